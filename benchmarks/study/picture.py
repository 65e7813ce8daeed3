"""Draw the study's pictures of all tasks: each method's pass@1 and seeds, and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from verl_ext.report.plots import STYLE, save
from verl_ext.report.tables import mean_and_interval

OURS = ("disco", "disco_b", "disco_l_ratio")
"""Methods whose marks stand out: the ones that the paper of DisCO proposes."""


def draw_methods(
    passed: Mapping[str, pd.DataFrame], starts: Mapping[str, float], labels: Mapping[str, str], path: Path
) -> None:
    """Draw a panel per task and a row per method, best on average at the top; write the picture to ``path``.

    Args:
        passed: by task, pass@1 of each method (columns) and seed (rows); NaN where a seed has no run.
        starts: by task, pass@1 before training.
        labels: by task, the axis' label.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    methods = pd.DataFrame({task: table.mean() for task, table in passed.items()}).mean(axis=1).sort_values().index
    with matplotlib.rc_context(STYLE):
        size = (4.2 * len(passed) + 1.2, 0.32 * len(methods) + 1.2)
        figure, axes = plt.subplots(1, len(passed), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axis, (task, table) in zip(axes[0], passed.items(), strict=True):
            axis.axvline(100 * starts[task], color="gray", linestyle="--", linewidth=1)
            for row, method in enumerate(methods):
                seeds = 100 * table.get(method, pd.Series(dtype=float)).dropna()
                mean, half = mean_and_interval(seeds.tolist())
                color = "tab:blue" if method in OURS else "dimgray"
                axis.errorbar([mean], [row], xerr=[half], fmt="D", color=color, markersize=5, capsize=3)
                # Above the mean, which would hide them.
                axis.plot(seeds, [row + 0.3] * len(seeds), "o", color=color, markersize=4, markerfacecolor="none")
            axis.set(title=task, xlabel=labels[task])
            axis.grid(alpha=0.3, axis="x")
        axes[0][0].set_yticks(range(len(methods)), methods)
        save(figure, path)
        plt.close(figure)


LINES = {"grpo": ("tab:orange", "-"), "dapo": ("tab:green", "-"), "dapo_static": ("tab:green", "--")}
LINES |= {"disco": ("tab:blue", "-"), "disco_l_ratio": ("tab:blue", "--"), "disco_b": ("tab:blue", ":")}
"""Colors are families, dashes their members: some of their curves lie on each other."""


def draw_panels(
    curves: Mapping[str, Mapping[str, pd.Series]],
    shown: Sequence[str],
    axes_labels: tuple[str, str],
    path: Path,
    marks: Mapping[str, float] | None = None,
) -> None:
    """Draw a panel per task and a curve per method, those of ``shown`` with a name and the others in gray.

    Args:
        curves: by task and method.
        axes_labels: of x and y.
        marks: by task, the place of a vertical line.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        size = (4.2 * len(curves) + 1.2, 4.2)
        figure, axes = plt.subplots(1, len(curves), figsize=size, squeeze=False, layout="constrained")
        named = [m for m in shown if any(m in own for own in curves.values())]
        for axis, (task, own) in zip(axes[0], curves.items(), strict=True):
            for method in sorted(own, key=lambda m: m in named):
                color, dashes = LINES.get(method, ("black", "-.")) if method in named else ("lightgray", "-")
                mark = "o" if len(own[method]) < 10 else ""
                axis.plot(own[method], dashes + mark, color=color, markersize=4, label=method)
            if marks:
                axis.axvline(marks[task], color="gray", linestyle=":", linewidth=1)
            axis.set(title=task, xlabel=axes_labels[0])
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel(axes_labels[1])
        handles = {text: line for axis in axes[0] for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend([handles[m] for m in named], named, loc="outside lower center", ncols=3)
        save(figure, path)
        plt.close(figure)
