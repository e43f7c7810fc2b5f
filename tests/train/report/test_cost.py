"""What a run has cost, told from its log."""

import math

import pytest
import torch

from wuerstchen.errors import UserError
from wuerstchen.train.report import cost
from wuerstchen.train.report.carbon import GRAMS_PER_KWH, WORLD_GRAMS
from wuerstchen.train.report.cost import (
    Cost,
    CostMeter,
    Tariff,
    duration,
    make_tariff,
    remaining_costs,
    tariff_of,
    total_cost,
)


def event(kind, stage, **values):
    return {"event": kind, "stage": stage, **values}


def test_costs_of_starts_add_up():
    events = [
        event("start", "a"),
        event("checkpoint", "a", seconds=10.0, kwh=0.1),
        event("progress", "a", seconds=20.0, kwh=0.2),  # a kill lost it, and it was spent
        event("progress", "a"),
        event("start", "a"),
        event("checkpoint", "a", seconds=5.0, kwh=0.05),
        event("start", "b"),
        event("checkpoint", "b", seconds=7.0, kwh=None),
        {"event": "end", "seconds": 32.0},
    ]
    totals = total_cost(events)
    assert totals["a"].seconds == 25.0
    assert totals["a"].kwh == pytest.approx(0.25)
    assert totals["b"] == Cost(seconds=7.0, kwh=None)
    assert (totals["a"] + totals["b"]).kwh is None  # half of it is not known


def test_logs_of_earlier_versions_have_no_cost():
    assert total_cost([event("start", "a"), event("checkpoint", "a", images=3)]) == {}


def test_unreadable_lines_have_no_cost():
    events = [
        event("progress", "a", seconds="x", kwh=[]),
        event("start", 3),
        event("progress", "a", seconds=2),
    ]
    assert total_cost(events) == {"a": Cost(seconds=2.0, kwh=None)}
    edited = [{"event": "tariff", "per_hour": -1.0}, {"event": "tariff", "kg_per_kwh": 10**400}]
    edited += [{"event": "tariff", "grid": "x", "kg_per_kwh": -1}]
    assert tariff_of(edited) == Tariff()


def test_unmeasured_energy_is_unknown():
    spent = CostMeter(torch.device("cpu")).spent()
    assert spent.seconds >= 0
    assert spent.kwh is None
    assert Tariff().kg_co2(spent) is None
    assert Tariff().describe(spent) == "0 s, energy not measured"
    assert Tariff(per_kwh=0.3).money(spent) is None
    assert Tariff(per_kwh=0.3, per_hour=1.0).money(spent) is None  # a part would pass for the whole


def test_joules_are_counted_in_kilowatt_hours(monkeypatch):
    """From the beginning on: the counter is the GPU's, and runs since it was switched on."""
    readings = iter((1e9, 1e9 + 7.2e6))
    monkeypatch.setattr(cost, "energy_counter", lambda device: lambda: next(readings))
    assert CostMeter(torch.device("cpu")).spent().kwh == pytest.approx(2)


def test_a_tariff_by_hand():
    cost = Cost(seconds=7200.0, kwh=1.5)
    tariff = make_tariff("fr", None, 2.5, 0.2)
    assert tariff.kg_co2(cost) == pytest.approx(1.5 * 0.056)
    assert tariff.money(cost) == pytest.approx(5.3)
    assert tariff.describe(cost) == "2.0 h, 1.5 kWh (GPU only), 0.084 kg CO2 (FR, Ember, 2023), cost 5.30"
    assert make_tariff(None, 0.1).kg_co2(cost) == pytest.approx(0.15)
    assert make_tariff().kg_co2(cost) == pytest.approx(1.5 * WORLD_GRAMS / 1000)
    assert make_tariff().money(cost) is None
    assert make_tariff(per_hour=3.0).money(Cost(seconds=3600.0, kwh=None)) == 3.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"region": "DE", "kg_per_kwh": 0.1}, "cannot be used together"),
        ({"region": "Germany"}, r"--region must be one of AR AT .* got Germany\. Or use --co2-per-kwh"),
        ({"kg_per_kwh": -1.0}, "--co2-per-kwh must be a finite number of at least 0, got -1.0"),
        ({"per_hour": math.nan}, "--price-per-hour must be a finite number of at least 0, got nan"),
        ({"per_kwh": math.inf}, "--price-per-kwh must be a finite number of at least 0, got inf"),
    ],
)
def test_invalid_tariffs_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        make_tariff(**given)


def test_the_last_tariff_of_a_log_applies():
    events = [{"event": "tariff", "per_hour": p, "grid": "x", "kg_per_kwh": 0.2} for p in (1.0, 2.0)]
    assert tariff_of([*events, event("start", "a")]) == Tariff(kg_per_kwh=0.2, grid="x", per_hour=2.0)


def test_remaining_costs_by_rehearsal_and_then_by_speed():
    rehearsed = [
        {"event": "rehearsed", "stage": "a", "total": 100, "seconds": 2.0, "kwh": 0.01},
        {"event": "rehearsed", "stage": "b", "total": 10, "seconds": 1.0, "kwh": None},
    ]
    assert remaining_costs(rehearsed) == {
        "a": Cost(seconds=200.0, kwh=1.0),
        "b": Cost(seconds=10.0, kwh=None),
    }
    started = [
        *rehearsed,
        event("start", "a", images=0, total=100),
        event("progress", "a", images=10, images_per_second=4.0, kwh=0.5),  # with what the start cost
        event("progress", "a", images=20, images_per_second=5.0, kwh=0.6),
        event("progress", "a", images=30, images_per_second=5.0, kwh=0.7),
    ]
    found = remaining_costs(started)
    assert found["a"].seconds == pytest.approx(70 / 5)
    assert found["a"].kwh == pytest.approx(70 * 0.01)
    assert found["b"].seconds == 10.0
    again = [*started, event("start", "a", images=20, total=100)]
    assert remaining_costs(again)["a"].seconds == pytest.approx(80 / 5)
    done = [*started, event("progress", "a", images=100, images_per_second=5.0)]
    assert remaining_costs(done)["a"].seconds == 0.0


def test_the_table_is_in_grams_and_in_order():
    assert list(GRAMS_PER_KWH) == sorted(GRAMS_PER_KWH)
    assert all(len(code) == 2 and 20 < grams < 1000 for code, grams in GRAMS_PER_KWH.items())


@pytest.mark.parametrize(("seconds", "text"), [(45.0, "45 s"), (750.0, "12.5 min"), (11520.0, "3.2 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
