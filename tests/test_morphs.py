"""Morphs, variations by Stage B's noise, and weighted prompts, with a tiny random model."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen.errors import UserError
from wuerstchen.pipeline import Wuerstchen
from wuerstchen.sampling import Sampling

from .configurations import with_lite0


@pytest.fixture(scope="module")
def model(small_cascade):
    return Wuerstchen(with_lite0(copy.deepcopy(small_cascade)), torch.device("cpu"))


DPM = Sampling(prior_sampler="dpm")


def pixels(image) -> np.ndarray:
    return np.asarray(image, np.int16)


def noise(sigma=60.0) -> Image.Image:
    return Image.effect_noise((128, 128), sigma).convert("RGB")


@pytest.fixture
def seen(monkeypatch):
    """The semantic latents that Stage B gets, batch by batch."""
    found = []
    decoder = Wuerstchen._sample_decoder

    def recorded(self, batch, semantic_latents):
        found.append(semantic_latents)
        return decoder(self, batch, semantic_latents)

    monkeypatch.setattr(Wuerstchen, "_sample_decoder", recorded)
    return found


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_morph_goes_from_one_prompt_to_the_other(model, guidance):
    sampling = Sampling(prior_sampler="dpm", guidance=guidance)
    frames = model.morph("a cat", "a red car", frames=5, seed=3, sampling=sampling, batch_size=2)
    assert len(frames) == 5
    for prompt, frame in (("a cat", frames[0]), ("a red car", frames[-1])):
        (alone,) = model.generate(prompt, seed=3, sampling=sampling)
        assert np.abs(pixels(frame) - pixels(alone)).max() <= 1
    whole = model.morph("a cat", "a red car", frames=5, seed=3, sampling=sampling, batch_size=8)
    for one, other in zip(frames, whole, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    assert np.abs(pixels(frames[0]) - pixels(frames[2])).max() > 0


def test_a_guidance_interval_holds_in_morphs(model):
    sampling = Sampling(prior_sampler="dpm", guidance=3.0, guidance_interval=(0.0, 0.8))
    frames = model.morph("a cat", "a red car", frames=2, seed=3, sampling=sampling, negative="a dog")
    (alone,) = model.generate("a red car", seed=3, sampling=sampling, negative="a dog")
    assert np.abs(pixels(frames[1]) - pixels(alone)).max() <= 1


def test_a_morph_between_seeds_changes_stage_c_s_noise_alone(model):
    frames = model.morph("a cat", "a cat", frames=3, seed=3, end_seed=9)
    (first,) = model.generate("a cat", seed=3, sampling=DPM)
    assert np.abs(pixels(frames[0]) - pixels(first)).max() <= 1
    assert all(np.abs(pixels(a) - pixels(b)).max() > 1 for a, b in itertools.pairwise(frames))


def test_the_default_sampler_draws_no_fresh_noise(model):
    assert model.morph("a cat", "a cow", frames=2, seed=1) == model.morph(
        "a cat", "a cow", frames=2, seed=1, sampling=DPM
    )


def test_a_morph_between_images_starts_and_ends_with_them(model, seen):
    """The ends have the images' own semantic latents, or those of a prompt."""
    images = [Image.new("RGB", (128, 128), "red"), Image.linear_gradient("L").convert("RGB")]
    for image in images:
        (drawn,) = model.generate("", init=image, strength=0)
        assert drawn.size == (128, 128)
    model.generate("a cat", seed=4, sampling=DPM)
    expected = seen[:]
    seen.clear()
    model.morph(*images, frames=3, seed=4)
    model.morph("a cat", images[1], frames=3, seed=4)
    ((first, middle, last), (prompt, _, other)) = seen
    for found, known in ((first, 0), (last, 1), (prompt, 2), (other, 1)):
        torch.testing.assert_close(found[None], expected[known], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, last, atol=1e-3)
    assert not torch.allclose(middle, first, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"frames": 1}, "frames must be an integer from 2 to 1000, got 1"),
        ({"frames": 2.5}, "frames must be an integer from 2 to 1000, got 2.5"),
        ({"end": 3}, "end must be a prompt or a PIL image, got <class 'int'>"),
        ({"end": "a cat"}, "the same prompt with the same seed: 'a cat'"),
        ({"end_seed": -1}, "end_seed must be from 0"),
        ({"negative": ["a", "b"]}, "negative must be one text, got 2"),
        ({"strength": 2}, "strength must be at least 0 and at most 1, got 2"),
        ({"size": 100}, "multiples of 8"),
    ],
)
def test_bad_morphs_are_refused(model, given, words):
    with pytest.raises(UserError, match=words):
        model.morph("a cat", **{"end": "a dog", **given})


def test_numbers_of_numpy_are_numbers(model):
    """Bug: a batch size of NumPy was accepted, and then refused by torch."""
    given = {"frames": 3, "batch_size": 2, "seed": 3, "end_seed": 4}
    numbers = {name: np.int64(value) for name, value in given.items()}
    assert model.morph("a cat", "a cow", **numbers) == model.morph("a cat", "a cow", **given)


def test_morphs_with_a_student_s_sampler_are_refused_as_morphs(model):
    """Bug: the message said that the student does not support an image to start from, without an image."""
    settings = dataclasses.replace(model.cascade.settings, prior_student_steps=1)
    student = dataclasses.replace(model.cascade, prior_student=model.cascade.prior, settings=settings)
    with pytest.raises(UserError, match="prior_sampler few does not support a morph"):
        Wuerstchen(student, torch.device("cpu")).morph(
            "a cat", "a cow", frames=2, sampling=Sampling(prior_sampler="few")
        )


def test_strength_0_keeps_the_semantic_latents(model, seen):
    """Only details change, and Stage C does not run."""
    init = noise()
    steps = []
    images = model.generate(
        "", init=init, strength=0, seed=2, count=2, progress=lambda stage, *_: steps.append(stage)
    )
    assert set(steps) == {"Stage B"}
    assert torch.equal(seen[0][0], seen[0][1])
    assert np.abs(pixels(images[0]) - pixels(images[1])).max() > 1


def test_a_detail_seed_changes_stage_b_alone(model, seen):
    drawn = [
        model.generate("a cat", seed=3, **given)[0]
        for given in ({}, {"detail_seed": 3}, {"detail_seed": 8}, {"detail_seed": 8})
    ]
    assert all(torch.equal(seen[0], other) for other in seen)
    assert drawn[2] == drawn[3]
    assert np.abs(pixels(drawn[1]) - pixels(drawn[2])).max() > 1
    both = model.generate("a cat", seed=[3, 3], count=2, detail_seed=[3, 8])
    assert all(np.abs(pixels(a) - pixels(b)).max() <= 1 for a, b in zip(both, drawn[1:3], strict=True))
    with pytest.raises(UserError, match="detail_seed must be an integer"):
        model.generate("a cat", detail_seed=1.5)
    with pytest.raises(UserError, match="1 detail_seeds do not match 2 images"):
        model.generate("a cat", count=2, detail_seed=[1])


def test_prompt_weights_are_off_by_default(model):
    plain, text = (model.generate(prompt, seed=1)[0] for prompt in ("a red cat", "a (red:3) cat"))
    weighted, one = (
        model.generate(prompt, seed=1, prompt_weights=True)[0]
        for prompt in ("a (red:3) cat", "a (red:1) cat")
    )
    assert one == plain
    assert len({image.tobytes() for image in (plain, text, weighted)}) == 3
    negative = [
        model.generate("a cat", negative=text, seed=1, prompt_weights=True, sampling=Sampling(guidance=3.0))[
            0
        ]
        for text in ("a dog", "a (dog:3)")
    ]
    assert negative[0] != negative[1]
    with pytest.raises(UserError, match="does not match"):
        model.generate("a (cat", prompt_weights=True)
