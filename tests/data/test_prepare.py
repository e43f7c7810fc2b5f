"""Prepared sets: their contents do not depend on kills or on the number of processes."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from wuerstchen.cli import main
from wuerstchen.data import prepare as module
from wuerstchen.data import prepare_shards
from wuerstchen.data.buckets import bucket_of, bucket_sizes, crop_boxes
from wuerstchen.data.filters import Filters
from wuerstchen.data.plan import BucketPlan
from wuerstchen.data.prepare import prepare
from wuerstchen.data.prepare_finish import summary
from wuerstchen.data.prepare_job import Execution, Rank
from wuerstchen.data.prepare_networks import Networks, read_networks
from wuerstchen.data.prepare_plan import PrepareConfig
from wuerstchen.data.prepared import PreparedSet, bytes_per_image, quantize_states
from wuerstchen.data.readers import FolderReader
from wuerstchen.data.tables import ParquetReader
from wuerstchen.errors import DataError, RunFolderError, UserError
from wuerstchen.images import open_image, resize_crop, to_tensor
from wuerstchen.models.compressor import compressor_input
from wuerstchen.pipeline import BUNDLED

SIZES = [(300, 200), (200, 300), (128, 128), (900, 150), (150, 900), (260, 256)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that tests start, whose sets are compared bit for bit with those made here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def networks() -> Networks:
    return read_networks(BUNDLED)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def write_photos(folder: Path) -> Path:
    """Eight images. Two have the same caption, and one has two captions."""
    folder.mkdir()
    lines = []
    for number in range(8):
        width, height = SIZES[number % len(SIZES)]
        noise = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / f"{number}.png")
        text = "a thing" if number in (1, 4) else f"image {number} of a thing"
        texts = [text, "another caption"] if number == 2 else text
        lines.append(
            {"file_name": f"{number}.png", "text": texts, "pwatermark": 0.1 * number, "punsafe": 0.0}
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


CONFIG = PrepareConfig(
    max_ratio=4.0, crop="random", crops=2, text_states="int8", batch_size=2, shard_size=3, seed=5
)


def make(photos: Path, out: Path, networks: Networks, config: PrepareConfig = CONFIG, **execution):
    return prepare(FolderReader(photos), out, networks, config, Execution(**execution), source="photos")


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def made_once(tmp_path_factory, networks) -> Path:
    """Finished sets that tests read, compare with, or copy and damage.

    ``whole`` is made by ``CONFIG``; ``states`` has text states in fp16; ``bare`` has none, and one shard.
    """
    folder = tmp_path_factory.mktemp("made")
    photos = write_photos(folder / "photos")
    make(photos, folder / "whole", networks)
    make(photos, folder / "states", networks, dataclasses.replace(CONFIG, text_states="fp16"))
    make(photos, folder / "bare", networks, dataclasses.replace(CONFIG, text_states="none", shard_size=100))
    return folder


@pytest.fixture
def whole(made_once) -> Path:
    return made_once / "whole"


def test_what_is_stored(photos, whole, networks):
    description = json.loads((whole / "prepared.json").read_text())
    prepared = PreparedSet(whole, verify=True)
    assert len(prepared) == 8
    assert prepared.buckets == bucket_sizes(256, 4.0)
    seen = set()
    for index in range(8):
        name = f"{index}.png"
        image = open_image(photos / name)
        assert prepared.name(index) == name
        size = prepared.buckets[bucket_of(image.size, prepared.buckets)]
        assert prepared.size(index) == size
        seen.add(size)
        for crop, box in enumerate(prepared.boxes(index)):
            pixels = to_tensor(image.resize(size, Image.Resampling.LANCZOS, box=tuple(map(float, box))))
            with torch.no_grad():
                expected = networks.compressor(compressor_input(pixels[None]))[0].numpy()
            found = prepared.semantic_latents(index, crop)
            assert found.dtype == np.float16
            assert found.shape == (16, size[1] * 3 // 128, size[0] * 3 // 128)
            assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
        captions = prepared.captions(index)
        for choice, caption in enumerate(captions):
            encoded = networks.text_encoder.encode([caption])
            tokens = networks.text_encoder.tokens(caption)
            assert prepared.tokens(index, choice).tolist() == tokens
            # The bundled model masks padding, so only the states of tokens are stored.
            states = prepared.states(index, choice)
            expected = encoded.states[0, : len(tokens)].numpy()
            assert states.shape == expected.shape
            scale = np.abs(expected).max(axis=1, keepdims=True) / 127
            assert (np.abs(states - expected) <= 0.51 * scale + 1e-4).all()
    assert seen == set(bucket_sizes(256, 4.0))
    assert prepared.captions(1) == prepared.captions(4) == ["a thing"]
    assert prepared.captions(2) == ["image 2 of a thing", "another caption"]
    assert description["texts"]["rows"] == 8  # of nine
    assert not (whole / "work").exists()
    assert description["buckets"] == [[128, 512, 1], [256, 256, 6], [512, 128, 1]]
    prepared.check_model(networks.compressor, networks.text_encoder)
    ids = BucketPlan(prepared.bucket_ids, 2, 0).ids(0)
    assert len({prepared.size(int(i)) for i in ids}) == 1


def test_centred_crops_are_those_of_reading_the_images(photos, tmp_path, networks):
    config = dataclasses.replace(CONFIG, crop="centre", crops=1, max_ratio=1.0, text_states="none")
    make(photos, tmp_path / "out", networks, config)
    prepared = PreparedSet(tmp_path / "out")
    for index in (0, 1, 5):
        pixels = to_tensor(resize_crop(open_image(photos / f"{index}.png"), 256, 256))
        with torch.no_grad():
            expected = networks.compressor(compressor_input(pixels[None]))[0].numpy()
        assert np.abs(prepared.semantic_latents(index) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("kept", ["fp16", "int8"])
def test_all_positions(photos, tmp_path, networks, kept):
    config = dataclasses.replace(CONFIG, text_states=kept, text_positions="all")
    make(photos, tmp_path / "out", networks, config)
    prepared = PreparedSet(tmp_path / "out")
    encoded = networks.text_encoder.encode(prepared.captions(0)[:1]).states[0].numpy()
    states = prepared.states(0)
    assert states.shape == encoded.shape
    scale = np.abs(encoded).max(axis=1, keepdims=True)
    assert (np.abs(states - encoded) <= scale * (0.51 / 127 if kept == "int8" else 1e-3)).all()


def test_all_views_of_an_image_are_in_one_split():
    names = [f"{image}.webp#view={view}" for image in range(200) for view in range(3)]
    prepared = PreparedSet.__new__(PreparedSet)
    column = SimpleNamespace(to_pylist=lambda: names)
    prepared._tables = {"images": SimpleNamespace(data=SimpleNamespace(column=lambda name: column))}
    train, held_out = (prepared.rows(split).tolist() for split in ("train", "heldout"))
    assert sorted([*train, *held_out]) == list(range(600))
    images = {row // 3 for row in held_out}
    assert 0 < len(images) < 20
    assert held_out == [3 * image + view for image in sorted(images) for view in range(3)]


def test_latents_are_float32_whatever_text_states_are(photos, tmp_path, networks):
    """In bf16 they have a bias, which training would pick up."""
    sets = []
    for precision in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, precision=precision, text_states="fp16")
        make(photos, tmp_path / precision, networks, config)
        sets.append(PreparedSet(tmp_path / precision))
        assert sets[-1].latents_precision == "float32"
    exact, near = sets
    for index in range(len(exact)):
        assert np.array_equal(exact.semantic_latents(index), near.semantic_latents(index))
    assert not np.array_equal(exact.states(0), near.states(0))
    del near.description["settings"]["maps_precision"]  # as in sets of earlier versions
    assert near.latents_precision == "bfloat16"


def test_without_states(photos, tmp_path, networks):
    make(photos, tmp_path / "out", networks, dataclasses.replace(CONFIG, text_states="none"))
    prepared = PreparedSet(tmp_path / "out")
    tokens = [prepared.tokens(index) for index in range(3)]
    states = networks.text_encoder.encode_tokens(tokens)
    expected = networks.text_encoder.encode([prepared.captions(index)[0] for index in range(3)])
    assert torch.equal(states.states, expected.states)
    assert torch.equal(states.mask, expected.mask)
    with pytest.raises(UserError, match=r"has no text states\. Encode its tokens"):
        prepared.states(0)


def test_long_captions_are_cut_and_counted(photos, tmp_path, networks):
    line = {"file_name": "0.png", "text": "word " * 900}
    for path in photos.glob("[1-7].png"):
        path.unlink()
    (photos / "metadata.jsonl").write_text(json.dumps(line))
    description = make(photos, tmp_path / "out", networks)
    assert description["cut_texts"] == 1
    assert len(PreparedSet(tmp_path / "out").tokens(0)) == networks.text_encoder.text_positions
    assert "1 texts were truncated" in "\n".join(summary(description))


def test_quantised_states():
    states = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32) * [[1], [1e-3], [1e4], [0], [1]]
    values, scales = quantize_states(states.astype(np.float32))
    assert (np.abs(values * scales[:, None] - states) <= 0.5001 * scales[:, None]).all()
    assert np.abs(values).max() == 127


def test_sizes_of_a_million_images():
    """At 1024 pixels, with latents of 16 × 24 × 24 and CLIP bigG's states: 25, 125 and 60 GB at most."""
    million, latents = 1_000_000, 16 * 24 * 24
    assert bytes_per_image(latent_values=latents, tokens=77.0) * million <= 25e9
    full = bytes_per_image(latent_values=latents, tokens=77.0, positions=77.0, width=1280, states="int8")
    assert 100e9 <= full * million <= 125e9
    real = bytes_per_image(latent_values=latents, tokens=30.0, positions=30.0, width=1280, states="int8")
    assert real * million <= 60e9
    in_half = bytes_per_image(latent_values=latents, tokens=77.0, positions=77.0, width=1280, states="fp16")
    assert in_half * million > 200e9  # the reason for int8


def test_the_arithmetic_is_what_the_files_take(photos, tmp_path, networks):
    config = dataclasses.replace(CONFIG, text_states="int8", text_positions="all", shard_size=100)
    description = make(photos, tmp_path / "out", networks, config)
    encoder = networks.text_encoder
    # All buckets have 6 × 6 or 3 × 12 positions, and there are eight texts for eight images.
    expected = bytes_per_image(
        latent_values=16 * 36,
        crops=2,
        tokens=7.0,
        positions=float(encoder.text_positions),
        width=encoder.width,
        states="int8",
    )
    sizes = description["bytes_per_image"]
    stored = sum((tmp_path / "out" / p).stat().st_size for p in contents(tmp_path / "out") if "arrow" in p)
    assert sizes["with_states"] * 8 == stored
    kept = encoder.text_positions * (encoder.width + 4)
    assert sizes["with_states"] - sizes["without_states"] == pytest.approx(kept)
    # The rest is the header and footer of a file with few rows.
    assert expected < sizes["with_states"] < expected + 1000


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_kill_before_any_rename_changes_nothing(photos, tmp_path, networks, monkeypatch):
    config = dataclasses.replace(CONFIG, shard_size=4, crops=1, size=128)
    make(photos, tmp_path / "whole", networks, config)
    replace = os.replace
    left = 0

    def dying(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    for allowed in range(100):
        out = tmp_path / str(allowed)
        left = allowed
        try:
            make(photos, out, networks, config)
            break
        except Killed:
            with pytest.raises(DataError, match="it is not finished"):
                PreparedSet(out)
        left = 100
        make(photos, out, networks, config)
        assert contents(out) == contents(tmp_path / "whole")
    # The plan, two files for each of four shards, and the three files at the end.
    assert allowed == 1 + 8 + 3


def test_what_is_done_is_not_done_again(photos, whole, tmp_path, networks, monkeypatch):
    write = prepare_shards.write_json

    def full(path, content):
        if path.name == "images-00002.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(prepare_shards, "write_json", full)
    with pytest.raises(RunFolderError, match=r"written \(No space left on device\)\. Free some space"):
        make(photos, tmp_path / "out", networks)
    monkeypatch.setattr(prepare_shards, "write_json", write)
    asked, ours = [], FolderReader.read

    def read(self, name, place):
        asked.append(name)
        return ours(self, name, place)

    monkeypatch.setattr(FolderReader, "read", read)
    make(photos, tmp_path / "out", networks)
    assert asked == ["6.png", "7.png"]
    assert contents(tmp_path / "out") == contents(whole)


def command(photos: Path, out: Path) -> list[str]:
    options = (
        "--max-ratio 4 --crop random --crops 2 --text-states int8 --batch-size 2 --shard-size 3 --seed 5"
    )
    start = [sys.executable, "-W", "error", "-m", "wuerstchen", "data", "prepare", str(photos), str(out)]
    return [*start, *options.split(), "--device", "cpu"]


def start(photos: Path, out: Path, rank: int = 0, world_size: int = 1) -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(photos, out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_and_kill_9_change_nothing(photos, whole, tmp_path, networks):
    """The second of two is killed and started again, while the first waits for it."""
    description = json.loads((whole / "prepared.json").read_text())
    out = tmp_path / "out"
    first, second = (start(photos, out, rank, 2) for rank in (0, 1))
    deadline = time.monotonic() + 100
    while not (out / "work" / "images-00001.json").exists() and time.monotonic() < deadline:
        assert second.poll() is None, second.communicate()
        time.sleep(0.01)
    os.kill(second.pid, signal.SIGKILL)
    assert second.communicate()[0] == ""
    execution = Execution(rank=Rank(1, 2))
    again = prepare(FolderReader(photos), out, networks, CONFIG, execution, source=str(photos))
    assert again is None
    said = first.communicate(timeout=200)
    assert first.returncode == 0, said
    assert said[0].splitlines()[0] == "8 of 8 captioned images, 8 texts"
    # Equal except for the name of the source on the command line.
    found = json.loads((out / "prepared.json").read_text())
    assert found == {**description, "source": str(photos)}
    theirs, ours = contents(out), contents(whole)
    del theirs["prepared.json"], ours["prepared.json"]
    assert theirs == ours


@pytest.mark.slow
def test_ten_kills_at_random_moments(photos, whole, tmp_path):
    out, rng = tmp_path / "out", np.random.default_rng(0)
    for _ in range(10):
        process = start(photos, out)
        time.sleep(float(rng.uniform(2, 9)))
        process.kill()
        process.communicate()
    process = start(photos, out)
    said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    theirs, ours = contents(out), contents(whole)
    del theirs["prepared.json"], ours["prepared.json"]
    assert theirs == ours


def test_ranks_one_after_the_other(photos, whole, tmp_path, networks, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.5)
    out = tmp_path / "out"
    # Rank 0 makes the plan and its own shards, and finds that nobody made the other shards.
    with pytest.raises(RunFolderError, match="Process 1 of 2 ended, or never started"):
        make(photos, out, networks, rank=Rank(0, 2))
    assert make(photos, out, networks, rank=Rank(1, 2)) is None
    assert make(photos, out, networks, rank=Rank(0, 2))
    assert contents(out) == contents(whole)
    # A late process finds the set finished, even if it was not yet finished when it first looked.
    assert make(photos, out, networks, rank=Rank(1, 2)) is None
    answers = iter([False])
    monkeypatch.setattr(module.Preparation, "is_finished", lambda self: next(answers, True))
    assert make(photos, out, networks, rank=Rank(1, 2)) is None
    assert list(answers) == []
    monkeypatch.undo()
    monkeypatch.setattr(module, "GRACE", 0.5)
    assert contents(out) == contents(whole)
    with pytest.raises(RunFolderError, match="Process 0 of 2 ended, or never started"):
        make(photos, tmp_path / "empty", networks, rank=Rank(1, 2))


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("-1", "2"), ("0", "0"), ("0", "")])
def test_ranks_that_make_no_sense(monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match="RANK must be a number from 0 to WORLD_SIZE - 1"):
        Rank.from_environment()


def test_a_folder_with_other_settings_or_another_source_is_refused(photos, tmp_path, networks):
    out = tmp_path / "out"
    make(photos, out, networks)
    before = contents(out)
    for change, message in (
        ({"crop": "saliency"}, "started with crop 'random', but now crop is 'saliency'"),
        ({"seed": 6}, "started with seed 5, but now seed is 6"),
        ({"filters": Filters(min_size=10)}, "started with filters"),
        ({"text_states": "fp16"}, "started with text_states 'int8', but now text_states is 'fp16'"),
    ):
        with pytest.raises(RunFolderError, match=message):
            make(photos, out, networks, dataclasses.replace(CONFIG, **change))
    other = dataclasses.replace(networks, settings=dataclasses.replace(networks.settings, view_scale=0.5))
    with pytest.raises(RunFolderError, match="started with"):
        make(photos, out, other)
    assert make(photos, out, networks)["images"]["rows"] == 8  # a finished set is not an error
    Image.new("RGB", (99, 99)).save(photos / "0.png")
    with pytest.raises(RunFolderError, match="started with another source"):
        make(photos, out, networks)
    assert contents(out) == before


def test_a_set_of_a_model_that_sees_images_enlarged_can_be_read(photos, tmp_path, networks):
    """It was prepared completely, and then every reader refused it."""
    settings = dataclasses.replace(networks.settings, view_scale=2.0)
    out = tmp_path / "out"
    config = dataclasses.replace(CONFIG, crops=1, size=128)
    made = make(photos, out, dataclasses.replace(networks, settings=settings), config)
    assert PreparedSet(out).description == made
    assert made["settings"]["view_scale"] == 2.0


def test_an_unfinished_folder_from_before_colour_profiles_were_read_is_refused(
    photos, tmp_path, networks, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.setattr("wuerstchen.data.prepare_shards.ShardMaker.make", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(photos, out, networks)
    plan = json.loads((out / "work" / "plan.json").read_text())
    assert plan.pop("colours") == "sRGB"
    (out / "work" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(RunFolderError, match="started by a version that ignored colour profiles"):
        make(photos, out, networks)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1", b"{}", b"[" * 100_000, None])
def test_a_damaged_plan_is_named(photos, tmp_path, networks, content):
    work = tmp_path / "out" / "work"
    work.mkdir(parents=True)
    os.mkfifo(work / "plan.json") if content is None else (work / "plan.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"plan.json is damaged \(.*\). Remove .*out and start the same"):
        make(photos, tmp_path / "out", networks)


def test_folders_that_are_not_ours(photos, tmp_path, networks):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").touch()
    with pytest.raises(RunFolderError, match=r"already contains other files \(thesis.doc\)"):
        make(photos, tmp_path / "full", networks)
    with pytest.raises(RunFolderError, match="is not a folder"):
        make(photos, photos / "0.png", networks)
    (tmp_path / "half" / "images").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="contains shards but no plan"):
        make(photos, tmp_path / "half", networks)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.doc"]


def test_a_folder_in_use(photos, tmp_path, networks, monkeypatch):
    monkeypatch.setattr(module, "LOCK_WAIT", 0.1)
    (tmp_path / "out" / "work").mkdir(parents=True)
    script = (
        "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
        "print(1, flush=True); time.sleep(99)"
    )
    lock = tmp_path / "out" / "work" / "rank-0.lock"
    holder = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(RunFolderError, match="in use by another process of rank 0"):
            make(photos, tmp_path / "out", networks)
    finally:
        holder.kill()
        holder.communicate()
    make(photos, tmp_path / "out", networks)


@pytest.mark.parametrize("number", [0, 1])
def test_a_folder_without_locks_is_refused_by_every_process(photos, tmp_path, networks, monkeypatch, number):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(RunFolderError, match=r"without working file locks \(Function not implemented\)"):
        make(photos, tmp_path / "out", networks, rank=Rank(number, 2))


def test_damaged_images_are_skipped_counted_and_named(photos, tmp_path, networks):
    (photos / "3.png").write_bytes((photos / "3.png").read_bytes()[:100])
    (photos / "4.png").write_bytes(b"")
    (photos / "5.png").write_bytes(b"#!/bin/sh\n")
    description = make(photos, tmp_path / "out", networks)
    assert description["dropped"] == {"damaged image": 3}
    assert [name for name, _ in description["damaged"]] == ["3.png", "4.png", "5.png"]
    prepared = PreparedSet(tmp_path / "out")
    assert [prepared.name(i) for i in range(len(prepared))] == ["0.png", "1.png", "2.png", "6.png", "7.png"]
    # The damage does not change the crops of other images.
    lines = summary(description)
    assert "  dropped 3: damaged image" in lines
    assert any(re.match(r"  damaged: 3.png \(.*3\.png", line) for line in lines)


def test_crops_do_not_depend_on_what_else_is_kept(photos, whole, tmp_path, networks):
    strict = dataclasses.replace(CONFIG, filters=Filters(max_watermark=0.35, min_size=140))
    description = make(photos, tmp_path / "some", networks, strict)
    assert description["dropped"] == {"watermark score above 0.35": 4, "size below 140": 1}
    some, everything = PreparedSet(tmp_path / "some"), PreparedSet(whole)
    assert [some.name(i) for i in range(len(some))] == ["0.png", "1.png", "3.png"]
    for ours, theirs in ((0, 0), (1, 1), (2, 3)):
        assert np.array_equal(some.boxes(ours), everything.boxes(theirs))
    for item in range(8):  # each image's crops are its own
        image, size = open_image(photos / f"{item}.png"), everything.size(item)
        expected = crop_boxes(image, size, CONFIG.crop, CONFIG.crops, CONFIG.seed, item)
        np.testing.assert_allclose(everything.boxes(item), expected, atol=1e-4)


def test_nothing_left(photos, tmp_path, networks):
    config = dataclasses.replace(CONFIG, filters=Filters(min_aesthetic=5.0, strict=True))
    with pytest.raises(DataError, match=r"No images are left of 8 captioned images \(8 no aesthetic score\)"):
        make(photos, tmp_path / "out", networks, config)
    for path in photos.glob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"No images are left of 8 captioned images \(8 damaged image\)"):
        make(photos, tmp_path / "other", networks)


def test_a_compressor_that_gives_nan_is_noticed(photos, tmp_path, networks, monkeypatch):
    compressed = prepare_shards._BatchCompressor._compressed
    calls = []

    def spoiled(self, images):
        made = compressed(self, images)
        calls.append(1)
        if len(calls) == 1:
            made[0, 3, 1, 1] = np.nan
        return made

    monkeypatch.setattr(prepare_shards._BatchCompressor, "_compressed", spoiled)
    description = make(photos, tmp_path / "out", networks)
    assert description["dropped"] == {"map not finite": 1}
    assert description["damaged"] == [["0.png", "the compressor's semantic latents contain NaN or infinity"]]
    assert len(PreparedSet(tmp_path / "out")) == 7


def test_text_states_that_are_nan_are_noticed(photos, tmp_path, networks, monkeypatch):
    encode = type(networks.text_encoder).encode_tokens

    def spoiled(self, tokens):
        encoded = encode(self, tokens)
        return dataclasses.replace(encoded, states=encoded.states * np.nan)

    monkeypatch.setattr(type(networks.text_encoder), "encode_tokens", spoiled)
    with pytest.raises(DataError, match="The text states of 'image 0 of a thing' contain NaN"):
        make(photos, tmp_path / "out", networks)


@pytest.fixture
def finished(made_once, tmp_path) -> Path:
    return shutil.copytree(made_once / "states", tmp_path / "out")


def overwrite(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def test_nan_in_what_is_stored_is_noticed_and_named(finished):
    prepared = PreparedSet(finished)
    latents, states = prepared.semantic_latents(4, 1), prepared.states(4)
    nan = np.array(np.nan, np.float16).tobytes()
    overwrite(finished / "images" / "00001.arrow", latents.tobytes(), nan + latents.tobytes()[2:])
    stored = states.astype(np.float16).tobytes()
    (path,) = [p for p in (finished / "texts").glob("*.arrow") if stored in p.read_bytes()]
    overwrite(path, stored, stored[:-2] + nan)
    damaged = PreparedSet(finished, verify=False)
    damaged.semantic_latents(4, 0)
    with pytest.raises(DataError, match=r"Image '4.png' of prepared set .* its semantic latents contain NaN"):
        damaged.semantic_latents(4, 1)
    with pytest.raises(DataError, match=r"Image '4.png' of prepared set .* its text states contain NaN"):
        damaged.states(4)
    with pytest.raises(DataError, match="has changed since it was written"):
        PreparedSet(finished, verify=True)


def test_shards_that_changed_at_equal_size_are_noticed(finished):
    """A shard newer than prepared.json, which is written last, is compared with its checksum."""
    shard = finished / "images" / "00001.arrow"
    data, described = shard.read_bytes(), (finished / "prepared.json").stat().st_mtime_ns
    shard.write_bytes(data[:-1500] + bytes([data[-1500] ^ 1]) + data[-1499:])
    with pytest.raises(DataError, match=r"00001.arrow' is damaged: it has changed since it was written"):
        PreparedSet(finished)
    shard.write_bytes(data)
    assert shard.stat().st_mtime_ns > described
    PreparedSet(finished)
    # The set is intact, so it is not read again.
    assert (finished / "prepared.json").stat().st_mtime_ns >= shard.stat().st_mtime_ns


def test_a_changed_shard_that_is_not_verified_ends_no_process(finished):
    """Changes each byte of the structure but keeps the file time: reading works or raises an error."""
    shard = finished / "images" / "00001.arrow"
    data, times = shard.read_bytes(), shard.stat()
    rng = np.random.default_rng(0)
    refused: list[str] = []
    for place in [*range(0, 2000, 31), *rng.integers(0, len(data), 20).tolist()]:
        changed = bytearray(data)
        changed[place] ^= int(rng.integers(1, 256))
        shard.write_bytes(changed)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        try:
            prepared = PreparedSet(finished)
            for index in range(len(prepared)):
                prepared.semantic_latents(index, 1)
                prepared.boxes(index)
                prepared.states(index)
                prepared.tokens(index)
            prepared.rows("train")
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert not any("\n" in message for message in refused)


def test_states_that_the_table_lacks(finished):
    path = finished / "prepared.json"
    description = json.loads(path.read_text())
    for kept in ("int8", "none"):
        description["settings"]["text_states"] = kept
        path.write_text(json.dumps(description))
        with pytest.raises(DataError, match=r"cannot be read \(its columns must be .*, got .*states"):
            PreparedSet(finished)


@pytest.mark.parametrize(
    ("table", "column", "value", "message"),
    [
        ("images", "texts", [99], r"it refers to the texts \[99\], but the set has 8"),
        ("images", "texts", [-1], "it refers to the texts"),
        ("images", "texts", [], "it refers to the texts"),
        ("images", "boxes", [0.0] * 7, "its crops have 7 sides instead of 8"),
        ("texts", "tokens", [65535], "from 65535 to 65535"),
        ("texts", "tokens", [1] * 1000, "its text has 1000 tokens"),
    ],
)
def test_sets_that_lie_are_refused(made_once, tmp_path, table, column, value, message):
    """An attacker who makes the set also writes its checksums."""
    out = shutil.copytree(made_once / "bare", tmp_path / "out")
    path = out / table / "00000.arrow"
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        rows, schema = stream.read_all().to_pylist(), stream.schema
    for row in rows:
        row[column] = value
    with open(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    description = json.loads((out / "prepared.json").read_text())
    (shard,) = description[table]["shards"]
    shard |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (out / "prepared.json").write_text(json.dumps(description))
    prepared = PreparedSet(out, verify=True)
    with pytest.raises(DataError, match=message):
        prepared.boxes(0), prepared.tokens(0)


def test_failed_downloads_are_counted_and_not_named(tmp_path, networks):
    """img2dataset writes a row per failed download, whose names took 77 MiB in the description."""
    file = io.BytesIO()
    Image.new("RGB", (200, 200), "red").save(file, "PNG")
    images = [file.getvalue() if row % 50 == 0 else None for row in range(150)]
    table = pa.table({"jpg": images, "caption": [f"row {row}" for row in range(150)]})
    pq.write_table(table, tmp_path / "a.parquet")
    out = tmp_path / "out"
    config = PrepareConfig(batch_size=2, shard_size=64)
    description = prepare(ParquetReader([tmp_path / "a.parquet"]), out, networks, config)
    assert description["dropped"] == {"not downloaded": 147}
    assert description["damaged"] == []
    assert len(PreparedSet(out)) == 3
    assert "  dropped 147: not downloaded" in summary(description)


def test_damaged_images_are_named_up_to_a_number(photos, tmp_path, networks, monkeypatch):
    monkeypatch.setattr("wuerstchen.data.filters.MAX_NAMED", 2)
    for name in (0, 1, 3, 4, 7):
        (photos / f"{name}.png").write_bytes(b"x")
    description = make(photos, tmp_path / "out", networks)
    assert description["dropped"] == {"damaged image": 5}
    assert [name for name, _ in description["damaged"]] == ["0.png", "1.png"]
    assert description["unnamed"] == 3
    assert "  and 3 more, counted above but not listed" in summary(description)
    assert len(PreparedSet(tmp_path / "out")) == 3


def test_sets_of_versions_that_named_every_damaged_image_open(finished):
    """Hundreds of thousands of names took over 64 MiB, which was then too large to read."""
    path = finished / "prepared.json"
    description = json.loads(path.read_text())
    for key in ("unnamed", "without_score"):
        del description[key]
    for key in ("image_column", "text_column"):
        del description["settings"][key]
    reason = "image 'part-00000.parquet:123456' is wrong because its cell holds no bytes; leave it out"
    description["damaged"] = [["part-00000.parquet:123456", reason * 6]] * 120_000
    path.write_text(json.dumps(description))
    assert path.stat().st_size > 64 << 20
    assert len(PreparedSet(finished)) == 8
    path.write_bytes(b'{"a": [' + b"[]," * 4_000_000 + b"[]]}")
    with pytest.raises(DataError, match="it has too many lists"):
        PreparedSet(finished)


def test_the_columns_are_part_of_the_settings(photos, tmp_path, networks):
    """The same command with another column continued with the first column."""
    images = [(photos / f"{number}.png").read_bytes() for number in range(3)]
    rows = {"image": images, "text": ["short"] * 3, "other": ["long"] * 3}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    out, config = tmp_path / "out", PrepareConfig(text_column="other")
    prepare(ParquetReader([tmp_path / "a.parquet"], text_column="other"), out, networks, config)
    assert PreparedSet(out).captions(2) == ["long"]
    reader = ParquetReader([tmp_path / "a.parquet"])
    with pytest.raises(RunFolderError, match="started with text_column 'other', but now text_column is None"):
        prepare(reader, out, networks, PrepareConfig())
    path = out / "prepared.json"
    description = json.loads(path.read_text())
    for key in ("image_column", "text_column"):  # as earlier versions wrote it
        del description["settings"][key]
    path.write_text(json.dumps(description))
    assert prepare(reader, out, networks, PrepareConfig())["images"]["rows"] == 3


def test_the_folders_are_data_sets_of_the_library(finished):
    images = datasets.load_from_disk(str(finished / "images"))
    texts = datasets.load_from_disk(str(finished / "texts"))
    assert (len(images), len(texts)) == (8, 8)
    assert texts[images[4]["texts"][0]]["text"] == "a thing"
    assert len(images[0]["maps"]) == 2 * 16 * 36


def test_a_set_goes_to_worker_processes(finished):
    prepared = PreparedSet(finished)
    copy = pickle.loads(pickle.dumps(prepared))
    assert np.array_equal(copy.semantic_latents(5, 1), prepared.semantic_latents(5, 1))


def test_what_is_asked_for_and_not_there(finished):
    prepared = PreparedSet(finished)
    with pytest.raises(UserError, match=r"crop must be between 0 and 1, got 2"):
        prepared.semantic_latents(0, 2)
    with pytest.raises(UserError, match=r"choice must be between 0 and 0 for '0.png', got 1"):
        prepared.tokens(0, 1)
    with pytest.raises(IndexError):
        prepared.semantic_latents(8)
    with pytest.raises(IndexError):
        prepared.semantic_latents(-1)


def test_sets_that_cannot_be_read(finished, tmp_path):
    with pytest.raises(DataError, match=r"it has no prepared.json\. Run wuerstchen data prepare"):
        PreparedSet(tmp_path / "nowhere")
    shard = finished / "images" / "00001.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[:-9])
    with pytest.raises(DataError, match=r"00001.arrow' is damaged: it has \d+ bytes instead of"):
        PreparedSet(finished)
    shard.write_bytes(b"\0" * len(data))
    with pytest.raises(DataError, match=r"00001.arrow' is damaged: it has changed since it was written"):
        PreparedSet(finished)
    with pytest.raises(DataError, match=r"00001.arrow' is damaged: it cannot be read"):
        PreparedSet(finished, verify=False)
    shard.unlink()
    with pytest.raises(DataError, match=r"00001.arrow' is damaged: it cannot be read \(No such file"):
        PreparedSet(finished)
    shard.write_bytes(data)
    PreparedSet(finished)
    path = finished / "prepared.json"
    text = path.read_text()
    for change in (
        lambda d: d.update(format=99),
        lambda d: d.pop("settings"),
        lambda d: d["settings"].pop("maps"),
        lambda d: d.update(images=[]),
        lambda d: d["images"]["shards"][0].update(file="../../00000.arrow"),
        lambda d: d["images"].update(shards=[]),
        lambda d: d["images"]["shards"][0].pop("bytes"),
    ):
        description = json.loads(text)
        change(description)
        path.write_text(json.dumps(description))
        with pytest.raises(DataError, match=r"[Pp]repare the set again"):
            PreparedSet(finished)
    for damage in ("", "[]", "{", "null", "[" * 100_000, '{"a": ' * 100_000, "\0", "1" * 5000, "\ud800"):
        path.write_bytes(damage.encode(errors="surrogatepass"))
        message = r"prepared.json does not describe a prepared set \(.*\)\. Prepare the set again\.$"
        with pytest.raises(DataError, match=message):
            PreparedSet(finished)


def places(value, path=()):
    """The paths to all values in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    for key, item in items:
        yield from places(item, (*path, key))


JUNK = (None, True, -1, 10**30, float("inf"), "\0", "x" * 300, [[]], {})


@pytest.mark.parametrize(
    "kinds", [2, pytest.param(len(JUNK) + 1, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_junk_anywhere_in_the_description_is_one_line(finished, networks, kinds):
    """Reading a set in all the ways of training only raises ``DataError``."""
    path = finished / "prepared.json"
    text = path.read_text()
    messages = []
    everything = (*JUNK, KeyError)
    for number, place in enumerate(list(places(json.loads(text)))[1:]):
        for junk in [everything[(number + kind) % len(everything)] for kind in range(kinds)]:
            description = json.loads(text)
            inside = description
            for key in place[:-1]:
                inside = inside[key]
            if junk is KeyError:
                del inside[place[-1]]
            else:
                inside[place[-1]] = junk
            path.write_text(json.dumps(description))
            try:
                prepared = PreparedSet(finished)
                for index in range(len(prepared)):
                    prepared.semantic_latents(index, prepared.crops - 1)
                    prepared.states(index)
                prepared.fingerprint()
                summary(prepared.description)
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > 40 * kinds
    assert all("\n" not in message and len(message) < 700 for message in messages)


def test_a_set_of_another_model_is_refused(finished, networks):
    prepared = PreparedSet(finished)
    changed = read_networks(BUNDLED)
    with torch.no_grad():
        changed.compressor.mapper[0].weight[0, 0] += 1e-3
    with pytest.raises(UserError, match=r"made with another compressor\. Prepare it with this model"):
        prepared.check_model(changed.compressor)


def test_the_command(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (photos / "5.png").write_bytes(b"x")
    arguments = command(photos, tmp_path / "out")
    assert main([*arguments[arguments.index("data") :], "--max-watermark", "0.55"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "5 of 8 captioned images, 6 texts"
    assert "  dropped 2: watermark score above 0.55" in out
    assert any(line.startswith("  damaged: 5.png") for line in out)
    assert re.fullmatch(r"  \d+ bytes per image, \d+ with states", out[-1])
    assert main(["data", "prepare", str(photos), str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "was started with" in capsys.readouterr().err
    assert main(["data", "prepare", "nowhere", "x", "--device", "cpu"]) == 2
    assert "Error: Data 'nowhere' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
