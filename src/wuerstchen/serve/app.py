"""The HTTP routes. docs/serving.md describes them for clients."""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from wuerstchen.serve.decoding import Upload, UploadError
from wuerstchen.serve.errors import Refused
from wuerstchen.serve.guard import Guard, error_body
from wuerstchen.serve.jobs import Job
from wuerstchen.serve.proxies import App, BehindProxies
from wuerstchen.serve.requests import (
    check_mask_size,
    check_model,
    in_openai_terms,
    make_job,
    model_view,
    of_openai,
    settings_of,
    upload_of,
)
from wuerstchen.serve.schemas import (
    ErrorAnswer,
    GeneratedImages,
    Health,
    ImageRequest,
    JobRequest,
    JobView,
    ModelView,
    OpenAIModel,
    OpenAIModels,
)
from wuerstchen.serve.service import Service
from wuerstchen.serve.streams import end_of, events_of
from wuerstchen.serve.uploads import Decoded
from wuerstchen.version import __version__

PAGE = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
}
"""Do not use the system's table: it differs between machines."""

NO_JSON = "The body is not valid JSON. Send an object, in UTF-8."
Queue = Callable[[Request, JobRequest], Awaitable[Job]]
"""Creates a job from a request and queues it. Raises ``Refused``."""

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in (
        (400, "the request is invalid"),
        (401, "a token is missing or unknown"),
        (403, "the request comes from another site, or uses an unknown host name"),
        (404, "not found"),
        (408, "the body took too long"),
        (413, "the body is too large"),
        (415, "the body is not JSON"),
        (429, "too many requests, jobs or queued images; see Retry-After"),
        (500, "internal error"),
        (503, "the model is loading, or the service is shutting down"),
    )
}


def make_app(service: Service, page: Path = PAGE) -> App:
    """The app of one service. The caller starts and stops the service. ``page``: folder of the web page."""
    # FastAPI's documentation page would load scripts from other sites.
    app = FastAPI(title="wuerstchen", version=__version__, docs_url=None, redoc_url=None)
    _add_error_handlers(app)
    _add_pages(app, page)
    queue = _make_queue(service)
    _add_jobs(app, service, queue)
    _add_results(app, service)
    _add_openai(app, service, queue)
    _add_monitoring(app, service)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # invalid requests get 400 instead
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            if service.config.tokens:
                bearer = {"type": "http", "scheme": "bearer"}
                schema["components"]["securitySchemes"] = {"token": bearer}
                schema["security"] = [{"token": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi
    # Outermost, so that it also handles the answers to internal errors.
    guard = Guard(app, service.config, service.metrics)
    return BehindProxies(guard, service.config.proxies) if service.config.proxies else guard


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _error(error.status, error.message, error.param, error.code, error.retry_after)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, NO_JSON, "body")
        place = [str(part) for part in first["loc"] if part not in ("body", "path", "query", "header")]
        name = ".".join(place)[:100] or "body"
        # Do not include the value: it may be long, or not be text.
        return _error(
            400,
            f"{name} is invalid: {first['msg']}. See /openapi.json.".encode("ascii", "replace").decode(),
            name,
        )

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = {
            400: NO_JSON,  # malformed in a way that the parser does not describe
            404: "There is no route for this path. See /openapi.json for the available ones.",
            405: f"{request.method} is not allowed at this address. See /openapi.json.",
        }.get(error.status_code, str(error.detail))
        answer = _error(error.status_code, message)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return _error(500, "Internal error. The service's log has the details.")


def _error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    retry_after: int | None = None,
) -> Response:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse(error_body(status, message, param, code), status, headers)


def _add_pages(app: FastAPI, folder: Path) -> None:
    # Read all files once, so that names from clients never reach the file system.
    files = {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}

    def file(name: str) -> Response:
        if name not in files:
            raise Refused(404, "There is no such file.")
        kind = KINDS.get(Path(name).suffix, "application/octet-stream")
        return Response(files[name], media_type=kind, headers={"Cache-Control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return file(name)


async def _decoded(request: Request, service: Service, client: str, upload: Upload) -> Decoded:
    """Decodes an upload while its sender waits. Raises ``Refused``."""
    decoding = asyncio.ensure_future(service.uploads.decode(client, upload))
    try:
        if not await _while_connected(request, decoding):
            raise Refused(499, "The client has disconnected.")  # for the metrics
        return decoding.result()
    except UploadError as error:
        raise Refused(
            error.status, error.message, param=upload.name, retry_after=error.retry_after
        ) from error


def _make_queue(service: Service) -> Queue:

    async def queue(request: Request, body: JobRequest) -> Job:
        client = _client(request)
        about = service.check_open()
        # A job that is too large for the queue is refused by make_job, with an error that says so.
        images = len(body.prompts or [""]) * body.count
        service.check_room(client, min(images, service.config.max_images_per_job))
        job = make_job(body, service.config, about, client, service.instance)
        if body.image is not None:
            upload = upload_of(body.image, job, service.config)
            image = await _decoded(request, service, client, upload)
            job.image = image.pixels
            job.notices.extend(image.notices)
            if body.mask is not None:
                upload = upload_of(body.mask, job, service.config, "mask")
                mask = await _decoded(request, service, client, upload)
                check_mask_size(mask.size, image.size)
                job.mask = mask.pixels
        await service.submit(job)
        return job

    return queue


def _add_jobs(app: FastAPI, service: Service, queue: Queue) -> None:
    @app.get("/v1/model", response_model=ModelView, responses=_errors(503))
    async def model() -> dict[str, Any]:
        """The model of the service, and its limits."""
        about = service.about
        if about is None:
            about = service.check_open()
        return model_view(service.config, about)

    @app.post(
        "/v1/jobs",
        status_code=202,
        response_model=JobView,
        responses=_errors(400, 404, 413, 415, 500, 503),
    )
    async def make(request: Request, body: JobRequest) -> dict[str, Any]:
        """Queues a job."""
        return view(request, await queue(request, body))

    @app.get("/v1/jobs/{job_id}", response_model=JobView, responses=_errors(404))
    async def look(request: Request, job_id: str) -> dict[str, Any]:
        """The current state of a job."""
        return view(request, service.job_of(job_id, _client(request)))

    @app.delete(
        "/v1/jobs/{job_id}",
        status_code=202,
        response_model=JobView,
        responses={200: {"model": JobView, "description": "the job had already ended"}, **_errors(404)},
    )
    async def cancel(request: Request, job_id: str, response: Response) -> dict[str, Any]:
        """Cancels a job. Does nothing if it has already ended."""
        job = service.job_of(job_id, _client(request))
        if job.has_ended:
            response.status_code = 200
        else:
            service.cancel(job)
        return view(request, job)

    def view(request: Request, job: Job) -> dict[str, Any]:
        return {
            "id": job.id,
            "state": job.state,
            "position": service.position(job),
            "kind": job.shape.kind,
            "settings": settings_of(job),
            "total": job.total,
            "progress": round(job.progress, 4),
            "images": [
                _with_prefix(request, image) for image in sorted(job.images, key=lambda i: i["index"])
            ],
            "error": job.error,
            "notices": job.notices,
            "created": job.unix_time,
        }


def _add_results(app: FastAPI, service: Service) -> None:
    @app.get(
        "/v1/jobs/{job_id}/events",
        response_class=StreamingResponse,
        responses={
            200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
            **_errors(404),
        },
    )
    async def events(request: Request, job_id: str) -> Response:
        """Streams a job's events (server-sent events). ``Last-Event-ID`` resumes a stream."""
        client = _client(request)
        job = service.job_of(job_id, client)
        service.streams.check(client)
        last = request.headers.get("last-event-id", "0")
        after = int(last) if last.isascii() and last.isdecimal() and len(last) < 18 else 0

        async def lines() -> AsyncIterator[str]:
            with service.streams.opened(client) as allowed:
                if not allowed:
                    return
                async for event in events_of(job, after):
                    if event is None:
                        yield ": keep-alive\n\n"
                    else:
                        data = json.dumps(
                            _with_prefix(request, event.data) if event.name == "image" else event.data
                        )
                        yield f"id: {event.number}\nevent: {event.name}\ndata: {data}\n\n"

        # Tells nginx not to buffer the stream.
        headers = {"X-Accel-Buffering": "no"}
        return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)

    @app.get(
        "/v1/images/{name}",
        response_class=Response,
        responses={
            200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
            **_errors(404),
        },
    )
    async def image(name: str) -> Response:
        """A finished image, with its settings in PNG text chunks."""
        data = await asyncio.to_thread(service.results.read, name)
        if data is None:
            raise Refused(404, "There is no such image, or it has expired.", code="image_not_found")
        headers = {
            "Cache-Control": "private, max-age=3600, immutable",
            "Cross-Origin-Resource-Policy": "cross-origin",
        }
        return Response(data, media_type="image/png", headers=headers)


def _client(request: Request) -> str:
    """The client's name, which ``Guard`` has set."""
    return request.scope["wuerstchen.client"]


def _with_prefix(request: Request, image: dict[str, Any]) -> dict[str, Any]:
    """Adds the path prefix of a proxy to the URL of an image."""
    return {**image, "url": request.scope.get("root_path", "") + image["url"]}


def _add_openai(app: FastAPI, service: Service, queue: Queue) -> None:
    @app.post(
        "/v1/images/generations",
        response_model=GeneratedImages,
        response_model_exclude_none=True,
        responses=_errors(400, 404, 413, 415, 500, 503),
    )
    async def generate(request: Request, body: ImageRequest) -> dict[str, Any]:
        """Generates images and answers when they are done, as OpenAI's clients expect."""
        about = service.check_open()
        try:
            job = await queue(request, of_openai(body, about))
        except Refused as error:
            raise in_openai_terms(error, body) from error
        if not await _while_connected(request, end_of(job)):
            service.cancel(job)
        if job.state == "cancelled":
            raise Refused(400, "The job was cancelled.", code="cancelled")
        if job.state == "failed":
            status = 400 if job.error_type == "invalid_request_error" else 500
            raise Refused(503 if service.draining else status, job.error or "The job failed.")
        data = []
        for image in sorted(job.images, key=lambda image: image["index"]):
            if body.response_format == "b64_json":
                name = image["url"].rpartition("/")[2]
                content = await asyncio.to_thread(service.results.read, name)
                if content is None:
                    raise Refused(500, "The image was deleted before it was sent. Increase --result-bytes.")
                data.append({"b64_json": base64.b64encode(content).decode()})
            else:
                data.append({"url": str(request.base_url).rstrip("/") + image["url"]})
        return {"created": int(time.time()), "data": data}

    async def edit() -> None:
        raise Refused(
            404,
            "This service has no such route. To vary or reconstruct an image, send it to POST /v1/jobs as "
            "JSON. See /openapi.json.",
        )

    for name in ("edits", "variations"):  # otherwise they count as names of images, which answer 405
        app.add_api_route(f"/v1/images/{name}", edit, methods=["POST"], include_in_schema=False)

    def the_model() -> OpenAIModel:
        about = service.about if service.about is not None else service.check_open()
        return OpenAIModel(id=about["name"], created=started, owned_by="wuerstchen")

    @app.get("/v1/models", response_model=OpenAIModels, responses=_errors(503))
    async def models() -> OpenAIModels:
        """The model, as a list in OpenAI's format."""
        return OpenAIModels(data=[the_model()])

    @app.get("/v1/models/{model_id:path}", response_model=OpenAIModel, responses=_errors(404, 503))
    async def model(model_id: str) -> OpenAIModel:
        """The model, in OpenAI's format."""
        found = the_model()
        check_model(model_id, found.id)
        return found

    started = int(time.time())


def _add_monitoring(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", response_model=Health)
    async def healthy() -> dict[str, str]:
        """The service is running."""
        return {"status": "ok"}

    @app.get(
        "/readyz",
        response_model=Health,
        responses={503: {"model": Health, "description": "loading or stopping"}},
    )
    async def ready(response: Response) -> dict[str, str]:
        """Whether the service can run a job now."""
        if not service.is_ready:
            response.status_code = 503
            return {"status": "stopping" if service.draining else "loading"}
        return {"status": "ready"}

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_errors()},
    )
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: ERRORS[status] for status in (*statuses, 401, 403, 408, 429)}


async def _while_connected(request: Request, work: Any) -> bool:
    """Waits for ``work``, and cancels it if the client disconnects. Returns whether it has finished."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
