"""The data that a run reads: can verl read it, and does every row hold a prompt and a truth?"""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from omegaconf import DictConfig, ListConfig

from verl_ext.preflight.findings import Finding, first_lines

PREPARE = "python -m verl_ext.tasks.math.prepare --out DIR, then math.folder=DIR"

OUR_GRADER = "pkg://verl_ext.tasks.math.reward"


@dataclass(frozen=True)
class DataFile:
    """One file of a split: its rows and features, or why they cannot be read."""

    split: str
    name: str
    frame: Any = None
    features: Any = None
    problem: str = ""
    remote: bool = False


class Data:
    """The files of both splits, each read once, when they are first asked for."""

    def __init__(self, config: DictConfig):
        self.config = config.data
        self.reward = config.reward

    @cached_property
    def files(self) -> list[DataFile]:
        read: dict[str, DataFile] = {}
        found = []
        for split in ("train", "val"):
            names = self.config[f"{split}_files"]
            names = list(names) if isinstance(names, ListConfig) else [names]
            if not any(names):
                found.append(DataFile(split, "", problem="no file is named"))
            for name in filter(None, names):
                if name not in read:
                    read[name] = _read(split, str(name), self.config.prompt_key)
                found.append(replace(read[name], split=split))
        return found

    def rows(self, split: str) -> int:
        """Rows of a split as far as they could be read, at most ``data.{split}_max_samples``."""
        count = sum(len(f.frame) for f in self.files if f.split == split and f.frame is not None)
        most = self.config.get(f"{split}_max_samples", -1)
        return min(count, most) if most > 0 else count

    def prompts(self, count: int) -> list[Any]:
        """The first training prompts that are lists of messages."""
        key = self.config.prompt_key
        frame = next((f.frame for f in self.files if f.frame is not None and key in f.frame), ())
        return [p for p in frame[key].head(count) if not wrong_prompt(p, key)] if len(frame) else []

    def is_whole(self, split: str) -> bool:
        """Whether all files of a split were read."""
        return all(f.frame is not None for f in self.files if f.split == split)


def check_data(data: Data) -> Iterator[Finding]:
    """Name the files that verl cannot read, and the rows that it cannot train on."""
    from verl_ext.tasks.math.reward import ground_truths

    graded_by_us = (data.reward.custom_reward_function or {}).get("path") == OUR_GRADER
    seen = set()
    for file in data.files:
        name, label = f"data.{file.split}_files", f"{file.split} data"
        if (file.split, file.name) in seen:
            yield Finding(label, "", f"{name}: {file.name} is there twice", "leave one out", warning=True)
            continue
        seen.add((file.split, file.name))
        if file.remote:
            yield Finding(label, file.name, f"{file.name} is remote and was not opened", "", warning=True)
        elif file.frame is None:
            yield Finding(label, file.name, f"{name}: {file.problem}", PREPARE)
        else:
            sources = "data_source" in file.frame and sorted(map(str, file.frame["data_source"].unique()))
            yield Finding(label, f"{file.name}: {len(file.frame)} rows, {', '.join(sources or '?')}")
            if data.config.custom_cls.get("path"):
                yield Finding(
                    label, "", f"{file.name} is read by data.custom_cls, so its rows were not checked", "", True
                )
                continue
            for problem in wrong_rows(file.frame, data.config.prompt_key, ground_truths if graded_by_us else None):
                yield Finding(label, "", f"{name}: {file.name}{problem}", PREPARE)
    for split in ("train", "val"):
        yield from _unlike([f for f in data.files if f.split == split and f.features is not None])


def wrong_rows(frame: Any, prompt_key: str, accept: Callable[[Any], Any] | None = None) -> Iterator[str]:
    """What is wrong with the rows of a file, each kind once, to be read behind the file's name.

    Args:
        frame: the rows, as a pandas.DataFrame.
        prompt_key: the column of the prompts.
        accept: raises ValueError for a truth that the reward function refuses.
    """
    missing = [c for c in (prompt_key, "reward_model", "data_source") if c not in frame]
    if missing:
        yield f" has no column {missing[0]}"
        return
    if not len(frame):
        yield " has no rows"
    found: dict[str, list[int]] = {}
    for i, (prompt, reward_model) in enumerate(zip(frame[prompt_key], frame["reward_model"], strict=True)):
        for problem in filter(None, (wrong_prompt(prompt, prompt_key), wrong_truth(reward_model, accept))):
            found.setdefault(problem, []).append(i)
    for problem, rows in found.items():
        others = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
        yield f": row {rows[0]}{problem}{others}"


def wrong_prompt(prompt: Any, key: str) -> str:
    """What keeps a prompt from being a list of messages with role and content; nothing if it is one."""
    if isinstance(prompt, (str, bytes, dict)) or not hasattr(prompt, "__len__") or not len(prompt):
        return f": {key} is not a list of messages"
    for message in prompt:
        if not isinstance(message, dict):
            return f": {key} is not a list of messages: {type(message).__name__} instead of role and content"
        for part in ("role", "content"):
            value = message.get(part)
            if value is None or (part == "role" and not (isinstance(value, str) and value.strip())):
                return f": a message of {key} has no {part}"
            if isinstance(value, (bool, int, float)):
                return f": a message of {key} has a number for its {part}"
    if all(is_empty(message["content"]) for message in prompt):
        return f": {key} is empty"
    return ""


def wrong_truth(reward_model: Any, accept: Callable[[Any], Any] | None = None) -> str:
    """Why ``reward_model`` holds no ground truth to grade by; nothing if it does."""
    if not isinstance(reward_model, dict):
        return f": reward_model is {type(reward_model).__name__}, not a record with ground_truth"
    truth = reward_model.get("ground_truth")
    if truth is None:
        return " has no reward_model.ground_truth"
    if is_empty(truth):
        return ": reward_model.ground_truth is empty"
    try:
        if accept is not None:
            accept(truth)
    except ValueError as e:
        return f": the reward function refuses reward_model.ground_truth: {first_lines(e)}"
    return ""


def is_empty(value: Any) -> bool:
    """Whether there is nothing in it: no text, no number, or a list of nothing else."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return bool(value != value)
    return all(is_empty(v) for v in (value.values() if isinstance(value, dict) else value))


def _read(split: str, name: str, prompt_key: str) -> DataFile:
    path = os.path.expanduser(name)
    if "://" in name:
        return DataFile(split, name, remote=True)
    if not os.path.exists(path):
        return DataFile(split, name, problem=f"there is no {name}")
    if not path.endswith((".parquet", ".json", ".jsonl")) or not os.path.isfile(path):
        return DataFile(split, name, problem=f"verl reads files that end in .parquet, .json or .jsonl, not {name}")
    if not os.path.getsize(path):
        return DataFile(split, name, problem=f"{name} is empty")
    try:
        return DataFile(split, name, *(_read_parquet if path.endswith(".parquet") else _read_json)(path, prompt_key))
    except Exception as e:
        cause = e.__cause__ or e
        return DataFile(split, name, problem=f"{name} cannot be read: {type(cause).__name__}: {first_lines(cause)}")


def _read_parquet(path: str, prompt_key: str) -> tuple[Any, Any]:
    import datasets
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    columns = [c for c in (prompt_key, "reward_model", "data_source") if c in schema.names]
    return pq.read_table(path, columns=columns).to_pandas(), datasets.Features.from_arrow_schema(schema)


def _read_json(path: str, prompt_key: str) -> tuple[Any, Any]:
    """As verl does, but nothing stays in the user's cache."""
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


def _unlike(files: list[DataFile]) -> Iterator[Finding]:
    """verl joins the files of a split, so they need the same types in the same columns."""
    import datasets

    # One row each: datasets leaves empty ones out.
    first, *others = [datasets.Dataset.from_list([dict.fromkeys(f.features)], f.features) for f in files] or [None]
    for file, other in zip(files[1:], others, strict=True):
        try:
            datasets.concatenate_datasets([first, other])
        except ValueError as e:
            problem = f"data.{file.split}_files: {file.name} and {files[0].name} cannot be joined: {first_lines(e)}"
            yield Finding(f"{file.split} data", "", problem, "prepare them alike")
