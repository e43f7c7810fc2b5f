"""bf16 copies of large matrices, which forward and backward passes read in place of the fp32 weights.

Autocast casts the weights again in every update, and casts their bf16 gradients to fp32 before the optimizer
reads them. At a billion parameters both are noticeable. Here AdamW writes the copy in the same pass as the
weight, and reads the bf16 gradient directly: the same numbers with 16 bytes of memory traffic per parameter
less.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor, nn

from wuerstchen.device import runs_triton

LARGE = 2**16  # minimum number of elements for a matrix to get a copy


class Bf16Weights:
    """bf16 copies of the large linear layers of a network, and their AdamW updates.

    The network's own weights and the optimizer's state stay in fp32, and so does everything in checkpoints.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.AdamW, least: int = LARGE) -> None:
        self.optimizer = optimizer
        groups = {
            p: number
            for number, group in enumerate(optimizer.param_groups)
            for p in group["params"]
            if not group.get("muon")  # Muon reads fp32 gradients; autocast casts these weights
        }
        self.layers = [
            (module, module.weight, nn.Parameter(module.weight.detach().bfloat16()))
            for module in network.modules()
            if type(module) is nn.Linear and module.weight in groups and module.weight.numel() >= least
            if module.weight.dtype is torch.float32
        ]
        self.groups: dict[int, list[tuple[nn.Parameter, nn.Parameter]]] = {}
        for _, weight, copy in self.layers:
            self.groups.setdefault(groups[weight], []).append((weight, copy))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside this context, the copies replace the weights of their layers."""
        for module, _, copy in self.layers:
            module.weight = copy
        try:
            yield
        finally:
            for module, weight, _ in self.layers:
                module.weight = weight

    def gradients(self) -> list[Tensor]:
        return [copy.grad for _, _, copy in self.layers if copy.grad is not None]

    @torch.no_grad()
    def step(self) -> None:
        """AdamW (arXiv 1711.05101, algorithm 2) on the weights that have copies, with the optimizer's
        settings.

        Follows the optimizer's ``found_inf`` and ``grad_scale`` too (``optim.update``).
        """
        skips, scale = self.optimizer.found_inf, self.optimizer.grad_scale
        for number, members in self.groups.items():
            group = self.optimizer.param_groups[number]
            pairs = [(weight, copy) for weight, copy in members if copy.grad is not None]
            if not pairs:
                continue
            states = [self._state(weight) for weight, _ in pairs]
            torch._foreach_add_([state["step"] for state in states], [1 - skips] * len(states))
            steps = states[0]["step"].double()  # equal for all: a weight always has a gradient or never
            beta1, beta2 = group["betas"]
            rate = group["lr"].double()
            numbers = (
                1 - rate * group["weight_decay"],
                rate / (1 - beta1**steps),
                (1 - beta2**steps).rsqrt(),
                1 / scale,
                1 - skips,
            )
            factors = torch.stack([number.float() for number in numbers])
            for (weight, copy), state in zip(pairs, states, strict=True):
                moments = state["exp_avg"], state["exp_avg_sq"]
                adamw(weight, copy, copy.grad, moments, factors, (beta1, beta2, group["eps"]))
                copy.grad = None

    def _state(self, weight: nn.Parameter) -> dict[str, Tensor]:
        state = self.optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state


def adamw(
    weight: Float32[Tensor, "*s"],
    copy: BFloat16[Tensor, "*s"],
    gradient: BFloat16[Tensor, "*s"],
    moments: tuple[Float32[Tensor, "*s"], Float32[Tensor, "*s"]],
    factors: Float32[Tensor, "5"],
    constants: tuple[float, float, float],
) -> None:
    """Updates weight, copy and moments in place. The ``constants`` are beta1, beta2 and eps.

    ``factors``: 1 − rate · weight decay, the rate over the first moment's bias correction, one over the root
    of the second moment's bias correction, the factor of the gradient, and 0 to skip the update (else 1).
    """
    (mean, square), (beta1, beta2, eps) = moments, constants
    if weight.is_cuda and runs_triton(weight.device):
        from wuerstchen.models.fused import adamw_kernel as kernels

        kernels.adamw(weight, copy, gradient, mean, square, factors, beta1, beta2, eps)
        return
    remains, rate, root, scale, keeps = factors
    g = gradient.float() * scale
    new_mean = mean.lerp(g, 1 - beta1)
    new_square = (beta2 * square).addcmul(g, g, value=1 - beta2)
    new_weight = weight * remains - rate * new_mean / (new_square.sqrt() * root + eps)
    for old, new in ((mean, new_mean), (square, new_square), (weight, new_weight)):
        old.copy_(torch.where(keeps > 0, new, old))
    copy.copy_(weight)
