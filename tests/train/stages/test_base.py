"""The losses of the three stages: what is dropped, noised and weighted, a picture at a time."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from wuerstchen.data.prepared import PreparedSet
from wuerstchen.diffusion.objective import OBJECTIVES
from wuerstchen.diffusion.sampler_table import samplers_for
from wuerstchen.diffusion.schedule import CosineSchedule, shifted
from wuerstchen.errors import DataError, UserError
from wuerstchen.images import to_images
from wuerstchen.models.compressor import Compressor, compressor_input
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.efficientnet import EfficientNetLite
from wuerstchen.models.previewer import Previewer
from wuerstchen.models.prior import Prior
from wuerstchen.models.vqgan import VQGAN
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.config import Phase, StageAConfig
from wuerstchen.train.feed.images import Batch, Feed, batches
from wuerstchen.train.feed.known_cells import random_regions
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.initial_weights import InitialWeights, Parts
from wuerstchen.train.precision import with_autocast_weights
from wuerstchen.train.stages.base import Run, cascade_settings, in_chunks, with_captions_dropped
from wuerstchen.train.stages.decoder import DECODER_STAGE, StageB, StageBRefinement
from wuerstchen.train.stages.decoding import Decoding
from wuerstchen.train.stages.prior import StageC, measure_statistics, needs, with_noise
from wuerstchen.train.stages.vqgan import PerceptualLoss, StageA, StageARefinement, random_crops

from ...configurations import SMALL_PREVIEWER, SMALL_STATISTICS, with_lite0

CPU = torch.device("cpu")
RECIPE = tiny()


def a_run(**given) -> SimpleNamespace:
    """A run that has what is given."""
    names = {*Run.__annotations__, *(name for name in vars(Run) if not name.startswith("_"))}
    return SimpleNamespace(**{**dict.fromkeys(names, lambda *_, **__: None), **given})


def make_batch(size: int = 64, count: int = 4) -> Batch:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return Batch(torch.arange(count) + 8, torch.from_numpy(images), ["a cat"] * count, [])


def random_of(batch: Batch) -> ImageRandom:
    return ImageRandom(0, batch.indices)


def losses_of(stage, batch: Batch):
    """Both steps of a stage on one batch."""
    with torch.no_grad():
        inputs = stage.prepare(batch, CPU)
    return stage.losses({"images": batch.images, **inputs}, random_of(batch))


def test_crops_stay_inside_and_differ():
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(30), indexing="ij")
    picture = torch.stack([rows, columns, rows + columns], dim=2).to(torch.uint8)
    crops = random_crops(picture.expand(300, -1, -1, -1), 8, ImageRandom(0, torch.arange(300)))
    assert crops.shape == (300, 8, 8, 3)
    corners = {(top, left) for top, left, _ in crops[:, 0, 0].tolist()}
    assert len(corners) > 100
    assert {top for top, _ in corners} == set(range(13))
    assert {left for _, left in corners} == set(range(23))
    for crop in crops[:5]:
        top, left, _ = crop[0, 0].tolist()
        assert torch.equal(crop, picture[top : top + 8, left : left + 8])


def test_crops_of_latents_lie_where_those_of_pixels_do():
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(24), indexing="ij")
    cells = torch.stack([rows, columns], dim=2).expand(50, -1, -1, -1)
    pixels = cells.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    random = ImageRandom(0, torch.arange(50))
    assert torch.equal(random_crops(pixels, 32, random, grid=4)[:, ::4, ::4], random_crops(cells, 8, random))


def nearly_equal(images, others) -> bool:
    """Whether images are the same to rounding."""
    pairs = zip(images, others, strict=True)
    differences = (np.asarray(one, np.int16) - np.asarray(other, np.int16) for one, other in pairs)
    return all(np.abs(difference).max() <= 1 for difference in differences)


class TestStageA:
    def make(self, **changes):
        torch.manual_seed(0)
        config = dataclasses.replace(RECIPE.stage_a, crop=None, perceptual="none", **changes)
        return StageA(config, VQGAN(RECIPE.vqgan), None)

    def test_reconstruction_and_quantiser_terms(self):
        batch, stage = make_batch(), self.make(adversarial_weight=0.0, quantise_dropout=0.0)
        stage.vqgan.eval()
        ((name, loss, terms),) = losses_of(stage, batch)
        output, quantised = stage.vqgan(batch.pixels(CPU))
        pixels = batch.pixels(CPU)
        expected = F.mse_loss(output, pixels) + 1.0 * F.l1_loss(output, pixels) + quantised.loss
        assert name == "vqgan"
        torch.testing.assert_close(loss, expected)
        assert terms.keys() == {"reconstruction", "quantiser", "codes_used"}
        assert terms["codes_used"].item() == len(quantised.indices.unique())

    def test_the_share_that_passes_unquantised(self):
        stage = self.make(adversarial_weight=0.0)
        seen = []
        stage.vqgan.forward = lambda pixels, quantise: (
            seen.append(quantise),
            VQGAN.forward(stage.vqgan, pixels),
        )[1]
        for start in range(0, 400, 4):
            batch = dataclasses.replace(make_batch(16), indices=torch.arange(start, start + 4))
            list(losses_of(stage, batch))
        assert torch.cat(seen).float().mean().item() == pytest.approx(0.9, abs=0.04)
        assert any(0 < q.sum() < 4 for q in seen)  # decided per image, not per batch

    def test_the_discriminator_is_listened_to_later_and_learns_alone(self):
        batch = make_batch()
        first, last = int(batch.indices.min()), int(batch.indices.max())
        stage = self.make(adversarial_from=last + 1, adversarial_weight=2.0, quantise_dropout=1.0)
        later = dataclasses.replace(batch, indices=batch.indices + (last + 1 - first))
        _, deaf, terms = next(losses_of(stage, batch))
        losses = losses_of(stage, later)
        name, loss, again = next(losses)
        assert name == "vqgan"
        torch.testing.assert_close(deaf, terms["reconstruction"] + terms["quantiser"])
        torch.testing.assert_close(
            loss - 2 * again["adversarial"], again["reconstruction"] + again["quantiser"]
        )
        loss.backward()
        stage.vqgan.zero_grad()
        name, loss, _ = next(losses)
        assert name == "discriminator"
        loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in stage.vqgan.parameters())
        # Logits of zero cost one for the real and one for the made image.
        assert loss.item() == pytest.approx(2, abs=0.5)

    def test_the_terms_written_out(self):
        """Every weight and sign, with a critic and an image network that anybody can do by hand."""
        batch, features = make_batch(), torch.nn.AvgPool2d(4)
        config = dataclasses.replace(
            RECIPE.stage_a,
            crop=None,
            perceptual="none",
            quantise_dropout=1.0,
            adversarial_from=0,
            l1_weight=0.25,
            perceptual_weight=0.5,
            adversarial_weight=2.0,
        )
        stage = StageA(config, VQGAN(RECIPE.vqgan), None)
        stage.vqgan.eval()
        stage.perceptual = lambda x, y: (features(x) - features(y)).abs().mean()
        stage.discriminator = lambda x: 3 * x[:, :1] - 0.7
        losses, pixels = losses_of(stage, batch), batch.pixels(CPU)
        output, quantised = stage.vqgan(pixels, quantise=torch.zeros(4, dtype=torch.bool))
        _, loss, terms = next(losses)
        squared, absolute = (output - pixels).square().mean(), (output - pixels).abs().mean()
        seen = (features(output) - features(pixels)).abs().mean()
        made, real = (3 * x[:, :1] - 0.7 for x in (output, pixels))
        expected = squared + 0.25 * absolute + quantised.loss + 0.5 * seen - 2 * made.mean()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(terms["adversarial"], -made.mean())
        _, loss, _ = next(losses)
        torch.testing.assert_close(loss, (1 - real).clamp(min=0).mean() + (1 + made).clamp(min=0).mean())

    def test_previews_are_of_the_average(self):
        stage = self.make()
        average = VQGAN(RECIPE.vqgan)
        pixels = make_batch().pixels(CPU)
        images = stage.preview({"vqgan": average.eval()}, pixels, CPU)
        with torch.no_grad():
            expected = to_images(average(pixels, quantise=True)[0].clamp(0, 1))
        assert [image.tobytes() for image in images[8:]] == [image.tobytes() for image in expected]
        assert nearly_equal(images, stage.preview({"vqgan": average}, pixels, CPU, low_memory=True))

    def test_the_codebook_does_not_collapse(self):
        """As published (``uniform``) all codes begin in one spot; those that are nearest first take all."""
        used = {}
        for init in ("uniform", StageAConfig(optimization=RECIPE.stage_a.optimization).codebook_init):
            torch.manual_seed(0)
            config = dataclasses.replace(
                RECIPE.stage_a, crop=None, perceptual="none", adversarial_weight=0.0, codebook_init=init
            )
            small = dataclasses.replace(RECIPE.vqgan, embed_dim=16, num_vq_embeddings=256)
            stage = StageA(config, VQGAN(small), None)
            optimizer = torch.optim.AdamW(stage.vqgan.parameters(), lr=1e-3)
            rng = np.random.default_rng(0)
            coarse = torch.from_numpy(rng.random((8, 3, 4, 4), dtype=np.float32))
            pixels = F.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)
            images = (pixels * 255).to(torch.uint8).permute(0, 2, 3, 1)
            for number in range(30):
                random = ImageRandom(0, torch.arange(8) + 8 * number)
                _, loss, terms = next(stage.losses({"images": images}, random))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            used[init] = terms["codes_used"].item()
        assert used["uniform"] < 30
        assert used["normal"] > 100

    def test_the_codebook_can_start_spread_out(self):
        spread, published = self.make(), self.make(codebook_init="uniform")
        assert spread.vqgan.vquantizer.embedding.weight.std() > 0.9
        assert published.vqgan.vquantizer.embedding.weight.abs().max() <= 1 / 256


class TestStageARefinement:
    def make(self, small_cascade, **changes):
        config = dataclasses.replace(
            RECIPE.stage_a, perceptual="none", refine_images=8, **{"adversarial_weight": 0.0, **changes}
        )
        return StageARefinement(config, small_cascade.vqgan, None, small_cascade, None, RECIPE)

    @pytest.mark.parametrize("quantise", [False, True])
    def test_the_loss_without_stage_b_is_that_of_stage_a(self, quantise, small_cascade):
        changes = {"refine_redrawn": 0.0, "quantise_dropout": 0.0 if quantise else 1.0, "crop": None}
        batch, stage = make_batch(128), self.make(small_cascade, **changes)
        _, loss, _ = next(losses_of(stage, batch))
        pixels = batch.pixels(CPU)
        output, _ = small_cascade.vqgan(pixels, quantise=quantise)
        torch.testing.assert_close(loss, F.mse_loss(output, pixels) + F.l1_loss(output, pixels))

    def test_stage_b_resamples_an_image_by_its_number(self, small_cascade):
        batch, stage = make_batch(128), self.make(small_cascade, refine_redrawn=1.0, crop=None)
        with torch.no_grad():
            made = stage.prepare(batch, CPU)
            alone = stage.prepare(Batch(batch.indices[1:2], batch.images[1:2], ["a cat"], []), CPU)
        assert (made["redrawn"] - made["latents"]).abs().max() > 0.01
        torch.testing.assert_close(made["redrawn"][1:2], alone["redrawn"], rtol=1e-4, atol=1e-4)
        _, loss, _ = next(losses_of(stage, batch))
        output, pixels = small_cascade.vqgan.decode(made["redrawn"]), batch.pixels(CPU)
        torch.testing.assert_close(loss, F.mse_loss(output, pixels) + F.l1_loss(output, pixels))

    def test_redrawn_written_out(self, small_cascade):
        """Four times noised and guessed again, each guess from the one before."""
        batch, stage = make_batch(128), self.make(small_cascade, crop=None)
        decoder, random, schedule = small_cascade.decoder.eval(), random_of(batch), CosineSchedule()
        with torch.no_grad():
            made = stage.prepare(batch, CPU)
            pixels = batch.pixels(CPU)
            z = small_cascade.compressor.eval()(compressor_input(pixels))
            x = small_cascade.vqgan.encode(pixels)
            context = decoder.context(z, tuple(x.shape[2:]), None, None)
            for t in (0.5, 0.35, 0.2, 0.08):
                noise = random.normal(f"noise at {t}", x.shape[1:])
                alpha_bar = schedule.alpha_bar(torch.tensor(t))
                noised = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
                predicted = decoder(noised, torch.full((4,), t), context)
                x = (noised - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
        torch.testing.assert_close(made["redrawn"], x, rtol=1e-3, atol=1e-4)

    def test_only_the_way_to_pixels_learns(self, small_cascade):
        batch, stage = make_batch(128), self.make(small_cascade, adversarial_weight=1.0, crop=64)
        before = small_cascade.vqgan.encode(batch.pixels(CPU))
        for name, loss, _ in losses_of(stage, batch):
            loss.backward(inputs=list(stage.networks[name].parameters()))
        learns = {name for name, p in small_cascade.vqgan.named_parameters() if p.grad is not None}
        assert learns == {
            n for n in small_cascade.vqgan.state_dict() if n.startswith(("up_blocks", "out_block"))
        }
        torch.testing.assert_close(small_cascade.vqgan.encode(batch.pixels(CPU)), before)
        averages = {"decoder_half": copy.deepcopy(stage.networks["decoder_half"])}
        previews = stage.preview(averages, batch.pixels(CPU), CPU)
        assert len(previews) == len(stage.preview_labels["rows"]) * len(batch.images)
        with torch.no_grad():
            assert nearly_equal(previews, stage.preview(averages, batch.pixels(CPU), CPU, low_memory=True))


def test_perceptual_loss_sees_blur_and_is_zero_for_equals():
    torch.manual_seed(0)
    loss = PerceptualLoss(EfficientNetLite())
    x = torch.rand(2, 3, 64, 64)
    assert loss(x, x).item() == 0
    near, far = (x + s * torch.randn_like(x) for s in (0.01, 0.3))
    assert 0 < loss(near, x) < loss(far, x)
    y = x.clone().requires_grad_()
    loss(y, 1 - x).backward()
    assert y.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in loss.parameters())


def test_perceptual_loss_compares_directions():
    """An image whose features are three times as large is the same to it. In numpy, position by position."""
    maps = {False: [torch.rand(2, 5, 4, 3), torch.rand(2, 7, 2, 2)]}
    maps[True] = [torch.rand(2, 5, 4, 3), torch.rand(2, 7, 2, 2)]

    network = EfficientNetLite()
    network.feature_maps = lambda x: [x[0, 0, 0, 0] * found for found in maps[bool(x[0, 0, 0, 0] > 2)]]
    loss = PerceptualLoss(network)
    one = torch.ones(2, 3, 4, 4)
    three = 3 * one
    expected = []
    for ours, theirs in zip(maps[False], maps[True], strict=True):
        a, b = (x.double().numpy() for x in (ours, theirs))
        a, b = (x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (a, b))
        expected.append(((a - b) ** 2).sum(1).mean())
    assert loss(one, three).item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert loss(one, 2 * one).item() == pytest.approx(0, abs=1e-10)


@pytest.fixture
def small_cascade(small_cascade):
    """A copy that a test may train, with a compressor whose backbone sees something."""
    cascade = with_lite0(copy.deepcopy(small_cascade))
    return cascade


def with_previewer(cascade):
    """The cascade with a previewer and without text."""
    return dataclasses.replace(cascade, previewer=Previewer(SMALL_PREVIEWER), text_encoder=None)


def normalising(cascade, statistics):
    """The cascade with other statistics of its semantic latents."""
    settings = dataclasses.replace(cascade.settings, latent_statistics=statistics)
    return dataclasses.replace(cascade, settings=settings)


@pytest.fixture
def stage_b(small_cascade):
    return StageB(RECIPE.stage_b, RECIPE, with_previewer(small_cascade))


class TestStageB:
    def test_latents_are_zeroed_and_noised_per_image(self, stage_b):
        stage_b.config = dataclasses.replace(stage_b.config, map_dropout=0.2, map_noise=0.5)
        z = torch.full((4000, 2, 3, 3), 7.0)
        augmented = stage_b.augment(z, ImageRandom(0, torch.arange(4000)))
        zeroed = (augmented == 0).flatten(1).all(1)
        untouched = (augmented == 7).flatten(1).all(1)
        noised = ~zeroed & ~untouched
        assert zeroed.float().mean().item() == pytest.approx(0.2, abs=0.02)
        assert noised.float().mean().item() == pytest.approx(0.8 * 0.5, abs=0.03)
        # Times reach to 0.5, where √ᾱ is 0.70: the mean of noised latents falls to
        # no less than that.
        shares = augmented[noised].flatten(1).mean(1) / 7
        assert shares.max() < 1.2
        assert 0.75 < shares.mean() < 0.97

    @pytest.mark.parametrize("refines", [False, True])
    def test_the_loss_written_out(self, refines, stage_b, small_cascade):
        """With shifted times and another weighting than the usual one."""
        changes = {"map_dropout": 0.0, "map_noise": 0.0, "loss_weight": "velocity"}
        if refines:
            changes |= {"time_shift": 0.5, "refine_shift": 2.0, "refine_images": 8}
            config = dataclasses.replace(RECIPE.stage_b, **changes)
            stage = StageBRefinement(config, RECIPE, with_previewer(small_cascade))
        else:
            stage = stage_b
            stage.config = dataclasses.replace(stage.config, time_shift=2.0, **changes)
            stage.trained.eval()
        small_cascade.decoder.eval()
        batch, decoder = make_batch(128), small_cascade.decoder
        random = random_of(batch)
        with torch.no_grad():
            losses = losses_of(stage, batch)
            loss, (name, of_previewer, _) = next(losses)[1], next(losses)
            pixels = batch.pixels(CPU)
            latents = small_cascade.vqgan.encode(pixels)
            z = small_cascade.compressor(compressor_input(pixels))
            t = shifted(((1 - random.uniform("time")) * 1.08 + 0.001).clamp(0.001, 1), 2.0)
            noise = random.normal("noise", latents.shape[1:])
            alpha_bar = CosineSchedule().alpha_bar(t)
            noised = CosineSchedule().add_noise(latents, noise, t)
            context = decoder.context(z, tuple(latents.shape[2:]), None, None)
            predicted = decoder(noised, t, context)
            expected = ((predicted - noise).square().mean((1, 2, 3)) / alpha_bar).mean()
            drawn = stage.previewer(z)
            side = 128 // drawn.shape[2]
            small = pixels.unflatten(3, (-1, side)).mean(4).unflatten(2, (-1, side)).mean(3)
        torch.testing.assert_close(loss, expected)
        assert name == "previewer"
        torch.testing.assert_close(of_previewer, (drawn - small).square().mean(), rtol=1e-4, atol=1e-6)

    def test_previews_and_validation_are_of_the_averages(self, stage_b, small_cascade, monkeypatch):
        drawn = []
        monkeypatch.setattr(Decoding, "reconstructions", lambda stage, *given: (drawn.append(given), [])[1])

        def drawn_with(expected):
            assert [id(network) for network in drawn.pop()[:3]] == [id(network) for network in expected]

        averages = {name: copy.deepcopy(network) for name, network in stage_b.networks.items()}
        both, batch = averages["decoder_and_compressor"], make_batch(128)
        stage_b.preview(averages, batch.pixels(CPU), CPU)
        drawn_with((both.decoder, both.compressor, averages["previewer"]))
        both.eval()
        with torch.no_grad():
            decoder, z = stage_b.decoder_and_latents(averages, {"images": batch.images})
            expected = both.compressor(compressor_input(batch.pixels(CPU), RECIPE.view_scale))
        assert decoder is both.decoder
        assert torch.equal(z, expected)
        config = dataclasses.replace(RECIPE.stage_b, refine_images=8)
        last = StageBRefinement(config, RECIPE, with_previewer(small_cascade))
        averages = {name: copy.deepcopy(network) for name, network in last.networks.items()}
        last.preview(averages, batch.pixels(CPU), CPU)
        drawn_with((averages["decoder"], small_cascade.compressor, averages["previewer"]))
        assert last.decoder_and_latents(averages, {"z": z})[0] is averages["decoder"]

    @torch.no_grad()
    def test_previews_with_less_memory_are_the_same_images(self, stage_b):
        averages = {name: copy.deepcopy(network).eval() for name, network in stage_b.networks.items()}
        stage_b.vqgan.eval()
        pixels = make_batch(128).pixels(CPU)[:2]
        images = stage_b.preview(averages, pixels, CPU)
        assert len(images) == 2 * len(stage_b.preview_labels["rows"])
        assert nearly_equal(images, stage_b.preview(averages, pixels, CPU, low_memory=True))

    def test_the_previewer_has_a_rate_of_its_own(self, small_cascade):
        config = dataclasses.replace(RECIPE.stage_b, previewer_rate=3e-3)
        assert StageB(config, RECIPE, with_previewer(small_cascade)).rates == {"previewer": 3e-3}

    def test_the_compressor_learns_with_the_decoder(self, stage_b):
        """Gradients reach the backbone through the semantic latents; Stage A's weights stay out of it."""
        for parameter in stage_b.trained.parameters():
            parameter.requires_grad_(True)
        stage_b.config = dataclasses.replace(stage_b.config, map_dropout=0.0, map_noise=0.0)
        batch = make_batch(128)
        losses = losses_of(stage_b, batch)
        name, loss, terms = next(losses)
        loss.backward()
        compressor = stage_b.trained.compressor
        assert (name, set(terms)) == ("decoder_and_compressor", {"map_std"})
        assert compressor.mapper[0].weight.grad.abs().sum() > 0
        assert compressor.backbone._conv_stem.weight.grad.abs().sum() > 0
        assert all(p.grad is None for p in stage_b.vqgan.parameters())
        # The previewer has no say in the semantic latents.
        stage_b.trained.zero_grad()
        name, loss, _ = next(losses)
        loss.backward()
        assert name == "previewer"
        assert all(p.grad is None for p in stage_b.trained.parameters())
        assert all(p.grad is not None for p in stage_b.previewer.parameters())

    def test_latents_without_information_stop_the_training(self, stage_b):
        """A saturated backbone gives the same semantic latents for every image, and no gradient to get out of
        it."""
        stage_b.trained.train()
        torch.nn.init.constant_(stage_b.trained.compressor.backbone._bn1.bias, 100.0)
        batch = make_batch(128)
        _, _, terms = next(losses_of(stage_b, batch))
        with pytest.raises(
            UserError,
            match=r"deviation of the semantic latents fell to .*\. Use a lower stage_b\.backbone_rate",
        ):
            stage_b.check({"map_std": terms["map_std"].item()})

    def test_the_backbone_learns_more_slowly(self, stage_b):
        assert stage_b.rate_scales == {"compressor.backbone.": 0.1}
        names = [name for name, _ in stage_b.trained.named_parameters()]
        assert sum(name.startswith("compressor.backbone.") for name in names) > 100

    def test_early_layers_can_be_frozen(self, small_cascade):
        compressor = small_cascade.compressor.requires_grad_(True)
        compressor.freeze_early_layers(8)
        z = compressor(torch.rand(1, 3, 96, 96))
        z.square().sum().backward()
        blocks = compressor.backbone._blocks
        # Lite0: blocks 0 | 1, 2 | 3, 4 work at strides 2, 4 and 8, block 5 is the first at 16.
        assert all(p.grad is None for p in blocks[:5].parameters())
        assert all(p.grad is not None for p in blocks[5].parameters())
        assert compressor.backbone._conv_stem.weight.grad is None
        assert compressor.mapper[0].weight.grad is not None

    def test_a_run_freezes_them_in_every_phase(self):
        recipe, seen = tiny(), []
        phases = (Phase(optimization=recipe.stage_b.optimization),)
        recipe = dataclasses.replace(
            recipe, stage_b=dataclasses.replace(recipe.stage_b, frozen_stride=8, phases=phases)
        )

        def train_phase(stage, phase, *, multiple):
            blocks = stage.trained.compressor.backbone._blocks
            seen.append([[p.requires_grad for p in part.parameters()] for part in (blocks[:5], blocks[5:])])
            return lambda network, name: stage.networks[name]

        run = a_run(
            recipe=recipe,
            device=CPU,
            start=InitialWeights(),
            parts=Parts(vqgan=VQGAN(recipe.vqgan)),
            seed_weights=lambda stage: None,
            is_new=lambda stage: False,
            train_phase=train_phase,
        )
        DECODER_STAGE.train(run)
        assert len(seen) == 2
        for early, late in seen:
            assert not any(early)
            assert all(late)

    def test_initial_weights_are_drawn_in_a_fixed_order(self):
        """A recipe and its seed begin with the same weights in every version."""
        torch.manual_seed(5)
        expected = Compressor(RECIPE.compressor), Decoder(RECIPE.decoder), Previewer(RECIPE.previewer)
        found = []

        def train_phase(stage, phase, *, multiple):
            found[:] = copy.deepcopy((stage.trained.decoder, stage.previewer))
            return lambda network, name: stage.networks[name]

        DECODER_STAGE.train(
            a_run(
                recipe=RECIPE,
                device=CPU,
                start=InitialWeights(),
                parts=Parts(vqgan=VQGAN(RECIPE.vqgan)),
                seed_weights=lambda name: torch.manual_seed(5),
                is_new=lambda name: False,
                train_phase=train_phase,
            )
        )
        for ours, theirs in zip(found, expected[1:], strict=True):
            state = theirs.state_dict()
            assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())

    def test_the_second_phase_has_rate_length_and_shift_of_its_own(self, small_cascade):
        config = dataclasses.replace(
            RECIPE.stage_b, time_shift=4.0, refine_images=12, refine_rate=2e-4, refine_shift=0.5
        )
        stage = StageBRefinement(config, RECIPE, with_previewer(small_cascade))
        assert (stage.optimization.images, stage.optimization.learning_rate) == (12, 2e-4)
        assert stage.config.time_shift == 0.5

    def test_the_loss_does_not_depend_on_the_rest_of_the_batch(self, stage_b):
        stage_b.trained.eval()
        batch = make_batch(128)
        with torch.no_grad():
            whole = next(losses_of(stage_b, batch))[1]
            parts = []
            for i in range(4):
                one = Batch(batch.indices[i : i + 1], batch.images[i : i + 1], ["a cat"], [])
                parts.append(next(losses_of(stage_b, one))[1])
        torch.testing.assert_close(whole, torch.stack(parts).mean())


class TestStageC:
    STATISTICS = SMALL_STATISTICS

    def test_padding_is_attended_to_where_the_recipe_says_so(self, small_cascade):
        batch, losses = make_batch(128), {}
        for positions in ("real", "all"):
            recipe = dataclasses.replace(RECIPE, text_positions=positions)
            stage = StageC(RECIPE.stage_c, recipe, normalising(small_cascade, self.STATISTICS))
            stage.prior.eval()
            assert ("mask" in stage.prepare(batch, CPU)) == (positions == "real")
            assert cascade_settings(recipe, self.STATISTICS).text_mask == (positions == "real")
            with torch.no_grad():
                losses[positions] = next(losses_of(stage, batch))[1].item()
        assert losses["real"] != losses["all"]

    def test_the_recipe_sets_how_the_model_samples(self):
        given = {"prior_sampler": "dpm", "prior_steps": 12, "decoder_steps": 4, "decoder_shift": 2.0}
        given |= {"prior_guidance": 3.0, "prior_guidance_interval": (0.2, 0.8), "decoder_guidance": 1.5}
        settings = cascade_settings(dataclasses.replace(tiny(), **given), self.STATISTICS)
        assert {name: getattr(settings, name) for name in given} == given
        own = cascade_settings(tiny(), self.STATISTICS)
        assert (own.prior_sampler, own.prior_guidance_interval) == ("ddpm", (0.0, 1.0))
        start = dataclasses.replace(own, prior_sampler="dpm")
        assert cascade_settings(tiny(), self.STATISTICS, start).prior_sampler == "dpm"
        chosen = dataclasses.replace(tiny(), prior_sampler="ddpm")
        assert cascade_settings(chosen, self.STATISTICS, start).prior_sampler == "ddpm"

    def test_a_model_says_whether_it_was_trained_with_known_cells(self):
        """Edits then show Stage C what they keep. Without Stage C, the model at the start decides."""
        trained = dataclasses.replace(RECIPE, stage_c=dataclasses.replace(RECIPE.stage_c, known_fraction=0.1))
        known = cascade_settings(trained, self.STATISTICS)
        assert known.prior_known_cells
        assert not cascade_settings(RECIPE, self.STATISTICS, known).prior_known_cells
        decoder = dataclasses.replace(RECIPE, stages=("a", "b"))
        assert cascade_settings(decoder, self.STATISTICS, known).prior_known_cells
        assert not cascade_settings(decoder, self.STATISTICS).prior_known_cells

    def make(self, small_cascade, dropout, **fields):
        config = dataclasses.replace(RECIPE.stage_c, caption_dropout=dropout, **fields)
        return StageC(config, RECIPE, normalising(small_cascade, self.STATISTICS))

    def test_the_loss_written_out(self, small_cascade):
        batch, stage = make_batch(128), self.make(small_cascade, 0.0)
        stage.prior.eval()
        random = random_of(batch)
        with torch.no_grad():
            loss = next(losses_of(stage, batch))[1]
            z = small_cascade.compressor(compressor_input(batch.pixels(CPU)))
            x = (z - torch.tensor([0.5, -1.0]).view(2, 1, 1)) / torch.tensor([2.0, 3.0]).view(2, 1, 1)
            t = ((1 - random.uniform("time")) * 1.08 + 0.001).clamp(0.001, 1)
            noise = random.normal("noise", (2, 3, 3))
            alpha_bar = CosineSchedule().alpha_bar(t).view(-1, 1, 1, 1)
            text = small_cascade.text_encoder.encode(batch.captions)
            noised = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
            predicted = stage.prior(noised, t, stage.prior.context(text.states, text.mask))
            expected = ((predicted - noise).square().mean((1, 2, 3)) * (1 - alpha_bar.flatten())).mean()
        torch.testing.assert_close(loss, expected)

    def test_velocity_and_shifted_times_are_asked_for_by_the_recipe(self, small_cascade):
        batch = make_batch(128)
        stage = self.make(small_cascade, 0.0, loss_weight="velocity", time_shift=2.0)
        stage.prior.eval()
        random = random_of(batch)
        with torch.no_grad():
            loss = next(losses_of(stage, batch))[1]
            x = stage.prepare(batch, CPU)["x"]
            t = shifted(((1 - random.uniform("time")) * 1.08 + 0.001).clamp(0.001, 1), 2.0)
            noise = random.normal("noise", (2, 3, 3))
            alpha_bar = CosineSchedule().alpha_bar(t)
            text = small_cascade.text_encoder.encode(batch.captions)
            noised = CosineSchedule().add_noise(x, noise, t)
            predicted = stage.prior(noised, t, stage.prior.context(text.states, text.mask))
            expected = ((predicted - noise).square().mean((1, 2, 3)) / alpha_bar).mean()
        torch.testing.assert_close(loss, expected)

    def test_the_time_density_reaches_the_loss(self, small_cascade):
        """Another density at the same noise gives another loss, and None is the published one."""
        batch, losses = make_batch(128), {}
        for density in (None, "uniform", "logit_normal"):
            stage = self.make(small_cascade, 0.0, time_density=density)
            stage.prior.eval()
            with torch.no_grad():
                losses[density] = next(losses_of(stage, batch))[1].item()
        assert losses[None] == losses["uniform"] != losses["logit_normal"]

    def run_losses(self, stage, batch):
        """The loss, and the latents and times that the prior read."""
        seen, forward = [], stage.prior.forward
        stage.prior.forward = lambda x, t, context: (seen.append((x, t)), forward(x, t, context))[1]
        with torch.no_grad():
            loss = next(losses_of(stage, batch))[1]
        del stage.prior.forward
        return loss, *seen[0]

    def test_without_known_cells_the_loss_has_the_same_bits_as_before(self, small_cascade):
        batch, stage = make_batch(128), self.make(small_cascade, 0.3)
        stage.prior.eval()
        random, objective = random_of(batch), stage.objective
        loss, *_ = self.run_losses(stage, batch)
        with torch.no_grad():
            inputs = stage.prepare(batch, CPU)
            states, mask = with_captions_dropped(stage.no_text, inputs, random, 0.3)
            x, t = inputs["x"], objective.times(random.uniform("time"))
            noise = random.normal("noise", x.shape[1:])
            context = stage.prior.context(states, mask, cache_kv=False)
            output = stage.prior(objective.noised(x, noise, t), t, context)
            assert torch.equal(loss, objective.loss(output, x, noise, t).mean())

    def test_the_loss_with_known_cells_written_out(self, small_cascade):
        """Known cells are clean, at time 0, and have no loss. An image's weight does not depend on them."""
        batch = make_batch(128, count=12)
        stage = self.make(small_cascade, 0.0, known_fraction=0.5)
        stage.prior.eval()
        loss, noised, times = self.run_losses(stage, batch)
        random = random_of(batch)
        known = random_regions(random, (3, 3), 0.5)
        has_known = known.flatten(1).any(1)
        assert 0 < has_known.sum() < 12
        with torch.no_grad():
            inputs = stage.prepare(batch, CPU)
            x, noise = inputs["x"], random.normal("noise", (2, 3, 3))
            t = ((1 - random.uniform("time")) * 1.08 + 0.001).clamp(0.001, 1)
            alpha_bar = CosineSchedule().alpha_bar(t).view(-1, 1, 1, 1)
            x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
            x_t = torch.where(known[:, None].expand_as(x), x, x_t)
            assert torch.equal(noised, x_t)
            cells = t[:, None, None].repeat(1, 3, 3)
            cells[known] = 0
            assert torch.equal(times, cells)
            context = stage.prior.context(inputs["states"], inputs["mask"])
            errors = (stage.prior(x_t, cells, context) - noise).square().mean(1)
            means = torch.stack([error[~region].mean() for error, region in zip(errors, known, strict=True)])
            torch.testing.assert_close(loss, (means * (1 - alpha_bar.flatten())).mean())

    def test_noise_on_text_states_is_in_multiples_of_their_size(self):
        """The empty text of dropped captions and the other random numbers stay as they are."""
        states = torch.randn(64, 5, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor(
            [0.01, 0.1, 1.0, 10.0, 100.0]
        ).view(1, 5, 1)
        noisy = with_noise(states, ImageRandom(0, torch.arange(64)), 0.3)
        sizes = (noisy - states).square().mean((0, 2)).sqrt() / states.square().mean((0, 2)).sqrt()
        torch.testing.assert_close(sizes, torch.full((5,), 0.3), rtol=0.05, atol=0)
        assert with_noise(states.half(), ImageRandom(0, torch.arange(64)), 0.3).dtype == torch.float16

    def test_dropped_captions_get_no_text_noise(self, small_cascade):
        batch, found = make_batch(128, count=12), {}
        for dropout in (0.0, 1.0):
            for noise in (0.0, 0.5):
                stage = self.make(small_cascade, dropout, text_noise=noise)
                stage.prior.eval()
                found[dropout, noise] = self.run_losses(stage, batch)
        assert torch.equal(found[1.0, 0.0][0], found[1.0, 0.5][0])
        assert not torch.equal(found[0.0, 0.0][0], found[0.0, 0.5][0])
        assert torch.equal(found[0.0, 0.0][1], found[0.0, 0.5][1])

    def test_known_cells_shift_no_other_random_numbers(self, small_cascade):
        """Images without them have the times, noise and captions of a run without the option."""
        batch, found = make_batch(128, count=12), []
        for fraction in (0.0, 0.5):
            stage = self.make(small_cascade, 0.3, known_fraction=fraction)
            stage.prior.eval()
            found.append(self.run_losses(stage, batch)[1:])
        rest = ~random_regions(random_of(batch), (3, 3), 0.5).flatten(1).any(1)
        assert torch.equal(found[0][0][rest], found[1][0][rest])
        assert torch.equal(found[0][1][rest, None, None].expand(-1, 3, 3), found[1][1][rest])

    @pytest.mark.parametrize("prediction", ["velocity", "flow"])
    def test_other_objectives_train_with_known_cells(self, prediction, small_cascade):
        """The gradient is finite, and reaches every weight."""
        config = dataclasses.replace(small_cascade.prior.config, prediction=prediction)
        objective = OBJECTIVES[prediction]()
        cascade = dataclasses.replace(
            small_cascade,
            prior=Prior(config),
            settings=dataclasses.replace(
                small_cascade.settings,
                prior_objective=objective,
                prior_sampler=samplers_for(objective.path)[0],
                latent_statistics=self.STATISTICS,
            ),
        )
        recipe = dataclasses.replace(
            RECIPE,
            prior=config,
            compressor=dataclasses.replace(RECIPE.compressor, c_latent=2),
            decoder=dataclasses.replace(RECIPE.decoder, effnet_embd=2),
            previewer=dataclasses.replace(RECIPE.previewer, c_in=2),
        )
        stage = StageC(dataclasses.replace(RECIPE.stage_c, known_fraction=1.0), recipe, cascade)
        torch.nn.init.normal_(stage.prior.out[1].weight)
        next(losses_of(stage, make_batch(128)))[1].backward()
        for name, parameter in stage.prior.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name

    def test_previews_are_of_the_average(self, small_cascade, monkeypatch):
        drawn = []

        class Drawing:
            def __init__(self, cascade, device):
                drawn.append(cascade)

            def generate(self, prompts, sampling=None):
                return [Image.new("RGB", (8, 8)) for _ in prompts]

        monkeypatch.setattr("wuerstchen.train.stages.prior.Wuerstchen", Drawing)
        recipe = dataclasses.replace(RECIPE, preview_prompts=("a cat",))
        stage = StageC(RECIPE.stage_c, recipe, normalising(small_cascade, self.STATISTICS))
        average = copy.deepcopy(small_cascade.prior)
        assert len(stage.preview({"prior": average}, torch.empty(0, 3, 8, 8), CPU)) == 1
        assert drawn[0].prior is average
        assert drawn[0].settings.latent_statistics == self.STATISTICS

    def test_captions_are_dropped_per_image(self, small_cascade):
        stage = self.make(small_cascade, 0.3)
        seen = []
        context = stage.prior.context
        stage.prior.context = lambda states, mask, **how: (
            seen.append((states, mask)),
            context(states, mask, **how),
        )[1]
        with torch.no_grad():
            for start in range(0, 240, 4):
                batch = dataclasses.replace(make_batch(128), indices=torch.arange(start, start + 4))
                next(losses_of(stage, batch))
            empty = small_cascade.text_encoder.encode([""])
        dropped = [torch.equal(s, empty.states[0]) for states, _ in seen for s in states]
        hidden = [torch.equal(m, empty.mask[0]) for _, mask in seen for m in mask]
        assert dropped == hidden
        assert sum(dropped) / len(dropped) == pytest.approx(0.3, abs=0.1)
        assert any(0 < sum(dropped[i : i + 4]) < 4 for i in range(0, 240, 4))


@pytest.mark.parametrize("kind", ["a2", "b", "b2", "c"])
def test_targets_are_computed_in_fp32_under_autocast(kind, small_cascade):
    """In bf16 they have a bias, which training would learn."""
    if kind == "c":
        stage = TestStageC().make(small_cascade, 0.0)
    elif kind == "a2":
        stage = TestStageARefinement().make(small_cascade)
    else:
        stage_kind = StageB if kind == "b" else StageBRefinement
        config = dataclasses.replace(RECIPE.stage_b, refine_images=8)
        stage = stage_kind(config, RECIPE, with_previewer(small_cascade))
    batch, found = make_batch(128), []
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(stage.prepare(batch, CPU))
    targets = {"latents", "z", "x"} & found[0].keys()
    assert targets
    for name in targets:
        assert torch.equal(found[0][name], found[1][name]), name


class TestPlacing:
    """On a GPU only what updates need stays, in the precision that they need it in."""

    def make(self, cascade, monkeypatch, precision, needs):
        """A stage for a GPU that is not there, and where each network was sent last."""
        places: dict[int, str] = {}
        monkeypatch.setattr(
            torch.nn.Module, "to", lambda module, place: places.update({id(module): str(place)}) or module
        )
        recipe = dataclasses.replace(RECIPE, precision=precision, preview_prompts=("a cat", "a tree"))
        stage = StageC(RECIPE.stage_c, recipe, cascade, device=torch.device("cuda"), needs=needs)
        return stage, places

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("needs", [("compressor", "text_encoder"), ("text_encoder",), ()])
    def test_only_what_updates_need_stays_on_the_device(self, needs, precision, small_cascade, monkeypatch):
        stage, places = self.make(small_cascade, monkeypatch, precision, needs)
        frozen = stage.frozen.networks()
        own_copy = "text_encoder" in needs and precision == "bf16"
        for name, network in frozen.items():
            stays = name in needs and not (name == "text_encoder" and own_copy)
            assert places[id(network)] == ("cuda" if stays else "cpu"), name
        assert (stage.text_encoder is not frozen["text_encoder"]) == own_copy
        if own_copy:
            assert places[id(stage.text_encoder)] == "cuda"
            linear = [m for m in stage.text_encoder.modules() if isinstance(m, torch.nn.Linear)]
            assert {places[id(module)] for module in linear} == {"torch.bfloat16"}

    def test_previews_bring_one_network_at_a_time_and_send_it_back(self, small_cascade, monkeypatch):
        stage, _ = self.make(small_cascade, monkeypatch, "bf16", ())
        done = []

        class Drawing:
            def __init__(self, cascade, device, low_memory):
                done.append((cascade.text_encoder is stage.frozen.text_encoder, str(device), low_memory))
                self.residence = self

            def generate(self, prompts, batch_size, sampling=None):
                done.append((prompts, batch_size))
                raise torch.OutOfMemoryError

            def release(self):
                done.append("released")

        monkeypatch.setattr("wuerstchen.train.stages.prior.Wuerstchen", Drawing)
        with pytest.raises(torch.OutOfMemoryError):
            stage.preview({"prior": small_cascade.prior}, torch.empty(0), torch.device("cuda"))
        assert done == [(True, "cuda", "stage"), (["a cat", "a tree"], 8), "released"]
        done.clear()
        with pytest.raises(torch.OutOfMemoryError):
            stage.preview(
                {"prior": small_cascade.prior}, torch.empty(0), torch.device("cuda"), low_memory=True
            )
        assert done == [(True, "cuda", "layer"), (["a cat", "a tree"], 1), "released"]

    def test_half_of_a_text_encoder_gives_the_same_bits_under_autocast(self, small_cascade):
        encoder, texts = small_cascade.text_encoder, ["a cat", "a flat drawing of a red car", ""]
        half = with_autocast_weights(encoder, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            whole, ours = encoder.encode(texts), half.encode(texts)
        assert torch.equal(whole.states, ours.states)
        assert torch.equal(whole.mask, ours.mask)
        linear = [m for m in half.modules() if isinstance(m, torch.nn.Linear)]
        assert linear
        assert {m.weight.dtype for m in linear} == {torch.bfloat16}
        assert all(p.dtype == torch.float32 for p in encoder.parameters())

    def test_what_a_phase_needs_follows_from_its_data(self):
        stored = PreparedSet.__new__(PreparedSet)
        sources = {"set": stored, "": object()}
        run = a_run(recipe=RECIPE, makes_updates=True, source=lambda phase: sources[phase.data])
        phase = Phase(optimization=RECIPE.stage_c.optimization)
        assert needs(run, phase) == ("compressor", "text_encoder")
        phase = dataclasses.replace(phase, data="set")
        assert needs(run, phase) == ("text_encoder",)
        run.recipe = dataclasses.replace(RECIPE, stored_texts="states")
        assert needs(run, phase) == ()
        run.recipe, run.makes_updates = RECIPE, False  # as for an export
        assert needs(run, dataclasses.replace(phase, data="")) == ()

    @pytest.mark.gpu
    def test_on_a_gpu(self, small_cascade):
        device = torch.device("cuda")
        recipe = dataclasses.replace(RECIPE, precision="bf16", preview_prompts=("a cat",))
        prior = small_cascade.prior.to(device)
        stage = StageC(RECIPE.stage_c, recipe, small_cascade, device=device, needs=())
        frozen = dataclasses.replace(small_cascade, prior=None)
        for _ in range(2):
            assert {p.device.type for n in frozen.networks().values() for p in n.parameters()} == {"cpu"}
            for low_memory in (False, True):
                images = stage.preview({"prior": prior.eval()}, torch.empty(0), device, low_memory=low_memory)
                assert len(images) == 1
            assert {p.device.type for p in prior.parameters()} == {"cuda"}


def test_frozen_networks_see_a_few_images_at_a_time(small_cascade):
    batch, seen = make_batch(64, 5), []
    small_cascade.vqgan.eval()

    def frozen(pixels):
        seen.append(len(pixels))
        return {"latents": small_cascade.vqgan.encode(pixels), "means": pixels.mean((1, 2, 3))}

    with torch.no_grad():
        found = in_chunks(frozen, batch.images, most=2 * 64 * 64 + 1)
        whole = frozen(batch.pixels(CPU))
        assert seen == [2, 2, 1, 5]
        torch.testing.assert_close(found, whole)
        in_chunks(frozen, batch.images, most=1)
    assert seen[4:] == [1] * 5


def test_latent_statistics_are_those_of_numpy(small_cascade):
    batches = [make_batch(128), make_batch(128, 3)]
    measured = measure_statistics(small_cascade.compressor, iter(batches), CPU)
    with torch.no_grad():
        maps = [small_cascade.compressor(compressor_input(b.pixels(CPU))).numpy() for b in batches]
    columns = np.concatenate(maps).transpose(1, 0, 2, 3).reshape(2, -1).astype(np.float64)
    np.testing.assert_allclose(measured.mean, columns.mean(1), rtol=1e-5)
    np.testing.assert_allclose(measured.std, columns.std(1, ddof=1), rtol=1e-5)


def test_the_feed_is_a_function_of_the_image_number(toy_source):
    source = toy_source()
    first, again, plain = Feed(source, 1, 8, True), Feed(source, 1, 8, True), Feed(source, 1, 8, False)
    for index in (25, 3):
        a, b, c = first[index], again[index], plain[index]
        assert np.array_equal(a[1].image, b[1].image)
        assert np.array_equal(a[1].image, c[1].image)
        assert a[1].caption == b[1].caption != c[1].caption == ""
    epoch = [first[i][1].caption for i in range(10)]
    assert sorted(epoch) == sorted(f"picture {i}" for i in range(10))
    assert epoch != [first[i][1].caption for i in range(10, 20)]
    assert not np.array_equal(first[0][1].image[1:], Feed(source, 2, 8, True)[0][1].image[1:])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_s_error_is_one_line(workers, toy_source):
    feed = Feed(toy_source(3, broken=(0, 1, 2)), 0, 8, False)
    with pytest.raises(DataError, match=r"^none of the 3 images can be read, .*: \d\.png is broken$"):
        next(batches(feed, 0, 3, 1, workers))


def test_a_set_of_unreadable_images_ends_with_their_reason(toy_source):
    feed = Feed(toy_source(3, broken=(0, 1, 2)), 0, 8, False)
    with pytest.raises(DataError, match=r"none of the 3 images can be read, .*: \d\.png is broken"):
        feed[0]
