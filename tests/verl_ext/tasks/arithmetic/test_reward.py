"""The reward: strict about the form, and fast on any text."""

import math

import pytest
from verl.utils.import_utils import load_extern_object

from verl_ext.tasks.arithmetic.reward import compute_score, parse_answer


@pytest.mark.parametrize("response", ["12 7#7", "#7", "nonsense#7", "12 8#7"], ids=repr)
def test_the_right_answer_behind_the_mark_is_rewarded(response):
    # The working is not graded: the reward is of the outcome.
    assert compute_score("level_2", response, "7")["score"] == 1.0


@pytest.mark.parametrize(
    "response",
    [
        *("", "#", "7", "12 7", "12 7#8", "12 7#77", "12 7#7#7", "12 7##7", "12 7# 7", "12 7#7 ", "12 7#7\n", "7#12 7"),
        *("12 7#07", "12 7#+7", "12 7#-7", "12 7#7.0", "12 7#7e0", "12 7#0x7", "12 7#3+4", "12 7#٧", "12 7#７"),
        *("12 7#int('7')", "12 7#__import__('os')", "12 7#7\x00"),
    ],
    ids=repr,
)
def test_everything_else_is_not(response):
    result = compute_score("level_2", response, "7")
    assert result["score"] == result["acc"] == 0.0


@pytest.mark.parametrize(
    "text",
    ["7" * 100_000, "#" * 100_000, "7#" * 50_000, "#" + "7" * 100_000, "é" * 100_000, " " * 100_000 + "#"],
    ids=["digits", "marks", "pairs", "a long number", "not ASCII", "spaces"],
)
def test_long_text_is_read_once_and_not_rewarded(text):
    assert compute_score("level_2", text, "7")["score"] == 0.0


def test_the_answer_may_follow_long_working():
    assert compute_score("level_2", "1 " * 50_000 + "#7", "7")["score"] == 1.0


def test_what_verl_is_told():
    result = compute_score(
        "level_2", "12 7#8", "7", extra_info={"level": 2, "num_turns": 2}, reward_router_address=None
    )
    assert result == {"score": 0.0, "acc": 0.0, "parsed": 1.0, "pred": "8", "data_source": "level_2"}
    # verl averages numbers and skips texts.
    assert all(isinstance(v, str) or math.isfinite(v) for v in result.values())


def test_answers_are_parsed_or_none():
    assert parse_answer("12 0#0") == "0"
    assert parse_answer("1#123456789") == "123456789"
    assert parse_answer("1#1234567890") is None
    assert parse_answer("12 7") is None


def test_verl_finds_it_by_the_name_in_the_experiment():
    assert load_extern_object("pkg://verl_ext.tasks.arithmetic.reward", "compute_score") is compute_score
