"""The compressor alone: its published forms, its scale, and files of other networks."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import wuerstchen
from wuerstchen.checkpoints import compressors, hub
from wuerstchen.checkpoints.compressors import (
    PUBLISHED_COMPRESSOR,
    check_scale,
    fits_published,
    read_compressor,
)
from wuerstchen.checkpoints.layouts import Sources, convert, read_model
from wuerstchen.checkpoints.native import Provenance, write_network
from wuerstchen.checkpoints.original import write_original
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models import compressor as module
from wuerstchen.models.cascade import PUBLISHED_V1, CascadeSettings
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.efficientnet import EFFICIENTNET_V2_S, EfficientNetV2

from ..configurations import ORIGINAL_DECODER, narrow

NARROW = narrow(EFFICIENTNET_V2_S)


@pytest.fixture(scope="module", autouse=True)
def narrow_backbone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EFFICIENTNET_V2_S", NARROW)
        yield


class EfficientNetEncoder(ModelMixin, ConfigMixin):
    """As in diffusers' training script, with a narrow backbone."""

    @register_to_config
    def __init__(self, c_latent=16, c_cond=1280, effnet="efficientnet_v2_s", affine=True):
        super().__init__()
        self.backbone = EfficientNetV2(NARROW)
        self.mapper = nn.Sequential(
            nn.Conv2d(32, c_latent, kernel_size=1, bias=False), nn.BatchNorm2d(c_latent, affine=affine)
        )


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    encoder = EfficientNetEncoder(c_latent=4).eval()  # as the small published model
    with torch.no_grad():
        encoder.mapper[1].weight.fill_(40.0)
        encoder.mapper[1].running_mean.normal_()
    return encoder


@pytest.fixture(scope="module")
def published(encoder, tmp_path_factory) -> Path:
    """A folder like that on the hub."""
    folder = tmp_path_factory.mktemp("hub") / "EfficientNetEncoder"
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_without(write_published, tmp_path_factory) -> Path:
    """The published diffusers folders, which have no compressor."""
    return write_published(tmp_path_factory.mktemp("published"))


def same(found: Compressor | None, encoder: nn.Module) -> bool:
    assert found is not None
    theirs = encoder.state_dict()
    return found.state_dict().keys() == theirs.keys() and all(
        torch.equal(t, theirs[k]) for k, t in found.state_dict().items()
    )


def test_the_forms_of_a_compressor(encoder, published, tmp_path):
    assert json.loads((published / "config.json").read_text())["_class_name"] == "EfficientNetEncoder"
    assert same(read_compressor(published), encoder)
    weights = published / "diffusion_pytorch_model.safetensors"
    assert same(read_compressor(weights), encoder)
    half = read_compressor(published, dtype=torch.float16)
    assert half.mapper[0].weight.dtype == torch.float16
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    assert same(read_compressor(tmp_path / "pytorch_model.bin"), encoder)
    ours = Compressor(CompressorConfig(c_latent=4))
    ours.load_state_dict(encoder.state_dict())
    origin = Provenance(recipe="test", seed=0, images=0, data="")
    write_network(ours, tmp_path / "compressor.safetensors", origin)
    assert same(read_compressor(tmp_path / "compressor.safetensors"), encoder)
    assert same(read_compressor(tmp_path), encoder)
    original = tmp_path / "original"
    write_original({"decoder": Decoder(ORIGINAL_DECODER), "compressor": ours}, original)
    torch.save({"state_dict": {"x": torch.ones(1)}}, original / "another.pt")  # is not read
    assert same(read_compressor(original), encoder)
    assert same(read_compressor(original / "model_v2_stage_b.pt"), encoder)
    torch.save(encoder.state_dict(), tmp_path / "extracted.pt")
    assert same(read_compressor(tmp_path / "extracted.pt"), encoder)


def test_only_its_files_are_downloaded(published, encoder, monkeypatch):
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["allow_patterns"]))
        return str(published)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert same(read_compressor(PUBLISHED_COMPRESSOR), encoder)
    (name, patterns), *_ = asked
    assert name == "warp-ai/EfficientNetEncoder"
    assert {"config.json", "diffusion_pytorch_model.safetensors", "model_v2_stage_b.pt"} < set(patterns)
    assert not any("*" in pattern for pattern in patterns)


def test_stable_cascade_s_is_refused_with_the_reason(tmp_path):
    theirs = EfficientNetEncoder(affine=False)
    save_file(theirs.state_dict(), tmp_path / "effnet_encoder.safetensors")
    theirs.save_pretrained(tmp_path / "folder")
    for place in ("effnet_encoder.safetensors", "folder"):
        with pytest.raises(
            CheckpointError, match=r"Stable Cascade: its last batch norm has no learned weight"
        ):
            read_compressor(tmp_path / place)


def test_what_is_no_compressor(published, tmp_path, model_without):
    backbone = {f"features.{k}": t for k, t in EfficientNetV2(NARROW).state_dict().items()}
    torch.save(backbone, tmp_path / "efficientnet_v2_s.pth")
    assert read_compressor(tmp_path / "efficientnet_v2_s.pth") is None
    torch.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "stage.pt")
    for source in (tmp_path, tmp_path / "stage.pt", model_without):
        with pytest.raises(CheckpointError, match=r"has no compressor\. Use warp-ai/EfficientNetEncoder"):
            read_compressor(source)
    with pytest.raises(CheckpointError, match="nowhere"):
        read_compressor("nowhere/at.all.pt")
    with pytest.raises(CheckpointError, match=r"contains a 'WuerstchenPrior', not a compressor"):
        read_compressor(model_without / "prior_pipeline" / "prior")
    tensors = load_file(published / "diffusion_pytorch_model.safetensors")
    for key, value, message in (
        ("mapper.0.weight", torch.ones(4, 31, 1, 1), r"mapper\.0\.weight"),
        ("backbone.0.0.weight", None, "keys"),
        ("backbone.0.1.weight", None, r"backbone\.0\.1\.weight"),
        ("extra", torch.ones(1), "'extra' is not a key of this compressor"),
    ):
        changed = {k: t for k, t in tensors.items() if k != key}
        save_file(changed | ({} if value is None else {key: value}), tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=message):
            read_compressor(tmp_path / "x.safetensors")


def test_the_scale_of_the_latents():
    """The bundled compressor shows that the norm's weights are the scale that images have."""
    bundled = wuerstchen.load(device="cpu")
    statistics, compressor = bundled.cascade.settings.latent_statistics, bundled.cascade.compressor
    check_scale(compressor, statistics, "bundled")
    ratio = compressor.mapper[1].weight / torch.tensor(statistics.std)
    assert (ratio - 1).abs().max() < 0.05
    image = Image.open(Path(wuerstchen.__file__).parents[2] / "docs" / "demo.webp").convert("RGB")
    pixels = torch.stack([wuerstchen.images.to_tensor(image.resize((256, 256))), torch.rand(3, 256, 256)])
    z = statistics.normalise(bundled.encode(compressor, pixels))
    assert 0.3 < float(z.std()) < 3
    with pytest.raises(UserError, match=r"is the compressor of another model: .* deviation of 0\.08"):
        check_scale(compressor, CascadeSettings().latent_statistics, "bundled")
    untrained = Compressor(CompressorConfig())
    with pytest.raises(UserError, match=r"deviation of 0\.0238 .* must be about 1, from 0\.1 to 10"):
        check_scale(untrained, CascadeSettings().latent_statistics, "x")
    nn.init.constant_(untrained.mapper[1].weight, 42.0)
    check_scale(untrained, PUBLISHED_V1.latent_statistics, "x")  # v1 has no scale of its own


def test_a_model_without_takes_one_from_elsewhere(published, encoder, model_without, tmp_path):
    sources = Sources(compressor=published)
    found = read_model(model_without, sources)
    assert same(found.compressor, encoder)
    assert read_model(model_without, sources, leave_out=["compressor"]).compressor is None
    convert(model_without, tmp_path / "native", "native", sources)
    assert same(read_model(tmp_path / "native").compressor, encoder)
    with pytest.raises(UserError, match="has a compressor, which its Stage B was trained with"):
        read_model(tmp_path / "native", sources)
    wrong = EfficientNetEncoder(c_latent=4)
    wrong.save_pretrained(tmp_path / "untrained")
    with pytest.raises(UserError, match="untrained is the compressor of another model"):
        read_model(model_without, Sources(compressor=tmp_path / "untrained"))
    wide = EfficientNetEncoder()
    nn.init.constant_(wide.mapper[1].weight, 40.0)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(
        UserError, match="compressor has 16 channels of semantic latents, but the decoder has 4"
    ):
        read_model(model_without, Sources(compressor=tmp_path / "wide"))


def test_the_published_one_is_fetched_when_it_is_needed(published, encoder, model_without, monkeypatch):
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    model = wuerstchen.load(model_without, device="cpu")
    with pytest.raises(UserError, match=r"this model has no compressor, .* --compressor"):
        model.reconstruct(image)
    # A small Stage B counts as the published one here.
    monkeypatch.setattr("wuerstchen.reconstruction.fits_published", lambda *_: True)

    def offline(*_, **__):
        raise CheckpointError("offline.")

    with monkeypatch.context() as patch:
        patch.setattr(compressors, "local_folder", offline)
        with pytest.raises(CheckpointError, match=r"the published one cannot be used: offline\. Give a copy"):
            model.reconstruct(image)
    monkeypatch.setattr(compressors, "local_folder", lambda name, **_: published)
    assert model.reconstruct(image).image.size == (model.cascade.settings.image_size,) * 2
    assert same(model.cascade.compressor, encoder)


def test_only_models_like_the_published_one_take_it():
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig())
    settings = CascadeSettings()
    assert fits_published(decoder, settings)
    assert not fits_published(Decoder(ORIGINAL_DECODER), settings)
    assert not fits_published(decoder, PUBLISHED_V1)
    assert not fits_published(decoder, dataclasses.replace(settings, view_scale=1.0))
    assert not fits_published(None, settings)
    assert hub.HUB_NAME.fullmatch(PUBLISHED_COMPRESSOR)
