"""Countdown: combine all given numbers by ``+ - * /`` so that they make a target. The more numbers, the harder.

A question is made from its solution: numbers are drawn and combined at random until the result is a target within the
limits, so every question is solvable. Most have other solutions, too.

The toy model answers a "bare" question, ``3 5 7=22``, in attempts, each with its running totals, and repeats one of
them behind a mark: ``3+5+7=8 15;3*5+7=15 22#3*5+7``. So it can find out whether an attempt is right before it answers.
"""

import random
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

SIZES = (3, 4, 5, 6)
"""Numbers of a question, which are its difficulty."""

ANSWER_MARK = "#"
"""Separates the attempts and the answer of a bare response."""

LONGEST_RESPONSE = 71
"""Characters of a bare response, each a token of the toy model; the end of the turn is another."""

MOST_TRIES = 4
"""Wrong attempts in a response that the toy model is pre-trained on; the last of them, as many as fit."""

GIVE_UP = 0.5
"""Probability that a careless response answers with a wrong attempt instead of making another."""

MOST_DRAWS = 100_000
"""Draws of one new question, a second or two, before the limits are taken to leave no other."""


@dataclass(frozen=True)
class Combination:
    """An expression with its value; ``totals`` are the values after each operation."""

    text: str
    value: int
    totals: tuple[int, ...] = ()
    binds: int = 3
    """Of its last operation: 1 for + and -, 2 for * and /, 3 for a number."""

    def joined(self, sign: str, other: "Combination", value: int) -> "Combination":
        """Combine two expressions, with no more parentheses than needed."""
        binds = 1 if sign in "+-" else 2
        left = f"({self.text})" if self.binds < binds else self.text
        # a-(b+c), a/(b*c): the right side needs them at the same rank, too.
        right = f"({other.text})" if other.binds <= binds else other.text
        return Combination(left + sign + right, value, (*self.totals, *other.totals, value), binds)

    @property
    def attempt(self) -> str:
        """The expression, and its running totals."""
        return f"{self.text}={' '.join(map(str, self.totals))}"


@dataclass(frozen=True)
class Limits:
    """Of the numbers, the target and what comes between; ``chain``: each operation is on the total so far."""

    largest_number: int
    largest_target: int
    chain: bool = False

    @property
    def largest_total(self) -> int:
        # A chain's totals have no more digits than its target. Otherwise the way to a target may lead above it.
        return self.largest_target * (1 if self.chain else 10)


@dataclass(frozen=True)
class Question:
    """Numbers in the order that is shown, a target, and one way to it."""

    numbers: tuple[int, ...]
    target: int
    solution: Combination

    @property
    def size(self) -> int:
        return len(self.numbers)

    @property
    def key(self) -> tuple[int, ...]:
        """The same for a question with its numbers in another order."""
        return (self.target, *sorted(self.numbers))

    @property
    def text(self) -> str:
        return f"{' '.join(map(str, self.numbers))}={self.target}"

    @property
    def truth(self) -> dict:
        """What the reward needs, in TinyZero's form."""
        return {"numbers": list(self.numbers), "target": self.target}

    def bare_response(self, rng: random.Random, limits: Limits, careless: bool = False) -> str:
        """Write wrong attempts and then the right one; a careless response may answer with a wrong one instead."""
        tries = []
        for _ in range(rng.randrange(MOST_TRIES + 1)):
            tried = combine(rng, self.numbers, limits)
            if tried is None:
                continue
            tries.append(tried)
            if tried.value == self.target or (careless and rng.random() < GIVE_UP):
                break
        else:
            tries.append(self.solution)
        attempts, answer = [t.attempt for t in tries], ANSWER_MARK + tries[-1].text
        while len(text := ";".join(attempts) + answer) > LONGEST_RESPONSE:
            attempts.pop(0)
        return text


def combine(rng: random.Random, numbers: Iterable[int], limits: Limits) -> Combination | None:
    """Combine all numbers in a random order and by random operations, with positive whole totals within the limits.

    Returns:
        None if the order that was drawn allows no further operation.
    """
    parts = [Combination(str(n), n) for n in numbers]
    rng.shuffle(parts)
    while len(parts) > 1:
        if limits.chain:
            a, b = parts[:2]
            parts = parts[2:]
        else:
            a, b = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        results = {"+": a.value + b.value, "-": a.value - b.value, "*": a.value * b.value}
        if a.value % b.value == 0:
            results["/"] = a.value // b.value
        allowed = [sign for sign, value in results.items() if 0 < value <= limits.largest_total]
        if not allowed:
            return None
        sign = rng.choice(allowed)
        parts.insert(0, a.joined(sign, b, results[sign]))
    return parts[0]


def draw(rng: random.Random, size: int, limits: Limits) -> Question | None:
    """Draw a question of ``size`` numbers from 1 to ``limits.largest_number``; the target is none of them.

    Returns:
        None if the numbers that were drawn have led to no such target.
    """
    numbers = tuple(rng.randint(1, limits.largest_number) for _ in range(size))
    found = combine(rng, numbers, limits)
    if found and found.value <= limits.largest_target and found.value not in numbers:
        return Question(numbers, found.value, found)
    return None


def draw_many(
    rng: random.Random, sizes: Iterable[int], limits: Limits, exclude: Collection[tuple[int, ...]] = ()
) -> Iterator[Question]:
    """Draw a question for each of ``sizes``, with no key in ``exclude``.

    Raises:
        ValueError: none is found any more.
    """
    for size in sizes:
        for _ in range(MOST_DRAWS):
            if (question := draw(rng, size, limits)) and question.key not in exclude:
                yield question
                break
        else:
            raise ValueError(
                f"no other question of size {size} was found with countdown.largest_number={limits.largest_number} and "
                f"countdown.largest_target={limits.largest_target}: raise them, or ask for fewer questions"
            )


def draw_splits(
    train_size: int, test_size: int, sizes: Iterable[int], limits: Limits, seed: int
) -> tuple[list[Question], list[Question]]:
    """Draw training and held-out questions, equally many per size, all different from each other.

    Raises:
        ValueError: there are not so many.
    """
    rng, sizes = random.Random(seed), tuple(sizes)
    found: dict[tuple[int, ...], Question] = {}
    # Sizes of question after question, held-out ones first.
    order = [sizes[i % len(sizes)] for n in (test_size, train_size) for i in range(n)]
    for question in draw_many(rng, order, limits, found):
        found[question.key] = question
    questions = list(found.values())
    test, train = questions[:test_size], questions[test_size:]
    rng.shuffle(train)
    return train, test
