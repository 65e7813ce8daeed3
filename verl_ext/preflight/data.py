"""Reads a run's data files as verl does."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from numbers import Number
from typing import Any

from omegaconf import DictConfig, ListConfig

from verl_ext.preflight.findings import first_lines


@dataclass(frozen=True)
class DataFile:
    """A file of a split, and why verl cannot read it, as far as that shows without opening it."""

    split: str
    name: str
    problem: str = ""

    @property
    def missing(self) -> bool:
        return self.problem == _absent(self.name)

    @property
    def is_remote(self) -> bool:
        return "://" in self.name


@dataclass(frozen=True)
class Rows:
    """The rows and features of a file, or why they cannot be read."""

    frame: Any = None
    features: Any = None
    problem: str = ""


@dataclass(frozen=True)
class Head:
    """A file's columns, its number of rows, and a function that returns what its column ``data_source`` holds."""

    columns: list[str]
    rows: int
    sources: Callable[[], list[Any]]


LARGEST_JSON = 64 * 2**20
"""Bytes of a JSON file that a start reads; larger ones are left to the doctor."""


class Data:
    """The files of both splits; each is read once, when rows are first needed."""

    def __init__(self, config: DictConfig):
        self.config = config.data

    @cached_property
    def files(self) -> list[DataFile]:
        found = []
        for split in ("train", "val"):
            names = self.config[f"{split}_files"]
            names = [str(name) for name in (names if isinstance(names, ListConfig) else [names]) if name]
            # verl hands patterns on to "datasets".
            names = [file for name in names for file in _matching(name)]
            found += [DataFile(split, name, _fault(name)) for name in names] or [
                DataFile(split, "", "no file is named")
            ]
        return found

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """The contents of the existing files, by name."""
        names = dict.fromkeys(f.name for f in self.files if not f.problem and not f.is_remote)
        return {name: _read(name, self.config.prompt_key) for name in names}

    @cached_property
    def heads(self) -> dict[str, Head]:
        """What a start looks at of the files that can be read, by name."""
        found = {}
        for name in dict.fromkeys(f.name for f in self.files if not f.problem and not f.is_remote):
            path = os.path.expanduser(name)
            with suppress(Exception):  # The doctor, which reads the rows, says why.
                if _is_parquet(path) or os.path.getsize(path) <= LARGEST_JSON:
                    found[name] = _parquet_head(path) if _is_parquet(path) else _json_head(path)
        return found

    def sources(self, split: str) -> list[str]:
        """Return what the column ``data_source`` of a split's files holds, sorted, as far as they can be read."""
        found: set[str] = set()
        for head in (self.heads.get(f.name) for f in self.files if f.split == split):
            with suppress(Exception):
                found |= set(map(str, head.sources())) if head else set()
        return sorted(found)

    def rows_of(self, split: str) -> int | None:
        """Count the rows that verl takes of a split; None if a file is not known."""
        heads = [self.heads.get(f.name) for f in self.files if f.split == split]
        return None if None in heads else self._at_most(split, sum(head.rows for head in heads if head))

    def _at_most(self, split: str, count: int) -> int:
        most = self.config.get(f"{split}_max_samples", -1)
        return min(count, most) if most > 0 else count

    def read(self, split: str) -> dict[str, Rows]:
        """Return the files of a split that could be read."""
        found = {f.name: self.rows.get(f.name, Rows()) for f in self.files if f.split == split}
        return {name: rows for name, rows in found.items() if rows.frame is not None}

    def count(self, split: str) -> int:
        """Count the readable rows of a split, at most ``data.{split}_max_samples``."""
        return self._at_most(split, sum(len(rows.frame) for rows in self.read(split).values()))

    def prompts(self, count: int) -> list[Any]:
        """Return the valid prompts among the first ``count`` of a file."""
        key = self.config.prompt_key
        frame = next((r.frame for r in self.rows.values() if r.frame is not None and key in r.frame), ())
        return [p for p in frame[key].head(count) if not wrong_prompt(p, key)] if len(frame) else []

    def is_whole(self, split: str) -> bool:
        """Whether all files of a split were read."""
        return self.read(split).keys() == {f.name for f in self.files if f.split == split}


def wrong_prompt(prompt: Any, key: str) -> str:
    """Say why a prompt is not a list of messages with role and content; "" if it is one."""
    if isinstance(prompt, (str, bytes, dict)) or not hasattr(prompt, "__len__") or not len(prompt):
        return f": {key} is not a list of messages"
    for message in prompt:
        if not isinstance(message, dict):
            return f": {key} is not a list of messages: {type(message).__name__} instead of role and content"
        role, content = message.get("role"), message.get("content")
        if not (isinstance(role, str) and role.strip()):
            return f": a message of {key} has no role"
        if content is None:
            return f": a message of {key} has no content"
        # A text, or a list of texts and images.
        if isinstance(content, (bytes, dict)) or not hasattr(content, "__len__"):
            kind = "a number" if isinstance(content, Number) else type(content).__name__
            return f": a message of {key} has {kind} for its content"
    if all(is_empty(message["content"]) for message in prompt):
        return f": {key} is empty"
    return ""


def is_empty(value: Any) -> bool:
    """Whether a value holds no text and no number, at any depth."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return bool(value != value)
    return all(is_empty(v) for v in (value.values() if isinstance(value, dict) else value))


def _matching(name: str) -> list[str]:
    there = "://" in name or os.path.exists(os.path.expanduser(name))
    return [name] if there else sorted(glob(os.path.expanduser(name), recursive=True)) or [name]


def _absent(name: str) -> str:
    return f"there is no {name}"


def _fault(name: str) -> str:
    path = os.path.expanduser(name)
    if "://" in name:
        return ""
    if not os.path.exists(path):
        return _absent(name)
    if not path.endswith((".parquet", ".json", ".jsonl")) or not os.path.isfile(path):
        return f"verl reads files that end in .parquet, .json or .jsonl, not {name}"
    try:
        with open(path, "rb") as f:
            content = f.read(4)
            f.seek(-min(4, os.path.getsize(path)), os.SEEK_END)
            whole = not _is_parquet(path) or content == f.read(4) == b"PAR1"
    except OSError as e:
        return f"{name} cannot be read: {e.strerror}"
    if not content:
        return f"{name} is empty"
    return "" if whole else f"{name} is not a whole Parquet file: it was cut off, or is of another type"


def _is_parquet(path: str) -> bool:
    return path.endswith(".parquet")


def _values(table: Any) -> list[Any]:
    return table["data_source"].unique().to_pylist()


def _parquet_head(path: str) -> Head:
    """Read the footer; of the rows, one column where it is asked for."""
    import pyarrow.parquet as pq

    meta = pq.read_metadata(path)
    names = meta.schema.to_arrow_schema().names
    return Head(names, meta.num_rows, lambda: _values(pq.read_table(path, columns=["data_source"])))


def _json_head(path: str) -> Head:
    """Read lines of JSON fast. Raises on one array of records, which verl reads as well."""
    import pyarrow.json

    table = pyarrow.json.read_json(path)
    known = _values(table) if "data_source" in table.column_names else []
    return Head(table.column_names, table.num_rows, lambda: known)


def _read(name: str, prompt_key: str) -> Rows:
    path = os.path.expanduser(name)
    try:
        return Rows(*(_read_parquet if _is_parquet(path) else _read_json)(path, prompt_key))
    except Exception as e:
        cause = e.__cause__ or e
        return Rows(problem=f"{name} cannot be read: {type(cause).__name__}: {first_lines(cause)}")


def _read_parquet(path: str, prompt_key: str) -> tuple[Any, Any]:
    import datasets
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    columns = [c for c in (prompt_key, "reward_model", "data_source") if c in schema.names]
    return pq.read_table(path, columns=columns).to_pandas(), datasets.Features.from_arrow_schema(schema)


def _read_json(path: str, prompt_key: str) -> tuple[Any, Any]:
    """Read as verl does, but leave nothing in the user's cache."""
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.load_dataset("json", data_files=path, cache_dir=cache, keep_in_memory=True)["train"]
            return rows.to_pandas(), rows.features
    finally:
        if bars:
            datasets.enable_progress_bars()
