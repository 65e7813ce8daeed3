"""Write ``metrics.jsonl``: one JSON object per logged step, whole lines only.

The evaluation of a checkpoint after its step was logged adds a second line for that step;
:func:`verl_ext.runs.folder.read_metrics` joins the two.
"""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch

from verl_ext.runs.files import append_whole, write_new, write_whole
from verl_ext.training.progress import Progress

ROW_FILE = "metrics.json"
"""In a checkpoint's folder: rows that could not be written, and its step's, which verl logs after the evaluation."""


class Row(NamedTuple):
    """A line of ``metrics.jsonl``."""

    step: int
    line: bytes
    values: dict[str, Any]


def as_line(step: int, values: Mapping[str, Any]) -> bytes:
    """Write a step's metrics as one line; NaN and infinity become null."""
    numbers = {k: v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for k, v in values.items()}
    # With the step first, a row is found behind one that was cut off.
    row = {"step": step} | numbers | {"step": step}
    return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY, default=str) + b"\n"


def read_rows(content: bytes) -> tuple[list[Row], int]:
    """Return the readable rows, and the number of lines with anything else.

    A row behind one that was cut off, on the same line, is found by its beginning.
    """
    rows, damaged = [], 0
    for line in filter(bytes.strip, content.split(b"\n")):
        starts = [0, *(m.start() for m in re.finditer(rb'\{"step":', line) if m.start())]
        found = next(((start, row) for start in starts if (row := _parse(line[start:]))), None)
        if found:
            rows.append(found[1])
        damaged += not found or found[0] > 0
    return rows, damaged


def _parse(line: bytes) -> Row | None:
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    if not isinstance(step, int | float) or isinstance(step, bool) or step != step // 1 or step < 0:
        return None
    return Row(int(step), line.rstrip(b"\r") + b"\n", values)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def read_unlogged(checkpoint: Path) -> list[Row]:
    """Read the metrics in a checkpoint's folder, the step's own last."""
    return read_rows(_content(checkpoint / ROW_FILE))[0]


def is_evaluated(path: Path, step: int) -> bool:
    """Tell whether the file ``path`` has an evaluation of ``step``."""
    rows, _ = read_rows(_content(path))
    return any(name.startswith("val-") for row in rows if row.step == step for name in row.values)


class MetricsLog:
    """verl's ``Tracking``, plus the metrics file and a line per step on the standard output.

    A resumed run appends to the file. If it has unreadable lines or steps that will run again, it is kept as
    ``metrics.jsonl.1``, ``.2`` and so on, and a new file starts with the other lines.

    Args:
        tracking: verl's own logger.
        path: the metrics file.
        resumed_step: step of the checkpoint that the run starts from; 0 for a new run.
        trains: False if the run only evaluates: no step runs again, so all rows stay.
        unlogged: rows that the resumed checkpoint has, the step's own last; those that are not in the file are added.
        progress: makes the lines; None for none.
    """

    def __init__(
        self,
        tracking: Any,
        path: str | Path,
        resumed_step: int,
        *,
        trains: bool = True,
        unlogged: Sequence[Row] = (),
        progress: Progress | None = None,
    ):
        self._tracking, self._path, self._progress = tracking, Path(path), progress
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = _content(self._path)
        rows, damaged = read_rows(content)
        kept = [row for row in rows if not trains or 0 < resumed_step and row.step <= resumed_step]
        lines = b"".join(row.line for row in kept)
        if lines != content:
            # The new file is on the disk before it replaces the old one.
            new = write_new(self._path, lines)
            aside = self._put_aside()
            os.replace(new, self._path)
            counts = {"rows of steps to run again": len(rows) - len(kept), "unreadable lines": damaged}
            found = "".join(f"; {what}: {number}" for what, number in counts.items() if number)
            print(f"verl-disco: the old {self._path.name} is kept as {aside}{found}", flush=True)
        *lost, own = unlogged or [Row(resumed_step, b"", {})]
        known = {row.line for row in kept}
        lost = [row for row in lost if row.line not in known]
        if progress is not None:
            for row in [*kept, *lost]:
                progress.note(row.step, row.values)
        is_logged = any(row.step == resumed_step for row in kept)
        self._unlogged = {} if is_logged or not own.values else own.values | {"step": resumed_step}
        self._waiting, self._why = [row.line for row in lost], ""
        self._file = open(self._path, "ab", buffering=0)
        self.write_waiting()

    def _put_aside(self) -> Path:
        """Give the file a second name with the next free number; where links are impossible, copy it."""
        aside = next(p for i in count(1) if not (p := Path(f"{self._path}.{i}")).exists())
        try:
            os.link(self._path, aside)
        except OSError:
            write_whole(aside, _content(self._path))
        return aside

    def log(self, data: dict[str, Any], step: int, **kwargs: Any) -> None:
        """Log the metrics of a step or an evaluation."""
        before, self._unlogged = self._unlogged, {}
        if before and before["step"] != step:
            self._write(as_line(before["step"], before))
            before = {}
        self._write(as_line(step, before | data))
        self._tracking.log(data=data, step=step, **kwargs)
        if self._progress is not None:
            print(f"verl-disco: {self._progress.line(step, data)}", flush=True)

    def _write(self, line: bytes) -> None:
        self._waiting.append(line)
        self.write_waiting()

    def write_waiting(self) -> bytes:
        """Append the lines that could not be written; return those that still cannot."""
        try:
            while self._waiting:
                append_whole(self._file.fileno(), self._waiting[0])
                del self._waiting[0]
        except OSError as e:
            self._why = str(e.strerror)
            print(
                f"verl-disco: warning: {self._path} cannot be written ({e.strerror}); {len(self._waiting)} rows wait "
                "for the next attempt",
                flush=True,
            )
        return b"".join(self._waiting)

    def finish(self, *args: Any, **kwargs: Any) -> Any:
        """Close the file and verl's loggers.

        Raises:
            OSError: some rows could not be written.
        """
        if self._unlogged:
            self._write(as_line(self._unlogged["step"], self._unlogged))
            self._unlogged = {}
        self.write_waiting()
        self._file.close()
        result = self._tracking.finish(*args, **kwargs)
        if self._waiting:
            raise OSError(f"{len(self._waiting)} rows could not be written to {self._path}: {self._why}")
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracking, name)
