"""Batch norm over all processes: the same as torch's over the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from wuerstchen.train.engine.batch_norm import convert_batch_norm


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_reduce is deprecated:FutureWarning")
@pytest.mark.parametrize("affine", [False, True])
def test_batch_statistics_equal_those_of_torch(alone, affine):
    """Values, gradients, and the running statistics. The running variance is n/(n − 1) times the batch's."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(3, affine=affine, momentum=0.3)
    ours = copy.deepcopy(theirs)
    convert_batch_norm(ours)
    assert type(ours) is not type(theirs)
    for _ in range(3):
        x = 2 + 3 * torch.randn(2, 3, 2, 2)
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        weights = torch.randn(2, 3, 2, 2)
        made, expected = ours(mine), theirs(other)
        torch.testing.assert_close(made, expected)
        (made * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
