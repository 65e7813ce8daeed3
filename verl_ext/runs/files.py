"""Files that are there whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path


def write_new(path: Path, content: bytes) -> Path:
    """Put ``content`` beside ``path``, on the disk, under the name that is returned; ``os.replace`` makes it ``path``.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    new = Path(f"{path}.new")
    try:
        with open(new, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        # A full disk is told without the file's name.
        raise OSError(e.errno, e.strerror, str(new)) from None
    return new


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file by ``content`` in one move: a reader, or a restart after a kill, finds the old one or the new one.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    os.replace(write_new(path, content), path)
