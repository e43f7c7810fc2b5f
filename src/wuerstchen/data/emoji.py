"""The built-in data set: 1,337 emoji subjects, each drawn in five styles, with captions composed for them.

``emoji_build.build`` makes the pictures from public npm packages; ``EmojiSource`` serves them to training.
A subject may be held out in one of its five styles: the pair is for evaluation, never seen in training.
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
"""Share of the pictures placed in the middle: a prompt without a place should give a subject there."""
STYLES = ("fluent-3d", "fluent-flat", "fluent-mono", "noto", "twemoji")
LICENSES = dict(zip(STYLES, ("MIT", "MIT", "MIT", "Apache-2.0", "CC-BY-4.0"), strict=True))
RESOLUTION = 256
_MAX_INDEX = 1 << 28  # bytes of index.jsonl

_HERE = Path(__file__).parent
HEX = r"[0-9a-f]{2,6}(?:-[0-9a-f]{2,6})*"


def sample_root() -> Path:
    """The folder of the 100 training pictures that come with the package, laid out as a built set."""
    return _HERE / "sample"


def listed_subjects() -> tuple[str, ...]:
    """The 1,337 subjects by their code points, in Unicode's order."""
    return tuple((_HERE / "emoji_subjects.txt").read_text().split())


def listed_heldout() -> frozenset[str]:
    """The 650 pairs ``STYLE/HEX`` that training may never see."""
    return frozenset((_HERE / "emoji_heldout.txt").read_text().split())


VAL_PAIRS = 150
"""Held-out pairs that choices are made on; the others are for the report."""


def val_of(keys: Collection[str], count: int) -> frozenset[str]:
    """The ``count`` keys whose SHA-256, after ``evaluate val``, is smallest: they are *val*."""
    return frozenset(
        sorted(keys, key=lambda key: hashlib.sha256(f"evaluate val {key}".encode()).digest())[:count]
    )


@cache
def listed_validation() -> frozenset[str]:
    """The held-out pairs ``STYLE/HEX`` in the part *val*."""
    return val_of(listed_heldout(), VAL_PAIRS)


def subject_hash(subject: str) -> int:
    """The number that decides about the subject: the SHA-256 of ``wue`` and its code points."""
    return int.from_bytes(hashlib.sha256(f"wue{subject}".encode()).digest(), "big")


def split_of(style: str, subject: str) -> str:
    """``train`` or ``heldout``: half of the subjects lose one of their five styles."""
    number = subject_hash(subject)
    lost = STYLES[number // 1000 % len(STYLES)] if number % 1000 < 500 else None
    return "heldout" if style == lost else "train"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A line of ``index.jsonl``: one picture and what is known about it."""

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
            raise DataError(f"style {self.style!r} must be one of {', '.join(STYLES)}; build the set anew")
        if not re.fullmatch(HEX, self.hex) or self.id != f"{self.style}/{self.hex}":
            raise DataError(f"id {self.id!r} must be STYLE/HEX of its line; build the set anew")
        if not self.names or not all(self.names):
            raise DataError(f"names of {self.id} must hold a name; build the set anew")
        if self.split != split_of(self.style, self.hex):
            raise DataError(
                f"split {self.split!r} of {self.id} must be {split_of(self.style, self.hex)!r}, as the rule "
                "for held-out pairs says; build the set anew"
            )


def read_index(root: Path) -> list[Record]:
    """The records of a built folder. Raises ``DataError`` naming the line that cannot be used."""
    path = root / "index.jsonl"
    try:
        lines = read_file(path, _MAX_INDEX).decode().splitlines()
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error.__class__.__name__}); "
            f"make the data set with `wuerstchen data emoji {root}`"
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
                f"{path} line {number} is not a record of the index ({error}); build the set anew"
            ) from error
    if not records:
        raise DataError(f"{path} is empty; make the data set with `wuerstchen data emoji {root}`")
    return records


def write_index(root: Path, records: Iterable[Record]) -> None:
    """Write ``index.jsonl``, one record a line."""
    lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records]
    write_whole(root / "index.jsonl", "".join(lines).encode())


def write_attribution(root: Path) -> None:
    """Write ``ATTRIBUTION.txt``: whose work the pictures are, and under which licences."""
    write_whole(root / "ATTRIBUTION.txt", (_HERE / "emoji_attribution.txt").read_bytes())


def read_rgba(path: Path) -> UInt8[np.ndarray, "256 256 4"]:
    """The picture as straight (not premultiplied) RGBA. Raises ``DataError`` naming the file."""
    try:
        with Image.open(path, formats=["WEBP"]) as image:
            if image.size != (RESOLUTION, RESOLUTION):
                raise DataError(
                    f"{path} is {image.width}×{image.height} but must be {RESOLUTION}×{RESOLUTION}; "
                    "delete it and build the set again"
                )
            return np.array(image.convert("RGBA"))
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as a WebP picture ({error.__class__.__name__}); "
            "delete it and build the set again"
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
            f"{path} cannot be written ({error.strerror}); make room or choose another folder"
        ) from error


# --- Pictures for training ---

_SCALES = (0.6, 1.0)  # side of the picture over the side of the canvas
_TOUCHES_BORDER = {"twemoji": 0.85}  # the other styles have a margin of their own
_PLAIN_SCALE = 0.8
_P_WHITE, _P_RECOLOUR = 1 / 3, 1 / 2
HUE_SHIFTS = (21, 236)  # of 256, the last excluded: at least 30 degrees either way

_MIN_DISTANCE = 35.0  # in L*a*b*: a pixel nearer to the background than that is lost in it
_MAX_LOST = 0.3  # share of the subject that may be lost
_MIN_LIGHTNESS = 40.0  # of a background behind a black glyph: about a contrast of 3 to 1

_BACKGROUND_NAMES = tuple(COLOURS)
_BACKGROUND_LAB = to_lab(np.array(list(COLOURS.values()), dtype=np.uint8))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a picture's frame lies on the canvas, in pixels."""

    side: int
    left: int
    top: int


def compose(
    rgba: UInt8[np.ndarray, "h h 4"], placement: Placement, background: tuple[int, int, int], size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """The straight RGBA picture, resized and laid on a canvas of ``size`` × ``size`` in one colour.

    Colour is multiplied by alpha before the resize, so that what lies under transparent pixels does not
    come up as a fringe (Porter and Duff 1984).
    """
    return _lay(_resize(rgba, placement.side), placement, background, size)


def visible_backgrounds(rgba: UInt8[np.ndarray, "h w 4"], style: str) -> tuple[str, ...]:
    """The background colours before which the subject can be told apart; at least one."""
    return _visible(_coarse(rgba), style)


def _coarse(rgba: np.ndarray) -> np.ndarray:
    """Every fourth pixel either way: enough to tell colours by."""
    return rgba[::4, ::4]


def _visible(coarse: np.ndarray, style: str) -> tuple[str, ...]:
    if style == MONO_STYLE:
        allowed = _BACKGROUND_LAB[:, 0] >= _MIN_LIGHTNESS
    else:
        opaque = coarse[coarse[..., 3] > 128][:, :3]
        # np.linalg.norm takes four times as long over an axis of three; these are its bits.
        squares = np.square(to_lab(opaque).T[:, None] - _BACKGROUND_LAB.T[..., None])
        distance = np.sqrt(squares[0] + squares[1] + squares[2])
        lost = np.count_nonzero(distance < _MIN_DISTANCE, axis=1) / max(len(opaque), 1)
        allowed = lost <= max(_MAX_LOST, lost.min())
    return tuple(name for name, ok in zip(_BACKGROUND_NAMES, allowed, strict=True) if ok)


def _resize(rgba: np.ndarray, side: int) -> np.ndarray:
    premultiplied = Image.fromarray(rgba).convert("RGBa")
    return np.asarray(premultiplied.resize((side, side), Image.Resampling.BICUBIC))


def _lay(
    premultiplied: np.ndarray, placement: Placement, background: tuple[int, int, int], size: int
) -> np.ndarray:
    canvas = np.empty((size, size, 3), dtype=np.uint8)
    canvas[:] = background
    rows = slice(placement.top, placement.top + placement.side)
    columns = slice(placement.left, placement.left + placement.side)
    behind = np.array(background, dtype=np.uint16) * (255 - premultiplied[..., 3:].astype(np.uint16))
    # Bicubic weights overshoot, so colour may exceed alpha a little.
    canvas[rows, columns] = np.minimum(premultiplied[..., :3] + (behind + 127) // 255, 255)
    return canvas


def plain_placement(style: str, size: int) -> Placement:
    """The middle of a canvas of ``size`` × ``size``, at the scale that all styles look alike large in."""
    side = round(size * _PLAIN_SCALE * _TOUCHES_BORDER.get(style, 1))
    return Placement(side=side, left=(size - side) // 2, top=(size - side) // 2)


def shift_hue(rgba: UInt8[np.ndarray, "h w 4"], shift: int) -> UInt8[np.ndarray, "h w 4"]:
    """The picture with its hue turned by ``shift`` of 256 parts of the circle, its alpha as it was."""
    hsv = np.array(Image.fromarray(rgba[..., :3]).convert("HSV"))
    hsv[..., 0] += np.uint8(shift)  # hue counts to 256 and wraps, as the type does
    rgb = np.asarray(Image.frombytes("HSV", hsv.shape[1::-1], hsv.tobytes()).convert("RGB"))
    return np.concatenate([rgb, rgba[..., 3:]], axis=2)


@dataclass(frozen=True, kw_only=True)
class _View:
    """How a picture is shown."""

    scale: float
    across: float
    down: float
    centred: bool
    shift: int  # of the hue, 0 for none
    background: str
    coarse: np.ndarray  # what `_coarse` leaves of the picture in the colours that are shown


class EmojiSource:
    """The pictures of a built folder (or of `sample_root`) as a ``Source``.

    ``split`` is ``train``, ``heldout``, or ``validation``. The last is the part *val* of the held-out pairs,
    empty in a set without them; whether its files are there is seen when they are read. The share ``centred``
    of the pictures is placed as ``plain`` places them, the others at random. With ``cache`` every decoded
    picture stays in memory: 256 KiB each, 1.6 GB for the whole set.
    """

    def __init__(
        self, root: Path, split: str = "train", *, cache: bool = False, centred: float = 0.0
    ) -> None:
        if split not in ("train", "heldout", "validation"):
            raise DataError(f"split {split!r} must be train, heldout or validation; choose one")
        self.root = Path(root)
        self.split = split
        self.centred = centred
        self._pictures: dict[int, np.ndarray] | None = {} if cache else None
        self.records = tuple(record for record in read_index(self.root) if self._is_in(record))
        if split == "validation":
            return
        if not self.records:
            raise DataError(f"{self.root} holds no pictures of the split {split}; build the whole set")
        for record in self.records:
            if not self._path(record).is_file():
                raise DataError(
                    f"{self._path(record)} is missing; run `wuerstchen data emoji {self.root}` again"
                )

    def _is_in(self, record: Record) -> bool:
        """Whether a record is one of this split."""
        if self.split == "validation":
            return record.split == "heldout" and record.id in listed_validation()
        return record.split == self.split

    def __len__(self) -> int:
        return len(self.records)

    def name(self, item: int) -> str:
        """The picture's file, relative to the folder."""
        return f"{self.records[item].id}.webp"

    def rgba(self, item: int) -> UInt8[np.ndarray, "256 256 4"]:
        """The picture itself, straight RGBA. Raises ``DataError`` naming a file that is damaged."""
        if self._pictures is None:
            return read_rgba(self._path(self.records[item]))
        if item not in self._pictures:
            self._pictures[item] = read_rgba(self._path(self.records[item]))
        return self._pictures[item]

    def image(self, item: int, rng: np.random.Generator, size: int | Size) -> UInt8[np.ndarray, "s s 3"]:
        """The picture at a random place and scale, half of the time recoloured, on a named colour."""
        rgba = self.rgba(item)
        return self._composed(item, rgba, self._view(item, rgba, rng), size)

    def example(self, item: int, rng: np.random.Generator, size: int | Size) -> Example:
        """`image` with a caption composed for what it shows."""
        rgba = self.rgba(item)
        view = self._view(item, rgba, rng)
        return Example(image=self._composed(item, rgba, view, size), caption=self._caption(item, view, rng))

    def captions(self, item: int, rngs: Iterable[np.random.Generator]) -> list[str]:
        """The captions of `example` with each of the generators, at a fraction of the time."""
        rgba = self.rgba(item)
        return [self._caption(item, self._view(item, rgba, rng), rng) for rng in rngs]

    def plain(self, item: int, size: int) -> Example:
        """The subject in its own colours, in the middle of white, with the shortest full caption."""
        record = self.records[item]
        image = compose(self.rgba(item), plain_placement(record.style, size), COLOURS["white"], size)
        return Example(image=image, caption=plain_caption(record.style, record.names[0]))

    def fingerprint(self) -> str:
        """A hash of the split's records and of the bytes of their files."""
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
        # Everything is drawn in every case, so that the caption's draws begin at the same place.
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
            raise UserError(f"pictures of {size[0]}x{size[1]} of emoji: they are composed as squares alone")
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
