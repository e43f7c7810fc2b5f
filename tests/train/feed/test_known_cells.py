"""Regions of known cells: their shapes, how often they come, and the mean outside them."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wuerstchen.models.text import TextStates
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.optim import make_optimizer
from wuerstchen.train.engine.update import StepRunner, TrainStep
from wuerstchen.train.feed.known_cells import central_region, mean_of_unknown, random_regions
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.prior import StageC

GRIDS = [(6, 6), (3, 3), (12, 24), (24, 24)]


def regions(grid, fraction=1.0, count=2000):
    return random_regions(ImageRandom(3, torch.arange(count)), grid, fraction)


def is_rectangle(cells):
    """Whether the cells are all those of some rows in some columns that lie together."""
    rows, columns = cells.any(1), cells.any(0)
    together = all((side[1:] != side[:-1]).sum() <= 2 for side in (rows, columns))
    return together and torch.equal(cells, rows[:, None] & columns)


@pytest.mark.parametrize("grid", GRIDS)
def test_regions_are_rectangles_and_their_complements_in_equal_numbers(grid):
    found = regions(grid)
    # A rectangle at an edge has a rectangle as its complement.
    touching = torch.tensor([is_rectangle(cells) and is_rectangle(~cells) for cells in found])
    inside = torch.tensor([is_rectangle(cells) for cells in found]) & ~touching
    around = torch.tensor([is_rectangle(~cells) for cells in found]) & ~touching
    assert (inside | around | touching).all()
    assert inside.sum().item() == pytest.approx(around.sum().item(), rel=0.25)


@pytest.mark.parametrize("grid", GRIDS)
def test_between_a_tenth_and_nine_tenths_of_the_cells_are_known(grid):
    found = regions(grid)
    known = found.float().mean((1, 2))
    assert known.min() >= 0.07
    assert known.max() <= 0.93
    assert known.mean().item() == pytest.approx(0.5, abs=0.03)
    # Every cell is known equally often: regions do not prefer a side.
    assert (found.float().mean(0) - 0.5).abs().max() < 0.06
    wide, tall = (found.any(axis).float().mean() for axis in (1, 2))
    assert wide.item() == pytest.approx(tall.item(), abs=0.1)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (5, 1), (2, 2)])
def test_at_least_one_cell_is_unknown(grid):
    assert not regions(grid).flatten(1).all(1).any()


def test_only_a_fraction_of_the_images_has_known_cells():
    for fraction in (0.0, 0.15):
        has = regions((6, 6), fraction).flatten(1).any(1)
        assert has.float().mean().item() == pytest.approx(fraction, abs=0.03)


def test_an_image_has_its_region_in_any_batch():
    alone = random_regions(ImageRandom(3, torch.tensor([7])), (6, 6), 1.0)
    assert torch.equal(alone[0], regions((6, 6), count=10)[7])


def test_nothing_is_decided_on_the_host():
    """Else an update could not be recorded as a CUDA graph. Fake tensors have no values to read."""
    with FakeTensorMode():
        known = random_regions(ImageRandom(3, torch.arange(4)), (6, 6), 0.5)
        assert mean_of_unknown(torch.rand(4, 6, 6), known).shape == (4,)


def test_the_central_region_has_half_the_sides():
    found = central_region((6, 4), torch.device("cpu"))
    expected = torch.zeros(6, 4, dtype=torch.bool)
    expected[1:4, 1:3] = True
    assert torch.equal(found, expected)
    assert central_region((3, 1), torch.device("cpu")).tolist() == [[False], [True], [False]]


def test_the_mean_is_over_the_unknown_cells_of_each_image():
    known = torch.tensor([[[True, False], [False, False]], [[True, True], [True, False]]])
    errors = torch.tensor([[[100.0, 1.0], [2.0, 6.0]], [[7.0, torch.inf], [1.0, 5.0]]])
    assert mean_of_unknown(errors, known).tolist() == [3.0, 5.0]


@pytest.mark.gpu
def test_updates_can_be_recorded(small_cascade):
    """Whatever waits for the device, or reads a number of it on the host, cannot."""
    cuda, found, config = torch.device("cuda"), [], dataclasses.replace(tiny().stage_c, known_fraction=0.5)
    for record in (False, True):
        stage = StageC(config, tiny(), copy.deepcopy(small_cascade))
        texts = [value.to(cuda) for value in (stage.no_text.states, stage.no_text.mask)]
        stage.no_text = TextStates(states=texts[0], mask=texts[1])
        stage.prior.to(cuda).eval()
        states, mask = (value.expand(12, *value.shape[1:]) for value in texts)
        x = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(0)).to(cuda)
        inputs = {"x": x, "states": states, "mask": mask}
        optimizers = {"prior": make_optimizer(stage.prior, config.optimization)}
        state = TrainingState(networks=stage.networks, averages={}, optimizers=optimizers)
        step = TrainStep(stage, state, 0, torch.bfloat16, Processes(cuda))
        with contextlib.closing(StepRunner(step, record)) as update:
            batches = [torch.arange(12, device=cuda) + 12 * number for number in range(8)]
            found.append([update(inputs, indices)["loss"].item() for indices in batches])
    assert found[1] == pytest.approx(found[0], rel=2e-2)
