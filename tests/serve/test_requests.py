"""Validation of requests and uploads."""

import base64
import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from pydantic import ValidationError

from wuerstchen.checkpoints.adapter_metadata import AdapterMetadata
from wuerstchen.images import decode_image, resize_crop
from wuerstchen.serve.adapters import ListedAdapter
from wuerstchen.serve.errors import Refused
from wuerstchen.serve.jobs import ImageTask
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.requests import image_settings, make_job, model_view
from wuerstchen.serve.schemas import JobRequest

from .fake_worker import ABOUT, DEFAULTS


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompts", "at least one entry, got none"),
        ({"prompts": []}, "prompts", "at least one entry, got none"),
        ({"prompts": "a cat"}, "prompts", "valid list"),
        ({"prompts": [3]}, "prompts.0", "valid string"),
        ({"prompts": ["x" * 1001]}, "prompts", "at most 1000 characters, got 1001"),
        ({"prompts": ["x"] * 17}, "prompts", "at most 16 entries, got 17"),
        ({"prompts": ["x"], "negative": "x" * 1001}, "negative", "at most 1000 characters, got 1001"),
        ({"prompts": ["x"], "count": 0}, "count", "greater than or equal to 1"),
        ({"prompts": ["x"], "count": 17}, "count", "at most 16, got 17"),
        ({"prompts": ["x"] * 16, "count": 5}, "count", "images: 80. A job has at most 64"),
        ({"prompts": ["x"], "count": 2.5}, "count", "valid integer"),
        ({"prompts": ["x"], "seed": -1}, "seed", "greater than or equal to 0"),
        ({"prompts": ["x"], "seed": 2**32 - 2, "count": 3}, "seed", "Use at most 4294967293"),
        ({"prompts": ["x"], "seed": True}, "seed", "valid integer"),
        ({"prompts": ["x"], "width": 100}, "width", "multiple of 8"),
        ({"prompts": ["x"], "width": 1000}, "width", "from 64 to 256"),
        ({"prompts": ["x"], "height": 56}, "width", "from 64 to 256"),
        ({"prompts": ["x"], "width": 256, "height": 256}, "width", "65,536. An image has at most 16,384"),
        ({"prompts": ["x"], "guidance": 101}, "guidance", "less than or equal to 100"),
        ({"prompts": ["x"], "guidance_interval": [0.5]}, "guidance_interval", "at least 2 items"),
        ({"prompts": ["x"], "guidance_interval": [0, 2]}, "guidance_interval.1", "less than or equal to 1"),
        ({"prompts": ["x"], "guidance_interval": [0.8, 0.2]}, "guidance_interval", "got [0.8, 0.2]"),
        ({"prompts": ["x"], "prior_steps": 101}, "prior_steps", "at most 100, got 101"),
        ({"prompts": ["x"], "decoder_steps": 0}, "decoder_steps", "greater than or equal to 1"),
        (
            {"prompts": ["x"], "prior_sampler": "plms"},
            "prior_sampler",
            "'ddpm' or 'dpm' or 'ddim' or 'euler'",
        ),
        ({"prompts": ["x"], "prior_sampler": 3}, "prior_sampler", "valid string"),
        ({"prompts": ["x"], "prior_sampler": "euler"}, "prior_sampler", "Use ddpm or dpm or ddim."),
        ({"prompts": ["x"], "strength": 0.5}, "strength", "no image to vary"),
        ({"prompts": ["x"], "mask": "MASK"}, "mask", "mask has no image to edit"),
        ({"kind": "reconstruct", "image": "IMAGE", "mask": "MASK"}, "mask", "mask has no image to edit"),
        ({"prompts": ["x"], "image": "IMAGE", "mask": "§"}, "mask", "mask is not valid base64"),
        ({"prompts": ["x"], "colour": "red"}, "colour", "Extra inputs"),
        ({"kind": "dream", "prompts": ["x"]}, "kind", "'generate' or 'reconstruct'"),
        ({"kind": "reconstruct"}, "image", "image is missing"),
        (
            {"kind": "reconstruct", "image": "IMAGE", "prompts": ["x"]},
            "prompts",
            "do not apply to a reconstruction",
        ),
        (
            {"kind": "reconstruct", "image": "IMAGE", "count": 2},
            "count",
            "must be 1 for a reconstruction, got 2",
        ),
        ({"kind": "reconstruct", "image": "IMAGE", "width": 64, "height": 128}, "width", "is not square"),
        ({"kind": "reconstruct", "image": "IMAGE", "strength": 0.5}, "strength", "no image to vary"),
        ({"prompts": ["x"], "image": "IMAGE", "strength": 0}, "strength", "greater than 0"),
        ({"prompts": ["x"], "k" * 1000: 1}, "k" * 100, "Extra inputs"),
        ({"prompts": ["x"], "count": 300}, "count", "at most 16, got 300"),
        ([], "body", "valid dictionary"),
    ],
)
def test_invalid_requests_get_an_error_in_the_common_format(plain, body, param, words):
    running = plain
    if isinstance(body, dict) and body.get("image"):
        body["image"] = encoded(Image.new("RGB", (8, 8)))
    answer = running.http.post("/v1/jobs", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert "\n" not in error["message"]


def bomb():
    """A PNG of 60,000 × 60,000 pixels in a few hundred bytes."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999))
    return base64.b64encode(data).decode()


def animated(kind):
    frames = [Image.effect_noise((32, 32), sigma).convert("RGB") for sigma in (20, 60)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


NOISE = Image.effect_noise((40, 30), 60).convert("RGB")
BAD_UPLOADS = {
    "no base64": (lambda: "§$%", "not valid base64"),
    "not quite base64": (lambda: "AAA", "not valid base64"),
    "no picture": (lambda: base64.b64encode(b"text").decode(), "not a readable PNG, JPEG or WebP"),
    "empty": (lambda: "", "not a readable PNG, JPEG or WebP"),
    "GIF": (lambda: encoded(NOISE, "GIF"), "not a readable PNG, JPEG or WebP"),
    "TIFF": (lambda: encoded(NOISE, "TIFF"), "not a readable PNG, JPEG or WebP"),
    "EPS": (lambda: encoded(NOISE, "EPS"), "not a readable PNG, JPEG or WebP"),
    "cut off": (lambda: encoded(NOISE)[:-400], "damaged"),
    "bomb": (bomb, "pixels"),
    "animated PNG": (lambda: animated("PNG"), "animated"),
    "animated WebP": (lambda: animated("WEBP"), "animated"),
    "an address": (lambda: "data:image/png,x", "not in base64"),
    "a path": (lambda: "/etc/passwd", "image is not"),
    "another address": (lambda: "https://example.org/x.png", "not valid base64"),
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_bad_uploads_are_refused(plain, name):
    make, words = BAD_UPLOADS[name]
    answer = plain.http.post("/v1/jobs", json={"kind": "reconstruct", "image": make()})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "image"


def test_masks_must_fit_their_image(plain):
    image, mask = encoded(Image.new("RGB", (64, 64))), Image.new("L", (64, 64), 0)
    for wrong, words in (
        (mask, "mask is empty: all of its 64x64 pixels"),
        (Image.new("L", (64, 64), 255), "mask is full"),
        (Image.linear_gradient("L").resize((64, 32)), "mask has 64x32 pixels, but image has 64x64"),
    ):
        body = {"prompts": ["x"], "image": image, "mask": encoded(wrong)}
        answer = plain.http.post("/v1/jobs", json=body)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "mask"
    mask.paste(255, (0, 0, 9, 9))
    job = plain.wait(plain.draw(image=image, mask=encoded(mask)))
    assert job["settings"]["strength"] == 1.0


def test_large_uploads_are_refused(serve):
    running = serve(upload_bytes=1000, upload_pixels=500)
    large = {"kind": "reconstruct", "image": encoded(Image.effect_noise((40, 40), 60))}
    assert running.http.post("/v1/jobs", json=large).status_code == 413
    many = running.http.post(
        "/v1/jobs", json={"kind": "reconstruct", "image": encoded(Image.new("L", (30, 30)))}
    )
    assert (many.status_code, "At most 500" in many.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "MPO"])
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_uploads_are_upright_scaled_and_stripped(plain, kind, prefix):
    """Bugs: a phone's photo on its side, or its metadata in the result. The stand-in returns the upload."""
    running = plain
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Sekret"
    text = encoded(NOISE, kind, exif=exif)
    job = running.http.post(
        "/v1/jobs", json={"prompts": [""], "image": prefix + text, "height": 128, "width": 64}
    )
    assert job.status_code == 202, job.text
    assert job.json()["settings"]["strength"] == 0.7
    done = running.wait(job.json())
    content = running.http.get(done["images"][0]["url"]).content
    assert b"Sekret" not in content
    expected = resize_crop(decode_image(base64.b64decode(text), "x"), 64, 128)
    with Image.open(io.BytesIO(content)) as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_base64_may_have_line_breaks(plain):
    """Many encoders add them, and they were refused."""
    text = base64.encodebytes(base64.b64decode(encoded(NOISE))).decode()
    assert "\n" in text.strip()
    for body in (text, "data:image/png;base64,\n" + text):
        answer = plain.http.post("/v1/jobs", json={"kind": "reconstruct", "image": body})
        assert answer.status_code == 202, answer.text


def test_reconstructions_are_a_kind_of_job(serve):
    running = serve()
    answer = running.http.post(
        "/v1/jobs", json={"kind": "reconstruct", "image": encoded(NOISE), "width": 128}
    )
    job = running.wait(answer.json())
    assert (job["state"], job["kind"], job["total"]) == ("done", "reconstruct", 1)
    assert (job["images"][0]["width"], job["images"][0]["height"]) == (128, 128)


@pytest.mark.parametrize("body", [{"prompts": [1] * 1000}, {f"k{number}": 0 for number in range(1000)}])
def test_a_thousand_errors_cost_as_much_as_one(body):
    """pydantic made an error of a kilobyte for each. A body of 2 MB took a gigabyte and blocked others for 5
    s."""
    with pytest.raises(ValidationError) as caught:
        JobRequest.model_validate(body)
    assert caught.value.error_count() == 1


def test_a_job_larger_than_the_queue_is_invalid(serve):
    """A client would repeat a 429 forever."""
    running = serve(max_waiting=4)
    assert running.http.get("/v1/model").json()["limits"]["pictures"] == 4
    answer = running.http.post("/v1/jobs", json={"prompts": ["x"], "count": 5})
    assert answer.status_code == 400
    assert "images: 5. A job has at most 4" in answer.json()["error"]["message"]


WITH_STUDENT = {
    **ABOUT,
    "name": "wuerstchen",
    "defaults": {**DEFAULTS, "guidance": 1.0, "prior_steps": 2, "prior_sampler": "few"},
    "students": {"guidance": 1.0, "prior_steps": 2, "prior_sampler": "few"},
    "samplers": ["few", "ddpm", "dpm", "ddim"],
    "loras": [ListedAdapter("dog", Path("dog.safetensors"), AdapterMetadata())],
}


def drawn_by(**body):
    """The settings of Stage C, and what an image file says about who sampled it."""
    job = make_job(JobRequest(prompts=["x"], **body), ServeConfig(), WITH_STUDENT, "client", "here")
    settings = image_settings(ImageTask(job, 0), WITH_STUDENT)
    if "image" not in body:  # the settings in a file reproduce the image
        request = JobRequest(**{k: v for k, v in settings.items() if k in JobRequest.model_fields})
        assert make_job(request, ServeConfig(), WITH_STUDENT, "client", "here").shape == job.shape
    return job.shape.prior_sampler, job.shape.prior_steps, job.shape.guidance, settings["stage_c"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, ("few", 2, 1.0, "student")),
        ({"prior_sampler": "few", "prior_steps": 4}, ("few", 4, 1.0, "student")),
        ({"full": True}, ("ddpm", 6, 2.0, "full")),
        ({"negative": "red"}, ("ddpm", 6, 2.0, "full")),
        ({"image": "x"}, ("ddpm", 6, 2.0, "full")),
        ({"lora": "dog"}, ("ddpm", 6, 2.0, "full")),
        ({"guidance": 3.0}, ("ddpm", 6, 3.0, "full")),
        ({"prior_steps": 2}, ("ddpm", 2, 2.0, "full")),
        ({"prior_sampler": "dpm"}, ("dpm", 6, 2.0, "full")),
    ],
)
def test_a_student_samples_what_it_supports(body, expected):
    assert drawn_by(**body) == expected


def test_a_student_that_is_asked_for_is_not_replaced():
    with pytest.raises(Refused, match="prior_sampler few does not support a negative prompt") as caught:
        drawn_by(prior_sampler="few", negative="red")
    assert (caught.value.status, caught.value.param) == (400, "prior_sampler")


def test_the_model_shows_the_defaults_of_student_and_full_network():
    view = model_view(ServeConfig(), WITH_STUDENT)
    assert (view["defaults"]["guidance"], view["full"]["guidance"]) == (1.0, 2.0)
    assert "stage_c" not in image_settings(
        ImageTask(make_job(JobRequest(prompts=["x"]), ServeConfig(), ABOUT, "client", "here"), 0), ABOUT
    )


WITH_BOTH = {
    **WITH_STUDENT,
    "full": {**DEFAULTS, "decoder_sampler": "ddpm"},
    "students": {**WITH_STUDENT["students"], "decoder_steps": 1, "decoder_sampler": "few"},
    "decoder_samplers": ["few", "ddpm", "dpm", "ddim"],
}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, ("few", 1, "student")),
        ({"guidance": 3.0}, ("few", 1, "student")),
        ({"decoder_steps": 1}, ("ddpm", 1, "full")),
        ({"decoder_sampler": "few", "decoder_steps": 2}, ("few", 2, "student")),
        ({"full": True}, ("ddpm", 4, "full")),
    ],
)
def test_the_student_of_stage_b_samples_what_it_supports(body, expected):
    job = make_job(JobRequest(prompts=["x"], **body), ServeConfig(), WITH_BOTH, "client", "here")
    settings = image_settings(ImageTask(job, 0), WITH_BOTH)
    assert (settings["decoder_sampler"], settings["decoder_steps"], settings["stage_b"]) == expected
    request = JobRequest(**{k: v for k, v in settings.items() if k in JobRequest.model_fields})
    assert make_job(request, ServeConfig(), WITH_BOTH, "client", "here").shape == job.shape


def test_a_sampler_of_stage_b_is_refused_without_a_student_of_it():
    with pytest.raises(Refused, match="decoder_sampler 'few' does not fit this model") as caught:
        drawn_by(decoder_sampler="few")
    assert caught.value.param == "decoder_sampler"
