"""The compressor's layout, resizing of images, and what train() may and may not change."""

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from wuerstchen.errors import UserError
from wuerstchen.models.compressor import (
    BackboneName,
    Compressor,
    CompressorConfig,
    compressor_input,
    latent_side,
)


@pytest.fixture
def compressor() -> Compressor:
    """Lite0 with statistics that let a signal through random weights."""
    torch.manual_seed(0)
    compressor = Compressor(CompressorConfig(backbone="efficientnet_lite0"))
    with torch.no_grad():
        for module in compressor.backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(std=(2 / module.weight[0].numel()) ** 0.5)
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_(std=0.3)
    return compressor


@pytest.mark.parametrize(
    ("backbone", "keys", "parameters"),
    [
        ("efficientnet_v2_s", 786, 20_198_000),
        ("efficientnet_v2_l", 1552, 117_254_784),
        ("efficientnet_lite0", 300, 3_371_008 + 16 * 1280 + 32),
    ],
)
def test_counts(backbone: BackboneName, keys: int, parameters: int) -> None:
    with torch.device("meta"):
        compressor = Compressor(CompressorConfig(backbone=backbone))
    state = compressor.state_dict()
    assert len(state) == keys
    assert sum(p.numel() for p in compressor.parameters()) == parameters
    assert list(state)[-6:] == [
        "mapper.0.weight",
        "mapper.1.weight",
        "mapper.1.bias",
        "mapper.1.running_mean",
        "mapper.1.running_var",
        "mapper.1.num_batches_tracked",
    ]
    assert all(key.startswith("backbone.") for key in list(state)[:-6])
    assert state["mapper.0.weight"].shape == (16, 1280, 1, 1)


def test_published_key_of_the_stem() -> None:
    with torch.device("meta"):
        state = Compressor(CompressorConfig()).state_dict()
    assert state["backbone.0.0.weight"].shape == (24, 3, 3, 3)


def test_z_is_the_output_of_the_mappers_batch_norm(compressor: Compressor) -> None:
    compressor.eval()
    projection, batch_norm = compressor.mapper
    assert isinstance(projection, nn.Conv2d)
    assert isinstance(batch_norm, nn.BatchNorm2d)
    mean, variance = torch.randn(16), torch.rand(16) + 0.5
    with torch.no_grad():
        batch_norm.load_state_dict({"running_mean": mean, "running_var": variance}, strict=False)
        batch_norm.weight.normal_()
        batch_norm.bias.normal_()
        images = torch.rand(2, 3, 64, 96)
        z = compressor(images)
        features = compressor.backbone(images)
        projected = torch.einsum("bchw,dc->bdhw", features, projection.weight[:, :, 0, 0])

    def per_channel(x: torch.Tensor) -> torch.Tensor:
        return x.view(1, -1, 1, 1)

    expected = (projected - per_channel(mean)) / (per_channel(variance) + 1e-5).sqrt()
    expected = expected * per_channel(batch_norm.weight) + per_channel(batch_norm.bias)
    assert z.shape == (2, 16, 2, 3)
    assert expected.std() > 0.3  # the images' signal reaches the output
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)
    assert z.is_contiguous()


def test_train_leaves_the_backbone_in_eval_mode(compressor: Compressor) -> None:
    parent = nn.ModuleList([compressor])
    assert not any(module.training for module in compressor.backbone.modules())
    parent.train()
    assert compressor.training
    assert all(module.training for module in compressor.mapper.modules())
    assert not any(module.training for module in compressor.backbone.modules())
    parent.eval()
    assert not any(module.training for module in compressor.modules())


def test_training_updates_only_the_mappers_statistics(compressor: Compressor) -> None:
    before = {key: value.clone() for key, value in compressor.state_dict().items()}
    compressor.train()(torch.rand(4, 3, 64, 64))
    changed = {key for key, value in compressor.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"mapper.1.running_mean", "mapper.1.running_var", "mapper.1.num_batches_tracked"}

    before = {key: value.clone() for key, value in compressor.state_dict().items()}
    compressor.eval()(torch.rand(4, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in compressor.state_dict().items())


def test_features_are_the_same_in_training_and_inference(compressor: Compressor) -> None:
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(compressor.train().backbone(images), compressor.eval().backbone(images))


def test_a_training_step_reaches_every_weight(compressor: Compressor) -> None:
    images = torch.rand(4, 3, 64, 64)
    weights = torch.randn(4, 16, 2, 2)
    (compressor.train()(images) * weights).sum().backward()
    without = [name for name, p in compressor.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_latents_of_another_width() -> None:
    compressor = Compressor(CompressorConfig(backbone="efficientnet_lite0", c_latent=4)).eval()
    with torch.no_grad():
        assert compressor(torch.rand(1, 3, 33, 65)).shape == (1, 4, latent_side(33), latent_side(65))


@pytest.mark.parametrize(("side", "positions"), [(384, 12), (400, 13), (768, 24), (192, 6), (100, 4), (1, 1)])
def test_latent_side(side: int, positions: int) -> None:
    assert latent_side(side) == positions


@pytest.mark.parametrize("scale", [0.75, 0.375])
def test_the_input_is_an_antialiased_bilinear_resize(scale: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    view = compressor_input(images, scale=scale)
    expected = Image.fromarray(pixels).resize((int(96 * scale), int(64 * scale)), Image.Resampling.BILINEAR)
    assert view.shape == (1, 3, int(64 * scale), int(96 * scale))
    found = view[0].permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(
        found, np.asarray(expected, dtype=np.float32), atol=1.01
    )  # Pillow rounds twice


def test_the_input_is_three_quarters_by_default() -> None:
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(
        compressor_input(images), F.interpolate(images, size=48, mode="bilinear", antialias=True)
    )
    assert compressor_input(torch.rand(1, 3, 1024, 512)).shape == (1, 3, 768, 384)


@pytest.mark.parametrize("scale", [0.0, -1.0, 0.001])
def test_a_scale_without_pixels_is_refused(scale: float) -> None:
    with pytest.raises(UserError, match=rf"^scale is too small for images of 64×32: {scale}\. .* 0\.75"):
        compressor_input(torch.rand(1, 3, 32, 64), scale=scale)


def test_an_unknown_backbone_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without the type checker
    with pytest.raises(
        UserError, match=r"^backbone must be one of efficientnet_v2_s, .*lite0, got 'resnet50'"
    ):
        CompressorConfig(backbone="resnet50")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(UserError, match=r"^c_latent must be at least 1, got 0"):
        CompressorConfig(c_latent=0)


@pytest.mark.parametrize("depths", [(), (8, 16)])
def test_the_backbone_is_called_as_a_module(depths: tuple[int, ...]) -> None:
    """Compilation and FSDP wrap the call. A method of the backbone runs uncompiled."""
    compressor = Compressor(CompressorConfig(backbone="efficientnet_lite0", depths=depths)).eval()
    calls: list[nn.Module] = []
    compressor.backbone.register_forward_hook(lambda module, *_: calls.append(module))
    compressor(torch.rand(1, 3, 32, 32))
    assert calls == [compressor.backbone]


def test_depths_reach_the_mapper_folded_onto_its_grid() -> None:
    torch.manual_seed(0)
    compressor = Compressor(CompressorConfig(backbone="efficientnet_lite0", depths=(8, 16))).eval()
    projection = compressor.mapper[0]
    assert isinstance(projection, nn.Conv2d)
    assert projection.weight.shape == (16, 1280 + 16 * 40 + 4 * 112, 1, 1)
    images = torch.rand(1, 3, 72, 96)
    with torch.no_grad():
        maps = compressor.backbone.feature_maps(images)
        torch.nn.init.zeros_(projection.weight)
        projection.weight[0, 1280 + 16 * 3 + 4 * 2 + 1] = 1  # channel 3 at stride 8, row 2 and column 1 of 4
        projection.weight[1, 1280 + 16 * 40 + 4 * 7 + 2] = (
            1  # channel 7 at stride 16, row 1 and column 0 of 2
        )
        projected = compressor.mapper[0](
            torch.cat([torch.zeros(1, 1280, 3, 3), *_folded_by_hand(maps)], dim=1)
        )
        z = compressor(images)
    # 72 pixels are 9 rows at stride 8: the third row of the grid has one of its four, and zeros.
    eight = F.pad(maps[2][:, 3], (0, 0, 0, 3))[:, 2::4, 1::4]
    sixteen = F.pad(maps[3][:, 7], (0, 0, 0, 1))[:, 1::2, 0::2]
    torch.testing.assert_close(projected[:, 0], eight)
    torch.testing.assert_close(projected[:, 1], sixteen)
    norm = compressor.mapper[1]
    torch.testing.assert_close(z[:, :2], projected[:, :2] / (1 + norm.eps) ** 0.5)


def _folded_by_hand(maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every factor × factor cell of the features at strides 8 and 16 as channels, row by row."""
    folded = []
    for x, factor in ((maps[2], 4), (maps[3], 2)):
        padded = F.pad(x, (0, -x.shape[3] % factor, 0, -x.shape[2] % factor))
        cells = [padded[:, :, i::factor, j::factor] for i in range(factor) for j in range(factor)]
        folded.append(torch.stack(cells, dim=2).flatten(1, 2))
    return folded


@pytest.mark.parametrize(
    ("backbone", "depths"), [("efficientnet_lite0", (16, 8)), ("efficientnet_v2_s", (8,))]
)
def test_unsupported_depths_are_refused(backbone: BackboneName, depths: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"^depths must be a subset of \(4, 8, 16\) in this order"):
        CompressorConfig(backbone=backbone, depths=depths)
