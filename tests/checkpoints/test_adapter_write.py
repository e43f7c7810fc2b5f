"""Adapters that are written here have the same effect in diffusers, peft and kohya's formula, and back."""

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path

import peft
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, WuerstchenPriorPipeline
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from wuerstchen.checkpoints.adapter_metadata import AdapterMetadata, weights_hash
from wuerstchen.checkpoints.adapter_write import dotted_name, file_name, write_adapter
from wuerstchen.checkpoints.adapters import METADATA, PEFT_CONFIG, Adapter, LayerTensors, read_adapter
from wuerstchen.diffusers import WuerstchenPriorPipeline as OurPipeline
from wuerstchen.errors import CheckpointError, UserError, UserNotice
from wuerstchen.lora import adapter_tensors, fuse_lora, load_lora, unfuse_lora, unload_lora
from wuerstchen.models.prior import Prior, PriorConfig

SIZES = {"c_in": 4, "c": 16, "c_cond": 12, "c_r": 8, "depth": 2, "nhead": 2, "dropout": 0.0}
QUERY = "blocks.2.attention.to_q"
METADATA_OF_ALL = AdapterMetadata(
    title="my dog",
    base_model="warp-ai/wuerstchen",
    base_hash="0123abcd",
    trigger_words=("sks dog", "ohwx"),
    images=12,
    updates=300,
    licence="CC0-1.0",
)


@pytest.fixture
def prior(randomise) -> Prior:
    prior = randomise(Prior(PriorConfig(**SIZES))).eval().requires_grad_(False)
    prior.out[1].weight.mul_(0.2)  # 1 / |1 − b| amplifies rounding without bound where b is close to 1
    return prior


def pipeline_of(prior: Prior) -> WuerstchenPriorPipeline:
    model = WuerstchenPrior(**SIZES).eval()
    model.load_state_dict(prior.state_dict())
    return WuerstchenPriorPipeline(
        tokenizer=None, text_encoder=None, prior=model, scheduler=DDPMWuerstchenScheduler()
    )


def run(prior: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x, text = torch.randn(2, 4, 3, 5, generator=generator), torch.randn(2, 7, 12, generator=generator)
    r = torch.tensor([0.9, 0.3])
    with torch.no_grad():
        return prior(x, r, prior.context(text)) if isinstance(prior, Prior) else prior(x, r, text)


def adapter_for(prior: Prior, *, dora: bool = False, mixed: bool = True, only: str = "") -> Adapter:
    """An adapter of all linear layers and 1×1 convolutions, with ranks and alphas that differ by layer."""
    generator = torch.Generator().manual_seed(3)
    layers = {}
    for number, (name, layer) in enumerate(prior.named_modules()):
        kernel = getattr(layer, "kernel_size", ())
        if not isinstance(layer, nn.Linear | nn.Conv2d) or kernel == (3, 3) or only not in name:
            continue
        rank = 2 + number % 3 if mixed else 4
        out, into = layer.weight.shape[:2]
        a = torch.randn(rank, into, *kernel, generator=generator) * 0.2
        b = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * 0.2
        norms = layer.weight.flatten(1).norm(dim=1) * (1 + torch.rand(out, generator=generator))
        layers[name] = LayerTensors(a, b, [4.0, 1.0, 2.5][number % 3], norms if dora else None)
    return Adapter(prior=layers, metadata=replace(METADATA_OF_ALL, base_hash=weights_hash(prior)))


def fused(prior: Prior, adapter: Adapter) -> Tensor:
    """The output with the adapter in the weights, by the formulas of LoRA and DoRA (Eq. 5)."""
    changed = Prior(prior.config)
    changed.load_state_dict(prior.state_dict())
    for name, layer in adapter.prior.items():
        weight = changed.eval().get_submodule(name).weight.data
        delta = (layer.b.flatten(1) @ layer.a.flatten(1)) * layer.alpha / layer.a.shape[0]
        adapted = weight.flatten(1) + delta
        if layer.magnitude is not None:
            adapted = adapted / adapted.norm(dim=1, keepdim=True) * layer.magnitude[:, None]
        weight.copy_(adapted.view_as(weight))
    return run(changed)


def assert_same(ours: Adapter, other: Adapter) -> None:
    assert ours.prior.keys() == other.prior.keys()
    for name, layer in ours.prior.items():
        found = other.prior[name]
        rank = layer.a.shape[0]
        alpha = found.alpha if found.alpha is not None else other.prior_config.alpha([name], rank)
        assert alpha == layer.alpha
        for mine, theirs in ((layer.a, found.a), (layer.b, found.b), (layer.magnitude, found.magnitude)):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_what_is_written_is_read_again_with_the_same_effect(prior, tmp_path, form, dora, relative_error):
    adapter = adapter_for(prior, dora=dora)
    expected, plain = fused(prior, adapter), run(prior)
    path = write_adapter(tmp_path / "new" / "x.safetensors", adapter, form=form)
    load_lora(prior, path)
    assert relative_error(run(prior), expected) <= 1e-4
    assert relative_error(plain, expected) > 0.05
    # From the network to the file and back. kohya's names have no dots.
    again = Adapter(prior=adapter_tensors(prior), metadata=adapter.metadata)
    unload_lora(prior)
    assert torch.equal(run(prior), plain)
    assert_same(adapter, again)
    read = read_adapter(write_adapter(tmp_path / "new" / "x.safetensors", again, form=form))
    assert read.metadata == adapter.metadata
    assert_same(adapter, replace(read, prior={dotted_name(n): layer for n, layer in read.prior.items()}))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_diffusers_loads_it_with_the_same_effect(prior, tmp_path, dora, mixed, relative_error):
    adapter = adapter_for(prior, dora=dora, mixed=mixed)
    path = write_adapter(tmp_path / "pytorch_lora_weights.safetensors", adapter)
    pipe = pipeline_of(prior)
    pipe.load_lora_weights(str(tmp_path), adapter_name="mine")
    assert relative_error(run(pipe.prior), fused(prior, adapter)) <= 1e-4
    load_lora(prior, path, adapter_name="mine")
    assert relative_error(run(prior), run(pipe.prior)) <= 1e-4
    # And from diffusers back.
    back = tmp_path / "back"
    ours = tmp_path / "ours"
    layers = peft.get_peft_model_state_dict(pipe.prior, adapter_name="mine")
    config = pipe.prior.peft_config["mine"].to_dict()
    pipe.save_lora_weights(back, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    assert_same(adapter, read_adapter(back))
    save = {"unet_lora_layers": layers, "unet_lora_adapter_metadata": config}
    OurPipeline.save_lora_weights(ours, **save)
    assert_same(adapter, read_adapter(ours))


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_strengths_of_a_dora_are_those_of_diffusers(prior, tmp_path, strength, relative_error):
    from wuerstchen.lora import set_lora

    path = write_adapter(tmp_path / "pytorch_lora_weights.safetensors", adapter_for(prior, dora=True))
    pipe = pipeline_of(prior)
    pipe.load_lora_weights(str(tmp_path), adapter_name="mine")
    pipe.set_adapters(["mine"], [strength])
    load_lora(prior, path, adapter_name="mine")
    set_lora(prior, ["mine"], [strength])
    expected = run(pipe.prior)
    assert relative_error(run(prior), expected) <= 1e-4
    plain = run(prior)
    fuse_lora(prior, safe=True)
    assert relative_error(run(prior), expected) <= 1e-4
    unfuse_lora(prior)
    assert relative_error(run(prior), plain) <= 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_the_folder(prior, tmp_path, dora, relative_error):
    adapter = adapter_for(prior, dora=dora)
    write_adapter(tmp_path / file_name("peft"), adapter, form="peft")
    model = peft.PeftModel.from_pretrained(pipeline_of(prior).prior, str(tmp_path))
    assert relative_error(run(model.base_model.model), fused(prior, adapter)) <= 1e-4
    assert json.loads((tmp_path / PEFT_CONFIG).read_text())["base_model_name_or_path"] == "warp-ai/wuerstchen"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(tmp_path / "back"))
    assert_same(adapter, read_adapter(tmp_path / "back"))


def test_the_text_encoder_too(prior, tmp_path):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    text = CLIPTextModel(config).eval()
    name = next(n for n, m in text.named_modules() if n.endswith("self_attn.q_proj"))
    layers = {name: LayerTensors(torch.ones(2, 12), torch.ones(12, 2), 3.0)}
    adapter = replace(adapter_for(prior, only="to_q"), text=layers)
    ids = torch.tensor([[0, 5, 1]])
    outputs = []
    for form in ("diffusers", "kohya"):
        path = write_adapter(tmp_path / f"{form}.safetensors", adapter, form=form)
        load_lora(prior, path, text_encoder=text)
        outputs.append((run(prior), text(ids).last_hidden_state.detach()))
        unload_lora(prior)
        unload_lora(text)
    assert all(map(torch.equal, *outputs))
    assert not torch.equal(outputs[0][1], text(ids).last_hidden_state)
    with pytest.raises(UserError, match="peft stores adapters of one network"):
        write_adapter(tmp_path / "x.safetensors", adapter, form="peft")


def test_new_words_are_stored_and_do_not_disturb_diffusers(prior, tmp_path):
    words = {"sks": torch.randn(2, 12), "a.b": torch.randn(1, 12)}
    adapter = replace(adapter_for(prior, only="to_q"), tokens=words)
    for form in ("diffusers", "kohya", "peft"):
        path = write_adapter(tmp_path / "adapter_model.safetensors", adapter, form=form)
        found = read_adapter(path).tokens
        assert found.keys() == words.keys()
        assert all(torch.equal(found[word], words[word]) for word in words)
        if form == "kohya":
            assert "bundle_emb.sks.clip_g" in load_file(path)  # OneTrainer's
        if form == "diffusers":
            pipe = pipeline_of(prior)
            pipe.load_lora_weights(str(path))
            assert pipe.get_active_adapters() == ["default_0"]
        if form == "peft":
            peft.PeftModel.from_pretrained(pipeline_of(prior).prior, str(tmp_path))
    save_file({"bundle_emb.x.clip_g": torch.ones(3)}, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"must have one matrix of shape \(count, width\)"):
        read_adapter(tmp_path / "bad.safetensors")
    save_file({"bundle_emb.x.clip_g_out": torch.ones(1, 3)}, tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match="has an output embedding of a new word"):
        read_adapter(tmp_path / "out.safetensors")


def test_names_without_dots_get_them_back(prior):
    with torch.device("meta"):
        big = Prior(PriorConfig(**SIZES | {"depth": 16}, text_blocks=2))
    names = [name for name, layer in big.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    names += [f"text_model.encoder.layers.11.{part}" for part in ("self_attn.out_proj", "mlp.fc1")]
    names += ["encoder.layer.3.attention.output.dense", "encoder.layers.0.self_attn.k_proj"]
    assert {name: dotted_name(name.replace(".", "_")) for name in names} == {name: name for name in names}


def test_depthwise_convolutions_of_onetrainer(prior, tmp_path, relative_error):
    """OneTrainer adds one value to all channels. The layer norm removes it, and peft has no such B."""
    layers = adapter_for(prior).prior | {
        "blocks.0.depthwise": LayerTensors(torch.randn(3, 16, 3, 3), torch.randn(1, 3, 1, 1), 1.0)
    }
    adapter = Adapter(prior=layers)
    load_lora(prior, write_adapter(tmp_path / "kohya.safetensors", adapter, form="kohya"))
    expected = run(prior)
    with pytest.warns(UserNotice, match="1 depthwise convolutions are left out"):
        path = write_adapter(tmp_path / "pytorch_lora_weights.safetensors", adapter)
    unload_lora(prior)
    pipe = pipeline_of(prior)
    pipe.load_lora_weights(str(path))
    assert relative_error(run(pipe.prior), expected) <= 1e-4
    layers["blocks.0.depthwise"] = LayerTensors(torch.ones(3, 16, 3, 3), torch.ones(16, 3, 1, 1), 1.0)
    with pytest.raises(UserError, match="a depthwise convolution, cannot be written"):
        write_adapter(tmp_path / "x.safetensors", Adapter(prior=layers), form="kohya")


def test_a_dora_that_cannot_be_applied(prior, tmp_path):
    def refused(message: str, **changes: Tensor | None) -> None:
        path = write_adapter(tmp_path / "x.safetensors", adapter_for(prior, dora=True), form="kohya")
        tensors = load_file(path)
        for key, value in changes.items():
            tensors.pop(key.replace("__", "."))
            if value is not None:
                tensors[key.replace("__", ".")] = value
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message):
            load_lora(prior, path)

    key = "lora_prior_unet_blocks_2_attention_to_q__dora_scale"
    refused(r"scales the inputs of layers: .* has shape \(1, 16\)", **{key: torch.ones(1, 16)})
    refused("the magnitude of .* has 15 values, not 16", **{key: torch.ones(15, 1)})
    refused("is a DoRA, but some of its layers have no magnitude", **{key: None})
    layer = LayerTensors(torch.ones(16, 16, 3, 3), torch.ones(16, 1, 1, 1), 1.0, torch.ones(16))
    path = write_adapter(tmp_path / "y.safetensors", Adapter(prior={"blocks.0.depthwise": layer}))
    with pytest.raises(CheckpointError, match="a convolution with groups, which is not supported"):
        load_lora(prior, path)


def test_metadata(tmp_path, prior):
    """All that is known stands in the header, also under the names of other programs."""
    adapter = adapter_for(prior, mixed=False)
    for form in ("diffusers", "kohya"):
        path = write_adapter(tmp_path / f"{form}.safetensors", adapter, form=form, dtype=torch.float16)
        assert read_adapter(path).metadata == adapter.metadata
        with safe_open(path, "pt") as file:
            header = file.metadata()
            assert {file.get_slice(key).get_dtype() for key in file.keys() if "alpha" not in key} == {"F16"}  # noqa: SIM118
        assert header["modelspec.trigger_phrase"] == "sks dog, ohwx"
        assert header["modelspec.license"] == "CC0-1.0"
        assert header["ss_num_train_images"] == "12"
        if form == "diffusers":
            config = json.loads(header[METADATA])
            assert config["prior.r"] == 4
            assert config["prior.target_modules"] == sorted(adapter.prior)
        else:
            assert header["ss_network_dim"] == "4"
            del header["wuerstchen"]
            assert AdapterMetadata.of_header(header) == replace(METADATA_OF_ALL, base_hash="")
    named = replace(METADATA_OF_ALL, title="other")
    assert read_adapter(write_adapter(path, adapter, named)).metadata == named
    assert AdapterMetadata().as_header().keys() == {
        "wuerstchen",
        "modelspec.sai_model_spec",
        "modelspec.architecture",
        "modelspec.implementation",
    }


@pytest.mark.parametrize(
    "header",
    [
        {"wuerstchen": "{"},
        {"wuerstchen": "[1]"},
        {"wuerstchen": json.dumps({field.name: [[1], None] for field in fields(AdapterMetadata)})},
        {"wuerstchen": json.dumps({field.name: {"a": 1} for field in fields(AdapterMetadata)})},
        {"wuerstchen": json.dumps({"images": -3, "updates": True, "trigger_words": [1]})},
        {"ss_num_train_images": "9" * 5000, "ss_steps": "²"},
    ],
)
def test_a_header_of_nonsense_is_an_empty_description(header):
    assert AdapterMetadata.of_header(header) == AdapterMetadata()


def test_long_texts_of_a_header_are_cut():
    found = AdapterMetadata.of_header(
        {"modelspec.title": "x" * 10**6, "modelspec.trigger_phrase": "y," * 500}
    )
    assert len(found.title) == 2000
    assert len(found.trigger_words) == 100


def test_the_hash_of_weights(prior, tmp_path):
    before = weights_hash(prior)
    assert len(before) == 64
    load_lora(prior, write_adapter(tmp_path / "x.safetensors", adapter_for(prior)))
    assert weights_hash(prior) == before  # adapters are no weights of the model
    unload_lora(prior)
    assert weights_hash(prior.half().float()) == before
    prior.get_submodule(QUERY).weight.mul_(1.01)
    assert weights_hash(prior) != before


def test_what_cannot_be_written(prior, tmp_path):
    adapter = adapter_for(prior, only="to_q")
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"form must be one of diffusers, kohya, peft, got 'a1111'"):
        write_adapter(path, adapter, form="a1111")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        write_adapter(tmp_path / "x.pt", adapter)
    with pytest.raises(UserError, match="no layers"):
        write_adapter(path, Adapter())
    broken = replace(adapter.prior[QUERY], b=torch.full((16, 4), float("nan")))
    with pytest.raises(UserError, match="contains NaN or infinity"):
        write_adapter(path, Adapter(prior={QUERY: broken}))
    with pytest.raises(UserError, match="has no A or no B"):
        write_adapter(path, Adapter(prior={QUERY: replace(broken, a=None)}))
    some = adapter_for(prior, only="to_k", dora=True).prior | adapter.prior
    with pytest.raises(UserError, match="others have none"):
        write_adapter(path, Adapter(prior=some))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_adapter(tmp_path / "file" / "x.safetensors", adapter)
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == ["file"]
