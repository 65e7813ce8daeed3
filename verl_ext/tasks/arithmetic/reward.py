"""The arithmetic task's reward: 1 for the right final answer in the right place, else 0."""

import re
from typing import Any

from verl_ext.tasks.arithmetic.task import ANSWER_MARK

# Working without a mark, one mark, then a plain number up to the very end.
_RESPONSE = re.compile(rf"[^{ANSWER_MARK}]*{ANSWER_MARK}(0|[1-9][0-9]{{0,8}})")


def parse_answer(text: str) -> str | None:
    """The final answer of a response, or None. Takes one pass over the text, whatever it holds."""
    match = _RESPONSE.fullmatch(text)
    return match.group(1) if match else None


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Grade a decoded response the way verl's reward managers ask for it.

    Returns:
        score: the reward, 0.0 or 1.0; acc: the same, under the name by which verl reports pass@1; parsed: whether
        there was an answer at all; pred: that answer, or ""; data_source: the question's, for the dumped samples.
    """
    answer = parse_answer(solution_str)
    score = float(answer is not None and answer == ground_truth)
    return {
        "score": score,
        "acc": score,
        "parsed": float(answer is not None),
        "pred": answer or "",
        "data_source": data_source,
    }
