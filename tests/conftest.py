"""What several test files share."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from wuerstchen.checkpoints.native import Provenance, write_cascade
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.models.cascade import Cascade, CascadeSettings, MapStatistics
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.vqgan import VQGAN, VQGANConfig
from wuerstchen.pipeline import BUNDLED


def _fill(name: str, tensor: torch.Tensor) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    draw = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if name.endswith("running_var"):
        return draw.abs() + 0.5
    fan_in = max(tensor[0].numel(), 1) if tensor.ndim > 1 else 25
    return draw / fan_in**0.5


@pytest.fixture
def randomise():
    """Fills every weight and statistic of a module, those that start at zero too, by its name.

    Parts that start at zero would hide errors behind them.
    """

    def fill(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(_fill(name, tensor))
        return module

    return fill


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖ over the whole tensor, in fp64."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


@pytest.fixture(name="relative_error")
def relative_error_fixture():
    return relative_error


@pytest.fixture
def assert_same_gradients():
    """Compares parameter by parameter. What is zero in exact arithmetic (a key's bias) is only rounding."""

    def check(ours: nn.Module, theirs: nn.Module, but: tuple[str, ...] | list[str] = ()) -> None:
        reference = {name: p.grad.double() for name, p in theirs.named_parameters() if p.grad is not None}
        total = torch.stack([g.norm() for g in reference.values()]).norm()
        compared = {name: p.grad for name, p in ours.named_parameters() if name not in but}
        assert set(compared) == set(reference) - set(but)
        for name, gradient in compared.items():
            error = (gradient.double() - reference[name]).norm()
            assert error <= 1e-4 * reference[name].norm() + 1e-7 * total, name

    return check


@pytest.fixture(scope="session")
def small_cascade() -> Cascade:
    """A whole model of random weights, every part of it tiny but the text encoder."""
    torch.manual_seed(0)
    cascade = Cascade(
        settings=CascadeSettings(
            image_size=128,
            map_statistics=MapStatistics(mean=(0.5, -1.0), std=(2.0, 3.0)),
            text_mask=True,
            prior_steps=3,
            decoder_steps=2,
        ),
        vqgan=VQGAN(VQGANConfig(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16)),
        decoder=Decoder(
            DecoderConfig(
                c_r=8,
                c_cond=8,
                c_hidden=(8, 8),
                nhead=(-1, -1),
                blocks=(1, 1),
                level_config=("CT", "CT"),
                inject_effnet=(False, True),
                effnet_embd=2,
                clip_embd=None,
            )
        ),
        compressor=Compressor(CompressorConfig(backbone="efficientnet_lite0", c_latent=2)),
        prior=Prior(PriorConfig(c_in=2, c=16, c_cond=384, c_r=8, depth=1, nhead=2)),
        text_encoder=read_text_encoder(BUNDLED / "text_encoder"),
    )
    for part in (cascade.decoder, cascade.prior):
        assert part is not None
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                if not parameter.any():
                    parameter.copy_(0.1 * _fill(name, parameter))
    return cascade


@pytest.fixture(scope="session")
def model_folder(small_cascade: Cascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small_cascade`` on disk."""
    folder = tmp_path_factory.mktemp("models") / "small"
    provenance = Provenance(recipe="test", seed=1, images=2, data="none")
    parts = dict.fromkeys(("vqgan", "decoder", "compressor", "prior"), provenance)
    write_cascade(small_cascade, folder, parts, text_encoder=BUNDLED / "text_encoder")
    return folder
