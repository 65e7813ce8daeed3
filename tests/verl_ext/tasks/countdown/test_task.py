"""Questions that are solvable, different and within their limits; responses that are what they should be."""

import itertools
import random
import re

import pytest

from verl_ext.tasks.countdown.expression import evaluate
from verl_ext.tasks.countdown.reward import compute_score, judge
from verl_ext.tasks.countdown.task import (
    LONGEST_RESPONSE,
    SIZES,
    Combination,
    Limits,
    Question,
    combine,
    draw_many,
    draw_splits,
)

TOY, REAL = Limits(9, 99, chain=True), Limits(99, 100)


@pytest.fixture(scope="module", params=[TOY, REAL], ids=["toy", "real"])
def drawn(request):
    return request.param, list(draw_many(random.Random(0), SIZES * 200, request.param))


def test_every_question_is_solvable_and_within_its_limits(drawn):
    limits, questions = drawn
    for q in questions:
        assert judge(q.solution.text, q.numbers, q.target, use_all=True) == ""
        assert max(q.numbers) <= limits.largest_number and 0 < q.target <= limits.largest_target
        assert q.target not in q.numbers and len(q.solution.totals) == q.size - 1
        assert all(0 < total <= limits.largest_total for total in q.solution.totals)
    assert {q.size for q in questions} == set(SIZES)
    assert set("+-*/()") <= set("".join(q.solution.text for q in questions))


def test_all_shapes_occur_where_no_chain_is_asked_for(drawn):
    limits, questions = drawn
    # An operation on two results: parentheses on the right.
    two_results = [q for q in questions if re.search(r"[-+*/]\(", q.solution.text)]
    assert bool(two_results) == (not limits.chain)


@pytest.mark.parametrize(
    "left, sign, right, text",
    [("1+2", "*", "3", "(1+2)*3"), ("1*2", "+", "3", "1*2+3"), ("1", "-", "2+3", "1-(2+3)"), ("1", "-", "2*3", "1-2*3")]
    + [("6", "/", "2*3", "6/(2*3)"), ("1-2", "-", "3", "1-2-3"), ("1+2", "/", "3-4", "(1+2)/(3-4)")],
)
def test_parentheses_where_they_are_needed(left, sign, right, text):
    def of(t):
        return Combination(t, 0, binds=1 if set(t) & set("+-") else 2 if set(t) & set("*/") else 3)

    joined = of(left).joined(sign, of(right), 0)
    assert joined.text == text
    assert evaluate(text) == evaluate(f"({left}){sign}({right})")


def test_splits_are_disjoint_different_and_even():
    train, test = draw_splits(800, 80, SIZES, TOY, seed=1)
    keys = [q.key for q in train + test]
    assert len(set(keys)) == 880
    # The same numbers in another order are the same question.
    assert Question((7, 3, 5), 22, None).key == Question((3, 5, 7), 22, None).key
    for split in (train, test):
        assert [sum(q.size == size for q in split) for size in SIZES] == [len(split) // 4] * 4
    assert draw_splits(800, 80, SIZES, TOY, seed=1) == (train, test)
    assert draw_splits(800, 80, SIZES, TOY, seed=2) != (train, test)


def test_the_toy_task_has_1840_questions_of_size_3():
    """As verl_ext/config/experiment/countdown_cpu.yaml says: numbers in any order, every chain, worked out again."""
    found = set()
    for order in itertools.product(range(1, 10), repeat=3):
        totals = {order[0]}
        for b in order[1:]:
            results = {v for a in totals for v in (a + b, a - b, a * b, a // b if a % b == 0 else 0)}
            totals = {v for v in results if 0 < v <= 99}
        found |= {(target, *sorted(order)) for target in totals - set(order)}
    assert len(found) == 1840
    assert {q.key for q in draw_many(random.Random(0), [3] * 500, TOY)} <= found


def test_limits_that_leave_too_few_questions_are_an_error():
    with pytest.raises(ValueError, match="no other question of size 3 .*_number=2 and countdown.largest_target=4"):
        draw_splits(100, 10, (3,), Limits(2, 4), seed=1)


def test_careful_responses_are_right_and_show_their_totals():
    rng = random.Random(0)
    tries = []
    for q in draw_many(rng, SIZES * 100, TOY):
        text = q.bare_response(rng, TOY)
        assert compute_score("", text, q.truth, style="bare")["score"] == 1.0 and len(text) <= LONGEST_RESPONSE
        attempts = text.partition("#")[0].split(";")
        tries.append(len(attempts))
        for i, attempt in enumerate(attempts):
            expression, _, totals = attempt.partition("=")
            value, numbers = evaluate(expression)
            assert sorted(numbers) == sorted(q.numbers) and value == int(totals.split()[-1])
            # It ends with the first right one.
            assert (value == q.target) == (i == len(attempts) - 1)
    assert set(tries) == {1, 2, 3, 4, 5}


def test_careless_responses_answer_with_wrong_attempts_too():
    rng = random.Random(0)
    scores = []
    for q in draw_many(rng, SIZES * 200, TOY):
        text = q.bare_response(rng, TOY, careless=True)
        result = compute_score("", text, q.truth, style="bare")
        assert result["failure"] in ("", "wrong") and len(text) <= LONGEST_RESPONSE
        scores.append(result["score"])
    assert 0.3 < sum(scores) / len(scores) < 0.7


def test_an_order_without_a_further_operation_is_none():
    # 3-2 is within the limits; with 2 first, nothing is.
    seen = {combine(random.Random(seed), (2, 3), Limits(3, 1, chain=True)) for seed in range(20)}
    assert {c and c.text for c in seen} == {None, "3-2"}


@pytest.mark.parametrize("limits", [Limits(1, 1), Limits(9, 0)], ids=str)
def test_limits_that_leave_no_question_end_with_their_names(limits, monkeypatch):
    monkeypatch.setattr("verl_ext.tasks.countdown.task.MOST_DRAWS", 50)
    with pytest.raises(ValueError, match=f"countdown.largest_target={limits.largest_target}: raise them"):
        next(draw_many(random.Random(0), [3], limits))
