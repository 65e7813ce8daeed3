"""The toy task: running totals of small additions and subtractions, graded by their number.

A question of level k asks for k operations on a two-digit number, "47+8-5+9=", and a response works it out total by
total before it answers, "55 50 59#59". Every total lies in 0..99, so one operation is a fact that a tiny model can
learn, and a chain of k operations is only as good as its weakest link.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LEVELS = (1, 2, 3, 4, 5, 6)
"""Levels of difficulty: the number of operations of a question."""

ANSWER_MARK = "#"
"""What stands between the working and the final answer of a response."""


@dataclass(frozen=True)
class Question:
    """A question and its running totals (one per operation; the last is the answer)."""

    text: str
    totals: tuple[int, ...]

    @property
    def level(self) -> int:
        return len(self.totals)

    @property
    def answer(self) -> str:
        return str(self.totals[-1])

    @property
    def solution(self) -> str:
        """The correct response: the working, the mark, the answer."""
        return " ".join(map(str, self.totals)) + ANSWER_MARK + self.answer


def draw(rng: random.Random, level: int) -> Question:
    """Draw one question of ``level`` operations, each with a digit 1..9, with all totals in 0..99."""
    total = rng.randint(10, 99)
    text, totals = str(total), []
    for _ in range(level):
        digit = rng.randint(1, 9)
        sign = rng.choice("+-")
        if not 0 <= (total + digit if sign == "+" else total - digit) <= 99:
            sign = "-" if sign == "+" else "+"
        total = total + digit if sign == "+" else total - digit
        text += f"{sign}{digit}"
        totals.append(total)
    return Question(text + "=", tuple(totals))


def draw_many(rng: random.Random, levels: Iterable[int], exclude: frozenset[str] = frozenset()) -> Iterator[Question]:
    """One question for each of ``levels``, none of whose text is in ``exclude``."""
    for level in levels:
        while (question := draw(rng, level)).text in exclude:
            pass
        yield question
