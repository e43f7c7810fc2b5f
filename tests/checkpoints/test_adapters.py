"""Adapters by peft, kohya's scripts and OneTrainer have the same effect here as in those programs."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wuerstchen.checkpoints.adapters import METADATA, PEFT_CONFIG, WEIGHT_NAME, WEIGHT_NAMES, wanted_files
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.lora import AssumedScaleWarning, fuse_lora, load_lora, lora_names, unload_lora
from wuerstchen.models.prior import Prior, PriorConfig

SIZES = {"c_in": 4, "c": 16, "c_cond": 12, "c_r": 8, "depth": 2, "nhead": 2, "dropout": 0.0}
QUERIES = ["blocks.2.attention.to_q", "blocks.5.attention.to_q"]


@pytest.fixture
def prior(randomise) -> Prior:
    prior = randomise(Prior(PriorConfig(**SIZES))).eval().requires_grad_(False)
    prior.out[1].weight.mul_(0.2)  # 1 / |1 − b| amplifies rounding without bound where b is close to 1
    return prior


def theirs_of(prior: Prior) -> nn.Module:
    model = WuerstchenPrior(**SIZES).eval()
    model.load_state_dict(prior.state_dict())
    return model


def run(prior: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x, text = torch.randn(2, 4, 3, 5, generator=generator), torch.randn(2, 7, 12, generator=generator)
    r = torch.tensor([0.9, 0.3])
    with torch.no_grad():
        return prior(x, r, prior.context(text)) if isinstance(prior, Prior) else prior(x, r, text)


def randomised(model: nn.Module, only: str = "lora_") -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


# peft


def peft_folder(prior: Prior, folder: Path, **config: Any) -> Tensor:
    """Saves an adapter with peft and returns the output of its model for ``run``."""
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about groups
        model = peft.get_peft_model(theirs_of(prior), peft.LoraConfig(**settings | config))
        randomised(model)
        model.eval().save_pretrained(str(folder))
        again = peft.PeftModel.from_pretrained(theirs_of(prior), str(folder))
    assert torch.equal(run(again.base_model.model), run(model.base_model.model))
    return run(again.base_model.model)


EVERYTHING = (
    r"projection|cond_mapper\.[02]|out\.1|blocks\.\d+\."
    r"(channelwise\.[04]|mapper|kv_mapper\.1|attention\.to_[qkv]|attention\.to_out\.0)"
)
PATTERNS = {  # in the order in which peft writes them
    "^blocks.2.attention.to_out.0": 3,
    "attention": 5,  # fits none: the end of the name is meant
    "blocks.2.attention.to_q": 2,  # the first that fits counts, so not the last one for this layer
    r"blocks\.\d+\.attention\.to_k": 2,
    "to_[vq]": 8,
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": PATTERNS},
        {"alpha_pattern": PATTERNS},
        {"alpha_pattern": PATTERNS, "rank_pattern": {r".*\.5\..*to_q": 6}, "use_rslora": True},
        {"target_modules": EVERYTHING, "alpha_pattern": {"projection": 2, r"out\.1": 40}},
        {"target_modules": ["depthwise"], "r": 32},  # a convolution of 16 groups
        {"init_lora_weights": "gaussian", "r": 3, "lora_alpha": 1},
    ],
)
@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_peft_is_as_strong_as_there(prior, tmp_path, config, safe, relative_error):
    expected = peft_folder(prior, tmp_path, **config)
    plain = run(prior)
    if not safe:
        torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_model.safetensors").unlink()
    load_lora(prior, tmp_path)
    assert relative_error(run(prior), expected) <= 1e-4
    assert relative_error(plain, expected) > 1e-3
    unload_lora(prior)
    assert torch.equal(run(prior), plain)


def test_a_file_of_peft_finds_the_configuration_next_to_it(prior, tmp_path, relative_error):
    expected = peft_folder(prior, tmp_path)
    load_lora(prior, tmp_path / "adapter_model.safetensors", adapter_name="a")
    assert relative_error(run(prior), expected) <= 1e-4
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "mine.safetensors")
    load_lora(prior, tmp_path, adapter_name="b")  # the only one there
    assert relative_error(run(prior), expected) <= 1e-4
    # In a folder with several adapters, the configuration belongs to another one.
    save_file({"blocks.2.attention.to_q.lora_A.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.warns(AssumedScaleWarning):
        load_lora(prior, tmp_path / "mine.safetensors", adapter_name="c")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / PEFT_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"r": 8},
            r"adapter_config\.json: the rank of '.*' is 8, but its tensors have rank 4",
        ),
        ({"use_dora": True}, "is a DoRA, but some of its layers have no magnitude"),
        ({"use_qalora": True}, "is a QALoRA. Only LoRA and DoRA are supported"),
        ({"peft_type": "LOKR"}, "is a 'LOKR'"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the model's own weights"),
        ({"modules_to_save": ["out"]}, "is a LoRA with fully trained layers"),
        ({"lora_alpha": "16"}, "alpha of .* must be a finite number, got '16'"),
        ({"alpha_pattern": {"to_q": None, "to_k": [1]}}, r"alpha of .* must be a finite number, got a list"),
        ({"rank_pattern": [4]}, "rank_pattern must be a JSON object, got"),
    ],
)
def test_configurations_that_mean_something_else(prior, tmp_path, changes, message):
    peft_folder(prior, tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_lora(prior, tmp_path)
    assert lora_names(prior) == []


def test_a_damaged_configuration_of_peft(prior, tmp_path):
    peft_folder(prior, tmp_path)
    (tmp_path / PEFT_CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        load_lora(prior, tmp_path)


def test_files_in_a_folder(prior, tmp_path):
    """diffusers' name is preferred to peft's. A file with another name is read if it is the only one."""
    for number, name in enumerate(WEIGHT_NAMES[1::-1], start=1):
        tensors = {f"{QUERIES[0]}.lora_A.weight": torch.full((1, 16), float(number))}
        alpha = {f"{QUERIES[0]}.alpha": torch.tensor(1)}
        save_file(tensors | alpha | {f"{QUERIES[0]}.lora_B.weight": torch.ones(16, 1)}, tmp_path / name)
        load_lora(prior, tmp_path, adapter_name=name.partition(".")[0])
    a = prior.get_submodule(QUERIES[0]).lora_A
    assert [float(matrix.weight[0, 0]) for matrix in a.values()] == [1.0, 2.0]
    (tmp_path / WEIGHT_NAME).rename(tmp_path / "one.safetensors")
    load_lora(prior, tmp_path, adapter_name="peft")
    assert float(a["peft"].weight[0, 0]) == 1.0
    (tmp_path / WEIGHT_NAMES[1]).rename(tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"It contains 2 weight files\. Give the path of one"):
        load_lora(prior, tmp_path, adapter_name="none")


def test_what_is_fetched_from_the_hub():
    assert set(wanted_files()) == {*WEIGHT_NAMES, PEFT_CONFIG}
    assert wanted_files("x.safetensors", "sub") == ["sub/x.safetensors", f"sub/{PEFT_CONFIG}"]


# Where alpha is stored, and where not


def matrices(layers: list[str], name: Callable[[str, str], str], rank: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for layer in layers:
        found[name(layer, "down")] = torch.randn(rank, 16, generator=generator) / 4
        found[name(layer, "up")] = torch.randn(16, rank, generator=generator) / 2
    return found


def dotted(layer: str, way: str) -> str:
    return f"{layer}.lora_{'A' if way == 'down' else 'B'}.weight"


def joined(layer: str, way: str) -> str:
    return f"lora_prior_unet_{layer.replace('.', '_')}.lora_{way}.weight"


def reference(prior: Prior, scale: float) -> Tensor:
    prior = copy.deepcopy(prior)
    layers = matrices(QUERIES, dotted)
    for layer in QUERIES:
        delta = layers[dotted(layer, "up")] @ layers[dotted(layer, "down")]
        prior.get_submodule(layer).weight.add_(delta * scale)
    return run(prior)


@pytest.mark.parametrize("prefix", ["prior.", "unet."])
@pytest.mark.parametrize("rslora", [False, True])
def test_metadata_of_either_name_of_the_network(prior, tmp_path, prefix, rslora, relative_error):
    fields = {"r": 4, "lora_alpha": 16, "use_rslora": rslora, "alpha_pattern": {r"blocks\.\d\.x": 1}}
    header = {METADATA: json.dumps({prefix + key: value for key, value in fields.items()})}
    tensors = {prefix + key: tensor for key, tensor in matrices(QUERIES, dotted).items()}
    save_file(tensors, tmp_path / WEIGHT_NAME, metadata=header)
    expected = reference(prior, 8.0 if rslora else 4.0)
    load_lora(prior, tmp_path)
    assert relative_error(run(prior), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_of_any_kind_of_number(prior, tmp_path, dtype, shape, relative_error):
    alphas = {
        joined(layer, "x").split(".")[0] + ".alpha": torch.full(shape, 2, dtype=dtype) for layer in QUERIES
    }
    save_file(matrices(QUERIES, joined) | alphas, tmp_path / "kohya.safetensors")
    expected = reference(prior, 0.5)
    load_lora(prior, tmp_path / "kohya.safetensors")
    assert relative_error(run(prior), expected) <= 1e-5


@pytest.mark.parametrize("source", ["file", "dict"])
@pytest.mark.parametrize("name", [dotted, joined])
def test_an_assumed_scale_gives_a_warning(prior, tmp_path, source, name, relative_error):
    tensors, expected = matrices(QUERIES, name), reference(prior, 1.0)
    save_file(tensors, tmp_path / "x.safetensors")
    where = "the adapter" if source == "dict" else str(tmp_path / "x.safetensors")
    with pytest.warns(AssumedScaleWarning, match=r"does not store alpha: .*which gives scale 1") as caught:
        load_lora(prior, tensors if source == "dict" else tmp_path / "x.safetensors")
    assert str(caught[0].message).startswith(where)
    assert relative_error(run(prior), expected) <= 1e-5


def test_layers_of_a_compiled_network(prior, relative_error):
    expected = reference(prior, 1.0)
    tensors = {f"base_model.model._orig_mod.{k}": t for k, t in matrices(QUERIES, dotted).items()}
    alphas = {f"base_model.model._orig_mod.{layer}.alpha": torch.tensor(4) for layer in QUERIES}
    load_lora(prior, tensors | alphas)
    assert relative_error(run(prior), expected) <= 1e-5


def test_an_assumed_scale_of_some_layers_gives_a_warning(prior):
    alpha = {f"{QUERIES[1]}.alpha": torch.tensor(4.0)}
    with pytest.warns(AssumedScaleWarning, match="does not store alpha for 1 of its 2 layers"):
        load_lora(prior, matrices(QUERIES, dotted) | alpha)


def test_a_refused_file_gives_no_warning(prior):
    tensors = matrices(QUERIES, dotted)
    tensors[dotted(QUERIES[0], "up")] = torch.ones(3, 3)
    with pytest.raises(CheckpointError):
        load_lora(prior, tensors)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits(prior, tmp_path, dtype, relative_error):
    small = {key: tensor.to(dtype) for key, tensor in matrices(QUERIES, joined).items()}
    alphas = {joined(layer, "x").split(".")[0] + ".alpha": torch.tensor(4) for layer in QUERIES}
    save_file(small | alphas, tmp_path / "x.safetensors")
    load_lora(prior, tmp_path / "x.safetensors", adapter_name="small")
    result = run(prior)
    load_lora(prior, {key: tensor.float() for key, tensor in small.items()} | alphas, adapter_name="same")
    assert torch.equal(result, run(prior))
    small[joined(QUERIES[0], "down")] = torch.full((4, 16), float("nan")).to(dtype)
    with pytest.raises(CheckpointError, match="contains NaN or infinity"):
        load_lora(prior, small | alphas, adapter_name="bad")


def test_weights_that_cannot_be_computed_with(prior):
    packed = torch.zeros(4, 16, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(CheckpointError, match=r"the dtype torch\.float4_e2m1fn_x2 of .* is not supported"):
        load_lora(prior, matrices(QUERIES, dotted) | {dotted(QUERIES[0], "down"): packed})


# OneTrainer's: every linear layer and every convolution of Stage C


class OneTrainer:
    """OneTrainer's formula for LoRA: x ↦ layer(x) + up(down(x)) · alpha / rank."""

    def __init__(self, model: nn.Module, rank: int = 3, alpha: float = 1.0) -> None:
        self.scale, self.alpha = alpha / rank, alpha
        generator = torch.Generator().manual_seed(5)
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                shapes = (rank, layer.in_features), (layer.out_features, rank)
            elif isinstance(layer, nn.Conv2d):
                out = layer.out_channels // layer.groups
                shapes = (rank, layer.in_channels, *layer.kernel_size), (out, rank, 1, 1)
            else:
                continue
            down, up = (torch.randn(shape, generator=generator) * 0.2 for shape in shapes)
            self.weights[name] = down, up
            layer.register_forward_hook(self._hook(down, up))

    def _hook(self, down: Tensor, up: Tensor) -> Callable[..., Tensor]:
        def added(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if isinstance(layer, nn.Linear):
                return output + inputs[0] @ down.T @ up.T * self.scale
            inner = nn.functional.conv2d(inputs[0], down, stride=layer.stride, padding=layer.padding)
            return output + nn.functional.conv2d(inner, up) * self.scale

        return added

    def saved(self, layout: str) -> dict[str, Tensor]:
        found = {}
        for name, (down, up) in self.weights.items():
            if layout == "diffusers":  # alpha is in B
                found[f"prior.{name}.lora_A.weight"] = down
                found[f"prior.{name}.lora_B.weight"] = up * self.scale
                continue
            base = f"prior.{name}" if layout == "internal" else f"lora_unet_{name.replace('.', '_')}"
            if layout == "old":
                base = f"lora_prior_unet.{name}"
            found[f"{base}.lora_down.weight"], found[f"{base}.lora_up.weight"] = down, up
            found[f"{base}.alpha"] = torch.tensor(self.alpha)
        return found


@pytest.mark.filterwarnings("ignore::wuerstchen.lora.AssumedScaleWarning")
@pytest.mark.parametrize("layout", ["diffusers", "kohya", "internal", "old"])
def test_onetrainer_trains_all_linear_layers_and_convolutions(prior, tmp_path, layout, relative_error):
    theirs = theirs_of(prior)
    trained = OneTrainer(theirs)
    kinds = {type(theirs.get_submodule(name)) for name in trained.weights}
    assert kinds == {nn.Linear, nn.Conv2d}
    save_file(trained.saved(layout), tmp_path / "lora.safetensors")
    plain = run(prior)
    load_lora(prior, tmp_path / "lora.safetensors")
    assert relative_error(run(prior), run(theirs)) <= 1e-4
    assert relative_error(plain, run(theirs)) > 0.05
    assert prior.blocks[0].depthwise.base_layer.groups == 16
    unload_lora(prior)
    assert torch.equal(run(prior), plain)


def test_each_layer_of_stage_c_heeds_its_adapter(prior, relative_error):
    """The weights of some layers are used without calling the layer, so an adapter would have no effect."""
    trained = OneTrainer(theirs_of(prior), alpha=3.0)
    plain = run(prior)
    for name, (down, up) in trained.weights.items():
        theirs = theirs_of(prior)
        theirs.get_submodule(name).register_forward_hook(trained._hook(down, up))
        tensors = {dotted(name, "down"): down, dotted(name, "up"): up, f"{name}.alpha": torch.tensor(3)}
        load_lora(prior, tensors)
        assert relative_error(run(prior), run(theirs)) <= 1e-4, name
        # What OneTrainer adds after a depthwise convolution is the same for all channels: the layer norm that
        # follows takes it away.
        assert "depthwise" in name or relative_error(run(prior), plain) > 1e-5, name
        unload_lora(prior)


def test_convolutions_with_groups_cannot_be_fused(prior, relative_error):
    trained = OneTrainer(theirs_of(prior))
    load_lora(prior, trained.saved("kohya"), adapter_name="all")
    before = run(prior)
    with pytest.raises(UserError, match=r"changes 'blocks\.0\.depthwise', a convolution with groups"):
        fuse_lora(prior)
    assert torch.equal(run(prior), before)
    pointwise = {k: t for k, t in trained.saved("kohya").items() if "depthwise" not in k}
    unload_lora(prior)
    load_lora(prior, pointwise)
    apart = run(prior)
    fuse_lora(prior, safe=True)
    assert relative_error(run(prior), apart) <= 1e-5


@pytest.mark.gpu
def test_adapters_of_all_layers_on_a_gpu(prior, relative_error):
    trained = OneTrainer(theirs_of(prior))
    load_lora(prior, trained.saved("kohya"))
    exact = run(prior)
    prior.to("cuda")
    generator = torch.Generator().manual_seed(7)
    x, text = torch.randn(2, 4, 3, 5, generator=generator), torch.randn(2, 7, 12, generator=generator)
    with torch.no_grad():
        found = prior(x.cuda(), torch.tensor([0.9, 0.3], device="cuda"), prior.context(text.cuda()))
    assert relative_error(found.cpu(), exact) < 0.01  # cuDNN rounds in other convolutions


def test_half_precision(prior, relative_error):
    """The last layer and its adapter always compute in float32."""
    trained = OneTrainer(theirs_of(prior))
    load_lora(prior, trained.saved("kohya"))
    exact = run(prior)
    prior.bfloat16()
    generator = torch.Generator().manual_seed(7)
    x, text = torch.randn(2, 4, 3, 5, generator=generator), torch.randn(2, 7, 12, generator=generator)
    with torch.no_grad():
        context = prior.context(text.bfloat16())
        half = prior(x.bfloat16(), torch.tensor([0.9, 0.3]), context)
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), exact) < 0.1
