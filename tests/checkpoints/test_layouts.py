"""Every layout reads as the same model, and models that a layout cannot store are refused."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from wuerstchen.checkpoints import hub
from wuerstchen.checkpoints.diffusers import read_decoder_folder, read_prior_folder
from wuerstchen.checkpoints.diffusers_write import write_prior_folder
from wuerstchen.checkpoints.hub import local_folder
from wuerstchen.checkpoints.layout_table import LAYOUTS, Layout
from wuerstchen.checkpoints.layouts import (
    Sources,
    convert,
    layout_of,
    read_incomplete,
    read_model,
    weight_files,
)
from wuerstchen.checkpoints.native import Provenance, write_cascade
from wuerstchen.checkpoints.pipeline_folders import cascade_of
from wuerstchen.cli import main
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models import compressor as compressors
from wuerstchen.models.cascade import PUBLISHED_V1, Cascade, CascadeSettings, LatentStatistics
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.efficientnet import EFFICIENTNET_V2_S
from wuerstchen.models.paella import Paella, PaellaConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.vqgan import VQGAN
from wuerstchen.pipeline import BUNDLED

from ..configurations import ORIGINAL_DECODER, SMALL_VQGAN, narrow, with_student, write_model


@pytest.fixture(scope="module", autouse=True)
def narrow_backbone():
    """The compressor of the original's files, with few channels: 80 MB take long to write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressors, "EFFICIENTNET_V2_S", narrow(EFFICIENTNET_V2_S))
        yield


@pytest.fixture(scope="module")
def published(write_published, tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("published"))


def v2() -> Cascade:
    """The parts that the original's files contain, as small as its rule for heads allows."""
    return Cascade(
        settings=CascadeSettings(),
        vqgan=VQGAN(SMALL_VQGAN),
        decoder=Decoder(ORIGINAL_DECODER),
        compressor=Compressor(CompressorConfig(backbone="efficientnet_v2_s")),
        prior=Prior(PriorConfig(c=64, c_cond=16, depth=1, nhead=1)),
    )


def v1() -> Cascade:
    small = v2()
    paella = PaellaConfig(
        num_labels=16,
        c_token=8,
        c_cond=8,
        c_hidden=(8, 80),
        nhead=(-1, 1),
        blocks=(1, 1),
        level_config=("CT", "CTA"),
        clip_embd=16,
    )
    return dataclasses.replace(small, settings=PUBLISHED_V1, decoder=Paella(paella), compressor=None)


def assert_same(ours: Cascade, theirs: Cascade) -> None:
    assert ours.settings == theirs.settings
    assert ours.networks().keys() == theirs.networks().keys()
    for name, network in ours.networks().items():
        state, wanted = network.state_dict(), theirs.networks()[name].state_dict()
        assert state.keys() == wanted.keys(), name
        for key, tensor in state.items():
            assert torch.equal(tensor, wanted[key]), (name, key)


def test_two_pipelines_are_one_model(published):
    cascade = read_model(published)
    assert cascade.settings == CascadeSettings()
    parts = {"vqgan", "decoder", "prior", "text_encoder", "decoder_text_encoder"}
    assert cascade.networks().keys() == parts
    prior = read_prior_folder(published / "prior_pipeline")
    assert_same(cascade, cascade_of(read_decoder_folder(published), prior))
    files = weight_files(published)
    assert len(files) == 5
    assert published / "prior_pipeline" / "prior" / "diffusion_pytorch_model.safetensors" in files


@pytest.mark.parametrize("middle", ["native", "diffusers", "paddle"])
def test_a_round_trip_gives_identical_tensors(published, tmp_path, middle):
    convert(published, tmp_path / "middle", middle)
    assert layout_of(tmp_path / "middle") == middle
    convert(tmp_path / "middle", tmp_path / "back", "diffusers")
    assert_same(read_model(tmp_path / "back"), read_model(published))
    encoders = (read_model(path).text_encoder for path in (tmp_path / "middle", published))
    assert len({str(encoder.encode(["a Cat"]).states.tolist()) for encoder in encoders}) == 1


@pytest.mark.parametrize("make", [v1, v2])
def test_the_originals_files_survive_a_round_trip(published, tmp_path, make):
    cascade, whence = make(), Provenance(recipe="test", seed=0, images=0, data="")
    write_cascade(cascade, tmp_path / "native", dict.fromkeys(cascade.networks(), whence))
    convert(tmp_path / "native", tmp_path / "original", "original")
    assert layout_of(tmp_path / "original") == "original"
    no_text = ("text_encoder", "decoder_text_encoder")
    assert_same(read_model(tmp_path / "original", leave_out=no_text), cascade)
    # Text encoders come from elsewhere. v1 has one for both stages.
    sources = Sources(text_encoder=published / "prior_pipeline", decoder_text_encoder=published)
    whole = read_model(tmp_path / "original", sources)
    assert whole.text_encoder.width == 16
    assert (whole.decoder_text_encoder is None) == (make is v1)
    with pytest.raises(UserError, match=r"text_encoder.* cannot be stored in the original layout"):
        convert(tmp_path / "original", tmp_path / "again", "original", sources)
    convert(tmp_path / "original", tmp_path / "again", "original", leave_out=no_text)
    assert_same(read_model(tmp_path / "again", leave_out=no_text), cascade)


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_only_the_files_of_a_text_encoder_are_copied(model_folder, storage, tmp_path):
    """An untrusted folder may link to files of this machine, and the copy may be shared."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "id").write_text("a private key")
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    text = folder / "text_encoder"
    (text / "README.md").unlink()
    (text / "README.md").symlink_to(secret / "id")
    (text / "id").symlink_to(secret / "id")
    (text / "links").symlink_to(secret)
    (text / "vocab.txt").rename(tmp_path / "blob")
    (text / "vocab.txt").symlink_to(tmp_path / "blob")  # as in the hub's cache
    (folder / "notes.txt").write_text("private")
    convert(folder, tmp_path / "out", "native", storage=storage)
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    copied = {"text_encoder", *(f"text_encoder/{name}" for name in ("config.json", "vocab.txt", "LICENSE"))}
    networks = {f"{name}.safetensors" for name in ("vqgan", "decoder", "compressor", "prior")}
    assert names == {"model.json", *networks, *copied, "text_encoder/model.safetensors"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    ours, theirs = (read_model(path).text_encoder for path in (tmp_path / "out", model_folder))
    assert ours.encode(["a cat"]).states.equal(theirs.encode(["a cat"]).states)


def test_a_clip_of_a_native_model_is_copied_completely(write_published, tmp_path):
    convert(write_published(tmp_path / "published"), tmp_path / "native", "native", storage="float16")
    convert(tmp_path / "native", tmp_path / "again", "native")
    one, other = (read_model(tmp_path / name).text_encoder for name in ("native", "again"))
    assert one.encode(["a cat!"]).states.equal(other.encode(["a cat!"]).states)
    assert one.text_positions == other.text_positions


def test_the_original_without_a_known_text_encoder_says_so(tmp_path):
    whence = Provenance(recipe="test", seed=0, images=0, data="")
    write_cascade(v2(), tmp_path / "native", dict.fromkeys(v2().networks(), whence))
    convert(tmp_path / "native", tmp_path / "original", "original")
    with pytest.raises(CheckpointError, match="needs a text_encoder with states of width 16"):
        read_model(tmp_path / "original")
    (tmp_path / "original" / "vqgan_f4_v1_500k.pt").unlink()
    with pytest.raises(CheckpointError, match=r"but no vqgan\. Put the files of Stages A, B and C"):
        read_model(tmp_path / "original")


@pytest.fixture
def native(tmp_path):
    whence = Provenance(recipe="test", seed=0, images=0, data="")
    write_cascade(v2(), tmp_path / "native", dict.fromkeys(v2().networks(), whence))
    return tmp_path / "native"


def test_the_originals_files_can_be_stored_in_half_precision(native, tmp_path):
    convert(native, tmp_path / "half", "original", storage="float16")
    for path in (tmp_path / "half").iterdir():
        for state in torch.load(path).values():
            assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float16}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("layout", ["original", "native"])
def test_an_interrupted_conversion_leaves_nothing(native, tmp_path, monkeypatch, layout, stop):
    replaced = []

    def replace(*paths):
        if len(replaced) == 1:
            raise stop
        replaced.append(paths)
        os.rename(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        convert(native, tmp_path / "out", layout)
    assert len(replaced) == 1
    assert list(tmp_path.iterdir()) == [native]


def test_an_existing_target_is_refused_before_anything_is_read(native, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for target in (native, tmp_path / "link"):
        for layout in ("original", "native"):
            with pytest.raises(CheckpointError, match="already exists"):
                convert("nobody/nothing", target, layout)


def test_a_decoder_is_not_left_with_a_text_encoder_that_does_not_fit(published, tmp_path):
    with pytest.raises(
        UserError, match="text encoder has 16 channels of text states, but the decoder has 12"
    ):
        convert(published, tmp_path / "out", "native", leave_out=["decoder_text_encoder"])
    assert not (tmp_path / "out").exists()


def test_sources_that_would_not_be_used_are_refused(published, native, tmp_path):
    convert(native, tmp_path / "original", "original")
    with pytest.raises(UserError, match="take no prior from elsewhere"):
        read_model(tmp_path / "original", Sources(prior=published / "prior_pipeline"))
    for sources in (Sources(text_encoder=published), Sources(decoder_text_encoder=published)):
        with pytest.raises(UserError, match="already contains text encoders"):
            read_model(published, sources)


def test_a_full_disk_gives_one_line_in_all_layouts(published, tmp_path, monkeypatch):
    def full(*_, **__):
        raise Exception("No space left on device")  # as the tokenizers library does

    monkeypatch.setattr(CLIPTokenizer, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
        convert(published, tmp_path / "out", "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_the_prior_can_come_from_elsewhere(published, tmp_path):
    other = read_prior_folder(published / "prior_pipeline")
    with torch.no_grad():
        other.prior.projection.weight.add_(1)
    write_prior_folder(other, tmp_path / "other")
    for source in (tmp_path / "other", tmp_path / "other" / "prior"):
        cascade = read_model(published, Sources(prior=source))
        assert torch.equal(cascade.prior.projection.weight, other.prior.projection.weight)
        assert cascade.text_encoder.width == 16
    assert tmp_path / "other/prior/diffusion_pytorch_model.safetensors" in weight_files(
        published, Sources(prior=tmp_path / "other")
    )
    with pytest.raises(UserError, match="is a native model, which contains all networks"):
        read_model(BUNDLED, Sources(prior=tmp_path / "other"))


@pytest.mark.parametrize("layout", ["diffusers", "original", "paddle"])
def test_the_bundled_model_fits_no_other_layout(layout, tmp_path):
    with pytest.raises(UserError, match=f"int8, which the {layout} layout does not support"):
        convert(BUNDLED, tmp_path / "out", layout)
    convert(BUNDLED, tmp_path / "native", "native")
    # Parts that cannot be left out come first, then all that can be left out, in one message.
    words = "text_encoder cannot be stored in .* layout: it is not a CLIP"
    if layout == "original":
        words = "(previewer and text_encoder|text_encoder and previewer) cannot be stored .* --leave-out"
        with pytest.raises(UserError, match="image_size=256 cannot be stored in the original layout"):
            convert(tmp_path / "native", tmp_path / "out", layout, leave_out=["previewer", "text_encoder"])
    with pytest.raises(UserError, match=words):
        convert(tmp_path / "native", tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_statistics_by_channel_cannot_be_stored(published, tmp_path):
    cascade = read_model(published)
    statistics = LatentStatistics(mean=(0.0,) * 4, std=(1.0, 2.0, 3.0, 4.0))
    for settings, name in (
        (CascadeSettings(latent_statistics=statistics), "latent_statistics"),
        (CascadeSettings(prior_steps=12), "prior_steps=12"),
        (CascadeSettings(text_mask=True), "text_mask=True"),
    ):
        cascade.settings = settings
        whence = Provenance(recipe="test", seed=0, images=0, data="")
        native = tmp_path / name
        write_cascade(cascade, native, dict.fromkeys(cascade.networks(), whence))
        with pytest.raises(UserError, match=f"{name}.* cannot be stored in the diffusers layout"):
            convert(native, tmp_path / "out", "diffusers")
    # One mean and one standard deviation for all channels can be stored.
    cascade.settings = CascadeSettings(latent_statistics=LatentStatistics(mean=(-2.0,), std=(40.0,)))
    write_cascade(cascade, tmp_path / "shared", dict.fromkeys(cascade.networks(), whence))
    convert(tmp_path / "shared", tmp_path / "out", "diffusers")
    assert_same(read_model(tmp_path / "out"), cascade)


def test_what_is_not_a_model_says_why(tmp_path, published):
    with pytest.raises(CheckpointError, match=r"no model.json, no model_index.json and no .pt file"):
        read_model(tmp_path)
    with pytest.raises(CheckpointError, match="contains only one network"):
        read_model(published / "decoder")
    with pytest.raises(CheckpointError, match="has no Stage B"):
        read_model(published / "prior_pipeline")
    with pytest.raises(UserError, match="decoder cannot be left out"):
        convert(published, tmp_path / "out", "native", leave_out=["decoder"])
    with pytest.raises(UserError, match="unet cannot be left out"):
        convert(published, tmp_path / "out", "native", leave_out=["unet"])
    with pytest.raises(CheckpointError, match="already exists"):
        convert(published, tmp_path, "native")


def test_other_numbers_than_the_published_belong_to_diffusers_interface(published):
    prior = read_prior_folder(published / "prior_pipeline")
    prior.resolution_multiple = 32.0
    with pytest.raises(CheckpointError, match=r"Load this model with wuerstchen\.diffusers"):
        cascade_of(read_decoder_folder(published), prior)


@pytest.fixture
def cache(published, tmp_path):
    """The hub's cache as its client leaves it, with two models in it."""
    folder = tmp_path / "hub"
    for name, source in (("wuerstchen", published), ("wuerstchen-prior", published / "prior_pipeline")):
        repository = folder / f"models--warp-ai--{name}"
        shutil.copytree(source, repository / "snapshots" / "0123456789abcdef")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123456789abcdef")
    snapshot = folder / "models--warp-ai--wuerstchen" / "snapshots" / "0123456789abcdef"
    shutil.rmtree(snapshot / "prior_pipeline")
    (snapshot / "README.md").write_text("---\nprior:\n- warp-ai/wuerstchen-prior\n---\n")
    return folder


def test_a_name_on_the_hub_is_found_in_its_cache_and_names_its_prior(cache, published, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert_same(read_model("warp-ai/wuerstchen", Sources(local_files_only=True)), read_model(published))
    assert local_folder("warp-ai/wuerstchen", cache_dir=cache, local_files_only=True).is_relative_to(cache)


@pytest.mark.parametrize(
    "name", ["warp-ai/nothing", "no-owner", "../up/there", "a/b/c", "", "https://a/b", "x" * 5000]
)
def test_an_unavailable_name_gives_one_line(name, tmp_path):
    with pytest.raises(CheckpointError) as raised:
        local_folder(name or " ", cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert "Check the name and the network" in str(raised.value) or "OWNER/NAME" in str(raised.value)


def test_without_a_network_the_reason_is_in_the_message(monkeypatch):
    def no_network(*_, **__):
        raise LocalEntryNotFoundError("Cannot reach\nthe hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded from the hub.*Cannot reach the hub"):
        local_folder("warp-ai/wuerstchen")


class Repository:
    """A repository on the hub: what is fetched of it, and what has been."""

    def __init__(self, folder, files):
        self.folder, self.files, self.fetched = folder, files, []

    def snapshot_download(self, *_, allow_patterns, ignore_patterns, **settings):
        self.settings = settings
        for name in self.files:
            matches = [
                any(fnmatch(name, p) for p in patterns) for patterns in (allow_patterns, ignore_patterns)
            ]
            if matches == [True, False] and name not in self.fetched:
                self.fetched.append(name)
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_text("")
        return str(self.folder)


DESCRIPTIONS = ["model_index.json", "decoder/config.json", "text_encoder/config.json", "README.md"]
STEM = "decoder/diffusion_pytorch_model"
REPOSITORIES = {
    # What is there, by name, and what is fetched of it without and with variant="fp16".
    "full and fp16": (
        [f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.bin", "text_encoder/model.safetensors"],
        [f"{STEM}.safetensors", "text_encoder/model.safetensors"],
        [f"{STEM}.fp16.safetensors", "text_encoder/model.safetensors"],
    ),
    "fp16 alone": (
        [f"{STEM}.fp16.safetensors", f"{STEM}.fp16.bin", "text_encoder/model.fp16.safetensors"],
        [f"{STEM}.fp16.safetensors", "text_encoder/model.fp16.safetensors"],
        [f"{STEM}.fp16.safetensors", "text_encoder/model.fp16.safetensors"],
    ),
    "fp16 in shards, and a full pickle": (
        [
            f"{STEM}.safetensors.index.fp16.json",
            f"{STEM}.fp16-00001-of-00002.safetensors",
            f"{STEM}.fp16-00002-of-00002.safetensors",
            "text_encoder/pytorch_model.bin",
        ],
        [
            f"{STEM}.safetensors.index.fp16.json",
            f"{STEM}.fp16-00001-of-00002.safetensors",
            f"{STEM}.fp16-00002-of-00002.safetensors",
            "text_encoder/pytorch_model.bin",
        ],
        [
            f"{STEM}.safetensors.index.fp16.json",
            f"{STEM}.fp16-00001-of-00002.safetensors",
            f"{STEM}.fp16-00002-of-00002.safetensors",
            "text_encoder/pytorch_model.bin",
        ],
    ),
}


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("name", REPOSITORIES)
def test_one_file_format_of_each_network_is_downloaded(name, variant, monkeypatch, tmp_path):
    files, without, with_variant = REPOSITORIES[name]
    repository = Repository(tmp_path, DESCRIPTIONS + files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", repository.snapshot_download)
    local_folder("someone/model", variant=variant, force_download=True)
    expected = without if variant is None else with_variant
    assert sorted(repository.fetched) == sorted(DESCRIPTIONS + expected)
    assert repository.settings["force_download"] is True


def test_a_text_encoder_of_the_fp16_variant_alone_is_fetched(monkeypatch, tmp_path):
    files = ["text_encoder/config.json", "text_encoder/model.fp16.safetensors", "decoder/a.safetensors"]
    repository = Repository(tmp_path, files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", repository.snapshot_download)
    local_folder("someone/model", only=("text_encoder/*", "tokenizer/*"))
    assert repository.fetched == files[:2]


def test_pickles_are_only_downloaded_if_there_is_nothing_else(monkeypatch, tmp_path):
    """The first call brings descriptions and safetensors; a second one what is still missing."""
    asked = []

    def fetch(*_, allow_patterns, **__):
        asked.append(allow_patterns)
        if "text_encoder/*.bin" in allow_patterns:
            (tmp_path / "text_encoder" / "a.bin").write_text("")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for part in ("decoder", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    (tmp_path / "decoder" / "a.safetensors").write_text("")
    local_folder("warp-ai/wuerstchen")
    assert len(asked) == 2
    assert asked[1][-1:] == ["text_encoder/*.bin"]
    (tmp_path / "decoder" / "a.safetensors").unlink()
    (tmp_path / "text_encoder" / "a.bin").unlink()
    local_folder("warp-ai/wuerstchen")
    assert "*.bin" in asked[3]
    assert hub.HUB_NAME.fullmatch("warp-ai/wuerstchen-prior")


def read_toy(path, sources, dtype, leave_out):
    settings = CascadeSettings(**json.loads((path / "toy.json").read_text()))
    networks = {part: cls(config) for part, (cls, config) in toy_networks().items()}
    for part, network in networks.items():
        network.load_state_dict(load_file(path / f"{part}.toy.safetensors"))
    return Cascade(settings=settings, **networks)


def write_toy(cascade, folder, storage, source):
    folder.mkdir()
    (folder / "toy.json").write_text(json.dumps({"prior_steps": cascade.settings.prior_steps}))
    for part in toy_networks():
        save_file(cascade.networks()[part].state_dict(), folder / f"{part}.toy.safetensors")


def toy_networks():
    parts = v2().networks()
    return {part: (type(parts[part]), parts[part].config) for part in ("vqgan", "decoder", "prior")}


TOY_LAYOUT = Layout(
    marker="toy.json",
    matches=lambda path: (path / "toy.json").is_file(),
    read=read_toy,
    write=write_toy,
    parts=frozenset({"vqgan", "decoder", "prior"}),
    storages=("float32",),
    assumed_settings=lambda cascade: CascadeSettings(prior_steps=cascade.settings.prior_steps),
)


def test_a_new_layout_is_one_file_and_one_row(native, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(LAYOUTS, "toy", f"{__name__}:TOY_LAYOUT")
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert re.search(r"\{native,.*,toy[,}]", capsys.readouterr().out)
    command = ["convert", str(native), str(tmp_path / "toy"), "--layout", "toy"]
    assert main(command) == 2
    assert "compressor cannot be stored in the toy layout" in capsys.readouterr().err
    assert main([*command, "--storage", "float16", "--leave-out", "compressor"]) == 2
    assert "float16 is not supported by the toy layout. Use float32." in capsys.readouterr().err
    assert main([*command, "--leave-out", "compressor"]) == 0

    assert layout_of(tmp_path / "toy") == "toy"
    original = read_model(native, leave_out=["compressor"])
    assert_same(read_model(tmp_path / "toy"), original)
    settings, parts, provenance = read_incomplete(tmp_path / "toy")
    assert (settings, parts.keys(), provenance) == (original.settings, original.networks().keys(), {})
    assert [file.name for file in weight_files(tmp_path / "toy")] == [
        "decoder.toy.safetensors",
        "prior.toy.safetensors",
        "vqgan.toy.safetensors",
    ]
    convert(tmp_path / "toy", tmp_path / "back", "native")
    assert_same(read_model(tmp_path / "back"), original)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no model\.json, .* and no toy\.json"):
        layout_of(tmp_path / "empty")


def test_the_table_of_layouts_needs_no_torch():
    code = "import sys, wuerstchen.checkpoints.layout_table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("options", [{"storage": "int8"}, {"max_shard_size": "12MB"}])
def test_a_student_is_a_part_like_any_other(small_cascade, randomise, tmp_path, options):
    cascade = with_student(small_cascade, steps=3)
    randomise(cascade.prior_student)
    folder, out = write_model(cascade, tmp_path / "model"), tmp_path / "out"
    convert(folder, out, "native", **options)
    found, expected = read_model(out), cascade.prior_student.state_dict()
    assert (found.settings.prior_student_steps, found.settings.prior_student_guidance) == (3, 2.5)
    for name, tensor in found.prior_student.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=0.1 if "storage" in options else 0, rtol=0)
    assert not torch.equal(found.prior_student.out[1].weight, found.prior.out[1].weight)


def test_a_student_is_written_only_with_its_prior_and_in_the_native_layout(small_cascade, tmp_path):
    folder = write_model(with_student(small_cascade), tmp_path / "model")
    for layout in ("diffusers", "original", "paddle"):
        with pytest.raises(UserError, match="cannot be stored in the"):
            convert(folder, tmp_path / layout, layout)
    with pytest.raises(UserError, match="prior_student"):
        convert(folder, tmp_path / "original", "original")
    with pytest.raises(UserError, match="has a prior_student without its prior"):
        convert(folder, tmp_path / "alone", "native", leave_out=["prior"])
    convert(folder, tmp_path / "teacher", "native", leave_out=["prior_student"])
    assert "student" not in (tmp_path / "teacher" / "model.json").read_text()
