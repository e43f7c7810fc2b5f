"""torch's defaults as this package expects them, whatever a caller has set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def usual_defaults() -> Iterator[None]:
    """New layers are in fp32 on the CPU inside, as without any setting; the caller's own come back after.

    For work that builds networks anew. The default dtype belongs to the whole process, so other threads see
    it too. Drawing needs none of this: it says dtype and device of every tensor.
    """
    dtype = torch.get_default_dtype()
    if dtype == torch.float32 and torch.get_default_device().type == "cpu":
        yield  # the mode below would cost time in every operation
        return
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
