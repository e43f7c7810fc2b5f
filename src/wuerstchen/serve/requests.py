"""Turns requests into jobs: fills in defaults and refuses what cannot be served."""

import re
import secrets
from collections.abc import Sequence
from typing import Any, Literal

from wuerstchen.errors import UserError
from wuerstchen.sampling import EDIT, Sampling, checked_interval, completed
from wuerstchen.serve.decoding import Upload
from wuerstchen.serve.errors import Refused
from wuerstchen.serve.jobs import ImageTask, Job, Shape
from wuerstchen.serve.limits import ServeConfig
from wuerstchen.serve.schemas import MAX_SEED, ImageRequest, JobRequest
from wuerstchen.version import __version__


def size_limits(config: ServeConfig, about: dict[str, Any]) -> tuple[int, int]:
    """The longest side and the largest number of pixels of an image."""
    return about["max_side"], config.max_pixels or 4 * about["side"] ** 2


def model_view(config: ServeConfig, about: dict[str, Any]) -> dict[str, Any]:
    """The body of ``GET /v1/model``."""
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
        "full": about["full"],
        "limits": {
            "count": config.max_count,
            "prompts": config.max_prompts,
            "pictures": config.max_images_per_job,
            "prompt_chars": config.prompt_chars,
            "steps": config.max_steps,
            "upload_bytes": config.upload_bytes,
            "result_seconds": config.result_seconds,
        },
        "samplers": about["samplers"],
        "loras": [
            {
                "name": listed.name,
                "title": listed.metadata.title,
                "trigger_words": list(listed.metadata.trigger_words),
                "licence": listed.metadata.licence,
            }
            for listed in about.get("loras", ())
        ],
        "decoder_samplers": about["decoder_samplers"],
        "can": about["can"],
        "examples": about["examples"],
        "image_note": about["image_note"],
    }


def make_job(
    request: JobRequest, config: ServeConfig, about: dict[str, Any], client: str, instance: str
) -> Job:
    """The job of a request, without its uploaded image yet (see ``upload_of``). Raises ``Refused``."""
    _check_kind(request, about)
    prompts = _prompts(request, config)
    total = _total(request, len(prompts), config)
    _check_sampling(request, config, about)
    size = _size(request, config, about)
    _check_image_options(request, size)
    _check_lora(request, about)
    seed = _first_seed(request, total)
    return Job(
        client=client,
        instance=instance,
        shape=_shape(request, size, about),
        prompts=[prompt for prompt in prompts for _ in range(request.count)],
        seeds=range(seed, seed + total),
        count=request.count,
        negative=request.negative,
        previews=request.previews,
    )


def _shape(request: JobRequest, size: tuple[int, int], about: dict[str, Any]) -> Shape:
    is_variation = request.kind == "generate" and request.image is not None
    masked = is_variation and request.mask is not None
    asks = {"a negative prompt": bool(request.negative.strip()), EDIT: is_variation}
    asks["a LoRA adapter"] = request.lora is not None
    beyond = [name for name, asked in asks.items() if asked]
    interval = request.guidance_interval
    asked = Sampling(
        guidance=None if request.guidance is None else float(request.guidance),
        guidance_interval=None if interval is None else _interval(interval),
        prior_steps=request.prior_steps,
        prior_sampler=request.prior_sampler,
        decoder_steps=request.decoder_steps,
        decoder_sampler=request.decoder_sampler,
        full=request.full,
    )
    try:
        used = completed(asked, Sampling(**about["full"]), Sampling(**about["students"]), beyond)
    except UserError as error:
        setting = next(name for name in ("prior_sampler", "decoder_sampler") if name in str(error))
        raise Refused(400, str(error), param=setting) from error
    return Shape(
        kind=request.kind,
        width=size[0],
        height=size[1],
        guidance=float(used.guidance),
        guidance_interval=used.guidance_interval,
        prior_steps=used.prior_steps,
        prior_sampler=used.prior_sampler,
        decoder_steps=used.decoder_steps,
        decoder_sampler=used.decoder_sampler or "",
        strength=(request.strength or (1.0 if masked else 0.7)) if is_variation else None,
        masked=masked,
        lora=request.lora,
        lora_strength=1.0 if request.lora_strength is None else float(request.lora_strength),
    )


def _interval(times: Sequence[float]) -> tuple[float, float]:
    """The guidance interval of a request. Raises ``Refused``."""
    try:
        return checked_interval("guidance_interval", times)
    except UserError as error:
        raise Refused(400, str(error), param="guidance_interval") from error


def _check_kind(request: JobRequest, about: dict[str, Any]) -> None:
    can = about["can"]
    if not can[request.kind]:
        raise Refused(400, f"kind {request.kind!r} is not supported by this model.", param="kind")
    if request.kind == "generate" and request.image is not None and not can["variation"]:
        raise Refused(400, "image is not supported: this model cannot encode images. Omit it.", param="image")


def _total(request: JobRequest, prompts: int, config: ServeConfig) -> int:
    """How many images the job has."""
    total = prompts * request.count
    if request.count > config.max_count:
        raise _too_large("count", request.count, config.max_count)
    if total > config.max_images_per_job:
        raise Refused(
            400,
            f"count {request.count} makes too many images: {total}. A job has at most "
            f"{config.max_images_per_job}. Use a smaller count or fewer prompts.",
            param="count",
        )
    return total


def _check_sampling(request: JobRequest, config: ServeConfig, about: dict[str, Any]) -> None:
    for name in ("prior_steps", "decoder_steps"):
        steps = getattr(request, name)
        if steps is not None and steps > config.max_steps:
            raise _too_large(name, steps, config.max_steps)
    for name, fitting in (
        ("prior_sampler", about["samplers"]),
        ("decoder_sampler", about["decoder_samplers"]),
    ):
        sampler = getattr(request, name)
        if sampler is not None and sampler not in fitting:
            use = f"Use {' or '.join(fitting)}." if fitting else "Omit it."
            raise Refused(400, f"{name} {sampler!r} does not fit this model. {use}", param=name)


def _check_image_options(request: JobRequest, size: tuple[int, int]) -> None:
    generates = request.kind == "generate"
    if not generates and size[0] != size[1]:
        raise Refused(
            400,
            f"size {size[0]}x{size[1]} is not square. Reconstructions are square. Use two equal sides.",
            param="width",
        )
    if request.mask is not None and (not generates or request.image is None):
        raise Refused(400, "mask has no image to edit. Send image too, or omit mask.", param="mask")
    if request.strength is not None and (not generates or request.image is None):
        raise Refused(
            400,
            f"strength {request.strength} has no image to vary. Send image too, or omit strength.",
            param="strength",
        )


def _check_lora(request: JobRequest, about: dict[str, Any]) -> None:
    if request.lora is None:
        if request.lora_strength is not None:
            raise Refused(
                400,
                f"lora_strength {request.lora_strength} has no adapter. Send lora too, or omit it.",
                param="lora_strength",
            )
        return
    if request.kind != "generate":
        raise Refused(400, "lora does not apply to a reconstruction. Omit it.", param="lora")
    names = [listed.name for listed in about.get("loras", ())]
    if request.lora not in names:
        known = ", ".join(map(ascii, names[:10])) + (" and more" if len(names) > 10 else "")
        raise Refused(
            400,
            f"lora {request.lora!a} is not available. "
            + (f"Use one of {known}, or omit it." if names else "This service has no adapters. Omit it."),
            param="lora",
        )


def _first_seed(request: JobRequest, total: int) -> int:
    """The seed of the first image: the one requested, or a random one."""
    if request.seed is None:
        return secrets.randbelow(MAX_SEED - total + 2)
    if request.seed > MAX_SEED - total + 1:
        raise Refused(
            400,
            f"seed {request.seed} is too large for {total} images, because seeds count up to at most "
            f"{MAX_SEED}. Use at most {MAX_SEED - total + 1}.",
            param="seed",
        )
    return request.seed


def check_model(name: str, own: str) -> None:
    """Raises ``Refused`` if ``name`` is not ``own``, the name of the model that is served."""
    if name not in (own, "wuerstchen"):
        raise Refused(
            404,
            f"model {name[:100]!a} is not served here. Use {own!r}, or omit it.",
            param="model",
            code="model_not_found",
        )


def upload_of(text: str, job: Job, config: ServeConfig, name: Literal["image", "mask"] = "image") -> Upload:
    """The upload of a job, ready to be decoded. ``text``: the image or the mask as it was sent."""
    return Upload(
        name=name,
        text=text,
        width=job.shape.width,
        height=job.shape.height,
        max_bytes=config.upload_bytes,
        max_pixels=config.upload_pixels,
        seconds=config.upload_timeout,
    )


def check_mask_size(mask: tuple[int, int] | None, image: tuple[int, int] | None) -> None:
    """Raises ``Refused`` if a mask and its image, as they were sent, have different sizes."""
    if mask is not None and image is not None and mask != image:
        raise Refused(
            400,
            f"mask has {mask[0]}x{mask[1]} pixels, but image has {image[0]}x{image[1]}. Both must have the "
            "same size. Resize the mask.",
            param="mask",
        )


def of_openai(request: ImageRequest, about: dict[str, Any]) -> JobRequest:
    """Translates a request in OpenAI's format into ours. Raises ``Refused``."""
    if request.model is not None:
        check_model(request.model, about["name"])
    width = height = None
    if request.size not in (None, "auto"):
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", request.size)
        if match is None:
            raise Refused(400, f"size must be WIDTHxHEIGHT or auto, got {request.size!a}.", param="size")
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
        guidance_interval=request.guidance_interval,
        prior_steps=request.steps,
        full=request.full or False,
        lora=request.lora,
        lora_strength=request.lora_strength,
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
"""Our field names, and the corresponding ones in OpenAI's format."""


def in_openai_terms(error: Refused, request: ImageRequest) -> Refused:
    """Replaces the field names in a refusal with those that the client sent."""
    name = _IN_OPENAI.get(error.param or "")
    if name is None:
        return error
    message = error.message
    if name == "size":  # one field for width and height
        message = re.sub(r"^(width|height) ", rf"size {request.size}: \1 ", message)
    elif message.startswith(f"{error.param} "):
        message = name + message[len(error.param or "") :]
    return Refused(error.status, message, param=name, code=error.code, retry_after=error.retry_after)


def settings_of(job: Job) -> dict[str, Any]:
    """All settings of a job except its image, under the names of ``POST /v1/jobs``.

    For a reconstruction, only the settings that it uses.
    """
    shape = job.shape
    if shape.kind == "reconstruct":
        names = ("width", "height", "decoder_steps")
        own = {name: getattr(shape, name) for name in names}
        return {"kind": shape.kind, "seed": job.seeds[0], **own, **_decoder_sampler(shape)}
    return {
        "kind": shape.kind,
        "prompts": list(job.prompts[:: job.count]),
        "negative": job.negative,
        "count": job.count,
        "width": shape.width,
        "height": shape.height,
        "seed": job.seeds[0],
        "guidance": shape.guidance,
        "guidance_interval": list(shape.guidance_interval),
        "prior_steps": shape.prior_steps,
        "prior_sampler": shape.prior_sampler,
        "decoder_steps": shape.decoder_steps,
        **_decoder_sampler(shape),
        "strength": shape.strength,
        **_lora_settings(shape),
    }


def _lora_settings(shape: Shape) -> dict[str, Any]:
    return {} if shape.lora is None else {"lora": shape.lora, "lora_strength": shape.lora_strength}


def _decoder_sampler(shape: Shape) -> dict[str, Any]:
    """Stage B's sampler, for a model with a student of Stage B."""
    return {"decoder_sampler": shape.decoder_sampler} if shape.decoder_sampler else {}


def image_settings(task: ImageTask, about: dict[str, Any]) -> dict[str, Any]:
    """Settings that reproduce one image, under the names of ``POST /v1/jobs``."""
    job, shape = task.job, task.job.shape
    settings: dict[str, Any] = {"kind": shape.kind}
    if shape.kind == "generate":
        settings |= {"prompts": [task.prompt], "negative": job.negative}
    settings |= {"count": 1, "width": shape.width, "height": shape.height, "seed": task.seed}
    if shape.kind == "generate":
        settings |= {
            "guidance": shape.guidance,
            "guidance_interval": list(shape.guidance_interval),
            "prior_steps": shape.prior_steps,
            "prior_sampler": shape.prior_sampler,
        }
    settings |= {"decoder_steps": shape.decoder_steps, **_decoder_sampler(shape)}
    for stage, name in (("stage_c", "prior_sampler"), ("stage_b", "decoder_sampler")):
        student = about["students"].get(name)
        if student is not None and (stage == "stage_b" or shape.kind == "generate"):
            settings[stage] = "student" if getattr(shape, name) == student else "full"
    if shape.strength is not None:
        settings["strength"] = shape.strength
    settings |= _lora_settings(shape)
    return settings | {"model": about.get("name", "wuerstchen")}


def _prompts(request: JobRequest, config: ServeConfig) -> list[str]:
    if request.kind == "reconstruct":
        if request.image is None:
            raise Refused(400, "image is missing. A reconstruction needs one.", param="image")
        if request.prompts or request.negative:
            raise Refused(
                400,
                "prompts and negative do not apply to a reconstruction. Omit them.",
                param="prompts",
            )
        if request.count != 1:
            raise Refused(
                400,
                f"count must be 1 for a reconstruction, got {request.count}.",
                param="count",
            )
        return [""]
    prompts = request.prompts
    if not prompts:
        raise Refused(400, "prompts must have at least one entry, got none.", param="prompts")
    if len(prompts) > config.max_prompts:
        raise Refused(
            400,
            f"prompts must have at most {config.max_prompts} entries, got {len(prompts)}.",
            param="prompts",
        )
    for name, text in (*(("prompts", prompt) for prompt in prompts), ("negative", request.negative)):
        if len(text) > config.prompt_chars:
            raise Refused(
                400,
                f"{name} must have at most {config.prompt_chars} characters, got {len(text)}.",
                param=name,
            )
    return prompts


def _size(request: JobRequest, config: ServeConfig, about: dict[str, Any]) -> tuple[int, int]:
    max_side, max_pixels = size_limits(config, about)
    width = next((side for side in (request.width, request.height) if side is not None), about["side"])
    height = width if request.height is None else request.height
    for name, side in (("width", width), ("height", height)):
        if side % about["multiple"] or not about["min"] <= side <= max_side:
            raise Refused(
                400,
                f"{name} must be a multiple of {about['multiple']} from {about['min']} to {max_side}, got "
                f"{side}.",
                param=name,
            )
    if width * height > max_pixels:
        raise Refused(
            400,
            f"size {width}x{height} has too many pixels: {width * height:,}. An image has at most "
            f"{max_pixels:,}. Use a smaller size.",
            param="width",
        )
    return width, height


def _too_large(name: str, value: int, limit: int) -> Refused:
    return Refused(400, f"{name} must be at most {limit}, got {value}.", param=name)
