"""Generation and reconstruction with a small random model: results, seeds, sizes and errors."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import save_file

import wuerstchen
from wuerstchen import pipeline
from wuerstchen.diffusion.objective import PUBLISHED_OBJECTIVE
from wuerstchen.diffusion.samplers import ddpm, draw_noise
from wuerstchen.diffusion.schedule import stage_c_timesteps, uniform_timesteps
from wuerstchen.errors import UserError, UserNotice
from wuerstchen.images import center_crop_resize, open_image, to_images, to_tensor
from wuerstchen.models.cascade import PUBLISHED_STATISTICS, CascadeSettings, LatentStatistics
from wuerstchen.models.compressor import compressor_input
from wuerstchen.models.text import PromptTooLongWarning
from wuerstchen.models.vqgan import VQGAN, VQGANConfig
from wuerstchen.pipeline import Sampling, Wuerstchen
from wuerstchen.sampling_batch import SamplingBatch

from .configurations import with_decoder_student, with_student


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
    """Text, guidance, the latents' statistics and the order of random numbers, written out."""
    cascade, generator = model.cascade, [torch.Generator().manual_seed(11)]
    with torch.no_grad():
        cond, uncond = (cascade.text_encoder.encode([t]) for t in ("a cat", "a dog"))
        contexts = [cascade.prior.context(e.states, e.mask) for e in (cond, uncond)]

        def predict(x, t):
            yes, no = (cascade.prior(x, t, context) for context in contexts)
            return no + 2.5 * (yes - no)

        normalised = ddpm(
            predict, draw_noise((2, 3, 3), generator), stage_c_timesteps(3), generator, PUBLISHED_OBJECTIVE
        )
        z = normalised * torch.tensor([2.0, 3.0])[:, None, None] + torch.tensor([0.5, -1.0])[:, None, None]
        context = cascade.decoder.context(z, (32, 32))
        latents = ddpm(
            lambda x, t: cascade.decoder(x, t, context),
            draw_noise((4, 32, 32), generator),
            uniform_timesteps(2),
            generator,
            PUBLISHED_OBJECTIVE,
        )
        expected = to_images(cascade.vqgan.decode(latents).clamp(0, 1))
    drawn = model.generate("a cat", negative="a dog", seed=11, sampling=Sampling(guidance=2.5))
    assert np.abs(pixels(drawn) - pixels(expected)).max() <= 1


def test_outside_its_interval_guidance_changes_nothing_and_costs_nothing(model, monkeypatch):
    """Bugs: the default interval changes images, or unguided steps still run both halves of the batch."""
    rows = []
    forward = type(model.cascade.prior).forward
    monkeypatch.setattr(
        type(model.cascade.prior),
        "forward",
        lambda self, x, *rest: rows.append(len(x)) or forward(self, x, *rest),
    )

    def drawn(**sampling):
        rows.clear()
        images = model.generate(["a cat", "a cow"], negative="a dog", seed=3, sampling=Sampling(**sampling))
        return pixels(images)

    always, first, second, _ = drawn(guidance=2.5), *stage_c_timesteps(3)[:3]
    assert rows == [4, 4, 4]
    assert np.array_equal(drawn(guidance=2.5, guidance_interval=(0.0, 1.0)), always)
    middle = drawn(guidance=2.5, guidance_interval=(second - 0.01, first - 0.01))
    assert rows == [2, 4, 2]
    assert not np.array_equal(middle, always)
    never = drawn(guidance=2.5, guidance_interval=(0.0, 1e-6))
    assert rows == [2, 2, 2]
    assert np.array_equal(never, drawn(guidance=1.0))


def test_a_model_may_have_a_guidance_interval(small_cascade):
    """A caller's interval comes first, and (0, 1) turns off the model's."""
    own = dataclasses.replace(small_cascade.settings, prior_guidance_interval=(0.2, 0.8))
    assert own.completed(Sampling()).guidance_interval == (0.2, 0.8)
    for given in ((0.0, 1.0), (0.5, 0.7)):
        assert own.completed(Sampling(guidance_interval=given)).guidance_interval == given
    assert small_cascade.settings.completed(Sampling()).guidance_interval == (0.0, 1.0)


def test_an_image_is_the_same_alone_and_in_a_batch(model):
    together = model.generate(["a cat", "a dog", "a cow"], seed=5, batch_size=3)
    alone = model.generate("a dog", seed=6)
    chunked = model.generate(["a cat", "a dog", "a cow"], seed=5, batch_size=2)
    # The noise is bit for bit the same. Other batch sizes may round differently.
    assert np.abs(pixels(together[1:2]) - pixels(alone)).max() <= 1
    assert np.abs(pixels(together) - pixels(chunked)).max() <= 1


def test_recordings_are_reused_for_the_next_image(model):
    """Otherwise each image would need a new recording."""
    model.generate("a cat")
    kept = dict(model._recorders)
    model.generate("a dog")
    assert model._recorders == kept


def test_seeds_can_be_named(model):
    named = model.generate(["a cat", "a dog"], seed=[9, 6], batch_size=1)
    for prompt, seed, image in (("a cat", 9, named[0]), ("a dog", 6, named[1])):
        assert np.array_equal(pixels([image]), pixels(model.generate(prompt, seed=seed)))
    with pytest.raises(UserError, match="1 seeds do not match 2 images"):
        model.generate(["a cat", "a dog"], seed=[9])
    with pytest.raises(UserError, match=r"seed must be from 0 to 4294967295, .* got -1"):
        model.generate(["a cat", "a dog"], seed=[9, -1])


def test_each_prompt_may_have_its_own_negative_and_beginning(model):
    """Otherwise the first client's negative prompt or image would be used for the whole batch."""
    inits = [Image.effect_noise((150, 130), sigma).convert("RGB") for sigma in (30, 90)]
    for given in (
        {"negative": ["a dog", ""]},
        {"init": inits, "strength": 0.5},
        {"negative": ["", "a cow"], "init": inits, "strength": 0.3, "count": 2, "batch_size": 3},
    ):
        together = model.generate(["a cat", "a house"], seed=4, **given)
        each = given.get("count", 1)
        for number, prompt in enumerate(["a cat", "a house"]):
            own = {k: v[number] if isinstance(v, list) else v for k, v in given.items()}
            alone = model.generate(prompt, seed=4 + number * each, **own)
            mine = together[number * each : (number + 1) * each]
            assert np.abs(pixels(mine) - pixels(alone)).max() <= 1
    assert np.abs(pixels(model.generate("a cat", seed=4)) - pixels(together[:1])).max() > 1


class _Enough(Exception):
    pass


@pytest.mark.parametrize("stage", ["Stage C", "Stage B"])
def test_a_step_callback_can_stop_sampling_without_side_effects(model, stage):
    """A canceled call runs to its end, or leaves something behind that changes the next one."""
    seen = []

    def stop(step):
        seen.append((step.stage, step.step))
        if step.stage == stage and step.step == 2:
            raise _Enough

    before = pixels(model.generate("a cat"))
    with pytest.raises(_Enough):
        model.generate("a cat", on_step=stop)
    assert seen[-1] == (stage, 2)
    assert len(seen) == {"Stage C": 2, "Stage B": 5}[stage]
    assert np.array_equal(before, pixels(model.generate("a cat")))
    with pytest.raises(_Enough):
        model.generate("a cat", watch=stop)  # the former name of on_step
    with pytest.raises(_Enough):
        model.generate("a cat", on_step=stop, watch=None)


@pytest.mark.gpu
def test_guided_and_unguided_steps_are_both_recorded():
    """Bugs: one of them always runs eagerly, or reads the text of the other."""
    model = wuerstchen.load(device="cuda", precision="float32")
    sampling = Sampling(guidance_interval=(0.2, 0.8), prior_steps=12, decoder_steps=2)

    def draw():
        return pixels(model.generate(["a cat", "a red car"], seed=3, sampling=sampling))

    recorded = [draw() for _ in range(3)]
    recorder = model._recorders[model.cascade.prior]
    assert {key[0][0][0][0] for key in recorder._graphs._graphs if key[0] != "prepare"} == {2, 4}
    model._recorders.records = False
    eager = draw()
    for images in recorded:
        assert np.abs(images - eager).max() <= 2


@pytest.mark.gpu
def test_step_callbacks_on_a_gpu_run_step_by_step():
    """A whole stage queued at once: too late to stop it, and progress reports steps that are only queued."""
    made = []

    def record(step):
        made.append(torch.cuda.Event())
        made[-1].record()
        if len(made) > 2:
            assert made[-3].query()

    model = wuerstchen.load(device="cuda")
    for _ in range(2):
        made.clear()
        model.generate("a cat", count=8, batch_size=8, size=(512, 512), on_step=record)


WRONG_TYPES = """
import wuerstchen

def told(function):
    try:
        function()
    except wuerstchen.UserError as error:
        print(error)

told(lambda: wuerstchen.Sampling(prior_steps=2.5))
told(lambda: wuerstchen.Sampling(decoder_steps="4"))
told(lambda: wuerstchen.Sampling(guidance="4"))
told(lambda: wuerstchen.Sampling(guidance=float("nan")))
told(lambda: wuerstchen.Sampling(guidance_interval=0.5))
told(lambda: wuerstchen.Sampling(guidance_interval=(0, "1")))
told(lambda: wuerstchen.Sampling(decoder_shift="1"))
told(lambda: wuerstchen.load().generate("a", sampling={"prior_steps": 4}))
"""


def test_settings_of_other_types_are_refused():
    """They raised errors deep inside torch or Python. The type checks during tests would hide that."""
    ran = subprocess.run([sys.executable, "-c", WRONG_TYPES], capture_output=True, text=True, timeout=120)
    assert not ran.stderr
    for line, words in zip(
        ran.stdout.splitlines(),
        (
            "prior_steps must be an integer from 1 to 1000, got 2.5.",
            "decoder_steps must be an integer from 1 to 1000, got '4'.",
            "guidance must be a number from 0 to 100, got '4'.",
            "guidance must be a number from 0 to 100, got nan.",
            "guidance_interval must be two times with 0 <= LOW < HIGH <= 1, got 0.5.",
            "guidance_interval must be two times with 0 <= LOW < HIGH <= 1, got (0, '1').",
            "decoder_shift must be above 0 and at most 100, got '1'.",
            "sampling must be a wuerstchen.Sampling, got a dict",
        ),
        strict=True,
    ):
        assert line.startswith(words)


def test_previews_show_an_estimate_and_change_nothing():
    """Noise instead of an estimate, or an image that depends on whether a preview was made."""
    bundled = wuerstchen.load(device="cpu")
    seen = []

    def look(step):
        if step.stage == "Stage C" or step.step < 3:
            seen.append((step.stage, step.step, *step.preview([1, 0])))

    sampling = Sampling(prior_steps=6, decoder_steps=3)
    given = {"seed": [3, 5], "size": (192, 128), "sampling": sampling}
    drawn = bundled.generate(["a red car", "a green tree"], on_step=look, **given)
    assert np.array_equal(pixels(drawn), pixels(bundled.generate(["a red car", "a green tree"], **given)))
    assert [entry[:2] for entry in seen] == [
        *(("Stage C", n) for n in range(1, 7)),
        ("Stage B", 1),
        ("Stage B", 2),
    ]
    for stage, number, second, first in seen:
        assert first.size == {"Stage C": (48, 32), "Stage B": (96, 64)}[stage]
        for small, large in ((first, drawn[0]), (second, drawn[1])):
            error = pixels([small]) - pixels([large.resize(small.size)])
            limit = 12 if stage == "Stage B" else 25 if number > 3 else 50
            assert np.abs(error).mean() < limit


def test_a_model_without_a_previewer_shows_stage_b_alone(model, small_v1):
    for one, size in ((model, (64, 64)), (Wuerstchen(small_v1, torch.device("cpu")), (64, 64))):
        seen = []
        one.generate("a cat", on_step=lambda step, seen=seen: seen.append((step.stage, step.preview([0]))))
        assert all(bool(shown) == (stage == "Stage B") for stage, shown in seen)
        assert seen[-1][1][0].size == size


def test_images_are_reconstructed_together_as_alone(model):
    images = [Image.effect_noise((150, 130), sigma).convert("RGB") for sigma in (20, 60, 90)]
    together = model.reconstruct_batch(images, seeds=[4, 2, 7])
    for image, seed, result in zip(images, [4, 2, 7], together, strict=True):
        alone = model.reconstruct(image, seed=seed)
        assert np.array_equal(pixels([result.original]), pixels([alone.original]))
        assert np.abs(pixels([result.image]) - pixels([alone.image])).max() <= 1
        assert result.latent_size == alone.latent_size


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
    assert settings.latent_size(1024, 1536) == settings.map_size(1024, 1536) == (36, 24)
    assert settings.map_statistics == settings.latent_statistics  # the former names


def test_a_size_between_two_canvases_is_cut_out_of_the_larger(model):
    whole = model.generate("a cat", size=(256, 128))[0]
    part = model.generate("a cat", size=(136, 72))[0]
    assert np.array_equal(pixels([part]), pixels([whole.crop((60, 28, 196, 100))]))
    image = Image.effect_noise((300, 300), 80).convert("RGB")
    result = model.reconstruct(image, size=200)
    assert result.original.size == result.image.size == (200, 200)
    # The semantic latents are those of the image with its edges repeated to 256 pixels.
    padded = np.pad(pixels([result.original])[0], ((28, 28), (28, 28), (0, 0)), mode="edge")
    canvas = model.reconstruct(Image.fromarray(padded.astype(np.uint8)), size=256).image
    assert np.array_equal(pixels([result.image]), pixels([canvas.crop((28, 28, 228, 228))]))


def test_sampling_starts_from_the_semantic_latents_of_an_image(model):
    """The steps written out: from the image's latents, noised to the time that the strength names."""
    init = Image.effect_noise((150, 130), 80).convert("RGB")
    cascade, generator = model.cascade, [torch.Generator().manual_seed(3)]
    statistics = cascade.settings.latent_statistics
    with torch.no_grad():
        z = model.encode(cascade.compressor, torch.stack([to_tensor(center_crop_resize(init, 128))]))
        noised = PUBLISHED_OBJECTIVE.noised(
            statistics.normalise(z), draw_noise((2, 3, 3), generator), torch.tensor([0.5])
        )
        text = cascade.text_encoder.encode([""])
        context = cascade.prior.context(text.states, text.mask)
        # The three steps from 1 to 0 have points at 1, 5/6, 2/3 and 0.
        sample = ddpm(
            lambda x, t: cascade.prior(x, t, context), noised, [0.5, 0.0], generator, PUBLISHED_OBJECTIVE
        )
        batch = SamplingBatch(
            prompts=[""],
            seeds=[3],
            size=(128, 128),
            canvas=(128, 128),
            sampling=model.cascade.settings.completed(Sampling()),
        )
        batch.generators[0].set_state(generator[0].get_state())
        expected = model._decode(model._sample_decoder(batch, statistics.restore(sample)))
    seen = []
    drawn = model.generate("", init=init, strength=0.5, seed=3, progress=lambda *step: seen.append(step))
    assert np.abs(pixels(drawn) - pixels(to_images(expected))).max() <= 1
    assert seen[0] == ("Stage C", 1, 1)
    # Almost nothing changed: the result is the image's reconstruction.
    kept = model.generate("a cat", init=init, strength=1e-6, sampling=Sampling(decoder_steps=30))
    assert kept[0].size == (128, 128)
    changed = model.generate("a cat", init=init, strength=1.0)
    assert np.abs(pixels(kept) - pixels(changed)).mean() > 1


def test_v1_generates_and_reconstructs(small_v1):
    model = Wuerstchen(small_v1, torch.device("cpu"))
    together = model.generate(["a cat", "a cat"], seed=5, size=(72, 128))
    assert together[0].size == (72, 128)
    alone = model.generate("a cat", seed=6, size=(72, 128))
    assert np.abs(pixels(together[1:]) - pixels(alone)).max() <= 1
    for other in (Sampling(decoder_guidance=1.0), Sampling(decoder_steps=3), Sampling(guidance=1.0)):
        changed = model.generate("a cat", seed=6, size=(72, 128), sampling=other)
        assert np.abs(pixels(alone) - pixels(changed)).max() > 1
    assert model.reconstruct(Image.new("RGB", (80, 80), "red"), size=128).latent_size == (2, 3, 3)


def test_torch_s_defaults_change_no_bit(model_folder, small_v1, foreign_defaults):
    """A tensor on the default device or in the default dtype would change the image or fail."""
    photo = Image.effect_noise((128, 128), 60).convert("RGB")
    dpm = Sampling(prior_sampler="dpm", guidance=3.0, decoder_guidance=2.0)

    def draw(model: Wuerstchen) -> list[np.ndarray]:
        return [
            pixels(model.generate("a cat", seed=1, size=(72, 128))),
            pixels(model.generate("a cat", negative="dog", init=photo, strength=0.5, sampling=dpm)),
            pixels(model.generate("a cat", init=photo, extend="left=40")),
            pixels([model.reconstruct(photo).image]),
        ]

    def load() -> list[Wuerstchen]:
        v1 = Wuerstchen(small_v1, torch.device("cpu"))
        return [
            wuerstchen.load(model_folder, device="cpu"),
            wuerstchen.load(model_folder, device="cpu", low_memory="layer"),
            v1,
        ]

    expected = [draw(model) for model in load()]
    with foreign_defaults(torch.float64):
        found = [draw(model) for model in load()]
    for ours, theirs in zip(expected, found, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(a, b)


def test_autocast_around_generate_changes_no_bit(model):
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.generate("a cat", seed=1)
    assert np.array_equal(pixels(inside), pixels(model.generate("a cat", seed=1)))


def test_v1_ends_in_tokens_of_the_codebook(small_v1, monkeypatch):
    """Stage A decodes entries of its codebook, without the scale factor of the latents."""
    seen = []
    vqgan = small_v1.vqgan
    decoded = vqgan.unembed
    monkeypatch.setattr(vqgan, "unembed", lambda z: seen.append(z) or decoded(z))
    Wuerstchen(small_v1, torch.device("cpu")).generate("a cat", size=128)
    (z,) = seen
    codes = vqgan.vquantizer.embedding.weight.detach()
    distances = torch.cdist(z.clone().permute(0, 2, 3, 1).flatten(0, 2), codes)
    assert float(distances.min(dim=1).values.max()) < 1e-4


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_close(model_folder, model, precision):
    half = wuerstchen.load(model_folder, device="cpu", precision=precision)
    networks = half.cascade.networks().values()
    assert {p.dtype for network in networks for p in network.parameters()} == {getattr(torch, precision)}
    exact, near = (pixels(m.generate("a cat", seed=1)) for m in (model, half))
    assert 0 < np.abs(exact - near).mean() < (8 if precision == "bfloat16" else 3)


@pytest.mark.parametrize("low_memory", ["stage", "layer"])
def test_low_memory_generates_the_same_images(model_folder, model, low_memory):
    small = wuerstchen.load(model_folder, device="cpu", low_memory=low_memory)
    assert np.abs(pixels(model.generate("a cat")) - pixels(small.generate("a cat"))).max() <= 1
    image = Image.effect_noise((150, 130), 60).convert("RGB")
    one, other = (m.reconstruct(image).image for m in (model, small))
    assert np.abs(pixels([one]) - pixels([other])).max() <= 1


def test_adapters_mix_and_come_off_again(model_folder, model, tmp_path):
    layer = "prior.blocks.2.attention.to_q"
    for name, seed in (("one", 1), ("two", 2)):
        draw = torch.Generator().manual_seed(seed)
        shapes = {"lora_A": (4, 16), "lora_B": (16, 4)}
        tensors = {f"{layer}.{k}.weight": torch.randn(s, generator=draw) for k, s in shapes.items()}
        tensors[f"{layer}.alpha"] = torch.tensor(4)
        save_file(tensors, tmp_path / f"{name}.safetensors")
    adapted = wuerstchen.load(model_folder, device="cpu")
    plain = pixels(adapted.generate("a cat"))
    adapted.load_lora(tmp_path / "one.safetensors", 0.5)
    one = pixels(adapted.generate("a cat"))
    adapted.load_lora(tmp_path / "two.safetensors", 2.0)
    both = pixels(adapted.generate("a cat"))
    assert np.abs(plain - one).max() > 0
    assert np.abs(one - both).max() > 0
    adapted.unload_lora()
    assert np.array_equal(plain, pixels(adapted.generate("a cat")))
    adapted.load_lora(tmp_path / "one.safetensors", 0.5)
    assert np.array_equal(one, pixels(adapted.generate("a cat")))
    with pytest.raises(UserError, match="scale must be a finite number, got nan"):
        adapted.load_lora(tmp_path / "one.safetensors", math.nan)


@pytest.mark.parametrize("strength", [-0.1, -1.0, 1.5, math.nan])
def test_strength_is_a_time(model, strength):
    with pytest.raises(UserError, match=r"strength must be at least 0 and at most 1, got .*"):
        model.generate("a cat", init=Image.new("RGB", (8, 8)), strength=strength)


@pytest.mark.parametrize("mode", ["turned", "palette", "transparent", "grey of 16 bits"])
def test_open_images_are_read_like_files(model, mode, tmp_path):
    """Rotated photos, palettes that are interpolated, and the hidden colours of transparent pixels."""
    image = Image.effect_noise((150, 130), 80).convert("RGB")
    path = tmp_path / "picture.png"
    if mode == "turned":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        image.save(path, exif=exif)
    elif mode == "palette":
        image.quantize(16).save(path)
    elif mode == "transparent":
        image.putalpha(Image.effect_noise(image.size, 90))
        image.save(path)
    else:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    with Image.open(path) as is_open:
        for draw in (
            lambda picture: model.generate("", init=picture, strength=0.3)[0],
            lambda picture: model.reconstruct(picture).original,
        ):
            assert np.array_equal(pixels([draw(is_open)]), pixels([draw(open_image(path))]))


def test_numbers_of_numpy_are_numbers(model):
    given = {"seed": np.int64(3), "size": np.int32(128), "count": np.int64(1), "strength": np.float32(0.5)}
    assert np.array_equal(pixels(model.generate("a", **given)), pixels(model.generate("a", seed=3)))
    assert model.generate("a", seed=[np.int64(3)], size=[np.int64(72), 128])[0].size == (72, 128)


def test_init_needs_a_compressor(small_cascade):
    model = Wuerstchen(dataclasses.replace(small_cascade, compressor=None), torch.device("cpu"))
    with pytest.raises(UserError, match="no compressor, so it cannot encode"):
        model.generate("a cat", init=Image.new("RGB", (8, 8)))


def test_parts_of_two_models_do_not_make_one(small_cascade):
    other = VQGAN(VQGANConfig(bottleneck_blocks=1, embed_dim=8, latent_channels=3))
    with pytest.raises(UserError, match="vqgan has 3 latent channels, but the decoder has 4"):
        dataclasses.replace(small_cascade, vqgan=other)


def test_reconstruction(model):
    image = Image.effect_noise((300, 200), 80).convert("RGB")
    result = model.reconstruct(image)
    assert result.original.size == result.image.size == (128, 128)
    assert result.latent_size == result.map_size == (2, 3, 3)
    assert result.spatial_compression == pytest.approx(42.67, abs=0.01)
    assert result.element_compression == pytest.approx(3 * 128 * 128 / 18)


def test_encode_reads_the_smaller_view(model):
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        expected = model.cascade.compressor(compressor_input(x, 0.75))
        assert torch.equal(model.encode(model.cascade.compressor, x), expected)


def test_map_statistics_are_inverse_and_published():
    z = torch.randn(2, 3, 4, 4)
    statistics = LatentStatistics(mean=(1.0, 2.0, 3.0), std=(0.5, 1.0, 4.0))
    torch.testing.assert_close(statistics.restore(statistics.normalise(z)), z)
    torch.testing.assert_close(PUBLISHED_STATISTICS.normalise(z), (z + 1) / 42)
    torch.testing.assert_close(PUBLISHED_STATISTICS.restore(z), z * 42 - 1)


def test_long_prompts_are_cut_with_a_warning(model):
    with pytest.warns(PromptTooLongWarning, match="lostword"):
        model.generate("cat " * 40 + "lostword", sampling=Sampling(guidance=1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, r"prompts must not be empty, got \[\]"),
        ({"seed": -1}, r"seed must be from 0 to 4294967295, .* got -1"),
        ({"seed": 2**32}, r"seed must be from 0 to 4294967295, .* got 4294967296"),
        ({"seed": 2**32 - 2, "count": 3}, r"to 4294967295, also for later images, .* got 4294967294"),
        ({"prompts": None}, "prompt must be a string or a list of strings, got None"),
        ({"prompts": ["a", 3]}, "prompt must be a string or a list of strings, got 3"),
        ({"negative": ["a", "b"]}, "negative has 2 values for 1 prompts"),
        ({"negative": None}, "negative must be a string or a list of strings, got None. Use '' for none"),
        ({"seed": 1.5}, "seed must be an integer, .* got 1.5"),
        ({"seed": "3"}, "seed must be an integer, .* got '3'"),
        ({"count": 0}, "count must be an integer of at least 1, got 0"),
        ({"count": 2.0}, "count must be an integer of at least 1, got 2.0"),
        ({"size": 128.0}, r"size must be \(width, height\) in pixels, .* got 128.0"),
        ({"size": "128"}, "size must be .* got '128'"),
        ({"size": (128,)}, r"size must be .* got \(128,\)"),
        ({"size": (128, 128.0)}, r"size must be .* got \(128, 128\.0\)"),
        ({"init": "photo.jpg"}, "init must be a PIL image, got <class 'str'>"),
        ({"init": Image.new("RGB", (0, 9))}, "init has 0×9 pixels"),
        ({"strength": "0.5"}, "strength must be at least 0 and at most 1, got 0.5"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        (
            {"size": 100},
            "multiples of 8 from .*, got 100x100. Use 96 in place of 100",
        ),
        ({"size": (256, 0)}, "Use 64 in place of 0"),
        ({"size": 10**6}, "from 64 to 2048, .* Use 2048 in place of 1000000"),
        ({"sampling": {"prior_steps": 0}}, "prior_steps must be an integer from 1 to 1000, got 0"),
        ({"sampling": {"decoder_steps": -3}}, "decoder_steps must be an integer from 1 to 1000, got -3"),
        ({"sampling": {"guidance": math.nan}}, "guidance must be a number from 0 to 100, got nan"),
        ({"sampling": {"guidance": math.inf}}, "guidance must be a number from 0 to 100, got inf"),
        ({"sampling": {"guidance_interval": (0.8, 0.2)}}, r"0 <= LOW < HIGH <= 1, got \(0.8, 0.2\)"),
        ({"sampling": {"guidance_interval": (0.0, math.nan)}}, r"0 <= LOW < HIGH <= 1, got \(0.0, nan\)"),
        ({"sampling": {"decoder_shift": 0.0}}, "decoder_shift must be above 0 and at most 100, got 0.0"),
        (
            {"sampling": {"decoder_guidance": -1.0}},
            "decoder_guidance must be a number from 0 to 100, got -1.0",
        ),
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

    monkeypatch.setattr(model.cascade.vqgan, "unembed", full)
    with pytest.raises(UserError, match="batch_size=2 at 128x128 pixels does not fit into memory"):
        model.generate("a cat", count=2)


def test_models_without_stage_c_or_compressor_say_so(small_cascade):
    import dataclasses

    poor = dataclasses.replace(small_cascade, prior=None, compressor=None)
    model = Wuerstchen(poor, torch.device("cpu"))
    with pytest.raises(UserError, match="no Stage C or no text encoder"):
        model.generate("a cat")
    with pytest.raises(UserError, match="no compressor, so it cannot encode images"):
        model.reconstruct(Image.new("RGB", (128, 128)))


@pytest.mark.parametrize("device", ["toaster", "meta", "cuda:77"])
def test_unavailable_devices_are_refused(device, model_folder):
    with pytest.raises(UserError, match=rf"device '{device}' .*\. Use cpu"):
        wuerstchen.load(model_folder, device=device)


def test_a_gpu_without_triton_says_why_it_is_slow(monkeypatch):
    monkeypatch.setattr(pipeline, "default_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(pipeline, "runs_triton", lambda device: False)
    monkeypatch.setattr(pipeline, "read_model", lambda *_, dtype: dtype)
    monkeypatch.setattr(pipeline, "Wuerstchen", lambda dtype, *_, **__: dtype)
    with pytest.warns(UserNotice, match="does not support Triton"):
        assert pipeline.load() == torch.float16


@pytest.fixture
def student_model(small_cascade, randomise):
    """A model whose student differs from its prior."""
    cascade = with_student(small_cascade)
    randomise(cascade.prior_student)
    return Wuerstchen(cascade, torch.device("cpu"))


def test_few_lets_the_student_jump_without_guidance(student_model, monkeypatch):
    cascade, found = student_model.cascade, []
    restore = LatentStatistics.restore

    def restored(self, normalised):
        found.append(normalised)
        return restore(self, normalised)

    monkeypatch.setattr(LatentStatistics, "restore", restored)
    student_model.generate("a cat", seed=3, sampling=Sampling(prior_sampler="few"))
    with torch.inference_mode():
        text = cascade.text_encoder.encode(["a cat"])
        noise, t = draw_noise((2, 3, 3), [torch.Generator().manual_seed(3)]), torch.tensor([0.98])
        predicted = cascade.prior_student(noise, t, cascade.prior_student.context(text.states, text.mask))
        alpha_bar = PUBLISHED_OBJECTIVE.alpha_bar(t)
        clean = (noise - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
    torch.testing.assert_close(found[0], clean, rtol=1e-4, atol=1e-4)


def test_few_has_the_settings_of_the_student(student_model, model):
    few = Sampling(prior_sampler="few")
    settings = student_model.settings_of(few)
    assert (settings["guidance"], settings["prior_steps"], settings["prior_sampler"]) == (1.0, 1, "few")
    assert student_model.settings_of(dataclasses.replace(few, prior_steps=4))["prior_steps"] == 4
    assert settings == student_model.settings_of(Sampling())
    with pytest.raises(UserError, match=r"few does not support guidance 3"):
        student_model.generate("a cat", sampling=dataclasses.replace(few, guidance=3.0))


def test_the_student_samples_by_default_and_the_full_network_on_request(student_model, model):
    """Images of earlier versions are reproduced bit for bit."""
    before, few = pixels(model.generate("a cat")), Sampling(prior_sampler="few")
    assert np.array_equal(pixels(student_model.generate("a cat", sampling=Sampling(full=True))), before)
    own = pixels(student_model.generate("a cat"))
    assert np.array_equal(own, pixels(student_model.generate("a cat", sampling=few)))
    assert not np.array_equal(own, before)
    stored = model.settings_of(Sampling())
    assert not {"full", "stage_c"} & stored.keys()  # nothing changes in images of models without students
    assert np.array_equal(pixels(student_model.generate("a cat", sampling=Sampling(**stored))), before)


def test_the_full_network_samples_what_the_student_does_not_support(student_model, model, tmp_path):
    image = model.generate("a dog")[0]
    for options in ({"negative": "red"}, {"init": image, "strength": 0.5}):
        found = pixels(student_model.generate("a cat", **options))
        assert np.array_equal(found, pixels(model.generate("a cat", **options))), options
        with pytest.raises(UserError, match="prior_sampler few does not support"):
            student_model.generate("a cat", sampling=Sampling(prior_sampler="few"), **options)
    settings = student_model.settings_of(Sampling(), negative="red")
    assert settings == {**model.settings_of(Sampling()), "stage_c": "full"}
    assert student_model.settings_of(Sampling(), edits=True) == settings
    assert student_model.settings_of(Sampling(), negative=" ")["stage_c"] == "student"

    adapter = tmp_path / "adapter.safetensors"
    name = "blocks.2.attention.to_q"
    weight = dict(model.cascade.prior.named_parameters())[f"{name}.weight"]
    rows, columns = weight.shape
    save_file(
        {
            f"{name}.lora_A.weight": torch.zeros(2, columns),
            f"{name}.lora_B.weight": torch.zeros(rows, 2),
            f"{name}.alpha": torch.tensor(2.0),
        },
        adapter,
    )
    student_model.load_lora(adapter)
    assert student_model.settings_of(Sampling())["stage_c"] == "full"
    with pytest.raises(UserError, match="does not support a LoRA adapter"):
        student_model.generate("a cat", sampling=Sampling(prior_sampler="few"))
    student_model.unload_lora()
    assert student_model.settings_of(Sampling())["stage_c"] == "student"


def test_a_model_s_own_sampler_is_not_that_of_students():
    with pytest.raises(UserError, match="prior_sampler must be a sampler of the prior itself, got 'few'"):
        CascadeSettings(prior_sampler="few")


def test_steps_of_few_can_be_watched(student_model, model):
    seen, few = [], Sampling(prior_sampler="few", prior_steps=2)
    plain = pixels(student_model.generate("a cat", sampling=few))
    drawn = student_model.generate("a cat", sampling=few, on_step=lambda step: seen.append(step.stage))
    assert np.array_equal(pixels(drawn), plain)
    assert seen.count("Stage C") == 2


@pytest.fixture
def with_both(small_cascade, randomise):
    """A model with students of Stages B and C that differ from the full networks."""
    cascade = with_decoder_student(with_student(small_cascade), steps=2)
    randomise(cascade.prior_student)
    randomise(cascade.decoder_student)
    return Wuerstchen(cascade, torch.device("cpu"))


def test_the_student_of_stage_b_jumps(with_both, monkeypatch):
    """Two steps, written out."""
    cascade, found = with_both.cascade, []
    decode = VQGAN.decode
    monkeypatch.setattr(VQGAN, "decode", lambda self, z: (found.append(z), decode(self, z))[1])
    image = Image.new("RGB", (128, 128), "red")
    with_both.reconstruct(image, seed=3)
    with torch.inference_mode():
        z = with_both.encode(cascade.compressor, to_tensor(image)[None])
        generator = torch.Generator().manual_seed(3)
        x = draw_noise((4, 32, 32), [generator])
        context, objective = cascade.decoder_student.context(z, (32, 32)), PUBLISHED_OBJECTIVE
        first, second = torch.tensor([0.98]), torch.tensor([0.66])
        clean = objective.to_clean(cascade.decoder_student(x, first, context), x, first)
        x = objective.noised(clean, draw_noise((4, 32, 32), [generator]), second)
        clean = objective.to_clean(cascade.decoder_student(x, second, context), x, second)
    torch.testing.assert_close(found[0], clean, rtol=1e-3, atol=1e-3)


def test_stage_b_has_its_own_student_and_sampler(with_both, model):
    before = pixels(model.generate("a cat"))
    assert np.array_equal(pixels(with_both.generate("a cat", sampling=Sampling(full=True))), before)
    found = with_both.settings_of(Sampling())
    assert (found["decoder_sampler"], found["decoder_steps"], found["stage_b"]) == ("few", 2, "student")
    assert not {"decoder_sampler", "stage_b"} & model.settings_of(Sampling()).keys()
    only_c = with_both.settings_of(Sampling(decoder_steps=3))
    assert (only_c["stage_c"], only_c["stage_b"], only_c["decoder_sampler"]) == ("student", "full", "ddpm")
    only_b = with_both.settings_of(Sampling(), negative="red")
    assert (only_b["stage_c"], only_b["stage_b"]) == ("full", "student")
    assert with_both.settings_of(Sampling(), edits=True)["stage_b"] == "full"

    dpm = Sampling(decoder_sampler="dpm")
    assert model.settings_of(dpm)["decoder_sampler"] == "dpm"
    assert not np.array_equal(pixels(model.generate("a cat", sampling=dpm)), before)
    with pytest.raises(
        UserError, match=r"decoder_sampler=euler is incompatible with this model\. Its Stage B"
    ):
        model.generate("a cat", sampling=Sampling(decoder_sampler="euler"))


def test_a_stage_b_on_tokens_has_no_choice_of_samplers(small_v1):
    v1 = Wuerstchen(small_v1, torch.device("cpu"))
    with pytest.raises(UserError, match="decoder_sampler ddpm does not fit this model"):
        v1.generate("a cat", sampling=Sampling(decoder_sampler="ddpm"))
    assert "decoder_sampler" not in v1.settings_of(Sampling())


def test_steps_of_the_student_of_stage_b_can_be_watched(with_both):
    seen = []
    drawn = with_both.generate("a cat", on_step=lambda step: seen.append((step.stage, step.preview([0]))))
    assert np.array_equal(pixels(drawn), pixels(with_both.generate("a cat")))
    assert [stage for stage, _ in seen] == ["Stage C", "Stage B", "Stage B"]
