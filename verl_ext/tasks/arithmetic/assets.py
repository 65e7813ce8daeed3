"""Builds what the arithmetic run needs, once: a pre-trained small model, training and held-out questions.

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
VERSION = 6
"""Raise it when the same parameters build something else."""


def to_row(question: Question, index: int, split: str) -> dict:
    """One row in verl's RL schema; the level is in the data source, so that verl reports pass@1 by level."""
    return {
        "data_source": f"level_{question.level}",
        "prompt": [{"role": "user", "content": question.text}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": question.answer},
        "extra_info": {"index": index, "split": split, "level": question.level},
    }


def draw_splits(train_size: int, test_size: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions, all levels alike, without a question in both or twice held out.

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
    """Build model and data in ``folder``, unless it holds them already, made with the same parameters.

    Whole or not at all: everything is made beside it and renamed. Whoever comes second waits and finds it done.

    Raises:
        ValueError: ``folder`` holds what was not built here.
    """
    # Where a link leads, so that the folder there is judged and replaced, not the link.
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        return _build_assets(folder, iterations, train_size, test_size, seed)


def _build_assets(folder: Path, iterations: int, train_size: int, test_size: int, seed: int) -> Path:
    parameters = dict(
        version=VERSION, iterations=iterations, train_size=train_size, test_size=test_size, seed=seed, levels=LEVELS
    )
    built = read_stamp(folder)
    if built == json.loads(json.dumps(parameters)):
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
        torch.set_num_threads(min(2, os.cpu_count() or 1))
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, seed)
        pretrain(model, tokenizer, iterations, seed, exclude={q.text for q in test})
        torch.set_num_threads(threads)
        tokenizer.save_pretrained(partial / "model")
        model.save_pretrained(partial / "model")
        (partial / STAMP).write_text(json.dumps(parameters, sort_keys=True))
        if folder.exists():
            set_aside(folder)
        os.replace(partial, folder)
    return folder


def read_stamp(folder: Path) -> dict | None:
    """With which parameters ``folder`` was built; None where it was not built here."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return None
    # A user's file may have that name, too.
    return stamp if isinstance(stamp, dict) and {"version", "iterations", "levels"} <= stamp.keys() else None


def refuse_foreign(folder: Path) -> None:
    """Refuse to replace what was not built here.

    Raises:
        ValueError: names the folder, and some of what it holds.
    """
    if not folder.is_dir():
        raise ValueError(f"arithmetic.folder={folder} is a file; give a new or empty folder")
    if held := sorted(f.name for f in folder.iterdir()):
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        raise ValueError(
            f"arithmetic.folder={folder} holds {', '.join(held[:3])}{more}, but nothing that was built here; building "
            "would remove that, so give a new or empty folder"
        )


def set_aside(folder: Path) -> None:
    """Remove a folder that was built here; rename it where somebody has put something else in it."""
    if read_stamp(folder) is None:
        # Something may have come there while the model was trained.
        refuse_foreign(folder)
    if {f.name for f in folder.iterdir()} <= BUILT:
        shutil.rmtree(folder)
        return
    old = next(o for n in itertools.count(1) if not (o := folder.with_name(f"{folder.name}.old{n}")).exists())
    print(f"{folder} holds more than was built here: renamed to {old}", flush=True)
    os.replace(folder, old)


def ensure_assets(config: DictConfig) -> None:
    """``verl_ext.prepare`` of the task: build what ``config.arithmetic`` describes."""
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
