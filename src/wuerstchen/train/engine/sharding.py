"""Shards large networks over the processes of a run with FSDP2."""

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from wuerstchen.errors import is_out_of_memory
from wuerstchen.models.traits import traits_of
from wuerstchen.train.engine.distributed import Processes


def shard(network: nn.Module, processes: Processes) -> bool:
    """Shards a network in place. Returns False, with nothing changed, for a network that is not sharded.

    Each block is a unit of its own, and the layers between blocks form another. Small networks stay whole:
    those of Stage A, the discriminator and the previewer. So does v1's Stage B: its loss reads the weight of
    the last layer. A sharded network cannot be copied. Make copies first, and shard them the same way.
    """
    roots = [module for module in network.modules() if traits_of(module).shard == "network"]
    stays_whole = any(traits_of(module).shard == "keep whole" for module in network.modules())
    if processes.count == 1 or stays_whole or not roots:
        return False
    # The warning is about in-place changes to the output, and no forward pass makes any.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for root in roots:
        for module in root.modules():
            if traits_of(module).shard == "block":
                fully_shard(module, mesh=mesh)
        fully_shard(root, mesh=mesh)
        for method in ("context", "with_features"):
            if hasattr(root, method):
                register_fsdp_forward_method(root, method)
    return True


def is_sharded(network: nn.Module) -> bool:
    """Whether a network or a part of it is sharded."""
    return any(isinstance(module, FSDPModule) for module in network.modules())


def synchronise_gradients(network: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass of a sharded network averages gradients over ranks or only accumulates
    them."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(enabled, recurse=False)


def local_part(tensor: Tensor) -> Tensor:
    """The shard of a tensor on this process, as a view; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: DTensor) -> int:
    """The first row of this process's shard. Shards are split as by ``torch.chunk``."""
    rows, count = tensor.shape[0], tensor.device_mesh.size()
    return min(tensor.device_mesh.get_local_rank() * -(-rows // count), rows)


def empty_copy(network: nn.Module) -> nn.Module:
    """A copy on the meta device for ``gather`` to fill. Make it before sharding."""
    return copy.deepcopy(network).to("meta")


@torch.no_grad()
def gather(network: nn.Module, empty: nn.Module, processes: Processes) -> nn.Module:
    """A whole copy of a sharded network on rank 0; other ranks get ``empty`` back.

    All ranks call it. Rank 0 needs memory for all weights, the others for one tensor at a time. If rank 0
    runs out of memory, it still takes part in all collectives and raises torch's error afterwards.
    """
    tensors: dict[str, Tensor] = {}
    lack: BaseException | None = None
    for name, tensor in network.state_dict().items():
        try:
            whole = _whole(tensor)
        except (MemoryError, RuntimeError) as error:
            if not processes.is_main or not is_out_of_memory(error):
                raise
            lack = error.with_traceback(None)
            tensors.clear()
            if tensor.device.type == "cuda":
                torch.cuda.empty_cache()
            whole = _whole(tensor)
        if processes.is_main and lack is None:
            tensors[name] = whole
    if lack is not None:
        raise lack
    if not processes.is_main:
        return empty
    filled = copy.deepcopy(empty)
    filled.load_state_dict(tensors, assign=True)
    return filled.requires_grad_(False)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
