"""What a service is started with: where it listens, what it draws with, and how much anyone may ask for."""

import hashlib
import hmac
import importlib.util
import ipaddress
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from wuerstchen.errors import UserError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
MIN_TOKEN = 16  # characters: shorter ones can be guessed


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Times are in seconds. Raises ``UserError`` for what cannot be served."""

    host: str = "127.0.0.1"
    port: int = 8042
    """0 takes any that is free."""
    model: str | None = None
    """A folder, or a name on the hub; None is the model in the package."""
    devices: tuple[str, ...] = ()
    """A worker for each; empty is one on a GPU if there is one."""
    precision: str | None = None
    deterministic: bool = False
    """Whether every batch is filled up to ``max_batch``, so that a picture is the same to the bit whoever
    shares it."""
    max_batch: int = 8
    """Pictures drawn together, of the model's own size; of larger ones fewer."""

    tokens: tuple[str, ...] = field(default=(), repr=False)
    """Who has one of them is served. Each stands for a client."""
    allowed_hosts: tuple[str, ...] = ()
    """Names besides those of this machine that requests may call it by."""
    proxies: tuple[str, ...] = ()
    """Addresses or networks whose X-Forwarded headers are believed: For, Proto, Host, Port and Prefix.
    ``*`` is all."""
    filter: str | None = None
    """``module:function``, asked about every prompt and picture (docs/serving.md)."""
    log_prompts: bool = False

    prompt_chars: int = 1000
    max_prompts: int = 16
    max_count: int = 16
    max_pictures: int = 64
    """Of one job: prompts times count."""
    max_steps: int = 100
    max_pixels: int | None = None
    """Of one picture; None is four times those of the model's own size."""
    upload_bytes: int = 8 * 2**20
    upload_pixels: int = 40_000_000
    """Of WebP half as many: its decoder takes twice the memory of the others."""
    upload_timeout: float = 20.0
    """To decode one upload."""

    max_waiting: int = 256
    """Pictures in the queue."""
    max_jobs_per_client: int = 16
    """Waiting or being drawn."""
    max_connections: int | None = None
    """Open at a time; None is 4,096, or what the limit of file descriptors leaves room for."""
    max_connections_per_address: int | None = None
    """None is 512, or half of ``max_connections``. Trusted proxies may have any number."""
    max_requests_per_second: float = 50.0
    """Of one client; many more at once after a pause (``serve.rates``). 0 is no limit."""
    load_timeout: float = 1800.0
    """To load the model, its download included."""
    queue_timeout: float = 600.0
    run_timeout: float = 600.0
    """Of one batch."""
    grace: float = 30.0
    """After a signal the service ends within so long; what is being drawn is finished if it can be."""
    body_timeout: float = 30.0
    """For a request's headers, and again for its body."""

    results_dir: Path | None = None
    """None is a temporary folder. Several instances may share one."""
    result_seconds: float = 3600.0
    result_bytes: int = 2**30
    c2pa_certificate: Path | None = None
    c2pa_key: Path | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "port" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if one.name == "max_requests_per_second":
                if value != 0 and not 0.01 <= value <= 1_000_000:
                    raise UserError(
                        f"max_requests_per_second is wrong: {value}. It must be from 0.01 to 1,000,000, or 0 "
                        "for no limit. Choose another."
                    )
                continue
            if not (math.isfinite(value) and value > 0):
                raise UserError(
                    f"{one.name} {value} is wrong because it must be above 0; choose a larger one"
                )
        if not 0 <= self.port <= 65535:
            raise UserError(f"port {self.port} is wrong because ports are 0 to 65535; 8042 is common here")
        for token in self.tokens:
            if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
                raise UserError(
                    f"a token of {len(token)} characters is wrong because it must have at least {MIN_TOKEN}, "
                    "all of them ASCII without spaces; python -c 'import secrets; "
                    "print(secrets.token_urlsafe())' makes one"
                )
        if not self.is_loopback and not self.tokens:
            raise UserError(
                f"host {self.host} is wrong because others could reach it without a token; name a "
                "--token-file, or use 127.0.0.1"
            )
        for proxy in self.proxies:
            if self.proxies != ("*",) and not _is_address_or_network(proxy):
                raise UserError(
                    f"proxy {proxy} is wrong because it must be an address or a network, as 10.0.0.0/8; "
                    "give what the proxy connects from, or * alone for all"
                )
        if (self.c2pa_certificate is None) != (self.c2pa_key is None):
            raise UserError("--c2pa-certificate and --c2pa-key belong together; give both or none")
        if self.c2pa_certificate is not None and importlib.util.find_spec("c2pa") is None:
            raise UserError('signing needs the package c2pa-python; pip install "wuerstchen[c2pa]"')

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def pictures_of_job(self) -> int:
        """The most that a job may have: more than the queue holds would never fit."""
        return min(self.max_pictures, self.max_waiting)

    @property
    def body_bytes(self) -> int:
        """The most that a request may hold: an upload in base64, and texts."""
        return self.upload_bytes * 4 // 3 + 2**18

    def client_of_token(self, token: str) -> str | None:
        """A name for the client whose token that is, None for nobody's; in the same time for any guess."""
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
    """Tokens in a file, one a line; blank lines and those with # are left out. Raises ``UserError``."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"token file {path} cannot be read ({error}); give one in UTF-8") from error
    tokens = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not tokens:
        raise UserError(f"token file {path} holds no token; write one a line")
    return tokens
