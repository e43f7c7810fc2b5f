"""Stage B of v1 in training: its loss against torch's own, what is random in it, and what learns."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wuerstchen.diffusion.schedule import shifted
from wuerstchen.errors import UserError
from wuerstchen.models.compressor import compressor_input
from wuerstchen.models.paella import Paella
from wuerstchen.models.previewer import Previewer
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.config import StageBConfig
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.validation import BINS, Denoising, DenoisingTokens, HeldOut, Validation
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages import paella as stage_paella
from wuerstchen.train.stages.base import Stage
from wuerstchen.train.stages.paella import StagePaella, StagePaellaRefinement, token_losses

from ...configurations import SMALL_PREVIEWER, with_lite0

CPU = torch.device("cpu")
LABELS, WIDTH = 16, 5


def make_batch(count: int = 4, first: int = 8) -> Batch:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)
    return Batch(torch.arange(count) + first, torch.from_numpy(images), ["a cat"] * count, [])


def one_of(batch: Batch, i: int) -> Batch:
    return Batch(batch.indices[i : i + 1], batch.images[i : i + 1], batch.captions[i : i + 1], [])


@pytest.fixture
def cascade(small_v1):
    """A copy that a test may train, with a compressor whose backbone sees something."""
    return with_lite0(copy.deepcopy(small_v1))


def recipe_of(cascade):
    """tiny with the shapes of a cascade."""
    recipe = tiny()
    return dataclasses.replace(
        recipe,
        decoder_steps=2,
        vqgan=cascade.vqgan.config,
        compressor=cascade.compressor.config,
        previewer=SMALL_PREVIEWER,
        decoder=cascade.decoder.config,
        prior=cascade.prior.config,
    )


def make_stage(cascade, kind=StagePaella, **changes):
    recipe = recipe_of(cascade)
    model = dataclasses.replace(cascade, previewer=Previewer(SMALL_PREVIEWER))
    config = dataclasses.replace(recipe.stage_b, refine_images=8, **changes)
    stage = kind(config, recipe, model)
    for network in stage.networks.values():
        network.requires_grad_(True).eval()  # without dropout
    return stage


def losses_of(stage, batch):
    with torch.no_grad():
        inputs = stage.prepare(batch, CPU)
    return stage.losses({"images": batch.images, **inputs}, ImageRandom(0, batch.indices))


@pytest.mark.parametrize("kind", [StagePaella, StagePaellaRefinement])
def test_tokens_are_those_of_fp32_under_autocast(cascade, kind):
    stage, found = make_stage(cascade, kind), []
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(stage.prepare(make_batch(), CPU))
    assert torch.equal(found[0]["tokens"], found[1]["tokens"])
    if kind is StagePaellaRefinement:
        assert torch.equal(found[0]["z"], found[1]["z"])


def averages_of(stage):
    return {name: make_average(stage.networks[name]) for name in stage.averaged}


class TestTokenLosses:
    """Against torch.nn.functional.cross_entropy on all logits at once, in float64."""

    def make(self):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        labels = torch.randint(LABELS, (3, 4, 6), generator=generator)
        return draw(3, 4, 6, WIDTH), draw(LABELS, WIDTH), labels

    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
    @pytest.mark.parametrize("positions", [7, 24, 10_000])
    def test_values_and_gradients_are_torch_s(self, smoothing, positions, monkeypatch):
        monkeypatch.setattr(stage_paella, "POSITIONS", positions)
        features, weight, labels = self.make()
        counts = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        losses = token_losses(features, weight, labels)
        ours = torch.autograd.grad((losses.smoothed(smoothing) * counts).sum(), (features, weight))
        logits = (features @ weight.T).permute(0, 3, 1, 2)
        expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        theirs = torch.autograd.grad((expected * counts).sum(), (features, weight))
        torch.testing.assert_close(losses.smoothed(smoothing), expected, rtol=1e-12, atol=1e-12)
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-11, atol=1e-12)
        assert torch.equal(losses.correct, logits.argmax(1) == labels)

    def test_logits_are_never_there_all_at_once(self, monkeypatch):
        """Neither in the forward pass nor kept for the backward pass."""
        monkeypatch.setattr(stage_paella, "POSITIONS", 8)
        features, weight, labels = self.make()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
            losses = token_losses(features, weight, labels)
        assert max(kept, default=0) <= max(features.numel(), weight.numel())
        sizes = []
        linear = F.linear
        monkeypatch.setattr(F, "linear", lambda *given: (sizes.append(len(given[0])), linear(*given))[1])
        losses.cross_entropy.sum().backward()
        assert sizes == [8] * 9  # computed again, piece by piece

    def test_many_labels_are_summed_in_fp32_under_autocast(self):
        """bf16 has no number between 256 and 258: a sum of 8192 equal shares would be far from one."""
        features = torch.zeros(1, 2, 2, 4)
        labels = torch.zeros(1, 2, 2, dtype=torch.long)
        weight = torch.zeros(8192, 4, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            losses = token_losses(features.requires_grad_(), weight, labels)
        assert losses.cross_entropy.dtype == torch.float32
        assert losses.cross_entropy.flatten().tolist() == pytest.approx([math.log(8192)] * 4, abs=1e-5)
        losses.cross_entropy.sum().backward()
        assert weight.grad.dtype == torch.float32

    def test_gradients_of_many_pieces_are_summed_in_fp32(self, monkeypatch):
        """A thousand pieces in bf16 would stop growing where a piece is 1/256 of the sum."""
        monkeypatch.setattr(stage_paella, "POSITIONS", 1)
        conv = torch.nn.Conv2d(4, 3, 1, bias=False)
        torch.nn.init.zeros_(conv.weight)
        features, labels = torch.ones(1, 1, 1024, 4), torch.zeros(1, 1, 1024, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16):
            losses = token_losses(features, conv.weight.flatten(1), labels)
        losses.cross_entropy.sum().backward()
        found = conv.weight.grad.flatten(1)[:, 0]
        torch.testing.assert_close(found, 1024 * torch.tensor([-2 / 3, 1 / 3, 1 / 3]), rtol=5e-3, atol=0)


class TestStagePaella:
    def test_the_loss_written_out(self, cascade):
        """In float64, with all logits at once, from the same draws, at shifted times."""
        stage = make_stage(cascade, map_dropout=0.0, map_noise=0.0, caption_dropout=0.0, time_shift=0.5)
        batch = make_batch()
        with torch.no_grad():
            name, loss, terms = next(losses_of(stage, batch))
        assert name == "decoder_and_compressor"
        exact = copy.deepcopy(cascade)
        for network in (exact.vqgan, exact.decoder, exact.compressor):
            network.double()
        random, total, hits = ImageRandom(0, batch.indices), [], []
        u, choice = random.uniform("time"), random.uniform("token choice", (32, 32))
        noise = random.integers("token noise", (32, 32), LABELS)
        with torch.no_grad():
            pixels = batch.pixels(CPU)
            tokens = cascade.vqgan(pixels)[1].indices
            text = cascade.text_encoder.encode(batch.captions).states.double()
            z = exact.compressor(compressor_input(pixels.double()))
            context = exact.decoder.context(z, text)
            times = shifted(((1 - u) * 1.08 + 0.001).clamp(0.001, 1), 0.5)
            noised = torch.where(choice <= times[:, None, None], noise, tokens)
            logits = exact.decoder(noised, times, context)
        errors = F.cross_entropy(logits, tokens, reduction="none", label_smoothing=0.1)
        for i in range(len(tokens)):
            t = times[i].double()
            kept = (choice[i] > times[i]).double()
            weight = 1 - kept * (1 - t) * 0.7
            total.append((errors[i] * weight).sum() / weight.sum())
            hits.append((logits[i].argmax(0) == tokens[i]).double().mean())
        assert loss.item() == pytest.approx(torch.stack(total).mean().item(), rel=1e-4)
        assert terms["accuracy"].item() == pytest.approx(torch.stack(hits).mean().item(), abs=2e-3)

    def test_before_training_every_token_is_as_likely(self, cascade):
        config = dataclasses.replace(cascade.decoder.config, num_labels=LABELS)
        stage = make_stage(dataclasses.replace(cascade, decoder=Paella(config)))
        _, loss, _ = next(losses_of(stage, make_batch()))
        assert loss.item() == pytest.approx(math.log(LABELS), rel=1e-5)

    @pytest.mark.parametrize("kind", [StagePaella, StagePaellaRefinement])
    def test_an_image_s_loss_does_not_depend_on_its_batch(self, kind, cascade):
        stage = make_stage(cascade, kind, map_dropout=0.3, map_noise=0.5, caption_dropout=0.5)
        assert isinstance(stage, Stage)
        batch = make_batch()
        with torch.no_grad():
            whole = [loss for _, loss, _ in losses_of(stage, batch)]
            parts = [[loss for _, loss, _ in losses_of(stage, one_of(batch, i))] for i in range(4)]
        for ours, theirs in zip(whole, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(ours, torch.stack(theirs).mean(), rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            later = next(losses_of(stage, dataclasses.replace(batch, indices=batch.indices + 4)))[1]
        assert abs(later - whole[0]) > 1e-4

    def test_the_compressor_learns_with_paella_and_stage_a_does_not(self, cascade):
        stage = make_stage(cascade, map_dropout=0.0, map_noise=0.0)
        stage.trained.train()
        losses = losses_of(stage, make_batch())
        _, loss, terms = next(losses)
        loss.backward()
        compressor = stage.trained.compressor
        assert set(terms) == {"map_std", "accuracy"}
        assert compressor.mapper[0].weight.grad.abs().sum() > 0
        assert compressor.backbone._conv_stem.weight.grad.abs().sum() > 0
        assert not any(module.training for module in compressor.backbone.modules())
        assert compressor.mapper[1].training
        assert all(p.grad is not None for p in stage.trained.decoder.parameters())
        assert all(p.grad is None for p in stage.vqgan.parameters())
        assert stage.rate_scales == {"compressor.backbone.": 0.1}
        with pytest.raises(UserError, match=r"semantic latents fell to 0\.01"):
            stage.check({"map_std": 0.01})

    def test_in_the_second_phase_the_compressor_stays(self, cascade):
        stage = make_stage(cascade, StagePaellaRefinement)
        for _, loss, _ in losses_of(stage, make_batch()):
            loss.backward()
        assert set(stage.networks) == {"decoder", "previewer"}
        assert all(p.grad is not None for p in stage.networks["decoder"].parameters())
        assert all(p.grad is None for p in cascade.compressor.parameters())

    def test_latents_and_captions_are_dropped_per_image(self, cascade):
        stage = make_stage(cascade, map_dropout=0.3, map_noise=0.0, caption_dropout=0.4)
        seen = []
        context = stage.trained.decoder.context
        stage.trained.decoder.context = lambda z, text, **how: (
            seen.append((z, text)),
            context(z, text, **how),
        )[1]
        with torch.no_grad():
            for first in range(0, 240, 4):
                next(losses_of(stage, make_batch(first=first)))
            empty = cascade.text_encoder.encode([""]).states[0]
        zeroed = [not z.any() for maps, _ in seen for z in maps]
        dropped = [torch.equal(state, empty) for _, states in seen for state in states]
        assert sum(zeroed) / 240 == pytest.approx(0.3, abs=0.1)
        assert sum(dropped) / 240 == pytest.approx(0.4, abs=0.1)
        assert any(0 < sum(zeroed[i : i + 4]) < 4 for i in range(0, 240, 4))
        both = sum(z and d for z, d in zip(zeroed, dropped, strict=True))
        assert both / 240 == pytest.approx(0.12, abs=0.07)

    def test_label_smoothing_is_a_share(self):
        with pytest.raises(UserError, match=r"label_smoothing must be between 0 and 1, got 1\.5"):
            dataclasses.replace(tiny().stage_b, label_smoothing=1.5)
        assert StageBConfig(optimization=tiny().stage_b.optimization).label_smoothing == 0.1

    @pytest.mark.parametrize("kind", [StagePaella, StagePaellaRefinement])
    def test_the_preview_shows_what_stage_b_could_reach_at_best(self, kind, cascade):
        """Stage A's row is quantised: Stage B of v1 draws nothing but codes."""
        stage = make_stage(cascade, kind)
        pixels = make_batch(2).pixels(CPU)
        with torch.no_grad():
            images = stage.preview(averages_of(stage), pixels, CPU)
            expected = cascade.vqgan(pixels, quantise=True)[0].clamp(0, 1)
        assert [image.size for image in images] == [(128, 128)] * 8
        assert len(stage.preview_labels["rows"]) == 4
        shown = torch.from_numpy(np.array(images[2])).permute(2, 0, 1) / 255
        assert (shown - expected[0]).abs().max() <= 1 / 255


class TestValidation:
    def measure(self, stage):
        batch = make_batch(6)
        pictures = HeldOut(images=batch.images, captions=batch.captions)
        return Validation(stage, pictures, dtype=None, device=CPU)(averages_of(stage))

    @pytest.mark.parametrize("kind", [StagePaella, StagePaellaRefinement])
    def test_it_is_the_cross_entropy_by_time(self, kind, cascade):
        stage = make_stage(cascade, kind)
        assert isinstance(stage, DenoisingTokens)
        assert not isinstance(stage, Denoising)
        stage.optimization = dataclasses.replace(stage.optimization, batch_size=4)
        found = self.measure(stage)
        batch, bins, losses = make_batch(6), [], []
        with torch.no_grad():
            pixels = batch.pixels(CPU)
            tokens = cascade.vqgan(pixels)[1].indices
            z = cascade.compressor.eval()(compressor_input(pixels))
            context = cascade.decoder.context(z, cascade.text_encoder.encode(batch.captions).states)
            for k in range(BINS):
                random, t = ImageRandom(k, torch.arange(6)), (k + 0.5) / BINS
                noise = random.integers("token noise", (32, 32), LABELS)
                hidden = random.uniform("token choice", (32, 32)) <= t
                noised = torch.where(hidden, noise, tokens)
                logits = cascade.decoder(noised, torch.full((6,), t), context)
                bins.append(F.cross_entropy(logits, tokens).item())
                errors = F.cross_entropy(logits, tokens, reduction="none", label_smoothing=0.1)
                weight = torch.where(hidden, 1.0, 0.3 + 0.7 * t)
                losses += ((errors * weight).sum((1, 2)) / weight.sum((1, 2))).tolist()
        assert found["bins"] == pytest.approx(bins, rel=1e-4)
        assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert self.measure(stage) == found
