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


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics file, in order of steps; a line that is still being written is left out."""
    rows = []
    for line in (run / METRICS_FILE).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return sorted(rows, key=lambda r: r["step"])


def flatten(config: DictConfig) -> dict[str, Any]:
    """Settings by their full names."""

    def walk(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {name: value}
        return {n: v for key, part in value.items() for n, v in walk(f"{name}.{key}" if name else key, part).items()}

    return walk("", OmegaConf.to_container(config, resolve=True))


def without_hydra(config: DictConfig) -> DictConfig:
    """The settings that the job itself sees: Hydra's own node has values that are not known before it runs."""
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def is_finished(run: Path, config: DictConfig) -> bool:
    """Whether a run with these settings has ended in this directory."""
    if not ((run / FINISHED_FILE).exists() and (run / CONFIG_FILE).exists()):
        return False
    return flatten(OmegaConf.load(run / CONFIG_FILE)) == flatten(config)
