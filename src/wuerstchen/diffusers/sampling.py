"""The loop that Stages B and C share: predict, guide, step, and let callbacks change what they asked for."""

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
"""What a callback may see and change, by name: the latents and what steers them."""


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What is called after a step: the present kind of callback, and the deprecated one."""

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
        """Raises ``UserError`` or ``TypeError`` for what cannot be called so."""
        names = check_callbacks(on_step_end, tensor_inputs, allowed)
        if callback is not None and not callable(callback):
            raise TypeError(f"'callback' must be a function, but got {type(callback)}")
        for name, value in (("callback", callback), ("callback_steps", callback_steps)):
            if value is not None:
                warnings.warn(
                    f"`{name}` is deprecated; use `callback_on_step_end`", FutureWarning, stacklevel=4
                )
        steps = 1 if callback_steps is None else check_count("callback_steps", callback_steps)
        return cls(on_step_end=on_step_end, tensor_inputs=names, every=callback, every_steps=steps)


def check_callbacks(on_step_end: Any, names: Any, allowed: Sequence[str], prefix: str = "") -> list[str]:
    """The tensors that a callback asks for. ``prefix`` is that of the arguments' names."""
    if on_step_end is not None and not callable(on_step_end):
        raise TypeError(f"'{prefix}callback_on_step_end' must be a function, but got {type(on_step_end)}")
    names = [names] if isinstance(names, str) else list(names or ())
    if unknown := [name for name in names if name not in allowed]:
        raise UserError(
            f"`{prefix}callback_on_step_end_tensor_inputs` has to be in {list(allowed)}, but found {unknown}"
        )
    return names


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least ``least``. Raises ``TypeError`` or ``UserError``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        hint = "; for timesteps of your own use 'timesteps'" if "num_inference_steps" in name else ""
        raise TypeError(f"'{name}' must be of type 'int', but got {type(value)}{hint}")
    if value < least:
        raise UserError(f"{name}={value} is too few; use at least {least}")
    return int(value)


def check_scale(name: str, value: Any) -> float:
    """A guidance scale. Raises ``TypeError`` or ``UserError``."""
    try:
        scale = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"'{name}' must be a number, but got {type(value)}") from error
    if not math.isfinite(scale):
        raise UserError(f"{name}={scale} must be a finite number; up to 1 there is no guidance, 4 is common")
    return scale


def check_generator(generator: Any) -> None:
    several = list(generator) if isinstance(generator, list | tuple) else [generator]
    for one in several:
        if not isinstance(one, torch.Generator) and generator is not None:
            raise TypeError(
                f"'generator' must be a torch.Generator or a list of them, but got {type(one)}; "
                "torch.Generator().manual_seed(0) makes one"
            )


def check_steps(prefix: str, num_inference_steps: Any, timesteps: Any) -> int:
    """The number of steps, if they can be taken. 0 steps give back the noise, as in diffusers."""
    if timesteps is not None:
        check_timesteps(timesteps)
    return check_count(f"{prefix}num_inference_steps", num_inference_steps, least=0)


def set_timesteps(scheduler: Any, num_inference_steps: Any, timesteps: Any, device: torch.device) -> None:
    """Tells a scheduler of its steps. Others than ours may not know of given timesteps."""
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
    """The noise to start from: that which was given, or drawn; times the scheduler's ``sigma``."""
    if given is None:
        return draw_normal(shape, generator, device, dtype) * sigma
    if not isinstance(given, Tensor):
        raise TypeError(f"'latents' must be of type 'torch.Tensor', but got {type(given)}")
    if tuple(given.shape) != shape:
        raise UserError(f"Unexpected latents shape, got {tuple(given.shape)}, expected {shape}")
    return given.to(device, dtype) * sigma


def predicts_noise(network: Any, prediction: str) -> Callable[..., Tensor]:
    """The network's output as the noise ε̂, which these pipelines and their schedulers work on.

    ``prediction`` is what it predicts. Raises ``UserError`` for a network that no noise follows from.
    """
    objective = make_objective(prediction)
    if objective.path != "variance_preserving":
        raise UserError(
            f"a network that predicts {prediction!r} does not fit this pipeline, whose schedulers work on "
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
    are further tensors that callbacks may change and ``pipe._steering`` reads.
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
    """Takes ``state["latents"]`` through the timesteps of the pipeline's scheduler.

    ``pipe._steering(state, guides)`` returns the arguments of the network's context. It is called once, and
    again only after a callback changed something. With ``guides`` the batch is twice as large: conditional,
    then unconditional. The guidance scale is read at every step, because callbacks may set it.
    """
    times = pipe.scheduler.timesteps
    pipe._num_timesteps = len(times[:-1])
    predict = guides = None
    for step, t in enumerate(pipe.progress_bar(times[:-1])):
        latents = state["latents"]
        assert latents is not None
        if predict is None or guides != pipe.do_classifier_free_guidance:
            guides = pipe.do_classifier_free_guidance
            predict = network.given(*pipe._steering(state, guides))
        r = t.to(latents.dtype).expand(len(latents))
        noise = (guided(predict, pipe.guidance_scale) if guides else predict)(latents, r)
        # The scheduler gets the timestep as it stands in the list: rounded, it could be taken for another.
        latents = pipe.scheduler.step(
            model_output=noise, timestep=t.expand(len(latents)), sample=latents, generator=generator
        ).prev_sample
        state["latents"] = latents
        if _call_back(pipe, callbacks, step, t, state):
            predict = None
        if callbacks.on_step_end is not None or callbacks.every is not None:
            network.invalidate()  # a callback may load an adapter, or scale one
    assert state["latents"] is not None
    return state["latents"]


def _call_back(pipe: Any, callbacks: Callbacks, step: int, t: Tensor, state: State) -> bool:
    """Lets the callbacks change the state. Says whether the context must be computed again."""
    changed = False
    if callbacks.on_step_end is not None:
        before = dict(state)
        seen = {name: state[name] for name in callbacks.tensor_inputs}
        steering = {name: tensor for name, tensor in seen.items() if name != "latents" and tensor is not None}
        copies = {name: tensor.clone() for name, tensor in steering.items()}
        returned = callbacks.on_step_end(pipe, step, t, seen)
        if returned is None:
            returned = {}
        if not isinstance(returned, Mapping):
            raise TypeError(f"a callback must return a dict or None, but returned {type(returned)}")
        rewritten = {name for name, copy in copies.items() if not torch.equal(copy, steering[name])}
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
        raise TypeError(f"a callback returned {type(new)} as {name!r}; it must be a tensor")
    state[name] = new if old is None else new.to(old)


def _follow_negative(before: State, state: State) -> None:
    """Puts negative states that a callback changed in the place of the old, behind those of the prompt."""
    negative, text = state["negative_prompt_embeds"], state["text_encoder_hidden_states"]
    if negative is None or text is None or len(text) != 2 * len(negative):
        return
    if text is before["text_encoder_hidden_states"]:  # otherwise the callback gave both halves itself
        state["text_encoder_hidden_states"] = torch.cat([text[: len(negative)], negative])


def text_rows(text: Tensor | None, rows: int, guides: bool) -> Tensor:
    """The text states that a step needs, out of those of the prompts or of prompts and negative prompts."""
    assert text is not None
    if not guides and len(text) == 2 * rows:
        return text[:rows]  # guidance was turned off on the way
    needed = 2 * rows if guides else rows
    if len(text) != needed:
        raise UserError(
            f"text_encoder_hidden_states has {len(text)} rows, but a step of {rows} latents "
            f"{'with' if guides else 'without'} guidance needs {needed}; guidance can be turned off on the "
            "way, but must be on from the start to be turned on again"
        )
    return text
