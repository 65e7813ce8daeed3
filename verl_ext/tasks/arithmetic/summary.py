"""Summarise an arithmetic run from its ``metrics.jsonl``: a table on the terminal, and plots beside the file.

python -m verl_ext.tasks.arithmetic.summary outputs/arithmetic/grpo,seed=1
"""

import argparse
import math
import statistics
from pathlib import Path

from omegaconf import OmegaConf

from verl_ext.recipes import metric_names
from verl_ext.runs.folder import CONFIG_FILE, METRICS_FILE, read_metrics

PLOTS = "plots.png"


def pass_at_1(row: dict) -> dict[int, float]:
    """Read held-out pass@1 per level from a row of metrics; empty without an evaluation."""
    found = {}
    for name, value in row.items():
        if name.startswith("val-core/level_") and "/acc/mean@" in name:
            found[int(name.split("/")[1].removeprefix("level_"))] = value
    return found


def overall(levels: dict[int, float], questions: int) -> tuple[float, float]:
    """Compute the mean over levels, and an upper bound of its standard error over ``questions`` in all.

    The bound assumes one response per question; several make the error lower.
    """
    mean = statistics.fmean(levels.values())
    variance = statistics.fmean(p * (1 - p) for p in levels.values())
    return mean, math.sqrt(variance / questions)


def describe(run: Path) -> str:
    """Summarise a run as text."""
    rows, questions = read_metrics(run), OmegaConf.load(run / CONFIG_FILE).arithmetic.test_size
    evaluations = [(r["step"], pass_at_1(r)) for r in rows if pass_at_1(r)]
    steps = [r for r in rows if "timing_s/step" in r]
    if not evaluations or not steps:
        return f"{run}: no evaluation followed by a finished step yet"
    (first, before), (last, after) = evaluations[0], evaluations[-1]
    lines = [f"pass@1 on held-out questions, before (step {first}) and after (step {last}):", ""]
    for level in sorted(before):
        lines.append(f"  level {level}    {before[level]:6.1%} -> {after[level]:6.1%}")
    (p, p_error), (q, q_error) = overall(before, questions), overall(after, questions)
    lines += [f"  all        {p:6.1%} -> {q:6.1%}    (standard error below {max(p_error, q_error):.1%})", ""]

    def span(label: str, *names: str, form: str = ".3f") -> None:
        values = [r[name] for r in steps for name in names if r.get(name) is not None]
        if values:
            head, tail = statistics.fmean(values[:5]), statistics.fmean(values[-5:])
            lines.append(f"  {label:28} {head:{form}} -> {tail:{form}}")

    lines += ["means of the first and of the last 5 steps:", ""]
    span("reward in training", "critic/score/mean")
    span("KL(old || new), nats per token", *metric_names("kl", "actor/ppo_kl"), form=".2e")
    span("entropy, nats per token", "actor/entropy")
    span("response length, tokens", "response_length/mean", form=".1f")
    span("share of mixed groups", "training/mixed_questions")
    seconds = statistics.median(r["timing_s/step"] for r in steps)
    lines += ["", f"{len(steps)} steps, median {seconds:.2f} s each"]
    checkpoints = sorted(run.glob("global_step_*"), key=lambda f: int(f.name.rsplit("_", 1)[1]))
    lines += [
        f"checkpoint   {checkpoints[-1] if checkpoints else 'none'}",
        f"metrics      {run / METRICS_FILE}",
        f"plots        {run / PLOTS}",
    ]
    return "\n".join(lines)


def plot(run: Path) -> Path:
    """Plot pass@1, reward, KL, entropy, coefficient and lengths over the steps; return the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(run)
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), layout="constrained")
    evaluations = [(r["step"], pass_at_1(r)) for r in rows if pass_at_1(r)]
    for level in sorted(evaluations[0][1]) if evaluations else ():
        points = [(s, e[level]) for s, e in evaluations]
        axes[0, 0].plot(*zip(*points, strict=True), marker=".", label=f"level {level}")
    axes[0, 0].set(title="pass@1 on held-out questions", ylim=(0, 1))
    axes[0, 0].legend(fontsize=7)
    panels = {
        (0, 1): ("reward in training", ["critic/score/mean", "training/mixed_questions"]),
        (0, 2): ("entropy (nats per token)", ["actor/entropy"]),
        (1, 0): ("KL(old || new) (nats per token)", metric_names("kl", "actor/ppo_kl")),
        (1, 1): ("coefficient of the KL", metric_names("coefficient")),
        (1, 2): ("response length (tokens)", metric_names("lengths") or ["response_length/mean"]),
    }
    for position, (title, names) in panels.items():
        axis = axes[position]
        for name in names:
            points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(fontsize=7)
    path = run / PLOTS
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="trainer.default_local_dir of the run")
    args = parser.parse_args()
    if not (args.run / METRICS_FILE).exists():
        raise SystemExit(f"{args.run / METRICS_FILE} does not exist; give the folder of a run")
    plot(args.run)
    print(describe(args.run))


if __name__ == "__main__":
    main()
