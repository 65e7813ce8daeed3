"""Reads runs for a report: settings, metrics, evaluations, and which of them are the same method."""

import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from verl_ext.hydra_config import ALGORITHMS, DEFAULT_ALGORITHM
from verl_ext.runs import CONFIG_FILE, FINISHED_FILE, METRICS_FILE, flatten, read_metrics

EVALUATION = re.compile(r"^val-core/(?P<benchmark>.+)/(?:acc|reward|score)/(?P<kind>mean|best)@(?P<n>\d+)(?:/mean)?$")
"""verl's names: ``mean@16`` is pass@1 over 16 samples, ``best@4/mean`` is pass@4."""

COPIES = ("disco_published_tau.", "actor_rollout_ref.actor.policy_loss.")
"""Nodes that repeat a method's settings, or from which they are looked up."""

NO_SETTING = re.compile(r"(^|[._])(seed|.*_dir|.*_name|logger|prepare|validator|save_freq|max_.*_ckpt_to_keep)$")
"""Settings in which any two runs may differ."""


@dataclass
class Run:
    """One run.

    Args:
        folder: its ``trainer.default_local_dir``.
        settings: by full name.
        metrics: a row a logged step, indexed by step; a column a metric.
        method: the algorithm, and what else is set otherwise in its other runs.
    """

    folder: Path
    settings: dict
    metrics: pd.DataFrame
    method: str = ""
    pass_at: dict[int, pd.DataFrame] = field(default_factory=dict)

    @property
    def algorithm(self) -> str:
        return self.settings.get("verl_ext.algorithm", DEFAULT_ALGORITHM)

    @property
    def seed(self):
        return self.settings.get("seed", self.settings.get("data.seed"))

    @property
    def state(self) -> str:
        """``finished`` or ``step 40 of 100``."""
        if (self.folder / FINISHED_FILE).exists():
            return "finished"
        total = self.settings.get("trainer.total_training_steps")
        return f"step {self.metrics.index.max()}" + (f" of {total}" if total else "")

    def column(self, *names: str) -> pd.Series:
        """The first of the metrics ``names`` that was logged, without gaps; empty if none was."""
        for name in names:
            if name in self.metrics:
                return self.metrics[name].dropna().astype(float)
        return pd.Series(dtype=float)

    def answers(self, step: int) -> pd.DataFrame:
        """Evaluated responses of a step: columns ``question`` and ``right`` (0 to 1); empty where none were dumped."""
        folder = self.settings.get("trainer.validation_data_dir")
        file = self.folder / "validation" / f"{step}.jsonl"
        if folder and not file.exists():
            file = Path(folder) / f"{step}.jsonl"
        if not file.exists():
            return pd.DataFrame(columns=["question", "right"])
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return pd.DataFrame({"question": r["input"], "right": float(r.get("acc", r["score"]))} for r in rows)


def read_run(folder: Path) -> Run | None:
    """A run, or None where there are no metrics yet.

    Raises:
        ValueError: ``folder`` is no directory of a run.
    """
    if not (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} is no run: it has no {CONFIG_FILE}; give trainer.default_local_dir of runs")
    rows = read_metrics(folder) if (folder / METRICS_FILE).exists() else []
    if not rows:
        return None
    metrics = pd.DataFrame(rows).set_index("step")
    return Run(folder, flatten(OmegaConf.load(folder / CONFIG_FILE)), metrics, pass_at=evaluations(metrics))


def evaluations(metrics: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """{k: pass@k by step and benchmark}; k = 1 is the mean over all samples of a question."""
    found: dict[int, dict[str, pd.Series]] = {}
    for name in metrics:
        if match := EVALUATION.match(name):
            k = 1 if match["kind"] == "mean" else int(match["n"])
            found.setdefault(k, {})[match["benchmark"]] = metrics[name].dropna().astype(float)
    return {k: pd.DataFrame(columns).sort_index() for k, columns in sorted(found.items())}


@functools.cache
def method_settings() -> frozenset[str]:
    """Full names of what the algorithms' YAML files set: where they belong to the method, not to the experiment."""
    names = {name for file in ALGORITHMS.glob("*.yaml") for name in flatten_raw(file)}
    return frozenset(n for n in names if not n.startswith("defaults"))


def flatten_raw(file: Path) -> list[str]:
    """Full names of a YAML file's settings, interpolations untouched."""

    def walk(prefix: str, node) -> list[str]:
        if not isinstance(node, dict):
            return [prefix]
        return [n for key, value in node.items() for n in walk(f"{prefix}.{key}" if prefix else str(key), value)]

    return walk("", OmegaConf.to_container(OmegaConf.load(file), resolve=False))


def belongs_to_method(name: str) -> bool:
    """Whether a setting is part of what a method is."""
    nodes = ("disco.", *COPIES, "verl_ext.", "reward.reward_kwargs.")
    # The critic's follow the actor's.
    return name.startswith(nodes) or name.replace("critic.loss_", "actor_rollout_ref.actor.loss_") in method_settings()


def differences(settings: list[dict]) -> list[str]:
    """Names of settings that are not the same in all, but for those in which any two runs may differ."""
    names = sorted({n for s in settings for n in s})
    return [n for n in names if not NO_SETTING.search(n) and len({repr(s.get(n)) for s in settings}) > 1]


def read_runs(folders: list[Path]) -> list[Run]:
    """Runs with metrics, their methods named: ``disco (score=l_ratio)`` where there is also another disco."""
    runs = [run for folder in folders if (run := read_run(folder)) is not None]
    for run in runs:
        alike = [r.settings for r in runs if r.algorithm == run.algorithm]
        # What only some of them know is of another version, not of another method.
        told = [n for n in differences(alike) if not n.startswith(COPIES) and all(n in s for s in alike)]
        values = ", ".join(f"{n.rsplit('.', 1)[-1]}={run.settings[n]}" for n in told)
        run.method = f"{run.algorithm} ({values})" if values else run.algorithm
    return sorted(runs, key=lambda r: (r.method, str(r.seed)))


def other_differences(runs: list[Run]) -> dict[str, dict[str, str]]:
    """{setting: {method: value}} for what differs between runs beside the method; nothing for an equal comparison."""
    names = [n for n in differences([r.settings for r in runs]) if not belongs_to_method(n)]
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for run in runs:
            values = found.setdefault(name, {}).setdefault(run.method, [])
            if (value := str(run.settings.get(name, "(not set)"))) not in values:
                values.append(value)
    return {name: {m: " or ".join(v) for m, v in by_method.items()} for name, by_method in found.items()}
