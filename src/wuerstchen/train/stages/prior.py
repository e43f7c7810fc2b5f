"""Stage C in training: the prior on the maps of the finished compressor."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float16
from PIL import Image
from torch import Tensor, nn

from wuerstchen.diffusion.schedule import PUBLISHED_SCHEDULE, training_timesteps
from wuerstchen.errors import DataError, UserError
from wuerstchen.models.cascade import Cascade, MapStatistics
from wuerstchen.models.compressor import Compressor, compressor_input
from wuerstchen.models.prior import Prior
from wuerstchen.pipeline import Wuerstchen
from wuerstchen.train.config import Optimization, Recipe, StageCConfig
from wuerstchen.train.engine.precision import HALVES, with_half_matrices
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.feed.prepared import StoredBatch
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.base import (
    LEAST_SPREAD,
    PIECE,
    Inputs,
    Losses,
    diffusion_loss,
    encoded_captions,
    full_precision,
    in_pieces,
    text_inputs,
    with_captions_dropped,
)

Need = Literal["compressor", "text_encoder"]
"""What makes the inputs of updates; with prepared sets, neither may be needed."""


class StageC:
    """The prior, on the frozen compressor's normalised maps. Its later phases are the same by other names."""

    averaged = ("prior",)
    captions = True
    reads_images = False
    denoises = "x"

    def __init__(
        self,
        config: StageCConfig,
        recipe: Recipe,
        prior: Prior,
        frozen: Cascade,
        statistics: MapStatistics,
        *,
        name: str = "c",
        optimization: Optimization | None = None,
        device: torch.device | None = None,
        needs: Collection[Need] = ("compressor", "text_encoder"),
    ) -> None:
        """``optimization`` is that of a later phase, which then has a name of its own.

        On a ``device`` that is not the CPU only those ``frozen`` networks stay that updates ``needs``; the
        others visit it for previews. Without one all stay where they are.
        """
        assert frozen.compressor is not None
        assert frozen.text_encoder is not None
        self.name = name
        self.config = config
        self.recipe = recipe
        self.optimization = optimization or config.optimization
        self.prior = prior
        self.compressor = frozen.compressor.eval().requires_grad_(False)
        self.text_encoder = frozen.text_encoder
        if device is not None:
            frozen.text_encoder.to(device)
        self.no_text = frozen.text_encoder.encode([""])
        self.frozen = frozen
        self.statistics = statistics
        self.networks: dict[str, nn.Module] = {"prior": prior}
        self.rates: dict[str, float] = {}
        self.rate_scales: dict[str, float] = {}
        self.preview_labels = {"prompts": list(recipe.preview_prompts)}
        if device is not None and device.type != "cpu":
            self._place(device, needs)

    def _place(self, device: torch.device, needs: Collection[Need]) -> None:
        """Leaves on ``device`` only what updates need, in the precision that they need it in."""
        for network in self.frozen.networks().values():
            network.to("cpu")
        if "compressor" in needs:
            self.compressor.to(device)
        if "text_encoder" in needs:
            half = HALVES.get(self.recipe.precision)
            if half is not None:
                self.text_encoder = with_half_matrices(self.text_encoder, half)
            self.text_encoder.to(device)

    def prepare(self, batch: Batch, device: torch.device) -> Inputs:
        with full_precision(device):
            z = in_pieces(self._map, batch.images.to(device))["z"]
        text = encoded_captions(self.text_encoder, batch.captions, self.recipe)
        return {"x": self.statistics.normalise(z), **text}

    def _map(self, pixels: Float[Tensor, "b 3 h w"]) -> Inputs:
        return {"z": self.compressor(compressor_input(pixels, self.recipe.view_scale)).float()}

    def prepare_stored(self, batch: StoredBatch, device: torch.device) -> Inputs:
        """``prepare`` on what the compressor, and maybe the text encoder, have made already."""
        x = self.statistics.normalise(batch.maps.to(device).float())
        return {"x": x, **text_inputs(batch.texts(self.text_encoder, device), self.recipe)}

    def losses(self, inputs: Inputs, random: ImageRandom) -> Losses:
        x = inputs["x"]
        states, mask = with_captions_dropped(self.no_text, inputs, random, self.config.caption_dropout)
        t = training_timesteps(random.uniform("time"), self.config.time_shift)
        noise = random.normal("noise", x.shape[1:])
        context = self.prior.context(states, mask, once=True)
        predicted = self.prior(PUBLISHED_SCHEDULE.add_noise(x, noise, t), t, context)
        yield "prior", diffusion_loss(predicted, noise, t, self.config.loss_weight), {}

    def check(self, values: dict[str, float]) -> None:
        pass

    def predict(self, averages: dict[str, nn.Module], inputs: Inputs, x: Tensor, t: Tensor) -> Tensor:
        prior = averages["prior"]
        assert isinstance(prior, Prior)
        return prior(x, t, prior.context(inputs["states"], inputs.get("mask")))

    def preview(
        self,
        averages: dict[str, nn.Module],
        pixels: Tensor,
        device: torch.device,
        *,
        low_memory: bool = False,
    ) -> list[Image.Image]:
        """Pictures of the recipe's prompts, through C, B and A."""
        prior = averages["prior"]
        assert isinstance(prior, Prior)
        settings = dataclasses.replace(self.frozen.settings, map_statistics=self.statistics)
        cascade = dataclasses.replace(self.frozen, settings=settings, prior=prior)
        prompts = list(self.recipe.preview_prompts)
        if not prompts:
            return []
        if device.type == "cpu" and not low_memory:
            return Wuerstchen(cascade, device).generate(prompts)
        # Networks that updates do not need come one at a time, and the averages stay where they are.
        model = Wuerstchen(cascade, device, low_memory="layer" if low_memory else "stage")
        most = 1 if low_memory else max(1, min(8, PIECE // settings.image_size**2))
        try:
            return model.generate(prompts, batch_size=most)
        finally:
            model.residence.release()


@torch.no_grad()
def measure_map(
    compressor: Compressor, batches: Iterator[Batch], device: torch.device, view_scale: float = 0.75
) -> MapStatistics:
    """Mean and standard deviation of each channel of the map over some pictures."""
    views = (compressor_input(batch.pixels(device), view_scale) for batch in batches)
    maps = torch.cat([compressor(view).float().cpu() for view in views])
    return _statistics(maps.double().transpose(0, 1).flatten(1))


def measure_stored_maps(maps: Iterable[Float16[np.ndarray, "c h w"]]) -> MapStatistics:
    """``measure_map`` over stored maps, whose sizes may differ. Raises ``DataError`` if there are none."""
    columns = [torch.from_numpy(found.astype(np.float64)).flatten(1) for found in maps]
    if not columns:
        raise DataError("none of the maps of the prepared set can be read; prepare the set again")
    return _statistics(torch.cat(columns, dim=1))


def _statistics(columns: Float[Tensor, "c n"]) -> MapStatistics:
    spread = columns.std(1).clamp(min=1e-3).tolist()  # a channel may lie idle, but is not to divide by zero
    if max(spread) < LEAST_SPREAD:
        raise UserError(
            f"the semantic map's deviation over the pictures is {max(spread):.3g} at most, so it says "
            "nothing about them; train Stage B anew with a lower stage_b.backbone_rate"
        )
    return MapStatistics(mean=tuple(columns.mean(1).tolist()), std=tuple(spread))
