"""Export a checkpoint as a Hugging Face folder with a model card.

    python -m verl_ext.export RUN_DIR [--step N] [--out DIR] [--dtype TYPE] [--push REPO [--dry-run] [--public]]

RUN_DIR is ``trainer.default_local_dir`` of a run. Without ``--step``, the whole checkpoint with the best pass@1 is
exported, or the last one. A LoRA adapter is merged into the weights. The export is compared with the checkpoint and the
base model, and described in a card from these figures, ``config.yaml`` and ``metrics.jsonl``.

Nothing leaves this machine without ``--push``: it uploads weights, tokenizer and card, and nothing else of the folder,
to a private repository on the Hugging Face hub. ``--dry-run`` shows what would go up and does not connect. A model that
is in the folder from before, by a dry run for one, is pushed as it is.
"""

import logging
import os
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from verl_ext.command import parser_of
from verl_ext.export.model import export_model
from verl_ext.export.push import describe, is_hub_name, plan, push
from verl_ext.report.read import one_line as printable
from verl_ext.report.read import read_run
from verl_ext.runs.checkpoints import DTYPES, Checkpoint, ExportError, find_checkpoints, one_line, read_json
from verl_ext.runs.folder import CHECKPOINT_FILE, CONFIG_FILE, read_settings

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
"""Settings on the card, besides the method's own settings."""


FOLDERS = re.compile(r"(?<![\w.:/])~?/(?:[^/\s'\",\]]+/)+")
"""Of an absolute path: they name a user and a machine, and are nobody else's business."""

STEPS = "steps of reinforcement learning"
"""On the card, behind their number."""


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("verl_ext.export", __doc__)
    parser.add_argument("run", type=Path, help="trainer.default_local_dir of a run")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the best, else the last")
    parser.add_argument("--out", type=Path, help="default: RUN_DIR/export/global_step_N")
    parser.add_argument(
        "--dtype", choices=["checkpoint", *DTYPES], default="checkpoint", help="of the weights; default: checkpoint"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code, as in training")
    parser.add_argument("--push", metavar="REPO", help="upload to this repository on the Hugging Face hub")
    parser.add_argument("--public", action="store_true", help="make the repository public; default: private")
    parser.add_argument("--dry-run", action="store_true", help="show what --push would upload, and do not connect")
    args = parser.parse_args(arguments)
    if not args.push and (args.public or args.dry_run):
        parser.error("--public and --dry-run belong to --push REPO")
    if args.push and not is_hub_name(args.push):
        parser.error(f"--push {args.push} is no name of a repository; give USER/NAME")
    # torch warns at each tensor of a shard that there is no process group.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    try:
        out = export(args.run, args.step, args.out, args.trust_remote_code, args.dtype, reuse=bool(args.push))
        print(f"exported to {out}")
        if args.push:
            chosen = plan(out)
            print(describe(out, args.push, not args.public, chosen))
            if args.dry_run:
                print("dry run: nothing was sent")
            else:
                print(f"pushed: {push(out, args.push, not args.public, chosen)}")
    except ExportError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def export(
    run: Path,
    step: int | None,
    out: Path | None,
    trust_remote_code: bool = False,
    dtype: str = "checkpoint",
    reuse: bool = False,
) -> Path:
    """Write a checkpoint's model into ``out``, check it, write its card, and return ``out``.

    The model is in ``OUT.unfinished`` until it is checked, and removed if the check fails. With ``reuse``, a model of
    the same step and type that ``out`` holds already is left as it is.

    Raises:
        ExportError: there is no such run or whole checkpoint, ``out`` cannot be used, or the export differs from the
            trained model.
    """
    try:
        found = read_run(run)
        settings = found.settings if found else read_settings(run)
    except ValueError as e:
        raise ExportError(e) from None
    for name in ("actor_rollout_ref.model.path", "actor_rollout_ref.actor.strategy"):
        if not isinstance(settings.get(name), str):
            raise ExportError(f"{run / CONFIG_FILE} has {name}={settings.get(name)}, which must be a text")
    for fault in found.faults if found else ():
        print(f"note: {fault}", file=sys.stderr)
    evaluations = found.pass_at_1 if found else pd.DataFrame()
    try:
        checkpoint = choose(run, settings["actor_rollout_ref.actor.strategy"] == "megatron", evaluations, step)
        out = (out or run / "export" / f"global_step_{checkpoint.step}").resolve()
    except (OSError, RuntimeError) as e:  # no right to read, a loop of links
        raise ExportError(f"a folder cannot be read: {one_line(e)}") from None
    if out.is_relative_to(checkpoint.folder.parent.resolve()):
        raise ExportError(f"--out={out} is inside a checkpoint, which verl may delete; choose another folder")
    if reuse and is_export(out, model_card(settings, evaluations, checkpoint.step, []), dtype):
        return out
    unfinished = out.with_name(out.name + ".unfinished")
    make_folder(out, unfinished)
    try:
        told = export_model(checkpoint, unfinished, settings, DTYPES.get(dtype), trust_remote_code)
        (unfinished / "README.md").write_text(model_card(settings, evaluations, checkpoint.step, told))
        os.replace(unfinished, out)
    except ExportError:
        raise
    except Exception as e:  # transformers, tokenizers, peft and safetensors each raise their own
        raise ExportError(f"{checkpoint.folder} cannot be exported: {type(e).__name__}: {one_line(e)}") from e
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"step {checkpoint.step}", *told, sep="\n")
    return out


def choose(run: Path, megatron: bool, evaluations: pd.DataFrame, step: int | None) -> Checkpoint:
    """Choose the checkpoint of ``step``, or the best whole one; report those that are not whole on stderr.

    Args:
        megatron: the run's engine is Megatron.
        evaluations: see :func:`best_step`.

    Raises:
        ExportError: there is no whole checkpoint, or none of that step.
    """
    checkpoints = {c.step: c for c in find_checkpoints(run, megatron)}
    if not checkpoints:
        raise ExportError(f"{run} has no checkpoint; train with trainer.save_freq > 0")
    known = ", ".join(map(str, checkpoints))
    if step is not None:
        if step not in checkpoints:
            raise ExportError(f"{run} has no checkpoint of step {step}; it has {known}")
        if fault := checkpoints[step].fault:
            raise ExportError(f"the checkpoint of step {step} is not whole: {fault} in {checkpoints[step].folder}")
        return checkpoints[step]
    whole = [c.step for c in checkpoints.values() if not c.fault]
    faults = [f"step {c.step}: {c.fault}" for c in checkpoints.values() if c.fault]
    if not whole:
        raise ExportError(f"{run} has no whole checkpoint ({'; '.join(faults)})")
    for fault in faults:
        print(f"note: left out as not whole: {fault}", file=sys.stderr)
    tracker = run / CHECKPOINT_FILE
    latest = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    if latest and latest not in map(str, whole):
        print(f"note: {tracker} names step {latest[:20]}, which has no whole checkpoint", file=sys.stderr)
    return checkpoints[best_step(evaluations, whole)]


def is_export(out: Path, card: str, dtype: str) -> bool:
    """Tell whether ``out`` holds a finished export with weights of this type (``checkpoint``: any).

    Its card, which may have been edited, must still name the method, step, figures and settings of ``card``: those of
    another run are another model.
    """
    try:
        found, config = (out / "README.md").read_text(), read_json(out / "config.json")
    except (OSError, ValueError):
        return False
    naming = {line for line in card.splitlines() if STEPS in line or line.startswith("| ")}
    kept = naming <= set(found.splitlines())
    return kept and dtype in ("checkpoint", config.get("dtype") or config.get("torch_dtype"))


def make_folder(out: Path, unfinished: Path) -> None:
    """Make the folder ``unfinished``, if ``out`` is free for it.

    Raises:
        ExportError: ``out`` or ``unfinished`` is in use, or the folder cannot be made.
    """
    try:
        if out.exists() and not out.is_dir():
            raise ExportError(f"--out={out} is a file; give a new folder")
        if out.exists() and any(out.iterdir()):
            raise ExportError(f"{out} is not empty; choose another --out, or remove it")
        if unfinished.exists():
            raise ExportError(f"{unfinished} belongs to a running or aborted export; remove it if none is running")
        unfinished.mkdir(parents=True)
    except OSError as e:
        raise ExportError(f"--out={out} cannot be written: {e.strerror} ({e.filename})") from None


def best_step(evaluations: pd.DataFrame, steps: list[int]) -> int:
    """Choose the step with the highest mean pass@1 over benchmarks, or the last one if none was evaluated.

    Args:
        evaluations: pass@1, one row per step, one column per benchmark.
        steps: the steps of the whole checkpoints, in order.
    """
    # A mean over fewer benchmarks is not comparable.
    mean = evaluations.dropna().mean(axis=1)
    evaluated = [step for step in steps if step in mean.index]
    return max(evaluated, key=lambda step: (mean[step], step)) if evaluated else steps[-1]


def after_steps(step: int) -> str:
    return f"after {step} {STEPS}"


def without_folders(value: Any) -> Any:
    """Leave out the folders of absolute paths, those with spaces too where a path is all of a value."""
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    if not isinstance(value, str):
        return value
    whole = re.fullmatch(r"~?/.*?([^/]*)/*", value, re.DOTALL)
    return f".../{whole[1]}" if whole else FOLDERS.sub(".../", value)


def cell(value: Any) -> str:
    """Write a value as a cell of a Markdown table."""
    return printable(without_folders(value)).replace("|", "\\|")


def model_card(settings: dict[str, Any], evaluations: pd.DataFrame, step: int, weights: list[str]) -> str:
    """Write the card in Markdown, with front matter for the hub.

    Args:
        settings: the run's settings by full name.
        evaluations: see :func:`best_step`.
        weights: sentences on the exported weights, see :func:`~verl_ext.export.model.export_model`.
    """
    base = str(settings["actor_rollout_ref.model.path"])
    told_base = printable(without_folders(base))
    algorithm = printable(settings.get("verl_ext.algorithm", "ppo"))
    shown = {name: settings[name] for name in SHOWN if name in settings}
    shown |= {n: v for n, v in settings.items() if n.startswith(f"{algorithm}.") and not n.endswith("_target_")}
    # The hub takes names on it alone.
    facts: dict[str, Any] = {"base_model": base} if is_hub_name(base) else {}
    facts |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    facts["tags"] = ["reinforcement-learning", "verl", "verl-disco", algorithm]
    lines = ["---", yaml.safe_dump(facts, sort_keys=False, allow_unicode=True) + "---", ""]
    lines += [f"# {Path(told_base).name}, trained by {algorithm}", ""]
    lines += [f"`{told_base}` {after_steps(step)} with the method `{algorithm}`, by", ""]
    lines += ["    python -m verl.trainer.main_ppo algorithm=" + algorithm + " ...", ""]
    lines += [f"with verl {version('verl')} and verl-disco {version('verl-disco')}.", ""]
    if step in evaluations.index:
        lines += ["## pass@1 on held-out questions, in percent", ""]
        lines += [f"| benchmark | before | step {step} |", "|---|---|---|"]
        scores = evaluations.reindex([0, step]).mul(100).round(1)
        for benchmark in scores.columns[scores.loc[step].notna()]:
            before, after = ("" if pd.isna(score) else f"{score:.1f}" for score in scores[benchmark])
            lines.append(f"| {cell(benchmark)} | {before} | {after} |")
        lines.append("")
    # The sentences name the base model, by a path that may have spaces.
    weights = [sentence.replace(f"`{base}`", f"`{told_base}`") for sentence in weights]
    lines += ["## Weights", "", *(f"- {FOLDERS.sub('.../', sentence)}" for sentence in weights), ""]
    lines += ["## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | {cell(value)} |" for name, value in shown.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
