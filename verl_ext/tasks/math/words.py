"""Recognise and compare answers in words."""

import re

ENVIRONMENT = r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[^{}]*\})?"
"""``\\begin{pmatrix}``, whose name is not a word."""

ANSWERS = {"yes", "no", "true", "false", "none", "odd", "even", "both", "neither"}
"""Words that are short enough to be products of variables."""


def is_words(text: str) -> bool:
    """Tell whether a text is language: ``\\text{}`` around all of it or a longer word, or four letters in a row."""
    bare = re.sub(ENVIRONMENT + r"|\\(?!text)[A-Za-z]+|_\s*\{[^{}]*\}", " ", text)
    if not re.fullmatch(r"\\text\s*\{[^{}]*\}", bare):
        # Short text is a symbol, or a unit within an expression.
        bare = re.sub(r"\\text\s*\{\s*[A-Za-z]{0,5}\s*\}", " ", bare)
    return bool(re.search(r"\\text\s*\{[^{}]*[A-Za-z\u0080-\uffff]|(?<![\\A-Za-z])[A-Za-z]{4,}", bare))


def same_words(a: str, b: str) -> bool:
    """Tell whether two texts are equal except for case, spaces and punctuation; numbers and formulas count."""
    a, b = (
        re.sub(r"\\text|[^\w<>=+\-*/^:()\[\]\\.]|\.(?!\d)|[()](?=[^()\d,]*[)(]|$)", "", text).casefold()
        for text in (a, b)
    )
    return bool(a) and a == b
