"""What a run leaves in ``trainer.default_local_dir``, and what can be told from it."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
FINISHED_FILE = "finished"
"""There as soon as the job has ended without an error."""
LOG_FILE = "log.txt"
"""What the job printed, where a sweep or the quickstart started it."""
CHECKPOINT_FILE = "latest_checkpointed_iteration.txt"
"""verl's, there as soon as there is a checkpoint."""


def read_json_lines(file: Path) -> list[dict]:
    """The objects of a JSONL file; a line that is still being written is left out."""
    rows = []
    # Not splitlines: texts may hold characters that it takes for the end of a line.
    for line in file.read_text().split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics file, in order of steps."""
    return sorted(read_json_lines(run / METRICS_FILE), key=lambda r: r["step"])


def flatten(config: DictConfig) -> dict[str, Any]:
    """Settings by their full names."""
    return full_names("", OmegaConf.to_container(config, resolve=True))


def full_names(name: str, value: Any) -> dict[str, Any]:
    """The leaves of nested dictionaries by their path below ``name``."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    below = {f"{name}.{key}" if name else str(key): part for key, part in value.items()}
    return {n: v for path, part in below.items() for n, v in full_names(path, part).items()}


def without_hydra(config: DictConfig) -> DictConfig:
    """The settings that the job itself sees: Hydra's own node has values that are not known before it runs."""
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def is_finished(run: Path, config: DictConfig) -> bool:
    """Whether a run with these settings has ended in this directory."""
    if not ((run / FINISHED_FILE).exists() and (run / CONFIG_FILE).exists()):
        return False
    return flatten(OmegaConf.load(run / CONFIG_FILE)) == flatten(config)
