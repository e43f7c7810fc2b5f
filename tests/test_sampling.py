"""Checks of prompts, seeds and sizes."""

import subprocess
import sys

import pytest

from wuerstchen import pipeline, sampling
from wuerstchen.errors import UserError
from wuerstchen.sampling import MAX_SEED, check_seed, checked_request, checked_size, one_for_each


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
