"""The built-in data set: 1,337 emoji subjects, each drawn in five styles, with composed captions.

``emoji_build.build`` makes the images from public npm packages, and ``EmojiSource`` provides them for
training. Half of the subjects are held out in one of the five styles. Training never sees these pairs of
style and subject. They are for evaluation.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from wuerstchen.data.captions import MONO_STYLE, Scene, caption, plain_caption
from wuerstchen.data.colours import COLOURS, name_colours, to_lab
from wuerstchen.data.files import read_file
from wuerstchen.data.sources import Example, Size
from wuerstchen.errors import DataError, UserError

CENTRED = 0.7
"""Fraction of the images that are centred, because a prompt without a position should centre its subject."""
STYLES = ("fluent-3d", "fluent-flat", "fluent-mono", "noto", "twemoji")
LICENSES = dict(zip(STYLES, ("MIT", "MIT", "MIT", "Apache-2.0", "CC-BY-4.0"), strict=True))
RESOLUTION = 256
_MAX_INDEX = 1 << 28  # bytes of index.jsonl

_HERE = Path(__file__).parent
HEX = r"[0-9a-f]{2,6}(?:-[0-9a-f]{2,6})*"


def sample_root() -> Path:
    """The folder of the 100 training images in the package, in the layout of a built set."""
    return _HERE / "sample"


def listed_subjects() -> tuple[str, ...]:
    """The code points of the 1,337 subjects, in the order of Unicode."""
    return tuple((_HERE / "emoji_subjects.txt").read_text().split())


def listed_heldout() -> frozenset[str]:
    """The 650 held-out pairs ``STYLE/HEX``, which training never sees."""
    return frozenset((_HERE / "emoji_heldout.txt").read_text().split())


VAL_PAIRS = 150
"""Number of held-out pairs for model selection. The others are for the report."""


def val_of(keys: Collection[str], count: int) -> frozenset[str]:
    """The subset *val*: the ``count`` keys with the smallest SHA-256 of ``evaluate val KEY``."""
    return frozenset(
        sorted(keys, key=lambda key: hashlib.sha256(f"evaluate val {key}".encode()).digest())[:count]
    )


@cache
def listed_validation() -> frozenset[str]:
    """The held-out pairs ``STYLE/HEX`` in the subset *val*."""
    return val_of(listed_heldout(), VAL_PAIRS)


def subject_hash(subject: str) -> int:
    """The SHA-256 of ``wue`` and the code points of a subject, which decides whether it is held out."""
    return int.from_bytes(hashlib.sha256(f"wue{subject}".encode()).digest(), "big")


def split_of(style: str, subject: str) -> str:
    """``train`` or ``heldout``. Half of the subjects have one held-out style."""
    number = subject_hash(subject)
    held_out_style = STYLES[number // 1000 % len(STYLES)] if number % 1000 < 500 else None
    return "heldout" if style == held_out_style else "train"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A line of ``index.jsonl``: an image and its metadata."""

    id: str  # STYLE/HEX
    style: str
    hex: str
    names: tuple[str, ...]
    tags: tuple[str, ...]
    group: str
    subgroup: str
    colours: tuple[str, ...]
    license: str
    split: str

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise DataError(
                f"style must be one of {', '.join(STYLES)}, got {self.style!r}. Build the set again."
            )
        if not re.fullmatch(HEX, self.hex) or self.id != f"{self.style}/{self.hex}":
            raise DataError(
                f"id must be STYLE/HEX with the values of its line, got {self.id!r}. Build the set again."
            )
        if not self.names or not all(self.names):
            raise DataError(f"names of {self.id} must contain names that are not empty. Build the set again.")
        if self.split != split_of(self.style, self.hex):
            raise DataError(
                f"split of {self.id} must be {split_of(self.style, self.hex)!r} by the rule for held-out"
                f" pairs, got {self.split!r}. Build the set again."
            )


def read_index(root: Path) -> list[Record]:
    """Reads the records of a built folder. Raises ``DataError`` with the number of an invalid line."""
    path = root / "index.jsonl"
    try:
        lines = read_file(path, _MAX_INDEX).decode().splitlines()
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error.__class__.__name__}). Make the data set with `wuerstchen data"
            f" emoji {root}`."
        ) from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            fields: dict[str, Any] = json.loads(line)
            for key in ("names", "tags", "colours"):
                fields[key] = tuple(map(str, fields[key]))
            records.append(Record(**fields))
        except DataError as error:
            raise DataError(f"{path} line {number}: {error}") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"{path} line {number} is not a record of the index ({error}). Build the set again."
            ) from error
    if not records:
        raise DataError(f"{path} is empty. Make the data set with `wuerstchen data emoji {root}`.")
    return records


def write_index(root: Path, records: Iterable[Record]) -> None:
    """Writes ``index.jsonl``, with a record per line."""
    lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records]
    write_whole(root / "index.jsonl", "".join(lines).encode())


def write_attribution(root: Path) -> None:
    """Writes ``ATTRIBUTION.txt`` with the authors and licences of the images."""
    write_whole(root / "ATTRIBUTION.txt", (_HERE / "emoji_attribution.txt").read_bytes())


def read_rgba(path: Path) -> UInt8[np.ndarray, "256 256 4"]:
    """The image in straight (not premultiplied) RGBA. Raises ``DataError`` with the name of the file."""
    try:
        with Image.open(path, formats=["WEBP"]) as image:
            if image.size != (RESOLUTION, RESOLUTION):
                raise DataError(
                    f"{path} must have {RESOLUTION}×{RESOLUTION} pixels, got {image.width}×{image.height}."
                    " Delete it and build the set again."
                )
            return np.array(image.convert("RGBA"))
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as a WebP image ({error.__class__.__name__}). Delete it and build the set"
            " again."
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error.strerror}). Free some space, or choose another folder."
        ) from error


# --- Images for training ---

_SCALES = (0.6, 1.0)  # side of the drawing divided by the side of the canvas
_TOUCHES_BORDER = {"twemoji": 0.85}  # the drawings of other styles include a margin
_PLAIN_SCALE = 0.8
_P_WHITE, _P_RECOLOUR = 1 / 3, 1 / 2
HUE_SHIFTS = (21, 236)  # of 256, the end excluded: at least 30 degrees in either direction

_MIN_DISTANCE = 35.0  # in L*a*b*; closer pixels do not stand out from the background
_MAX_LOST = 0.3  # fraction of the subject that may not stand out
_MIN_LIGHTNESS = 40.0  # of a background behind a black glyph, for a contrast of about 3 to 1

_BACKGROUND_NAMES = tuple(COLOURS)
_BACKGROUND_LAB = to_lab(np.array(list(COLOURS.values()), dtype=np.uint8))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Size and position of a drawing on the canvas, in pixels."""

    side: int
    left: int
    top: int


def compose(
    rgba: UInt8[np.ndarray, "h h 4"], placement: Placement, background: tuple[int, int, int], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes a drawing in straight RGBA and puts it on a canvas of ``size`` × ``size`` pixels in one colour.

    Colours are premultiplied by alpha before resizing, so that the colours of transparent pixels cause no
    fringe (Porter and Duff 1984).
    """
    return _blend(_resize(rgba, placement.side), placement, background, size)


def visible_backgrounds(rgba: UInt8[np.ndarray, "h w 4"], style: str) -> tuple[str, ...]:
    """The background colours from which the subject stands out, at least one."""
    return _visible(_coarse(rgba), style)


def _coarse(rgba: np.ndarray) -> np.ndarray:
    """Every fourth pixel in both directions, which is enough to judge colours."""
    return rgba[::4, ::4]


def _visible(coarse: np.ndarray, style: str) -> tuple[str, ...]:
    if style == MONO_STYLE:
        allowed = _BACKGROUND_LAB[:, 0] >= _MIN_LIGHTNESS
    else:
        opaque = coarse[coarse[..., 3] > 128][:, :3]
        # The same bits as np.linalg.norm, which is four times slower on an axis of length 3.
        squares = np.square(to_lab(opaque).T[:, None] - _BACKGROUND_LAB.T[..., None])
        distance = np.sqrt(squares[0] + squares[1] + squares[2])
        lost = np.count_nonzero(distance < _MIN_DISTANCE, axis=1) / max(len(opaque), 1)
        allowed = lost <= max(_MAX_LOST, lost.min())
    return tuple(name for name, ok in zip(_BACKGROUND_NAMES, allowed, strict=True) if ok)


def _resize(rgba: np.ndarray, side: int) -> np.ndarray:
    premultiplied = Image.fromarray(rgba).convert("RGBa")
    return np.asarray(premultiplied.resize((side, side), Image.Resampling.BICUBIC))


def _blend(
    premultiplied: np.ndarray, placement: Placement, background: tuple[int, int, int], size: int
) -> np.ndarray:
    canvas = np.empty((size, size, 3), dtype=np.uint8)
    canvas[:] = background
    rows = slice(placement.top, placement.top + placement.side)
    columns = slice(placement.left, placement.left + placement.side)
    behind = np.array(background, dtype=np.uint16) * (255 - premultiplied[..., 3:].astype(np.uint16))
    # Bicubic interpolation overshoots, so colour can slightly exceed alpha.
    canvas[rows, columns] = np.minimum(premultiplied[..., :3] + (behind + 127) // 255, 255)
    return canvas


def plain_placement(style: str, size: int) -> Placement:
    """The centre of a canvas, at a scale that gives the drawings of all styles the same apparent size."""
    side = round(size * _PLAIN_SCALE * _TOUCHES_BORDER.get(style, 1))
    return Placement(side=side, left=(size - side) // 2, top=(size - side) // 2)


def shift_hue(rgba: UInt8[np.ndarray, "h w 4"], shift: int) -> UInt8[np.ndarray, "h w 4"]:
    """Rotates the hue by ``shift`` / 256 of a full turn, without changing alpha."""
    hsv = np.array(Image.fromarray(rgba[..., :3]).convert("HSV"))
    hsv[..., 0] += np.uint8(shift)  # hue is modulo 256, like the type
    rgb = np.asarray(Image.frombytes("HSV", hsv.shape[1::-1], hsv.tobytes()).convert("RGB"))
    return np.concatenate([rgb, rgba[..., 3:]], axis=2)


@dataclass(frozen=True, kw_only=True)
class _View:
    """The random choices for one composed image."""

    scale: float
    across: float
    down: float
    centred: bool
    shift: int  # of the hue, 0 for none
    background: str
    coarse: np.ndarray  # the result of `_coarse` after recolouring


class EmojiSource:
    """The images of a built folder, or of ``sample_root``, as a ``Source``.

    ``split`` is ``train``, ``heldout``, or ``validation``. The last is the subset *val* of the held-out
    pairs, which is empty if the set has none. Its files are not checked before they are read. A fraction
    ``centred`` of the images is placed as by ``plain``, the others at random. With ``cache``, decoded
    drawings stay in memory: 256 KiB each, and 1.6 GB for the whole set.
    """

    def __init__(
        self, root: Path, split: str = "train", *, cache: bool = False, centred: float = 0.0
    ) -> None:
        if split not in ("train", "heldout", "validation"):
            raise DataError(f"split must be train, heldout or validation, got {split!r}.")
        self.root = Path(root)
        self.split = split
        self.centred = centred
        self._cached: dict[int, np.ndarray] | None = {} if cache else None
        self.records = tuple(record for record in read_index(self.root) if self._is_in(record))
        if split == "validation":
            return
        if not self.records:
            raise DataError(f"{self.root} has no images of the split {split}. Build the whole set.")
        for record in self.records:
            if not self._path(record).is_file():
                raise DataError(
                    f"{self._path(record)} is missing. Run `wuerstchen data emoji {self.root}` again."
                )

    def _is_in(self, record: Record) -> bool:
        """Whether a record belongs to this split."""
        if self.split == "validation":
            return record.split == "heldout" and record.id in listed_validation()
        return record.split == self.split

    def __len__(self) -> int:
        return len(self.records)

    def name(self, item: int) -> str:
        """The file of the drawing, relative to the folder."""
        return f"{self.records[item].id}.webp"

    def rgba(self, item: int) -> UInt8[np.ndarray, "256 256 4"]:
        """The original drawing in straight RGBA. Raises ``DataError`` with the name of a damaged file."""
        if self._cached is None:
            return read_rgba(self._path(self.records[item]))
        if item not in self._cached:
            self._cached[item] = read_rgba(self._path(self.records[item]))
        return self._cached[item]

    def image(self, item: int, rng: np.random.Generator, size: int | Size) -> UInt8[np.ndarray, "s s 3"]:
        """The drawing at a random place and scale on a named colour, half of the time recoloured."""
        rgba = self.rgba(item)
        return self._composed(item, rgba, self._view(item, rgba, rng), size)

    def example(self, item: int, rng: np.random.Generator, size: int | Size) -> Example:
        """The result of ``image``, and a composed caption that describes it."""
        rgba = self.rgba(item)
        view = self._view(item, rgba, rng)
        return Example(image=self._composed(item, rgba, view, size), caption=self._caption(item, view, rng))

    def captions(self, item: int, rngs: Iterable[np.random.Generator]) -> list[str]:
        """The captions that ``example`` returns with each of the generators, but much faster."""
        rgba = self.rgba(item)
        return [self._caption(item, self._view(item, rgba, rng), rng) for rng in rngs]

    def plain(self, item: int, size: int) -> Example:
        """The subject in its original colours, centred on white, with the shortest full caption."""
        record = self.records[item]
        image = compose(self.rgba(item), plain_placement(record.style, size), COLOURS["white"], size)
        return Example(image=image, caption=plain_caption(record.style, record.names[0]))

    def fingerprint(self) -> str:
        """A hash of the records of the split and of the contents of their files."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for record in self.records:
            content = hashlib.blake2b(self._path(record).read_bytes(), digest_size=16).hexdigest()
            digest.update(json.dumps([asdict(record), content]).encode())
        return digest.hexdigest()

    def _path(self, record: Record) -> Path:
        return self.root / f"{record.id}.webp"

    def _view(self, item: int, rgba: np.ndarray, rng: np.random.Generator) -> _View:
        # All random numbers are drawn in every case, so that those of the caption do not shift.
        scale, across, down = rng.uniform(*_SCALES), rng.random(), rng.random()
        recolour, shift = rng.random() < _P_RECOLOUR, int(rng.integers(*HUE_SHIFTS))
        on_white, choice = rng.random() < _P_WHITE, rng.random()
        centred = rng.random() < self.centred

        style, coarse = self.records[item].style, _coarse(rgba)
        if recolour and style != MONO_STYLE:
            coarse = shift_hue(coarse, shift)
        else:
            shift = 0
        visible = _visible(coarse, style)
        coloured = [name for name in visible if name != "white"]
        if "white" in visible and (on_white or not coloured):
            background = "white"
        else:
            background = coloured[int(choice * len(coloured))]
        return _View(
            scale=scale,
            across=across,
            down=down,
            centred=centred,
            shift=shift,
            background=background,
            coarse=coarse,
        )

    def _composed(self, item: int, rgba: np.ndarray, view: _View, size: int | Size) -> np.ndarray:
        if not isinstance(size, int):
            raise UserError(f"Emoji images must be square, got {size[0]}x{size[1]}. Use a single side.")
        style = self.records[item].style
        if view.centred:
            placement = plain_placement(style, size)
        else:
            side = max(1, round(size * view.scale * _TOUCHES_BORDER.get(style, 1)))
            room = size - side + 1
            placement = Placement(side=side, left=int(view.across * room), top=int(view.down * room))
        shown = shift_hue(rgba, view.shift) if view.shift else rgba
        return compose(shown, placement, COLOURS[view.background], size)

    def _caption(self, item: int, view: _View, rng: np.random.Generator) -> str:
        record = self.records[item]
        scene = Scene(
            style=record.style,
            names=record.names,
            tags=record.tags,
            colours=tuple(name_colours(view.coarse)) if view.shift else record.colours,
            recoloured=bool(view.shift),
            background=view.background,
        )
        return caption(scene, rng)
