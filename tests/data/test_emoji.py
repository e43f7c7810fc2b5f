import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wuerstchen.data import emoji, emoji_build
from wuerstchen.data.captions import MONO_STYLE
from wuerstchen.data.colours import COLOURS
from wuerstchen.data.emoji import (
    STYLES,
    EmojiSource,
    Placement,
    Record,
    compose,
    listed_heldout,
    listed_subjects,
    read_index,
    sample_root,
    split_of,
    visible_backgrounds,
    write_index,
)
from wuerstchen.data.emoji_build import read_members
from wuerstchen.data.plan import generator
from wuerstchen.errors import DataError, UserError


def disc(colour: tuple[int, int, int], under: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """A soft-edged disc; ``under`` is the hidden colour of its transparent pixels."""
    y, x = np.mgrid[:256, :256] - 127.5
    alpha = np.clip((110 - np.hypot(x, y)) / 8, 0, 1)
    image = np.empty((256, 256, 4), dtype=np.uint8)
    image[..., :3] = np.where(alpha[..., None] > 0, colour, under)
    image[..., 3] = np.round(alpha * 255)
    return image


def record(style: str, subject: str, **changes: object) -> Record:
    fields = {
        "id": f"{style}/{subject}",
        "style": style,
        "hex": subject,
        "names": ("fox",),
        "tags": ("animal",),
        "group": "animals-nature",
        "subgroup": "animal-mammal",
        "colours": ("orange",),
        "license": "MIT",
        "split": split_of(style, subject),
    }
    return Record(**{**fields, **changes})


def make_set(root: Path, subjects: tuple[str, ...], colour: tuple[int, int, int] = (230, 130, 40)) -> Path:
    records = [record(style, subject) for subject in subjects for style in STYLES]
    for one in records:
        buffer = io.BytesIO()
        shade = (0, 0, 0) if one.style == MONO_STYLE else colour
        Image.fromarray(disc(shade)).save(buffer, "WEBP", lossless=True, method=0)
        (root / one.style).mkdir(parents=True, exist_ok=True)
        (root / f"{one.id}.webp").write_bytes(buffer.getvalue())
    write_index(root, records)
    return root


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("emoji"), listed_subjects()[:12])


# --- The split ---


def test_split_rule_gives_the_listed_pairs() -> None:
    subjects = listed_subjects()
    assert len(subjects) == len(set(subjects)) == 1337
    heldout = set()
    for subject in subjects:  # a second implementation of the rule
        number = int(hashlib.sha256(("wue" + subject).encode()).hexdigest(), 16)
        if number % 1000 < 500:
            lost = ["fluent-3d", "fluent-flat", "fluent-mono", "noto", "twemoji"][(number // 1000) % 5]
            heldout.add(f"{lost}/{subject}")
    assert heldout == listed_heldout()
    assert len(heldout) == 650
    assert {f"{s}/{x}" for x in subjects for s in STYLES if split_of(s, x) == "heldout"} == heldout


def test_nothing_held_out_is_in_train(built: Path) -> None:
    train, heldout = EmojiSource(built), EmojiSource(built, split="heldout")
    hidden = {record.id for record in heldout.records}
    assert hidden  # otherwise the test is vacuous
    assert hidden == {r.id for r in read_index(built)} & listed_heldout()
    shown = {train.name(item).removesuffix(".webp") for item in range(len(train))}
    assert not shown & listed_heldout()
    assert len(shown) + len(hidden) == 12 * 5


def test_an_index_that_calls_a_heldout_pair_train_is_refused(built: Path, tmp_path: Path) -> None:
    lines = (built / "index.jsonl").read_text().replace('"heldout"', '"train"')
    (tmp_path / "index.jsonl").write_text(lines)
    with pytest.raises(DataError, match=r"line \d+: split of \S+ must be 'heldout' .*, got 'train'"):
        EmojiSource(tmp_path)


def test_the_sample_is_whole_and_holds_nothing_heldout() -> None:
    train = EmojiSource(sample_root())
    assert len(train) == 100
    assert len({r.hex for r in train.records}) == 20
    subjects = {r.hex for r in read_index(sample_root())}
    assert not any(pair.split("/")[1] in subjects for pair in listed_heldout())
    assert not any(r.id in listed_heldout() for r in train.records)
    size = sum(file.stat().st_size for file in sample_root().rglob("*") if file.is_file())
    assert size <= 1_000_000
    for item in range(len(train)):
        assert train.rgba(item)[..., 3].max() == 255
    assert (sample_root() / "ATTRIBUTION.txt").read_text() == (
        Path(emoji.__file__).parent / "emoji_attribution.txt"
    ).read_text()


def test_the_sample_is_chosen_by_hash() -> None:
    lost = {pair.split("/")[1] for pair in listed_heldout()}
    whole = sorted(set(listed_subjects()) - lost, key=emoji.subject_hash)
    assert {r.hex for r in read_index(sample_root())} == set(whole[:20])


# --- The source ---


@pytest.mark.parametrize("size", [64, 100])
def test_examples_are_a_function_of_item_and_rng(built: Path, size: int) -> None:
    plain, cached = EmojiSource(built), EmojiSource(built, cache=True)
    for item in range(0, len(plain), 3):
        first = plain.example(item, generator(1, item, "image"), size)
        again = plain.example(item, generator(1, item, "image"), size)
        kept = cached.example(item, generator(1, item, "image"), size)
        alone = cached.image(item, generator(1, item, "image"), size)
        assert first.image.shape == (size, size, 3)
        assert first.image.dtype == np.uint8
        assert first.caption == again.caption == kept.caption
        for other in (again.image, kept.image, alone):
            np.testing.assert_array_equal(first.image, other)
    other = plain.example(0, generator(2, 0, "image"), size)
    assert (other.image != plain.example(0, generator(1, 0, "image"), size).image).any()


def test_background_is_the_colour_that_the_caption_says() -> None:
    source = EmojiSource(sample_root())
    told = 0
    for index in range(300):
        example = source.example(index % len(source), generator(3, index, "image"), 48)
        corners = {tuple(example.image[y, x].tolist()) for y in (0, -1) for x in (0, -1)}
        names = [name for name, value in COLOURS.items() if value in corners]
        assert names, "the subject covers all four corners"
        if "background" in example.caption:
            told += 1
            assert any(f"{name} background" in example.caption for name in names)
    assert told > 100


def test_mono_is_never_on_a_dark_background() -> None:
    source = EmojiSource(sample_root(), cache=True)
    glyphs = [item for item, one in enumerate(source.records) if one.style == MONO_STYLE]
    seen = set()
    for index in range(300):
        image = source.image(glyphs[index % len(glyphs)], generator(4, index, "image"), 32)
        pixels = image.reshape(-1, 3)
        background = pixels[pixels.astype(int).sum(axis=1).argmax()]  # the glyph is black
        seen.add(tuple(background.tolist()))
        linear = np.where(background > 10, ((background / 255 + 0.055) / 1.055) ** 2.4, 0)
        luminance = linear @ (0.2126, 0.7152, 0.0722)
        assert (luminance + 0.05) / 0.05 >= 3  # WCAG 2.1, 1.4.11: contrast of graphics
    assert seen <= set(COLOURS.values())
    assert len(seen) > 6
    assert {"black", "brown"}.isdisjoint(visible_backgrounds(disc((0, 0, 0)), MONO_STYLE))


@pytest.mark.parametrize("name", sorted(COLOURS))
def test_a_subject_is_not_put_on_its_own_colour(name: str) -> None:
    visible = visible_backgrounds(disc(COLOURS[name]), "noto")
    assert name not in visible
    assert len(visible) >= 8


def test_white_is_a_third_of_the_backgrounds_and_half_are_recoloured(built: Path) -> None:
    source = EmojiSource(built, cache=True)
    coloured = [item for item, one in enumerate(source.records) if one.style == "noto"]
    white = kept = 0
    for index in range(300):
        example = source.example(coloured[index % len(coloured)], generator(5, index, "image"), 32)
        border = np.concatenate([example.image[0], example.image[-1]])
        values, counts = np.unique(border, axis=0, return_counts=True)
        white += tuple(values[counts.argmax()]) == COLOURS["white"]
        kept += (np.abs(example.image.astype(int) - (230, 130, 40)).max(axis=2) < 3).any()
    assert white / 300 == pytest.approx(1 / 3, abs=0.09)
    assert kept / 300 == pytest.approx(1 / 2, abs=0.09)


def test_a_recoloured_subject_is_named_by_its_new_colour(built: Path) -> None:
    source = EmojiSource(built, cache=True)
    item = next(i for i, one in enumerate(source.records) if one.style == "noto")
    found = set()
    for index in range(150):
        example = source.example(item, generator(6, index, "image"), 32)
        for name in ("green", "blue", "purple", "pink", "red", "yellow"):
            if f"{name} fox" in example.caption:
                found.add(name)
                assert "orange fox" not in example.caption
    assert len(found) >= 4


def test_subject_lies_inside_at_a_fair_scale(built: Path) -> None:
    source = EmojiSource(built, cache=True)
    shares = {style: [] for style in STYLES}
    for index in range(400):
        item = index % len(source)
        image = source.image(item, generator(7, index, "image"), 64).astype(int)
        subject = np.abs(image - image[0, 0]).max(axis=2) > 40
        columns = np.flatnonzero(subject.any(axis=0))
        shares[source.records[item].style].append((columns[-1] - columns[0] + 1) / 64 / (220 / 256))
    for style, values in shares.items():
        low, high = (0.51, 0.85) if style == "twemoji" else (0.6, 1.0)
        assert low - 0.06 <= min(values) <= low + 0.08
        assert high - 0.08 <= max(values) <= high + 0.03


def test_plain_is_centred_on_white() -> None:
    source = EmojiSource(sample_root())
    for item in range(0, len(source), 7):
        example = source.plain(item, 80)
        assert (example.image[:6] == 255).all()
        assert (example.image[-6:] == 255).all()
        assert (example.image[:, :6] == 255).all()
        assert example.caption.startswith("a ")
        assert "background" not in example.caption


# --- Compositing ---


@pytest.mark.parametrize("side", [37, 64, 100, 256, 300])
def test_white_on_white_stays_white(side: int) -> None:
    image = compose(
        disc((255, 255, 255), under=(0, 0, 0)), Placement(side=side, left=0, top=0), (255,) * 3, 300
    )
    assert (image == 255).all()


def test_what_lies_under_transparent_pixels_is_never_seen() -> None:
    place = Placement(side=61, left=2, top=1)
    black = compose(disc((200, 60, 20), under=(0, 0, 0)), place, COLOURS["pink"], 64)
    green = compose(disc((200, 60, 20), under=(0, 255, 0)), place, COLOURS["pink"], 64)
    np.testing.assert_array_equal(black, green)


def test_compose_agrees_with_pillow_where_nothing_is_resized() -> None:
    subject = disc((20, 90, 200))
    canvas = Image.new("RGBA", (300, 300), (*COLOURS["yellow"], 255))
    canvas.alpha_composite(Image.fromarray(subject), (10, 30))
    expected = np.asarray(canvas.convert("RGB")).astype(int)
    image = compose(subject, Placement(side=256, left=10, top=30), COLOURS["yellow"], 300)
    assert np.abs(image - expected).max() <= 2


# --- Damage ---


def test_a_damaged_image_is_named(built: Path, tmp_path: Path) -> None:
    make_set(tmp_path, listed_subjects()[:1])
    source = EmojiSource(tmp_path)
    path = tmp_path / source.name(0)
    whole = path.read_bytes()
    for damaged in (b"", b"not an image", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{path.name} cannot be read"):
            source.example(0, generator(0, 0, "image"), 32)
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 32)).save(buffer, "WEBP")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="must have 256×256 pixels, got 64×32"):
        source.rgba(0)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} is missing"):
        EmojiSource(tmp_path)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "null", "{}", '{"id": 3}'],
)
def test_a_damaged_index_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        EmojiSource(tmp_path)
    write_index(tmp_path, [record("noto", listed_subjects()[0])])
    with (tmp_path / "index.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"index\.jsonl line 2 "):
        EmojiSource(tmp_path)


def test_an_id_may_not_leave_the_folder() -> None:
    with pytest.raises(DataError, match="must be STYLE/HEX"):
        record("noto", "../1f600")
    with pytest.raises(DataError, match="must be one of"):
        record("../noto", "1f600")


def test_an_unknown_split_is_refused(built: Path) -> None:
    with pytest.raises(DataError, match="must be train, heldout or validation"):
        EmojiSource(built, split="test")


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    make_set(tmp_path, listed_subjects()[:2])
    before = EmojiSource(tmp_path).fingerprint()
    assert EmojiSource(tmp_path).fingerprint() == before
    path = tmp_path / EmojiSource(tmp_path).name(1)
    path.write_bytes(path.read_bytes() + b"\0")
    replaced = EmojiSource(tmp_path).fingerprint()
    write_index(tmp_path, read_index(tmp_path)[1:])
    removed = EmojiSource(tmp_path).fingerprint()
    assert len({before, replaced, removed}) == 3


# --- Building ---


def tarball(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


def test_hostile_members_are_never_read_nor_written(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    evil = {
        "../evil.webp": b"x",
        "/package/assets/1f600.webp": b"x",
        "package/assets/../../evil.webp": b"x",
        "package/assets/1f600.webp/../../../evil": b"x",
        "package/assets/1f601.webp": b"good",
    }
    archive = tarball(inside / "art.tgz", evil)
    wanted = re.compile(rf"package/assets/{emoji.HEX}\.webp")
    assert read_members(archive, wanted) == {"package/assets/1f601.webp": b"good"}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["art.tgz"]
    linked = tarball(inside / "linked.tgz", {}, {"package/assets/1f600.webp": "/etc/hostname"})
    with pytest.raises(DataError, match="not a regular file"):
        read_members(linked, wanted)
    (inside / "cut.tgz").write_bytes(archive.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cut\.tgz is damaged"):
        read_members(inside / "cut.tgz", wanted)


def test_npm_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_build, "_renderer", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm is not on the PATH.*Install Node\.js"):
        emoji_build.build(tmp_path / "out")


def test_npm_failing_is_told_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho first >&2\necho 'npm error network is down' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(emoji_build, "_renderer", lambda: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError, match=r"could not download @lobehub\S+ \(npm error network is down\)"):
        emoji_build.build(tmp_path / "out")


def test_resvg_missing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r'pip install "wuerstchen\[train\]"'):
        emoji_build.build(tmp_path / "out")


FOX = listed_subjects()[0]


def fake_packages(folder: Path) -> dict[str, Path]:
    """Packages with one subject, one sign and one flag, in the layout of the real packages."""
    webp = io.BytesIO()
    Image.fromarray(disc((200, 60, 20))).save(webp, "WEBP", lossless=True, method=0)
    icons = {"icons": {"fox": {"body": '<rect width="32" height="16" fill="currentColor"/>', "height": 16}}}
    icon_files = {"icons.json": json.dumps({**icons, "width": 32}), "chars.json": json.dumps({FOX: "fox"})}
    code = f"{FOX.upper()}-FE0F"
    entries = [
        {"label": "Sign", "hexcode": "1F521", "group": 8, "subgroup": 1, "order": 2},
        {"label": "Flag", "hexcode": "1F3C1", "group": 9, "subgroup": 2, "order": 3},
        {"label": "letter", "hexcode": "1F1E6"},
        {"label": "Ox", "hexcode": code, "group": 3, "subgroup": 0, "order": 1, "tags": ["animal"]},
    ]
    groups = {
        "groups": {"3": "animals-nature", "8": "symbols", "9": "flags"},
        "subgroups": {"0": "animal-mammal", "1": "alphanum", "2": "flag"},
    }
    names = {"en/data.json": json.dumps(entries), "meta/groups.json": json.dumps(groups)}
    for table in emoji_build._SHORTCODES:
        names[f"en/shortcodes/{table}.json"] = json.dumps({code: ["bo", "big_ox"]})
    contents = {
        package: icon_files for style, package in emoji_build._PACKAGES.items() if style != "fluent-3d"
    }
    contents[emoji_build._NAMES_PACKAGE] = names
    archives = {
        package: tarball(
            folder / f"{number}.tgz", {f"package/{name}": text.encode() for name, text in files.items()}
        )
        for number, (package, files) in enumerate(contents.items())
    }
    archives[emoji_build._PACKAGES["fluent-3d"]] = tarball(
        folder / "art.tgz", {f"package/assets/{FOX}-fe0f.webp": webp.getvalue()}
    )
    return archives


def test_build_of_one_subject_and_its_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    archives = fake_packages(tmp_path)
    monkeypatch.setattr(emoji_build.shutil, "which", lambda _: "npm")
    monkeypatch.setattr(emoji_build, "_fetch", lambda _npm, package, _folder: archives[package])
    out = tmp_path / "out"
    with pytest.raises(DataError, match="contain 1 subjects instead of 1337"):
        emoji_build.build(out)
    assert not out.exists()

    monkeypatch.setattr(emoji_build, "listed_subjects", lambda: (FOX,))
    own = frozenset(pair for pair in listed_heldout() if pair.endswith(f"/{FOX}"))
    monkeypatch.setattr(emoji_build, "listed_heldout", lambda: own)
    records = emoji_build.build(out)
    assert [r.id for r in records] == [f"{style}/{FOX}" for style in STYLES]
    assert records == read_index(out)
    assert {r.names for r in records} == {("ox", "big ox")}
    assert (out / "ATTRIBUTION.txt").is_file()
    alpha = emoji.read_rgba(out / "noto" / f"{FOX}.webp")[..., 3]
    assert alpha[64:192].min() > 250  # a drawing twice as wide as high is centred
    assert alpha[:60].max() == alpha[196:].max() == 0

    whole, damaged = out / "noto" / f"{FOX}.webp", out / "twemoji" / f"{FOX}.webp"
    before, stamp = damaged.read_bytes(), whole.stat().st_mtime_ns
    damaged.write_bytes(before[:40])
    assert emoji_build.build(out) == records
    assert damaged.read_bytes() == before
    assert whole.stat().st_mtime_ns == stamp
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_the_true_build(tmp_path: Path) -> None:
    """Downloads 30 MB from npm and renders 6,685 images."""
    if emoji_build.shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    probe = subprocess.run(
        ["npm", "view", emoji_build._NAMES_PACKAGE, "version"], capture_output=True, check=False
    )
    if probe.returncode != 0:
        pytest.skip("npm's registry cannot be reached")
    records = emoji_build.build(tmp_path)
    assert len(records) == 6685
    assert {r.id for r in records if r.split == "heldout"} == listed_heldout()
    sample = {r.id: r for r in read_index(sample_root())}
    assert {r.id: r for r in records if r.id in sample} == sample
