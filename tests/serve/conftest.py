"""A service in this process, with a stand-in for the worker or the real one. Its server runs in a thread."""

import asyncio
import contextlib
import threading
from pathlib import Path

import httpx
import pytest
import torch

from wuerstchen.serve import worker
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.server import address, listen, make_server
from wuerstchen.serve.service import Service


class Running:
    """A running service. ``call`` runs a function on its event loop."""

    def __init__(self, config, worker_main):
        self.config = config
        self.listening = listen(config.host, config.port)
        self.url = address(self.listening)
        self._main = worker_main
        self._up = threading.Event()
        self._failed = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._up.wait(60), "the service did not start"
        if self._failed is not None:
            self.listening.close()
            raise self._failed
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def _serve(self):
        try:
            asyncio.run(self._run())
        except BaseException as error:
            self._failed = error
            self._up.set()

    async def _run(self):
        self.loop = asyncio.get_running_loop()
        self.service = Service(self.config, self._main)
        server = self.server = make_server(self.service)
        await self.service.start()
        serving = asyncio.create_task(server.serve(sockets=[self.listening]))
        await self.service.started.wait()
        while not server.started:
            await asyncio.sleep(0.01)
        self._up.set()
        await serving
        await self.service.stop()

    def call(self, function):
        async def run():
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)

    def close(self):
        self.server.should_exit = True
        self._thread.join(30)
        self.listening.close()
        self.http.close()
        assert not self._thread.is_alive(), "the service did not stop"

    def draw(self, **body):
        answer = self.http.post("/v1/jobs", json={"prompts": ["a cat"], **body})
        assert answer.status_code == 202, answer.text
        return answer.json()

    def wait(self, job):
        """Waits for the end of a job, and returns it."""
        for _ in self.events(job):
            pass
        return self.http.get(f"/v1/jobs/{job['id']}").json()

    def events(self, job, **headers):
        """Yields (name, data) until the job has ended."""
        with self.http.stream("GET", f"/v1/jobs/{job['id']}/events", headers=headers) as answer:
            yield from parsed(answer)


def parsed(answer):
    import json

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    name = None
    for line in answer.iter_lines():
        word, _, value = line.partition(": ")
        if word == "event":
            name = value
        elif word == "data":
            yield name, json.loads(value)


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Starts services, and stops them at the end of the test."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # the worker process inherits this path
    import fake_worker

    with contextlib.ExitStack() as stack:

        def start(*, real=False, **settings):
            settings.setdefault("results_dir", tmp_path / "results")
            # Tests poll until a condition holds.
            settings.setdefault("max_requests_per_second", 0.0)
            config = ServeConfig(port=0, **settings)
            running = Running(config, worker.main if real else fake_worker.main)
            stack.callback(running.close)
            return running

        yield start


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A shared service with the stand-in, for tests that do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        import fake_worker

        folder = tmp_path_factory.mktemp("results")
        config = ServeConfig(
            port=0, results_dir=folder, allowed_hosts=("draw.example",), max_requests_per_second=0.0
        )
        running = Running(config, fake_worker.main)
    yield running
    running.close()


@pytest.fixture(scope="session")
def exact(request, tmp_path_factory):
    """``real``, but always in float32."""
    if not torch.cuda.is_available():
        yield request.getfixturevalue("real")
        return
    config = ServeConfig(port=0, results_dir=tmp_path_factory.mktemp("results"), precision="float32")
    running = Running(config, worker.main)
    yield running
    running.close()


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """A shared service with the bundled model, for tests that do not change it."""
    running = Running(ServeConfig(port=0, results_dir=tmp_path_factory.mktemp("results")), worker.main)
    yield running
    running.close()
