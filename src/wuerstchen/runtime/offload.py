"""Offloading and tiled decoding, for networks and images that do not fit on the GPU.

A ``Residence`` moves networks to the device before a stage uses them. The CPU's copy of every weight stays in
memory (pinned for CUDA, for fast transfers). Moving a weight back only points to that copy again, because
sampling does not change weights. Call ``release`` before changing weights in place or adding some, as
training and adapters do.
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
"""Side of a tile in latents, 256 pixels with the published Stage A. Each tile has a halo of 13 latents,
which doubles the cost of decoding. But decoding is only 2 % of the time per image, and tiling needs an eighth
of the memory at 1024 pixels."""

LowMemory = Literal["stage", "layer"]
"""What to keep on a small GPU at a time: one network, or one layer, which is far slower."""


class Residence(Protocol):
    """Where networks are while they compute."""

    device: torch.device
    """Where the inputs must be."""

    def using(self, *modules: nn.Module) -> AbstractContextManager[None]:
        """A context in which ``modules`` compute on ``device``. Contexts can be nested."""
        ...

    def release(self) -> None:
        """Frees the device's memory, except for what open contexts use."""
        ...


class AllOnDevice:
    """Keeps everything on the device: the fastest, if it fits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def using(self, *modules: nn.Module) -> Iterator[None]:
        """Moves nothing. Raises ``UserError`` if a weight is on another device."""
        for module in modules:
            for tensor in _tensors(module):
                if not _is_on(tensor, self.device):
                    raise UserError(
                        f"A {type(module).__name__} is on the wrong device: {tensor.device}. "
                        f"It must be on {self.device}. Move it with .to({str(self.device)!r})."
                    )
        yield

    def release(self) -> None:
        """Does nothing."""


class OneAtATime:
    """Keeps one network on the device at a time: needs memory for the largest, and moves each once per batch.

    Networks start on the CPU. A network stays on the device until another one is used, so one that is used
    twice in a row is moved once.
    """

    def __init__(self, device: torch.device, *, pinned: bool = True) -> None:
        """``pinned`` keeps the CPU copies in pinned memory. Otherwise transfers are several times slower."""
        self.device = device
        self._loans = _Loans(device, pinned)
        self._open: list[list[Tensor]] = []

    @contextmanager
    def using(self, *modules: nn.Module) -> Iterator[None]:
        """Moves back what no open context uses, then moves ``modules`` to the device.

        After an error, everything that no other context uses is moved back.
        """
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
        """Moves back everything that no open context uses."""
        self._loans.keep_only(tensor for tensors in self._open for tensor in tensors)


class Layerwise:
    """Keeps one layer on the device at a time: the least memory, but every step waits for its weights.

    Linear layers and convolutions are moved to the device when they are called, and back afterwards. All else
    is small or is read without a call, so it stays for the whole context: norms, embeddings, learned scalars,
    and 1×1 convolutions, which run as linear layers. Compiled networks do not work, because they do not call
    their layers.
    """

    def __init__(self, device: torch.device, *, pinned: bool = True) -> None:
        """``pinned`` keeps the CPU copies in pinned memory. Otherwise transfers are several times slower."""
        self.device = device
        self._loans = _Loans(device, pinned)
        self._open: list[dict[int, Tensor]] = []

    @contextmanager
    def using(self, *modules: nn.Module) -> Iterator[None]:
        """Moves small tensors to the device and adds hooks to the other layers. Undoes both in the end."""
        parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
        stay = [t for part in parts if not _moves_alone(part) for t in _tensors(part, recurse=False)]
        self._open.append({id(tensor): tensor for tensor in stay})
        # DoRA reads the weight of its layer without calling it, so the weight moves when DoRA is called.
        readers = {part.base_layer: part for part in parts if getattr(part, "lora_magnitude_vector", None)}
        alone = [part for part in parts if _moves_alone(part)]
        hooks = [hook for part in alone for hook in self._hooks(part, readers.get(part, part))]
        try:
            self._loans.bring(stay)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._open.pop()
            self.release()

    def release(self) -> None:
        """Moves back everything that no open context keeps."""
        self._loans.keep_only(tensor for stay in self._open for tensor in stay.values())

    def _hooks(self, layer: nn.Module, called: nn.Module) -> list[Any]:
        """Hooks that move the weights of ``layer`` for each call of ``called``."""

        def bring(*_: object) -> None:
            self._loans.bring(_tensors(layer))

        def give_back(*_: object) -> None:
            # A weight that is tied to one that stays, such as an embedding's, stays too.
            self._loans.give_back(t for t in _tensors(layer) if not any(id(t) in stay for stay in self._open))

        return [called.register_forward_pre_hook(bring), called.register_forward_hook(give_back)]


def residence_on(device: torch.device, low_memory: LowMemory | None) -> AllOnDevice | OneAtATime | Layerwise:
    """Where to keep networks that compute on ``device``."""
    if low_memory is None:
        return AllOnDevice(device)
    return OneAtATime(device) if low_memory == "stage" else Layerwise(device)


def _moves_alone(layer: nn.Module) -> bool:
    """Whether to move a layer by itself: its weights are large, and only read when it is called."""
    # Exact types: a subclass's weights may be read without a call, as those of torch's attention output are.
    if type(layer) in (nn.Conv2d, nn.ConvTranspose2d):
        return math.prod(layer.kernel_size) > 1  # type: ignore[arg-type]
    return type(layer) is nn.Linear


@dataclass(frozen=True)
class _Loan:
    tensor: Tensor
    home: Tensor
    """The tensor's data on the CPU."""
    address: int
    """Address of the copy on the device."""


class _Loans:
    """Tensors that are on the device for now. They keep their identity, so tied weights stay tied."""

    def __init__(self, device: torch.device, pinned: bool) -> None:
        self.device = device
        self.pinned = pinned and device.type == "cuda"
        self._loans: dict[int, _Loan] = {}

    def bring(self, tensors: Iterable[Tensor]) -> None:
        # Tensors copied in inference mode could never be trained again.
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
                # A different address means that someone assigned new data, which the CPU's copy lacks.
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
    """``vqgan.decode`` on tiles of ``tile``×``tile`` latents: the same pixels up to rounding, without seams.

    Each tile is decoded together with the receptive field around it (``decoding_halo``), so no blending is
    needed. Besides the result, memory depends on the tile, not on the size or number of images.
    Raises ``UserError`` for a tile below 1.
    """
    if tile < 1:
        raise UserError(f"tile must be at least 1, got {tile}. {TILE} is the default.")
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
    """How many latents on each side of a latent affect its pixels: 13 for the published Stage A."""
    halo = 0
    for _ in range(vqgan.config.levels - 1):
        halo += 1  # the 3×3 convolution of the level's block
        halo = halo // 2 + 1  # the transposed 4×4: pixel i reads (i − 1) // 2 and the next one
    return halo + vqgan.config.bottleneck_blocks
