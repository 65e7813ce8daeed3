"""Checks that the data files exist and that every row holds a prompt and a ground truth."""

from collections.abc import Callable, Hashable, Iterator
from importlib import import_module
from typing import Any

from verl_ext.preflight.composition import Run
from verl_ext.preflight.data import Rows, is_empty, wrong_prompt
from verl_ext.preflight.findings import Finding, first_lines

OUR_GRADERS = {
    "pkg://verl_ext.tasks.math.reward": "ground_truths",
    "pkg://verl_ext.tasks.countdown.reward": "numbers_and_target",
}
"""Rewards of ours, and the function of each that reads a ground truth and refuses a wrong one."""


def _prepare(run: Run) -> str:
    task = "gsm8k" if "gsm8k" in run.config else "math"
    return f"give existing files, such as python -m verl_ext.tasks.{task}.prepare --out DIR makes for {task}.folder=DIR"


def check_data_files(run: Run) -> Iterator[Finding]:
    """Name the files that do not exist or that verl cannot read, without opening them."""
    own = run.config.data.custom_cls.get("path")
    seen = set()
    for file in run.data.files:
        name, label = f"data.{file.split}_files", f"{file.split} data"
        if (file.split, file.name) in seen:
            yield Finding(label, "", f"{name}: {file.name} is named twice", "leave one out", warning=True)
        elif file.problem and not run.is_elsewhere(file.name):
            fix = "make sure that data.custom_cls knows it" if own else _prepare(run)
            yield Finding(label, file.name, f"{name}: {file.problem}", fix, warning=bool(own))
        seen.add((file.split, file.name))


def check_rows(run: Run) -> Iterator[Finding]:
    """Name the rows that verl cannot train on."""
    settings, data = run.config.data, run.data
    grader = str((run.config.reward.custom_reward_function or {}).get("path"))
    accept = (
        getattr(import_module(grader.removeprefix("pkg://")), reader) if (reader := OUR_GRADERS.get(grader)) else None
    )
    for file in dict.fromkeys(data.files):
        name, label = f"data.{file.split}_files", f"{file.split} data"
        if file.is_remote:
            yield Finding(label, file.name, f"{file.name} is remote and was not opened", warning=True)
        elif (rows := data.rows.get(file.name)) is None:
            continue
        elif rows.problem:
            yield Finding(label, file.name, f"{name}: {rows.problem}", _prepare(run))
        else:
            sources = "data_source" in rows.frame and sorted(set(map(str, rows.frame["data_source"])))
            yield Finding(label, f"{file.name}: {len(rows.frame)} rows, {', '.join(sources or '?')}")
            if settings.custom_cls.get("path"):
                problem = f"{file.name} is read by data.custom_cls, so its rows were not checked"
                yield Finding(label, "", problem, warning=True)
                continue
            for problem in wrong_rows(rows.frame, settings.prompt_key, accept):
                yield Finding(label, "", f"{name}: {file.name}{problem}", _prepare(run))
    for split in ("train", "val"):
        yield from _unlike(split, data.read(split))


def wrong_rows(frame: Any, prompt_key: str, accept: Callable[[Any], Any] | None = None) -> Iterator[str]:
    """Say what is wrong with the rows of a file, each kind once, as text that follows the file's name.

    Args:
        frame: the rows, as a pandas.DataFrame.
        prompt_key: the column of the prompts.
        accept: raises ValueError for a truth that the reward function refuses.
    """
    if missing := [c for c in (prompt_key, "reward_model", "data_source") if c not in frame]:
        yield f" has no column {missing[0]}"
        return
    if not len(frame):
        yield " has no rows"
    found: dict[str, list[int]] = {}
    columns = (frame[name] for name in (prompt_key, "reward_model", "data_source"))
    for i, (prompt, reward_model, source) in enumerate(zip(*columns, strict=True)):
        wrong = (wrong_prompt(prompt, prompt_key), wrong_truth(reward_model, accept), wrong_source(source))
        for problem in filter(None, wrong):
            found.setdefault(problem, []).append(i)
    for problem, rows in found.items():
        others = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
        yield f": row {rows[0]}{problem}{others}"


def wrong_truth(reward_model: Any, accept: Callable[[Any], Any] | None = None) -> str:
    """Say why ``reward_model`` holds no ground truth; "" if it does."""
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


def wrong_source(source: Any) -> str:
    """Say why ``data_source`` names no benchmark, by which verl sorts its metrics; "" if it does."""
    return "" if isinstance(source, Hashable) else f": data_source is {type(source).__name__}, not a text"


def _unlike(split: str, read: dict[str, Rows]) -> Iterator[Finding]:
    """Name files whose columns differ in type from the first's, since verl joins the files of a split."""
    import datasets

    # One row each, because datasets ignores empty files.
    one = {name: datasets.Dataset.from_list([dict.fromkeys(r.features)], r.features) for name, r in read.items()}
    first = next(iter(one), "")
    for name, rows in one.items():
        try:
            datasets.concatenate_datasets([one[first], rows])
        except Exception as e:
            # Of a record beside a plain value datasets says only what it failed at.
            why = first_lines(e) if isinstance(e, ValueError) else "a column is a record in one of them alone"
            problem = f"data.{split}_files: {name} and {first} cannot be joined: {why}"
            yield Finding(f"{split} data", "", problem, "prepare them alike")
