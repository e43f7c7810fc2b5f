"""The benchmarks' own arithmetic, and a rehearsal of the one that draws."""

import copy
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wuerstchen.diffusion.objective import make_objective
from wuerstchen.diffusion.sampler_table import samplers_for
from wuerstchen.diffusion.schedule import CosineSchedule
from wuerstchen.models.previewer import PreviewerConfig
from wuerstchen.models.prior import Prior
from wuerstchen.pipeline import BUNDLED
from wuerstchen.recipes.mini import mini
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.engine import image_cache
from wuerstchen.train.engine.validation import HeldOut
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.initial_weights import read_start
from wuerstchen.train.stages.prior import StageC

from .configurations import SMALL_PRIOR, with_lite0, write_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import floor
    import random_model
    import sampling

    return floor, random_model, sampling


@pytest.mark.parametrize("batch", [1, 2])
def test_the_floor_misses_no_product(benchmarks, batch):
    """A layer that calls the library in a way the recorder does not know would lower the floor."""
    floor, random_model, _ = benchmarks
    cascade = random_model.random_v2(torch.device("cpu"), tiny=True)
    for name, (run, times) in floor.forwards(cascade, torch.float32, batch, (128, 256)).items():
        recorded = floor.record(run)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        # torch does not count attention on a CPU.
        products = sum(n * o.flop for o, n in recorded.items() if o.kind != "attention")
        assert products == counter.get_total_flops() > 0, name
        attends = any(o.kind == "attention" for o in recorded)
        assert attends == (name.startswith(("step", "text encoder"))), name
        assert times == {"step of Stage C": 29, "step of Stage B": 12}.get(name, 1)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
        (
            "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, c10::Half>",
            "convolutions",
        ),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x128", "attention"),
        ("_attend", "attention"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<unsigned short>", "copies"),
        ("Memcpy DtoH (Device -> Pageable)", "copies"),
        (
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half>",
            "norms and elementwise",
        ),
        ("triton_red_fused_convolution_native_layer_norm_3", "norms and elementwise"),
    ],
)
def test_kernels_are_grouped_by_what_they_do(benchmarks, kernel, group):
    """A layer norm after a convolution, or a convolution made of products, in the wrong group."""
    assert benchmarks[2].kernel_group(kernel) == group


def test_ratios_compare_the_same_case(benchmarks):
    """float16 is the end of bfloat16, and each of ours would be compared with peers of both."""
    sampling = benchmarks[2]
    half, brain = (sampling.Case(dtype, 1, (1024, 1024)) for dtype in ("float16", "bfloat16"))
    seconds = {f"wuerstchen, {half}": 1, f"wuerstchen, {brain}": 2, f"SDXL, {half}": 3, f"SDXL, {brain}": 8}
    rows = {name: {"seconds": value} for name, value in seconds.items()}
    floors = {str(brain): {"image": {"ms": 500.0}}}
    assert sampling.ratios(rows, floors, [half, brain]) == {
        f"SDXL, {half} / wuerstchen": 3,
        f"SDXL, {brain} / wuerstchen": 4,
        f"wuerstchen / floor, {brain}": 4,
    }


@pytest.mark.slow
def test_the_time_of_an_image_is_measured_to_the_end(tmp_path):
    """A rehearsal on this machine: an option, a part or a peer that no longer runs."""
    command = [sys.executable, str(BENCHMARKS / "sampling.py"), "--tiny", "--images", "1"]
    parts = ["--parts", "ours", "diffusers", "floor", "profile", "--json", str(tmp_path / "found.json")]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src"), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([*command, *parts], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert len(found["rows"]) == 2
    assert len(found["ratios"]) == 2
    assert found["floors"]
    assert found["profiles"]


def test_every_variant_of_the_ablation_is_a_recipe(benchmarks):
    """A variant that cannot be built would be found out on a rented GPU."""
    import ablation

    for name, variant in ablation.VARIANTS.items():
        recipe = ablation.recipe_of(name, "data", 512, 3, 2, str(BUNDLED), {"log_every": 7})
        alone = name.startswith("b2")
        assert (recipe.stages, recipe.log_every) == ((name[0],), 7)
        assert recipe.fresh == (() if alone else (name[0],))
        own = variant.changed.get("stage_b.optimization.images", 512)
        refined = variant.changed.get("stage_b.refine_images", 512 if alone else 0)
        assert recipe.stage_b.refine_images == refined
        assert ablation._images(recipe) == (0 if alone else own) + refined
        for field, value in variant.changed.items():
            found = recipe
            for part in field.split("."):
                found = getattr(found, part)
            assert found == value


def test_rows_of_stage_c_have_its_errors_around_known_cells(benchmarks, small_cascade, monkeypatch):
    """A part of the scoring that failed would lose the row after its training."""
    import ablation

    images = torch.randint(0, 256, (2, 128, 128, 3), generator=torch.Generator().manual_seed(0))
    pictures = HeldOut(images=images.to(torch.uint8), captions=["a cat"] * 2)
    monkeypatch.setattr(ablation, "held_out", lambda source, size: pictures)
    cascade = with_lite0(copy.deepcopy(small_cascade))
    found = ablation.errors_around_known_cells(cascade, tiny(), torch.device("cpu"))
    assert {name: len(bins) for name, bins in found.items()} == {"known": 8, "nothing_known": 8}
    assert all(value is not None for bins in found.values() for value in bins)


def test_a_stage_c_of_the_ablation_fits_its_start(benchmarks, small_cascade, tmp_path):
    """Channels of the latents, networks and sampling are those of the model, not those of the recipe."""
    import ablation

    settings = dataclasses.replace(small_cascade.settings, view_scale=1.0, decoder_steps=3, text_mask=False)
    start = write_model(dataclasses.replace(small_cascade, settings=settings), tmp_path / "start")
    recipe = ablation.recipe_of("c-text1", "data", 512, 3, 2, str(start), {})
    assert (recipe.prior.c_in, recipe.prior.c_cond, recipe.prior.text_blocks) == (2, 384, 1)
    assert recipe.previewer.c_in == 2
    for name in ("vqgan", "decoder", "compressor"):
        assert getattr(recipe, name) == getattr(small_cascade, name).config
    assert (recipe.view_scale, recipe.decoder_steps, recipe.text_positions) == (1.0, 3, "all")
    read_start(recipe).resolved(recipe)  # which refuses what does not fit


def test_other_averages_are_kept_beside_the_own_one(benchmarks):
    """One of the same decay is the same, bit for bit."""
    import ablation

    from wuerstchen.train.engine.ema import decay_at, make_average
    from wuerstchen.train.engine.update import TrainStep

    network, own = torch.nn.Linear(3, 2), TrainStep.average
    state = SimpleNamespace(averages={"prior": make_average(network)})
    step = SimpleNamespace(stage=SimpleNamespace(networks={"prior": network}), state=state)
    with ablation.averaging({"same": 0.6, "shorter": 0.3}) as averages:
        for update in range(1, 30):
            torch.nn.init.normal_(network.weight)
            step.decay = decay_at(update, 0.6)
            TrainStep.average(step)
    assert TrainStep.average is own
    assert torch.equal(averages["same"].weight, state.averages["prior"].weight)
    assert not torch.allclose(averages["shorter"].weight, averages["same"].weight, atol=1e-2)
    with ablation.averaging({}) as averages:
        assert TrainStep.average is own
    assert averages == {}


@pytest.mark.parametrize("prediction", ["velocity", "flow"])
def test_errors_on_held_out_images_compare_objectives(benchmarks, small_cascade, prediction):
    """A prior that predicts 0 has, at every level, the error that follows from the formula of its objective.

    With the velocity 0 on the cosine path, the noise is predicted as √(1 − ᾱ)·x_t, which is wrong by
    √ᾱ·(√(1 − ᾱ)·x₀ − √ᾱ·ε). On the straight line it is x_t, wrong by (1 − t)·(x₀ − ε).
    """
    import held_out

    prior = Prior(dataclasses.replace(SMALL_PRIOR, prediction=prediction)).eval()
    objective = make_objective(prediction)
    own = {"prior_objective": objective, "prior_sampler": samplers_for(objective.path)[0]}
    settings = dataclasses.replace(small_cascade.settings, **own)
    cascade = dataclasses.replace(small_cascade, prior=prior, settings=settings)
    recipe = dataclasses.replace(
        mini(), prior=prior.config, compressor=small_cascade.compressor.config,
        decoder=small_cascade.decoder.config, previewer=PreviewerConfig(c_in=2),
    )  # fmt: skip
    images = HeldOut(images=torch.randint(256, (6, 128, 128, 3), dtype=torch.uint8), captions=["a"] * 6)
    found = torch.tensor(held_out.errors_on(images, cascade, "c", recipe))
    stage = StageC(recipe.stage_c, recipe, cascade)
    batch = next(iter(images.batches(6)))
    x = stage.prepare(batch, torch.device("cpu"))["x"]
    for k, error in enumerate(found):
        alpha_bar = CosineSchedule().alpha_bar(torch.tensor((k + 0.5) / 8))
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        noise = ImageRandom(0, torch.arange(6)).normal(f"held out {k}", x.shape[1:])
        wrong = signal * (sigma * x - signal * noise)
        if prediction == "flow":
            wrong = signal / (signal + sigma) * (x - noise)
        torch.testing.assert_close(error, wrong.square().mean(), rtol=1e-3, atol=1e-5)


def test_variants_of_the_ablation_share_their_composed_images(benchmarks):
    """What the script replaces is what a run calls: composing takes a minute a variant."""
    import timed_training

    composed = []
    once = timed_training.once(lambda feed, *_: composed.append(feed) or len(composed))
    feed, other, turned = (
        SimpleNamespace(seed=seed, size=8, mirrored=mirrored)
        for seed, mirrored in ((1, 0.0), (2, 0.0), (2, 0.5))
    )
    assert [once(one, 4, 0, None) for one in (feed, feed, other, turned)] == [1, 1, 2, 3]
    assert timed_training.run_phase.fill_image_cache is image_cache.fill_image_cache


def test_a_killed_scoring_does_not_end_the_next_one(benchmarks):
    """Of four variants on a rented GPU, the last three were lost with the first one's scoring."""
    import timed_training

    with timed_training.OneProcess() as process:
        killed = process.submit(os._exit, 1)
        assert isinstance(killed.exception(), BrokenProcessPool)
        assert process.submit(abs, -2).result() == 2


def test_a_finished_training_keeps_its_minutes(benchmarks, tmp_path, monkeypatch):
    """A run that was only scored again had 0.05 minutes in its row."""
    import timed_training

    times = iter([0.0, 300.0, 300.0, 301.0])
    monkeypatch.setattr(timed_training.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(timed_training.run, "train", lambda *_, **__: None)
    progress = {"event": "progress", "stage": "c", "images_per_second": 10.0, "loss": 0.5}
    (tmp_path / "log.jsonl").write_text(json.dumps(progress) + "\n")
    first = timed_training.timed_training(tiny(), tmp_path, "c")
    assert (first["minutes"], first["images_per_second"], first["loss"]) == (5.0, 10.0, 0.5)
    assert timed_training.timed_training(tiny(), tmp_path, "c") == first


def test_the_page_of_experiments_is_made_from_its_rows():
    scripts = BENCHMARKS.parent / "scripts"
    subprocess.run([sys.executable, str(scripts / "experiments_table.py"), "--check"], check=True)


def measured_on(tmp_path: Path, *gpus: int, batch: int) -> list[dict]:
    """The rows of many_gpus.py with a tiny network on as many processes of a CPU."""
    command = [sys.executable, str(BENCHMARKS / "many_gpus.py"), "--tiny", "--out", str(tmp_path)]
    command += ["--side", "4", "--warm", "1", "--updates", "1", "--batches", "1"]
    command += ["--compared-batch", str(batch), "--gpus", *map(str, gpus)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src"), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert (tmp_path / "table.md").read_text().strip() in ran.stdout
    assert not (tmp_path / "checkpoints").exists()
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def test_scaling_is_measured_in_every_mode(benchmarks, tmp_path):
    """A mode or a checkpoint that no longer runs would be found out on rented GPUs."""
    import scaling_table

    rows = measured_on(tmp_path, 2, batch=2)
    modes = [row["mode"] for row in rows if row["part"] == "speed"]
    assert sorted(modes) == ["FSDP2", "FSDP2, recompute", "accumulate 4", "replicated"]
    assert all(row["images_per_second"] > 0 < row["mfu"] for row in rows if row["part"] == "speed")
    replicated, sharded = (row for row in rows if row["part"] == "checkpoint")
    assert len(sharded["losses"]) == 20
    assert scaling_table.difference(sharded["losses"], replicated["losses"]) < 1e-3
    for row in (replicated, sharded):
        assert row["bytes"] > 2e6
        assert row["checkpoint"]["updates_meanwhile"] >= 3
        assert row["checkpoint"]["images"] > row["first_checkpoint"]["images"]


@pytest.mark.slow
def test_eight_processes_continue_the_checkpoint_of_one_and_the_other_way_round(benchmarks, tmp_path):
    import scaling_table

    rows = measured_on(tmp_path, 1, 8, batch=8)
    written = {row["gpus"]: row for row in rows if row["part"] == "checkpoint"}
    assert scaling_table.difference(written[8]["losses"], written[1]["losses"]) < 1e-3
    resumed = {(row["written_by"], row["gpus"]): row for row in rows if row["part"] == "resume"}
    assert resumed.keys() == {(1, 8), (8, 1)}
    for (by, _), row in resumed.items():
        after = written[by]["checkpoint"]["losses_after"]
        assert scaling_table.difference(row["losses_after"], after) < 1e-3
    assert measured_on(tmp_path, 1, batch=8) == rows  # nothing is measured twice


def test_the_stages_whose_memory_is_measured_are_those_of_runs(benchmarks):
    """A stage that asks more of a run than the script's one gives would be found out on a rented GPU."""
    import finetune_memory

    cpu = torch.device("cpu")
    cascade = finetune_memory.make_cascade(cpu, tiny=True)
    for kind, trained in (("full", "prior"), ("lora", "adapter"), ("lora int8", "adapter")):
        row = finetune_memory.Row(kind, "normal", 2, False, 24)
        recipe = finetune_memory.recipe_of(row, cascade, cpu, 10)
        stage = finetune_memory.stage_of(recipe, copy.deepcopy(cascade), cpu)
        assert [*stage.networks] == [trained]
        assert stage.optimization.batch_size == 2


@pytest.mark.slow
def test_the_memory_of_fine_tuning_is_measured_for_every_choice():
    command = [sys.executable, str(BENCHMARKS / "finetune_memory.py"), "--tiny", "--updates", "1"]
    command += ["--memory", "normal", "low", "lowest", "--batches", "2"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src"), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    choices = [(row["kind"], row["memory"]) for row in rows]
    full = [("full", "normal"), ("full", "low"), ("full", "lowest")]
    assert choices == [*full, ("lora", "normal"), ("lora int8", "normal")]
    assert all(row["images_per_second"] > 0 for row in rows)


def test_scaling_is_compared_with_the_same_mode_on_one_gpu(benchmarks):
    import scaling_table

    def row(mode: str, gpus: int, rate: float, batch: int = 8) -> dict:
        seen = {"part": "speed", "mode": mode, "gpus": gpus, "batch": batch, "mfu": 0.4, "memory_gib": 20.0}
        return {**seen, "images_per_second": rate}

    rows = [
        row("replicated", 1, 999.0),  # measured again below
        row("replicated", 1, 100.0),
        row("replicated", 1, 400.0, batch=32),
        row("replicated", 8, 720.0),
        row("accumulate 4", 1, 120.0),
        row("accumulate 4", 8, 900.0),
        row("FSDP2", 8, 540.0),
        row("FSDP2", 8, 50.0, batch=16),
    ]
    found = {(r["mode"], r["gpus"], r["batch"]): r for r in scaling_table.scaling(rows)}
    assert found["replicated", 8, 8]["speedup"] == pytest.approx(7.2)
    assert found["replicated", 8, 8]["efficiency"] == pytest.approx(0.9)
    assert found["accumulate 4", 8, 8]["speedup"] == pytest.approx(7.5)
    assert found["FSDP2", 8, 8]["speedup"] == pytest.approx(5.4)
    assert found["FSDP2", 8, 8]["against_replicated"] == pytest.approx(0.75)
    assert found["FSDP2", 8, 16]["speedup"] is None
    text = scaling_table.table(rows)
    assert "| replicated | 8 | 8 | 720.0 | 7.20× | 90% | 40.0% | 20.0 | 1.00× |" in text
    assert "999" not in text


def test_losses_that_differ_are_named(benchmarks):
    import scaling_table

    once = {"seconds": 2, "start_seconds": 1, "updates_meanwhile": 3, "updates_lost": 0, "losses_after": [1]}
    common = {"part": "checkpoint", "bytes": 1, "update_seconds": 1, "checkpoint": once}
    rows = [
        {**common, "first_checkpoint": once, "mode": "replicated", "gpus": gpus, "losses": [0.5, loss]}
        for gpus, loss in ((1, 0.25), (2, 0.2501), (4, 0.2506))
    ]
    ends = [line.rsplit("| ", 1)[1] for line in scaling_table.table(rows).splitlines()[2:5]]
    assert ends == ["yes |", "yes |", "no |"]


def test_repainted_rectangles_are_in_the_middle_and_seams_are_seen(script):
    """Bugs: a rectangle outside the image, or a seam that is measured beside the border."""
    editing = script("benchmarks/editing")
    boxes = [editing.rectangle(number, 6, 252) for number in range(40)]
    assert len(set(boxes)) > 5
    for left, top, right, bottom in boxes:
        assert all(side % 42 == 0 for side in (left, top, right, bottom))
        assert 84 <= right - left <= 168
        assert 84 <= bottom - top <= 168
        assert left < 126 < right
        assert top < 126 < bottom
    box = (20, 30, 60, 50)
    smooth = np.tile(np.arange(100, dtype=np.uint8)[:, None], (100, 1, 3)).reshape(100, 100, 3)
    border, inside = editing.gradients(smooth, box, 4)
    cut = smooth.copy()
    cut[30:50, 20:60] += 50
    seam, same = editing.gradients(cut, box, 4)
    assert inside == pytest.approx(same)
    assert seam > 10 * border


def test_the_costs_of_synthetic_data_are_measured(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("WUERSTCHEN_CACHE", str(tmp_path))
    scale = importlib.import_module("scale")
    for kind in ("indexed", "mixture", "plan"):
        found = scale.measure(kind, 4000, [1, 4])
        assert {"open_seconds", "drawing_bytes", "batch_seconds_1", "epoch_seconds_4"} <= found.keys()
        larger = scale.extrapolated(found, 10)
        assert larger["epoch_seconds_4"] == 10 * found["epoch_seconds_4"]
        assert larger["batch_seconds_4"] == found["batch_seconds_4"]
