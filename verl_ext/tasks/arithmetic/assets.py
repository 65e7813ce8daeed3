"""Build the files of the arithmetic task, once: a pre-trained small model, training and held-out questions.

    python -m verl_ext.tasks.arithmetic.assets [--folder DIR] [--iterations N] [--seed N] ...

``+task=arithmetic`` calls :func:`ensure_assets` before Ray starts. Its YAML file has the defaults.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from verl_ext.tasks.arithmetic.model import build_model, build_tokenizer
from verl_ext.tasks.arithmetic.pretrain import pretrain
from verl_ext.tasks.arithmetic.task import LEVELS, Question, draw_many

STAMP = "assets.json"
BUILT = {STAMP, "model", "train.parquet", "test.parquet"}
VERSION = 7
"""Increase it when the same parameters build different files."""


def to_row(question: Question, index: int, split: str) -> dict:
    """Make a row in verl's RL schema; the data source has the level, so that verl reports pass@1 per level."""
    return {
        "data_source": f"level_{question.level}",
        "prompt": [{"role": "user", "content": question.text}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": question.answer},
        "extra_info": {"index": index, "split": split, "level": question.level},
    }


def draw_splits(train_size: int, test_size: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Draw training and held-out questions, equally many per level; held-out questions are distinct and not trained on.

    Level 1 has 126 questions in all, so ``test_size`` should be well below 6 * 126.
    """
    rng = random.Random(seed)
    test: dict[str, Question] = {}
    while len(test) < test_size:
        (question,) = draw_many(rng, [LEVELS[len(test) % len(LEVELS)]], exclude=test)
        test[question.text] = question
    train = list(draw_many(rng, [LEVELS[i % len(LEVELS)] for i in range(train_size)], exclude=test))
    rng.shuffle(train)
    return train, list(test.values())


def build_assets(folder: str | Path, *, iterations: int, train_size: int, test_size: int, seed: int) -> Path:
    """Build model and data in ``folder``, unless they are already there with the same parameters.

    Everything is built beside the folder and renamed. A second process waits for the first.

    Raises:
        ValueError: ``folder`` holds files that were not built here.
    """
    # Check and replace the folder that a link points to, not the link.
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    stamp = dict(
        version=VERSION, iterations=iterations, train_size=train_size, test_size=test_size, seed=seed, levels=[*LEVELS]
    )
    with FileLock(f"{folder}.lock"):
        built = read_stamp(folder)
        if built == stamp:
            return folder
        if built is None and folder.exists():
            refuse_foreign(folder)
        print(f"building the arithmetic task in {folder}", flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            partial = Path(beside, folder.name)
            partial.mkdir()
            train, test = draw_splits(train_size, test_size, seed)
            for split, questions in (("train", train), ("test", test)):
                rows = [to_row(q, i, split) for i, q in enumerate(questions)]
                pd.DataFrame(rows).to_parquet(partial / f"{split}.parquet")
            threads = torch.get_num_threads()
            # More threads wait for each other at operations of this size: on a busy machine ten times as long.
            torch.set_num_threads(1)
            tokenizer = build_tokenizer()
            model = build_model(tokenizer, seed)
            pretrain(model, tokenizer, iterations, seed, exclude={q.text for q in test})
            torch.set_num_threads(threads)
            tokenizer.save_pretrained(partial / "model")
            model.save_pretrained(partial / "model")
            (partial / STAMP).write_text(json.dumps(stamp, sort_keys=True))
            if folder.exists():
                set_aside(folder)
            os.replace(partial, folder)
    return folder


def read_stamp(folder: Path) -> dict | None:
    """Read the parameters that ``folder`` was built with; None if it was not built here."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return None
    # A user's file may have the same name.
    return stamp if isinstance(stamp, dict) and {"version", "iterations", "levels"} <= stamp.keys() else None


def refuse_foreign(folder: Path) -> None:
    """Raise ValueError if ``folder`` is a file, or holds files that were not built here."""
    if not folder.is_dir():
        raise ValueError(f"arithmetic.folder={folder} is a file; give a new or empty folder")
    if held := sorted(f.name for f in folder.iterdir()):
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        raise ValueError(
            f"arithmetic.folder={folder} holds {', '.join(held[:3])}{more}, not the arithmetic task; building would "
            "remove that, so give a new or empty folder"
        )


def set_aside(folder: Path) -> None:
    """Remove a folder that was built here; rename it if it holds other files too."""
    if read_stamp(folder) is None:
        # Files may have been added while the model was trained.
        refuse_foreign(folder)
    if {f.name for f in folder.iterdir()} <= BUILT:
        shutil.rmtree(folder)
        return
    old = next(o for n in itertools.count(1) if not (o := folder.with_name(f"{folder.name}.old{n}")).exists())
    print(f"{folder} holds other files too: renamed to {old}", flush=True)
    os.replace(folder, old)


def ensure_assets(config: DictConfig) -> None:
    """Build the files that ``config.arithmetic`` describes (``verl_ext.prepare`` of the task)."""
    a = config.arithmetic
    build_assets(a.folder, iterations=a.iterations, train_size=a.train_size, test_size=a.test_size, seed=a.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = files("verl_ext") / "config/task/arithmetic.yaml"
    for name, value in OmegaConf.create(task.read_text()).arithmetic.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    try:
        build_assets(**vars(parser.parse_args()))
    except ValueError as e:
        raise SystemExit(f"not built: {e}") from None


if __name__ == "__main__":
    main()
