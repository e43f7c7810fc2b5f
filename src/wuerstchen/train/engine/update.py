"""One update of a stage, run eagerly or recorded once as a CUDA graph and replayed.

Launching the thousand kernels of an update one by one leaves a GPU idle. A recorded update is a single
launch. So nothing in it may be decided on the host: what changes from update to update (inputs, image
numbers, learning rate) is read from tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from wuerstchen.models.traits import traits_of
from wuerstchen.runtime.graphs import Graphs
from wuerstchen.train.engine.bf16_weights import Bf16Weights
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.ema import update_average
from wuerstchen.train.engine.factored import FactoredAdamW
from wuerstchen.train.engine.loss_scale import LEAST_SCALE, loss_scale_of
from wuerstchen.train.engine.optim import update
from wuerstchen.train.engine.sharding import is_sharded, synchronise_gradients
from wuerstchen.train.engine.throughput import Gauge
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.base import Inputs, Stage, autocast

Values = dict[str, Tensor]
"""Losses, terms and gradient norms of an update, each a 0-d tensor on the device."""

_WARM_UPS = 3  # eager updates of a shape before it is recorded: they compile, and allocate what stays


def compile_regions(network: nn.Module) -> None:
    """Compiles block by block: repeated blocks are compiled once, and the keys of the weights do not
    change."""
    # A block class is compiled once for each width and grid.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in network.modules():
        if traits_of(module).compile:
            if isinstance(module, FSDPModule):  # leave the hooks that gather its weights uncompiled
                module.forward = torch.compile(module.forward, dynamic=False)
            else:
                module.compile(dynamic=False)


def recompute_blocks(network: nn.Module) -> None:
    """Activation checkpointing: blocks keep only their input and recompute the rest in the backward pass."""
    for module in network.modules():
        if traits_of(module).recompute:
            module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: object) -> Tensor:
        # Restoring the generator gives the recomputation the same dropout masks.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=True)

    return run


def make_bf16_weights(stage: Stage, state: TrainingState) -> dict[str, Bf16Weights]:
    """bf16 copies of the large matrices of a stage's networks, for passes that are in bf16 anyway.

    Empty for a stage that accumulates gradients: bf16 lacks the precision for sums.
    """
    if stage.optimization.accumulate > 1:
        return {}
    return {name: Bf16Weights(net, state.optimizers[name]) for name, net in stage.networks.items()}


@contextmanager
def _keeping_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Undoes what a backward pass inside this context adds to the gradients of ``parameters``."""
    kept = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    yield
    for p, gradient in zip(parameters, kept, strict=True):
        p.grad = gradient


class TrainStep:
    """Makes one update of each network of a stage per call.

    A batch is computed in ``Optimization.accumulate`` parts. A network is updated in the last part, as soon
    as its gradient is complete. In that part, losses that follow would see the updated network. In our stages
    this makes no difference: they read only detached outputs from before the update.
    """

    def __init__(
        self,
        stage: Stage,
        state: TrainingState,
        seed: int,
        dtype: torch.dtype | None,
        processes: Processes,
        copies: dict[str, Bf16Weights] | None = None,
    ) -> None:
        """``dtype`` is what autocast computes in; None is without autocast. With ``copies`` forward and
        backward passes read bf16 copies of the large matrices (``make_bf16_weights``)."""
        self.copies = copies or {}
        self.stage = stage
        self.state = state
        self.seed = seed
        self.dtype = dtype
        self.processes = processes
        self.device = processes.device
        self.fault = torch.full((), -1, dtype=torch.int64, device=self.device)
        """The first image of the first update whose loss or gradient was not finite; -1 without one."""
        self.decay: float | None = None
        """EMA decay after the next update; None to leave the averages as they are."""
        self.gauge: Gauge | None = None

    def __call__(self, inputs: Inputs, indices: Int[Tensor, " b"]) -> Values:
        """One update of every network of the stage, without waiting for the device."""
        parts = list(self._parts(inputs, indices))
        if self.gauge is not None:
            self.gauge.before_update(*parts[0])
        values: Values = {}
        for part, (part_inputs, part_indices) in enumerate(parts):
            weight = len(part_indices) / len(indices)
            last = part + 1 == len(parts)
            self._part(part_inputs, part_indices, weight, last, values)
        checked = [value.float() for name, value in values.items() if name.startswith(("loss", "gradient"))]
        faulty = ~torch.stack(checked).isfinite().all()
        for scale in filter(None, map(loss_scale_of, self.state.optimizers.values())):
            faulty = faulty | (scale.value < LEAST_SCALE)
        first = indices[0] - self.processes.rank * len(indices)  # of the whole batch, the same on all ranks
        self.fault.copy_(torch.where((self.fault < 0) & faulty, first, self.fault))
        return values

    def _parts(self, inputs: Inputs, indices: Tensor) -> Iterator[tuple[Inputs, Tensor]]:
        """The batch in ``accumulate`` parts, or fewer if it has fewer images."""
        count = min(self.stage.optimization.accumulate, len(indices))
        columns = {name: tensor.tensor_split(count) for name, tensor in inputs.items()}
        for part, numbers in enumerate(indices.tensor_split(count)):
            yield {name: column[part] for name, column in columns.items()}, numbers

    def _part(self, inputs: Inputs, indices: Tensor, weight: float, last: bool, values: Values) -> None:
        """Adds a part, which counts ``weight`` of the batch, to gradients and ``values``. The last one
        updates."""
        stage, first = self.stage, True
        losses = stage.losses(inputs, ImageRandom(self.seed, indices))
        while True:
            with self._reading_copies(), autocast(self.device, self.dtype):
                following = next(losses, None)
            if following is None:
                return
            name, loss, terms = following
            network, loss = stage.networks[name], loss * weight
            scale = loss_scale_of(self.state.optimizers[name])
            scaled = loss if scale is None else loss * scale.value
            if is_sharded(network):
                # FSDP averages gradients in its reduce-scatter. It cannot say which weights get a gradient.
                synchronise_gradients(network, last)
                with self._reading_copies(), _keeping_gradients(self._others(name)):
                    scaled.backward()
            else:
                with self._reading_copies():
                    # For this network only: other networks in this loss learn from losses of their own.
                    trained = [p for p in network.parameters() if p.requires_grad]
                    released = self._prepare_release(name, loss)
                    kept = [p for p in trained if p not in released]
                    with self.processes.averaging_gradients(kept if last else []):
                        scaled.backward(inputs=trained)
            key, first = "loss" if first else f"loss_{name}", False
            values[key] = values.get(key, 0) + loss.detach()
            if last:
                self.processes.all_reduce_mean_([values[key]])
                clip_norm = stage.optimization.clip_norm
                optimizer, copies = self.state.optimizers[name], self.copies.get(name)
                if scale is not None:
                    values[f"scale_{name}"] = scale.value.clone()
                norm = update(network, optimizer, clip_norm, values[key], copies)
                if scale is not None:  # an overflow is not a fault: it lowers the scale
                    norm = torch.where(norm.isfinite(), norm, torch.zeros_like(norm))
                values[f"gradient_{name}"] = norm
            for term, value in terms.items():
                values[term] = values.get(term, 0) + value.detach() * weight

    def _prepare_release(self, name: str, loss: Tensor) -> frozenset[nn.Parameter]:
        """The weights that the next backward pass updates. It skips all of them if the loss is not finite on
        any rank."""
        optimizer = self.state.optimizers[name]
        if not isinstance(optimizer, FactoredAdamW) or not optimizer.released:
            return frozenset()
        mean = loss.detach().float().clone()
        self.processes.all_reduce_mean_([mean])
        optimizer.found_inf = 1 - mean.isfinite().float()
        return optimizer.released

    def _others(self, name: str) -> list[nn.Parameter]:
        """The weights of the networks that a loss of ``name`` does not update."""
        others = [network for key, network in self.stage.networks.items() if key != name]
        return [p for network in others for p in network.parameters() if p.requires_grad]

    @contextmanager
    def _reading_copies(self) -> Iterator[None]:
        with ExitStack() as stack:
            for copies in self.copies.values():
                stack.enter_context(copies.in_place())
            yield

    def average(self) -> None:
        """Updates the weight averages. This is not recorded, because a recording would fix the decay."""
        if self.decay is None:
            return
        for name, average in self.state.averages.items():
            update_average(average, self.stage.networks[name], self.decay)


class StepRunner:
    """Runs updates and their averaging. With ``record``, each shape of inputs is recorded as a CUDA graph
    after its first updates and replayed from then on.
    """

    def __init__(self, step: TrainStep, record: bool) -> None:
        self.step = step
        self.graphs = Graphs(torch.cuda.Stream(), _WARM_UPS, non_blocking=True) if record else None

    def close(self) -> None:
        """Drops the recordings. NCCL would wait for them when the process group is destroyed."""
        if self.graphs is not None:
            self.graphs.forget()

    def __call__(self, inputs: Inputs, indices: Int[Tensor, " b"]) -> Values:
        values = self._update(inputs, indices)
        self.step.average()
        return values

    def _update(self, inputs: Inputs, indices: Tensor) -> Values:
        if self.graphs is None:
            return self.step(inputs, indices)
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        if not self.graphs.is_warm(shape):
            return self.graphs.warm_up(shape, lambda: self.step(inputs, indices))
        values = (*inputs.values(), indices)
        if shape not in self.graphs:
            names = tuple(inputs)
            self.graphs.record(
                shape, lambda *own: self.step(dict(zip(names, own[:-1], strict=True)), own[-1]), values
            )
        return self.graphs.replay(shape, values)
