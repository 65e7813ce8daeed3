"""Draw the plots of a report."""

import functools
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from verl_ext.recipes import installed, kl_metrics, metric_names
from verl_ext.report.read import Run, is_number
from verl_ext.report.tables import by_method

CURVES = {
    "reward": ("reward in training", "critic/score/mean"),
    "entropy": ("entropy, nats per token", "actor/entropy"),
    "kl": ("KL(old || new), nats per token", "actor/ppo_kl"),
    "coefficient": ("coefficient of the KL", "actor/kl_coef"),
    "length": ("response length, tokens", "response_length/mean"),
    "mixed": ("share of questions with right and wrong responses", "training/mixed_questions"),
}
"""File name -> title, and verl's metric; a recipe's metrics stand in if a run did not log that."""

SMOOTHING = 5
"""Steps of the running mean over training curves; evaluations are drawn as they are."""


GAIN = "gain of pass@1 by pass rate at the start"


def curve_of(run: Run, name: str) -> pd.Series:
    names = kl_metrics(run.algorithm) if name == "kl" else metric_names(name, CURVES[name][1])
    return run.column(*names).rolling(SMOOTHING, min_periods=1).mean()


def draw_all(runs: list[Run], difficulty: pd.DataFrame, out: Path) -> list[tuple[str, str]]:
    """Write the plots that have anything to show into ``out``; return their file names and titles."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    panels: dict[str, tuple[str, Callable]] = {
        "pass_at_1": ("pass@1, mean over benchmarks", lambda run: run.pass_at_1.mean(axis=1))
    }
    panels |= {name: (title, functools.partial(curve_of, name=name)) for name, (title, _) in CURVES.items()}
    # A method's name may hold a setting's value with a dollar sign, which must not start a formula.
    with matplotlib.rc_context({"text.parse_math": False}):
        for name, (title, of) in panels.items():
            bounds = [recipe.kl_bound(r.settings) for r in runs if name == "kl" for recipe in installed()]
            deltas = {bound for bound in bounds if is_number(bound)}
            if draw_curves(runs, of, title, deltas, out / f"{name}.png"):
                written.append((f"{name}.png", title))
        if len(difficulty):
            draw_bars(difficulty, out / "difficulty.png")
            written.append(("difficulty.png", GAIN))
    return written


def draw_curves(runs: list[Run], of: Callable[[Run], pd.Series], title: str, levels: set[float], path: Path) -> bool:
    """Draw a line per method, the mean over its runs, and thin lines for these; return whether there was any."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (method, group) in enumerate(by_method(runs).items()):
        curves = [c for c in map(of, group) if len(c)]
        if not curves:
            continue
        color = f"C{i % 10}"
        for c in curves if len(curves) > 1 else ():
            axis.plot(c.index, c, color=color, alpha=0.25, linewidth=0.8)
        # Only over steps that all runs have: an unfinished run would distort the mean.
        mean = pd.concat(curves, axis=1).dropna().mean(axis=1)
        axis.plot(mean.index, mean, color=color, label=f"{method}, {len(curves)} run{'s' * (len(curves) > 1)}")
    drawn = bool(axis.lines)
    if drawn:
        for level in sorted(levels):
            axis.axhline(level, color="black", linestyle=":", linewidth=1, label=f"delta = {level:g}")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return drawn


def draw_bars(table: pd.DataFrame, path: Path) -> None:
    """Draw a group of bars per band of difficulty, a bar per method, in percentage points."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    (100 * table.T).plot.bar(ax=axis, rot=0, width=0.8)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="pass rate at the start", ylabel="gain of pass@1, points", title=GAIN)
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
