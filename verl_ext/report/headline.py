"""The report's first table: each method's final pass@1, and how far it is from a baseline."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from verl_ext.report.paired import paired_interval
from verl_ext.report.read import Run
from verl_ext.report.tables import by_method, mean_and_interval, percent, with_mean

BASELINES = ("grpo", "ppo")
"""Algorithms that others are compared with unless told otherwise, the first that is there."""


def evaluated(runs: list[Run]) -> dict[str, dict[str, Run]]:
    """Map each method to its runs with an evaluation, by seed."""
    methods = {method: {r.seed: r for r in group if len(r.pass_at_1)} for method, group in by_method(runs).items()}
    return {method: group for method, group in methods.items() if group}


def choose_baseline(runs: list[Run], wanted: str | None = None) -> str | None:
    """Choose the method that the others are compared with: ``wanted``, GRPO, PPO, or the first; None without any.

    Args:
        wanted: a method's name in the report, or an algorithm that only one method has.

    Raises:
        ValueError: no method with an evaluation, or several, are meant.
    """
    methods = evaluated(runs)
    of = {name: [m for m, g in methods.items() if next(iter(g.values())).algorithm == name] for name in BASELINES}
    if wanted is None:
        return next((m for name in BASELINES for m in of[name]), next(iter(methods), None))
    meant = [m for m, g in methods.items() if wanted in (m, next(iter(g.values())).algorithm)]
    if wanted in meant:
        return wanted
    if len(meant) != 1:
        raise ValueError(
            f"--baseline {wanted} means {len(meant)} of the evaluated methods; name one of {list(methods)}"
        )
    return meant[0]


def last_common_step(runs: Sequence[Run]) -> int | None:
    """Return the last step that all runs have evaluated."""
    return max(set.intersection(*(set(r.pass_at_1.index) for r in runs)), default=None)


def mean_pass_at_1(run: Run, step: int) -> float:
    """Return the mean over benchmarks, as the other tables do."""
    return float(with_mean(run.pass_at_1).loc[step].iloc[-1])


def pass_rates_by_question(run: Run, step: int) -> pd.Series | None:
    """Return pass rates by benchmark, question and occurrence of the same text; None unless they give what was logged.

    Stored responses may lack their benchmark, or be of another evaluation.
    """
    answers = run.answers(step)
    if not len(answers):
        return None
    answers = answers.assign(occurrence=answers.groupby(["benchmark", "question"]).cumcount())
    index = ["benchmark", "question", "occurrence"]
    rates = (answers["right"] / answers["samples"]).set_axis(pd.MultiIndex.from_frame(answers[index])).sort_index()
    stored = rates.groupby(level="benchmark").mean().mean()
    return rates if abs(stored - mean_pass_at_1(run, step)) < 1e-6 else None


def pairs_of(method: dict[str, Run], baseline: dict[str, Run]) -> list[tuple[Run, Run]]:
    """Pair runs by seed; if no seed is common, in order."""
    common = [seed for seed in method if seed in baseline]
    if common:
        return [(method[seed], baseline[seed]) for seed in common]
    return list(zip(method.values(), baseline.values(), strict=False))


def benchmarks_of(run: Run, step: int) -> set[str]:
    """Return the benchmarks that a run has evaluated at a step."""
    return set(run.pass_at_1.loc[step].dropna().index)


def difference(pairs: list[tuple[Run, Run]], step: int) -> tuple[float, float, int]:
    """Return the mean difference of pass@1, half the width of its interval, and the number of questions it is over.

    Without stored responses of the same questions for all runs, the interval is over seeds alone, and the number 0.
    """
    rates = [(pass_rates_by_question(a, step), pass_rates_by_question(b, step)) for a, b in pairs]
    first = rates[0][0]
    if first is not None and all(x is not None and x.index.equals(first.index) for pair in rates for x in pair):
        found = np.array([a.to_numpy() - b.to_numpy() for a, b in rates])
        return *paired_interval(found, first.index.get_level_values("benchmark").to_numpy()), len(first)
    logged = [mean_pass_at_1(a, step) - mean_pass_at_1(b, step) for a, b in pairs]
    return *mean_and_interval(logged), 0


def headline(runs: list[Run], baseline: str | None) -> pd.DataFrame:
    """Tabulate each method's final pass@1 and its difference to ``baseline``, best first, as shares.

    Columns: ``step`` and ``seeds`` of ``pass_at_1`` with ``half`` the width of its interval over seeds; ``difference``
    with ``low`` and ``high``, over ``pairs`` of runs and ``questions`` (0: seeds alone) at ``at_step``.
    """
    methods, rows = evaluated(runs), {}
    for method, group in methods.items():
        if (step := last_common_step(list(group.values()))) is None:
            continue
        mean, half = mean_and_interval([mean_pass_at_1(r, step) for r in group.values()])
        rows[method] = {"step": step, "seeds": len(group), "pass_at_1": mean, "half": half}
        if baseline is None or method == baseline:
            continue
        pairs = pairs_of(group, methods[baseline])
        both = [r for pair in pairs for r in pair]
        at_step = last_common_step(both)
        # Means over other benchmarks cannot be compared.
        if at_step is not None and all(benchmarks_of(r, at_step) == benchmarks_of(both[0], at_step) for r in both):
            points, half, questions = difference(pairs, at_step)
            rows[method] |= {"difference": points, "low": points - half, "high": points + half}
            rows[method] |= {"pairs": len(pairs), "questions": questions, "at_step": at_step}
    columns = ["step", "seeds", "pass_at_1", "half", "difference", "low", "high", "pairs", "questions", "at_step"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("method")
    return table.sort_values("pass_at_1", ascending=False, kind="stable")


def in_words(table: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """Write :func:`headline`'s table in percent and points."""
    rows = {}
    end = table["step"].get(baseline)
    for method, row in table.iterrows():
        cells = {"pass@1, %": percent(row["pass_at_1"], row["half"])}
        if len(table) > 1:
            cells[f"points to {baseline}"] = "baseline" if method == baseline else points(row, end)
            cells["over"] = "" if math.isnan(row["pairs"]) else over(row)
        rows[method] = cells | {"seeds": str(int(row["seeds"])), "step": str(int(row["step"]))}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def points(row: pd.Series, end: float | None) -> str:
    """Write a difference and its interval in percentage points: ``+1.2 (-0.4 to +2.8)``.

    Args:
        end: the step of the baseline's own pass@1; a difference at another step than both methods' says so.
    """
    found = [100 * row[name] for name in ("difference", "low", "high")]
    if math.isnan(found[0]):
        return "no common step or benchmarks"
    at = "" if row["at_step"] == row["step"] == end else f", at step {int(row['at_step'])}"
    return f"{found[0]:+.1f}" + ("" if math.isnan(found[1]) else f" ({found[1]:+.1f} to {found[2]:+.1f})") + at


def over(row: pd.Series) -> str:
    """Say what a difference's interval is over."""
    pairs, questions = int(row["pairs"]), int(row["questions"])
    seeds = f"{pairs} seed{'s' * (pairs > 1)}"
    return f"{seeds} x {questions} questions" if questions else seeds
