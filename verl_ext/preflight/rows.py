"""Checks that the data files exist and that every row holds a prompt and a ground truth."""

import contextlib
import io
from collections.abc import Callable, Collection, Hashable, Iterator
from importlib import import_module
from typing import Any

from omegaconf import OmegaConf

from verl_ext.preflight.composition import Run
from verl_ext.preflight.data import Rows, is_empty, wrong_prompt
from verl_ext.preflight.findings import Finding, first_lines
from verl_ext.preflight.references import PASSED

OUR_GRADERS = {
    "pkg://verl_ext.tasks.math.reward": "ground_truths",
    "pkg://verl_ext.tasks.countdown.reward": "numbers_and_target",
}
"""Rewards of ours, and the function of each that reads a ground truth and refuses a wrong one."""


def _prepare(run: Run) -> str:
    task = next((name for name in ("gsm8k", "math") if name in run.config), "")
    if task:
        return f"make the files: python -m verl_ext.tasks.{task}.prepare --out DIR; the run takes {task}.folder=DIR"
    return "give files with the columns prompt (messages), reward_model.ground_truth and data_source, or a +task=NAME"


def check_data_files(run: Run) -> Iterator[Finding]:
    """Name the files that do not exist or that verl cannot read, without opening them."""
    own = run.config.data.custom_cls.get("path")
    fix = "make sure that data.custom_cls knows it" if own else _prepare(run)
    for split in ("train", "val"):
        setting, label = f"data.{split}_files", f"{split} data"
        files = [f for f in run.data.files if f.split == split]
        for file in dict.fromkeys(f for f in files if files.count(f) > 1):
            yield Finding(label, "", f"{setting}: {file.name} is named twice", "leave one out", warning=True)
        wrong = [f for f in dict.fromkeys(files) if f.problem and not run.is_elsewhere(f.name)]
        missing = [f.name for f in wrong if f.missing]
        # One by one where a task may build some of them.
        one_by_one = bool(OmegaConf.select(run.config, "verl_ext.prepare"))
        for names in [[name] for name in missing] if one_by_one else filter(None, [missing]):
            problem = f"{setting}: there is no {' and no '.join(names)}"
            yield Finding(label, "", problem, fix, warning=bool(own))
        for file in wrong:
            if not file.missing:
                yield Finding(label, file.name, f"{setting}: {file.problem}", fix, warning=bool(own))


def check_columns(run: Run) -> Iterator[Finding]:
    """Name the first column that a file lacks."""
    settings = run.config.data
    if settings.custom_cls.get("path"):
        return
    for file in dict.fromkeys(run.data.files):
        columns = run.data.columns.get(file.name)
        if columns is not None and (problem := missing_column(columns, settings.prompt_key)):
            problem = f"data.{file.split}_files: {file.name}{problem}"
            yield Finding(f"{file.split} data", "", problem, f"it has {', '.join(columns)}; {_prepare(run)}")


def missing_column(columns: Collection[str], prompt_key: str) -> str:
    """Say which column is missing, as text that follows the file's name; "" if none is."""
    missing = next((c for c in (prompt_key, "reward_model", "data_source") if c not in columns), "")
    return f" has no column {missing}" + (" (data.prompt_key)" if missing == prompt_key else "") if missing else ""


def check_default_reward(run: Run) -> Iterator[Finding]:
    """Name sets that verl has no reward function for, where the run gives none: all their rewards would fail."""
    from verl.utils.reward_score import get_default_compute_score

    reward, agent = run.config.reward, run.config.actor_rollout_ref.rollout.agent
    given = (reward.custom_reward_function or {}).get("path") or reward.reward_model.enable
    # An agent loop of the user's may bring the reward.
    own = agent.agent_loop_config_path or agent.default_agent_loop not in ("single_turn_agent", "tool_agent")
    if given or own or reward.reward_manager.source != "register" or run.config.data.custom_cls.get("path"):
        return
    grade = get_default_compute_score(reward.reward_manager.name)
    unknown: dict[str, list[str]] = {}
    for source in run.data.sources():
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                grade(source, "", "")
        except NotImplementedError:
            unknown.setdefault("verl has no reward function for data_source=", []).append(source)
        except ImportError as e:
            why = f"verl's reward function does not load ({first_lines(e)}) for data_source="
            unknown.setdefault(why, []).append(source)
        except Exception:
            continue  # An empty response is no text that it must take.
    for why, sources in unknown.items():
        shown = ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
        fix = f"set it to a file with compute_score({', '.join(PASSED)})"
        yield Finding("reward", "", f"{why}{shown}, and reward.custom_reward_function.path is null", fix)


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
    if missing := missing_column(frame.columns, prompt_key):
        yield missing
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
