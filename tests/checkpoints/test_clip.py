"""CLIP's tokenizer: only the vocabulary of a folder is used, and its other settings have no effect."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from wuerstchen.checkpoints import clip
from wuerstchen.checkpoints.clip import read_clip_tokenizer
from wuerstchen.errors import CheckpointError

PROMPTS = ["a cat!", "", "Ümläut 12 🦊 don't", "x  y\nz", "<|endoftext|> ! a"]


@pytest.fixture
def folder(clip_tokenizer: CLIPTokenizer, tmp_path: Path) -> Path:
    clip_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def same(ours: CLIPTokenizer, theirs: CLIPTokenizer) -> None:
    for options in ({}, {"padding": "max_length", "truncation": True, "max_length": 9}):
        assert ours(PROMPTS, **options)["input_ids"] == theirs(PROMPTS, **options)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.model_max_length == theirs.model_max_length
    assert len(ours) == len(theirs)


def published(content: dict[str, Any]) -> None:
    """As in the published prior, the padding token is also a word."""
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    ids = {"!": "0", content["bos_token"]: "1", content["eos_token"]: "2"}
    content["pad_token"] = "!"
    content["added_tokens_decoder"] = {number: {"content": name, **token} for name, number in ids.items()}


@pytest.mark.parametrize("pad", [None, published])
@pytest.mark.parametrize("whole", [True, False])
def test_tokens_are_those_of_transformers(folder, whole, pad):
    if pad is not None:
        edit(folder / "tokenizer_config.json", pad)
    if not whole:
        pieces = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(pieces["vocab"]), encoding="utf-8")
        merges = "\n".join(" ".join(pair) for pair in pieces["merges"])
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    ours = read_clip_tokenizer(folder)
    same(ours, CLIPTokenizer.from_pretrained(str(folder)))
    assert ours.name_or_path == str(folder)


def endless_padding(content: dict[str, Any]) -> None:
    # 10⁹ tokens would kill the process. This number makes the test fail.
    fixed = {"strategy": {"Fixed": 50_000}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = {**fixed, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}


def multiple(content: dict[str, Any]) -> None:
    endless_padding(content)
    content["padding"] |= {"strategy": "BatchLongest", "pad_to_multiple_of": 50_000}


def growing(content: dict[str, Any]) -> None:
    """Each step doubles the text."""
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [double] * 16}


def cut(content: dict[str, Any]) -> None:
    cutting = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["truncation"] = cutting


@pytest.mark.parametrize("change", [endless_padding, multiple, growing, cut])
def test_a_tokenizer_pads_cuts_and_grows_nothing_by_itself(folder, change):
    plain = read_clip_tokenizer(folder)
    edit(folder / "tokenizer.json", change)
    ours = read_clip_tokenizer(folder)
    assert ours.backend_tokenizer.padding is None  # a call of the tokenizer sets both
    assert ours.backend_tokenizer.truncation is None
    same(ours, plain)


def long_template(content: dict[str, Any]) -> None:
    many = {"X": {"id": "X", "ids": [1] * 2000, "tokens": ["x"] * 2000}}
    pieces = [{"SpecialToken": {"id": "X", "type_id": 0}}] * 2000
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": many,
    }


def deep(content: dict[str, Any]) -> None:
    nested: object = 1
    for _ in range(500):
        nested = [nested]
    content["model"]["vocab"] = nested


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer.json", long_template, "post_processor has more than 4096 characters"),
        ("tokenizer.json", deep, "is nested more than 100 deep"),
        ("tokenizer.json", lambda c: c.pop("model"), "is not a CLIP tokenizer"),
        (
            "tokenizer_config.json",
            lambda c: c.update(model_max_length=10**400),
            "an integer of 401 digits",
        ),
        (
            "tokenizer_config.json",
            lambda c: c.update(model_max_length="x"),
            "model_max_length must be at least 3, got 'x'",
        ),
    ],
)
def test_invalid_tokenizers_are_refused(folder, file, change, message):
    edit(folder / file, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_clip_tokenizer(folder)
    assert len(str(caught.value)) < 1000


def test_files_of_absurd_size(folder, monkeypatch):
    monkeypatch.setattr(clip, "_MAX_VOCABULARY", 100)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has more than 0 MB"):
        read_clip_tokenizer(folder)
