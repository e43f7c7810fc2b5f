"""Folders by diffusers: parity with diffusers' own networks, and all kinds of invalid folders."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from wuerstchen.checkpoints.clip import clip_tokenizer_of
from wuerstchen.checkpoints.diffusers import (
    linked_prior,
    pipeline_class,
    read_decoder_folder,
    read_network,
    read_prior_folder,
    read_prior_network,
)
from wuerstchen.checkpoints.diffusers_write import (
    write_combined_folder,
    write_decoder_folder,
    write_prior_folder,
)
from wuerstchen.checkpoints.layouts import read_model, weight_files
from wuerstchen.cli import main
from wuerstchen.errors import CheckpointError, UserError, UserNotice
from wuerstchen.models.prior import Prior
from wuerstchen.models.text import TextEncoder

GENERATIONS = {
    "published": {"year": 2023},
    "published, pickled": {"year": 2023, "pickled": True},
    "published, in shards": {"year": 2023, "shard_size": "10KB"},
    "published, pickled, in shards": {"year": 2023, "pickled": True, "shard_size": "10KB"},
    "as written today": {"year": 2026},
}


@pytest.fixture(scope="module")
def published(write_published, tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "wuerstchen")


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v != "gone"}))


@pytest.mark.parametrize("generation", GENERATIONS.values(), ids=GENERATIONS)
def test_reads_every_generation_as_diffusers_does(
    generation, write_published, diffusers_pipelines, tmp_path, relative_error
):
    root = write_published(tmp_path, **generation)
    prior, decoder = read_prior_folder(root / "prior_pipeline"), read_decoder_folder(root)
    theirs = diffusers_pipelines
    prompts = ["a cat", "Ab 2!", ""]
    for ours, reference in ((prior, theirs.prior), (decoder, theirs.decoder)):
        padded = reference.tokenizer(prompts, padding="max_length", return_tensors="pt")
        with torch.no_grad():
            wanted = reference.text_encoder(padded.input_ids, attention_mask=padded.attention_mask)
        states = TextEncoder.from_transformers(ours.text_encoder, ours.tokenizer).encode(prompts).states
        assert relative_error(states, wanted.last_hidden_state) < 1e-6
        assert (ours.schedule.s, ours.schedule.scaler) == (0.008, 1.0)

    x, r = torch.randn(2, 4, 6, 6), torch.tensor([0.3, 0.8])
    text = torch.randn(2, 12, 16)
    with torch.no_grad():
        ours = prior.prior(x, r, prior.prior.context(text))
        assert relative_error(ours, theirs.prior.prior(x, r, text)) < 1e-4
        latents, text = torch.randn(2, 4, 32, 16), torch.randn(2, 12, 12)
        ours = decoder.decoder(latents, r, decoder.decoder.context(x, (32, 16), text))
        assert relative_error(ours, theirs.decoder.decoder(latents, r, x, text)) < 1e-5
        pixels = decoder.vqgan.unembed(latents)
        assert relative_error(pixels, theirs.decoder.vqgan.decode(latents).sample) < 1e-5
    assert (prior.latent_mean, prior.latent_std, prior.resolution_multiple) == (42.0, 1.0, 42.67)
    assert decoder.latent_dim_scale == 10.67
    assert linked_prior(root) == root / "prior_pipeline"


def test_reads_the_variants_of_the_prior_with_their_configuration_at_the_root(published, diffusers_pipelines):
    prior = read_prior_network(published / "prior_pipeline" / "prior")
    for key, value in diffusers_pipelines.prior.prior.state_dict().items():
        assert torch.equal(prior.state_dict()[key], value), key


def test_fields_that_are_left_out_have_diffusers_defaults(copy):
    config = copy / "prior_pipeline" / "prior" / "config.json"
    edit(config, c="gone", depth="gone", nhead="gone", c_cond="gone")
    with pytest.raises(CheckpointError, match=r"the configuration expects \(5120,\)"):
        read_prior_folder(copy / "prior_pipeline")


def test_reads_in_half_precision_and_leaves_out_what_is_given(published):
    prior = read_prior_folder(published / "prior_pipeline", dtype=torch.bfloat16, given=["text_encoder"])
    assert prior.text_encoder is None
    assert {p.dtype for p in prior.prior.parameters()} == {torch.bfloat16}
    decoder = read_decoder_folder(published, dtype=torch.float16, given=["decoder", "tokenizer"])
    assert decoder.decoder is None
    assert decoder.vqgan.state_dict()["down_blocks.3.1.num_batches_tracked"].dtype == torch.int64


def test_what_is_written_is_what_was_read_and_diffusers_reads_it(published, tmp_path, monkeypatch):
    import importlib

    import diffusers

    old = importlib.import_module("diffusers.pipelines.deprecated.wuerstchen")
    monkeypatch.setattr(diffusers.pipelines, "wuerstchen", old, raising=False)
    prior, decoder = read_prior_folder(published / "prior_pipeline"), read_decoder_folder(published)
    decoder.prior = "someone/some-prior"
    write_prior_folder(prior, tmp_path / "prior")
    write_decoder_folder(decoder, tmp_path / "decoder")
    write_combined_folder(decoder, prior, tmp_path / "combined")
    assert linked_prior(tmp_path / "decoder") == "someone/some-prior"
    assert pipeline_class(tmp_path / "combined") == "WuerstchenCombinedPipeline"
    for folder in ("prior", "combined"):
        again = read_prior_folder(tmp_path / folder)
        assert_equal(again.prior, prior.prior)
        assert_equal(again.text_encoder, prior.text_encoder)
    for folder in ("decoder", "combined"):
        again = read_decoder_folder(tmp_path / folder)
        assert_equal(again.decoder, decoder.decoder)
        assert_equal(again.vqgan, decoder.vqgan)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "combined")
    assert_equal(theirs.decoder, decoder.decoder)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "decoder")
    assert_equal(theirs.vqgan, decoder.vqgan)
    theirs = diffusers.WuerstchenPriorPipeline.from_pretrained(tmp_path / "prior")
    assert_equal(theirs.prior, prior.prior)
    assert theirs.tokenizer("a cat")["input_ids"] == prior.tokenizer("a cat")["input_ids"]


def assert_equal(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_tokenizer_of_a_text_encoder_is_the_one_it_was_made_of(clip_tokenizer, published):
    prior = read_prior_folder(published / "prior_pipeline")
    made = clip_tokenizer_of(TextEncoder.from_transformers(prior.text_encoder, prior.tokenizer))
    prompt = "A Cat, 12 cats and a ütf"
    assert (
        made(prompt, padding="max_length", truncation=True)["input_ids"]
        == (clip_tokenizer(prompt, padding="max_length", truncation=True)["input_ids"])
    )


def test_a_config_with_our_own_field_is_refused(copy):
    """Ignoring it would leave out blocks that the weights need."""
    edit(copy / "prior_pipeline" / "prior" / "config.json", text_blocks=1)
    with pytest.raises(CheckpointError, match="a Prior has no field 'text_blocks'"):
        read_prior_folder(copy / "prior_pipeline")


def test_what_the_layout_cannot_store_is_refused(small_cascade, published, tmp_path):
    decoder = read_decoder_folder(published)
    decoder.decoder = small_cascade.decoder
    with pytest.raises(UserError, match="without text cannot be stored"):
        write_decoder_folder(decoder, tmp_path / "out")
    prior = read_prior_folder(published / "prior_pipeline")
    plain = prior.prior
    for name in ("text_blocks", "registers"):
        prior.prior = Prior(dataclasses.replace(plain.config, **{name: 1}))
        with pytest.raises(UserError, match=f"{name}=1 cannot be stored"):
            write_prior_folder(prior, tmp_path / "out")
    prior.prior = plain
    prior.latent_mean = 40.0
    with pytest.raises(UserError, match=r"latent_mean=40\.0 cannot be stored"):
        write_combined_folder(decoder=read_decoder_folder(published), prior=prior, folder=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


INDEX = {
    "another pipeline": (
        {"_class_name": "StableDiffusionPipeline"},
        "must be one of .*, got 'StableDiffusionPipeline'",
    ),
    "a class of a hub's code": (
        {"decoder": ["os", "system"]},
        r"class of decoder must be .*, got \['os', 'system'\]",
    ),
    "a class of the right library": (
        {"vqgan": ["diffusers", "VQModel"]},
        "class of vqgan must be PaellaVQModel",
    ),
    "a missing part": ({"vqgan": "gone"}, "vqgan must be .*, got None"),
    "a part left empty": ({"vqgan": [None, None]}, r"class of vqgan must be .*, got \[None, None\]"),
    "a part too many": ({"unet": ["diffusers", "UNet2DModel"]}, "has no 'unet'"),
    "a number that is none": (
        {"latent_dim_scale": "10.67"},
        "latent_dim_scale must be a number .*, got '10.67'",
    ),
    "larger than any number": ({"latent_dim_scale": 10**400}, "it has an integer of 401 digits"),
    "a library that is no text": ({"vqgan": [["diffusers"], "PaellaVQModel"]}, "class of vqgan must be"),
    "a pipeline that is no text": ({"_class_name": ["WuerstchenDecoderPipeline"]}, "must be one of"),
    "a very long class": ({"_class_name": "x" * 10**6}, "got .x{79}…"),
    "infinite": ({"latent_dim_scale": float("inf")}, "latent_dim_scale must be a number .*, got inf"),
}


@pytest.mark.parametrize(("changes", "message"), INDEX.values(), ids=INDEX)
def test_an_index_that_is_almost_right_is_refused(copy, changes, message):
    edit(copy / "model_index.json", **changes)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_decoder_folder(copy)
    assert len(str(raised.value)) < 1000


CONFIGS = {
    "absurd depth": ("prior_pipeline/prior", {"depth": 10**12}, "depth must be .*, got '1000000000000'"),
    "absurd width": ("prior_pipeline/prior", {"c": 10**12}, "c must be .*, got '1000000000000'"),
    "large width": ("prior_pipeline/prior", {"c": 2**20}, "the configuration expects"),
    "levels to overflow": ("vqgan", {"levels": 10**9}, "levels must be .*, got '1000000000'"),
    "a word": ("prior_pipeline/prior", {"nhead": "24"}, "nhead must be .*, got '24'"),
    "a yes": ("prior_pipeline/prior", {"nhead": True}, "nhead must be .*, got 'True'"),
    "a fraction": ("prior_pipeline/prior", {"depth": 2.5}, "depth must be .*, got '2.5'"),
    "no number": ("prior_pipeline/prior", {"dropout": float("nan")}, "dropout must be .*, got 'nan'"),
    "uneven heads": ("prior_pipeline/prior", {"nhead": 3}, r"the configuration expects \(15,\)"),
    "several dropouts": (
        "prior_pipeline/prior",
        {"dropout": [0.1, 0.2]},
        r"dropout must be .*, got '\[0\.1, 0\.2\]'",
    ),
    "no dropout for a level": (
        "decoder",
        {"dropout": [0.1, 0.2]},
        r"dropout must be one number, .* got \(0.1, 0.2\)",
    ),
    "a dropout that is none": (
        "decoder",
        {"dropout": [0.1, None, 0.1, 0.1]},
        "dropout must be .*, got 'None'",
    ),
    "a number for a list": ("decoder", {"blocks": 4}, "blocks must be a list .*, got '4'"),
    "a list for a number": ("decoder", {"c_cond": [4]}, r"c_cond must be .*, got '\[4\]'"),
    "lists of unequal length": ("decoder", {"blocks": [1, 1]}, "one entry for each of the 4 levels"),
    "unknown blocks": ("decoder", {"level_config": ["CT", "XTA", "CTA", "CTA"]}, "'XTA'"),
    "our own field": ("decoder", {"prediction": "velocity"}, "no field 'prediction'"),
    "negative channels": ("vqgan", {"latent_channels": -1}, "latent_channels must be at least 1, got -1"),
    "no codes": ("vqgan", {"num_vq_embeddings": 0}, "num_vq_embeddings must be at least 1, got 0"),
    "a scale of nothing": ("vqgan", {"scale_factor": 0.0}, "scale_factor must be a finite number .* got 0.0"),
    "endless blocks": (
        "decoder",
        {"level_config": ["C" * 10**6, "CTA", "CTA", "CTA"]},
        "at most 1000 blocks",
    ),
    "too many blocks": ("decoder", {"blocks": [512] * 4}, "at most 1000 blocks"),
    "negative text": ("decoder", {"clip_embd": -1}, "clip_embd must be at least 1, .* got -1"),
    "no frequencies": ("decoder", {"c_r": -1}, "c_r must be .* at least 4, got -1"),
    "more than can be counted": (
        "decoder",
        {"patch_size": 512, "c_in": 2**24, "c_out": 2**24},
        "the configuration expects",
    ),
    "sizes that overflow": (
        "decoder",
        {
            "patch_size": 512,
            "c_in": 2**24,
            "c_out": 2**24,
            "c_hidden": [2**24] * 4,
            "nhead": [-1, 1, 1, 1],
        },
        "is not a valid configuration",
    ),
    "all of it dropped": ("prior_pipeline/prior", {"dropout": 5.0}, "dropout must be from 0 to 1, got 5.0"),
    "an epsilon beyond numbers": ("text_encoder", {"layer_norm_eps": 10**400}, "integer of 401 digits"),
    "another class": ("decoder", {"_class_name": "UNet2DModel"}, "'UNet2DModel'"),
    "another text model": ("text_encoder", {"model_type": "t5"}, "model_type must be .*, got 't5'"),
    "absurd text model": (
        "text_encoder",
        {"num_hidden_layers": 10**9},
        "num_hidden_layers must be .*, got 1000000000",
    ),
    "no heads": ("text_encoder", {"num_attention_heads": 0}, "num_attention_heads must be .*, got 0"),
    "an activation of somebody's": (
        "text_encoder",
        {"hidden_act": "evil"},
        "hidden_act must be gelu or quick_gelu, got 'evil'",
    ),
    "a schedule of its own": ("scheduler", {"scaler": -1.0}, "scaler must be .* got -1.0"),
    "another scheduler": ("scheduler", {"beta_start": 0.1}, "beta_start"),
}


@pytest.mark.parametrize(("part", "changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_is_wrong_or_absurd_is_refused(copy, part, changes, message):
    edit(copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **changes)
    with pytest.raises(CheckpointError, match=message) as raised:
        (read_prior_folder(copy / "prior_pipeline") if "prior" in part else read_decoder_folder(copy))
    assert "\n" not in str(raised.value)
    assert part in str(raised.value)


MISSING = ("model_index.json", "decoder/config.json", "vqgan/diffusion_pytorch_model.safetensors")
MISSING += ("text_encoder/model.safetensors", "tokenizer/vocab.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{Path(name).parent}|{Path(name).name}"):
        read_decoder_folder(copy)


@pytest.mark.parametrize("name", [n for n in MISSING if not n.startswith("vqgan")])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe[1", b"[]", b"null"])
def test_a_damaged_file_is_named(copy, name, content):
    (copy / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{Path(name).parent}|{Path(name).name}"):
        read_decoder_folder(copy)


def test_a_truncated_file_is_refused(copy):
    path = copy / "decoder" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_decoder_folder(copy)


def test_a_key_too_many_or_too_few_is_refused(copy):
    path = copy / "vqgan" / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file(state | {"extra": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"'extra' is \(1,\) in the file, but .* expects no such"):
        read_decoder_folder(copy)
    state.pop("in_block.1.bias")
    safetensors.torch.save_file(state, path)
    with pytest.raises(
        CheckpointError, match=r"'in_block.1.bias' is missing in the file, but .* expects \(8,\)"
    ):
        read_decoder_folder(copy)


class WritesToDisk:
    def __reduce__(self):
        return Path.write_text, (Path("evil"), "was here")


def test_code_in_a_pickle_is_never_run(write_published, tmp_path, monkeypatch):
    root = write_published(tmp_path, pickled=True)
    monkeypatch.chdir(tmp_path)
    for part in ("decoder/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        kept = (root / part).read_bytes()
        for payload in (pickle.dumps(WritesToDisk()), kept[:200] + pickle.dumps(WritesToDisk())):
            (root / part).write_bytes(payload)
            with pytest.raises(CheckpointError, match=Path(part).name):
                read_decoder_folder(root)
        torch.save({"weight": WritesToDisk()}, root / part)
        with pytest.raises(CheckpointError, match="pickled objects, which are never loaded"):
            read_decoder_folder(root)
        (root / part).write_bytes(kept)
    assert not Path("evil").exists()
    # Unpickling this file runs its code.
    pickle.loads(pickle.dumps(WritesToDisk()))
    assert Path("evil").exists()


LINES = {
    "../prior_pipeline": False,
    "/etc": False,
    "https://example.org/prior": False,
    ".": False,
    "nowhere": False,
    "warp-ai/wuerstchen-prior": True,
    "prior_pipeline": True,
    "warp-ai/../prior": False,
    "x" * 10_000: False,
    "x" * 5000 + "/y": True,
    '"a\\0b"': False,
}


@pytest.mark.parametrize(("line", "allowed"), LINES.items(), ids=range(len(LINES)))
def test_the_prior_line_names_a_folder_inside_or_a_hub_name(copy, line, allowed):
    (copy.parent / "prior_pipeline").mkdir()
    (copy / "README.md").write_text(f"---\nprior:\n- {line}\n---\n")
    if allowed:
        assert str(linked_prior(copy)).endswith(line)
    else:
        with pytest.raises(CheckpointError, match="must name a folder inside"):
            linked_prior(copy)


def test_a_link_out_of_the_folder_is_not_a_folder_inside(copy, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (copy / "sly").symlink_to(tmp_path / "elsewhere")
    (copy / "README.md").write_text("---\nprior:\n- sly\n---\n")
    with pytest.raises(CheckpointError, match="must name a folder inside"):
        linked_prior(copy)


def test_a_link_to_itself_is_not_a_folder(copy):
    (copy / "loop").symlink_to("loop")
    (copy / "README.md").write_text("---\nprior: loop\n---\n")
    with pytest.raises(CheckpointError, match="must name a folder inside"):
        linked_prior(copy)


def test_an_endless_line_is_not_expanded(copy):
    """Ten lines of YAML expand to a list of 10**10 words."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11))]
    (copy / "README.md").write_text("\n".join(["---", *lines, "prior: *a10", "---"]))
    with pytest.raises(CheckpointError, match="it contains aliases"):
        linked_prior(copy)


@pytest.mark.parametrize("text", ["", "no front matter", "---\nlicense: mit\n---\n"])
def test_a_readme_without_the_line_says_what_to_do(copy, text):
    (copy / "README.md").write_text(text)
    with pytest.raises(CheckpointError, match=r"[Pp]ass the folder of Stage C as prior"):
        linked_prior(copy)


@pytest.mark.parametrize("text", ["---\nprior: [\n---\n", "---\nprior: 3\n---\n", "---\n- a\n---\n"])
def test_a_damaged_readme_is_named(copy, text):
    (copy / "README.md").write_text(text)
    with pytest.raises(CheckpointError, match=r"README\.md"):
        linked_prior(copy)


def test_the_halves_are_not_taken_for_one_another(published):
    with pytest.raises(CheckpointError, match="has no Stage C"):
        read_prior_folder(published)
    with pytest.raises(CheckpointError, match="has no Stage B"):
        read_decoder_folder(published / "prior_pipeline")


def test_more_tokens_than_the_text_encoder_knows_are_refused(copy):
    path = copy / "tokenizer" / "vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"one": 600, "more": 601}))
    with pytest.raises(CheckpointError, match="tokens, but the text encoder has"):
        read_decoder_folder(copy)


def test_a_token_past_the_end_is_refused_however_few_there_are(copy):
    path = copy / "tokenizer" / "vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"b</w>": 10**6}))
    with pytest.raises(CheckpointError, match="1000001 tokens, but the text encoder has"):
        read_decoder_folder(copy)


@pytest.mark.parametrize("length", ["77", 0, -5, [1], True])
def test_an_invalid_length_is_refused(copy, length):
    edit(copy / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(CheckpointError, match=r"model_max_length must be at least 3, got"):
        read_decoder_folder(copy)


def test_a_length_may_be_a_fraction_or_beyond_the_model(copy):
    for length, positions in ((4.5, 4), (1e30, 12)):
        edit(copy / "tokenizer" / "tokenizer_config.json", model_max_length=length)
        parts = read_decoder_folder(copy)
        assert parts.tokenizer.model_max_length == positions
        encoder = TextEncoder.from_transformers(parts.text_encoder, parts.tokenizer)
        assert encoder.encode(["a"]).states.shape[1] == positions


def test_a_tokenizer_that_cannot_read_a_letter_is_refused(write_published, tmp_path):
    root = write_published(tmp_path, 2026)
    path = root / "tokenizer" / "tokenizer.json"
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": words}))
    with pytest.raises(CheckpointError, match="is not a CLIP tokenizer"):
        read_decoder_folder(root)


def test_names_of_code_in_a_folder_are_passed_over(copy, published):
    """They could name Python files to run, or kernels to download."""
    evil = {"auto_map": {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    edit(copy / "tokenizer" / "tokenizer_config.json", **evil, tokenizer_class="Evil", vocab_file="evil")
    edit(copy / "text_encoder" / "config.json", **evil, _attn_implementation="evil/kernel")
    (copy / "tokenizer" / "evil.py").write_text("raise SystemExit")
    assert_equal(read_decoder_folder(copy).text_encoder, read_decoder_folder(published).text_encoder)


@pytest.fixture
def write_variant(write_published, tmp_path):
    """Writes the pipelines in half precision with diffusers, as a variant with this name."""

    def write(variant="fp16", shard_size="10GB", legacy=False) -> Path:
        root = write_published(tmp_path / "v", 2026, shard_size=shard_size, variant=variant)
        for path in root.rglob("*.safetensors"):
            half = {
                key: t.half() for key, t in safetensors.torch.load_file(path).items() if t.is_floating_point()
            }
            others = {k: t for k, t in safetensors.torch.load_file(path).items() if not t.is_floating_point()}
            safetensors.torch.save_file(half | others, path, metadata={"format": "pt"})
        for index in root.rglob(f"*.index.{variant}.json") if legacy else ():
            # The names of shards and their index in diffusers up to 0.30.
            text = index.read_text()
            for path in index.parent.glob(f"*.{variant}-*.safetensors"):
                name = path.name.replace(f".{variant}-", "-").replace(
                    ".safetensors", f".{variant}.safetensors"
                )
                text = text.replace(path.name, name)
                path.rename(path.with_name(name))
            index.unlink()
            stem = index.name.removesuffix(f".index.{variant}.json")
            (index.parent / f"{stem}.{variant}.index.json").write_text(text)
        return root

    return write


SHARDS = {
    "whole": {},
    "in shards": {"shard_size": "10KB"},
    "in old shards": {"shard_size": "10KB", "legacy": True},
}


@pytest.mark.parametrize("how", SHARDS)
def test_a_folder_of_the_fp16_variant_alone_is_read(how, write_variant, published, tmp_path, capsys):
    root = write_variant(**SHARDS[how])
    names = [path.name for path in root.rglob("*.safetensors")]
    assert len(names) == 5 if how == "whole" else len(names) > 10
    assert all("fp16" in name for name in names)
    full = read_decoder_folder(published), read_prior_folder(published / "prior_pipeline")
    with pytest.warns(UserNotice, match=r"only the variant 'fp16' "):
        found = read_decoder_folder(root), read_prior_folder(root / "prior_pipeline")
    # No notice if the variant was requested.
    asked = (
        read_decoder_folder(root, variant="fp16", dtype=None),
        read_prior_folder(root / "prior_pipeline", variant="fp16", dtype=None),
    )
    for ours, same, theirs in zip(found, asked, full, strict=True):
        for part in ("decoder", "vqgan", "prior", "text_encoder"):
            if isinstance(getattr(theirs, part, None), torch.nn.Module):
                state, stored = getattr(ours, part).state_dict(), getattr(same, part).state_dict()
                for key, tensor in getattr(theirs, part).state_dict().items():
                    rounded = tensor.half() if tensor.is_floating_point() else tensor
                    assert torch.equal(state[key], rounded.to(tensor.dtype)), key
                    assert torch.equal(stored[key], rounded), key
                    assert stored[key].dtype == rounded.dtype
    with pytest.warns(UserNotice, match=r"only the variant 'fp16' "):
        cascade = read_model(root)
    assert torch.equal(cascade.prior.out[1].weight, found[1].prior.out[1].weight)
    assert main(["convert", str(root), str(tmp_path / "native"), "--layout", "native"]) == 0
    assert "Warning: " in (said := capsys.readouterr().err)  # a command prints notices itself
    assert "only the variant 'fp16' " in said


def test_full_weights_are_preferred_to_variants(write_variant, copy):
    half = write_variant()
    for path in half.rglob("*.fp16.safetensors"):
        shutil.copy(path, copy / path.relative_to(half))
    full, rounded = read_decoder_folder(copy), read_decoder_folder(copy, variant="fp16")
    weight = full.decoder.clip_mapper.weight
    assert not torch.equal(weight, rounded.decoder.clip_mapper.weight)
    assert torch.equal(weight.half().float(), rounded.decoder.clip_mapper.weight)
    assert_equal(read_decoder_folder(copy, variant="bf16").decoder, full.decoder)
    assert len(weight_files(copy)) == 5


def test_half_precision_is_preferred_among_several_variants(write_variant):
    root = write_variant("non_ema")
    with pytest.warns(UserNotice, match="only the variant 'non_ema' "):
        expected = read_decoder_folder(root)
    path = root / "decoder" / "diffusion_pytorch_model.non_ema.safetensors"
    shutil.copy(path, path.with_name("diffusion_pytorch_model.ema-2.safetensors"))
    with pytest.raises(CheckpointError, match=r"several variants: ema-2, non_ema\. Remove all but one"):
        read_network(root / "decoder", "decoder")
    assert_equal(read_network(root / "decoder", "decoder", variant="ema-2"), expected.decoder)
    shutil.copy(path, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.warns(UserNotice, match="only the variant 'fp16' "):
        assert_equal(read_network(root / "decoder", "decoder"), expected.decoder)
