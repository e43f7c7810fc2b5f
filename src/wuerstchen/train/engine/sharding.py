"""Networks sharded over the processes of a run (FSDP2): each holds a part of every large weight."""

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
    """Lets each process keep its part of a network's weights alone, in place; whether it is one to shard.

    Blocks are gathered when they compute, what lies between them with the network. Small networks stay whole:
    those of Stage A, the discriminator, the previewer; and v1's Stage B, whose last layer its loss reads. A
    copy of a sharded network cannot be made: what is to be a copy is copied first and sharded alike.
    """
    roots = [module for module in network.modules() if traits_of(module).shard == "network"]
    stays_whole = any(traits_of(module).shard == "keep whole" for module in network.modules())
    if processes.count == 1 or stays_whole or not roots:
        return False
    # Nothing in a forward pass changes in place what a network has returned.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for root in roots:
        for module in root.modules():
            if traits_of(module).shard == "block":
                fully_shard(module, mesh=mesh)
        fully_shard(root, mesh=mesh)
        if hasattr(root, "context"):
            register_fsdp_forward_method(root, "context")
    return True


def is_sharded(network: nn.Module) -> bool:
    """Whether ``shard`` has sharded a network."""
    return any(isinstance(module, FSDPModule) for module in network.modules())


def synchronise_gradients(network: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass of a sharded network averages gradients, or only adds them up."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(wanted, recurse=False)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory: all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: DTensor) -> int:
    """Where this process's part of a tensor begins: they are as ``torch.chunk`` makes them."""
    rows, count = tensor.shape[0], tensor.device_mesh.size()
    return min(tensor.device_mesh.get_local_rank() * -(-rows // count), rows)


def empty_copy(network: nn.Module) -> nn.Module:
    """A network as this one without memory, to be filled by ``gather``. Made before sharding."""
    return copy.deepcopy(network).to("meta")


@torch.no_grad()
def gather(network: nn.Module, empty: nn.Module, processes: Processes) -> nn.Module:
    """A whole copy of a sharded network, in the first process alone; others get the ``empty`` one.

    All processes take part. The first needs memory for all the weights, the others for one tensor at a time.
    Where the first has not enough it raises what torch raised, after its part in the exchange: the others
    do not notice.
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
