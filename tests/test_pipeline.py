"""Drawing and reconstructing with a small random model: the way through, seeds, sizes and refusals."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import wuerstchen
from wuerstchen.diffusion.samplers import ddpm, draw_noise
from wuerstchen.diffusion.schedule import PUBLISHED_SCHEDULE, stage_c_timesteps, uniform_timesteps
from wuerstchen.errors import UserError
from wuerstchen.images import to_images
from wuerstchen.models.cascade import PUBLISHED_MAP, CascadeSettings, MapStatistics
from wuerstchen.models.compressor import compressor_input
from wuerstchen.models.text import PromptTooLongWarning
from wuerstchen.pipeline import Sampling, Wuerstchen


@pytest.fixture(scope="module")
def model(small_cascade):
    return Wuerstchen(small_cascade, torch.device("cpu"))


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def test_three_lines_are_enough(model_folder):
    model = wuerstchen.load(model_folder, device="cpu")
    image = model.generate("a purple camel")[0]
    assert image.size == (128, 128)


def test_generate_is_the_steps_written_out(model):
    """Text, guidance, the map's statistics and the order of draws, once more by hand."""
    cascade, generator = model.cascade, [torch.Generator().manual_seed(11)]
    with torch.no_grad():
        cond, uncond = (cascade.text_encoder.encode([t]) for t in ("a cat", "a dog"))
        contexts = [cascade.prior.context(e.states, e.mask) for e in (cond, uncond)]

        def predict(x, t):
            yes, no = (cascade.prior(x, t, context) for context in contexts)
            return no + 2.5 * (yes - no)

        normalised = ddpm(
            predict, draw_noise((2, 3, 3), generator), stage_c_timesteps(3), generator, PUBLISHED_SCHEDULE
        )
        z = normalised * torch.tensor([2.0, 3.0])[:, None, None] + torch.tensor([0.5, -1.0])[:, None, None]
        context = cascade.decoder.context(z, (32, 32))
        latents = ddpm(
            lambda x, t: cascade.decoder(x, t, context),
            draw_noise((4, 32, 32), generator),
            uniform_timesteps(2),
            generator,
            PUBLISHED_SCHEDULE,
        )
        expected = to_images(cascade.vqgan.decode(latents).clamp(0, 1))
    drawn = model.generate("a cat", negative="a dog", seed=11, sampling=Sampling(guidance=2.5))
    assert np.abs(pixels(drawn) - pixels(expected)).max() <= 1


def test_a_picture_is_the_same_alone_and_in_a_batch(model):
    together = model.generate(["a cat", "a dog", "a cow"], seed=5, batch_size=3)
    alone = model.generate("a dog", seed=6)
    chunked = model.generate(["a cat", "a dog", "a cow"], seed=5, batch_size=2)
    # The noise is the same to the bit; the arithmetic of another batch size may round differently.
    assert np.abs(pixels(together[1:2]) - pixels(alone)).max() <= 1
    assert np.abs(pixels(together) - pixels(chunked)).max() <= 1


def test_seeds_can_be_named(model):
    named = model.generate(["a cat", "a dog"], seed=[9, 6], batch_size=1)
    for prompt, seed, image in (("a cat", 9, named[0]), ("a dog", 6, named[1])):
        assert np.array_equal(pixels([image]), pixels(model.generate(prompt, seed=seed)))
    with pytest.raises(UserError, match="1 seeds do not fit 2 pictures"):
        model.generate(["a cat", "a dog"], seed=[9])
    with pytest.raises(UserError, match="seed -1 must be from 0"):
        model.generate(["a cat", "a dog"], seed=[9, -1])


def test_pictures_are_reconstructed_together_as_alone(model):
    images = [Image.effect_noise((150, 130), sigma).convert("RGB") for sigma in (20, 60, 90)]
    together = model.reconstruct_batch(images, seeds=[4, 2, 7])
    for image, seed, result in zip(images, [4, 2, 7], together, strict=True):
        alone = model.reconstruct(image, seed=seed)
        assert np.array_equal(pixels([result.original]), pixels([alone.original]))
        assert np.abs(pixels([result.image]) - pixels([alone.image])).max() <= 1
        assert result.map_size == alone.map_size


def test_what_should_matter_matters(model):
    base = pixels(model.generate("a cat"))
    for other in (
        model.generate("a cat", seed=1),
        model.generate("a purple camel"),
        model.generate("a cat", negative="a dog"),
        model.generate("a cat", sampling=Sampling(guidance=1.0)),
        model.generate("a cat", sampling=Sampling(prior_steps=5)),
        model.generate("a cat", sampling=Sampling(decoder_steps=4)),
        model.generate("a cat", sampling=Sampling(decoder_guidance=3.0)),
        model.generate("a cat", sampling=Sampling(decoder_shift=3.0)),
    ):
        assert np.abs(base - pixels(other)).max() > 1
    assert np.array_equal(base, pixels(model.generate("a cat")))


def test_count_and_order(model):
    images = model.generate(["a cat", "a dog"], count=2, seed=3)
    assert len(images) == 4
    assert np.abs(pixels(images[2:3]) - pixels(model.generate("a dog", seed=5))).max() <= 1


def test_sizes_follow_the_map(model):
    seen = []
    images = model.generate(
        "a cat", size=(256, 128), progress=lambda stage, step, steps: seen.append((stage, step, steps))
    )
    assert images[0].size == (256, 128)
    assert seen == [
        ("Stage C", 1, 3),
        ("Stage C", 2, 3),
        ("Stage C", 3, 3),
        ("Stage B", 1, 2),
        ("Stage B", 2, 2),
    ]
    settings = CascadeSettings()
    # 1024 pixels are 24 positions, 1536 are 36: the published sizes.
    assert settings.map_size(1024, 1536) == (36, 24)


def test_reconstruction(model):
    image = Image.effect_noise((300, 200), 80).convert("RGB")
    result = model.reconstruct(image)
    assert result.original.size == result.image.size == (128, 128)
    assert result.map_size == (2, 3, 3)
    assert result.spatial_compression == pytest.approx(42.67, abs=0.01)
    assert result.element_compression == pytest.approx(3 * 128 * 128 / 18)


def test_encode_reads_the_smaller_view(model):
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        expected = model.cascade.compressor(compressor_input(x, 0.75))
        assert torch.equal(model.encode(model.cascade.compressor, x), expected)


def test_map_statistics_are_inverse_and_published():
    z = torch.randn(2, 3, 4, 4)
    statistics = MapStatistics(mean=(1.0, 2.0, 3.0), std=(0.5, 1.0, 4.0))
    torch.testing.assert_close(statistics.restore(statistics.normalise(z)), z)
    torch.testing.assert_close(PUBLISHED_MAP.normalise(z), (z + 1) / 42)
    torch.testing.assert_close(PUBLISHED_MAP.restore(z), z * 42 - 1)


def test_long_prompts_are_cut_with_a_warning(model):
    with pytest.warns(PromptTooLongWarning, match="lostword"):
        model.generate("cat " * 40 + "lostword", sampling=Sampling(guidance=1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompt was given"),
        ({"seed": -1}, "seed -1 must be from 0"),
        ({"seed": 2**32}, "must be from 0 to 4294967295"),
        ({"seed": 2**32 - 2, "count": 3}, "so must those of the pictures after it"),
        ({"count": 0}, "count 0 draws nothing"),
        ({"batch_size": 0}, "batch_size 0 draws nothing"),
        (
            {"size": 100},
            "size 100x100 cannot be drawn: sides are multiples of 128 .* use 128 in place of 100",
        ),
        ({"size": (256, 0)}, "use 128 in place of 0"),
        ({"size": 10**6}, "from 128 to 2048; use 2048 in place of 1000000"),
        ({"sampling": {"prior_steps": 0}}, "prior_steps 0 must be from 1"),
        ({"sampling": {"decoder_steps": -3}}, "decoder_steps -3 must be from 1"),
        ({"sampling": {"guidance": math.nan}}, "guidance nan must be a number from 0 to 100"),
        ({"sampling": {"guidance": math.inf}}, "guidance inf must be a number"),
        ({"sampling": {"decoder_shift": 0.0}}, "decoder_shift 0.0 must be above 0"),
        ({"sampling": {"decoder_guidance": -1.0}}, "decoder_guidance -1.0 must be a number"),
    ],
)
def test_impossible_requests_are_refused(model, arguments, message):
    def sampling() -> Sampling | None:
        return Sampling(**arguments["sampling"]) if "sampling" in arguments else None

    with pytest.raises(UserError, match=message):
        model.generate(**{"prompts": "a cat", **arguments, "sampling": sampling()})


def test_out_of_memory_says_size_and_batch(model, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.cascade.vqgan, "decode", full)
    with pytest.raises(UserError, match="batch_size=2 at 128x128 pixels does not fit into memory"):
        model.generate("a cat", count=2)


def test_models_without_stage_c_or_compressor_say_so(small_cascade):
    import dataclasses

    poor = dataclasses.replace(small_cascade, prior=None, compressor=None)
    model = Wuerstchen(poor, torch.device("cpu"))
    with pytest.raises(UserError, match="no Stage C or no text encoder; it reconstructs, but cannot draw"):
        model.generate("a cat")
    with pytest.raises(UserError, match="no compressor, so it cannot encode pictures"):
        model.reconstruct(Image.new("RGB", (128, 128)))


@pytest.mark.parametrize("device", ["toaster", "meta", "cuda:77"])
def test_devices_that_are_not_there_are_refused(device, model_folder):
    with pytest.raises(UserError, match=f"device '{device}' .*; use cpu, cuda or mps"):
        wuerstchen.load(model_folder, device=device)
