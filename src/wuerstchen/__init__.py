"""Würstchen: text-to-image with latents that are 42× smaller per side.

    import wuerstchen
    model = wuerstchen.load()
    model.generate("a 3D render of a purple camel")[0].save("camel.png")

The names below are imported on first use, so importing the package does not load torch.
"""

import os
from typing import TYPE_CHECKING, Any

from wuerstchen.version import __version__ as __version__

if TYPE_CHECKING:
    from wuerstchen.errors import CheckpointError, DataError, RunFolderError, UserError
    from wuerstchen.pipeline import Sampling, Wuerstchen, load

# Spinning threads block cores as soon as anything else runs, and an image then takes minutes. OpenMP reads
# this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = [
    "CheckpointError",
    "DataError",
    "RunFolderError",
    "Sampling",
    "UserError",
    "Wuerstchen",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from wuerstchen import errors

    if hasattr(errors, name):
        return getattr(errors, name)
    from wuerstchen import pipeline

    return getattr(pipeline, name)
