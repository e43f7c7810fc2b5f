"""Prompts to token states: a frozen ``transformers`` text model and its tokenizer."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from wuerstchen.device import to_device
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
    """A prompt has more tokens than the text model reads. The message names the words that are cut off."""


@dataclass(frozen=True, kw_only=True)
class TextStates:
    """The text model's states of a batch of prompts."""

    states: Float[Tensor, "b t d"]
    mask: Bool[Tensor, "b t"]  # True at tokens (begin and end included), False at padding


LastStates = Callable[[Tensor, Tensor], Tensor]
"""(token ids: b t, mask: b t) → states: b t d."""


class TextEncoder(nn.Module):
    """A frozen text model with its tokenizer. Every prompt becomes ``text_positions`` states of ``width``.

    The length is fixed, so the states of a prompt do not depend on the other prompts in the batch (except for
    rounding with another batch size, about 1e-6 in float32).
    """

    def __init__(
        self,
        model: "BertModel | CLIPTextModel",
        tokenizer: Tokenizer,
        *,
        pad_id: int,
        text_positions: int,
    ) -> None:
        """``tokenizer`` adds the begin and end tokens. ``pad_id`` fills up to ``text_positions``.

        Raises ``UserError`` if the model has fewer positions.
        """
        super().__init__()
        longest = model.config.max_position_embeddings
        if not 3 <= text_positions <= longest:
            raise UserError(
                f"text_positions must be from 3 to {longest} for this text model, got {text_positions}. "
                "Choose a number in that range."
            )
        self.model = model.eval().requires_grad_(False)
        # A copy without the truncation in the tokenizer's file, which would cut words without a warning.
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.pad_id = pad_id
        self.text_positions = text_positions
        self._added: dict[int, range] = {}
        """The tokens of added words, by the id that the tokenizer gives the word."""
        self._before: tuple[nn.Parameter, str] | None = None
        """Embeddings and tokenizer without the added words."""

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
        """Number of channels of a state."""
        return self.model.config.hidden_size

    @property
    def words(self) -> list[str]:
        """The added words."""
        return [word for number in self._added if (word := self.tokenizer.id_to_token(number)) is not None]

    def add_words(self, words: Mapping[str, Tensor]) -> None:
        """Adds words with their own input embeddings, of shape (count, width), until ``remove_words``.

        A word stands for ``count`` tokens. Prompts must spell it exactly. Raises ``UserError`` for another
        width, and for a word that the tokenizer already knows. On error, nothing is changed.
        """
        embedding = self.model.get_input_embeddings()
        width = embedding.weight.shape[1]
        for word, vectors in words.items():
            if vectors.ndim != 2 or vectors.shape[1] != width or not len(vectors):
                raise UserError(
                    f"the vectors of the word {word[:80]!r} must have {width} values each, got shape "
                    f"{tuple(vectors.shape)}. Use an adapter that was trained for this text encoder."
                )
            if not word.strip() or word != word.strip() or self.tokenizer.token_to_id(word) is not None:
                raise UserError(
                    f"the new word {word[:80]!r} is already a word of the tokenizer, or has spaces around "
                    "it. Choose another word."
                )
        if not words:
            return
        if self._before is None:
            self._before = embedding.weight, self.tokenizer.to_str()
        self.tokenizer.add_tokens([AddedToken(w, single_word=True, normalized=False) for w in words])
        weight = embedding.weight
        first = len(weight)
        for word, vectors in words.items():
            self._added[self.tokenizer.token_to_id(word)] = range(first, first + len(vectors))
            first += len(vectors)
        rows = [vectors.detach().to(weight.device, weight.dtype) for vectors in words.values()]
        self._set_embeddings(nn.Parameter(torch.cat([weight.detach(), *rows]), requires_grad=False))

    def remove_words(self) -> None:
        """Removes all added words. The embeddings and the tokenizer are then what they were before."""
        if self._before is not None:
            weight, tokenizer = self._before
            self._set_embeddings(weight)
            self.tokenizer = Tokenizer.from_str(tokenizer)
            self._added, self._before = {}, None

    def _set_embeddings(self, weight: nn.Parameter) -> None:
        embedding = self.model.get_input_embeddings()
        embedding.weight, embedding.num_embeddings = weight, len(weight)

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stays in eval mode: ``train()`` on a surrounding module must not turn on dropout here."""
        return super().train(False)

    def encode(self, prompts: Sequence[str], run: LastStates | None = None) -> TextStates:
        """The last hidden states of ``prompts``, on the model's device and in its dtype.

        The empty prompt is valid: unconditional guidance uses it. Words beyond ``text_positions`` are cut off
        with a ``PromptTooLongWarning``. ``run`` replaces ``last_states``. Raises ``UserError`` for a bare
        string, for no prompts, and for text that is not Unicode.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list of strings, got {prompts!r}. Put the prompt in a list.")
        if not prompts:
            raise UserError(
                "prompts must contain at least one prompt, got []. Pass [''] for an empty prompt."
            )
        return self.encode_tokens(list(map(self.tokens, prompts)), run)

    def encode_tokens(
        self, tokens: Sequence[Sequence[int] | Int[np.ndarray, " _"]], run: LastStates | None = None
    ) -> TextStates:
        """The states of prompts as token ids from ``tokens``, without padding."""
        ids = torch.full((len(tokens), self.text_positions), self.pad_id, dtype=torch.long, device="cpu")
        mask = torch.zeros((len(tokens), self.text_positions), dtype=torch.bool, device="cpu")
        for row, numbers in enumerate(tokens):
            ids[row, : len(numbers)] = torch.as_tensor(numbers, device="cpu")
            mask[row, : len(numbers)] = True
        # The device of the embedding: with offloading, other layers may be elsewhere.
        device = self.model.get_input_embeddings().weight.device
        ids, mask = to_device(ids, device), to_device(mask, device)
        with torch.no_grad():
            states = (run or self.last_states)(ids, mask)
        return TextStates(states=states, mask=mask)

    def is_understood(self, prompt: str) -> bool:
        """Whether any word of ``prompt`` is in the tokenizer's vocabulary as a whole.

        Other words are split into pieces or unknown. Without a known word, the image may be unrelated to the
        prompt. Words like "the" and single letters do not count.
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
        """The model's last hidden states of token ids."""
        return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def offsets(self, prompt: str) -> list[tuple[int, int]]:
        """The characters of ``prompt`` at each position, from the first to before the last one. Begin and end
        have none, (0, 0)."""
        encoding = self.tokenizer.encode(prompt)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        spread = [place for i, place in places for _ in self._added.get(i, (i,))]
        return spread[: self.text_positions - 1]

    def tokens(self, prompt: str) -> list[int]:
        """The token ids of a prompt, including begin and end, at most ``text_positions`` of them.

        Warns and raises like ``encode``.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            # Python decodes command-line bytes that are not UTF-8 as lone surrogates.
            raise UserError(f"A prompt must be valid Unicode, got {prompt!r}. Write it in UTF-8.") from error
        encoding = self.tokenizer.encode(prompt)
        ids, places = encoding.ids, range(len(encoding.ids))
        if self._added:
            spread = [(n, place) for place, i in enumerate(ids) for n in self._added.get(i, (i,))]
            ids, places = [n for n, _ in spread], [place for _, place in spread]
        if len(ids) <= self.text_positions:
            return ids
        first_ignored = places[self.text_positions - 1]
        # A word that is cut in the middle counts as ignored: name the full word.
        first_of_word = encoding.word_ids.index(encoding.word_ids[first_ignored])
        ignored = prompt[encoding.offsets[first_of_word][0] :].strip()
        warnings.warn(
            f"The prompt is too long: {len(ids)} tokens in {_shortened(prompt)!r}. The text model "
            f"reads {self.text_positions}. These words are ignored: {_shortened(ignored)!r}",
            PromptTooLongWarning,
            stacklevel=3,
        )
        return [*ids[: self.text_positions - 1], ids[-1]]


def _shortened(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
