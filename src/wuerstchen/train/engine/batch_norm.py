"""Batch norm over the whole batch, for any number of processes."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that trains with the statistics of the whole batch, over all processes.

    Like torch's SyncBatchNorm, which needs GPUs. Mean and variance are computed in two passes, in at least
    fp32: a single pass over sums of squares loses the digits in which the processes must agree.
    """

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if not self.training:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            x = input.to(torch.promote_types(input.dtype, torch.float32))
            count = x.numel() // x.shape[1] * dist.get_world_size()
            mean = all_reduce(x.sum(dim=(0, 2, 3))) / count
            centred = x - mean[:, None, None]
            variance = all_reduce(centred.square().sum(dim=(0, 2, 3))) / count
            self._update_running(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
            scale = (variance + self.eps).rsqrt()
            if self.affine:
                scale = scale * self.weight
            result = centred * scale[:, None, None]
            return (result + self.bias[:, None, None] if self.affine else result).to(input.dtype)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        """Updates the running statistics, which are used in eval mode."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def convert_batch_norm(network: nn.Module) -> None:
    """Makes every batch norm of a network compute its statistics over all processes, in place."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
