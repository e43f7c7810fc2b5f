"""Loading pipelines from published folders and those that diffusers writes, and saving them."""

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

import wuerstchen.diffusers
from wuerstchen.checkpoints.layouts import convert, read_model
from wuerstchen.diffusers import (
    AutoPipelineForText2Image,
    DDPMWuerstchenScheduler,
    DiffusionPipeline,
    WuerstchenCombinedPipeline,
    WuerstchenDecoderPipeline,
    WuerstchenPriorPipeline,
    register,
)
from wuerstchen.errors import CheckpointError, UserError, UserNotice


@pytest.fixture(scope="module")
def published(write_published, tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "copy")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **given):
    run = {"height": 128, "width": 128, "prior_num_inference_steps": 2, "num_inference_steps": 2}
    generator = torch.Generator().manual_seed(0)
    return quiet(pipe)("a cat", **run, generator=generator, output_type="latent", **given).images


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("year", [2023, 2026])
def test_a_loaded_folder_gives_the_same_as_diffusers(year, write_published, diffusers_pipelines, tmp_path):
    """From a folder that names its prior, as published and as diffusers writes today."""
    root = write_published(tmp_path, year=year)
    theirs = diffusers_pipelines
    priors = {f"prior_{name}": part for name, part in theirs.prior.components.items()}
    expected = generate(diffusers.WuerstchenCombinedPipeline(**theirs.decoder.components, **priors))
    for pipe in (
        AutoPipelineForText2Image.from_pretrained(root),
        WuerstchenCombinedPipeline.from_pretrained(str(root), use_safetensors=True, low_cpu_mem_usage=True),
    ):
        torch.testing.assert_close(
            generate(pipe), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )


def test_the_base_class_loads_the_pipeline_of_a_folder(published, tmp_path):
    decoder = DiffusionPipeline.from_pretrained(published)
    prior = DiffusionPipeline.from_pretrained(published / "prior_pipeline")
    assert type(decoder) is WuerstchenDecoderPipeline
    assert type(prior) is WuerstchenPriorPipeline
    AutoPipelineForText2Image.from_pretrained(published).save_pretrained(tmp_path / "combined")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "combined")) is WuerstchenCombinedPipeline
    assert all(not network.training for network in decoder._networks().values())


def test_all_networks_are_loaded_in_the_dtype_asked_for(published):
    pipe = AutoPipelineForText2Image.from_pretrained(published, torch_dtype=torch.float16)
    assert {network.dtype for network in (pipe, pipe.prior_pipe, pipe.text_encoder)} == {torch.float16}
    pipe = AutoPipelineForText2Image.from_pretrained(published, dtype=torch.float16)  # its name since 0.42
    assert {pipe.prior_pipe.dtype, pipe.text_encoder.dtype} == {torch.float16}
    pipe = AutoPipelineForText2Image.from_pretrained(published, prior_torch_dtype=torch.bfloat16)
    assert (pipe.dtype, pipe.prior_pipe.dtype) == (torch.float32, torch.bfloat16)
    assert generate(pipe).isfinite().all()


def test_components_and_numbers_given_are_used_and_not_read(copy):
    whole = AutoPipelineForText2Image.from_pretrained(copy)
    shutil.rmtree(copy / "vqgan")
    shutil.rmtree(copy / "prior_pipeline" / "prior")
    scheduler = DDPMWuerstchenScheduler(s=0.01)
    pipe = AutoPipelineForText2Image.from_pretrained(
        copy,
        vqgan=whole.vqgan,
        scheduler=scheduler,
        prior_prior=whole.prior_prior,
        prior_text_encoder=None,
        prior_latent_mean=40.0,
    )
    assert pipe.vqgan is whole.vqgan
    assert pipe.scheduler is scheduler
    assert pipe.prior_prior is whole.prior_prior
    assert pipe.prior_text_encoder is None
    assert pipe.prior_pipe.config.latent_mean == 40.0


def test_with_a_whole_prior_no_other_is_loaded(copy):
    prior = WuerstchenPriorPipeline.from_pretrained(copy / "prior_pipeline")
    (copy / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"README\.md has no prior: entry"):
        AutoPipelineForText2Image.from_pretrained(copy)
    parts = {f"prior_{name}": part for name, part in prior.components.items()}
    assert AutoPipelineForText2Image.from_pretrained(copy, **parts).prior_prior is prior.prior
    decoder = WuerstchenDecoderPipeline.from_pretrained(copy)
    assert AutoPipelineForText2Image.from_pipe(decoder, **parts).decoder is decoder.decoder
    with pytest.raises(UserError, match=r"Components are missing: prior_tokenizer, "):
        AutoPipelineForText2Image.from_pipe(decoder)
    with pytest.raises(UserError, match="A prior alone"):
        AutoPipelineForText2Image.from_pipe(prior)


def test_pipelines_share_their_parts(published):
    pipe = AutoPipelineForText2Image.from_pretrained(published)
    prior, decoder = WuerstchenPriorPipeline.from_pipe(pipe), WuerstchenDecoderPipeline.from_pipe(pipe)
    assert prior.components == pipe.prior_pipe.components
    assert decoder.components == pipe.decoder_pipe.components
    assert type(DiffusionPipeline.from_pipe(prior)) is WuerstchenPriorPipeline
    parts = {f"prior_{name}": part for name, part in prior.components.items()}
    again = WuerstchenCombinedPipeline.from_pipe(decoder, **parts, prior_latent_mean=40.0)
    assert again.components == pipe.components
    assert again.prior_pipe.config.latent_mean == 40.0
    for name in ("dtype", "torch_dtype"):
        assert WuerstchenDecoderPipeline.from_pipe(pipe, **{name: torch.float16}).dtype == torch.float16
        pipe.to(torch.float32)
    with pytest.raises(UserError, match="Components are missing: decoder, vqgan"):
        WuerstchenDecoderPipeline.from_pipe(prior)
    with pytest.raises(TypeError, match="unexpected keyword argument 'unet'"):
        WuerstchenDecoderPipeline.from_pipe(pipe, unet=None)


def test_networks_have_a_device_and_a_dtype(published):
    pipe = AutoPipelineForText2Image.from_pretrained(published, dtype=torch.bfloat16)
    for network in (
        pipe.prior_prior,
        pipe.decoder,
        pipe.vqgan,
        torch.compile(pipe.prior_prior, backend="eager"),
    ):
        assert (network.device, network.dtype) == (torch.device("cpu"), torch.bfloat16)


def test_the_numbers_in_a_folder_are_used(copy):
    edit(copy / "model_index.json", latent_dim_scale=16.0)
    edit(copy / "prior_pipeline" / "model_index.json", latent_mean=2.0, resolution_multiple=64.0)
    edit(copy / "prior_pipeline" / "scheduler" / "scheduler_config.json", s=0.02)
    pipe = AutoPipelineForText2Image.from_pretrained(copy)
    assert dict(pipe.config) == {
        "latent_dim_scale": 16.0,
        "prior_latent_mean": 2.0,
        "prior_latent_std": 1.0,
        "prior_resolution_multiple": 64.0,
    }
    assert pipe.prior_scheduler.config.s == 0.02
    with pytest.raises(UserError, match="cannot be stored in a WuerstchenCombinedPipeline"):
        pipe.save_pretrained(copy / "again")
    again = AutoPipelineForText2Image.from_pipe(pipe)
    assert dict(again.config) == dict(pipe.config)


README = Path(__file__).parent.parent.parent / "README.md"

APART = """
from wuerstchen.diffusers import WuerstchenDecoderPipeline, WuerstchenPriorPipeline

device, dtype, num_images_per_prompt, negative_prompt = "cuda", torch.float16, 2, ""
prior_pipeline = WuerstchenPriorPipeline.from_pretrained(
    "warp-ai/wuerstchen-prior", torch_dtype=dtype
).to(device)
decoder_pipeline = WuerstchenDecoderPipeline.from_pretrained(
    "warp-ai/wuerstchen", torch_dtype=dtype
).to(device)
prior_output = prior_pipeline(
    prompt=caption,
    height=1024,
    width=1536,
    timesteps=DEFAULT_STAGE_C_TIMESTEPS,
    negative_prompt=negative_prompt,
    guidance_scale=4.0,
    num_images_per_prompt=num_images_per_prompt,
)
apart = decoder_pipeline(
    image_embeddings=prior_output.image_embeddings,
    prompt=caption,
    negative_prompt=negative_prompt,
    guidance_scale=0.0,
    output_type="pil",
).images
assert [image.size for image in images] == [(128, 256)] * 2
assert [image.size for image in apart] == [(256, 128)] * 2
assert {part.dtype for part in (pipe.prior_prior, pipe.decoder, pipe.vqgan)} == {torch.float16}
"""

COMPILED = """
def generate():
    generator = torch.Generator(device="cuda").manual_seed(0)
    return pipe(caption, 128, 128, 2, num_inference_steps=2, generator=generator, output_type="pt").images

pipe.to(torch.float32)
expected = generate()
pipe.prior_prior = torch.compile(pipe.prior_prior, backend="eager", fullgraph=True)
pipe.decoder = torch.compile(pipe.decoder, backend="eager", fullgraph=True)
torch.testing.assert_close(generate(), expected)

# As on a GPU: contexts are not compiled, so they are those of fused blocks.
from wuerstchen.models import blocks, decoder
from wuerstchen.models.fused import blocks as fused

def can_fuse(x):
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()

for module in (blocks, decoder, fused):
    module.can_fuse = can_fuse
torch.testing.assert_close(generate(), expected)
"""


@pytest.mark.parametrize(
    "compiled", ["", pytest.param(COMPILED, marks=pytest.mark.slow)], ids=["", "compiled"]
)
def test_published_snippets_run_from_the_hubs_cache(published, tmp_path, compiled):
    """Those of the model's card, unchanged except for imports, device and sizes.

    In a process of its own: the types of arguments, checked in tests, do not compile.
    """
    for name, part in (("wuerstchen", ""), ("wuerstchen-prior", "prior_pipeline")):
        repository, commit = tmp_path / f"models--warp-ai--{name}", "c" * 40
        snapshot = shutil.copytree(published / part, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        for network, last in (("prior", "out"), ("decoder", "clf")):
            for path in (snapshot / network).glob("*.safetensors"):
                state = safetensors.torch.load_file(path)
                # Keeps divisors away from 0, so that nothing overflows fp16.
                tamed = {key: 0.1 * value if key.startswith(last) else value for key, value in state.items()}
                safetensors.torch.save_file(tamed, path, metadata={"format": "pt"})
    snapshot = tmp_path / "models--warp-ai--wuerstchen" / "snapshots" / commit
    shutil.rmtree(snapshot / "prior_pipeline")
    (snapshot / "README.md").write_text(
        "---\nlicense: mit\nprior:\n- warp-ai/wuerstchen-prior\n---\n# Card\n"
    )

    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (together,) = [snippet for snippet in snippets if "wuerstchen.diffusers" in snippet]
    code = (
        (together + APART + compiled).replace('"cuda"', '"cpu"').replace("1024", "128").replace("1536", "256")
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(wuerstchen.__file__).parent.parent)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_options_apply_to_downloads(published, monkeypatch):
    """The prior's repository is loaded with the decoder's options, except for the revision."""
    calls = []

    def fetch(name, **settings):
        calls.append((str(name), settings))
        if Path(name).exists():
            return Path(name)
        return published if name == "warp-ai/wuerstchen" else published / "prior_pipeline"

    monkeypatch.setattr("wuerstchen.diffusers.loading.local_folder", fetch)
    monkeypatch.setattr(
        "wuerstchen.diffusers.combined.linked_prior", lambda folder: "warp-ai/wuerstchen-prior"
    )
    AutoPipelineForText2Image.from_pretrained(
        "warp-ai/wuerstchen", revision="abc", cache_dir="/cache", local_files_only=True, token="t"
    )
    settings = {"cache_dir": "/cache", "local_files_only": True, "token": "t"}
    settings |= {"force_download": False, "variant": None}
    assert calls == [
        ("warp-ai/wuerstchen", {"revision": "abc", **settings}),
        ("warp-ai/wuerstchen-prior", {"revision": None, **settings}),
    ]
    calls.clear()
    AutoPipelineForText2Image.from_pretrained("warp-ai/wuerstchen", prior_revision="def", prior_token=False)
    assert calls[1][1]["revision"] == "def"
    assert calls[1][1]["token"] is False


def test_a_scheduler_is_read_from_its_folder(published, tmp_path):
    scheduler = DDPMWuerstchenScheduler.from_pretrained(published, subfolder="scheduler")
    assert dict(scheduler.config) == {"scaler": 1.0, "s": 0.008}
    options = {"force_download": False, "proxies": None, "mirror": None, "user_agent": {}}
    scheduler = DDPMWuerstchenScheduler.from_pretrained(
        published, subfolder="scheduler", s=0.02, local_files_only=None, return_unused_kwargs=False, **options
    )
    theirs = diffusers.DDPMWuerstchenScheduler.from_pretrained(
        published, subfolder="scheduler", s=0.02, **options
    )
    assert (scheduler.config.s, scheduler.config.scaler) == (theirs.config.s, theirs.config.scaler)
    for wrong, error in (({"proxies": {"https": "a"}}, UserError), ({"bogus": 1}, TypeError)):
        with pytest.raises(error):
            DDPMWuerstchenScheduler.from_pretrained(published, subfolder="scheduler", **wrong)
    DDPMWuerstchenScheduler(scaler=2.0).save_pretrained(tmp_path)
    assert DDPMWuerstchenScheduler.from_pretrained(tmp_path).config.scaler == 2.0


def test_a_saved_pipeline_gives_the_same(published, tmp_path):
    pipe = AutoPipelineForText2Image.from_pretrained(published)
    expected = generate(pipe)
    pipe.prior_prior = torch.compile(pipe.prior_prior, backend="eager")
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    pipe.save_pretrained(tmp_path / "combined")
    assert torch.equal(generate(AutoPipelineForText2Image.from_pretrained(tmp_path / "combined")), expected)
    pipe.prior_pipe.save_pretrained(tmp_path / "prior")
    pipe.decoder_pipe.save_pretrained(str(tmp_path / "decoder"))
    prior = WuerstchenPriorPipeline.from_pretrained(tmp_path / "prior")
    decoder = WuerstchenDecoderPipeline.from_pretrained(tmp_path / "decoder")
    parts = {f"prior_{name}": part for name, part in prior.components.items()}
    assert torch.equal(generate(AutoPipelineForText2Image.from_pipe(decoder, **parts)), expected)


def test_saving_again_replaces_a_pipeline_and_nothing_else(copy, tmp_path):
    pipe = WuerstchenPriorPipeline.from_pretrained(copy / "prior_pipeline")
    folder = tmp_path / "run"
    (folder / "prior").mkdir(parents=True)
    (folder / "log.txt").write_text("mine")
    (folder / "prior" / "notes.txt").write_text("mine too")
    stale = folder / "prior" / "diffusion_pytorch_model.safetensors.index.json"
    stale.write_text("{}")
    with torch.no_grad():
        pipe.prior.projection.weight.add_(1)
    for _ in range(2):
        pipe.save_pretrained(folder)
    again = WuerstchenPriorPipeline.from_pretrained(folder)
    assert torch.equal(again.prior.projection.weight, pipe.prior.projection.weight)
    assert (folder / "log.txt").read_text() == "mine"
    assert (folder / "prior" / "notes.txt").read_text() == "mine too"
    assert not stale.exists()
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set()
    with pytest.raises(CheckpointError, match="is a file"):
        pipe.save_pretrained(folder / "log.txt")


def test_a_decoder_keeps_the_name_of_its_prior_on_the_hub(copy, tmp_path):
    (copy / "README.md").write_text("---\nprior:\n- someone/some-prior\n---\n")
    WuerstchenDecoderPipeline.from_pretrained(copy).save_pretrained(tmp_path / "saved")
    assert "- someone/some-prior\n" in (tmp_path / "saved" / "README.md").read_text()
    (copy / "README.md").write_text("---\nprior:\n- prior_pipeline\n---\n")
    WuerstchenDecoderPipeline.from_pretrained(copy).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / "README.md").exists()


def test_a_missing_variant_is_named(published):
    with pytest.warns(UserNotice, match=r"has no variant 'fp16'\. Its default weights are read"):
        pipe = WuerstchenDecoderPipeline.from_pretrained(published, variant="fp16", torch_dtype=torch.float16)
    assert pipe.dtype == torch.float16
    with pytest.raises(UserError, match="variant is not a valid name"):
        WuerstchenDecoderPipeline.from_pretrained(published, variant="../fp16")


def test_pickles_can_be_refused(write_published, tmp_path):
    root = write_published(tmp_path, pickled=True)
    assert type(DiffusionPipeline.from_pretrained(root)) is WuerstchenDecoderPipeline
    with pytest.raises(CheckpointError, match=r"has no \.safetensors files, which use_safetensors=True"):
        DiffusionPipeline.from_pretrained(root, use_safetensors=True)


@pytest.mark.parametrize(
    ("kind", "inside", "settings", "error", "message"),
    [
        (
            AutoPipelineForText2Image,
            "prior_pipeline",
            {},
            CheckpointError,
            "holds only a WuerstchenPriorPipeline",
        ),
        (WuerstchenDecoderPipeline, "prior_pipeline", {}, CheckpointError, "has no Stage B"),
        (WuerstchenPriorPipeline, "", {}, CheckpointError, "has no Stage C"),
        (DiffusionPipeline, "vqgan", {}, CheckpointError, "does not exist"),
        (DiffusionPipeline, "README.md", {}, CheckpointError, "is not a folder"),
        (DiffusionPipeline, "nowhere/at/all", {}, CheckpointError, "does not exist"),
        (DiffusionPipeline, "", {"torch_dtype": "float16"}, TypeError, "'torch_dtype' must be a floating"),
        (DiffusionPipeline, "", {"torch_dtype": torch.int8}, TypeError, "'torch_dtype' must be a floating"),
        (
            DiffusionPipeline,
            "",
            {"safety_checker": None},
            TypeError,
            r"argument 'safety_checker'\. The components that can be passed are",
        ),
        (
            DiffusionPipeline,
            "",
            {"prior_prior": None},
            TypeError,
            "unexpected keyword argument 'prior_prior'",
        ),
        (AutoPipelineForText2Image, "", {"prior_c": 3}, TypeError, "unexpected keyword argument 'prior_c'"),
    ],
)
def test_invalid_arguments_are_refused(kind, inside, settings, error, message, published):
    with pytest.raises(error, match=message):
        kind.from_pretrained(published / inside, **settings)


@pytest.mark.parametrize("settings", [{"safe_serialization": False}, {"variant": "fp16"}])
def test_unsupported_ways_to_save_are_refused(settings, published, tmp_path):
    pipe = WuerstchenDecoderPipeline.from_pretrained(published)
    with pytest.raises(UserError, match="Only safetensors without a variant"):
        pipe.save_pretrained(tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


OLD_PATH = "diffusers.pipelines.wuerstchen"


@pytest.fixture
def as_installed(monkeypatch):
    """diffusers without registered classes, restored after the test."""
    for name in [name for name in sys.modules if name.startswith(OLD_PATH)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(diffusers.pipelines, "wuerstchen", raising=False)
    for name in ("WuerstchenPrior", "WuerstchenDiffNeXt", "PaellaVQModel"):
        monkeypatch.delitem(vars(diffusers), name, raising=False)
    yield
    for name in [name for name in sys.modules if name.startswith(OLD_PATH)]:
        del sys.modules[name]
    vars(diffusers.pipelines).pop("wuerstchen", None)
    for name in ("WuerstchenPrior", "WuerstchenDiffNeXt", "PaellaVQModel"):
        vars(diffusers).pop(name, None)


@pytest.mark.parametrize("year", [2023, 2026])
def test_diffusers_own_loaders_find_the_folders_again(
    year, write_published, diffusers_pipelines, as_installed, tmp_path
):
    root = write_published(tmp_path, year=year)
    with pytest.raises((ValueError, AttributeError)):
        diffusers.DiffusionPipeline.from_pretrained(root)
    register()
    register()
    for kind, folder, part in (
        (diffusers.DiffusionPipeline, root, "decoder"),
        (diffusers.WuerstchenPriorPipeline, root / "prior_pipeline", "prior"),
    ):
        network = getattr(kind.from_pretrained(folder), part)
        expected = getattr(getattr(diffusers_pipelines, part), part)
        assert type(network) is type(expected)
        assert all(
            torch.equal(*pair) for pair in zip(network.parameters(), expected.parameters(), strict=True)
        )


def test_imports_from_the_old_path_give_the_same_classes(as_installed):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(OLD_PATH)
    register()
    old = importlib.import_module(f"{OLD_PATH}.modeling_wuerstchen_prior")
    assert old is importlib.import_module(
        "diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior"
    )
    assert importlib.import_module(OLD_PATH).DEFAULT_STAGE_C_TIMESTEPS


def test_registering_needs_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="diffusers is not installed"):
        register()


def test_the_names_are_those_of_diffusers():
    for name in wuerstchen.diffusers.__all__:
        assert hasattr(wuerstchen.diffusers, name)
    expected = {"WuerstchenPriorPipeline", "WuerstchenDecoderPipeline", "WuerstchenCombinedPipeline"}
    assert expected | {"AutoPipelineForText2Image", "DiffusionPipeline"} <= set(wuerstchen.diffusers.__all__)


KINDS = (WuerstchenPrior, WuerstchenDiffNeXt)
FORMER_TESTS = {
    # As in diffusers' tests of 2023 to 2025, prior and combined.
    "former tests": (
        {"c_in": 2, "c": 8, "depth": 2, "c_cond": 32, "c_r": 8, "nhead": 2},
        {
            "c_cond": 32,
            "c_hidden": [320],
            "nhead": [-1],
            "blocks": [4],
            "level_config": ["CT"],
            "clip_embd": 32,
            "inject_effnet": [False],
        },
    ),
    "a dropout for each level": (
        {"c_in": 3, "c": 10, "depth": 1, "c_cond": 32, "c_r": 8, "nhead": 3},
        {
            "c_cond": 16,
            "c_hidden": [8, 16],
            "nhead": [1, 2],
            "blocks": [1, 1],
            "level_config": ["TCA", "CTA"],
            "clip_embd": 32,
            "inject_effnet": [True, True],
            "effnet_embd": 3,
            "patch_size": 1,
            "kernel_size": 5,
            "dropout": [0.0, 0.2],
        },
    ),
}


@pytest.mark.parametrize("name", FORMER_TESTS)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_other_shapes_give_the_same_as_diffusers(name, clip_tokenizer, randomise, tmp_path):
    """Pipelines that diffusers saves, loads and runs, with networks of other shapes."""
    shapes = FORMER_TESTS[name]
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000
    )
    scheduler = diffusers.DDPMWuerstchenScheduler()
    networks = [kind(**shape).eval() for kind, shape in zip(KINDS, shapes, strict=True)]
    for network in networks:
        randomise(network)
        for key, tensor in network.named_parameters():
            tensor.data.mul_(0.1 if key.startswith(("out.", "clf.")) else 1.0)
    vqgan = randomise(PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=16)).eval()
    parts = (clip_tokenizer, randomise(CLIPTextModel(text)).eval())
    prior = quiet(diffusers.WuerstchenPriorPipeline(*parts, networks[0], scheduler))
    decoder = quiet(diffusers.WuerstchenDecoderPipeline(*parts, networks[1], scheduler, vqgan))
    decoder.save_pretrained(tmp_path)
    prior.save_pretrained(tmp_path / "prior_pipeline")
    (tmp_path / "README.md").write_text("---\nprior:\n- prior_pipeline\n---\n")

    def run(prior, decoder):
        generator = torch.Generator().manual_seed(0)
        embeddings = prior("horse", 128, 128, 2, guidance_scale=4.0, generator=generator).image_embeddings
        assert embeddings.shape == (1, shapes[0]["c_in"], 3, 3)
        return embeddings, decoder(embeddings, "horse", 2, generator=generator, output_type="pt").images

    ours = AutoPipelineForText2Image.from_pretrained(tmp_path)
    results = run(quiet(ours.prior_pipe), quiet(ours.decoder_pipe))
    for found, expected in zip(results, run(prior, decoder), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    # The same folder loaded in other ways, and saved again.
    cascade = read_model(tmp_path)
    assert cascade.decoder.config == ours.decoder.config
    convert(tmp_path, tmp_path / "native", "native")
    convert(tmp_path / "native", tmp_path / "again", "diffusers")
    again = AutoPipelineForText2Image.from_pretrained(tmp_path / "again")
    assert (again.decoder.config, again.prior_prior.config) == (ours.decoder.config, ours.prior_prior.config)
    assert torch.equal(generate(again), generate(ours))


@pytest.fixture(scope="module")
def half(write_published, tmp_path_factory):
    """The same pipelines as the fp16 variant alone."""
    root = write_published(tmp_path_factory.mktemp("half"), 2026, variant="fp16")
    for path in root.rglob("*.safetensors"):
        state = {key: t.half() if t.is_floating_point() else t for key, t in load_file(path).items()}
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    return root


def dtypes(pipe) -> dict:
    return {name: network.dtype for name, network in pipe._networks().items()}


def test_the_fp16_variant_is_loaded(half):
    both = AutoPipelineForText2Image.from_pretrained(half, variant="fp16", torch_dtype=torch.float16)
    assert set(dtypes(both).values()) == {torch.float16}
    with pytest.warns(UserNotice, match="only the variant 'fp16'"):
        found = AutoPipelineForText2Image.from_pretrained(half)
    assert torch.equal(found.decoder.clip_mapper.weight, both.decoder.clip_mapper.weight.float())
    assert torch.equal(found.prior_prior.projection.weight, both.prior_prior.projection.weight.float())


def test_each_component_is_loaded_in_the_dtype_asked_for(published, half):
    given = {"prior": torch.bfloat16, "text_encoder": torch.float16, "prior_text_encoder": torch.float64}
    pipe = AutoPipelineForText2Image.from_pretrained(published, torch_dtype=given)
    assert dtypes(pipe) == {
        "decoder": torch.float32,
        "vqgan": torch.float32,
        "text_encoder": torch.float16,
        "prior_prior": torch.bfloat16,
        "prior_text_encoder": torch.float64,
    }
    given = {"prior_prior": torch.float16, "default": torch.bfloat16}
    pipe = AutoPipelineForText2Image.from_pretrained(published, dtype=given)
    assert dtypes(pipe).pop("prior_prior") == torch.float16
    assert set(dtypes(pipe).values()) == {torch.float16, torch.bfloat16}
    pipe = WuerstchenPriorPipeline.from_pretrained(
        published / "prior_pipeline", torch_dtype={"prior": "auto"}
    )
    assert dtypes(pipe) == {"prior": torch.float32, "text_encoder": torch.float32}
    pipe = AutoPipelineForText2Image.from_pretrained(half, torch_dtype="auto", variant="fp16")
    assert set(dtypes(pipe).values()) == {torch.float16}
    with pytest.raises(
        UserError, match=r"torch_dtype has an unknown network: 'unet'\. The networks are prior, decoder"
    ):
        AutoPipelineForText2Image.from_pretrained(published, torch_dtype={"unet": torch.float16})
    with pytest.raises(TypeError, match="'torch_dtype' must be a floating"):
        AutoPipelineForText2Image.from_pretrained(published, torch_dtype={"default": "half"})


HARMLESS = {
    "device_map": None,
    "max_memory": {0: "4GB"},
    "offload_folder": "/tmp/offload",
    "offload_state_dict": True,
    "low_cpu_mem_usage": False,
    "force_download": True,
    "proxies": None,
    "mirror": None,
    "quantization_config": None,
    "custom_pipeline": None,
    "custom_revision": None,
    "trust_remote_code": True,
    "use_onnx": False,
    "provider": None,
    "use_flashpack": False,
    "disable_mmap": True,
    "use_auth_token": None,
    "output_loading_info": False,
    "load_connected_pipeline": True,
}


def test_options_without_effect_are_accepted(published):
    plain = AutoPipelineForText2Image.from_pretrained(published)
    pipe = AutoPipelineForText2Image.from_pretrained(published, **HARMLESS)
    assert torch.equal(generate(pipe), generate(plain))
    assert pipe.hf_device_map is None
    assert WuerstchenDecoderPipeline.from_pipe(pipe, custom_pipeline=None).decoder is pipe.decoder


def test_the_options_are_those_of_diffusers(published):
    """A new version of diffusers may have new ones."""
    source = inspect.getsource(diffusers.DiffusionPipeline.from_pretrained)
    names = set(re.findall(r'kwargs\.pop\("(\w+)"', source))
    assert {"device_map", "max_memory", "variant", "use_flashpack"} <= names
    with pytest.raises(TypeError, match="unexpected keyword argument 'bogus'"):
        AutoPipelineForText2Image.from_pretrained(published, bogus=1, **dict.fromkeys(names))


REFUSED = {
    "proxies": ({"https": "127.0.0.1:1"}, "proxies is not supported.*Set HTTPS_PROXY"),
    "mirror": ("tuna", "mirror is not supported.*Set HF_ENDPOINT"),
    "custom_pipeline": ("clip_guided", "Code of other pipelines is never fetched or run"),
    "quantization_config": ({"load_in_8bit": True}, "Networks are not quantized when loaded"),
    "use_onnx": (True, "ONNX is not read"),
    "from_flax": (True, "Flax weights are not read"),
    "use_flashpack": (True, "FlashPack is not read"),
    "dduf_file": ("a.dduf", "DDUF files are not read"),
    "device_map": ("auto", r"device_map='auto' is not supported\. Components are not split"),
    "max_memory": ({0: "4GB"}, r"max_memory is not supported with device_map"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_be_used_are_refused_with_the_reason(name, published):
    value, message = REFUSED[name]
    given = {"device_map": "cpu", name: value}
    with pytest.raises(UserError, match=message):
        DiffusionPipeline.from_pretrained(published, **given)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}])
def test_a_device_map_puts_the_whole_pipeline_somewhere(device_map, published):
    pipe = AutoPipelineForText2Image.from_pretrained(published, device_map=device_map)
    names = ("text_encoder", "decoder", "vqgan", "prior_text_encoder", "prior_prior")
    assert pipe.hf_device_map == dict.fromkeys(names, "cpu")
    pipe.reset_device_map()
    assert pipe.hf_device_map is None


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"prior": 0, "decoder": 1}, "Components are not split between devices"),
        ("sequential", "Components are not split between devices"),
        ("nowhere", "device 'nowhere' is not available"),
        (3.5, "device_map must be 'balanced' or a device, got a float"),
    ],
)
def test_device_maps_that_cannot_be_used(device_map, message, published):
    with pytest.raises(UserError, match=message):
        DiffusionPipeline.from_pretrained(published, device_map=device_map)


def test_balanced_is_the_first_gpu(published, monkeypatch):
    moved = []
    monkeypatch.setattr(DiffusionPipeline, "to", lambda pipe, device: moved.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    DiffusionPipeline.from_pretrained(published, device_map="balanced")
    assert moved == [torch.device("cuda")]
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a GPU, and there is none"):
        DiffusionPipeline.from_pretrained(published, device_map="balanced")


def test_the_base_class_loads_the_combined_pipeline_on_request(published):
    pipe = DiffusionPipeline.from_pretrained(published, load_connected_pipeline=True)
    assert type(pipe) is WuerstchenCombinedPipeline


def test_the_prior_can_be_given_by_its_folder(copy, published):
    """As the message about a missing prior says: a pipeline, or only its network."""
    expected = generate(AutoPipelineForText2Image.from_pretrained(published))
    for place in (published / "prior_pipeline", str(published / "prior_pipeline" / "prior")):
        assert torch.equal(generate(AutoPipelineForText2Image.from_pretrained(copy, prior=place)), expected)
    (copy / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"[Pp]ass the folder of Stage C as prior"):
        AutoPipelineForText2Image.from_pretrained(copy)
    pipe = AutoPipelineForText2Image.from_pretrained(copy, prior=published / "prior_pipeline")
    assert torch.equal(generate(pipe), expected)
    with pytest.raises(UserError, match="prior must be a folder or a name on the hub, got a Prior"):
        AutoPipelineForText2Image.from_pretrained(copy, prior=pipe.prior_prior)


def test_pushing_to_the_hub_is_refused(published, tmp_path):
    pipe = WuerstchenDecoderPipeline.from_pretrained(published)
    with pytest.raises(UserError, match="push_to_hub is not supported"):
        pipe.save_pretrained(tmp_path / "new", push_to_hub=True, repo_id="a/b")
    with pytest.raises(TypeError, match="unexpected keyword argument 'bogus'"):
        pipe.save_pretrained(tmp_path / "new", bogus=True)
    assert not (tmp_path / "new").exists()
    pipe.save_pretrained(tmp_path / "new", push_to_hub=False, token=None)
    assert (tmp_path / "new" / "model_index.json").is_file()
