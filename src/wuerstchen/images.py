"""Decodes, rotates, crops and resizes images, and converts them to and from tensors.

Importing this module loads neither torch nor numpy, because the command line imports it early.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image, ImageDraw, ImageFont

from wuerstchen.colour_profiles import differs_from_srgb, profile_of, to_srgb
from wuerstchen.errors import DataError, UserError, UserNotice
from wuerstchen.png_text import is_about_text, open_any, open_without_text

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float
    from torch import Tensor

MAX_PIXELS = 100_000_000
STRIP_PIXELS = 2**20
"""Pixels per strip in conversions that need several times the memory of the image."""

# EXIF orientation → rotation that turns the image upright (EXIF 2.32, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: Path | str) -> Image.Image:
    """Decodes the image in ``path`` to sRGB with 8 bits, upright, with a white background.

    Returns the first frame of an animation. Embedded colour profiles are applied, as in ``to_rgb``. Raises
    ``DataError`` if the file is missing, empty, damaged, truncated, not an image, or larger than
    ``MAX_PIXELS`` (by the header, before anything is decoded), and for EPS, because decoding it runs a
    program in the file.
    """
    return _decoded(path, path)


def decode_image(data: bytes, name: str) -> Image.Image:
    """``open_image`` for the bytes of an image file. ``name`` is its name in messages."""
    if not data:
        raise bad_image(name, "it is empty", "download it again or remove it")
    return _decoded(io.BytesIO(data), name)


def _decoded(file: Path | str | io.BytesIO, name: Path | str) -> Image.Image:
    rgb = opened_image(file, name, lambda image: to_rgb(image, f"image {str(name)!r}"))
    rgb.info = {}  # the profile, EXIF and text of the source must not be saved with the result
    return rgb


def opened_image(
    file: Path | str | io.BytesIO, name: Path | str, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """The image in ``file``, upright and converted with ``convert``. Raises ``DataError`` as ``open_image``.

    ``name`` is its name in messages.
    """
    if not isinstance(file, io.BytesIO):
        check_file(file)
    with pillow_errors(name):
        try:
            loaded = _loaded(open_any(file), name)
        except ValueError as error:
            if not is_about_text(error):
                raise
            loaded = _loaded(open_without_text(file), name)  # the text is after the pixels
        return convert(loaded)


def _loaded(opened: Image.Image, name: Path | str) -> Image.Image:
    """The image in its own mode, upright. Only one copy of its pixels remains in memory."""
    with opened as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        if image.format == "EPS":
            raise bad_image(name, "EPS files are programs, which are never run", "save it as PNG or JPEG")
        image.load()
        return turned_upright(image)


def is_converted(path: Path | str) -> bool:
    """Whether the colour profile in ``path`` changes the colours, by the file's header. False if it cannot be
    read."""
    try:
        check_file(path)  # opening a FIFO would wait
        with pillow_errors(path), open_any(path) as image:
            profile = profile_of(image)
            return profile is not None and differs_from_srgb(profile)
    except DataError:
        return False


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Converts a decoded image of any mode to 8-bit sRGB.

    The embedded colour profile is applied (``colour_profiles.to_srgb``). Without one, RGB is assumed to be
    sRGB, and CMYK is converted by a simple formula. 16-bit grey is scaled (Pillow's own conversion clips it),
    and the background of transparent images becomes white. Raises ``DataError`` for integers outside 0..65535
    and floats outside 0..1, because their white is unknown. ``name`` is the name of the image in messages.
    """
    if image.mode.startswith("I"):
        return _grey_to_rgb(image, 65535, name)
    if image.mode == "F":
        return _grey_to_rgb(image, 1, name)
    if image.has_transparency_data:
        return _strip_by_strip(image, _on_white)
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    coloured = to_srgb(image)
    return coloured if coloured is not image and coloured.mode == "RGB" else coloured.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    if profile_of(image) is not None:
        opaque = image.convert("L") if image.mode in ("L", "LA") else layer.convert("RGB")
        coloured = to_srgb(opaque).convert("RGBA")
        coloured.putalpha(layer.getchannel("A"))
        layer = coloured
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in strips of ``STRIP_PIXELS`` (at least one row), from the top: (first row, strip)."""
    rows = max(1, STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _strip_by_strip(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Applies ``convert`` strip by strip and returns an RGB image.

    ``convert`` must treat each pixel independently. Converting a whole image through RGBA or float64 would
    take several times the memory of the result, too much for a large upload.
    """
    converted = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        converted.paste(convert(strip), (0, top))
    return converted


def note_conversion(image: Image.Image, name: str) -> None:
    """Prints a ``UserNotice`` if ``to_rgb`` changes the pixels of a decoded image."""
    profile = profile_of(image)
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        what = "is transparent"
    elif image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        what = f"has the mode {image.mode}"
    elif profile is not None and differs_from_srgb(profile):
        what = "has another colour profile than sRGB"
    else:
        return
    warnings.warn(
        f"{name} {what}. The result is 8-bit sRGB on white, also outside the mask",
        UserNotice,
        stacklevel=2,
    )


def upright_rgb(image: Any, name: str = "image") -> Image.Image:
    """Converts an opened PIL image as ``open_image`` does a file: 8-bit sRGB, upright, on white.

    Raises ``UserError`` if it is not an image or has no pixels.
    """
    if not isinstance(image, Image.Image):
        raise UserError(f"{name} must be a PIL image, got {type(image)}. Open files with PIL.Image.open.")
    if 0 in image.size:
        raise UserError(f"{name} has {image.width}×{image.height} pixels. Both sides must be at least 1.")
    rgb = to_rgb(turned_upright(image), name)
    rgb.info = {}  # the profile must not be applied again
    return rgb


def center_crop_resize(image: Image.Image, size: int) -> Image.Image:
    """Crops the largest square from the center and resizes it to ``size`` × ``size``."""
    return resize_crop(image, size, size)


def resize_crop(
    image: Image.Image, width: int, height: int, rng: np.random.Generator | None = None
) -> Image.Image:
    """Resizes to cover ``width`` × ``height``, keeping the aspect ratio, and crops the rest.

    The crop is centered, or placed by two random numbers from ``rng``. Antialiased (Lanczos). Raises
    ``UserError`` for sides below 1.
    """
    if width < 1 or height < 1:
        raise UserError(f"both sides must be at least 1, got {width}×{height}.")
    along, down = (0.5, 0.5) if rng is None else (rng.random(), rng.random())
    box = crop_box(image.size, width, height, along, down)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def crop_box(
    size: tuple[int, int], width: int, height: int, along: float = 0.5, down: float = 0.5
) -> tuple[float, float, float, float]:
    """The largest box with the aspect ratio ``width``:``height`` in an image of ``size``.

    Returns left, top, right and bottom in pixels. ``along`` and ``down`` place the box, from 0 (left, top) to
    1 (right, bottom). Only one of them has an effect.
    """
    scale = max(width / size[0], height / size[1])
    crop_width, crop_height = min(width / scale, size[0]), min(height / scale, size[1])
    left, top = along * (size[0] - crop_width), down * (size[1] - crop_height)
    return left, top, min(left + crop_width, size[0]), min(top + crop_height, size[1])


def to_tensor(image: Image.Image) -> Float[Tensor, "3 h w"]:
    """The image as float32 in [0, 1]. Other modes than RGB are converted with ``to_rgb``."""
    import numpy as np
    import torch

    pixels = np.array(image if image.mode == "RGB" else to_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def to_images(tensor: Float[Tensor, "b c h w"]) -> list[Image.Image]:
    """Converts values in [0, 1] to 8-bit images. Values outside are clamped.

    One channel gives grey images, three channels RGB, four channels RGBA.

    Raises ``UserError`` for NaN, which would silently become black.
    """
    if bool(tensor.isnan().any()):
        raise UserError(
            "the image tensor contains NaN, usually because a network overflowed in float16. Use "
            "bfloat16 or float32."
        )
    pixels = (tensor.detach().float().clamp(0, 1) * 255).round().byte()
    # Contiguous, because PIL is eight times as slow otherwise.
    pixels = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


def grid(
    images: Sequence[Image.Image], columns: int, padding: int = 4, labels: Sequence[str] | None = None
) -> Image.Image:
    """Arranges images row by row on white, with ``padding`` pixels around each and the labels below.

    Cells are as large as the largest image. Long labels are wrapped. Raises ``UserError`` if there are no
    images, for ``columns`` below 1, for a negative ``padding``, and if the number of labels differs from that
    of images.
    """
    if not images:
        raise UserError("a grid needs at least one image, got none.")
    if columns < 1:
        raise UserError(f"columns must be at least 1, got {columns}.")
    if padding < 0:
        raise UserError(f"padding must be at least 0, got {padding}.")
    if labels is not None and len(labels) != len(images):
        raise UserError(f"{len(labels)} labels do not match {len(images)} images. Give one for each.")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    font = ImageFont.load_default(max(12, width // 18))
    texts = [_wrapped(label, width, font) for label in labels or []]
    text_height = max((_text_height(text, font) for text in texts), default=0)
    cell_width, cell_height = width + padding, height + text_height + padding
    canvas = Image.new("RGB", (columns * cell_width + padding, rows * cell_height + padding), "white")
    draw = ImageDraw.Draw(canvas)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x, y = padding + column * cell_width, padding + row * cell_height
        canvas.paste(image if image.mode == "RGB" else to_rgb(image), (x, y))
        if texts:
            draw.multiline_text((x, y + height), texts[index], fill="black", font=font)
    return canvas


def check_file(path: Path | str) -> None:
    """Raises ``DataError`` unless ``path`` is a regular file that is not empty."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise bad_image(path, f"it cannot be read ({reason})", "give the path of an image") from error
    if stat.S_ISDIR(status.st_mode):
        raise bad_image(path, "it is a folder", "give the path of one image")
    if not stat.S_ISREG(status.st_mode):
        raise bad_image(path, "it is not a regular file", "give the path of an image")
    if status.st_size == 0:
        raise bad_image(path, "it is empty", "download it again or remove it")


@contextlib.contextmanager
def pillow_errors(path: Path | str) -> Iterator[None]:
    """Turns all errors of Pillow into ``DataError``."""
    try:
        with warnings.catch_warnings():
            # Pillow warns about sizes, which are checked here, and about metadata, which is not used.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    except (DataError, UserNotice):
        raise
    except Image.DecompressionBombError as error:
        limit = MAX_PIXELS // 1_000_000
        raise bad_image(path, f"it has over {limit} megapixels", "resize it or remove it") from error
    except Image.UnidentifiedImageError as error:
        raise bad_image(path, "it is not an image in a known format", "save it as PNG or JPEG") from error
    except PermissionError as error:
        raise bad_image(path, "there is no permission to read it", "change its permissions") from error
    except Exception as error:  # decoders raise almost anything for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise bad_image(
            path, f"it is damaged or truncated ({reason})", "download it again or remove it"
        ) from error


def bad_image(path: Path | str, reason: str, fix: str) -> DataError:
    return DataError(f"image {str(path)!r} cannot be used: {reason}. {fix[0].upper()}{fix[1:]}.")


def turned_upright(image: Image.Image) -> Image.Image:
    """The image rotated and mirrored as its EXIF orientation says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF does not matter for the pixels
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _grey_to_rgb(image: Image.Image, white: int, name: str) -> Image.Image:
    import numpy as np

    def extremes(strip: Image.Image) -> tuple[float, float]:
        values = np.asarray(strip)
        return float(values.min()), float(values.max())

    # NumPy's minimum and maximum keep NaN, unlike Python's. It is refused below.
    low, high = np.array([extremes(strip) for _, strip in _strips(image)]).T
    low, high = low.min(), high.max()
    if not (low >= 0 and high <= white):
        raise DataError(
            f"{name} has values from {low:g} to {high:g}. In Pillow's mode {image.mode} they "
            f"must be from 0 to {white}. Save it with 8 or 16 bits."
        )
    transparent = image.info.get("transparency")
    curve = None
    if profile_of(image) is not None:
        ramp = Image.frombytes("L", (256, 1), bytes(range(256)))
        ramp.info = dict(image.info)
        curve = np.asarray(to_srgb(ramp).convert("L"))[0]

    def convert(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip).astype(np.float64)
        levels = values * (255 / white)
        if curve is not None:
            levels = np.interp(levels, np.arange(256), curve)
        pixels = np.rint(levels).astype(np.uint8)
        if isinstance(transparent, int):
            pixels[values == transparent] = 255
        return Image.fromarray(pixels).convert("RGB")

    return _strip_by_strip(image, convert)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _text_height(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return int(box[3]) + 2


def pad_to_canvas(pixels: Float[Tensor, "b 3 h w"], canvas: tuple[int, int]) -> Float[Tensor, "b 3 h2 w2"]:
    """Centers images on a larger canvas by repeating their edges."""
    (right, left), (bottom, top) = (
        ((rest := whole - own) - rest // 2, rest // 2)
        for whole, own in zip(canvas, (pixels.shape[3], pixels.shape[2]), strict=True)
    )
    from torch.nn.functional import pad

    return pad(pixels, (left, right, top, bottom), mode="replicate")


def center_crop(pixels: Float[Tensor, "b 3 h2 w2"], size: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
    """The center crop of images with ``size`` (width, height)."""
    left, top = (pixels.shape[3] - size[0]) // 2, (pixels.shape[2] - size[1]) // 2
    return pixels[:, :, top : top + size[1], left : left + size[0]]
