"""The formats of requests and answers, from which the OpenAPI schema is generated."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from wuerstchen.diffusion.sampler_table import SAMPLERS
from wuerstchen.sampling import MAX_SEED, MAX_STEPS
from wuerstchen.serve.jobs import Kind, State

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Guidance = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Time = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
GuidanceInterval = Annotated[list[Time], Field(min_length=2, max_length=2)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Side = Annotated[int, Field(ge=8, le=2**16)]
LoraName = Annotated[str, Field(min_length=1, max_length=100)]
LoraStrength = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=100_000)]


class _SamplerEnum:
    """Lists the samplers in the schema, as of the time when the schema is generated."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "enum": list(SAMPLERS)}


def _check_sampler(name: str) -> str:
    if name not in SAMPLERS:
        names = " or ".join(map(repr, SAMPLERS))
        raise PydanticCustomError("sampler", "Input should be {names}", {"names": names})
    return name


Sampler = Annotated[str, AfterValidator(_check_sampler), _SamplerEnum()]


class _Request(BaseModel):
    # Strict: "7" and 7.5 are not accepted as integers.
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_count(cls, data: Any) -> Any:
        # pydantic would create an error for each unknown field, and there may be a million.
        if isinstance(data, dict) and len(data) > len(cls.model_fields):
            raise ValueError(f"there are {len(data):,} fields, but at most {len(cls.model_fields)} are known")
        return data


class JobRequest(_Request):
    """``POST /v1/jobs``. A field that is null takes the model's default."""

    kind: Kind = "generate"
    prompts: Annotated[list[Text], Field(fail_fast=True)] | None = None
    """For ``generate``. An empty prompt generates any image, or varies ``image``."""
    negative: Text = ""
    count: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Images per prompt."""
    width: Side | None = None
    height: Side | None = None
    seed: Seed | None = None
    """Seed of the first image; later images count up. Null: a random seed."""
    guidance: Guidance | None = None
    guidance_interval: GuidanceInterval | None = None
    """Lowest and highest time at which Stage C is guided, from 0 (clean) to 1 (noise)."""
    prior_steps: Steps | None = None
    prior_sampler: Sampler | None = None
    """One of ``samplers`` in ``GET /v1/model``."""
    decoder_steps: Steps | None = None
    decoder_sampler: Sampler | None = None
    """Only for models with a student of Stage B: ``few``, or one of ``decoder_samplers`` in
    ``GET /v1/model``."""
    full: bool = False
    """Sample with the full networks, also if the model has students for few steps."""
    lora: LoraName | None = None
    """The name of an adapter, one of ``loras`` in ``GET /v1/model``."""
    lora_strength: LoraStrength | None = None
    """Scale of the adapter's effect. Null: 1, as trained."""
    image: str | None = None
    """PNG, JPEG or WebP, in base64 or as a data: URL. The image to ``reconstruct``, or the init image of
    ``generate``."""
    mask: str | None = None
    """A mask for ``image`` with the same size: only its white part is repainted, grey with a part of the
    strength. In a mask with transparent pixels, these are repainted. If ``image`` has the requested size, all
    pixels outside the mask and a feather of 1/32 of the model's side stay the same."""
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """How much ``image`` may change. Null: 0.7, or 1 with a mask."""
    previews: bool = True


class ImageRequest(_Request):
    """``POST /v1/images/generations``, as OpenAI's clients send it, with additional fields at the end.

    Null fields are ignored, whatever their name: some clients send all fields that they know. Fields for
    features that do not exist here accept only the value that turns the feature off.
    """

    prompt: Text
    n: Annotated[int, Field(ge=1, le=10_000)] | None = None
    size: Annotated[str, Field(max_length=20)] | None = None
    response_format: Literal["url", "b64_json"] | None = None
    """Null: ``url``."""
    model: Annotated[str, Field(max_length=200)] | None = None
    user: str | None = None
    """Ignored, as is ``safety_identifier``."""
    safety_identifier: str | None = None
    quality: str | None = None
    """Ignored, as are ``style``, ``complexity`` and ``moderation``."""
    style: str | None = None
    complexity: str | None = None
    moderation: str | None = None
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png"] | None = None
    output_compression: Literal[100] | None = None
    """PNG is lossless."""
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None
    """Partial images need streaming."""
    seed: Seed | None = None
    negative_prompt: Text | None = None
    guidance: Guidance | None = None
    guidance_interval: GuidanceInterval | None = None
    steps: Steps | None = None
    """Sampling steps of Stage C."""
    full: bool | None = None
    lora: LoraName | None = None
    lora_strength: LoraStrength | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class JobImage(BaseModel):
    index: int
    url: str
    seed: int
    prompt: str
    width: int
    height: int


class JobView(BaseModel):
    """The current state of a job."""

    id: str
    state: State
    position: int
    """Position in the queue, from 1. 0 if the job is not queued."""
    kind: Kind
    settings: dict[str, Any]
    total: int
    progress: float
    images: list[JobImage]
    error: str | None
    notices: list[str]
    """Deviations from the request, such as words that the text encoder truncates."""
    created: int


class GeneratedImage(BaseModel):
    b64_json: str | None = None
    url: str | None = None


class GeneratedImages(BaseModel):
    created: int
    data: list[GeneratedImage]


class ErrorBody(BaseModel):
    message: str
    type: Literal[
        "invalid_request_error",
        "rate_limit_error",
        "not_found_error",
        "authentication_error",
        "server_error",
    ]
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody


class ModelSize(BaseModel):
    default: tuple[int, int]
    multiple: int
    min: int
    max_side: int
    max_pixels: int
    common: list[tuple[int, int]]


class ModelLimits(BaseModel):
    count: int
    prompts: int
    pictures: int
    prompt_chars: int
    steps: int
    upload_bytes: int
    result_seconds: float
    """Longest time that a finished image is kept, in seconds."""


class LoraView(BaseModel):
    """An adapter that requests can name."""

    name: str
    title: str
    trigger_words: list[str]
    """Words that prompts should contain."""
    licence: str


class ModelView(BaseModel):
    """``GET /v1/model``."""

    name: str
    version: str
    device: str
    size: ModelSize
    defaults: dict[str, float | int | str | tuple[float, float]]
    full: dict[str, float | int | str | tuple[float, float]]
    """The defaults of the full networks. They differ from ``defaults`` if the model has students. Those
    sample requests that set nothing of Stage C."""
    limits: ModelLimits
    samplers: list[str]
    """Samplers that fit the objective of Stage C, its default first."""
    loras: list[LoraView]
    """The adapters that ``lora`` of a job can name."""
    decoder_samplers: list[str]
    """Samplers of Stage B if the model has a student of it, its default first. Otherwise empty."""
    can: dict[str, bool]
    examples: list[str]
    image_note: str | None
    """A hint for users who upload an image, or null."""


class OpenAIModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class OpenAIModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class Health(BaseModel):
    status: str
