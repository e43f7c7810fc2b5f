"""The cost of training: time, energy, CO2 and money.

Energy is read from the counter of an NVIDIA GPU. CO2 and money follow from a tariff that the user gives.
"""

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wuerstchen.errors import UserError
from wuerstchen.train.report.carbon import GRAMS_PER_KWH, SOURCE, WORLD_GRAMS


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and energy."""

    seconds: float
    kwh: float | None
    """Energy of the GPU only, without the rest of the machine. None if it is not measured."""

    def __add__(self, other: "Cost") -> "Cost":
        known = self.kwh is not None and other.kwh is not None
        return Cost(seconds=self.seconds + other.seconds, kwh=self.kwh + other.kwh if known else None)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(seconds=self.seconds * factor, kwh=None if self.kwh is None else self.kwh * factor)


NOTHING = Cost(seconds=0.0, kwh=0.0)


@dataclass(frozen=True, kw_only=True)
class Tariff:
    """The prices and emissions of time and energy."""

    kg_per_kwh: float = WORLD_GRAMS / 1000
    """kg of CO2 equivalents per kWh."""
    grid: str = f"world average, {SOURCE}"
    """The source of ``kg_per_kwh``."""
    per_hour: float | None = None
    """Price of the machine per hour."""
    per_kwh: float | None = None
    """Price per kWh."""

    def __post_init__(self) -> None:
        for option, value in (
            ("--co2-per-kwh", self.kg_per_kwh),
            ("--price-per-hour", self.per_hour),
            ("--price-per-kwh", self.per_kwh),
        ):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{option} must be a finite number of at least 0, got {value}.")

    def kg_co2(self, cost: Cost) -> float | None:
        """kg of CO2 equivalents. None if the energy is not known."""
        return None if cost.kwh is None else cost.kwh * self.kg_per_kwh

    def money(self, cost: Cost) -> float | None:
        """The cost in the currency of the prices. None without prices, or if it depends on unknown energy."""
        if (self.per_hour is None and self.per_kwh is None) or (self.per_kwh and cost.kwh is None):
            return None
        return (self.per_hour or 0) * cost.seconds / 3600 + (self.per_kwh or 0) * (cost.kwh or 0)

    def describe(self, cost: Cost) -> str:
        """The cost in words."""
        text = duration(cost.seconds)
        if cost.kwh is None:
            text += ", energy not measured"
        else:
            text += f", {cost.kwh:.3g} kWh (GPU only), {self.kg_co2(cost):.3g} kg CO2 ({self.grid})"
        money = self.money(cost)
        return text if money is None else f"{text}, cost {money:,.2f}"


def make_tariff(
    region: str | None = None,
    kg_per_kwh: float | None = None,
    per_hour: float | None = None,
    per_kwh: float | None = None,
) -> Tariff:
    """A tariff from a country's code (ISO 3166-1 alpha-2, as in ``DE``), or from a number for CO2.

    Raises ``UserError`` for an unknown country, for both at once, and for negative numbers.
    """
    if region is not None and kg_per_kwh is not None:
        raise UserError(f"--region {region} and --co2-per-kwh cannot be used together. Use one of them.")
    if kg_per_kwh is not None:
        return Tariff(kg_per_kwh=kg_per_kwh, grid="as given", per_hour=per_hour, per_kwh=per_kwh)
    if region is None:
        return Tariff(per_hour=per_hour, per_kwh=per_kwh)
    code = region.upper()
    if code not in GRAMS_PER_KWH:
        raise UserError(
            f"--region must be one of {' '.join(GRAMS_PER_KWH)}, got {region}. Or use --co2-per-kwh."
        )
    kg, grid = GRAMS_PER_KWH[code] / 1000, f"{code}, {SOURCE}"
    return Tariff(kg_per_kwh=kg, grid=grid, per_hour=per_hour, per_kwh=per_kwh)


def tariff_of(events: Iterable[dict[str, Any]]) -> Tariff:
    """The tariff of the last start of a run."""
    found = Tariff()
    for event in events:
        if event["event"] == "tariff":
            numbers = {name: number_in(event, name) for name in ("kg_per_kwh", "per_hour", "per_kwh")}
            kg = numbers["kg_per_kwh"]
            if isinstance(event.get("grid"), str) and kg is not None:
                with contextlib.suppress(UserError):  # a log that was edited by hand
                    found = Tariff(**(numbers | {"kg_per_kwh": kg}), grid=event["grid"])
    return found


def remaining_costs(events: Sequence[dict[str, Any]]) -> dict[str, Cost]:
    """What each stage will still cost at its latest speed, or before that at the speed of its rehearsal.

    Leaves out stages whose speed is not known.
    """
    pace: dict[str, Cost] = {}
    left: dict[str, float] = {}
    total: dict[str, float] = {}
    rates: dict[str, list[float]] = {}
    energy: dict[str, tuple[float, float] | None] = {}  # images and kWh at the first line of the last start
    for event in events:
        stage, images = event.get("stage"), number_in(event, "images")
        if not isinstance(stage, str):
            continue
        kwh = number_in(event, "kwh")
        if event["event"] == "rehearsed":
            seconds, all_images = number_in(event, "seconds"), number_in(event, "total")
            if seconds is not None and all_images is not None:
                pace.setdefault(stage, Cost(seconds=seconds, kwh=kwh))
                total[stage] = left[stage] = all_images
        elif event["event"] == "start" and images is not None:
            total[stage] = number_in(event, "total") or images
            left[stage], energy[stage] = total[stage] - images, None
        elif event["event"] == "progress" and images is not None and stage in total:
            left[stage] = total[stage] - images
            rate = number_in(event, "images_per_second")
            if rate:
                rates[stage] = [*rates.get(stage, [])[-49:], rate]
                first = energy.get(stage)
                per_image = pace[stage].kwh if stage in pace else None
                if kwh is not None and first is None:
                    energy[stage] = (images, kwh)
                elif kwh is not None and first is not None and images > first[0]:
                    per_image = (kwh - first[1]) / (images - first[0])
                pace[stage] = Cost(seconds=1 / statistics.median(rates[stage]), kwh=per_image)
    return {stage: pace[stage] * max(left[stage], 0.0) for stage in left if stage in pace}


def number_in(event: dict[str, Any], name: str) -> float | None:
    """A finite number of an event, or None."""
    value = event.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON integers have any length
        return None


def duration(seconds: float) -> str:
    """A duration in words: ``45 s``, ``12.5 min`` or ``3.2 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class CostMeter:
    """Measures time and energy from its construction on."""

    def __init__(self, device: torch.device) -> None:
        self._counter = energy_counter(device)
        self._joules = self._counter()
        self._began = time.monotonic()

    def spent(self) -> Cost:
        """Time and energy since the construction."""
        now = self._counter()
        kwh = None if now is None or self._joules is None else (now - self._joules) / 3.6e6
        return Cost(seconds=time.monotonic() - self._began, kwh=kwh)


def energy_counter(device: torch.device) -> Any:
    """A function that returns the GPU's energy counter in joules, or None if there is no counter."""
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
        except Exception:
            pass  # not installed, not permitted, or a GPU without a counter: the energy is then unknown
    return lambda: None


def total_cost(events: Iterable[dict[str, Any]]) -> dict[str, Cost]:
    """The cost of each stage by name, over all starts of a run, from the events of its log.

    Counts each start up to its last log line. The time after that is not known.
    """
    totals: dict[str, Cost] = {}
    latest: dict[str, Cost] = {}

    def close(stage: str) -> None:
        last = latest.pop(stage, None)
        if last is not None:
            totals[stage] = totals.get(stage, NOTHING) + last

    for event in events:
        stage, seconds = event.get("stage"), number_in(event, "seconds")
        if not isinstance(stage, str):
            continue
        if event["event"] == "start":
            close(stage)
        elif event["event"] in ("progress", "checkpoint") and seconds is not None:
            latest[stage] = Cost(seconds=seconds, kwh=number_in(event, "kwh"))
    for stage in list(latest):
        close(stage)
    return totals
