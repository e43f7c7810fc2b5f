"""The scheduler against diffusers' own, and cases in which that one fails."""

import copy
import json
import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen_prior import (
    DEFAULT_STAGE_C_TIMESTEPS as THEIR_TIMESTEPS,
)

from wuerstchen.diffusers import DEFAULT_STAGE_C_TIMESTEPS, DDPMWuerstchenScheduler


def step(scheduler, t, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    sample, noise = (torch.randn(2, 3, 4, 4, generator=generator).to(dtype) for _ in range(2))
    return scheduler.step(noise, t, sample, generator=generator).prev_sample


@pytest.mark.parametrize("scaler", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("t", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_step_equals_diffusers(scaler, t, dtype):
    results = []
    for kind in (DDPMWuerstchenScheduler, diffusers.DDPMWuerstchenScheduler):
        scheduler = kind(scaler=scaler, s=0.01)
        scheduler.set_timesteps(5)
        results.append(step(scheduler, torch.full((2,), t), dtype))
    assert results[0].dtype == dtype
    torch.testing.assert_close(*results, rtol=1e-5 if dtype != torch.float16 else 2e-3, atol=1e-5)


def test_published_timesteps_equal_diffusers():
    ours, theirs = DDPMWuerstchenScheduler(), diffusers.DDPMWuerstchenScheduler()
    ours.set_timesteps(timesteps=DEFAULT_STAGE_C_TIMESTEPS)
    theirs.set_timesteps(timesteps=THEIR_TIMESTEPS)
    assert torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda x: torch.tensor(x).double()])
def test_timesteps_of_every_kind(kind):
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(timesteps=kind([1, 0.5, 0.0]))
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.timesteps.tolist() == [1, 0.5, 0.0]


def test_noise_is_added_as_in_diffusers():
    x, noise, t = torch.randn(2, 3, 4, 4).half(), torch.randn(2, 3, 4, 4).half(), torch.tensor([0.1, 0.9])
    ours = DDPMWuerstchenScheduler().add_noise(x, noise, t)
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours, diffusers.DDPMWuerstchenScheduler().add_noise(x, noise, t))


def test_the_length_is_the_number_of_timesteps():
    scheduler = DDPMWuerstchenScheduler()
    assert len(scheduler) == 0
    assert scheduler  # true even without timesteps
    scheduler.set_timesteps(5)
    assert len(scheduler) == 6


def test_one_timestep_applies_to_the_batch():
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(5)
    assert torch.equal(step(scheduler, torch.tensor(0.6)), step(scheduler, torch.full((2,), 0.6)))


def test_each_row_may_have_its_own_timestep():
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(5)
    mixed = step(scheduler, torch.tensor([1.0, 0.4]))
    assert torch.equal(mixed[0], step(scheduler, torch.tensor([1.0, 1.0]))[0])
    assert torch.equal(mixed[1], step(scheduler, torch.tensor([0.4, 0.4]))[1])


@pytest.mark.parametrize("last", [0.0, 0.2])
def test_after_the_last_timestep_nothing_changes(last):
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(timesteps=[1.0, 0.5, last])
    sample = torch.randn(2, 3, 4, 4)
    result = scheduler.step(torch.randn(2, 3, 4, 4), torch.full((2,), last), sample)
    assert torch.equal(result.prev_sample, sample)


def test_results_are_read_by_name_key_and_position():
    scheduler = DDPMWuerstchenScheduler()
    scheduler.set_timesteps(2)
    result = scheduler.step(torch.ones(1, 2), torch.tensor([0.5]), torch.ones(1, 2))
    assert result.prev_sample is result["prev_sample"] is result[0] is result.to_tuple()[0]
    assert list(result) == ["prev_sample"]
    result["prev_sample"] = torch.zeros(1, 2)
    assert not result.prev_sample.any()
    for call in (lambda: result["sample"], lambda: result.__setitem__("sample", 1)):
        with pytest.raises(KeyError):
            call()
    plain = scheduler.step(torch.ones(1, 2), torch.tensor([0.5]), torch.ones(1, 2), return_dict=False)
    assert isinstance(plain, tuple)


def test_diffusers_reads_and_writes_the_same_settings(tmp_path):
    ours = DDPMWuerstchenScheduler(scaler=2.0, s=0.01)
    ours.save_pretrained(tmp_path / "new")
    theirs = diffusers.DDPMWuerstchenScheduler.from_pretrained(tmp_path / "new")
    assert (theirs.config.scaler, theirs.config.s) == (2.0, 0.01)
    back = DDPMWuerstchenScheduler.from_config(theirs.config, s=0.02)
    assert dict(back.config) == {"scaler": 2.0, "s": 0.02}
    written = json.loads((tmp_path / "new" / "scheduler_config.json").read_text())
    assert written["_class_name"] == "DDPMWuerstchenScheduler"


def test_settings_do_not_change():
    config = DDPMWuerstchenScheduler().config
    with pytest.raises(AttributeError, match="fixed"):
        config.s = 1.0
    for change in (lambda: config.update(s=1.0), lambda: config.pop("s"), lambda: config.__setitem__("s", 1)):
        with pytest.raises(AttributeError, match="fixed"):
            change()
    with pytest.raises(AttributeError, match=r"no setting 'betas'\. Use one of scaler, s"):
        config.betas  # noqa: B018
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config
        assert type(again) is type(config)


def test_settings_make_a_scheduler_of_diffusers():
    """The usual way to replace a scheduler. diffusers takes anything but a dict for a name on the hub."""
    ours = DDPMWuerstchenScheduler(s=0.01)
    assert diffusers.DDPMWuerstchenScheduler.from_config(ours.config).config.s == 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.set_timesteps(-1), "num_inference_steps must be at least 0, got -1"),
        (lambda s: s.set_timesteps(), "num_inference_steps must be at least 0, got None"),
        (
            lambda s: s.set_timesteps(timesteps=[1.0, float("nan")]),
            "timesteps must be a list of numbers that decrease",
        ),
        (
            lambda s: s.set_timesteps(timesteps=torch.ones(1, 2)),
            "timesteps must be a list of numbers that decrease",
        ),
        (lambda s: step(s, torch.tensor([0.5])), "Call set_timesteps first"),
        (lambda s: DDPMWuerstchenScheduler(s=-1.0), "s must be .* got -1.0"),
    ],
)
def test_invalid_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(DDPMWuerstchenScheduler())


def test_pipelines_take_schedulers_without_custom_timesteps(make_prior, seeded):
    class Plain(diffusers.DDPMWuerstchenScheduler):
        def set_timesteps(self, num_inference_steps, device=None):
            super().set_timesteps(num_inference_steps, device=device)

    pipe = make_prior()
    run = {"height": 128, "width": 128, "num_inference_steps": 3}
    expected = pipe("a", **run, generator=seeded())[0]
    pipe.scheduler = Plain()
    torch.testing.assert_close(pipe("a", **run, generator=seeded())[0], expected, rtol=1e-4, atol=1e-3)


def test_a_pipeline_with_a_scheduler_of_another_kind_is_not_saved(make_prior, tmp_path):
    pipe = make_prior()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match="A DPMSolverMultistepScheduler cannot be saved: it has no s"):
        pipe.save_pretrained(tmp_path)


def test_pipelines_take_diffusers_scheduler(make_prior, seeded):
    pipe = make_prior()
    run = {"height": 128, "width": 128, "num_inference_steps": 3}
    expected = pipe("a", **run, generator=seeded())[0]
    pipe.scheduler = diffusers.DDPMWuerstchenScheduler()
    torch.testing.assert_close(pipe("a", **run, generator=seeded())[0], expected, rtol=1e-4, atol=1e-3)
