"""Networks that are larger than the GPU, and pictures that are: what is on the device when, and tiles.

A ``Residence`` brings to the device what a stage is about to use. The CPU's copy of every weight stays where
it is (pinned for CUDA, so that it travels fast), and giving a weight back only points to it again: drawing
changes no weights. Whoever does change them in place or adds some (training, an adapter) calls ``release``
before.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wuerstchen.errors import UserError
from wuerstchen.models.vqgan import VQGAN

TILE = 64
"""Side of a tile in latents: 256 pixels of the published Stage A. Its halo of 13 doubles the work, which is
2 % of a picture's; the memory is an eighth at 1024 pixels and less beyond."""

LowMemory = Literal["stage", "layer"]
"""What is on a small GPU at a time: one network, or one layer of it, which is far slower."""


class Residence(Protocol):
    """Where networks live while they work."""

    device: torch.device
    """Where inputs must be."""

    def using(self, *modules: nn.Module) -> AbstractContextManager[None]:
        """Within this block, and any it holds, ``modules`` compute on ``device``."""
        ...

    def release(self) -> None:
        """Gives the device's memory back, but for blocks that are open."""
        ...


class AllOnDevice:
    """Everything stays on the device: the fastest, if it fits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def using(self, *modules: nn.Module) -> Iterator[None]:
        """Moves nothing. Raises ``UserError`` if a weight is elsewhere."""
        for module in modules:
            for tensor in _tensors(module):
                if not _is_on(tensor, self.device):
                    raise UserError(
                        f"{type(module).__name__} is on {tensor.device}, but is to compute on {self.device}; "
                        "move it there"
                    )
        yield

    def release(self) -> None:
        """Nothing was moved, so nothing goes back."""


class OneAtATime:
    """One stage on the device at a time: memory for the largest, one transfer of each a batch.

    Networks start on the CPU. What a block used stays until another block uses something else, so a network
    used twice in a row travels once.
    """

    def __init__(self, device: torch.device, *, pinned: bool = True) -> None:
        """``pinned`` locks the CPU's copies in memory; without it they travel some times slower."""
        self.device = device
        self._loans = _Loans(device, pinned)
        self._open: list[list[Tensor]] = []

    @contextmanager
    def using(self, *modules: nn.Module) -> Iterator[None]:
        """First sends back what no open block uses, then brings ``modules``; after an error, both go back."""
        self._open.append([tensor for module in modules for tensor in _tensors(module)])
        try:
            self.release()
            self._loans.bring(self._open[-1])
            yield
        except BaseException:
            self._open.pop()
            self.release()
            raise
        self._open.pop()

    def release(self) -> None:
        """Sends back whatever no open block uses."""
        self._loans.keep_only(tensor for tensors in self._open for tensor in tensors)


class Blockwise:
    """One layer on the device at a time: the least memory, and every step as slow as its weights travel.

    Linear layers and convolutions come when they are called and go when they are done. All else is small, or
    is read without a call, and is there for the whole block: norms, embeddings, learnt scalars, and the 1×1
    convolutions, which are computed as the linear layers they are. Not for compiled networks: in them, no
    layer is called.
    """

    def __init__(self, device: torch.device, *, pinned: bool = True) -> None:
        """``pinned`` locks the CPU's copies in memory; without it they travel some times slower."""
        self.device = device
        self._loans = _Loans(device, pinned)
        self._open: list[dict[int, Tensor]] = []

    @contextmanager
    def using(self, *modules: nn.Module) -> Iterator[None]:
        """Brings what stays and hooks onto what travels; in the end nothing of it is on the device."""
        parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
        stay = [t for part in parts if not _travels(part) for t in _tensors(part, recurse=False)]
        self._open.append({id(tensor): tensor for tensor in stay})
        hooks = [hook for part in parts if _travels(part) for hook in self._hooks(part)]
        try:
            self._loans.bring(stay)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._open.pop()
            self.release()

    def release(self) -> None:
        """Sends back what no open block keeps."""
        self._loans.keep_only(tensor for stay in self._open for tensor in stay.values())

    def _hooks(self, layer: nn.Module) -> list[Any]:
        def come(*_: object) -> None:
            self._loans.bring(_tensors(layer))

        def go(*_: object) -> None:
            # What is tied to a weight that stays, an embedding's for one, stays too.
            self._loans.give_back(t for t in _tensors(layer) if not any(id(t) in stay for stay in self._open))

        return [layer.register_forward_pre_hook(come), layer.register_forward_hook(go)]


def residence_on(device: torch.device, low_memory: LowMemory | None) -> AllOnDevice | OneAtATime | Blockwise:
    """Where networks wait that compute on ``device``."""
    if low_memory is None:
        return AllOnDevice(device)
    return OneAtATime(device) if low_memory == "stage" else Blockwise(device)


def _travels(layer: nn.Module) -> bool:
    """Whether a layer's weights are read only by calling it, and are worth the way."""
    # Exact types: subclasses may be read without a call, such as the output layer of torch's own attention.
    if type(layer) in (nn.Conv2d, nn.ConvTranspose2d):
        return math.prod(layer.kernel_size) > 1  # type: ignore[arg-type]
    return type(layer) is nn.Linear


@dataclass(frozen=True)
class _Loan:
    tensor: Tensor
    home: Tensor
    """What the tensor held before, on the CPU."""
    address: int
    """Where its copy on the device begins."""


class _Loans:
    """The tensors that are on the device for a while. Their identity, and so every tie, is kept."""

    def __init__(self, device: torch.device, pinned: bool) -> None:
        self.device = device
        self.pinned = pinned and device.type == "cuda"
        self._loans: dict[int, _Loan] = {}

    def bring(self, tensors: Iterable[Tensor]) -> None:
        # Otherwise what is copied in inference mode could never be trained again.
        with torch.inference_mode(False):
            for tensor in tensors:
                if id(tensor) in self._loans or _is_on(tensor, self.device):
                    continue
                home = tensor.data
                if self.pinned and home.device.type == "cpu" and not home.is_pinned():
                    home = home.pin_memory()
                tensor.data = _copied(home, self.device)
                self._loans[id(tensor)] = _Loan(tensor, home, tensor.data_ptr())

    def give_back(self, tensors: Iterable[Tensor]) -> None:
        with torch.inference_mode(False):
            for tensor in tensors:
                loan = self._loans.pop(id(tensor), None)
                if loan is None:
                    continue
                # At another address it has another value, which somebody gave it and the home lacks.
                same = tensor.data_ptr() == loan.address
                tensor.data = loan.home if same else tensor.data.to(loan.home.device)

    def keep_only(self, tensors: Iterable[Tensor]) -> None:
        kept = {id(tensor) for tensor in tensors}
        self.give_back([loan.tensor for key, loan in self._loans.items() if key not in kept])


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=tensor.is_pinned())


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _tensors(module: nn.Module, *, recurse: bool = True) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]


def tiled_decode(
    vqgan: VQGAN, latents: Float[Tensor, "b z h4 w4"], *, tile: int = TILE
) -> Float[Tensor, "b c h w"]:
    """``vqgan.decode`` a tile of ``tile`` latents at a time: the same pixels up to rounding, without seams.

    Every tile sees as much around it as the convolutions reach (``decoding_halo``), so nothing is blended.
    The memory beyond the result follows from the tile, not from the pictures' size or number.
    Raises ``UserError`` for a tile below 1.
    """
    if tile < 1:
        raise UserError(f"tile {tile} holds nothing; use at least 1, {TILE} is common")
    halo, factor = decoding_halo(vqgan), vqgan.config.factor
    height, width = latents.shape[2:]
    result: Tensor | None = None
    for number in range(len(latents)):
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                bottom, right = min(top + tile, height), min(left + tile, width)
                # At the edge of the image there is no halo: the convolutions must pad there, and only there.
                y, x = max(top - halo, 0), max(left - halo, 0)
                part = vqgan.decode(latents[number : number + 1, :, y : bottom + halo, x : right + halo])[0]
                part = part[:, factor * (top - y) : factor * (bottom - y)]
                part = part[:, :, factor * (left - x) : factor * (right - x)]
                if result is None:
                    result = part.new_empty((len(latents), len(part), factor * height, factor * width))
                rows = slice(factor * top, factor * bottom)
                result[number, :, rows, factor * left : factor * right] = part
    assert result is not None
    return result


def decoding_halo(vqgan: VQGAN) -> int:
    """How many latents to each side of a latent decide on its pixels: 13 for the published Stage A."""
    halo = 0
    for _ in range(vqgan.config.levels - 1):
        halo += 1  # the 3×3 convolution of the level's block
        halo = halo // 2 + 1  # the transposed 4×4: pixel i comes of (i − 1) // 2 and the next
    return halo + vqgan.config.bottleneck_blocks
