"""What training costs: time and, on an NVIDIA GPU, the energy that the GPU's own counter tells."""

import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

GRID_KG_PER_KWH = 0.48
"""Of the world's electricity in 2023, kg CO2 a kWh (Ember, Global Electricity Review 2024)."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and energy of a piece of work."""

    seconds: float
    kwh: float | None
    """Of the GPU alone, without the machine around it; None where nothing measures it."""

    @property
    def kg_co2(self) -> float | None:
        """With the world's average electricity."""
        return None if self.kwh is None else self.kwh * GRID_KG_PER_KWH

    def __str__(self) -> str:
        text = f"{self.seconds / 60:.1f} minutes"
        if self.kwh is not None:
            text += f", {self.kwh:.3f} kWh of the GPU ({self.kg_co2:.3f} kg CO2 at the world's average)"
        return text


class CostMeter:
    """Measures from its construction on."""

    def __init__(self, device: torch.device) -> None:
        self._counter = _energy_counter(device)
        self._joules = self._counter()
        self._began = time.monotonic()

    def spent(self) -> Cost:
        """What was spent since the construction."""
        now = self._counter()
        kwh = None if now is None or self._joules is None else (now - self._joules) / 3.6e6
        return Cost(seconds=time.monotonic() - self._began, kwh=kwh)


def _energy_counter(device: torch.device) -> Any:
    """A function that gives the GPU's energy counter in joules, or None where there is none."""
    if device.type == "cuda":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        except (
            Exception
        ):  # not installed, not permitted, or a GPU without a counter: the cost is then unknown
            pass
    return lambda: None


def total_cost(events: Iterable[dict[str, Any]]) -> dict[str, Cost]:
    """The cost of each stage, by its name, over all starts of a run, from the events of its log.

    What a kill lost after the last checkpoint is not counted.
    """
    totals: dict[str, Cost] = {}
    latest: dict[str, Cost] = {}

    def close(stage: str) -> None:
        last = latest.pop(stage, None)
        if last is not None:
            before = totals.get(stage, Cost(seconds=0.0, kwh=0.0))
            known = last.kwh is not None and before.kwh is not None
            totals[stage] = Cost(
                seconds=before.seconds + last.seconds, kwh=before.kwh + last.kwh if known else None
            )

    for event in events:
        if event["event"] == "start":
            close(event["stage"])
        elif event["event"] == "checkpoint" and "seconds" in event:
            latest[event["stage"]] = Cost(seconds=event["seconds"], kwh=event.get("kwh"))
    for stage in list(latest):
        close(stage)
    return totals
