"""The notebooks run from top to bottom, offline, on what the package holds."""

import ast
import json
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_and_ends_with_a_picture(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict = {"__name__": path.stem}
    for cell in code[:-1]:
        exec(compile(cell, path.name, "exec"), names)
    last = ast.parse(code[-1])
    final = last.body.pop()
    assert isinstance(final, ast.Expr)
    exec(compile(last, path.name, "exec"), names)
    shown = eval(compile(ast.Expression(final.value), path.name, "eval"), names)
    assert isinstance(shown, Image.Image)
    assert min(shown.size) >= 128
    assert len(shown.convert("RGB").getcolors(1 << 24)) > 100


def test_there_are_notebooks():
    assert [p.stem for p in NOTEBOOKS] == ["generate", "reconstruct", "train"]
