"""Safe reading of untrusted files: only regular files, up to a limit, without blocking."""

import os
from pathlib import Path

import pytest

from wuerstchen.data.files import open_file, parse_object, read_file, read_text
from wuerstchen.errors import DataError


def test_a_fifo_is_refused_at_once(tmp_path):
    """It has no writer, so a plain open would block forever."""
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"^File 'a.txt' is not a regular file"):
        open_file(tmp_path / "a.txt", "a.txt")


def test_links_to_devices_are_refused_and_links_to_files_are_followed(tmp_path):
    (tmp_path / "endless").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="not a regular file"):
        read_text(tmp_path / "endless", "endless")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_text(tmp_path / "link", "link") == "text"


def test_folders_and_missing_files(tmp_path):
    for path in (tmp_path, tmp_path / "gone", Path("a\0b")):
        with pytest.raises(DataError, match=r"cannot be read|is not a regular file"):
            read_file(path, 10)


def test_more_than_the_limit_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(DataError, match=r"It may have at most 4 bytes\. Shorten it"):
        read_file(path, 4)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "9" * 5000, "[]", "1"])
def test_what_is_no_json_object(text):
    with pytest.raises(DataError, match=r"^line 1 is not "):
        parse_object(text, "line 1")
