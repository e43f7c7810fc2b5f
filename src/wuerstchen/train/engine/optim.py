"""Optimizers, the learning rate schedule, and the update itself."""

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
from wuerstchen.train.engine.factored import FactoredAdamW, is_factored, zero_state
from wuerstchen.train.engine.loss_scale import loss_scale_of
from wuerstchen.train.engine.muon import MuonWithAdamW, hidden_matrices
from wuerstchen.train.engine.sharding import local_part

_SCALE = "loss_scale"  # prefix of its keys in checkpoints
FINAL_FRACTION = 0.05  # of the peak learning rate, at the end of a cosine decay


def learning_rate(config: Optimization, images: int) -> float:
    """The learning rate of the update that ends at ``images``. A pure function: there is no state to
    store."""
    if images < config.warmup:
        return config.learning_rate * images / config.warmup
    if config.decay == "constant":
        return config.learning_rate
    done = (images - config.warmup) / max(config.images - config.warmup, 1)
    cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return config.learning_rate * (FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine)


def make_optimizer(
    network: nn.Module,
    config: Optimization,
    rate_scales: Mapping[str, float] | None = None,
    *,
    decays_all_axes: bool = False,
) -> torch.optim.AdamW:
    """AdamW over a network's trainable parameters. With ``config.optimizer="muon"``, Muon updates the
    matrices inside blocks (``muon.hidden_matrices``). Matrices in bf16 have 2 bytes of state per weight
    (``factored.FactoredAdamW``).

    Weight decay applies to weights of linear layers, convolutions and embeddings. It does not apply to biases
    and scales, including GRN's gamma and beta, nor to the codebook, which follows the latents. The original
    decays every parameter, with torch's default of 0.01.

    ``rate_scales`` maps prefixes of parameter names to factors of the learning rate. ``decays_all_axes`` is
    for runs of earlier versions, which decayed every parameter with more than one axis.
    """
    hidden = hidden_matrices(network) if config.optimizer == "muon" else set()
    exempt = set() if decays_all_axes else _exempt(network)
    # Checkpoints store parameters by place, and the order depends on the number of axes, not on the decay.
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
        for decays, kind in itertools.product((True, False), ("muon", "factored", "")):
            members = [
                p
                for p in parameters
                if (is_matrix and p not in exempt) == decays and _kind(p, hidden) == kind
            ]
            if members:
                decay = config.weight_decay if decays else 0.0
                where = [places[p] for p in members]
                group = {"params": members, "weight_decay": decay, "scale": scale, "places": where}
                described.append({**group, kind: True} if kind else group)
    # A tensor, because a recorded update reads the rate from it at each replay.
    device = next(network.parameters()).device
    optimizer = _class_for(config, described)(
        described,
        lr=torch.tensor(config.learning_rate, dtype=torch.float32, device=device),
        betas=config.betas,
        fused=True,
        capturable=device.type == "cuda",
    )
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(config.learning_rate, dtype=torch.float32, device=device)  # not shared
    return optimizer


def _kind(parameter: nn.Parameter, hidden: set[nn.Parameter]) -> str:
    """The mark of a parameter's group: how it is updated. Empty for AdamW."""
    if parameter in hidden:
        return "muon"
    return "factored" if is_factored(parameter) else ""


def _class_for(config: Optimization, groups: list[dict[str, Any]]) -> type[torch.optim.AdamW]:
    if config.optimizer == "muon":
        return MuonWithAdamW
    return FactoredAdamW if any(group.get("factored") for group in groups) else torch.optim.AdamW


def _exempt(network: nn.Module) -> set[nn.Parameter]:
    """Parameters of modules that opt out of weight decay (``weight_decay = False``)."""
    modules = (module for module in network.modules() if not getattr(module, "weight_decay", True))
    return {parameter for module in modules for parameter in module.parameters()}


def _places(optimizer: torch.optim.Optimizer) -> dict[int, nn.Parameter]:
    """The parameters by their places in checkpoints."""
    groups = optimizer.param_groups
    pairs = (pair for group in groups for pair in zip(group["places"], group["params"], strict=True))
    return dict(sorted(pairs))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, for safetensors."""
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
    """The inverse of ``optimizer_tensors`` for these ``keys``. ``fill(key, tensor)`` loads each tensor.

    Moments are sharded like their parameters. Raises ``KeyError`` or ``ValueError`` if the keys do not fit.
    """
    parameters, scale = _places(optimizer), loss_scale_of(optimizer)
    for key in keys:
        index, name = key.split(".")
        if index == _SCALE:
            if scale is not None:  # the run may have been in fp16 before
                fill(key, getattr(scale, name))
            continue
        parameter = parameters[int(index)]
        tensor = zero_state(parameter, name)
        fill(key, tensor)
        optimizer.state[parameter][name] = tensor


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next update, scaled for each group (``rate_scales``)."""
    for group in optimizer.param_groups:
        group["lr"].fill_(rate * group["scale"])


GRAD_SCALER_DEVICES = ("cpu", "cuda")
"""Devices whose fused optimizers support found_inf and grad_scale. MPS lacks them before torch 2.13."""


def update(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    loss: Float[Tensor, ""],
    copies: Bf16Weights | None = None,
) -> Float[Tensor, ""]:
    """One update from the current gradients, including those of ``copies``. Returns their norm before
    clipping.

    If the optimizer has a ``loss_scale``, gradients are divided by it first. If the loss or the norm is not
    finite, nothing is updated. This is decided on the device, without waiting for it, and in the same way on
    all ranks, because loss and gradients are averaged over them.
    """
    others = [] if copies is None else copies.gradients()
    released = optimizer.released_norms() if isinstance(optimizer, FactoredAdamW) else []
    norm = _gradient_norm(network, others, released)
    scale = loss_scale_of(optimizer)
    norm = norm if scale is None else norm / scale.value
    finite, divisor = norm.isfinite() & loss.isfinite(), (norm / clip_norm).clamp(min=1).float()
    divisor = divisor if scale is None else divisor * scale.value
    if norm.device.type in GRAD_SCALER_DEVICES:
        # The interface of torch's GradScaler: the optimizer skips an update if found_inf is 1, and divides
        # gradients by grad_scale in the same pass over memory.
        optimizer.found_inf, optimizer.grad_scale = 1 - finite.float(), divisor
        optimizer.step()
    elif finite:
        torch._foreach_div_([p.grad for p in network.parameters() if p.grad is not None], divisor)
        optimizer.step()
    if copies is not None:
        copies.step()
    if scale is not None:
        scale.update(norm.isfinite())
    optimizer.zero_grad(set_to_none=True)
    return norm


def _gradient_norm(
    network: nn.Module, bf16_gradients: list[Tensor], released: list[Tensor]
) -> Float[Tensor, ""]:
    """The norm of all gradients, also of those that are sharded, of ``bf16_gradients``, and of those that had
    the norms in ``released``."""
    every = [p.grad for p in network.parameters() if p.grad is not None]
    gradients = [gradient for gradient in every if gradient.dtype is not torch.bfloat16]
    halves = bf16_gradients + [gradient for gradient in every if gradient.dtype is torch.bfloat16]
    if halves or released:  # summed in fp32: in bf16 the norm would have two digits
        norms = [*(torch._foreach_norm(gradients) if gradients else ()), *released]
        norms += torch._foreach_norm(halves, 2, torch.float32) if halves else ()
        return torch.linalg.vector_norm(torch.stack(norms))
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    square = torch.stack(torch._foreach_norm([local_part(g) for g in gradients])).square().sum()
    dist.all_reduce(square)
    return square.sqrt()
