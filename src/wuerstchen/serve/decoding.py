"""The process that decodes uploads. It can be killed at any time, and its memory and time are bounded.

A few kilobytes can hold an image that takes hours to decode (thousands of progressive scans) or gigabytes of
memory, and no library can be stopped in the middle of it. ``serve.uploads`` starts these processes.

Messages are tuples. To the process: a number and an ``Upload``. From it: ``("ready",)`` once, and for each
upload ``("pixels", number, RGB bytes, notices, last)`` or ``("refused", number, status, message, last)``.
After an answer with ``last`` it ends by itself, to give its memory back. ``notices`` are texts for the
client, such as that a colour profile could not be used. The process prints none of them: clients would fill
the log.
"""

import base64
import binascii
import importlib
import io
import os
import signal
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

from wuerstchen.errors import UserError, UserNotice
from wuerstchen.images import decode_image, resize_crop
from wuerstchen.png_text import open_any

UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")
WEBP_SHARE = 2
"""WebP may have so many times fewer pixels: its decoder takes twice the memory of the others."""
MEMORY = 640 * 2**20
"""Bytes that one process may use to decode, besides what it has when it starts. The most that was measured
is 470 MiB: a progressive CMYK JPEG of 40 megapixels."""
KEPT_MEMORY = 256 * 2**20
"""A process that has used more ends after its answer."""
MAX_NOTICES = 10
"""Of one upload."""
ALARM_SECONDS = 5.0
"""After the time limit the process ends by itself, should the service be gone that watches over it."""


@dataclass(frozen=True)
class Upload:
    """An image as a client sent it, and what is wanted of it."""

    text: str
    """Base64, or a data: URL in base64."""
    width: int
    height: int
    max_bytes: int
    max_pixels: int
    seconds: float
    """Time limit."""


class UploadError(Exception):
    """An upload that cannot be used: an HTTP status, the message, and when to try again, in seconds."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


def main(memory: int, connection: Connection) -> None:
    """Decodes what comes through the pipe until it ends, which it does with the service.

    ``memory``: bytes that may be used besides what is used at the start.
    """
    # The service ends this process; a terminal's Ctrl-C reaches all processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # what clients should know is recorded below
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # each reserves memory
    # 16-bit images need NumPy, and its libraries would not fit any more.
    importlib.import_module("numpy")
    _bound_memory(memory)
    try:
        connection.send(("ready",))
        while True:
            job, upload = connection.recv()
            with _alarm(upload.seconds + ALARM_SECONDS):
                answer = _answer(job, upload)
            last = _peak_memory() > KEPT_MEMORY
            connection.send((*answer, last))
            if last:
                return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the service is gone


def _answer(job: int, upload: Upload) -> tuple[Any, ...]:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserNotice)
            picture = resize_crop(read_upload(upload), upload.width, upload.height)
        notices = tuple(dict.fromkeys(str(warning.message) for warning in caught))[:MAX_NOTICES]
        return ("pixels", job, picture.tobytes(), notices)
    except UploadError as error:
        return ("refused", job, error.status, error.message)
    except MemoryError:
        return ("refused", job, 400, "image is wrong because it takes too much memory to decode; shrink it")


def read_upload(upload: Upload) -> Image.Image:
    """The whole image: RGB, upright, without metadata. Raises ``UploadError``, and ``MemoryError``.

    Format, size and number of frames are told from the header, before anything is decoded.
    """
    data = _bytes_of(upload)
    try:
        with open_any(io.BytesIO(data), UPLOAD_FORMATS) as header:
            pixels = header.width * header.height
            most = upload.max_pixels // (WEBP_SHARE if header.format == "WEBP" else 1)
            # Phones put further images into a JPEG, which is still one that stands.
            frames = 1 if header.format == "MPO" else getattr(header, "n_frames", 1)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise _refused("it has far too many pixels; shrink it") from error
    except Exception as error:  # damaged files make the readers fail in ways of every kind
        raise _refused("it is no PNG, JPEG or WebP that can be read; save it anew as one") from error
    if pixels > most:
        raise _refused(f"it has {pixels:,} pixels and may have {most:,}; shrink it")
    if frames != 1:
        raise _refused("it is animated; give a still picture")
    try:
        return decode_image(data, "upload")
    except UserError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from None
        raise UploadError(400, str(error)) from error


def _bytes_of(upload: Upload) -> bytes:
    """The file that an upload holds. Raises ``UploadError``."""
    text = upload.text
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise _refused("its data: URL is not in base64; write data:image/png;base64,...")
    text = "".join(text.split())  # many encoders break lines
    if len(text) > upload.max_bytes * 4 // 3 + 4:
        raise _refused(f"it has over {upload.max_bytes:,} bytes; shrink it", 413)
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused("it is no base64; encode the file's bytes") from error


def _refused(message: str, status: int = 400) -> UploadError:
    return UploadError(status, f"image is wrong because {message}")


class _alarm:
    """The system ends this process if the block takes longer: also inside of a library."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        if hasattr(signal, "setitimer"):  # not on Windows
            signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: object) -> None:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _bound_memory(memory: int) -> None:
    """Lets this process have so much more address space. Only where /proc tells how much it has: on Linux."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ModuleNotFoundError, OSError):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + memory
    resource.setrlimit(
        resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
    )


def _peak_memory() -> int:
    """The most bytes that this process has had; 0 where nobody tells."""
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0
