"""The parser of untrusted expressions: values, what it refuses, and its bounds."""

import ast
import operator
import re
import time
from fractions import Fraction

import pytest
from fuzzing import cases
from hypothesis import example, given
from hypothesis import strategies as st

from verl_ext.tasks.countdown.expression import DEEPEST, LONGEST, MOST_DIGITS, Malformed, evaluate

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def by_python(text: str) -> Fraction:
    """The value by Python's own grammar, in fractions."""

    def walk(node: ast.AST) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
        return Fraction(node.value)

    return walk(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize(
    "text, value, numbers",
    [
        ("7", 7, [7]),
        ("3*5+7", 22, [3, 5, 7]),
        ("3+5*7", 38, [3, 5, 7]),
        (" ( 3 + 5 )*7 ", 56, [3, 5, 7]),
        ("8-3-2", 3, [8, 3, 2]),
        ("8/4/2", 1, [8, 4, 2]),
        ("1/3*3", 1, [1, 3, 3]),
        ("(1+2)/4", Fraction(3, 4), [1, 2, 4]),
        ("((12))-(2-(3-9))", 4, [12, 2, 3, 9]),
        ("007", 7, [7]),
    ],
)
def test_values_are_exact_and_numbers_are_listed(text, value, numbers):
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize(
    "text, reason",
    [(text, "not an expression") for text in ("", " ", "()", "(1", "1)", "1 2", "2(3)", "1+", "*1", "-1", "+1", "1+-2")]
    + [(text, "not an expression") for text in ("2**3", "7//2", "7%2", "1,2", "1.5", "1e3", "a", "1=1", "1<2", "２+1")]
    + [(text, "not an expression") for text in ("__import__('os')", "3×5", "1_000", "[1]", "1;2", "1\x002", "(1)(2)")]
    + [("1/0", "division by zero"), ("4/(2-1-1)", "division by zero"), ("1/(1/0)", "division by zero")]
    + [("1" * (MOST_DIGITS + 1), "too long"), ("1+" * LONGEST, "too long"), (" " * (LONGEST + 1), "too long")]
    + [("(" * (DEEPEST + 1) + "1" + ")" * (DEEPEST + 1), "too deep")],
)
def test_everything_else_is_refused_with_a_reason(text, reason):
    with pytest.raises(Malformed, match=reason):
        evaluate(text)


def test_the_bounds_are_inclusive():
    nested = "(" * DEEPEST + "9" * MOST_DIGITS + ")" * DEEPEST
    assert evaluate(nested.ljust(LONGEST)) == (10**MOST_DIGITS - 1, [10**MOST_DIGITS - 1])


trees = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.builds(lambda a, sign, b: f"({a}){sign}({b})", inner, st.sampled_from("+-*/"), inner),
    max_leaves=6,
)


@cases(300)
@given(text=trees | st.lists(st.sampled_from([*"0123456789", *"+-*/", " ", "(", ")"]), max_size=20).map("".join))
@example(text=" 00/0")
@example(text="(0/0")
def test_it_agrees_with_pythons_grammar(text):
    # Python alone refuses leading zeros and a space in front.
    as_python = re.sub(r"\b0+(?=\d)", "", text).strip()
    try:
        value, _ = evaluate(text)
    except Malformed as e:
        if str(e) == "division by zero":
            # The text may break the grammar as well, further on.
            with pytest.raises((ZeroDivisionError, SyntaxError)):
                by_python(as_python)
        return
    assert value == by_python(as_python)


@cases(300)
@given(text=st.text(max_size=300))
def test_any_text_has_a_value_or_a_reason(text):
    try:
        evaluate(text)
    except Malformed as e:
        assert str(e)


def test_the_worst_texts_take_no_time():
    worst = [
        "9" * MOST_DIGITS + ("/" + "9" * MOST_DIGITS) * 27,
        "(" * LONGEST,
        "1-" * (LONGEST // 2),
        "1/(2+" * 19 + "1",
    ]
    started = time.perf_counter()
    for text in worst:
        try:
            evaluate(text)
        except Malformed:
            pass
    assert time.perf_counter() - started < 0.5
