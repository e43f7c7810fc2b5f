"""The worker with the bundled model: its images, independent of the batch, and its previews."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from .test_openai import client_of

PROMPTS = [
    "a cat",
    "a 3D render of a purple camel on a blue background",
    "a flat illustration of a red apple",
    "a noto emoji of a cat",
    "a 3D render of a green car",
    "a twemoji of a rocket on a black background",
    "a black glyph of a tree",
    "an umbrella",
]


def pixels(running, job):
    assert job["state"] == "done", job
    files = [running.http.get(image["url"]).content for image in job["images"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(content))).astype(int) for content in files])


def compare(running, alone, prompts=PROMPTS, **settings):
    """Some of several images drawn one by one, less the same in a batch; and in other places, likewise."""
    before = batches(running)
    together = pixels(running, running.wait(running.draw(prompts=prompts, seed=10, **settings)))
    jobs = [running.wait(running.draw(prompts=[prompts[k]], seed=10 + k, **settings)) for k in alone]
    assert [now - then for now, then in zip(batches(running), before, strict=True)] == [
        len(alone) + 1,
        len(alone) + len(prompts),
    ]
    other = running.wait(
        running.draw(prompts=["a pizza", *prompts[alone[0] :]], seed=9 + alone[0], **settings)
    )
    one_by_one = np.concatenate([pixels(running, job) for job in jobs])
    return one_by_one - together[alone], pixels(running, other)[1:] - together[alone[0] :]


def batches(running):
    """The number of batches, and of images in them."""
    text = running.http.get("/metrics").text
    return [float(re.search(rf"wuerstchen_batch_pictures_{what} (.*)", text)[1]) for what in ("count", "sum")]


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch(exact):
    """Bugs: noise drawn per batch instead of per image, or rounding errors that grow from step to step."""
    for difference in compare(exact, [4, 6]):
        assert np.abs(difference).max() <= 2
        assert (difference != 0).mean() <= 0.001


@pytest.mark.slow
def test_deterministic_images_are_bit_identical(serve):
    running = serve(real=True, deterministic=True)
    small = {"width": 128, "height": 128, "prior_steps": 4, "decoder_steps": 2}
    for difference in compare(running, [2], PROMPTS[:4], **small):
        assert not difference.any()


def test_each_image_has_its_own_negative_prompt_and_init_image(exact):
    """Bug: jobs of two clients in one batch get each other's texts or images."""
    running = exact
    buffer = io.BytesIO()
    Image.effect_noise((100, 80), 90).convert("RGB").save(buffer, "PNG")
    noise = base64.b64encode(buffer.getvalue()).decode()
    Image.new("RGB", (80, 100), "red").save(buffer := io.BytesIO(), "PNG")
    red = base64.b64encode(buffer.getvalue()).decode()
    few = {"prior_steps": 6, "decoder_steps": 3, "seed": 3}
    bodies = [
        {"negative": "a dog", **few},
        {"negative": "blue", **few},
        {"image": noise, **few},
        {"image": red, "negative": "green", **few},
    ]
    alone = [pixels(running, running.wait(running.draw(**body))) for body in bodies]
    before = batches(running)
    running.draw(prompts=["a house"], prior_steps=100 if torch.cuda.is_available() else 20)
    jobs = [running.draw(**body) for body in bodies]
    for body, expected in zip(jobs, alone, strict=True):
        assert np.abs(pixels(running, running.wait(body)) - expected).max() <= 2
    # The house, and two batches of two.
    assert [now - then for now, then in zip(batches(running), before, strict=True)] == [3, 5]
    kinds = [np.abs(a - b).max() > 10 for k, a in enumerate(alone) for b in alone[:k]]
    assert all(kinds)
    upload = {"kind": "reconstruct", "image": red, "prompts": None, "width": 128}
    (redone,) = pixels(running, running.wait(running.draw(**upload)))
    assert redone.shape == (128, 128, 3)
    assert redone.mean(axis=(0, 1))[0] > 150 > 100 > redone.mean(axis=(0, 1))[1]


def test_a_mask_is_repainted_and_the_rest_is_the_image(real):
    """Also beside an image without a mask in the queue, which must not be in its batch."""
    image = Image.effect_noise((128, 128), 60).convert("RGB")
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (0, 0, 40, 128))

    def encoded(one):
        one.save(buffer := io.BytesIO(), "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    small = {"width": 128, "height": 128, "prior_steps": 2, "decoder_steps": 1, "image": encoded(image)}
    jobs = [real.draw(**small, mask=encoded(mask), count=3), real.draw(**small, strength=1.0)]
    edited, varied = (pixels(real, real.wait(job)) for job in jobs)
    own = np.asarray(image).astype(int)
    for one in edited:
        assert np.array_equal(one[:, 48:], own[:, 48:])
        assert np.abs(one[:, :40] - own[:, :40]).mean() > 10
    assert np.abs(varied[0][:, 48:] - own[:, 48:]).mean() > 10


def test_previews_are_cheap_and_early(real):
    running = real
    events = list(running.events(running.draw(prompts=["a red car"])))
    order = [name for name, _ in events]
    shown = [data for name, data in events if name == "preview"]
    assert order.index("preview") < order.index("image")
    assert {(one["width"], one["height"]) for one in shown} <= {(64, 64), (128, 128)}
    for one in shown:
        head, _, data = one["image"].partition(",")
        assert head == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.size == (one["width"], one["height"])
    stages = [data["stage"] for name, data in events if name == "progress"]
    assert stages == sorted(stages, reverse=True)


def test_truncated_prompts_are_reported(real):
    running = real
    job = running.wait(running.draw(prompts=["cat " * 40 + "lostword", "a dog"], prior_steps=2))
    (notice,) = job["notices"]
    assert "lostword" in notice


def test_the_model_reports_its_capabilities(real):
    about = real.http.get("/v1/model").json()
    assert about["name"] == "wuerstchen"
    assert about["size"]["default"] == [256, 256]
    assert [512, 256] in about["size"]["common"]
    assert about["defaults"] == {
        "guidance": 2.0,
        "guidance_interval": [0.0, 1.0],
        "prior_steps": 29,
        "prior_sampler": "ddpm",
        "decoder_steps": 10,
    }
    assert about["can"] == dict.fromkeys(("generate", "reconstruct", "variation", "preview"), True)
    assert len(about["examples"]) == 9
    assert "a photograph comes out as blobs" in about["image_note"]  # the page shows it beside an image


@pytest.mark.parametrize(
    "body",
    [{"prior_sampler": "dpm", "guidance": 1}, {"guidance_interval": [0, 0.5]}, {"width": 64, "height": 96}],
)
def test_other_settings_work(real, body):
    running = real
    job = running.wait(running.draw(prior_steps=2, decoder_steps=1, **body))
    assert job["state"] == "done"


def test_the_client_of_openai_works_with_it(real):
    running = real
    with client_of(running) as client:
        (model,) = client.models.list().data
        assert model.id == "wuerstchen"
        answer = client.images.generate(
            prompt="a red car", size="auto", response_format="b64_json", extra_body={"steps": 4}
        )
    with Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))) as image:
        assert image.size == (256, 256)
        assert max(high - low for low, high in image.getextrema()) > 50
