"""Random numbers that are a pure function of (seed, image index, purpose, position).

The generator is counter-based: it hashes instead of advancing a state. The noise of image 1,000,000 does not
depend on what was drawn before, on the batch, or on the number of processes. Integer arithmetic gives the
same bits on every device. Only the last digits of the normal transform may differ between devices.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wuerstchen.data.plan import stable_hash

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_BITS = 24  # fp32 represents these exactly


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer, because tensors only multiply signed ones."""
    return (value & (2**64 - 1)) - (2**64 if value & 2**63 else 0)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift, which shifts the sign bit too."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that scatters every bit."""
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


class ImageRandom:
    """Random numbers for the images of a batch with these ``indices`` in the run."""

    def __init__(self, seed: int, indices: Int[Tensor, " b"]) -> None:
        self.seed = seed
        self.indices = indices

    def _bits(self, purpose: str, shape: Sequence[int]) -> Int[Tensor, "b ..."]:
        key = _signed(stable_hash(self.seed, purpose))
        images = _mix(self.indices * _signed(_GOLDEN) + key)
        positions = torch.arange(math.prod(shape), device=self.indices.device) * _signed(_GOLDEN)
        return _mix(images[:, None] + positions).unflatten(1, tuple(shape) or (1,))

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Float[Tensor, "b ..."]:
        """Uniform numbers in [0, 1): one tensor of ``shape`` per image."""
        bits = _shift(self._bits(purpose, shape), 64 - _BITS).float() / 2**_BITS
        return bits if shape else bits.squeeze(1)

    def integers(self, purpose: str, shape: Sequence[int], high: int) -> Int[Tensor, "b ..."]:
        """Integers in [0, ``high``): one tensor of ``shape`` per image. ``high`` is at most 2³¹.

        Their probabilities differ by at most a fraction of ``high`` / 2³¹.
        """
        assert 0 < high <= 2**31
        return (_shift(self._bits(purpose, shape), 64 - 31) * high) >> 31

    def normal(self, purpose: str, shape: Sequence[int]) -> Float[Tensor, "b ..."]:
        """Standard normal numbers by the Box–Muller transform: one tensor of ``shape`` per image."""
        bits = self._bits(purpose, shape)
        u1 = (_shift(bits, 64 - _BITS).float() + 1) / 2**_BITS
        u2 = (_shift(bits, 64 - 2 * _BITS) & (2**_BITS - 1)).float() / 2**_BITS
        return (-2 * u1.log()).sqrt() * (2 * math.pi * u2).cos()
