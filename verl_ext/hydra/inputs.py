"""Remember a run's data files by their digests: a run that resumes on changed data would train on other questions."""

import hashlib
import json
import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_ext.hydra.identity import holds_run
from verl_ext.runs.checkpoints import read_json
from verl_ext.runs.files import write_whole
from verl_ext.runs.folder import INPUTS_FILE

SPLITS = ("train", "val")


def digests(config: DictConfig) -> dict[str, list[str]]:
    """Compute the SHA-256 of each local data file, by split, in their order; files that are not there are left out."""
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        names = OmegaConf.select(config, f"data.{split}_files") or []
        paths = [os.path.expanduser(str(name)) for name in ([names] if isinstance(names, str) else names)]
        found[split] = [_digest(path) for path in paths if os.path.isfile(path)]
    return found


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def check_data(config: DictConfig, folder: Path) -> dict[str, list[str]]:
    """Compare the data files with those that the run in ``folder`` began with; changed test data is only told.

    Files that were moved are the same files.

    Returns:
        The digests to remember for the next start.

    Raises:
        ValueError: the training data has changed.
    """
    now = digests(config)
    if not (holds_run(folder) and (folder / INPUTS_FILE).exists()) or OmegaConf.select(config, "verl_ext.same_run"):
        return now
    try:
        before = read_json(folder / INPUTS_FILE)
    except ValueError as e:
        print(f"verl-disco: warning: {folder}: {e}; the data cannot be compared with the run's", flush=True)
        return now
    for split in SPLITS:
        earlier = before.get(split)
        if not (now[split] and earlier):
            # Nothing to compare: a file is named elsewhere, or built when the run starts.
            now[split] = now[split] or earlier or []
            continue
        if earlier == now[split]:
            continue
        names = OmegaConf.select(config, f"data.{split}_files")
        found = f"data.{split}_files={names} changed since the run in {folder} began"
        if split == "train":
            if not OmegaConf.select(config, "trainer.val_only"):
                raise ValueError(
                    f"{found}, which would go on with other questions; restore the data, choose another "
                    "trainer.default_local_dir, or go on with ++verl_ext.same_run=true"
                )
            # An evaluation does not read it. Training will ask for the old data again.
            now[split] = earlier
        print(f"verl-disco: warning: {found}", flush=True)
    return now


def save_data(found: dict[str, list[str]], folder: Path) -> None:
    """Save the digests of the data files that the run in ``folder`` starts or goes on with."""
    write_whole(folder / INPUTS_FILE, json.dumps(found, indent=1).encode())
