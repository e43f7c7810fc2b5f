"""Prompts: checked, and encoded by CLIP."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wuerstchen.device import sent
from wuerstchen.errors import UserError, UserNotice


def check_prompt(name: str, prompt: Any) -> list[str] | None:
    """A prompt or a list of them, as a list. Raises ``TypeError`` for anything else, None aside."""
    if prompt is None:
        return None
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise TypeError(f"'{name}' must be of type 'list' or 'str', but got {type(prompt)}")
    for one in prompt:
        if not isinstance(one, str):
            raise TypeError(f"'{name}' must hold only 'str', but holds {type(one)}")
    if not prompt:
        raise UserError(f"{name}=[] draws nothing; give at least one text")
    return list(prompt)


def check_negative(negative: Any, batch: int) -> list[str]:
    """The negative prompt of each prompt: one text serves all of them, and none at all is the empty text."""
    texts = check_prompt("negative_prompt", negative)
    if texts is None:
        return [""] * batch
    if isinstance(negative, str):
        return texts * batch
    if len(texts) != batch:
        raise UserError(
            f"negative_prompt has batch size {len(texts)}, but the prompt has batch size {batch}; "
            "give one text, or one for each prompt"
        )
    return texts


@dataclass(frozen=True)
class _LastStates:
    """A text encoder's states alone. No closure: pipelines keep it, and are copied and pickled."""

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
    """CLIP's states of all positions, after its last layer norm; texts are padded to its longest length.

    The published models were trained on padded texts and attend to the padding: it stays in.
    ``recorded`` makes of a network and a function of it what is called.
    """
    if tokenizer is None or text_encoder is None:
        raise UserError("this pipeline has no text encoder or tokenizer; give embeddings instead of texts")
    longest = tokenizer.model_max_length
    # Not as tensors: the tokenizer would put them on torch's default device.
    tokens = tokenizer(texts, padding="max_length", max_length=longest, truncation=True, return_tensors="np")
    ids, mask = (torch.as_tensor(part, device="cpu") for part in (tokens.input_ids, tokens.attention_mask))
    for whole in tokenizer(texts, verbose=False).input_ids:
        if len(whole) > longest:
            lost = tokenizer.decode(whole[longest - 1 : -1])
            warnings.warn(
                f"a prompt is longer than the {longest} tokens that CLIP reads, and this part was cut off: "
                f"{lost!r}",
                UserNotice,
                stacklevel=2,
            )

    run = recorded(text_encoder, _LastStates(text_encoder))
    return run(sent(ids, device), sent(mask, device))
