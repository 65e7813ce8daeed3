"""Choose the checkpoint that a run resumes from, and remove old ones.

verl removes old checkpoints before its tracker file names the new one, so a kill in between leaves a tracker without
its checkpoint; and verl knows only the checkpoints that its own process wrote. Here old ones are removed last, and
found in the run's folder.
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
"""verl's state of the data loader."""

WITH_A_CHECKPOINT = (DATA_FILE, ROW_FILE, "transfer_queue")
"""Files and folders beside the weights that are removed with them."""

STATES = {"optimizer": "optim", "extra": "extra_state"}
"""Entry of ``checkpoint.load_contents`` -> prefix of its files, as verl's FSDP engine names them."""


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / f"global_step_{step}"


def checkpoint_steps(run: Path) -> list[int]:
    """List the steps with a checkpoint folder, whole or not."""
    folders = run.iterdir() if run.is_dir() else ()
    return sorted(int(match[1]) for folder in folders if (match := STEP_FOLDER.fullmatch(folder.name)))


def resume_fault(role: Path, *, megatron: bool, contents: Collection[str]) -> str:
    """Say why a run cannot resume from a checkpoint's folder ``actor`` or ``critic``; empty if it can.

    Args:
        role: the folder.
        megatron: whether verl's Megatron engine wrote it, not its FSDP engine.
        contents: what will be loaded, as in ``checkpoint.load_contents``.
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
    """Point verl's tracker to the newest whole checkpoint if the one it names is missing or broken, with a warning.

    Args:
        run: the run's folder.
        roles: folders of a checkpoint that will be loaded: actor, and critic if the method has one.
        megatron, contents: as in :func:`resume_fault`.

    Raises:
        ValueError: the tracker names no existing checkpoint, and no checkpoint is whole.
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
                f"verl-disco: warning: starting from step 0, because {run} has no {CHECKPOINT_FILE}, although it holds "
                f"checkpoints up to step {whole[-1]}; to resume from one, write its step into that file",
                flush=True,
            )
        return
    text = tracker.read_text(errors="replace").strip()
    named = int(text) if STEP_FOLDER.fullmatch(f"global_step_{text}") else None
    if named is None:
        problem = f"{tracker} holds {text[:20]!r}, which is not a step"
    elif not step_folder(run, named).exists():
        problem = f"{tracker} names step {named}, whose checkpoint is missing"
    elif found := fault(named):
        problem = f"{tracker} names step {named}, whose checkpoint is broken ({found})"
    else:
        return
    # Without data.pt the run would start again with the first questions.
    whole = sorted((s for s in checkpoint_steps(run) if not fault(s)), key=lambda step: (has_data(step), step))
    if whole:
        write_whole(tracker, str(whole[-1]).encode())
        more = "" if has_data(whole[-1]) else f"; it has no {DATA_FILE}, so the data starts from the first question"
        print(f"verl-disco: warning: {problem}; resuming from the newest whole one, step {whole[-1]}{more}", flush=True)
    elif named is not None and step_folder(run, named).exists():
        # The missing shards may be on the local disks of other nodes.
        print(f"verl-disco: warning: {problem} on this node, and none is whole; verl will try to load it", flush=True)
    else:
        raise ValueError(
            f"{problem}, and {run} holds no whole one; to start from step 0, remove {CHECKPOINT_FILE}, or choose "
            "another trainer.default_local_dir"
        )


def remove_old_checkpoints(run: Path, step: int, keep: Mapping[str, int | None]) -> list[int]:
    """Remove all but the newest checkpoints up to ``step``, including those that an earlier process wrote.

    Later ones stay: the run was set back to an earlier step and will overwrite them.

    Args:
        run: the run's folder.
        step: step of the checkpoint just written.
        keep: how many to keep, by folder (``actor``, ``critic``); None or 0 keeps all.

    Returns:
        The steps with a removed folder.
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
            # Fails, as it should, if the folder holds anything else.
            with suppress(OSError):
                folder.rmdir()
    return sorted(removed)
