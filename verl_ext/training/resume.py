"""Which checkpoint a run resumes from, and which ones it keeps.

verl removes old checkpoints before its tracker names the new one, so that a kill in between leaves a tracker without a
checkpoint; and it knows only those that its own process wrote. Here the order is the other way round, and the folder is
what counts.
"""

import shutil
import zipfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from verl_ext.runs.checkpoints import STEP_FOLDER, fsdp_fault, megatron_fault, shard_files
from verl_ext.runs.files import write_whole
from verl_ext.runs.folder import CHECKPOINT_FILE
from verl_ext.training.metrics_log import ROW_FILE

DATA_FILE = "data.pt"
"""verl's: how far the questions are read."""

WITH_A_CHECKPOINT = (DATA_FILE, ROW_FILE, "transfer_queue")
"""What lies beside the weights and goes with them."""

STATES = {"optimizer": "optim", "extra": "extra_state"}
"""How verl's FSDP engine names the files of what ``checkpoint.load_contents`` lists, besides the model's."""


def step_folder(run: Path, step: int) -> Path:
    """Name the folder of a step's checkpoint."""
    return run / f"global_step_{step}"


def checkpoint_steps(run: Path) -> list[int]:
    """List the steps with a checkpoint's folder, whole or not."""
    folders = run.iterdir() if run.is_dir() else ()
    return sorted(int(match[1]) for folder in folders if (match := STEP_FOLDER.fullmatch(folder.name)))


def resume_fault(role: Path, *, megatron: bool, contents: Collection[str]) -> str:
    """Tell why a run cannot go on from the folder ``actor`` or ``critic`` of a checkpoint; empty if it can.

    Args:
        role: the folder.
        megatron: whether verl's Megatron engine wrote it, not its FSDP engine.
        contents: what is loaded, as in ``checkpoint.load_contents``.
    """
    if not role.is_dir():
        return f"{role.name}/ is missing"
    if fault := megatron_fault(role) if megatron else fsdp_fault(role):
        return f"{role.name}: {fault}"
    for shard in [] if megatron else shard_files(role):
        for content in STATES.keys() & set(contents):
            file = shard.with_name(shard.name.replace("model", STATES[content], 1))
            if not file.is_file():
                return f"{role.name}: {file.name} is missing"
            if not zipfile.is_zipfile(file):
                return f"{role.name}: {file.name} is cut off"
    return ""


def name_whole_checkpoint(run: Path, roles: Collection[str], *, megatron: bool, contents: Collection[str]) -> None:
    """Let verl's tracker name the newest whole checkpoint where the one it names is gone or broken, and say so.

    Args:
        run: the run's folder.
        roles: folders of a checkpoint that are loaded: actor, and critic where there is one.
        megatron, contents: as in :func:`resume_fault`.

    Raises:
        ValueError: the tracker names no checkpoint that is there, and no other one is whole.
    """
    tracker = run / CHECKPOINT_FILE

    def fault(step: int) -> str:
        faults = (resume_fault(step_folder(run, step) / role, megatron=megatron, contents=contents) for role in roles)
        return next(filter(None, faults), "")

    def has_data(step: int) -> bool:
        return (step_folder(run, step) / DATA_FILE).is_file()

    if not tracker.exists():
        if whole := [step for step in checkpoint_steps(run) if not fault(step)]:
            print(
                f"verl-disco: warning: {run} holds checkpoints up to step {whole[-1]}, but no {CHECKPOINT_FILE}: the "
                "run starts anew; to resume one, write its step into that file",
                flush=True,
            )
        return
    text = tracker.read_text(errors="replace").strip()
    named = int(text) if STEP_FOLDER.fullmatch(f"global_step_{text}") else None
    if named is None:
        problem = f"{tracker} holds {text[:20]!r}, which is no step"
    elif not step_folder(run, named).exists():
        problem = f"{tracker} names step {named}, whose checkpoint is gone"
    elif found := fault(named):
        problem = f"{tracker} names step {named}, whose checkpoint is not whole ({found})"
    else:
        return
    # Without verl's state of the data loader the run would start again with the first questions.
    whole = sorted((s for s in checkpoint_steps(run) if not fault(s)), key=lambda step: (has_data(step), step))
    if whole:
        write_whole(tracker, str(whole[-1]).encode())
        more = "" if has_data(whole[-1]) else f"; it has no {DATA_FILE}, so the questions start anew"
        print(f"verl-disco: warning: {problem}: resumed from the newest whole one, step {whole[-1]}{more}", flush=True)
    elif named is not None and step_folder(run, named).exists():
        # Other nodes may have disks of their own, with the shards that are missing here.
        print(f"verl-disco: warning: {problem} on this node, and no other one is; verl will try it", flush=True)
    else:
        raise ValueError(
            f"{problem}, and {run} holds no other whole one; remove {CHECKPOINT_FILE} to start anew there, or choose "
            "another trainer.default_local_dir"
        )


def remove_old_checkpoints(run: Path, step: int, keep: Mapping[str, int | None]) -> list[int]:
    """Remove all but the newest checkpoints up to ``step``, also those that an earlier process wrote.

    Later ones belong to a run that was set back, and stay until this one gets there.

    Args:
        run: the run's folder.
        step: the one just written.
        keep: how many to keep, by folder (``actor``, ``critic``); None or 0 keeps all.

    Returns:
        The steps of which something was removed.
    """
    removed = set()
    for role, number in keep.items():
        steps = [s for s in checkpoint_steps(run) if s <= step and (step_folder(run, s) / role).is_dir()]
        for s in steps[:-number] if number and number > 0 else []:
            shutil.rmtree(step_folder(run, s) / role, ignore_errors=True)
            removed.add(s)
    for s in removed:
        folder = step_folder(run, s)
        if not any((folder / role).is_dir() for role in keep):
            for name in WITH_A_CHECKPOINT:
                shutil.rmtree(folder / name, ignore_errors=True)
                with suppress(OSError):
                    (folder / name).unlink(missing_ok=True)
            # Not where there is something else in it.
            with suppress(OSError):
                folder.rmdir()
    return sorted(removed)
