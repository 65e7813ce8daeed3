"""Compute the tables of a report as data frames: pass@k, gain by difficulty, time."""

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
from verl_ext.report.read import Run
from verl_ext.runs.evaluations import BAND_NAMES, EVALUATION, QUESTIONS, WEIGHT, band_of

PHASES = ("old_log_prob", "ref", "values", "adv", "update_critic", "update_actor", "update_weights")


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (Student's t); NaN where there are too few values."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return float(values.sum()) if n else math.nan, math.nan
    return float(values.mean()), float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))


def percent(mean: float, half: float) -> str:
    """Write a share in percent, ``81.3 ± 2.1``; empty for NaN."""
    return "" if math.isnan(mean) else f"{100 * mean:.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def with_mean(by_benchmark: pd.DataFrame) -> pd.DataFrame:
    """Add the mean over benchmarks, the columns, if there are several."""
    return by_benchmark.assign(mean=by_benchmark.mean(axis=1)) if by_benchmark.shape[1] > 1 else by_benchmark


def over_seeds(values: pd.DataFrame) -> dict[str, str]:
    """Write each column's mean over rows, with its interval, as the cells of a table's row."""
    return {name: percent(*mean_and_interval(values[name].dropna())) for name in values}


def summarise(evaluations: pd.DataFrame, last: int, end: int) -> dict[str, pd.Series]:
    """Summarise pass@1 up to step ``end``, by benchmark and their mean: start, final, best, mean of ``last``."""
    table = with_mean(evaluations).loc[:end]
    found = {"start (step 0)": table.loc[0]} if 0 in table.index else {}
    found |= {f"final (step {end})": table.loc[end], "best": table.max()}
    return found | {f"mean of last {last}": table[-last:].mean()}


def pass_table(runs: list[Run], last: int) -> pd.DataFrame:
    """Tabulate pass@1 in percent with its interval over seeds: method and summary x benchmark.

    The runs of a method are compared up to the last step that all of them have.
    """
    rows = {}
    for method, group in by_method(runs).items():
        tables = {r.seed: r.pass_at_1 for r in group if len(r.pass_at_1)}
        common = set.intersection(*(set(t.index) for t in tables.values())) if tables else set()
        if not common:
            continue
        summaries = [summarise(table, last, max(common)) for table in tables.values()]
        for name in [n for n in summaries[0] if all(n in s for s in summaries)]:
            frame = pd.DataFrame([s[name] for s in summaries])
            rows[method, name] = {"seeds": len(summaries)} | over_seeds(frame)
    return named(rows, "pass@1")


def named(rows: dict[tuple[str, str], dict], what: str) -> pd.DataFrame:
    """Make a table of rows by method and summary, with ``what`` as the second heading."""
    table = pd.DataFrame(rows).T
    if len(table):
        table.index.names = ["method", what]
    return table


@cache
def pass_at_k(samples: int, right: int, k: int) -> float:
    """Estimate pass@k without bias: the chance that ``k`` of ``samples``, drawn without replacement, hold a right one.

    1 - C(n - c, k) / C(n, k), with n ``samples`` and c ``right``.
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def shares(answers: pd.DataFrame, k: int) -> pd.Series:
    """Compute pass@k of each question with at least ``k`` samples, indexed by benchmark."""
    enough = answers[(answers["samples"] >= k) & (answers["largest_k"] >= k)]
    counts = zip(enough["samples"], enough["right"], strict=True)
    return pd.Series([pass_at_k(n, int(c), k) for n, c in counts], index=enough["benchmark"], dtype=float)


def over_questions(values: pd.Series) -> dict[str, str]:
    """Write the same cells as :func:`over_seeds` for one run, with intervals over the questions of each benchmark."""
    found = {name: mean_and_interval(of) for name, of in values.groupby(level=0)}
    if len(found) > 1:
        means, halves = zip(*found.values(), strict=True)
        found["mean"] = (float(np.mean(means)), math.hypot(*halves) / len(halves))
    return {name: percent(*cell) for name, cell in found.items()}


def stored_in_common(runs: list[Run]) -> tuple[list[Run], list[int]]:
    """Pick a method's runs with stored responses, one per seed, and of the steps that all stored the 0th and last."""
    stored = list({r.seed: r for r in runs if r.dumps}.values())
    common = set.intersection(*(set(r.dumps) for r in stored)) if stored else set()
    steps = sorted(common & {0, max(common, default=0)})
    for run in stored:
        for step in steps:
            run.answers(step)
    # Reading drops the stored responses of a run that turns out to be damaged.
    return (stored, steps) if all(r.dumps for r in stored) else stored_in_common(runs)


def pass_k_table(runs: list[Run], k: int) -> pd.DataFrame:
    """Tabulate pass@k in percent from stored responses, first and last step: method and step x benchmark.

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
    """Return {k: table} for k = 2, 4, 8, ... up to the number of samples."""
    tables = ((2**i, pass_k_table(runs, 2**i)) for i in itertools.count(1))
    return dict(itertools.takewhile(lambda item: len(item[1]), tables))


def without_samples(runs: list[Run]) -> list[Run]:
    """Find runs that evaluated several responses per question and stored none."""
    return [r for r in runs if not r.dumps and any((m := EVALUATION.match(n)) and int(m["n"]) > 1 for n in r.metrics)]


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """Group runs by method, in their order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


@cache
def published() -> dict:
    """Read published results: source -> model -> method -> benchmark -> pass@1."""
    files = {r.source: resources.files(r.config) / r.published for r in recipes.installed() if r.published}
    return {source: OmegaConf.to_container(OmegaConf.load(str(file))) for source, file in files.items()}


def plain(name: str) -> str:
    """Reduce a benchmark's name to lower case, without separators and century."""
    return re.sub(r"20(2\d)", r"\1", re.sub(r"[-_ /]", "", name.lower()))


def published_tables(runs: list[Run]) -> dict[str, pd.DataFrame]:
    """Tabulate published pass@1 by source, for the models and benchmarks of the runs."""
    # An evaluation of a trained model names its base model.
    models = {Path(str(r.settings.get("base_model") or model_of(r))).name for r in runs}
    benchmarks = [b for r in runs for b in r.pass_at_1]
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
    """Tabulate the mean gain of pass@1 by band of difficulty, from stored responses: method x band.

    A question's difficulty is its pass rate at step 0 over all runs from the same model. Runs with different seeds drew
    different samples, so the more runs there are, the smaller is the regression to the mean.
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
    return table.reindex(columns=[b for b in BAND_NAMES if b in table])


def pass_rates(answers: pd.DataFrame) -> pd.Series:
    """Compute the pass rate by question, without those with graded scores."""
    sums = answers[answers["largest_k"] > 0].groupby("question")[["right", "samples"]].sum()
    return sums["right"] / sums["samples"]


def model_of(run: Run) -> str:
    return str(run.settings.get("actor_rollout_ref.model.path"))


def bands_logged(run: Run, names: tuple[str, ...]) -> pd.DataFrame:
    """Return a metric's columns by band of pass rates, under the bands' names; empty if it was not logged."""
    if not set(names) <= set(run.metrics):
        return pd.DataFrame(columns=list(BAND_NAMES))
    return run.metrics[list(names)].set_axis(list(BAND_NAMES), axis=1).dropna()


def weight_table(runs: list[Run]) -> pd.DataFrame:
    """Tabulate the bands' share of the training's weight, and of its questions, in each third of the steps, in percent.

    A cell is ``34 of 20``: 34 % of the weight on 20 % of the questions.
    """
    rows = {}
    for method, group in by_method(runs).items():
        logged = [(w, bands_logged(r, QUESTIONS)) for r in group if len(w := bands_logged(r, WEIGHT))]
        steps = sorted(set.intersection(*(set(w.index) for w, _ in logged))) if logged else []
        for part in np.array_split(steps, 3) if len(steps) >= 3 else [np.array(steps)]:
            if len(part):
                weight, questions = (
                    100 * np.mean([x.loc[part].mean() for x in xs], axis=0) for xs in zip(*logged, strict=True)
                )
                cells = (f"{w:.0f} of {q:.0f}" for w, q in zip(weight, questions, strict=True))
                rows[method, f"{part[0]} to {part[-1]}"] = dict(zip(BAND_NAMES, cells, strict=True))
    return named(rows, "steps")


def time_table(runs: list[Run], skip: int = 5) -> pd.DataFrame:
    """Tabulate median seconds per step, in all and by phase, without each run's first ``skip`` steps."""
    rows = {}
    for method, group in by_method(runs).items():
        frame = pd.concat([r.metrics.loc[r.column("timing_s/step").index[skip:]] for r in group])
        if not len(frame):
            continue
        median = frame.median(numeric_only=True)
        step = median["timing_s/step"]
        phases = {p: median[f"timing_s/{p}"] for p in PHASES if f"timing_s/{p}" in frame}
        # verl's own "gen" ends when the prompts are sent, before it waits for responses and rewards.
        phases["generation, rewards, other"] = max(step - sum(phases.values()), 0.0)
        update = phases.get("update_actor", 0.0) + phases.get("update_critic", 0.0)
        rows[method] = {"step": step, **phases, "update, % of step": 100 * update / step}
        if "perf/total_num_tokens" in frame:
            rows[method]["tokens/s"] = (frame["perf/total_num_tokens"] / frame["timing_s/step"]).median()
    return pd.DataFrame(rows).T
