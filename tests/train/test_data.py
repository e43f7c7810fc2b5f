"""What a name of data can be: training, validation and preparing read every kind that data/open.py lists."""

import copy
import dataclasses
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from wuerstchen.data import open as opening
from wuerstchen.data.items import Item
from wuerstchen.data.mixture import MixedSource
from wuerstchen.data.open import KINDS, Kind, open_reader, open_source
from wuerstchen.data.plan import held_out_names
from wuerstchen.data.prepare import prepare
from wuerstchen.data.prepare_networks import Networks
from wuerstchen.data.prepare_plan import PrepareConfig
from wuerstchen.data.prepared import PreparedSet
from wuerstchen.errors import DataError, RunFolderError
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.config import Recipe
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.engine.validation import held_out
from wuerstchen.train.feed.images import Feed, batches
from wuerstchen.train.report.announce import RunMonitor
from wuerstchen.train.run import train
from wuerstchen.train.run_data import open_subset

from ..configurations import with_lite0, with_optimization

COUNT = 9


def image(number: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((150, 130)).save(file, "PNG")
    return file.getvalue()


class StripesReader:
    """All that a new source needs: images that are made here, and captions."""

    def __init__(self, count: int) -> None:
        self.count = count

    def items(self, tally):
        for number in range(self.count):
            yield Item(f"stripes {number}", (f"thing {number}",), {}, (number, 0, 0))

    def read(self, name: str, place: tuple[int, int, int]) -> bytes:
        return image(place[0])

    def fingerprint(self) -> str:
        return f"stripes {self.count}"


STRIPES = Kind(
    name="stripes",
    matches=lambda name: name.text.startswith("stripes:"),
    reader=lambda data: StripesReader(int(data.text.partition(":")[2])),
)


@pytest.fixture
def stripes(monkeypatch):
    monkeypatch.setattr(opening, "KINDS", [STRIPES, *KINDS])


def recipe(data: Path | str, **changes) -> Recipe:
    """Three updates of Stage A."""
    full = tiny()
    stage = with_optimization(full.stage_a, images=6, batch_size=2, warmup=0)
    stage = dataclasses.replace(stage, adversarial_from=2, discriminator_width=8, perceptual="none")
    settings = {"statistics_images": 4, "workers": 1, "checkpoint_seconds": 0.0, "log_every": 1, **changes}
    return dataclasses.replace(full, data=str(data), stages=("a",), stage_a=stage, **settings)


def trained(data: Path | str, run_dir: Path, **changes) -> dict[str, str]:
    """The checksums of the last checkpoint."""
    train(recipe(data, **changes), run_dir, device="cpu", monitor=RunMonitor(rehearse=False))
    path, state = newest(run_dir / "stage_a" / "checkpoints")
    assert state["images"] == 6
    assert hashlib.sha256((path / "networks.safetensors").read_bytes()).hexdigest() in str(state["files"])
    return state["files"]


def events(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(image(number))
        (folder / f"{number}.txt").write_text(f"thing {number}")
    return folder


def write_tars(folder: Path) -> Path:
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(5 * shard, min(5 * shard + 5, COUNT)):
                for suffix, data in (("png", image(number)), ("txt", f"thing {number}".encode())):
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def write_parquet(folder: Path) -> Path:
    folder.mkdir()
    numbers = range(COUNT)
    table = pa.table({"bild": [image(n) for n in numbers], "text": [f"thing {n}" for n in numbers]})
    pq.write_table(table, folder / "0.parquet", row_group_size=4)
    return folder


@pytest.fixture(scope="module")
def of_a_folder(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("folder")
    return trained(write_folder(root / "data"), root / "run")


@pytest.mark.parametrize(
    ("write", "columns"),
    [(write_tars, {}), (write_parquet, {"image_column": "bild"})],
    ids=["tars", "parquet"],
)
def test_stage_a_learns_the_same_from_tars_and_parquet_as_from_a_folder(
    write, columns, of_a_folder, tmp_path
):
    """And when it is resumed, with its images decoded in another process."""
    data, run_dir = write(tmp_path / "data"), tmp_path / "run"
    whole = trained(data, run_dir, **columns)
    assert whole["networks.safetensors"] == of_a_folder["networks.safetensors"]
    path, _ = newest(run_dir / "stage_a" / "checkpoints")
    shutil.rmtree(path)
    shutil.rmtree(run_dir / "model")
    assert trained(data, run_dir, **columns) == whole
    assert [e["images"] for e in events(run_dir) if e["event"] == "start"] == [0, 4]


def test_a_mixture_resumes_with_the_same_images(tmp_path):
    """A folder and tars, in which images have the same names."""
    data = f"{write_folder(tmp_path / 'photos')}=1 + {write_tars(tmp_path / 'tars')}=3"
    whole = trained(data, tmp_path / "whole")
    resumed = trained(data, tmp_path / "run")
    path, _ = newest(tmp_path / "run" / "stage_a" / "checkpoints")
    shutil.rmtree(path)
    shutil.rmtree(tmp_path / "run" / "model")
    assert whole == resumed == trained(data, tmp_path / "run")
    assert [e["images"] for e in events(tmp_path / "run") if e["event"] == "start"] == [0, 4]
    said = next(event for event in events(tmp_path / "whole") if event["event"] == "data")["said"]
    assert [line.strip() for line in said if "of the mixture" in line] == [
        "25 % of the mixture",
        "75 % of the mixture",
    ]


def test_a_mixture_takes_the_place_of_a_damaged_image_from_the_same_data_set(toy_source):
    class Damaged(type(toy_source(3))):
        def image(self, item, rng, size):
            if item < 2:
                raise DataError("it is damaged")
            return super().image(item, rng, size)

    source = MixedSource([Damaged(3), toy_source(50)], ["damaged", "whole"], (1, 1))
    feed = Feed(source, 0, 8, False)
    drawn = [(feed.names([index])[0], feed[index][2]) for index in range(60)]
    skipped = [name for first, entries in drawn for name, _ in entries]
    assert skipped
    assert all(name.startswith("damaged: ") for name in skipped)
    source.parts[0] = toy_source(3)
    every = Feed(source, 0, 8, False, skip=[source.name(item) for item in range(3)])
    with pytest.raises(DataError, match="got the names of all 3"):
        [every[index] for index in range(60)]


def test_a_grown_data_set_of_a_mixture_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("wuerstchen.train.run.TrainingRun.train", lambda self: self.run_dir / "model")
    photos, tars, run_dir = write_folder(tmp_path / "photos"), write_tars(tmp_path / "tars"), tmp_path / "run"
    begin = {"device": "cpu", "monitor": RunMonitor(rehearse=False)}
    train(recipe(f"{photos}=1 + {tars}=1"), run_dir, **begin)
    moved = shutil.copytree(photos, tmp_path / "moved")
    train(recipe(f"{moved}=2 + {tars}=2"), run_dir, **begin)  # other places, the same fractions
    with pytest.raises(RunFolderError, match="have changed"):
        train(recipe(f"{photos}=1 + {tars}=2"), run_dir, **begin)
    (photos / "new.png").write_bytes(image(99))
    (photos / "new.txt").write_text("another thing")
    with pytest.raises(RunFolderError, match=r"photos' had 9 images, and has 10"):
        train(recipe(f"{photos}=1 + {tars}=1"), run_dir, **begin)
    train(recipe(f"{photos}=1 + {tars}=1"), run_dir, accept_changed_data=True, **begin)
    (photos / "new.txt").write_text("a thing again")
    with pytest.raises(RunFolderError, match=r"captions of '.*photos' are others"):
        train(recipe(f"{photos}=1 + {tars}=1"), run_dir, **begin)


def test_a_folder_in_another_one_of_a_mixture_holds_out_the_same_images(tmp_path):
    outer = tmp_path / "outer"
    (outer / "inner").mkdir(parents=True)
    for number in range(240):
        folder = outer / "inner" if number % 2 else outer
        (folder / f"{number}.png").write_bytes(image(number % 3))
        (folder / f"{number}.txt").write_text(f"thing {number}")
    mixture = recipe(f"{outer}=1 + {outer / 'inner'}=1")
    parts = {subset: open_subset(mixture.data, subset, mixture, mixture) for subset in ("train", "heldout")}
    names = {}
    for subset, source in parts.items():
        found = (source.name(item).rpartition("/")[2].rpartition(" ")[2] for item in range(len(source)))
        names[subset] = set(found)
    assert names["heldout"]
    assert not names["train"] & names["heldout"]


def test_saved_sets_are_decoded_in_another_process(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [image(n) for n in range(COUNT)], "text": [f"thing {n}" for n in range(COUNT)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "data"))
    source = open_source(str(tmp_path / "data"))
    assert not isinstance(source, PreparedSet)
    feed = Feed(source, 0, 16, captions=True)
    here, there = (next(batches(feed, 0, 8, 8, workers)) for workers in (0, 1))
    assert torch.equal(here.images, there.images)
    assert here.captions == there.captions
    assert len(set(here.captions)) == 8
    assert not there.skipped


def test_a_new_source_is_one_reader_and_one_row(stripes, small_cascade, tmp_path):
    """Training, validation and preparing read it."""
    run_dir = tmp_path / "run"
    trained("stripes:100", run_dir, workers=0)
    said = next(event for event in events(run_dir) if event["event"] == "data")["said"]
    kept = held_out_names([f"stripes {number}" for number in range(100)])
    assert said[0] == f"stripes:100: {100 - len(kept)} images to train on"
    # Validation.
    found = held_out(open_source("stripes:100", "heldout", verify=False), 16)
    assert found is not None
    assert {f"stripes {caption.split()[1]}" for caption in found.captions} == kept
    # Preparing, which holds out the same images.
    cascade = with_lite0(copy.deepcopy(small_cascade))
    networks = Networks(
        settings=cascade.settings, compressor=cascade.compressor.eval(), text_encoder=cascade.text_encoder
    )
    prepare(open_reader("stripes:100"), tmp_path / "set", networks, PrepareConfig(size=128, max_ratio=1.0))
    prepared = PreparedSet(tmp_path / "set")
    assert {prepared.name(int(row)) for row in prepared.rows("heldout")} == kept


def test_a_run_belongs_to_its_columns_and_its_data(tmp_path, monkeypatch):
    monkeypatch.setattr("wuerstchen.train.run.TrainingRun.train", lambda self: self.run_dir / "model")
    data, run_dir = write_tars(tmp_path / "data"), tmp_path / "run"
    begin = {"device": "cpu", "monitor": RunMonitor(rehearse=False)}
    train(recipe(data), run_dir, **begin)
    with pytest.raises(RunFolderError, match="another recipe: text_column"):
        train(recipe(data, text_column="txt"), run_dir, **begin)
    train(recipe(shutil.copytree(data, tmp_path / "copy")), run_dir, **begin)  # the same data elsewhere
    (data / "1.tar").unlink()
    with pytest.raises(RunFolderError, match="have changed since"):
        train(recipe(data), run_dir, **begin)


def test_runs_of_earlier_versions_have_no_columns_and_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("wuerstchen.train.run.TrainingRun.train", lambda self: self.run_dir / "model")
    data, run_dir = write_folder(tmp_path / "data"), tmp_path / "run"
    begin = {"device": "cpu", "monitor": RunMonitor(rehearse=False)}
    train(recipe(data), run_dir, **begin)
    stored = json.loads((run_dir / "run.json").read_text())
    for name in ("image_column", "text_column"):
        del stored["recipe"][name]
    (run_dir / "run.json").write_text(json.dumps(stored))
    train(recipe(data), run_dir, **begin)


def test_packed_tars_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.tar.gz").touch()
    for name in (tmp_path / "data" / "0.tar.gz", tmp_path / "data"):
        with pytest.raises(DataError, match=r"Decompress .*\(tars to .tar\)"):
            open_source(str(name))
