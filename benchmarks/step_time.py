"""Where the seconds of a step go, and what a run learned, from its metrics.jsonl.

python benchmarks/step_time.py RUN_DIR [--name quickstart] [--seconds 354] [--skip 5] [--raw]

Writes NAME_steps, medians over the run's steps; of an arithmetic run also NAME, before and after; with --raw also
`raw/NAME.tar.xz`, the run's metrics and settings, which tests/test_benchmarks.py makes the committed figures from.
"""

import argparse
import statistics
from pathlib import Path

from record import ROOT, Figure, record

from verl_ext.report.tables import PHASES
from verl_ext.runs.folder import CONFIG_FILE, METRICS_FILE, read_metrics, read_settings
from verl_ext.tasks.arithmetic.summary import overall, pass_at_1

MEASURING = "disco/measure_seconds"
RIGHT, WRONG = "disco/score_positive", "disco/score_negative"
MEMORY, STANDARD_ERROR = "actor/perf/cpu_memory_used_gb", "disco/kl_standard_error"
TENTH = 1.2816
"""Standard errors from the mean to the 10th and the 90th percentile."""
IN_TRAINING = {
    "reward in training": ("critic/score/mean", "ratio"),
    "entropy": ("actor/entropy", "nats per token"),
    "response length": ("response_length/mean", "tokens"),
    "mixed groups": ("training/mixed_questions", "ratio"),
}


def phases(steps: list[dict]) -> dict[str, Figure]:
    """Take medians of seconds per phase; what is neither a phase of the worker nor of the trainer is generation."""
    figures = {"step": Figure.of([s["timing_s/step"] for s in steps], "s")}
    known = [f"timing_s/{p}" for p in PHASES]
    for name in known:
        if values := [s[name] for s in steps if name in s]:
            figures[name.removeprefix("timing_s/")] = Figure.of(values, "s")
    rest = [s["timing_s/step"] - sum(s.get(name, 0.0) for name in known) for s in steps]
    figures["generation, rewards, other"] = Figure.of(rest, "s")
    if measured := [s for s in steps if MEASURING in s]:
        figures["measuring passes, in update_actor"] = Figure.of([s[MEASURING] for s in measured], "s")
        shares = [s[MEASURING] / s["timing_s/update_actor"] for s in measured]
        figures["measuring passes, share of update_actor"] = Figure.of(shares, "ratio")
    if used := [s[MEMORY] for s in steps if MEMORY in s]:
        # All processes of the machine together; the README asks for 8 GB.
        figures["memory in use on the machine"] = Figure(max(used), "GiB", target=7)
    if errors := [s[STANDARD_ERROR] for s in steps if STANDARD_ERROR in s]:
        figures["standard error of a mini-batch's KL"] = Figure.of(errors, "nats per token", better="neither")
    if gaps := [s[RIGHT] - s[WRONG] for s in steps if {RIGHT, WRONG} <= s.keys()]:
        figures["scores, right minus wrong"] = Figure.of(gaps, "nats per token", better="neither")
    return figures


def learned(rows: list[dict], steps: list[dict], questions: int) -> dict[str, Figure]:
    """Compare the first with the last evaluation, and the first five steps with the last five."""
    evaluations = [levels for levels in map(pass_at_1, rows) if levels]
    if len(evaluations) < 2:
        return {}
    figures = {}
    for when, levels, near in (("before", evaluations[0], steps[:5]), ("after", evaluations[-1], steps[-5:])):
        count = questions / len(levels)
        for name, chosen in {"all levels": levels, **{f"level {n}": {n: p} for n, p in levels.items()}}.items():
            value, _ = overall(chosen, questions)
            # With two more right and two more wrong: 100 % right is not without noise.
            careful = {level: (p * count + 2) / (count + 4) for level, p in chosen.items()}
            _, error = overall(careful, count * len(chosen))
            low, high = (100 * min(max(value + side * TENTH * error, 0.0), 1.0) for side in (-1, 1))
            better = "higher" if when == "after" else "neither"
            figures[f"pass@1, {name}, {when}"] = Figure(100 * value, "%", low, high, better=better)
        for label, (metric, unit) in IN_TRAINING.items():
            if values := [s[metric] for s in near if metric in s]:
                figures[f"{label}, {when}"] = Figure(statistics.fmean(values), unit, better="neither")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="trainer.default_local_dir of a run")
    parser.add_argument("--name", default="quickstart", help="of the files in benchmarks/results")
    parser.add_argument("--seconds", type=float, help="of the whole training, as examples/quickstart.sh prints them")
    parser.add_argument("--skip", type=int, default=5, help="first steps to leave out of the times (warm-up)")
    parser.add_argument("--raw", action="store_true", help="keep what the figures are made from")
    args = parser.parse_args()
    rows = read_metrics(args.run)
    steps = [r for r in rows if "timing_s/step" in r]
    if len(steps) <= args.skip:
        raise SystemExit(f"{args.run}: no steps after the first {args.skip}")
    whole = {} if args.seconds is None else {"training, pre-training included": Figure(args.seconds, "s", target=240)}
    record(f"{args.name}_steps", whole | phases(steps[args.skip :]), {"steps": len(steps) - args.skip})
    settings = read_settings(args.run)
    questions = settings.get("arithmetic.test_size")
    if questions and (figures := learned(rows, steps, questions)):
        shown = ("trainer.total_training_steps", "data.train_batch_size", "actor_rollout_ref.rollout.n")
        record(args.name, figures, {"held-out questions": questions} | {name: settings.get(name) for name in shown})
    if args.raw:
        from study.collect import pack
        from study.collect import settings as plain_settings

        texts = {
            METRICS_FILE: (args.run / METRICS_FILE).read_text(),
            CONFIG_FILE: plain_settings(args.run, ROOT / "outputs/study"),
        }
        pack(ROOT / f"benchmarks/raw/{args.name}.tar.xz", {f"{args.run.name}/{n}": text for n, text in texts.items()})


if __name__ == "__main__":
    main()
