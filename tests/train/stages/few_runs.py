"""Trains a student of a small model. As a script with MODEL RUN_DIR, it kills itself after a checkpoint."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.config import Optimization, Recipe, StageFewConfig

IMAGES = 24


def recipe(model: Path, **changes) -> Recipe:
    optimization = Optimization(images=IMAGES, batch_size=8, learning_rate=2e-3, ema_decay=0.9)
    few = StageFewConfig(optimization=optimization, steps=2, teacher_steps=4)
    given = {"stage_few": few, "prior_guidance": 2.0, "prior_steps": 3, "preview_prompts": ("a cat",)}
    return dataclasses.replace(
        tiny(),
        stages=("few",),
        start_from=str(model),
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
        if kind == "checkpoint" and 0 < values["images"] < IMAGES:
            os.kill(os.getpid(), signal.SIGKILL)

    Log.event = event
    train(recipe(Path(sys.argv[1])), Path(sys.argv[2]), device="cpu")
