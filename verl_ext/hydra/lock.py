"""Lock a run's folder, because two processes writing into it would corrupt each other's run."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

LOCK_FILE = ".lock"
HOLDER_FILE = ".lock.holder"
"""The lock holder's process and host; a separate file, because locking may empty the lock file."""


def hold(folder: str | Path) -> BaseFileLock | None:
    """Lock a run's folder, without waiting.

    Returns:
        The lock, held until ``release()``, its deletion or the end of the process, a kill included; None, with a
        warning, if the file system has no locks.

    Raises:
        ValueError: the folder is locked already; names the process and host.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # filelock's soft lock would outlive a kill, and another node could never take it back.
    lock = FileLock(folder / LOCK_FILE, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"trainer.default_local_dir={folder} is in use by {_holder(folder)}; stop that process or wait for its "
            "end, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as e:
        if not os.access(folder, os.W_OK):
            raise ValueError(
                f"trainer.default_local_dir={folder} is not writable: {e}; choose another folder"
            ) from None
        print(f"verl-disco: warning: {folder} cannot be locked ({e}); make sure that no other run uses it", flush=True)
        return None
    # The lock holds even if a full disk keeps its holder's name from being written.
    with suppress(OSError):
        (folder / HOLDER_FILE).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    return lock


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        # The holder has not written its name yet.
        return "another process"
