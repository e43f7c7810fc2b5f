"""From a request to a job: what it leaves open is filled in, what cannot be served is refused."""

import re
import secrets
from typing import Any

from wuerstchen.serve.decoding import Upload
from wuerstchen.serve.errors import Refused
from wuerstchen.serve.jobs import Job, Picture, Shape
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.schemas import MAX_SEED, ImageRequest, JobRequest
from wuerstchen.version import __version__


def size_limits(config: ServeConfig, about: dict[str, Any]) -> tuple[int, int]:
    """The longest side and the most pixels that may be asked for."""
    return about["max_side"], config.max_pixels or 4 * about["side"] ** 2


def model_view(config: ServeConfig, about: dict[str, Any]) -> dict[str, Any]:
    """What ``GET /v1/model`` tells."""
    side = about["side"]
    max_side, max_pixels = size_limits(config, about)
    longer = side * 3 // 2 // about["multiple"] * about["multiple"]
    sizes = [
        (side, side),
        (longer, side),
        (side, longer),
        (2 * side, side),
        (side, 2 * side),
        (2 * side, 2 * side),
    ]
    return {
        "name": about["name"],
        "version": __version__,
        "device": about["device"],
        "size": {
            "default": (side, side),
            "multiple": about["multiple"],
            "min": about["min"],
            "max_side": max_side,
            "max_pixels": max_pixels,
            "common": [(w, h) for w, h in sizes if max(w, h) <= max_side and w * h <= max_pixels],
        },
        "defaults": about["defaults"],
        "limits": {
            "count": config.max_count,
            "prompts": config.max_prompts,
            "pictures": config.pictures_of_job,
            "prompt_chars": config.prompt_chars,
            "steps": config.max_steps,
            "upload_bytes": config.upload_bytes,
            "result_seconds": config.result_seconds,
        },
        "samplers": about["samplers"],
        "can": about["can"],
        "examples": about["examples"],
        "image_note": about["image_note"],
    }


def make_job(
    request: JobRequest, config: ServeConfig, about: dict[str, Any], client: str, instance: str
) -> Job:
    """The job of a request, still without its image (``upload_of``). Raises ``Refused``."""
    _check_kind(request, about)
    prompts = _prompts(request, config)
    total = _total(request, len(prompts), config)
    _check_sampling(request, config, about)
    size = _size(request, config, about)
    _check_image_options(request, size)
    seed = _first_seed(request, total)
    return Job(
        client=client,
        instance=instance,
        shape=_shape(request, size, about["defaults"]),
        prompts=[prompt for prompt in prompts for _ in range(request.count)],
        seeds=range(seed, seed + total),
        count=request.count,
        negative=request.negative,
        previews=request.previews,
    )


def _shape(request: JobRequest, size: tuple[int, int], defaults: dict[str, Any]) -> Shape:
    varies = request.kind == "generate" and request.image is not None
    return Shape(
        kind=request.kind,
        width=size[0],
        height=size[1],
        guidance=defaults["guidance"] if request.guidance is None else float(request.guidance),
        prior_steps=request.prior_steps or defaults["prior_steps"],
        prior_sampler=request.prior_sampler or defaults["prior_sampler"],
        decoder_steps=request.decoder_steps or defaults["decoder_steps"],
        strength=(request.strength or 0.7) if varies else None,
    )


def _check_kind(request: JobRequest, about: dict[str, Any]) -> None:
    can = about["can"]
    if not can[request.kind]:
        raise Refused(400, f"kind {request.kind!r} is wrong because this model cannot do it", param="kind")
    if request.kind == "generate" and request.image is not None and not can["variation"]:
        raise Refused(
            400, "image is wrong because this model cannot read pictures; leave it out", param="image"
        )


def _total(request: JobRequest, prompts: int, config: ServeConfig) -> int:
    """How many images the job has."""
    total = prompts * request.count
    if request.count > config.max_count:
        raise _too_large("count", request.count, config.max_count)
    if total > config.pictures_of_job:
        of_all = f" of {prompts} prompts" if prompts > 1 else ""
        raise _too_large("count", f"{request.count}{of_all}", f"{config.pictures_of_job} pictures")
    return total


def _check_sampling(request: JobRequest, config: ServeConfig, about: dict[str, Any]) -> None:
    for name in ("prior_steps", "decoder_steps"):
        steps = getattr(request, name)
        if steps is not None and steps > config.max_steps:
            raise _too_large(name, steps, config.max_steps)
    if request.prior_sampler is not None and request.prior_sampler not in about["samplers"]:
        raise Refused(
            400,
            f"prior_sampler {request.prior_sampler!r} does not suit this model. Use "
            f"{' or '.join(about['samplers'])}.",
            param="prior_sampler",
        )


def _check_image_options(request: JobRequest, size: tuple[int, int]) -> None:
    draws = request.kind == "generate"
    if not draws and size[0] != size[1]:
        raise Refused(
            400,
            f"size {size[0]}x{size[1]} is wrong because reconstructions are square; make both sides equal",
            param="width",
        )
    if request.strength is not None and (not draws or request.image is None):
        raise Refused(
            400,
            f"strength {request.strength} is wrong because there is no image to vary; give one",
            param="strength",
        )


def _first_seed(request: JobRequest, total: int) -> int:
    """The seed of the first image: the one requested, or a random one."""
    if request.seed is None:
        return secrets.randbelow(MAX_SEED - total + 2)
    if request.seed > MAX_SEED - total + 1:
        raise Refused(
            400,
            f"seed {request.seed} is wrong because the last of {total} pictures would have one over "
            f"{MAX_SEED}; choose a smaller one",
            param="seed",
        )
    return request.seed


def check_model(name: str, own: str) -> None:
    """Raises ``Refused`` where ``name`` is not the model that is served, whose name is ``own``."""
    if name not in (own, "wuerstchen"):
        raise Refused(
            404,
            f"model {name[:100]!a} is not served here; use {own!r}, or leave it out",
            param="model",
            code="model_not_found",
        )


def upload_of(text: str, job: Job, config: ServeConfig) -> Upload:
    """What is to be decoded for a job: ``text`` is the image as it was sent."""
    return Upload(
        text=text,
        width=job.shape.width,
        height=job.shape.height,
        max_bytes=config.upload_bytes,
        max_pixels=config.upload_pixels,
        seconds=config.upload_timeout,
    )


def of_openai(request: ImageRequest, about: dict[str, Any]) -> JobRequest:
    """The same in our own form. Raises ``Refused``."""
    if request.model is not None:
        check_model(request.model, about["name"])
    width = height = None
    if request.size not in (None, "auto"):
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", request.size)
        if match is None:
            raise Refused(
                400, f"size {request.size!a} is wrong because it must be WIDTHxHEIGHT or auto", param="size"
            )
        width, height = int(match[1]), int(match[2])
    return JobRequest.model_construct(
        kind="generate",
        prompts=[request.prompt],
        negative=request.negative_prompt or "",
        count=request.n or 1,
        width=width,
        height=height,
        seed=request.seed,
        guidance=request.guidance,
        prior_steps=request.steps,
        previews=False,
    )


_IN_OPENAI = {
    "prompts": "prompt",
    "negative": "negative_prompt",
    "count": "n",
    "prior_steps": "steps",
    "width": "size",
    "height": "size",
}
"""Our names of fields, and those of OpenAI's form."""


def in_openais_words(error: Refused, request: ImageRequest) -> Refused:
    """A refusal of what ``of_openai`` made, under the names of what was sent."""
    name = _IN_OPENAI.get(error.param or "")
    if name is None:
        return error
    message = error.message
    if name == "size":  # both sides are in one field
        message = re.sub(r"^(width|height) \d+", f"size {request.size}", message)
    elif message.startswith(f"{error.param} "):
        message = name + message[len(error.param or "") :]
    return Refused(error.status, message, param=name, code=error.code, retry_after=error.retry_after)


def settings_of(job: Job) -> dict[str, Any]:
    """A job's settings in full, under the names of ``POST /v1/jobs``, but for an image.

    Of a reconstruction only those that it reads.
    """
    shape = job.shape
    if shape.kind == "reconstruct":
        own = ("width", "height", "decoder_steps")
        return {"kind": shape.kind, "seed": job.seeds[0], **{name: getattr(shape, name) for name in own}}
    return {
        "kind": shape.kind,
        "prompts": list(job.prompts[:: job.count]),
        "negative": job.negative,
        "count": job.count,
        "width": shape.width,
        "height": shape.height,
        "seed": job.seeds[0],
        "guidance": shape.guidance,
        "prior_steps": shape.prior_steps,
        "prior_sampler": shape.prior_sampler,
        "decoder_steps": shape.decoder_steps,
        "strength": shape.strength,
    }


def picture_settings(picture: Picture, about: dict[str, Any]) -> dict[str, Any]:
    """What draws the picture again, under the names of ``POST /v1/jobs``."""
    job, shape = picture.job, picture.job.shape
    settings: dict[str, Any] = {"kind": shape.kind}
    if shape.kind == "generate":
        settings |= {"prompts": [picture.prompt], "negative": job.negative}
    settings |= {"count": 1, "width": shape.width, "height": shape.height, "seed": picture.seed}
    if shape.kind == "generate":
        settings |= {
            "guidance": shape.guidance,
            "prior_steps": shape.prior_steps,
            "prior_sampler": shape.prior_sampler,
        }
    settings["decoder_steps"] = shape.decoder_steps
    if shape.strength is not None:
        settings["strength"] = shape.strength
    return settings | {"model": about.get("name", "wuerstchen")}


def _prompts(request: JobRequest, config: ServeConfig) -> list[str]:
    if request.kind == "reconstruct":
        if request.image is None:
            raise Refused(400, "image is missing, which is to be reconstructed; give one", param="image")
        if request.prompts or request.negative:
            raise Refused(
                400,
                "prompts are wrong because a reconstruction reads no text; leave them out",
                param="prompts",
            )
        if request.count != 1:
            raise Refused(
                400,
                f"count {request.count} is wrong because a reconstruction is one picture; use 1",
                param="count",
            )
        return [""]
    prompts = request.prompts
    if not prompts:
        raise Refused(
            400, "prompts [] is wrong because there is nothing to draw; give at least one", param="prompts"
        )
    if len(prompts) > config.max_prompts:
        raise _too_large("prompts", len(prompts), config.max_prompts)
    for name, text in (*(("prompts", prompt) for prompt in prompts), ("negative", request.negative)):
        if len(text) > config.prompt_chars:
            raise _too_large(name, f"of {len(text)} characters", config.prompt_chars)
    return prompts


def _size(request: JobRequest, config: ServeConfig, about: dict[str, Any]) -> tuple[int, int]:
    max_side, max_pixels = size_limits(config, about)
    width = next((side for side in (request.width, request.height) if side is not None), about["side"])
    height = width if request.height is None else request.height
    for name, side in (("width", width), ("height", height)):
        if side % about["multiple"] or not about["min"] <= side <= max_side:
            raise Refused(
                400,
                f"{name} {side} is wrong because sides are multiples of {about['multiple']} from "
                f"{about['min']} to {max_side}; use another",
                param=name,
            )
    if width * height > max_pixels:
        raise Refused(
            400,
            f"size {width}x{height} is wrong because a picture may have {max_pixels:,} pixels; "
            "make it smaller",
            param="width",
        )
    return width, height


def _too_large(name: str, value: object, most: object) -> Refused:
    return Refused(400, f"{name} {value} is wrong because {most} is the most here; use less", param=name)
