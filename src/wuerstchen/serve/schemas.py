"""What requests and answers look like; OpenAPI is made of it."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from wuerstchen.diffusion.sampler_table import SAMPLERS
from wuerstchen.sampling import MAX_SEED, MAX_STEPS
from wuerstchen.serve.jobs import Kind, State

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Guidance = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Side = Annotated[int, Field(ge=8, le=2**16)]
Text = Annotated[str, Field(max_length=100_000)]


class _OfTheTable:
    """Says in the schema which samplers there are, when the schema is made."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), "enum": list(SAMPLERS)}


def _in_the_table(name: str) -> str:
    if name not in SAMPLERS:
        names = " or ".join(map(repr, SAMPLERS))
        raise PydanticCustomError("sampler", "Input should be {names}", {"names": names})
    return name


Sampler = Annotated[str, AfterValidator(_in_the_table), _OfTheTable()]


class _Request(BaseModel):
    # Numbers are numbers: "7" and 7.5 are refused where a whole number is wanted.
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_count(cls, data: Any) -> Any:
        # Of a million unknown fields, pydantic would make a million errors.
        if isinstance(data, dict) and len(data) > len(cls.model_fields):
            raise ValueError(f"there are {len(data):,} fields of at most {len(cls.model_fields)}")
        return data


class JobRequest(_Request):
    """``POST /v1/jobs``. What is null is the model's own."""

    kind: Kind = "generate"
    prompts: Annotated[list[Text], Field(fail_fast=True)] | None = None
    """Of ``generate``; the empty one draws anything, or varies ``image``."""
    negative: Text = ""
    count: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Pictures of each prompt."""
    width: Side | None = None
    height: Side | None = None
    seed: Seed | None = None
    """Of the first picture; the next has the next. Null: drawn by the service."""
    guidance: Guidance | None = None
    prior_steps: Steps | None = None
    prior_sampler: Sampler | None = None
    """One that suits the model: those in ``samplers`` of ``GET /v1/model``."""
    decoder_steps: Steps | None = None
    image: str | None = None
    """PNG, JPEG or WebP, in base64 or as data: URL. Of ``reconstruct``; of ``generate``, what Stage C begins
    with."""
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """How much of ``image`` may change; 0.7 if null."""
    previews: bool = True


class ImageRequest(_Request):
    """``POST /v1/images/generations``, as OpenAI's clients send it, with fields of our own at the end.

    A field that is null counts as left out, whatever its name: some clients send all that they know. Fields
    of what is not done here may have only the value that asks for nothing.
    """

    prompt: Text
    n: Annotated[int, Field(ge=1, le=10_000)] | None = None
    size: Annotated[str, Field(max_length=20)] | None = None
    response_format: Literal["url", "b64_json"] | None = None
    """``url`` if null."""
    model: Annotated[str, Field(max_length=200)] | None = None
    user: str | None = None
    """Not used, nor is ``safety_identifier``."""
    safety_identifier: str | None = None
    quality: str | None = None
    """Not used, nor are ``style``, ``complexity`` and ``moderation``."""
    style: str | None = None
    complexity: str | None = None
    moderation: str | None = None
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png"] | None = None
    output_compression: Literal[100] | None = None
    """PNG loses nothing."""
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None
    """They come in streams alone."""
    seed: Seed | None = None
    negative_prompt: Text | None = None
    guidance: Guidance | None = None
    steps: Steps | None = None
    """Of Stage C."""

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
    """A job as it is now."""

    id: str
    state: State
    position: int
    """Place in the queue from 1; 0 when the job no longer waits."""
    kind: Kind
    settings: dict[str, Any]
    total: int
    progress: float
    images: list[JobImage]
    error: str | None
    notices: list[str]
    """What did not go quite as asked, such as words beyond what the text encoder reads."""
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
    """For how long a finished image is kept, at most."""


class ModelView(BaseModel):
    """``GET /v1/model``."""

    name: str
    version: str
    device: str
    size: ModelSize
    defaults: dict[str, float | int | str]
    limits: ModelLimits
    samplers: list[str]
    """Those that suit the model's Stage C, its objective's default first."""
    can: dict[str, bool]
    examples: list[str]
    image_note: str | None
    """What to know before giving an image; null where there is nothing to say."""


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
