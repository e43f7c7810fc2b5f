"""Trains an adapter for a small model.

As a script with MODEL DATA RUN_DIR CROPS, it kills itself in the middle. As one of several processes it does
not.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.config import Optimization, Recipe, StageLoraConfig

IMAGES = 24


def recipe(model: Path, data: Path, **changes) -> Recipe:
    optimization = Optimization(images=IMAGES, batch_size=4, learning_rate=1e-2, ema_decay=0.9)
    lora = StageLoraConfig(optimization=optimization, updates=None, rank=2, crops=2)
    settings = {name: changes.pop(name) for name in tuple(changes) if hasattr(lora, name)}
    given = {
        "stage_lora": dataclasses.replace(lora, **settings),
        "caption": "a photo of sks",
        "held_out": 0.2,
    }
    return dataclasses.replace(
        tiny(),
        stages=("lora",),
        data=str(data),
        start_from=str(model),
        preview_prompts=("sks",),
        validate_every=8,
        checkpoint_seconds=0.0,
        log_every=1,
        workers=0,
        **given | changes,
    )


if __name__ == "__main__":
    from wuerstchen.train.report.events import Log
    from wuerstchen.train.run import train

    writes = Log.event

    def event(self, kind, **values):
        writes(self, kind, **values)
        if (
            "RANK" not in os.environ and kind == "checkpoint" and values["images"] == 16
        ):  # before the validation there
            os.kill(os.getpid(), signal.SIGKILL)

    Log.event = event
    model, data, run_dir = map(Path, sys.argv[1:4])
    train(recipe(model, data, crops=int(sys.argv[4])), run_dir, device="cpu")
