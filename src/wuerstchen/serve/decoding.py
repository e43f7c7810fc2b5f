"""The process that decodes uploads. It can be killed at any time, and its memory and time are bounded.

An image of a few kilobytes can take hours (thousands of progressive scans) or gigabytes of memory to decode,
and libraries cannot be stopped in the middle of it. ``serve.uploads`` starts these processes.

Messages are tuples. To the process: a number and an ``Upload``. From it: ``("ready",)`` once, and for each
upload ``("pixels", number, bytes, notices, (width, height) as sent, last)`` or
``("refused", number, status, message, last)``.
After an answer with ``last`` it exits, to free its memory. ``notices`` are texts for the client, such as that
a colour profile could not be used. They are not printed, because clients could fill the log with them.
"""

import base64
import binascii
import importlib
import io
import os
import re
import signal
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from PIL import Image

from wuerstchen.errors import UserError, UserNotice
from wuerstchen.images import decode_image, resize_crop
from wuerstchen.png_text import open_any

UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")
WEBP_FACTOR = 2
"""WebP images may have this many times fewer pixels: their decoder takes twice as much memory."""
MEMORY = 640 * 2**20
"""Bytes that one process may use in addition to what it has at its start. The most that was measured is 470
MiB, for a progressive CMYK JPEG of 40 megapixels."""
KEPT_MEMORY = 256 * 2**20
"""A process that has used more exits after its answer."""
MAX_NOTICES = 10
"""Per upload."""
ALARM_SECONDS = 5.0
"""This long after the time limit the process exits by itself, in case the service no longer exists."""


@dataclass(frozen=True)
class Upload:
    """An image as a client sent it, with the target size and the limits."""

    text: str
    """Base64, or a data: URL in base64."""
    width: int
    height: int
    max_bytes: int
    max_pixels: int
    seconds: float
    """Time limit."""
    name: Literal["image", "mask"] = "image"
    """A mask is decoded to grey, and an image to RGB."""


class UploadError(Exception):
    """An upload that cannot be used: HTTP status, message, and seconds until another try makes sense."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


def main(memory: int, connection: Connection) -> None:
    """Decodes uploads until the pipe closes, which happens at the latest when the service exits.

    ``memory``: bytes that may be used in addition to what is used at the start.
    """
    # The service ends this process. Ctrl-C in a terminal reaches all processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # warnings for clients are recorded below
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # each thread reserves memory
    # 16-bit images and masks need NumPy. Import it now: its libraries would exceed the memory limit later.
    importlib.import_module("wuerstchen.masks")
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
            image = read_upload(upload)
            pixels = _at_size(image, upload).tobytes()
        notices = tuple(dict.fromkeys(str(warning.message) for warning in caught))[:MAX_NOTICES]
        return ("pixels", job, pixels, notices, image.size)
    except UploadError as error:
        return ("refused", job, error.status, re.sub(r"^image\b", upload.name, error.message))
    except MemoryError:
        return ("refused", job, 400, f"{upload.name} takes too much memory to decode. Shrink it.")


def _at_size(image: Image.Image, upload: Upload) -> Image.Image:
    """The image scaled and cropped to the size of the upload. Raises ``UploadError`` for a mask that is black
    or white everywhere."""
    if upload.name == "image":
        return resize_crop(image, upload.width, upload.height)
    from wuerstchen.masks import check_mask, scaled_mask

    try:
        check_mask(image)
        mask = scaled_mask(image, (upload.width, upload.height))
        check_mask(mask, given=image.size)
    except UserError as error:
        raise UploadError(400, str(error)) from error
    return mask


def read_upload(upload: Upload) -> Image.Image:
    """Decodes an image to RGB or a mask to grey, upright and without metadata. Raises ``UploadError`` and
    ``MemoryError``.

    Checks format, size and number of frames from the header before decoding anything.
    """
    data = _bytes_of(upload)
    try:
        with open_any(io.BytesIO(data), UPLOAD_FORMATS) as header:
            pixels = header.width * header.height
            limit = upload.max_pixels // (WEBP_FACTOR if header.format == "WEBP" else 1)
            # Phones add more images to a JPEG, but it is still a single picture.
            frames = 1 if header.format == "MPO" else getattr(header, "n_frames", 1)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise _refused("has far too many pixels. Shrink it.") from error
    except Exception as error:  # damaged files raise all kinds of exceptions
        raise _refused(
            "is not a readable PNG, JPEG or WebP. Save it again in one of these formats."
        ) from error
    if pixels > limit:
        raise _refused(f"has too many pixels: {pixels:,}. At most {limit:,} are allowed. Shrink it.")
    if frames != 1:
        raise _refused("is animated. Send a still image.")
    try:
        if upload.name == "mask":
            from wuerstchen.masks import decode_mask

            return decode_mask(data, "upload")
        return decode_image(data, "upload")
    except UserError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from None
        raise UploadError(400, str(error)) from error


def _bytes_of(upload: Upload) -> bytes:
    """The bytes of the uploaded file. Raises ``UploadError``."""
    text = upload.text
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise _refused("has a data: URL that is not in base64. Write data:image/png;base64,...")
    text = "".join(text.split())  # many encoders break lines
    if len(text) > upload.max_bytes * 4 // 3 + 4:
        raise _refused(f"has more than {upload.max_bytes:,} bytes. Shrink it.", 413)
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused("is not valid base64. Encode the bytes of the file.") from error


def _refused(message: str, status: int = 400) -> UploadError:
    return UploadError(status, f"image {message}")


class _alarm:
    """Lets the system kill this process if the block takes longer, even inside a library."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        if hasattr(signal, "setitimer"):  # not on Windows
            signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: object) -> None:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _bound_memory(memory: int) -> None:
    """Limits the address space to what is in use plus ``memory`` bytes. Linux only, since it needs /proc."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ModuleNotFoundError, OSError):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + memory
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


def _peak_memory() -> int:
    """Peak memory of this process in bytes, or 0 if the system does not report it."""
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0
