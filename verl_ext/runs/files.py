"""Files, and lines, that are written whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path


def write_new(path: Path, content: bytes, writer: int | str = "") -> Path:
    """Write ``content`` to a new file beside ``path``, flush it to the disk and return its name for ``os.replace``.

    Args:
        writer: tells apart processes that write the same file.

    Raises:
        OSError: the file cannot be written; nothing of it is left.
    """
    new = Path(f"{path}{writer}.new")
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


def write_whole(path: Path, content: bytes, writer: int | str = "") -> None:
    """Replace a file atomically: a reader, or a restart after a kill, finds either the old or the new content.

    Raises:
        OSError: the file cannot be written; the old content is still there.
    """
    os.replace(write_new(path, content, writer), path)


def append_whole(file: int, line: bytes) -> None:
    """Append ``line`` to an open file as a whole, or raise OSError and leave the file unchanged."""
    size, rest = os.fstat(file).st_size, memoryview(line)
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
    except OSError:
        os.ftruncate(file, size)
        raise
