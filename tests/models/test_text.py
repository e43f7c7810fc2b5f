import dataclasses
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertModel

from wuerstchen.checkpoints.int4 import quantize_groups
from wuerstchen.checkpoints.int8 import quantize_rows
from wuerstchen.checkpoints.text_encoder import copy_text_encoder, read_text_encoder
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.models.text import PromptTooLongWarning, TextEncoder

BUNDLED = Path(str(files("wuerstchen"))) / "bundled" / "text_encoder"

PROMPTS = [
    "",
    "a 3D render of a purple dromedary camel on a blue background",
    "Crème brûlée, São Paulo: 12.5% — 一只猫!",
    "antidisestablishmentarianism",
]


@pytest.fixture(scope="module")
def bundled() -> TextEncoder:
    return read_text_encoder(BUNDLED)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text encoder of a few kilobytes, with random weights."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "camel", "on", "blue", "un", "##read", "##able", ","]
    config = {
        "model_type": "bert",
        "vocab_size": len(pieces),
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 12,
        "pad_token_id": 0,
        "text_positions": 6,
    }
    torch.manual_seed(0)
    model = BertModel(BertConfig(**config), add_pooling_layer=False)
    safetensors.torch.save_file(quantize_rows(dict(model.state_dict())), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return tmp_path


def test_the_bundled_encoder_knows_what_words_mean(bundled: TextEncoder) -> None:
    """A wrong mapping of the weights or the vocabulary would not give this order."""
    prompts = ["a puppy", "a young dog", "a suspension bridge", "the colour crimson", "dark red"]
    result = bundled.encode(prompts)
    means = (result.states * result.mask[..., None]).sum(1) / result.mask.sum(1, keepdim=True)
    means = torch.nn.functional.normalize(means, dim=-1)
    likeness = means @ means.T
    assert likeness[0, 1] > likeness[0, 2] + 0.3
    assert likeness[3, 4] > likeness[3, 2] + 0.3


def test_states_equal_transformers(bundled: TextEncoder) -> None:
    tokenizer = BertTokenizer.from_pretrained(
        BUNDLED, vocab=str(BUNDLED / "vocab.txt"), local_files_only=True
    )
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=32, return_tensors="pt")
    with torch.no_grad():
        expected = bundled.model(tokens.input_ids, tokens.attention_mask).last_hidden_state
    result = bundled.encode(PROMPTS)
    assert torch.equal(result.mask, tokens.attention_mask.bool())
    torch.testing.assert_close(result.states, expected, rtol=0, atol=1e-6)


def test_shapes_and_mask(bundled: TextEncoder) -> None:
    result = bundled.encode(["", "ox"])
    assert bundled.width == 384
    assert bundled.text_positions == 32
    assert result.states.shape == (2, 32, 384)
    assert result.states.dtype == torch.float32
    assert result.mask.dtype == torch.bool
    assert result.mask.sum(1).tolist() == [2, 3]  # begin and end, and one word
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.mask = result.mask  # type: ignore[misc]


def test_a_prompt_has_the_same_states_alone_and_in_a_batch(bundled: TextEncoder) -> None:
    full = " ".join("abcdefghijklmnopqrstuvwxyz1234")  # fills all 32 positions: nothing is masked
    prompts = [*PROMPTS, full]
    together = bundled.encode(prompts).states
    for row, prompt in enumerate(prompts):
        alone = bundled.encode([prompt]).states[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=3e-6)


def test_padding_does_not_reach_the_words(bundled: TextEncoder) -> None:
    short = TextEncoder(bundled.model, bundled.tokenizer, pad_id=0, text_positions=8).encode(["a blue ox"])
    long = bundled.encode(["a blue ox"])
    torch.testing.assert_close(long.states[:, :5], short.states[:, :5], rtol=0, atol=1e-5)


def test_stays_frozen_inside_a_model_that_trains(folder: Path) -> None:
    encoder = read_text_encoder(folder)
    before = encoder.encode(["a camel"]).states
    torch.nn.Sequential(encoder).train()
    torch.testing.assert_close(
        encoder.encode(["a camel"]).states, before, rtol=0, atol=0
    )  # dropout stays off
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    weight = torch.ones(8, requires_grad=True)
    (encoder.encode(["a camel"]).states * weight).sum().backward()  # fails on tensors of inference mode
    assert weight.grad is not None


def test_reading_leaves_the_global_generator_alone(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    read_text_encoder(folder)
    assert torch.equal(torch.rand(1), expected)


def test_int8_and_floating_files_agree(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    encoder = read_text_encoder(folder)
    other = tmp_path_factory.mktemp("floating")
    shutil.copytree(folder, other, dirs_exist_ok=True)
    safetensors.torch.save_file(dict(encoder.model.state_dict()), other / "model.safetensors")
    expected = encoder.encode(["a camel, blue"]).states
    torch.testing.assert_close(read_text_encoder(other).encode(["a camel, blue"]).states, expected)


WORDS = "embeddings.word_embeddings.weight"


def _write_int4(folder: Path, changes: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    """Stores the word embeddings of a folder in 4 bits, one row also exactly, and makes further changes."""
    model = read_text_encoder(folder).model
    others = {key: tensor for key, tensor in model.state_dict().items() if key != WORDS}
    words = quantize_groups(WORDS, model.state_dict()[WORDS], 4, None, 1)
    state = {**quantize_rows(others), **words, **changes}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata)


INT4 = {"wuerstchen.storage": "int4"}


BIAS = "encoder.layer.1.output.dense.bias"


def test_word_embeddings_in_4_bits(folder: Path) -> None:
    """Catches words that are read in another order than they are written."""
    expected = read_text_encoder(folder)
    _write_int4(folder, {}, INT4)
    encoder = read_text_encoder(folder)
    for key, tensor in encoder.model.state_dict().items():
        if key != WORDS:
            torch.testing.assert_close(tensor, expected.model.state_dict()[key], rtol=1e-2, atol=1e-4)
    words, exact = encoder.model.state_dict()[WORDS], expected.model.state_dict()[WORDS]
    # Half of the coarsest step, 2 · max / 15.
    assert ((words - exact).abs() <= exact.abs().amax(1, keepdim=True) / 7).all()
    states = [each.encode(["a camel, blue"]).states for each in (encoder, expected)]
    assert torch.nn.functional.cosine_similarity(*states, dim=-1).min() > 0.9


@pytest.mark.parametrize(
    ("changes", "metadata", "message"),
    [
        ({}, None, rf"'{WORDS}' is \(12, 4\) in the file, but config.json expects \(12, 8\)"),
        ({}, {"wuerstchen.storage": "int3"}, "'wuerstchen.storage' in its metadata .* got 'int3'. Update"),
        ({WORDS: torch.zeros(12, 3, dtype=torch.uint8)}, INT4, rf"'{WORDS}.exact.* do not fit"),
        ({WORDS: torch.zeros(11, 4, dtype=torch.uint8)}, INT4, r"scale' is .* of shape \(12, 2\)"),
        ({f"{WORDS}.scale": torch.ones(12, 3)}, INT4, r"scale' is .* of shape \(12, 3\)"),
        ({BIAS: torch.zeros(8, dtype=torch.uint8)}, INT4, f"'{BIAS}.scale' is missing"),
    ],
)
def test_unsuitable_4_bit_files_are_refused(
    folder: Path, changes: dict[str, torch.Tensor], metadata: dict[str, str] | None, message: str
) -> None:
    _write_int4(folder, changes, metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_text_encoder(folder)
    assert "model.safetensors'" in str(caught.value)


def test_a_copy_of_a_4_bit_folder_has_the_same_states(folder: Path) -> None:
    _write_int4(folder, {}, INT4)
    copy_text_encoder(folder, folder / "copy")
    states = [read_text_encoder(each).encode(["a camel"]).states for each in (folder, folder / "copy")]
    assert torch.equal(*states)


def test_a_truncated_4_bit_file_is_refused(folder: Path) -> None:
    _write_int4(folder, {}, INT4)
    _truncate(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' cannot be read"):
        read_text_encoder(folder)


def test_the_bundled_weights_have_the_states_of_the_original(bundled: TextEncoder) -> None:
    """``scripts/make_text_encoder.py --reference`` wrote the states of the original fp32 weights."""
    with safetensors.safe_open(Path(__file__).with_name("text_states.safetensors"), framework="pt") as file:
        prompts, expected = json.loads(file.metadata()["prompts"]), file.get_tensor("states").float()
    text = bundled.encode(prompts)
    cosines = torch.nn.functional.cosine_similarity(text.states[text.mask], expected, dim=-1)
    assert len(cosines) > 200
    assert cosines.min() >= 0.99


def test_moves_and_follows_the_dtype(folder: Path) -> None:
    encoder = read_text_encoder(folder).to(torch.bfloat16)
    assert encoder.encode(["a"]).states.dtype == torch.bfloat16
    assert not any(tensor.is_meta for tensor in encoder.buffers())


def test_a_cut_prompt_warns_and_names_the_words(folder: Path) -> None:
    encoder = read_text_encoder(folder)
    with pytest.warns(PromptTooLongWarning, match="These words are ignored: 'Unreadable, blue'$"):
        cut = encoder.encode(["a camel on Unreadable, blue"])  # it is cut after "un"
    assert issubclass(PromptTooLongWarning, UserWarning)
    kept = encoder.encode(["a camel on un"])
    assert torch.equal(cut.mask, kept.mask)
    assert torch.equal(cut.states, kept.states)  # the end token is kept


def test_a_prompt_that_just_fits_does_not_warn(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_text_encoder(folder).encode(["a camel on blue"]).mask.all()


def test_brackets_in_a_prompt_are_not_special_tokens(folder: Path) -> None:
    encoder = read_text_encoder(folder)
    assert encoder.tokenizer.encode("[SEP]").ids == [2, 1, 1, 1, 3]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a camel", "prompts must be a list of strings, got 'a camel'"),
        ([], r"prompts must contain at least one prompt, got \[\]"),
        (["caf\udce9"], r"A prompt must be valid Unicode, got 'caf\\udce9'. Write it in UTF-8"),
    ],
)
def test_invalid_prompts_are_refused(folder: Path, prompts: Sequence[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        read_text_encoder(folder).encode(prompts)
    assert "\n" not in str(caught.value)


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = safetensors.torch.load((folder / "model.safetensors").read_bytes())
        change(state)
        safetensors.torch.save_file(state, folder / "model.safetensors")

    return damage


def _truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "config.json does not exist"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json cannot be read"),
        (_config(num_hidden_layers=10**9), "num_hidden_layers must be from 1 to 512, got 1000000000"),
        (_config(pad_token_id=-1), "pad_token_id must be an id in the vocabulary, got -1"),
        (_config(model_type="t5"), "model_type must be 'bert' or 'clip_text_model', got 't5'"),
        (_config(text_positions="6"), "text_positions must be an integer, got '6'"),
        (_config(text_positions=13), "text_positions must be from 3 to 12 for this text model, got 13"),
        (_config(num_attention_heads=3), "is not a valid BERT configuration"),
        (_config(hidden_size="eight"), "is not a valid BERT configuration"),
        (_config(intermediate_size=24), r"is \(16,\) in the file, but config.json expects \(24,\)"),
        (_config(num_hidden_layers=3), "'encoder.layer.2.*' is missing"),
        (lambda f: (f / "vocab.txt").unlink(), "vocab.txt' cannot be read"),
        (lambda f: (f / "vocab.txt").write_bytes(b"\xff\xfe"), "vocab.txt' is not UTF-8"),
        (lambda f: (f / "vocab.txt").write_text("a\nb\n"), "has 2 different pieces in 2 lines"),
        (
            lambda f: (f / "vocab.txt").write_text((f / "vocab.txt").read_text().replace("[SEP]", "sep")),
            r"does not contain \[SEP\]",
        ),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "model.safetensors' cannot be read",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b""),
            "model.safetensors' cannot",
        ),
        (_truncate, "model.safetensors' cannot be read"),
        (_weights(lambda s: s.pop(BIAS)), f"'{BIAS}' is missing"),
        (_weights(lambda s: s.update(extra=torch.ones(1))), "'extra' is .*, but config.json expects no such"),
        (_weights(lambda s: s.update({BIAS: s[BIAS].long()})), f"'{BIAS}' must contain floating-point"),
        (_weights(lambda s: s.pop("embeddings.word_embeddings.weight.scale")), "weight.scale' is missing"),
    ],
)
def test_damaged_folders_are_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_text_encoder(folder)
    assert "\n" not in str(caught.value)
    assert re.search(r"[;.] \w+ ", str(caught.value))  # what to do


def _tiny_clip() -> tuple[CLIPTextModel, CLIPTokenizer]:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [","]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "camel</w>", "mel</w>", "me", "l</w>"]
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    merges = [("c", "a"), ("m", "e"), ("me", "l</w>"), ("ca", "mel</w>")]
    tokenizer = CLIPTokenizer({piece: i for i, piece in enumerate(pieces)}, merges, model_max_length=7)
    config = CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return CLIPTextModel(config), tokenizer


def test_clip_states_follow_the_published_recipe() -> None:
    """Padded and cut to the tokenizer's length, with the mask given to the text model."""
    model, tokenizer = _tiny_clip()
    prompts = ["", "a camel", "a camel, a ox, a camel"]
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=7, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        expected = model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    # The call above stored a length of 7 in the tokenizer; the encoder must still see the lost words.
    encoder = TextEncoder.from_transformers(model, tokenizer)
    with pytest.warns(PromptTooLongWarning, match="These words are ignored: 'ox, a camel'"):
        result = encoder.encode(prompts)
    assert encoder.text_positions == 7
    assert encoder.width == 8
    assert torch.equal(result.mask, tokens.attention_mask.bool())
    torch.testing.assert_close(result.states, expected, rtol=0, atol=1e-6)


def test_importing_does_not_import_transformers() -> None:
    code = "import sys, wuerstchen.models.text; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_added_words_have_their_own_vectors(folder: Path) -> None:
    """A new word of two tokens acts as two words with these vectors would."""
    encoder = read_text_encoder(folder)
    embedding = encoder.model.get_input_embeddings()
    before = encoder.encode(["a blue camel", "[SEP] sks"])
    old = embedding.weight
    encoder.add_words({"sks": embedding.weight[[7, 5]], "<My-Dog>": torch.ones(1, 8)})  # blue, camel
    assert encoder.words == ["sks", "<My-Dog>"]
    assert encoder.tokens("a sks") == [2, 4, 12, 13, 3]
    assert encoder.tokens("<My-Dog>, asks") == [2, 14, 11, 1, 3]
    torch.testing.assert_close(encoder.encode(["a sks"]).states, before.states[:1])
    assert encoder.is_understood("sks")
    assert not encoder.is_understood("Sks")
    torch.testing.assert_close(encoder.encode(["a blue camel"]).states, before.states[:1])
    encoder.remove_words()
    encoder.remove_words()
    assert embedding.weight is old
    assert encoder.words == []
    assert torch.equal(encoder.encode(["a blue camel", "[SEP] sks"]).states, before.states)


def test_an_added_word_is_cut_like_others(folder: Path) -> None:
    encoder = read_text_encoder(folder)
    encoder.add_words({"sks": torch.ones(3, 8)})
    with pytest.warns(PromptTooLongWarning, match=r"7 tokens .* These words are ignored: 'sks'$"):
        assert encoder.tokens("a blue sks") == [2, 4, 7, 12, 13, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"x": torch.ones(1, 8), "camel": torch.ones(1, 8)}, "'camel' is already a word of the tokenizer"),
        ({" x": torch.ones(1, 8)}, "has spaces around it"),
        ({"": torch.ones(1, 8)}, "has spaces around it"),
        ({"x": torch.ones(1, 9)}, r"must have 8 values each, got shape \(1, 9\)"),
        ({"x": torch.ones(8)}, r"got shape \(8,\)"),
        ({"x": torch.ones(0, 8)}, r"got shape \(0, 8\)"),
    ],
)
def test_words_that_cannot_be_added(folder: Path, words: dict[str, torch.Tensor], message: str) -> None:
    encoder = read_text_encoder(folder)
    with pytest.raises(UserError, match=message):
        encoder.add_words(words)
    assert encoder.words == []
    assert encoder.model.get_input_embeddings().num_embeddings == 12


def test_clip_reads_added_words() -> None:
    model, tokenizer = _tiny_clip()
    encoder = TextEncoder.from_transformers(model, tokenizer)
    rows = model.get_input_embeddings().weight
    (_, a, *_) = encoder.tokens("a")
    encoder.add_words({"sks": rows[[a]].clone()})
    torch.testing.assert_close(encoder.encode(["sks a"]).states, encoder.encode(["a a"]).states)
