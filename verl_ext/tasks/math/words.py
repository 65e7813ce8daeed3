"""Answers in words: what is language, and when two texts say the same."""

import re

ENVIRONMENT = r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[^{}]*\})?"
"""``\\begin{pmatrix}``: its name is no word."""

ANSWERS = {"yes", "no", "true", "false", "none", "odd", "even", "both", "neither"}
"""Words so short that they could be products of variables."""


def is_words(text: str) -> bool:
    """Whether a text is language: ``\\text{}`` around all of it or a longer word, or four letters in a row."""
    bare = re.sub(ENVIRONMENT + r"|\\(?!text)[A-Za-z]+|_\s*\{[^{}]*\}", " ", text)
    if not re.fullmatch(r"\\text\s*\{[^{}]*\}", bare):
        # A symbol of few letters, or a unit within an expression.
        bare = re.sub(r"\\text\s*\{\s*[A-Za-z]{0,5}\s*\}", " ", bare)
    return bool(re.search(r"\\text\s*\{[^{}]*[A-Za-z\u0080-\uffff]|(?<![\\A-Za-z])[A-Za-z]{4,}", bare))


def same_words(a: str, b: str) -> bool:
    """Whether two texts are the same but for case, spaces and punctuation; numbers and formulas in them count."""
    a, b = (
        re.sub(r"\\text|[^\w<>=+\-*/^:()\[\]\\.]|\.(?!\d)|[()](?=[^()\d,]*[)(]|$)", "", text).casefold()
        for text in (a, b)
    )
    return bool(a) and a == b
