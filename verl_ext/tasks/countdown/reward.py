"""The countdown task's reward: 1 for an expression of the given numbers that equals the target, else 0.

There are many right answers, so nothing is compared with a solution: the answer itself is worked out.

Sources: TinyZero (github.com/Jiayi-Pan/TinyZero, ``verl/utils/reward_score/countdown.py``) takes the last ``<answer>``,
asks for each number exactly once, although its prompt says "only once", and gives 0.1 for a wrong answer in tags. Here
that is 0, as the reward is binary; ``countdown.use_all=false`` lets numbers be left out, as the television game does.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from verl_ext.tasks.countdown.expression import LONGEST, Malformed, evaluate
from verl_ext.tasks.countdown.task import ANSWER_MARK

STYLES = ("tags", "bare")
OPENS, CLOSES = "<answer>", "</answer>"

FAILURES = ("", "no answer", "not an expression", "too long", "too deep", "division by zero", "other numbers", "wrong")
"""The values of ``failure``."""


def find_answer(text: str, style: str) -> str | None:
    """Find the answer in a response, or None, in time linear in its length.

    tags: within the last ``<answer>`` and the ``</answer>`` after it. bare: behind the only mark, to the end.
    """
    if style == "bare":
        _, mark, answer = text.partition(ANSWER_MARK)
        return answer.strip() if mark and ANSWER_MARK not in answer else None
    end = text.rfind(CLOSES)
    start = text.rfind(OPENS, 0, end) if end >= 0 else -1
    return text[start + len(OPENS) : end].strip() if start >= 0 else None


def judge(answer: str, numbers: Sequence[int], target: int, use_all: bool) -> str:
    """Return why an answer is not right: one of ``FAILURES``, "" if it is right."""
    try:
        value, used = evaluate(answer)
    except Malformed as e:
        return str(e)
    given, taken = Counter(numbers), Counter(used)
    if taken != given if use_all else taken - given:
        return "other numbers"
    return "" if value == target else "wrong"


def numbers_and_target(truth: Any) -> tuple[list[int], int]:
    """Read a ground truth.

    Raises:
        ValueError: it has no list of whole numbers, or no target.
    """
    try:
        numbers, target = truth["numbers"], truth["target"]
        if isinstance(numbers, str | bytes | dict) or not len(numbers):
            raise TypeError("numbers is no list")
        return [_whole(n) for n in numbers], _whole(target)
    except (LookupError, TypeError, ValueError, OverflowError) as e:
        raise ValueError(f"ground_truth must have numbers and a target, got {str(truth)[:80]}") from e


def _whole(value: Any) -> int:
    """Convert a whole number, or its text; ``int`` alone would cut off a fraction."""
    number = int(value)
    if not isinstance(value, str) and number != value:
        raise ValueError(f"{value} is no whole number")
    return number


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: dict[str, Any],
    extra_info: dict | None = None,
    *,
    use_all: bool = True,
    style: str = "tags",
    **kwargs: Any,
) -> dict[str, Any]:
    """Grade a decoded response; verl's reward managers call it.

    Args:
        data_source: returned as it is, for the dumps of an evaluation.
        solution_str: the response. Untrusted: at most ``LONGEST`` characters of it are parsed, by a grammar.
        ground_truth: ``numbers``, a list, and ``target``, as in TinyZero's rows.
        extra_info: not read.
        use_all: each number exactly once; False: at most once.
        style: where the answer is, one of ``STYLES``.
        kwargs: not read.

    Returns:
        ``score`` and ``acc``, the reward; ``pred``, the answer; ``failure``, one of ``FAILURES``; ``data_source``.

    Raises:
        ValueError: an unknown ``style``, or an answer is there and the ground truth has no numbers and target.
    """
    if style not in STYLES:
        raise ValueError(f"reward_kwargs.style must be one of {', '.join(STYLES)}, got {style!r}")
    answer = find_answer(solution_str, style)
    failure = "no answer" if answer is None else judge(answer, *numbers_and_target(ground_truth), use_all)
    score = float(not failure)
    # Spaces aside, so that verl's majority votes count answers rather than spellings.
    pred = re.sub(r"\s+", "", (answer or "")[:LONGEST])
    return {"score": score, "acc": score, "pred": pred, "failure": failure, "data_source": data_source}
