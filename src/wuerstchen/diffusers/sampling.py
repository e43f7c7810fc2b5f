"""The sampling loop of Stages B and C: predict, apply guidance, step, and call callbacks."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.diffusers.base import dtype_of, plain
from wuerstchen.diffusers.scheduler import Generators, check_timesteps, draw_normal
from wuerstchen.diffusion.objective import make_objective, predictions_for_sampling
from wuerstchen.diffusion.samplers import guided
from wuerstchen.errors import UserError
from wuerstchen.runtime.recorder import Recorder

State = dict[str, Tensor | None]
"""Tensors that callbacks may read and change, by name: the latents and their conditions."""


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """The callbacks after each step: diffusers' current kind, and the deprecated one."""

    on_step_end: Callable[..., Any] | None
    tensor_inputs: Sequence[str]
    every: Callable[..., Any] | None
    every_steps: int

    @classmethod
    def checked(
        cls,
        on_step_end: Any,
        tensor_inputs: Any,
        allowed: Sequence[str],
        callback: Any,
        callback_steps: Any,
    ) -> "Callbacks":
        """Raises ``UserError`` or ``TypeError`` for invalid callbacks."""
        names = check_callbacks(on_step_end, tensor_inputs, allowed)
        if callback is not None and not callable(callback):
            raise TypeError(f"'callback' must be a function, got {type(callback)}.")
        for name, value in (("callback", callback), ("callback_steps", callback_steps)):
            if value is not None:
                warnings.warn(
                    f"`{name}` is deprecated. Use `callback_on_step_end`.", FutureWarning, stacklevel=4
                )
        steps = 1 if callback_steps is None else check_count("callback_steps", callback_steps)
        return cls(on_step_end=on_step_end, tensor_inputs=names, every=callback, every_steps=steps)


def check_callbacks(on_step_end: Any, names: Any, allowed: Sequence[str], prefix: str = "") -> list[str]:
    """The names of the tensors for a callback. ``prefix`` is the prefix of the arguments' names."""
    if on_step_end is not None and not callable(on_step_end):
        raise TypeError(f"'{prefix}callback_on_step_end' must be a function, got {type(on_step_end)}.")
    names = [names] if isinstance(names, str) else list(names or ())
    if unknown := [name for name in names if name not in allowed]:
        raise UserError(
            f"`{prefix}callback_on_step_end_tensor_inputs` has to be in {list(allowed)}, but found {unknown}."
        )
    return names


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least ``least``. Raises ``TypeError`` or ``UserError``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        hint = " Use 'timesteps' for custom timesteps." if "num_inference_steps" in name else ""
        raise TypeError(f"'{name}' must be of type 'int', got {type(value)}.{hint}")
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}.")
    return int(value)


def check_scale(name: str, value: Any) -> float:
    """A guidance scale. Raises ``TypeError`` or ``UserError``."""
    try:
        scale = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"'{name}' must be a number, got {type(value)}.") from error
    if not math.isfinite(scale):
        raise UserError(
            f"{name} must be a finite number, got {scale}. Values up to 1 turn guidance off, and 4 is common."
        )
    return scale


def check_generator(generator: Any) -> None:
    several = list(generator) if isinstance(generator, list | tuple) else [generator]
    for one in several:
        if not isinstance(one, torch.Generator) and generator is not None:
            raise TypeError(
                f"'generator' must be a torch.Generator or a list of them, got {type(one)}. "
                "Use torch.Generator().manual_seed(0), for example."
            )


def check_steps(prefix: str, num_inference_steps: Any, timesteps: Any) -> int:
    """The number of steps, checked. 0 steps return the noise, as in diffusers."""
    if timesteps is not None:
        check_timesteps(timesteps)
    return check_count(f"{prefix}num_inference_steps", num_inference_steps, least=0)


def set_timesteps(scheduler: Any, num_inference_steps: Any, timesteps: Any, device: torch.device) -> None:
    """Sets a scheduler's timesteps. diffusers' schedulers may not take custom ones."""
    if timesteps is None:
        scheduler.set_timesteps(num_inference_steps, device=device)
    else:
        scheduler.set_timesteps(timesteps=timesteps, device=device)


def initial_latents(
    given: Any,
    shape: tuple[int, ...],
    generator: Generators,
    device: torch.device,
    dtype: torch.dtype,
    sigma: float,
) -> Float[Tensor, "b c h w"]:
    """The noise to start from, given or generated, times the scheduler's ``sigma``."""
    if given is None:
        return draw_normal(shape, generator, device, dtype) * sigma
    if not isinstance(given, Tensor):
        raise TypeError(f"'latents' must be of type 'torch.Tensor', got {type(given)}.")
    if tuple(given.shape) != shape:
        raise UserError(f"Unexpected latents shape, got {tuple(given.shape)}, expected {shape}.")
    return given.to(device, dtype) * sigma


def predicts_noise(network: Any, prediction: str) -> Callable[..., Tensor]:
    """The network's output converted to the noise ε̂, which diffusers' schedulers need.

    ``prediction`` is the kind of its objective. Raises ``UserError`` if it cannot be converted.
    """
    objective = make_objective(prediction)
    if objective.path != "variance_preserving":
        raise UserError(
            f"The network predicts {prediction!r}, which this pipeline cannot use. Its schedulers work on "
            "noise. Load the model with wuerstchen.load."
        )
    return predictions_for_sampling(network, objective)


@dataclass(frozen=True, kw_only=True)
class LoopArguments:
    """A call's arguments for the sampling loop, checked."""

    num_inference_steps: int
    timesteps: Any
    latents: Any
    """The noise to start from; None to generate it."""
    generator: Generators
    callbacks: Callbacks

    @classmethod
    def checked(
        cls, num_inference_steps: Any, timesteps: Any, latents: Any, generator: Any, callbacks: Callbacks
    ) -> "LoopArguments":
        """Raises ``UserError`` or ``TypeError`` for invalid steps or generators."""
        steps = check_steps("", num_inference_steps, timesteps)
        check_generator(generator)
        return cls(
            num_inference_steps=steps,
            timesteps=timesteps,
            latents=latents,
            generator=generator,
            callbacks=callbacks,
        )


def sample_latents(
    pipe: Any,
    network: Any,
    shape: tuple[int, ...],
    states: tuple[Tensor, Tensor | None],
    arguments: LoopArguments,
    **conditions: Tensor,
) -> Float[Tensor, "b c h w"]:
    """Samples latents of ``shape`` with a network of ``pipe``, on its device and in its dtype.

    ``states`` are the text states of the prompts and, with guidance, of the negative prompts. ``conditions``
    are more tensors that callbacks may change and ``pipe._context_arguments`` reads.
    """
    with pipe._using(network) as device:
        dtype = dtype_of(network)
        text, negative = (None if part is None else part.to(device, dtype) for part in states)
        assert text is not None
        set_timesteps(pipe.scheduler, arguments.num_inference_steps, arguments.timesteps, device)
        sigma = pipe.scheduler.init_noise_sigma
        state: State = {
            "latents": initial_latents(arguments.latents, shape, arguments.generator, device, dtype, sigma),
            "text_encoder_hidden_states": text if negative is None else torch.cat([text, negative]),
            "negative_prompt_embeds": negative,
            **{name: tensor.to(device, dtype) for name, tensor in conditions.items()},
        }
        noise = predicts_noise(network, plain(network).config.prediction)
        recorder = pipe._recorded(network, noise, network.context)
        return denoise(pipe, recorder, state, arguments.generator, arguments.callbacks)


def denoise(
    pipe: Any,
    network: Recorder,
    state: State,
    generator: Generators,
    callbacks: Callbacks,
) -> Float[Tensor, "b c h w"]:
    """Denoises ``state["latents"]`` along the timesteps of the pipeline's scheduler.

    ``pipe._context_arguments(state, uses_guidance)`` returns the arguments of the network's context. It is
    called once, and again only after a callback changed something. With guidance the batch is twice as large:
    conditional, then unconditional. The guidance scale is read at every step, because callbacks may set it.
    """
    times = pipe.scheduler.timesteps
    pipe._num_timesteps = len(times[:-1])
    predict = uses_guidance = None
    for step, t in enumerate(pipe.progress_bar(times[:-1])):
        latents = state["latents"]
        assert latents is not None
        if predict is None or uses_guidance != pipe.do_classifier_free_guidance:
            uses_guidance = pipe.do_classifier_free_guidance
            predict = network.bind(*pipe._context_arguments(state, uses_guidance))
        r = t.to(latents.dtype).expand(len(latents))
        noise = (guided(predict, pipe.guidance_scale) if uses_guidance else predict)(latents, r)
        # The scheduler gets the exact timestep: a rounded one could be nearer to another in its list.
        latents = pipe.scheduler.step(
            model_output=noise, timestep=t.expand(len(latents)), sample=latents, generator=generator
        ).prev_sample
        state["latents"] = latents
        if _call_back(pipe, callbacks, step, t, state):
            predict = None
        if callbacks.on_step_end is not None or callbacks.every is not None:
            network.invalidate()  # callbacks may load or scale adapters
    assert state["latents"] is not None
    return state["latents"]


def _call_back(pipe: Any, callbacks: Callbacks, step: int, t: Tensor, state: State) -> bool:
    """Calls the callbacks, which may change the state. Returns whether to compute the context again."""
    changed = False
    if callbacks.on_step_end is not None:
        before = dict(state)
        seen = {name: state[name] for name in callbacks.tensor_inputs}
        inputs = {name: tensor for name, tensor in seen.items() if name != "latents" and tensor is not None}
        copies = {name: tensor.clone() for name, tensor in inputs.items()}
        returned = callbacks.on_step_end(pipe, step, t, seen)
        if returned is None:
            returned = {}
        if not isinstance(returned, Mapping):
            raise TypeError(f"A callback must return a dict or None, got {type(returned)}.")
        rewritten = {name for name, copy in copies.items() if not torch.equal(copy, inputs[name])}
        changed = bool(rewritten)
        for name, old in before.items():
            new = returned.get(name)
            if new is not None and new is not old:
                _take(state, name, new)
                changed = changed or name != "latents" or new.shape != old.shape
        if state["negative_prompt_embeds"] is not before["negative_prompt_embeds"] or (
            "negative_prompt_embeds" in rewritten
        ):
            _follow_negative(before, state)
    if callbacks.every is not None and step % callbacks.every_steps == 0:
        callbacks.every(step // getattr(pipe.scheduler, "order", 1), t, state["latents"])
    return changed


def _take(state: State, name: str, new: Any) -> None:
    old = state[name]
    if not isinstance(new, Tensor):
        raise TypeError(f"A callback must return a tensor for {name!r}, got {type(new)}.")
    state[name] = new if old is None else new.to(old)


def _follow_negative(before: State, state: State) -> None:
    """Copies negative states that a callback changed into the text states, where they follow the prompt's."""
    negative, text = state["negative_prompt_embeds"], state["text_encoder_hidden_states"]
    if negative is None or text is None or len(text) != 2 * len(negative):
        return
    if text is before["text_encoder_hidden_states"]:  # otherwise the callback returned both
        state["text_encoder_hidden_states"] = torch.cat([text[: len(negative)], negative])


def text_rows(text: Tensor | None, rows: int, uses_guidance: bool) -> Tensor:
    """The text states for a step, from those of the prompts or of prompts and negative prompts."""
    assert text is not None
    if not uses_guidance and len(text) == 2 * rows:
        return text[:rows]  # a callback turned guidance off
    needed = 2 * rows if uses_guidance else rows
    if len(text) != needed:
        raise UserError(
            f"text_encoder_hidden_states must have {needed} rows for {rows} latents "
            f"{'with' if uses_guidance else 'without'} guidance, got {len(text)}. A callback can only turn "
            "guidance on again if the call started with guidance."
        )
    return text
