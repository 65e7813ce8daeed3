"""The mathematical reward: 1 for a right final answer in a box after the thinking, else 0.

For verl's custom reward function::

    reward.custom_reward_function.path=pkg://verl_ext.tasks.math.reward
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.require_think=false

Source: the reward of arXiv 2505.12366, which reads the boxed answer after ``</think>``.
"""

import json
import numbers
import os
import queue
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from typing import Any

from verl_ext.tasks.math.grader import BY_WEIGHT, Grader, plainly_equal

THINK_END = "</think>"
BOX = re.compile(r"\\(?:f?boxed|fbox)\s*\{")
UNBRACED = re.compile(r"\\(?:f?boxed|fbox)\s*(-?\d[\d.,/]*|[A-Za-z](?![A-Za-z]))(?!\s*[\w^\\(])")
BETWEEN = re.compile(r"(?:[\s$,;&]|\\(?:[,;:!()\[\] ]|quad|qquad|text)|[{}]|and|or)*", re.IGNORECASE)
"""Text between boxes that are one answer together."""
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

LONGEST_ANSWER = 2000
"""Characters. The longest ground truth of the six benchmarks has 230."""

NO_ANSWER = ("no </think>", "no box", "box not closed", "empty box", "too long")
FAILURES = ("", *NO_ANSWER, *BY_WEIGHT, "timeout", "grader died")
"""The values of ``failure``."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict | None = None,
    *,
    require_think: bool = True,
    timeout: float = 5.0,
    memory_mb: int = 1024,
    processes: int = 2,
    **kwargs: Any,
) -> dict[str, Any]:
    """Return a score of 1.0 if the last ``\\boxed{}`` after the last ``</think>`` equals a ground truth, else 0.0.

    Answers are equal as text in any spelling, as integers, or as mathematics (:mod:`verl_ext.tasks.math.equality`).
    Safe in any thread and process; each process of verl's reward loop grades in children of its own.

    Args:
        data_source: returned as it is, for the dumps of an evaluation.
        solution_str: the decoded response. Untrusted: never evaluated; only its box is parsed, within the limits.
        ground_truth: str, int, float, or a list (or array) of alternatives.
        extra_info: its ``stop_reason`` is read, if the rollout gives it.
        require_think: a response without ``</think>`` gets 0.0; False: the box may be anywhere in such a response.
        timeout: seconds to grade one answer.
        memory_mb: MiB to grade one answer.
        processes: children that grade at the same time, per process of verl's reward loop.
        kwargs: not read.

    Returns:
        ``score`` and ``acc``, the reward; ``pred``, the text in the box (for verl's majority votes); ``failure``, one
        of ``FAILURES``; ``truncated``, 1.0 if the response hit its limit: by ``stop_reason``, else because thinking or
        box was not closed; ``data_source``.

    Raises:
        ValueError: there is no ground truth, or ``timeout``, ``memory_mb`` or ``processes`` is not positive.
        RuntimeError: no grading process can be started (for example without math-verify).
    """
    for name, value in (("timeout", timeout), ("memory_mb", memory_mb), ("processes", processes)):
        if not value > 0:
            raise ValueError(f"reward_kwargs.{name} must be positive, got {value!r}")
    truths = ground_truths(ground_truth)
    answer, failure = boxed_answer(solution_str, require_think)
    reason = (extra_info or {}).get("stop_reason")
    truncated = failure in ("no </think>", "box not closed") if reason is None else reason == "length"
    right = False
    if not failure:
        seen = [plainly_equal(answer, truth) for truth in truths]
        right, failure = any(seen), "" if any(seen) else "wrong"
        unclear = [truth for truth, equal in zip(truths, seen, strict=True) if equal is None]
        if unclear and not right:
            with grader(memory_mb, processes) as g:
                right, failure = g.grade(answer, unclear, timeout)
    result = {"score": float(right), "acc": float(right), "pred": answer[:LONGEST_ANSWER], "failure": failure}
    return result | {"truncated": float(truncated), "data_source": data_source}


def boxed_answer(text: str, require_think: bool = True) -> tuple[str, str]:
    """Find the text in the last box after the last ``</think>``, in time linear in the text's length.

    Boxes with only a comma, "and" or "or" between them are one list: ``\\boxed{1} and \\boxed{2}`` is 1, 2.
    ``\\fbox{5}`` is a box, and ``\\boxed 5`` too if no box has braces.

    Returns:
        (answer, ""), or ("", reason) with a reason of ``NO_ANSWER``.
    """
    _, found, rest = text.rpartition(THINK_END)
    if require_think and not found:
        return "", "no </think>"
    starts = list(BOX.finditer(rest))
    if not starts:
        bare = UNBRACED.findall(rest)
        return (bare[-1].rstrip(".,"), "") if bare else ("", "no box")
    parts, after = [], None
    for box in reversed(starts):
        end = closing_brace(rest, box.end(), after)
        if end is None:
            if after is None:
                return "", "box not closed"
            break
        if after is not None and (end >= after or not BETWEEN.fullmatch(rest, end + 1, after)):
            break
        part = rest[box.end() : end].strip()
        # A repeated answer counts once.
        if part and [part] != parts[:1]:
            parts.insert(0, part)
        after = box.start()
    answer = ", ".join(parts)
    if not answer:
        return "", "empty box"
    return (answer, "") if len(answer) <= LONGEST_ANSWER else ("", "too long")


def closing_brace(text: str, start: int, end: int | None) -> int | None:
    """Find where the group that opens before ``start`` closes; None if it does not before ``end``."""
    depth = 1
    for match in BRACE.finditer(text, start, len(text) if end is None else end):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def ground_truths(value: Any) -> list[str]:
    """Convert ground truths of any data set to texts; whole floats lose their ``.0``.

    Raises:
        ValueError: there is none, or one is neither text nor number.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str) and re.match(r'\s*\[\s*"', value):
        # Some data sets have a list as JSON text. [1, 2] without quotes is an interval.
        with suppress(json.JSONDecodeError, RecursionError):
            value = json.loads(value)
    values = value if isinstance(value, (list, tuple)) else [value]
    truths = []
    for x in values:
        nan = x.is_nan() if isinstance(x, Decimal) else x != x
        if isinstance(x, bool) or not isinstance(x, (str, numbers.Real, Decimal)) or nan:
            raise ValueError(f"a ground truth must be text or a number, got {str(x)[:80]}")
        if text := x.strip() if isinstance(x, str) else number_text(x):
            truths.append(text)
    if not truths:
        raise ValueError(f"no ground truth: {value!r}")
    return truths


def number_text(x: numbers.Real | Decimal) -> str:
    """Write a number without a final ``.0``; integers may have any length, which ``str`` refuses."""
    return str(Decimal(int(x)) if isinstance(x, numbers.Integral) else x).removesuffix(".0")


# Graders of this process ---------------------------------------------------------------------------------------------

_pools: dict[tuple[int, int, int], queue.LifoQueue] = {}
_lock = threading.Lock()


@contextmanager
def grader(memory_mb: int, processes: int) -> Iterator[Grader]:
    """Lend one of this process's graders; wait while all are busy."""
    # The process id is part of the key: a fork must not use its parent's pipes.
    key = (os.getpid(), memory_mb, processes)
    with _lock:
        if key not in _pools:
            pool = _pools[key] = queue.LifoQueue()
            for _ in range(processes):
                pool.put(Grader(memory_mb))
    pool = _pools[key]
    one = pool.get()
    try:
        yield one
    finally:
        pool.put(one)
