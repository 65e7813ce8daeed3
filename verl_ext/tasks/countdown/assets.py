"""Build the files of the countdown task, once: training and held-out questions, and for "bare" ones a toy model.

    python -m verl_ext.tasks.countdown.assets [--folder DIR] [--sizes 3 4] [--seed N] ...

``+task=countdown`` calls :func:`ensure_assets` before Ray starts. Its YAML file has the defaults.
"""

import random
from collections.abc import Collection, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from verl_ext.tasks.arithmetic.pretrain import BATCH, fit
from verl_ext.tasks.assets import build, built_files, from_command_line, require_whole, save_pretrained, save_rows
from verl_ext.tasks.countdown.expression import MOST_DIGITS
from verl_ext.tasks.countdown.reward import STYLES
from verl_ext.tasks.countdown.task import SIZES, Limits, Question, draw_many, draw_splits

VERSION = 1
"""Increase it when the same parameters build different files."""


def prompt_of(question: Question, style: str, use_all: bool) -> str:
    """Write a question's prompt.

    "tags" has the parts of TinyZero's (github.com/Jiayi-Pan/TinyZero, ``examples/data_preprocess/countdown.py``):
    numbers, target, the four operations, reasoning in ``<think>``, the answer in ``<answer>``, an example of it.
    """
    if style == "bare":
        return question.text
    often = "exactly once" if use_all else "at most once"
    return (
        f"Here are the numbers {', '.join(map(str, question.numbers))}. Write an expression that equals "
        f"{question.target}. Use each number {often}, the operations +, -, *, / and parentheses. Reason within "
        "<think> </think>, then give the expression alone within <answer> </answer>, such as "
        "<answer>(1 + 2) / 3</answer>."
    )


def to_row(question: Question, index: int, split: str, style: str, use_all: bool) -> dict:
    """Make a row in verl's RL schema; the data source has the size, so that verl reports pass@1 per size."""
    return {
        "data_source": f"size_{question.size}",
        "prompt": [{"role": "user", "content": prompt_of(question, style, use_all)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": question.truth},
        "extra_info": {"index": index, "split": split, "size": question.size},
    }


def build_assets(
    folder: str | Path,
    *,
    style: str,
    sizes: Sequence[int],
    largest_number: int,
    largest_target: int,
    use_all: bool,
    iterations: int,
    train_size: int,
    test_size: int,
    seed: int,
) -> Path:
    """Build data, and with ``iterations`` above 0 a model, in ``folder``, as :func:`verl_ext.tasks.assets.build` does.

    Raises:
        ValueError: a wrong parameter, or ``folder`` holds files that were not built here.
    """
    check_parameters(style, sizes, largest_number, largest_target, iterations, train_size, test_size)
    sizes = sorted(set(sizes))
    limits = Limits(largest_number, largest_target, chain=style == "bare")
    stamp = dict(version=VERSION, style=style, sizes=sizes, largest_number=largest_number, use_all=use_all, seed=seed)
    stamp |= dict(largest_target=largest_target, iterations=iterations, train_size=train_size, test_size=test_size)

    def make(place: Path) -> None:
        train, test = draw_splits(train_size, test_size, sizes, limits, seed)
        for split, questions in (("train", train), ("test", test)):
            save_rows(place, split, [to_row(q, i, split, style, use_all) for i, q in enumerate(questions)])
        if iterations:
            held_out = {q.key for q in test}
            save_pretrained(place / "model", seed, lambda *m: pretrain(*m, iterations, sizes, limits, seed, held_out))

    return build(folder, "countdown", stamp, make)


def check_parameters(
    style: str,
    sizes: Sequence[int],
    largest_number: int,
    largest_target: int,
    iterations: int,
    train_size: int,
    test_size: int,
    **others: object,
) -> None:
    """Raise ValueError if nothing can be built with these parameters of :func:`build_assets`."""
    if style not in STYLES:
        raise ValueError(f"countdown.style={style} must be one of {', '.join(STYLES)}")
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes or not all(s in SIZES for s in sizes):
        raise ValueError(f"countdown.sizes={sizes} must be among {', '.join(map(str, SIZES))}")
    require_whole("countdown", 0, iterations=iterations)
    require_whole("countdown", 1, largest_target=largest_target, train_size=train_size, test_size=test_size)
    # The reward reads no longer numbers.
    if type(largest_number) is not int or not 1 <= largest_number < 10**MOST_DIGITS:
        raise ValueError(f"countdown.largest_number={largest_number} must be 1 to {10**MOST_DIGITS - 1}")
    if iterations and (style != "bare" or largest_number > 9 or largest_target > 99):
        raise ValueError(
            f"countdown.iterations={iterations} pre-trains a toy model, which needs style=bare, largest_number of at "
            f"most 9 and largest_target of at most 99, not {style}, {largest_number} and {largest_target}"
        )


def refuse(config: DictConfig) -> None:
    """Raise ValueError if :func:`ensure_assets` would, for the checks of a start and of the doctor."""
    check_parameters(**OmegaConf.to_container(config.countdown, resolve=True))


def builds(config: DictConfig) -> list[str]:
    """Name what :func:`ensure_assets` builds; the model only where it is pre-trained."""
    return built_files(config.countdown.folder, model=config.countdown.iterations > 0)


def pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    iterations: int,
    sizes: Sequence[int],
    limits: Limits,
    seed: int,
    exclude: Collection[tuple[int, ...]] = (),
) -> list[float]:
    """Train ``model`` in place on random questions whose keys are not in ``exclude``; return the losses."""
    rng = random.Random(seed)

    def draw(careless: bool) -> list[tuple[str, str]]:
        questions = draw_many(rng, rng.choices(sizes, k=BATCH), limits, exclude)
        return [(q.text, q.bare_response(rng, limits, careless)) for q in questions]

    return fit(model, tokenizer, iterations, draw)


def ensure_assets(config: DictConfig) -> None:
    """Build the files that ``config.countdown`` describes (``verl_ext.prepare`` of the task)."""
    build_assets(**OmegaConf.to_container(config.countdown, resolve=True))


def main() -> None:
    from_command_line("countdown", __doc__, build_assets)


if __name__ == "__main__":
    main()
