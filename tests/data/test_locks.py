"""Locks exclude a second process, or the folder is refused."""

import errno
import fcntl

import pytest
from filelock import Timeout

from wuerstchen.data.locks import acquired, check_locks
from wuerstchen.errors import RunFolderError
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.run import train


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def no_flock(request, monkeypatch):
    """The error of Lustre without ``-o flock`` and of some NFS."""

    def flock(*_):
        raise OSError(request.param, "not here")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_holder_is_kept_out(tmp_path):
    with acquired(tmp_path / "lock", timeout=0.0), pytest.raises(Timeout):
        acquired(tmp_path / "lock", timeout=0.0)
    with acquired(tmp_path / "lock", timeout=0.0):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_file_system_without_locks_is_refused_by_name(tmp_path, no_flock):
    """filelock fell back to marker files, which runs on two nodes could both acquire."""
    with pytest.raises(RunFolderError, match=r"is on a file system without working file locks \(not here\)"):
        acquired(tmp_path / "lock", timeout=0.0)
    assert not list(tmp_path.iterdir())


def test_locks_that_do_not_lock_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(RunFolderError, match="a second process would get the same lock"):
        check_locks(tmp_path)


def test_a_run_is_refused_without_locks(tmp_path, no_flock):
    with pytest.raises(RunFolderError, match="without working file locks"):
        train(tiny(), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "run.json").exists()
