"""The toy task: add and subtract chains of single digits; the longer, the harder.

A question of level k has k operations, "4+8-5+9=", and a response writes each total before the answer, "12 7 16#16".
A tiny model can learn one operation by heart; one wrong total makes the whole chain wrong.
"""

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

LEVELS = (1, 2, 3, 4, 5, 6)
"""Levels of difficulty: the number of operations of a question."""

ANSWER_MARK = "#"
"""Separates the working and the final answer of a response."""

GUESS_MORE, GUESS_MOST = 0.22, 0.90
"""Share of careless responses that guess the answer: the increase per operation after the first, and the limit.
A guess at level k is right once in k^2."""

SLIP_FIRST, SLIP_MORE = 0.01, 0.01
"""Probability of a slip in the first operation that is worked out, and the increase per further operation."""


def respond(totals: Sequence[int]) -> str:
    """Write a response in the right form: the working, the mark, the answer."""
    return " ".join(map(str, totals)) + ANSWER_MARK + str(totals[-1])


@dataclass(frozen=True)
class Question:
    """A question and its running totals, one per operation; the last is the answer."""

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
        """The correct response."""
        return respond(self.totals)

    def careless_solution(self, rng: random.Random) -> str:
        """Write a response that mostly guesses, and otherwise slips now and then.

        A slip is by 1 or 2, more likely in longer chains, and the later totals include it.
        """
        if rng.random() < min(GUESS_MOST, GUESS_MORE * (self.level - 1)):
            off = 0 if rng.random() < 1 / self.level**2 else rng.choice((-3, -2, -1, 1, 2, 3))
            return ANSWER_MARK + str(abs(self.totals[-1] + off))
        slip, totals = 0, []
        for i, total in enumerate(self.totals):
            if rng.random() < SLIP_FIRST + SLIP_MORE * i:
                slip += rng.choice((-2, -1, 1, 2))
            totals.append(max(total + slip, 0))
        return respond(totals)


def draw(rng: random.Random, level: int) -> Question:
    """Draw one question of ``level`` operations on digits 1..9. No total is negative."""
    total = rng.randint(1, 9)
    text, totals = str(total), []
    for _ in range(level):
        digit = rng.randint(1, 9)
        subtract = rng.random() < 0.5 and digit <= total
        total += -digit if subtract else digit
        text += f"{'-' if subtract else '+'}{digit}"
        totals.append(total)
    return Question(text + "=", tuple(totals))


def draw_many(rng: random.Random, levels: Iterable[int], exclude: Collection[str] = ()) -> Iterator[Question]:
    """Draw a question for each of ``levels``, with no text in ``exclude``."""
    for level in levels:
        while (question := draw(rng, level)).text in exclude:
            pass
        yield question
