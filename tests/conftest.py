"""What several test files share."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import safetensors.torch
import tokenizers
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from wuerstchen.checkpoints import backbones
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.models.cascade import PUBLISHED_V1, Cascade, CascadeSettings
from wuerstchen.models.compressor import Compressor
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.paella import Paella
from wuerstchen.models.prior import Prior
from wuerstchen.models.vqgan import VQGAN
from wuerstchen.pipeline import BUNDLED

from .configurations import (
    SMALL_COMPRESSOR,
    SMALL_DECODER,
    SMALL_PAELLA,
    SMALL_PRIOR,
    SMALL_STATISTICS,
    SMALL_VQGAN,
    write_model,
)


def _fill(name: str, tensor: torch.Tensor) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    draw = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if name.endswith("running_var"):
        return draw.abs() + 0.5
    fan_in = max(tensor[0].numel(), 1) if tensor.ndim > 1 else 25
    return draw / fan_in**0.5


@pytest.fixture
def script(monkeypatch) -> Callable[[str], ModuleType]:
    """Imports a file of ``benchmarks`` or ``scripts``, such as ``benchmarks/speedrun``."""

    def imported(place: str) -> ModuleType:
        folder, name = place.split("/")
        monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / folder))
        return importlib.import_module(name)

    return imported


@pytest.fixture
def randomise():
    """Fills every weight and statistic of a module, those that start at zero too, by its name.

    Parts that start at zero would hide errors behind them.
    """

    def fill(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(_fill(name, tensor))
        return module

    return fill


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def packaged_backbones_are_read_once():
    """Many tests start from Lite0, whose old format takes time to check."""
    read, found = backbones.read_tensors_of, {}

    def remembered(path: Path) -> dict[str, torch.Tensor]:
        if path.name not in (backbones.LITE0_FILE, backbones.LITE1_FILE):
            return read(path)
        if path not in found:
            found[path] = read(path)
        return dict(found[path])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "read_tensors_of", remembered)
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Lists of data sets are kept in the test's own folder."""
    if "WUERSTCHEN_CACHE" not in os.environ:
        monkeypatch.setenv("WUERSTCHEN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def foreign_defaults():
    """Sets torch's default dtype, and a default device on which nothing can be computed."""

    @contextlib.contextmanager
    def use(dtype: torch.dtype) -> Iterator[None]:
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                yield
        finally:
            torch.set_default_dtype(torch.float32)

    return use


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖ over the whole tensor, in fp64."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


@pytest.fixture(name="relative_error")
def relative_error_fixture():
    return relative_error


@pytest.fixture
def assert_same_gradients():
    """Compares parameter by parameter. What is zero in exact arithmetic (a key's bias) is only rounding."""

    def check(ours: nn.Module, theirs: nn.Module, but: tuple[str, ...] | list[str] = ()) -> None:
        reference = {name: p.grad.double() for name, p in theirs.named_parameters() if p.grad is not None}
        total = torch.stack([g.norm() for g in reference.values()]).norm()
        compared = {name: p.grad for name, p in ours.named_parameters() if name not in but}
        assert set(compared) == set(reference) - set(but)
        for name, gradient in compared.items():
            error = (gradient.double() - reference[name]).norm()
            assert error <= 1e-4 * reference[name].norm() + 1e-7 * total, name

    return check


@pytest.fixture(scope="session")
def small_cascade() -> Cascade:
    """A whole model of random weights, every part of it tiny but the text encoder."""
    torch.manual_seed(0)
    cascade = Cascade(
        settings=CascadeSettings(
            image_size=128,
            latent_statistics=SMALL_STATISTICS,
            text_mask=True,
            prior_steps=3,
            decoder_steps=2,
        ),
        vqgan=VQGAN(SMALL_VQGAN),
        decoder=Decoder(SMALL_DECODER),
        compressor=Compressor(SMALL_COMPRESSOR),
        prior=Prior(SMALL_PRIOR),
        text_encoder=read_text_encoder(BUNDLED / "text_encoder"),
    )
    for part in (cascade.decoder, cascade.prior):
        assert part is not None
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                if not parameter.any():
                    parameter.copy_(0.1 * _fill(name, parameter))
    return cascade


@pytest.fixture(scope="session")
def small_v1(small_cascade: Cascade) -> Cascade:
    """The same with a Stage B on tokens."""
    decoder = Paella(SMALL_PAELLA)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(_fill(name, parameter))
    settings = dataclasses.replace(
        PUBLISHED_V1, image_size=128, text_mask=True, prior_steps=3, decoder_steps=2
    )
    return dataclasses.replace(small_cascade, decoder=decoder, settings=settings)


@pytest.fixture(scope="session")
def model_folder(small_cascade: Cascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small_cascade`` on disk."""
    return write_model(small_cascade, tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with no words but the letters and two pairs."""
    letters = [*tokenizers.pre_tokenizers.ByteLevel.alphabet()]
    letters.sort()
    pieces = [*letters, *(letter + "</w>" for letter in letters), "ca", "ca" + "t</w>"]
    vocab = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[("c", "a"), ("ca", "t</w>")], model_max_length=12)


@pytest.fixture(scope="session")
def diffusers_pipelines(clip_tokenizer: CLIPTokenizer) -> SimpleNamespace:
    """diffusers' own pipelines of Stage C (``prior``) and of Stages B and A (``decoder``), tiny, random."""
    from diffusers import DDPMWuerstchenScheduler, WuerstchenDecoderPipeline, WuerstchenPriorPipeline
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

    def text_encoder(width: int) -> CLIPTextModel:
        words = len(clip_tokenizer)
        config = CLIPTextConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            hidden_act="gelu",
            bos_token_id=words - 2,
            eos_token_id=words - 1,
            pad_token_id=words - 1,
        )
        return CLIPTextModel(config)

    def filled(network: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                if tensor.is_floating_point():
                    # Small last layers, as trained ones have: sampling would blow every rounding up.
                    last = name.startswith(("out.", "clf."))
                    tensor.copy_((0.1 if last else 1.0) * _fill(name, tensor))
        return network.eval()

    prior = WuerstchenPrior(c_in=4, c=16, c_cond=16, c_r=16, depth=2, nhead=2)
    decoder = WuerstchenDiffNeXt(
        c_r=16,
        c_cond=12,
        c_hidden=[8, 16, 16, 16],
        nhead=[-1, 2, 2, 2],
        blocks=[1, 1, 2, 1],
        effnet_embd=4,
        clip_embd=12,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated there
        return SimpleNamespace(
            prior=WuerstchenPriorPipeline(
                clip_tokenizer, filled(text_encoder(16)), filled(prior), DDPMWuerstchenScheduler()
            ),
            decoder=WuerstchenDecoderPipeline(
                clip_tokenizer,
                filled(text_encoder(12)),
                filled(decoder),
                DDPMWuerstchenScheduler(),
                filled(PaellaVQModel(bottleneck_blocks=2, embed_dim=16, num_vq_embeddings=32)),
            ),
        )


Write = Callable[..., Path]


@pytest.fixture(scope="session")
def write_published(diffusers_pipelines: SimpleNamespace) -> Write:
    """Writes those pipelines into a folder, in the layout of a year."""

    def write(
        folder: Path,
        year: int = 2023,
        *,
        pickled: bool = False,
        shard_size: str = "10GB",
        variant: str | None = None,
    ) -> Path:
        """``folder/wuerstchen``, which names ``folder/wuerstchen/prior_pipeline`` as its prior.

        2023 is as published; 2026 as diffusers 0.42 and transformers 5 write.
        """
        root = folder / "wuerstchen"
        for part, place in (("decoder", root), ("prior", root / "prior_pipeline")):
            pipeline = getattr(diffusers_pipelines, part)
            pipeline.save_pretrained(
                place, safe_serialization=not pickled, max_shard_size=shard_size, variant=variant
            )
            if pickled:
                # transformers 5 writes safetensors only.
                torch.save(pipeline.text_encoder.state_dict(), place / "text_encoder" / "pytorch_model.bin")
                for path in (place / "text_encoder").glob("model*.safetensors*"):
                    path.unlink()
            if year == 2023:
                _as_published(place, pickled)
        (root / "README.md").write_text("---\nlicense: mit\nprior:\n- prior_pipeline\n---\n# A model\n")
        return root

    return write


def _as_published(folder: Path, pickled: bool) -> None:
    """Turns what is written today into what was published."""
    index = json.loads((folder / "model_index.json").read_text())
    for part, entry in index.items():
        if isinstance(entry, list) and part in ("prior", "decoder", "vqgan"):
            entry[0] = "wuerstchen"
    index["tokenizer"][1] = "CLIPTokenizerFast"
    (folder / "model_index.json").write_text(json.dumps(index))
    text = folder / "text_encoder"
    path = text / ("pytorch_model.bin" if pickled else "model.safetensors")
    if path.is_file():
        state = torch.load(path) if pickled else safetensors.torch.load_file(path)
        state = {f"text_model.{key}": value for key, value in state.items()}
        state["text_model.embeddings.position_ids"] = torch.arange(12)[None]
        if pickled:
            torch.save(state, path)
        else:
            safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    pieces = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(pieces["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in pieces["merges"])
    (folder / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """Headless Chromium, or a skip where there is none; WUERSTCHEN_REQUIRE_BROWSER=1 makes that an error."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((path for name in names if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        if os.environ.get("WUERSTCHEN_REQUIRE_BROWSER") == "1":
            pytest.fail(
                "chromium and chromedriver are required; on Debian: apt-get install chromium chromium-driver"
            )
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium has none for root
    driver = webdriver.Chrome(options=options, service=Service(driver))
    yield driver
    driver.quit()
