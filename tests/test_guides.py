"""The commands in the guides: all their options exist and accept the values."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from wuerstchen.cli import main
from wuerstchen.train import run

DOCS = Path(__file__).parents[1] / "docs"


def training_commands(text: str) -> list[str]:
    """The ``wuerstchen train`` commands in code blocks, with shell variables replaced."""
    text = text.replace("\\\n", " ")
    variables = dict(re.findall(r'^(\w+)="([^"]+)"', text, re.MULTILINE))
    found = re.findall(r"^ *wuerstchen (train [^|&\n]*)", text, re.MULTILINE)
    return [re.sub(r"\$(\w+)", lambda name: variables[name[1]], command) for command in found]


def options_in_sentences(text: str) -> list[str]:
    """Options with values in inline code, as commands. W stands for a weight."""
    spans = [" ".join(span.split()) for span in re.findall(r"`(--[^`]+)`", text)]
    of_recipes = r"--(add-phase|stage-[abc]|vqgan|compressor|decoder|previewer|prior)\b.* \S"
    return [f"train RECIPE {re.sub(r' W$', ' 0.5', span)}" for span in spans if re.match(of_recipes, span)]


COMMANDS = [
    command
    for find in (training_commands, options_in_sentences)
    for command in find((DOCS / "training.md").read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_guides_are_accepted(command, monkeypatch, tmp_path):
    """Bug: a switch was followed by a value, which the command line refuses.

    Options without a command must fit the small recipe or the one of the published size.
    """
    started = []
    monkeypatch.setattr(run, "train", lambda *recipe, **options: started.append(recipe) or tmp_path)
    words = [word for word in shlex.split(command, comments=True) if word != "..."]
    recipes = ("mini", "v2") if words[1] == "RECIPE" else (words[1],)
    assert any(main(["train", recipe, *words[2:]]) == 0 for recipe in recipes)
    assert started


def drawing_commands(text: str) -> list[list[str]]:
    """The ``wuerstchen generate`` and ``morph`` commands in code blocks, as words."""
    found = re.findall(r"^wuerstchen ((?:generate|morph) [^|&\n]*)", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(command) for command in found]


@pytest.mark.parametrize(
    "words", drawing_commands((DOCS / "editing.md").read_text(encoding="utf-8")), ids=" ".join
)
def test_commands_in_the_guide_to_editing_run(words, monkeypatch, tmp_path, model_folder):
    """With a tiny model and images of the right size. Bug: an option was renamed, or needs another one."""
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "first.png", "second.png"):
        Image.effect_noise((140, 128), 60).convert("RGB").save(name)
    mask = Image.new("L", (140, 128), 0)
    mask.paste(255, (20, 20, 70, 70))
    mask.save("mask.png")
    fast = ["--prior-steps", "1", "--decoder-steps", "1", "--model", str(model_folder)]
    assert main([*words, *fast, *(["--frames", "2"] if words[0] == "morph" else [])]) == 0
