"""Finds the layers of a network that an adapter file changes, and converts A and B to their shapes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from wuerstchen.checkpoints.adapters import AdapterConfig, LayerTensors
from wuerstchen.checkpoints.foreign import check_adapter_not_cascade
from wuerstchen.errors import CheckpointError, shown


@dataclass(frozen=True)
class LayerUpdate:
    """What an adapter adds to one layer: (alpha / rank) · B A."""

    a: Tensor
    b: Tensor
    alpha: float
    is_assumed: bool
    """Whether the file does not say alpha, which is then the rank."""
    magnitude: Tensor | None = None
    """Of DoRA, in peft's shape: (out,), or (1, out, 1, 1) for a convolution."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def layer_updates(
    layers: Mapping[str, nn.Module],
    found: Mapping[str, LayerTensors],
    config: AdapterConfig | None,
    *,
    network: str,
    where: str,
) -> dict[str, LayerUpdate]:
    """The update of each layer, by the names in ``layers``: the linear layers and convolutions of a network.

    ``network`` and ``where`` are names for messages. Raises ``CheckpointError`` unless all layers
    and shapes match.
    """
    names = _Names(layers)
    updates: dict[str, LayerUpdate] = {}
    for layer, tensors in found.items():
        name = names.find(layer)
        if name is None:
            check_adapter_not_cascade(where, found)
            raise CheckpointError(
                f"{where} is incompatible with this model: {shown(layer)} is not a linear layer or a "
                f"convolution of {network}. Use an adapter that was trained for this model."
            )
        if name in updates:
            raise CheckpointError(f"{where} is damaged: it contains {name!r} twice. Download it again.")
        a, b = _fitted(layers[name], tensors, layer, where)
        rank, alpha = a.shape[0], tensors.alpha
        if alpha is None and config is not None:
            alpha = config.alpha([layer, name], rank)
        magnitude = _fitted_magnitude(layers[name], tensors, layer, where)
        updates[name] = LayerUpdate(
            a, b, float(rank) if alpha is None else alpha, is_assumed=alpha is None, magnitude=magnitude
        )
    dora = {update.magnitude is not None for update in updates.values()}
    if len(dora) > 1 or (config is not None and config.is_dora and dora == {False}):
        raise CheckpointError(
            f"{where} is a DoRA, but some of its layers have no magnitude (lora_magnitude_vector or "
            "dora_scale). Download it again."
        )
    return updates


def _fitted_magnitude(target: nn.Module, tensors: LayerTensors, layer: str, where: str) -> Tensor | None:
    """DoRA's magnitude in the shape that peft uses for ``target``."""
    magnitude = tensors.magnitude
    if magnitude is None:
        return None
    out = target.weight.shape[0]
    if magnitude.numel() != out:
        raise CheckpointError(
            f"{where} is incompatible with this model: the magnitude of {shown(layer)} has "
            f"{magnitude.numel()} values, not {out}. Use an adapter that was trained for this model."
        )
    if not isinstance(target, nn.Conv2d):
        return magnitude.reshape(out)
    if target.groups > 1:
        raise CheckpointError(
            f"{where} is a DoRA of {shown(layer)}, a convolution with groups, which is not supported. "
            "Train without its depthwise convolutions, or without DoRA."
        )
    return magnitude.reshape(1, out, 1, 1)


def _fitted(target: nn.Module, tensors: LayerTensors, layer: str, where: str) -> tuple[Tensor, Tensor]:
    """A and B in the shapes that peft uses for ``target``. Raises ``CheckpointError`` for other shapes."""
    a, b = tensors.a, tensors.b
    if a is None or b is None:
        raise CheckpointError(f"{where} is damaged: {shown(layer)} has no A or no B. Download it again.")
    rank = a.shape[0] if a.ndim else 0
    wanted_a: tuple[int, ...]
    wanted_b: tuple[int, ...]
    if isinstance(target, nn.Conv2d):
        groups, ones, out = target.groups, (1, 1), target.out_channels
        wanted_a, wanted_b = (rank, target.in_channels, *target.kernel_size), (out, rank, *ones)
        if rank and groups > 1 and a.shape == wanted_a:
            if groups == out and b.shape == (1, rank, *ones):
                # OneTrainer, for depthwise convolutions: one channel, which is added to all.
                b = b.expand(wanted_b).contiguous()
            elif rank % groups == 0 and b.shape == (out, rank // groups, *ones):
                b = _ungrouped(b, groups)  # peft
    else:
        assert isinstance(target, nn.Linear)
        wanted_a, wanted_b = (rank, target.in_features), (target.out_features, rank)
    if rank < 1 or a.shape != wanted_a or b.shape != wanted_b:
        shapes = [", ".join(["rank", *map(str, wanted_a[1:])]), ", ".join([str(wanted_b[0]), "rank"])]
        shapes[1] += "".join(f", {size}" for size in wanted_b[2:])
        raise CheckpointError(
            f"{where} is incompatible with this model: A and B of {shown(layer)} have shapes "
            f"{tuple(a.shape)} and {tuple(b.shape)}, not ({shapes[0]}) and "
            f"({shapes[1]}). Use an adapter that was trained for this model."
        )
    return a, b


def _ungrouped(b: Tensor, groups: int) -> Tensor:
    """The weights (out, rank, 1, 1) of the equivalent convolution without groups."""
    out, width = b.shape[:2]
    whole = b.new_zeros(out, width * groups, 1, 1)
    for group in range(groups):
        rows = slice(group * out // groups, (group + 1) * out // groups)
        whole[rows, group * width : (group + 1) * width] = b[rows]
    return whole


class _Names:
    """Finds a network's layers by the names that files use for them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        # kohya's names have underscores instead of dots.
        self.flat = {name.replace(".", "_"): name for name in names}

    def find(self, layer: str) -> str | None:
        # ``TextEncoder`` keeps the text model under ``model.``.
        for spelling in (s for plain in _spellings(layer) for s in (plain, f"model.{plain}")):
            if spelling in self.names:
                return spelling
        bare = layer.removeprefix("text_model_")
        joined = (layer, bare, f"model_{layer}", f"model_{bare}")
        return next((self.flat[name] for name in joined if name in self.flat), None)


def _spellings(layer: str) -> tuple[str, ...]:
    """The possible names of a layer: transformers 5 dropped ``text_model.``, and older versions of diffusers
    called the output layer ``to_out``."""
    bare = layer.removeprefix("text_model.")
    return layer, bare, f"text_model.{bare}", f"{layer}.0"
