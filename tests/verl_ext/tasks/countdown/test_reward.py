"""What counts as an answer, and as a right one, in both styles."""

import math

import numpy as np
import pytest

from verl_ext.tasks.countdown.reward import FAILURES, compute_score

TRUTH = {"numbers": [3, 5, 7], "target": 22}


def grade(text: str, truth=TRUTH, **settings) -> str:
    """The failure, once it is clear that all else agrees with it."""
    result = compute_score("size_3", text, truth, **settings)
    assert result["failure"] in FAILURES and result["data_source"] == "size_3"
    assert result["score"] == result["acc"] == float(result["failure"] == "")
    return result["failure"]


@pytest.mark.parametrize(
    "answer, failure",
    [
        ("3*5+7", ""),
        ("7 + (5*3)", ""),
        ("5*3+7", ""),
        ("3+5+7", "wrong"),
        # Each number exactly once.
        ("22", "other numbers"),
        ("3*5+7+3-3", "other numbers"),
        ("3*5", "other numbers"),
        ("7+7+7+1", "other numbers"),
        # A loophole of an expression that is only evaluated: the target from other numbers.
        ("5*5-3", "other numbers"),
        ("3*5+7=22", "not an expression"),
        ("22 = 3*5+7", "not an expression"),
        ("-3+25", "not an expression"),
        ("3**5-7", "not an expression"),
        ("3/(5-5)+7", "division by zero"),
        ("", "not an expression"),
    ],
)
def test_answers(answer, failure):
    assert grade(f"<think>5*3 is 15.</think> <answer> {answer} </answer>") == failure
    assert grade(f"3+5+7=8 15;3*5+7=15 22#{answer}", style="bare") == failure


def test_numbers_may_be_left_out_where_the_setting_says_so():
    truth = {"numbers": [3, 5, 7, 9], "target": 22}
    text = "<answer>3*5+7</answer>"
    assert grade(text, truth) == "other numbers" and grade(text, truth, use_all=False) == ""
    # Never twice.
    assert grade("<answer>7+7+5+3</answer>", truth, use_all=False) == "other numbers"
    twice = {"numbers": [7, 7, 5, 3], "target": 22}
    assert grade("<answer>7+7+5+3</answer>", twice) == grade("<answer>5*3+7</answer>", twice, use_all=False) == ""


def test_fractions_are_exact():
    assert grade("<answer>8/(3-8/3)</answer>", {"numbers": [3, 8, 8, 8], "target": 24}) == "other numbers"
    assert grade("<answer>8/(3-8/3)</answer>", {"numbers": [8, 3, 8, 3], "target": 24}) == ""
    assert grade("<answer>1/3*9</answer>", {"numbers": [1, 3, 9], "target": 3}) == ""


@pytest.mark.parametrize(
    "text, failure",
    [
        ("no answer at all: 3*5+7", "no answer"),
        ("<answer>3*5+7", "no answer"),
        ("3*5+7</answer>", "no answer"),
        ("<answer>3+5+7</answer> no, <answer>3*5+7</answer>", ""),
        ("<answer>3*5+7</answer> or <answer>3+5+7</answer>", "wrong"),
        ("<answer>3*5+7</answer> and more", ""),
        ("<answer><answer>3*5+7</answer>", ""),
        ("<think>the form is <answer> </answer></think><answer>\n3*5+7\n</answer>", ""),
    ],
)
def test_the_last_answer_in_tags_counts(text, failure):
    assert grade(text) == failure


@pytest.mark.parametrize(
    "text, failure",
    [("3*5+7", "no answer"), ("#3*5+7", ""), ("3*5+7=15 22#3*5+7#", "no answer"), ("#1#3*5+7", "no answer")]
    + [("x#3*5+7 ", ""), ("#3*5+7;", "not an expression")],
)
def test_a_bare_answer_is_behind_the_only_mark(text, failure):
    assert grade(text, style="bare") == failure


def test_the_prediction_is_the_answer_without_spaces_and_bounded():
    assert compute_score("", "<answer> 3 * 5 + 7 </answer>", TRUTH)["pred"] == "3*5+7"
    long = compute_score("", f"<answer>{'1+' * 10**6}</answer>", TRUTH)
    assert long["failure"] == "too long" and len(long["pred"]) == 200


def test_ground_truths_as_parquet_gives_them():
    truth = {"numbers": np.array([3, 5, 7]), "target": np.int64(22)}
    assert grade("<answer>3*5+7</answer>", truth) == ""


@pytest.mark.parametrize(
    "truth",
    [None, "22", {"numbers": [1]}, {"target": 3}, {"numbers": ["x"], "target": 3}, np.array(["22"], dtype=object)]
    + [{"numbers": x, "target": 3} for x in ("12", [], [1.5], [math.inf])]
    + [{"numbers": [3], "target": x} for x in (2.5, math.nan, None)],
    ids=str,
)
def test_a_wrong_ground_truth_is_an_error(truth):
    with pytest.raises(ValueError, match="ground_truth must have numbers and a target"):
        compute_score("", "<answer>1</answer>", truth)


def test_an_unknown_style_is_an_error():
    with pytest.raises(ValueError, match="reward_kwargs.style must be one of tags, bare, got 'bear'"):
        compute_score("", "", TRUTH, style="bear")
