"""AdamW with 2 bytes of state per weight, for large matrices that are themselves in bf16.

With fp32 weights and AdamW a parameter takes 12 bytes, and 4 here:

- The weight is in bf16. It is rounded stochastically: up or down with probabilities that keep its expected
  value. Rounding to nearest would lose every change below 1/256 of a weight, which is most of them.
- The first moment is in bf16 and rounded in the same way, as in "Scaling Vision Transformers" (arXiv
  2106.04560, section 3.4) apart from the rounding.
- The second moment is factored into one value per row and one per column (Adafactor, arXiv 1804.04235,
  section 3). It is too small where a large gradient meets a row and a column of small ones, so updates are
  bounded as AdamW's are by nature (arXiv 1412.6980, section 2.1).

Everything else is AdamW, with its bias corrections, decoupled weight decay and global gradient clipping.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, no_type_check

import torch
from jaxtyping import BFloat16, Float32, Int32
from torch import Tensor, nn

from wuerstchen.device import runs_triton
from wuerstchen.train.engine.bf16_weights import LARGE

LIMIT = 2.0
"""How much larger than usual a gradient may be where the norm of all gradients is unknown. Adafactor has 1,
which also shortens ordinary updates."""
_TINY = 1e-30  # instead of a mean of squares that is 0


def is_factored(parameter: nn.Parameter) -> bool:
    """Whether ``FactoredAdamW`` keeps 2 bytes of state for each weight of a parameter."""
    return parameter.dtype is torch.bfloat16 and parameter.ndim > 1


def keep_in_bf16(network: nn.Module, *, accumulates: bool = False, least: int = LARGE) -> None:
    """Rounds the trained weights of large linear layers and convolutions to bf16, in place.

    They compute under bf16 autocast only. Their gradients are in bf16, or in fp32 if the network
    ``accumulates`` gradients, because bf16 lacks the precision for sums.
    """
    for module in network.modules():
        if type(module) not in (nn.Linear, nn.Conv2d):  # a subclass may use its weight in another way
            continue
        weight = module.weight
        if weight.requires_grad and weight.is_contiguous() and weight.numel() >= least:
            weight.data = weight.data.bfloat16()
            if accumulates:
                weight.grad_dtype = torch.float32


def zero_state(parameter: nn.Parameter, name: str) -> Tensor:
    """A part of an optimizer's state before the first update, by its name in checkpoints."""
    shapes = {"step": (), "row_squares": parameter.shape[:1], "column_squares": (parameter[:1].numel(),)}
    if name in shapes:
        return torch.zeros(shapes[name], dtype=torch.float32, device=parameter.device)
    return torch.zeros_like(parameter)


class FactoredAdamW(torch.optim.AdamW):
    """AdamW that keeps 2 bytes of state per weight in parameter groups with ``"factored": True``.

    ``found_inf`` and ``grad_scale`` mean the same as for fused AdamW (``optim.update``). Nothing is decided
    on the host, so a step can be captured in a CUDA graph. The random bits for rounding are a function of the
    number of the update and the place of the parameter, so they are the same on all ranks and after a resume.
    """

    def __init__(self, params: Iterable[dict[str, Any]], **settings: Any) -> None:
        super().__init__(params, **settings)
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self.released: frozenset[nn.Parameter] = frozenset()
        """Parameters that are updated in the backward pass (``update_in_backward``)."""
        self._norms: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        every = self.param_groups
        self.param_groups = [group for group in every if not group.get("factored")]
        try:
            super().step(closure)
        finally:
            self.param_groups = every
        for group, place, parameter in self._factored():
            if parameter.grad is not None:
                self._update(group, place, parameter, parameter.grad)

    def update_in_backward(self, reduce: Callable[[list[Tensor]], None]) -> None:
        """From now on, backward passes update each factored weight as soon as its gradient is complete, and
        free the gradient.

        ``reduce`` averages a gradient over processes in place. The norm of all gradients is not known then.
        Instead of clipping to ``clip_norm``, a gradient whose root mean square is more than ``LIMIT`` times
        the running one of its parameter is scaled down to that (as the update clipping in section 6 of
        Adafactor). Set ``found_inf`` before a backward pass to 1 to skip it. A gradient that is not finite
        is skipped too.
        """

        def take(group: dict[str, Any], place: int, parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            with torch.no_grad():
                reduce([gradient])
                norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
                self._norms.append(norm)
                self._update(group, place, parameter, gradient, norm)

        for group, place, parameter in self._factored():
            parameter.register_post_accumulate_grad_hook(functools.partial(take, group, place))
        self.released = frozenset(parameter for *_, parameter in self._factored())

    def released_norms(self) -> list[Tensor]:
        """The norms of the gradients that the last backward pass has freed."""
        norms, self._norms = self._norms, []
        return norms

    def _factored(self) -> Iterable[tuple[dict[str, Any], int, nn.Parameter]]:
        """The factored parameters, each with its group and its place in checkpoints."""
        groups = (group for group in self.param_groups if group.get("factored"))
        return itertools.chain.from_iterable(
            ((group, place, p) for place, p in zip(group["places"], group["params"], strict=True))
            for group in groups
        )

    def _update(
        self,
        group: dict[str, Any],
        place: int,
        parameter: nn.Parameter,
        gradient: Tensor,
        norm: Tensor | None = None,
    ) -> None:
        """One update. A gradient with a ``norm`` is limited (``update_in_backward``)."""
        state = self.state[parameter]
        if not state:
            for name in ("step", "momentum", "row_squares", "column_squares"):
                state[name] = zero_state(parameter, name)
        step = state["step"]
        keeps = torch.ones_like(step) if self.found_inf is None else 1 - self.found_inf
        scale = torch.ones_like(step) if self.grad_scale is None else 1 / self.grad_scale
        if norm is not None:
            keeps, scale = keeps * norm.isfinite(), torch.ones_like(step)
        step += keeps
        beta1, beta2 = group["betas"]
        g = gradient.view(len(gradient), -1)
        squares = [state["row_squares"], state["column_squares"]]
        for old, axis in zip(squares, (1, 0), strict=True):
            size = torch.linalg.vector_norm(g, dim=axis, dtype=torch.float32) * scale
            new = old.lerp(size.square() / g.shape[axis], 1 - beta2)
            old.copy_(torch.where(keeps > 0, new, old))
        mean = squares[0].mean().clamp(min=_TINY)
        usual = mean / _correction(beta2, step)
        if norm is not None:
            scale = scale / (norm / (usual * g.numel()).sqrt() / LIMIT).clamp(min=1)
        rate = group["lr"]
        numbers = 1 - rate * group["weight_decay"], rate, 1 / _correction(beta1, step), scale, keeps
        apply_update(
            parameter.detach().view_as(g),
            state["momentum"].view_as(g),
            g,
            (squares[0] / mean).sqrt(),
            (squares[1] * usual / mean).sqrt(),
            torch.stack(numbers),
            _mixed(step.int() * 0x2C1B3C6D + place),
            (beta1, max(1.0, (1 - beta1) / math.sqrt(1 - beta2)), group["eps"]),
        )


def _correction(beta: float, step: Tensor) -> Tensor:
    """1 − betaˢᵗᵉᵖ without cancellation: the weight that a moving average gives to past updates."""
    return -torch.expm1(step * (math.log(beta) if beta else -math.inf))


def apply_update(
    weight: BFloat16[Tensor, "m n"],
    momentum: BFloat16[Tensor, "m n"],
    gradient: Tensor,
    rows: Float32[Tensor, " m"],
    columns: Float32[Tensor, " n"],
    factors: Float32[Tensor, "5"],
    seed: Int32[Tensor, ""],
    constants: tuple[float, float, float],
) -> None:
    """Updates weight and momentum in place. The root of the second moment is ``rows`` · ``columns``.

    ``factors``: 1 − rate · weight decay, the rate, one over the first moment's bias correction, the factor of
    the gradient, and 0 to skip the update (else 1). The ``constants`` are beta1, the bound of updates in
    learning rates, and eps. Compiled on GPUs, into one pass over memory.
    """
    compiles = weight.is_cuda and runs_triton(weight.device)
    function = _compiled() if compiles else _apply
    function(weight, momentum, gradient, rows, columns, factors, seed, *constants)


@functools.cache
def _compiled() -> Callable[..., None]:
    return torch.compile(_apply, dynamic=True)


# Tests check annotations at run time, in code that torch cannot compile. So what is compiled opts out.
@no_type_check
def _apply(
    weight: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    rows: Tensor,
    columns: Tensor,
    factors: Tensor,
    seed: Tensor,
    beta1: float,
    bound: float,
    eps: float,
) -> None:
    remains, rate, correction, scale, keeps = factors.unbind()
    new_momentum = momentum.float().lerp(gradient.float() * scale, 1 - beta1)
    change = correction * new_momentum / (rows[:, None] * columns[None, :] + eps)
    new_weight = weight.float() * remains - rate * change.clamp(-bound, bound)
    bits = random_bits(weight.numel(), seed).view(weight.shape)
    new_weight = rounded(new_weight, bits & 0xFFFF)
    new_momentum = rounded(new_momentum, (bits >> 16) & 0xFFFF)
    weight.copy_(torch.where(keeps > 0, new_weight, weight))
    momentum.copy_(torch.where(keeps > 0, new_momentum, momentum))


@no_type_check
def rounded(x: Float32[Tensor, "*s"], bits: Int32[Tensor, "*s"]) -> BFloat16[Tensor, "*s"]:
    """Rounds fp32 to bf16 stochastically, with int32 random ``bits`` that are uniform in [0, 2¹⁶).

    The expected value is ``x``: bf16 is the upper half of the bits of fp32, and adding the random bits
    carries over into it as often as the lower half says.
    """
    return ((x.contiguous().view(torch.int32) + bits) & -0x10000).view(torch.float32).bfloat16()


@no_type_check
def random_bits(count: int, seed: Int32[Tensor, ""]) -> Int32[Tensor, " count"]:
    """32 random bits for each of ``count`` positions in int32, as a function of position and seed."""
    positions = torch.arange(count, dtype=torch.int32, device=seed.device)
    return _mixed(_mixed(positions * 0x1E3779B1 + seed) + positions)


@no_type_check
def _mixed(x: Int32[Tensor, "*s"]) -> Int32[Tensor, "*s"]:
    """The finaliser of MurmurHash3, a bijection of 32 bits."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -0x7A143595
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -0x3D4D51CB
    return x ^ ((x >> 16) & 0xFFFF)
