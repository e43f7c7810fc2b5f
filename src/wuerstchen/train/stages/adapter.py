"""A new low-rank adapter on a frozen Stage C, and its weights as a network of their own.

The layers are peft's. The training loop optimizes, averages and stores only the adapter's weights, so a
checkpoint is as small as the adapter, and the average is a second set of weights for the same layers.
"""

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from wuerstchen.checkpoints.adapters import LayerTensors
from wuerstchen.errors import UserError
from wuerstchen.models.int8_linear import quantize_linear_layers
from wuerstchen.models.prior import Prior
from wuerstchen.train.config import StageLoraConfig
from wuerstchen.train.stages.new_word import NewWord

_NAME = "trained"  # of the adapter in peft's layers
_ATTENTION = re.compile(r"\.attention\.(to_q|to_k|to_v|to_out\.0)$")
_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")


class AdapterWeights(nn.Module):
    """The trained weights of an adapter, in fp32: two matrices for each layer, DoRA's magnitudes, and the
    embedding of a new word."""

    def __init__(self, layers: dict[str, Any], word: Tensor | None = None) -> None:
        """``word`` is the initial embedding of a new word, which is trained too."""
        super().__init__()
        self.word = None if word is None else nn.Parameter(word.clone())
        self.names = list(layers)
        # Names of modules cannot contain dots.
        self.layers = nn.ModuleDict(
            {
                _flat(name): nn.ModuleDict(
                    {part: held[_NAME] for part in _PARTS if _NAME in (held := getattr(layer, part))}
                )
                for name, layer in layers.items()
            }
        )

    def tensors(self, alpha: float) -> dict[str, LayerTensors]:
        """The weights by the names of the layers, for ``checkpoints.adapter_write``."""
        found = {}
        for name in self.names:
            a, b, magnitude = (self._weight(name, part) for part in _PARTS)
            found[name] = LayerTensors(a, b, alpha, None if magnitude is None else magnitude.flatten())
        return found

    def _weight(self, name: str, part: str) -> Tensor | None:
        layer = self.layers[_flat(name)]
        return layer[part].weight.detach() if part in layer else None


def _flat(name: str) -> str:
    return name.replace(".", "_")


class AdaptedPrior:
    """A frozen prior with a new adapter, which does nothing until it is trained."""

    def __init__(
        self,
        prior: Prior,
        config: StageLoraConfig,
        dtype: torch.dtype | None = None,
        *,
        word: NewWord | None = None,
    ) -> None:
        """The weights of ``prior`` are not changed. They are used in ``dtype`` or as they are, and large
        matrices in int8 if ``config`` says so. The embedding of ``word`` is trained with the adapter.

        A and B are initialized with torch's generator as in LoRA's paper: B is zero. Raises ``UserError`` if
        ``peft`` is missing.
        """
        self.prior = _frozen_copy(prior, dtype)
        if config.base_weights == "int8":
            quantize_linear_layers(self.prior)
        self.config = config
        names = target_layers(self.prior, config.targets)
        self._layers = _inject(self.prior, names, config)
        self._set_magnitudes(prior)
        self.weights = self._used = AdapterWeights(self._layers, None if word is None else word.initial)
        self.word = word
        if word is not None:
            word.vectors = self._vectors

    def _set_magnitudes(self, prior: Prior) -> None:
        """Sets DoRA's magnitudes to the norms of the exact weights.

        peft takes those of the rounded ones, with which a new adapter would change the exact model.
        """
        for name, layer in self._layers.items():
            if _NAME in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[_NAME].weight
                norms = prior.get_submodule(name).weight.detach().float().flatten(1).norm(dim=1)
                magnitude.data.copy_(norms.view_as(magnitude))

    @contextlib.contextmanager
    def using(self, weights: nn.Module) -> Iterator[Prior]:
        """The prior in eval mode with other weights of the adapter, such as the average."""
        assert isinstance(weights, AdapterWeights)
        training = self.prior.training
        self._set(weights)
        try:
            yield self.prior.eval()
        finally:
            self._set(self.weights)
            self.prior.train(training)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[Prior]:
        """The prior without the adapter, in eval mode."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield self.prior.eval()
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    def _vectors(self) -> Tensor:
        """The current embedding of the new word."""
        assert self._used.word is not None
        return self._used.word

    def _set(self, weights: AdapterWeights) -> None:
        self._used = weights
        for name, layer in self._layers.items():
            for part, module in weights.layers[_flat(name)].items():
                getattr(layer, part)[_NAME] = module


def target_layers(prior: nn.Module, targets: str) -> list[str]:
    """The names of the layers that an adapter changes.

    Depthwise convolutions are never among them: diffusers and peft cannot load adapters for them.
    """
    layers = [
        name
        for name, layer in prior.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]
    return layers if targets == "all" else [name for name in layers if _ATTENTION.search(name)]


def _frozen_copy(prior: Prior, dtype: torch.dtype | None) -> Prior:
    with torch.device("meta"):
        copied = Prior(prior.config)
    weights = {name: tensor.detach().to(dtype or tensor.dtype) for name, tensor in prior.state_dict().items()}
    copied.load_state_dict(weights, assign=True)
    return copied.eval().requires_grad_(False)


def _inject(prior: Prior, names: list[str], config: StageLoraConfig) -> dict[str, Any]:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            'adapters need the package peft. Install it with: pip install "wuerstchen[lora]"'
        ) from error
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.rank * config.scale,  # type: ignore[arg-type]
        target_modules="|".join(re.escape(name) for name in names),
        use_dora=config.dora,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about networks that are not transformers models
        peft.inject_adapter_in_model(settings, prior, _NAME)
    layers = {name: prior.get_submodule(name) for name in names}
    for layer in layers.values():
        for part in _PARTS:
            held = getattr(layer, part)
            if _NAME in held:
                held[_NAME].float()
    return layers
