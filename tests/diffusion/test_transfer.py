"""What is sent to where a network computes."""

import pytest
import torch

from wuerstchen.diffusion.transfer import sent


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_values_arrive(device):
    """A copy that is read before it is there, a precision that is lost on the way."""
    device = torch.device(device)
    for number in range(20):
        tensor = torch.full((1 << 18,), float(number))
        half = sent(tensor, device, torch.float16)
        assert half.dtype == torch.float16
        assert half.device.type == device.type
        del tensor  # its memory may be taken at once
        torch.full((1 << 18,), -1.0)
        assert bool((half == number).all())
    whole = torch.arange(5)
    assert torch.equal(sent(whole, device).cpu(), whole)
