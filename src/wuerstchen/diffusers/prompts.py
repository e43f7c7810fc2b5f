"""Checks prompts, and encodes them with CLIP."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wuerstchen.device import to_device
from wuerstchen.errors import UserError, UserNotice


def check_prompt(name: str, prompt: Any) -> list[str] | None:
    """A prompt or a list of prompts as a list, or None. Raises ``TypeError`` for anything else."""
    if prompt is None:
        return None
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise TypeError(f"'{name}' must be of type 'list' or 'str', got {type(prompt)}.")
    for one in prompt:
        if not isinstance(one, str):
            raise TypeError(f"'{name}' must contain only 'str', got {type(one)}.")
    if not prompt:
        raise UserError(f"{name} must have at least one text, got [].")
    return list(prompt)


def check_negative(negative: Any, batch: int) -> list[str]:
    """The negative prompt of each prompt. A single text is used for all. None is the empty text."""
    texts = check_prompt("negative_prompt", negative)
    if texts is None:
        return [""] * batch
    if isinstance(negative, str):
        return texts * batch
    if len(texts) != batch:
        raise UserError(
            f"negative_prompt must have the prompt's batch size {batch}, got {len(texts)}. "
            "Pass one text, or one for each prompt."
        )
    return texts


@dataclass(frozen=True)
class _LastStates:
    """Returns only the states of a text encoder. Unlike a closure, it can be copied and pickled."""

    text_encoder: nn.Module

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.text_encoder(ids, attention_mask=mask).last_hidden_state


def encode(
    tokenizer: Callable[..., Any] | None,
    text_encoder: nn.Module | None,
    texts: list[str],
    device: torch.device,
    recorded: Callable[[nn.Module, Callable[..., Tensor]], Callable[..., Tensor]],
) -> Float[Tensor, "b t c"]:
    """CLIP's states at all positions, after its last layer norm. Texts are padded to CLIP's maximum length.

    The published models were trained on padded texts and attend to the padding, so it is not masked.
    ``recorded(network, function)`` returns the function to call.
    """
    if tokenizer is None or text_encoder is None:
        raise UserError(
            "This pipeline has no text encoder or no tokenizer. Pass embeddings instead of texts."
        )
    longest = tokenizer.model_max_length
    # Arrays, because the tokenizer would create tensors on torch's default device.
    tokens = tokenizer(texts, padding="max_length", max_length=longest, truncation=True, return_tensors="np")
    ids, mask = (torch.as_tensor(part, device="cpu") for part in (tokens.input_ids, tokens.attention_mask))
    for whole in tokenizer(texts, verbose=False).input_ids:
        if len(whole) > longest:
            lost = tokenizer.decode(whole[longest - 1 : -1])
            warnings.warn(
                f"A prompt is longer than the {longest} tokens that CLIP reads. This part was cut "
                f"off: {lost!r}",
                UserNotice,
                stacklevel=2,
            )

    run = recorded(text_encoder, _LastStates(text_encoder))
    return run(to_device(ids, device), to_device(mask, device))
