"""Reads and writes CLIP text encoders and tokenizers in the layout of ``transformers``.

``transformers`` is imported inside the functions because importing it takes as long as importing torch.
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wuerstchen.checkpoints.files import read_json, write_json, write_safetensors
from wuerstchen.checkpoints.weights import StoredTensors, fill
from wuerstchen.errors import CheckpointError, docstrings_needed, shown
from wuerstchen.models.text import TextEncoder

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

Fill = Callable[[nn.Module, StoredTensors, torch.dtype], None]
"""Loads stored tensors, under the names of one layout, into a network on ``meta``."""

PREFIX = "text_model."
_POSITIONS = "embeddings.position_ids"  # a buffer that older versions of transformers stored
_MAX_WIDTH, _MAX_LAYERS, _MAX_WORDS = 65_536, 512, 10_000_000
_MAX_VOCABULARY = 32 << 20
"""Size limit of a vocabulary file in bytes. CLIP's has 2 MB."""
_MAX_POST_PROCESSOR = 4096
"""Length limit in characters. It runs for every text. CLIP's adds two tokens."""
_TOKENIZER_FIELDS = {"bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "errors"}
_TOKENIZER_FIELDS |= {"added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"}
_TOKENIZER_FIELDS |= {"add_prefix_space", "padding_side", "split_special_tokens", "do_lower_case"}
_TOKENIZER_FIELDS |= {"clean_up_tokenization_spaces", "add_bos_token", "add_eos_token"}


@dataclass(frozen=True, kw_only=True)
class CLIPTextFields:
    """The configuration of a CLIP text model. Only these fields of a ``config.json`` are used.

    This way, a configuration can neither name code nor choose how attention is computed.
    """

    vocab_size: int = 49_408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float | int = 1e-5
    attention_dropout: float | int = 0.0
    bos_token_id: int = 49_406
    eos_token_id: int = 49_407
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        limits = {
            "vocab_size": _MAX_WORDS,
            "hidden_size": _MAX_WIDTH,
            "intermediate_size": 4 * _MAX_WIDTH,
            "projection_dim": _MAX_WIDTH,
            "num_hidden_layers": _MAX_LAYERS,
            "num_attention_heads": _MAX_WIDTH,
            "max_position_embeddings": _MAX_WIDTH,
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise CheckpointError(f"{name} must be an integer from 1 to {limit}, got {shown(value)}.")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= _MAX_WORDS:
                raise CheckpointError(f"{name} must be the id of a token, got {shown(value)}.")
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                "hidden_size must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}, got {self.hidden_size}."
            )
        if self.hidden_act not in ("gelu", "quick_gelu"):
            raise CheckpointError(f"hidden_act must be gelu or quick_gelu, got {shown(self.hidden_act)}.")
        for name in ("layer_norm_eps", "attention_dropout"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < 1:
                raise CheckpointError(f"{name} must be at least 0 and below 1, got {shown(value)}.")


def fill_torch(network: nn.Module, stored: StoredTensors, dtype: torch.dtype) -> None:
    """Loads tensors under PyTorch's names into a network.

    Up to transformers 4, CLIP's keys have the prefix ``text_model.``. Both kinds of keys are read.
    """
    keys = network.state_dict().keys()
    with_prefix = any(name.startswith(PREFIX) for name in stored.shapes)
    ours_with_prefix = any(key.startswith(PREFIX) for key in keys)
    if with_prefix and not ours_with_prefix:
        names = {key: PREFIX + key for key in keys}
    elif ours_with_prefix and not with_prefix:
        names = {key: key.removeprefix(PREFIX) for key in keys}
    else:
        names = {}
    fill(network, stored, names, dtype, ignored=(_POSITIONS, PREFIX + _POSITIONS))


def read_clip(
    folder: Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    stems: Sequence[str] = ("model", "pytorch_model"),
    variant: str | None = None,
    fill_from: Fill = fill_torch,
) -> "CLIPTextModel":
    """Reads a CLIP text model, frozen and in eval mode. ``dtype`` None keeps the stored dtype.

    Shapes are compared with the header of the weights before anything is allocated. Raises
    ``CheckpointError`` for a missing or damaged file, another kind of model, or shapes that do not match.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type", "clip_text_model") != "clip_text_model":
        raise CheckpointError(
            f"{path}: model_type must be 'clip_text_model', got {shown(raw['model_type'])}. "
            "Use the folder of the text encoder."
        )
    known = {field.name for field in dataclasses.fields(CLIPTextFields)}
    try:
        # A missing token may be written as null.
        fields = CLIPTextFields(**{k: v for k, v in raw.items() if k in known and v is not None})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error} Download it again.") from None
    stored = StoredTensors.in_folder(folder, stems, variant)

    with docstrings_needed():
        from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**dataclasses.asdict(fields)))
    fill_from(model, stored, stored.dtype() if dtype is None else dtype)
    # A buffer that current files do not contain.
    embeddings = next(m for m in model.modules() if hasattr(m, "position_embedding"))
    embeddings.register_buffer(
        "position_ids", torch.arange(fields.max_position_embeddings, device="cpu")[None], persistent=False
    )
    return model


def read_clip_tokenizer(folder: Path, model: "CLIPTextModel | None" = None) -> "CLIPTokenizer":
    """Reads a CLIP tokenizer: ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.

    Raises ``CheckpointError`` if a file is missing or damaged, or if it has more tokens than ``model``.
    """
    whole = (folder / "tokenizer.json").is_file()
    for name in () if whole else ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is not a tokenizer: it has no tokenizer.json and no "
                f"{name}. Download the model again."
            )

    from transformers import CLIPTokenizer

    try:
        with _harmless_copy(folder, whole) as copy:
            tokenizer = CLIPTokenizer.from_pretrained(str(copy), local_files_only=True)
        tokenizer.name_or_path = str(folder)
        tokenizer.backend_tokenizer.encode("a Cat, 1 ü")  # fails if unknown letters have no token
        tokens, pad = max(tokenizer.get_vocab().values()) + 1, tokenizer.pad_token_id
    except CheckpointError:
        raise
    except Exception as error:  # transformers and tokenizers raise almost anything for damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{folder} is not a CLIP tokenizer ({reason}). Download the model again."
        ) from error
    if pad is None:
        raise CheckpointError(f"{folder} has no padding token, which CLIP needs. Download the model again.")
    limit = tokenizer.model_max_length
    if type(limit) not in (int, float) or not limit >= 3:
        raise CheckpointError(
            f"{folder}: model_max_length must be at least 3, got {shown(limit)}. Download the model again."
        )
    if model is not None and tokens > model.config.vocab_size:
        raise CheckpointError(
            f"{folder} has {tokens} tokens, but the text encoder has {model.config.vocab_size}. "
            "Download both again, from the same model."
        )
    if model is not None:  # transformers writes 10³⁰ if there is no limit
        tokenizer.model_max_length = int(min(limit, model.config.max_position_embeddings))
    return tokenizer


@contextlib.contextmanager
def _harmless_copy(folder: Path, whole: bool) -> Iterator[Path]:
    """A copy of ``folder`` with only what CLIP's tokenizer needs.

    transformers builds everything but the vocabulary itself, but would also follow other settings in
    ``tokenizer.json``: padding to 10⁹ tokens would run out of memory.
    """
    with tempfile.TemporaryDirectory(prefix="wuerstchen-tokenizer-") as name:
        copy = Path(name)
        if whole:
            raw = read_json(folder / "tokenizer.json", _MAX_VOCABULARY)
            taken = {key: raw.get(key) for key in ("version", "added_tokens", "post_processor", "model")}
            if len(json.dumps(taken["post_processor"])) > _MAX_POST_PROCESSOR:
                raise CheckpointError(
                    f"{folder / 'tokenizer.json'}: post_processor has more than {_MAX_POST_PROCESSOR} "
                    "characters. Download the model again."
                )
            write_json(copy / "tokenizer.json", taken)
        else:
            write_json(copy / "vocab.json", read_json(folder / "vocab.json", _MAX_VOCABULARY))
            merges = folder / "merges.txt"
            if merges.stat().st_size > _MAX_VOCABULARY:
                raise CheckpointError(
                    f"{merges} has more than {_MAX_VOCABULARY >> 20} MB. Download the model again."
                )
            shutil.copyfile(merges, copy / "merges.txt")
        for file in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            if (folder / file).is_file():
                raw = read_json(folder / file)
                known = file != "tokenizer_config.json"
                write_json(copy / file, {k: v for k, v in raw.items() if known or k in _TOKENIZER_FIELDS})
        yield copy


def clip_tokenizer_of(encoder: TextEncoder) -> "CLIPTokenizer":
    """A ``transformers`` tokenizer equal to that of a text encoder."""
    from transformers import CLIPTokenizer

    pieces = json.loads(encoder.tokenizer.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in pieces["merges"]]
    return CLIPTokenizer(
        vocab=pieces["vocab"],
        merges=merges,
        pad_token=encoder.tokenizer.id_to_token(encoder.pad_id),
        model_max_length=encoder.text_positions,
    )


def write_clip(
    model: nn.Module,
    folder: Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    written: str = "pt",
    dtype: torch.dtype | None = None,
) -> None:
    """Writes ``config.json`` and ``model.safetensors``, with names that all versions of transformers read.

    ``tensors`` are the model's tensors as another program stores them, ``written`` is the name of its format.
    Weights are stored in ``dtype`` if it is given.
    """
    folder.mkdir()
    fields = {field.name: getattr(model.config, field.name) for field in dataclasses.fields(CLIPTextFields)}
    description = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **fields}
    write_json(folder / "config.json", description)
    state = model.state_dict() if tensors is None else tensors
    state = {PREFIX + key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
    write_safetensors(state, folder / "model.safetensors", {"format": written}, dtype)


def write_clip_tokenizer(tokenizer: "CLIPTokenizer", folder: Path) -> None:
    """Writes ``tokenizer.json`` for current versions of transformers, vocabulary and merges for older ones.

    Raises ``CheckpointError`` if they cannot be written.
    """
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise CheckpointError(
            f"{folder} cannot be written ({error}). Free some space or choose another folder."
        ) from error
    pieces = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", pieces["vocab"])
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in pieces["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
