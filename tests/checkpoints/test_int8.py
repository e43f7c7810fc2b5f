import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from wuerstchen.checkpoints.int8 import dequantize, quantize_rows
from wuerstchen.errors import CheckpointError


def _normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) * scale


def test_rows_are_restored_to_half_a_scale_of_their_own() -> None:
    weight = _normal(5, 40)
    weight[0] *= 1000  # one scale for the whole matrix would wipe out the other rows
    stored = quantize_rows({"w": weight})
    assert stored["w"].dtype == torch.int8
    assert stored["w.scale"].dtype == torch.float16
    assert stored["w.scale"].shape == (5,)
    restored = dequantize(stored)
    assert restored.keys() == {"w"}
    error = (restored["w"] - weight).abs().double().numpy()
    bound = weight.abs().amax(1, keepdim=True).double().numpy() / 127 * (1 + 2**-10) / 2
    assert np.all(error <= bound + 1e-7)


def test_every_row_uses_its_full_range_and_never_wraps() -> None:
    weight = _normal(300, 17, scale=0.05)
    levels = quantize_rows({"w": weight})["w"].int()
    assert levels.abs().max() <= 127
    assert (levels.abs().amax(1) >= 126).all()


def test_convolutions_go_by_output_channel() -> None:
    weight = _normal(4, 3, 3, 3)
    weight[2] *= 50
    stored = quantize_rows({"conv.weight": weight})
    assert stored["conv.weight.scale"].shape == (4,)
    restored = dequantize(stored)["conv.weight"]
    assert restored.shape == weight.shape
    for channel in range(4):
        bound = float(weight[channel].abs().max()) / 127
        assert float((restored[channel] - weight[channel]).abs().max()) <= bound


def test_zero_rows_stay_zero() -> None:
    weight = _normal(3, 4)
    weight[1] = 0
    restored = dequantize(quantize_rows({"w": weight}))["w"]
    assert torch.equal(restored[1], torch.zeros(4))
    assert torch.isfinite(restored).all()


@settings(max_examples=60, deadline=None)
@given(st.floats(-12, 6), st.integers(0, 2**31 - 1))
def test_rows_of_any_size_keep_the_promised_error(exponent: float, seed: int) -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    stored = quantize_rows({"w": weight})
    error = (dequantize(stored)["w"] - weight).abs()
    # Half a scale, and the scale is at most one float16 step (2^-10, or 2^-24 near zero) above max / 127.
    bound = (weight.abs().amax(1, keepdim=True) / 127 * (1 + 2**-10) + 2**-24) / 2
    assert (error <= bound * (1 + 1e-5)).all()


def test_gains_biases_and_buffers_are_not_quantized() -> None:
    state = {
        "bias": _normal(7),
        "grn.gamma": _normal(1, 1, 1, 9),
        "tiny": torch.tensor([1e-9, 1.0]),  # would vanish in float16
        "huge": torch.tensor([1e9]),  # would overflow in float16
        "steps": torch.tensor([3, 4]),
        "flag": torch.tensor(True),
    }
    stored = quantize_rows(state)
    assert stored.keys() == state.keys()
    assert stored["bias"].dtype == stored["grn.gamma"].dtype == torch.float16
    assert stored["tiny"].dtype == stored["huge"].dtype == torch.float32
    assert stored["steps"].dtype == torch.int64
    assert stored["flag"].dtype == torch.bool
    restored = dequantize(stored)
    for key, tensor in state.items():
        torch.testing.assert_close(restored[key], tensor, rtol=1e-3, atol=0)


def test_the_smallest_matrices_are_not_quantized() -> None:
    """Catches a stem or a depthwise convolution of a few values in int8, which doubles a network's error."""
    state = {
        "body": _normal(100, 100),
        "stem": _normal(2, 3, 3, 1),
        "head": _normal(3, 6),
        "next": _normal(4, 5),  # 56 values with it, more than 0.5 % of the 10,066
        "bias": _normal(10),
    }
    stored = quantize_rows(state)
    assert {key for key, tensor in stored.items() if tensor.dtype == torch.int8} == {"body", "next"}
    assert {key for key in stored if key.endswith(".scale")} == {"body.scale", "next.scale"}
    assert stored["stem"].dtype == stored["head"].dtype == torch.float16
    restored = dequantize(stored)
    for key in ("stem", "head"):
        torch.testing.assert_close(restored[key], state[key], rtol=1e-3, atol=0)


def test_all_float_types_come_back_as_float32() -> None:
    weight = _normal(4, 6)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        restored = dequantize(quantize_rows({"w": weight.to(dtype), "b": weight[0].to(dtype)}))
        assert {t.dtype for t in restored.values()} == {torch.float32}


def test_a_parameter_that_is_called_scale_survives() -> None:
    state = {"norm.scale": _normal(4), "norm": _normal(4)}
    restored = dequantize(quantize_rows(state))
    torch.testing.assert_close(restored, state, rtol=1e-3, atol=0)


def test_survives_a_file() -> None:
    state = {"w": _normal(4, 6).T, "b": _normal(4), "n": torch.arange(3)}
    stored = quantize_rows(state)
    again = load(save(stored))
    torch.testing.assert_close(dequantize(again), dequantize(stored), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(3, 4), (4,)])
def test_refuses_nan_and_infinity(bad: float, shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    weight[0] = bad
    with pytest.raises(CheckpointError, match=r"^tensor 'a\.w' contains NaN or infinity. "):
        quantize_rows({"a.w": weight})


def test_refuses_values_over_the_range_of_the_scale() -> None:
    with pytest.raises(CheckpointError, match=r"'w' has a value of 1e\+10.* at most 8\.32e\+06"):
        quantize_rows({"w": torch.full((2, 2), 1e10)})


def test_refuses_what_is_quantized_already() -> None:
    with pytest.raises(CheckpointError, match="'w' is already int8"):
        quantize_rows(quantize_rows({"w": _normal(2, 3)}))


def test_refuses_names_that_collide() -> None:
    with pytest.raises(CheckpointError, match=r"'w\.scale' has the name that the scale of 'w' needs"):
        quantize_rows({"w": _normal(2, 3), "w.scale": _normal(2)})


def test_refuses_damaged_scales() -> None:
    stored = quantize_rows({"w": _normal(2, 3)})
    with pytest.raises(CheckpointError, match=r"'w\.scale' is missing\. .* Download the file again"):
        dequantize({"w": stored["w"]})
    with pytest.raises(CheckpointError, match=r"'w\.scale' is torch\.float16 of shape \(3,\)"):
        dequantize({"w": stored["w"], "w.scale": torch.ones(3, dtype=torch.float16)})
    with pytest.raises(CheckpointError, match=r"'w\.scale' contains NaN"):
        dequantize({"w": stored["w"], "w.scale": torch.full((2,), torch.nan, dtype=torch.float16)})
    with pytest.raises(CheckpointError, match=r"'w\.scale' contains .* too large for float32"):
        dequantize({"w": stored["w"], "w.scale": torch.full((2,), 3e38)})
    with pytest.raises(CheckpointError, match=r"'w\.scale' is torch\.complex64"):
        dequantize({"w": stored["w"], "w.scale": torch.ones(2, dtype=torch.complex64)})
