"""Measures `wuerstchen serve`: start-up, first preview, batching, many clients, and a killed worker.

    python benchmarks/serving.py [--model MODEL] [--device cuda] [--jobs 32] [--clients 200]

The service runs in its own processes, and the clients in this one, on the same cores.

Start           from the command until its address is printed
First preview   from a request to an idle service until the first preview or image, median of nine
Throughput      --jobs requests to the OpenAI endpoint for one image each, sent at once, with batches and with
                --max-batch 1
Clients         each has a token, and repeatedly requests an image, follows the events of the job, downloads
                the image and compares its settings with the request. A refused client waits for Retry-After.
                "Lost" jobs were accepted but not drawn, and "wrong" images have other settings. Memory is the
                private memory of the service and its workers.
Killed worker   kill -9 with 24 requests waiting: seconds until the service is ready and until the next image,
                and the number of failed jobs
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

THINGS = (
    "a cat",
    "a red car",
    "a green tree",
    "a pizza",
    "a rocket",
    "an umbrella",
    "a blue house",
    "a camel",
)


class Service:
    """`wuerstchen serve` in its own process. It is ready once constructed."""

    def __init__(self, options: list[str], tokens: int = 1) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.tokens = [secrets.token_urlsafe(24) for _ in range(tokens)]
        path = Path(self.folder.name) / "tokens"
        path.write_text("\n".join(self.tokens))
        command = [sys.executable, "-m", "wuerstchen", "serve", "--port", "0", "--token-file", str(path)]
        command += ["--max-requests-per-second", "0"]  # no limit, to keep the service busy
        began = time.perf_counter()
        self.log = open(Path(self.folder.name) / "log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.start_seconds = time.perf_counter() - began
        if not line:
            sys.exit(f"The service did not start: {(Path(self.folder.name) / 'log').read_text()}")
        self.url = line.split()[-1]

    def client(self, token: int = 0) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.tokens[token]}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120, trust_env=False)

    def processes(self) -> list[int]:
        """The ids of the service and its child processes."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def worker(self) -> int:
        """The worker with the model, which is the largest process."""
        return max(self.processes()[1:], key=private_bytes)

    def memory(self) -> float:
        """Private memory of all processes in MiB."""
        return sum(map(private_bytes, self.processes())) / 2**20

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.log.close()
        self.folder.cleanup()


def private_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        values = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return 1024 * (values["Private_Clean"] + values["Private_Dirty"])
    return 0


async def events(client: httpx.AsyncClient, job: str) -> Any:
    """Yields the (name, data) of each event until the job ends."""
    async with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
        answer.raise_for_status()
        name = ""
        async for line in answer.aiter_lines():
            word, _, value = line.partition(": ")
            if word == "event":
                name = value
            elif word == "data":
                yield name, json.loads(value)


async def first_preview(service: Service) -> float:
    seconds = []
    async with service.client() as client:
        for _ in range(9):
            began = time.perf_counter()
            job = (await client.post("/v1/jobs", json={"prompts": ["a cat"]})).json()
            found = None
            async for name, _ in events(client, job["id"]):
                if name in ("preview", "image") and found is None:
                    found = time.perf_counter() - began
            assert found is not None
            seconds.append(found)
    return statistics.median(seconds)


def throughput(service: Service, jobs: int) -> float:
    """Images per second."""

    def draw(seed: int) -> None:
        body = json.dumps({"prompt": THINGS[seed % len(THINGS)], "seed": seed}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {service.tokens[0]}"}
        with urllib.request.urlopen(  # httpx's pool is slower than the service
            urllib.request.Request(f"{service.url}/v1/images/generations", body, headers), timeout=120
        ) as answer:
            answer.read()

    with ThreadPoolExecutor(jobs) as clients:
        # A single request and then a full batch warm up the kernels.
        for count in (1, jobs, jobs):
            began = time.perf_counter()
            list(clients.map(draw, range(count)))
    return jobs / (time.perf_counter() - began)


class Load:
    """Many simultaneous clients, and the outcomes of their requests."""

    def __init__(self, service: Service, seconds: float) -> None:
        self.service = service
        self.until = time.perf_counter() + seconds
        self.counts = dict.fromkeys(("drawn", "refused", "refused without Retry-After", "lost", "wrong"), 0)
        self.waits: list[float] = []

    async def client(self, number: int) -> None:
        draw = random.Random(number)
        async with self.service.client(number) as client:
            await asyncio.sleep(draw.random())
            while time.perf_counter() < self.until:
                wait = await self.request(client, draw)
                await asyncio.sleep(min(wait, max(0.0, self.until - time.perf_counter())))

    async def request(self, client: httpx.AsyncClient, draw: random.Random) -> float:
        """Requests one image. Returns the seconds to wait before the next request."""
        prompt, seed = draw.choice(THINGS), draw.randrange(2**32)
        began = time.perf_counter()
        try:
            answer = await client.post("/v1/jobs", json={"prompts": [prompt], "seed": seed})
            if answer.status_code == 429:
                self.counts["refused"] += 1
                if "retry-after" not in answer.headers:
                    self.counts["refused without Retry-After"] += 1
                return float(answer.headers.get("retry-after", 1))
            answer.raise_for_status()
            url = None
            async for name, data in events(client, answer.json()["id"]):
                url = data["url"] if name == "image" else url
            content = (await client.get(url or "/nowhere")).raise_for_status().content
        except httpx.HTTPError:
            self.counts["lost"] += 1
            return 0.0
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            settings = json.loads(image.info["wuerstchen"])
        right = settings["prompts"] == [prompt] and settings["seed"] == seed
        self.counts["drawn" if right else "wrong"] += 1
        self.waits.append(time.perf_counter() - began)
        return 0.0


async def load(service: Service, clients: int, seconds: float) -> dict[str, Any]:
    many = Load(service, seconds)
    tasks = [asyncio.create_task(many.client(number)) for number in range(clients)]
    await asyncio.sleep(seconds / 2)
    middle = service.memory()
    await asyncio.sleep(max(0.0, many.until - time.perf_counter()))
    end = service.memory()
    await asyncio.gather(*tasks)
    waits = sorted(many.waits)
    return {
        "clients": clients,
        "seconds": seconds,
        **many.counts,
        "median_wait": statistics.median(waits) if waits else None,
        "longest_wait": waits[-1] if waits else None,
        "memory_middle_mib": middle,
        "memory_end_mib": end,
        "memory_growth": end / middle - 1,
    }


async def killed_worker(service: Service, jobs: int = 24) -> dict[str, Any]:
    async with service.client() as client:
        killed: list[float] = []
        drawn: list[float] = []
        recovery: list[asyncio.Task[float]] = []

        async def ready_again() -> float:
            await asyncio.sleep(0.5)  # until the service notices
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.05)
            return time.perf_counter() - killed[0]

        async def draw(seed: int) -> str:
            body = {"prompts": ["a cat"], "seed": seed, "previews": False}
            job = (await client.post("/v1/jobs", json=body)).json()
            last = ""
            async for name, _ in events(client, job["id"]):
                last = name
                if name == "progress" and not killed:
                    killed.append(time.perf_counter())
                    os.kill(service.worker(), signal.SIGKILL)
                    recovery.append(asyncio.create_task(ready_again()))
                elif name == "image" and killed:
                    drawn.append(time.perf_counter() - killed[0])
            return last

        ends = await asyncio.gather(*(draw(seed) for seed in range(jobs)))
        ready = await recovery[0]
    failed, done = ends.count("failed"), ends.count("done")
    # Images drawn before the kill reach their clients within half a second.
    after = [seconds for seconds in drawn if seconds > 0.5]
    found = {"ready_seconds": ready, "image_seconds": min(after, default=None)}
    return {**found, "failed": failed, "done": done, "lost": jobs - failed - done}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=32)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--skip", nargs="*", default=[], choices=("preview", "throughput", "load", "kill"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    common = [
        "--max-jobs-per-client",
        str(max(64, options.jobs)),
        "--max-waiting",
        str(max(128, options.jobs)),
    ]
    for name in ("model", "device"):
        if getattr(options, name) is not None:
            common += [f"--{name}", getattr(options, name)]
    batched = [*common, "--max-batch", str(options.max_batch)]

    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}

    def show(name: str, value: Any) -> None:
        found[name] = value
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in rows:
            text = f"{number:.3f}" if isinstance(number, float) else str(number)
            print(f"{f'{name} {part}':45} {text}", flush=True)

    with Service(batched, max(1, options.clients)) as service:
        show("start to ready, s", service.start_seconds)
        if "preview" not in options.skip:
            show("first preview, s", asyncio.run(first_preview(service)))
        if "throughput" not in options.skip:
            show("images per second, in batches", throughput(service, options.jobs))
        if "load" not in options.skip:
            show("clients:", asyncio.run(load(service, options.clients, options.seconds)))
        if "kill" not in options.skip:
            show("killed worker:", asyncio.run(killed_worker(service)))
    if "throughput" not in options.skip:
        with Service([*common, "--max-batch", "1"]) as service:
            show("images per second, one at a time", throughput(service, options.jobs))
        gain = found["images per second, in batches"] / found["images per second, one at a time"]
        show("gain of batches", gain)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
