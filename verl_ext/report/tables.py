"""The tables of a report, as data frames: pass@k, gain by difficulty, time."""

import itertools
import math
import re
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from scipy import stats

from verl_ext import recipes
from verl_ext.report.read import EVALUATION, Run

BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Upper ends of the bands of difficulty; the first and the last of all shares stand alone: 0, (0, .25], ... 1."""

PHASES = ("old_log_prob", "ref", "values", "adv", "update_critic", "update_actor", "update_weights")


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t); NaN for a single value, and both without any."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return float(values.sum()) if n else math.nan, math.nan
    return float(values.mean()), float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))


def percent(mean: float, half: float) -> str:
    """``81.3 ± 2.1`` in percent; nothing for NaN."""
    return "" if math.isnan(mean) else f"{100 * mean:.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def with_mean(by_benchmark: pd.DataFrame) -> pd.DataFrame:
    """The columns, one per benchmark, with their mean beside them where there are several."""
    return by_benchmark.assign(mean=by_benchmark.mean(axis=1)) if by_benchmark.shape[1] > 1 else by_benchmark


def over_seeds(values: pd.DataFrame) -> dict[str, str]:
    """The cells of a table's row: of each column, the mean over rows with its interval."""
    return {name: percent(*mean_and_interval(values[name].dropna())) for name in values}


def summarise(evaluations: pd.DataFrame, last: int, end: int) -> dict[str, pd.Series]:
    """A run's pass@1 by benchmark up to step ``end``, in the ways that are usual; the mean over benchmarks beside."""
    table = with_mean(evaluations).loc[:end]
    found = {"start (step 0)": table.loc[0]} if 0 in table.index else {}
    found |= {f"final (step {end})": table.loc[end], "best": table.max()}
    return found | {f"mean of last {last}": table[-last:].mean()}


def pass_table(runs: list[Run], last: int) -> pd.DataFrame:
    """Method and summary x benchmark, pass@1 in percent, with its interval over seeds.

    The runs of a method are compared up to the last step that all of them have.
    """
    rows = {}
    for method, group in by_method(runs).items():
        tables = {r.seed: r.pass_at[1] for r in group if 1 in r.pass_at}
        common = set.intersection(*(set(t.index) for t in tables.values())) if tables else set()
        if not common:
            continue
        summaries = [summarise(table, last, max(common)) for table in tables.values()]
        for name in [n for n in summaries[0] if all(n in s for s in summaries)]:
            frame = pd.DataFrame([s[name] for s in summaries])
            rows[method, name] = {"seeds": len(summaries)} | over_seeds(frame)
    return named(rows, "pass@1")


def named(rows: dict[tuple[str, str], dict], what: str) -> pd.DataFrame:
    """Rows by method and summary as a table, its second heading ``what``."""
    table = pd.DataFrame(rows).T
    if len(table):
        table.index.names = ["method", what]
    return table


@cache
def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that ``k`` of a question's ``samples``, drawn without replacement, hold a right one.

    Its mean over evaluations is pass@k for any number of samples from ``k`` on: 1 - C(n - c, k) / C(n, k).
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def shares(answers: pd.DataFrame, k: int) -> pd.Series:
    """pass@k of each question that has ``k`` samples, indexed by benchmark."""
    enough = answers[(answers["samples"] >= k) & (answers["largest_k"] >= k)]
    counts = zip(enough["samples"], enough["right"], strict=True)
    return pd.Series([pass_at_k(n, int(c), k) for n, c in counts], index=enough["benchmark"], dtype=float)


def over_questions(values: pd.Series) -> dict[str, str]:
    """As :func:`over_seeds` for one run: the intervals are over the questions of each benchmark."""
    found = {name: mean_and_interval(of) for name, of in values.groupby(level=0)}
    if len(found) > 1:
        means, halves = zip(*found.values(), strict=True)
        found["mean"] = (float(np.mean(means)), math.hypot(*halves) / len(halves))
    return {name: percent(*cell) for name, cell in found.items()}


def stored_in_common(runs: list[Run]) -> tuple[list[Run], list[int]]:
    """Pick the runs of a method with stored responses, one per seed, and step 0 and the last step that all stored."""
    stored = list({r.seed: r for r in runs if r.dumps}.values())
    common = set.intersection(*(set(r.dumps) for r in stored)) if stored else set()
    steps = sorted(common & {0, max(common, default=0)})
    for run in stored:
        for step in steps:
            run.answers(step)
    # A run found damaged while it is read has no stored responses any more.
    return (stored, steps) if all(r.dumps for r in stored) else stored_in_common(runs)


def pass_k_table(runs: list[Run], k: int) -> pd.DataFrame:
    """Method and step x benchmark, pass@k in percent from stored responses, at the start and the end.

    Its interval is over seeds, or over questions for a single run.
    """
    rows = {}
    for method, group in by_method(runs).items():
        stored, steps = stored_in_common(group)
        for step in steps:
            found = [values for r in stored if len(values := shares(r.answers(step), k))]
            if not found:
                continue
            means = with_mean(pd.DataFrame([values.groupby(level=0).mean() for values in found]))
            cells = over_seeds(means) if len(found) > 1 else over_questions(found[0])
            rows[method, f"{'final' if step else 'start'} (step {step})"] = {"seeds": len(found)} | cells
    return named(rows, f"pass@{k}")


def pass_k_tables(runs: list[Run]) -> dict[int, pd.DataFrame]:
    """{k: its table} for k = 2, 4, 8 ... as far as there are samples."""
    tables = ((2**i, pass_k_table(runs, 2**i)) for i in itertools.count(1))
    return dict(itertools.takewhile(lambda item: len(item[1]), tables))


def without_samples(runs: list[Run]) -> list[Run]:
    """Runs that drew several responses per question in an evaluation, of which none are stored."""
    several = [any((m := EVALUATION.match(name)) and int(m["n"]) > 1 for name in r.metrics) for r in runs]
    return [r for r, drew in zip(runs, several, strict=True) if drew and not r.dumps]


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by method, in the order in which they come."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


@cache
def published() -> dict:
    """Published results: source -> model -> method -> benchmark -> pass@1."""
    told = {r.source: resources.files(r.config) / r.published for r in recipes.installed() if r.published}
    return {source: OmegaConf.to_container(OmegaConf.load(str(file))) for source, file in told.items()}


def plain(name: str) -> str:
    """A benchmark's name without case, separators and century."""
    return re.sub(r"20(2\d)", r"\1", re.sub(r"[-_ /]", "", name.lower()))


def published_tables(runs: list[Run]) -> dict[str, pd.DataFrame]:
    """Published pass@1 by source, for the runs' model and the benchmarks that they evaluate, where any matches."""
    # An evaluation says what the model was trained from.
    models = {Path(str(r.settings.get("base_model") or model_of(r))).name for r in runs}
    benchmarks = [b for r in runs for b in r.pass_at.get(1, ())]
    tables = {}
    for source, results in published().items():
        rows = {}
        for model in models & set(results):
            for method, values in results[model].items():
                row = {b: f"{100 * values[p]:.1f}" for b in dict.fromkeys(benchmarks) for p in values if p in plain(b)}
                if row:
                    rows[model, method] = row
        if rows:
            tables[source] = pd.DataFrame(rows).T
    return tables


def difficulty_table(runs: list[Run]) -> pd.DataFrame:
    """Mean gain of pass@1 by band of difficulty, from stored responses: one row per method, one column per band.

    A question's difficulty is its pass rate at step 0, over all runs that start from the same model. Runs with other
    seeds drew other samples, so the more runs, the less the lowest band gains by chance alone.
    """
    starts: dict[str, list[pd.DataFrame]] = {}
    for run in runs:
        starts.setdefault(model_of(run), []).append(run.answers(0))
    difficulty = {m: pass_rates(pd.concat(parts)) for m, parts in starts.items()}
    rows: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        end = max(run.dumps, default=0)
        before, after = difficulty[model_of(run)], pass_rates(run.answers(end))
        if not len(before) or not len(after) or end == 0:
            continue
        gain = (after - before.reindex(after.index)).dropna()
        for band, values in gain.groupby(before.reindex(gain.index).map(band_of)):
            rows.setdefault(run.method, {}).setdefault(band, []).append(values.mean())
    table = pd.DataFrame({m: {b: np.mean(gains) for b, gains in bands.items()} for m, bands in rows.items()}).T
    return table.reindex(columns=[b for b in band_names() if b in table])


def pass_rates(answers: pd.DataFrame) -> pd.Series:
    """Pass rate by question, but for those with graded scores."""
    sums = answers[answers["largest_k"] > 0].groupby("question")[["right", "samples"]].sum()
    return sums["right"] / sums["samples"]


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
    """Seconds per step (medians without the first steps) in all and by phase, tokens/s, share of the update."""
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
