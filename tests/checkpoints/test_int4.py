"""Four-bit weights are restored within their scales, and damaged files are refused."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from wuerstchen.checkpoints.int4 import dequantize_groups, quantize_groups
from wuerstchen.errors import CheckpointError


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _sensitivity(columns: int) -> torch.Tensor:
    """Positive definite, and far from the identity: a few directions matter a hundred times as much."""
    directions = _normal(columns, columns, seed=1)
    directions[:4] *= 10
    return directions.T @ directions / columns + 0.01 * torch.eye(columns)


def _restored(weight: torch.Tensor, *arguments: object) -> torch.Tensor:
    return dequantize_groups(quantize_groups("w", weight, *arguments))["w"]  # type: ignore[arg-type]


def test_two_values_share_a_byte_and_every_group_has_a_scale() -> None:
    stored = quantize_groups("w", _normal(6, 64), 16)
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in stored.items()} == {
        "w": (torch.uint8, (6, 32)),
        "w.scale": (torch.float16, (6, 4)),
    }


def test_values_that_fit_the_grid_are_restored_exactly() -> None:
    """Catches halves, signs and groups that are mixed up between writing and reading."""
    levels = torch.randint(-8, 8, (5, 48), generator=torch.Generator().manual_seed(0)).float()
    levels[:, ::12] = -8  # every group uses its full range
    scales = torch.tensor([0.5, -2.0, 0.125, 8.0]).repeat_interleave(12)
    assert torch.equal(_restored(levels * scales, 12), levels * scales)
    stored = quantize_groups("w", levels * scales, 12)
    assert torch.equal(
        stored["w"] & 15,
        (
            levels[:, :24] * scales[:24].sign() * stored["w.scale"][:, :2].sign().repeat_interleave(12, 1) + 8
        ).to(torch.uint8),
    )


@settings(max_examples=40, deadline=None)
@given(st.floats(-3, 3), st.integers(0, 2**31 - 1), st.sampled_from([2, 8, 16]))
def test_the_error_is_less_than_plain_rounding_allows(exponent: float, seed: int, group_size: int) -> None:
    weight = _normal(3, 16, seed=seed) * 10**exponent
    error = (_restored(weight, group_size) - weight).square().view(3, -1, group_size).sum(2)
    step = weight.abs().view(3, -1, group_size).amax(2) / 7
    assert (error <= group_size * (step / 2).square() * 1.01).all()


def test_one_large_value_only_affects_its_group() -> None:
    weight = _normal(4, 64)
    plain = _restored(weight, 16)
    weight[:, 3] = 1000
    restored = _restored(weight, 16)
    assert torch.equal(restored[:, 16:], plain[:, 16:])
    assert not torch.equal(restored[:, :16], plain[:, :16])


def test_sensitivity_reduces_the_error_that_it_weighs() -> None:
    weight, matrix = _normal(50, 64), _sensitivity(64)

    def loss(restored: torch.Tensor) -> float:
        error = restored - weight
        return float(((error @ matrix) * error).sum())

    assert loss(_restored(weight, 32, matrix)) < 0.6 * loss(_restored(weight, 32))


def test_the_worst_rows_can_be_stored_exactly() -> None:
    weight = _normal(40, 64)
    weight[[7, 31], 5] = 30  # the scale of this value rounds all others in its group to 0
    stored = quantize_groups("w", weight, 32, None, 2)
    assert stored["w.exact_rows"].tolist() == [7, 31]
    assert stored["w.exact"].dtype == torch.float16
    restored = dequantize_groups(stored)
    assert restored.keys() == {"w"}
    assert torch.equal(restored["w"][[7, 31]], weight[[7, 31]].half().float())


def test_zeros_stay_zero() -> None:
    weight = _normal(3, 32)
    weight[1, :16] = 0
    weight[2] = 0
    for matrix in (None, _sensitivity(32)):
        restored = _restored(weight, 16, matrix, 1)
        assert torch.equal(restored[weight == 0], torch.zeros(48))
        assert torch.isfinite(restored).all()


def test_other_tensors_stay_as_they_are_and_a_file_changes_nothing() -> None:
    others = {"b": _normal(4), "i": torch.arange(3), "q": torch.ones(2, 2, dtype=torch.int8)}
    stored = quantize_groups("w", _normal(4, 8), 4, None, 1) | others
    restored = dequantize_groups(load(save(stored)))
    assert restored.keys() == {"w", *others}
    torch.testing.assert_close(restored, dequantize_groups(stored), rtol=0, atol=0)
    assert all(restored[key] is not None and torch.equal(restored[key], others[key]) for key in others)


@pytest.mark.parametrize(
    ("weight", "group_size", "message"),
    [
        (torch.ones(2, 7), 7, "an even number and a multiple of the group size, 7"),
        (torch.ones(2, 8), 3, "an even number and a multiple of the group size, 3"),
        (torch.full((2, 8), torch.nan), 4, "'w' contains NaN or infinity"),
        (torch.full((2, 8), torch.inf), 4, "'w' contains NaN or infinity"),
        (
            torch.full((2, 8), 1e6),
            4,
            r"'w' has a value of 1e\+06\. In 4 bits, values can be at most 6\.55e\+04",
        ),
    ],
)
def test_unsuitable_weights_are_refused(weight: torch.Tensor, group_size: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        quantize_groups("w", weight, group_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("w.scale"), "'w.scale' is missing"),
        (lambda s: s.update({"w.scale": torch.ones(4)}), r"'w.scale' is torch.float32 of shape \(4,\)"),
        (lambda s: s.update({"w.scale": torch.ones(3, 2)}), r"'w.scale' is .* of shape \(3, 2\)"),
        (lambda s: s.update({"w.scale": torch.ones(4, 0)}), r"'w.scale' is .* of shape \(4, 0\)"),
        (lambda s: s.update({"w.scale": torch.ones(4, 3)}), r"'w.scale' is .* of shape \(4, 3\)"),
        (lambda s: s.update({"w.scale": torch.ones(4, 32)}), r"'w.scale' is .* of shape \(4, 32\)"),
        (lambda s: s.update({"w.scale": torch.ones(4, 2, dtype=torch.int32)}), "'w.scale' is torch.int32"),
        (lambda s: s.update({"w.scale": torch.ones(4, 2, dtype=torch.uint8)}), "'w.scale' is torch.uint8"),
        (lambda s: s.update({"w.scale": torch.full((4, 2), torch.nan)}), "'w.scale' contains NaN"),
        (lambda s: s.update({"w.scale": torch.full((4, 2), 3e38)}), "too large for float32"),
        (
            lambda s: s.update({"w.scale": torch.full((4, 2), 1e300, dtype=torch.float64)}),
            "too large for float32",
        ),
        (
            lambda s: s.update({"w.scale": torch.full((4, 2), torch.nan).to(torch.float8_e4m3fn)}),
            "'w.scale' contains NaN",
        ),
        (
            lambda s: s.update({"w": s["w"][:, :7], "w.scale": torch.ones(4, 4)}),
            r"'w' of shape \(4, 7\) need",
        ),
        (lambda s: s.update(w=s["w"][0]), r"'w' of shape \(8,\) need"),
        (lambda s: s.update(w=s["w"].view(2, 2, 8)), r"'w' of shape \(2, 2, 8\) need"),
        (lambda s: s.update(w=torch.tensor(3, dtype=torch.uint8)), r"'w' of shape \(\) need"),
        (lambda s: s.pop("w.exact"), "'w.exact' and 'w.exact_rows' do not fit"),
        (lambda s: s.pop("w.exact_rows"), "'w.exact' and 'w.exact_rows' do not fit"),
        (lambda s: s.update({"w.exact_rows": torch.tensor([4], dtype=torch.int32)}), "do not fit"),
        (lambda s: s.update({"w.exact_rows": torch.tensor([-1], dtype=torch.int32)}), "do not fit"),
        (lambda s: s.update({"w.exact_rows": torch.tensor([2])}), "numbers as int32"),
        (lambda s: s.update({"w.exact_rows": torch.zeros(1, 1, dtype=torch.int32)}), "do not fit"),
        (lambda s: s.update({"w.exact": torch.ones(1, 8)}), r"do not fit 'w' of shape \(4, 16\)"),
        (lambda s: s.update({"w.exact": torch.ones(2, 16)}), "do not fit"),
        (lambda s: s.update({"w.exact": torch.ones(1, 16, dtype=torch.int8)}), "do not fit"),
        (lambda s: s.update({"w.exact": torch.full((1, 16), torch.inf)}), "must contain finite rows"),
        (
            lambda s: s.update({"w.exact": torch.full((1, 16), 1e300, dtype=torch.float64)}),
            "must contain finite rows",
        ),
        (
            lambda s: s.update({"w.exact": torch.ones(2, 16), "w.exact_rows": torch.ones(2).int()}),
            "different numbers",
        ),
    ],
)
def test_damaged_files_are_refused(change: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    stored = quantize_groups("w", _normal(4, 16), 8, None, 1)
    change(stored)
    with pytest.raises(CheckpointError, match=message) as caught:
        dequantize_groups(stored)
    assert "Download the file again" in str(caught.value)
