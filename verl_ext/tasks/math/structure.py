"""What kind of thing an answer is: one expression, a list, a set, a pair; which side of an equation is a name."""

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
"""What the structure of an answer hangs on."""

JOINS = {"or": {"or", r"\lor", r"\vee"}, "and": {"and", r"\land", r"\wedge"}}
SEPARATORS = {",", ";", r"\quad", r"\qquad", r"\cr", *JOINS["or"], *JOINS["and"]}

RELATIONS = {"<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", r"\neq": "!=", "=": "=", r"\approx": "~", r"\in": "in"}
INEQUALITIES = {"<", ">", "<=", ">=", "!="}


@dataclass(frozen=True)
class Thing:
    """What an answer is.

    Args:
        kind: "one" (an expression, a condition, words), "list" (parts in no order), "set" (no order, no repeats) or
            "tuple" (parts in order, a pair's brackets may be an interval's).
        parts: texts; of "one" the only one.
        brackets: of "tuple".
        joined: "and" or "or" where that stands between the parts of "list", else "".
    """

    kind: str
    parts: tuple[str, ...]
    brackets: str = ""
    joined: str = ""


def tokens(text: str) -> Iterator[tuple[str, int, int, int]]:
    """Yield (token, start, end, depth); a bracket has the depth of what is around it.

    Round and square brackets may close each other, as those of intervals do.
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
    """The parts of ``text`` between the outermost tokens for which ``at`` holds, and those tokens."""
    parts, found, last = [], [], 0
    for token, start, end, depth in tokens(text):
        if depth == 0 and at(token):
            parts.append(text[last:start].strip())
            found.append(token)
            last = end
    return [*parts, text[last:].strip()], found


def bracketed(text: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) of a text that is one pair of brackets and what is in it."""
    first = next(tokens(text), None)
    if first is None or first[1] != 0 or first[0] not in OPEN:
        return None
    for token, start, end, depth in tokens(text):
        if depth == 0 and start > 0 and token in CLOSE:
            return (first[0], text[first[2] : start].strip(), token) if end == len(text) else None
    return None


def without_braces(text: str) -> str:
    """``text`` without braces around all of it."""
    while (whole := bracketed(text)) and whole[0] == "{" and whole[2] == "}":
        text = whole[1]
    return text


@lru_cache(maxsize=64)
def structure(text: str, thousands: bool = True) -> Thing:
    """What a normalised text is.

    Args:
        text: normalised.
        thousands: whether 1,234 is one number.
    """
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
    """1,234,567 outside of brackets is one number."""
    commas = {start for token, start, _, depth in tokens(text) if token == "," and depth == 0}
    numbers = re.finditer(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)", text)
    within = {match.start() + i for match in numbers for i, c in enumerate(match[0]) if c == ","}
    return "".join(c for i, c in enumerate(text) if i not in commas & within)


def plus_minus(parts: Sequence[str]) -> list[str]:
    """Each part twice that has a plus-minus sign: all signs of a part are the upper ones, or the lower ones."""
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
    """(domain, condition) of what stands in braces as x \\in domain | condition; the domain may be empty."""
    for sign in ("|", ":"):
        parts, found = split(inside, sign.__eq__)
        if len(found) == 1 and (named := re.fullmatch(r"[A-Za-z](?:\s*\\in(.*))?", parts[0], re.DOTALL)):
            return (named[1] or "").strip(), parts[1]
    return None


# Equations ------------------------------------------------------------------------------------------------------------


def relation_chain(text: str) -> tuple[list[str], list[str]]:
    """The sides of a chain of relations, a < b < c, and the relations under the names of ``RELATIONS``."""
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
    """Whether one side of an equation names the other: x, a_{n}, f(x), |AB|, \\angle ABC, (x, y), V_1 : V_2, words.

    With ``sums`` so does m + n, of which a number was asked for.
    """
    side = side.strip()
    if not re.search(r"[A-Za-z]", side):
        return False
    inside = bracketed(side)
    if inside and inside[0] == "(":
        return all(is_name(part) for part in split(inside[1], ",".__eq__)[0])
    ratio = re.fullmatch(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}|([^:/]+)[:/]([^:/]+)", side)
    if ratio:
        return all(is_name(part) for part in ratio.groups() if part is not None)
    if NAME.fullmatch(side) or (sums and SUM.fullmatch(side)):
        return True
    return is_words(side) and not re.search(r"\d", side)


def value_of(text: str, sums: bool = False) -> str:
    """What an equation says that a name is, if it says so: x = 5, 5 = x, x = 2+3 = 5, x \\in (0,1), \\approx 5.

    The last value of a chain counts. ``text`` as it is where an equation names nothing, or is one of a list. For
    ``sums`` see :func:`is_name`.
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
    # The exact one of x = \\sqrt{2} \\approx 1.41.
    signs = found[len(found) - len(values) + 1 :]
    return values[signs.index("~")] if "~" in signs else values[-1]


def mentions(text: str, letter: str) -> bool:
    """Whether a letter stands in a text: x = x^2 names nothing."""
    return bool(re.fullmatch("[A-Za-z]", letter) and re.search(rf"(?<![\\A-Za-z]){letter}(?![A-Za-z])", text))


def is_constant(text: str) -> bool:
    """Whether no letter stands in it but those of commands, e and i."""
    bare = re.sub(ENVIRONMENT + r"|\\[A-Za-z]+|(?<![A-Za-z])[ei](?![A-Za-z])", "", text)
    return bool(text) and not re.search(r"[A-Za-z]", bare)
