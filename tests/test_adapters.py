"""The adapters of a loaded model: adding, replacing and removing them."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import wuerstchen
from wuerstchen import adapters
from wuerstchen.adapters import ModelAdapters
from wuerstchen.checkpoints.adapter_metadata import AdapterMetadata, weights_hash
from wuerstchen.checkpoints.adapter_write import write_adapter
from wuerstchen.checkpoints.adapters import Adapter, LayerTensors, wanted_files
from wuerstchen.errors import CheckpointError, UserError, UserNotice
from wuerstchen.lora import chosen_loras, load_lora, lora_names, unload_lora
from wuerstchen.models.cascade import Cascade

METADATA_OF_OTHERS = AdapterMetadata(title="a longer header" * 50)


@pytest.fixture(scope="module")
def loaded() -> Cascade:
    return wuerstchen.load(device="cpu").cascade


@pytest.fixture
def cascade(loaded) -> Iterator[Cascade]:
    yield loaded
    unload_lora(loaded.prior)
    unload_lora(loaded.text_encoder)
    loaded.text_encoder.remove_words()


def adapter(cascade: Cascade, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    width = cascade.prior.config.c
    layers = {
        name: LayerTensors(
            torch.randn(2, width, generator=generator), torch.randn(width, 2, generator=generator), 2.0
        )
        for name, layer in cascade.prior.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith("to_q")
    }
    words = {"sks": torch.randn(1, cascade.text_encoder.width, generator=generator)}
    return Adapter(prior=layers, tokens=words)


@pytest.fixture
def files(loaded, tmp_path) -> list[Path]:
    return [write_adapter(tmp_path / f"{i}.safetensors", adapter(loaded, i)) for i in range(3)]


def output(cascade: Cascade, prompt: str = "a sks") -> torch.Tensor:
    prior = cascade.prior
    with torch.no_grad():
        text = cascade.text_encoder.encode([prompt])
        x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        return prior(x, torch.tensor([0.5]), prior.context(text.states, text.mask))


def test_one_set_of_adapters_replaces_another(cascade, files):
    used = ModelAdapters(cascade)
    plain = output(cascade)
    assert not used.use({})
    found = []
    for wanted in ({files[0]: 1.0}, {files[1]: 1.0}, {files[0]: 0.5}, {files[0]: 0.7}):
        assert used.use(wanted)
        assert cascade.text_encoder.words == ["sks"]  # both files have the word, each its own vector
        found.append(output(cascade))
        assert not used.use(wanted)
        assert torch.equal(output(cascade), found[-1])
    assert all(not torch.equal(found[i], found[j]) for i in range(3) for j in range(i))
    assert used.use({files[0]: 1.0})
    assert torch.equal(output(cascade), found[0])
    with pytest.raises(CheckpointError, match="'sks' is already a word"):  # each has its own
        used.use({files[0]: 1.0, files[1]: 0.5})
    assert not used.use({})  # the failure has left none
    assert torch.equal(output(cascade), plain)
    assert cascade.text_encoder.words == []


def test_a_change_of_strengths_alone_loads_nothing_again(cascade, files, tmp_path, monkeypatch):
    other = replace(adapter(cascade, 7), tokens={})
    second = write_adapter(tmp_path / "other.safetensors", other)
    used = ModelAdapters(cascade)
    used.use({files[0]: 1.0, second: 0.25})
    expected = output(cascade)
    used.use({second: 2.0, files[0]: 0.5})
    monkeypatch.setattr(adapters, "load_lora", None)
    assert used.use({second: 0.25, files[0]: 1.0})
    assert torch.equal(output(cascade), expected)
    monkeypatch.undo()
    with pytest.raises(UserError, match="scale must be a finite number, got inf"):
        used.use({second: float("inf"), files[0]: 1.0})


def test_use_equals_load(cascade, files):
    used = ModelAdapters(cascade)
    used.use({files[2]: 0.7})
    expected = output(cascade)
    used.unload()
    used.load(files[2], 0.7)
    assert torch.equal(output(cascade), expected)
    assert used.use({files[2]: 0.7})  # what ``load`` added does not count
    assert torch.equal(output(cascade), expected)


def test_a_name_on_the_hub_is_downloaded(cascade, files, tmp_path, monkeypatch):
    asked = []
    (tmp_path / "hub").mkdir()
    files[0].rename(tmp_path / "hub" / "pytorch_lora_weights.safetensors")
    monkeypatch.setattr(adapters, "local_folder", lambda *a, **k: asked.append((a, k)) or tmp_path / "hub")
    used = ModelAdapters(cascade)
    used.load("someone/my-dog", 1.0)
    assert asked == [(("someone/my-dog",), {"only": wanted_files()})]
    assert len(lora_names(cascade.prior)) == 1
    for nowhere in ("a/b.safetensors", "no file"):
        with pytest.raises(CheckpointError, match=r"does not exist\. Download the adapter first"):
            used.load(nowhere)
    assert len(asked) == 1


def test_a_failed_change_leaves_no_adapter(cascade, files, tmp_path):
    used = ModelAdapters(cascade)
    plain = output(cascade)
    wrong, other = adapter(cascade, 0), adapter(cascade, 5)
    used.use({files[0]: 1.0})
    wrong.prior["blocks.99.attention.to_q"] = next(iter(wrong.prior.values()))
    path = write_adapter(tmp_path / "wrong.safetensors", wrong)
    with pytest.raises(CheckpointError, match=r"is incompatible with this model"):
        used.use({path: 1.0})
    assert torch.equal(output(cascade), plain)
    with pytest.raises(UserError, match="scale must be a finite number"):
        used.use({files[0]: float("inf")})
    assert used.use({files[0]: 1.0})
    twice = write_adapter(tmp_path / "twice.safetensors", other)
    with pytest.raises(CheckpointError, match="'sks' is already a word"):
        used.load(twice)
    assert len(lora_names(cascade.prior)) == 1
    twice.unlink()
    with pytest.raises(CheckpointError, match="does not exist any more"):
        used.use({twice: 1.0})


def test_an_adapter_that_fails_leaves_the_others_as_they_were(cascade):
    """A word of a wrong width is found after the layers were added."""
    used = ModelAdapters(cascade)
    first, second, third = (replace(adapter(cascade, seed), tokens={}) for seed in (1, 2, 3))
    used.load(first, 0.5)
    used.load(second, 0.7)
    before, chosen = output(cascade), chosen_loras(cascade.prior)
    assert chosen == ({"adapter_0": 0.5, "adapter_1": 0.7}, True)
    with pytest.raises(CheckpointError, match="the vectors of the word 'sks'"):
        used.load(replace(third, tokens={"sks": torch.zeros(1, 7)}))
    assert chosen_loras(cascade.prior) == chosen
    assert torch.equal(output(cascade), before)


def test_files_are_read_once_and_again_after_a_change(cascade, files, monkeypatch):
    reads = []
    read = adapters.read_adapter
    monkeypatch.setattr(adapters, "read_adapter", lambda path: reads.append(path.stem) or read(path))
    monkeypatch.setattr(adapters, "MAX_CACHED", 2)
    used = ModelAdapters(cascade)
    for number in (0, 1, 0, 1, 2, 1, 0):  # 2 drops 0, the least recently used
        used.use({files[number]: 1.0})
    assert reads == ["0", "1", "2", "0"]
    before = output(cascade)
    used.use({})
    write_adapter(files[0], adapter(cascade, 9))
    os.utime(files[0], ns=(1, 1))
    used.use({files[0]: 1.0})
    assert not torch.equal(output(cascade), before)
    monkeypatch.setattr(adapters, "MAX_CACHED_BYTES", 1)
    reads.clear()
    for number in (1, 0, 1):  # the last one is kept, so the first is still there
        used.use({files[number]: 1.0})
    assert reads == ["0", "1"]


def test_files_that_are_replaced_while_they_are_used_are_read_again(cascade, tmp_path):
    """Also within a folder, whose own state does not change. The tensors of a file that was read are no parts
    of it: one that became shorter would end the process."""
    weights = [adapter(cascade, seed) for seed in (1, 2)]
    folder = tmp_path / "theirs"
    file = write_adapter(folder / "pytorch_lora_weights.safetensors", weights[0])
    other = write_adapter(tmp_path / "other.safetensors", weights[0], METADATA_OF_OTHERS)
    used = ModelAdapters(cascade)
    used.use({folder: 1.0})
    expected = output(cascade)
    for content in (other.read_bytes(), write_adapter(tmp_path / "new.safetensors", weights[1]).read_bytes()):
        with open(file, "r+b") as opened:  # in place
            opened.write(content)
            opened.truncate()
        os.utime(file, ns=(len(content), len(content)))
        assert used.use({folder: 1.0})
        found = output(cascade)
        assert not used.use({folder: 1.0})
        assert torch.equal(found, expected) == (content == other.read_bytes())
    file.write_bytes(b"")
    used._cache[folder][1].prior["blocks.2.attention.to_q"].a.sum()
    with pytest.raises(CheckpointError):
        used.use({folder: 1.0})


def test_an_adapter_of_another_model_gives_a_notice(cascade, files):
    prior, encoder = cascade.prior, cascade.text_encoder
    mine = replace(adapter(cascade, 1), metadata=AdapterMetadata(base_hash=weights_hash(prior)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lora(prior, mine, adapter_name="a", text_encoder=encoder)
    encoder.remove_words()
    other = replace(mine, metadata=AdapterMetadata(base_model="their/model", base_hash="00"))
    with pytest.warns(UserNotice, match=r"trained on a model with other weights \(their/model\)"):
        load_lora(prior, other, adapter_name="b", text_encoder=encoder)
    encoder.remove_words()
    with pytest.warns(UserNotice, match=r"new words \(sks\), which are ignored"):
        load_lora(prior, mine, adapter_name="c", text_encoder=encoder.model)
    wide = replace(mine, tokens={"sks": torch.ones(1, 5)})
    with pytest.raises(CheckpointError, match=r"the adapter: the vectors of the word 'sks'"):
        load_lora(prior, wide, adapter_name="d", text_encoder=encoder)
    assert lora_names(prior) == ["a", "b", "c"]
