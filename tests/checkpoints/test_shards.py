"""Weight files in shards: none is larger than asked for, and all readers read them."""

import json
import os
import shutil
import threading
from fnmatch import fnmatch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wuerstchen.checkpoints import hub, shards
from wuerstchen.checkpoints.layouts import convert, read_model, weight_files
from wuerstchen.checkpoints.native import (
    read_cascade,
    read_network,
    read_parts,
    read_tensors,
    write_parts,
    write_tensors,
)
from wuerstchen.checkpoints.shards import size_in_bytes, split_files
from wuerstchen.checkpoints.text_encoder import copy_text_encoder, read_text_encoder
from wuerstchen.cli import main
from wuerstchen.data.prepare_networks import read_networks
from wuerstchen.errors import CheckpointError, UserError

NETWORKS = ("decoder", "prior", "compressor")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """The networks of the tests are smaller than the smallest limit."""
    monkeypatch.setattr(shards, "LEAST", 1000)


@pytest.fixture
def sharded(model_folder, tmp_path):
    """The small model with three networks in shards of at most 0.7 of their size."""
    folder = shutil.copytree(model_folder, tmp_path / "sharded")
    for name in NETWORKS:
        (folder / "of_one").mkdir()
        (folder / f"{name}.safetensors").rename(folder / "of_one" / f"{name}.safetensors")
        split_files(folder / "of_one", f"{limit_of(model_folder, name) / 1000:.3f}KB")
        for path in (folder / "of_one").iterdir():
            path.rename(folder / path.name)
        (folder / "of_one").rmdir()
    return folder


def limit_of(folder, name):
    return int(0.7 * (folder / f"{name}.safetensors").stat().st_size)


def assert_equal(ours, theirs):
    assert ours.settings == theirs.settings
    ours, theirs = ours.networks(), theirs.networks()
    assert ours.keys() == theirs.keys()
    for part, network in ours.items():
        state = theirs[part].state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items()), part


def test_no_file_is_larger_than_the_limit_and_the_model_stays_the_same(sharded, model_folder, small_cascade):
    for part in NETWORKS:
        files = sorted(path.name for path in sharded.glob(f"{part}*"))
        names = [f"{part}-0000{n}-of-00002.safetensors" for n in (1, 2)]
        assert files == [*names, f"{part}.safetensors.index.json"]
        limit = limit_of(model_folder, part)
        assert all((sharded / name).stat().st_size <= limit for name in names)
    assert_equal(read_cascade(sharded), small_cascade)
    assert (
        read_network(sharded / "prior.safetensors")[1] == read_network(model_folder / "prior.safetensors")[1]
    )
    assert read_networks(sharded).compressor.config == small_cascade.compressor.config
    assert set(weight_files(sharded)) == {path for path in sharded.rglob("*.safetensors") if path.is_file()}


def test_the_index_is_that_of_transformers(sharded):
    index = json.loads((sharded / "decoder.safetensors.index.json").read_text())
    assert index.keys() == {"metadata", "weight_map"}
    total = 0
    for name, file in index["weight_map"].items():
        with safe_open(sharded / file, "pt") as opened:
            total += opened.get_tensor(name).nbytes
    assert index["metadata"]["total_size"] == total


def test_the_hub_downloads_all_shards_and_the_index(sharded):
    patterns, ignored = next(hub._kinds_of_weights(None))
    for path in sharded.iterdir():
        if path.is_file():
            assert any(fnmatch(path.name, pattern) for pattern in [*hub._DESCRIPTIONS, *patterns]), path.name
            assert not any(fnmatch(path.name, pattern) for pattern in ignored), path.name


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_convert_writes_shards_of_small_storage(storage, model_folder, tmp_path):
    """The text encoder is split too."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    convert(model_folder, whole, "native", storage=storage)
    largest = (model_folder / "text_encoder" / "model.safetensors").stat().st_size * 3 // 4000 * 1000
    options = ["--layout", "native", "--storage", storage, "--max-shard-size", f"{largest // 1000}KB"]
    assert main(["convert", str(model_folder), str(parts), *options]) == 0
    assert_equal(read_cascade(parts), read_cascade(whole))
    assert max(path.stat().st_size for path in parts.rglob("*.safetensors")) <= largest
    assert read_parts(parts)[2] == read_parts(model_folder)[2]  # the origin of the weights
    encoder = parts / "text_encoder"
    assert len([*encoder.glob("model-*.safetensors")]) == 2
    copy_text_encoder(encoder, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in encoder.iterdir()}
    state = read_text_encoder(encoder).state_dict()
    ours = read_text_encoder(model_folder / "text_encoder").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.items())


def test_the_diffusers_layout_is_split_too(write_published, tmp_path):
    published = write_published(tmp_path / "published")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    convert(published, whole, "diffusers", storage="float16")
    largest = max(path.stat().st_size for path in whole.rglob("*.safetensors"))
    convert(published, parts, "diffusers", storage="float16", max_shard_size=f"{largest * 0.9 / 1000:.1f}KB")
    assert any(parts.rglob("*-00001-of-*.safetensors"))
    assert_equal(read_model(parts), read_model(whole))


def test_additional_files_of_a_stage_are_not_split(small_cascade, model_folder, tmp_path):
    """Bug: they were split, and their readers found no file."""
    limit = limit_of(model_folder, "vqgan")

    def write_extra(folder):
        save_file({name: torch.ones(limit // 4) for name in "ab"}, folder / "adapter.safetensors")

    folder = tmp_path / "model"
    provenance = {"vqgan": read_network(model_folder / "vqgan.safetensors")[1]}
    networks, size = {"vqgan": small_cascade.vqgan}, f"{limit / 1000:.3f}KB"
    write_parts(
        small_cascade.settings, networks, folder, provenance, write_extra=write_extra, max_shard_size=size
    )
    assert (folder / "vqgan.safetensors.index.json").is_file()
    assert (folder / "adapter.safetensors").is_file()


def test_layouts_that_cannot_be_split_are_refused(model_folder, tmp_path):
    with pytest.raises(UserError, match="not supported by the original layout"):
        convert(model_folder, tmp_path / "out", "original", max_shard_size="1MB")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "size"), [("16MB", 16_000_000), ("16MiB", 2**24), ("0.5 GB", 500_000_000)])
def test_sizes_have_decimal_or_binary_units(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["16", "MB", "-1MB", "1e9MB", "16 M", "0MB", "١MB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UserError, match="max_shard_size must be"):
        size_in_bytes(text)


def test_a_tensor_is_never_cut(tmp_path):
    """Bug: a file is larger than the limit, without an error."""
    save_file({"small": torch.ones(10), "large": torch.ones(30_000)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"largest tensor of a\.safetensors, 'large' with 120,000 bytes"):
        split_files(tmp_path, "100KB")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_damaged_shards_are_refused(sharded):
    first, second, *_ = sorted(sharded.glob("decoder-*.safetensors"))
    tensors, header = read_tensors(second)
    kept = second.read_bytes()
    write_tensors(tensors, second, {**header, "storage": "float16"})
    with pytest.raises(CheckpointError, match="does not belong to decoder-00001"):
        read_cascade(sharded)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="does not belong to decoder-00001"):
        read_cascade(sharded)
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"{second.name} does not exist"):
        read_cascade(sharded)
    second.write_bytes(kept)
    index = sharded / "decoder.safetensors.index.json"
    index.write_text(index.read_text().replace(second.name, "../decoder.safetensors"))
    with pytest.raises(CheckpointError, match="not a weight file in the same folder"):
        read_cascade(sharded)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"decoder\.safetensors does not exist"):
        read_cascade(sharded)


def test_names_that_no_file_can_have_are_refused(sharded, model_folder, tmp_path):
    """Opening a file with such a name raises OSError."""
    index = sharded / "decoder.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": f"{'a' * 300}.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a weight file in the same folder"):
        read_cascade(sharded)
    encoder = shutil.copytree(model_folder / "text_encoder", tmp_path / "encoder")
    (encoder / "model.safetensors").unlink()
    shutil.copy(index, encoder / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="not a weight file in the same folder"):
        copy_text_encoder(encoder, tmp_path / "copy")


def feed(pipe):
    """Lets a reader of the pipe go on, so that a failing test ends."""
    os.write(os.open(pipe, os.O_RDWR | os.O_NONBLOCK), bytes(64))


def test_a_pipe_in_place_of_a_text_encoder_is_refused(model_folder, tmp_path):
    """Opening it would wait forever."""
    encoder = shutil.copytree(model_folder / "text_encoder", tmp_path / "encoder")
    (encoder / "model.safetensors").unlink()
    os.mkfifo(encoder / "model.safetensors")
    end_of_wait = threading.Timer(5, feed, [encoder / "model.safetensors"])
    end_of_wait.start()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        read_text_encoder(encoder)
    end_of_wait.cancel()


def test_an_error_in_an_index_is_reported_once(model_folder, tmp_path):
    encoder = shutil.copytree(model_folder / "text_encoder", tmp_path / "encoder")
    (encoder / "model.safetensors").unlink()
    (encoder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map") as caught:
        read_text_encoder(encoder)
    assert "cannot be read" not in str(caught.value)


def test_float16_refuses_values_that_it_cannot_store(small_cascade, model_folder, tmp_path):
    """Infinite weights would be read without an error."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tensors, header = read_tensors(folder / "prior.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 4)
    tensors[name].view(-1)[0] = 7e4
    write_tensors(tensors, folder / "prior.safetensors", header)
    with pytest.raises(CheckpointError, match=r"has a value of 7e\+04, and float16 stores at most 65504"):
        convert(folder, tmp_path / "out", "native", storage="float16")
