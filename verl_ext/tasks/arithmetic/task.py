"""The toy task: chains of single digits to add and subtract, graded by their length.

A question of level k has k operations, "4+8-5+9=", and a response works it out total by total before it answers,
"12 7 16#16". One operation is a fact that a tiny model can learn; a chain is only as good as its weakest link.
"""

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

LEVELS = (1, 2, 3, 4, 5, 6)
"""Levels of difficulty: the number of operations of a question."""

ANSWER_MARK = "#"
"""What stands between the working and the final answer of a response."""


GUESS_MORE, GUESS_MOST = 0.22, 0.90
"""Share of careless responses that guess the answer without working it out: what each operation after the first adds to
it, and its limit. A guess at level k is right once in k^2."""

SLIP_FIRST, SLIP_MORE = 0.01, 0.01
"""Probability of a slip in the first operation that is worked out, and what each further one adds to it."""


def respond(totals: Sequence[int]) -> str:
    """A response in the right form: the working, the mark, the answer."""
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
        """The correct response: the working, the mark, the answer."""
        return respond(self.totals)

    def careless_solution(self, rng: random.Random) -> str:
        """A response of somebody who knows how, but mostly guesses, and slips when working it out.

        A slip is by 1 or 2, ever more likely the longer the chain gets, and the working goes on from it.
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
    """One question for each of ``levels``, none of whose text is in ``exclude``."""
    for level in levels:
        while (question := draw(rng, level)).text in exclude:
            pass
        yield question
