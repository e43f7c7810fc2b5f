"""One update of a stage: run as it is written, or recorded once as a CUDA graph and replayed.

Starting the thousand kernels of an update one by one leaves a GPU waiting. A recorded update is started as
one. So nothing in it may be decided on the host: what changes from update to update (the inputs, the images'
numbers, the learning rate) is read from tensors.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from wuerstchen.models.efficientnet import EfficientNetLite
from wuerstchen.models.layers import AttnBlock, ConditionedResBlock, ResBlock, TimestepBlock
from wuerstchen.models.vqgan import MixingResidualBlock
from wuerstchen.train.ema import update_average
from wuerstchen.train.optim import update
from wuerstchen.train.parallel import Processes
from wuerstchen.train.random import ImageRandom
from wuerstchen.train.snapshot import TrainingState
from wuerstchen.train.stages import Inputs, Stage
from wuerstchen.train.throughput import Gauge

Values = dict[str, Tensor]
"""Losses, terms and gradient norms of an update, each a tensor of no dimension on the device."""

_REGIONS = (ResBlock, ConditionedResBlock, TimestepBlock, AttnBlock, MixingResidualBlock, EfficientNetLite)
_UNRECORDED = 3  # updates that run as written before one is recorded: they compile, and allocate what stays


def compile_regions(network: nn.Module) -> None:
    """Compiles block by block: a block that repeats is compiled once, and the keys of the weights stay."""
    # One block class has as many versions as there are widths and grids.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in network.modules():
        if isinstance(module, _REGIONS):
            module.compile(dynamic=False)


class Step:
    """Makes the updates of a stage, one a call."""

    def __init__(
        self, stage: Stage, state: TrainingState, seed: int, autocast: bool, processes: Processes
    ) -> None:
        self.stage = stage
        self.state = state
        self.seed = seed
        self.autocast = autocast
        self.processes = processes
        self.device = processes.device
        self.decay: float | None = None
        """Of the weight averages, for the next update; None where they do not follow it."""
        self.gauge: Gauge | None = None

    def __call__(self, inputs: Inputs, indices: Int[Tensor, " b"]) -> Values:
        """One update of every network of the stage. Waits for nothing on the device."""
        stage, state = self.stage, self.state
        if self.gauge is not None:
            self.gauge.before_update(inputs, indices)
        random = ImageRandom(self.seed, indices)
        values: Values = {}
        losses = stage.losses(inputs, random)
        while True:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                following = next(losses, None)
            if following is None:
                break
            name, loss, terms = following
            network = stage.networks[name]
            # Gradients for this network alone: what else the loss passes through learns from its own loss.
            trained = [p for p in network.parameters() if p.requires_grad]
            loss.backward(inputs=trained)
            loss = loss.detach().clone()
            self.processes.average_([*(p.grad for p in trained if p.grad is not None), loss])
            norm = update(network, state.optimizers[name], stage.optimization.clip_norm, loss)
            key = "loss" if "loss" not in values else f"loss_{name}"
            values |= {key: loss, f"gradient_{name}": norm}
            values |= {term: value.detach() for term, value in terms.items()}
        return values

    def average(self) -> None:
        """Lets the averages follow the networks. Not recorded: that would fix their decay."""
        if self.decay is None:
            return
        for name, average in self.state.averages.items():
            update_average(average, self.stage.networks[name], self.decay)


@dataclass
class _Recording:
    """A recorded update, with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    indices: Tensor
    values: Values

    def __call__(self, inputs: Inputs, indices: Tensor) -> Values:
        for name, tensor in self.inputs.items():
            tensor.copy_(inputs[name], non_blocking=True)
        self.indices.copy_(indices, non_blocking=True)
        self.graph.replay()
        return self.values


class Updates:
    """Makes updates with their averages. With ``record`` each shape of inputs is recorded after its first
    updates and replayed from then on.
    """

    def __init__(self, step: Step, record: bool) -> None:
        self.step = step
        self.stream = torch.cuda.Stream() if record else None
        self.seen: dict[tuple, int] = {}
        self.recordings: dict[tuple, _Recording] = {}

    def __call__(self, inputs: Inputs, indices: Int[Tensor, " b"]) -> Values:
        values = self._update(inputs, indices)
        self.step.average()
        return values

    def _update(self, inputs: Inputs, indices: Tensor) -> Values:
        if self.stream is None:
            return self.step(inputs, indices)
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        if shape in self.recordings:
            return self.recordings[shape](inputs, indices)
        self.seen[shape] = self.seen.get(shape, 0) + 1
        if self.seen[shape] <= _UNRECORDED:
            # On a stream of its own, as what is recorded later will be.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                values = self.step(inputs, indices)
            torch.cuda.current_stream().wait_stream(self.stream)
            return values
        # Recording runs nothing, so it is replayed at once. All recordings share their memory, for one runs
        # at a time.
        mine = {name: tensor.clone() for name, tensor in inputs.items()}
        numbers, graph = indices.clone(), torch.cuda.CUDAGraph()
        others = next(iter(self.recordings.values()), None)
        pool = None if others is None else others.graph.pool()
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            values = self.step(mine, numbers)
        self.recordings[shape] = _Recording(graph, mine, numbers, values)
        return self.recordings[shape](inputs, indices)
