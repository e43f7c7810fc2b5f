"""The prior pipeline against diffusers' own, step by step, and cases in which that one fails."""

import copy
import pickle

import numpy as np
import pytest
import torch

from wuerstchen.diffusers import DEFAULT_STAGE_C_TIMESTEPS
from wuerstchen.errors import UserError, UserNotice
from wuerstchen.models.prior import Prior
from wuerstchen.runtime.recorder import Recorder

SIZE = {"height": 128, "width": 100}


def states(rows: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(rows, 16, 24, generator=torch.Generator().manual_seed(seed))


def noise(rows: int, seed: int = 6) -> torch.Tensor:
    return torch.randn(rows, 3, 3, 3, generator=torch.Generator().manual_seed(seed))


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 + i) for i in range(count)]


PATTERNS = {
    "one prompt": lambda: {"prompt": "a cat", "generator": generators(1)[0]},
    "negative prompt": lambda: {"prompt": "a cat", "negative_prompt": "bad", "generator": generators(1)[0]},
    "no guidance": lambda: {"prompt": "a cat", "guidance_scale": 1.0, "generator": generators(1)[0]},
    "no guidance, negative ignored": lambda: {
        "prompt": "a cat",
        "negative_prompt": "bad",
        "guidance_scale": 0.0,
        "generator": generators(1)[0],
    },
    "published timesteps": lambda: {
        "prompt": "a cat",
        "timesteps": DEFAULT_STAGE_C_TIMESTEPS,
        "guidance_scale": 4.0,
        "generator": generators(1)[0],
    },
    "timesteps as a tensor": lambda: {
        "prompt": "a cat",
        "timesteps": torch.tensor([1.0, 0.9, 0.4, 0.1]),
        "generator": generators(1)[0],
    },
    "several images a prompt": lambda: {
        "prompt": "a cat",
        "num_images_per_prompt": 3,
        "generator": generators(1)[0],
    },
    "several prompts": lambda: {"prompt": ["a cat", "two dogs"], "generator": generators(1)[0]},
    "several prompts with negatives and images": lambda: {
        "prompt": ["a cat", "two dogs"],
        "negative_prompt": ["bad", "worse"],
        "num_images_per_prompt": 2,
        "generator": generators(1)[0],
    },
    "embeddings": lambda: {
        "prompt_embeds": states(2),
        "negative_prompt_embeds": states(2, seed=7),
        "num_images_per_prompt": 2,
        "generator": generators(1)[0],
    },
    "embeddings without negative": lambda: {"prompt_embeds": states(2), "generator": generators(1)[0]},
    "prompt with negative embeddings": lambda: {
        "prompt": "a cat",
        "negative_prompt_embeds": states(1),
        "generator": generators(1)[0],
    },
    "latents given": lambda: {
        "prompt": ["a", "b"],
        "latents": noise(2),
        "generator": generators(1)[0],
    },
    "generator for each": lambda: {"prompt": ["a", "b", "c"], "generator": generators(3)},
    "list of one generator": lambda: {"prompt": ["a", "b"], "generator": generators(1)},
    "one step": lambda: {"prompt": "a", "num_inference_steps": 1, "generator": generators(1)[0]},
    "as a tuple": lambda: {"prompt": "a", "return_dict": False, "generator": generators(1)[0]},
    "as an array": lambda: {"prompt": "a", "output_type": "np", "generator": generators(1)[0]},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_every_step_equals_diffusers(name, make_prior, theirs, assert_same_steps):
    pipe = make_prior()

    def call(pipe, recorder):
        given = {"num_inference_steps": 6, **SIZE, **PATTERNS[name]()}
        return pipe(callback_on_step_end=recorder, **given)

    result, expected = assert_same_steps(pipe, theirs.prior(pipe), call)
    assert type(result).__name__ == type(expected).__name__
    embeddings, reference = torch.as_tensor(result[0]), torch.as_tensor(expected[0])
    assert type(result[0]) is type(expected[0])
    torch.testing.assert_close(embeddings, reference, rtol=1e-4, atol=42e-4)


def test_numbers_of_steps_and_guidance_can_be_read_while_it_runs(make_prior):
    pipe = make_prior()
    seen = []

    def look(pipe, step, t, tensors):
        seen.append((pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance, float(t)))
        return tensors

    pipe("a", **SIZE, num_inference_steps=2, guidance_scale=3, callback_on_step_end=look)
    assert seen == [(2, 3.0, True, 1.0), (2, 3.0, True, 0.5)]


def test_latents_that_a_callback_returns_are_used(make_prior, theirs, assert_same_steps):
    pipe = make_prior()

    def call(pipe, recorder):
        def change(pipe, step, t, tensors):
            recorder(pipe, step, t, tensors)
            return {"latents": tensors["latents"] * 0.5} if step == 1 else {}

        generator = torch.Generator().manual_seed(0)
        return pipe("a", **SIZE, num_inference_steps=4, generator=generator, callback_on_step_end=change)

    assert_same_steps(pipe, theirs.prior(pipe), call)


@pytest.mark.parametrize("in_place", [False, True], ids=["returned", "changed in place"])
def test_text_states_that_a_callback_changes_are_used(in_place, make_prior, theirs, assert_same_steps):
    pipe = make_prior()

    def call(pipe, recorder):
        def change(pipe, step, t, tensors):
            recorder(pipe, step, t, tensors)
            text = tensors["text_encoder_hidden_states"]
            if step == 1 and in_place:
                text.mul_(-1)
            return {"text_encoder_hidden_states": -text} if step == 1 and not in_place else {}

        return pipe(
            "a",
            **SIZE,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["latents", "text_encoder_hidden_states"],
        )

    assert_same_steps(pipe, theirs.prior(pipe), call)


def test_negative_states_that_a_callback_returns_are_used(make_prior, seeded):
    """The same as passing text states with the second half replaced."""
    pipe = make_prior()
    negative = states(1)

    def run(name, changed):
        def change(pipe, step, t, tensors):
            return {name: changed(tensors[name])} if step == 0 else {}

        return pipe(
            "a",
            **SIZE,
            num_inference_steps=3,
            generator=seeded(),
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=[name],
        ).image_embeddings

    exchanged = run("negative_prompt_embeds", lambda old: negative)
    expected = run("text_encoder_hidden_states", lambda old: torch.cat([old[:1], negative]))
    assert torch.equal(exchanged, expected)
    assert not torch.allclose(exchanged, run("negative_prompt_embeds", lambda old: old), atol=1e-2)


@pytest.mark.parametrize("halves_text", [True, False])
def test_a_callback_can_turn_guidance_off(halves_text, make_prior, theirs, assert_same_steps):
    """In diffusers the callback must halve the text states too. Here both ways work."""
    pipe = make_prior()
    reference = theirs.prior(pipe)

    def call(pipe, recorder):
        def change(pipe, step, t, tensors):
            recorder(pipe, step, t, tensors)
            if step != 1:
                return {}
            pipe._guidance_scale = 0.0
            text = tensors["text_encoder_hidden_states"]
            return {"text_encoder_hidden_states": text[:1]} if halves_text or pipe is reference else {}

        return pipe(
            "a",
            **SIZE,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["latents", "text_encoder_hidden_states"],
        )

    assert_same_steps(pipe, reference, call)


def test_a_callback_cannot_turn_guidance_on(make_prior):
    def change(pipe, step, t, tensors):
        pipe._guidance_scale = 4.0
        return tensors

    with pytest.raises(UserError, match="if the call started with guidance"):
        make_prior()("a", **SIZE, guidance_scale=1.0, callback_on_step_end=change)


def test_a_callback_may_return_nothing(make_prior, seeded):
    pipe = make_prior()
    run = {**SIZE, "num_inference_steps": 2}
    with_callback = pipe("a", **run, generator=seeded(), callback_on_step_end=lambda *_: None)
    assert torch.equal(with_callback[0], pipe("a", **run, generator=seeded())[0])


def test_recordings_are_invalidated_after_a_callback(make_prior, monkeypatch):
    """Otherwise a recorded pass would keep an adapter that a callback removed, or its old scale."""
    invalidated = []
    monkeypatch.setattr(Recorder, "invalidate", lambda recorder: invalidated.append(recorder.network))
    pipe = make_prior()
    pipe("a", **SIZE, num_inference_steps=3)
    assert not invalidated
    pipe("a", **SIZE, num_inference_steps=3, callback_on_step_end=lambda *_: None)
    assert invalidated == [pipe.prior] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_of_a_used_pipeline_is_independent(copied, make_prior, seeded):
    """It used the text encoder of the first."""
    pipe = make_prior()
    run = {**SIZE, "num_inference_steps": 1}
    expected = pipe("a", **run, generator=seeded())[0]
    twin = copied(pipe)
    assert torch.equal(twin("a", **run, generator=seeded())[0], expected)
    with torch.no_grad():
        for parameter in twin.text_encoder.parameters():
            parameter.zero_()
    assert not torch.allclose(twin("a", **run, generator=seeded())[0], expected)
    assert torch.equal(pipe("a", **run, generator=seeded())[0], expected)


def test_recordings_of_replaced_networks_are_dropped(make_prior):
    """They kept a replaced network, and the memory of a device that was no longer used."""
    pipe = make_prior()
    pipe("a", **SIZE, num_inference_steps=1)
    assert set(pipe._recorders) == {pipe.text_encoder, pipe.prior}
    pipe.prior = copy.deepcopy(pipe.prior)
    pipe("a", **SIZE, num_inference_steps=1)
    assert set(pipe._recorders) == {pipe.text_encoder, pipe.prior}
    assert not pipe.to("cpu")._recorders


@pytest.mark.parametrize(("steps", "seen"), [(None, [0, 1, 2, 3, 4]), (2, [0, 2, 4])])
def test_the_deprecated_callback_works_without_callback_steps(steps, seen, make_prior):
    calls = []
    with pytest.warns(FutureWarning, match="deprecated"):
        make_prior()(
            "a",
            **SIZE,
            num_inference_steps=5,
            callback=lambda step, t, latents: calls.append((step, tuple(latents.shape))),
            callback_steps=steps,
        )
    assert calls == [(step, (1, 3, 3, 3)) for step in seen]


@pytest.mark.parametrize("negative", ["embeddings", "text"])
def test_negatives_without_guidance_are_ignored(negative, make_prior, seeded):
    pipe = make_prior()
    run = {**SIZE, "num_inference_steps": 2, "guidance_scale": 1.0}
    given = {"negative_prompt_embeds": states(1)} if negative == "embeddings" else {"negative_prompt": 3}
    assert torch.equal(
        pipe("a", **run, **given, generator=seeded())[0], pipe("a", **run, generator=seeded())[0]
    )


def test_a_negative_prompt_applies_to_all_prompts_and_embeddings(make_prior, seeded):
    pipe = make_prior()
    run = {**SIZE, "num_inference_steps": 2}
    once = pipe(["a", "b"], **run, negative_prompt="bad", generator=seeded())[0]
    each = pipe(["a", "b"], **run, negative_prompt=["bad", "bad"], generator=seeded())[0]
    assert torch.equal(once, each)
    embeds, _ = pipe.encode_prompt(prompt=["a", "b"], num_images_per_prompt=1)
    torch.testing.assert_close(
        pipe(prompt_embeds=embeds, **run, negative_prompt="bad", generator=seeded())[0], once
    )


def test_encode_prompt_repeats_each_prompt_for_its_images(make_prior, theirs):
    pipe = make_prior()
    given = {"num_images_per_prompt": 2, "do_classifier_free_guidance": True, "prompt": ["a", "b"]}
    ours, reference = pipe.encode_prompt("cpu", **given), theirs.prior(pipe).encode_prompt("cpu", **given)
    for own, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(own, other)


def test_embeddings_need_no_text_encoder(make_prior, seeded):
    pipe = make_prior()
    embeds, negative = pipe.encode_prompt(prompt="a")
    run = {**SIZE, "num_inference_steps": 2}
    expected = pipe("a", **run, generator=seeded())[0]
    pipe.text_encoder = pipe.tokenizer = None
    result = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, **run, generator=seeded())[0]
    torch.testing.assert_close(result, expected)
    with pytest.raises(UserError, match="has no text encoder"):
        pipe("a", **run)


def test_the_text_that_is_cut_off_is_named(make_prior):
    with pytest.warns(UserNotice, match="This part was cut off: 'o p q'"):
        make_prior()("a b c d e f g h i j k l m n o p q", **SIZE, num_inference_steps=1)


@pytest.mark.parametrize(("side", "positions"), [(1, 1), (42, 1), (43, 2), (128, 3), (1000, 24), (1024, 24)])
def test_sides_of_embeddings_are_rounded_up(side, positions, make_prior):
    embeddings = make_prior()("a", height=side, width=8, num_inference_steps=1)[0]
    assert embeddings.shape == (1, 3, positions, 1)


def test_own_statistics_are_used(make_prior, seeded):
    run = {**SIZE, "num_inference_steps": 2}
    published = make_prior()("a", **run, generator=seeded())[0]
    own = make_prior(latent_mean=2.0, latent_std=3.0)("a", **run, generator=seeded())[0]
    torch.testing.assert_close(own, (published + 1) / 42 * 2 - 3)


@pytest.mark.parametrize(
    ("text", "network", "given"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float64),
        (torch.float16, torch.float16, torch.float32),
    ],
)
def test_parts_and_inputs_may_have_different_dtypes(text, network, given, make_prior):
    pipe = make_prior()
    pipe.text_encoder.to(text)
    pipe.prior.to(network)
    embeddings = pipe("a", **SIZE, num_inference_steps=3, latents=noise(1).to(given))[0]
    assert embeddings.dtype == network
    assert embeddings.isfinite().all()
    embeds = pipe(prompt_embeds=states(1).to(given), **SIZE, num_inference_steps=3)[0]
    assert embeds.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_steps_in_half_precision_follow_the_steps_of_fp32(dtype, make_prior, seeded):
    """Rounded to bf16, neighbouring timesteps of 1000 are the same number."""
    pipe = make_prior()
    seen = []
    step = pipe.scheduler.step

    def watched(**given):
        seen.append(float(pipe.scheduler.previous_timestep(given["timestep"])[0]))
        return step(**given)

    pipe.scheduler.step = watched
    times = torch.linspace(1, 0, 1001)[700:760]
    run = {"height": 8, "width": 8, "guidance_scale": 1.0, "generator": seeded()}
    assert pipe.to(dtype)("a", timesteps=times, **run)[0].isfinite().all()
    assert seen == times[1:].tolist()


class Echo(Prior):
    """A prior on the meta device, which has no autocast."""

    def context(self, text, mask=None):
        assert text.device.type == "meta"
        return []

    def forward(self, x, r, context):
        return x * r.view(-1, 1, 1, 1)


def test_no_step_synchronises(make_prior):
    """The meta device has no values to read."""
    pipe = make_prior()
    pipe.prior = Echo(pipe.prior.config).to("meta")
    embeddings = pipe("a", **SIZE, num_images_per_prompt=2, num_inference_steps=3, generator=generators(2))[0]
    assert embeddings.device.type == "meta"
    assert embeddings.shape == (2, 3, 3, 3)


def test_a_compiled_network_gives_the_same(make_prior, seeded):
    pipe = make_prior()
    run = {**SIZE, "num_inference_steps": 2}
    expected = pipe("a", **run, generator=seeded())[0]
    pipe.prior = torch.compile(pipe.prior, backend="eager")
    with torch.compiler.set_stance("force_eager"):  # the type checks in tests do not compile
        torch.testing.assert_close(pipe("a", **run, generator=seeded())[0], expected)
    assert pipe.dtype == torch.float32


BAD = {
    "no prompt": ({"prompt": None}, ValueError, "Provide either `prompt` or `prompt_embeds`"),
    "prompt is a number": ({"prompt": 3}, TypeError, "'prompt' must be of type"),
    "prompt holds a number": ({"prompt": ["a", 3]}, TypeError, "'prompt' must contain only"),
    "no prompts": ({"prompt": []}, ValueError, r"prompt must have at least one text, got \[\]"),
    "prompt twice": ({"prompt_embeds": states(1)}, ValueError, "Cannot forward both `prompt`"),
    "negative twice": (
        {"negative_prompt": "b", "negative_prompt_embeds": states(1)},
        ValueError,
        "Cannot forward both `negative_prompt`",
    ),
    "negative is a number": ({"negative_prompt": 3}, TypeError, "'negative_prompt' must be of type"),
    "negatives too few": (
        {"prompt": ["a", "b"], "negative_prompt": ["c"]},
        ValueError,
        "negative_prompt must have the prompt's batch size 2, got 1",
    ),
    "embeddings of two lengths": (
        {"prompt": None, "prompt_embeds": states(1)[:, :9], "negative_prompt_embeds": states(1)},
        ValueError,
        "must have the same shape",
    ),
    "embeddings too wide": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 25)},
        ValueError,
        r"must have the shape \(batch, positions, 24\)",
    ),
    "embeddings as a list": ({"prompt": None, "prompt_embeds": [1.0]}, TypeError, "'prompt_embeds' must be"),
    "steps are a float": (
        {"num_inference_steps": 2.0},
        TypeError,
        "'num_inference_steps' must be of type 'int'",
    ),
    "steps below 0": (
        {"num_inference_steps": -1},
        ValueError,
        "num_inference_steps must be at least 0, got -1",
    ),
    "timesteps of DDPM": (
        {"timesteps": [999, 500, 0]},
        ValueError,
        "timesteps must be a list of numbers that decrease",
    ),
    "timesteps are text": ({"timesteps": "all"}, TypeError, "'timesteps' must be a list of numbers"),
    "timesteps rise": (
        {"timesteps": [0.1, 0.9]},
        ValueError,
        "timesteps must be a list of numbers that decrease",
    ),
    "guidance is text": ({"guidance_scale": "strong"}, TypeError, "'guidance_scale' must be a number"),
    "guidance is nan": ({"guidance_scale": float("nan")}, ValueError, "must be a finite number"),
    "no images": (
        {"num_images_per_prompt": 0},
        ValueError,
        "num_images_per_prompt must be at least 1, got 0",
    ),
    "height is text": ({"height": "128"}, TypeError, "'height' must be of type 'int'"),
    "width is nothing": ({"width": 0}, ValueError, "width must be at least 1 pixel, got 0"),
    "latents of another size": (
        {"latents": torch.zeros(1, 3, 4, 4)},
        ValueError,
        r"Unexpected latents shape, got \(1, 3, 4, 4\), expected \(1, 3, 3, 3\)",
    ),
    "latents as a list": ({"latents": [0.0]}, TypeError, "'latents' must be of type 'torch.Tensor'"),
    "a seed for a generator": ({"generator": 3}, TypeError, "'generator' must be a torch.Generator"),
    "generators too few": (
        {"prompt": ["a", "b", "c"], "generator": generators(2)},
        ValueError,
        "1 or 3 generators for a batch of 3, got 2",
    ),
    "output type unknown": (
        {"output_type": "bogus"},
        ValueError,
        "output_type must be one of .*, got 'bogus'",
    ),
    "callback input unknown": (
        {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
        ValueError,
        r"`callback_on_step_end_tensor_inputs` has to be in .* but found \['noise'\]",
    ),
    "callback is no function": ({"callback_on_step_end": 3}, TypeError, "must be a function"),
    "callback returns a tensor": (
        {"callback_on_step_end": lambda pipe, step, t, tensors: tensors["latents"]},
        TypeError,
        "A callback must return a dict",
    ),
    "argument unknown": ({"guidance": 4.0}, TypeError, "unexpected keyword argument 'guidance'"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_arguments_are_refused(name, make_prior):
    changed, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make_prior()(**{"prompt": "a", **SIZE, "num_inference_steps": 1, **changed})


@pytest.mark.parametrize("in_place", [False, True], ids=["returned", "changed in place"])
def test_changes_take_effect_in_inference_mode(in_place, make_prior, seeded):
    """In inference mode torch does not track changes of tensors."""
    pipe = make_prior()

    def run():
        def change(pipe, step, t, tensors):
            text = tensors["text_encoder_hidden_states"]
            if in_place:
                text.neg_()
                return {}
            return {"text_encoder_hidden_states": -text}

        names = ["text_encoder_hidden_states", "negative_prompt_embeds"]
        given = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
        return pipe("a", **SIZE, num_inference_steps=3, generator=seeded(), **given)[0]

    expected = run()
    with torch.inference_mode():
        assert torch.equal(run(), expected)


def test_numpy_numbers_are_accepted(make_prior):
    size, count = np.int64(128), np.int32(2)
    embeddings = make_prior()(
        "a", size, size, count, guidance_scale=np.float32(4), num_images_per_prompt=count
    )[0]
    assert embeddings.shape == (2, 3, 3, 3)


def test_parts_that_do_not_fit_are_refused(make_prior, make_decoder):
    with pytest.raises(UserError, match=r"resolution_multiple must be above 0, got 0\.0"):
        make_prior(resolution_multiple=0.0)
    pipe = make_prior()
    pipe.text_encoder = make_decoder().text_encoder
    with pytest.raises(UserError, match=r"states are 20 wide. The prior reads states 24 wide"):
        pipe("a", **SIZE, num_inference_steps=1)
