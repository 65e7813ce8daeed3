"""Files that are written whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path


def write_new(path: Path, content: bytes) -> Path:
    """Write ``content`` to a new file beside ``path``, flush it to the disk and return its name for ``os.replace``.

    Raises:
        OSError: the file cannot be written; nothing of it is left.
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
        # The error of a full disk lacks the file's name.
        raise OSError(e.errno, e.strerror, str(new)) from None
    return new


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader, or a restart after a kill, finds either the old or the new content.

    Raises:
        OSError: the file cannot be written; the old content is still there.
    """
    os.replace(write_new(path, content), path)
