"""The files of a run in ``trainer.default_local_dir``, and how to read them."""

import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import MarkedYAMLError

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
INPUTS_FILE = "inputs.json"
"""Digests of the run's data files."""
FINISHED_FILE = "finished"
"""Exists once the run has made all its steps and logged its last evaluation."""
LOG_FILE = "log.txt"
"""The job's output, if a sweep or the quickstart started it."""
CHECKPOINT_FILE = "latest_checkpointed_iteration.txt"
"""verl's tracker, written with the first checkpoint."""

HALF_A_LINE = ("is not JSON", "is not UTF-8: unexpected end of data")
"""Faults of a line that is cut off, possibly within a character."""


def read_json_lines(file: Path) -> Iterator[tuple[int, dict]]:
    """Yield the objects of a JSONL file with their line numbers; an unfinished last line is left out.

    Raises:
        ValueError: the file cannot be read, or a line is not a JSON object.
    """
    try:
        # As bytes: text mode and splitlines also split at other characters, which texts may contain.
        with open(file, "rb") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row, fault = json.loads(line.decode("utf-8-sig")), "is not a JSON object"
                except UnicodeDecodeError as e:
                    row, fault = None, f"is not UTF-8: {e.reason}"
                except (ValueError, RecursionError):
                    row, fault = None, "is not JSON"
                if isinstance(row, dict):
                    yield number, row
                elif line.startswith(b"{") and not line.endswith(b"\n") and fault in HALF_A_LINE:
                    return
                else:
                    raise ValueError(f"{file}, line {number}, {fault}")
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror}") from None


def read_metrics(run: Path) -> list[dict]:
    """Read a run's metrics: one row per step, in order; of a metric logged twice for a step, the last value.

    Raises:
        ValueError: the file is damaged; the message has file, line and fault.
    """
    file = run / METRICS_FILE
    rows: dict[int, dict] = {}
    for number, row in read_json_lines(file):
        step = row.get("step")
        # The bound: integers of a float64 column.
        if isinstance(step, bool) or not isinstance(step, int | float) or not (0 <= step < 2**53 and step == int(step)):
            found = f"step={reprlib.repr(step)}" if "step" in row else "no step"
            raise ValueError(f"{file}, line {number}, has {found}; it must be the whole number of the step")
        rows[int(step)] = rows.get(int(step), {}) | row
    return [rows[step] | {"step": step} for step in sorted(rows)]


def read_settings(run: Path) -> dict[str, Any]:
    """Read a run's settings by their full names.

    Raises:
        ValueError: the file cannot be read or holds no settings.
    """
    file = run / CONFIG_FILE
    try:
        config = OmegaConf.load(file)
        settings = flatten(config) if isinstance(config, DictConfig) else {}
    except OSError as e:
        raise ValueError(f"{file} cannot be read: {e.strerror or e}") from None
    except Exception as e:
        # YAML's constructors and OmegaConf's resolvers raise many kinds of exceptions.
        marked = isinstance(e, MarkedYAMLError) and e.problem_mark
        fault = f"line {e.problem_mark.line + 1}: {e.problem}" if marked else str(e)
        raise ValueError(f"{file} cannot be read as settings: {' '.join(fault.split())}") from None
    # An empty file gives {"": {}}, a single word {word: None}.
    if all(value in (None, {}) for value in settings.values()):
        raise ValueError(f"{file} holds no settings")
    return settings


def is_run(folder: Path) -> bool:
    """Tell whether a folder with a config file is a run's, and not one of Hydra, wandb or others with that file name.

    A file that cannot be read counts as a run's, so that its reader reports it.
    """
    try:
        if (folder / METRICS_FILE).exists():
            return True
        # Hydra's folder, whatever its name in hydra.output_subdir.
        if (folder / "overrides.yaml").exists():
            return False
        trainer = {name.split(".")[1] for name in read_settings(folder) if name.startswith("trainer.")}
    except (OSError, ValueError):
        return True
    # wandb stores each node below "value".
    return bool(trainer - {"value", "desc"})


def flatten(config: DictConfig) -> dict[str, Any]:
    """Map the full name of each setting to its value."""
    return full_names("", OmegaConf.to_container(config, resolve=True))


def full_names(name: str, value: Any) -> dict[str, Any]:
    """Map the path below ``name`` of each leaf of nested dictionaries to its value."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    below = {f"{name}.{key}" if name else str(key): part for key, part in value.items()}
    return {n: v for path, part in below.items() for n, v in full_names(path, part).items()}


def without_hydra(config: DictConfig) -> DictConfig:
    """Drop Hydra's own node, which has values that are unknown before the job runs."""
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that verl's tracker names, if there is one."""
    try:
        return folder / f"global_step_{int((folder / CHECKPOINT_FILE).read_text())}"
    except (OSError, ValueError):
        return None


def how_to_continue(folder: Path, resume_mode: str) -> str:
    """Say by which command a run goes on from its latest checkpoint; empty without one."""
    checkpoint = latest_checkpoint(folder)
    # Any other mode begins anew, or at the checkpoint that it names.
    more = "" if resume_mode == "auto" else " with trainer.resume_mode=auto"
    return f"the same command{more} continues from {checkpoint.name}" if checkpoint else ""


def is_finished(run: Path, config: DictConfig) -> bool:
    """Tell whether a run with these settings has finished in this folder.

    Raises:
        ValueError: the folder's settings are damaged.
    """
    if not ((run / FINISHED_FILE).exists() and (run / CONFIG_FILE).exists()):
        return False
    # As text: NaN is the same setting, though not the same number.
    before, now = (
        {name: repr(value) for name, value in found.items()} for found in (read_settings(run), flatten(config))
    )
    return before == now


def what_is_left(run: Path, config: DictConfig) -> str:
    """Say what a job that ended without an error did not do; empty if nothing, or without metrics (legacy trainer).

    Raises:
        ValueError: the metrics are damaged.
    """
    if not (run / METRICS_FILE).exists():
        return ""
    rows = read_metrics(run)
    evaluated = [row["step"] for row in rows if any(name.startswith("val-") for name in row)]
    last = rows[-1]["step"] if rows else 0
    trainer = config.trainer
    if trainer.get("val_only"):
        if not evaluated:
            return f"no evaluation is in {METRICS_FILE}"
        # A run that only evaluates has none of these metrics.
        if not any(name.startswith(("actor/", "training/", "timing_s/")) for row in rows for name in row):
            return ""
    total = trainer.get("total_training_steps")
    if total is not None and last < total:
        return f"step {last} of {total} is the last in {METRICS_FILE}"
    if trainer.get("test_freq", -1) > 0 and last not in evaluated:
        return f"the evaluation of step {last} is not in {METRICS_FILE}"
    return ""
