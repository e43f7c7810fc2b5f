"""What is said about a run while it goes on, beside its losses: what it will cost, and what it has cost."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from wuerstchen.train.report.cost import NOTHING, Cost, Tariff, costs_to_come, tariff_of, total_cost
from wuerstchen.train.report.events import Log


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How a run is watched. Nothing of it changes a result."""

    tariff: Tariff = field(default_factory=Tariff)
    tensorboard: bool = False
    """Whether event files are written beside ``log.jsonl``."""
    rehearses: bool = False
    """Whether a new run first makes a few updates of each stage, to say what all will cost."""


def begin(log: Log, watch: Watch) -> None:
    """Notes the tariff, if it is not the one before."""
    if watch.tariff != tariff_of(log.events()):
        log.event("tariff", **asdict(watch.tariff))


def say_costs_to_come(log: Log) -> None:
    """Prints what each stage that is not at its end will cost, as far as its pace is known."""
    events = log.events()
    tariff = tariff_of(events)
    to_come = {stage: cost for stage, cost in costs_to_come(events).items() if cost.seconds > 0}
    if to_come:
        print("To come, at the measured pace:")
        _say(to_come, tariff)


def say_cost(log: Log) -> None:
    """Prints what each stage has cost, over all starts."""
    events = log.events()
    _say(total_cost(events), tariff_of(events))


def _say(costs: dict[str, Cost], tariff: Tariff) -> None:
    for stage, cost in costs.items():
        print(f"  Stage {stage.upper()}: {tariff.describe(cost)}")
    if len(costs) > 1:
        print(f"  in all: {tariff.describe(total(costs.values()))}")


def total(costs: Iterable[Cost]) -> Cost:
    """The sum; its energy is None where that of a part is."""
    return sum(costs, start=NOTHING)
