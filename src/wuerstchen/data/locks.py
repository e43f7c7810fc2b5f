"""File locks, with an error where the file system does not support them.

Some file systems have no working ``flock`` (some NFS, or Lustre without that mount option). Depending on its
version, filelock then raises an error, or falls back to a marker file that two nodes can both acquire. So
``flock`` is tested first.
"""

import errno
import os
import sys
import tempfile
from pathlib import Path

from filelock import BaseFileLock, FileLock

from wuerstchen.errors import RunFolderError


def acquired(path: Path, timeout: float) -> BaseFileLock:
    """Acquires the lock at ``path`` within ``timeout`` seconds. It is released when the process ends.

    The folder of ``path`` must exist. Raises ``filelock.Timeout`` if another process holds the lock,
    ``RunFolderError`` if the file system has no locks, and ``OSError`` if the folder cannot be written.
    """
    check_locks(path.parent)
    lock = FileLock(path)
    lock.acquire(timeout=timeout)
    return lock


def check_locks(folder: Path) -> None:
    """Raises ``RunFolderError`` unless a lock in ``folder`` excludes a second process."""
    if sys.platform == "win32":
        return  # filelock uses a lock there that every local disk supports
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
        f"{folder} is on a file system without working file locks ({reason}), so two processes could write"
        " there at the same time. Use a folder on another disk. Lustre has locks if it is mounted with -o"
        " flock."
    )
