"""Reads folders of ppdiffusers, PaddlePaddle's port of diffusers, with the same pipelines, names and files.

The tensors differ: the matrix of a linear layer is stored as (in, out), the statistics of BatchNorm have
other names, and counters are omitted. Shapes alone do not tell which matrices to transpose: embeddings are
matrices too, and a square matrix has the same shape either way. So the network's layers decide.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wuerstchen.checkpoints.clip import PREFIX, fill_torch
from wuerstchen.checkpoints.diffusers import TensorLayout
from wuerstchen.checkpoints.files import read_json
from wuerstchen.checkpoints.weights import StoredTensors
from wuerstchen.errors import CheckpointError

_STATISTICS = {".running_mean": "._mean", ".running_var": "._variance"}
_COUNTER = ".num_batches_tracked"
_POSITIONS = "position_ids"
# Names in PaddleNLP's own CLIP, which ppdiffusers used before it ported the one of transformers.
_PADDLENLP = {
    "text_model.embeddings.token_embedding.": "text_model.token_embedding.",
    "text_model.embeddings.position_embedding.": "text_model.positional_embedding.",
    "text_model.final_layer_norm.": "text_model.ln_final.",
    "text_model.encoder.layers.": "text_model.transformer.layers.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".mlp.fc1.": ".linear1.",
    ".mlp.fc2.": ".linear2.",
}


def is_paddle(folder: Path) -> bool:
    """Whether the ``model_index.json`` in a folder names classes of Paddle's libraries.

    Raises ``CheckpointError`` if it cannot be read.
    """
    entries = read_json(folder / "model_index.json").values()
    libraries = [str(entry[0]) for entry in entries if isinstance(entry, list) and entry]
    return any(library.split(".")[0] in ("ppdiffusers", "paddlenlp") for library in libraries)


def from_paddle(
    network: nn.Module, tensors: Mapping[str, Tensor], where: str | Path = "the state dict"
) -> dict[str, Tensor]:
    """Converts Paddle's tensors to a state dict of ``network``, which may be on ``meta``.

    Matrices become transposed views, counters are 0. Raises ``CheckpointError``, starting with ``where``, if
    a tensor is missing, is unexpected, or has the wrong shape or dtype.
    """

    def error(name: str, found: object, wanted: object) -> CheckpointError:
        return CheckpointError(
            f"{where}: {name!r} is {found} in the file, but the configuration expects {wanted}. "
            "Download both again."
        )

    names, linear = _names(network, tensors), _linear_weights(network)
    state: dict[str, Tensor] = {}
    for key, target in network.state_dict().items():
        if key not in names:
            state[key] = torch.zeros(target.shape, dtype=target.dtype, device="cpu")
            continue
        name = names[key]
        shape = target.shape[::-1] if key in linear else target.shape
        found = tensors.get(name)
        if found is None:
            raise error(name, "missing", tuple(shape))
        # Paddle's converter turns a vector with one value into a scalar.
        is_scalar = found.numel() == target.numel() == 1 and max(found.ndim, target.ndim) == 1
        if found.shape != shape and not is_scalar:
            raise error(name, tuple(found.shape), tuple(shape))
        if found.dtype is torch.uint16:  # Paddle writes with numpy, which has no bfloat16
            found = found.view(torch.bfloat16)
        if found.is_floating_point() != target.is_floating_point():
            raise error(name, found.dtype, target.dtype)
        state[key] = found.T if key in linear else found.reshape(target.shape)
    left = {name for name in tensors.keys() - set(names.values()) if not name.endswith(_POSITIONS)}
    if left:
        raise error(min(left), tuple(tensors[min(left)].shape), "no such tensor")
    return state


def to_paddle(network: nn.Module) -> dict[str, Tensor]:
    """A network's tensors as Paddle names and stores them, without counters. The inverse of
    ``from_paddle``."""
    state, linear = network.state_dict(), _linear_weights(network)
    return {name: state[key].T if key in linear else state[key] for key, name in _names(network).items()}


def fill_paddle(network: nn.Module, stored: StoredTensors, dtype: torch.dtype) -> None:
    """Loads the tensors of a folder with Paddle's classes into ``network``, which is on ``meta``.

    The metadata of the file decides: ``format`` is ``pd`` for ppdiffusers, ``np`` for PaddleNLP, and ``pt``
    for PyTorch's tensors. Raises ``CheckpointError`` for other formats and for tensors that do not match, and
    leaves the network unchanged.
    """
    written = stored.metadata.get("format", "pd")
    if written == "pt":
        fill_torch(network, stored, dtype)
        return
    where = stored.files[0]
    if written not in ("pd", "np"):
        raise CheckpointError(
            f"{where}: format must be pd, np or pt, got {written!r}. Download the model again."
        )
    state = from_paddle(network, stored.read(), where)
    network.load_state_dict(
        {key: t.to(dtype if t.is_floating_point() else t.dtype).contiguous() for key, t in state.items()},
        assign=True,
    )
    network.eval().requires_grad_(False)


PADDLE = TensorLayout(
    libraries=frozenset(
        {"wuerstchen", "ppdiffusers", "ppdiffusers.transformers", "paddlenlp", "paddlenlp.transformers"}
    ),
    network_stems=("diffusion_paddle_model",),
    text_stems=("model",),
    fill=fill_paddle,
    tensors=to_paddle,
    network_format="pd",
    text_format="np",
    own_library="ppdiffusers",
    version="0.29.0",
    text_library="ppdiffusers.transformers",
)


def _names(network: nn.Module, stored: Collection[str] = ()) -> dict[str, str]:
    """Paddle's names for our keys. A text encoder has two possible sets of names: ``stored`` decides."""
    keys = [key for key in network.state_dict() if not key.endswith(_COUNTER)]
    names = {key: key for key in keys}
    if any(key.endswith("token_embedding.weight") for key in keys):
        names = {key: PREFIX + key.removeprefix(PREFIX) for key in keys}
        old = f"{PREFIX}token_embedding.weight" in stored
    else:
        old = False
    for ours, theirs in (_STATISTICS | (_PADDLENLP if old else {})).items():
        names = {key: name.replace(ours, theirs) for key, name in names.items()}
    return names


def _linear_weights(network: nn.Module) -> set[str]:
    modules = network.named_modules()
    return {f"{name}.weight".lstrip(".") for name, module in modules if isinstance(module, nn.Linear)}
