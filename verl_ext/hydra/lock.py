"""A lock on a run's folder: two processes that write into one folder would spoil the run of each other."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

LOCK_FILE = ".lock"
HOLDER_FILE = ".lock.holder"
"""Who holds the lock: a file of its own, since locking may empty the lock's."""


def hold(folder: str | Path) -> BaseFileLock | None:
    """Take the lock on a run's folder, without waiting.

    It is held until ``release()``, or until the process ends, by whatever: a kill leaves nothing to clean up. Keep what
    is returned: the lock goes with it. None where the file system knows no locks, which is said.

    Raises:
        ValueError: another process holds it, or this one by another call; names process and host.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Not filelock's own substitute: its mark outlives a kill, and another node could never take it back.
    lock = FileLock(folder / LOCK_FILE, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"trainer.default_local_dir={folder} is in use by {_holder(folder)}; stop that one or wait for its end, or "
            "choose another folder"
        ) from None
    except (OSError, NotImplementedError) as e:
        if not os.access(folder, os.W_OK):
            raise ValueError(
                f"trainer.default_local_dir={folder} cannot be locked: {e}; choose another folder"
            ) from None
        print(f"verl-disco: warning: {folder} cannot be locked ({e}): see that no other run uses it", flush=True)
        return None
    # On a full disk the lock holds all the same.
    with suppress(OSError):
        (folder / HOLDER_FILE).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    return lock


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        # It has just taken the lock and has not written its name yet.
        return "another process"
