"""Paddle's tensors and folders, against networks whose linear layers compute as Paddle's do: x @ W + b."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from wuerstchen.checkpoints.diffusers import pipeline_class, read_decoder_folder, read_prior_folder
from wuerstchen.checkpoints.diffusers_config import shared_fields
from wuerstchen.checkpoints.layouts import convert, layout_of, read_model
from wuerstchen.checkpoints.paddle import PADDLE, fill_paddle, from_paddle, is_paddle, to_paddle
from wuerstchen.checkpoints.weights import StoredTensors
from wuerstchen.errors import CheckpointError
from wuerstchen.models.decoder import Decoder, DecoderConfig
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.vqgan import VQGAN, VQGANConfig

PRIOR = PriorConfig(c_in=3, c=16, c_cond=16, c_r=32, depth=2, nhead=2)
DECODER = DecoderConfig(
    c_r=16,
    c_cond=16,
    c_hidden=(8, 16),
    nhead=(-1, 2),
    blocks=(1, 2),
    level_config=("CT", "CTA"),
    inject_effnet=(False, True),
    effnet_embd=5,
    clip_embd=16,
)
VQ = VQGANConfig(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=4)  # as many codes as channels: square
CLIP = CLIPTextConfig(
    vocab_size=24,
    hidden_size=24,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=24,
    bos_token_id=22,
    eos_token_id=23,
    pad_token_id=23,
)


class PaddleLinear(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(c_in, c_out))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def as_paddle(network: nn.Module) -> nn.Module:
    """The network with other linear layers."""
    for name, child in network.named_children():
        if isinstance(child, nn.Linear):
            setattr(network, name, PaddleLinear(child.in_features, child.out_features))
        else:
            as_paddle(child)
    return network.eval()


def stored(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that Paddle saves for such a network."""
    return {
        key.replace("running_mean", "_mean").replace("running_var", "_variance"): tensor
        for key, tensor in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


def stored_text(network: nn.Module, *, paddlenlp: bool = False) -> dict[str, Tensor]:
    """A text encoder's, under the names of ppdiffusers' class or of PaddleNLP's."""
    state = {f"text_model.{key.removeprefix('text_model.')}": t for key, t in network.state_dict().items()}
    if not paddlenlp:
        return state
    renamed = {}
    for key, tensor in state.items():
        key = re.sub(r"embeddings\.token_embedding", "token_embedding", key)
        key = re.sub(r"embeddings\.position_embedding", "positional_embedding", key)
        key = key.replace("final_layer_norm", "ln_final").replace("encoder.layers", "transformer.layers")
        key = re.sub(r"\.mlp\.fc(\d)", r".linear\1", key).replace(".layer_norm", ".norm")
        renamed[key] = tensor
    return renamed


def filled(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network, first made on ``meta``, with the weights."""
    network.load_state_dict(from_paddle(network, tensors), assign=True)
    return network.eval()


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


# Tensors


def test_a_prior_computes_the_same(randomise, relative_error):
    """Most matrices are square, and would also fit if they were transposed."""
    theirs = randomise(as_paddle(WuerstchenPrior(**shared_fields(PRIOR))))
    with torch.no_grad():  # 1 / |1 − b| amplifies rounding without bound where b is close to 1
        theirs.out[1].weight.mul_(0.2)
    with torch.device("meta"):
        ours = Prior(PRIOR)
    filled(ours, stored(theirs))
    x, r, text = torch.randn(2, 3, 4, 5), torch.tensor([1.0, 0.3]), torch.randn(2, 7, 16)
    with torch.no_grad():
        assert relative_error(ours(x, r, ours.context(text)), theirs(x, r, text)) <= 1e-5
    assert_same(to_paddle(ours), stored(theirs))


def test_a_decoder_computes_the_same(randomise, relative_error):
    theirs = randomise(as_paddle(WuerstchenDiffNeXt(**shared_fields(DECODER))))
    with torch.device("meta"):
        ours = Decoder(DECODER)
    filled(ours, stored(theirs))
    x, r = torch.randn(2, 4, 8, 16), torch.tensor([1.0, 0.3])
    semantic_map, text = torch.randn(2, 5, 3, 3), torch.randn(2, 7, 16)
    with torch.no_grad():
        found = ours(x, r, ours.context(semantic_map, (8, 16), text))
        assert relative_error(found, theirs(x, r, semantic_map, text)) <= 1e-5
    assert_same(to_paddle(ours), stored(theirs))


def test_a_vqgan_computes_the_same(randomise, relative_error):
    theirs = randomise(as_paddle(PaellaVQModel(**shared_fields(VQ))))
    with torch.device("meta"):
        ours = VQGAN(VQ)
    filled(ours, stored(theirs))
    pixels = torch.rand(2, 3, 16, 8)
    with torch.no_grad():
        latents = theirs.encode(pixels).latents
        assert relative_error(ours.embed(pixels), latents) <= 1e-5
        assert relative_error(ours.unembed(latents), theirs.decode(latents).sample) <= 1e-5
    codes = ours.vquantizer.embedding.weight
    assert torch.equal(codes, theirs.vquantizer.embedding.weight)
    assert not torch.equal(codes, codes.T)
    assert int(ours.down_blocks[3][1].num_batches_tracked) == 0
    assert_same(to_paddle(ours), stored(theirs))


@pytest.mark.parametrize("paddlenlp", [False, True])
def test_a_text_encoder_computes_the_same(paddlenlp, randomise, relative_error):
    """All its matrices are square, the two embeddings among them."""
    theirs = randomise(as_paddle(CLIPTextModel(CLIP)))
    tensors = stored_text(theirs, paddlenlp=paddlenlp)
    assert ("text_model.transformer.layers.1.linear2.weight" in tensors) == paddlenlp
    ours = CLIPTextModel(CLIP)
    filled(ours, tensors)
    ids = torch.tensor([[22, 5, 7, 23], [22, 1, 23, 23]])
    with torch.no_grad():
        found, wanted = (network(input_ids=ids).last_hidden_state for network in (ours, theirs))
    assert relative_error(found, wanted) <= 1e-5
    assert_same(to_paddle(ours), stored_text(theirs))


def test_a_number_may_be_a_vector_of_one(randomise):
    config = VQGANConfig(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=4, latent_channels=1)
    network = randomise(VQGAN(config))
    tensors = to_paddle(network)
    flat = {name: t.squeeze() if t.ndim == 1 else t for name, t in tensors.items()}
    assert flat["down_blocks.3.1._mean"].shape == ()
    assert_same(from_paddle(network, flat), network.state_dict())


def test_bfloat16_is_stored_as_whole_numbers(randomise):
    """numpy does not support bfloat16."""
    network = randomise(Prior(PRIOR)).bfloat16()
    tensors = {name: t.contiguous().view(torch.uint16) for name, t in to_paddle(network).items()}
    assert_same(from_paddle(network, tensors), network.state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out.1.bias": None}, r"'out.1.bias' is missing in the file, but .* expects \(6,\)"),
        ({"extra": torch.ones(2)}, r"'extra' is \(2,\) in the file, but .* expects no such"),
        (
            {"blocks.1.mapper.weight": torch.ones(30, 32)},
            r"is \(30, 32\) in the file, but .* expects \(32, 32\)",
        ),
        (
            {"blocks.0.channelwise.0.weight": torch.ones(64, 16)},
            r"is \(64, 16\) in the file, but .* expects \(16, 64\)",
        ),
        ({"out.1.bias": torch.ones(6).long()}, "is torch.int64 in the file, but .* expects torch.float32"),
        ({"out.1.bias": torch.ones(6, 1)}, r"is \(6, 1\) in the file, but .* expects \(6,\)"),
    ],
)
def test_tensors_that_do_not_fit(change, words):
    tensors = {name: t for name, t in {**to_paddle(Prior(PRIOR)), **change}.items() if t is not None}
    with torch.device("meta"):
        network = Prior(PRIOR)
    with pytest.raises(CheckpointError, match=f"^the file: .*{words}.* Download both again"):
        from_paddle(network, tensors, "the file")


def test_positions_are_left_out(randomise):
    network = randomise(CLIPTextModel(CLIP))
    tensors = to_paddle(network) | {"text_model.embeddings.position_ids": torch.arange(24)[None]}
    assert_same(from_paddle(network, tensors), network.state_dict())


# Files


@pytest.mark.parametrize("written", ["pd", "np", None, "pt"])
def test_what_a_file_says_about_itself(written, tmp_path, randomise):
    network = randomise(Prior(PRIOR))
    tensors = network.state_dict() if written == "pt" else to_paddle(network)
    path = tmp_path / "model.safetensors"
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata=None if written is None else {"format": written})
    with torch.device("meta"):
        again = Prior(PRIOR)
    fill_paddle(again, StoredTensors.of([path]), torch.float32)
    assert_same(again.state_dict(), network.state_dict())
    assert all(tensor.is_contiguous() for tensor in again.state_dict().values())
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())


def test_another_format(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(1)}, path, metadata={"format": "flax"})
    with pytest.raises(CheckpointError, match="must be pd, np or pt, got 'flax'"):
        fill_paddle(Prior(PRIOR), StoredTensors.of([path]), torch.float32)


# Folders


def in_paddle(published: Path, folder: Path, pipelines, *, paddlenlp: bool) -> Path:
    """A folder in the style of Paddle's community: in fp16, without tokenizer.json."""
    shutil.copytree(published, folder)
    for place, pipeline in ((folder, pipelines.decoder), (folder / "prior_pipeline", pipelines.prior)):
        index = json.loads((place / "model_index.json").read_text())
        del index["_diffusers_version"]
        library = "paddlenlp.transformers" if paddlenlp else "ppdiffusers.transformers"
        index |= {"_ppdiffusers_version": "0.24.0", "scheduler": ["ppdiffusers", "DDPMWuerstchenScheduler"]}
        index |= {"text_encoder": [library, "CLIPTextModel"], "tokenizer": [library, "CLIPTokenizer"]}
        (place / "model_index.json").write_text(json.dumps(index))
        for part in {"decoder", "vqgan", "prior", "text_encoder"} & index.keys():
            for old in (place / part).glob("*.safetensors"):
                old.unlink()
            network = getattr(pipeline, part)
            linear = {f"{n}.weight" for n, m in network.named_modules() if isinstance(m, nn.Linear)}
            state = {key: t.T if key in linear else t for key, t in network.state_dict().items()}
            holder = nn.Module()
            holder.state_dict = lambda state=state: state
            text = part == "text_encoder"
            tensors = stored_text(holder, paddlenlp=paddlenlp) if text else stored(holder)
            name = "model.safetensors" if text else "diffusion_paddle_model.safetensors"
            half = {key: tensor.half().contiguous() for key, tensor in tensors.items()}
            save_file(half, place / part / name, metadata={"format": "np" if text else "pd"})
    return folder


@pytest.fixture(scope="module")
def published(write_published, tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(params=[False, True], ids=["ppdiffusers", "paddlenlp"])
def paddle_folder(request, published, diffusers_pipelines, tmp_path):
    return in_paddle(published, tmp_path / "paddle", diffusers_pipelines, paddlenlp=request.param)


def test_a_folder_of_paddle_is_read(paddle_folder, published):
    """fp16 of the values in diffusers' folder."""
    assert is_paddle(paddle_folder)
    assert is_paddle(paddle_folder / "prior_pipeline")
    assert layout_of(paddle_folder) == "paddle"
    ours, theirs = read_model(paddle_folder), read_model(published)
    assert ours.settings == theirs.settings
    for part, network in theirs.networks().items():
        half = {k: t.half().float() if t.is_floating_point() else t for k, t in network.state_dict().items()}
        assert_same(ours.networks()[part].state_dict(), half)
    states = [model.text_encoder.encode(["a Cat", ""]).states for model in (ours, theirs)]
    torch.testing.assert_close(*states, rtol=1e-2, atol=1e-2)


def test_the_halves_are_read_apart(paddle_folder):
    prior = read_prior_folder(paddle_folder / "prior_pipeline", layout=PADDLE, given=["text_encoder"])
    assert prior.prior is not None
    assert (prior.latent_mean, prior.latent_std) == (42.0, 1.0)
    decoder = read_decoder_folder(paddle_folder, layout=PADDLE, dtype=torch.bfloat16)
    assert {p.dtype for p in decoder.decoder.parameters()} == {torch.bfloat16}


def test_the_two_layouts_are_not_taken_for_one_another(published, paddle_folder):
    assert not is_paddle(published)
    with pytest.raises(CheckpointError, match=r"must be .*, got \[.ppdiffusers|got \[.paddlenlp"):
        read_decoder_folder(paddle_folder)
    with pytest.raises(CheckpointError, match=r"got \['diffusers', 'DDPMWuerstchenScheduler'\]"):
        pipeline_class(published, PADDLE)


def test_pickles_of_paddle_are_refused_with_a_way_out(paddle_folder):
    weights = paddle_folder / "decoder" / "diffusion_paddle_model.safetensors"
    weights.rename(weights.with_name("model_state.pdparams"))
    with pytest.raises(CheckpointError, match=r"decoder contains Paddle's pickles .* save it with save_pret"):
        read_model(paddle_folder)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_a_folder_is_written_as_paddle_reads_it(storage, published, tmp_path, diffusers_pipelines):
    convert(published, tmp_path / "new", "paddle", storage=storage)
    theirs = in_paddle(published, tmp_path / "theirs", diffusers_pipelines, paddlenlp=False)
    index, wanted = (json.loads((f / "model_index.json").read_text()) for f in (tmp_path / "new", theirs))
    version = index.pop("_ppdiffusers_version")
    assert version >= wanted.pop("_ppdiffusers_version")
    assert index == {key: value for key, value in wanted.items() if value != [None, None]}
    files, same = (
        sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
        for folder in (theirs, tmp_path / "new")
    )
    assert len(files) == 5
    assert same == files
    for file in files:
        with safe_open(tmp_path / "new" / file, "pt") as one, safe_open(theirs / file, "pt") as other:
            assert one.metadata() == other.metadata()
        found = load_file(tmp_path / "new" / file)
        assert {t.dtype for t in found.values()} == {getattr(torch, storage)}
        assert_same({name: t.half() for name, t in found.items()}, load_file(theirs / file))
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"):
        assert (tmp_path / "new" / name).is_file()


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_an_index_that_cannot_be_read(content, tmp_path):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model_index\.json (cannot be read|is not a JSON object)"):
        is_paddle(tmp_path)
    (tmp_path / "model_index.json").write_text('{"a": [], "b": [null, null], "c": 3, "d": ["x"]}')
    assert not is_paddle(tmp_path)
