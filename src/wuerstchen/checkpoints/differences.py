"""Weights stored in 4 bits as differences to the network that they were trained from.

A student begins with its teacher's weights, so their differences are small. Stored with one scale per 32
columns, they take 4.5 bits per value, and cause a fifth of the error of 4-bit weights.
"""

import torch
from torch import Tensor

from wuerstchen.checkpoints.int4 import dequantize_groups, quantize_groups
from wuerstchen.checkpoints.int8 import half_if_exact_enough
from wuerstchen.errors import CheckpointError

STORAGE = "int4_difference"
GROUP_SIZE = 32


def quantize_differences(state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to store for a network that was trained from ``base``, whose tensors have the same shapes.

    ``base`` has the values that readers will see, so the rounding of its own storage is part of the
    differences. A matrix ``(rows, columns)`` or convolution ``(out, in, h, w)`` with a multiple of 32 values
    per row is stored as its difference, as in ``int4.quantize_groups``. All other tensors are stored whole,
    as float16 if that is exact to 0.001, otherwise as float32.

    Raises ``CheckpointError`` if the tensors of ``base`` are others, and as ``quantize_groups``.
    """
    _check_same(state, base)
    stored: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if _is_stored_as_difference(tensor):
            difference = tensor.float() - base[key].float()
            stored |= quantize_groups(key, difference.flatten(1), GROUP_SIZE)
        else:
            stored[key] = half_if_exact_enough(tensor.float()) if tensor.is_floating_point() else tensor
    return stored


def add_differences(stored: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``quantize_differences``, with floating-point tensors as float32.

    Raises ``CheckpointError`` if the tensors of ``base`` are others, and as ``int4.dequantize_groups``.
    """
    packed = {key for key, tensor in stored.items() if tensor.dtype == torch.uint8}
    found = dequantize_groups(stored)
    for key in packed & base.keys():
        if found[key].numel() == base[key].numel():
            found[key] = base[key].float() + found[key].view_as(base[key])
    _check_same(found, base)
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in found.items()}


def _is_stored_as_difference(tensor: Tensor) -> bool:
    matrix = tensor.is_floating_point() and tensor.ndim in (2, 4) and tensor.shape[0] > 1
    return matrix and tensor.numel() > 0 and tensor[0].numel() % GROUP_SIZE == 0


def _check_same(state: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    for key in sorted(state.keys() | base.keys()):
        shapes = [tuple(of[key].shape) if key in of else None for of in (state, base)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"tensor {key!r} has the shape {shapes[0]}, and {shapes[1]} in the network that it is stored "
                "as a difference to. Use the network that it was trained from."
            )
