"""Read an expression of ``+ - * /``, parentheses and whole numbers, exactly and within bounds.

Own grammar, own parser: a text that a model wrote is never given to ``eval``.

    sum     = product (("+" | "-") product)*
    product = atom (("*" | "/") atom)*
    atom    = digits | "(" sum ")"

There is no sign in front of a number, since the game has none, and no ``**`` or ``//``.
"""

import re
from fractions import Fraction

LONGEST = 200
"""Characters. Six numbers of three digits with all parentheses that make sense have below 60."""

DEEPEST = 20
"""Parentheses within each other."""

MOST_DIGITS = 6
"""Of a number; with ``LONGEST``, the bound of all values."""

TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*/()]))")


class Malformed(ValueError):
    """A text is no expression, or has no value; the message says why in a few words."""


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """Evaluate an expression.

    Returns:
        Its value, and the numbers in it, in order.

    Raises:
        Malformed: it breaks the grammar or a bound, or divides by zero.
    """
    if len(text) > LONGEST:
        raise Malformed("too long")
    tokens, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise Malformed("not an expression")
        digits, sign = match.groups()
        if digits and len(digits) > MOST_DIGITS:
            raise Malformed("too long")
        tokens.append(int(digits) if digits else sign)
        position = match.end()
    # Popped from the end; None is never popped.
    rest: list[int | str | None] = [None, *reversed(tokens)]
    value = _sum(rest, 0)
    if rest[-1] is not None:
        raise Malformed("not an expression")
    return value, [token for token in tokens if isinstance(token, int)]


def _sum(rest: list, depth: int) -> Fraction:
    value = _product(rest, depth)
    while rest[-1] in ("+", "-"):
        sign = rest.pop()
        term = _product(rest, depth)
        value = value + term if sign == "+" else value - term
    return value


def _product(rest: list, depth: int) -> Fraction:
    value = _atom(rest, depth)
    while rest[-1] in ("*", "/"):
        sign = rest.pop()
        factor = _atom(rest, depth)
        if sign == "/" and factor == 0:
            raise Malformed("division by zero")
        value = value * factor if sign == "*" else value / factor
    return value


def _atom(rest: list, depth: int) -> Fraction:
    token = rest[-1]
    if isinstance(token, int):
        return Fraction(rest.pop())
    if token != "(":
        raise Malformed("not an expression")
    if depth == DEEPEST:
        raise Malformed("too deep")
    rest.pop()
    value = _sum(rest, depth + 1)
    if rest[-1] != ")":
        raise Malformed("not an expression")
    rest.pop()
    return value
