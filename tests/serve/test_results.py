"""Finished images: names, expiry, total size, and several instances in one folder."""

import os
import time

import pytest
from PIL import Image

from wuerstchen.errors import UserError
from wuerstchen.serve.results import Results
from wuerstchen.serve.signing import Signer

RED = Image.new("RGB", (64, 64), "red")


def make(folder, instance="abc123", **settings):
    return Results(folder, instance, **{"seconds": 60.0, "max_bytes": 10**6, **settings})


def test_names_contain_the_instance_and_cannot_be_guessed(tmp_path):
    results = make(tmp_path)
    names = {results.save(RED, {"seed": k}) for k in range(20)}
    assert len(names) == 20
    assert all(name.startswith("abc123-") and len(name) == 7 + 32 + 4 for name in names)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_only_images_can_be_read(tmp_path):
    """A name from a client must not lead out of the folder."""
    (tmp_path / "secret.png").write_bytes(b"x")
    folder = tmp_path / "results"
    results = make(folder)
    name = results.save(RED, {})
    (folder / "notes.png").write_bytes(b"x")
    assert results.read(name) is not None
    for other in (
        "../secret.png",
        "notes.png",
        "",
        ".",
        name[:-1],
        name + "/",
        f"./{name}",
        name + "\n",
        "\0",
    ):
        assert results.read(other) is None


class Clock:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_another_instance_can_serve_and_delete_images(tmp_path):
    clock = Clock()
    one, other = make(tmp_path), make(tmp_path, "def456", clock=clock)
    name = one.save(RED, {})
    assert other.read(name) == one.read(name) is not None
    other.clear()
    clock.now += 61
    assert other.read(name) is None
    other.clear()
    assert os.listdir(tmp_path) == []
    assert one.read(name) is None
    one.clear()


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_jump_of_the_system_clock_changes_nothing(tmp_path, jump):
    """After the clock was set, all images were deleted at once, or the newest first."""
    clock = Clock()
    results = make(tmp_path, clock=clock)
    old = results.save(RED, {})
    os.utime(tmp_path / old, (time.time() - jump,) * 2)  # as its file would be after the jump
    clock.now += 50
    new = results.save(RED, {})
    results.clear()
    assert results.read(old) is not None
    results.max_bytes = (tmp_path / new).stat().st_size + 5
    results.clear()
    assert (results.read(old), results.read(new) is None) == (None, False)
    clock.now += 61
    assert results.read(new) is None
    results.clear()
    assert os.listdir(tmp_path) == []


def test_files_that_exist_at_the_start_expire_by_their_modification_time(tmp_path):
    results = make(tmp_path)
    names = [results.save(RED, {"seed": k}) for k in range(3)]
    for name, age in zip(names, (100, 40, -1000), strict=True):
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    clock = Clock()
    again = make(tmp_path, "def456", clock=clock)
    assert [again.read(name) is None for name in names] == [True, False, False]
    clock.now += 30
    assert [again.read(name) is None for name in names] == [True, True, False]
    clock.now += 40  # a file from the future counts as new
    again.clear()
    assert os.listdir(tmp_path) == []


def test_the_oldest_images_are_deleted_first(tmp_path):
    clock = Clock()
    results = make(tmp_path, clock=clock)
    names = []
    for k in range(5):
        names.insert(0, results.save(RED, {"seed": k}))
        clock.now += 1
    names.reverse()
    size = (tmp_path / names[0]).stat().st_size
    (tmp_path / "notes.txt").write_bytes(b"not ours" * 1000)
    results.max_bytes = 3 * size + 5
    results.clear()
    assert sorted(os.listdir(tmp_path)) == sorted([*names[2:], "notes.txt"])


def test_unfinished_files_of_a_crash_are_deleted(tmp_path):
    clock = Clock()
    results = make(tmp_path, clock=clock)
    name = results.save(RED, {})
    half = tmp_path / f".{name[:-4]}-0123abcd.tmp"
    half.write_bytes(b"half")
    results.clear()
    assert half.exists()  # it may still be written
    clock.now += 61
    results.clear()
    assert not half.exists()


def test_only_regular_files_are_served(tmp_path):
    """A link with an image's name in a shared folder could expose any file, and a pipe would block."""
    folder = tmp_path / "results"
    results = make(folder)
    name = results.save(RED, {})
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    link, pipe, inside = (f"abc123-{digit * 32}.png" for digit in "123")
    (folder / link).symlink_to(secret)
    os.mkfifo(folder / pipe)
    (folder / inside).mkdir()
    assert [results.read(other) for other in (link, pipe, inside)] == [None] * 3
    assert results.read(name) is not None
    results.max_bytes = 1
    results.clear()
    assert secret.read_bytes() == b"secret"


def test_a_deleted_folder_is_created_again(tmp_path):
    """Systems delete old files in /tmp. After that, every job of an idle service failed."""
    results = make(tmp_path / "r")
    (tmp_path / "r").rmdir()
    results.clear()
    assert results.read(results.save(RED, {}))


def test_an_image_that_cannot_be_signed_is_not_kept(tmp_path):
    """Its name is in the log, so others could fetch it unsigned."""

    class Broken(Signer):
        def __init__(self):
            pass

        def sign(self, path):
            raise UserError(f"{path.name} could not be signed")

    with pytest.raises(UserError, match="could not be signed"):
        make(tmp_path, signer=Broken()).save(RED, {})
    assert os.listdir(tmp_path) == []
