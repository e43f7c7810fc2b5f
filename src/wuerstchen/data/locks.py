"""File locks that really lock, or an error.

Where a file system has no ``flock`` (Lustre mounted without it, some NFS), what filelock does depends on
its version: it raises an error of its own, or falls back to a marker file that two nodes may both believe to
own. So the file system is asked first.
"""

import errno
import os
import sys
import tempfile
from pathlib import Path

from filelock import BaseFileLock, FileLock

from wuerstchen.errors import RunFolderError


def acquired(path: Path, timeout: float) -> BaseFileLock:
    """The lock at ``path``, acquired within ``timeout`` seconds. It ends with the process at the latest.

    The folder of ``path`` must exist. Raises ``filelock.Timeout`` where another process holds the lock,
    ``RunFolderError`` where the file system has no locks, and ``OSError`` where the folder cannot be written.
    """
    check_locks(path.parent)
    lock = FileLock(path)
    lock.acquire(timeout=timeout)
    return lock


def check_locks(folder: Path) -> None:
    """Raises ``RunFolderError`` unless a lock in ``folder`` keeps out whoever comes second."""
    if sys.platform == "win32":
        return  # filelock uses locks there that every local disk has
    import fcntl

    handle, name = tempfile.mkstemp(prefix=".lock-test.", dir=folder)
    try:
        with open(name, "r+b") as second:
            reason = "a second process would get the same lock"
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return
                reason = error.strerror or type(error).__name__
    finally:
        os.close(handle)
        os.unlink(name)
    raise RunFolderError(
        f"{folder} is on a file system without working file locks ({reason}), so two processes could write "
        "there at once. Use a folder on another disk; Lustre has locks when it is mounted with -o flock"
    )
