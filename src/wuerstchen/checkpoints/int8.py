"""Weights stored as int8 with a scale a row: a quarter of the size of fp32, for what ships in the package."""

import torch
from torch import Tensor

from wuerstchen.errors import CheckpointError

_LEVELS = 127
_FLOAT16_MAX = torch.finfo(torch.float16).max


def quantize_rows(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Store weight matrices as int8 by row, everything else as it was or in half precision.

    A floating 2-D tensor ``(rows, columns)`` or 4-D convolution ``(out, in, h, w)`` becomes int8 under its
    own key, with ``KEY.scale`` (float16, one a row) beside it: ``weight ≈ int8 · scale``, off by at most half
    a scale, where ``scale = max|row| / 127`` rounded up. A tensor with a single row is no matrix (a gain of
    shape ``(1, 1, 1, c)``, say). It and all other floating tensors become float16 if that keeps every value
    to one part in a thousand, float32 otherwise. Integers and booleans stay as they are.

    Raises ``CheckpointError`` for NaN, infinity, values too large for a float16 scale, int8 input (stored
    already) and keys that would collide.
    """
    stored: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if tensor.dtype == torch.int8:
            raise CheckpointError(
                f"tensor {key!r} is wrong because it is int8 already; dequantize the state first"
            )
        if not tensor.is_floating_point():
            stored[key] = tensor
            continue
        weight = tensor.float()
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"tensor {key!r} is wrong because it holds NaN or infinity;"
                " take weights from before the run diverged"
            )
        if tensor.ndim in (2, 4) and tensor.shape[0] > 1 and tensor.numel() > 0:
            if f"{key}.scale" in state:
                raise CheckpointError(
                    f"tensor '{key}.scale' is wrong because its name is the scale of {key!r};"
                    " rename one of them"
                )
            stored[key], stored[f"{key}.scale"] = _quantize(key, weight)
        else:
            stored[key] = _half_if_exact_enough(weight)
    return stored


def dequantize(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``quantize_rows``: the same keys and shapes, floating tensors as float32.

    Raises ``CheckpointError`` for int8 weights whose scale is missing, of another length, or not finite.
    """
    restored: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith(".scale") and _is_int8(state, key.removesuffix(".scale")):
            continue
        if tensor.dtype == torch.int8:
            scale = state.get(f"{key}.scale")
            if scale is None or tensor.ndim == 0 or scale.shape != tensor.shape[:1]:
                found = "missing" if scale is None else f"of shape {tuple(scale.shape)}"
                raise CheckpointError(
                    f"tensor {key!r} is wrong because int8 weights of shape {tuple(tensor.shape)} need"
                    f" a scale for each row and '{key}.scale' is {found}; fetch the file again"
                )
            if not bool(torch.isfinite(scale.float()).all()):
                raise CheckpointError(
                    f"tensor '{key}.scale' is wrong because it holds NaN or infinity; fetch the file again"
                )
            restored[key] = tensor.float() * scale.float().view(-1, *[1] * (tensor.ndim - 1))
        elif tensor.is_floating_point():
            restored[key] = tensor.float()
        else:
            restored[key] = tensor
    return restored


def _is_int8(state: dict[str, Tensor], key: str) -> bool:
    return key in state and state[key].dtype == torch.int8


def _quantize(key: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = weight.flatten(1).abs().amax(1)
    exact = largest / _LEVELS
    if bool((exact > _FLOAT16_MAX).any()):
        raise CheckpointError(
            f"tensor {key!r} is wrong because a value of {float(largest.max()):.3g} is over"
            f" {_FLOAT16_MAX * _LEVELS:.3g}, the most a float16 scale can hold;"
            " take weights from before the run diverged"
        )
    scale = exact.to(torch.float16)
    # Rounded down, the scale would cut off the largest value of the row (and a tiny row would lose all).
    too_small = scale.float() < exact
    scale = torch.where(too_small, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    divisor = torch.where(scale == 0, torch.ones_like(exact), scale.float())  # a row of zeros stays one
    levels = (weight / divisor.view(-1, *[1] * (weight.ndim - 1))).round()
    return levels.to(torch.int8).contiguous(), scale


def _half_if_exact_enough(tensor: Tensor) -> Tensor:
    half = tensor.to(torch.float16)
    return half if bool(((half.float() - tensor).abs() <= 1e-3 * tensor.abs()).all()) else tensor
