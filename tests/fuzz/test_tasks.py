"""Random answers through the graders: right ones are right in any spelling, and any text costs bounded time."""

import json
import math
import random as randoms
import string
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st

from verl_ext.tasks.arithmetic import reward as arithmetic
from verl_ext.tasks.arithmetic.task import draw as draw_sum
from verl_ext.tasks.countdown import reward as countdown
from verl_ext.tasks.countdown.expression import Malformed, evaluate
from verl_ext.tasks.countdown.task import Limits, draw_many
from verl_ext.tasks.math import reward as mathematics
from verl_ext.tasks.math.grader import BY_WEIGHT, Grader, plainly_equal
from verl_ext.tasks.math.layouts import Unusable, answers_of, question_of, shorten
from verl_ext.tasks.math.normalise import key, normalise
from verl_ext.tasks.math.structure import (
    bracketed,
    is_name,
    plus_minus,
    relation_chain,
    split,
    structure,
    tokens,
    value_of,
    without_braces,
)
from verl_ext.tasks.math.units import units_differ, without_unit
from verl_ext.tasks.math.words import is_words, same_words

PIECES = [
    *"0123456789.,;:+-*/^_=<>|()[]{}%$&'\"~ \n\\", *"xyzabijnAEI", r"\frac", r"\frac{1}{2}", r"\sqrt", r"\sqrt[3]{2}",
    "{", "}", r"\left(", r"\right)", r"\text{", r"\text{ cm}", r"\pm", r"\cup", r"\in", r"\mathbb{R}", r"\infty",
    r"\pi", r"\%", r"\ldots", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\{", r"\}", "^2", "_1", r"^\circ", "e^x",
    r"\leq", r"\neq", r"\sin", r"\log_2", "!", r"\binom{5}{2}", r"\int_0^1", r"\sum_{k=1}^{9}", r"\lim_{x\to0}",
    r"\overline{3}", r"\cdot", "or", " and ", "base", "x=", "f(x)=", r"\boxed{", "</think>", r"\vec{a}", r"\times", "π",
    "½", "²", "−", "∞", "10^", "mod", r"\pmod{5}", r"\lfloor", r"\rfloor", r"\gcd", "9999999999", "1e9", "No",
    r"\emptyset", r"\mid",
]  # fmt: skip
latex = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
texts = st.one_of(latex, st.text(max_size=40))


@pytest.fixture(scope="module")
def grader():
    one = Grader(memory_mb=512)
    yield one
    one.close()


# Mathematics ----------------------------------------------------------------------------------------------------------


@st.composite
def calculations(draw, depth=2):
    """(LaTeX, value) of a calculation with rational numbers, spelled at random; None where it divides by zero."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        n = draw(st.integers(0, 99))
        return str(n), Fraction(n)
    (a, x), (b, y) = (draw(calculations(depth=depth - 1)) for _ in range(2))
    left, right = draw(st.sampled_from([("(", ")"), (r"\left(", r"\right)"), (r"\left( ", r"\,\right)")]))
    kind, space = draw(st.sampled_from("+-*/f^")), draw(st.sampled_from(["", " ", r"\,"]))
    if x is None or y is None or (kind in "/f" and y == 0):
        return "0", None
    if kind == "f":
        return draw(st.sampled_from([r"\frac", r"\dfrac", r"\tfrac"])) + f"{{{a}}}{{{b}}}", x / y
    if kind == "^":
        return f"{left}{a}{right}^{{{2}}}", x * x
    if kind == "*":
        sign = draw(st.sampled_from([r"\cdot ", r"\times ", "*"]))
        return f"{left}{a}{right}{sign}{left}{b}{right}", x * y
    if kind == "/":
        return f"{left}{a}{right}/{left}{b}{right}", x / y
    return f"{left}{a}{right}{space}{kind}{space}{left}{b}{right}", x + y if kind == "+" else x - y


def as_text(value):
    return str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


@cases(150)
@given(calculations(), st.sampled_from([Fraction(1), Fraction(-1), Fraction(1, 7), Fraction(1, 1000)]))
def test_a_calculation_equals_its_value_and_no_other(grader, calculation, other):
    text, value = calculation
    if value is None:
        return
    assert grader.grade(text, [as_text(value)], 20) == (True, "")
    assert grader.grade(as_text(value), [text], 20) == (True, "")
    assert grader.grade(text, [as_text(value + other)], 20) == (False, "wrong")
    if other != -1:
        assert plainly_equal(text, as_text(value + other)) is not True


@cases(250)
@given(latex, st.sampled_from(["42", r"\frac{1}{2}", "x+1", "(1,2)", r"\{1,2\}", "x>2", r"\text{east}", "50\\%"]))
def test_any_latex_is_graded_and_no_fault_of_the_grader(grader, answer, truth):
    started = time.monotonic()
    equal, reason = grader.grade(answer, [truth], 5)
    assert reason in {*BY_WEIGHT, "", "timeout"} - {"grader error"} and equal == (reason == "")
    assert time.monotonic() - started < 5 + 30


@cases(300)
@given(texts)
def test_an_answer_equals_itself(text):
    assert plainly_equal(text, text) is True
    assert key(normalise(text)) == key(normalise(text)) and normalise(text).count("\n") == 0
    assert same_words(text, text) in (True, False) and isinstance(is_words(text), bool)


@cases(300)
@given(texts)
def test_the_structure_of_any_text_loses_nothing_to_errors(text):
    found = structure(text)
    assert found.kind in ("one", "list", "set", "tuple") and all(isinstance(part, str) for part in found.parts)
    assert (len(found.parts) == 1) if found.kind == "one" else True
    parts, seps = split(text, {",", ";"}.__contains__)
    assert len(parts) == len(seps) + 1 and all(part in text for part in parts)
    sides, signs = relation_chain(text)
    assert len(sides) == len(signs) + 1
    inside = bracketed(text)
    assert inside is None or text.startswith(inside[0]) and text.endswith(inside[2]) and inside[1] in text
    assert without_braces(without_braces(text)) == without_braces(text)
    assert all(0 <= depth and text[start:end] for _, start, end, depth in tokens(text))
    assert len(plus_minus([text, "1"])) == len(plus_minus([text])) + 1 <= 3
    assert isinstance(value_of(text), str) and isinstance(is_name(text), bool)
    value, unit = without_unit(text)
    assert value in text and not units_differ(unit, unit)


@cases(300)
@given(texts, texts, st.booleans())
def test_the_box_is_found_in_any_response(before, answer, require_think):
    found, failure = mathematics.boxed_answer(before + answer, require_think)
    assert (failure in mathematics.NO_ANSWER and not found) or (not failure and found)
    opens = Counter(c for c in answer if c in "{}")
    if not opens and "\\" not in answer and answer.strip() and len(answer) < 2000 and "</think>" not in answer:
        # Text before </think> does not matter, nor does text without a box behind it.
        response = f"{before}</think> \\boxed{{{answer}}} so it is."
        assert mathematics.boxed_answer(response, require_think) == (answer.strip(), "")


truths = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.decimals()),
    lambda x: st.lists(x, max_size=3),
)


@cases(200)
@given(truths)
def test_a_ground_truth_is_texts_or_refused(value):
    try:
        found = mathematics.ground_truths(value)
    except ValueError as e:
        assert "ground truth" in str(e)
        return
    assert found and all(isinstance(text, str) and text.strip() == text != "" for text in found)
    assert mathematics.ground_truths(found) == found


names = st.sampled_from(
    ["problem", "question", "prompt", "answer", "solution", "reward_model", "messages", "images", "choices", "x"]
)
contents = st.recursive(
    st.one_of(truths, texts, st.just({"role": "user", "content": "1+1?"})),
    lambda x: st.one_of(
        st.lists(x, max_size=2),
        st.dictionaries(st.sampled_from(["role", "content", "ground_truth", "from", "value", "type"]), x, max_size=3),
    ),
    max_leaves=5,
)


@cases(300)
@given(st.one_of(st.dictionaries(names, contents, max_size=4), contents))
def test_any_record_is_read_or_unusable_with_a_reason(record):
    try:
        messages, problem, notes = question_of(record, "Box it.")
        assert problem.strip() == problem != "" and messages[-1]["content"].endswith("Box it.")
        json.dumps(messages, ensure_ascii=False).encode()
        # What was written is read the same.
        assert question_of({"prompt": messages}, "Box it.")[:2] == (messages, problem)
    except Unusable as e:
        assert e.reason
    try:
        found, left_out = answers_of(record)
        assert found and all(found) and all(e.reason for e in left_out)
    except Unusable as e:
        assert e.reason


@cases(200)
@given(st.text())
def test_a_shortened_text_is_a_line(text):
    line = shorten(text)
    assert len(line) <= 80 and "\n" not in line and line.encode() is not None


# Countdown and arithmetic ---------------------------------------------------------------------------------------------


@cases(200)
@given(st.integers(0, 2**32), st.integers(3, 6), st.booleans(), st.sampled_from(["tags", "bare"]), texts)
def test_a_solution_is_right_and_a_change_is_not(seed, size, chain, style, noise):
    rng = randoms.Random(seed)
    (question,) = draw_many(rng, [size], Limits(largest_number=20, largest_target=99, chain=chain))
    text = question.solution.text
    assert evaluate(text) == (question.target, evaluate(text)[1])
    assert Counter(evaluate(text)[1]) == Counter(question.numbers)
    noise = noise.replace("#", "")
    wrap = (lambda x: f"{noise}<answer>{x}</answer>") if style == "tags" else (lambda x: f"{noise}#{x}")

    def grade(answer, truth=question.truth):
        return countdown.compute_score("", wrap(answer), truth, style=style)

    assert grade(text)["score"] == 1.0 and grade(f" ({text}) ")["failure"] == ""
    assert grade(text, question.truth | {"target": question.target + 1})["failure"] == "wrong"
    assert grade(f"{text}+1")["failure"] == "other numbers"
    assert grade(noise)["failure"] in countdown.FAILURES


@cases(300)
@given(texts, st.booleans(), st.sampled_from(["tags", "bare"]))
def test_any_response_to_countdown_is_graded(text, use_all, style):
    for response in (text, f"<answer>{text}</answer>", f"#{text}"):
        found = countdown.compute_score("", response, {"numbers": [1, 2], "target": 3}, use_all=use_all, style=style)
        assert found["failure"] in countdown.FAILURES and found["score"] == float(found["failure"] == "")
    try:
        value, numbers = evaluate(text)
        assert isinstance(value, Fraction) and all(isinstance(n, int) for n in numbers)
    except Malformed as e:
        assert str(e) in countdown.FAILURES


@cases(200)
@given(st.integers(0, 2**32), st.text(string.digits + "+=# ", max_size=12))
def test_arithmetic_takes_one_number_behind_one_mark(seed, text):
    found = arithmetic.compute_score("", text, "7")
    assert found["score"] == float(text.count("#") == 1 and text.partition("#")[2] == "7")
    assert draw_sum(randoms.Random(seed), 3)


# A corpus of hostile answers ------------------------------------------------------------------------------------------

HOSTILE = [
    json.loads(line)
    for line in Path(__file__).with_name("hostile.jsonl").read_text().splitlines()
    if not line.startswith("//")
]
"""Each a name and parts, ``[text, how often]``. What a fuzzed grader stumbled over belongs there."""


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case["what"])
def test_a_hostile_answer_costs_bounded_time_and_memory(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = "".join(text * times for text, times in case["parts"])
    limits = dict(timeout=1.0, memory_mb=512, processes=1)
    started, used = time.monotonic(), time.process_time()
    result = mathematics.compute_score("", rf"</think> \boxed{{{answer}}}", "42", **limits)
    # This process only finds the box and spells it; the child has a second, and two to start.
    assert time.process_time() - used < 2 and time.monotonic() - started < 30
    assert result["score"] == 0.0 and result["failure"] in {*mathematics.FAILURES} - {"", "grader error"}
    assert countdown.compute_score("", f"<answer>{answer}</answer>", {"numbers": [42], "target": 42})["score"] == 0.0
    assert arithmetic.compute_score("", f"#{answer}", "42")["score"] == 0.0
    # The next answer is graded.
    assert (
        mathematics.compute_score("", r"</think> \boxed{\frac{84}{2}}", "42", **limits | {"timeout": 20})["score"] == 1
    )
    assert not list(tmp_path.iterdir()) and math.isfinite(result["score"])
