"""Summarise an arithmetic run from its ``metrics.jsonl``: a table on the terminal.

python -m verl_ext.tasks.arithmetic.summary outputs/arithmetic/grpo,seed=1
"""

import math
import re
import statistics
from pathlib import Path

from omegaconf import OmegaConf

from verl_ext.command import parser_of
from verl_ext.recipes import metric_names
from verl_ext.runs import evaluations
from verl_ext.runs.folder import CONFIG_FILE, METRICS_FILE, read_metrics
from verl_ext.training.resume import checkpoint_steps, step_folder

LEVEL = re.compile(r"level_(\d{1,9})")
"""The data source of a level's questions."""


def pass_at_1(row: dict) -> dict[int, float]:
    """Read held-out pass@1 per level from a row of metrics; empty without an evaluation."""
    found = ((LEVEL.fullmatch(name), value) for name, value in evaluations.pass_at_1(row).items())
    return {int(match[1]): value for match, value in found if match}


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
    evaluated = [(r["step"], pass_at_1(r)) for r in rows if pass_at_1(r)]
    steps = [r for r in rows if r.get("timing_s/step") is not None]
    if not evaluated or not steps:
        return f"{run}: no evaluation followed by a finished step yet"
    (first, before), (last, after) = evaluated[0], evaluated[-1]
    lines = [f"pass@1 on held-out questions, before (step {first}) and after (step {last}):", ""]
    levels = sorted(before.keys() & after.keys())
    for level in levels:
        lines.append(f"  level {level}    {before[level]:6.1%} -> {after[level]:6.1%}")
    if levels:
        (p, p_error), (q, q_error) = (overall({n: of[n] for n in levels}, questions) for of in (before, after))
        lines.append(f"  all        {p:6.1%} -> {q:6.1%}    (standard error below {max(p_error, q_error):.1%})")
    lines.append("")

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
    checkpoints = checkpoint_steps(run)
    lines += [
        f"checkpoint   {step_folder(run, checkpoints[-1]) if checkpoints else 'none'}",
        f"metrics      {run / METRICS_FILE}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = parser_of("verl_ext.tasks.arithmetic.summary", __doc__)
    parser.add_argument("run", type=Path, help="trainer.default_local_dir of the run")
    args = parser.parse_args()
    if not (args.run / METRICS_FILE).exists():
        raise SystemExit(f"{args.run / METRICS_FILE} does not exist; give the folder of a run")
    print(describe(args.run))


if __name__ == "__main__":
    main()
