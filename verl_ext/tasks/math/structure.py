"""Find an answer's structure: one expression, a list, a set, a tuple; and which side of an equation is a name."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from verl_ext.tasks.math.words import ENVIRONMENT, is_words

OPEN = ("(", "[", r"\{", r"\langle", "{", r"\lfloor", r"\lceil")
CLOSE = (")", "]", r"\}", r"\rangle", "}", r"\rfloor", r"\rceil")
TOKEN = re.compile(
    r"\\text\s*\{\s*,?\s*(?P<word>and|or)\s*,?\s*\}|(?<![\\A-Za-z])(?P<bare>and|or)(?![A-Za-z])"
    r"|\\begin\s*\{|\\end\s*\{|\\[A-Za-z]+|\\.|[<>]=?|[\[\](){},;=|:]",
    re.DOTALL,
)
"""The tokens that decide the structure of an answer."""

JOINS = {"or": {"or", r"\lor", r"\vee"}, "and": {"and", r"\land", r"\wedge"}}
SEPARATORS = {",", ";", r"\quad", r"\qquad", r"\cr", *JOINS["or"], *JOINS["and"]}

RELATIONS = {"<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", r"\neq": "!=", "=": "=", r"\approx": "~", r"\in": "in"}
INEQUALITIES = {"<", ">", "<=", ">=", "!="}


@dataclass(frozen=True)
class Thing:
    """The structure of an answer.

    Args:
        kind: "one" (an expression, a condition, words), "list" (parts in no order), "set" (no order, no repeats) or
            "tuple" (parts in order; a pair may be an interval).
        parts: texts; "one" has a single part.
        brackets: those of a "tuple".
        joined: "and" or "or", if it is between the parts of a "list".
    """

    kind: str
    parts: tuple[str, ...]
    brackets: str = ""
    joined: str = ""


def tokens(text: str) -> Iterator[tuple[str, int, int, int]]:
    """Yield (token, start, end, depth); a bracket has the depth outside it.

    Round and square brackets may close each other, as in intervals.
    """
    depth = 0
    for match in TOKEN.finditer(text):
        token = match["word"] or match["bare"] or match[0]
        begins, ends = token.startswith(r"\begin"), token.startswith(r"\end")
        if token in CLOSE or ends:
            depth = max(depth - 1, 0)
        yield token, match.start(), match.end(), depth
        # The name after \begin has braces of its own.
        depth += (token in OPEN) + 2 * begins + ends


def split(text: str, at: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Split ``text`` at the outermost tokens for which ``at`` holds; return the parts and those tokens."""
    parts, found, last = [], [], 0
    for token, start, end, depth in tokens(text):
        if depth == 0 and at(token):
            parts.append(text[last:start].strip())
            found.append(token)
            last = end
    return [*parts, text[last:].strip()], found


def bracketed(text: str) -> tuple[str, str, str] | None:
    """Return (opening, inside, closing) of a text that is one pair of brackets; else None."""
    first = next(tokens(text), None)
    if first is None or first[1] != 0 or first[0] not in OPEN:
        return None
    for token, start, end, depth in tokens(text):
        if depth == 0 and start > 0 and token in CLOSE:
            return (first[0], text[first[2] : start].strip(), token) if end == len(text) else None
    return None


def without_braces(text: str) -> str:
    """Remove braces around all of ``text``."""
    while (whole := bracketed(text)) and whole[0] == "{" and whole[2] == "}":
        text = whole[1]
    return text


@lru_cache(maxsize=64)
def structure(text: str, thousands: bool = True) -> Thing:
    """Find the structure of a normalised text; with ``thousands``, 1,234 is one number."""
    text = without_braces(text)
    if thousands:
        text = join_thousands(text)
    if whole := bracketed(text):
        opening, inside, closing = whole
        if opening in "([" and len(both := plus_minus([text])) > 1:
            return Thing("list", tuple(both))
        parts, _ = split(inside, {",", ";"}.__contains__)
        if opening == r"\{":
            if builder(inside):
                return Thing("one", (text,))
            return Thing("set", tuple(plus_minus([part for part in parts if part])))
        if opening in ("(", "[", r"\langle") and closing in (")", "]", r"\rangle"):
            if len(parts) > 1:
                brackets = (opening + closing).replace(r"\langle", "(").replace(r"\rangle", ")")
                return Thing("tuple", tuple(parts), brackets)
            if inside and opening != r"\langle":
                return structure(inside, thousands)
    parts, found = split(text, SEPARATORS.__contains__)
    kept = [part for part in parts if part]
    if len(kept) > 1:
        joined = next((name for name, signs in JOINS.items() if signs & set(found)), "")
        return Thing("list", tuple(plus_minus(kept)), joined=joined)
    if kept and kept[0] != text:
        return structure(kept[0], thousands)
    both = plus_minus([text])
    return Thing("list", tuple(both)) if len(both) > 1 else Thing("one", (text,))


def join_thousands(text: str) -> str:
    """Remove the commas of 1,234,567 outside brackets."""
    commas = {start for token, start, _, depth in tokens(text) if token == "," and depth == 0}
    numbers = re.finditer(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)", text)
    within = {match.start() + i for match in numbers for i, c in enumerate(match[0]) if c == ","}
    return "".join(c for i, c in enumerate(text) if i not in commas & within)


def plus_minus(parts: Sequence[str]) -> list[str]:
    """Write a part with plus-minus signs twice: with all upper signs, and with all lower signs."""
    found = []
    for part in parts:
        if re.search(r"\\pm(?![A-Za-z])", part):
            for pm, mp in (("+", "-"), ("-", "+")):
                one = re.sub(r"\\mp(?![A-Za-z])", mp, re.sub(r"\\pm(?![A-Za-z])", pm, part))
                found.append(re.sub(r"^\s*\+|(?<=[=(,\[{])\s*\+", "", one).strip())
        else:
            found.append(part)
    return found


def builder(inside: str) -> tuple[str, str] | None:
    """Return (domain, condition) of x \\in domain | condition in braces, else None; the domain may be empty."""
    for sign in ("|", ":"):
        parts, found = split(inside, sign.__eq__)
        if len(found) == 1 and (named := re.fullmatch(r"[A-Za-z](?:\s*\\in(.*))?", parts[0], re.DOTALL)):
            return (named[1] or "").strip(), parts[1]
    return None


# Equations ------------------------------------------------------------------------------------------------------------


def relation_chain(text: str) -> tuple[list[str], list[str]]:
    """Split a chain of relations, a < b < c, into its sides and the relations by their names in ``RELATIONS``."""
    sides, found = split(text, RELATIONS.__contains__)
    return sides, [RELATIONS[token] for token in found]


WORD = r"(?:angle|triangle|overline|vec|text|mathrm|operatorname|mathcal|[A-Z]?[a-z]+)"
SUBSCRIPT = r"(?:\s*_\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\w|\\[A-Za-z]+))?"
ARGUMENTS = r"(?:\s*\((?:[^()]|\([^()]*\))*\)|\[[^\[\]]*\])?"
NAME = re.compile(
    rf"(?:\\{WORD}\s*)*\{{?(?:[A-Za-z]+|(?<=[a-z]))'*\}}?{SUBSCRIPT}'*(?:\^\{{-1\}})?{ARGUMENTS}"
    r"|\|[^|]*[A-Z][^|]*\||\\\|[^|]*\\\||\[[A-Z]{3,}\]"
)
SUM = re.compile(r"[A-Za-z]\w*(?:_\{?\w+\}?)?(?:\s*[-+]\s*[A-Za-z]\w*(?:_\{?\w+\}?)?)+")


def is_name(side: str, sums: bool = False) -> bool:
    """Tell whether a side of an equation is a name: x, a_{n}, f(x), |AB|, \\angle ABC, (x, y), V_1 : V_2, words.

    With ``sums``, m + n is a name too.
    """
    side = side.strip()
    if not re.search(r"[A-Za-z]", side):
        return False
    inside = bracketed(side)
    if inside and inside[0] == "(":
        return all(is_name(part) for part in split(inside[1], ",".__eq__)[0])
    if ratio := re.fullmatch(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}|([^:/]+)[:/]([^:/]+)", side):
        return all(is_name(part) for part in ratio.groups() if part is not None)
    if NAME.fullmatch(side) or (sums and SUM.fullmatch(side)):
        return True
    return is_words(side) and not re.search(r"\d", side)


def value_of(text: str, sums: bool = False) -> str:
    """Return the value that an equation gives to a name: x = 5, 5 = x, x = 2+3 = 5, x \\in (0,1), \\approx 5.

    The last value of a chain counts. An equation without a name, or in a list, is returned as it is. For ``sums`` see
    :func:`is_name`.
    """
    sides, found = relation_chain(text)
    if not found or not set(found) <= {"=", "~", "in"}:
        return text
    if any(split(side, SEPARATORS.__contains__)[1] for side in sides[:-1]):
        return text
    if not sides[0]:
        sides, found = sides[1:], found[1:]
        if not found:
            return sides[0]
    if found == ["="] and is_name(sides[1], sums) and not is_name(sides[0], sums):
        sides = sides[::-1]
    if "in" in found:
        return sides[1] if found == ["in"] and is_name(sides[0]) else text
    if len(sides) == 2 and mentions(sides[1], sides[0]):
        return text
    values = sides[1:] if is_name(sides[0], sums) else sides
    if len(values) == len(sides) and not all(map(is_constant, values)):
        return text
    # The exact value of x = \\sqrt{2} \\approx 1.41.
    signs = found[len(found) - len(values) + 1 :]
    return values[signs.index("~")] if "~" in signs else values[-1]


def mentions(text: str, letter: str) -> bool:
    """Tell whether a letter occurs in a text: x = x^2 gives no value to x."""
    return bool(re.fullmatch("[A-Za-z]", letter) and re.search(rf"(?<![\\A-Za-z]){letter}(?![A-Za-z])", text))


def is_constant(text: str) -> bool:
    """Tell whether a text has no letters except commands, e and i."""
    bare = re.sub(ENVIRONMENT + r"|\\[A-Za-z]+|(?<![A-Za-z])[ei](?![A-Za-z])", "", text)
    return bool(text) and not re.search(r"[A-Za-z]", bare)
