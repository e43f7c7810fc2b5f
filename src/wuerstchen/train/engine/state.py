"""The state of a stage at the start of its training: new, or from its newest checkpoint."""

import torch
from torch import nn

from wuerstchen.train.engine import checkpoint
from wuerstchen.train.engine.batch_norm import convert_batch_norm
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.factored import FactoredAdamW, keep_in_bf16
from wuerstchen.train.engine.job import StageJob
from wuerstchen.train.engine.loss_scale import LossScale
from wuerstchen.train.engine.optim import make_optimizer
from wuerstchen.train.engine.sharding import empty_copy, is_sharded, shard
from wuerstchen.train.engine.update import TrainStep, compile_regions, make_bf16_weights, recompute_blocks
from wuerstchen.train.stages.base import UsesAverages, UsesBackbones


def make_state(job: StageJob) -> checkpoint.TrainingState:
    """Networks, averages and optimizers of a stage, restored from its newest complete checkpoint if any.

    All ranks call it. Raises ``CheckpointError`` for an incompatible checkpoint.
    """
    stage, settings, processes = job.stage, job.settings, job.processes
    for network in stage.networks.values():
        if processes.count > 1:
            convert_batch_norm(network)
    averages = _averages_and_precision(job)
    for network in stage.networks.values():
        network.to(processes.device).train()
    state = checkpoint.TrainingState(
        networks=stage.networks,
        averages=averages,
        whole=_shard_all(job, averages) if settings.shards else {},
        optimizers={
            name: make_optimizer(
                network, stage.optimization, stage.rate_scales, decays_all_axes=settings.decays_all_axes
            )
            for name, network in stage.networks.items()
        },
    )
    if settings.autocast is torch.float16:
        for optimizer in state.optimizers.values():
            optimizer.loss_scale = LossScale(processes.device)
    found = checkpoint.newest_of_all(job.checkpoints, processes)
    if found is not None:
        checkpoint.restore(state, *found, processes)
    if isinstance(stage, UsesAverages):
        stage.use_averages(state.averages)
    backbones = stage.backbones if isinstance(stage, UsesBackbones) else ()
    for network in (*stage.networks.values(), *backbones) if state.images < job.total else ():
        if settings.recomputes:
            recompute_blocks(network)
        if settings.compiles:
            compile_regions(network)
    return state


def _averages_and_precision(job: StageJob) -> dict[str, nn.Module]:
    """The averages of new networks. To save memory, averages are kept in host memory, and large weights of
    the networks are rounded to bf16 after these fp32 copies were made.

    Averages that losses read are on the device in any case.
    """
    stage, device = job.stage, job.processes.device
    if job.settings.memory == "normal":
        for network in stage.networks.values():
            network.to(device)
        return {name: make_average(stage.networks[name]) for name in stage.averaged}
    host = device if isinstance(stage, UsesAverages) else torch.device("cpu")
    averages = {name: make_average(stage.networks[name].to("cpu")).to(host) for name in stage.averaged}
    for network in stage.networks.values():
        keep_in_bf16(network, accumulates=stage.optimization.accumulate > 1)
    return averages


def _shard_all(job: StageJob, averages: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Shards networks and averages in place. Returns an empty copy of each average that is now sharded."""
    empty = {name: empty_copy(average) for name, average in averages.items()}
    for network in (*job.stage.networks.values(), *averages.values()):
        shard(network, job.processes)
    return {name: copy for name, copy in empty.items() if is_sharded(averages[name])}


def make_step(job: StageJob, state: checkpoint.TrainingState) -> TrainStep:
    """The training step of a stage."""
    settings = job.settings
    with_copies = settings.records and settings.autocast is torch.bfloat16
    copies = make_bf16_weights(job.stage, state) if with_copies else {}
    for optimizer in state.optimizers.values() if settings.memory == "lowest" else ():
        if isinstance(optimizer, FactoredAdamW):
            optimizer.update_in_backward(job.processes.all_reduce_mean_)
    return TrainStep(job.stage, state, job.seed, settings.autocast, job.processes, copies)
