"""Adapters of the prior's pipeline: diffusers' methods, on files that diffusers writes."""

import inspect
import re

import pytest
import torch
from diffusers import WuerstchenPriorPipeline as TheirPriorPipeline

from wuerstchen.diffusers import WuerstchenCombinedPipeline, WuerstchenPriorPipeline
from wuerstchen.errors import CheckpointError, UserError

# diffusers omits alpha.
pytestmark = pytest.mark.filterwarnings("ignore::wuerstchen.lora.AssumedScaleWarning")

RANK = 2


def layers(network, pattern: str, seed: int) -> dict[str, torch.Tensor]:
    """Random adapters of some linear layers, with peft's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear) and pattern in name:
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, layer.in_features, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, RANK, generator=generator)
    assert tensors
    return tensors


@pytest.fixture
def folder(make_prior, tmp_path):
    """Two adapters written by diffusers: one of the prior, one also of its text encoder."""
    pipe = make_prior()
    TheirPriorPipeline.save_lora_weights(
        tmp_path / "first", unet_lora_layers=layers(pipe.prior, "attention.to_", 1)
    )
    TheirPriorPipeline.save_lora_weights(
        tmp_path / "second",
        unet_lora_layers=layers(pipe.prior, "to_k", 2),
        text_encoder_lora_layers=layers(pipe.text_encoder, "q_proj", 3),
    )
    return tmp_path


def generate(pipe) -> torch.Tensor:
    run = {"height": 128, "width": 128, "num_inference_steps": 2}
    return pipe("a", **run, generator=torch.Generator().manual_seed(0))[0]


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-2)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # diffusers, at its second adapter
def test_adapters_act_as_in_diffusers(make_prior, theirs, folder):
    file = "second/pytorch_lora_weights.safetensors"
    ours = make_prior()
    plain = generate(ours)
    both = (ours, theirs.prior(make_prior()))
    for pipe in both:
        pipe.load_lora_weights(folder / "first", adapter_name="one")
    assert same(*map(generate, both))
    assert not same(generate(ours), plain)
    for pipe in both:
        pipe.load_lora_weights(folder, weight_name=file, adapter_name="two")
        pipe.set_adapters(["one", "two"], [0.5, 0.25])
    assert same(*map(generate, both))
    assert sorted(ours.get_active_adapters()) == ["one", "two"]
    assert ours.get_list_adapters() == {"prior": ["one", "two"], "text_encoder": ["two"]}
    for pipe in both:
        pipe.set_adapters("one")
    assert same(*map(generate, both))
    assert ours.get_active_adapters() == ["one"]
    for pipe in both:
        pipe.disable_lora()
    assert same(generate(ours), plain)
    assert ours.get_active_adapters() == []
    for pipe in both:
        pipe.enable_lora()
        pipe.delete_adapters("two")
    assert same(*map(generate, both))
    assert ours.get_list_adapters() == {"prior": ["one"]}
    ours.unload_lora_weights()
    assert torch.equal(generate(ours), plain)


@pytest.mark.parametrize("part", ["kv_mapper", "to_k", "to_q"])
def test_a_callback_scales_an_adapter_as_in_diffusers(part, make_prior, theirs, tmp_path):
    """Keys and values of the text, computed once per image, kept the first scale."""
    ours = make_prior()
    TheirPriorPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers(ours.prior, part, 1))

    def scale(pipe, step, t, tensors):
        for layer in pipe.prior.modules():
            if step == 1 and hasattr(layer, "lora_A"):
                layer.set_scale("one", 4.0)
        return {}

    generated = []
    for pipe in (ours, theirs.prior(make_prior())):
        pipe.load_lora_weights(tmp_path, adapter_name="one")
        run = {"height": 128, "width": 128, "num_inference_steps": 4, "callback_on_step_end": scale}
        generated.append(pipe("a", **run, generator=torch.Generator().manual_seed(0))[0])
    torch.testing.assert_close(*generated, rtol=1e-3, atol=1e-3)


def test_fused_adapters_give_the_same_and_can_be_unfused(make_prior, folder):
    pipe = make_prior()
    plain = generate(pipe)
    pipe.load_lora_weights(folder / "second")
    pipe.set_adapters("default_0", 0.5)
    adapted = generate(pipe)
    pipe.fuse_lora(components=["unet", "text_encoder"], safe_fusing=True)
    assert same(generate(pipe), adapted)
    pipe.unfuse_lora()
    assert same(generate(pipe), adapted)
    pipe.fuse_lora(lora_scale=0.5, adapter_names=["default_0"])
    pipe.unload_lora_weights()
    assert not same(generate(pipe), plain)
    pipe.load_lora_weights(folder / "second")
    assert not same(generate(pipe), adapted)


def test_the_combined_pipeline_passes_adapters_on(make_prior, make_decoder, folder):
    prior = make_prior()
    priors = {f"prior_{name}": part for name, part in prior.components.items()}
    pipe = WuerstchenCombinedPipeline(**make_decoder().components, **priors)
    pipe.prior_pipe.set_progress_bar_config(disable=True)
    plain = generate(pipe.prior_pipe)
    pipe.load_lora_weights(folder / "first")
    assert pipe.get_list_adapters() == pipe.prior_pipe.get_list_adapters() == {"prior": ["default_0"]}
    assert not same(generate(pipe.prior_pipe), plain)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe.prior_pipe), plain)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:Adapter two was active")
def test_deleting_the_active_adapter_activates_another(make_prior, theirs, folder):
    both = (make_prior(), theirs.prior(make_prior()))
    for pipe in both:
        pipe.load_lora_weights(folder / "first", adapter_name="one")
        pipe.load_lora_weights(folder / "second", adapter_name="two")
        pipe.set_adapters("two")
        pipe.delete_adapters("two")
    assert both[0].get_active_adapters() == ["one"]
    assert same(*map(generate, both))


def test_networks_may_have_separate_weights(make_prior, theirs, folder):
    both = (make_prior(), theirs.prior(make_prior()))
    generated = []
    for weights in ({"text_encoder": 0.5, "prior": 0.1}, [{"text_encoder": 0.25}]):
        for pipe in both:
            if not pipe.get_list_adapters():
                pipe.load_lora_weights(folder / "second", adapter_name="two")
            pipe.set_adapters("two" if isinstance(weights, dict) else ["two"], weights)
        generated.append(generate(both[0]))
        assert same(generated[-1], generate(both[1]))
    assert not same(*generated)
    with pytest.raises(UserError, match="No adapter applies to 'unet'"):
        both[0].set_adapters("two", {"unet": 1.0})


def test_diffusers_loads_saved_adapters(make_prior, theirs, tmp_path):
    pipe = make_prior()
    WuerstchenPriorPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers(pipe.prior, "to_q", 4),
        text_encoder_lora_layers=layers(pipe.text_encoder, "k_proj", 5),
        weight_name="mine.safetensors",
    )
    both = (pipe, theirs.prior(make_prior()))
    for one in both:
        one.load_lora_weights(tmp_path, weight_name="mine.safetensors")
    assert same(*map(generate, both))
    pipe.save_lora_weights(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_adapters_can_be_loaded_into_offloaded_and_compiled_networks(make_prior, folder):
    pipe = make_prior()
    pipe.load_lora_weights(folder / "first")
    expected = generate(pipe)
    pipe = make_prior()
    pipe.enable_model_cpu_offload(device="cpu")
    generate(pipe)
    pipe.prior = torch.compile(pipe.prior, backend="eager")
    pipe.load_lora_weights(folder / "first")
    with torch.compiler.set_stance("force_eager"):
        assert same(generate(pipe), expected)


def test_a_pipeline_with_adapters_is_not_saved(make_prior, folder, tmp_path):
    pipe = make_prior()
    pipe.load_lora_weights(folder / "first", adapter_name="style")
    with pytest.raises(UserError, match="Adapters are loaded: style"):
        pipe.save_pretrained(tmp_path / "pipe")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipe")
    again = WuerstchenPriorPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert same(generate(again), generate(pipe))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.set_adapters("two"), r"Adapter 'two' is not loaded\. Loaded adapters: one"),
        (
            lambda pipe: pipe.set_adapters(["one"], [1.0, 2.0]),
            "one weight per adapter, got 2 weights and 1 adapters",
        ),
        (lambda pipe: pipe.delete_adapters(["one", "two"]), "Adapter 'two' is not loaded"),
        (
            lambda pipe: pipe.fuse_lora(components=["vqgan"]),
            "These components do not support adapters: vqgan",
        ),
        (lambda pipe: pipe.fuse_lora(adapter_names=["two"]), "Adapter 'two' is not loaded"),
        (lambda pipe: (pipe.disable_lora(), pipe.fuse_lora()), "no adapter is active"),
        (lambda pipe: pipe.load_lora_weights("nowhere/at/all"), "does not exist"),
        (lambda pipe: pipe.save_lora_weights("x", safe_serialization=False), "Only safetensors are written"),
    ],
)
def test_invalid_arguments_are_refused(call, message, make_prior, folder):
    pipe = make_prior()
    pipe.load_lora_weights(folder / "first", adapter_name="one")
    with pytest.raises(UserError, match=message):
        call(pipe)


def test_options_of_diffusers_are_known(make_prior, folder):
    """Options of ``load_lora_weights`` and of the functions that it calls, with neutral values."""
    pipe = make_prior()
    options = {
        "low_cpu_mem_usage": True,
        "force_download": False,
        "local_files_only": None,
        "use_safetensors": True,
        "proxies": None,
        "prefix": "unet",
        "unet_config": None,
        "return_lora_metadata": True,
        "user_agent": {},
    }
    pipe.load_lora_weights(folder / "first", "one", **options)
    assert pipe.get_active_adapters() == ["one"]
    names = inspect.signature(TheirPriorPipeline.load_lora_weights).parameters
    source = inspect.getsource(TheirPriorPipeline.lora_state_dict)
    popped = set(re.findall(r'kwargs\.pop\("(\w+)"', source))
    assert {"hotswap", "kwargs"} <= set(names)
    pipe.load_lora_weights(folder / "second", "two", **dict.fromkeys(popped - {"weight_name", "subfolder"}))
    assert inspect.signature(TheirPriorPipeline.save_lora_weights).parameters.keys() == (
        inspect.signature(WuerstchenPriorPipeline.save_lora_weights).parameters.keys()
    )
    for given, message in (
        ({"prefix": "transformer"}, r"prefix='transformer' is not supported"),
        ({"proxies": {"https": "127.0.0.1:1"}}, "proxies is not supported"),
        (
            {"unet_config": {}, "hotswap": True},
            "hotswap=True needs the name of a loaded adapter, got 'three'",
        ),
        (
            {"weight_name": "other.bin", "use_safetensors": True},
            r"has no \.safetensors files, which use_safetensors=True",
        ),
    ):
        with pytest.raises(UserError, match=message):
            pipe.load_lora_weights(folder / "first", "three", **given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bogus'"):
        pipe.load_lora_weights(folder / "first", "three", bogus=1)
    assert pipe.get_active_adapters() == ["two"]


@pytest.mark.parametrize("on", [True, False])
def test_hotswap_replaces_an_adapter(on, make_prior, folder):
    """As if the other had been loaded with that name. Active adapters and their weights stay the same."""
    pipe, expected = make_prior(), make_prior()
    plain = generate(pipe)
    for one, first in ((pipe, "first"), (expected, "second")):
        one.load_lora_weights(folder / "first", adapter_name="other")
        one.load_lora_weights(folder / first, adapter_name="swapped")
        one.set_adapters(["swapped", "other"], [0.5, 0.25])
    before = generate(pipe)
    if not on:
        pipe.disable_lora()
    pipe.load_lora_weights(folder / "second", adapter_name="swapped", hotswap=True)
    assert pipe.get_list_adapters() == {"prior": ["other", "swapped"], "text_encoder": ["swapped"]}
    if not on:
        assert torch.equal(generate(pipe), plain)
        pipe.enable_lora()
    assert sorted(pipe.get_active_adapters()) == ["other", "swapped"]
    assert same(generate(pipe), generate(expected))
    assert not same(generate(pipe), before)


def test_a_failed_hotswap_changes_nothing(make_prior, folder):
    pipe = make_prior()
    pipe.load_lora_weights(folder / "first", adapter_name="one")
    pipe.set_adapters("one", 0.5)
    before = generate(pipe)
    with pytest.raises(CheckpointError, match="is not a weight of a LoRA"):
        pipe.load_lora_weights({"a": torch.zeros(1)}, adapter_name="one", hotswap=True)
    assert pipe.get_list_adapters() == {"prior": ["one"]}
    assert torch.equal(generate(pipe), before)
    pipe.set_adapters("one", 1.0)
    pipe.load_lora_weights(folder / "first", adapter_name="waits")
    pipe.set_adapters("one", 0.5)
    pipe.load_lora_weights(folder / "second", adapter_name="waits", hotswap=True)  # inactive
    assert pipe.get_active_adapters() == ["one"]
    assert torch.equal(generate(pipe), before)


def test_the_scale_is_saved_as_in_diffusers(make_prior, theirs, tmp_path):
    ours = make_prior()
    metadata = {
        "r": RANK,
        "lora_alpha": 6,
        "target_modules": {"to_k", "to_q", "to_v", "to_out.0"},
        "use_rslora": False,
    }
    text = {"r": RANK, "lora_alpha": 1, "target_modules": ["q_proj"]}
    for kind, place in ((TheirPriorPipeline, "theirs"), (WuerstchenPriorPipeline, "ours")):
        kind.save_lora_weights(
            tmp_path / place,
            unet_lora_layers=layers(ours.prior, "attention.to_", 1),
            text_encoder_lora_layers=layers(ours.text_encoder, "q_proj", 2),
            unet_lora_adapter_metadata=dict(metadata),
            text_encoder_lora_adapter_metadata=dict(text),
        )
    other = theirs.prior(make_prior())
    ours.load_lora_weights(tmp_path / "ours", adapter_name="one")
    other.load_lora_weights(tmp_path / "theirs", adapter_name="one")
    expected = generate(other)
    assert same(generate(ours), expected)
    ours.load_lora_weights(tmp_path / "theirs", adapter_name="two")
    assert same(generate(ours), expected)
    mirror = theirs.prior(make_prior())
    mirror.load_lora_weights(tmp_path / "ours", adapter_name="one")
    assert same(generate(mirror), expected)
    with pytest.raises(UserError, match="configuration cannot be saved: JSON cannot store a Linear"):
        WuerstchenPriorPipeline.save_lora_weights(
            tmp_path / "bad",
            layers(ours.prior, "to_k", 1),
            unet_lora_adapter_metadata={"a": torch.nn.Linear(1, 1)},
        )
    with pytest.raises(UserError, match="save_function is not supported"):
        WuerstchenPriorPipeline.save_lora_weights(
            tmp_path / "bad", layers(ours.prior, "to_k", 1), save_function=torch.save
        )


def test_adapters_are_moved_to_a_device(make_prior, folder):
    pipe = make_prior()
    pipe.load_lora_weights(folder / "second", adapter_name="one")
    expected = generate(pipe)
    pipe.set_lora_device("one", "meta")
    with pytest.raises(
        UserError, match=r"Adapter 'one' is active, but on another device.*set_lora_device\('one'"
    ):
        generate(pipe)
    pipe.disable_lora()
    assert not same(generate(pipe), expected)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(folder / "second", adapter_name="one")
    pipe.set_lora_device(["one"], "cpu")
    assert torch.equal(generate(pipe), expected)
    with pytest.raises(UserError, match="Adapter 'two' is not loaded"):
        pipe.set_lora_device(["two"], "cpu")
    with pytest.raises(UserError, match="device 'nowhere' is not available"):
        pipe.set_lora_device(["one"], "nowhere")
    pipe.enable_lora_hotswap(target_rank=64)
    assert pipe.num_fused_loras == 0
    pipe.fuse_lora()
    assert pipe.fused_loras == {"one"}
