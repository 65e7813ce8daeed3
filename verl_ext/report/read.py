"""Reads runs for a report: settings, metrics, evaluations, and which of them are the same method."""

import functools
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from verl_ext.hydra_config import ALGORITHMS, DEFAULT_ALGORITHM
from verl_ext.runs import CONFIG_FILE, FINISHED_FILE, METRICS_FILE, flatten, full_names, read_json_lines, read_metrics

EVALUATION = re.compile(r"^val-core/(?P<benchmark>.+)/(?:acc|reward|score)/(?P<kind>mean|best)@(?P<n>\d+)(?:/mean)?$")
"""verl's names: ``mean@16`` is pass@1 over 16 samples, ``best@4/mean`` is pass@4."""

COPIES = ("disco_published_tau.", "actor_rollout_ref.actor.policy_loss.disco.", "verl_ext.", "critic.loss_")
"""Nodes that repeat a method's settings, or from which they are looked up, or that follow from it."""

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
        rows = [(r["input"], float(r.get("acc", r["score"]))) for r in read_json_lines(file)]
        return pd.DataFrame(rows, columns=["question", "right"])


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
def own_settings(algorithm: str) -> dict:
    """What the algorithm's YAML file sets, by full name, with those of the algorithms that it builds on."""
    file = ALGORITHMS / f"{algorithm}.yaml"
    if not file.exists():
        return {}
    node = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    bases = [b for b in node.pop("defaults", ()) if isinstance(b, str) and b != "_self_"]

    return {n: v for base in bases for n, v in own_settings(base).items()} | full_names("", node)


def is_the_methods_own(name: str, run: Run) -> bool:
    """Whether a setting has the value that the run's algorithm gives it."""
    own = own_settings(run.algorithm)
    if name not in own:
        return False
    # An interpolation follows from other settings, which are compared themselves.
    return "${" in str(own[name]) or run.settings.get(name) == own[name]


def values_of(name: str, settings: list[dict]) -> list:
    """The different values of a setting; 10 and 10.0 are one."""
    found = []
    for s in settings:
        if s.get(name) not in found:
            found.append(s.get(name))
    return found


def differences(settings: list[dict]) -> list[str]:
    """Names of settings that are not the same in all, but for those in which any two runs may differ."""
    names = sorted({n for s in settings for n in s if not NO_SETTING.search(n) and not n.startswith(COPIES)})
    return [n for n in names if len(values_of(n, settings)) > 1]


def read_runs(folders: list[Path]) -> list[Run]:
    """Runs with metrics, their methods named: ``disco (score=l_ratio)`` where there is also another disco."""
    runs = [run for folder in folders if (run := read_run(folder)) is not None]
    for run in runs:
        alike = [r.settings for r in runs if r.algorithm == run.algorithm]
        # Of what only some of them know, options were given; the rest is of another version.
        told = [n for n in differences(alike) if n.startswith("disco.options") or all(n in s for s in alike)]
        values = ", ".join(f"{n.rsplit('.', 1)[-1]}={run.settings.get(n, '(not set)')}" for n in told)
        run.method = f"{run.algorithm} ({values})" if values else run.algorithm
    return sorted(runs, key=lambda r: (r.method, str(r.seed)))


def other_differences(runs: list[Run]) -> dict[str, dict[str, str]]:
    """{setting: {method: value}} for what differs between runs beside the method; nothing for an equal comparison.

    A difference belongs to the methods where each run has the value that its own algorithm sets, and those whose
    algorithms do not set it have one value.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name in differences([r.settings for r in runs]):
        rest = [r for r in runs if not is_the_methods_own(name, r)]
        changed = [r for r in rest if name in own_settings(r.algorithm)]
        if not changed and len(values_of(name, [r.settings for r in rest])) <= 1:
            continue
        for run in runs:
            values = found.setdefault(name, {}).setdefault(run.method, [])
            if (value := str(run.settings.get(name, "(not set)"))) not in values:
                values.append(value)
    return {name: {m: " or ".join(v) for m, v in by_method.items()} for name, by_method in found.items()}


def repeated_seeds(runs: list[Run]) -> list[str]:
    """``disco, seed 1``: what stands in more than one run, which says nothing of the spread over seeds."""
    counts = Counter(f"{r.method}, seed {r.seed}" for r in runs)
    return sorted(name for name, count in counts.items() if count > 1)
