"""Build a task's folder once: data, and a model where the task has one of its own."""

import argparse
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock
from omegaconf import ListConfig, OmegaConf
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from verl_ext.command import parser_of
from verl_ext.runs.checkpoints import read_json
from verl_ext.tasks.arithmetic.model import build_model, build_tokenizer

STAMP = "assets.json"
DATA = ("train.parquet", "test.parquet")
MODEL = "model"
BUILT = {STAMP, MODEL, *DATA}


def build(folder: str | Path, task: str, stamp: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """Make the files of a task in ``folder``, unless they are already there with the same parameters.

    Everything is made beside the folder and renamed. A second process waits for the first.

    Args:
        folder: a setting ``TASK.folder``.
        task: its name in messages.
        stamp: the parameters, stored with the files; a folder with other keys is not the task's.
        make: writes the files, named as in ``BUILT``, to an empty folder.

    Raises:
        ValueError: ``folder`` holds files that were not made here.
    """
    # Check and replace the folder that a link points to, not the link.
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        built = read_stamp(folder, stamp)
        if built == stamp:
            return folder
        if built is None and folder.exists():
            refuse_foreign(folder, task)
        print(f"building the {task} task in {folder}", flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            partial = Path(beside, folder.name)
            partial.mkdir()
            make(partial)
            (partial / STAMP).write_text(json.dumps(stamp, sort_keys=True))
            if folder.exists():
                set_aside(folder, task, stamp)
            os.replace(partial, folder)
    return folder


def built_files(folder: str | Path, model: bool = True) -> list[str]:
    """Name what :func:`build` makes for a run: the data, and the model where the task has one."""
    return [f"{folder}/{name}" for name in (*DATA, *[MODEL] * model)]


def from_command_line(task: str, description: str | None, build_assets: Callable[..., Path]) -> None:
    """Call a task's ``build_assets`` with a flag per parameter, whose defaults are those of the task's YAML file."""
    parser = parser_of(f"verl_ext.tasks.{task}.assets", description)
    yaml = files("verl_ext") / f"config/task/{task}.yaml"
    for name, value in OmegaConf.create(yaml.read_text())[task].items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, ListConfig):
            parser.add_argument(flag, type=int, nargs="+", default=[*value])
        elif isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(flag, type=type(value), default=value)
    try:
        build_assets(**vars(parser.parse_args()))
    except ValueError as e:
        raise SystemExit(f"not built: {e}") from None


def require_whole(task: str, least: int, **values: object) -> None:
    """Raise ValueError unless these parameters of a task are whole numbers, at least ``least``."""
    for name, value in values.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{task}.{name}={value} must be a whole number, at least {least}")


def save_rows(folder: Path, split: str, rows: list[dict]) -> None:
    """Write a split, in verl's RL schema."""
    pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")


def save_pretrained(folder: Path, seed: int, train: Callable[[Qwen3ForCausalLM, PreTrainedTokenizerFast], Any]) -> None:
    """Build the toy model, train it, and write it to ``folder``."""
    threads = torch.get_num_threads()
    # More threads wait for each other at operations of this size: on a busy machine ten times as long.
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    train(model, tokenizer)
    torch.set_num_threads(threads)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def read_stamp(folder: Path, like: dict[str, Any]) -> dict | None:
    """Read the parameters that ``folder`` was built with; None if it was not built by the task of ``like``."""
    try:
        stamp = read_json(folder / STAMP)
    except ValueError:
        return None
    # A user's file may have the same name.
    return stamp if stamp.keys() == like.keys() else None


def refuse_foreign(folder: Path, task: str) -> None:
    """Raise ValueError if ``folder`` is a file, or holds files that were not built here."""
    if not folder.is_dir():
        raise ValueError(f"{task}.folder={folder} is a file; give a new or empty folder")
    if held := sorted(f.name for f in folder.iterdir()):
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        raise ValueError(
            f"{task}.folder={folder} holds {', '.join(held[:3])}{more}, not the {task} task; building would "
            "remove that, so give a new or empty folder"
        )


def set_aside(folder: Path, task: str, like: dict[str, Any]) -> None:
    """Remove a folder that was built here; rename it if it holds other files too."""
    if read_stamp(folder, like) is None:
        # Files may have been added while the model was trained.
        refuse_foreign(folder, task)
    if {f.name for f in folder.iterdir()} <= BUILT:
        shutil.rmtree(folder)
        return
    old = next(o for n in itertools.count(1) if not (o := folder.with_name(f"{folder.name}.old{n}")).exists())
    print(f"{folder} holds other files too: renamed to {old}", flush=True)
    os.replace(folder, old)
