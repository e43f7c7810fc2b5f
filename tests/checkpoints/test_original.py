"""The original's ``.pt`` files: reading, and writing files that the original's code reads."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from torch import Tensor, nn

from wuerstchen.checkpoints.diffusers_config import shared_fields
from wuerstchen.checkpoints.original import find_original, network_of, read_original, write_original
from wuerstchen.checkpoints.original_config import StateDict
from wuerstchen.errors import CheckpointError
from wuerstchen.models import compressor as compressors
from wuerstchen.models.compressor import Compressor, CompressorConfig
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.efficientnet import EFFICIENTNET_V2_S
from wuerstchen.models.layers import timestep_embedding
from wuerstchen.models.paella import Paella, PaellaConfig
from wuerstchen.models.previewer import Previewer, PreviewerConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.vqgan import VQGAN, VQGANConfig

from ..configurations import narrow

PRIOR = PriorConfig(c_in=3, c=128, c_cond=10, c_r=8, depth=2, nhead=2)
DECODER = DecoderConfig(
    c_r=6,
    c_cond=12,
    c_hidden=(8, 64, 128),
    nhead=(-1, 1, 2),
    blocks=(2, 1, 2),
    level_config=("CT", "CTA", "CTA"),
    inject_effnet=(False, True, True),
    effnet_embd=5,
    clip_embd=10,
)
PAELLA = PaellaConfig(
    num_labels=11,
    c_token=6,
    c_r=10,
    c_cond=12,
    c_hidden=(8, 80, 160),
    nhead=(-1, 1, 2),
    blocks=(1, 2, 1),
    level_config=("CT", "CTA", "CTA"),
    effnet_embd=5,
    clip_embd=10,
)
VQ = VQGANConfig(bottleneck_blocks=3, embed_dim=16, latent_channels=5, num_vq_embeddings=32)


# Stage C with the structure of the original, reimplemented with torch's own attention


class TheirAttention(nn.Module):
    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(c, heads, batch_first=True)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        both = torch.cat([tokens, text], dim=1)
        return self.attn(tokens, both, both, need_weights=False)[0]


class TheirAttnBlock(nn.Module):
    def __init__(self, c: int, c_cond: int, heads: int) -> None:
        super().__init__()
        self.attention = TheirAttention(c, heads)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, c))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens = nn.functional.layer_norm(x.flatten(2).mT, x.shape[1:2], eps=1e-6)
        return x + self.attention(tokens, self.kv_mapper(text)).mT.unflatten(2, x.shape[2:])


class TheirNorm(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, c))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, c))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.square().sum((1, 2), keepdim=True).sqrt()
        return self.gamma * x * norm / (norm.mean(-1, keepdim=True) + 1e-6) + self.beta + x


class TheirResBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.channelwise = nn.Sequential(
            nn.Linear(c, 4 * c), nn.GELU(), TheirNorm(4 * c), nn.Dropout(0.1), nn.Linear(4 * c, c)
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.depthwise(x).permute(0, 2, 3, 1)
        inner = self.channelwise(nn.functional.layer_norm(inner, inner.shape[-1:], eps=1e-6))
        return x + inner.permute(0, 3, 1, 2)


class TheirTimestepBlock(nn.Module):
    def __init__(self, c: int, c_r: int) -> None:
        super().__init__()
        self.mapper = nn.Linear(c_r, 2 * c)

    def forward(self, x: Tensor, r_embed: Tensor) -> Tensor:
        scale, shift = self.mapper(r_embed)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class TheirPrior(nn.Module):
    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        c, self.c_r = config.c, config.c_r
        self.projection = nn.Conv2d(config.c_in, c, 1)
        self.cond_mapper = nn.Sequential(nn.Linear(config.c_cond, c), nn.LeakyReLU(0.2), nn.Linear(c, c))
        self.blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.blocks.append(TheirResBlock(c))
            self.blocks.append(TheirTimestepBlock(c, config.c_r))
            self.blocks.append(TheirAttnBlock(c, c, config.nhead))
        self.out = nn.Sequential(nn.Identity(), nn.Conv2d(c, 2 * config.c_in, 1))

    def forward(self, x: Tensor, r: Tensor, text: Tensor) -> Tensor:
        inner, text, r_embed = self.projection(x), self.cond_mapper(text), timestep_embedding(r, self.c_r)
        for block in self.blocks:
            if isinstance(block, TheirTimestepBlock):
                inner = block(inner, r_embed)
            elif isinstance(block, TheirAttnBlock):
                inner = block(inner, text)
            else:
                inner = block(inner)
        inner = nn.functional.layer_norm(inner.permute(0, 2, 3, 1), inner.shape[1:2], eps=1e-6)
        a, b = self.out(inner.permute(0, 3, 1, 2)).chunk(2, dim=1)
        return (x - a) / ((1 - b).abs() + 1e-5)


def in_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's names from diffusers', by the inverse of diffusers' conversion script."""
    found = dict(state)
    for key in state:
        if ".to_q." in key:
            rows = [found.pop(key.replace(".to_q.", f".to_{name}.")) for name in "qkv"]
            found[key.replace(".to_q.", ".attn.in_proj_")] = torch.cat(rows)
        elif ".to_out.0." in key:
            found[key.replace(".to_out.0.", ".attn.out_proj.")] = found.pop(key)
    if "vquantizer.embedding.weight" in found:
        found["vquantizer.codebook.weight"] = found.pop("vquantizer.embedding.weight")
    return found


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.fixture
def parts(randomise) -> dict[str, nn.Module]:
    """A small model without a compressor, which only has published sizes."""
    networks = {"vqgan": VQGAN(VQ), "decoder": Decoder(DECODER), "prior": Prior(PRIOR)}
    return {part: randomise(network) for part, network in networks.items()}


@pytest.fixture
def compressor(monkeypatch) -> Compressor:
    """With few channels, which readers do not look at; its published sizes are tested by their shapes."""
    monkeypatch.setattr(compressors, "EFFICIENTNET_V2_S", narrow(EFFICIENTNET_V2_S))
    torch.manual_seed(0)
    return Compressor(CompressorConfig(c_latent=3))


@pytest.fixture
def prior_state(parts) -> dict[str, Tensor]:
    return in_original(parts["prior"].state_dict())


# Reading


def test_a_prior_of_the_originals_computes_the_same(tmp_path, randomise, relative_error):
    """Against torch's attention, whose queries, keys and values are one matrix."""
    theirs = randomise(TheirPrior(PRIOR)).eval()
    with torch.no_grad():  # 1 / |1 − b| amplifies rounding without bound where b is close to 1
        theirs.out[1].weight.mul_(0.2)
    torch.save({"ema_state_dict": theirs.state_dict()}, tmp_path / "c.pt")
    ours = read_original(tmp_path / "c.pt")["prior"]
    assert ours.config == PRIOR
    x, r, text = torch.randn(2, 3, 4, 5), torch.tensor([1.0, 0.3]), torch.randn(2, 7, 10)
    with torch.no_grad():
        assert relative_error(ours(x, r, ours.context(text)), theirs(x, r, text)) <= 1e-5
        ours.double(), theirs.double()
        x, r, text = x.double(), r.double(), text.double()
        assert relative_error(ours(x, r, ours.context(text)), theirs(x, r, text)) <= 1e-10


@pytest.mark.parametrize(
    ("part", "theirs", "config"),
    [
        ("prior", WuerstchenPrior, PRIOR),
        ("decoder", WuerstchenDiffNeXt, DECODER),
        ("vqgan", PaellaVQModel, VQ),
    ],
)
def test_the_names_are_those_of_diffusers_conversion(part, theirs, config, tmp_path, randomise):
    state = randomise(theirs(**shared_fields(config))).state_dict()
    torch.save({"state_dict": in_original(state)}, tmp_path / "model.pt")
    networks = read_original(tmp_path / "model.pt")
    assert networks.keys() == {part}
    assert networks[part].config == config
    assert_same(networks[part].state_dict(), state)


@pytest.mark.parametrize(
    ("part", "theirs", "config", "keys"),
    [
        ("vqgan", lambda: PaellaVQModel(), VQGANConfig(), 122),
        ("decoder", lambda: WuerstchenDiffNeXt(), DecoderConfig(), 814),
        ("prior", lambda: WuerstchenPrior(c=1536, c_cond=1280, depth=32, nhead=24), PriorConfig(), 520),
        ("prior", lambda: WuerstchenPrior(c=1536, depth=32, nhead=24), PriorConfig(c_cond=1024), 520),
        ("decoder", lambda: Paella(PaellaConfig()), PaellaConfig(), 610),
        ("compressor", lambda: Compressor(CompressorConfig()), CompressorConfig(), 786),
        (
            "compressor",
            lambda: Compressor(CompressorConfig(backbone="efficientnet_v2_l")),
            CompressorConfig(backbone="efficientnet_v2_l"),
            1552,
        ),
    ],
    ids=["vqgan", "v2 decoder", "v2 prior", "v1 prior", "v1 decoder", "v2 compressor", "v1 compressor"],
)
def test_published_networks_are_known_by_their_shapes(part, theirs, config, keys, monkeypatch):
    # diffusers scales weights once for every module above them, which takes half a minute.
    monkeypatch.setattr(WuerstchenDiffNeXt, "_init_weights", lambda *_: None)
    with torch.device("meta"):
        state = theirs().state_dict()
    in_file = in_original(state)
    assert len(in_file) == keys
    found, network = network_of(StateDict("published", in_file))
    assert (found, network.config) == (part, config)
    shapes = {key: tensor.shape for key, tensor in state.items()}
    assert {key: tensor.shape for key, tensor in network.state_dict().items()} == shapes


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(
            DECODER, c_hidden=(64,), nhead=(1,), blocks=(3,), level_config=("CTA",), inject_effnet=(True,)
        ),
        dataclasses.replace(DECODER, level_config=("C", "CTAC", "CAT"), blocks=(4, 2, 1)),
        dataclasses.replace(DECODER, c_in=7, c_out=1, kernel_size=5, inject_effnet=(True, False, False)),
    ],
    ids=["one level", "other patterns", "other channels and kernel"],
)
def test_decoders_of_other_shapes(config, tmp_path, randomise):
    network = randomise(Decoder(config))
    write_original({"decoder": network}, tmp_path)
    again = read_original(tmp_path)["decoder"]
    assert again.config == config
    assert_same(again.state_dict(), network.state_dict())


@pytest.mark.parametrize(
    "change", [{}, {"patch_size": 1}, {"patch_size": 4, "level_config": ("C", "CTA", "CA")}]
)
def test_decoders_of_v1(change, tmp_path, randomise):
    config = dataclasses.replace(PAELLA, **change)
    network = randomise(Paella(config))
    write_original({"decoder": network}, tmp_path)
    again = read_original(tmp_path)["decoder"]
    assert again.config == config
    assert_same(again.state_dict(), network.state_dict())


def test_what_is_read_does_not_train_and_shares_nothing(tmp_path, parts):
    """Weights that are views of one tensor could not be written as safetensors."""
    write_original(parts, tmp_path)
    for network in read_original(tmp_path).values():
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        tensors = [t for t in network.state_dict().values() if t.numel()]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
        assert all(t.is_contiguous() for t in tensors)


def test_the_type_of_the_weights_is_chosen(tmp_path, parts):
    write_original({"vqgan": parts["vqgan"]}, tmp_path)
    state = read_original(tmp_path, dtype=torch.bfloat16)["vqgan"].state_dict()
    counters = {key for key, tensor in state.items() if tensor.dtype != torch.bfloat16}
    assert counters == {"down_blocks.3.1.num_batches_tracked"}
    assert torch.equal(
        state["in_block.1.weight"], parts["vqgan"].state_dict()["in_block.1.weight"].bfloat16()
    )


def test_half_precision_files_are_read_in_full(tmp_path, parts):
    write_original({"prior": parts["prior"].half()}, tmp_path)
    assert_same(
        read_original(tmp_path)["prior"].state_dict(),
        {key: tensor.float() for key, tensor in parts["prior"].state_dict().items()},
    )


# Which dictionary of a file


def only_prior(content: object, tmp_path: Path) -> dict[str, Tensor]:
    torch.save(content, tmp_path / "c.pt")
    networks = read_original(tmp_path / "c.pt")
    assert networks.keys() == {"prior"}
    return networks["prior"].state_dict()


@pytest.mark.parametrize("name", ["ema_state_dict", "state_dict_ema"])
def test_the_average_is_preferred(name, tmp_path, parts, prior_state):
    last = {key: tensor + 1 for key, tensor in prior_state.items()}
    state = only_prior({"state_dict": last, name: prior_state}, tmp_path)
    assert_same(state, parts["prior"].state_dict())
    state = only_prior({"state_dict": prior_state, name: None}, tmp_path)
    assert_same(state, parts["prior"].state_dict())


def test_a_bare_state_dict_and_the_wrappers_of_training(tmp_path, parts, prior_state):
    wrapped = {f"module.{key}": tensor for key, tensor in prior_state.items()}
    compiled = {f"_orig_mod.{key}": tensor for key, tensor in prior_state.items()}
    both = {f"_orig_mod.{key}": tensor for key, tensor in wrapped.items()}
    other = {f"module.{key}": tensor for key, tensor in compiled.items()}
    for content in (prior_state, wrapped, {"state_dict": wrapped}, compiled, both, {"ema_state_dict": other}):
        assert_same(only_prior(content, tmp_path), parts["prior"].state_dict())


def test_what_training_leaves_in_a_file_is_ignored(tmp_path, parts, prior_state):
    """The format of train_stage_C.py."""
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": {key: tensor + 1 for key, tensor in prior_state.items()},
        "ema_state_dict": prior_state,
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_last_step": 12,
        "iter": 12,
        "metrics": {"ema_loss": 0.5},
        "grad_scaler_state_dict": {"scale": 65536.0, "_growth_tracker": 0},
        "wandb_run_id": "abc",
    }
    assert_same(only_prior(content, tmp_path), parts["prior"].state_dict())


def test_a_compressor_may_stand_alone(tmp_path, compressor):
    torch.save({"effnet_state_dict": compressor.state_dict()}, tmp_path / "b.pt")
    networks = read_original(tmp_path / "b.pt")
    assert networks.keys() == {"compressor"}
    assert_same(networks["compressor"].state_dict(), compressor.state_dict())


# Files and folders


def test_finding_files(tmp_path):
    (tmp_path / "b.pt").touch()
    (tmp_path / "a.pt").touch()
    (tmp_path / ".c.pt").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.pt").mkdir()
    assert find_original(tmp_path) == [tmp_path / "a.pt", tmp_path / "b.pt"]
    assert find_original(tmp_path / "b.pt") == [tmp_path / "b.pt"]
    for none in ("notes.txt", "folder.pt", "nowhere", "nowhere.pt"):
        assert find_original(tmp_path / none) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.pt", "does not exist. Use one of the original's .pt files, or their folder"),
        ("notes.txt", "is not a .pt file and contains none. Use one of the original's .pt files, or their"),
        (
            "empty",
            "is not a .pt file and contains none. Use one of the original's .pt files, or their folder",
        ),
    ],
)
def test_nothing_to_read(name, words, tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / name} {words}")):
        read_original(tmp_path / name)


def test_two_files_with_the_same_part(tmp_path, prior_state):
    torch.save({"ema_state_dict": prior_state}, tmp_path / "model_stage_c.pt")
    torch.save({"state_dict": prior_state}, tmp_path / "model_v2_stage_c.pt")
    words = "model_v2_stage_c.pt['state_dict'] contains a prior, and so does "
    words += f"{tmp_path / 'model_stage_c.pt'}['ema_state_dict']. Use the files of one model."
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read_original(tmp_path)


# Files that do not fit


def refused(content: object, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path / 'model.pt'))}.*{words}"):
        read_original(tmp_path / "model.pt")


SMALLEST = {
    "prior": lambda: Prior(dataclasses.replace(PRIOR, depth=1)),
    "decoder": lambda: Decoder(
        dataclasses.replace(
            DECODER,
            c_hidden=(8, 64),
            nhead=(-1, 1),
            blocks=(1, 1),
            level_config=("CT", "CTA"),
            inject_effnet=(False, True),
        )
    ),
    "v1 decoder": lambda: Paella(
        dataclasses.replace(
            PAELLA, c_hidden=(8, 80), nhead=(-1, 1), blocks=(1, 1), level_config=("CT", "CTA")
        )
    ),
    "vqgan": lambda: VQGAN(dataclasses.replace(VQ, bottleneck_blocks=1)),
}


@pytest.mark.parametrize("kinds", [1, pytest.param(5, marks=pytest.mark.slow)], ids=["one each", "all"])
@pytest.mark.parametrize("part", SMALLEST)
def test_every_tensor_is_needed_in_its_shape(part, kinds):
    """Missing, with one more row, one more axis, no values, or of whole numbers: each in one way, in turn,
    or in all of them."""
    with torch.device("meta"):
        state = in_original(SMALLEST[part]().state_dict())
    assert network_of(StateDict("place", state))[0] == part.removeprefix("v1 ")
    for number, (key, tensor) in enumerate(state.items()):
        shape = tuple(tensor.shape)
        others = [None, tensor.new_empty(1, *shape), tensor.new_empty(*shape, 0)]
        if shape and "codebook" not in key:  # which may have any number of rows
            others.append(tensor.new_empty(shape[0] + 1, *shape[1:]))
        others.append(tensor.long() if tensor.is_floating_point() else tensor.float())
        first = number % len(others)
        for other in (others[first:] + others[:first])[:kinds]:
            changed = {name: t for name, t in {**state, key: other}.items() if t is not None}
            with pytest.raises(CheckpointError, match=r"^place: .*\. (Download|Use) "):
                network_of(StateDict("place", changed))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"out.1.bias": None},
            r"\['state_dict'\]: 'out.1.bias' is missing, but must be \(6,\)",
        ),
        (
            {"out.1.weight": torch.zeros(3, 128, 1, 1)},
            r"is \(3, 128, 1, 1\), but must be \(6, 128, 1, 1\)",
        ),
        ({"out.1.bias": torch.zeros(6).long()}, "is torch.int64, but must be torch.float32"),
        ({"extra": torch.zeros(1)}, "'extra' is not a key of this prior"),
        ({"module.extra": torch.zeros(1)}, "'module.extra' is not a key of this prior"),
        (
            {"extra": 3},
            "the entry 'extra' is not a tensor. Use one of the original's files: a state dict, or one",
        ),
        ({3: torch.zeros(1)}, "the entry 3 is not a tensor"),
        ({"extra": torch.zeros(1).expand(10**6, 10**6)}, "the entry 'extra' is not a plain tensor"),
        (
            {"blocks.6.mapper.weight": torch.zeros(256, 8)},
            "'blocks.6.mapper.weight' is not a key of this prior",
        ),
        ({"blocks.8.mapper.weight": torch.zeros(1)}, "'blocks.6' is missing, but must be the next of 7"),
        ({"blocks.2999999999.mapper.weight": torch.zeros(1)}, "'blocks.6' is missing"),
        ({"blocks.-1.mapper.weight": torch.zeros(1)}, "'blocks.6' is missing"),
        ({"blocks.٦.mapper.weight": torch.zeros(1)}, "'blocks.6' is missing"),
        (
            dict.fromkeys([f"x{n}" for n in range(5000)], torch.zeros(1)),
            "contains 5040 entries, not the tensors of a network",
        ),
        ({"projection.weight": torch.zeros(96, 3, 1, 1)}, "must be a multiple of 64 along axis 0"),
        ({"projection.weight": torch.zeros(128, 0, 1, 1)}, "must be a tensor of 4 axes"),
        (
            {"blocks.1.mapper.weight": torch.zeros(256, 2)},
            "the shapes are not those of a network .c_r must be .* at least 4, got 2",
        ),
    ],
)
def test_priors_that_do_not_fit(change, words, tmp_path, prior_state):
    state = {key: value for key, value in {**prior_state, **change}.items() if value is not None}
    refused({"state_dict": state}, words, tmp_path)


def test_more_values_than_can_be_counted(parts):
    state = in_original(parts["prior"].to("meta").state_dict())
    state["projection.weight"] = torch.empty(64 * 10**12, 1, 1, 1, device="meta")
    with pytest.raises(CheckpointError, match="place: the shapes are not those of a prior"):
        network_of(StateDict("place", state))


def test_a_block_of_unknown_kind(tmp_path, parts):
    """The original's feed-forward blocks, which no published model has."""
    state = in_original(parts["decoder"].state_dict())
    for key in [key for key in state if key.startswith("down_blocks.1.2.")]:
        del state[key]
    state["down_blocks.1.2.channelwise.0.weight"] = torch.zeros(256, 64)
    refused(state, r"'down_blocks.1.2.\*' is of an unknown kind, but must be a block with one of", tmp_path)


def test_another_image_network(tmp_path):
    state = {"backbone.0.0.weight": torch.zeros(40, 3, 3, 3), "mapper.0.weight": torch.zeros(16, 1280, 1, 1)}
    refused({"effnet_state_dict": state}, r"is \(40, 3, 3, 3\), but must be 24 or 32 along axis 0", tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(2), "contains a Tensor, not tensors by name"),
        ([1, 2], "contains a list, not tensors by name"),
        ({}, "contains 0 entries, not the tensors of a network"),
        ({"iter": 3}, "the entry 'iter' is not a tensor"),
        (
            {"state_dict": 7},
            r"\['state_dict'\] contains a int, not the tensors of a network",
        ),
        ({"state_dict": {}}, r"\['state_dict'\] contains 0 entries"),
        (
            {"state_dict": {"conv.weight": torch.zeros(1)}},
            r"the keys \(the first is 'conv.weight'\) are not those of a",
        ),
    ],
)
def test_files_without_a_network(content, words, tmp_path):
    refused(content, words, tmp_path)


class Touches:
    """Creates a file when it is unpickled by plain pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


def test_code_in_a_file_is_not_run(tmp_path, prior_state):
    content = {"state_dict": prior_state, "optimizer_state_dict": Touches(tmp_path / "touched")}
    refused(content, "contains pickled objects, which are never loaded", tmp_path)
    assert not (tmp_path / "touched").exists()


def test_a_truncated_file(tmp_path, parts):
    (path,) = write_original({"prior": parts["prior"]}, tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_original(path)


# Writing


def test_a_model_comes_back_as_it_was(tmp_path, parts, compressor):
    parts["compressor"] = compressor
    paths = write_original(parts, tmp_path / "new" / "model")
    assert [path.name for path in paths] == [
        "vqgan_f4_v1_500k.pt",
        "model_v2_stage_b.pt",
        "model_v2_stage_c.pt",
    ]
    assert sorted(paths) == sorted((tmp_path / "new" / "model").iterdir())
    again = read_original(tmp_path / "new" / "model")
    assert again.keys() == parts.keys()
    for part, network in parts.items():
        assert again[part].config == network.config
        assert_same(again[part].state_dict(), network.state_dict())


@pytest.mark.parametrize(
    ("v1", "made"),
    [
        ({"decoder": Paella(PAELLA), "prior": Prior(PRIOR)}, ["model_stage_b.pt", "model_stage_c_ema.pt"]),
        ({"prior": Prior(dataclasses.replace(PRIOR, c_cond=1024))}, ["model_stage_c_ema.pt"]),
        ({"prior": Prior(dataclasses.replace(PRIOR, c_cond=1280))}, ["model_v2_stage_c.pt"]),
    ],
)
def test_the_names_of_v1(v1, made, tmp_path):
    assert [path.name for path in write_original(v1, tmp_path)] == made


def test_the_originals_code_finds_what_it_reads(tmp_path, parts, compressor):
    parts["compressor"] = compressor
    write_original(parts, tmp_path)
    files = {path.name: torch.load(path, weights_only=True) for path in tmp_path.iterdir()}
    assert {name: list(content) for name, content in files.items()} == {
        "vqgan_f4_v1_500k.pt": ["state_dict"],
        "model_v2_stage_b.pt": ["state_dict", "effnet_state_dict"],
        "model_v2_stage_c.pt": ["ema_state_dict"],
    }
    TheirPrior(PRIOR).load_state_dict(files["model_v2_stage_c.pt"]["ema_state_dict"], strict=True)
    decoder = WuerstchenDiffNeXt(**shared_fields(DECODER)).state_dict()
    assert files["model_v2_stage_b.pt"]["state_dict"].keys() == in_original(decoder).keys()
    assert all(
        isinstance(t, Tensor) for content in files.values() for s in content.values() for t in s.values()
    )


def test_a_view_is_written_without_what_it_was_cut_from(tmp_path, parts):
    prior = parts["prior"]
    rows = torch.zeros(1000, *prior.projection.weight.shape)
    rows[0] = prior.projection.weight
    prior.projection.weight = nn.Parameter(rows[0])
    (path,) = write_original({"prior": prior}, tmp_path)
    stored = torch.load(path, weights_only=True)["ema_state_dict"]["projection.weight"]
    assert stored.untyped_storage().nbytes() == stored.nbytes


def velocity(config: Any) -> Any:
    return dataclasses.replace(config, prediction="velocity")


@pytest.mark.parametrize(
    ("part", "make", "words"),
    [
        (
            "prior",
            lambda: Prior(velocity(PRIOR)),
            "it predicts the velocity, the original's networks predict noise",
        ),
        ("decoder", lambda: Decoder(velocity(DECODER)), "it predicts the velocity"),
        (
            "decoder",
            lambda: Decoder(
                dataclasses.replace(DECODER, level_config=("CT",) * 3, nhead=(-1,) * 3, clip_embd=None)
            ),
            "it reads no text, the original's decoders do",
        ),
        (
            "compressor",
            lambda: Compressor(CompressorConfig(backbone="efficientnet_lite0")),
            "its backbone is efficientnet_lite0, the original's is EfficientNetV2",
        ),
        (
            "prior",
            lambda: Prior(dataclasses.replace(PRIOR, text_blocks=2)),
            "its text_blocks is 2, the original's priors have none",
        ),
        (
            "prior",
            lambda: Prior(dataclasses.replace(PRIOR, registers=4)),
            "its registers is 4, the original's priors have none",
        ),
        (
            "prior",
            lambda: Prior(dataclasses.replace(PRIOR, nhead=4)),
            "its nhead is 4, but readers assume 64 channels per head",
        ),
        (
            "decoder",
            lambda: Decoder(dataclasses.replace(DECODER, nhead=(-1, 1, 4))),
            r"its nhead is \(-1, 1, 4\), but readers assume 64 channels per head",
        ),
        (
            "decoder",
            lambda: Paella(dataclasses.replace(PAELLA, nhead=(-1, 1, 1))),
            r"its nhead is \(-1, 1, 1\), but readers assume 80 channels per head",
        ),
        (
            "decoder",
            lambda: Decoder(dataclasses.replace(DECODER, patch_size=4)),
            "its c_in is 4, but a reader would assume 16",
        ),
        (
            "decoder",
            lambda: Decoder(dataclasses.replace(DECODER, inject_effnet=(False,) * 3)),
            "it could not be read back .the decoder: the keys",
        ),
        (
            "vqgan",
            lambda: VQGAN(dataclasses.replace(VQ, scale_factor=0.5)),
            "its scale_factor is 0.5, but a reader would assume 0.3764",
        ),
        ("previewer", lambda: Previewer(PreviewerConfig()), "the original's files cannot contain it"),
        ("text_encoder", lambda: nn.Linear(1, 1), "the original's files cannot contain it"),
    ],
)
def test_what_the_layout_cannot_hold(part, make, words, tmp_path, parts):
    words = f"^the {part} cannot be written in the original's layout: ({words}).* Omit it, or keep"
    with pytest.raises(CheckpointError, match=words):
        write_original({"vqgan": parts["vqgan"], part: make()}, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_heads_of_levels_without_attention_do_not_matter(tmp_path):
    write_original({"decoder": Decoder(dataclasses.replace(DECODER, nhead=(4, 1, 2)))}, tmp_path)
    assert read_original(tmp_path)["decoder"].config == DECODER


def test_a_network_with_adapters_is_not_written_without_them(tmp_path, parts):
    attention = parts["prior"].blocks[2].attention
    attention.to_q = nn.Sequential(attention.to_q)
    with pytest.raises(CheckpointError, match="its weights do not match its configuration"):
        write_original({"prior": parts["prior"]}, tmp_path)


def test_a_compressor_is_not_written_alone(tmp_path, compressor):
    words = "the compressor cannot be written alone: the original stores it in Stage B's file. Pass"
    with pytest.raises(CheckpointError, match=words):
        write_original({"compressor": compressor}, tmp_path)


def test_nothing_is_overwritten(tmp_path, parts):
    write_original({"prior": parts["prior"]}, tmp_path)
    with pytest.raises(CheckpointError, match=r"model_v2_stage_c\.pt already exists\. Choose another folder"):
        write_original(parts, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model_v2_stage_c.pt"]


def test_a_folder_that_is_a_file(tmp_path, parts):
    (tmp_path / "model").touch()
    with pytest.raises(
        CheckpointError, match=r"model cannot be created \(File exists\)\. Choose another folder"
    ):
        write_original(parts, tmp_path / "model")


@pytest.mark.parametrize(("module", "broken"), [(torch, "save"), (os, "replace")])
def test_a_failed_write_leaves_nothing(module, broken, tmp_path, parts, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, broken, fail)
    words = r"model_v2_stage_c\.pt cannot be written \(.*No space left on device\)\. Free some space"
    with pytest.raises(CheckpointError, match=words):
        write_original({"prior": parts["prior"]}, tmp_path)
    assert list(tmp_path.iterdir()) == []
