"""Reads and writes text encoders with their tokenizers: the small BERT, or CLIP.

``transformers`` is imported inside the functions because importing it takes as long as importing torch.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

from wuerstchen.checkpoints import int4
from wuerstchen.checkpoints.clip import (
    clip_tokenizer_of,
    read_clip,
    read_clip_tokenizer,
    write_clip,
    write_clip_tokenizer,
)
from wuerstchen.checkpoints.files import MAX_DESCRIPTION, check_header, check_is_file, read_json
from wuerstchen.checkpoints.int8 import dequantize
from wuerstchen.checkpoints.shards import read_joined
from wuerstchen.checkpoints.variants import files_of
from wuerstchen.errors import CheckpointError, UserError, docstrings_needed, shown
from wuerstchen.models.text import TextEncoder

if TYPE_CHECKING:
    from transformers import BertModel

_BERT_FIELDS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_BERT_FIELDS += ("intermediate_size", "hidden_act", "max_position_embeddings", "type_vocab_size")
_BERT_FIELDS += ("layer_norm_eps", "pad_token_id", "text_positions")

_FILES = ("config.json", "model.safetensors", "vocab.txt")
_FILES += ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
_FILES += ("special_tokens_map.json", "added_tokens.json")
_TEXTS = ("LICENSE", "README.md")


def read_text_encoder(path: Path | str, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """Reads a text encoder's ``config.json``, ``model.safetensors`` and tokenizer.

    BERT has ``vocab.txt`` and may be stored in int8 or 4 bits. CLIP has ``tokenizer.json``, or ``vocab.json``
    and ``merges.txt``. ``path`` may also be the folder of a pipeline, with subfolders ``tokenizer`` and
    ``text_encoder``. Nothing is downloaded and no code is run. Raises ``CheckpointError`` if a file is
    missing, damaged, or does not match the others.
    """
    folder = Path(path)
    if (folder / "text_encoder").is_dir() and not (folder / "config.json").exists():
        model_folder, tokenizer_folder = folder / "text_encoder", folder / "tokenizer"
    else:
        model_folder = tokenizer_folder = folder
    if _is_clip(model_folder / "config.json"):
        model = read_clip(model_folder, dtype=dtype)
        return TextEncoder.from_transformers(model, read_clip_tokenizer(tokenizer_folder, model))
    return _read_bert_encoder(folder).to(dtype)


def write_text_encoder(encoder: TextEncoder, folder: Path) -> None:
    """Writes CLIP and its tokenizer to one new folder for ``read_text_encoder``.

    Raises ``UserError`` for BERT. Copy its folder instead.
    """
    if encoder.model.config.model_type != "clip_text_model":
        raise UserError(
            "only CLIP text encoders can be saved. For any other, pass its folder as text_encoder, so that "
            "it is copied."
        )
    write_clip(encoder.model, folder)
    write_clip_tokenizer(clip_tokenizer_of(encoder), folder)


def copy_text_encoder(source: Path, target: Path) -> None:
    """Copies a text encoder from the folder ``source`` to the new folder ``target``.

    Copies only the files that ``read_text_encoder`` reads, and the license and README unless they are links:
    an untrusted folder may contain anything, and link to anything.
    """
    target.mkdir()
    whole = (source / "model.safetensors").is_file()
    shards = [] if whole else [file.name for file in files_of(source, ["model"], None)]
    index = ["model.safetensors.index.json"] if shards else []
    for name in (*_FILES, *_TEXTS, *index, *shards):
        file = source / name
        if file.is_file() and not (name in _TEXTS and file.is_symlink()):
            shutil.copyfile(file, target / name)


def _is_clip(path: Path) -> bool:
    try:
        return read_json(path).get("model_type") == "clip_text_model"
    except CheckpointError:
        return False  # the other reader has the better message


def _read_bert_encoder(folder: Path) -> TextEncoder:
    config = _read_config(folder / "config.json")
    tokenizer = _read_word_pieces(folder / "vocab.txt", config["vocab_size"])
    model = _read_bert(folder / "model.safetensors", config)
    pad_id, text_positions = config["pad_token_id"], config["text_positions"]
    try:
        return TextEncoder(model, tokenizer, pad_id=pad_id, text_positions=text_positions)
    except UserError as error:
        raise CheckpointError(f"{_quoted(folder / 'config.json')}: {error}") from error


def _quoted(path: Path) -> str:
    return f"text encoder file {str(path)!r}"


def _read_config(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    # No other fields: a configuration could choose how attention is computed, even with downloaded code.
    config = {name: raw[name] for name in _BERT_FIELDS if name in raw}
    if config.get("model_type") != "bert":
        raise CheckpointError(
            f"{_quoted(path)}: model_type must be 'bert' or 'clip_text_model', got "
            f"{shown(config.get('model_type'))}. Use the folder of a BERT or CLIP text encoder."
        )
    for field in ("vocab_size", "pad_token_id", "text_positions"):
        if type(config.get(field)) is not int:
            raise CheckpointError(
                f"{_quoted(path)}: {field} must be an integer, got "
                f"{shown(config.get(field))}. Download it again."
            )
    layers, pad = config.get("num_hidden_layers", 1), config["pad_token_id"]
    if type(layers) is not int or not 1 <= layers <= 512 or not 0 <= pad < config["vocab_size"]:
        raise CheckpointError(
            f"{_quoted(path)}: num_hidden_layers must be from 1 to 512, got {shown(layers)}, and "
            f"pad_token_id must be an id in the vocabulary, got {pad}. Download it again."
        )
    return config


def _read_word_pieces(path: Path, vocab_size: int) -> Tokenizer:
    """The uncased WordPiece tokenizer of BERT. The id of a piece is its line in ``vocab.txt``."""
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > MAX_DESCRIPTION):
            raise CheckpointError(
                f"{_quoted(path)} is not a file of at most {MAX_DESCRIPTION >> 20} MB. Download it again."
            )
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise CheckpointError(
            f"{_quoted(path)} cannot be read ({error.strerror}). "
            "Use the folder of a text encoder, or reinstall the package."
        ) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{_quoted(path)} is not UTF-8. Download it again.") from error
    ids = {piece: line for line, piece in enumerate(pieces)}
    if len(ids) != vocab_size or len(pieces) != vocab_size:
        raise CheckpointError(
            f"{_quoted(path)} has {len(ids)} different pieces in {len(pieces)} lines, but "
            f"vocab_size in config.json is {vocab_size}. Download it again."
        )
    for special in ("[UNK]", "[CLS]", "[SEP]"):
        if special not in ids:
            raise CheckpointError(f"{_quoted(path)} does not contain {special}. Download it again.")
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return tokenizer


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, and what its metadata says about how they are stored."""
    if path.exists():
        check_is_file(path)  # opening a pipe would wait forever
    check_header(path)
    with safe_open(path, framework="pt") as file:
        storage = (file.metadata() or {}).get(int4.METADATA_KEY)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return tensors, {} if storage is None else {"storage": storage}


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of its shards, in floating point.

    The type int8 tells which weights are stored in int8. Weights in 4 bits must also be announced in the
    file's metadata, because uint8 is not reserved for them.
    """
    try:
        state, header = read_joined(path, _load)
    except CheckpointError as error:
        raise CheckpointError(f"{_quoted(path)}: {error}") from error
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{_quoted(path)} cannot be read ({reason}). "
            "Use the folder of a text encoder, or reinstall the package."
        ) from error
    storage = header.get("storage")
    if storage not in (None, int4.STORAGE):
        raise CheckpointError(
            f"{_quoted(path)}: {int4.METADATA_KEY!r} in its metadata must be {int4.STORAGE!r} or absent, got "
            f"{shown(storage)}. Update wuerstchen, or download the file again."
        )
    try:
        return dequantize(int4.dequantize_groups(state) if storage == int4.STORAGE else state)
    except CheckpointError as error:
        raise CheckpointError(f"{_quoted(path)}: {error}") from error


def _read_bert(path: Path, config: dict[str, Any]) -> "BertModel":
    with docstrings_needed():
        from transformers.models.bert.configuration_bert import BertConfig
        from transformers.models.bert.modeling_bert import BertModel

    state = _read_state(path)
    try:
        # "meta" is fast, and does not change the state of torch's global generator.
        with torch.device("meta"):
            model = BertModel(BertConfig.from_dict(config), add_pooling_layer=False)
    except Exception as error:  # transformers raises many kinds of errors for invalid fields
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{_quoted(path.with_name('config.json'))} is not a valid BERT "
            f"configuration ({reason}). Download it again."
        ) from error
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise CheckpointError(
                f"{_quoted(path)}: {key!r} is {found.get(key, 'missing')} in the file, but config.json "
                f"expects {expected.get(key, 'no such tensor')}. Download both again."
            )
        if not state[key].is_floating_point():
            raise CheckpointError(
                f"{_quoted(path)}: {key!r} must contain floating-point numbers, got {state[key].dtype}. "
                "Download it again."
            )
    model.load_state_dict(state, assign=True)
    # Two buffers that are not stored.
    positions = model.config.max_position_embeddings
    model.embeddings.register_buffer(
        "position_ids", torch.arange(positions, device="cpu")[None], persistent=False
    )
    token_types = torch.zeros(1, positions, dtype=torch.long, device="cpu")
    model.embeddings.register_buffer("token_type_ids", token_types, persistent=False)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model
