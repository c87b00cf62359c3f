"""Locks of folders, so that one process at a time writes to a run."""

from __future__ import annotations

import atexit
import fcntl
import os
from pathlib import Path

from tqdm import tqdm

LOCK = ".lock"
_locks: dict[Path, int] = {}  # folder -> descriptor of its lock, which this process holds


def lock(folder: Path) -> None:
    """Lock the folder for this process, with flock on the file `LOCK`. The system releases the lock when the process ends.

    Raises ValueError if another process holds the lock. On NFS the lock counts between machines only if the server supports it. A file
    system without locks gives a warning.
    """
    key, path = folder.resolve(), folder / LOCK
    folder.mkdir(parents=True, exist_ok=True)
    while key not in _locks:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"another process is writing to {folder}: wait for its end, or choose another --output-dir"
            ) from None
        except OSError as error:
            tqdm.write(f"warning: {folder} cannot be locked ({error.strerror}): start only one run in it")
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            _locks[key] = descriptor
        else:
            os.close(descriptor)  # its last owner removed it before it was locked here


def locked(folder: Path) -> bool:
    """Lock the folder for a run that this process begins next. Return False where another process holds the lock."""
    try:
        lock(folder)
    except ValueError:
        return False
    return True


def unlock(folder: Path) -> None:
    """Release the lock of this process on a folder, and remove its file."""
    if (descriptor := _locks.pop(folder.resolve(), None)) is not None:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)


@atexit.register
def unlock_all() -> None:
    """Release all locks of this process."""
    for folder in list(_locks):
        unlock(folder)
