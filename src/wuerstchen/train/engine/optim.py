"""Optimizers and the learning rate: what turns a loss into an update."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wuerstchen.train.config import Optimization
from wuerstchen.train.engine.bf16_weights import Bf16Weights
from wuerstchen.train.engine.loss_scale import loss_scale_of
from wuerstchen.train.engine.muon import MuonWithAdamW, hidden_matrices
from wuerstchen.train.engine.sharding import local_part

_SCALE = "loss_scale"  # in what is stored
FINAL_SHARE = 0.05  # of the learning rate, where a cosine ends


def learning_rate(config: Optimization, images: int) -> float:
    """The learning rate of the update that ends at ``images``: a pure function, nothing to checkpoint."""
    if images < config.warmup:
        return config.learning_rate * images / config.warmup
    if config.decay == "constant":
        return config.learning_rate
    share = (images - config.warmup) / max(config.images - config.warmup, 1)
    cosine = (1 + math.cos(math.pi * min(share, 1.0))) / 2
    return config.learning_rate * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


def make_optimizer(
    network: nn.Module,
    config: Optimization,
    rate_scales: Mapping[str, float] | None = None,
    *,
    decays_all_axes: bool = False,
) -> torch.optim.AdamW:
    """AdamW over a network's trainable parameters; with ``config.optimizer="muon"`` matrices inside blocks
    are updated by Muon (``muon.hidden_matrices``).

    Weight decay acts on weights of linear layers, convolutions and embeddings: not on biases and scales,
    GRN's gamma and beta included, nor on the codebook, whose codes are pulled to the latents. The original
    decays every parameter, by torch's default of 0.01.

    ``rate_scales`` gives parameters whose names begin so a share of the learning rate. ``decays_all_axes`` is
    for runs of earlier versions, which decayed everything of more than one axis.
    """
    hidden = hidden_matrices(network) if config.optimizer == "muon" else set()
    exempt = set() if decays_all_axes else _exempt(network)
    # Places in what is stored are by the number of axes, whatever is decayed: checkpoints depend on them.
    order: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            scales = [s for prefix, s in (rate_scales or {}).items() if name.startswith(prefix)]
            order.setdefault((min(scales, default=1.0), parameter.ndim > 1), []).append(parameter)
    described: list[dict[str, Any]] = []
    place = 0
    for (scale, is_matrix), parameters in order.items():
        places = dict(zip(parameters, range(place, place + len(parameters)), strict=True))
        place += len(parameters)
        for decays, muon in itertools.product((True, False), repeat=2):
            members = [
                p for p in parameters if (is_matrix and p not in exempt) == decays and (p in hidden) == muon
            ]
            if members:
                decay = config.weight_decay if decays else 0.0
                where = [places[p] for p in members]
                group = {"params": members, "weight_decay": decay, "scale": scale, "places": where}
                described.append({**group, "muon": True} if muon else group)
    # A tensor as rate can change between replays of a recorded update.
    device = next(network.parameters()).device
    kind = MuonWithAdamW if config.optimizer == "muon" else torch.optim.AdamW
    optimizer = kind(
        described,
        lr=torch.tensor(config.learning_rate, dtype=torch.float32, device=device),
        betas=config.betas,
        fused=True,
        capturable=device.type == "cuda",
    )
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(config.learning_rate, dtype=torch.float32, device=device)  # one of its own
    return optimizer


def _exempt(network: nn.Module) -> set[nn.Parameter]:
    """The parameters of more than one axis that are not decayed: those of modules that say so."""
    modules = (module for module in network.modules() if not getattr(module, "weight_decay", True))
    return {parameter for module in modules for parameter in module.parameters()}


def _places(optimizer: torch.optim.Optimizer) -> dict[int, nn.Parameter]:
    """The parameters by their places in what is stored."""
    groups = optimizer.param_groups
    pairs = (pair for group in groups for pair in zip(group["places"], group["params"], strict=True))
    return dict(sorted(pairs))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, which is what safetensors hold."""
    found = {
        f"{place}.{name}": tensor
        for place, parameter in _places(optimizer).items()
        for name, tensor in optimizer.state.get(parameter, {}).items()
    }
    scale = loss_scale_of(optimizer)
    return found if scale is None else found | {f"{_SCALE}.value": scale.value, f"{_SCALE}.good": scale.good}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, keys: Iterable[str], fill: Callable[[str, Tensor], None]
) -> None:
    """The inverse of ``optimizer_tensors``, for those ``keys``; ``fill(key, tensor)`` gives each its content.

    A moment is sharded as its parameter is. Raises ``KeyError`` or ``ValueError`` if they do not fit.
    """
    parameters, scale = _places(optimizer), loss_scale_of(optimizer)
    for key in keys:
        index, name = key.split(".")
        if index == _SCALE:
            if scale is not None:  # else the run was in fp16 and is no longer
                fill(key, getattr(scale, name))
            continue
        parameter = parameters[int(index)]
        if name == "step":
            tensor = torch.zeros((), dtype=torch.float32, device=parameter.device)
        else:
            tensor = torch.zeros_like(parameter)
        fill(key, tensor)
        optimizer.state[parameter][name] = tensor


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next update, scaled for each group as ``make_optimizer`` was told."""
    for group in optimizer.param_groups:
        group["lr"].fill_(rate * group["scale"])


GRAD_SCALER_DEVICES = ("cpu", "cuda")
"""Where fused optimizers heed found_inf and grad_scale; on Apple's GPUs those before torch 2.13 do not."""


def update(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    loss: Float[Tensor, ""],
    copies: Bf16Weights | None = None,
) -> Float[Tensor, ""]:
    """One update from the gradients at hand, those of ``copies`` too; returns their norm before shortening.

    Where the optimizer has a ``loss_scale``, gradients are those of the loss times the scale, and are divided
    by it. A loss or a norm that is not finite updates nothing. That is decided on the device: nothing waits
    for it. All processes decide alike: gradients and loss are the average over them, or parts of it.
    """
    norm = _gradient_norm(network, [] if copies is None else copies.gradients())
    scale = loss_scale_of(optimizer)
    norm = norm if scale is None else norm / scale.value
    finite, divisor = norm.isfinite() & loss.isfinite(), (norm / clip_norm).clamp(min=1).float()
    divisor = divisor if scale is None else divisor * scale.value
    if norm.device.type in GRAD_SCALER_DEVICES:
        # The optimizer's part of the contract with torch's GradScaler: an update is left out where found_inf
        # is 1, and gradients are divided by grad_scale in the same pass over memory.
        optimizer.found_inf, optimizer.grad_scale = 1 - finite.float(), divisor
        optimizer.step()
    elif finite:
        torch._foreach_div_([p.grad for p in network.parameters() if p.grad is not None], divisor)
        optimizer.step()
    if copies is not None:
        copies.step()
    if scale is not None:
        scale.follow(norm.isfinite())
    optimizer.zero_grad(set_to_none=True)
    return norm


def _gradient_norm(network: nn.Module, halves: list[Tensor]) -> Float[Tensor, ""]:
    """Of all gradients together, ``halves`` included, of which each process may hold a part."""
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if halves:  # summed in fp32: in their own precision the norm would have two digits
        norms = [*torch._foreach_norm(gradients), *torch._foreach_norm(halves, 2, torch.float32)]
        return torch.linalg.vector_norm(torch.stack(norms))
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    square = torch.stack(torch._foreach_norm([local_part(g) for g in gradients])).square().sum()
    dist.all_reduce(square)
    return square.sqrt()
