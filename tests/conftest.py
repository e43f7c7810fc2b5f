"""What several test files share."""

import hashlib

import pytest
import torch
from torch import nn


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
