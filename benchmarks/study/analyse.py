"""Make the study's tables and pictures from docs/study/data alone: docs/study/report.

    python benchmarks/study/analyse.py [--data docs/study/data] [--out docs/study/report] [--record]

With ``--record`` the figures that other documents quote go to benchmarks/results/study.json.

docs/study/protocol.md says what is computed and how it is judged. The parts are those of ``verl_ext.report``: reading,
pass@k, paired intervals, tables, curves.
"""

import argparse
import json
import math
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
import pandas as pd
from picture import draw_methods
from record import Figure, record
from run import LR, STANDARD
from scipy import stats

from verl_ext.report.__main__ import Tables, find_runs
from verl_ext.report.paired import paired_interval
from verl_ext.report.plots import CURVES, STYLE, curve_of, draw_curves, draw_weights
from verl_ext.report.read import Run, differences, read_runs, repeated_seeds
from verl_ext.report.tables import by_method, mean_and_interval, named, pass_at_k, percent, weight_table
from verl_ext.runs.evaluations import BAND_NAMES, band_of
from verl_ext.runs.folder import METRICS_FILE, read_json_lines

FAILED_FILE = "failed"
"""In a run that ended with an error (``collect.py``)."""

BUDGETS = {"arithmetic": 85_000, "countdown": 450_000}
"""Generated tokens at which methods are compared."""

COMPARED = ("main", "wide")
"""Stages in which a method has one run per seed."""

BASELINE = "grpo"
HYPOTHESES = (("disco", "grpo"), ("disco", "dapo_static"))
"""What is tested, in each task: the first is better than the second."""
CONFIDENCE = 1 - 0.05 / (len(HYPOTHESES) * len(BUDGETS))
"""Of the tested differences' intervals: 5 % for the family (Bonferroni)."""
MARGIN = 0.02
"""A difference below it is of no practical size."""
KS = (1, 8)
HARD = 0.1
"""Pass rate at the start below which a question is hard."""

PAPER = {"grpo": 0.457, "grpo_er": 0.460, "dr_grpo": 0.443, "dapo_static": 0.473, "trpa": 0.470}
PAPER |= {"disco_l_ratio": 0.524, "disco": 0.533}
"""Average pass@1 at 1.5B in arXiv 2505.12366."""

FACTORS = (0.3, 1.0, 3.0, 10.0)
"""Learning rates that tell of stability, in units of the best; those at the first are as long as tuning's."""

SHOWN = ("grpo", "dapo", "dapo_static", "disco", "disco_l_ratio", "disco_b")
"""Methods in pictures."""


# Reading ------------------------------------------------------------------------------------------------------------


def unpack(data: Path, place: Path) -> None:
    """Unpack ``TASK-STAGE.tar.xz`` to ``place/TASK/STAGE``, and give each run the measured start as its step 0."""
    for file in sorted(data.glob("*.tar.xz")):
        task, stage = file.name.removesuffix(".tar.xz").split("-", 1)
        with tarfile.open(file) as tar:
            tar.extractall(place / task / stage, filter="data")
    for task in place.iterdir():
        for stage in (f for f in task.iterdir() if not f.name.startswith("start-")):
            name = "tuning" if stage.name == "tune" else "judging"
            file = task / f"start-{name}" / f"{name}.jsonl"
            lines = pd.DataFrame(line for _, line in read_json_lines(file))
            passed = {f"val-core/{b}/acc/mean@1": float(own.mean()) for b, own in lines.groupby("data_source")["acc"]}
            for run in find_runs([stage])[0]:
                (run / "validation").mkdir(exist_ok=True)
                shutil.copy(file, run / "validation/0.jsonl")
                rows = run / METRICS_FILE
                text = rows.read_text() if rows.exists() else ""
                rows.write_text(json.dumps({"step": 0} | passed) + "\n" + text)


def load(stage: Path) -> list[Run]:
    """Read a stage's runs; none if there are none.

    Raises:
        ValueError: a run is damaged, or two are the same, or in a stage that compares methods, runs of one method
            differ by more than their seed.
    """
    runs, damaged = read_runs(find_runs([stage])[0] if stage.is_dir() else [])
    if damaged:
        raise ValueError("; ".join(damaged.values()))
    if repeated := repeated_seeds(runs):
        raise ValueError(f"{stage.name}: several runs of {'; '.join(repeated)}")
    if stage.name in COMPARED and (odd := sorted({r.method for r in runs if r.method != r.algorithm})):
        raise ValueError(f"{stage.name}: runs of one method have other settings: {'; '.join(odd)}")
    return runs


def has_failed(run: Run) -> bool:
    return (run.folder / FAILED_FILE).exists()


# One run ------------------------------------------------------------------------------------------------------------


def generated(run: Run) -> pd.Series:
    """Count the response tokens that a run has generated up to each step.

    A row stands for the steps since the one before, as later rows of long runs are thinned. Tokens of questions that
    dynamic sampling replaced or had left over are taken to be as many as the others'.
    """
    questions = run.settings["data.train_batch_size"]
    rows = questions * run.settings["actor_rollout_ref.rollout.n"]
    length = run.column("response_length/mean")
    extra = pd.Series(0.0, length.index)
    for name in run.metrics.columns[
        run.metrics.columns.str.contains(r"filter_groups/(?:evicted|discarded)", regex=True)
    ]:
        extra += run.metrics[name].reindex(length.index).fillna(0.0)
    steps = np.diff(length.index, prepend=0)
    tokens = (length * steps * rows * (1 + extra / questions)).cumsum()
    return pd.concat([pd.Series({0: 0.0}), tokens])


def by_question(run: Run, step: int, k: int) -> pd.Series:
    """Compute pass@k of each question at an evaluated step, by benchmark and question.

    Raises:
        ValueError: the responses are damaged.
    """
    if not len(found := run.answers(step)):
        raise ValueError(f"{run.folder.name}, step {step}: {'; '.join(run.faults)}")
    answers = found.set_index(["benchmark", "question"]).sort_index()
    values = [pass_at_k(n, int(c), k) for n, c in zip(answers["samples"], answers["right"], strict=True)]
    return pd.Series(values, answers.index, dtype=float)


def at_budget(run: Run, budget: float, k: int) -> pd.Series:
    """Compute pass@k of each question after ``budget`` generated tokens, between evaluations on a straight line.

    A run that ends before keeps its last evaluation; one that failed before has 0.

    Raises:
        ValueError: the two evaluations are of different questions.
    """
    steps, tokens = sorted(run.dumps), generated(run)
    places = [float(tokens[tokens.index <= step].iloc[-1]) for step in steps]
    if has_failed(run) and budget > places[-1]:
        return 0.0 * by_question(run, steps[-1], k)
    after = next((i for i, place in enumerate(places) if place >= budget), len(places) - 1)
    before = max(after - 1, 0)
    gap = places[after] - places[before]
    share = min((budget - places[before]) / gap, 1.0) if gap else 1.0
    first, second = (by_question(run, steps[i], k) for i in (before, after))
    if not first.index.equals(second.index):
        raise ValueError(f"{run.folder.name}: steps {steps[before]} and {steps[after]} are of different questions")
    return (1 - share) * first + share * second


# Learning -----------------------------------------------------------------------------------------------------------


def matrices(runs: Iterable[Run], budget: float, k: int) -> dict[str, pd.DataFrame]:
    """Map each method to pass@k by seed (rows) and question (columns)."""
    found: dict[str, dict[str, pd.Series]] = {}
    for run in runs:
        found.setdefault(run.method, {})[run.seed] = at_budget(run, budget, k)
    return {method: pd.DataFrame(own).T.sort_index() for method, own in found.items()}


def compare(
    ours: pd.DataFrame, theirs: pd.DataFrame, confidence: float = 0.95, only: Collection | None = None
) -> tuple[float, float, float, int]:
    """Compare two methods' matrices on common seeds: difference, its interval's bounds, and the number of seeds.

    Args:
        only: questions to compare on; all by default.
    """
    seeds = ours.index.intersection(theirs.index)
    if not len(seeds):
        return math.nan, math.nan, math.nan, 0
    if not ours.columns.equals(theirs.columns):
        raise ValueError("the two methods answered different questions")
    columns = ours.columns if only is None else ours.columns[ours.columns.isin(only)]
    apart = ours.loc[seeds, columns].to_numpy() - theirs.loc[seeds, columns].to_numpy()
    mean, half = paired_interval(apart, columns.get_level_values("benchmark").to_numpy(), confidence)
    return mean, mean - half, mean + half, len(seeds)


def verdict(low: float, high: float, seeds: int) -> str:
    """Say what an interval of a difference says; that of one seed, over questions alone, says nothing of others."""
    if seeds < 2 or math.isnan(low):
        return "too few runs"
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "no difference of practical size" if -MARGIN < low and high < MARGIN else "undecided"


def points(mean: float, low: float, high: float) -> str:
    """Write a difference in percentage points."""
    if math.isnan(mean):
        return ""
    return f"{100 * mean:+.1f}" + ("" if math.isnan(low) else f" ({100 * low:+.1f} to {100 * high:+.1f})")


def of_questions(passed: pd.Series) -> float:
    """Average pass@k of questions over the benchmarks' means."""
    return float(passed.groupby(level="benchmark").mean().mean())


def of_seeds(matrix: pd.DataFrame) -> pd.Series:
    """Average each seed's pass@k over the benchmarks' means."""
    return matrix.T.groupby(level="benchmark").mean().mean()


def learning_table(runs: list[Run], budget: float) -> pd.DataFrame:
    """Tabulate pass@1 and pass@8 after the budget, and their differences to the baseline, best first."""
    rows: dict[str, dict[str, object]] = {}
    for k in KS:
        found = matrices(runs, budget, k)
        for method, matrix in found.items():
            row = rows.setdefault(method, {"seeds": str(len(matrix))})
            row[f"pass@{k}, %"] = percent(*mean_and_interval(of_seeds(matrix).tolist()))
            if BASELINE in found:
                same = method == BASELINE
                row[f"points to {BASELINE}, pass@{k}"] = (
                    "baseline" if same else points(*compare(matrix, found[BASELINE])[:3])
                )
            row.setdefault("order", -float(of_seeds(matrix).mean()))
    for method, own in by_method(runs).items():
        rows[method]["tokens of a run"] = f"{np.mean([generated(r).iloc[-1] for r in own]):,.0f}"
        rows[method]["failed"] = str(sum(map(has_failed, own)))
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    return table.sort_values("order", kind="stable").drop(columns="order")


def hypotheses_table(tasks: Mapping[str, list[Run]]) -> pd.DataFrame:
    """Tabulate the tested differences of pass@1 with the family's intervals, and what they say."""
    rows = {}
    for task, runs in tasks.items():
        found = matrices(runs, BUDGETS[task], 1)
        for ours, theirs in HYPOTHESES:
            if ours in found and theirs in found:
                *interval, seeds = compare(found[ours], found[theirs], CONFIDENCE)
                said = {"points of pass@1": points(*interval), "seeds": str(seeds)}
                rows[task, f"{ours} - {theirs}"] = said | {"verdict": verdict(*interval[1:], seeds)}
    return pd.DataFrame(rows).T.rename_axis(["task", "difference"]) if rows else pd.DataFrame()


def order_of_paper(runs: list[Run], budget: float) -> tuple[float, float, int]:
    """Correlate the methods' order here with the paper's: Spearman's rho, its p-value, number of methods."""
    found = {m: float(of_seeds(x).mean()) for m, x in matrices(runs, budget, 1).items() if m in PAPER}
    if len(found) < 3 or len(set(found.values())) == 1:
        return math.nan, math.nan, len(found)
    rho, p = stats.spearmanr([PAPER[m] for m in found], list(found.values()))
    return float(rho), float(p), len(found)


def start_rates(runs: Sequence[Run]) -> pd.Series:
    """Read the questions' pass rates at the start, the same for all runs."""
    return by_question(runs[0], 0, 1)


def bands_table(runs: list[Run], budget: float, k: int) -> pd.DataFrame:
    """Tabulate the gain of pass@k by band of the pass rate at the start, in points: method x band."""
    bands = start_rates(runs).map(band_of)
    before = by_question(runs[0], 0, k)
    rows = {}
    for method, matrix in matrices(runs, budget, k).items():
        gain = (matrix.mean() - before).groupby(bands).mean()
        rows[method] = {f"{b} ({(bands == b).sum()})": 100 * gain[b] for b in BAND_NAMES if b in gain}
    return pd.DataFrame(rows).T.rename_axis("method")


# Stability ----------------------------------------------------------------------------------------------------------


def outcome(run: Run) -> dict[str, object]:
    """Say how a run ended against its start, over its questions."""
    steps = sorted(run.dumps)
    start, end = by_question(run, 0, 1), by_question(run, steps[-1], 1)
    if has_failed(run):
        end = 0.0 * end
    apart, half = paired_interval((end - start).to_numpy()[None], start.index.get_level_values(0).to_numpy())
    passed = [of_questions(by_question(run, s, 1)) for s in steps]
    entropy = entropy_of(run)
    return {
        "best": max(passed),
        "end": 0.0 if has_failed(run) else passed[-1],
        "below": has_failed(run) or apart + half < 0,
        "entropy": float(entropy.iloc[-1]) if len(entropy) else math.nan,
        "steps": int(run.metrics.index.max()),
        "failed": has_failed(run),
    }


def stability_table(runs: list[Run], best: Mapping[str, str], long: int) -> pd.DataFrame:
    """Tabulate what became of each method's runs of ``long`` steps by learning rate, in units of its best one."""
    rows: dict[str, dict[str, object]] = {}
    for algorithm in dict.fromkeys(run.algorithm for run in runs):
        found: dict[float, list[dict]] = {}
        for run in (r for r in runs if r.algorithm == algorithm and is_standard(r)):
            told, factor = outcome(run), float(f"{run.settings[LR] / float(best[algorithm]):.1g}")
            if factor in FACTORS and (told["steps"] >= long or told["failed"] or factor == FACTORS[0]):
                found.setdefault(factor, []).append(told)
        if not found:
            continue
        cells: dict[str, object] = {"best lr": best[algorithm]}
        for factor, told in sorted(found.items()):
            end, entropy = np.mean([t["end"] for t in told]), np.mean([t["entropy"] for t in told])
            mark = f", {told[0]['steps']} steps" * (told[0]["steps"] < long) + ", failed" * any(
                t["failed"] for t in told
            )
            cells[f"{factor:g} x"] = f"{100 * end:.1f} %, {entropy:.2f}{mark}"
        below = [t["below"] for told in found.values() for t in told]
        cells["ended below its start"] = f"{sum(below)} of {len(below)}"
        rows[algorithm] = cells
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method").fillna("")
    order = ["best lr", *sorted((c for c in table if c.endswith(" x")), key=lambda c: float(c[:-2]))]
    return table[[*order, "ended below its start"]] if len(table) else table


def is_standard(run: Run) -> bool:
    """Tell whether a tuning run has the second settings' values that rates were tuned with."""
    return all(float(run.settings.get(name, value)) == float(value) for name, value in STANDARD.items())


# Mechanisms ---------------------------------------------------------------------------------------------------------


def entropy_of(run: Run) -> pd.Series:
    """Return the entropy in units of the first steps'.

    verl averages it over tokens as the method's loss is averaged, so that methods have different units.
    """
    curve = curve_of(run, "entropy")
    return curve / curve.iloc[0] if len(curve) else curve


def entropy_table(runs: list[Run]) -> pd.DataFrame:
    """Tabulate the entropy in the middle and at the end of runs, in units of the first step's: mean and extremes."""
    rows = {}
    for method, own in by_method(runs).items():
        if curves := [c for c in map(entropy_of, own) if len(c)]:
            ends = [c.iloc[-1] for c in curves]
            middle = float(np.mean([c.iloc[len(c) // 2] for c in curves]))
            row = {"middle": middle, "last step": float(np.mean(ends)), "lowest": min(ends), "highest": max(ends)}
            rows[method] = row
    return pd.DataFrame(rows).T.rename_axis("method")


def constraint_table(groups: Mapping[object, list[Run]]) -> pd.DataFrame:
    """Tabulate how the constraint worked in groups of runs: KL and its standard error, share of mini-batches above
    delta, coefficient."""
    names = {"KL": "disco/kl", "its standard error": "disco/kl_standard_error"}
    names |= {"share above delta": "disco/over_delta", "coefficient": "disco/coefficient"}
    names |= {"gradient norm": "actor/grad_norm"}
    rows = {}
    for name, own in groups.items():
        if any("disco/kl" in r.metrics for r in own):
            rows[name] = {
                k: np.mean([c.mean() for r in own if len(c := r.column(n))] or [np.nan]) for k, n in names.items()
            }
    table = pd.DataFrame(rows).T
    return table.rename_axis(["method", "change"] if table.index.nlevels == 2 else "method")


def by_change(runs: list[Run], standard: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """Group variants by the method that they change and by the settings that differ from its run of the same seed."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        like = next((r for r in standard if r.algorithm == run.algorithm and r.seed == run.seed), None)
        if like is not None:
            found = [n for n in differences([like.settings, run.settings]) if n.startswith("disco.")]
            change = ", ".join(f"{n.removeprefix('disco.')}={run.settings[n]}" for n in found)
            groups.setdefault((run.algorithm, change or "as it is"), []).append(run)
    return groups


def changes_table(groups: Mapping[tuple[str, str], list[Run]], standard: list[Run], budget: float) -> pd.DataFrame:
    """Tabulate variants against the method that they change, paired by seed."""
    base, rows = matrices(standard, budget, 1), {}
    for (algorithm, change), own in groups.items():
        matrix = pd.DataFrame({r.seed: at_budget(r, budget, 1) for r in own}).T
        mean, low, high, seeds = compare(matrix, base[algorithm])
        rows[algorithm, change] = {
            "pass@1, %": percent(*mean_and_interval(of_seeds(matrix).tolist())),
            "points to the standard": points(mean, low, high),
            "seeds": str(seeds),
            "failed": str(sum(map(has_failed, own))),
        }
    return named(rows, "change")


def pair_table(pairs: Mapping[str, tuple[list[Run], str, str]], budget: float) -> pd.DataFrame:
    """Tabulate the difference of two methods, over all questions and over hard ones."""
    rows = {}
    for name, (runs, ours, theirs) in pairs.items():
        row = {}
        for k in KS:
            found = matrices(runs, budget, k)
            if ours in found and theirs in found:
                rates = start_rates(runs)
                hard = rates.index[rates < HARD]
                row[f"pass@{k}, all"] = points(*compare(found[ours], found[theirs])[:3])
                row[f"pass@{k}, {len(hard)} hard"] = points(*compare(found[ours], found[theirs], only=hard)[:3])
        if row:
            rows[f"{ours} - {theirs}, {name}"] = row
    return pd.DataFrame(rows).T.rename_axis("difference")


# The report ---------------------------------------------------------------------------------------------------------


def draw(runs: list[Run], task: str, out: Path) -> dict[str, str]:
    """Draw curves of the methods in ``SHOWN``; return file name -> title."""
    matplotlib.use("Agg")
    shown = [r for r in runs if r.method in SHOWN]
    panels = {"pass_at_1": ("held-out pass@1 by step", lambda run: run.pass_at_1.mean(axis=1))}
    panels["entropy"] = ("entropy, in units of the first step's", entropy_of)
    for name in ("kl", "reward"):
        panels[name] = (CURVES[name][0], lambda run, name=name: curve_of(run, name))
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, (title, of) in panels.items():
            if draw_curves(shown, of, f"{task}: {title}", set(), out / f"{task}-{name}.svg"):
                drawn[f"{task}-{name}.svg"] = title
        if draw_weights([r for r in shown if r.method in SHOWN[:1] + SHOWN[3:4]], out / f"{task}-weight.svg"):
            drawn[f"{task}-weight.svg"] = "share of the training's weight by pass rate in the batch"
    return drawn


def draw_headline(tasks: Mapping[str, list[Run]], path: Path) -> None:
    """Draw every method's pass@1 at the budget, all tasks side by side."""
    found = {task: matrices(runs, BUDGETS[task], 1) for task, runs in tasks.items()}
    passed = {task: pd.DataFrame({m: of_seeds(x) for m, x in own.items()}) for task, own in found.items()}
    starts = {task: of_questions(start_rates(runs)) for task, runs in tasks.items()}
    labels = {task: f"pass@1 after {BUDGETS[task]:,} generated tokens, %" for task in tasks}
    draw_methods(passed, starts, labels, path)


def quoted(tasks: Mapping[str, list[Run]]) -> dict[str, Figure]:
    """Make the figures that other documents quote: the tested differences, and pass@1 of each method, in percent."""

    def figure(unit: str, mean: float, low: float, high: float) -> Figure:
        bounds = (None, None) if math.isnan(low) else (100 * low, 100 * high)
        return Figure(100 * mean, unit, *bounds, better="neither")

    found = {}
    for task, runs in tasks.items():
        passed = matrices(runs, BUDGETS[task], 1)
        for ours, theirs in HYPOTHESES:
            if ours in passed and theirs in passed:
                interval = compare(passed[ours], passed[theirs], CONFIDENCE)[:3]
                found[f"{task}, {ours} - {theirs}"] = figure("points", *interval)
        found[f"{task}, start"] = figure("%", of_questions(start_rates(runs)), *[math.nan] * 2)
        for method, matrix in passed.items():
            mean, half = mean_and_interval(of_seeds(matrix).tolist())
            found[f"{task}, {method}"] = figure("%", mean, mean - half, mean + half)
    return found


def write(data: Path, out: Path) -> tuple[str, dict[str, Figure]]:
    """Write tables and pictures into ``out``; return the report as Markdown, and the figures to quote."""
    out.mkdir(parents=True, exist_ok=True)
    tables = Tables(out / "tables")
    with tempfile.TemporaryDirectory() as place:
        unpack(data, Path(place))
        tasks = {t: load(Path(place, t, "main")) for t in BUDGETS if Path(place, t, "main").is_dir()}
        tasks = {t: runs for t, runs in tasks.items() if runs}
        parts = [
            "# The study",
            "Made by `python benchmarks/study/analyse.py` from `docs/study/data`. What was asked, and how it",
        ]
        parts[-1] += " is judged: [the protocol](../protocol.md)."
        if len(table := hypotheses_table(tasks)):
            parts += [
                "## What was tested",
                f"Intervals of {100 * CONFIDENCE:.4g} %, which hold together in 95 % of studies.",
            ]
            parts.append(tables.add("hypotheses", table))
        if tasks:
            draw_headline(tasks, out / "methods.svg")
            parts += ["![pass@1 of each method](methods.svg)"]
            parts += ["A dot is a seed, a diamond their mean with its 95 % interval; dashed: where all runs began."]
        for task, runs in tasks.items():
            parts += of_task(task, runs, Path(place, task), data, tables, out)
    return "\n\n".join(parts) + "\n", quoted(tasks)


def of_task(task: str, runs: list[Run], place: Path, data: Path, tables: Tables, out: Path) -> list[str]:
    """Make one task's part of the report."""
    budget = BUDGETS[task]
    parts = [
        f"## {task}: learning",
        f"After {budget:,} generated tokens, paired over seeds and questions; 95 % intervals.",
    ]
    parts += [tables.add(f"{task}-learning", learning_table(runs, budget))]
    parts += ["At the end of the runs:", tables.add(f"{task}-end", learning_table(runs, math.inf))]
    rho, p, methods = order_of_paper(runs, budget)
    if not math.isnan(rho):
        parts += [f"Order of {methods} methods against the paper's at 1.5B: Spearman's rho {rho:.2f} (p = {p:.2g})."]
    for k in KS:
        parts += [f"Gain of pass@{k} by pass rate at the start (number of questions), points:"]
        parts += [tables.add(f"{task}-bands-{k}", bands_table(runs, budget, k), "+.1f")]
    drawn = draw(runs, task, out)
    parts += [f"![{title}]({name})" for name, title in drawn.items()]
    wide, tuned = load(place / "wide"), load(place / "tune")
    if wide:
        parts += [f"## {task}: groups of 32", tables.add(f"{task}-wide", learning_table(wide, budget))]
    best = data / f"{task}-chosen.json"
    if tuned and best.exists():
        lengths = [int(r.metrics.index.max()) for r in tuned]
        table = stability_table(tuned, json.loads(best.read_text())["lr"], max(lengths))
        if len(table) and max(lengths) > max(int(r.metrics.index.max()) for r in runs):
            parts += [
                f"## {task}: stability",
                f"After {max(lengths)} steps, by learning rate: pass@1 on the tuning questions,",
            ]
            parts[-1] += " and the entropy in units of the first step's."
            parts += [tables.add(f"{task}-stability", table)]
    parts += [f"## {task}: mechanisms", "Gradient weight by pass rate in the batch:"]
    parts += [tables.add(f"{task}-weight", weight_table(runs)), "Entropy, in units of the first step's:"]
    parts += [tables.add(f"{task}-entropy", entropy_table(runs), ".2f"), "The constraint:"]
    parts += [tables.add(f"{task}-constraint", constraint_table(by_method(runs)), ".2e")]
    pairs = {"groups of 8": (runs, "disco", "disco_b"), "groups of 32": (wide, "disco", "disco_b")}
    if len(table := pair_table(pairs, budget)):
        parts += [f"Hard: a pass rate below {HARD} at the start.", tables.add(f"{task}-hard", table)]
    changed = load(place / "mechanisms")
    clipped = {"groups of 8": (changed, "grpo_unclipped", "grpo_free")}
    if changed:
        groups = by_change(changed, runs)
        if len(table := pair_table(clipped, budget)):
            parts += ["Without clipping, against with it:", tables.add(f"{task}-clipping", table)]
        if len(table := changes_table(groups, runs, budget)):
            parts += ["One change at a time:", tables.add(f"{task}-changes", table)]
        if len(table := constraint_table(groups)):
            parts += [tables.add(f"{task}-changes-constraint", table, ".2e")]
    return parts


def main() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs/study"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=docs / "data")
    parser.add_argument("--out", type=Path, default=docs / "report")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    text, figures = write(args.data, args.out)
    (args.out / "README.md").write_text(text)
    print(text)
    if args.record:
        record("study", figures)


if __name__ == "__main__":
    main()
