"""Prompts to token states: a frozen ``transformers`` text model and its tokenizer."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from wuerstchen.device import sent
from wuerstchen.errors import UserError, UserNotice

if TYPE_CHECKING:
    from transformers import BertModel, CLIPTextModel, PreTrainedTokenizerBase


_SMALL_WORDS = frozenset(
    (
        "a",
        "an",
        "and",
        "as",
        "at",
        "by",
        "for",
        "from",
        "in",
        "is",
        "it",
        "of",
        "on",
        "or",
        "the",
        "to",
        "with",
    )
)


class PromptTooLongWarning(UserNotice):
    """A prompt has more tokens than the text model reads; the message names the words that are lost."""


@dataclass(frozen=True, kw_only=True)
class TextStates:
    """What the text model makes of a batch of prompts."""

    states: Float[Tensor, "b t d"]
    mask: Bool[Tensor, "b t"]  # True at tokens (begin and end included), False at padding


LastStates = Callable[[Tensor, Tensor], Tensor]
"""(token ids: b t, mask: b t) → states: b t d."""


class TextEncoder(nn.Module):
    """A frozen text model with its tokenizer; every prompt becomes ``text_positions`` states of ``width``.

    The length is fixed, so the states of a prompt do not depend on the prompts beside it (beyond the rounding
    of another batch size: some 1e-6 in float32).
    """

    def __init__(
        self,
        model: "BertModel | CLIPTextModel",
        tokenizer: Tokenizer,
        *,
        pad_id: int,
        text_positions: int,
    ) -> None:
        """``tokenizer`` adds the begin and end tokens; ``pad_id`` fills up to ``text_positions``.

        Raises ``UserError`` if the model has fewer positions.
        """
        super().__init__()
        longest = model.config.max_position_embeddings
        if not 3 <= text_positions <= longest:
            raise UserError(
                f"text_positions {text_positions} is wrong because this text model reads 3 to {longest};"
                " choose a number in that range"
            )
        self.model = model.eval().requires_grad_(False)
        # A copy: the length is ours to keep, and one stored in the tokenizer's file would cut words unseen.
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.pad_id = pad_id
        self.text_positions = text_positions

    @classmethod
    def from_transformers(cls, model: "CLIPTextModel", tokenizer: "PreTrainedTokenizerBase") -> "TextEncoder":
        """The text model and tokenizer of a published model, padded as its tokenizer says (77 for CLIP)."""
        return cls(
            model,
            tokenizer.backend_tokenizer,
            pad_id=tokenizer.pad_token_id,
            text_positions=int(min(tokenizer.model_max_length, model.config.max_position_embeddings)),
        )

    @property
    def width(self) -> int:
        """The number of channels of a state."""
        return self.model.config.hidden_size

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stay in evaluation mode: a surrounding model that trains must not turn on the dropout in here."""
        return super().train(False)

    def encode(self, prompts: Sequence[str], run: LastStates | None = None) -> TextStates:
        """The last hidden states of ``prompts``, on the model's device and in its dtype.

        The empty prompt is valid: it is the text of unconditional guidance. Words beyond ``text_positions``
        are cut with a ``PromptTooLongWarning``. ``run`` stands in for ``last_states``. Raises ``UserError``
        for a bare string, for no prompts, and for text that is not Unicode.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts {prompts!r} is wrong because a list is read; put the prompt in a list")
        if not prompts:
            raise UserError("prompts [] is wrong because at least one is read; give one, it may be empty")
        return self.encode_tokens(list(map(self.tokens, prompts)), run)

    def encode_tokens(
        self, tokens: Sequence[Sequence[int] | Int[np.ndarray, " _"]], run: LastStates | None = None
    ) -> TextStates:
        """The states of prompts that ``tokens`` has read already, without their padding."""
        ids = torch.full((len(tokens), self.text_positions), self.pad_id, dtype=torch.long, device="cpu")
        mask = torch.zeros((len(tokens), self.text_positions), dtype=torch.bool, device="cpu")
        for row, numbers in enumerate(tokens):
            ids[row, : len(numbers)] = torch.as_tensor(numbers, device="cpu")
            mask[row, : len(numbers)] = True
        # Where the ids are looked up: other layers may be on another device for now.
        device = self.model.get_input_embeddings().weight.device
        ids, mask = sent(ids, device), sent(mask, device)
        with torch.no_grad():
            states = (run or self.last_states)(ids, mask)
        return TextStates(states=states, mask=mask)

    def is_understood(self, prompt: str) -> bool:
        """Whether some word of ``prompt`` stands in the tokenizer's vocabulary whole.

        The others are read in pieces or not at all, so a prompt of those alone may draw anything. Words like
        "the" do not count, and neither do single letters.
        """
        encoding = self.tokenizer.encode(prompt, add_special_tokens=False)
        pieces = Counter(encoding.word_ids)
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        known = foreign = False
        for token, number, place in zip(encoding.tokens, encoding.word_ids, encoding.offsets, strict=True):
            word = prompt[slice(*place)].lower()
            if pieces[number] > 1 or token == unknown:
                foreign = True
            elif any(letter.isalnum() for letter in word) and word not in _SMALL_WORDS:
                known = known or len(word) > 1 or not word.isascii()
        return known or not foreign

    def last_states(self, ids: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """What the model makes of token ids."""
        return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def tokens(self, prompt: str) -> list[int]:
        """The token ids of a prompt, begin and end included, at most ``text_positions`` of them.

        Warns and raises as ``encode`` does.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            # Python gives bytes of the command line that are not UTF-8 as lone surrogates.
            raise UserError(
                f"prompt {prompt!r} is wrong because it is not Unicode; write it in UTF-8"
            ) from error
        encoding = self.tokenizer.encode(prompt)
        if len(encoding.ids) <= self.text_positions:
            return encoding.ids
        first_lost = self.text_positions - 1
        # A word that is cut in the middle is lost as well: name it from its first letter on.
        first_of_word = encoding.word_ids.index(encoding.word_ids[first_lost])
        lost = prompt[encoding.offsets[first_of_word][0] :].strip()
        warnings.warn(
            f"prompt {_shortened(prompt)!r} is cut because it has {len(encoding.ids)} tokens and the text"
            f" model reads {self.text_positions}; these words are lost: {_shortened(lost)!r}",
            PromptTooLongWarning,
            stacklevel=3,
        )
        return [*encoding.ids[:first_lost], encoding.ids[-1]]


def _shortened(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
