"""Weights in prompts, as users of ComfyUI and AUTOMATIC1111's web UI type them.

``(word:1.3)`` weights a part of the prompt by 1.3, ``(word)`` by 1.1 and ``[word]`` by 1 / 1.1. They can be
nested, and their weights multiply. A backslash before a bracket makes it text.
"""

import math
import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from wuerstchen.device import to_device
from wuerstchen.errors import UserError, shown
from wuerstchen.models.text import TextEncoder, TextStates

STEP = 1.1
MAX_WEIGHT = 10.0
_OPEN, _CLOSE = {"(": STEP, "[": 1 / STEP}, {")": "(", "]": "["}
_NUMBER = re.compile(r":\s*([+-]?\.?[0-9][^\s:()\[\]]*)\s*\)")


class WeightedPrompt(str):
    """A prompt without its brackets, with the weight of each character in ``weights``."""

    weights: tuple[float, ...]

    def __new__(cls, text: str, weights: Sequence[float]) -> "WeightedPrompt":
        prompt = super().__new__(cls, text)
        prompt.weights = tuple(weights)
        return prompt


def parsed(prompt: str) -> WeightedPrompt:
    """Reads the weights of a prompt. Raises ``UserError`` for brackets that do not match, and for weights
    that are no numbers from 0 to ``MAX_WEIGHT``."""
    text: list[str] = []
    weights: list[float] = []
    waiting: list[tuple[str, int]] = []  # brackets, and where their text starts
    position = 0
    while position < len(prompt):
        letter = prompt[position]
        if letter == "\\" and prompt[position + 1 : position + 2] in tuple("()[]\\"):
            text.append(prompt[position + 1])
            weights.append(1.0)
            position += 2
            continue
        number = _NUMBER.match(prompt, position) if waiting and waiting[-1][0] == "(" else None
        if number is not None or letter in _CLOSE:
            if not waiting or (number is None and waiting[-1][0] != _CLOSE[letter]):
                raise _unmatched(prompt, letter)
            bracket, start = waiting.pop()
            factor = _OPEN[bracket] if number is None else _weight(number[1])
            weights[start:] = [weight * factor for weight in weights[start:]]
            position = position + 1 if number is None else number.end()
        else:
            if letter in _OPEN:
                waiting.append((letter, len(text)))
            else:
                text.append(letter)
                weights.append(1.0)
            position += 1
    if waiting:
        raise _unmatched(prompt, waiting[-1][0])
    return WeightedPrompt("".join(text), weights)


def _weight(number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= MAX_WEIGHT:
        raise UserError(
            f"a weight in a prompt must be a number from 0 to {MAX_WEIGHT:g}, got {shown(number)}. 1.3 is "
            "common. Put a backslash before a bracket that is text."
        )
    return weight


def _unmatched(prompt: str, bracket: str) -> UserError:
    return UserError(
        f"a bracket in the prompt does not match: {bracket!r} in {shown(prompt)}. Write (word:1.3), or put a "
        "backslash before a bracket that is text."
    )


def weighted(
    states: TextStates, prompts: Sequence[str], empty: TextStates, encoder: TextEncoder, *, is_masked: bool
) -> TextStates:
    """Moves each token's state away from the empty prompt's by its weight: e + weight · (z − e).

    This is ComfyUI's formula. ``empty`` has one row. If attention ignores padding (``is_masked``), positions
    without a token in the empty prompt use its last token. Prompts that are not ``WeightedPrompt`` do not
    change.
    """
    factors = torch.stack([_factors(prompt, encoder) for prompt in prompts])
    reference = empty.states
    if is_masked:
        last = reference[:, int(empty.mask[0].sum()) - 1, None]
        reference = torch.where(empty.mask[..., None], reference, last)
    factors = to_device(factors, states.states.device, states.states.dtype)[..., None]
    moved = reference + factors * (states.states - reference)
    return TextStates(states=torch.where(factors == 1, states.states, moved), mask=states.mask)


def _factors(prompt: str, encoder: TextEncoder) -> Float[Tensor, " t"]:
    """The weight of each position: that of the first character of its token, and 1 for special tokens."""
    found = torch.ones(encoder.text_positions, dtype=torch.float32, device="cpu")
    if isinstance(prompt, WeightedPrompt):
        for position, (start, end) in enumerate(encoder.offsets(prompt)):
            if end > start:
                found[position] = prompt.weights[start]
    return found
