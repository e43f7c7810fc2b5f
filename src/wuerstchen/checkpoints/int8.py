"""Weights stored as float16, or as int8 with one scale per row, a quarter of the size of fp32. The bundled
model uses int8."""

import torch
from torch import Tensor

from wuerstchen.errors import CheckpointError

_LEVELS = 127
_UNQUANTIZED = 0.005
_FLOAT16_MAX = torch.finfo(torch.float16).max


def in_float16(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts floating-point tensors to float16. Raises ``CheckpointError`` for values that would become
    infinite."""
    stored = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    for key, tensor in stored.items():
        if tensor.is_floating_point() and bool((tensor.isinf() & state[key].isfinite()).any()):
            raise CheckpointError(
                f"{key} has a value of {float(state[key].abs().max()):.3g}, and float16 stores at most "
                f"{_FLOAT16_MAX:.0f}. Use storage float32."
            )
    return stored


def quantize_rows(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantizes weight matrices to int8 by row, and stores everything else in half precision if possible.

    A floating-point matrix ``(rows, columns)`` or convolution ``(out, in, h, w)`` becomes int8 under its own
    key, with a new key ``KEY.scale`` (float16, one per row): ``weight ≈ int8 · scale``. The error is at most
    half a scale, where ``scale = max|row| / 127``, rounded up. Tensors with a single row, such as gains of
    shape ``(1, 1, 1, c)``, are not quantized, nor are the smallest matrices, up to 0.5 % of all values: first
    layers, last layers and depthwise convolutions, which would cause half of the error. They and all other
    floating-point tensors become float16 if the relative error of every value is at most 0.001, otherwise
    float32. Integers and booleans are not changed.

    Raises ``CheckpointError`` for NaN, infinity, values too large for a float16 scale, int8 input, and keys
    that would collide.
    """
    stored: dict[str, Tensor] = {}
    small = _smallest_matrices(state)
    for key, tensor in state.items():
        if tensor.dtype == torch.int8:
            raise CheckpointError(f"tensor {key!r} is already int8. Dequantize the state first.")
        if not tensor.is_floating_point():
            stored[key] = tensor
            continue
        weight = tensor.float()
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"tensor {key!r} contains NaN or infinity. Use weights from before the run diverged."
            )
        if _is_matrix(tensor) and key not in small:
            if f"{key}.scale" in state:
                raise CheckpointError(
                    f"tensor '{key}.scale' has the name that the scale of {key!r} needs. Rename one of them."
                )
            stored[key], stored[f"{key}.scale"] = _quantize(key, weight)
        else:
            stored[key] = half_if_exact_enough(weight)
    return stored


def dequantize(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``quantize_rows``: the same keys and shapes, floating-point tensors as float32.

    Raises ``CheckpointError`` if the scale of int8 weights is missing, has another length, or is not finite.
    """
    restored: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith(".scale") and _is_int8(state, key.removesuffix(".scale")):
            continue
        if tensor.dtype == torch.int8:
            scale = state.get(f"{key}.scale")
            if (
                scale is None
                or tensor.ndim == 0
                or scale.shape != tensor.shape[:1]
                or not scale.is_floating_point()
            ):
                found = "missing" if scale is None else f"{scale.dtype} of shape {tuple(scale.shape)}"
                raise CheckpointError(
                    f"'{key}.scale' is {found}. The int8 weights {key!r} of shape {tuple(tensor.shape)} need "
                    "a floating-point scale for each row. Download the file again."
                )
            scale = scale.float()
            if not bool(torch.isfinite(scale * (_LEVELS + 1)).all()):
                raise CheckpointError(
                    f"tensor '{key}.scale' contains NaN, infinity, or values too large for float32. Download "
                    "the file again."
                )
            restored[key] = tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
        elif tensor.is_floating_point():
            restored[key] = tensor.float()
        else:
            restored[key] = tensor
    return restored


def _is_matrix(tensor: Tensor) -> bool:
    floating = tensor.is_floating_point()
    return floating and tensor.ndim in (2, 4) and tensor.shape[0] > 1 and tensor.numel() > 0


def _smallest_matrices(state: dict[str, Tensor]) -> set[str]:
    room = _UNQUANTIZED * sum(tensor.numel() for tensor in state.values())
    found: set[str] = set()
    for key in sorted(filter(lambda key: _is_matrix(state[key]), state), key=lambda key: state[key].numel()):
        room -= state[key].numel()
        if room < 0:
            break
        found.add(key)
    return found


def _is_int8(state: dict[str, Tensor], key: str) -> bool:
    return key in state and state[key].dtype == torch.int8


def _quantize(key: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = weight.flatten(1).abs().amax(1)
    exact = largest / _LEVELS
    if bool((exact > _FLOAT16_MAX).any()):
        raise CheckpointError(
            f"tensor {key!r} has a value of {float(largest.max()):.3g}. With a float16 scale, values can be "
            f"at most {_FLOAT16_MAX * _LEVELS:.3g}. Use weights from before the run diverged."
        )
    scale = exact.to(torch.float16)
    # A scale that is rounded down would clip the largest value of the row, or all of a tiny row.
    too_small = scale.float() < exact
    scale = torch.where(too_small, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    divisor = torch.where(scale == 0, torch.ones_like(exact), scale.float())  # rows of zeros
    levels = (weight / divisor.view(-1, *[1] * (weight.ndim - 1))).round()
    return levels.to(torch.int8).contiguous(), scale


def half_if_exact_enough(tensor: Tensor) -> Tensor:
    """The tensor in float16 if the relative error of every value is at most 0.001, otherwise as it is."""
    half = tensor.to(torch.float16)
    return half if bool(((half.float() - tensor).abs() <= 1e-3 * tensor.abs()).all()) else tensor
