"""Edits of a part of an image, with tiny random models: what is kept, what changes, and what is refused."""

import copy
import dataclasses
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from wuerstchen.diffusion.known_cells import Known, predict_around
from wuerstchen.diffusion.samplers import ddpm, draw_noise
from wuerstchen.diffusion.schedule import stage_c_timesteps
from wuerstchen.edit_options import EditOptions
from wuerstchen.edits import canvas_of, checked_inits, filled, make_edits
from wuerstchen.errors import UserError, UserNotice
from wuerstchen.image_files import save_png
from wuerstchen.images import open_image, pad_to_canvas, resize_crop, to_tensor
from wuerstchen.models.cascade import CascadeSettings
from wuerstchen.pipeline import Wuerstchen
from wuerstchen.sampling import Sampling
from wuerstchen.sampling_batch import SamplingBatch

from .configurations import with_lite0


@pytest.fixture(scope="module")
def model(small_cascade):
    return Wuerstchen(with_lite0(copy.deepcopy(small_cascade)), torch.device("cpu"))


def noise(width, height, sigma=60.0) -> Image.Image:
    return Image.effect_noise((width, height), sigma).convert("RGB")


def masked(size, box, value=255) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=value)
    return mask


def changed(before, after) -> np.ndarray:
    assert before.size == after.size
    return (np.asarray(before) != np.asarray(after)).any(2)


@pytest.mark.parametrize("size", [(128, 128), (150, 97), (300, 70)])
@pytest.mark.parametrize("crop", [False, 10])
def test_pixels_outside_the_mask_and_its_feather_are_the_image_s(model, size, crop, tmp_path):
    """Also after the PNG is written and read again, at sizes that no canvas has."""
    init = noise(*size)
    box = (40, 20, 70, 50)
    (drawn,) = model.generate("a cat", init=init, mask=masked(size, box), feather=6, crop_to_mask=crop)
    save_png(drawn, tmp_path / "edit.png", {})
    seen = changed(init, open_image(tmp_path / "edit.png"))
    inside = np.zeros_like(seen)
    inside[20 - 6 : 50 + 6, 40 - 6 : 70 + 6] = True
    assert not seen[~inside].any()
    assert seen[20:50, 40:70].mean() > 0.9


def test_extensions_keep_the_image_but_for_the_feather(model):
    init = noise(128, 100)
    (drawn,) = model.generate("a cat", init=init, extend="left=40,bottom=9", feather=4)
    assert drawn.size == (168, 109)
    same = changed(init, drawn.crop((40, 0, 168, 100)))
    assert not same[:96, 4:].any()
    assert np.asarray(drawn)[:, :40].std() > 1
    both = model.generate(
        "a cat", init=init, extend={"right": 64}, mask=masked(init.size, (0, 0, 30, 30)), feather=0
    )[0]
    untouched = ~changed(init, both.crop((0, 0, 128, 100)))
    assert untouched[:, 30:].all()
    assert untouched[:30, :30].mean() < 0.1


def test_stage_c_replaces_known_cells_at_each_step(model):
    """The steps written out: cells outside the mask are the noised image's after each step."""
    cascade, generator = model.cascade, [torch.Generator().manual_seed(7)]
    init = noise(256, 256)
    mask = masked(init.size, (0, 0, 60, 60))  # in four of 6 × 6 cells
    settings = cascade.settings
    (edit,) = make_edits([init], mask, EditOptions(), 1.0, None, settings)
    known = model.known_parts(edit, (256, 256)).semantic_latents
    expected_cells = torch.ones(6, 6, dtype=torch.bool)
    expected_cells[:2, :2] = False
    assert torch.equal(known.cells[0], expected_cells)
    times = stage_c_timesteps(3)
    with torch.no_grad():
        text = cascade.text_encoder.encode(["a cat"])
        context = cascade.prior.context(text.states, text.mask)
        start = draw_noise((2, 6, 6), generator)
        objective = settings.prior_objective
        x = torch.where(known.cells[:, None], objective.noised(known.clean, start, torch.ones(1)), start)
        for now, then in itertools.pairwise(times):
            x = ddpm(lambda x, t: cascade.prior(x, t, context), x, [now, then], generator, objective)
            kept = objective.noised(known.clean, start, torch.tensor([then])) if then else known.clean
            x = torch.where(known.cells[:, None], kept, x)
    sampled = sample_c(model, edit, seed=7)
    torch.testing.assert_close(sampled, x, rtol=1e-4, atol=1e-4)
    assert torch.equal(sampled[:, :, known.cells[0]], known.clean[:, :, known.cells[0]])


def sample_c(model, edit, seed, sampling=None):
    """Stage C's normalised sample of an edit."""
    settings = model.cascade.settings
    canvas = canvas_of(edit.size, settings)
    batch = SamplingBatch(
        prompts=["a cat"],
        negatives=[""],
        seeds=[seed],
        size=edit.size,
        canvas=canvas,
        sampling=settings.completed(sampling or Sampling(guidance=1.0)),
        known=model.known_parts(edit, canvas),
    )
    with torch.inference_mode():
        z = model._sample_prior(batch, model._encode_prompts(batch))
        return settings.latent_statistics.normalise(z)


def trained(model) -> Wuerstchen:
    settings = dataclasses.replace(model.cascade.settings, prior_known_cells=True)
    return Wuerstchen(dataclasses.replace(model.cascade, settings=settings), torch.device("cpu"))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_stage_c_trained_for_it_sees_known_cells_at_time_0(model, guidance, monkeypatch):
    """And one that was not sees the same time everywhere."""
    seen = []
    forward = type(model.cascade.prior).forward

    def recorded(self, x, t, *rest):
        seen.append((x.clone(), t.clone()))
        return forward(self, x, t, *rest)

    monkeypatch.setattr(type(model.cascade.prior), "forward", recorded)
    init = noise(256, 256)
    (edit,) = make_edits(
        [init], masked(init.size, (0, 0, 20, 20)), EditOptions(), 1.0, None, model.cascade.settings
    )
    known = model.known_parts(edit, (256, 256)).semantic_latents
    samples = []
    for one in (model, trained(model)):
        seen.clear()
        samples.append(sample_c(one, edit, 3, Sampling(guidance=guidance)))
        for (x, t), time in zip(seen, stage_c_timesteps(3), strict=False):
            if one is model:
                assert torch.equal(t, torch.full((len(x),), time))
            else:
                assert t.shape == (len(x), 6, 6)
                assert (t[:, known.cells[0]] == 0).all()
                assert torch.allclose(t[:, ~known.cells[0]], torch.tensor(time))
                expected = known.clean[0][:, known.cells[0]].expand(len(x), -1, -1)
                assert torch.equal(x[:, :, known.cells[0]], expected)
    untrained, knowing = samples
    assert not torch.allclose(untrained, knowing)
    assert torch.equal(untrained[:, :, known.cells[0]], knowing[:, :, known.cells[0]])


def test_stage_b_keeps_the_latents_outside_the_mask(model):
    """They are exactly Stage A's of the image. In the feather they may change a little."""
    init = noise(128, 128)
    mask = masked(init.size, (32, 32, 96, 96))
    (edit,) = make_edits([init], mask, EditOptions(feather=8), 1.0, None, model.cascade.settings)
    known = model.known_parts(edit, (128, 128)).latents
    with torch.no_grad():
        expected = model.cascade.vqgan.encode(edit.pixels()[None])
    assert torch.equal(known.clean, expected)
    assert (known.strength[0, 8:24, 8:24] == 1).all()
    assert (known.strength[0, :, :6] == 0).all()
    assert ((known.strength[0, 12, 6:8] > 0) & (known.strength[0, 12, 6:8] <= 1)).all()
    seen = []
    decode = model._decode
    model._decode = lambda latents: seen.append(latents) or decode(latents)
    try:
        model.generate("a cat", init=init, mask=mask, feather=8)
    finally:
        del model._decode
    kept = known.cells[0]
    assert torch.equal(seen[0][:, :, kept], expected[:, :, kept])
    assert not torch.allclose(seen[0][:, :, ~kept], expected[:, :, ~kept])


def test_v1_keeps_tokens(small_v1):
    model = Wuerstchen(with_lite0(copy.deepcopy(small_v1)), torch.device("cpu"))
    init = noise(128, 128)
    mask = masked(init.size, (32, 32, 64, 64))
    seen = []
    decode = model._decode
    model._decode = lambda tokens: seen.append(tokens) or decode(tokens)
    (drawn,) = model.generate("a cat", init=init, mask=mask, feather=0)
    vqgan = model.cascade.vqgan
    (edit,) = make_edits([init], mask, EditOptions(feather=0), 1.0, None, model.cascade.settings)
    with torch.no_grad():
        tokens = vqgan.vquantizer.nearest(vqgan.embed(edit.pixels()[None]))
    kept = torch.ones(32, 32, dtype=torch.bool)
    kept[8:16, 8:16] = False
    assert torch.equal(seen[0][0][kept], tokens[0][kept])
    assert not torch.equal(seen[0][0][~kept], tokens[0][~kept])
    assert not changed(init, drawn)[:, 64:].any()


def test_grey_follows_the_image_until_its_time(model):
    """A cell of strength s is the noised image's while t ≥ s, and free below."""
    clean, start = torch.full((1, 1, 1, 3), 2.0), torch.full((1, 1, 1, 3), -1.0)
    known = Known(clean, torch.tensor([[[0.0, 0.5, 1.0]]]))
    objective = model.cascade.settings.prior_objective
    begun = known.begin(start, objective, 1.0)
    assert begun[0, 0, 0, 2] == -1
    assert (begun[0, 0, 0, :2] != -1).all()
    times = [1.0, 0.75, 0.5, 0.25, 0.0]
    followed = known.replaced(start, times, objective)
    for step, then in enumerate(times[1:]):
        x = torch.full((1, 1, 1, 3), 9.0)
        followed(step, x)
        expected = objective.noised(clean, start, torch.tensor([then]))[0, 0, 0]
        assert x[0, 0, 0, 0] == (2 if then == 0 else pytest.approx(float(expected[0])))
        assert x[0, 0, 0, 1] == (9 if then < 0.5 else pytest.approx(float(expected[1])))
        assert x[0, 0, 0, 2] == 9


def test_strength_multiplies_the_mask(model):
    init = noise(256, 128)
    mask = Image.new("L", init.size, 0)
    mask.paste(128, (0, 0, 40, 40))
    (edit,) = make_edits([init], mask, EditOptions(), 0.5, None, model.cascade.settings)
    cells = edit.cell_strengths((256, 128), (3, 6))
    assert cells.max() == pytest.approx(128 / 255 / 2)
    assert (cells[2] == 0).all()
    assert edit.latent_strengths((256, 128), (32, 64))[0, 0] == 1
    # Almost no strength keeps the composition: the sample is close to the image's own latents.
    kept = model.known_parts(edit, (256, 128)).semantic_latents.clean
    (weak,) = make_edits([init], mask, EditOptions(), 1e-4, None, model.cascade.settings)
    (strong,) = make_edits([init], mask, EditOptions(), 1.0, None, model.cascade.settings)
    many = Sampling(guidance=1.0, prior_steps=12)
    distances = [(sample_c(model, each, 2, many) - kept).square().mean() for each in (weak, strong)]
    assert distances[0] < distances[1]


def test_the_mask_grows_by_as_many_positions_on_each_canvas():
    """Bug: it depended on the canvas. The published v2 grew by none on 1024x768 (18 × 24 positions).

    A position has the same size in pixels on each canvas, so the model decides: one for 24 × 24 positions of
    a training image, none for 6 × 6.
    """
    for side, scale, grown in ((1024, 0.75, 1), (256, 0.75, 0), (2048, 0.75, 2)):
        settings = CascadeSettings(image_size=side, view_scale=scale)
        for size in ((768, 768), (1152, 768), (1152, 1152), (2304, 768)):
            mask = masked(size, (256, 256, 512, 512))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserNotice)
                (edit,) = make_edits([Image.new("RGB", size)], mask, EditOptions(), 1.0, None, settings)
            width, height = (side // 32 for side in size)
            expected = torch.zeros(height, width)
            inside = slice(8 - grown, 16 + grown)
            expected[inside, inside] = 1
            assert torch.equal(edit.cell_strengths(size, (height, width)), expected)


def test_masks_lie_on_the_canvas_where_the_image_does(model):
    """Also at sizes that are no canvas: against masks that were padded as the image is."""
    settings, size = model.cascade.settings, (150, 97)
    canvas = canvas_of(size, settings)
    assert canvas != size
    grid = settings.latent_size(*canvas)
    for box in ((0, 0, 9, 97), (141, 0, 150, 97), (0, 0, 150, 9), (0, 88, 150, 97), (60, 40, 66, 46)):
        mask = masked(size, box)
        options = EditOptions(feather=0)
        (edit,) = make_edits([Image.new("RGB", size)], mask, options, 1.0, None, settings)
        whole = pad_to_canvas(to_tensor(mask)[None, :1], canvas)
        for found, shape in (
            (edit.cell_strengths(canvas, grid), grid),
            (
                edit.latent_strengths(canvas, (canvas[1] // 4, canvas[0] // 4)),
                (canvas[1] // 4, canvas[0] // 4),
            ),
        ):
            assert torch.equal(found, torch.nn.functional.adaptive_max_pool2d(whole, shape)[0, 0])


def test_a_size_that_crops_the_mask_away_says_so(model):
    """Bug: the message was that the mask is empty, with the size of the result."""
    image, left = Image.new("RGB", (400, 100)), masked((400, 100), (0, 0, 60, 100))
    inverted = left.point(lambda value: 255 - value)
    for mask, word in ((left, "white"), (inverted, "black")):
        with pytest.raises(UserError, match=rf"no {word} pixel left: size 128x128 .* 400x100 pixels"):
            model.generate("a", init=image, mask=mask, size=128)


def test_what_keeps_nothing_is_not_seen():
    """Otherwise the compressor would describe the old content in the cells around the mask."""
    settings = CascadeSettings(image_size=128)
    init = Image.new("RGB", (64, 64), (100, 150, 200))
    ImageDraw.Draw(init).rectangle((20, 20, 39, 39), fill="red")
    mask = masked(init.size, (18, 18, 42, 42))
    (edit,) = make_edits([init], mask, EditOptions(), 1.0, None, settings)
    flat = torch.tensor([100, 150, 200])[:, None, None] / 255
    torch.testing.assert_close(edit.pixels(), flat.expand(3, 64, 64), rtol=0, atol=1e-5)
    (half,) = make_edits([init], mask, EditOptions(), 0.5, None, settings)
    assert half.pixels()[0, 30, 30] == 1


def test_holes_are_filled_from_around():
    ramp = torch.linspace(0, 1, 64).expand(3, 48, 64).clone()
    known = torch.ones(48, 64, dtype=torch.bool)
    known[10:30, 20:40] = False
    holed = torch.where(known, ramp, torch.tensor(math.nan)).nan_to_num(7.0)
    found = filled(holed, known)
    assert torch.equal(found[:, known], ramp[:, known])
    assert (found - ramp).abs().max() < 0.15
    assert torch.equal(filled(ramp, ~known & False), torch.full_like(ramp, 0.5))


def test_crop_to_mask_enlarges_the_region(model):
    seen = []
    init = noise(400, 400)
    mask = masked(init.size, (300, 300, 320, 320))
    generated = model.generate(
        "a cat",
        init=init,
        mask=mask,
        crop_to_mask=6,
        feather=0,
        on_step=lambda step: seen.append(step.preview([0])),
    )
    assert generated[0].size == (400, 400)
    (edit,) = make_edits(
        [init], mask, EditOptions(crop_to_mask=6, feather=0), 1.0, None, model.cascade.settings
    )
    assert (edit.box, edit.size) == ((294, 294, 326, 326), (128, 128))
    assert seen[-2][0].size == (64, 64)
    (edit,) = make_edits(
        [init], mask, EditOptions(crop_to_mask=True), 1.0, (256, 128), model.cascade.settings
    )
    assert edit.size[0] / edit.size[1] == pytest.approx(2, rel=0.1)
    assert edit.size[0] * edit.size[1] == pytest.approx(256 * 128, rel=0.15)


def test_each_prompt_may_have_its_own_image_and_mask(model):
    inits = [noise(128, 128), noise(128, 128), noise(140, 90)]
    masks = [masked(init.size, (20, 20, 60 + 5 * n, 60)) for n, init in enumerate(inits)]
    prompts = ["a cat", "a dog", "a cow"]
    together = model.generate(prompts, init=inits, mask=masks, seed=4, count=2, batch_size=3)
    assert [image.size for image in together] == [(128, 128)] * 4 + [(140, 90)] * 2
    for number, prompt in enumerate(prompts):
        alone = model.generate(prompt, init=inits[number], mask=masks[number], seed=4 + 2 * number, count=2)
        for one, other in zip(alone, together[2 * number :], strict=False):
            assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


def test_size_scales_the_image_and_the_mask(model):
    init = noise(300, 200)
    (drawn,) = model.generate(
        "a cat", init=init, mask=masked(init.size, (0, 0, 100, 200)), size=128, feather=0
    )
    assert drawn.size == (128, 128)
    scaled = resize_crop(init, 128, 128)
    assert not changed(scaled, drawn)[:, 34:].any()
    assert changed(scaled, drawn)[:, :30].mean() > 0.9


def test_edits_of_many_pixels_come_with_a_notice():
    """A photograph of a phone would be sampled for hours."""
    settings, init = CascadeSettings(image_size=64, size_multiple=128), Image.new("RGB", (160, 120))
    mask = masked(init.size, (0, 0, 30, 30))
    with pytest.warns(UserNotice, match=r"160x120 pixels, 5 times as many .* Use crop_to_mask"):
        make_edits([init], mask, EditOptions(), 1.0, None, settings)
    make_edits([init], mask, EditOptions(crop_to_mask=True), 1.0, None, settings)
    make_edits([init], mask, EditOptions(), 1.0, (128, 128), settings)


def test_a_region_of_a_very_large_image_can_be_edited():
    """Bug: the limit of the canvas was that of the whole image, also if only its region is sampled."""
    settings, init = CascadeSettings(image_size=64), Image.new("RGB", (3000, 1200))
    mask = masked(init.size, (0, 0, 2900, 3))
    (edit,) = make_edits([init], mask, EditOptions(crop_to_mask=0, feather=0), 1.0, (64, 64), settings)
    assert edit.image.size == (3000, 1200)
    assert max(edit.size) <= 1024
    with pytest.raises(UserError, match=r"init is too large: it has 3000x1200 .* at most 1024"):
        make_edits([init], mask, EditOptions(), 1.0, None, settings)


def test_images_that_are_not_kept_as_they_are_come_with_a_notice():
    """Bug: the pixels outside the mask were promised, and transparency was lost without a word."""
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 9))
    grey16 = Image.new("I;16", (64, 64), 99)
    for image, words in (
        (clear, "init is transparent"),
        (grey16, "init has the mode I;16"),
        (Image.new("CMYK", (64, 64)), "init has the mode CMYK"),
    ):
        with pytest.warns(UserNotice, match=f"{words}. The result is 8-bit sRGB on white"):
            checked_inits(image, MASK, EditOptions())
        checked_inits(image, None, EditOptions())  # a variation keeps no pixels
    for image in (IMAGE, IMAGE.convert("RGBA"), IMAGE.convert("L"), IMAGE.convert("P")):
        assert len(checked_inits(image, MASK, EditOptions())) == 1


IMAGE, MASK = Image.new("RGB", (64, 64)), masked((64, 64), (8, 8, 30, 30))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"init": IMAGE, "mask": Image.new("L", (64, 60), 255)}, "mask has 64x60 pixels, but init has 64x64"),
        ({"init": IMAGE, "mask": Image.new("L", (64, 64), 0)}, "mask is empty: all of its 64x64 pixels"),
        ({"init": IMAGE, "mask": Image.new("L", (64, 64), 255)}, "mask is full: all of its 64x64 pixels"),
        ({"init": IMAGE, "mask": "mask.png"}, "mask must be a PIL image, got <class 'str'>"),
        ({"init": IMAGE, "mask": [MASK, MASK]}, "mask has 2 values for 1 init images"),
        ({"init": [], "mask": MASK}, r"init is empty: \[\]"),
        ({"init": ()}, r"init is empty: \(\)"),
        ({"init": IMAGE, "mask": []}, "mask has 0"),
        ({"mask": MASK}, "mask needs an image to edit, but init is missing"),
        ({"extend": "left=8"}, "extend needs an image to edit"),
        ({"init": IMAGE, "feather": 3}, "feather needs a mask or extend"),
        ({"init": IMAGE, "crop_to_mask": True}, "crop_to_mask needs a mask or extend"),
        ({"init": IMAGE, "extend": "left=4000"}, "4064x64 pixels. Sides may have at most 2048 pixels"),
        ({"init": IMAGE, "extend": "up=8"}, "extend has an unknown side: 'up'"),
        ({"init": IMAGE, "mask": MASK, "feather": -1}, "feather must be from 0 to 1024 pixels, got -1"),
        ({"init": IMAGE, "mask": MASK, "feather": True}, "feather must be from 0 to 1024 pixels, got True"),
        ({"init": IMAGE, "mask": MASK, "crop_to_mask": -1}, "crop_to_mask must be True or a padding"),
        ({"init": IMAGE, "mask": MASK, "strength": 0}, "strength must be above 0"),
    ],
)
def test_bad_edits_are_refused_in_one_sentence(model, given, words):
    with pytest.raises(UserError, match=words):
        model.generate("a cat", **given)


def test_a_model_without_a_compressor_cannot_edit(model):
    without = Wuerstchen(dataclasses.replace(model.cascade, compressor=None), torch.device("cpu"))
    with pytest.raises(UserError, match="no compressor, so it cannot encode images"):
        without.generate("a cat", init=IMAGE, mask=MASK)


@pytest.mark.parametrize("network", ["vqgan", "compressor"])
@pytest.mark.parametrize("size", [None, 128])
def test_images_that_do_not_fit_into_memory_are_named(model, monkeypatch, network, size):
    """Bug: images were encoded outside of what names the error, and ended in a traceback."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    method = "embed" if network == "vqgan" else "forward"
    monkeypatch.setattr(getattr(model.cascade, network), method, full)
    shown = "128x128" if size else "150x97"
    with pytest.raises(UserError, match=f"the edit at {shown} pixels does not fit into memory"):
        model.generate("a cat", init=noise(150, 97), mask=masked((150, 97), (50, 20, 90, 60)), size=size)
    if network == "compressor":
        with pytest.raises(UserError, match="the image at 128x128 pixels does not fit into memory"):
            model.generate("a cat", init=noise(150, 97), size=size)


def test_known_cells_of_guided_networks_are_those_of_the_first_half(model):
    """``predict_around`` outside of guidance: both halves see the same known cells."""
    seen = []

    def predict(x, t):
        seen.append(t)
        return x

    clean, cells = torch.zeros(1, 1, 2, 2), torch.tensor([[[True, False], [False, False]]])
    predict_around(predict, clean, cells)(torch.ones(1, 1, 2, 2), torch.tensor([0.5]))
    assert seen[0].tolist() == [[[0.0, 0.5], [0.5, 0.5]]]
