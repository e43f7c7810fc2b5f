"""``wuerstchen evaluate``: what it prints and writes, and one line with exit code 2 for what one can mend."""

import json
import re

import pytest
from PIL import Image

from wuerstchen.cli import main
from wuerstchen.errors import UserError


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["evaluate", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_evaluate_writes_a_report(run, model_folder, emoji_set, use_simple_judges, monkeypatch, tmp_path):
    use_simple_judges(monkeypatch)
    code, out, err = run(
        *(model_folder, "--data", emoji_set, "--split", "val", "--limit", "2", "--lists", "b"),
        *("--guidance", "1", "--prior-steps", "2", "--before", model_folder, "--out", "found"),
    )
    assert code == 0, err
    assert "2 entries and 0 photographs: 4 images to draw from text, 2 to reconstruct" in err
    assert out.startswith("list (b), val, 2 entries")
    assert "only the first 2" in out
    assert "targets" not in out
    assert re.search(r"^found/report\.json\nfound/report\.html\n\Z", out, re.MULTILINE)
    content = json.loads((tmp_path / "found" / "report.json").read_text())
    assert list(content["lists"]) == ["b"]
    assert content["settings"]["sampling"]["guidance"] == 1
    assert content["settings"]["splits"] == ["val"]
    assert content["before"] == content["model"]


def test_photographs_alone_need_no_data_set(run, model_folder, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.effect_noise((150, 130), 60).save(tmp_path / "photos" / "one.png")
    code, out, _ = run(model_folder, "--photos", "photos")
    assert code == 0
    assert "1 photographs, Stage A, unquantised: PSNR" in out
    assert (tmp_path / "evaluation" / "report.html").is_file()


def test_a_model_is_judged_by_targets_where_asked_or_where_they_are_its_own(
    run, model_folder, monkeypatch, tmp_path
):
    asked = []

    def evaluate(*_, against_targets, **__):
        asked.append(against_targets)
        raise UserError("enough")

    monkeypatch.setattr("wuerstchen.evaluate.report.evaluate", evaluate)
    monkeypatch.setattr("wuerstchen.pipeline.load", lambda *_, **__: None)
    for arguments in (
        [model_folder],
        [model_folder, "--targets"],
        [],
        ["bundled"],
        ["bundled", "--limit", 8],
    ):
        assert run(*arguments)[2] == "Error: enough\n"
    assert asked == [False, True, True, True, False]


BAD_CALLS = {
    "targets of a few": (["--limit", "8", "--targets"], "targets cannot be checked on 8 entries"),
    "no data set": ([], "data/emoji/index.jsonl cannot be read"),
    "how to make it": (["--data", "here"], "Make the data set with `wuerstchen data emoji here`"),
    "no model": (["nowhere"], "'nowhere' does not exist"),
    "no model before": (["--before", "nowhere"], "'nowhere' does not exist"),
    "unknown list": (["--lists", "a,c"], "unknown list in 'a,c'. Use a, b or a,b"),
    "unknown split": (["--split", "train"], "invalid choice: 'train'"),
    "limit 0": (["--limit", "0"], "limit must be at least 1, got 0"),
    "batch 0": (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
    "no photos": (["--photos", "nowhere"], "got 'nowhere', which is not a folder"),
    "guidance nan": (["--guidance", "nan"], "guidance must be a number from 0 to 100, got nan"),
    "steps 0": (["--decoder-steps", "0"], "decoder_steps must be an integer from 1 to 1000, got 0"),
    "unknown option": (["--speed", "9"], "unknown option: --speed 9"),
    "no folder": (["--out", "file/inside"], "cannot be written"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_get_one_line(name, run, model_folder, tmp_path):
    arguments, message = BAD_CALLS[name]
    (tmp_path / "file").touch()
    if name != "no model":
        arguments = [str(model_folder), *arguments]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert re.fullmatch(r"Error: [^\n]+\n", err)
