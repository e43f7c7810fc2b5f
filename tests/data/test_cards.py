"""Limits on the YAML in data set cards."""

import os
from types import SimpleNamespace

import datasets
import pytest

from wuerstchen.data.cards import check_card
from wuerstchen.data.open import open_reader
from wuerstchen.data.tables import DatasetReader
from wuerstchen.errors import DataError


def test_much_yaml_is_refused(tmp_path):
    """The library parses 30 KB per second: 3 MB took 40 s."""
    card = "---\n" + "\n".join(f"key_{i}: value" for i in range(30_000)) + "\n---\ntext\n"
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(
        DataError, match=r"README.md' is too large: its YAML may have at most 256 KiB and 100000 values"
    ):
        open_reader(tmp_path, format="hub")
    (tmp_path / "README.md").write_text(" " * (1 << 19) + card)
    with pytest.raises(DataError, match=r"README.md' is too large"):
        check_card(str(tmp_path))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n" + "x" * (1 << 19))  # much text is fine
    check_card(str(tmp_path))
    (tmp_path / "README.md").write_text("x" * (1 << 19))
    check_card(str(tmp_path))
    (tmp_path / ".huggingface.yaml").write_text("a: b\n" * (1 << 17))
    with pytest.raises(DataError, match=r"\.huggingface\.yaml' is too large"):
        check_card(str(tmp_path))


NINE = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    "yaml",
    [NINE, "a: &a [*a, *a]", "[" * 200, "- " * 50_000 + "x", "a: [" + "x," * 110_000 + "x]"],
    ids=["nine times nine", "itself", "deep", "deep blocks", "wide"],
)
def test_yaml_that_stands_for_more_is_refused(tmp_path, yaml):
    (tmp_path / "README.md").write_text(f"---\n{yaml}\n---\n")
    with pytest.raises(DataError, match="100000 values"):
        check_card(str(tmp_path))


@pytest.mark.parametrize(
    "yaml", ["a: &a [1, 2]\nb: *a\nc: [*a, *a]", "a: *gone", "a: [", "\x00", "a: b: c", ""]
)
def test_other_yaml_is_left_to_the_library(tmp_path, yaml):
    (tmp_path / "README.md").write_text(f"---\n{yaml}\n---\n")
    check_card(str(tmp_path))


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "README.md")
    with pytest.raises(DataError, match="is not a regular file"):
        open_reader(tmp_path, format="hub")


def test_a_set_of_the_hub_is_looked_at_too(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    info = SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename="README.md")])
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, **_: str(tmp_path / file))
    loaded = datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": None}], "text": ["a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    assert isinstance(open_reader("owner/name"), DatasetReader)
    (tmp_path / "README.md").write_text("---\n" + "a: b\n" * (1 << 17))
    with pytest.raises(DataError, match="its YAML may have"):
        open_reader("owner/name")


def test_without_a_network_the_cache_is_looked_at(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("it waits long"))
    check_card("owner/name")
    check_card("no//name")
    (tmp_path / "README.md").write_text("---\n" + "a: b\n" * (1 << 17))
    cached = {"README.md": str(tmp_path / "README.md")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file, **_: cached.get(file))
    with pytest.raises(DataError, match="its YAML may have"):
        check_card("owner/name")
