"""What a run has cost, told from its log."""

import pytest
import torch

from wuerstchen.train.cost import GRID_KG_PER_KWH, Cost, CostMeter, total_cost


def event(kind, stage, **values):
    return {"event": kind, "stage": stage, **values}


def test_starts_add_up_and_checkpoints_of_one_start_do_not():
    events = [
        event("start", "a"),
        event("checkpoint", "a", seconds=10.0, kwh=0.1),
        event("checkpoint", "a", seconds=20.0, kwh=0.2),
        event("progress", "a"),
        event("start", "a"),  # after a kill
        event("checkpoint", "a", seconds=5.0, kwh=0.05),
        event("start", "b"),
        event("checkpoint", "b", seconds=7.0, kwh=None),
        {"event": "end"},
    ]
    totals = total_cost(events)
    assert totals["a"].seconds == 25.0
    assert totals["a"].kwh == pytest.approx(0.25)
    assert totals["a"].kg_co2 == pytest.approx(0.25 * GRID_KG_PER_KWH)
    assert totals["b"] == Cost(seconds=7.0, kwh=None)


def test_logs_of_earlier_versions_have_no_cost():
    assert total_cost([event("start", "a"), event("checkpoint", "a", images=3)]) == {}


def test_energy_that_nothing_measures_is_not_claimed():
    spent = CostMeter(torch.device("cpu")).spent()
    assert spent.seconds >= 0
    assert spent.kwh is None
    assert "kWh" not in str(spent)
    assert "0.250 kWh of the GPU (0.120 kg CO2" in str(Cost(seconds=60.0, kwh=0.25))
