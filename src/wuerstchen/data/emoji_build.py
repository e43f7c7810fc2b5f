"""Builds the emoji data set from public npm packages: downloads, renders, names and checks the images."""

import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wuerstchen.data.colours import name_colours
from wuerstchen.data.emoji import (
    HEX,
    LICENSES,
    RESOLUTION,
    STYLES,
    Record,
    listed_heldout,
    listed_subjects,
    read_rgba,
    split_of,
    write_attribution,
    write_index,
    write_whole,
)
from wuerstchen.errors import DataError, UserError
from wuerstchen.image_files import check_writable
from wuerstchen.progress_bar import bar

_PACKAGES = {
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent-mono": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
_NAMES_PACKAGE = "emojibase-data@17.0.0"

_DROPPED_GROUPS = frozenset({"component", "flags"})
# Signs and letters instead of things, and images that differ mainly in a sign.
_DROPPED_SUBGROUPS = frozenset(
    {
        "alphanum",
        "keycap",
        "arrow",
        "av-symbol",
        "transport-sign",
        "punctuation",
        "math",
        "currency",
        "gender",
        "religion",
        "zodiac",
        "family",
        "time",
        "other-symbol",
        "warning",
        "person-symbol",
    }
)
# The sources of synonyms, the most widely used first.
_SHORTCODES = ("github", "iamcal", "joypixels", "cldr", "emojibase")

_WEBP = {"format": "WEBP", "quality": 90, "method": 4}
_MAX_MEMBER = 256 << 20


def build(out: Path) -> list[Record]:
    """Builds the data set in ``out``: ``STYLE/HEX.webp``, ``index.jsonl`` and ``ATTRIBUTION.txt``.

    Existing intact images are kept, so an interrupted build can continue. Raises ``UserError`` if npm or
    resvg is missing or fails, and ``DataError`` if the packages do not contain exactly the listed subjects.
    """
    out = Path(out)
    if out.exists():
        check_writable(out)
    render = _renderer()
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            "npm is not on the PATH. It downloads the packages of the emoji. Install Node.js"
            " (https://nodejs.org, or `apt-get install npm`) and try again."
        )
    with tempfile.TemporaryDirectory(prefix="wuerstchen-emoji-") as scratch:
        packages = (*_PACKAGES.values(), _NAMES_PACKAGE)
        archives = {
            package: _fetch(npm, package, Path(scratch) / str(number))
            for number, package in enumerate(bar(packages, desc="downloading", unit="package"))
        }
        art: dict[str, dict[str, Callable[[], bytes]]] = {
            "fluent-3d": _raster(archives[_PACKAGES["fluent-3d"]])
        }
        for style in STYLES[1:]:
            art[style] = _vectors(archives[_PACKAGES[style]], render)
        subjects = _subjects(archives[_NAMES_PACKAGE])

    subjects = {key: value for key, value in subjects.items() if all(key in art[s] for s in STYLES)}
    _check_lists(subjects)
    check_writable(out)
    records = []
    pairs = [(subject, style) for subject in subjects for style in STYLES]
    for subject, style in bar(pairs, desc="rendering", unit="img"):
        rgba = _ensure_image(out / style / f"{subject}.webp", art[style][subject])
        records.append(
            Record(
                id=f"{style}/{subject}",
                style=style,
                hex=subject,
                colours=tuple(name_colours(rgba)),
                license=LICENSES[style],
                split=split_of(style, subject),
                **subjects[subject],
            )
        )
    write_attribution(out)
    write_index(out, records)
    return records


def _renderer() -> Callable[[str], bytes]:
    try:
        import resvg_py
    except ImportError as error:
        raise UserError(
            'resvg-py is not installed. It renders the emoji. Run `pip install "wuerstchen[train]"`.'
        ) from error

    def render(svg: str) -> bytes:
        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
        return _to_webp(Image.open(io.BytesIO(bytes(png))))

    return render


def _to_webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGBA").save(buffer, **_WEBP)
    return buffer.getvalue()


def _fetch(npm: str, package: str, folder: Path) -> Path:
    folder.mkdir()
    result = subprocess.run(
        [npm, "pack", package, "--ignore-scripts"], cwd=folder, capture_output=True, text=True, check=False
    )
    found = list(folder.glob("*.tgz"))
    if result.returncode != 0 or len(found) != 1:
        output = [line for line in result.stderr.splitlines() if line.strip()]
        reason = output[-1].strip() if output else f"exit code {result.returncode}"
        raise UserError(
            f"npm could not download {package} ({reason}). Check the network and npm's registry, and try"
            " again."
        )
    return found[0]


def read_members(archive: Path, wanted: re.Pattern[str]) -> dict[str, bytes]:
    """Reads the members of a tarball with a name that fully matches ``wanted``.

    Nothing is extracted to the disk, so names, links and modes in the archive have no effect. Raises
    ``DataError`` if a wanted member is not a regular file or is too large, or if the archive is damaged.
    """
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if not wanted.fullmatch(member.name):
                    continue
                stream = tar.extractfile(member) if member.isreg() else None
                if stream is None or member.size > _MAX_MEMBER:
                    raise DataError(
                        f"{member.name!r} in {archive.name} is not a regular file of at most"
                        f" {_MAX_MEMBER >> 20} MiB. Download the package again from a registry that you"
                        " trust."
                    )
                members[member.name] = stream.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{archive.name} is damaged ({error}). Download the package again.") from error
    return members


def _read_json(archive: Path, *names: str) -> list[Any]:
    members = read_members(archive, re.compile("|".join(re.escape(f"package/{name}") for name in names)))
    missing = [name for name in names if f"package/{name}" not in members]
    if missing:
        raise DataError(f"{missing[0]} is missing from {archive.name}. Download the package again.")
    try:
        return [json.loads(members[f"package/{name}"]) for name in names]
    except ValueError as error:
        raise DataError(
            f"{archive.name} contains damaged JSON ({error}). Download the package again."
        ) from error


def _plain_hex(code: str) -> str:
    """Code points without the variation selector, which only some packages include."""
    return code.lower().replace("-fe0f", "")


def _raster(archive: Path) -> dict[str, Callable[[], bytes]]:
    files = read_members(archive, re.compile(rf"package/assets/{HEX}\.webp"))
    return {_plain_hex(Path(name).stem): _copier(data) for name, data in files.items()}


def _copier(data: bytes) -> Callable[[], bytes]:
    def copy() -> bytes:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            if image.size == (RESOLUTION, RESOLUTION):
                return data
            return _to_webp(image.convert("RGBa").resize((RESOLUTION, RESOLUTION)).convert("RGBA"))

    return copy


def _vectors(archive: Path, render: Callable[[str], bytes]) -> dict[str, Callable[[], bytes]]:
    icons, codes = _read_json(archive, "icons.json", "chars.json")
    drawn = {_plain_hex(code): name for code, name in codes.items() if name in icons["icons"]}
    return {code: _drawer(icons, icons["icons"][name], render) for code, name in drawn.items()}


def _drawer(icons: dict, icon: dict, render: Callable[[str], bytes]) -> Callable[[], bytes]:
    def draw() -> bytes:
        width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
        # SVG centres drawings that are not square by default.
        return render(
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{RESOLUTION}" height="{RESOLUTION}" viewBox="0 0 {width} {height}">'
            f"{icon['body'].replace('currentColor', '#000')}</svg>"
        )

    return draw


def _subjects(archive: Path) -> dict[str, dict]:
    """The metadata in emojibase of each subject that is a thing and not a sign, in the order of Unicode."""
    paths = [f"en/shortcodes/{name}.json" for name in _SHORTCODES]
    entries, groups, *shortcodes = _read_json(archive, "en/data.json", "meta/groups.json", *paths)
    codes = [
        {_plain_hex(code): [value] if isinstance(value, str) else value for code, value in table.items()}
        for table in shortcodes
    ]
    subjects = {}
    for entry in sorted(entries, key=lambda entry: entry.get("order", 0)):
        if "group" not in entry:
            continue
        group, subgroup = groups["groups"][str(entry["group"])], groups["subgroups"][str(entry["subgroup"])]
        if group in _DROPPED_GROUPS or subgroup in _DROPPED_SUBGROUPS:
            continue
        subject = _plain_hex(entry["hexcode"])
        synonyms = [re.sub("[_-]", " ", code).lower() for table in codes for code in table.get(subject, [])]
        # Shortcodes of one or two characters are not words ("v", "+1"), but a label can be this short ("ox").
        names = [entry["label"].lower(), *(synonym for synonym in synonyms if len(synonym) > 2)]
        subjects[subject] = {
            "names": tuple(dict.fromkeys(names)),
            "tags": tuple(entry.get("tags", [])),
            "group": group,
            "subgroup": subgroup,
        }
    return subjects


def _check_lists(subjects: Iterable[str]) -> None:
    found, listed = tuple(subjects), listed_subjects()
    if found != listed:
        different = sorted(set(found) ^ set(listed)) or ["their order"]
        raise DataError(
            f"The packages contain {len(found)} subjects instead of {len(listed)} (first difference:"
            f" {different[0]}). They must be the pinned versions. Clear npm's cache and try again."
        )
    heldout = {
        f"{style}/{subject}" for subject in found for style in STYLES if split_of(style, subject) == "heldout"
    }
    if heldout != listed_heldout():
        raise DataError(
            f"The rule holds out {len(heldout)} pairs instead of {len(listed_heldout())}. The list in this"
            " package is damaged. Install wuerstchen again."
        )


def _ensure_image(path: Path, make: Callable[[], bytes]) -> np.ndarray:
    if path.is_file():
        try:
            return read_rgba(path)
        except DataError:
            pass  # damaged images are made again
    write_whole(path, make())
    return read_rgba(path)
