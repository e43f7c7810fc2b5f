"""Return values of the pipelines and the scheduler, and their configuration."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
from PIL import Image
from torch import Tensor


class Config(dict[str, Any]):
    """Read-only settings, available as ``config.name`` and ``config["name"]``.

    A dict, because diffusers' ``from_config`` takes nothing else.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"There is no setting {name!r}. Use one of {', '.join(self)}.")
        return self[name]

    def _refuse(self, *given: object, **named: object) -> NoReturn:
        raise AttributeError("A configuration is fixed. Create a new object.")

    __setattr__ = __delattr__ = __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self),)

    def __repr__(self) -> str:
        return f"Config({dict(self)})"


@dataclasses.dataclass(eq=False)
class Output(Mapping):
    """Fields that can be read by name, key or position, like diffusers' outputs."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in list(self):
            raise KeyError(key)
        setattr(self, key, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in list(self):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in dataclasses.fields(self))

    def __len__(self) -> int:
        return len(dataclasses.fields(self))

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self)


@dataclasses.dataclass(eq=False)
class WuerstchenPriorPipelineOutput(Output):
    """The prior pipeline's output."""

    image_embeddings: Tensor | np.ndarray
    """Semantic latents, (b, 16, h, w)."""


@dataclasses.dataclass(eq=False)
class ImagePipelineOutput(Output):
    """The decoder's and the combined pipeline's output."""

    images: list[Image.Image] | np.ndarray | Tensor
    """PIL images, an array (b, height, width, 3) in [0, 1], a tensor (b, 3, height, width) in [0, 1], or
    latents (b, 4, h, w)."""


@dataclasses.dataclass(eq=False)
class DDPMWuerstchenSchedulerOutput(Output):
    """The scheduler's output for a step."""

    prev_sample: Tensor
    """The sample at the next, less noisy timestep, which is the next step's input."""
