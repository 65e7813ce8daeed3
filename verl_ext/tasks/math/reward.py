"""Reward of 1 for a right final answer to a mathematical question, in a box after the thinking.

For verl's custom reward function::

    reward.custom_reward_function.path=pkg://verl_ext.tasks.math.reward
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.require_think=false

Source of the rule: arXiv 2505.12366, whose reward looks for a boxed answer after ``</think>``.
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

from verl_ext.tasks.math.grader import Grader, plainly_equal

THINK_END = "</think>"
BOX = re.compile(r"\\(?:f?boxed|fbox)\s*\{")
UNBRACED = re.compile(r"\\(?:f?boxed|fbox)\s*(-?\d[\d.,/]*|[A-Za-z](?![A-Za-z]))(?!\s*[\w^\\(])")
BETWEEN = re.compile(r"(?:[\s$,;&]|\\(?:[,;:!()\[\] ]|quad|qquad|text)|[{}]|and|or)*", re.IGNORECASE)
"""What may stand between boxes that are one answer together."""
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

LONGEST_ANSWER = 2000
"""Characters. The longest ground truth of the six benchmarks has 230."""

FAILURES = (
    "",
    "no </think>",
    "no box",
    "box not closed",
    "empty box",
    "too long",
    "wrong",
    "unreadable",
    "grader error",
    "memory",
    "timeout",
    "grader died",
)
"""What ``failure`` can be."""


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
    """1.0 when the last ``\\boxed{}`` after the last ``</think>`` equals one of the ground truths, else 0.0.

    Equal is equal as text (but for its spelling), as integers or as mathematics (:mod:`verl_ext.tasks.math.equality`).
    May be called from any thread and process; each process of verl's reward loop grades in children of its own.

    Args:
        data_source: returned as it is, for the dumps of an evaluation.
        solution_str: the response, decoded. Untrusted: never evaluated; its box alone is parsed, within the bounds.
        ground_truth: str, int, float, or a list (or array) of them, of which one has to be met.
        extra_info: ``stop_reason`` is read where the rollout gives it.
        require_think: whether a response without ``</think>`` gets 0.0; otherwise all of it is searched for the box.
        timeout: seconds for one answer.
        memory_mb: MiB that grading one answer may take.
        processes: children that grade at the same time, for each process of verl's reward loop.
        kwargs: what else verl passes; not read.

    Returns:
        ``score`` and ``acc``, the reward; ``pred``, the text in the box (verl takes majorities over it); ``failure``,
        one of ``FAILURES``; ``truncated``, 1.0 for a response that ended without thinking or box being closed;
        ``data_source``.

    Raises:
        ValueError: there is no ground truth, or ``timeout``, ``memory_mb`` or ``processes`` is not positive.
        RuntimeError: no grading process can be started at all (math-verify is not installed, say).
    """
    for name, value in (("timeout", timeout), ("memory_mb", memory_mb), ("processes", processes)):
        if not value > 0:
            raise ValueError(f"reward_kwargs.{name} must be positive, got {value!r}")
    truths = ground_truths(ground_truth)
    answer, failure = boxed_answer(solution_str, require_think)
    truncated = is_truncated(failure, extra_info)
    right = False
    if not failure:
        seen = [plainly_equal(answer, truth) for truth in truths]
        right, failure = any(seen), "" if any(seen) else "wrong"
        unclear = [truth for truth, equal in zip(truths, seen, strict=True) if equal is None]
        if unclear and not right:
            with grader(memory_mb, processes) as g:
                right, failure = g.grade(answer, unclear, timeout)
    score = float(right)
    return {
        "score": score,
        "acc": score,
        "pred": answer[:LONGEST_ANSWER],
        "failure": failure,
        "truncated": float(truncated),
        "data_source": data_source,
    }


def boxed_answer(text: str, require_think: bool = True) -> tuple[str, str]:
    """The text in the last box after the last ``</think>``, and a reason when there is none.

    Boxes with nothing but a comma, "and" or "or" between them are one list: ``\\boxed{1} and \\boxed{2}`` is 1, 2.
    ``\\fbox{5}`` is a box, and so is ``\\boxed 5`` where no box has braces. Linear in the text's length, whatever its
    braces.

    Returns:
        (answer, "") or ("", reason), reason in "no </think>", "no box", "box not closed", "empty box", "too long".
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
        # Said twice is said once.
        if part and [part] != parts[:1]:
            parts.insert(0, part)
        after = box.start()
    answer = ", ".join(parts)
    if not answer:
        return "", "empty box"
    return (answer, "") if len(answer) <= LONGEST_ANSWER else ("", "too long")


def closing_brace(text: str, start: int, end: int | None) -> int | None:
    """Where the group closes that opens before ``start``, if it does before ``end``."""
    depth = 1
    for match in BRACE.finditer(text, start, len(text) if end is None else end):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def is_truncated(failure: str, extra_info: dict | None) -> bool:
    """Whether a response hit its limit: as the rollout says, else when thinking or box was not closed."""
    reason = (extra_info or {}).get("stop_reason")
    if reason is not None:
        return reason == "length"
    return failure in ("no </think>", "box not closed")


def ground_truths(value: Any) -> list[str]:
    """Ground truths as found in the wild, as texts: whole floats without their ``.0``.

    Raises:
        ValueError: there is none, or one is neither text nor number.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str) and re.match(r'\s*\[\s*"', value):
        # A list as JSON text, as some data sets have it. [1, 2] without quotes is an interval.
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    values = value if isinstance(value, (list, tuple)) else [value]
    truths = []
    for x in values:
        if isinstance(x, bool) or not isinstance(x, (str, numbers.Real, Decimal)) or x != x:
            raise ValueError(f"a ground truth must be text or a number, got {str(x)[:80]}")
        if text := x.strip() if isinstance(x, str) else number_text(x):
            truths.append(text)
    if not truths:
        raise ValueError(f"no ground truth: {value!r}")
    return truths


def number_text(x: numbers.Real | Decimal) -> str:
    """A number's digits; whole ones without ``.0``, and of any size."""
    if isinstance(x, numbers.Integral):
        return str(Decimal(int(x)))
    return str(x).removesuffix(".0")


# Graders of this process ---------------------------------------------------------------------------------------------

_pools: dict[tuple[int, int, int], queue.LifoQueue] = {}
_lock = threading.Lock()


@contextmanager
def grader(memory_mb: int, processes: int) -> Iterator[Grader]:
    """One of this process's graders; waits for one while all are at work."""
    # A fork must not share its parent's pipes.
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
