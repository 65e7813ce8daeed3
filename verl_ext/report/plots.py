"""Draw the plots of a report."""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from verl_ext.recipes import installed, kl_metrics, metric_names
from verl_ext.report.read import Run, is_number
from verl_ext.report.tables import bands_logged, by_method
from verl_ext.runs.evaluations import BAND_NAMES, WEIGHT
from verl_ext.runs.files import write_whole

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
WEIGHTS = "share of the training's weight by pass rate in the batch"

SIZE = (7, 4)
"""Inches. Text of 12 points is then legible where the plot is as wide as a telephone."""

STYLE = {
    # A method's name may hold a setting's value with a dollar sign, which must not start a formula.
    "text.parse_math": False,
    "font.size": 12,
    "legend.fontsize": 10,
    # Letters stay text, and the same runs give the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
}


def save(figure: Any, path: Path) -> None:
    """Write a plot as SVG."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    write_whole(path, content.getvalue())


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
    with matplotlib.rc_context(STYLE):
        for name, (title, of) in panels.items():
            bounds = [recipe.kl_bound(r.settings) for r in runs if name == "kl" for recipe in installed()]
            deltas = {bound for bound in bounds if is_number(bound)}
            if draw_curves(runs, of, title, deltas, out / f"{name}.svg"):
                written.append((f"{name}.svg", title))
        if len(difficulty):
            draw_bars(difficulty, out / "difficulty.svg")
            written.append(("difficulty.svg", GAIN))
        if draw_weights(runs, out / "weight.svg"):
            written.append(("weight.svg", WEIGHTS))
    return written


def draw_curves(runs: list[Run], of: Callable[[Run], pd.Series], title: str, levels: set[float], path: Path) -> bool:
    """Draw a line per method, the mean over its runs, and thin lines for these; return whether there was any."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    for i, (method, group) in enumerate(by_method(runs).items()):
        curves = [c for c in map(of, group) if len(c)]
        if not curves:
            continue
        color = f"C{i % 10}"
        for c in curves if len(curves) > 1 else ():
            axis.plot(c.index, c, color=color, alpha=0.25, linewidth=0.8)
        # Only over steps that all runs have: an unfinished run would distort the mean.
        mean = pd.concat(curves, axis=1).dropna().mean(axis=1)
        # A line needs two points.
        axis.plot(
            mean.index,
            mean,
            "o" if len(mean) == 1 else "-",
            color=color,
            label=f"{method}, {len(curves)} run{'s' * (len(curves) > 1)}",
        )
    drawn = bool(axis.lines)
    if drawn:
        for level in sorted(levels):
            axis.axhline(level, color="black", linestyle=":", linewidth=1, label=f"delta = {level:g}")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
        save(figure, path)
    plt.close(figure)
    return drawn


def draw_weights(runs: list[Run], path: Path) -> bool:
    """Draw a panel per method, the bands' shares of its weight by step; return whether there was any."""
    import matplotlib.pyplot as plt

    panels: dict[str, pd.DataFrame] = {}
    for method, group in by_method(runs).items():
        logged = [shares for r in group if len(shares := bands_logged(r, WEIGHT))]
        if logged:
            both = pd.concat(logged).groupby(level=0)
            # Only steps that all runs have.
            mean = both.mean()[both.size() == len(logged)]
            panels[method] = mean.rolling(SMOOTHING, min_periods=1).mean()
    if not panels:
        return False
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    size = (SIZE[0], 0.8 + 2.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
    colors = plt.get_cmap("viridis")([i / (len(BAND_NAMES) - 1) for i in range(len(BAND_NAMES))])
    for axis, (method, shares) in zip(axes.flat, panels.items(), strict=False):
        axis.stackplot(shares.index, shares.T, colors=colors, labels=BAND_NAMES)
        axis.set(title=method, ylim=(0, 1), xlabel="step")
        axis.margins(x=0)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), title="pass rate in the batch")
    save(figure, path)
    plt.close(figure)
    return True


def draw_bars(table: pd.DataFrame, path: Path) -> None:
    """Draw a group of bars per band of difficulty, a bar per method, in percentage points."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=SIZE, layout="constrained")
    (100 * table.T).plot.bar(ax=axis, rot=0, width=0.8)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="pass rate at the start", ylabel="gain of pass@1, points", title=GAIN)
    axis.grid(alpha=0.3, axis="y")
    axis.legend()
    save(figure, path)
    plt.close(figure)
