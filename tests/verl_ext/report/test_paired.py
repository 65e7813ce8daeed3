"""The paired interval: by hand, and how often it holds the truth on simulated runs."""

import math

import numpy as np
import pytest

from verl_ext.report.paired import paired_interval

T2, T3 = 4.302653, 3.182446
"""Student's 97.5 % points of 2 and 3 degrees of freedom."""


def one(questions: int) -> np.ndarray:
    return np.zeros(questions, int)


def test_by_hand():
    # Rows 0, 1, 2 apart, the same for all questions: the means of seeds are 0, 1, 2, and nothing else varies.
    seeds = np.array([[0.0] * 4, [1.0] * 4, [2.0] * 4])
    assert paired_interval(seeds, one(4)) == (1.0, pytest.approx(T2 * math.sqrt(1 / 3), rel=1e-5))
    # The same for all seeds: the variance of 0, 1, 2, 3 is 5 / 3.
    questions = np.array([[0.0, 1.0, 2.0, 3.0]] * 3)
    assert paired_interval(questions, one(4)) == (1.5, pytest.approx(T3 * math.sqrt(5 / 12), rel=1e-5))
    # Both at once: the two add up, and the rest is 0.
    both = math.hypot(T2 * math.sqrt(1 / 3), T3 * math.sqrt(5 / 12))
    assert paired_interval(seeds + questions, one(4)) == (2.5, pytest.approx(both, rel=1e-5))
    # What is left of a question's mean without the seeds' noise in it is not below 0.
    rest = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert paired_interval(rest, one(2)) == (0.0, 0.0)


def test_a_higher_confidence_is_a_wider_interval():
    # Student's 99.5 % point of 2 degrees of freedom.
    seeds = np.array([[0.0] * 4, [1.0] * 4, [2.0] * 4])
    assert paired_interval(seeds, one(4), 0.99)[1] == pytest.approx(9.924843 * math.sqrt(1 / 3), rel=1e-5)


def test_a_single_seed_has_an_interval_over_questions_and_a_single_question_one_over_seeds():
    assert paired_interval(np.array([[0.0, 1.0, 2.0, 3.0]]), one(4))[1] == pytest.approx(
        T3 * math.sqrt(5 / 12), rel=1e-5
    )
    assert paired_interval(np.array([[0.0], [1.0], [2.0]]), one(1))[1] == pytest.approx(T2 * math.sqrt(1 / 3), rel=1e-5)
    assert math.isnan(paired_interval(np.array([[1.0]]), one(1))[1])


def test_each_benchmark_counts_the_same():
    # Two questions of one benchmark, four of another.
    differences = np.array([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]] * 2)
    mean, half = paired_interval(differences, np.array(["a", "a", "b", "b", "b", "b"]))
    assert (mean, half) == (0.5, 0.0)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("of_seeds", [0.0, 0.4], ids=["seeds alike", "seeds differ"])
@pytest.mark.parametrize("of_questions", [0.0, 0.7], ids=["questions alike", "questions differ"])
def test_it_holds_the_truth_as_often_as_it_says(seeds, of_seeds, of_questions):
    if seeds == 1 and of_seeds:
        pytest.skip("nothing can be known of other seeds")
    rng, held, runs = np.random.default_rng(0), 0, 600
    for _ in range(runs):
        # One sample per question of two methods that are equally good: right or wrong.
        difficulty = rng.normal(0, 1.5, 60)
        a, b = (difficulty + rng.normal(0, of_questions, 60) + rng.normal(0, of_seeds, (seeds, 1)) for _ in "ab")
        right = [rng.random((seeds, 60)) < 1 / (1 + np.exp(-logit)) for logit in (a, b)]
        mean, half = paired_interval(right[0].astype(float) - right[1], one(60))
        held += abs(mean) <= half
    # Two standard errors of 600 runs are 1.8 points.
    assert 0.93 <= held / runs <= 0.99
