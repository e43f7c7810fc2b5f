"""The scheduler of the Würstchen pipelines, with diffusers' names."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.checkpoints.diffusers import read_schedule
from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.device import to_device
from wuerstchen.diffusers.options import drop_options
from wuerstchen.diffusers.outputs import Config, DDPMWuerstchenSchedulerOutput
from wuerstchen.diffusion.schedule import CosineSchedule
from wuerstchen.errors import UserError, shown

Generators = torch.Generator | Sequence[torch.Generator] | None

CONFIG_NAME = "scheduler_config.json"


def draw_normal(
    shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "b ..."]:
    """Standard normal numbers, generated on the generator's device and moved to ``device``.

    One generator, or a list of one, generates the whole batch. A longer list has one per image.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        if len(generator) not in (1, shape[0]):
            raise UserError(
                f"There must be 1 or {shape[0]} generators for a batch of {shape[0]}, got {len(generator)}."
            )
        if len(generator) > 1:
            return torch.cat([draw_normal((1, *shape[1:]), one, device, dtype) for one in generator])
        generator = generator[0]
    source = device if generator is None else generator.device
    return to_device(torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype), device)


def check_timesteps(timesteps: Any) -> Float[Tensor, " n"]:
    """Custom timesteps in fp32. Raises ``UserError`` unless they decrease from at most 1 to at least 0."""
    try:
        times = torch.as_tensor(
            timesteps, dtype=torch.float32, device=None if isinstance(timesteps, Tensor) else "cpu"
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"'timesteps' must be a list of numbers, got {timesteps!r}.") from error
    values = times.tolist() if times.ndim == 1 else [math.nan]
    falling = all(now >= then for now, then in itertools.pairwise(values))
    if not (falling and all(0 <= value <= 1 for value in values)):
        raise UserError(
            "timesteps must be a list of numbers that decrease from at most 1 (noise) to at least 0, got "
            f"{shown(values)}. DEFAULT_STAGE_C_TIMESTEPS is such a list."
        )
    return times


def schedule_of(scheduler: Any) -> CosineSchedule:
    """The schedule of a pipeline's scheduler. Raises ``UserError`` for other kinds of schedulers."""
    missing = [name for name in ("s", "scaler") if name not in scheduler.config]
    if missing:
        raise UserError(
            f"A {type(scheduler).__name__} cannot be saved: it has no {missing[0]}. Pipelines can "
            "only be saved with a DDPMWuerstchenScheduler. Set one as scheduler before saving."
        )
    return CosineSchedule(s=float(scheduler.config["s"]), scaler=float(scheduler.config["scaler"]))


class DDPMWuerstchenScheduler:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) in continuous time along a cosine schedule.

    Same settings, methods and random numbers as diffusers' class of this name, which these pipelines can use
    too.
    """

    init_noise_sigma = 1.0
    """Standard deviation of the initial noise."""
    order = 1

    def __init__(self, scaler: float = 1.0, s: float = 0.008) -> None:
        self.config = Config({"scaler": scaler, "s": s})
        self.schedule = CosineSchedule(scaler=scaler, s=s)
        self.timesteps: Tensor = torch.zeros(0, dtype=torch.float32, device="cpu")

    @classmethod
    def from_schedule(cls, schedule: CosineSchedule) -> "DDPMWuerstchenScheduler":
        return cls(scaler=schedule.scaler, s=schedule.s)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> "DDPMWuerstchenScheduler":
        """A new scheduler with the settings of another one's ``config`` and ``changes``."""
        known = {name: config[name] for name in ("scaler", "s") if name in config}
        return cls(**{**known, **changes})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool | None = False,
        token: str | bool | None = None,
        force_download: bool | None = False,
        s: float | None = None,
        scaler: float | None = None,
        return_unused_kwargs: bool = False,
        **options: Any,
    ) -> "DDPMWuerstchenScheduler":
        """Reads ``scheduler_config.json`` from a pipeline's folder or a name on the hub.

        Pass ``subfolder="scheduler"``. ``s`` and ``scaler`` override the file. ``options`` are diffusers'
        options without effect here. Raises ``UserError`` for unsupported ones.
        """
        drop_options(options)
        for name in options:
            raise TypeError(f"from_pretrained() got an unexpected keyword argument {name!r}")
        if return_unused_kwargs:
            raise UserError(
                "return_unused_kwargs is not supported. Unknown arguments raise an error instead. Remove it."
            )
        folder = local_folder(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=bool(local_files_only),
            token=token,
            force_download=bool(force_download),
            only=[f"*{CONFIG_NAME}"],
        )
        schedule = read_schedule(folder / (subfolder or ""))
        given = {name: value for name, value in (("s", s), ("scaler", scaler)) if value is not None}
        return cls.from_schedule(dataclasses.replace(schedule, **given))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes ``scheduler_config.json`` into a folder, which is created if needed."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"_class_name": type(self).__name__, **self.config}
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")

    def __len__(self) -> int:
        """Number of timesteps."""
        return len(self.timesteps)

    def __bool__(self) -> bool:
        return True  # even without timesteps, when the length is 0

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Returns the sample: this scheduler needs no scaling."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        timesteps: Tensor | np.ndarray | Sequence[float | int] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Sets ``timesteps`` to ``num_inference_steps`` equal steps from 1 to 0, or to custom ones.

        n steps need n + 1 timesteps. Custom ``timesteps`` override ``num_inference_steps``.
        """
        if timesteps is not None:
            self.timesteps = check_timesteps(timesteps).to(device)
            return
        if num_inference_steps is None or num_inference_steps < 0:
            raise UserError(
                f"num_inference_steps must be at least 0, got {num_inference_steps}. 12 is common."
            )
        self.timesteps = torch.linspace(
            1.0, 0.0, num_inference_steps + 1, dtype=torch.float32, device=device or "cpu"
        )

    def previous_timestep(self, timestep: Float[Tensor, "..."]) -> Float[Tensor, " b"]:
        """For each timestep, the entry of ``timesteps`` after the nearest one. The last is followed by
        itself."""
        if len(self.timesteps) == 0:
            raise UserError("There are no timesteps. Call set_timesteps first.")
        timestep = timestep.reshape(-1)
        times = self.timesteps.to(timestep.device)
        nearest = (times[None, :] - timestep[:, None]).abs().argmin(dim=1)
        # The index stays on its device: reading it on the host would synchronise at every step.
        return times.index_select(0, (nearest + 1).clamp(max=len(times) - 1))

    def step(
        self,
        model_output: Float[Tensor, "b ..."],
        timestep: Float[Tensor, "..."],
        sample: Float[Tensor, "b ..."],
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMWuerstchenSchedulerOutput | tuple[Tensor]:
        """The sample at the next timestep, from the predicted noise.

        With α = ᾱ(t)/ᾱ(t'): μ = (x − (1 − α)·ε̂/√(1 − ᾱ(t)))/√α and
        x' = μ + √((1 − α)(1 − ᾱ(t'))/(1 − ᾱ(t)))·z, in at least fp32. z is generated in the dtype of the
        network's output. The step to t' = 0 generates z too, but does not add it. Pass ``timestep`` exactly
        as in ``timesteps``: rounded to bf16, it may be nearer to another one.
        """
        rows = (len(sample), *[1] * (sample.ndim - 1))
        timestep = timestep.to(model_output.device).reshape(-1)
        then = self.previous_timestep(timestep)
        bar = self.schedule.alpha_bar(timestep.float()).expand(len(sample)).view(rows)
        bar_then = self.schedule.alpha_bar(then.float()).expand(len(sample)).view(rows)
        alpha = bar / bar_then
        mean = (1 / alpha).sqrt() * (sample - (1 - alpha) * model_output / (1 - bar).sqrt())
        noise = draw_normal(sample.shape, generator, model_output.device, model_output.dtype)
        std = ((1 - alpha) * (1 - bar_then) / (1 - bar)).sqrt()
        adds = (then != 0).expand(len(sample)).view(rows)
        result = (mean + std * noise * adds).to(model_output.dtype)
        return DDPMWuerstchenSchedulerOutput(prev_sample=result) if return_dict else (result,)

    def add_noise(
        self,
        original_samples: Float[Tensor, "b ..."],
        noise: Float[Tensor, "b ..."],
        timesteps: Float[Tensor, " b"],
    ) -> Float[Tensor, "b ..."]:
        """√ᾱ·x₀ + √(1 − ᾱ)·ε, in the dtype of the samples."""
        times = timesteps.to(original_samples.device, torch.float32).flatten()  # (b,) or (b, 1, 1, 1)
        return self.schedule.add_noise(original_samples, noise, times).to(original_samples.dtype)
