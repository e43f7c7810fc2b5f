"""Checks of prompts, seeds and sizes."""

import subprocess
import sys

import pytest

from wuerstchen import pipeline, sampling
from wuerstchen.errors import UserError
from wuerstchen.sampling import (
    EDIT,
    MAX_SEED,
    NO_STUDENTS,
    Sampling,
    check_seed,
    checked_request,
    checked_size,
    completed,
    one_for_each,
)

FULL = Sampling(
    guidance=4.0,
    guidance_interval=(0.0, 1.0),
    prior_steps=29,
    prior_sampler="ddpm",
    decoder_steps=12,
    decoder_sampler="ddpm",
    decoder_guidance=1.0,
    decoder_shift=2.0,
)
STUDENTS = Sampling(guidance=1.0, prior_steps=2, prior_sampler="few")
OF_STUDENT = {"guidance": 1.0, "prior_steps": 2, "prior_sampler": "few"}


def test_options_are_made_without_torch():
    code = "import sys, wuerstchen.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_are_found_where_users_import_them_from():
    import wuerstchen

    assert wuerstchen.Sampling is pipeline.Sampling is sampling.Sampling
    assert pipeline.Reconstruction is sampling.Reconstruction
    assert pipeline.LowMemory


def test_seeds_of_all_images_must_be_usable():
    assert list(checked_request(["a", "b"], 3, 2, 8)) == [3, 4, 5, 6]
    assert list(checked_request(["a"], [7, 1], 2, 8)) == [7, 1]
    check_seed(MAX_SEED, 1)
    with pytest.raises(UserError, match=f"from 0 to {MAX_SEED}"):
        check_seed(MAX_SEED, 2)


def test_a_size_is_two_sides_or_one():
    assert checked_size(None, 64) == (64, 64)
    assert checked_size(96, 64) == (96, 96)
    assert checked_size([96, 32], 64) == (96, 32)
    for wrong in ((1, 2, 3), "64", (64.0, 64)):
        with pytest.raises(UserError, match="size must be"):
            checked_size(wrong, 64)


def test_a_message_about_an_interval_shows_the_start_of_a_long_value():
    """A model.json may contain a list of any length."""
    with pytest.raises(UserError, match="guidance_interval must be two times") as caught:
        sampling.checked_interval("guidance_interval", [0.5] * 10**5)
    assert len(str(caught.value)) < 300


def test_one_value_stands_for_all_or_there_is_one_for_each():
    assert one_for_each("negative", ["x"], 2, 2) == ["x"] * 4
    assert one_for_each("negative", ["x", "y"], 2, 2) == ["x", "x", "y", "y"]
    with pytest.raises(UserError, match="negative has 3 values for 2 prompts"):
        one_for_each("negative", ["x", "y", "z"], 2, 2)


@pytest.mark.parametrize(
    ("asked", "beyond", "expected"),
    [
        ({}, (), OF_STUDENT),
        ({"decoder_steps": 5}, (), {**OF_STUDENT, "decoder_steps": 5}),
        ({"prior_sampler": "few", "prior_steps": 4}, (), {**OF_STUDENT, "prior_steps": 4}),
        ({"prior_sampler": "few", "guidance": 1.0}, (), OF_STUDENT),
        ({"full": True}, (), {"full": True}),
        ({}, ("a negative prompt",), {}),
        ({"guidance": 1.0}, (), {"guidance": 1.0}),
        ({"guidance_interval": (0.0, 0.5)}, (), {"guidance_interval": (0.0, 0.5)}),
        ({"prior_steps": 2}, (), {"prior_steps": 2}),
        ({"prior_sampler": "dpm"}, (), {"prior_sampler": "dpm"}),
    ],
)
def test_a_student_samples_unless_a_request_sets_what_it_does_not_support(asked, beyond, expected):
    assert completed(Sampling(**asked), FULL, STUDENTS, beyond) == Sampling(**{**vars(FULL), **expected})
    # A model without a student ignores all of this.
    assert completed(Sampling(**asked), FULL, NO_STUDENTS, beyond) == Sampling(**{**vars(FULL), **asked})


@pytest.mark.parametrize(
    ("asked", "beyond", "named"),
    [
        ({"guidance": 3.0}, (), "guidance 3"),
        ({"full": True}, (), "full"),
        ({}, ("a negative prompt", "a LoRA adapter"), "a negative prompt"),
    ],
)
def test_a_student_that_is_asked_for_is_not_replaced(asked, beyond, named):
    with pytest.raises(UserError, match=rf"few does not support {named}\. .* Leave out prior_sampler"):
        completed(Sampling(prior_sampler="few", **asked), FULL, STUDENTS, beyond)


BOTH = Sampling(**{**OF_STUDENT, "decoder_steps": 1, "decoder_sampler": "few", "decoder_guidance": 1.0})
OF_BOTH = {**OF_STUDENT, "decoder_steps": 1, "decoder_sampler": "few"}


@pytest.mark.parametrize(
    ("asked", "beyond", "expected"),
    [
        ({}, (), OF_BOTH),
        ({"full": True}, (), {"full": True}),
        ({"guidance": 3.0}, (), {"guidance": 3.0, "decoder_steps": 1, "decoder_sampler": "few"}),
        ({}, ("a negative prompt",), {"decoder_steps": 1, "decoder_sampler": "few"}),
        ({}, (EDIT,), {}),
        ({"decoder_steps": 1}, (), {**OF_STUDENT, "decoder_steps": 1}),
        ({"decoder_shift": 0.5}, (), {**OF_STUDENT, "decoder_shift": 0.5}),
        ({"decoder_sampler": "few", "decoder_steps": 2}, (), {**OF_BOTH, "decoder_steps": 2}),
        ({"decoder_sampler": "dpm"}, (), {**OF_STUDENT, "decoder_sampler": "dpm"}),
    ],
)
def test_each_stage_has_its_own_student(asked, beyond, expected):
    assert completed(Sampling(**asked), FULL, BOTH, beyond) == Sampling(**{**vars(FULL), **expected})
    for wrong in ({"decoder_guidance": 2.0}, {"full": True}):
        with pytest.raises(UserError, match="decoder_sampler few does not support"):
            completed(Sampling(decoder_sampler="few", **wrong), FULL, BOTH)
    with pytest.raises(UserError, match="decoder_sampler few does not support an image to start from"):
        completed(Sampling(decoder_sampler="few"), FULL, BOTH, (EDIT,))


def test_completed_settings_stay_as_they_are():
    """Stored settings reproduce the image, whichever network sampled it."""
    for asked in (Sampling(), Sampling(prior_steps=3), Sampling(full=True)):
        once = completed(asked, FULL, BOTH)
        assert completed(once, FULL, BOTH) == once
