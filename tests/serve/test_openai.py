"""The service with the real ``openai`` client."""

import base64
import io
import time

import httpx
import openai
import pytest
from PIL import Image

from wuerstchen.image_files import read_settings

TOKEN = "a-token-of-some-length"


def client_of(running, **options):
    http = openai.DefaultHttpxClient(trust_env=False)
    options = {"api_key": "none", "max_retries": 0, **options}
    return openai.OpenAI(base_url=f"{running.url}/v1", http_client=http, **options)


@pytest.mark.parametrize("form", ["url", "b64_json", None])
def test_images_have_the_format_that_the_client_expects(serve, form, tmp_path):
    running = serve()
    more = {} if form is None else {"response_format": form}
    with client_of(running) as client:
        answer = client.images.generate(
            prompt="a cat",
            model="wuerstchen",
            n=2,
            size="128x64",
            user="somebody",
            extra_body={"seed": 5, "negative_prompt": "a dog", "guidance": 1.5, "steps": 3},
            **more,
        )
    assert abs(answer.created - time.time()) < 60
    assert len(answer.data) == 2
    for number, one in enumerate(answer.data):
        if form == "b64_json":
            assert one.url is None
            content = base64.b64decode(one.b64_json)
        else:
            assert one.b64_json is None
            content = httpx.get(one.url, trust_env=False).content
        path = tmp_path / "x.png"
        path.write_bytes(content)
        settings = read_settings(path)
        assert settings["seed"] == 5 + number
        assert settings["negative"] == "a dog"
        assert (settings["guidance"], settings["prior_steps"]) == (1.5, 3)
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (128, 64)


def test_errors_raise_the_exceptions_of_the_client(serve):
    running = serve(max_waiting=2, tokens=(TOKEN,), max_pixels=256 * 128)
    with client_of(running) as client, pytest.raises(openai.AuthenticationError, match="token is missing"):
        client.images.generate(prompt="a")
    with client_of(running, api_key=TOKEN) as client:
        for error, words, wrong in (
            (openai.NotFoundError, "is not served here", {"model": "dall-e-3"}),
            (openai.BadRequestError, "must be WIDTHxHEIGHT", {"size": "large"}),
            (openai.BadRequestError, "size 100x100: width must be a multiple of 8", {"size": "100x100"}),
            (openai.BadRequestError, "size 0x0: width must", {"size": "0x0"}),
            (openai.BadRequestError, "size 64x0: height must", {"size": "64x0"}),
            (openai.BadRequestError, "size 0x64: width must", {"size": "0x64"}),
            (openai.BadRequestError, "size 256x256 has too many pixels", {"size": "256x256"}),
            (openai.BadRequestError, "output_format is invalid", {"output_format": "jpeg"}),
            (openai.BadRequestError, "Extra inputs", {"extra_body": {"colour": "red"}}),
            (openai.BadRequestError, "n 3 makes too many images: 3. A job has at most 2", {"n": 3}),
            (openai.BadRequestError, "does not fit into memory", {"prompt": "fail"}),
            (openai.InternalServerError, "ended unexpectedly", {"prompt": "crash"}),
        ):
            with pytest.raises(error, match=words):
                client.images.generate(**{"prompt": "a", **wrong})
            while running.http.get("/readyz").status_code != 200:
                time.sleep(0.05)


def test_errors_name_the_fields_that_were_sent(plain):
    """A request that has only ``size`` must not get an error about ``width``."""
    with client_of(plain) as client:
        for param, beginning, wrong in (
            ("size", "size 100x64: width must", {"size": "100x64"}),
            ("size", "size 64x4000: height must", {"size": "64x4000"}),
            ("size", "size must be WIDTHxHEIGHT or auto, got", {"size": "large"}),
            ("n", "n must be at most 16, got 99", {"n": 99}),
            ("n", "n is invalid", {"n": 0}),
            ("prompt", "prompt must have at most 1000 characters, got 2000", {"prompt": "x" * 2000}),
            ("negative_prompt", "negative_prompt must have", {"extra_body": {"negative_prompt": "x" * 2000}}),
            ("steps", "steps must be at most 100, got 101", {"extra_body": {"steps": 101}}),
            ("seed", "seed 4294967295 is too large", {"n": 2, "extra_body": {"seed": 2**32 - 1}}),
        ):
            with pytest.raises(openai.BadRequestError) as error:
                client.images.generate(**{"prompt": "a", **wrong})
            assert error.value.param == param
            assert error.value.body["message"].startswith(beginning)


def test_fields_with_default_values_are_accepted(plain):
    """Some clients send all fields that they know, each with its default."""
    neutral = {
        "background": "auto",
        "complexity": "low",
        "frame_count": None,
        "frame_duration_ms": None,
        "moderation": "auto",
        "output_compression": 100,
        "output_format": "png",
        "partial_images": 0,
        "quality": "auto",
        "safety_identifier": "somebody",
        "stream": False,
        "style": "vivid",
        "svg": None,
        "user": "somebody",
        "n": None,
        "size": None,
        "model": None,
        "response_format": None,
    }
    with client_of(plain) as client:
        client.images.generate(prompt="a", extra_body={**neutral, "of_tomorrow": None})
        for wrong in (
            {"output_compression": 50},
            {"partial_images": 2},
            {"output_format": "webp"},
            {"background": "transparent"},
            {"frame_count": 9},
            {"stream": True},
        ):
            ((name, _),) = wrong.items()
            with pytest.raises(openai.BadRequestError, match=f"{name} is invalid"):
                client.images.generate(prompt="a", extra_body=wrong)


def test_the_model_is_found_by_its_name(plain):
    with client_of(plain) as client:
        (listed,) = client.models.list().data
        assert client.models.retrieve(listed.id) == listed
        for name in ("gpt-image-2", "somebody/else"):
            with pytest.raises(openai.NotFoundError, match="is not served here") as error:
                client.models.retrieve(name)
            assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_edits_and_variations_do_not_exist(plain):
    """They answered 415 with "use application/json", which led to another refusal."""
    image = ("a.png", b"x" * 1000, "image/png")
    with client_of(plain) as client, pytest.raises(openai.NotFoundError, match="no such route"):
        client.images.edit(image=image, prompt="a")
    assert plain.http.post("/v1/images/variations", files={"image": image}).status_code == 404
    for content_type in ("application/json", "text/plain"):
        answer = plain.http.post("/v1/nowhere", content=b"{}", headers={"content-type": content_type})
        assert answer.status_code == 404


def test_too_many_jobs_raise_a_rate_limit_error(serve):
    running = serve(max_jobs_per_client=1)
    running.draw(prompts=["slowly"], prior_steps=50)
    with client_of(running) as client, pytest.raises(openai.RateLimitError, match="already have 1 open jobs"):
        client.images.generate(prompt="a")


def test_the_job_of_a_disconnected_client_is_cancelled(serve):
    """Otherwise images that nobody receives delay other clients."""
    running = serve()
    with client_of(running, timeout=0.5) as client, pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt="slowly", extra_body={"steps": 100})
    deadline = time.monotonic() + 30
    while 'jobs_total{state="cancelled"} 1.0' not in running.http.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
