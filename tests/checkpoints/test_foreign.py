"""Stable Cascade's files are recognized wherever they are given."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wuerstchen.checkpoints.backbones import load_backbone
from wuerstchen.checkpoints.layouts import layout_of, read_model
from wuerstchen.checkpoints.original import read_original
from wuerstchen.cli import main
from wuerstchen.diffusers import DiffusionPipeline, WuerstchenPriorPipeline
from wuerstchen.errors import CheckpointError
from wuerstchen.lora import load_lora
from wuerstchen.models.efficientnet import EfficientNetV2
from wuerstchen.models.prior import Prior, PriorConfig

MESSAGE = "is a file of Stable Cascade, which is not supported"

# Some tensor names of each file: of its own repository, diffusers, and ComfyUI's single files.
NAMES = {
    "stage_c.safetensors": [
        "clip_txt_mapper.weight",
        "clip_img_mapper.weight",
        "down_blocks.0.0.depthwise.weight",
    ],
    "stage_b_lite_bf16.safetensors": [
        "effnet_mapper.0.weight",
        "pixels_mapper.0.weight",
        "clip_mapper.weight",
    ],
    "other.safetensors": ["model.diffusion_model.clip_txt_pooled_mapper.weight"],
    "effnet_encoder.safetensors": ["backbone.0.0.weight", "mapper.0.weight"],
    "stage_a.safetensors": ["vquantizer.codebook.weight"],
}


def write(path: Path, names: list[str]) -> Path:
    save_file({name: torch.ones(1) for name in names}, path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_single_files_and_folders_of_them(name, tmp_path):
    path = write(tmp_path / name, NAMES[name])
    for given in (path, tmp_path):
        with pytest.raises(CheckpointError, match=MESSAGE):
            read_model(given)


@pytest.mark.parametrize(
    "kind", ["StableCascadePriorPipeline", "StableCascadeDecoderPipeline", "StableCascadeCombinedPipeline"]
)
def test_pipelines_of_diffusers(kind, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, "prior": ["x", "y"]}))
    with pytest.raises(CheckpointError, match=MESSAGE):
        read_model(tmp_path)
    for loader in (DiffusionPipeline, WuerstchenPriorPipeline):
        with pytest.raises(CheckpointError, match=MESSAGE):
            loader.from_pretrained(tmp_path)


def test_a_network_of_diffusers(tmp_path, write_published):
    root = write_published(tmp_path / "model")
    (tmp_path / "network").mkdir()
    (tmp_path / "network" / "config.json").write_text('{"_class_name": "StableCascadeUNet"}')
    with pytest.raises(CheckpointError, match=MESSAGE):
        layout_of(tmp_path / "network")
    (root / "decoder" / "config.json").write_text('{"_class_name": "StableCascadeUNet"}')
    with pytest.raises(CheckpointError, match=MESSAGE):
        read_model(root)


def test_torch_files(tmp_path):
    torch.save({name: torch.ones(1) for name in NAMES["stage_c.safetensors"]}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=MESSAGE):
        read_original(tmp_path / "c.pt")


def test_its_compressor_is_not_a_backbone(tmp_path):
    path = write(tmp_path / "effnet_encoder.safetensors", NAMES["effnet_encoder.safetensors"])
    with pytest.raises(CheckpointError, match=MESSAGE):
        load_backbone(EfficientNetV2(), path)


@pytest.mark.parametrize(
    "layer",
    [
        "lora_prior_unet_down_blocks_0_2_attention_attn_in_proj",
        "down_blocks.1.5.attention.to_q",
        "lora_unet_clip_txt_mapper",
        "up_blocks.0.0.channelwise.4",
    ],
)
def test_adapters(layer):
    prior = Prior(PriorConfig(c_in=4, c=16, c_cond=12, c_r=8, depth=1, nhead=2))
    tensors = {f"{layer}.lora_down.weight": torch.ones(1, 16), f"{layer}.lora_up.weight": torch.ones(16, 1)}
    with pytest.raises(CheckpointError, match="is an adapter for Stable Cascade, which is not supported"):
        load_lora(prior, tensors)


@pytest.mark.parametrize("layer", ["lora_unet_down_blocks_1_attentions_0_proj_in", "blocks.9.attention.to_q"])
def test_adapters_of_others_are_not_called_so(layer):
    prior = Prior(PriorConfig(c_in=4, c=16, c_cond=12, c_r=8, depth=1, nhead=2))
    tensors = {f"{layer}.lora_down.weight": torch.ones(1, 16), f"{layer}.lora_up.weight": torch.ones(16, 1)}
    with pytest.raises(CheckpointError, match="is not a linear layer or a convolution of Prior"):
        load_lora(prior, tensors)


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    path = write(tmp_path / "stage_c.safetensors", NAMES["stage_c.safetensors"])
    assert main(["generate", "a cat", "--model", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert MESSAGE in err


def test_other_files_are_not_called_so(tmp_path):
    write(tmp_path / "x.safetensors", ["down_blocks.0.0.weight", "clip_mapper.weight"])
    (tmp_path / "damaged.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"is not a model: it has no model\.json"):
        layout_of(tmp_path)
