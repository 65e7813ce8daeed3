"""Each rule does what its example says, is needed for it, and takes bounded time."""

import time

import pytest

from verl_ext.tasks.math import normalise as module
from verl_ext.tasks.math.normalise import LOOKS_LIKE, RULES, key, normalise


def same(a: str, b: str) -> bool:
    return a.replace(" ", "") == b.replace(" ", "")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.before)
def test_a_rule_does_what_its_case_says_and_is_needed_for_it(rule, monkeypatch):
    assert same(normalise(rule.before), rule.after)
    monkeypatch.setattr(module, "RULES", [r for r in RULES if r is not rule])
    assert normalise.__wrapped__(rule.before) != rule.after


def test_normal_text_stays():
    plain = ("42", r"\frac{1}{2}", r"x^{2}+1", "(0,1)", r"\sqrt{2}", r"\text{east}")
    for text in (*plain, r"\begin{pmatrix}1\\2\end{pmatrix}"):
        assert normalise(text) == text


@pytest.mark.parametrize(
    "text, expected",
    [
        *(("１２", "12"), ("√2", r"\sqrt{2}"), ("x²", "x^{2}"), ("–3", "-3"), ("90°", r"90^\circ"), ("€5", "5")),
        *(("3½", r"(3+\frac{1}{2})"), ("0 < x ≤ 1", r"0 < x \leq 1"), ("∅", r"\emptyset")),
        ("(−∞, 2)", r"(-\infty , 2)"),
    ],
)
def test_characters_that_latex_writes_otherwise(text, expected):
    assert same(normalise(text), expected)


def test_every_replacement_of_a_character_is_ascii():
    assert all(value.isascii() for value in LOOKS_LIKE.values())


@pytest.mark.parametrize(
    "a, b, same_key",
    [
        ("(1, 2)", "(1,2)", True),
        (r"\frac{1}{2}", r"\frac12", True),
        ("x^{2}", "x^2", True),
        (r"2\times 3", r"2\cdot3", True),
    ]
    + [("1, 234", "1,234", False), ("3 4", "34", False), ("x^{12}", "x^12", False), (r"\text{east}", "east", True)],
)
def test_the_key_of_two_spellings(a, b, same_key):
    assert (key(a) == key(b)) is same_key


HOSTILE = ["{", "(", r"\text{", r"\frac{", "1,", "1 ", "a", r"\pm", "^{", r"\sqrt(", "answer is ", r"\quad", "0.3"]
HOSTILE += ["9" * 7 + "."]


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_is_bounded_by_the_length(piece):
    text = (piece * 2000)[:2000]
    for hostile in (text, text + r"\ldots", "1" + text + "}"):
        started = time.process_time()
        key(normalise.__wrapped__(hostile))
        assert time.process_time() - started < 0.5, hostile[:40]
