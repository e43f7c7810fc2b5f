"""The decoder pipeline against diffusers' own, step by step, and cases in which that one fails."""

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen.diffusers import ImagePipelineOutput
from wuerstchen.errors import UserError
from wuerstchen.models.decoder import Decoder, DecoderContext
from wuerstchen.models.vqgan import VQGAN, VQGANConfig


def embeddings(rows: int, height: int = 3, width: int = 3) -> torch.Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(5)) * 5


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 + i) for i in range(count)]


def noise(rows: int) -> torch.Tensor:
    return torch.randn(rows, 4, 32, 32, generator=torch.Generator().manual_seed(6))


PATTERNS = {
    "one prompt": lambda: {"image_embeddings": embeddings(1), "prompt": "a cat"},
    "guidance": lambda: {"image_embeddings": embeddings(1), "prompt": "a cat", "guidance_scale": 3.0},
    "guidance and negative": lambda: {
        "image_embeddings": embeddings(1),
        "prompt": "a cat",
        "negative_prompt": "bad",
        "guidance_scale": 2.0,
    },
    "one prompt for several embeddings": lambda: {
        "image_embeddings": embeddings(3),
        "prompt": "a",
        "guidance_scale": 2.0,
    },
    "embeddings as a list": lambda: {"image_embeddings": [embeddings(1), embeddings(2)[1:]], "prompt": "a"},
    "embeddings as an array": lambda: {"image_embeddings": embeddings(2).numpy(), "prompt": "a"},
    "not square": lambda: {"image_embeddings": embeddings(1, 3, 6), "prompt": "a"},
    "timesteps": lambda: {
        "image_embeddings": embeddings(1),
        "prompt": "a",
        "timesteps": [1.0, 0.7, 0.2, 0.0],
    },
    "generator for each": lambda: {
        "image_embeddings": embeddings(2),
        "prompt": "a",
        "generator": generators(2),
    },
    "list of one generator": lambda: {
        "image_embeddings": embeddings(2),
        "prompt": "a",
        "generator": generators(1),
    },
    "latents given": lambda: {"image_embeddings": embeddings(2), "prompt": "a", "latents": noise(2)},
    "as an array": lambda: {"image_embeddings": embeddings(1), "prompt": "a", "output_type": "np"},
    "as PIL images": lambda: {"image_embeddings": embeddings(2), "prompt": "a", "output_type": "pil"},
    "as latents": lambda: {"image_embeddings": embeddings(2), "prompt": "a", "output_type": "latent"},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_every_step_equals_diffusers(name, make_decoder, theirs, assert_same_steps):
    pipe = make_decoder()

    def call(pipe, recorder):
        given = {"num_inference_steps": 5, "output_type": "pt", "generator": generators(1)[0]}
        return pipe(callback_on_step_end=recorder, **{**given, **PATTERNS[name]()})

    result, expected = assert_same_steps(pipe, theirs.decoder(pipe), call)
    assert isinstance(result, ImagePipelineOutput)
    assert type(result.images) is type(expected.images)
    if isinstance(result.images, list):
        assert all(isinstance(image, Image.Image) for image in result.images)
        arrays = [np.stack([np.asarray(i, dtype=int) for i in r.images]) for r in (result, expected)]
        assert np.abs(arrays[0] - arrays[1]).max() <= 1
    else:
        images, reference = torch.as_tensor(result.images), torch.as_tensor(expected.images)
        torch.testing.assert_close(images, reference, rtol=1e-4, atol=1e-3)


def run(pipe, rows: int = 1, **given):
    given = {"prompt": "a", "num_inference_steps": 2, "output_type": "pt", **given}
    given.setdefault("image_embeddings", embeddings(rows))
    given.setdefault("generator", torch.Generator().manual_seed(0))
    return pipe(**given).images


def test_each_prompt_applies_to_its_embedding(make_decoder):
    """As when each is generated alone. diffusers fails."""
    pipe = make_decoder()
    together = run(pipe, 2, prompt=["a cat", "two dogs"], generator=generators(2))
    for i, prompt in enumerate(["a cat", "two dogs"]):
        alone = run(
            pipe, image_embeddings=embeddings(2)[i : i + 1], prompt=prompt, generator=generators(2)[i]
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_each_prompt_applies_to_a_group_of_embeddings(make_decoder):
    """The prior's pipeline puts all embeddings of the first prompt first."""
    pipe = make_decoder()
    together = run(pipe, 4, prompt=["a", "b"], guidance_scale=2.0, negative_prompt=["c", "d"])
    each = run(pipe, 4, prompt=list("aabb"), guidance_scale=2.0, negative_prompt=list("ccdd"))
    torch.testing.assert_close(together, each)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_several_images_of_each_embedding(guidance, make_decoder):
    """As when each embedding is repeated. diffusers fails."""
    pipe = make_decoder()
    given = {"prompt": ["a", "b"], "guidance_scale": guidance, "negative_prompt": "bad"}
    several = run(pipe, 2, num_images_per_prompt=3, **given)
    repeated = run(pipe, image_embeddings=embeddings(2).repeat_interleave(3, dim=0), **given)
    assert several.shape == (6, 3, 128, 128)
    torch.testing.assert_close(several, repeated)
    assert not torch.allclose(several[0], several[1], atol=1e-2)


@pytest.mark.parametrize(
    ("grid", "latents"),
    [((3, 3), (32, 32)), ((1, 2), (12, 24)), ((4, 5), (44, 56)), ((10, 1), (108, 12))],
)
def test_sizes_that_the_network_cannot_halve_are_rounded_up_and_cropped(grid, latents, make_decoder):
    """This network halves by 4; diffusers fails unless both sides are a multiple of it."""
    pipe = make_decoder()
    drawn = run(pipe, image_embeddings=embeddings(1, *grid), output_type="latent")
    assert tuple(drawn.shape[2:]) == latents
    pixels = run(pipe, image_embeddings=embeddings(1, *grid))
    height, width = (4 * int(side * 10.67) for side in grid)
    assert tuple(pixels.shape[2:]) == (height, width)
    whole = pipe.vqgan.decode(drawn).clamp(0, 1)
    top, left = (4 * latents[0] - height) // 2, (4 * latents[1] - width) // 2
    assert torch.equal(pixels, whole[:, :, top : top + height, left : left + width])


@pytest.mark.parametrize("kind", ["returned", "in place"])
def test_embeddings_that_a_callback_changes_are_used(kind, make_decoder):
    pipe = make_decoder()

    def change(pipe, step, t, tensors):
        old = tensors["image_embeddings"]
        if step > 0:
            return {}
        assert torch.equal(old, embeddings(1))
        if kind == "returned":
            return {"image_embeddings": old * 0}
        old.zero_()
        return {}

    first: list[torch.Tensor] = []
    changed = run(
        pipe,
        output_type="latent",
        timesteps=[1.0, 0.4, 0.2],
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=["image_embeddings"],
    )
    keep = {"callback_on_step_end": lambda *a: first.append(a[3]["latents"])}
    run(pipe, output_type="latent", timesteps=[1.0, 0.4], **keep)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # the random numbers of the first step
        torch.randn(1, 4, 32, 32, generator=generator)
    expected = run(
        pipe,
        image_embeddings=embeddings(1) * 0,
        output_type="latent",
        timesteps=[0.4, 0.2],
        latents=first[0],
        generator=generator,
    )
    torch.testing.assert_close(changed, expected)


def test_a_callback_can_turn_guidance_off(make_decoder):
    """Later steps are as without guidance."""
    pipe = make_decoder()

    def off(pipe, step, t, tensors):
        pipe._guidance_scale = 0.0

    first: list[torch.Tensor] = []
    guided = {"guidance_scale": 3.0, "output_type": "latent"}
    turned = run(pipe, **guided, timesteps=[1.0, 0.4, 0.2], callback_on_step_end=off)
    run(pipe, **guided, timesteps=[1.0, 0.4], callback_on_step_end=lambda *a: first.append(a[3]["latents"]))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        torch.randn(1, 4, 32, 32, generator=generator)
    rest = run(pipe, output_type="latent", timesteps=[0.4, 0.2], latents=first[0], generator=generator)
    torch.testing.assert_close(turned, rest)


def test_a_tuple_on_request(make_decoder):
    pipe = make_decoder()
    result = pipe(embeddings(1), "a", num_inference_steps=1, output_type="pt", return_dict=False)
    assert isinstance(result, tuple)
    assert len(result) == 1
    assert result[0].shape == (1, 3, 128, 128)


@pytest.mark.parametrize(
    ("text", "network", "vqgan", "given"),
    [
        (torch.float32, torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.float64),
        (torch.float16, torch.float16, torch.float16, torch.float32),
    ],
)
def test_parts_and_inputs_may_have_different_dtypes(text, network, vqgan, given, make_decoder):
    pipe = make_decoder()
    pipe.text_encoder.to(text)
    pipe.decoder.to(network)
    pipe.vqgan.to(vqgan)
    pixels = run(
        pipe, image_embeddings=40 * embeddings(1).to(given), latents=noise(1).to(given), guidance_scale=2.0
    )
    assert pixels.dtype == vqgan
    assert pixels.isfinite().all()
    assert isinstance(run(pipe, output_type="pil")[0], Image.Image)


class Echo(Decoder):
    """A decoder on the meta device, which has no autocast."""

    def context(self, semantic_latents, size, text=None, mask=None):
        assert semantic_latents.device.type == text.device.type == "meta"
        return DecoderContext(conditions=[], texts=[])

    def forward(self, x, r, context):
        return x * r.view(-1, 1, 1, 1)


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, lambda x: [np.asarray(x)]])
def test_embeddings_are_moved_to_the_networks_device(kind, make_decoder):
    """Also checks that no step synchronises: the meta device has no values to read."""
    pipe = make_decoder()
    pipe.decoder = Echo(pipe.decoder.config).to("meta")
    pipe.vqgan.to("meta")
    pixels = run(pipe, image_embeddings=kind(embeddings(2)), guidance_scale=2.0)
    assert pixels.device.type == "meta"
    assert pixels.shape == (2, 3, 128, 128)


def test_latents_have_as_many_channels_as_the_network(make_decoder):
    latents = run(make_decoder({"c_in": 6, "c_out": 6}), output_type="latent")
    assert latents.shape == (1, 6, 32, 32)


def test_own_scale_is_used(make_decoder):
    assert run(make_decoder(latent_dim_scale=8.0)).shape == (1, 3, 96, 96)


def test_a_method_that_is_replaced_later_is_called(make_decoder, seeded):
    """As tiling does. The first method was kept."""
    pipe = make_decoder()
    run = {"num_inference_steps": 1, "output_type": "pt"}
    pipe(embeddings(1), "a", **run, generator=seeded())
    decode = pipe.vqgan.decode
    kept = dict(pipe._recorders)
    expected = pipe(embeddings(1), "a", **run, generator=seeded()).images
    assert pipe._recorders == kept  # or every image would be recorded again
    pipe.vqgan.decode = lambda latents: 1 - decode(latents)
    found = pipe(embeddings(1), "a", **run, generator=seeded()).images
    torch.testing.assert_close(found.clamp(0, 1), 1 - expected)


def test_compiled_networks_give_the_same(make_decoder):
    pipe = make_decoder()
    expected = run(pipe)
    pipe.decoder, pipe.vqgan = (torch.compile(part, backend="eager") for part in (pipe.decoder, pipe.vqgan))
    with torch.compiler.set_stance("force_eager"):  # the type checks in tests do not compile
        torch.testing.assert_close(run(pipe), expected)


BAD = {
    "no prompt": ({"prompt": None}, TypeError, "'prompt' must be of type"),
    "prompt is a number": ({"prompt": 3}, TypeError, "'prompt' must be of type"),
    "prompts do not fit": (
        {"prompt": ["a", "b"], "image_embeddings": embeddings(3)},
        ValueError,
        "must divide that of image_embeddings, got 2 and 3",
    ),
    "negatives do not fit": (
        {"negative_prompt": ["a", "b"], "guidance_scale": 2.0},
        ValueError,
        "negative_prompt must have the prompt's batch size 1, got 2",
    ),
    "embeddings are text": ({"image_embeddings": "text"}, TypeError, "'image_embeddings' must be of type"),
    "no embeddings": ({"image_embeddings": []}, ValueError, r"must have the shape \(batch, 3, h, w\)"),
    "embeddings without batch": (
        {"image_embeddings": embeddings(1)[0]},
        ValueError,
        r"must have the shape \(batch, 3, h, w\)",
    ),
    "embeddings of another model": (
        {"image_embeddings": torch.zeros(1, 16, 3, 3)},
        ValueError,
        r"got \[\(1, 16, 3, 3\)\]",
    ),
    "embeddings of two sizes": (
        {"image_embeddings": [embeddings(1), embeddings(1, 3, 4)]},
        ValueError,
        "differ in size",
    ),
    "steps are a float": (
        {"num_inference_steps": 2.0},
        TypeError,
        "'num_inference_steps' must be of type 'int'",
    ),
    "no images": (
        {"num_images_per_prompt": 0},
        ValueError,
        "num_images_per_prompt must be at least 1, got 0",
    ),
    "output type unknown": (
        {"output_type": "bogus", "callback_on_step_end": lambda *_: pytest.fail("sampled all the same")},
        ValueError,
        "Only the output types `pt`, `np`, `pil` and `latent` are supported",
    ),
    "argument unknown": ({"guidence_scale": 4.0}, TypeError, "unexpected keyword argument 'guidence_scale'"),
    "latents of another size": (
        {"latents": torch.zeros(1, 4, 30, 32)},
        ValueError,
        r"got \(1, 4, 30, 32\), expected \(1, 4, 32, 32\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_arguments_are_refused(name, make_decoder):
    changed, error, message = BAD[name]
    given = {"image_embeddings": embeddings(1), "prompt": "a", "num_inference_steps": 1, **changed}
    with pytest.raises(error, match=message):
        make_decoder()(**given)


def test_parts_that_do_not_fit_are_refused_before_sampling(make_decoder):
    pipe = make_decoder()
    given = {
        "image_embeddings": embeddings(1),
        "prompt": "a",
        "num_inference_steps": 1,
        "callback_on_step_end": lambda *_: pytest.fail("sampled all the same"),
    }
    small = {"bottleneck_blocks": 1, "embed_dim": 8, "num_vq_embeddings": 16}
    encoder, pipe.text_encoder = pipe.text_encoder, make_decoder({"clip_embd": 10}).text_encoder
    with pytest.raises(UserError, match=r"states are 10 wide. The decoder reads states 20 wide"):
        pipe(**given)
    pipe.text_encoder, pipe.vqgan = encoder, VQGAN(VQGANConfig(latent_channels=3, **small))
    with pytest.raises(UserError, match=r"samples latents of 4 channels. The vqgan reads latents of 3"):
        pipe(**given)
    pipe.vqgan = VQGAN(VQGANConfig(out_channels=2, **small))
    with pytest.raises(UserError, match=r"images of 2 channels. PIL has images of 1, 3 or 4"):
        pipe(**given)
    del given["callback_on_step_end"]
    assert pipe(**given, output_type="pt").images.shape == (1, 2, 128, 128)
    assert pipe(**given, output_type="latent").images.shape == (1, 4, 32, 32)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_images_of_other_channels(channels, mode, make_decoder):
    pipe = make_decoder()
    pipe.vqgan = VQGAN(
        VQGANConfig(out_channels=channels, bottleneck_blocks=0, embed_dim=8, num_vq_embeddings=16)
    )
    (image,) = run(pipe, output_type="pil")
    assert (image.mode, image.size) == (mode, (128, 128))


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scales_that_are_not_positive_are_refused(scale, make_decoder):
    with pytest.raises(UserError, match=f"latent_dim_scale must be above 0, got {scale}"):
        make_decoder(latent_dim_scale=scale)
