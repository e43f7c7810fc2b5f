"""Weights stored in 4 bits with one scale per group of columns, for the word embeddings of text encoders.

Two values share a byte. With groups of 32 columns, a matrix takes 4.5 bits per value. A few rows can also be
stored in float16: rows with a very large value, which makes the scale too coarse for the rest of its group.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.errors import CheckpointError

METADATA_KEY, STORAGE = "wuerstchen.storage", "int4"
"""In the metadata of a safetensors file that contains such weights."""

_LOWEST, _HIGHEST = -8, 7
_LARGEST = torch.finfo(torch.float16).max
_CLIPS = tuple(0.6 + 0.05 * step for step in range(12))
_ROUNDS = 5
_ROWS_AT_ONCE = 4096


def quantize_groups(
    key: str,
    weight: Float[Tensor, "rows columns"],
    group_size: int,
    sensitivity: Float[Tensor, "columns columns"] | None = None,
    exact: int = 0,
) -> dict[str, Tensor]:
    """Quantizes a matrix to 4 bits. Returns the tensors to store.

    ``KEY`` has the packed values in uint8, of shape ``(rows, columns / 2)``, and ``KEY.scale`` has float16
    scales of shape ``(rows, columns / group_size)``. ``weight ≈ value · scale`` with values from -8 to 7, and
    one scale of either sign for ``group_size`` consecutive columns of a row. The low 4 bits of byte ``j`` are
    the value of column ``j`` plus 8, and the high 4 bits are that of column ``columns / 2 + j``.

    ``sensitivity`` is a symmetric, positive definite matrix S. Values and scales are chosen to make
    ``error · S · errorᵀ`` small in each row. Each group starts with the best of several scales. Then the
    values of one column after another and all scales of a row are updated in turn. Without ``sensitivity``,
    the squared error is minimized.

    The ``exact`` rows with the largest such error, relative to ``row · S · rowᵀ``, are also stored in
    float16, in ``KEY.exact``, with their row numbers in ``KEY.exact_rows`` as int32.

    Raises ``CheckpointError`` for NaN, infinity, values too large for float16, and a number of columns that
    is odd or not a multiple of ``group_size``.
    """
    columns = weight.shape[1]
    if columns % 2 or columns % group_size:
        raise CheckpointError(
            f"tensor {key!r} of shape {tuple(weight.shape)} cannot be stored in 4 bits. Its columns must be "
            f"an even number and a multiple of the group size, {group_size}. Choose another group size."
        )
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(
            f"tensor {key!r} contains NaN or infinity. Use weights from before the run diverged."
        )
    if weight.numel() and float(weight.abs().amax()) > _LARGEST:
        raise CheckpointError(
            f"tensor {key!r} has a value of {float(weight.abs().amax()):.3g}. In 4 bits, values can be at "
            f"most {_LARGEST:.3g}. Use weights from before the run diverged."
        )
    matrix = _identity(columns, weight) if sensitivity is None else sensitivity.float()
    packed, scales = [], []
    for rows in weight.float().split(_ROWS_AT_ONCE):
        scale = _first_scales(rows, group_size, matrix.diagonal())
        values = _rounded(rows, _spread(scale, group_size))
        for _ in range(_ROUNDS if sensitivity is not None else 0):
            values = _improved_values(rows, values, _spread(scale, group_size), matrix)
            scale = _improved_scales(rows, values, scale, matrix)
        low, high = (_rounded_to_bytes(half) for half in values.chunk(2, dim=1))
        packed.append(low | (high << 4))
        scales.append(scale.half())
    stored = {key: torch.cat(packed), f"{key}.scale": torch.cat(scales)}
    if exact:
        error = weight - _unpacked(key, stored[key], stored[f"{key}.scale"])
        relative = _quadratic(error, matrix) / _quadratic(weight.float(), matrix)
        chosen = relative.nan_to_num(0).topk(exact).indices.sort().values
        stored[f"{key}.exact"] = weight[chosen].half()
        stored[f"{key}.exact_rows"] = chosen.to(torch.int32)
    return stored


def dequantize_groups(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Restores the uint8 tensors of a state to float32. All other tensors stay as they are.

    Raises ``CheckpointError`` if the scales of such a tensor are missing, have an unsuitable shape or type,
    or are not finite, or if its exact rows are outside the matrix or do not fit it.
    """
    restored = dict(state)
    for key, tensor in state.items():
        if tensor.dtype == torch.uint8:
            weight = _unpacked(key, tensor, restored.pop(f"{key}.scale", None))
            exact, rows = (restored.pop(f"{key}.{name}", None) for name in ("exact", "exact_rows"))
            if exact is not None or rows is not None:
                _set_rows(key, weight, exact, rows)
            restored[key] = weight
    return restored


def _set_rows(key: str, weight: Tensor, exact: Tensor | None, rows: Tensor | None) -> None:
    if (
        exact is None
        or rows is None
        or rows.ndim != 1
        or rows.dtype != torch.int32
        or not exact.is_floating_point()
        or exact.shape != (len(rows), weight.shape[1])
        or bool(((rows < 0) | (rows >= len(weight))).any())
        or rows.unique().shape != rows.shape
        or not bool(torch.isfinite(exact.float()).all())
    ):
        raise CheckpointError(
            f"'{key}.exact' and '{key}.exact_rows' do not fit {key!r} of shape {tuple(weight.shape)}. The "
            "first must contain finite rows, the second their different numbers as int32. Download the file "
            "again."
        )
    weight[rows.long()] = exact.float()


def _unpacked(key: str, packed: Tensor, scale: Tensor | None) -> Tensor:
    if (
        scale is None
        or packed.ndim != 2
        or scale.ndim != 2
        or len(scale) != len(packed)
        or scale.shape[1] == 0
        or 2 * packed.shape[1] % scale.shape[1]
        or not scale.is_floating_point()
    ):
        found = "missing" if scale is None else f"{scale.dtype} of shape {tuple(scale.shape)}"
        raise CheckpointError(
            f"'{key}.scale' is {found}. The 4-bit weights {key!r} of shape {tuple(packed.shape)} need "
            "floating-point scales for each row. Their number must divide the number of columns, which is "
            "twice the number of bytes. Download the file again."
        )
    scale = scale.float()
    if not bool(torch.isfinite(scale * _LOWEST).all()):
        raise CheckpointError(
            f"tensor '{key}.scale' contains NaN, infinity, or values too large for float32. Download the "
            "file again."
        )
    rows, half = packed.shape
    weight = torch.empty(rows, 2 * half, dtype=torch.float32, device=packed.device)
    weight[:, :half] = packed & 15
    weight[:, half:] = packed >> 4
    weight.view(rows, scale.shape[1], 2 * half // scale.shape[1]).add_(_LOWEST).mul_(scale[..., None])
    return weight


def _quadratic(rows: Tensor, matrix: Tensor) -> Tensor:
    return ((rows @ matrix) * rows).sum(1)


def _identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=torch.float32, device=like.device)


def _spread(scale: Tensor, group_size: int) -> Tensor:
    """The divisor of each column. Groups of zeros have a scale of 0, and are divided by 1."""
    return torch.where(scale == 0, 1, scale).repeat_interleave(group_size, dim=1)


def _rounded(weight: Tensor, divisor: Tensor) -> Tensor:
    return (weight / divisor).round_().clamp_(_LOWEST, _HIGHEST)


def _rounded_to_bytes(values: Tensor) -> Tensor:
    return (values - _LOWEST).to(torch.uint8)


def _first_scales(weight: Tensor, group_size: int, weights: Tensor) -> Tensor:
    """The best scales of several that map the largest value of a group near -8, of either sign."""
    groups = weight.unflatten(1, (-1, group_size))
    weights = weights.view(-1, group_size)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for clip in _CLIPS:
        for sign in (1, -1):
            scale = largest * (sign * clip / _LOWEST)
            values = _rounded(groups, torch.where(scale == 0, 1, scale))
            # The least-squares scale for these values. It is 0 for a group of zeros.
            scale = (weights * values * groups).sum(2, True) / (weights * values * values).sum(2, True)
            scale = scale.nan_to_num(0, 0, 0).half().float()
            error = groups - _rounded(groups, torch.where(scale == 0, 1, scale)) * scale
            error = (weights * error.square()).sum(2, True)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    return best.squeeze(2)


def _improved_values(weight: Tensor, values: Tensor, divisor: Tensor, sensitivity: Tensor) -> Tensor:
    """Updates the values of one column after another, with those of all other columns fixed."""
    values, error = values.clone(), weight - values * divisor
    for column in range(weight.shape[1]):
        own = divisor[:, column]
        wanted = error @ sensitivity[:, column] / sensitivity[column, column] + values[:, column] * own
        new = _rounded(wanted, own)
        error[:, column] += (values[:, column] - new) * own
        values[:, column] = new
    return values


def _improved_scales(weight: Tensor, values: Tensor, scale: Tensor, sensitivity: Tensor) -> Tensor:
    """Solves for all scales of a row by least squares. Scales without a solution stay as they are."""
    rows, groups = scale.shape
    size = weight.shape[1] // groups
    apart = torch.zeros(rows, groups, groups, size, dtype=torch.float32, device=weight.device)
    apart.diagonal(dim1=1, dim2=2).copy_(values.view(rows, groups, size).transpose(1, 2))
    apart = apart.view(rows, groups, groups * size)
    weighted = apart @ sensitivity
    product = weighted @ apart.mT
    ridge = 1e-6 * product.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
    product += ridge[:, None, None] * _identity(groups, weight)
    found = torch.linalg.solve(product, (weighted @ weight[..., None]).squeeze(2)).half().float()
    return torch.where(torch.isfinite(found) & (found != 0), found, scale)
