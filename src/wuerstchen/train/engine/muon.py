"""Muon: momentum updates orthogonalised before they are applied, with AdamW for everything else.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). The update is scaled
to the size of AdamW's as in "Muon is scalable for LLM training" (arXiv 2502.16982), section 2.2, so AdamW's
learning rate is a good first guess.
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wuerstchen.models.traits import traits_of

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, tuned for speed over exactness
_STEPS = 5
_RMS = 0.2  # root mean square of AdamW's usual update, before the learning rate


def hidden_matrices(network: nn.Module) -> set[nn.Parameter]:
    """The weights that Muon trains: those of linear layers inside convolution and attention blocks.

    First and last layers, timestep mappers, convolutions, gains and biases stay with AdamW.
    """
    blocks = (m for m in network.modules() if traits_of(m).orthogonalise)
    layers = itertools.chain.from_iterable(block.modules() for block in blocks)
    return {layer.weight for layer in layers if isinstance(layer, nn.Linear)}


class MuonWithAdamW(torch.optim.AdamW):
    """AdamW that updates parameter groups with ``"muon": True``, which hold only matrices, by Muon.

    ``found_inf`` and ``grad_scale`` mean the same as for fused AdamW (``optim.update``). Nothing is decided
    on the host, so a step can be captured in a CUDA graph.
    """

    def __init__(self, params: Iterable[dict[str, Any]], **settings: Any) -> None:
        super().__init__(params, **settings)
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        every = self.param_groups
        self.param_groups = [group for group in every if not group.get("muon")]
        try:
            super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group.get("muon"):
                self._muon(group)

    def _muon(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        shapes: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            shapes.setdefault(parameter.shape, []).append(parameter)
        for shape, members in shapes.items():  # matrices of one shape are orthogonalised as one batch
            for parameter in members:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            buffers = [self.state[parameter]["momentum"] for parameter in members]
            gradients = torch.stack([p.grad for p in members])  # type: ignore[misc]
            if self.grad_scale is not None:
                gradients = gradients / self.grad_scale
            old = torch.stack(buffers)
            momentum = old.lerp(gradients, 1 - MOMENTUM)
            direction = orthogonalised(gradients.lerp(momentum, MOMENTUM))  # Nesterov momentum
            weights = torch.stack([p.detach() for p in members])
            rate = group["lr"] * (_RMS * math.sqrt(max(shape)))
            new = weights * (1 - group["lr"] * group["weight_decay"]) - rate * direction
            if self.found_inf is not None:  # where instead of a product: NaN times 0 is NaN
                new = torch.where(self.found_inf > 0, weights, new)
                momentum = torch.where(self.found_inf > 0, old, momentum)
            torch._foreach_copy_(members, list(new.unbind()))
            torch._foreach_copy_(buffers, list(momentum.unbind()))


def orthogonalised(matrices: Float[Tensor, "k m n"]) -> Float[Tensor, "k m n"]:
    """Approximates the nearest (semi-)orthogonal matrix of each: singular values end in about 0.7 to 1.2.

    Five Newton-Schulz iterations in bf16 on GPUs, in the matrices' own precision elsewhere.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if wide else matrices
    # In fp32 first: the norm of a small gradient underflows in bf16.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if matrices.is_cuda:
        x = x.bfloat16()
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.to(matrices.dtype)
    return x.mT if wide else x
