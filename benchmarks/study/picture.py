"""Draw the study's one picture: each method's pass@1 on each task, every seed, and where all runs began."""

from collections.abc import Mapping
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
                axis.plot(seeds, [row] * len(seeds), "o", color=color, markersize=4, alpha=0.35, markeredgewidth=0)
                axis.errorbar([mean], [row], xerr=[half], fmt="D", color=color, markersize=6, capsize=3)
            axis.set(title=task, xlabel=labels[task])
            axis.grid(alpha=0.3, axis="x")
        axes[0][0].set_yticks(range(len(methods)), methods)
        save(figure, path)
        plt.close(figure)
