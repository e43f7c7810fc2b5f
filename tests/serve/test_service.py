"""Jobs over HTTP, with a stand-in for the worker process: events, cancelling, limits and shutdown."""

import asyncio
import base64
import io
import shutil
import time

from PIL import Image

from wuerstchen.image_files import read_settings
from wuerstchen.serve import service as service_module
from wuerstchen.serve import streams


def names(events):
    """The names of events, without consecutive repeats."""
    found = []
    for name, _ in events:
        if found[-1:] != [name]:
            found.append(name)
    return found


def test_a_job_from_start_to_end(serve):
    running = serve()
    job = running.draw(prompts=["a cat", "a dog"], count=2, seed=7, negative="a cow", guidance=3)
    assert job["state"] == "queued"
    assert job["position"] == 1
    assert job["total"] == 4
    assert job["settings"] == {
        "kind": "generate",
        "prompts": ["a cat", "a dog"],
        "negative": "a cow",
        "count": 2,
        "width": 64,
        "height": 64,
        "seed": 7,
        "guidance": 3.0,
        "guidance_interval": [0.0, 1.0],
        "prior_steps": 6,
        "prior_sampler": "ddpm",
        "decoder_steps": 4,
        "strength": None,
    }
    events = list(running.events(job))
    assert events[-1] == ("done", {})
    kinds = {name for name, _ in events}
    assert (
        {"running", "image", "done"} <= kinds <= {"queued", "running", "progress", "preview", "image", "done"}
    )
    images = sorted((data for name, data in events if name == "image"), key=lambda image: image["index"])
    assert [(i["index"], i["prompt"], i["seed"]) for i in images] == [
        (0, "a cat", 7),
        (1, "a cat", 8),
        (2, "a dog", 9),
        (3, "a dog", 10),
    ]
    fractions = [data["fraction"] for name, data in events if name == "progress"]
    assert fractions == sorted(fractions)
    ended = running.http.get(f"/v1/jobs/{job['id']}").json()
    assert (ended["state"], ended["progress"], ended["position"], ended["images"]) == ("done", 1.0, 0, images)


def test_an_image_contains_the_settings_to_reproduce_it(serve, tmp_path):
    """It must also say that a model made it."""
    running = serve()
    job = running.wait(
        running.draw(prompts=["ein Kätzchen"], seed=5, guidance_interval=[0.2, 0.8], width=128)
    )
    answer = running.http.get(job["images"][0]["url"])
    assert answer.headers["content-type"] == "image/png"
    assert "immutable" in answer.headers["cache-control"]
    path = tmp_path / "x.png"
    path.write_bytes(answer.content)
    settings = read_settings(path)
    assert b"trainedAlgorithmicMedia" in answer.content
    assert b"Software" in answer.content
    model = settings.pop("model")
    assert model == "wuerstchen"
    again = running.http.post("/v1/jobs", json=settings).json()
    assert again["settings"] == {**job["settings"], "count": 1}
    assert again["settings"]["guidance_interval"] == [0.2, 0.8]


def test_the_settings_of_a_reconstruction_can_be_sent_again(serve):
    """They contained prompts, guidance and Stage C steps, which a reconstruction refuses."""
    running = serve()
    Image.new("RGB", (96, 64), "red").save(buffer := io.BytesIO(), "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    job = running.http.post("/v1/jobs", json={"kind": "reconstruct", "image": image, "seed": 7}).json()
    settings = {"kind": "reconstruct", "width": 64, "height": 64, "seed": 7, "decoder_steps": 4}
    assert job["settings"] == settings
    again = running.http.post("/v1/jobs", json={**settings, "image": image})
    assert (again.status_code, again.json()["settings"]) == (202, settings)


def test_the_model_view_says_how_long_images_are_kept(serve):
    assert serve(result_seconds=60.0).http.get("/v1/model").json()["limits"]["result_seconds"] == 60.0


def test_a_missing_seed_is_random_and_reported(serve):
    running = serve()
    seeds = {running.draw()["settings"]["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_previews_are_sent_only_on_request(serve):
    running = serve()
    for previews in (True, False):
        job = running.draw(prompts=["slowly"], prior_steps=2, decoder_steps=1, previews=previews)
        assert ("preview" in names(running.events(job))) == previews


def test_a_stream_resumes_where_it_stopped(serve):
    running = serve()
    job = running.draw(prompts=["a", "b"])
    whole = list(running.events(job))
    with running.http.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        numbers = [int(line[4:]) for line in answer.iter_lines() if line.startswith("id: ")]
    kept = [(name, data) for name, data in whole if name in ("running", "image", "done")]
    for place, number in enumerate(numbers[:-1]):
        rest = list(running.events(job, **{"Last-Event-ID": str(number)}))
        assert rest == kept[place + 1 :]
    assert list(running.events(job, **{"Last-Event-ID": str(numbers[-1])})) == []
    assert list(running.events(job, **{"Last-Event-ID": "nonsense"})) == kept


def test_a_cancelled_job_stops_within_one_step(serve):
    """Otherwise a worker generates unwanted images to the end while others wait."""
    running = serve()
    job = running.draw(prompts=["slowly"], prior_steps=100)
    events = running.events(job)
    while next(events)[0] != "progress":
        pass
    began = time.monotonic()
    answer = running.http.delete(f"/v1/jobs/{job['id']}")
    assert answer.status_code == 202
    assert answer.json()["state"] == "cancelled"
    assert names(events)[-1] == "cancelled"
    assert running.wait(running.draw())["state"] == "done"
    assert time.monotonic() - began < 10  # a step takes 0.2 s, and all of them twenty
    assert running.http.delete(f"/v1/jobs/{job['id']}").status_code == 200


def test_the_open_streams_of_a_client_are_limited(serve, monkeypatch):
    """A client that keeps streams open would use up the file descriptors."""
    monkeypatch.setattr(streams, "STREAMS_PER_CLIENT", 2)
    running = serve()
    url = f"/v1/jobs/{running.draw(prompts=['slowly'], prior_steps=100)['id']}/events"
    with running.http.stream("GET", url) as first, running.http.stream("GET", url) as second:
        assert (first.status_code, second.status_code) == (200, 200)
        refused = running.http.get(url)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
    deadline = time.monotonic() + 15
    while running.call(lambda: len(running.service.streams)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with running.http.stream("GET", url) as again:
        assert again.status_code == 200


def test_the_memory_for_init_images_is_limited(serve, monkeypatch):
    """256 queued jobs could each hold tens of megabytes."""
    monkeypatch.setattr(service_module, "IMAGE_BYTES", 64 * 64 * 3)
    running = serve(max_batch=1)
    Image.new("RGB", (64, 64), "red").save(buffer := io.BytesIO(), "PNG")
    begin = {"image": base64.b64encode(buffer.getvalue()).decode()}
    first = running.draw(prompts=["slowly"], prior_steps=4, **begin)
    refused = running.http.post("/v1/jobs", json={"prompts": ["a cat"], **begin})
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert running.wait(running.draw())["state"] == "done"
    assert running.wait(first)["state"] == "done"
    assert running.wait(running.draw(**begin))["state"] == "done"


def test_the_position_in_the_queue_is_updated(serve):
    """It stayed the same as when the job was created."""
    running = serve(max_batch=1)
    for _ in range(2):
        running.draw(prompts=["slowly"], prior_steps=3, decoder_steps=1)
    events = list(running.events(running.draw()))
    assert [data["position"] for name, data in events if name == "queued"] == [2, 1]


def test_a_full_queue_is_refused_with_retry_after(serve):
    running = serve(max_waiting=4, max_jobs_per_client=3, max_batch=1)
    running.draw(prompts=["slowly"], prior_steps=20)
    time.sleep(0.1)
    running.draw(count=3)
    full = running.http.post("/v1/jobs", json={"prompts": ["a"], "count": 2})
    running.draw()
    many = running.http.post("/v1/jobs", json={"prompts": ["a"]})
    for answer, words in ((full, "the limit is 4"), (many, "already have 3 open jobs")):
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 600
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert words in answer.json()["error"]["message"]


def test_clients_take_turns(serve, tmp_path):
    """One client's many jobs must not block another client's."""
    one, other = "first-token-of-all", "second-token-of-all"
    running = serve(tokens=(one, other), max_batch=1)

    def post(token, **body):
        headers = {"Authorization": f"Bearer {token}"}
        return running.http.post("/v1/jobs", json={"prompts": ["a"], **body}, headers=headers).json()

    def state(token, job):
        return running.http.get(f"/v1/jobs/{job['id']}", headers={"Authorization": f"Bearer {token}"}).json()

    greedy = post(one, count=10, prior_steps=50)
    modest = post(other)
    while (now := state(other, modest))["state"] != "done":
        assert now["state"] != "failed"
        time.sleep(0.01)
    assert state(one, greedy)["state"] == "running"


def test_results_expire(serve, monkeypatch):
    running = serve(result_seconds=0.5)
    job = running.wait(running.draw())
    url = job["images"][0]["url"]
    time.sleep(0.6)
    assert running.http.get(url).status_code == 404
    time.sleep(0.4)
    gone = running.http.get(f"/v1/jobs/{job['id']}")
    assert gone.status_code == 404
    assert "ended long ago" in gone.json()["error"]["message"]


def test_draining_finishes_running_jobs_and_fails_queued_ones(serve):
    running = serve(max_batch=1, grace=20.0)
    begun = running.draw(prompts=["slowly"], prior_steps=5)
    while running.http.get(f"/v1/jobs/{begun['id']}").json()["state"] == "queued":
        time.sleep(0.01)
    waits = running.draw()
    draining = asyncio.run_coroutine_threadsafe(running.service.drain(), running.loop)
    failed = running.wait(waits)
    assert failed["state"] == "failed"
    assert "shutting down and cannot finish this job" in failed["error"]
    refused = running.http.post("/v1/jobs", json={"prompts": ["a"]})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
    assert running.http.get("/readyz").status_code == 503
    assert running.http.get("/healthz").status_code == 200
    assert running.wait(begun)["state"] == "done"
    draining.result(10)


def test_jobs_that_exceed_the_grace_time_fail(serve):
    running = serve(grace=0.3)
    job = running.draw(prompts=["slowly"], prior_steps=100)
    asyncio.run_coroutine_threadsafe(running.service.drain(), running.loop).result(10)
    assert "shutting down and cannot finish this job" in running.wait(job)["error"]


def test_the_filter_checks_prompts_and_images(serve, monkeypatch, tmp_path):
    (tmp_path / "rules.py").write_text(
        "def check(prompt, image):\n"
        "    if 'bad' in prompt:\n        return 'this prompt is against the rules'\n"
        "    if image is not None and image.getpixel((0, 0))[0] == 66:\n        return 'this picture is'\n"
        "    if 'broken' in prompt:\n        raise ValueError\n"
    )
    monkeypatch.chdir(tmp_path)
    running = serve(filter="rules:check")
    refused = running.http.post("/v1/jobs", json={"prompts": ["good", "bad"]})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "content_policy_violation"
    assert "against the rules" in refused.json()["error"]["message"]
    assert running.wait(running.draw(seed=65))["state"] == "done"
    job = running.wait(running.draw(seed=66))
    assert (job["state"], job["error"], job["images"]) == ("failed", "this picture is", [])
    assert running.http.post("/v1/jobs", json={"prompts": ["broken"]}).status_code == 500


def test_prompts_are_logged_only_on_request(serve, caplog):
    caplog.set_level("INFO", logger="wuerstchen.serve")
    for logs in (False, True):
        running = serve(log_prompts=logs)
        for prompt in ("sekret fail", "sekret crash", "sekret"):
            running.wait(running.draw(prompts=[prompt]))
        running.http.post("/v1/jobs", json={"prompts": ["sekret"], "width": 3})
        assert ("sekret" in caplog.text) == logs
    assert "generate, images: 1" in caplog.text


def test_job_ids_are_not_logged(serve, caplog):
    """Whoever reads the log could read, follow and cancel everybody's jobs."""
    caplog.set_level("DEBUG")
    running = serve()
    job = running.wait(running.draw())
    failed = running.wait(running.draw(prompts=["crash"]))
    while running.http.get("/readyz").status_code != 200:
        time.sleep(0.05)
    cancelled = running.draw(prompts=["slowly"], prior_steps=100)
    running.http.delete(f"/v1/jobs/{cancelled['id']}")
    # The client of the test logs its own requests.
    text = "\n".join(r.getMessage() for r in caplog.records if not r.name.startswith("http"))
    for one in (job, failed, cancelled):
        # The log has the beginning of the id. The rest has 96 bits.
        beginning, rest = one["id"][:-24], one["id"][-24:]
        assert text.count(f"job {beginning}:") == 2
        assert rest not in text
    assert job["images"][0]["url"].rpartition("/")[2] not in text


def test_a_job_belongs_to_its_token(serve):
    """A leaked id was enough for another client to read the prompts and cancel the job."""
    mine, others = "first-token-of-all", "second-token-of-all"
    running = serve(tokens=(mine, others))

    def ask(token, method, path, **more):
        headers = {"Authorization": f"Bearer {token}"}
        answer = running.http.request(method, path, headers=headers, **more)
        return answer.status_code, answer.json()

    _, job = ask(mine, "POST", "/v1/jobs", json={"prompts": ["slowly"], "prior_steps": 100})
    address = f"/v1/jobs/{job['id']}"
    unknown = f"{address[:-1]}{'0' if address[-1] != '0' else '1'}"
    for method, path in (("GET", address), ("DELETE", address), ("GET", f"{address}/events")):
        refused = ask(others, method, path)
        assert refused == ask(others, method, path.replace(address, unknown))
        assert (refused[0], refused[1]["error"]["code"]) == (404, "job_not_found")
    assert ask(mine, "GET", address)[1]["state"] in ("queued", "running")
    assert ask(mine, "DELETE", address)[1]["state"] == "cancelled"


def test_without_tokens_a_job_is_found_from_any_address(serve):
    """A phone that changes networks would lose its images."""
    running = serve(proxies=("127.0.0.1",))
    first, second = ({"X-Forwarded-For": address} for address in ("10.1.1.1", "10.1.1.2"))
    job = running.http.post("/v1/jobs", json={"prompts": ["a cat"]}, headers=first).json()
    assert running.http.get(f"/v1/jobs/{job['id']}", headers=second).status_code == 200


def test_metrics_count(serve):
    running = serve()
    running.wait(running.draw(count=3))
    running.http.post("/v1/jobs", json={"prompts": []})
    text = running.http.get("/metrics").text  # without waiting for the monitor
    for line in (
        "wuerstchen_queue_pictures 0.0",
        "wuerstchen_jobs_open 0.0",
        "wuerstchen_workers_ready 1.0",
        'wuerstchen_jobs_total{state="done"} 1.0',
        'wuerstchen_pictures_total{kind="generate"} 3.0',
        'wuerstchen_refusals_total{reason="400"} 1.0',
        'wuerstchen_stage_seconds_count{stage="Stage B"} 1.0',
        'wuerstchen_worker_memory_bytes{device="default"} 1000.0',
        "process_resident_memory_bytes",
    ):
        assert line in text, line


def test_an_image_that_cannot_be_saved_fails_its_job_without_exposing_the_path(serve, tmp_path):
    running = serve()
    shutil.rmtree(tmp_path / "results")
    (tmp_path / "results").touch()
    ended = running.wait(running.draw())
    assert ended["state"] == "failed"
    assert "could not be saved" in ended["error"]
    assert str(tmp_path) not in ended["error"]
