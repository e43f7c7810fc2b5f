"""Untrusted names cannot control the terminal."""

import io
import os
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file

from wuerstchen.checkpoints.files import read_json
from wuerstchen.checkpoints.weights import read_tensors_of
from wuerstchen.cli import main
from wuerstchen.errors import CheckpointError, UserError, UserNotice, shown
from wuerstchen.images import open_image
from wuerstchen.lora import load_lora
from wuerstchen.terminal import printable, safe_streams, unfiltered

# Clear screen, set title, cursor up, backspace, bell, change of writing direction, and the C1 form.
HOSTILE = "a\x1b[2J\x1b]0;owned\x07\x1b[A\r\x08\u202e\u2028\x9b31m\x7fz"


def has_controls(text: str) -> bool:
    return any(c in text for c in "\x1b\x07\r\x08\u202e\u2028\x9b\x7f")


def test_controls_are_spelled_out_and_letters_are_not():
    assert printable(HOSTILE).startswith(r"a\x1b[2J\x1b]0;owned\x07\x1b[A\r\x08")
    assert not has_controls(printable(HOSTILE))
    assert printable("two\nlines") == r"two\nlines"
    family = "Würstchen 🌭, 日本語, 👩\u200d🚀"  # an emoji of two, joined by an invisible character
    assert printable(family) == family


@pytest.mark.parametrize("kind", [UserError, CheckpointError, UserNotice])
def test_messages_are_printable(kind):
    assert not has_controls(str(kind(f"{HOSTILE} is damaged")))
    assert not has_controls(f"{kind(HOSTILE)}")


def test_messages_are_never_longer_than_a_page():
    message = str(UserError(f"{'x' * 10**6} is wrong. Use less"))
    assert len(message) < 4100
    assert message.startswith("xxx")
    assert "(996019 characters are left out)" in message
    assert message.endswith("is wrong. Use less")
    assert str(UserError("short")) == "short"


def test_warnings_are_printable():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn(HOSTILE, UserNotice, stacklevel=1)
    assert not has_controls(str(caught[0].message))


def test_what_a_command_prints_is_safe(capsys):
    with safe_streams():
        print("skipped", HOSTILE)
        print(HOSTILE, file=sys.stderr)
        sys.stdout.writelines([HOSTILE, "\n"])
        assert not sys.stdout.isatty()
        unfiltered(sys.stdout).write("\x1b[1mhelp\x1b[0m")
    out, err = capsys.readouterr()
    assert not has_controls(out.replace("\x1b[1mhelp\x1b[0m", ""))
    assert not has_controls(err)
    assert out.count("\n") == 2
    print(HOSTILE)  # as before
    assert has_controls(capsys.readouterr().out)


def test_progress_bars_still_move(monkeypatch):
    """A bar returns to the start of its line, and a second bar moves up."""
    from tqdm import tqdm

    plain, safe = io.StringIO(), io.StringIO()
    for stream, around in ((plain, None), (safe, safe_streams())):
        monkeypatch.setattr(sys, "stderr", stream)
        if around is not None:
            around.__enter__()
        for _ in tqdm(range(3), file=sys.stderr, position=1, ncols=40, mininterval=0, bar_format="{n}"):
            pass
        if around is not None:
            around.__exit__(None, None, None)
    assert "\x1b[A" in plain.getvalue()
    assert safe.getvalue() == plain.getvalue()


@pytest.mark.parametrize("command", [["generate", "a cat", "--model"], ["convert", "--layout", "native"]])
def test_a_name_with_escapes_on_the_command_line(command, tmp_path, capfd):
    name = tmp_path / "\x1b[31mmodel"
    name.mkdir()
    more = [str(tmp_path / "new")] if command[0] == "convert" else []
    assert main([*command, str(name), *more]) == 2
    err = capfd.readouterr().err
    assert r"\x1b[31mmodel" in err
    assert not has_controls(err)


def test_names_of_tensors_dtypes_and_images(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({HOSTILE: torch.ones(1)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_lora(torch.nn.Linear(1, 1), path)
    assert not has_controls(str(caught.value))
    header = b'{"a":{"dtype":"\\u001b[2JF32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read_tensors_of(path)
    assert not has_controls(str(caught.value))
    image = tmp_path / f"{HOSTILE.replace('/', '')}.png"
    image.write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        open_image(image)
    assert not has_controls(str(caught.value))
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / HOSTILE)
    assert not has_controls(str(caught.value))


def test_values_of_any_size_are_shown_at_once():
    nested: object = ()
    for _ in range(200):
        nested = (nested, nested)  # 2^200 elements, if they are written out
    assert shown(nested) == "a tuple"
    assert len(shown("x" * 10**6)) < 100
    assert shown(10**5000) == "an integer of 16610 bits"
    assert shown({"a": 1}) == "a dict"
    assert [shown(value) for value in (None, True, 3, 0.5, "a\x1b")] == [
        "None",
        "True",
        "3",
        "0.5",
        r"'a\x1b'",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_help_of_recipes_keeps_its_colours():
    """It is our own text, and only has them on a terminal."""
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "wuerstchen", "train", "tiny", "--help"]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the command has ended
                break
            said += part
            if not part:
                break
        assert process.wait(60) == 0
    os.close(ours)
    assert b"image-size" in said
    assert b"\x1b[" in said
    assert rb"\x1b" not in said
