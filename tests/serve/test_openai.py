"""The client that people have: the real ``openai`` package."""

import base64
import io
import time

import httpx
import openai
import pytest
from PIL import Image

from wuerstchen.images import read_settings

TOKEN = "a-token-of-some-length"


def client_of(running, **options):
    http = openai.DefaultHttpxClient(trust_env=False)
    options = {"api_key": "none", "max_retries": 0, **options}
    return openai.OpenAI(base_url=f"{running.url}/v1", http_client=http, **options)


@pytest.mark.parametrize("form", ["url", "b64_json", None])
def test_pictures_come_as_the_client_expects_them(serve, form, tmp_path):
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


def test_the_model_in_the_package_draws_for_it(real):
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


def test_errors_are_those_of_the_client(serve):
    running = serve(max_waiting=2, tokens=(TOKEN,))
    with client_of(running) as client, pytest.raises(openai.AuthenticationError, match="token is missing"):
        client.images.generate(prompt="a")
    with client_of(running, api_key=TOKEN) as client:
        for error, words, wrong in (
            (openai.NotFoundError, "is not served here", {"model": "dall-e-3"}),
            (openai.BadRequestError, "must be WIDTHxHEIGHT", {"size": "large"}),
            (openai.BadRequestError, "multiples of 8", {"size": "100x100"}),
            (openai.BadRequestError, "output_format is wrong", {"output_format": "jpeg"}),
            (openai.BadRequestError, "Extra inputs", {"extra_body": {"colour": "red"}}),
            (openai.BadRequestError, "2 pictures is the most", {"n": 3}),
            (openai.BadRequestError, "does not fit into memory", {"prompt": "fail"}),
            (openai.InternalServerError, "ended before its time", {"prompt": "crash"}),
        ):
            with pytest.raises(error, match=words):
                client.images.generate(**{"prompt": "a", **wrong})
            while running.http.get("/readyz").status_code != 200:
                time.sleep(0.05)


def test_too_many_jobs_are_the_clients_rate_limit(serve):
    running = serve(max_jobs_per_client=1)
    running.draw(prompts=["slowly"], prior_steps=50)
    with client_of(running) as client, pytest.raises(openai.RateLimitError, match="a client may have 1"):
        client.images.generate(prompt="a")


def test_a_client_that_goes_away_leaves_no_job(serve):
    """Pictures for nobody, drawn while others wait."""
    running = serve()
    with client_of(running, timeout=0.5) as client, pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt="slowly", extra_body={"steps": 100})
    deadline = time.monotonic() + 30
    while 'jobs_total{state="cancelled"} 1.0' not in running.http.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
