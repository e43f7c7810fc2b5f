"""Adapters in the service: a folder of them, one for each request, and batches by adapter."""

import io
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import wuerstchen
from wuerstchen.checkpoints.adapter_metadata import AdapterMetadata
from wuerstchen.checkpoints.adapter_write import write_adapter
from wuerstchen.checkpoints.adapters import Adapter, LayerTensors
from wuerstchen.errors import UserError
from wuerstchen.sampling import Sampling, adapters_named
from wuerstchen.serve.adapters import AdapterFolder
from wuerstchen.serve.worker_adapters import WorkerAdapters

from .test_openai import client_of

STEPS = {"prior_steps": 2, "decoder_steps": 1}
METADATA = AdapterMetadata(title="My dog", trigger_words=("sks dog",), licence="CC0-1.0")


def adapter(seed: int, width: int = 256, token: int = 0) -> Adapter:
    """An adapter of the bundled model's size."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        f"blocks.{block}.attention.to_q": LayerTensors(
            torch.randn(2, width, generator=generator), torch.randn(width, 2, generator=generator), 2.0
        )
        for block in (2, 5)
    }
    words = {"sks": torch.randn(1, token, generator=generator)} if token else {}
    return Adapter(prior=layers, tokens=words, metadata=METADATA)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "loras"
    write_adapter(folder / "dog.safetensors", adapter(1))
    write_adapter(folder / "cat.safetensors", adapter(2, token=384), form="kohya")
    write_adapter(folder / "theirs" / "adapter_model.safetensors", adapter(3), form="peft")
    write_adapter(folder / "other model.safetensors", adapter(4, width=64))
    # None of these is an adapter.
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors")
    (folder / "broken.safetensors").write_bytes(b"\xff" * 100)
    (folder / "huge.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    (folder / "notes.txt").write_text("dog")
    (folder / "empty").mkdir()
    (folder / "gone.safetensors").symlink_to(folder / "nowhere.safetensors")
    (folder / "line\nbreak.safetensors").write_bytes((folder / "dog.safetensors").read_bytes())
    (folder / ".hidden.safetensors").write_bytes((folder / "dog.safetensors").read_bytes())
    return folder


def test_a_folder_lists_its_adapters(folder):
    found = AdapterFolder(folder)
    assert [listed.name for listed in found.scan()] == ["cat", "dog", "other model", "theirs"]
    assert found.scan()[1].metadata == METADATA
    assert found.find("theirs") == folder / "theirs"
    with pytest.raises(UserError, match="lora 'bird' does not exist any more"):
        found.find("bird")
    with pytest.raises(UserError, match=r"is not a folder\. Give a folder with \.safetensors files"):
        AdapterFolder(folder / "nowhere")
    write_adapter(folder / "bird.safetensors", adapter(5))
    (folder / "dog.safetensors").unlink()
    assert [listed.name for listed in found.scan()] == ["bird", "cat", "other model", "theirs"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"lora": "bird"}, "lora", "lora 'bird' is not available. Use one of 'cat', 'dog', 'other model'"),
        ({"lora": "../loras/dog"}, "lora", "is not available"),
        ({"lora": ""}, "lora", "at least 1 character"),
        ({"lora": "dog", "lora_strength": 3}, "lora_strength", "less than or equal to 2"),
        ({"lora": "dog", "lora_strength": "1"}, "lora_strength", "valid number"),
        ({"lora_strength": 0.5}, "lora_strength", "has no adapter"),
    ],
)
def test_requests_that_name_no_adapter_are_refused(serve, folder, body, param, words):
    running = serve(lora_dir=folder)
    answer = running.http.post("/v1/jobs", json={"prompts": ["x"], **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]
    assert str(folder) not in answer.text


def test_a_service_without_adapters(plain):
    assert plain.http.get("/v1/model").json()["loras"] == []
    answer = plain.http.post("/v1/jobs", json={"prompts": ["x"], "lora": "dog"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora")
    assert "This service has no adapters" in answer.json()["error"]["message"]


def test_the_model_lists_adapters_as_they_come_and_go(serve, folder, monkeypatch):
    monkeypatch.setattr("wuerstchen.serve.service.SCAN_SECONDS", 0.1)
    running = serve(lora_dir=folder)
    listed = running.http.get("/v1/model").json()["loras"]
    assert [each["name"] for each in listed] == ["cat", "dog", "other model", "theirs"]
    assert listed[1] == {
        "name": "dog",
        "title": "My dog",
        "trigger_words": ["sks dog"],
        "licence": "CC0-1.0",
    }
    write_adapter(folder / "bird.safetensors", adapter(5))
    end = time.monotonic() + 10
    while running.http.get("/v1/model").json()["loras"][0]["name"] != "bird":
        assert time.monotonic() < end
        time.sleep(0.05)
    job = running.draw(lora="bird", lora_strength=0.5)
    assert (job["settings"]["lora"], job["settings"]["lora_strength"]) == ("bird", 0.5)
    assert "lora" not in running.draw()["settings"]


def test_an_adapter_of_all_images_is_not_offered(folder):
    """Otherwise a request could replace its strength, or apply it twice."""
    found = AdapterFolder(folder, [folder / ".." / folder.name / "theirs", folder / "dog.safetensors"])
    assert [listed.name for listed in found.scan()] == ["cat", "other model"]
    twice = (str(folder / "theirs"), f"{folder / '..' / folder.name / 'theirs'}:0.5")
    with pytest.raises(UserError, match=r"is given twice\. Give it once"):
        adapters_named(twice)


def test_clients_do_not_learn_paths_of_the_operator(folder, tmp_path, caplog):
    own = write_adapter(tmp_path / "own.safetensors", adapter(6))
    other = folder / "pytorch_lora_weights.safetensors"
    write_adapter(other, adapter(7))
    used = WorkerAdapters(wuerstchen.load(device="cpu"), (str(own),), folder)
    used.use(None, 1.0)
    (folder / "adapter_model.safetensors").write_bytes(
        (folder / "theirs/adapter_model.safetensors").read_bytes()
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(UserError, match="this adapter is a 'LOHA'") as caught:
        used.use("adapter_model", 1.0)
    assert str(folder) not in str(caught.value)
    own.unlink()
    for name in ("dog", None):
        caplog.clear()
        with pytest.raises(UserError, match="an adapter that this service uses for all images") as caught:
            used.use(name, 1.0)
        assert str(tmp_path) not in str(caught.value)
        assert str(own) in caplog.text
    with pytest.raises(UserError, match=r"own\.safetensors does not exist"):  # the operator's own start
        WorkerAdapters(used.model, (str(own),), folder).use(None, 1.0)


def test_texts_of_a_file_break_no_answer(serve, folder):
    """A lone surrogate cannot be encoded, and control characters would act on a terminal."""
    texts = {"modelspec.title": "a\ud800b\x1b[2J", "modelspec.trigger_phrase": "\udfff, d\u00f6g"}
    header = {
        "__metadata__": texts,
        "prior.x.lora_A.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
    }
    content = json.dumps(header).encode()
    (folder / "evil.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    answer = serve(lora_dir=folder).http.get("/v1/model")
    assert answer.status_code == 200
    (evil,) = (each for each in answer.json()["loras"] if each["name"] == "evil")
    assert (evil["title"], evil["trigger_words"]) == ("a b [2J", ["d\u00f6g"])


def test_a_subfolder_that_cannot_be_entered_is_left_out(folder, monkeypatch):
    """A permission fails so in Python 3.11, unless the service runs as root."""
    is_file = Path.is_file

    def refuses(path):
        if path.parent.name == "empty":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuses)
    assert [listed.name for listed in AdapterFolder(folder).scan()] == ["cat", "dog", "other model", "theirs"]


def test_a_batch_has_one_adapter(serve, folder):
    """The stand-in's second colour is the number of images in the batch."""
    running = serve(lora_dir=folder)
    running.draw(prompts=["slowly"], prior_steps=3)
    settings = [{}, {"lora": "dog"}, {"lora": "cat"}, {"lora": "dog", "lora_strength": 0.5}]
    jobs = [running.draw(count=2, **each) for each in (*settings, *settings)]
    sizes = []
    for job in jobs:
        (url, _) = (image["url"] for image in running.wait(job)["images"])
        sizes.append(Image.open(io.BytesIO(running.http.get(url).content)).getpixel((0, 0))[1])
    assert sizes == [4] * 8  # those of the two jobs with the same adapter and strength


@pytest.fixture(scope="module")
def model():
    return wuerstchen.load(device="cpu", precision="float32")


def expected(model, adapters, prompt):
    model.use_loras(adapters)
    sampling = Sampling(prior_steps=2, decoder_steps=1)
    return np.asarray(model.generate(prompt, seed=3, sampling=sampling)[0]).astype(int)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with the CPU")
def test_each_request_has_its_own_adapter_and_strength(serve, folder, model):
    """Together with the operator's adapter. Notices and errors do not name the folder."""
    tensors = load_file(folder / "cat.safetensors")
    save_file({k: t for k, t in tensors.items() if "alpha" not in k}, folder / "bare.safetensors")
    always = {folder / "theirs": 0.5}
    running = serve(
        real=True,
        loras=(f"{folder / 'theirs'}:0.5",),
        lora_dir=folder,
        precision="float32",
        low_memory="stage",  # on the CPU it moves nothing
    )
    assert not running.http.get("/v1/model").json()["can"]["preview"]
    wanted = [(None, 1.0), ("dog", 1.0), ("cat", 1.0), ("other model", 1.0), ("dog", 0.5), (None, 1.0)]
    jobs = [
        running.draw(
            prompts=["a sks"], seed=3, **STEPS, **({"lora": n, "lora_strength": s} if n is not None else {})
        )
        for n, s in wanted
    ]
    found = []
    for job, (name, _) in zip(jobs, wanted, strict=True):
        ended = running.wait(job)
        if name == "other model":  # the others are drawn
            assert (ended["state"], ended["images"]) == ("failed", [])
            assert "lora 'other model' is incompatible with this model" in ended["error"]
            assert str(folder) not in ended["error"]
            found.append(None)
            continue
        assert (ended["state"], ended["notices"]) == ("done", []), ended
        content = running.http.get(ended["images"][0]["url"]).content
        found.append(np.asarray(Image.open(io.BytesIO(content))).astype(int))
    assert np.array_equal(found[0], found[5])
    for number in (0, 1, 2, 4):
        name, strength = wanted[number]
        adapters = always | ({} if name is None else {folder / f"{name}.safetensors": strength})
        assert np.abs(found[number] - expected(model, adapters, "a sks")).max() <= 2
        earlier = (found[k] for k in range(number) if found[k] is not None)
        assert all(np.abs(found[number] - other).max() > 20 for other in earlier)
    for _ in range(2):  # also when the adapter is in use already
        job = running.wait(running.draw(prompts=["a cat"], lora="bare", **STEPS))
        (notice,) = job["notices"]
        assert notice.startswith("lora 'bare' does not store alpha")
        assert str(folder) not in notice


def test_a_folder_that_hangs_stops_nothing_else(serve, folder, monkeypatch):
    """As a network drive may. The same loop ended late jobs and restarted workers."""
    hangs = threading.Event()
    monkeypatch.setattr("wuerstchen.serve.service.SCAN_SECONDS", 0.05)
    running = serve(lora_dir=folder, queue_timeout=0.5)
    monkeypatch.setattr(AdapterFolder, "scan", lambda _: hangs.wait(60))
    try:
        time.sleep(0.2)
        running.draw(prompts=["slowly"], prior_steps=15)
        late = running.wait(running.draw(lora="dog"))
        assert "it waited 0.5 s in the queue" in late["error"]
    finally:
        hangs.set()


def test_openai_clients_can_name_an_adapter(serve, folder):
    running = serve(lora_dir=folder)
    with client_of(running) as client:
        answer = client.images.generate(prompt="x", extra_body={"lora": "dog", "lora_strength": 0.5})
        assert len(answer.data) == 1
        with pytest.raises(Exception, match="lora 'bird' is not available"):
            client.images.generate(prompt="x", extra_body={"lora": "bird"})
