"""Prints what a run will cost, and what it has cost."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from wuerstchen.train.report.cost import NOTHING, Cost, Tariff, remaining_costs, tariff_of, total_cost
from wuerstchen.train.report.events import Log


@dataclass(frozen=True, kw_only=True)
class RunMonitor:
    """What a run reports while it trains. It does not change the result."""

    tariff: Tariff = field(default_factory=Tariff)
    tensorboard: bool = False
    """Whether to write TensorBoard event files in addition to ``log.jsonl``."""
    rehearse: bool = False
    """Whether a new run first makes a few updates of each stage, to estimate the total cost."""


def log_tariff(log: Log, tariff: Tariff) -> None:
    """Logs the tariff if it has changed."""
    if tariff != tariff_of(log.events()):
        log.event("tariff", **asdict(tariff))


def print_remaining_cost(log: Log) -> None:
    """Prints what each unfinished stage will still cost, if its speed is known."""
    events = log.events()
    tariff = tariff_of(events)
    remaining = {stage: cost for stage, cost in remaining_costs(events).items() if cost.seconds > 0}
    if remaining:
        print("Remaining cost at the measured speed:")
        _print(remaining, tariff)


def print_cost(log: Log) -> None:
    """Prints what each stage has cost over all starts."""
    events = log.events()
    _print(total_cost(events), tariff_of(events))


def _print(costs: dict[str, Cost], tariff: Tariff) -> None:
    for stage, cost in costs.items():
        print(f"  Stage {stage.upper()}: {tariff.describe(cost)}")
    if len(costs) > 1:
        print(f"  in total: {tariff.describe(total(costs.values()))}")


def total(costs: Iterable[Cost]) -> Cost:
    """The sum. Its energy is None if that of any part is."""
    return sum(costs, start=NOTHING)
