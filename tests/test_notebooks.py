"""The notebooks run from top to bottom, offline, on what the package holds."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

import wuerstchen
from wuerstchen import pipeline
from wuerstchen.pipeline import Wuerstchen

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem == "reconstruct" else pytest.mark.slow)
        for path in NOTEBOOKS
    ],
)
def test_notebook_runs_and_ends_with_a_picture(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = result_of(path)
    assert isinstance(shown, Image.Image)
    assert min(shown.size) >= 128
    assert len(shown.convert("RGB").getcolors(1 << 24)) > 100


@pytest.mark.parametrize("name", ["generate", "reconstruct"])
def test_notebook_runs_in_half_precision(name, monkeypatch):
    """As on a GPU, where ``load`` takes float16. In a few steps, which take less time."""

    def load() -> Wuerstchen:
        model = pipeline.load(precision="bfloat16")
        settings = dataclasses.replace(model.cascade.settings, prior_steps=2, decoder_steps=2)
        return Wuerstchen(dataclasses.replace(model.cascade, settings=settings), model.device)

    monkeypatch.setattr(wuerstchen, "load", load)
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    assert isinstance(result_of(path), Image.Image)


def result_of(path: Path) -> object:
    """What the last line of the last cell shows."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict = {"__name__": path.stem}
    for cell in code[:-1]:
        exec(compile(cell, path.name, "exec"), names)
    last = ast.parse(code[-1])
    final = last.body.pop()
    assert isinstance(final, ast.Expr)
    exec(compile(last, path.name, "exec"), names)
    return eval(compile(ast.Expression(final.value), path.name, "eval"), names)


def test_there_are_notebooks():
    assert [p.stem for p in NOTEBOOKS] == ["generate", "reconstruct", "train"]
