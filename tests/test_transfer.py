"""The check at a larger size: what it trains, and its rows."""

import json

import pytest


@pytest.fixture
def transfer(script):
    return script("benchmarks/transfer")


def options(transfer, tmp_path, *words):
    given = ["--data", "emoji", "--run-dir", str(tmp_path), "--rows", str(tmp_path / "rows.jsonl")]
    return transfer.parser().parse_args([*given, *words])


def test_both_variants_are_stage_c_of_v2_on_12x12_latents(transfer, tmp_path):
    given = options(transfer, tmp_path, "--set", "prior.text_blocks=1", "stage_c.time_shift=0.5")
    base, winner = (transfer.recipe_of(name, given) for name in ("t-base", "t-winner"))
    whole = transfer.v2()
    assert base.stages == base.fresh == ("c",)
    assert (base.prior.c, base.prior.depth, base.prior.nhead) == (512, whole.prior.depth, 8)
    assert base.prior.c_cond == 384  # that of the model's text encoder
    assert base.image_size * base.view_scale / 32 == 12
    assert (base.prior.prediction, base.stage_c.loss_weight) == ("noise", "p2")
    assert base.stage_c.optimization.learning_rate == whole.stage_c.optimization.learning_rate
    assert base.stage_c.optimization.optimizer == "adamw"
    assert winner.stage_c.optimization.optimizer == "muon"
    assert (winner.prior.text_blocks, winner.stage_c.time_shift) == (1, 0.5)
    assert (base.prior.text_blocks, base.stage_c.time_shift) == (0, 1.0)
    assert winner.seed == base.seed
    assert winner.prepared_images == base.prepared_images  # the same images


def test_a_row_has_a_line_on_the_page_of_experiments(transfer, script, tmp_path, monkeypatch):
    found = {"minutes": 9.5, "images_per_second": 1800.0, "loss": 0.1, "validation": {"bins": [0.1, 0.2]}}
    monkeypatch.setattr(transfer, "timed_training", lambda recipe, folder, stage, device: found)
    monkeypatch.setattr(transfer, "share_images", lambda: None)
    given = options(transfer, tmp_path, "--predicted", "error -3 %.")
    monkeypatch.setattr(transfer, "parser", lambda: type("P", (), {"parse_args": lambda self: given})())
    transfer.main()
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()]
    assert [row["name"] for row in rows] == ["t-base", "t-winner"]
    page = script("scripts/experiments_table").page(rows)
    assert "| t-winner | 1.02 | 9.5 | 1,800 | 0.1500 |  |" in page
    assert "`stage_c.optimization.optimizer=muon`. Predicted: error -3 %." in page
