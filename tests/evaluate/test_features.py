"""Features are what the published network gives for the resized image, whatever is beside it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wuerstchen.checkpoints.backbones import lite0_path, lite1_path
from wuerstchen.errors import UserError
from wuerstchen.evaluate.features import DETAIL, POOLED, FeatureNetwork, Features
from wuerstchen.models.efficientnet import (
    EFFICIENTNET_LITE0,
    EFFICIENTNET_LITE1,
    EfficientNetConfig,
    EfficientNetLite,
)


@pytest.fixture(scope="module")
def lite1() -> FeatureNetwork:
    try:
        return FeatureNetwork("efficientnet_lite1")
    except UserError as error:
        pytest.skip(str(error))


def squares(count: int, side: int) -> Tensor:
    """Coarse coloured squares: noise would look the same to the network everywhere."""
    coarse = torch.randint(0, 256, (count, 6, 6, 3), generator=torch.Generator().manual_seed(0))
    return coarse.repeat_interleave(side // 6, 1).repeat_interleave(side // 6, 2).to(torch.uint8)


@pytest.mark.parametrize(
    ("name", "config", "find", "side"),
    [
        ("efficientnet_lite0", EFFICIENTNET_LITE0, lite0_path, 224),
        ("efficientnet_lite1", EFFICIENTNET_LITE1, lite1_path, 240),
    ],
)
def test_features_are_those_of_a_direct_forward(
    name: str, config: EfficientNetConfig, find: Callable[[], Path], side: int
) -> None:
    """Catches weights, modes, channel orders, scales and maps that were mixed up."""
    try:
        weights = torch.load(find(), weights_only=True)
    except UserError as error:
        pytest.skip(str(error))
    network = EfficientNetLite(config)
    network.load_state_dict({key: value for key, value in weights.items() if not key.startswith("_fc")})
    images = torch.nn.functional.pad(squares(2, 222), (0, 0, *[(side - 222) // 2] * 4))
    assert images.shape == (2, side, side, 3)
    with torch.no_grad():
        network.eval()
        x = torch.stack([images[..., channel] for channel in range(3)], 1) / 255
        head, maps = network(x), network.feature_maps(x)
    found = FeatureNetwork(name, batch_size=1)(images)  # type: ignore[arg-type]
    assert found.pooled.shape == (2, POOLED)
    assert found.detail.shape == (2, DETAIL)
    torch.testing.assert_close(found.pooled, head.flatten(2).mean(2), atol=1e-4, rtol=1e-4)
    middle = torch.stack([x.flatten(2).std(2) for x in maps[1:2]])[0]
    start = 4 * 320 + 9 * 112 + 2 * 16 + 24
    torch.testing.assert_close(found.detail[:, start : start + 24], middle, atol=1e-4, rtol=1e-4)
    if side == 240:
        top_left, bottom_right = maps[4][:, :, :4, :4].mean((2, 3)), maps[4][:, :, 4:, 4:].mean((2, 3))
        torch.testing.assert_close(found.detail[:, 0:1280:4], top_left, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.detail[:, 3:1280:4], bottom_right, atol=1e-4, rtol=1e-4)
        center = maps[3][:, :, 5:10, 5:10].mean((2, 3))
        torch.testing.assert_close(found.detail[:, 1284:2288:9], center, atol=1e-4, rtol=1e-4)


def test_an_image_has_its_features_beside_any_other_and_at_any_place(lite1: FeatureNetwork) -> None:
    """Catches a last batch that is lost, an order that changes, and statistics taken over the batch."""
    images = [*squares(9, 96), squares(1, 300)[0][:, :200]]
    together = lite1(images)
    assert together.pooled.shape == (10, POOLED)
    for place in (0, 7, 8, 9):
        alone = lite1([images[place]])
        torch.testing.assert_close(together.pooled[place], alone.pooled[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.detail[place], alone.detail[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(lite1(images).pooled, together.pooled)


def test_what_is_too_fine_to_see_is_grey(lite1: FeatureNetwork) -> None:
    """Catches a resize without a filter, which would show a fine chessboard as black, white or stripes."""
    y, x = torch.meshgrid(torch.arange(960), torch.arange(960), indexing="ij")
    board = (((x + y) % 2) * 255).to(torch.uint8)[..., None].expand(-1, -1, 3)
    grey = torch.full((240, 240, 3), 128, dtype=torch.uint8)
    features = lite1([board, grey, torch.zeros_like(grey)]).pooled
    assert (features[0] - features[1]).norm() < 0.1 * (features[2] - features[1]).norm()


def test_joined_keeps_images_and_vectors_together() -> None:
    parts = [
        Features(pooled=torch.full((n, 2), 1.0 * n), detail=torch.full((n, 3), -1.0 * n)) for n in (1, 2)
    ]
    joined = Features.joined(parts)
    assert joined.pooled[:, 0].tolist() == [1, 2, 2]
    assert joined.detail[:, 0].tolist() == [-1, -2, -2]
