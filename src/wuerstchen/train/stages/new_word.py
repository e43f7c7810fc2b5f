"""A new word for the text encoder, whose input embedding is trained together with an adapter
(textual inversion, arXiv 2208.01618)."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from wuerstchen.device import to_device
from wuerstchen.models.text import TextEncoder


class NewWord:
    """A copy of a text encoder that knows the word.

    ``vectors`` returns its embedding (1, width) at each use, so that training and averages can change it.
    """

    def __init__(self, encoder: TextEncoder, word: str, like: str = "") -> None:
        """The embedding starts as the mean of those of the text ``like``, or of the word's own pieces.

        Raises ``UserError`` if the tokenizer knows the word already.
        """
        self.word = word
        self.encoder = copy.deepcopy(encoder)
        embedding = self.encoder.model.get_input_embeddings()
        pieces = encoder.tokenizer.encode(like or word, add_special_tokens=False).ids
        self.initial: Float[Tensor, "1 d"] = embedding.weight[pieces].detach().float().mean(0, keepdim=True)
        self._first = len(embedding.weight)
        self.encoder.add_words({word: self.initial})
        self.vectors: Callable[[], Tensor] = lambda: self.initial

        def embed(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            """The embeddings of token ids, with the current one of the word."""
            ids = inputs[0] - self._first
            return torch.where(
                (ids >= 0)[..., None], self.vectors().to(output.dtype)[ids.clamp(min=0)], output
            )

        embedding.register_forward_hook(embed)  # not a method: copies of the encoder would copy its object

    def tokens(
        self, captions: Sequence[str], device: torch.device
    ) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """The token ids of captions, and a mask that is False at padding."""
        shape = len(captions), self.encoder.text_positions
        ids = torch.full(shape, self.encoder.pad_id, dtype=torch.int64, device="cpu")
        mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
        for row, numbers in enumerate(map(self.encoder.tokens, captions)):
            ids[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64, device="cpu")
            mask[row, : len(numbers)] = True
        return to_device(ids, device), to_device(mask, device)
