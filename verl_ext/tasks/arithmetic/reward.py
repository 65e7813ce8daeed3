"""The arithmetic task's reward: 1 for the right final answer in the right form, else 0."""

import re
from typing import Any

from verl_ext.tasks.arithmetic.task import ANSWER_MARK

# Working without a mark, one mark, then a plain number that ends the response.
_RESPONSE = re.compile(rf"[^{ANSWER_MARK}]*{ANSWER_MARK}(0|[1-9][0-9]{{0,8}})")


def parse_answer(text: str) -> str | None:
    """Find the final answer of a response, or None, in one pass over the text."""
    match = _RESPONSE.fullmatch(text)
    return match.group(1) if match else None


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Grade a decoded response; verl's reward managers call it.

    Returns:
        score: the reward, 0.0 or 1.0; acc: the same, by which verl reports pass@1; parsed: 1.0 if there is an answer;
        pred: the answer, or ""; data_source: for the dumped samples.
    """
    answer = parse_answer(solution_str)
    parsed = float(answer is not None)
    score = float(answer is not None and answer == ground_truth)
    return {"score": score, "acc": score, "parsed": parsed, "pred": answer or "", "data_source": data_source}
