"""The choice of a device, and transfers."""

import pytest
import torch

from wuerstchen.device import checked_device, default_device, default_precision, to_device
from wuerstchen.errors import UserError


def test_an_available_device_is_used():
    assert checked_device("cpu") == default_device("cpu") == torch.device("cpu")
    assert default_precision(torch.device("cpu")) == "float32"
    assert default_precision(torch.device("cuda", 1)) == "float16"


@pytest.mark.parametrize("device", ["cuda:99", "nothing", "meta"])
def test_an_unavailable_device_is_refused(device):
    with pytest.raises(UserError, match="Use cpu"):
        default_device(device)


def test_the_first_available_device_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert default_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_device() == torch.device("cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_values_arrive(device):
    """A copy that is read before it is complete, or loses precision."""
    device = torch.device(device)
    for number in range(20):
        tensor = torch.full((1 << 18,), float(number))
        half = to_device(tensor, device, torch.float16)
        assert half.dtype == torch.float16
        assert half.device.type == device.type
        del tensor  # its memory may be taken at once
        torch.full((1 << 18,), -1.0)
        assert bool((half == number).all())
    whole = torch.arange(5)
    assert torch.equal(to_device(whole, device).cpu(), whole)
