"""What the study's tables are made of: its runs, their figures after a budget of tokens, and their differences.

docs/study/protocol.md says what is computed and how it is judged. The parts are those of ``verl_ext.report``: reading,
pass@k, paired intervals.
"""

import json
import math
import shutil
import tarfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from run import KNOBS, LR, RATES, SEEDS, is_standard, scores
from scipy import stats

from verl_ext.recipes import metric_names
from verl_ext.report.__main__ import find_runs
from verl_ext.report.paired import paired_interval
from verl_ext.report.plots import CURVES, SMOOTHING
from verl_ext.report.read import Run, differences, read_runs, repeated_seeds
from verl_ext.report.tables import by_method, mean_and_interval, named, pass_at_k, percent, published
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
TOO_FEW, SAME = "too few runs", "no difference of practical size"
KS = (1, 8)
HARD = 0.1
"""Pass rate at the start below which a question is hard."""

PAPER_MODEL = "DeepSeek-R1-Distill-Qwen-1.5B"
PAPER = {"grpo": "grpo", "grpo_er": "grpo_er", "dr_grpo": "dr_grpo", "dapo_static": "dapo", "trpa": "trpa"}
PAPER |= {"disco_l_ratio": "disco (score=l_ratio)", "disco": "disco"}
"""Methods here -> those of arXiv 2505.12366, whose results the recipe publishes."""

FACTORS = (0.3, 1.0, 3.0, 10.0)
"""Learning rates that tell of stability, in units of the best; those at the first are as long as tuning's."""


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


def spent(run: Run, budget: float) -> tuple[float, float]:
    """Compute the steps, and the seconds in them, that a run takes to generate ``budget`` tokens, or all it has."""
    tokens, seconds = generated(run), run.column("timing_s/step")
    elapsed = (seconds * np.diff(seconds.index, prepend=0)).cumsum()
    step = float(np.interp(budget, tokens, tokens.index))
    return step, float(np.interp(step, [0, *elapsed.index], [0.0, *elapsed]))


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
    return {method: matrix_of(own, budget, k) for method, own in by_method(list(runs)).items()}


def matrix_of(runs: Iterable[Run], budget: float, k: int) -> pd.DataFrame:
    """Tabulate pass@k of runs of one kind by seed (rows) and question (columns)."""
    return pd.DataFrame({run.seed: at_budget(run, budget, k) for run in runs}).T.sort_index()


def compare(
    ours: pd.DataFrame, theirs: pd.DataFrame, confidence: float = 0.95, only: Collection | None = None
) -> tuple[float, float, float, int]:
    """Compare two methods' matrices on common seeds: difference, its interval's bounds, and the number of seeds.

    A single seed has no interval: one over questions alone says nothing of other seeds.

    Args:
        only: questions to compare on, each of the same weight: levels may have one or two of them. All by default, with
            the same weight for each level.
    """
    seeds = ours.index.intersection(theirs.index)
    if not len(seeds):
        return math.nan, math.nan, math.nan, 0
    if not ours.columns.equals(theirs.columns):
        raise ValueError("the two methods answered different questions")
    columns = ours.columns if only is None else ours.columns[ours.columns.isin(only)]
    apart = ours.loc[seeds, columns].to_numpy() - theirs.loc[seeds, columns].to_numpy()
    level = columns.get_level_values("benchmark").to_numpy() if only is None else np.zeros(len(columns), int)
    mean, half = paired_interval(apart, level, confidence) if len(columns) else (math.nan, math.nan)
    half = half if len(seeds) > 1 else math.nan
    return mean, mean - half, mean + half, len(seeds)


def verdict(low: float, high: float, seeds: int) -> str:
    """Say what an interval of a difference says."""
    if seeds < 2 or math.isnan(low):
        return TOO_FEW
    small = -MARGIN < low and high < MARGIN
    if low > 0 or high < 0:
        return ("better" if low > 0 else "worse") + f", by less than {100 * MARGIN:g} points" * small
    return SAME if small else "undecided"


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


def common_seeds(runs: Sequence[Run]) -> list[str]:
    """List the seeds that all methods have: those that tables of all methods are over."""
    return sorted(set.intersection(*({r.seed for r in own} for own in by_method(runs).values()))) if runs else []


def of_common_seeds(runs: Sequence[Run]) -> list[Run]:
    """Leave out the runs of seeds that some methods do not have."""
    seeds = common_seeds(runs)
    return [run for run in runs if run.seed in seeds]


def learning_table(runs: list[Run], budget: float) -> pd.DataFrame:
    """Tabulate pass@1 and pass@8 after the budget, differences to the baseline, and the cost, best first."""
    rows: dict[str, dict[str, object]] = {}
    for method, own in by_method(runs).items():
        rows[method] = {"learning rate": " or ".join(dict.fromkeys(f"{r.settings[LR]:g}" for r in own))}
    for k in KS:
        found = matrices(runs, budget, k)
        for method, matrix in found.items():
            row = rows[method]
            row[f"pass@{k}, %"] = percent(*mean_and_interval(of_seeds(matrix).tolist()))
            if BASELINE in found:
                same = method == BASELINE
                row[f"points to {BASELINE}, pass@{k}"] = (
                    "baseline" if same else points(*compare(matrix, found[BASELINE])[:3])
                )
            row.setdefault("order", -float(of_seeds(matrix).mean()))
    to = " to the budget" if math.isfinite(budget) else ""
    for method, own in by_method(runs).items():
        tokens = [generated(r).iloc[-1] for r in own]
        steps, seconds = (float(np.mean(x)) for x in zip(*(spent(r, budget) for r in own), strict=True))
        # Some end before it.
        least = "over " if math.isfinite(budget) and min(tokens) < budget else ""
        rows[method] |= {f"steps{to}": f"{least}{steps:.0f}", f"seconds{to}": f"{least}{seconds:.0f}"}
        rows[method] |= {"tokens of a run": f"{np.mean(tokens):,.0f}", "failed": str(sum(map(has_failed, own)))}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    return table.sort_values("order", kind="stable").drop(columns="order")


def hypotheses_table(tasks: Mapping[str, list[Run]]) -> pd.DataFrame:
    """Tabulate the tested differences of pass@1 with the family's intervals, and what they say."""
    rows = {}
    for task, budget in BUDGETS.items():
        found = matrices(tasks.get(task, []), budget, 1)
        for ours, theirs in HYPOTHESES:
            there = ours in found and theirs in found
            *interval, seeds = compare(found[ours], found[theirs], CONFIDENCE) if there else (*[math.nan] * 3, 0)
            said = {"points of pass@1": points(*interval), "seeds": str(seeds)}
            rows[task, f"{ours} - {theirs}"] = said | {"verdict": verdict(*interval[1:], seeds)}
    return pd.DataFrame(rows).T.rename_axis(["task", "difference"])


def conclusion(table: pd.DataFrame) -> str:
    """Say in a sentence what the tested differences say of the paper's ordering, by the protocol's rule."""
    verdicts, seeds = table["verdict"], table["seeds"].astype(int)
    better, worse = (verdicts.str.startswith(word) for word in ("better", "worse"))
    alike = (verdicts == SAME).groupby(level="difference").all()
    if worse.any() or alike.any():
        found = [f"{difference} in {task} is below 0" for task, difference in verdicts.index[worse]]
        found += [f"{difference} is of no practical size in both tasks" for difference in alike.index[alike]]
        said = f"the paper's ordering is refuted here: {'; '.join(found)}."
    elif few := (verdicts == TOO_FEW).sum():
        said = f"the paper's ordering cannot be judged yet: {few} of {len(verdicts)} tests have too few runs."
    elif better.all():
        said = "the paper's ordering is supported here: disco is better than both baselines in both tasks."
    else:
        said = (
            "the result is mixed: the paper's ordering is neither supported nor refuted here. disco is better in "
            f"{better.sum()} of {len(verdicts)} tests; {(verdicts == 'undecided').sum()} are undecided."
        )
    if seeds.min() < len(SEEDS):
        return f"So far, with {seeds.min()} to {seeds.max()} of {len(SEEDS)} seeds, {said}"
    return said[0].upper() + said[1:]


def paper_average(method: str) -> float:
    """Average the paper's pass@1 at 1.5B over its benchmarks."""
    (results,) = (source[PAPER_MODEL] for source in published().values() if PAPER_MODEL in source)
    return float(np.mean(list(results[PAPER[method]].values())))


def order_of_paper(runs: list[Run], budget: float) -> tuple[float, float, int]:
    """Correlate the methods' order here with the paper's: Spearman's rho, its exact p-value, number of methods."""
    found = {m: float(of_seeds(x).mean()) for m, x in matrices(runs, budget, 1).items() if m in PAPER}
    if len(found) < 3 or len(set(found.values())) == 1:
        return math.nan, math.nan, len(found)
    theirs, ours = (stats.rankdata(x) for x in ([paper_average(m) for m in found], list(found.values())))

    def rho(permuted: np.ndarray) -> float:
        return float(np.corrcoef(permuted, ours)[0, 1])

    test = stats.permutation_test((theirs,), rho, permutation_type="pairings", n_resamples=np.inf)
    return float(test.statistic), float(test.pvalue), len(found)


def tuning_table(runs: Sequence[Run], steps: int, chosen: Mapping) -> pd.DataFrame:
    """Tabulate the scores that chose each method's learning rate, in percent, and say which is chosen."""
    found = scores(runs, steps)
    rows: dict[str, dict[str, str]] = {}
    for method, rate in sorted(found, key=lambda key: RATES.index(key[1])):
        mark = " (chosen)" * (rate == chosen["lr"].get(method))
        rows.setdefault(method, {})[rate] = f"{100 * found[method, rate]:.1f}{mark}"
    rates = [rate for rate in RATES if any(rate in row for row in rows.values())]
    return pd.DataFrame.from_dict(rows, orient="index", columns=rates).sort_index().rename_axis("method")


def second_settings(runs: Sequence[Run], steps: int, chosen: Mapping) -> list[str]:
    """Say what the tuning of the second settings found, a sentence for each."""
    said = []
    for method, (name, values) in KNOBS.items():
        found = scores(runs, steps, name)
        of = {v: found[key] for v in values if (key := (method, chosen["lr"].get(method), v)) in found}
        cells = (f"{v}: {100 * score:.1f}" + " (chosen)" * (v == chosen[name]) for v, score in of.items())
        said.append(f"{name} of {method}: {', '.join(cells)}.")
    return said


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
        "kind": kind_of(run),
    }


def kind_of(run: Run) -> str:
    """Say what holds a method's updates back."""
    constraint = run.settings.get("disco.constraint")
    if constraint is None:
        return "clipping"
    return {"none": "neither", "fixed": "a penalty of fixed weight on the KL"}.get(constraint, "a constraint on the KL")


def outcomes(runs: list[Run], best: Mapping[str, str], long: int) -> dict[str, dict[float, dict]]:
    """Map methods to the outcomes of their runs of ``long`` steps by learning rate, in units of the best one."""
    found: dict[str, dict[float, dict]] = {}
    for run in (r for r in runs if is_standard(r.settings)):
        factor = float(f"{run.settings[LR] / float(best[run.algorithm]):.1g}")
        if factor in FACTORS:
            told = outcome(run)
            if told["steps"] >= long or told["failed"] or factor == FACTORS[0]:
                found.setdefault(run.algorithm, {})[factor] = told
    return found


def stability_table(found: Mapping[str, Mapping[float, Mapping]], best: Mapping[str, str], long: int) -> pd.DataFrame:
    """Tabulate what became of each method's runs of ``long`` steps, by learning rate."""
    rows: dict[str, dict[str, object]] = {}
    for algorithm, by_factor in found.items():
        cells: dict[str, object] = {"best lr": best[algorithm]}
        for factor, told in sorted(by_factor.items()):
            parts = [f"{100 * told['end']:.1f} %"]
            parts += [] if math.isnan(told["entropy"]) else [f"{told['entropy']:.2f}"]
            parts += [f"{told['steps']} steps"] * (told["steps"] < long) + ["failed"] * told["failed"]
            cells[f"{factor:g} x"] = ", ".join(parts) + " (below)" * bool(told["below"])
        below = [told["below"] for told in by_factor.values()]
        cells["ended below its start"] = f"{sum(below)} of {len(below)}"
        rows[algorithm] = cells
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method").fillna("")
    order = ["best lr", *sorted((c for c in table if c.endswith(" x")), key=lambda c: float(c[:-2]))]
    return table[[*order, "ended below its start"]] if len(table) else table


def kinds_table(found: Mapping[str, Mapping[float, Mapping]]) -> pd.DataFrame:
    """Count the runs that ended below their start by what holds updates back, and by learning rate."""
    rows: dict[str, dict[str, object]] = {}
    every = pd.DataFrame(
        [(told["kind"], method, f"{f:g} x", told["below"]) for method, of in found.items() for f, told in of.items()],
        columns=["kind", "method", "factor", "below"],
    )
    for kind, own in every.groupby("kind"):
        counts = {factor: f"{part['below'].sum()} of {len(part)}" for factor, part in own.groupby("factor")}
        rows[kind] = {"methods": ", ".join(sorted(set(own["method"])))}
        rows[kind] |= {name: counts.get(name, "") for name in (f"{f:g} x" for f in FACTORS)}
        rows[kind]["all"] = f"{own['below'].sum()} of {len(own)}"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("updates held back by")


# Mechanisms ---------------------------------------------------------------------------------------------------------


PER_RESPONSE = "seq-mean-token-mean"
"""verl's name for the mean over responses of the mean over tokens."""


def entropy_of(run: Run) -> pd.Series:
    """Return the entropy, a running mean of logged steps, in units of the first step's.

    verl averages it as the method's loss: over tokens, over the tokens of each response and then over responses, or as
    a sum over a response's tokens, which grows with its length. Of the sum the mean over tokens is made.
    """
    curve = run.column(*metric_names("entropy", CURVES["entropy"][1]))
    if averaged(run).startswith("seq-mean-token-sum"):
        curve = curve / run.column("response_length/mean").reindex(curve.index)
    curve = curve.rolling(SMOOTHING, min_periods=1).mean()
    return curve / curve.iloc[0] if len(curve) else curve


def averaged(run: Run) -> str:
    """Return how a run's loss, and verl's entropy with it, is averaged."""
    return str(run.settings.get("actor_rollout_ref.actor.loss_agg_mode", "token-mean"))


def entropy_table(runs: list[Run]) -> pd.DataFrame:
    """Tabulate the entropy in the middle and at the end of runs, in units of the first step's: mean and extremes."""
    rows = {}
    for method, own in by_method(runs).items():
        if curves := [c for c in map(entropy_of, own) if len(c)]:
            ends = [c.iloc[-1] for c in curves]
            middle = float(np.mean([c.iloc[len(c) // 2] for c in curves]))
            row = {"middle": middle, "end": float(np.mean(ends)), "lowest end": min(ends), "highest end": max(ends)}
            over = "each response's tokens" if averaged(own[0]) == PER_RESPONSE else "tokens"
            rows[method] = {"mean over": over} | row
    return pd.DataFrame(rows).T.rename_axis("method")


def lengths_table(runs: list[Run]) -> pd.DataFrame:
    """Tabulate the tokens of a response in the first step and in the last ones, and the share that is cut off."""
    rows = {}
    for method, own in by_method(runs).items():
        length, cut = ([r.column(f"response_length/{name}") for r in own] for name in ("mean", "clip_ratio"))
        rows[method] = {
            "tokens, first step": float(np.mean([c.iloc[0] for c in length])),
            "tokens, end": float(np.mean([c.iloc[-SMOOTHING:].mean() for c in length])),
            "cut off at the end, %": 100 * float(np.mean([c.iloc[-SMOOTHING:].mean() for c in cut])),
        }
    return pd.DataFrame(rows).T.rename_axis("method")


def constraint_table(groups: Mapping[object, list[Run]]) -> pd.DataFrame:
    """Tabulate how the constraint worked in groups of runs, on average over their steps."""
    # Column -> metric, factor, format.
    shown = {
        "KL, 1e-3 nats": ("disco/kl", 1e3, ".2f"),
        "its standard error": ("disco/kl_standard_error", 1e3, ".2f"),
        "mini-batches above delta, %": ("disco/over_delta", 1e2, ".1f"),
        "coefficient": ("disco/coefficient", 1.0, ".3f"),
        "gradient norm": ("actor/grad_norm", 1.0, ".2f"),
    }
    rows: dict[object, dict[str, str]] = {}
    for name, own in groups.items():
        if any("disco/kl" in r.metrics for r in own):
            constraints = {r.settings.get("disco.constraint") for r in own}
            delta = {f"{1e3 * float(r.settings['disco.delta']):g}" for r in own if "disco.delta" in r.settings}
            rows[name] = {"delta, 1e-3 nats": "" if constraints & {"none", "fixed"} else " or ".join(sorted(delta))}
            for column, (metric, factor, form) in shown.items():
                means = [c.mean() for r in own if len(c := r.column(metric))]
                rows[name][column] = format(factor * np.mean(means), form) if means else ""
    table = pd.DataFrame(rows).T
    return table.rename_axis(["method", "change"] if table.index.nlevels == 2 else "method")


def by_change(runs: list[Run], standard: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """Group variants by the method that they change and by the settings that differ from its run of the same seed."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        like = next((r for r in standard if r.algorithm == run.algorithm and r.seed == run.seed), None)
        if like is not None:
            found = [n for n in differences([like.settings, run.settings]) if n.startswith(("disco.", "dapo."))]
            change = ", ".join(f"{n.partition('.')[2]}={run.settings[n]}" for n in found)
            groups.setdefault((run.algorithm, change or "as it is"), []).append(run)
    return groups


def changes_table(groups: Mapping[tuple[str, str], list[Run]], standard: list[Run], budget: float) -> pd.DataFrame:
    """Tabulate variants against the method that they change, paired by seed."""
    base, rows = matrices(standard, budget, 1), {}
    for (algorithm, change), own in groups.items():
        matrix = matrix_of(own, budget, 1)
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
                *interval, seeds = compare(found[ours], found[theirs])
                row |= {"seeds": str(seeds), f"pass@{k}, all": points(*interval)}
                row[f"pass@{k}, {len(hard)} hard"] = points(*compare(found[ours], found[theirs], only=hard)[:3])
        if row:
            rows[f"{ours} - {theirs}, {name}"] = row
    return pd.DataFrame(rows).T.rename_axis("difference")
