"""Restores torch's usual defaults, whatever a caller has set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Creates new layers in fp32 on the CPU inside the block, and restores the caller's defaults afterwards.

    For code that creates networks. The default dtype is global, so other threads see it too. Sampling does
    not need this: it specifies dtype and device of every tensor.
    """
    dtype = torch.get_default_dtype()
    if dtype == torch.float32 and torch.get_default_device().type == "cpu":
        yield  # the device mode below would slow down every operation
        return
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
