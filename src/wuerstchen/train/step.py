"""One update of a stage: run as it is written, or recorded once as a CUDA graph and replayed.

A small network on small maps leaves a GPU waiting: starting its thousand kernels takes longer than running
them. A recorded update is started as one. So nothing in it may be decided on the host: what changes from
update to update (which pictures, the learning rate, the decay of the averages) is read from tensors.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from wuerstchen.models.efficientnet import EfficientNetLite
from wuerstchen.models.layers import AttnBlock, ConditionedResBlock, ResBlock, TimestepBlock
from wuerstchen.models.vqgan import MixingResidualBlock
from wuerstchen.train.ema import update_average
from wuerstchen.train.optim import update
from wuerstchen.train.parallel import Processes, is_sharded, synchronise_gradients
from wuerstchen.train.random import ImageRandom
from wuerstchen.train.snapshot import TrainingState
from wuerstchen.train.stages import Inputs, Stage
from wuerstchen.train.throughput import Gauge

Values = dict[str, Tensor]
"""Losses, terms and gradient norms of an update, each a tensor of no dimension on the device."""

_REGIONS = (ResBlock, ConditionedResBlock, TimestepBlock, AttnBlock, MixingResidualBlock, EfficientNetLite)
_RECOMPUTED = (ResBlock, ConditionedResBlock, TimestepBlock, AttnBlock)
_UNRECORDED = 3  # updates that run as written before one is recorded: they compile, and allocate what stays


def compile_regions(network: nn.Module) -> None:
    """Compiles block by block: a block that repeats is compiled once, and the keys of the weights stay."""
    # One block class has as many versions as there are widths and grids.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in network.modules():
        if isinstance(module, _REGIONS):
            if isinstance(module, FSDPModule):  # the hooks that gather its weights stay outside
                module.forward = torch.compile(module.forward, dynamic=False)
            else:
                module.compile(dynamic=False)


def recompute_blocks(network: nn.Module) -> None:
    """Lets blocks keep their input alone, and compute the rest again when gradients ask for it."""
    for module in network.modules():
        if isinstance(module, _RECOMPUTED):
            module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: object) -> Tensor:
        # With the same dropout: the generator is set back for it.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=True)

    return run


class Step:
    """Makes the updates of a stage, one a call.

    A batch is computed in ``Optimization.accumulate`` parts. A network is updated in the last of them, as
    soon as its gradient is whole; networks whose losses come after see it updated in the last part alone. In
    our stages that is no difference: what they read of a network before them was computed before, detached.
    """

    def __init__(
        self, stage: Stage, state: TrainingState, seed: int, autocast: bool, processes: Processes
    ) -> None:
        self.stage = stage
        self.state = state
        self.seed = seed
        self.autocast = autocast
        self.processes = processes
        self.device = processes.device
        self.decay = torch.zeros((), device=self.device)
        """Of the weight averages, for the next update."""
        self.gauge: Gauge | None = None

    def __call__(self, inputs: Inputs, indices: Int[Tensor, " b"]) -> Values:
        """One update of every network of the stage, and of the averages. Waits for nothing on the device."""
        state, parts = self.state, list(self._parts(inputs, indices))
        if self.gauge is not None:
            self.gauge.before_update(*parts[0])
        values: Values = {}
        for part, (part_inputs, part_indices) in enumerate(parts):
            share = len(part_indices) / len(indices)
            last = part + 1 == len(parts)
            self._part(part_inputs, part_indices, share, last, values)
        for name, average in state.averages.items():
            update_average(average, self.stage.networks[name], self.decay)
        return values

    def _parts(self, inputs: Inputs, indices: Tensor) -> Iterator[tuple[Inputs, Tensor]]:
        """The batch in as many parts as it is computed in; of a last batch that is smaller, maybe fewer."""
        count = min(self.stage.optimization.accumulate, len(indices))
        columns = {name: tensor.tensor_split(count) for name, tensor in inputs.items()}
        for part, numbers in enumerate(indices.tensor_split(count)):
            yield {name: column[part] for name, column in columns.items()}, numbers

    def _part(self, inputs: Inputs, indices: Tensor, share: float, last: bool, values: Values) -> None:
        """Adds what this ``share`` of the batch says to the gradients and to ``values``; the last updates."""
        stage, first = self.stage, True
        losses = stage.losses(inputs, ImageRandom(self.seed, indices))
        while True:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                following = next(losses, None)
            if following is None:
                return
            name, loss, terms = following
            network, loss = stage.networks[name], loss * share
            trained: list[nn.Parameter] = []
            if is_sharded(network):
                # Gradients are averaged where they are scattered. Nothing else that learns is in this loss.
                synchronise_gradients(network, last)
                loss.backward()
            else:
                # For this network alone: what else the loss passes through learns from its own loss.
                trained = [p for p in network.parameters() if p.requires_grad]
                loss.backward(inputs=trained)
            key, first = "loss" if first else f"loss_{name}", False
            values[key] = values.get(key, 0) + loss.detach()
            if last:
                self.processes.average_([*(p.grad for p in trained if p.grad is not None), values[key]])
                clip_norm = stage.optimization.clip_norm
                norm = update(network, self.state.optimizers[name], clip_norm, values[key])
                values[f"gradient_{name}"] = norm
            for term, value in terms.items():
                values[term] = values.get(term, 0) + value.detach() * share


class RecordedStep:
    """A ``Step`` on pictures that are on the device: after its first updates it is recorded and replayed.

    ``inputs`` holds a row for every picture; an update reads those in ``rows``.
    """

    def __init__(self, step: Step, inputs: Inputs, record: bool) -> None:
        self.step = step
        self.inputs = inputs
        self.left_unrecorded = _UNRECORDED if record else -1
        self.stream = torch.cuda.Stream() if record else None
        self.replay: Callable[[], None] | None = None
        self.rows = torch.empty(0, dtype=torch.long)
        self.indices = torch.empty(0, dtype=torch.long)
        self.values: Values = {}

    def __call__(self, rows: Int[Tensor, " b"], indices: Int[Tensor, " b"]) -> Values:
        device = self.step.device
        if self.stream is None or (self.replay is not None and len(rows) != len(self.rows)):
            return self._run(rows.to(device), indices.to(device))  # a last batch that is smaller
        if self.left_unrecorded > 0:
            self.left_unrecorded -= 1
            # On a stream of its own, as what is recorded later will be.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                values = self._run(rows.to(device), indices.to(device))
            torch.cuda.current_stream().wait_stream(self.stream)
            return values
        if self.replay is None:
            self.rows, self.indices = rows.to(device), indices.to(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self.values = self._run(self.rows, self.indices)
            self.replay = graph.replay
        else:
            self.rows.copy_(rows, non_blocking=True)
            self.indices.copy_(indices, non_blocking=True)
        self.replay()
        return self.values

    def _run(self, rows: Tensor, indices: Tensor) -> Values:
        return self.step({name: tensor[rows] for name, tensor in self.inputs.items()}, indices)
