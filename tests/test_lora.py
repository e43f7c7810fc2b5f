"""Adapters on Stage C and the text encoder, against diffusers with the same weights and the same files."""

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, WuerstchenPriorPipeline
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.lora import (
    METADATA,
    WEIGHT_NAME,
    active_loras,
    delete_lora,
    enable_lora,
    fuse_lora,
    load_lora,
    lora_names,
    save_lora,
    set_lora,
    unfuse_lora,
    unload_lora,
)
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.text import TextEncoder
from wuerstchen.pipeline import BUNDLED

# Most files here do not store alpha, as diffusers.
pytestmark = pytest.mark.filterwarnings("ignore::wuerstchen.lora.AssumedScaleWarning")

SMALL = PriorConfig(c_in=4, c=32, c_cond=24, c_r=16, depth=2, nhead=4, dropout=0.1)
QUERY = "blocks.2.attention.to_q"
ATTENTION = [f"blocks.{i}.attention.{name}" for i in (2, 5) for name in ("to_q", "to_k", "to_v", "to_out.0")]


@pytest.fixture
def prior(randomise) -> Prior:
    prior = randomise(Prior(SMALL)).eval().requires_grad_(False)
    prior.out[1].weight.mul_(0.2)  # 1 / |1 − b| amplifies rounding without bound where b is close to 1
    return prior


def theirs_of(prior: Prior, text_encoder: CLIPTextModel | None = None) -> WuerstchenPriorPipeline:
    model = WuerstchenPrior(c_in=4, c=32, c_cond=24, c_r=16, depth=2, nhead=4, dropout=0.1).eval()
    model.load_state_dict(prior.state_dict())
    return WuerstchenPriorPipeline(
        tokenizer=None, text_encoder=text_encoder, prior=model, scheduler=DDPMWuerstchenScheduler()
    )


def adapter(
    seed: int = 1, rank: int = 4, layers: list[str] = ATTENTION, width: int = 32
) -> dict[str, Tensor]:
    """Layers as peft names them, strong enough to change everything."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for layer in layers:
        result[f"{layer}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
        result[f"{layer}.lora_B.weight"] = torch.randn(width, rank, generator=generator) / rank**0.5
    return result


def run(prior: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x, text = torch.randn(2, 4, 3, 5, generator=generator), torch.randn(2, 7, 24, generator=generator)
    r = torch.tensor([0.9, 0.3])
    with torch.no_grad():
        return prior(x, r, prior.context(text)) if isinstance(prior, Prior) else prior(x, r, text)


@pytest.fixture
def two_files(tmp_path) -> tuple[Path, Path]:
    save_lora(tmp_path / "a", adapter(seed=1))
    save_lora(tmp_path / "b", adapter(seed=2, rank=2, layers=ATTENTION[:3]))
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # diffusers lets it through
def test_everything_equals_diffusers(prior, two_files, relative_error):
    """Loading, mixing two with weights, fusing and removing give the same outputs at every step."""
    pipe = theirs_of(prior)
    plain = run(prior)

    def same() -> Tensor:
        ours = run(prior)
        assert relative_error(ours, run(pipe.prior)) <= 1e-5
        return ours

    for name, folder in zip("ab", two_files, strict=True):
        load_lora(prior, folder, adapter_name=name)
        pipe.load_lora_weights(str(folder), adapter_name=name)
        assert relative_error(same(), plain) > 0.05
        assert active_loras(prior) == [name] == pipe.get_active_adapters()
    set_lora(prior, ["a", "b"], [0.7, -0.4])
    pipe.set_adapters(["a", "b"], [0.7, -0.4])
    both = same()
    assert active_loras(prior) == ["a", "b"] == lora_names(prior)
    enable_lora(prior, False)
    pipe.disable_lora()
    assert torch.equal(same(), plain)
    assert active_loras(prior) == []
    enable_lora(prior, True)
    pipe.enable_lora()
    assert torch.equal(same(), both)
    set_lora(prior, ["b"], [2])
    pipe.set_adapters(["b"], [2.0])
    same()
    delete_lora(prior, ["b"])
    set_lora(prior, ["a"], [1.0])
    pipe.set_adapters(["a"], [1.0])
    pipe.delete_adapters("b")
    same()
    fuse_lora(prior, scale=0.3, names=["a"], safe=True)
    pipe.fuse_lora(components=["prior"], lora_scale=0.3, adapter_names=["a"])
    fused = same()
    unload_lora(prior)
    pipe.unload_lora_weights()
    assert torch.equal(same(), fused)


def test_fusing_changes_no_output_and_is_undone(prior, two_files, relative_error):
    for name, folder in zip("ab", two_files, strict=True):
        load_lora(prior, folder, adapter_name=name)
    before = {name: t.clone() for name, t in prior.state_dict().items()}
    set_lora(prior, ["b", "a"], [0.5, 1.5])
    apart = run(prior)
    fuse_lora(prior)
    assert active_loras(prior) == ["b", "a"]
    assert relative_error(run(prior), apart) <= 1e-5
    unfuse_lora(prior)
    unfuse_lora(prior)  # nothing left to undo
    assert relative_error(run(prior), apart) <= 1e-5
    for name, tensor in prior.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)
    for _ in range(2):  # a scale does not stay: in diffusers it does
        fuse_lora(prior, scale=0.0)
        assert relative_error(run(prior), apart) > 0.05
        unfuse_lora(prior)
        assert relative_error(run(prior), apart) <= 1e-5


def test_unloading_gives_back_the_very_layers(prior, two_files):
    before, layers, plain = copy.deepcopy(prior.state_dict()), dict(prior.named_modules()), run(prior)
    prior.blocks[0].requires_grad_(True)
    for name, folder in zip("ab", two_files, strict=True):
        load_lora(prior, folder, adapter_name=name)
    assert [n for n, p in prior.named_parameters() if p.requires_grad] == [
        f"blocks.0.{n}" for n, _ in prior.blocks[0].named_parameters()
    ]
    unload_lora(prior)
    assert dict(prior.named_modules()) == layers
    assert all(torch.equal(tensor, before[name]) for name, tensor in prior.state_dict().items())
    assert torch.equal(run(prior), plain)
    assert not hasattr(prior, "peft_config")
    load_lora(prior, two_files[0])  # the names are free again
    delete_lora(prior, ["default"])
    assert dict(prior.named_modules()) == layers


def test_deleting_one_leaves_the_other(prior, two_files):
    load_lora(prior, two_files[0], adapter_name="a")
    alone = run(prior)
    load_lora(prior, two_files[1], adapter_name="b")
    set_lora(prior, ["a", "b"], [1.0, 1.0])
    delete_lora(prior, "b")
    assert active_loras(prior) == lora_names(prior) == ["a"]
    assert torch.equal(run(prior), alone)


def test_loading_while_off_turns_on(prior, two_files):
    load_lora(prior, two_files[0], adapter_name="a")
    enable_lora(prior, False)
    load_lora(prior, two_files[1], adapter_name="b")
    assert active_loras(prior) == ["b"]
    set_lora(prior, [], [])
    assert active_loras(prior) == []
    assert run(prior).isfinite().all()


def test_half_precision_keeps_its_dtype(prior, two_files):
    load_lora(prior.bfloat16(), two_files[0])
    assert {p.dtype for p in prior.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in prior.parameters())


def test_a_dict_is_not_kept(prior):
    layers = adapter()
    load_lora(prior, layers)
    result = run(prior)
    for tensor in layers.values():
        tensor.zero_()
    assert torch.equal(run(prior), result)


OTHER_SPELLINGS = {
    "prefix": lambda layer, side: f"prior.{layer}.lora_{'A' if side == 'down' else 'B'}.weight",
    "old prefix": lambda layer, side: f"unet.{layer}.lora.{side}.weight",
    "peft": lambda layer, side: (
        f"base_model.model.{layer}.lora_{'A' if side == 'down' else 'B'}.default.weight"
    ),
    "linear layer": lambda layer, side: f"prior.{layer}.lora_linear_layer.{side}.weight",
    "processor": lambda layer, side: (
        f"prior.{layer.removesuffix('.0').replace('attention', 'attention.processor')}_lora.{side}.weight"
    ),
    "kohya": lambda layer, side: f"lora_prior_unet_{layer.replace('.', '_')}.lora_{side}.weight",
}


@pytest.mark.parametrize("spelling", OTHER_SPELLINGS)
def test_other_spellings_of_the_same_adapter(prior, spelling):
    load_lora(prior, adapter(), adapter_name="plain")
    expected = run(prior)
    spell = OTHER_SPELLINGS[spelling]
    renamed = {
        spell(key.partition(".lora_")[0], "down" if ".lora_A." in key else "up"): tensor
        for key, tensor in adapter().items()
    }
    load_lora(prior, renamed, adapter_name="other")
    assert torch.equal(run(prior), expected)


def scaled(layers: dict[str, Tensor], by: float) -> dict[str, Tensor]:
    return {key: tensor * by if ".lora_B." in key else tensor for key, tensor in layers.items()}


def test_alpha_keys_scale(prior, relative_error):
    alphas = {f"{layer}.alpha": torch.tensor(1.0) for layer in ATTENTION}
    load_lora(prior, adapter() | alphas, adapter_name="a")  # alpha 1 of rank 4
    result = run(prior)
    load_lora(prior, scaled(adapter(), 0.25), adapter_name="b")
    assert relative_error(result, run(prior)) <= 1e-6


@pytest.mark.parametrize("prefix", ["prior.", ""])
def test_metadata_scales(prior, tmp_path, prefix, relative_error):
    """Two ranks and two alphas in one file, as diffusers records them; its own reading agrees."""
    layers = adapter(rank=4, layers=ATTENTION[:4]) | adapter(rank=2, layers=ATTENTION[4:])
    metadata = {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": dict.fromkeys(ATTENTION[4:], 2),
        "alpha_pattern": {QUERY: 2.0},
        "target_modules": ATTENTION,
    }
    header = {METADATA: json.dumps({prefix + key: value for key, value in metadata.items()})}
    save_file({f"prior.{key}": t for key, t in layers.items()}, tmp_path / WEIGHT_NAME, metadata=header)
    load_lora(prior, tmp_path)
    result = run(prior)
    if prefix:
        pipe = theirs_of(unloaded(prior))
        pipe.load_lora_weights(str(tmp_path))
        assert relative_error(result, run(pipe.prior)) <= 1e-5
    expected = {
        key: t * (0.5 if key.startswith(QUERY) else 2 if t.shape[1] == 4 else 4) if ".lora_B." in key else t
        for key, t in layers.items()
    }
    unload_lora(prior)
    load_lora(prior, expected)
    assert relative_error(result, run(prior)) <= 1e-6


def unloaded(prior: Prior) -> Prior:
    prior = copy.deepcopy(prior)
    unload_lora(prior)
    return prior


def test_rank_stabilised_scaling(prior, tmp_path, relative_error):
    metadata = {METADATA: json.dumps({"prior.lora_alpha": 6, "prior.use_rslora": True})}
    save_file(adapter(), tmp_path / "x.safetensors", metadata=metadata)
    load_lora(prior, tmp_path / "x.safetensors")
    result = run(prior)
    unload_lora(prior)
    load_lora(prior, scaled(adapter(), 3.0))  # 6 / √4
    assert relative_error(result, run(prior)) <= 1e-6


def test_sources(prior, tmp_path):
    torch.save(adapter(), tmp_path / "pytorch_lora_weights.bin")
    save_file(adapter(seed=2), tmp_path / "style.safetensors")
    load_lora(prior, str(tmp_path), adapter_name="old")
    load_lora(prior, tmp_path, weight_name="style.safetensors", adapter_name="style")
    load_lora(prior, tmp_path / "style.safetensors", adapter_name="file")
    styles = [prior.get_submodule(QUERY).lora_A[name].weight for name in ("old", "style", "file")]
    assert torch.equal(styles[1], styles[2])
    assert not torch.equal(styles[0], styles[1])


def test_saved_files_are_diffusers(prior, tmp_path):
    WuerstchenPriorPipeline.save_lora_weights(tmp_path / "theirs", unet_lora_layers=adapter())
    ours = load_file(save_lora(tmp_path / "ours", adapter()))
    theirs = load_file(tmp_path / "theirs" / WEIGHT_NAME)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def small_clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=20,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            eos_token_id=2,
        )
    ).eval()


def states(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 5, 9, 2]])).last_hidden_state


TEXT_LAYERS = [f"encoder.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "out_proj")]


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_equals_diffusers(prior, tmp_path, prefix, relative_error):
    ours = small_clip().requires_grad_(False)
    theirs = copy.deepcopy(ours)
    plain = states(ours)
    text = adapter(seed=3, rank=3, layers=[prefix + layer for layer in TEXT_LAYERS], width=24)
    save_lora(tmp_path, adapter(), text_encoder_layers=text)
    load_lora(prior, tmp_path, adapter_name="a", text_encoder=ours)
    pipe = theirs_of(unloaded(prior), theirs)
    pipe.load_lora_weights(str(tmp_path), adapter_name="a")
    assert relative_error(states(ours), states(theirs)) <= 1e-5
    assert relative_error(states(ours), plain) > 0.01
    assert relative_error(run(prior), run(pipe.prior)) <= 1e-5
    set_lora(ours, ["a"], [0.5])
    assert relative_error(states(ours), states(theirs)) > 1e-3
    unload_lora(ours)
    assert torch.equal(states(ours), plain)


@pytest.mark.parametrize("spelling", ["text_encoder.{}.lora_{}.weight", "lora_prior_te_{}.lora_{}.weight"])
def test_the_wrapped_text_encoder(prior, spelling):
    encoder = read_text_encoder(BUNDLED / "text_encoder")
    assert isinstance(encoder, TextEncoder)
    plain = encoder.encode(["a camel"]).states
    layer = "encoder.layer.0.attention.self.query"
    found = {}
    for key, tensor in adapter(layers=[layer], width=384).items():
        side = (
            ("A", "down")["lora_prior" in spelling]
            if ".lora_A." in key
            else ("B", "up")["lora_prior" in spelling]
        )
        name = layer.replace(".", "_") if "lora_prior" in spelling else layer
        found[spelling.format(name, side)] = tensor
    load_lora(prior, found, text_encoder=encoder)
    assert lora_names(encoder) == ["default"]
    assert lora_names(prior) == []
    assert not torch.allclose(encoder.encode(["a camel"]).states, plain, atol=1e-3)
    unload_lora(encoder)
    assert torch.equal(encoder.encode(["a camel"]).states, plain)


def damaged(change: dict[str, object]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in (adapter() | change).items() if tensor is not None}


def pair(layer: str, width: int, out: int, kernel: int = 0, rank: int = 4) -> dict[str, object]:
    """A and B for a layer, with a kernel for a convolution."""
    sides, ones = ((kernel, kernel), (1, 1)) if kernel else ((), ())
    a, b = torch.ones(rank, width, *sides), torch.ones(out, rank, *ones)
    return {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}


A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({B: None}, "has no A or no B"),
        ({f"{QUERY}.alpha": torch.tensor(1), A: None, B: None}, "has no A or no B"),
        (
            {A: torch.ones(3, 32)},
            r"have shapes \(3, 32\) and \(32, 4\), not \(rank, 32\) and \(32, rank\)",
        ),
        ({A: torch.ones(4, 31)}, r"have shapes \(4, 31\)"),
        ({B: torch.ones(33, 4)}, r"and \(33, 4\)"),
        ({A: torch.ones(0, 32), B: torch.ones(32, 0)}, r"have shapes \(0, 32\)"),
        ({A: torch.ones(4, 32, 1, 1)}, r"have shapes \(4, 32, 1, 1\)"),
        ({A: torch.tensor(1.0)}, r"have shapes \(\)"),
        ({A: torch.full((4, 32), float("nan"))}, "contains NaN or infinity"),
        ({A: torch.ones(4, 32, dtype=torch.int64)}, "is not a floating-point tensor"),
        ({A: torch.ones(4, 32, device="meta")}, "is not a floating-point tensor"),
        ({A: torch.ones(4, 32).to_sparse()}, "is not a floating-point tensor"),
        ({f"prior.{A}": torch.ones(4, 32)}, "has A twice"),
        ({"lora_unet_blocks_2_attention_to_q.lora_down.weight": torch.ones(4, 32)}, "contains .* twice"),
        (pair("blocks.8.attention.to_q", 32, 32), "is not a linear layer or a convolution of Prior"),
        (pair("blocks.2.attention", 32, 32), "is not a linear layer or a convolution of Prior"),
        (pair("projection", 4, 32), r"have shapes \(4, 4\) and \(32, 4\), not \(rank, 4, 1, 1\)"),
        (pair("projection", 5, 32, 1), r"not \(rank, 4, 1, 1\) and \(32, rank, 1, 1\)"),
        (pair("blocks.0.depthwise", 32, 32, 1), r"not \(rank, 32, 3, 3\) and \(32, rank, 1, 1\)"),
        (pair("blocks.0.depthwise", 32, 2, 3), r"and \(2, 4, 1, 1\)"),
        ({f"{QUERY}.lora_magnitude_vector": torch.ones(31)}, "has 31 values, not 32"),
        ({f"{QUERY}.lora_B.bias": torch.ones(32)}, "is not a weight of a LoRA"),
        ({f"{QUERY}.hada_w1_a": torch.ones(32)}, "is not a weight of a LoRA"),
        ({f"{QUERY}.alpha": torch.tensor([1.0, 2.0])}, "alpha of .* must be a finite number, got None"),
        ({f"{QUERY}.alpha": torch.tensor(float("inf"))}, "alpha of .* must be a finite number, got inf"),
        ({f"{QUERY}.alpha": torch.tensor(True)}, "alpha of .* must be a finite number, got True"),
        (
            {"text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)},
            "Pass it as text_encoder",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(prior, change, message):
    before, plain = list(prior.modules()), run(prior)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_lora(prior, damaged(change))
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(". ") >= 1
    assert list(prior.modules()) == before
    assert torch.equal(run(prior), plain)


def test_a_misfit_in_the_text_encoder_leaves_the_prior_alone(prior):
    text = {"text_encoder.encoder.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 24)}
    with pytest.raises(CheckpointError, match="is not a linear layer or a convolution of CLIPTextModel"):
        load_lora(prior, adapter() | text, text_encoder=small_clip())
    assert lora_names(prior) == []


def test_a_partial_failure_is_undone(prior, monkeypatch):
    """As when memory runs out in the second network."""
    import wuerstchen.lora as module

    inject, clip = module.inject, small_clip()

    def failing(network, updates, name):
        inject(network, updates, name)
        if network is clip:
            raise MemoryError

    monkeypatch.setattr(module, "inject", failing)
    text = {f"text_encoder.{k}": t for k, t in adapter(layers=TEXT_LAYERS, width=24).items()}
    before, clip_before = list(prior.modules()), list(clip.modules())
    with pytest.raises(MemoryError):
        load_lora(prior, adapter() | text, text_encoder=clip)
    assert list(prior.modules()) == before
    assert list(clip.modules()) == clip_before


class _Code:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.safetensors", b"", "cannot be read"),
        ("x.safetensors", b"\xff" * 64, "cannot be read"),
        ("x.bin", pickle.dumps({"a": _Code()}), "never loaded"),
        ("x.bin", b"", "cannot be read|not a torch file"),
    ],
)
def test_damaged_files(prior, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_lora(prior, tmp_path, weight_name=name)
    assert capsys.readouterr().out == ""


def test_pickled_code_in_a_torch_file_is_not_run(prior, tmp_path, capsys):
    torch.save({A: _Code()}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="never loaded"):
        load_lora(prior, tmp_path / "x.bin")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not a JSON object"),
        ("[" * 100_000, "is not a JSON object"),
        ('{"prior.lora_alpha": NaN}', "alpha of .* must be a finite number, got nan"),
        ('{"prior.lora_alpha": 1' + "0" * 400 + "}", "an integer of 401 digits"),
        ('{"prior.lora_alpha": 4, "prior.x": ' + "[" * 900 + "]" * 900 + "}", "is nested"),
        ('{"prior.lora_alpha": "4"}', "alpha of .* must be a finite number, got '4'"),
        ('{"prior.lora_alpha": true}', "alpha of .* must be a finite number, got True"),
        ('{"prior.alpha_pattern": [1]}', "alpha_pattern must be a JSON object, got"),
        ('{"prior.r": 8, "prior.lora_alpha": 8}', "the rank of .* is 8, but its tensors have rank 4"),
        ('{"prior.rank_pattern": {"to_q": 2}}', "the rank of '.*to_q' is 2"),
        ('{"prior.alpha_pattern": {"(": 2}}', "is not a regular expression"),
        ('{"prior.alpha_pattern": {"(?R)": 2}}', "is not a regular expression"),
        ('{"prior.alpha_pattern": {"(a+)+": 2}}', "repeats a group"),
        ('{"prior.alpha_pattern": {"' + "((((a{999}){999}){999}){999})" + '": 2}}', "repeats a group"),
        ('{"prior.alpha_pattern": {"' + "a" * 1001 + '": 2}}', "more than 1000 characters"),
        ('{"prior.use_dora": true, "prior.lora_alpha": 4}', "is a DoRA"),
        ('{"prior.peft_type": "LOHA"}', "is a 'LOHA'"),
        ('{"prior.init_lora_weights": "pissa_niter_4"}', "which changes the model's own weights"),
    ],
)
def test_damaged_metadata(prior, tmp_path, metadata, message):
    save_file(adapter(), tmp_path / WEIGHT_NAME, metadata={METADATA: metadata})
    with pytest.raises(CheckpointError, match=message):
        load_lora(prior, tmp_path)
    assert lora_names(prior) == []


def test_missing_files(prior, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_lora(prior, "someone/adapter")
    with pytest.raises(
        CheckpointError, match=r"contains no pytorch_lora_weights\.safetensors\. Give the path of the file"
    ):
        load_lora(prior, tmp_path)
    with pytest.raises(CheckpointError, match="is empty"):
        load_lora(prior, {})


@pytest.mark.parametrize("name", ["", "a.b", "keys", "forward"])
def test_names_that_torch_cannot_hold(prior, name):
    with pytest.raises(UserError, match="adapter_name must be a non-empty string without dots"):
        load_lora(prior, adapter(), adapter_name=name)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda p: load_lora(p, adapter(), adapter_name="a"), "adapter_name 'a' is already used"),
        (lambda p: set_lora(p, ["c"], [1.0]), "adapter 'c' is not loaded. Loaded adapters: a, b"),
        (lambda p: set_lora(p, ["a"], [1.0, 2.0]), "2 weights do not match 1 adapters"),
        (lambda p: set_lora(p, ["a", "a"], [1.0, 2.0]), "contain a name twice"),
        (
            lambda p: set_lora(p, ["a"], [float("nan")]),
            "the weight of adapter 'a' must be a finite number, got nan",
        ),
        (lambda p: set_lora(p, ["a"], [10**400]), "must be a finite number"),
        (lambda p: fuse_lora(p, scale=float("nan")), "scale must be a finite number, got nan"),
        (lambda p: fuse_lora(p, names=["c"]), "adapter 'c' is not loaded"),
        (lambda p: fuse_lora(p, names=[]), "nothing to fuse"),
        (lambda p: fuse_lora(p, scale=1e38, names=["a", "b"], safe=True), "gives infinite weights"),
        (lambda p: delete_lora(p, ["a", "c"]), "adapter 'c' is not loaded"),
    ],
)
def test_what_cannot_be_done_changes_nothing(prior, two_files, act, message):
    for name, folder in zip("ab", two_files, strict=True):
        load_lora(prior, folder, adapter_name=name)
    if "infinite weights" in message:
        prior.get_submodule(QUERY).lora_B["b"].weight.fill_(100.0)
    before = run(prior)
    with pytest.raises(UserError, match=message):
        act(prior)
    assert lora_names(prior) == ["a", "b"]
    assert torch.equal(run(prior), before)


@pytest.mark.parametrize(
    "act",
    [
        lambda p: load_lora(p, adapter(), adapter_name="c"),
        lambda p: set_lora(p, ["a"], [0.5]),
        lambda p: enable_lora(p, False),
        lambda p: delete_lora(p, ["a"]),
        lambda p: fuse_lora(p, names=["a"]),
    ],
)
def test_fused_adapters_cannot_be_changed(prior, two_files, act):
    """peft would subtract a different amount than it added, or silently ignore the new adapter."""
    load_lora(prior, two_files[0], adapter_name="a")
    fuse_lora(prior)
    before = run(prior)
    with pytest.raises(UserError, match=r"is .*fused.*Call unfuse_lora first"):
        act(prior)
    assert torch.equal(run(prior), before)


def test_a_network_without_adapters(prior):
    assert lora_names(prior) == active_loras(prior) == []
    unload_lora(prior)
    unfuse_lora(prior)
    enable_lora(prior, True)
    set_lora(prior, [], [])
    with pytest.raises(UserError, match="nothing to fuse"):
        fuse_lora(prior)


@pytest.mark.parametrize(
    ("layers", "message"),
    [({}, "there are no layers"), ({"blocks.2.weight": torch.ones(1)}, "Keys must end in")],
)
def test_saving_refuses(tmp_path, layers, message):
    with pytest.raises(UserError, match=message):
        save_lora(tmp_path, layers)
    assert list(tmp_path.iterdir()) == []


def test_saving_into_a_file(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_lora(tmp_path / "x", adapter())


def test_without_peft(prior, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'pip install "wuerstchen\[lora\]"'):
        load_lora(prior, adapter())
    assert lora_names(prior) == []
