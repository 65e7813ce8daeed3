"""Build the files of the arithmetic task, once: a pre-trained small model, training and held-out questions.

    python -m verl_ext.tasks.arithmetic.assets [--folder DIR] [--iterations N] [--seed N] ...

``+task=arithmetic`` calls :func:`ensure_assets` before Ray starts. Its YAML file has the defaults.
"""

import random
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_ext.tasks.arithmetic.pretrain import pretrain
from verl_ext.tasks.arithmetic.task import LEVELS, Question, draw_many
from verl_ext.tasks.assets import build, built_files, from_command_line, require_whole, save_pretrained, save_rows

MOST_HELD_OUT = 750
"""There are 126 questions of level 1, of which one must be left to train on."""

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

    Args:
        test_size: at most ``MOST_HELD_OUT``.
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
    """Build model and data in ``folder``, as :func:`verl_ext.tasks.assets.build` does.

    Raises:
        ValueError: a wrong parameter, or ``folder`` holds files that were not built here.
    """
    check_parameters(iterations, train_size, test_size)
    levels = [*LEVELS]
    stamp = dict(
        version=VERSION, iterations=iterations, train_size=train_size, test_size=test_size, seed=seed, levels=levels
    )

    def make(place: Path) -> None:
        train, test = draw_splits(train_size, test_size, seed)
        for split, questions in (("train", train), ("test", test)):
            save_rows(place, split, [to_row(q, i, split) for i, q in enumerate(questions)])
        held_out = {q.text for q in test}
        save_pretrained(place / "model", seed, lambda *model: pretrain(*model, iterations, seed, held_out))

    return build(folder, "arithmetic", stamp, make)


def check_parameters(iterations: int, train_size: int, test_size: int, **others: object) -> None:
    """Raise ValueError if nothing can be built with these parameters of :func:`build_assets`."""
    require_whole("arithmetic", 0, iterations=iterations)
    require_whole("arithmetic", 1, train_size=train_size, test_size=test_size)
    if test_size > MOST_HELD_OUT:
        raise ValueError(
            f"arithmetic.test_size={test_size} must be at most {MOST_HELD_OUT}: there are no more of level 1"
        )


def refuse(config: DictConfig) -> None:
    """Raise ValueError if :func:`ensure_assets` would, for the checks of a start and of the doctor."""
    check_parameters(**OmegaConf.to_container(config.arithmetic, resolve=True))


def ensure_assets(config: DictConfig) -> None:
    """Build the files that ``config.arithmetic`` describes (``verl_ext.prepare`` of the task)."""
    a = config.arithmetic
    build_assets(a.folder, iterations=a.iterations, train_size=a.train_size, test_size=a.test_size, seed=a.seed)


def builds(config: DictConfig) -> list[str]:
    """Name what :func:`ensure_assets` builds."""
    return built_files(config.arithmetic.folder)


def main() -> None:
    from_command_line("arithmetic", __doc__, build_assets)


if __name__ == "__main__":
    main()
