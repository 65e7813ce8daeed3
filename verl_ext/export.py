"""A checkpoint as a Hugging Face folder, with a model card that tells how it was made.

    python -m verl_ext.export RUN_DIR [--step N] [--out DIR]

RUN_DIR is ``trainer.default_local_dir`` of a run. Without ``--step``, the checkpoint with the best pass@1 is taken, or
the last. verl's model merger does the work, in bfloat16. The card is filled from ``config.yaml`` and ``metrics.jsonl``.
"""

import argparse
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from verl_ext.report.read import read_run
from verl_ext.runs import CONFIG_FILE, flatten

SHOWN = (
    "actor_rollout_ref.model.path",
    "data.train_files",
    "data.train_batch_size",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.temperature",
    "data.max_prompt_length",
    "data.max_response_length",
    "actor_rollout_ref.actor.optim.lr",
    "actor_rollout_ref.actor.strategy",
    "seed",
)
"""Settings that the card shows, besides the method's own."""


class ExportError(Exception):
    """What cannot be exported, and why."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="trainer.default_local_dir of a run")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the best, else the last")
    parser.add_argument("--out", type=Path, help="default: RUN_DIR/export/global_step_N")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code, as in training")
    args = parser.parse_args(arguments)
    try:
        out = export(args.run, args.step, args.out, args.trust_remote_code)
    except ExportError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(f"exported to {out}")
    return 0


def export(run: Path, step: int | None, out: Path | None, trust_remote_code: bool = False) -> Path:
    """Merge a checkpoint's weights into ``out`` and write its model card; returns ``out``.

    Raises:
        ExportError: there is no such run or checkpoint, ``out`` is in use, or the merger failed.
    """
    try:
        found = read_run(run)
    except ValueError as e:
        raise ExportError(e) from None
    settings = found.settings if found else flatten(OmegaConf.load(run / CONFIG_FILE))
    evaluations = found.pass_at.get(1, pd.DataFrame()) if found else pd.DataFrame()
    steps = sorted(int(p.name.rpartition("_")[2]) for p in run.glob("global_step_*") if (p / "actor").is_dir())
    if not steps:
        raise ExportError(f"{run} has no checkpoint; train with trainer.save_freq > 0")
    if step is None:
        step = best_step(evaluations, steps)
    if step not in steps:
        raise ExportError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    out = out or run / "export" / f"global_step_{step}"
    if out.exists() and any(out.iterdir()):
        raise ExportError(f"{out} is not empty; choose another --out, or remove it")

    backend = "megatron" if settings["actor_rollout_ref.actor.strategy"] == "megatron" else "fsdp"
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", backend]
    command += ["--local_dir", str(run / f"global_step_{step}" / "actor"), "--target_dir", str(out)]
    if trust_remote_code:
        command.append("--trust-remote-code")
    merged = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if merged.returncode or not any(out.glob("*.safetensors")):
        raise ExportError(f"verl's model merger failed ({' '.join(command)}):\n{merged.stdout[-3000:]}")
    (out / "README.md").write_text(model_card(settings, evaluations, step))
    return out


def best_step(evaluations: pd.DataFrame, steps: list[int]) -> int:
    """The checkpoint of ``steps`` with the highest mean pass@1 over benchmarks; the last where none was evaluated.

    Args:
        evaluations: pass@1, a row a step, a column a benchmark.
    """
    mean = evaluations.mean(axis=1)
    evaluated = [step for step in steps if step in mean.index]
    return max(evaluated, key=lambda step: (mean[step], step)) if evaluated else steps[-1]


def model_card(settings: dict[str, Any], evaluations: pd.DataFrame, step: int) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
        settings: of the run, by full name.
        evaluations: as for :func:`best_step`.
        step: of the checkpoint.
    """
    base = str(settings["actor_rollout_ref.model.path"])
    algorithm = settings.get("verl_ext.algorithm", "ppo")
    shown = {name: settings[name] for name in SHOWN if name in settings}
    shown |= {n: v for n, v in settings.items() if n.startswith(f"{algorithm}.") and not n.endswith("_target_")}
    lines = ["---", f"base_model: {base}", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tags: [reinforcement-learning, verl, verl-disco, " + algorithm + "]", "---", ""]
    lines += [f"# {Path(base).name}, trained by {algorithm}", ""]
    lines += [f"`{base}` after {step} steps of reinforcement learning with the method `{algorithm}`, by", ""]
    lines += ["    python -m verl.trainer.main_ppo algorithm=" + algorithm + " ...", ""]
    lines += [f"with verl {version('verl')} and verl-disco {version('verl-disco')}.", ""]
    if step in evaluations.index:
        lines += ["## pass@1 on held-out questions, in percent", ""]
        lines += [f"| benchmark | before | step {step} |", "|---|---|---|"]
        for benchmark in evaluations:
            before = f"{100 * evaluations.at[0, benchmark]:.1f}" if 0 in evaluations.index else ""
            lines.append(f"| {benchmark} | {before} | {100 * evaluations.at[step, benchmark]:.1f} |")
        lines.append("")
    lines += ["## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in shown.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
