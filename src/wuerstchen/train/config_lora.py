"""The settings of a low-rank adapter (LoRA, DoRA) for Stage C."""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from wuerstchen.errors import UserError
from wuerstchen.train.config_stages import Optimization, check_side

Targets = Literal["attention", "all"]
UPDATES_PER_IMAGE, FEWEST_UPDATES, MOST_UPDATES = 25, 300, 2000
MOST_CROPS = 1024
"""With the published text encoder, each one takes up to 0.4 MB."""
FEWEST_IMAGES = 3
"""With fewer images an adapter reproduces them, and nothing else."""


def _optimization() -> Optimization:
    return Optimization(
        images=FEWEST_UPDATES * 4,
        batch_size=4,
        learning_rate=1e-4,
        warmup=20 * 4,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        ema_decay=0.99,
    )


@dataclass(frozen=True, kw_only=True)
class StageLoraConfig:
    """An adapter for Stage C, on your own images. Only the adapter is trained."""

    optimization: Optimization = field(default_factory=_optimization)
    updates: int | None = 0
    """Length in updates, from which ``optimization.images`` is set when the run starts. 0 chooses it from the
    number of images: 25 updates for each, at least 300 and at most 2,000. None leaves
    ``optimization.images`` as it is."""
    image_size: int | None = None
    """Side of the images in pixels. None for that of the model to start from."""
    rank: int = 16
    """Rank of the matrices that are trained for each layer."""
    alpha: float | None = None
    """The adapter is scaled by alpha / rank. None for the rank, which gives 1."""
    targets: Targets = "attention"
    """The layers that are adapted: the four linear layers of each ``attention``, or ``all`` linear layers and
    convolutions of Stage C. ``all`` learns textures and colours better, and has about four times as many
    parameters."""
    dora: bool = False
    """Also trains the norm of each output of a layer (DoRA, arXiv 2402.09353). Slower."""
    base_weights: Literal["half", "int8"] = "half"
    """The frozen weights of Stage C while the adapter is trained: in half precision on GPUs, or large
    matrices in ``int8`` with one scale per row, which takes half the memory and is slower. The adapter is
    used with the original weights in any case."""
    crops: int = 8
    """Random crops of each image, whose semantic latents and text states are computed once at the start and
    cached on the device. Then the compressor and the text encoder leave it. At most 1,024 crops are cached in
    all. 0 composes and encodes new crops in every update, and so does a larger data set."""
    caption_dropout: float = 0.1
    """Fraction of the images that train without their caption, for classifier-free guidance."""
    token: str = ""
    """A new word for the text encoder, whose input embedding is trained too (textual inversion, arXiv
    2208.01618). Captions and prompts must contain it. Its embedding starts as that of ``class_word``, or of
    its own pieces. The text encoder then stays on the device. Empty for none."""
    class_word: str = ""
    """What the subject is, such as ``dog``, or a whole prompt. Then the adapter also trains on images of it
    that the model draws itself, so that it does not change other dogs (prior preservation, arXiv 2208.12242).
    Only Stage C draws them: they are semantic latents. Empty for none."""
    class_images: int = 100
    """Number of drawn images. Each update trains on as many of them as of yours."""
    class_weight: float = 1.0
    """Weight of their loss."""
    form: Literal["diffusers", "kohya", "peft"] = "diffusers"
    """The form of the adapter's file. All of them load here. diffusers reads its own form, ComfyUI and others
    read kohya's."""
    licence: str = ""
    """Licence of the adapter, which is stored in its file."""
    keep: Literal["best", "last"] = "best"
    """Which averaged weights the adapter has: those with the lowest validation loss, or the last ones. It is
    the last ones without held-out images."""

    def __post_init__(self) -> None:
        check_side(self.image_size)
        if self.updates is not None and self.updates < 0:
            raise UserError(f"updates must be at least 0, got {self.updates}. 0 chooses the length.")
        if self.crops < 0:
            raise UserError(f"crops must be at least 0, got {self.crops}. 0 caches none.")
        if self.token and (len(self.token.split()) != 1 or self.token != self.token.strip()):
            raise UserError(f"token must be one word, got {self.token!r}. Leave out the spaces.")
        if self.class_images < 1:
            raise UserError(f"class_images must be at least 1, got {self.class_images}. 100 is common.")
        if not 0 < self.class_weight < math.inf:
            raise UserError(f"class_weight must be above 0, got {self.class_weight}. 1 is common.")
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}. 16 is common.")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UserError(f"alpha must be above 0, got {self.alpha}. Use the rank, {self.rank}.")
        if self.dora and self.base_weights == "int8":
            raise UserError("dora needs base_weights=half, got int8. Use one of the two.")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"caption_dropout must be between 0 and 1, got {self.caption_dropout}.")

    @property
    def scale(self) -> float:
        """The factor of the adapter's output."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def class_prompt(self) -> str:
        """The prompt for images of the class."""
        word = self.class_word.strip()
        return f"a {word}" if word and " " not in word else word


def check_result(storage: str, max_shard_size: str) -> None:
    """Raises ``UserError`` for a form of stored weights that files of adapters do not have."""
    if storage == "int8":
        raise UserError("storage must be float32 or float16 for an adapter, got int8. Use float16.")
    if max_shard_size:
        raise UserError(
            f"max_shard_size is for models, got {max_shard_size} for an adapter, which is one file. Leave it "
            "out."
        )


def check_training(config: StageLoraConfig, fresh: Collection[str]) -> None:
    """Raises ``UserError`` for settings that have no effect on an adapter."""
    if fresh:
        raise UserError(
            f"fresh={' '.join(fresh)} is for networks of a model. An adapter always starts anew. Leave "
            "it out."
        )
    if config.optimization.optimizer == "muon":
        raise UserError(
            "optimizer=muon is for matrices of whole networks, and an adapter has none. Use optimizer=adamw."
        )


def cached_crops(config: StageLoraConfig, images: int) -> int:
    """The number of crops to cache for a data set of this many images. 0 caches none."""
    if images > MOST_CROPS or not config.crops:
        return 0
    return min(config.crops, MOST_CROPS // images) * images


def with_length(config: StageLoraConfig, images: int) -> StageLoraConfig:
    """The settings with ``optimization.images`` set, for a data set of this many images."""
    if config.updates is None:
        return config
    automatic = min(max(UPDATES_PER_IMAGE * images, FEWEST_UPDATES), MOST_UPDATES)
    total = (config.updates or automatic) * config.optimization.batch_size
    return dataclasses.replace(
        config, updates=None, optimization=dataclasses.replace(config.optimization, images=total)
    )
