"""fp16 with scaled losses: the updates of fp32 to rounding, overflows left out, the same after any stop."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from wuerstchen.errors import UserError
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.automatic import resolved
from wuerstchen.train.config import Optimization
from wuerstchen.train.engine import loss_scale
from wuerstchen.train.engine.checkpoint import newest
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.loop import Trainer
from wuerstchen.train.engine.loss_scale import LossScale
from wuerstchen.train.engine.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors, update
from wuerstchen.train.feed.images import Feed
from wuerstchen.train.precision import gpu_precision
from wuerstchen.train.report.events import Log

from .test_loop import make_job

CPU = torch.device("cpu")
CONFIG = Optimization(images=64, batch_size=4, learning_rate=0.01, clip_norm=0.5)


def test_an_update_from_scaled_gradients_is_that_without_a_scale():
    torch.manual_seed(0)
    plain = nn.Linear(6, 4)
    scaled = copy.deepcopy(plain)
    x, norms = torch.randn(8, 6), []
    for network, scale in ((plain, None), (scaled, LossScale(CPU))):
        optimizer = make_optimizer(network, CONFIG)
        if scale is not None:
            optimizer.loss_scale = scale
        for _ in range(3):
            loss = network(x).square().mean()
            (loss if scale is None else loss * scale.value).backward()
            norms.append(update(network, optimizer, CONFIG.clip_norm, loss.detach()))
    torch.testing.assert_close(norms[3:], norms[:3])
    torch.testing.assert_close(dict(scaled.named_parameters()), dict(plain.named_parameters()))


def test_the_scale_is_halved_by_overflows_and_doubled_after_a_while(monkeypatch):
    monkeypatch.setattr(loss_scale, "_GROWS_AFTER", 3)
    scale = LossScale(CPU)
    found = []
    for finite in (True, True, False, True, True, True, True, False, False):
        scale.update(torch.tensor(finite))
        found.append((scale.value.item() / loss_scale.FIRST_SCALE, scale.good.item()))
    assert found == [
        *[(1, 1), (1, 2), (0.5, 0), (0.5, 1), (0.5, 2), (1, 0), (1, 1)],
        *[(0.5, 0), (0.25, 0)],
    ]


def test_the_scale_is_stored_with_the_optimizer_and_is_no_bar_to_a_change_of_precision():
    network = nn.Linear(2, 2)
    optimizer = make_optimizer(network, CONFIG)
    optimizer.loss_scale = LossScale(CPU)
    optimizer.loss_scale.value.fill_(8.0)
    network(torch.ones(1, 2)).sum().backward()
    update(network, optimizer, 1.0, torch.tensor(1.0))
    stored = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizer).items()}
    again = make_optimizer(network, CONFIG)
    load_optimizer_tensors(again, stored, lambda key, tensor: tensor.copy_(stored[key]))  # in fp32 now
    again.loss_scale = LossScale(CPU)
    load_optimizer_tensors(again, stored, lambda key, tensor: tensor.copy_(stored[key]))
    assert (again.loss_scale.value.item(), again.loss_scale.good.item()) == (8.0, 1.0)


def run(folder, stage, source, settings, **changes):
    settings = dataclasses.replace(settings, autocast=torch.float16, **changes)
    folder.mkdir(exist_ok=True)
    log = Log(folder / "log.jsonl")
    feed = Feed(source, 5, settings.preview_size, captions=True)
    return Trainer(make_job(stage, feed, folder, settings, log=log)).train(), log


def test_overflows_are_left_out_and_a_broken_run_ends_as_the_unbroken_one(
    tmp_path, toy_stage, toy_source, settings, monkeypatch
):
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0**30)  # the first gradients overflow
    whole, log = run(tmp_path / "whole", toy_stage(), toy_source(), settings)
    progress = [event for event in log.events() if event["event"] == "progress"]
    scales = [event["scale_model"] for event in progress]
    assert scales[0] == 2.0**30
    assert scales[-1] < scales[0]  # it was halved until nothing overflowed
    left_out = [event["gradient_model"] == 0 for event in progress]
    assert any(left_out)
    assert not all(left_out)

    def stop(random):
        if 60 in random.indices.tolist():
            raise SystemExit

    with pytest.raises(SystemExit):
        run(tmp_path / "broken", toy_stage(on_batch=stop), toy_source(), settings, checkpoint_seconds=0.0)
    broken, _ = run(tmp_path / "broken", toy_stage(), toy_source(), settings)
    files = [newest(path.parent)[1]["files"] for path in (whole, broken)]
    assert files[0] == files[1]


def test_gradients_that_always_overflow_are_a_fault(tmp_path, toy_stage, toy_source, settings, monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", loss_scale.LEAST_SCALE / 2)
    with pytest.raises(UserError, match="not finite at image 0 of stage A"):
        run(tmp_path / "run", toy_stage(), toy_source(), settings)


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_takes_what_the_gpu_has(has_bf16, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: has_bf16)
    monkeypatch.setattr("torch.cuda.device", lambda device: torch.no_grad())
    gpu = torch.device("cuda", 0)
    assert gpu_precision(gpu) == expected
    assert resolved(tiny(), Processes(gpu)).precision == expected
    assert resolved(tiny(), Processes(CPU)).precision == "fp32"
    assert resolved(dataclasses.replace(tiny(), precision="float16"), Processes(gpu)).precision == "fp16"


@pytest.mark.parametrize(
    ("stages", "decoder", "prior", "expected"),
    [
        (("a", "b", "c"), 0.0, 0.0, "graph"),
        (("a", "b", "c"), 0.0, 0.1, "compile"),
        (("a", "b", "c"), (0.0, 0.1), 0.0, "compile"),
        (("a", "b"), 0.0, 0.1, "graph"),
    ],
)
def test_recomputed_dropout_is_not_recorded(stages, decoder, prior, expected, monkeypatch):
    """Recording it ends in an error of torch's, after minutes of compiling."""
    monkeypatch.setattr("wuerstchen.train.automatic.gpu_precision", lambda device: "bf16")
    gpu, base = Processes(torch.device("cuda")), tiny()
    recipe = dataclasses.replace(
        base,
        stages=stages,
        decoder=dataclasses.replace(base.decoder, dropout=decoder),
        prior=dataclasses.replace(base.prior, dropout=prior),
        recompute="blocks",
        acceleration="auto",
    )
    assert resolved(recipe, gpu).acceleration == expected
    assert resolved(dataclasses.replace(recipe, recompute="none"), gpu).acceleration == "graph"
    asked = dataclasses.replace(recipe, acceleration="graph")
    if expected == "graph":
        assert resolved(asked, gpu).acceleration == "graph"
    else:
        with pytest.raises(UserError, match=r"together with dropout\. Use acceleration=compile"):
            resolved(asked, gpu)
