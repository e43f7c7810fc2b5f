"""Files of other programs: exact reading, errors for damaged or malicious ones, and no code is run."""

import json
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wuerstchen.checkpoints import files, pickles, torch_files
from wuerstchen.checkpoints.files import parse_json, read_json
from wuerstchen.checkpoints.torch_files import read_torch_file
from wuerstchen.checkpoints.weights import StoredTensors, fill, read_tensors_of
from wuerstchen.errors import CheckpointError, shown

STATE = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "bias": torch.tensor([1.0, -2.0], dtype=torch.float16),
    "steps": torch.tensor(7),
}


class Network(nn.Module):
    """A matrix, a vector and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.bias = nn.Parameter(torch.zeros(2))
        self.register_buffer("steps", torch.tensor(0))


def on_meta() -> Network:
    with torch.device("meta"):
        return Network()


def save(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def save_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def rewritten(
    source: Path, target: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED
) -> Path:
    """The archive again, its entries changed or stored in another way."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


class Touches:
    """Creates a file when it is unpickled by plain pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


# Whole files


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model.pt"])
def test_a_file_gives_back_what_was_saved(name: str, tmp_path: Path) -> None:
    assert_same(read_tensors_of(save(STATE, tmp_path / name)), STATE)


def test_the_legacy_format_of_torch(tmp_path: Path) -> None:
    save_legacy(STATE, tmp_path / "model.bin")
    assert_same(read_tensors_of(tmp_path / "model.bin"), STATE)


def test_a_torch_file_may_hold_more_than_tensors(tmp_path: Path) -> None:
    content = {"state_dict": STATE, "iter": 3, "optimizer": {"groups": [{"lr": 1e-4}]}, "none": None}
    torch.save(content, tmp_path / "trainer.pt")
    again = read_torch_file(tmp_path / "trainer.pt")
    assert isinstance(again, dict)
    assert_same(again.pop("state_dict"), STATE)
    content.pop("state_dict")
    assert again == content


def test_shapes_and_metadata_are_there_before_the_values(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = StoredTensors.of([tmp_path / "model.safetensors"])
    assert stored.shapes == {"weight": (2, 3), "bias": (2,), "steps": ()}
    assert stored.metadata == {"format": "pt"}
    assert stored.files == (tmp_path / "model.safetensors",)


def test_floating_tensors_are_read_in_the_given_type_and_others_as_they_are(tmp_path: Path) -> None:
    stored = StoredTensors.of([save(STATE, tmp_path / "model.safetensors")])
    assert_same(stored.read(), STATE)
    assert_same(
        stored.read(torch.float64),
        {"weight": STATE["weight"].double(), "bias": STATE["bias"].double(), "steps": STATE["steps"]},
    )


# Folders and shards


def write_shards(folder: Path, ending: str = ".safetensors", stem: str = "model") -> Path:
    """STATE in two files and their index."""
    shards = {f"{stem}-1{ending}": ["weight"], f"{stem}-2{ending}": ["bias", "steps"]}
    places = {name: shard for shard, names in shards.items() for name in names}
    for shard, names in shards.items():
        save({name: STATE[name] for name in names}, folder / shard)
    index = folder / f"{stem}{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards_are_read_as_one(ending: str, tmp_path: Path) -> None:
    write_shards(tmp_path, ending)
    assert_same(StoredTensors.in_folder(tmp_path, ["model"]).read(), STATE)


def test_the_order_in_which_files_are_looked_for(tmp_path: Path) -> None:
    """safetensors before .bin, the first stem before the second, a whole file before shards."""
    for order, name in enumerate(["b.bin", "a.bin", "b.safetensors"]):
        save({"order": torch.tensor(order)}, tmp_path / name)
        assert int(StoredTensors.in_folder(tmp_path, ["a", "b"]).read()["order"]) == order, name
    write_shards(tmp_path, stem="a")
    assert StoredTensors.in_folder(tmp_path, ["a", "b"]).shapes.keys() == STATE.keys()
    save({"order": torch.tensor(3)}, tmp_path / "a.safetensors")
    assert int(StoredTensors.in_folder(tmp_path, ["a", "b"]).read()["order"]) == 3


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "model.txt").touch()
    with pytest.raises(CheckpointError, match=r"has no weights: there is no model\.safetensors or \.bin"):
        StoredTensors.in_folder(tmp_path, ["model"])


def test_pickles_of_paddle_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "model_state.pdparams").write_bytes(pickle.dumps(Touches(tmp_path / "touched")))
    with pytest.raises(CheckpointError, match=r"which are never opened.*safe_serialization=True"):
        StoredTensors.in_folder(tmp_path, ["diffusion_paddle_model"])
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "place",
    [
        "../outside.safetensors",
        "sub/inside.safetensors",
        "model.pt",
        ".",
        "",
        3,
        None,
        ["m.safetensors"],
        "two\nlines.safetensors",
    ],
)
def test_shards_must_be_next_to_their_index(place: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save(STATE, tmp_path / "outside.safetensors")
    save(STATE, folder / "sub" / "inside.safetensors")
    save(STATE, folder / "model.pt")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": place}}))
    with pytest.raises(CheckpointError, match="is not a weight file in the same folder"):
        StoredTensors.in_folder(folder, ["model"])


def test_an_absolute_shard(tmp_path: Path) -> None:
    outside = save(STATE, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": str(outside)}}))
    rule = f"{shown(str(outside))} is not a weight file in the same folder"
    with pytest.raises(CheckpointError, match=re.escape(rule)):
        StoredTensors.in_folder(folder, ["model"])


def test_a_lost_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors does not exist"):
        StoredTensors.in_folder(tmp_path, ["model"])


def test_a_shard_of_a_very_long_name(tmp_path: Path) -> None:
    places = {"weight_map": {"weight": "x" * 5000 + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(places))
    with pytest.raises(CheckpointError, match="not a weight file"):
        StoredTensors.in_folder(tmp_path, ["model"])


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save(STATE, tmp_path / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="'weight' is also in another shard"):
        StoredTensors.in_folder(tmp_path, ["model"])


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_that_names_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        StoredTensors.in_folder(tmp_path, ["model"])


@pytest.mark.parametrize("content", ["", "{", "\x00", "[" * 100_000, '{"a": ' * 100_000])
def test_json_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_json(tmp_path / "config.json")


def test_json_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    os.truncate(path, 2**31)  # a hole, which takes no space
    with pytest.raises(CheckpointError, match="has more than 8 MB"):
        read_json(path)


def test_json_that_is_not_an_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        read_json(tmp_path / "config.json")


# Names of compiled networks

COMPILED = {
    "_orig_mod.weight": "weight",
    "block._orig_mod.bias": "block.bias",
    "_orig_mod.a._orig_mod.b": "a.b",
}


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_the_prefix_of_compiled_modules_is_left_out(name: str, tmp_path: Path) -> None:
    save({key: torch.tensor(float(i)) for i, key in enumerate(COMPILED)}, tmp_path / name)
    stored = StoredTensors.of([tmp_path / name])
    assert stored.shapes.keys() == set(COMPILED.values())
    for found in (stored.read(), stored.read(torch.float16), read_tensors_of(tmp_path / name)):
        assert {key: float(t) for key, t in found.items()} == {"weight": 0.0, "block.bias": 1.0, "a.b": 2.0}


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_a_network_both_compiled_and_not_is_refused(name: str, tmp_path: Path) -> None:
    save({"weight": torch.ones(1), "_orig_mod.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="with and without the prefix _orig_mod"):
        StoredTensors.of([tmp_path / name])


def test_a_name_that_only_contains_the_prefix_is_kept(tmp_path: Path) -> None:
    save({"my_orig_mod.weight": torch.ones(1)}, tmp_path / "m.safetensors")
    assert StoredTensors.of([tmp_path / "m.safetensors"]).shapes.keys() == {"my_orig_mod.weight"}


# Filling a network


def test_a_network_on_meta_is_filled(tmp_path: Path) -> None:
    network = on_meta()
    stored = StoredTensors.of([save(STATE, tmp_path / "model.safetensors")])
    fill(network, stored, {})
    assert_same(network.state_dict(), {**STATE, "bias": STATE["bias"].float()})


def test_names_in_the_file_may_differ(tmp_path: Path) -> None:
    network = on_meta()
    state = {"old.matrix": STATE["weight"], "bias": STATE["bias"], "steps": STATE["steps"]}
    stored = StoredTensors.of([save(state, tmp_path / "model.bin")])
    fill(network, stored, {"weight": "old.matrix"}, dtype=torch.float16)
    assert torch.equal(network.weight, STATE["weight"].half())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": None}, r"'weight' is missing in the file, but .* expects \(2, 3\)"),
        ({"extra": torch.ones(4)}, r"'extra' is \(4,\) in the file, but .* expects no such"),
        ({"weight": torch.ones(3, 2)}, r"'weight' is \(3, 2\) in the file, but .* expects \(2, 3\)"),
        ({"weight": torch.ones(2, 3, dtype=torch.int64)}, "'weight' must be torch.float32, got torch.int64"),
        ({"steps": torch.tensor(0.5)}, "'steps' must be torch.int64, got torch.float32"),
    ],
)
def test_what_does_not_fit_leaves_the_network_as_it_was(
    change: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    network = on_meta()
    state = {name: tensor for name, tensor in (STATE | change).items() if tensor is not None}
    stored = StoredTensors.of([save(state, tmp_path / "model.safetensors")])
    with pytest.raises(CheckpointError, match=words):
        fill(network, stored, {})
    assert all(tensor.is_meta for tensor in network.state_dict().values())


# Damage and malice


def refused(path: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}.*{words}"):
        read_tensors_of(path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_missing_file_and_a_folder(name: str, tmp_path: Path) -> None:
    refused(tmp_path / name, "does not exist. Check the name")
    (tmp_path / name).mkdir()
    refused(tmp_path / name, "does not exist. Check the name")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file(name: str, share: float, tmp_path: Path) -> None:
    path = save({"weight": torch.ones(50, 50)}, tmp_path / name)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, "")


def test_a_truncated_legacy_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_legacy({"weight": torch.ones(50, 50)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, r"cannot be read .*\. Download it again")


def with_header(path: Path, header: bytes, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(24))
    return path


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{}", 2**63),
        (b"{}", 2**31),
        (b"not json", None),
        (b"[" * 50_000, None),
        (b'{"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 1099511627776]}}', None),
        (b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 24]}}', None),
        (b'{"a": {"dtype": "F32", "shape": [-2, 3], "data_offsets": [0, 24]}}', None),
        (b'{"a": {"dtype": "X9", "shape": [2, 3], "data_offsets": [0, 24]}}', None),
    ],
)
def test_an_absurd_header_of_safetensors(header: bytes, length: int | None, tmp_path: Path) -> None:
    refused(with_header(tmp_path / "model.safetensors", header, length), "cannot be read")


@pytest.mark.parametrize("write", [torch.save, save_legacy, lambda x, p: p.write_bytes(pickle.dumps(x))])
def test_pickled_code_is_refused_and_not_run(write: Callable[..., object], tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    write({**STATE, "extra": Touches(touched)}, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", "contains pickled objects, which are never loaded")
    assert not touched.exists()
    # The same bytes create the file if they are run, so the test can fail.
    os.close(pickle.loads(pickle.dumps(Touches(touched))))
    assert touched.exists()


def test_a_pickle_is_not_read_as_safetensors(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    torch.save({"extra": Touches(touched)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "cannot be read")
    assert not touched.exists()


def test_an_archive_compressed_again(tmp_path: Path) -> None:
    """If it were memory-mapped, its bytes would be misread as values."""
    path = save(STATE, tmp_path / "a.pt")
    packed = rewritten(path, tmp_path / "b.pt", lambda _, data: data, zipfile.ZIP_DEFLATED)
    refused(packed, "was compressed after torch.save wrote it. Use the original file")


def test_a_tensor_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    path = save({"weight": torch.ones(6)}, tmp_path / "a.pt")

    def enlarge(name: str, data: bytes) -> bytes:
        # In the pickle: BININT1 6 becomes BININT 2^30, in the storage's size and in the tensor's.
        return data.replace(b"K\x06", b"J\x00\x00\x00\x40") if name.endswith("data.pkl") else data

    larger = rewritten(path, tmp_path / "b.pt", enlarge)
    assert b"J\x00\x00\x00\x40" in larger.read_bytes()
    refused(larger, "cannot be read")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(100_000, 100_000),
        torch.empty(10**12, device="meta"),
        torch.eye(3).to_sparse(),
    ],
    ids=["expanded", "meta", "sparse"],
)
def test_tensors_without_their_values(tensor: Tensor, tmp_path: Path) -> None:
    refused(save({"weight": tensor}, tmp_path / "model.pt"), "'weight' is not a plain tensor")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3), "contains a Tensor, not a state dict"),
        ([torch.zeros(3)], "contains a list, not a state dict"),
        ({"state_dict": STATE}, "the entry 'state_dict' is not a tensor"),
        ({"epoch": 3}, "the entry 'epoch' is not a tensor"),
        ({3: torch.zeros(3)}, "the entry 3 is not a tensor"),
    ],
)
def test_torch_files_that_are_not_a_state_dict(content: object, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", words)


# Small files that would take long to load


def nested_tuples(levels: int) -> object:
    """2ᵏ elements in k tuples, each with two references to the previous one."""
    inner: object = ()
    for _ in range(levels):
        inner = (inner, inner)
    return inner


def nested_key(levels: int) -> bytes:
    """The pickle of {tuples: 1}. The dictionary itself cannot be made: its key would have to be hashed."""
    tuples = b")" + b"q\x01h\x01\x86" * levels
    return b"\x80\x02}" + tuples + b"K\x01s."


@pytest.mark.parametrize("levels", [8, 40, 5_000])
@pytest.mark.parametrize("legacy", [False, True])
def test_nested_tuples_as_a_key(levels: int, legacy: bool, tmp_path: Path) -> None:
    """Forty levels are 500 bytes that take hours to hash, and to print."""
    data = nested_key(levels)
    if legacy:
        save_legacy(STATE, tmp_path / "a.pt")
        head = (tmp_path / "a.pt").read_bytes()
        with open(tmp_path / "a.pt", "rb") as file:
            for _ in range(3):  # a magic number, a version and the machine; then the object
                pickle.load(file)
            stop = file.tell()
        (tmp_path / "m.pt").write_bytes(head[:stop] + data)
    else:
        path = save(STATE, tmp_path / "a.pt")
        rewritten(path, tmp_path / "m.pt", lambda n, d: data if n.endswith("data.pkl") else d)
    refused(tmp_path / "m.pt", "a key in it has more than 100 elements")


@pytest.mark.parametrize("number", [0, 1, 4])
def test_nested_tuples_next_to_the_object_of_a_legacy_file(number: int, tmp_path: Path) -> None:
    """torch compares or prints the first two pickles, and uses the elements of the last one as keys."""
    save_legacy(STATE, tmp_path / "a.pt")
    pieces = []
    with open(tmp_path / "a.pt", "rb") as file:
        for _ in range(5):
            start = file.tell()
            assert [*pickletools.genops(file)]
            pieces.append((start, file.tell()))
    whole = (tmp_path / "a.pt").read_bytes()
    start, stop = pieces[number]
    hostile = b"\x80\x02](" + nested_key(30)[3:-4] + b"e."
    (tmp_path / "m.pt").write_bytes(whole[:start] + hostile + whole[stop:])
    refused(tmp_path / "m.pt", "is not a torch file")


def test_nested_tuples_as_the_id_of_a_storage(tmp_path: Path) -> None:
    path = save(STATE, tmp_path / "a.pt")
    key = nested_key(30)[3:-4]
    place = b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + key + b"X\x03\x00\x00\x00cpuK\x01tQ."
    rewritten(path, tmp_path / "m.pt", lambda n, d: place if n.endswith("data.pkl") else d)
    refused(tmp_path / "m.pt", "the id of a storage in it has more than 100 elements")


def filled_later(levels: int, used: bytes) -> bytes:
    """A pickle that makes a tuple of one list, puts 2ᵏ elements into the list, and does something with the
    tuple, in which it stands as ``h\\x03``."""
    tuples = b")" + b"q\x01h\x01\x86" * levels
    return b"\x80\x02(]q\x02\x85q\x03h\x02" + tuples + b"a" + used + b"t."


@pytest.mark.parametrize(
    "used",
    [
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nh\x03X\x03\x00\x00\x00cpuK\x01tQ",
        b"ccollections\nCounter\nh\x03R",  # torch lets it count, and so hash, the list's elements
    ],
)
def test_a_list_that_is_filled_when_it_is_in_something_else(used: bytes, tmp_path: Path) -> None:
    """It counted as empty. torch hashed 2ᵏ elements of a file with five bytes for each k: 0.19 s for 22, and
    twice that for each more."""
    path = save(STATE, tmp_path / "a.pt")
    hostile = filled_later(40, used)
    rewritten(path, tmp_path / "m.pt", lambda n, d: hostile if n.endswith("data.pkl") else d)
    refused(tmp_path / "m.pt", "a container in it is filled after it was added to another one")


def test_containers_that_are_in_several_others_are_read(tmp_path: Path) -> None:
    shared = [1, {"a": 2}]
    content = {"x": shared, "y": [shared, (shared,)], "state": OrderedDict(STATE)}
    for legacy in (False, True):
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
        found = read_torch_file(tmp_path / "m.pt")
        assert isinstance(found, dict)
        assert found["y"] == [shared, (shared,)]


class Circle:
    """Contains an object that contains it."""

    def __init__(self) -> None:
        self.inside = [self]


def test_objects_that_contain_each_other_are_called_objects(tmp_path: Path) -> None:
    torch.save(Circle(), tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "contains pickled objects, which are never loaded")


def test_keys_of_ordinary_size_are_read(tmp_path: Path) -> None:
    content = {"state": {0: {("a", 1, nested_tuples(3)): torch.ones(2)}, 1: {2.5: "x", None: [1, {3}]}}}
    torch.save(content, tmp_path / "m.pt")
    assert read_torch_file(tmp_path / "m.pt")["state"][1] == content["state"][1]  # type: ignore[index]


def test_nested_tuples_in_the_arguments_of_a_tensor(tmp_path: Path) -> None:
    path = save(STATE, tmp_path / "a.pt")
    huge = pickle.dumps(nested_tuples(30), protocol=2)[2:-1]

    def change(name: str, data: bytes) -> bytes:
        # The argument ``requires_grad`` becomes the tuples.
        return data.replace(b"\x89c", huge + b"c", 1) if name.endswith("data.pkl") else data

    refused(rewritten(path, tmp_path / "b.pt", change), "more than 10000 arguments")


def test_a_pickle_with_too_many_opcodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({f"w{i}": torch.ones(1) for i in range(30)}, tmp_path / "m.pt")
    assert len(read_tensors_of(path)) == 30
    monkeypatch.setattr(pickles, "MAX_OPCODES", 500)
    refused(path, "more than 500 opcodes")
    monkeypatch.setattr(torch_files, "MAX_PICKLE", 100)
    refused(path, "bytes besides its tensors")


@pytest.mark.parametrize("legacy", [False, True])
def test_many_tensors_of_the_same_few_values(legacy: bool, tmp_path: Path) -> None:
    """Converting them to another dtype would give each its own storage."""
    values = torch.ones(1 << 20)
    state = {f"w{i}": values[i:] for i in range(40)}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "m.pt", "tensors have .* bytes, but share")
    torch.save({"a": values, "tied": values}, tmp_path / "m.pt")
    assert read_tensors_of(tmp_path / "m.pt").keys() == {"a", "tied"}


def test_a_header_of_absurd_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({f"w{i}": torch.ones(1) for i in range(30)}, tmp_path / "m.safetensors")
    monkeypatch.setattr(files, "MAX_HEADER", 1000)
    refused(path, "its header has .* bytes")
    with pytest.raises(CheckpointError, match="its header has"):
        StoredTensors.of([path])


@pytest.mark.parametrize("depth", [101, 3_000, 100_000])
@pytest.mark.parametrize("kind", ["[", '{"a":'])
def test_json_that_is_nested_deep(depth: int, kind: str, tmp_path: Path) -> None:
    text = '{"a":' + kind * (depth - 1) + "1" + {"[": "]"}.get(kind, "}") * (depth - 1) + "}"
    with pytest.raises(ValueError, match="nested"):
        parse_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="is nested"):
        read_json(tmp_path / "config.json")


def test_json_of_ordinary_depth_and_numbers() -> None:
    assert parse_json('{"a": [[1, -2.5e3, null]], "most": 1000000000000000019884624838656}') == {
        "a": [[1, -2500.0, None]],
        "most": 10**30 + 19884624838656,
    }
    assert parse_json("7") == 7
    parse_json("[" * 100 + "]" * 100)


@pytest.mark.parametrize("digits", [401, 5_000])
def test_integers_that_no_float_can_hold(digits: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"size": ' + "9" * digits + "}")
    with pytest.raises(CheckpointError, match=f"an integer of {digits} digits"):
        read_json(tmp_path / "config.json")
