"""Questions against Python's own integers, and their lengths in tokens."""

import random
import re

import pytest

from verl_ext.tasks.arithmetic.model import build_tokenizer
from verl_ext.tasks.arithmetic.pretrain import encode
from verl_ext.tasks.arithmetic.reward import compute_score, parse_answer
from verl_ext.tasks.arithmetic.task import GUESS_MOST, LEVELS, Question, draw, draw_many


@pytest.fixture(scope="module")
def questions():
    return list(draw_many(random.Random(0), LEVELS * 300))


def terms(text: str) -> list[int]:
    """The signed numbers of a question: "4+8-5=" -> [4, 8, -5]."""
    assert re.fullmatch(r"[1-9]([+-][1-9])+=", text), text
    return [int(term) for term in re.findall(r"[+-]?[0-9]", text)]


def test_totals_and_answers_are_right(questions):
    for q in questions:
        numbers = terms(q.text)
        assert q.totals == tuple(sum(numbers[: i + 2]) for i in range(len(numbers) - 1))
        assert q.answer == str(sum(numbers))
        assert min(q.totals) >= 0


def test_the_level_is_the_number_of_operations(questions):
    assert {q.level for q in questions} == set(LEVELS)
    assert all(q.level == len(terms(q.text)) - 1 for q in questions)


def test_both_operations_and_all_digits_occur(questions):
    text = "".join(q.text for q in questions)
    assert set(text) == set("123456789+-=")


def test_a_solution_shows_each_total_and_earns_the_reward(questions):
    for q in questions:
        working, answer = q.solution.split("#")
        assert [int(total) for total in working.split(" ")] == list(q.totals)
        assert parse_answer(q.solution) == answer == q.answer
        assert compute_score("level_1", q.solution, q.answer)["score"] == 1.0


def test_careless_solutions_guess_or_slip_ever_more_often_in_longer_chains(questions):
    rng = random.Random(0)
    right, guessed = ({level: [] for level in LEVELS} for _ in range(2))
    for q in questions:
        response = q.careless_solution(rng)
        working, answer = response.split("#")
        assert parse_answer(response) == answer
        guessed[q.level].append(not working)
        if working:
            # Graded like any response: it answers with its own last total.
            totals = working.split(" ")
            assert len(totals) == q.level and answer == totals[-1]
        right[q.level].append(compute_score("", response, q.answer)["score"])
    share = {level: sum(scores) / len(scores) for level, scores in right.items()}
    assert share[1] > 0.9 and share[max(LEVELS)] < 0.2
    assert share[1] > share[3] > share[6]
    longest = guessed[max(LEVELS)]
    assert not any(guessed[1]) and abs(sum(longest) / len(longest) - GUESS_MOST) < 0.05


def test_a_slip_carries_on():
    question = Question("9+9+9+9=", (18, 27, 36))
    drawn = {question.careless_solution(random.Random(seed)) for seed in range(5000)}
    assert question.solution in drawn
    # One slip, at the first operation, by one: all later totals are off by one.
    assert "19 28 37#37" in drawn
    # A guess, right or not.
    assert {"#36", "#38"} <= drawn


def test_the_same_seed_draws_the_same_questions():
    first, second, other = (list(draw_many(random.Random(seed), LEVELS * 5)) for seed in (3, 3, 4))
    assert first == second != other


def test_excluded_questions_are_never_drawn():
    every = {draw(random.Random(seed), 1).text for seed in range(5000)}
    # All of level 1: 9 x 9 sums, and the differences that are not negative.
    assert len(every) == 81 + 45
    kept = sorted(every)[:3]
    drawn = {q.text for q in draw_many(random.Random(0), [1] * 200, exclude=every - set(kept))}
    assert drawn == set(kept)


def test_prompts_and_solutions_fit_into_32_tokens(questions):
    tokenizer = build_tokenizer()
    prompts, responses = zip(*(encode(tokenizer, q.text, q.solution) for q in questions), strict=True)
    assert max(map(len, prompts)) <= 32
    assert max(map(len, responses)) <= 32
    # The longest possible: every total of two digits. verl_ext/config/task/arithmetic.yaml says 21.
    assert len(tokenizer.encode(" ".join(["99"] * max(LEVELS)) + "#99")) + 1 == 21
