"""A fake service for the page: simple images, and delays and failures as a test requests.

``python tests/serve/page/fake_service.py`` serves it on port 8765, to look at the page.
"""

import asyncio
import base64
import binascii
import contextlib
import io
import json
import random
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image, ImageDraw

import wuerstchen

PAGE = Path(wuerstchen.__file__).parent / "serve" / "page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
ENDS = ("done", "failed", "cancelled")
DEFAULTS = {"guidance": 4.0, "prior_steps": 12, "decoder_steps": 4, "prior_sampler": "dpm"}
EXAMPLES = [
    "a 3D render of a purple camel on a blue background",
    "a flat illustration of a red apple",
    "a noto emoji of a cat",
    "a twemoji of a rocket on a black background",
    "a 3D render of a green car",
]


class Job:
    """A drawing: its resolved settings and the events so far."""

    def __init__(self, number: int, body: dict[str, Any], settings: dict[str, Any]) -> None:
        self.id = f"fake-{number}"
        self.body = body
        self.settings = settings
        self.total = max(len(settings.get("prompts") or []), 1) * settings.get("count", 1)
        self.state = "queued"
        self.progress = 0.0
        self.images: list[dict[str, Any]] = []
        self.error: str | None = None
        self.notices: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.cancelled = False
        self.created = int(time.time())

    def tell(self, name: str, **data: Any) -> None:
        self.events.append((name, data))
        if name in ("queued", "running", *ENDS):
            self.state = name
        elif name == "progress":
            self.progress = data["fraction"]
        if name == "failed":
            self.error = data["message"]

    def shown(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "state": self.state,
            "position": 1 if self.state == "queued" else 0,
            "kind": self.body.get("kind", "generate"),
            "settings": self.settings,
            "total": self.total,
            "progress": self.progress,
            "images": self.images,
            "error": self.error,
            "notices": self.notices,
            "created": self.created,
        }


class FakeService:
    """Served by a thread; what a test changes holds from the next request on."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.reset()
        self._server: uvicorn.Server | None = None

    def reset(self) -> None:
        self.step_delay = 0.01
        """Seconds of a step."""
        self.steps_until_pause: int | None = None
        """A job waits after so many steps until this is None."""
        self.hold_queue = False
        self.fail_with: str | None = None
        """What the next jobs fail with, halfway."""
        self.refuse: tuple[int, str, str | None] | None = None
        """Status, message and param of the answer to the next jobs."""
        self.proxy: tuple[str, int, str] | None = None
        """What a proxy answers in the service's place: beginning of the path, status and text."""
        self.token: str | None = None
        self.notices: list[str] = []
        """Of the next jobs."""
        self.can = {"generate": True, "reconstruct": True, "variation": True, "preview": True}
        self.defaults = DEFAULTS
        self.image_note: str | None = None
        self.loras: list[dict[str, Any]] = []
        self.result_seconds = 3600.0
        self.hold_answers = False
        """Whether new jobs are answered only when this is false again."""
        self.drop_streams_after: int | None = None
        """Events after which each stream breaks off."""
        self.jobs: dict[str, Job] = {}
        self.files: dict[str, bytes] = {}
        self.streams = 0
        """Open ones."""
        self.resumed_from: list[str] = []
        """Last-Event-ID headers that came."""

    def start(self) -> None:
        self._stopping = False
        config = uvicorn.Config(
            self._app(),
            port=self.port,
            log_config=None,  # it would change the loggers of the whole process
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,  # a browser may hold on to a stream
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Streams break off at once, and what was being drawn never ends."""
        assert self._server is not None
        self._stopping = True
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the service did not stop"
        self._server = None

    def forget_images(self) -> None:
        self.files.clear()

    def model(self) -> dict[str, Any]:
        return {
            "name": "bundled",
            "version": "0",
            "device": "cpu",
            "size": {
                "default": [256, 256],
                "multiple": 8,
                "min": 64,
                "max_side": 1024,
                "max_pixels": 1024 * 1024,
                "common": [[256, 256], [384, 256], [256, 384], [512, 512]],
            },
            "defaults": self.defaults,
            "full": DEFAULTS,
            "limits": {
                "count": 8,
                "prompt_chars": 500,
                "steps": 100,
                "upload_bytes": 1 << 20,
                "prompts": 8,
                "result_seconds": self.result_seconds,
            },
            "image_note": self.image_note,
            "samplers": ["ddpm", "dpm", "ddim"],
            "loras": self.loras,
            "can": self.can,
            "examples": EXAMPLES,
        }

    def _app(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None)

        @app.middleware("http")
        async def guard(request: Request, call_next: Any) -> Response:
            path = request.url.path
            if self.proxy and path.startswith(self.proxy[0]):
                return Response(self.proxy[2], self.proxy[1], media_type="text/html")
            closed = path.startswith("/v1/") and not path.startswith("/v1/images/")
            if self.token and closed and request.headers.get("authorization") != f"Bearer {self.token}":
                return _error(401, "The token is missing or unknown.", "authentication_error")
            response = await call_next(request)
            response.headers["Content-Security-Policy"] = CSP
            response.headers["X-Content-Type-Options"] = "nosniff"
            return response

        @app.get("/")
        async def index() -> Response:
            return Response((PAGE / "index.html").read_bytes(), media_type="text/html")

        @app.get("/page/{name}")
        async def page(name: str) -> Response:
            path = PAGE / name
            if path.suffix not in TYPES or not path.is_file():
                return _error(404, "There is no such file.", "not_found_error")
            return Response(path.read_bytes(), media_type=TYPES[path.suffix])

        @app.get("/v1/model")
        async def model() -> dict[str, Any]:
            return self.model()

        @app.post("/v1/jobs", status_code=202)
        async def create(request: Request) -> Any:
            body = await request.json()
            if self.refuse:
                status, message, param = self.refuse
                return _error(status, message, "invalid_request_error", param)
            problem = _problem(body)
            if problem:
                return _error(400, problem[1], "invalid_request_error", problem[0])
            while self.hold_answers:
                await asyncio.sleep(0.01)
            job = Job(len(self.jobs) + 1, body, _resolved(body))
            job.notices = list(self.notices)
            self.jobs[job.id] = job
            job.tell("queued", position=1)
            app.state.tasks = {*getattr(app.state, "tasks", ()), asyncio.create_task(self._draw(job))}
            return job.shown()

        @app.get("/v1/jobs/{name}")
        async def job(name: str) -> Any:
            if name not in self.jobs:
                return _error(404, "There is no such job. It may have ended long ago.", "not_found_error")
            return self.jobs[name].shown()

        @app.delete("/v1/jobs/{name}", status_code=202)
        async def cancel(name: str) -> Any:
            self.jobs[name].cancelled = True
            return self.jobs[name].shown()

        @app.get("/v1/jobs/{name}/events")
        async def events(name: str, request: Request) -> Any:
            if name not in self.jobs:
                return _error(404, "There is no such job. It may have ended long ago.", "not_found_error")
            last = request.headers.get("last-event-id")
            if last is not None:
                self.resumed_from.append(last)
            stream = self._events(self.jobs[name], 0 if last is None else int(last))
            return StreamingResponse(stream, media_type="text/event-stream")

        @app.get("/v1/images/{name}")
        async def image(name: str) -> Response:
            if name not in self.files:
                return _error(404, "There is no such image, or it has expired.", "not_found_error")
            return Response(self.files[name], media_type="image/png")

        return app

    async def _events(self, job: Job, at: int) -> AsyncIterator[str]:
        self.streams += 1
        try:
            async for line in self._lines(job, at):
                yield line
        finally:
            self.streams -= 1

    async def _lines(self, job: Job, at: int) -> AsyncIterator[str]:
        sent = 0
        while not self._stopping:
            while at < len(job.events):
                if self.drop_streams_after is not None and sent >= self.drop_streams_after:
                    return
                name, data = job.events[at]
                at, sent = at + 1, sent + 1
                yield f"id: {at}\nevent: {name}\ndata: {json.dumps(data)}\n\n"
                if name in ENDS:
                    return
            yield ": still there\n\n"
            await asyncio.sleep(0.01)

    async def _draw(self, job: Job) -> None:
        while self.hold_queue and not job.cancelled:
            await asyncio.sleep(0.01)
        if not job.cancelled:
            job.tell("running")
        stages = [("Stage C", 12), ("Stage B", 4)] if job.shown()["kind"] == "generate" else [("Stage B", 4)]
        done, total = 0, sum(steps for _, steps in stages)
        images = [_image(job.settings, index) for index in range(job.total)]
        for stage, steps in stages:
            for step in range(1, steps + 1):
                await asyncio.sleep(self.step_delay)
                while self.steps_until_pause == done and not job.cancelled:
                    await asyncio.sleep(0.01)
                if job.cancelled:
                    job.tell("cancelled")
                    return
                done += 1
                job.tell("progress", stage=stage, step=step, steps=steps, fraction=done / total)
                if self.fail_with and done >= total / 2:
                    job.tell("failed", message=self.fail_with)
                    return
                if job.body.get("previews", True) and step % 3 == 0:
                    for index, image in enumerate(images):
                        job.tell(
                            "preview", index=index, width=24, height=24, image=_preview(image, done / total)
                        )
        for index, image in enumerate(images):
            name = f"{job.id}-{random.getrandbits(64):x}.png"
            file = io.BytesIO()
            image.save(file, "PNG")
            self.files[name] = file.getvalue()
            told = {
                "index": index,
                "url": f"/v1/images/{name}",
                "seed": job.settings["seed"] + index,
                "prompt": (job.settings.get("prompts") or [""])[0],
                "width": image.width,
                "height": image.height,
            }
            job.images.append(told)
            job.tell("image", **told)
        job.tell("done")


def _error(status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
    content = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return JSONResponse(content, status, {"Retry-After": "5"} if status == 429 else None)


def _problem(body: dict[str, Any]) -> tuple[str, str] | None:
    """The setting that the service refuses, and why."""
    steps = body.get("prior_steps")
    if steps is not None and not 1 <= steps <= 100:
        return "prior_steps", f"prior_steps must be at most 100, got {steps}."
    for name in ("width", "height"):
        side = body.get(name)
        if side is not None and (side % 8 or not 64 <= side <= 1024):
            return name, f"{name} must be a multiple of 8 from 64 to 1024, got {side}."
    if body.get("image"):
        try:
            Image.open(io.BytesIO(base64.b64decode(body["image"].split(",")[-1]))).load()
        except (OSError, binascii.Error):
            return (
                "image",
                "image is not a readable PNG, JPEG or WebP. Save it again in one of these formats.",
            )
    return None


def _resolved(body: dict[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in body.items() if name not in ("image", "kind", "previews")}
    for name, value in DEFAULTS.items():
        if settings.get(name) is None:
            settings[name] = value
    if settings.get("seed") is None:
        settings["seed"] = random.getrandbits(32)
    if body.get("kind") == "reconstruct":
        settings = {
            "seed": settings["seed"],
            "decoder_steps": settings["decoder_steps"],
            "width": 256,
            "height": 256,
        }
    return {"count": 1, **settings}


def _image(settings: dict[str, Any], index: int) -> Image.Image:
    """A hill and a sun in colours of the prompt and seed."""
    width, height = settings["width"], settings["height"]
    draw_by = random.Random(f"{settings.get('prompts')}{settings['seed'] + index}{settings.get('guidance')}")
    hue = draw_by.randrange(360)
    image = Image.new("RGB", (width, height), f"hsl({hue}, 45%, 82%)")
    draw = ImageDraw.Draw(image)
    x, y, r = (
        draw_by.uniform(0.2, 0.8) * width,
        draw_by.uniform(0.2, 0.45) * height,
        0.13 * min(width, height),
    )
    draw.ellipse((x - r, y - r, x + r, y + r), f"hsl({(hue + 150) % 360}, 70%, 60%)")
    for layer in range(3):
        x, y = draw_by.uniform(-0.2, 1.2) * width, (0.95 + 0.2 * layer) * height
        r = draw_by.uniform(0.35, 0.6) * width
        colour = f"hsl({(hue + 25 * layer) % 360}, 40%, {60 - 15 * layer}%)"
        draw.ellipse((x - 1.6 * r, y - r, x + 1.6 * r, y + r), colour)
    return image


def _preview(image: Image.Image, progress: float) -> str:
    small = image.resize((24, 24)).point(lambda value: int(value * progress + 128 * (1 - progress)))
    file = io.BytesIO()
    small.save(file, "WEBP")
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    service = FakeService(8765)
    service.step_delay = 0.25
    service.start()
    print(service.url)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
