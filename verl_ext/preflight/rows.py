"""Checks that the data files exist and that every row holds a prompt and a ground truth."""

import contextlib
import io
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from importlib import import_module
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.preflight.composition import Run
from verl_ext.preflight.data import Rows, is_empty, wrong_prompt
from verl_ext.preflight.findings import Finding, first_lines
from verl_ext.preflight.references import PASSED
from verl_ext.preflight.sizes import evaluates, trains

OUR_GRADERS = {
    "pkg://verl_ext.tasks.math.reward": "ground_truths",
    "pkg://verl_ext.tasks.countdown.reward": "numbers_and_target",
}
"""Rewards of ours, and the function of each that reads a ground truth and refuses a wrong one."""

NO_ROWS = " has no rows"


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
    """Name the first column that a file lacks, and a file without rows."""
    settings = run.config.data
    if settings.custom_cls.get("path"):
        return
    for file in dict.fromkeys(run.data.files):
        head = run.data.heads.get(file.name)
        if head is None:
            continue
        problem = missing_column(head.columns, needed_columns(run.config, file.split))
        fix = f"it has {', '.join(head.columns)}; {_prepare(run)}" if problem else _prepare(run)
        if problem := problem or NO_ROWS * (not head.rows):
            yield Finding(f"{file.split} data", "", f"data.{file.split}_files: {file.name}{problem}", fix)


def needed_columns(config: DictConfig, split: str) -> list[str]:
    """Return the columns that verl reads of a split: those of the reward only where its reward managers grade."""
    graded = is_graded(config, split) and not _brings_reward(config)
    return [config.data.prompt_key or "prompt", *(("reward_model", "data_source") if graded else ())]


def is_graded(config: DictConfig, split: str) -> bool:
    """Whether a run grades responses to a split's questions."""
    return trains(config) if split == "train" else evaluates(config)


def _brings_reward(config: DictConfig) -> bool:
    """Whether rewards may come from elsewhere than verl's reward managers, which read columns of the data."""
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER

    reward, agent = config.reward, config.actor_rollout_ref.rollout.agent
    manager = reward.reward_manager
    # A reward model alone reads prompt and response.
    alone = reward.reward_model.enable and not (reward.custom_reward_function or {}).get("path")
    own_loop = agent.agent_loop_config_path or agent.default_agent_loop not in ("single_turn_agent", "tool_agent")
    own_loop = own_loop or not str(agent.get("agent_loop_manager_class") or "verl_ext.").startswith("verl_ext.")
    return bool(alone or own_loop or manager.source != "register" or manager.get("name") not in REWARD_MANAGER)


def missing_column(columns: Collection[str], needed: Sequence[str]) -> str:
    """Say which column is missing, as text that follows the file's name; "" if none is.

    Args:
        columns: the file's.
        needed: that of the prompts first.
    """
    missing = next((c for c in needed if c not in columns), None)
    if missing is None:
        return ""
    return f" has no column {missing}" + (" (data.prompt_key)" if missing == needed[0] else "")


def check_default_reward(run: Run) -> Iterator[Finding]:
    """Name sets that verl has no reward function for, where the run gives none: all their rewards would fail."""
    from verl.utils.reward_score import get_default_compute_score

    config = run.config
    given = (config.reward.custom_reward_function or {}).get("path") or config.data.custom_cls.get("path")
    if given or _brings_reward(config):
        return
    grade = get_default_compute_score(config.reward.reward_manager.name)
    unknown: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    for source in dict.fromkeys(
        s for split in ("train", "val") if is_graded(config, split) for s in run.data.sources(split)
    ):
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                # No response: what is known fails on it before it does its work.
                grade(source, None, None)
        except NotImplementedError:
            unknown.setdefault("verl has no reward function for data_source=", []).append(source)
        except ImportError as e:
            # It may be on the nodes.
            why = f"verl's reward function does not load ({first_lines(e)}) for data_source="
            missing.setdefault(why, []).append(source)
        except Exception:
            continue
    fix = f"set it to a file with compute_score({', '.join(PASSED)})"
    for why, sources in (unknown | missing).items():
        shown = ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
        problem = f"{why}{shown}, and reward.custom_reward_function.path is null"
        yield Finding("reward", "", problem, fix, warning=why in missing)


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
            for problem in wrong_rows(rows.frame, needed_columns(run.config, file.split), accept):
                yield Finding(label, "", f"{name}: {file.name}{problem}", _prepare(run))
    for split in ("train", "val"):
        yield from _unlike(split, data.read(split))


def wrong_rows(frame: Any, needed: Sequence[str], accept: Callable[[Any], Any] | None = None) -> Iterator[str]:
    """Say what is wrong with the rows of a file, each kind once, as text that follows the file's name.

    Args:
        frame: the rows, as a pandas.DataFrame.
        needed: the columns that are read: that of the prompts, and perhaps reward_model and data_source.
        accept: raises ValueError for a truth that the reward function refuses.
    """
    if missing := missing_column(frame.columns, needed):
        yield missing
        return
    if not len(frame):
        yield NO_ROWS
    found: dict[str, list[int]] = {}
    for i, (prompt, *graded) in enumerate(zip(*(frame[name] for name in needed), strict=True)):
        wrong = [wrong_prompt(prompt, needed[0])]
        if graded:
            wrong += [wrong_truth(graded[0], accept), wrong_source(graded[1])]
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
