"""Scores a model on val with different sampling settings, with a row per setting.

    python benchmarks/sampling_sweep.py --model runs/mini/model --data data/emoji --rows rows.jsonl
    python benchmarks/sampling_sweep.py s-guidance-3 s-dpm-12 --data data/emoji --rows rows.jsonl

Rows are written to a JSON-lines file, from which scripts/experiments_table.py makes the table "Sampling only"
of docs/experiments.md. All settings share the networks, their recorded passes and the features of the real
images. The test lists are never read.

Settings with autoguidance (arXiv 2406.02507) are only run with --weak-prior, a weaker version of Stage C: an
early checkpoint of it or a smaller one, trained on the same semantic latents and text states.
"""

import argparse
import dataclasses
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scoring import scores
from torch import Tensor, nn

from wuerstchen.checkpoints.native import read_network
from wuerstchen.errors import UserError
from wuerstchen.evaluate.lists import select
from wuerstchen.evaluate.references import References
from wuerstchen.models.prior import Prior
from wuerstchen.pipeline import Sampling, Wuerstchen, load

AS_BEFORE = "as the model's own settings, within the noise of R@1 (0.03) and KID (1)."


@dataclass(frozen=True)
class Setting:
    """What differs from the model's own settings, and the prediction from before the run."""

    sampling: Sampling
    predicted: str
    weight: float | None = None
    """Weight of autoguidance, which replaces guidance by the empty caption."""

    @property
    def changed(self) -> dict[str, Any]:
        """The differences as they appear in a row."""
        own = vars(Sampling())
        given = {name: value for name, value in vars(self.sampling).items() if value != own[name]}
        return given if self.weight is None else {"autoguidance": self.weight}


def _intervals() -> dict[str, Setting]:
    found = {}
    reasons = {
        (0.0, 0.8): "R@1 -0.02, diversity +10 %, KID -0.5: what an image shows is decided at high noise, "
        "where the prompt alone decides now.",
        (0.2, 0.8): "as 0 to 0.8 in all columns: at low noise guidance changes little on a 6 x 6 grid.",
        (0.2, 1.0): "as without an interval, in less time: at low noise guidance changes little.",
        (0.4, 0.95): "R@1 as without an interval, KID -0.5: the paper's middle, a little wider.",
    }
    for guidance, (low, high) in itertools.product((2.0, 2.5, 3.0), reasons):
        against = f"Against guidance {guidance:g} everywhere: "
        found[f"s-guidance-{guidance:g}-at-{low:g}-{high:g}"] = Setting(
            Sampling(guidance=guidance, guidance_interval=(low, high)), against + reasons[low, high]
        )
    return found


def _decoder_steps() -> dict[str, Setting]:
    predicted = {
        10: "KID and style as the model's own, which this is for the model in the package.",
        6: "as 10 steps, within noise.",
        4: "R@1 as with 10 steps, KID +0.5, style -0.01.",
        2: "R@1 -0.03, KID +4, style -0.05: too few for lines.",
    }
    shifts = {
        0.5: "",
        1.0: " Against shift 0.5: KID +0.5 with few steps, for fewer of them are at low noise.",
    }
    return {
        f"s-b-{steps}-shift-{shift:g}": Setting(
            Sampling(decoder_steps=steps, decoder_shift=shift), predicted[steps] + more
        )
        for steps, (shift, more) in itertools.product(predicted, shifts.items())
    }


SETTINGS: dict[str, Setting] = {
    "s-own": Setting(Sampling(), "as in the model's last evaluation."),
    "s-guidance-1.5": Setting(
        Sampling(guidance=1.5), "R@1 -0.02, KID -0.5, diversity +10 % against 2: half as far from the prompt."
    ),
    "s-guidance-2": Setting(Sampling(guidance=2.0), AS_BEFORE),
    "s-guidance-2.5": Setting(Sampling(guidance=2.5), "R@1 within noise of 2, KID +1, diversity -5 %."),
    "s-guidance-3": Setting(
        Sampling(guidance=3.0), "R@1 within noise of 2, KID +1 (a) and +4 (b), as with the last model."
    ),
    **_intervals(),
    "s-auto-1.5": Setting(
        Sampling(guidance=1.0), "KID -1, R@1 -0.03 against guidance 2, diversity +10 %.", weight=1.5
    ),
    "s-auto-2": Setting(
        Sampling(guidance=1.0), "KID -1.5, R@1 -0.02 against guidance 2, diversity +10 %.", weight=2.0
    ),
    "s-auto-2.5": Setting(
        Sampling(guidance=1.0), "KID as with weight 2, R@1 as with guidance 2.", weight=2.5
    ),
    "s-ddpm-20": Setting(Sampling(prior_sampler="ddpm", prior_steps=20), AS_BEFORE),
    "s-ddpm-12": Setting(Sampling(prior_sampler="ddpm", prior_steps=12), "R@1 -0.02, KID +1."),
    "s-dpm-12": Setting(Sampling(prior_sampler="dpm", prior_steps=12), AS_BEFORE),
    "s-dpm-8": Setting(Sampling(prior_sampler="dpm", prior_steps=8), "R@1 -0.02, KID +1."),
    **_decoder_steps(),
}
"""By name. All begin with s, for sampling."""


class Autoguided(Prior):
    """A prior that is guided by a weaker version of itself with the same caption: lerp(weak, strong, weight).

    It takes the place of the prior in a model. Sample with guidance 1.
    """

    def __init__(self, strong: Prior, weak: Prior, weight: float) -> None:
        nn.Module.__init__(self)
        self.config = strong.config
        self.strong, self.weak, self.weight = strong, weak, weight

    def context(self, states: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Any, Any]:
        """What the prediction needs of the text, for both."""
        return self.strong.context(states, mask, **options), self.weak.context(states, mask, **options)

    def forward(self, x: Tensor, t: Tensor, context: tuple[Any, Any]) -> Tensor:
        strong, weak = self.strong(x, t, context[0]), self.weak(x, t, context[1])
        return torch.lerp(weak.float(), strong.float(), self.weight).to(strong.dtype)


def weak_prior(path: Path, model: Wuerstchen) -> Prior:
    """The prior in a model folder, or in a file, on the device and in the precision of ``model``."""
    strong = model.cascade.prior
    assert strong is not None
    file = path / "prior.safetensors" if path.is_dir() else path
    prior, _ = read_network(file, next(strong.parameters()).dtype)
    names = ("c_in", "c_cond", "prediction")
    if not isinstance(prior, Prior) or any(
        getattr(prior.config, name) != getattr(strong.config, name) for name in names
    ):
        raise UserError(f"{file} is not a prior for this model. Its {', '.join(names)} must be the same.")
    return prior.to(model.device)


class Observed(Wuerstchen):
    """A model that keeps the generated images and the time that each batch took."""

    def __init__(self, model: Wuerstchen, prior: Prior | None = None) -> None:
        cascade = model.cascade if prior is None else dataclasses.replace(model.cascade, prior=prior)
        super().__init__(cascade, model.device)
        self.images: list[Image.Image] = []
        self.seconds: list[float] = []
        """Seconds per image, of each batch."""

    def generate(self, prompts: Any, **options: Any) -> list[Image.Image]:
        began = time.perf_counter()
        images = super().generate(prompts, **options)
        self.seconds.append((time.perf_counter() - began) / len(images))
        self.images += images
        return images


def diversity(images: list[Image.Image], seeds: int, references: References) -> list[float]:
    """How much the images of an entry differ between its seeds, for each entry: 1 - the cosine of their
    features (Lite1, pooled), averaged over pairs of seeds.

    ``images`` has all entries of the first seed, then of the second, and so on.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    features = F.normalize(references.features(pixels).pooled, dim=1).unflatten(0, (seeds, -1))
    pairs = list(itertools.combinations(features, 2))
    return torch.stack([1 - (one * other).sum(1) for one, other in pairs]).mean(0).tolist()


def score(name: str, model: Observed, references: References, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a setting."""
    setting = SETTINGS[name]
    model.images.clear()
    model.seconds.clear()
    began = time.monotonic()
    found = scores(
        model,
        references,
        "c_b_a",
        options.first_seeds,
        setting.sampling,
        limit=options.limit,
        batch_size=options.batch_size,
    )
    seeds = len(options.first_seeds)
    if seeds > 1:
        by_entry = diversity(model.images, seeds, references)
        first = len(select("a", ("val",), options.limit))
        for key, values in (("a", by_entry[:first]), ("b", by_entry[first:])):
            found[key]["diversity"] = [round(sum(values) / len(values), 4)]
    return {
        "name": name,
        "model": options.model or "bundled",
        "changed": setting.changed,
        "settings": model.settings_of(setting.sampling),
        "predicted": setting.predicted,
        "row": "c_b_a",
        "first_seeds": options.first_seeds,
        "scores": found,
        # The first passes of a shape are slower, because they are recorded.
        "seconds_per_image": round(min(model.seconds), 5),
        "scoring_minutes": round((time.monotonic() - began) / 60, 2),
        "machine": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def run_all(options: argparse.Namespace) -> None:
    """Scores the settings in order, and writes each row at once."""
    loaded = load(options.model, options.device, precision=options.precision)
    model, device = Observed(loaded), loaded.device
    options.batch_size = options.batch_size or (8 if device.type == "cpu" else 150)
    references = References(options.data, device, batch_size=8 if device.type == "cpu" else 64)
    weak = None if options.weak_prior is None else weak_prior(options.weak_prior, model)
    began, longest = time.monotonic(), 0.0
    scored: dict[Sampling, str] = {}
    for name in options.settings or SETTINGS:
        setting, sampled = SETTINGS[name], model
        if setting.weight is not None:
            if weak is None:
                print(f"{name}: skipped, it needs --weak-prior", flush=True)
                continue
            assert model.cascade.prior is not None
            sampled = Observed(loaded, Autoguided(model.cascade.prior, weak, setting.weight))
        else:
            completed = model.cascade.completed(setting.sampling)
            equal = scored.setdefault(completed, name)
            if equal != name:
                print(f"{name}: skipped, for this model it is the same as {equal}", flush=True)
                continue
        left = options.minutes - (time.monotonic() - began) / 60
        if longest > left:
            print(
                f"{name}: skipped, it needs up to {longest:.1f} minutes and {left:.1f} are left", flush=True
            )
            continue
        started = time.monotonic()
        row = json.dumps(score(name, sampled, references, options))
        longest = max(longest, (time.monotonic() - started) / 60)
        with open(options.rows, "a", encoding="utf-8") as file:
            file.write(row + "\n")
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="SETTING",
        help=f"settings to score (default: all): {', '.join(SETTINGS)}",
    )
    parser.add_argument("--model", help="model folder (default: the bundled model)")
    parser.add_argument("--data", type=Path, required=True, help="built emoji set")
    parser.add_argument("--rows", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument(
        "--weak-prior", type=Path, metavar="PATH", help="for autoguidance: a model folder, or a prior's file"
    )
    parser.add_argument("--first-seeds", type=int, nargs="+", default=[0, 1000])
    parser.add_argument("--limit", type=int, help="score only the first N entries of each list")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="do not start a setting that would end later"
    )
    parser.add_argument("--batch-size", type=int, help="images at once (default: 150, or 8 on a CPU)")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device")
    options = parser.parse_args()
    unknown = [name for name in options.settings if name not in SETTINGS]
    if unknown:
        parser.error(f"unknown settings: {' '.join(unknown)}. Use {', '.join(SETTINGS)}.")
    run_all(options)


if __name__ == "__main__":
    main()
