"""Training of v1's Stage B: Paella predicts the tokens of an image (arXiv 2211.07292).

Everything but the loss is as in v2's Stage B. There are two differences from the original's trainer: captions
and semantic latents are dropped per image instead of per batch, and there is a weight average.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wuerstchen.diffusion.schedule import training_timesteps
from wuerstchen.diffusion.tokens import add_noise, loss_weight
from wuerstchen.errors import UserError
from wuerstchen.models.blocks import Context
from wuerstchen.models.cascade import PUBLISHED_V1
from wuerstchen.models.paella import Paella, PaellaConfig
from wuerstchen.train.config import Recipe
from wuerstchen.train.decoder_kinds import DecoderKind
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.base import Inputs
from wuerstchen.train.stages.decoding import DecoderOnly, Decoding, WithCompressor

POSITIONS = 128 * 128
"""Positions that have logits at the same time: one image of 512 pixels, 512 MiB in fp32."""


@dataclass(frozen=True)
class TokenLosses:
    """How well logits predict labels at each position, in fp32 or better."""

    cross_entropy: Float[Tensor, "b h w"]
    """−ln p(label)."""
    uniform_cross_entropy: Float[Tensor, "b h w"]
    """The mean of −ln p over all labels, for label smoothing."""
    correct: Bool[Tensor, "b h w"]
    """Whether the label is the most likely one."""

    def smoothed(self, smoothing: float) -> Float[Tensor, "b h w"]:
        """The cross entropy to (1 − s) · one-hot + s / labels, as in arXiv 1512.00567, section 7."""
        return (1 - smoothing) * self.cross_entropy + smoothing * self.uniform_cross_entropy


def token_losses(
    features: Float[Tensor, "b h w c"], weight: Float[Tensor, "labels c"], labels: Int[Tensor, "b h w"]
) -> TokenLosses:
    """The losses of the logits ``features · weightᵀ``, computed for at most ``POSITIONS`` at a time.

    The backward pass recomputes them in the same chunks. The logits of 48 images of 512 pixels would take 24
    GiB, and the softmax as much again.
    """
    pieces = [
        checkpoint(_piece, vectors, weight, goals, use_reentrant=False, preserve_rng_state=False)
        for vectors, goals in zip(
            features.flatten(0, 2).split(POSITIONS), labels.flatten().split(POSITIONS), strict=True
        )
    ]
    return TokenLosses(*(torch.cat(parts).view(labels.shape) for parts in zip(*pieces, strict=True)))


def _piece(
    vectors: Float[Tensor, "n c"], weight: Float[Tensor, "labels c"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Bool[Tensor, " n"]]:
    logits = F.linear(vectors, weight)
    # Under autocast the product is in bf16, which is too coarse for sums over thousands of labels.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = logits.logsumexp(1)
    cross_entropy = total - logits.gather(1, labels[:, None])[:, 0]
    return cross_entropy, total - logits.mean(1), logits.argmax(1) == labels


class _Tokens(Decoding):
    """v1's decoder learns to predict the tokens of the quantised Stage A."""

    def targets(self, pixels: Float[Tensor, "b 3 h w"]) -> Inputs:
        return {"tokens": self.vqgan.vquantizer(self.vqgan.embed(pixels)).indices}

    def decoder_loss(
        self, decoder: nn.Module, z: Float[Tensor, "b c mh mw"], inputs: Inputs, random: ImageRandom
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The label-smoothed cross entropy, averaged over the positions of each image with
        ``loss_weight``."""
        states, _ = self.text_of(inputs, random)
        density = self.config.time_density or "uniform"
        t = training_timesteps(random.uniform("time"), self.config.time_shift, density)
        assert isinstance(decoder, Paella)
        assert states is not None
        context = decoder.context(self.augment(z, random), states, cache_kv=False)
        losses, mask = self._token_losses(decoder, context, inputs, t, random)
        return self._weighted(losses, mask, t).mean(), {"accuracy": losses.correct.float().mean()}

    def token_errors(
        self, averages: dict[str, nn.Module], inputs: Inputs, t: Float[Tensor, " b"], random: ImageRandom
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The mean cross entropy of each image at time ``t``, and its training loss."""
        decoder, z = self.decoder_and_latents(averages, inputs)
        assert isinstance(decoder, Paella)
        context = decoder.context(z, inputs["states"])
        losses, mask = self._token_losses(decoder, context, inputs, t, random)
        return losses.cross_entropy.flatten(1).mean(1), self._weighted(losses, mask, t)

    def _token_losses(
        self,
        decoder: Paella,
        context: Context,
        inputs: Inputs,
        t: Float[Tensor, " b"],
        random: ImageRandom,
    ) -> tuple[TokenLosses, Bool[Tensor, "b h w"]]:
        """The losses on tokens noised to ``t``, and which of them are noised."""
        tokens = inputs["tokens"]
        size = tokens.shape[1:]
        noise = random.integers("token noise", size, decoder.config.num_labels)
        noised, mask = add_noise(tokens, noise, t, random.uniform("token choice", size))
        features = decoder.features(noised, t, context)
        head = decoder.out_mapper[1]
        assert isinstance(head, nn.Conv2d)
        return token_losses(features, head.weight.flatten(1), tokens), mask

    def _weighted(
        self, losses: TokenLosses, mask: Bool[Tensor, "b h w"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        weight = loss_weight(t, mask)
        errors = losses.smoothed(self.config.label_smoothing) * weight
        return errors.flatten(1).sum(1) / weight.flatten(1).sum(1)

    def stage_a(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return self.vqgan(pixels)[0]


class StagePaella(_Tokens, WithCompressor):
    """Trains v1's Paella together with the semantic compressor."""


class StagePaellaRefinement(_Tokens, DecoderOnly):
    """The last phase of v1's Stage B: trains only Paella, on the finished compressor's latents."""


def _check_recipe(recipe: Recipe) -> None:
    """Raises ``UserError`` if the codebooks differ, and for settings that only a decoder of latents has."""
    decoder, codes = recipe.decoder, recipe.vqgan.num_vq_embeddings
    assert isinstance(decoder, PaellaConfig)
    if decoder.num_labels != codes:
        raise UserError(
            f"the codebook has {codes} entries in vqgan.num_vq_embeddings and {decoder.num_labels} in "
            "decoder.num_labels. Both must be equal."
        )
    if "b" in recipe.stages and recipe.stage_b.loss_weight != "p2":
        raise UserError(
            f"stage_b.loss_weight must be p2 for a decoder of tokens, got {recipe.stage_b.loss_weight}. It "
            "weights errors of noise on latents."
        )
    for name in ("feature_weight", "refine_feature_weight"):
        if "b" in recipe.stages and getattr(recipe.stage_b, name):
            raise UserError(
                f"stage_b.{name} must be 0 for a decoder of tokens, got {getattr(recipe.stage_b, name)}. The "
                "feature loss compares images decoded from predicted latents. Remove it, or use a v2 decoder."
            )
    if "b" in recipe.stages and any(phase.feature_weight for phase in recipe.stage_b.phases):
        raise UserError("feature_weight of a phase must be 0 for a decoder of tokens. Remove it.")
    if "a" in recipe.stages and recipe.stage_a.refine_images:
        raise UserError(
            f"stage_a.refine_images must be 0 with a decoder of tokens, got {recipe.stage_a.refine_images}. "
            "The refinement trains on latents that Stage B samples."
        )


TOKEN_DECODER = DecoderKind(
    version="v1",
    works_on="tokens",
    config=PaellaConfig,
    network=Paella,
    with_compressor=StagePaella,
    refinement=StagePaellaRefinement,
    check=_check_recipe,
    objective=None,
    settings=PUBLISHED_V1,
)
