"""Image to image and inpainting with diffusers' argument names, against ``Wuerstchen.generate``."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen.diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    WuerstchenImg2ImgPipeline,
    WuerstchenInpaintPipeline,
)
from wuerstchen.diffusers.editing import as_images
from wuerstchen.errors import UserError
from wuerstchen.images import to_tensor
from wuerstchen.pipeline import load
from wuerstchen.sampling import Sampling

IMAGE = Image.effect_noise((128, 96), 60).convert("RGB")
MASK = Image.new("L", IMAGE.size, 0)
MASK.paste(255, (0, 0, 40, 96))


@pytest.fixture(scope="module")
def inpaint(model_folder):
    return AutoPipelineForInpainting.from_pretrained(model_folder)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def seeds_of(count, seed=3):
    generator = seeded(seed)
    return [int(torch.randint(2**32, (1,), generator=generator)) for _ in range(count)]


def test_inpainting_is_an_edit(inpaint):
    images = inpaint("a cat", IMAGE, MASK, generator=seeded(), num_images_per_prompt=2).images
    expected = inpaint.model.generate("a cat", init=IMAGE, mask=MASK, seed=seeds_of(2), count=2)
    assert images == expected
    assert np.array_equal(np.asarray(images[0])[:, 60:], np.asarray(IMAGE)[:, 60:])
    assert images[0] != images[1]


def test_arguments_have_their_meaning(inpaint):
    given = {
        "strength": 0.5,
        "padding_mask_crop": 4,
        "prior_num_inference_steps": 4,
        "prior_guidance_scale": 2.0,
        "num_inference_steps": 3,
        "decoder_guidance_scale": 0.0,
        "negative_prompt": "a dog",
        "generator": seeded(),
    }
    (images,) = inpaint(prompt="a cat", image=IMAGE, mask_image=MASK, return_dict=False, **given)
    sampling = Sampling(prior_steps=4, guidance=2.0, decoder_steps=3, decoder_guidance=1.0)
    expected = inpaint.model.generate(
        *("a cat",), negative="a dog", init=IMAGE, mask=MASK, seed=seeds_of(1), sampling=sampling,
        strength=0.5, crop_to_mask=4,
    )  # fmt: skip
    assert images == expected
    resized = inpaint("a cat", IMAGE, MASK, height=64, width=72).images[0]
    assert resized.size == (72, 64)


def test_image_to_image_is_a_variation(inpaint):
    pipe = AutoPipelineForImage2Image.from_pipe(inpaint)
    assert isinstance(pipe, WuerstchenImg2ImgPipeline)
    (image,) = pipe(["a cat"], [IMAGE], strength=0.4, height=96, width=128, generator=[seeded()]).images
    assert [image] == pipe.model.generate("a cat", init=IMAGE, strength=0.4, size=(128, 96), seed=seeds_of(1))
    assert pipe("", IMAGE).images[0].size == (128, 128)


@pytest.mark.parametrize("form", ["tensor", "tensors", "array", "uint8", "list"])
def test_images_and_masks_may_be_arrays_and_tensors(inpaint, form):
    image, mask = to_tensor(IMAGE), to_tensor(MASK)[:1]
    forms = {
        "tensor": (image, mask),
        "tensors": (image[None], mask[None]),
        "array": (image.permute(1, 2, 0).numpy(), mask[0].numpy()),
        "uint8": (np.asarray(IMAGE), np.asarray(MASK)),
        "list": ([image], [MASK]),
    }
    found = inpaint("a cat", *forms[form], generator=seeded(), output_type="np").images
    (expected,) = inpaint("a cat", IMAGE, MASK, generator=seeded()).images
    assert found.shape == (1, 96, 128, 3)
    assert np.array_equal(np.rint(found[0] * 255), np.asarray(expected))


def test_arrays_with_an_alpha_channel_are_one_image():
    """Bug: (h, w, 4) became a batch of h images, and a batch of masks as a tensor became one RGB mask."""
    rgba = IMAGE.convert("RGBA")
    rgba.putalpha(MASK)
    for name in ("image", "mask_image"):
        (found,) = as_images(name, np.asarray(rgba))
        assert found.tobytes() == rgba.tobytes()
    masks = as_images("mask_image", np.stack([np.asarray(MASK)] * 5))
    assert [mask.tobytes() for mask in masks] == [MASK.tobytes()] * 5
    assert len(as_images("mask_image", to_tensor(MASK)[:1].expand(3, 1, 96, 128))) == 3
    for value in (
        np.zeros((64, 48, 2), np.uint8),
        np.zeros((5, 64, 48), np.uint8),
        np.zeros(5),
        np.zeros((1, 1, 8, 8, 3)),
        torch.zeros(5),
    ):
        shape = str(tuple(value.shape))
        with pytest.raises(UserError, match=f"image has the shape {re.escape(shape)}"):
            as_images("image", value)
    with pytest.raises(UserError, match=r"mask_image has the shape \(3, 8, 8\)\..* \(b, 1, h, w\)"):
        as_images("mask_image", torch.zeros(3, 8, 8))
    with pytest.raises(UserError, match="image must have numbers, got an array of <U7"):
        as_images("image", np.array([["cat.png"]]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"image": None}, "image is missing"),
        ({"mask_image": None}, "mask_image is missing"),
        ({"image": "cat.png"}, "image must be a PIL image, an array or a tensor, got <class 'str'>"),
        ({"image": torch.zeros(2, 8, 8)}, r"image has the shape \(2, 8, 8\)"),
        ({"image": torch.full((3, 8, 8), 2.0)}, "image must have values from 0 to 1"),
        ({"mask_image": Image.new("L", (8, 8))}, "mask has 8x8 pixels, but init has 128x96"),
        ({"output_type": "latent"}, "output_type must be one of pil, np, pt"),
        ({"generator": [seeded()] * 2}, "2 generators do not match 1 images"),
        ({"strength": 2.0}, "strength must be above 0"),
    ],
)
def test_bad_arguments_are_refused(inpaint, given, words):
    with pytest.raises(UserError, match=words):
        inpaint(**{"prompt": "a cat", "image": IMAGE, "mask_image": MASK, **given})


def test_a_model_without_a_compressor_is_refused(write_published, tmp_path):
    folder = write_published(tmp_path)
    with pytest.raises(UserError, match="no compressor"):
        WuerstchenInpaintPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match="torch_dtype must be float32, bfloat16 or float16"):
        WuerstchenInpaintPipeline.from_pretrained(folder, torch_dtype=torch.float64)


def test_pipelines_move_and_convert_as_those_of_diffusers_do(model_folder):
    """Bugs: a dtype that is taken for a device, and a model that no longer saves memory once it was moved."""
    pipe = WuerstchenImg2ImgPipeline.from_pretrained(
        model_folder, dtype=torch.bfloat16, low_cpu_mem_usage=True
    )
    dtypes = lambda: {each.dtype for each in pipe.model.cascade.prior.parameters()}  # noqa: E731
    assert dtypes() == {torch.bfloat16}
    assert pipe.to(torch.float32) is pipe
    assert dtypes() == {torch.float32}
    pipe.to("cpu", torch.bfloat16)
    assert (dtypes(), pipe.device.type) == ({torch.bfloat16}, "cpu")
    pipe.to(device="cpu", dtype=torch.float32)
    saving = WuerstchenImg2ImgPipeline(load(model_folder, "cpu", low_memory="stage")).to("cpu")
    assert saving.model.low_memory == "stage"
    with pytest.raises(UserError, match="device was given twice"):
        pipe.to("cpu", device="cpu")
    with pytest.raises(UserError, match=r"dtype must be float32, bfloat16 or float16, got torch\.float64"):
        pipe.to(torch.float64)


def test_what_editing_does_not_support_is_refused_in_a_sentence(model_folder, inpaint):
    for name, value in {"variant": "fp16", "cache_dir": "x", "use_safetensors": False, "anything": 1}.items():
        with pytest.raises(UserError, match=f"{name}(=False)? is not supported"):
            WuerstchenInpaintPipeline.from_pretrained(model_folder, **{name: value})
    with pytest.raises(UserError, match="dtype was given twice"):
        WuerstchenInpaintPipeline.from_pretrained(
            model_folder, dtype=torch.float16, torch_dtype=torch.float16
        )
    for auto in (AutoPipelineForImage2Image, AutoPipelineForInpainting):
        with pytest.raises(UserError, match="pipeline must be one for editing, got object"):
            auto.from_pipe(object())
    pipe = WuerstchenInpaintPipeline(inpaint.model)
    pipe.model = SimpleNamespace(_adapters=SimpleNamespace(scales={"style": 1.0}))
    with pytest.raises(UserError, match="Adapters are loaded"):
        pipe.to("cpu")
