"""Updates must run on a GPU and be recordable there. The meta device shows on a CPU what would prevent it.

It has no values, so reading one on the host fails, and so does a shape that depends on values. A tensor of
the CPU in an update would be copied to the GPU, which a recording does not allow.
"""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wuerstchen.models.cascade import PUBLISHED_STATISTICS, Cascade
from wuerstchen.models.compressor import Compressor
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.efficientnet import EfficientNetLite
from wuerstchen.models.previewer import Previewer
from wuerstchen.models.prior import Prior
from wuerstchen.models.text import TextStates
from wuerstchen.models.vqgan import VQGAN
from wuerstchen.recipes.mini import mini
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.adapter import AdaptedPrior
from wuerstchen.train.stages.base import cascade_settings, inputs_of
from wuerstchen.train.stages.class_images import ClassImages
from wuerstchen.train.stages.decoder import StageB, StageBRefinement
from wuerstchen.train.stages.lora import LORA_STAGE, StageLora
from wuerstchen.train.stages.prior import StageC

META = torch.device("meta")


class NoTensorsOfTheHost(TorchDispatchMode):
    """Raises ``AssertionError`` for an operation that reads or makes a tensor on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert all(tensor.device == META for tensor in tensors), f"{func} has a tensor on the CPU"
        return result


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """The meta device has none."""
    of_cpu = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: of_cpu)


def recipe(prediction: str = "velocity", text_width: int = 384):
    """A small recipe with every option of the losses of Stages B and C, and attention without text."""
    given, grids = mini(), {"level_config": ("CT", "CT", "CTA"), "nhead": (-1, -1, 2)}
    decoder = dataclasses.replace(given.decoder, c_hidden=(16, 16, 32), blocks=(1, 1, 1), **grids)
    shape = {"c": 32, "c_cond": text_width, "depth": 4, "nhead": 2, "text_blocks": 1, "registers": 2}
    weights = {"feature_weight": 1.0, "refine_feature_weight": 1.0, "previewer_weight": 1.0}
    density = {"time_density": "logit_normal"}
    of_prior = {"dispersive_weight": 0.25, "known_fraction": 0.5, "text_noise": 0.3}
    return dataclasses.replace(
        given,
        decoder=decoder,
        prior=dataclasses.replace(given.prior, prediction=prediction, **shape),
        stage_b=dataclasses.replace(given.stage_b, **weights, **density),
        stage_c=dataclasses.replace(given.stage_c, **of_prior, **density),
    )


def parts_of(given) -> dict[str, nn.Module]:
    with META:
        return {
            "vqgan": VQGAN(given.vqgan),
            "decoder": Decoder(given.decoder),
            "compressor": Compressor(given.compressor),
            "previewer": Previewer(given.previewer),
            "prior": Prior(given.prior),
        }


def check_losses(stage, inputs) -> None:
    with META:
        indices = torch.empty(4, dtype=torch.int64)
    found = []
    with NoTensorsOfTheHost():
        losses = stage.losses(inputs, ImageRandom(0, indices))
        for name, loss, terms in losses:
            assert all(term.ndim == 0 for term in terms.values())
            trained = list(stage.networks[name].parameters())
            loss.backward(inputs=[p for p in trained if p.requires_grad])
            found.append(name)
    assert found == list(stage.networks)


@pytest.mark.parametrize("prediction", ["velocity", "flow"])
def test_updates_of_stage_c(prediction, small_cascade):
    text = small_cascade.text_encoder
    given = recipe(prediction, text.width)
    settings = cascade_settings(given, PUBLISHED_STATISTICS)
    stage = StageC(given.stage_c, given, Cascade(settings=settings, **parts_of(given), text_encoder=text))
    with META:
        stage.no_text = TextStates(states=torch.empty(1, 32, text.width), mask=torch.empty(1, 32).bool())
        inputs = {
            "x": torch.empty(4, given.prior.c_in, 6, 6),
            "states": torch.empty(4, 32, text.width),
            "mask": torch.empty(4, 32).bool(),
        }
    check_losses(stage, inputs)


@pytest.mark.parametrize("dora", [False, True])
def test_updates_of_adapters(dora, small_cascade):
    text = small_cascade.text_encoder
    given = recipe("velocity", text.width)
    settings = cascade_settings(given, PUBLISHED_STATISTICS)
    given = dataclasses.replace(given, stages=("lora",), start_from="bundled")
    config = dataclasses.replace(given.stage_lora, targets="all", dora=dora, class_word="dog")
    model = Cascade(settings=settings, **parts_of(given), text_encoder=text)
    with META:
        empty = TextStates(states=torch.empty(1, 32, text.width), mask=torch.empty(1, 32).bool())
        x = torch.empty(4, given.prior.c_in, 6, 6)
        adapted = AdaptedPrior(model.prior, config)
        (phase,) = LORA_STAGE.phases(given)
        stage = StageLora(config, given, model, adapted, phase, class_images=ClassImages(x, empty))
        stage.no_text = empty
        inputs = {"x": x, "states": torch.empty(4, 32, text.width), "mask": torch.empty(4, 32).bool()}
    check_losses(stage, inputs)


@pytest.mark.parametrize("kind", [StageB, StageBRefinement])
def test_updates_of_stage_b(kind):
    given = recipe()
    parts = parts_of(given)
    del parts["prior"]
    model = Cascade(settings=cascade_settings(given, PUBLISHED_STATISTICS), **parts)
    batch = Batch(torch.arange(4), torch.empty(4, 128, 128, 3, dtype=torch.uint8), ["a"] * 4, [])
    with META:
        stage = kind(given.stage_b, given, model, None, EfficientNetLite())
        inputs = inputs_of(stage, batch, META)
    check_losses(stage, inputs)
