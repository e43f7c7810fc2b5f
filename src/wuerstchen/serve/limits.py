"""The configuration of a service: its address, its model and its limits."""

import hashlib
import hmac
import importlib.util
import ipaddress
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from wuerstchen.errors import UserError
from wuerstchen.sampling import adapters_named

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
MIN_TOKEN = 16  # characters; shorter tokens can be guessed


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """All times are in seconds. Raises ``UserError`` for invalid values."""

    host: str = "127.0.0.1"
    port: int = 8042
    """0 picks a free port."""
    model: str | None = None
    """A path or a name on the Hugging Face Hub. None for the bundled model."""
    devices: tuple[str, ...] = ()
    """One worker per device. If empty, one worker, on a GPU if there is one."""
    precision: str | None = None
    low_memory: str | None = None
    """``stage`` or ``layer``: what is on the GPU at a time. Without previews."""
    prior: str | None = None
    """Stage C from another place: a path or a name on the hub."""
    text_encoder: str | None = None
    """For models in the original's files, which contain none."""
    decoder_text_encoder: str | None = None
    """As ``text_encoder``, for Stage B."""
    compressor: str | None = None
    """For a model without one."""
    loras: tuple[str, ...] = ()
    """Adapters of all images, as ``FILE`` or ``FILE:SCALE``."""
    lora_dir: Path | None = None
    """A folder of adapters, from which requests can choose one."""
    deterministic: bool = False
    """Pad every batch to ``max_batch``, so that an image is bit-identical regardless of what else is in its
    batch."""
    max_batch: int = 8
    """Images per batch at the model's own size. Batches of larger images are smaller."""

    tokens: tuple[str, ...] = field(default=(), repr=False)
    """A request needs one of them, if there are any. Each token stands for one client."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that requests may use, besides those of the loopback address."""
    proxies: tuple[str, ...] = ()
    """Addresses or networks of trusted proxies, or ``*`` for all. Their X-Forwarded-For, -Proto, -Host, -Port
    and -Prefix headers are used."""
    filter: str | None = None
    """``module:function`` of the safety filter for prompts and images (docs/serving.md)."""
    log_prompts: bool = False

    prompt_chars: int = 1000
    max_prompts: int = 16
    max_count: int = 16
    max_images: int = 64
    """Images of one job: prompts times count."""
    max_steps: int = 100
    max_pixels: int | None = None
    """Pixels of one image. None for four times as many as at the model's own size."""
    upload_bytes: int = 8 * 2**20
    upload_pixels: int = 40_000_000
    """WebP images may have half as many, because their decoder takes twice as much memory."""
    upload_timeout: float = 20.0
    """Time to decode one upload."""

    max_waiting: int = 256
    """Images in the queue."""
    max_jobs_per_client: int = 16
    """Jobs of one client that have not ended."""
    max_connections: int | None = None
    """Open connections. None for 4,096, or fewer if the file descriptor limit is too low."""
    max_connections_per_address: int | None = None
    """None for 512, but at most half of ``max_connections``. Does not apply to trusted proxies."""
    max_requests_per_second: float = 50.0
    """Request rate of one client, with bursts (see ``serve.rates``). 0 for no limit."""
    load_timeout: float = 1800.0
    """Time to load the model, including its download."""
    queue_timeout: float = 600.0
    run_timeout: float = 600.0
    """Time to generate one batch."""
    grace: float = 30.0
    """The service exits within this time after a signal. It finishes running jobs if there is time for
    them."""
    body_timeout: float = 30.0
    """Time for the headers of a request, and the same again for its body."""

    results_dir: Path | None = None
    """None for a temporary folder. Several instances may share a folder."""
    result_seconds: float = 3600.0
    result_bytes: int = 2**30
    c2pa_certificate: Path | None = None
    c2pa_key: Path | None = None

    def __post_init__(self) -> None:
        for field_ in fields(self):
            name, value = field_.name, getattr(self, field_.name)
            if name == "port" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if name == "max_requests_per_second":
                if value != 0 and not 0.01 <= value <= 1_000_000:
                    raise UserError(
                        "max_requests_per_second must be from 0.01 to 1,000,000, or 0 for no limit, got "
                        f"{value}."
                    )
            elif not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be above 0, got {value}.")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port must be from 0 to 65535, got {self.port}.")
        for token in self.tokens:
            if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
                raise UserError(
                    f"a token must have at least {MIN_TOKEN} characters, all of them ASCII without spaces, "
                    f"got one of {len(token)} characters. Make one with "
                    "python -c 'import secrets; print(secrets.token_urlsafe())'"
                )
        if not self.is_loopback and not self.tokens:
            raise UserError(
                f"host {self.host} requires tokens, because other machines can reach it. Add --token-file, "
                "or use 127.0.0.1."
            )
        for proxy in self.proxies:
            if self.proxies != ("*",) and not _is_address_or_network(proxy):
                raise UserError(
                    f"proxy must be an address or a network such as 10.0.0.0/8, got {proxy}. Use the "
                    "address that the proxy connects from, or a single * to trust all addresses."
                )
        if (self.c2pa_certificate is None) != (self.c2pa_key is None):
            raise UserError("--c2pa-certificate and --c2pa-key belong together. Give both or neither.")
        if self.c2pa_certificate is not None and importlib.util.find_spec("c2pa") is None:
            raise UserError('signing needs the package c2pa-python. Run pip install "wuerstchen[c2pa]"')
        for path, _ in adapters_named(self.loras):
            if not path.exists():
                raise UserError(f"--lora {path} does not exist. Check the name.")
        if (self.loras or self.lora_dir is not None) and importlib.util.find_spec("peft") is None:
            raise UserError('adapters need the package peft. Run pip install "wuerstchen[lora]"')

    @property
    def always_used(self) -> tuple[Path, ...]:
        """The adapters of all images."""
        return tuple(path for path, _ in adapters_named(self.loras))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach ``host``."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def max_images_per_job(self) -> int:
        """A job with more images than the queue holds would never fit, so this is at most ``max_waiting``."""
        return min(self.max_images, self.max_waiting)

    @property
    def body_bytes(self) -> int:
        """Largest request body: an upload in base64, and texts."""
        return self.upload_bytes * 4 // 3 + 2**18

    def client_of_token(self, token: str) -> str | None:
        """The name of the client with this token, or None. Takes the same time for every guess."""
        given = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        found = None
        for number, own in enumerate(self.tokens):
            if hmac.compare_digest(given, hashlib.sha256(own.encode()).digest()):
                found = f"token {number}"
        return found


def _is_address_or_network(text: str) -> bool:
    try:
        (ipaddress.ip_network if "/" in text else ipaddress.ip_address)(text)
    except ValueError:
        return False
    return True


def read_tokens(path: Path) -> tuple[str, ...]:
    """Reads tokens from a file, one per line. Skips blank lines and comments (#). Raises ``UserError``."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"token file {path} cannot be read ({error}). It must be a text file in UTF-8."
        ) from error
    tokens = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not tokens:
        raise UserError(f"token file {path} has no token. Write one per line.")
    return tokens
