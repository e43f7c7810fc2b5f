"""Bars on a terminal, lines elsewhere."""

import io
import sys

from wuerstchen import progress_bar as progress
from wuerstchen.progress_bar import bar


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def written(monkeypatch, terminal: bool, seconds: float) -> str:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS", seconds)
    with bar(total=3000, desc="Stage A", unit="img", mininterval=0.0, miniters=1) as shown:
        for _ in range(3000):
            shown.update(1)
    return stream.getvalue()


def test_a_file_gets_whole_lines_and_few_of_them(monkeypatch):
    text = written(monkeypatch, terminal=False, seconds=60.0)
    lines = text.splitlines()
    assert "\r" not in text
    assert 1 <= len(lines) <= 3  # the beginning and the end
    assert lines[0].startswith("Stage A")
    assert "3000/3000" in lines[-1]


def test_lines_come_again_after_a_while(monkeypatch):
    assert len(written(monkeypatch, terminal=False, seconds=0.0).splitlines()) > 10


def test_a_terminal_has_a_bar_that_is_drawn_in_place(monkeypatch):
    text = written(monkeypatch, terminal=True, seconds=60.0)
    assert text.count("\r") > 10
