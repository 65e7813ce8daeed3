"""The tables of a report, as data frames: pass@k, gain by difficulty, time."""

import itertools
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from scipy import stats

from verl_ext.report.read import Run

BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Upper ends of the bands of difficulty; the first and the last of all shares stand alone: 0, (0, .25], ... 1."""

PHASES = ("old_log_prob", "ref", "values", "adv", "update_critic", "update_actor", "update_weights")


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t) over seeds; NaN for a single seed."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))


def percent(values: list[float]) -> str:
    """``81.3 ± 2.1`` in percent."""
    mean, half = mean_and_interval(values)
    return f"{100 * mean:.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def summarise(evaluations: pd.DataFrame, last: int, end: int) -> dict[str, pd.Series]:
    """A run's pass@k by benchmark up to step ``end``, in the ways that are usual; the mean over benchmarks beside."""
    table = evaluations.assign(mean=evaluations.mean(axis=1)) if evaluations.shape[1] > 1 else evaluations
    table = table.loc[:end]
    found = {"start (step 0)": table.loc[0]} if 0 in table.index else {}
    found |= {f"final (step {end})": table.loc[end], "best": table.max()}
    return found | {f"mean of last {last}": table[-last:].mean()}


def pass_table(runs: list[Run], k: int, last: int) -> pd.DataFrame:
    """Method and summary x benchmark, percent, with the interval over seeds; a method's runs up to the same step."""
    rows = {}
    for method, group in by_method(runs).items():
        tables = {r.seed: r.pass_at[k] for r in group if k in r.pass_at and len(r.pass_at[k])}
        common = set.intersection(*(set(t.index) for t in tables.values())) if tables else set()
        if not common:
            continue
        summaries = [summarise(table, last, max(common)) for table in tables.values()]
        for name in [n for n in summaries[0] if all(n in s for s in summaries)]:
            frame = pd.DataFrame([s[name] for s in summaries])
            rows[method, name] = {"seeds": len(summaries)} | {b: percent(list(frame[b].dropna())) for b in frame}
    table = pd.DataFrame(rows).T
    if len(table):
        table.index.names = ["method", "pass@" + str(k)]
    return table


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by method, in the order in which they come."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


@cache
def published() -> dict:
    """model -> method -> benchmark -> pass@1."""
    return OmegaConf.to_container(OmegaConf.load(Path(__file__).parent / "published.yaml"))


def plain(name: str) -> str:
    """A benchmark's name without case, separators and century."""
    return re.sub(r"20(2\d)", r"\1", re.sub(r"[-_ /]", "", name.lower()))


def published_table(runs: list[Run]) -> pd.DataFrame:
    """Published pass@1 for the runs' model, on the benchmarks that they evaluate; empty where nothing matches."""
    # An evaluation says what the model was trained from.
    models = {Path(str(r.settings.get("base_model") or model_of(r))).name for r in runs}
    benchmarks = [b for r in runs for b in r.pass_at.get(1, ())]
    rows = {}
    for model in models & set(published()):
        for method, values in published()[model].items():
            row = {b: f"{100 * values[p]:.1f}" for b in dict.fromkeys(benchmarks) for p in values if p in plain(b)}
            if row:
                rows[model, method] = row
    return pd.DataFrame(rows).T


def difficulty_table(runs: list[Run]) -> pd.DataFrame:
    """Mean gain of pass@1 by band of difficulty: a row a method, a column a band; empty without dumped evaluations.

    A question's difficulty is its share of right responses at step 0, over all runs that start from the same model.
    Runs with other seeds drew other samples, so the more runs, the less the lowest band gains by chance alone.
    """
    starts: dict[str, list[pd.DataFrame]] = {}
    for run in runs:
        starts.setdefault(model_of(run), []).append(run.answers(0))
    difficulty = {m: pd.concat(parts).groupby("question")["right"].mean() for m, parts in starts.items()}
    rows: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        steps = run.pass_at[1].index if 1 in run.pass_at else []
        before, after = difficulty[model_of(run)], run.answers(max(steps, default=0))
        if not len(before) or not len(after) or max(steps, default=0) == 0:
            continue
        after = after.groupby("question")["right"].mean()
        gain = (after - before.reindex(after.index)).dropna()
        for band, values in gain.groupby(before.reindex(gain.index).map(band_of)):
            rows.setdefault(run.method, {}).setdefault(band, []).append(values.mean())
    table = pd.DataFrame({m: {b: np.mean(gains) for b, gains in bands.items()} for m, bands in rows.items()}).T
    return table.reindex(columns=[b for b in band_names() if b in table])


def model_of(run: Run) -> str:
    return str(run.settings.get("actor_rollout_ref.model.path"))


def band_names() -> list[str]:
    between = [f"({low:g}, {high:g}{']' if high < 1 else ')'}" for low, high in itertools.pairwise(BANDS)]
    return ["0", *between, "1"]


def band_of(share: float) -> str:
    """0, (0, .25], (.25, .5], (.5, .75], (.75, 1), 1"""
    if share in (0.0, 1.0):
        return band_names()[0 if share == 0 else -1]
    return band_names()[1 + next(i for i, high in enumerate(BANDS[1:]) if share <= high)]


def time_table(runs: list[Run], skip: int = 5) -> pd.DataFrame:
    """Seconds a step (medians without the first steps) in all and by phase, tokens a second, share of the update."""
    rows = {}
    for method, group in by_method(runs).items():
        frame = pd.concat([r.metrics.loc[r.column("timing_s/step").index[skip:]] for r in group])
        if not len(frame):
            continue
        median = frame.median(numeric_only=True)
        step = median["timing_s/step"]
        phases = {p: median[f"timing_s/{p}"] for p in PHASES if f"timing_s/{p}" in frame}
        # verl's "gen" ends when the prompts are sent; it waits for responses and rewards in between.
        phases["generation, rewards, other"] = max(step - sum(phases.values()), 0.0)
        update = phases.get("update_actor", 0.0) + phases.get("update_critic", 0.0)
        rows[method] = {"step": step, **phases, "update, % of step": 100 * update / step}
        if "perf/total_num_tokens" in frame:
            rows[method]["tokens/s"] = (frame["perf/total_num_tokens"] / frame["timing_s/step"]).median()
    return pd.DataFrame(rows).T
