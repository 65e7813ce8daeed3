"""Make the study's tables and pictures from docs/study/data alone: docs/study/report.

    python benchmarks/study/analyse.py [--data docs/study/data] [--out docs/study/report] [--record]

With ``--record`` the figures that other documents quote go to benchmarks/results/study.json. ``measures.py`` computes
what is shown.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
import pandas as pd
from measures import (
    BUDGETS,
    COMPARED,
    CONFIDENCE,
    FACTORS,
    HARD,
    HYPOTHESES,
    KS,
    PER_RESPONSE,
    averaged,
    bands_table,
    by_change,
    by_question,
    changes_table,
    common_seeds,
    compare,
    conclusion,
    constraint_table,
    entropy_of,
    entropy_table,
    generated,
    has_failed,
    hypotheses_table,
    kinds_table,
    learning_table,
    lengths_table,
    load,
    matrices,
    matrix_of,
    of_common_seeds,
    of_questions,
    of_seeds,
    order_of_paper,
    outcomes,
    pair_table,
    points,
    second_settings,
    stability_table,
    start_rates,
    tuning_table,
    unpack,
)
from picture import draw_methods, draw_panels
from record import Figure, record
from run import ADDED, FEW_SEEDS, KNOBS, MECHANISMS, METHODS, PLANS, SEEDS, WIDE, is_standard

from verl_ext.report.__main__ import Tables
from verl_ext.report.plots import CURVES, SMOOTHING, STYLE, curve_of, draw_curves, draw_weights
from verl_ext.report.read import Run
from verl_ext.report.tables import by_method, mean_and_interval, weight_table

SHOWN = ("grpo", "dapo", "dapo_static", "disco", "disco_l_ratio", "disco_b")
"""Methods in pictures."""


def planned(task: str) -> dict[str, int]:
    """Count a task's planned runs by stage; tuning has more where the best rate was at an end of its grid."""
    seconds = sum(len(values) - 1 for _, values in KNOBS.values())
    variants = sum(math.prod(o.count(",") + 1 for o in overrides) for overrides in MECHANISMS)
    counts = {"tune": len(METHODS) * 4 + seconds, "main": len(METHODS) * len(SEEDS), "wide": len(WIDE) * len(SEEDS)}
    counts |= {
        "mechanisms": variants * FEW_SEEDS + len(ADDED) * len(SEEDS),
        "stability": len(METHODS) * (len(FACTORS) - 1),
    }
    return {stage: counts[stage] for stage in PLANS[task].stages if stage in counts}


def runs_table(stages: Mapping[str, Mapping[str, list[Run]]]) -> pd.DataFrame:
    """Tabulate what is there of each stage of each task, and what is not."""
    rows = {}
    for task, of in stages.items():
        for stage, number in planned(task).items():
            runs = of.get(stage, [])
            row = {"runs": str(len(runs)), "planned": str(number), "failed": str(sum(map(has_failed, runs)))}
            if stage in COMPARED:
                own = by_method(runs)
                none = sorted(set(METHODS if stage == "main" else WIDE) - set(own))
                row["seeds of all methods"] = ", ".join(common_seeds(runs) if not none else []) or "none"
                row["no run of"] = ", ".join(none)
            rows[task, stage] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["task", "stage"])


def draw(runs: list[Run], task: str, out: Path) -> dict[str, str]:
    """Draw a task's own curves of the methods in ``SHOWN``; return file name -> title."""
    matplotlib.use("Agg")
    shown = [r for r in runs if r.method in SHOWN]
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name in ("kl", "reward"):
            title = CURVES[name][0]
            file = f"{task}-{name}.svg"
            if draw_curves(shown, lambda run, name=name: curve_of(run, name), f"{task}: {title}", set(), out / file):
                drawn[file] = title
        if draw_weights([r for r in shown if r.method in ("grpo", "disco")], out / f"{task}-weight.svg"):
            drawn[f"{task}-weight.svg"] = "share of the mean absolute advantage by pass rate in the batch"
    return drawn


def learning_curve(runs: list[Run]) -> pd.Series:
    """Average pass@1 in percent over runs of a method at each evaluation, by thousands of generated tokens."""
    tokens = pd.DataFrame({r.seed: generated(r) for r in runs})
    steps = sorted(set.intersection(*(set(r.dumps) for r in runs)))
    passed = [100 * float(np.mean([of_questions(by_question(r, s, 1)) for r in runs])) for s in steps]
    return pd.Series(passed, [float(tokens[tokens.index <= s].iloc[-1].mean()) / 1000 for s in steps])


def draw_headlines(tasks: Mapping[str, list[Run]], out: Path) -> None:
    """Draw every method's pass@1 at the budget, learning curves and entropies, all tasks side by side."""
    found = {task: matrices(runs, BUDGETS[task], 1) for task, runs in tasks.items()}
    passed = {task: pd.DataFrame({m: of_seeds(x) for m, x in own.items()}) for task, own in found.items()}
    starts = {task: of_questions(start_rates(runs)) for task, runs in tasks.items()}
    labels = {task: f"pass@1 after {BUDGETS[task]:,} generated tokens, %" for task in tasks}
    draw_methods(passed, starts, labels, out / "methods.svg")
    curves, entropies = {}, {}
    for task, runs in tasks.items():
        curves[task] = {m: learning_curve(own) for m, own in by_method(runs).items()}
        every = {m: [c for c in map(entropy_of, own) if len(c)] for m, own in by_method(runs).items()}
        entropies[task] = {m: pd.concat(own, axis=1).dropna().mean(axis=1) for m, own in every.items() if own}
    budgets = {task: BUDGETS[task] / 1000 for task in tasks}
    draw_panels(curves, SHOWN, ("generated tokens, thousands", "held-out pass@1, %"), out / "learning.svg", budgets)
    draw_panels(entropies, SHOWN, ("step", "entropy / first step's"), out / "entropy.svg")


def figure(unit: str, mean: float, low: float, high: float) -> Figure:
    """Make a figure of percents, to a tenth as in the report."""
    bounds = (None, None) if math.isnan(low) else (round(100 * low, 1), round(100 * high, 1))
    return Figure(round(100 * mean, 1), unit, *bounds, better="neither")


def quoted(main: Mapping[str, list[Run]], tasks: Mapping[str, list[Run]]) -> dict[str, Figure]:
    """Make the figures that other documents quote, in percent: the tested differences, and pass@1 of each method.

    Args:
        main: runs of each task.
        tasks: those of the seeds that all methods have.
    """
    found = {}
    for task, runs in tasks.items():
        tested, passed = matrices(main[task], BUDGETS[task], 1), matrices(runs, BUDGETS[task], 1)
        for ours, theirs in HYPOTHESES:
            if ours in tested and theirs in tested:
                interval = compare(tested[ours], tested[theirs], CONFIDENCE)[:3]
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
        stages = {t: stages_of(Path(place, t), t) for t in BUDGETS if Path(place, t).is_dir()}
        main = {t: of["main"] for t, of in stages.items() if of["main"]}
        # What all methods are compared on.
        tasks = {t: fair for t, runs in main.items() if (fair := of_common_seeds(runs))}
        tested = hypotheses_table(main)
        parts = [
            "# The study",
            "Made by `python benchmarks/study/analyse.py` from `docs/study/data`. What was asked, and how it is "
            "judged: [the protocol](../protocol.md).",
            f"**{conclusion(tested)}** Two toy tasks and a model of 165,696 parameters: this neither confirms nor "
            "refutes the paper at 1.5B parameters.",
            tables.add("hypotheses", tested),
            f"pass@1 on the judging questions after the budget of tokens, intervals of {100 * CONFIDENCE:.4g} % over "
            "seeds and questions, all four of which hold in at least 95 % of studies.",
        ]
        apart = {task: unpenalised(task, runs, stages[task]["mechanisms"]) for task, runs in tasks.items()}
        for task, runs in tasks.items():
            parts += of_penalty(task, runs, apart[task])
        if tasks:
            draw_headlines(tasks, out)
            parts += [
                "![pass@1 of each method](methods.svg)",
                "A circle is a seed, a diamond their mean with its 95 % interval over seeds; dashed: where all runs "
                "began. In blue: the methods of the DisCO paper.",
                "![held-out pass@1 by generated tokens](learning.svg)",
                "Means over seeds at the evaluations, straight lines between; dotted: the budget. In gray: the methods "
                "without a name here.",
                "![entropy by step](entropy.svg)",
                f"Means over seeds of a running mean of {SMOOTHING} steps. {of_responses(tasks)} Methods have "
                "different learning rates (below), which move the entropy as well.",
            ]
        for task, runs in tasks.items():
            parts += ranking(task, runs, main[task], tables)
        parts += [
            "## What is there",
            "Runs that have ended. Tuning has more where the best rate was at an end.",
            tables.add("runs", runs_table(stages)),
        ]
        for task, runs in tasks.items():
            parts += of_task(task, runs, stages[task], data, tables, out)
        figures = quoted(main, tasks)
        for task, found in apart.items():
            if found:
                figures[f"{task}, {' - '.join(HYPOTHESES[1])} without its penalty"] = figure("points", *found[:3])
        return "\n\n".join(parts) + "\n", figures


def of_responses(tasks: Mapping[str, list[Run]]) -> str:
    """Say which methods' entropy is of another kind."""
    names = sorted({r.method for runs in tasks.values() for r in runs if averaged(r) == PER_RESPONSE})
    if not names:
        return ""
    return (
        f"verl averages that of {', '.join(names)} over each response's tokens first, and that of the others over all "
        "tokens: the two kinds do not compare."
    )


def unpenalised(task: str, runs: list[Run], changed: list[Run]) -> tuple[float, float, float, int] | None:
    """Compare with DAPO without its penalty on long responses; None if runs without it are not there."""
    ours, theirs = HYPOTHESES[1]
    own, without = [r for r in runs if r.method == ours], [r for r in changed if r.algorithm == theirs]
    budget = BUDGETS[task]
    return compare(matrix_of(own, budget, 1), matrix_of(without, budget, 1)) if own and without else None


def of_penalty(task: str, runs: list[Run], found: tuple[float, float, float, int] | None) -> list[str]:
    """Say what the tested difference to DAPO owes to DAPO's penalty on long responses.

    Args:
        found: the difference without the penalty, by :func:`unpenalised`.
    """
    ours, theirs = HYPOTHESES[1]
    cut = lengths_table(runs)["cut off at the end, %"]
    if found is None or theirs not in cut:
        return []
    *interval, seeds = found
    return [
        f"DAPO alone takes reward off responses in the last fifth before the limit. At the end of runs on {task}, the "
        f"limit cuts off {cut[ours]:.0f} % of {ours}'s responses and {cut[theirs]:.0f} % of {theirs}'s. Without that "
        f"penalty (runs added after these tests, {seeds} seeds, 95 % interval) the difference to {theirs} is "
        f"{points(*interval)} points."
    ]


def stages_of(place: Path, task: str) -> dict[str, list[Run]]:
    """Read a task's runs by stage; the tuning runs that went on are the stage "stability" as well."""
    found = {name: load(place / name) for name in ("tune", "main", "wide", "mechanisms")}
    long = PLANS[task].long
    found["stability"] = [r for r in found["tune"] if is_standard(r.settings) and r.metrics.index.max() >= long]
    return found


def over(runs: list[Run]) -> str:
    """Say what a table is over: seeds, questions, levels, responses."""
    seeds, rates = sorted({r.seed for r in runs}), start_rates(runs)
    last = runs[0].answers(max(runs[0].dumps))["samples"]
    levels = rates.index.get_level_values("benchmark").nunique()
    return (
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)} ({', '.join(seeds)}), {len(rates)} questions of {levels} levels, "
        f"{int(last.min())} responses to each"
    )


def ranking(task: str, runs: list[Run], every: list[Run], tables: Tables) -> list[str]:
    """Make one task's table of all methods at the budget."""
    start = {k: 100 * of_questions(by_question(runs[0], 0, k)) for k in KS}
    left = sorted({r.seed for r in every} - {r.seed for r in runs})
    return [
        f"## {task}: ranking",
        f"After {BUDGETS[task]:,} generated tokens; {over(runs)}."
        + f" Not all methods have seed {', '.join(left)}." * bool(left),
        f"All began at pass@1 {start[1]:.1f} % and pass@8 {start[8]:.1f} %"
        f" ({int(runs[0].answers(0)['samples'].min())} responses). The tuned learning rate differs among methods.",
        tables.add(f"{task}-learning", learning_table(runs, BUDGETS[task])),
        "±: 95 % interval over seeds. Points: 95 % interval over seeds and questions (none for a single seed), not "
        "adjusted: one in twenty is wrong by chance, and none is a finding by itself. Seconds: training steps without "
        "evaluation, two runs at a time on two shared cores. Over: some runs ended before the budget.",
    ]


def folded(title: str, *parts: str) -> str:
    """Fold parts of the report under a title."""
    return "\n\n".join([f"<details><summary>{title}</summary>", *parts, "</details>"])


def of_task(
    task: str, runs: list[Run], stages: Mapping[str, list[Run]], data: Path, tables: Tables, out: Path
) -> list[str]:
    """Make one task's part of the report, but for its ranking."""
    budget = BUDGETS[task]
    wide, tuned, changed = stages["wide"], stages["tune"], stages["mechanisms"]
    parts = [f"## {task}: learning", "At the end of the runs, equal in updates instead of tokens; else as the ranking."]
    parts += [tables.add(f"{task}-end", learning_table(runs, math.inf))]
    parts += [
        "Responses, in training (end: the last five steps):",
        tables.add(f"{task}-lengths", lengths_table(runs), ".1f"),
    ]
    rho, p, methods = order_of_paper(runs, budget)
    if not math.isnan(rho):
        parts += [
            f"Order after the budget of the {methods} methods that the paper has, against its order at 1.5B: "
            f"Spearman's rho {rho:.2f} (exact p = {p:.2g}; with seven methods, 0.79 reaches 0.05)."
        ]
    for k in KS:
        parts += [
            f"Gain of pass@{k} after the budget by pass rate at the start (number of questions), points, mean over "
            "questions and seeds:",
            tables.add(f"{task}-bands-{k}", bands_table(runs, budget, k), "+.1f"),
        ]
    parts += [f"![{title}]({name})" for name, title in draw(runs, task, out).items()]
    parts += [f"Curves: thin lines are seeds, thick ones their mean, both running means of {SMOOTHING} steps."]
    if fair := of_common_seeds(wide):
        parts += [
            f"## {task}: groups of 32",
            f"8 questions of 32 responses per step. After {budget:,} tokens; {over(fair)}.",
        ]
        parts += [tables.add(f"{task}-wide", learning_table(fair, budget))]
        parts += ["At the end of the runs:", tables.add(f"{task}-wide-end", learning_table(fair, math.inf))]
    if (file := data / f"{task}-chosen.json").exists():
        chosen = json.loads(file.read_text())
        parts += of_tuning(task, tuned, chosen, tables)
        if stages["stability"]:
            parts += of_stability(task, outcomes(tuned, chosen["lr"], PLANS[task].long), chosen["lr"], tables)
    parts += of_mechanisms(task, runs, stages["main"], wide, changed, tables)
    return parts


def of_tuning(task: str, tuned: list[Run], chosen: Mapping, tables: Tables) -> list[str]:
    """Make the part about what tuning chose."""
    if not tuned:
        return []
    seeds = ", ".join(sorted({r.seed for r in tuned}))
    return [
        f"## {task}: tuning",
        f"Mean pass@1 at the last two evaluations of {PLANS[task].steps} steps on the tuning questions, percent, by "
        f"learning rate; seed {seeds}. Noise of about two points may pick a neighbour of the best rate.",
        tables.add(f"{task}-tuning", tuning_table(tuned, PLANS[task].steps, chosen)),
        *second_settings(tuned, PLANS[task].steps, chosen),
    ]


def of_stability(task: str, found: Mapping, best: Mapping[str, str], tables: Tables) -> list[str]:
    """Make the part about runs that went on."""
    long = PLANS[task].long
    return [
        f"## {task}: stability",
        f"After {long} steps, by learning rate in units of the best: pass@1 on the tuning questions, and entropy in "
        f"units of the first step's (mean of the last {SMOOTHING} rows that are kept). Below: the 95 % interval of end "
        "minus start over questions lies below 0, or the run failed. One seed, on which the rate was chosen as well.",
        tables.add(f"{task}-stability", stability_table(found, best, long)),
        "Runs that ended below their start:",
        tables.add(f"{task}-kinds", kinds_table(found)),
    ]


def of_mechanisms(
    task: str, runs: list[Run], every: list[Run], wide: list[Run], changed: list[Run], tables: Tables
) -> list[str]:
    """Make the part about mechanisms; ``every``: also the runs of seeds that only some methods have."""
    budget = BUDGETS[task]
    parts = [
        f"## {task}: mechanisms",
        f"Entropy in units of the first step's, a running mean of {SMOOTHING} steps; the extremes are over seeds. "
        "Means over different things do not compare.",
        tables.add(f"{task}-entropy", entropy_table(runs), ".2f"),
    ]
    if len(table := constraint_table(by_method(runs))):
        parts += [
            "Constraint, means over steps and seeds. An error above delta means that the constraint acts on noise."
        ]
        parts += [tables.add(f"{task}-constraint", table)]
    if len(table := weight_table(runs)):
        told = (
            "`training/weight_at_pass_rate`: `34 of 20` is 34 % of the mean absolute advantage on 20 % of the "
            "questions, before what clipping, score and constraint make of it."
        )
        title = "Weight of questions by pass rate in the batch"
        parts += [folded(title, told, tables.add(f"{task}-weight", table))]
    note = f"After {budget:,} tokens, 95 % intervals over seeds and questions."
    pairs = {"groups of 8": (every, "disco", "disco_b"), "groups of 32": (wide, "disco", "disco_b")}
    if len(table := pair_table(pairs, budget)):
        parts += [f"Hard: a pass rate below {HARD} at the start. {note}", tables.add(f"{task}-hard", table)]
    if changed:
        if len(table := pair_table({"groups of 8": (changed, "grpo_unclipped", "grpo_free")}, budget)):
            parts += [f"Without clipping, against with it. {note}", tables.add(f"{task}-clipping", table)]
        groups = by_change(changed, every)
        if len(table := changes_table(groups, every, budget)):
            parts += [f"One change at a time, at the standard's learning rate. {note}"]
            parts += [tables.add(f"{task}-changes", table)]
        if len(table := constraint_table(groups)):
            parts += [tables.add(f"{task}-changes-constraint", table)]
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
