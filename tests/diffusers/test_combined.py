"""The combined pipeline against diffusers' own, and cases in which that one fails."""

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen.diffusers import DEFAULT_STAGE_C_TIMESTEPS
from wuerstchen.errors import UserError, UserNotice

SIZE = {"height": 128, "width": 128}


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 + i) for i in range(count)]


def seeded_globally() -> None:
    torch.manual_seed(3)


def run(pipe, **given):
    steps = {"prior_num_inference_steps": 2, "num_inference_steps": 2, "output_type": "pt"}
    given = {"prompt": "a", **SIZE, **steps, "generator": generators(1)[0], **given}
    return pipe(**given).images


PATTERNS = {
    "one generator for both": lambda: {"prompt": "a cat"},
    "seed of all of torch": lambda: {"prompt": "a cat", "generator": seeded_globally()},
    "negative": lambda: {"prompt": "a cat", "negative_prompt": "bad", "decoder_guidance_scale": 2.0},
    "no guidance": lambda: {"prompt": "a", "prior_guidance_scale": 1.0},
    "published recipe": lambda: {
        "prompt": "a",
        "prior_timesteps": DEFAULT_STAGE_C_TIMESTEPS,
        "decoder_timesteps": [1.0, 0.6, 0.2, 0.0],
    },
    "several images": lambda: {"prompt": "a", "num_images_per_prompt": 2},
    "embeddings": lambda: {"prompt": None, "prompt_embeds": torch.ones(1, 16, 24)},
    "embeddings and prompt": lambda: {"prompt": "a", "prompt_embeds": torch.ones(1, 16, 24)},
    "latents": lambda: {"prompt": "a", "latents": torch.ones(1, 3, 3, 3)},
    "generator for each": lambda: {"prompt": "a", "num_images_per_prompt": 2, "generator": generators(2)},
    "as latents": lambda: {"prompt": "a", "output_type": "latent"},
    "not square": lambda: {"prompt": "a", "height": 128, "width": 256},
}


@pytest.mark.parametrize("name", ["one generator for both", "negative", "published recipe", "several images"])
def test_torchs_defaults_change_nothing(name, make_combined, foreign_defaults):
    pipe, given = make_combined(), PATTERNS[name]()
    expected = run(pipe, **given, generator=generators(1)[0])
    with foreign_defaults(torch.float64):
        found = run(pipe, **given, generator=[torch.Generator("cpu").manual_seed(10)])
    assert torch.equal(expected, found)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_step_equals_diffusers(name, make_combined, theirs, assert_same_steps):
    pipe = make_combined()

    def call(pipe, recorder):
        priors = type(recorder)()
        given = {
            "prior_num_inference_steps": 4,
            "num_inference_steps": 3,
            "output_type": "pt",
            "generator": generators(1)[0],
            **SIZE,
            **PATTERNS[name](),
        }
        images = pipe(prior_callback_on_step_end=priors, callback_on_step_end=recorder, **given).images
        recorder.latents = [*priors.latents, *recorder.latents]
        return images

    reference = theirs.combined(pipe.prior_pipe, pipe.decoder_pipe)
    images, expected = assert_same_steps(pipe, reference, call)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-3)


def test_defaults_are_those_of_diffusers(make_prior, make_decoder, make_combined, theirs):
    import inspect

    ours = (make_prior(), make_decoder(), make_combined())
    others = (theirs.prior(ours[0]), theirs.decoder(ours[1]), theirs.combined(*ours[:2]))
    for own, other in zip(ours, others, strict=True):
        own_parameters = inspect.signature(own.__call__).parameters
        for name, parameter in inspect.signature(other.__call__).parameters.items():
            if name == "kwargs":
                continue
            default = own_parameters[name].default
            assert not isinstance(default, list), name  # all calls would share it, as in diffusers
            assert (list(default) if isinstance(default, tuple) else default) == parameter.default, name
        names = list(own_parameters)
        expected = [name for name in inspect.signature(other.__call__).parameters if name != "kwargs"]
        assert names[: len(expected)] == expected
        assert set(own.components) == set(other.components)
        own_init = list(inspect.signature(type(own).__init__).parameters)
        their_init = list(inspect.signature(type(other).__init__).parameters)
        assert own_init[: len(their_init)] == their_init


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_several_prompts_and_images(guidance, make_combined):
    """Each image equals the one generated alone. diffusers fails."""
    pipe = make_combined()
    given = {"negative_prompt": "bad", "decoder_guidance_scale": guidance}
    together = run(pipe, prompt=["a", "b"], num_images_per_prompt=2, generator=generators(4), **given)
    assert together.shape == (4, 3, 128, 128)
    for number, prompt in enumerate("aabb"):
        alone = run(pipe, prompt=prompt, generator=generators(4)[number], **given)
        torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(136, 128), (8, 16), (200, 264), (256, 1000)])
def test_sides_can_be_any_multiple_of_8(height, width, make_combined):
    """The centre of the decoder's output. diffusers fails at most sizes, or rounds them up."""
    pipe = make_combined()
    images = run(pipe, height=height, width=width)
    assert tuple(images.shape[2:]) == (height, width)
    generator = generators(1)[0]
    embeddings = pipe.prior_pipe(
        "a", height, width, num_inference_steps=2, guidance_scale=4.0, generator=generator
    ).image_embeddings
    whole = pipe.decoder_pipe(
        embeddings, "a", num_inference_steps=2, output_type="pt", generator=generator
    ).images
    top, left = (whole.shape[2] - height) // 2, (whole.shape[3] - width) // 2
    assert top % 2 == left % 2 == 0
    assert torch.equal(images, whole[:, :, top : top + height, left : left + width])


def test_arrays_and_pil_images_have_the_size_asked_for(make_combined):
    pipe = make_combined()
    array = run(pipe, height=136, width=144, output_type="np")
    assert array.shape == (1, 136, 144, 3)
    (image,) = run(pipe, height=136, width=144, output_type="pil")
    assert isinstance(image, Image.Image)
    assert np.abs(np.asarray(image, dtype=float) - array[0] * 255).max() <= 0.51


def test_a_tuple_on_request(make_combined):
    """diffusers returns the images without a tuple."""
    result = make_combined()("a", **SIZE, output_type="pt", return_dict=False, prior_num_inference_steps=1)
    assert isinstance(result, tuple)
    assert result[0].shape == (1, 3, 128, 128)


def test_the_numbers_of_both_pipelines_are_used(make_combined):
    """diffusers uses its defaults instead."""
    own = {"latent_mean": 2.0, "latent_std": 3.0, "resolution_multiple": 64.0}
    pipe = make_combined(own, {"latent_dim_scale": 16.0})
    assert dict(pipe.config) == {"latent_dim_scale": 16.0, **{f"prior_{k}": v for k, v in own.items()}}
    sizes = []

    def look(pipe, step, t, tensors):
        sizes.append(tuple(tensors["latents"].shape[2:]))

    run(pipe, prior_callback_on_step_end=look, callback_on_step_end=look)
    assert sizes == [(2, 2), (2, 2), (32, 32), (32, 32)]


def test_a_replaced_component_is_used(make_combined):
    pipe = make_combined()
    expected = run(pipe)
    pipe.prior_prior = torch.compile(pipe.prior_prior, backend="eager")
    pipe.prior_pipe.scheduler, pipe.decoder = pipe.scheduler, torch.compile(pipe.decoder, backend="eager")
    assert pipe.prior_scheduler is pipe.scheduler
    assert pipe.components["decoder"] is pipe.decoder_pipe.decoder
    assert pipe.prior_pipe.prior is pipe.prior_prior
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(run(pipe), expected)


def test_moves_and_converts_every_network(make_combined):
    pipe = make_combined()
    assert pipe.to(torch.bfloat16) is pipe
    assert pipe.dtype == pipe.prior_pipe.dtype == pipe.prior_text_encoder.dtype == torch.bfloat16
    assert run(pipe).isfinite().all()
    assert {p.device.type for n in pipe._networks().values() for p in n.parameters()} == {"cpu"}
    pipe.to("meta", torch.float16)
    assert pipe.device.type == pipe.prior_pipe.device.type == "meta"
    assert pipe.dtype == torch.float16
    for twice in ({"device": "cpu"}, {"torch_device": "cpu"}):
        with pytest.raises(ValueError, match="device was given twice"):
            pipe.to("meta", **twice)


def test_progress_bars_can_be_set_and_hidden(make_combined, capsys):
    pipe = make_combined()
    run(pipe)
    assert capsys.readouterr().err == ""
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2]
    assert pipe.progress_bar(total=3).total == 3
    pipe.set_progress_bar_config(desc="sampling")
    run(pipe)
    assert capsys.readouterr().err.count("sampling:   0%") == 2  # a slow bar may end twice
    with pytest.raises(ValueError, match="either `iterable` or `total`"):
        pipe.progress_bar()


def test_attention_options_change_nothing(make_combined):
    pipe = make_combined()
    for enable in (pipe.enable_xformers_memory_efficient_attention, pipe.enable_attention_slicing):
        with pytest.warns(UserNotice, match="always memory-efficient"):
            enable()
    pipe.disable_xformers_memory_efficient_attention()
    pipe.disable_attention_slicing()


def test_offloaded_networks_are_on_the_device_one_after_another(make_combined, monkeypatch):
    pipe = make_combined()
    expected = run(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    names = {id(network): name for name, network in pipe._networks().items()}
    visits = []
    for half in (pipe.prior_pipe, pipe.decoder_pipe):
        using, release = half._residence.using, half._residence.release

        def watched(*networks, using=using):
            visits.extend(names[id(network)] for network in networks)
            return using(*networks)

        def released(release=release):
            visits.append("all back")
            release()

        monkeypatch.setattr(half._residence, "using", watched)
        monkeypatch.setattr(half._residence, "release", released)
    step = {"prior_callback_on_step_end": lambda *_: visits.append("step")}
    assert torch.equal(run(pipe, **step), expected)
    order = ["prior_text_encoder", "prior_prior", "text_encoder", "decoder", "vqgan"]
    assert list(dict.fromkeys(visit for visit in visits if visit in order)) == order
    # After each pipeline: otherwise the prior would stay on the device beside the decoder.
    assert visits[visits.index("text_encoder") - 1] == "all back"
    assert visits[-2:] == ["all back"] * 2  # before Stage A and after it


def test_offloading_a_layer_at_a_time_gives_the_same(make_combined):
    pipe = make_combined()
    expected = run(pipe)
    pipe.enable_sequential_cpu_offload(device=torch.device("cpu"))
    assert torch.equal(run(pipe), expected)
    assert pipe._execution_device == torch.device("cpu")
    pipe.to("cpu")
    assert pipe.prior_pipe._residence is pipe.decoder_pipe._residence is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_offloading_needs_a_device(make_combined):
    with pytest.raises(ValueError, match="no accelerator to offload from"):
        make_combined().enable_model_cpu_offload()
    with pytest.raises(ValueError, match="'cuda:0' is not available"):
        make_combined().enable_sequential_cpu_offload(gpu_id=0, device="cuda:0")
    with pytest.raises(ValueError, match=r"device 'cuda' is not available\. Use cpu"):
        make_combined().to("cuda")


def test_offloading_to_two_devices_is_refused(make_combined):
    with pytest.raises(ValueError, match="device=meta:0 does not match gpu_id=1"):
        make_combined().enable_sequential_cpu_offload(gpu_id=1, device="meta:0")
    with pytest.raises(ValueError, match="device 'gpu' is not available"):
        make_combined().enable_model_cpu_offload(device="gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [None, "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_a_cpu_generator_gives_the_same_on_the_gpu(offload, make_combined, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions as exact as the CPU's
    pipe = make_combined()
    given = {"prompt": ["a", "b"], "decoder_guidance_scale": 2.0}
    expected = run(pipe, **given)
    if offload is None:
        pipe.to("cuda")
    else:
        getattr(pipe, offload)()
    images = run(pipe, **given)
    assert images.device.type == "cuda"
    torch.testing.assert_close(images.cpu(), expected, rtol=1e-2, atol=1e-2)
    assert pipe.device.type == ("cuda" if offload is None else "cpu")


def never(*_):
    pytest.fail("sampled all the same")


BAD = {
    "height": ({"height": 130}, ValueError, "height must be a multiple of 8, got 130"),
    "width": ({"width": 0}, ValueError, "width must be at least 1 pixel, got 0"),
    "output type": ({"output_type": "jpeg"}, ValueError, "Only the output types"),
    "decoder steps": ({"num_inference_steps": 2.5}, TypeError, "'num_inference_steps' must be of type 'int'"),
    "prior steps": (
        {"prior_num_inference_steps": "many"},
        TypeError,
        "'prior_num_inference_steps' must be of type 'int'",
    ),
    "decoder timesteps": (
        {"decoder_timesteps": [9, 0]},
        ValueError,
        "timesteps must be a list of numbers that decrease",
    ),
    "decoder guidance": ({"decoder_guidance_scale": "b"}, TypeError, "'decoder_guidance_scale' must be"),
    "negative of the decoder": (
        {"decoder_guidance_scale": 2.0, "prior_guidance_scale": 1.0, "negative_prompt": 3},
        TypeError,
        "'negative_prompt' must be",
    ),
    "decoder callback": (
        {"callback_on_step_end_tensor_inputs": ["embeddings"]},
        ValueError,
        "`callback_on_step_end_tensor_inputs` has to be in",
    ),
    "prior callback": (
        {"prior_callback_on_step_end_tensor_inputs": ["image_embeddings"]},
        ValueError,
        "`prior_callback_on_step_end_tensor_inputs` has to be in",
    ),
    "prompts and embeddings": (
        {"prompt": ["a", "b"], "prompt_embeds": torch.ones(3, 16, 24)},
        ValueError,
        "as many prompt_embeds as prompts, got 3 and 2",
    ),
    "unknown": ({"guidance_scale": 4.0}, TypeError, "unexpected keyword argument 'guidance_scale'"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_arguments_are_refused_before_anything_is_computed(name, make_combined):
    changed, error, message = BAD[name]
    given = {"prompt": "a", **SIZE, "prior_callback_on_step_end": never, **changed}
    with pytest.raises(error, match=message):
        make_combined()(**given)


def test_numbers_that_give_smaller_images_are_refused(make_combined):
    with pytest.raises(ValueError, match="height=128 is too large"):
        run(make_combined(None, {"latent_dim_scale": 8.0}))


def test_networks_of_another_class_are_refused(make_prior, theirs):
    pipe = make_prior()
    with pytest.raises(TypeError, match=r"prior must be a wuerstchen\.models\.prior\.Prior"):
        type(pipe)(**{**pipe.components, "prior": theirs.prior(pipe).prior})


def test_parts_that_do_not_fit_are_refused_before_sampling(make_combined):
    pipe = make_combined(None, {"shape": {"effnet_embd": 5}})
    with pytest.raises(UserError, match=r"image_embeddings of 3 channels. The decoder reads 5"):
        run(pipe, prior_callback_on_step_end=never)
    blind = make_combined(None, {"shape": {"effnet_embd": 5, "inject_effnet": (False, False)}})
    assert run(blind).shape == (1, 3, 128, 128)
