"""Whether two mathematical answers are equal: first what kind of thing each is, then its parts, by math-verify.

math-verify reads and compares expressions. What it confuses is settled before the call, here: lists, sets, pairs and
intervals; conditions; names before a value; units; percentages; numerals with a base; options of a multiple choice;
words. Without bounds on time and memory: :mod:`verl_ext.rewards.grader` runs it in a process that can be stopped.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import sympy
from latex2sympy2_extended.antlr_parser import PSParser
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from sympy.core.function import AppliedUndef

from verl_ext.rewards.normalise import key, normalise

if not hasattr(PSParser.AtomContext, "FUNC_GAMMA"):
    # The parser for antlr 4.9.3, the version that Hydra needs, lacks what latex2sympy2_extended 1.11 asks of each atom
    # that is none of the kinds before, a percentage among them. As its parsers for other versions have it.
    PSParser.AtomContext.FUNC_GAMMA = lambda self: self.getToken(PSParser.FUNC_GAMMA, 0)

# Units are ours, since the library takes a last letter for one; \boxed is gone.
CLEANING = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
READING = ConversionConfig(lowercase_symbols=False)

DECIMALS, DIGITS = 5e-7, 1e-5
"""Numbers of which one is a decimal are equal if they agree to 6 decimals and to 5 digits."""

ROUNDED = 1e-9
"""How far expressions with symbols may differ, relatively, where decimals are in them."""

PRECISION, EXACT = 40, sympy.Float("1e-30")
"""Digits to which exact expressions are evaluated, and how far they may differ, relatively."""

GIANT = 100_000
"""Exponents and arguments of factorials up to which numbers are written out."""

PIECES = (sympy.floor, sympy.ceiling, sympy.Mod, sympy.Abs, sympy.sign, sympy.Max, sympy.Min, sympy.Piecewise)
"""Functions that may agree in one place and differ in another."""

ENOUGH_DIGITS = 8
"""Significant digits from which on a decimal stands for the exact number of which it is the rounding."""


class Unreadable(ValueError):
    """No mathematics that can be compared."""


class Reader(_Latex2Sympy):
    """The library's reader without two of its liberties."""

    def convert_postfix_list(self, arr: Sequence, i: int = 0):
        """A product. The library adds neighbours that are numbers, as if 2(5) were the mixed number 2 5/1."""
        if len(arr) > 1 and i == 0:
            parts = [self.convert_postfix(part) for part in arr]
            if all(isinstance(part, sympy.Expr) and not part.is_Matrix for part in parts):
                return reduce(self.mul_flat, parts)
        return super().convert_postfix_list(arr, i)

    def convert_atom_expr(self, atom_expr):
        """A symbol; I is one like others. The imaginary unit is i, put in by :func:`read`."""
        found = super().convert_atom_expr(atom_expr)
        return sympy.Symbol("I", real=True) if found is sympy.I else found


# Text -----------------------------------------------------------------------------------------------------------------

OPEN, CLOSE = ("(", "[", r"\{", r"\langle", "{", r"\lfloor", r"\lceil"), (")", "]", r"\}", r"\rangle", "}")
CLOSE += (r"\rfloor", r"\rceil")
TOKEN = re.compile(
    r"\\text\s*\{\s*,?\s*(?P<word>and|or)\s*,?\s*\}|(?<![\\A-Za-z])(?P<bare>and|or)(?![A-Za-z])"
    r"|\\begin\s*\{|\\end\s*\{|\\[A-Za-z]+|\\.|[<>]=?|[\[\](){},;=|:]",
    re.DOTALL,
)
"""What the structure of an answer hangs on."""

RELATIONS = {"<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", r"\neq": "!=", "=": "=", r"\approx": "~", r"\in": "in"}
MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}


def tokens(text: str):
    """(token, start, end, depth) of what stands outside of nested brackets for depth 0; a bracket has its outer depth.

    Round and square brackets may close each other, as those of intervals do.
    """
    depth = 0
    for match in TOKEN.finditer(text):
        token = match["word"] or match["bare"] or match[0]
        opens = token in OPEN or token.startswith(r"\begin")
        closes = token in CLOSE or token.startswith(r"\end")
        # \begin{ and \end{ are followed by a closing brace of their own.
        if closes:
            depth = max(depth - 1, 0)
        if token.startswith((r"\begin", r"\end")):
            yield token, match.start(), match.end(), depth
            depth += 1 + opens
            continue
        yield token, match.start(), match.end(), depth
        depth += opens


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


ENVIRONMENT = r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[^{}]*\})?"


def is_words(text: str) -> bool:
    """Whether a text is language: ``\\text{}`` with letters, or a run of four letters that is no command."""
    bare = re.sub(ENVIRONMENT + r"|\\(?!text)[A-Za-z]+|_\s*\{[^{}]*\}", " ", text)
    bare = (
        re.sub(r"\\text\s*\{\s*[A-Za-z]{0,5}\s*\}", " ", bare)
        if not re.fullmatch(r"\\text\s*\{[^{}]*\}", bare)
        else bare
    )
    return bool(re.search(r"\\text\s*\{[^{}]*[A-Za-z\u0080-\uffff]|(?<![\\A-Za-z])[A-Za-z]{4,}", bare))


def same_words(a: str, b: str) -> bool:
    a, b = (re.sub(r"[^\w<>=+\-\\]|\\text", "", t).casefold() for t in (a, b))
    return bool(a) and a == b


# Units ----------------------------------------------------------------------------------------------------------------

SAME_UNIT = """
cm centimeter centimetre; mm millimeter millimetre; km kilometer kilometre; m meter metre; ft foot feet; in inch inches;
yd yard; mi mile; kg kilogram; mg milligram; g gram; lb pound; oz ounce; ton tonne; l liter litre; ml milliliter;
gal gallon; s sec second; min minute; h hr hour; day; week; month; yr year; am; pm; mph; kmh kph; hz; khz; dollar; cent;
euro; yuan; rupee; radian rad; n newton; j joule; w watt; v volt; k kelvin; pa pascal
"""
UNIT = {name: group.split()[0] for group in SAME_UNIT.split(";") for name in group.split()}
"""Names of units of measurement -> one of them. Of two different ones neither is the other; nouns are not compared."""

BARE_UNITS = {name for name in UNIT if len(name) > 1} | {"sq", "cu", "square", "cubic", "per", "units", "unit"}
"""Units that are told from variables without ``\\text{}`` around them."""

NO_UNITS = {
    "more",
    "less",
    "fewer",
    "squared",
    "cubed",
    "factorial",
    "mod",
    "times",
    "half",
    "dozen",
    "if",
    "for",
    "is",
}
NO_UNITS |= {"not", "to", "plus", "minus", "over", "choose", "base", "when", "where", "with", "and", "or"}
FUNCTIONS = {"sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "min", "max", "gcd", "lcm"}
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
POWER = r"(?:\s*\^\s*\{?\s*(?P<power>-?\d)\s*\}?)?"
TEXT_UNIT = re.compile(rf"(?P<value>.*\S)\s*\\text\s*\{{(?P<unit>[^{{}}\d]*)\}}{POWER}$", re.DOTALL)
WORD_UNIT = re.compile(
    rf"(?P<value>.*[\d}})%])(?P<space>\s*)(?P<unit>[A-Za-z][A-Za-z./ ]*[A-Za-z.]){POWER}$", re.DOTALL
)
FOREIGN_UNIT = re.compile(r"(?P<value>.*[\d})%])\s*(?P<unit>[\u4e00-\u9fff]+)$", re.DOTALL)


def without_unit(text: str) -> tuple[str, str]:
    """A value and its unit; ("5 apples" -> "5", "apples"); the unit is "" where there is none."""
    if text.endswith(r"^\circ") and not TRIGONOMETRIC.search(text):
        return text.removesuffix(r"^\circ").strip(), "degree"
    for pattern in (TEXT_UNIT, WORD_UNIT, FOREIGN_UNIT):
        match = pattern.fullmatch(text)
        if not match:
            continue
        value, words = match["value"], re.findall(r"[^\W\d_]+", match["unit"].lower())
        if not words or NO_UNITS & set(words):
            continue
        known = all(singular(word) in UNIT or word in BARE_UNITS for word in words)
        if pattern is WORD_UNIT:
            long = bool(match["space"]) and all(len(w) >= 4 or w in BARE_UNITS for w in words)
            speed = re.fullmatch(r"k?m/[hs]", match["unit"])
            known = all(w in BARE_UNITS or singular(w) in BARE_UNITS for w in words) or speed
            if not (known or long) or FUNCTIONS & set(words):
                continue
        if known or (re.search(r"\d", value) and not is_words(value)):
            deeper, more = without_unit(value)
            return deeper, " ".join(filter(None, (more, *words, match.groupdict().get("power"))))
    return text, ""


def singular(word: str) -> str:
    return word if word in UNIT else word.removesuffix("s")


def units_differ(a: str, b: str) -> bool:
    """Whether both are units of measurement, and not the same."""
    spelled = {str(i): str(i) for i in range(-9, 10)} | {"sq": "2", "square": "2", "cu": "3", "cubic": "3"}
    a, b = (
        " ".join(sorted(spelled.get(w) or UNIT.get(singular(w), "?") for w in unit.replace(".", "").split()))
        for unit in (a, b)
    )
    return bool(a and b) and "?" not in a + b and a != b


# Structure ------------------------------------------------------------------------------------------------------------


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


def is_separator(token: str) -> bool:
    return token in (",", ";", "and", "or", r"\quad", r"\qquad", r"\lor", r"\vee", r"\land", r"\wedge", r"\cr")


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
    whole = bracketed(text)
    if whole and whole[:3:2] not in (("{", "}"),):
        opening, inside, closing = whole
        parts, _ = split(inside, lambda t: t in (",", ";"))
        if opening == r"\{":
            return Thing("set", tuple(filter(None, parts))) if not is_builder(inside) else Thing("one", (text,))
        if opening in ("(", "[", r"\langle") and closing in (")", "]", r"\rangle"):
            if len(parts) > 1:
                round_or_square = {r"\langle": "(", r"\rangle": ")"}
                return Thing("tuple", tuple(parts), "".join(round_or_square.get(b, b) for b in (opening, closing)))
            if inside and (opening, closing) != (r"\langle", r"\rangle"):
                return structure(inside, thousands)
    parts, found = split(text, is_separator)
    kept = [part for part in parts if part]
    if len(kept) > 1:
        words = {"or": {"or", r"\lor", r"\vee"}, "and": {"and", r"\land", r"\wedge"}}
        joined = next((name for name, signs in words.items() if signs & set(found)), "")
        return Thing("list", tuple(plus_minus(kept)), joined=joined)
    one = kept[0] if kept else text
    both = plus_minus([one])
    return Thing("list", tuple(both)) if len(both) > 1 else Thing("one", (one,))


def join_thousands(text: str) -> str:
    """1,234,567 outside of brackets is one number."""
    positions = [start for token, start, _, depth in tokens(text) if token == "," and depth == 0]
    joins = {
        m.start() + i
        for m in re.finditer(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d])", text)
        for i, c in enumerate(m[0])
        if c == ","
    }
    cut = joins & set(positions)
    return "".join(c for i, c in enumerate(text) if i not in cut)


def plus_minus(parts: Sequence[str]) -> list[str]:
    """Each part twice that has a plus-minus sign: all signs of a part are the upper ones, or the lower ones."""
    found = []
    for part in parts:
        if re.search(r"\\pm(?![A-Za-z])", part):
            for pm, mp in (("+", "-"), ("-", "+")):
                one = re.sub(r"\\pm(?![A-Za-z])", pm, part)
                found.append(re.sub(r"^\s*\+|(?<=[=(])\s*\+", "", re.sub(r"\\mp(?![A-Za-z])", mp, one)).strip())
        else:
            found.append(part)
    return found


def is_builder(inside: str) -> bool:
    """Whether what stands in braces is {x | condition}."""
    return builder_condition(inside) is not None


def builder_condition(inside: str) -> str | None:
    for sign in ("|", ":"):
        parts, found = split(inside, lambda t, sign=sign: t == sign)
        if len(found) == 1 and re.fullmatch(r"[A-Za-z](?:\s*\\in.*)?", parts[0], re.DOTALL):
            return parts[1]
    return None


def relation_chain(text: str) -> tuple[list[str], list[str]]:
    """The sides of a chain of relations, a < b < c, and the relations under the names of ``RELATIONS``."""
    sides, found = split(text, RELATIONS.__contains__)
    return sides, [RELATIONS[token] for token in found]


NAME = re.compile(
    r"(?:\\(?:angle|triangle|overline|vec|text|mathrm|Delta|alpha|beta|gamma|theta|lambda|mu|phi|omega|sigma|operatorname|"
    r"mathcal)\s*)*\{?[A-Za-z]*'*\}?(?:\s*_\s*(?:\{[^{}]*\}|\w|\\[A-Za-z]+))?'*(?:\s*\((?:[A-Za-z]|\\[A-Za-z]+|\d+|,|\s)*\))?"
)


def is_name(side: str) -> bool:
    """Whether one side of an equation names the other: x, a_{n}, f(x), |AB|, \\angle ABC, (x, y), V_1 : V_2, words."""
    side = side.strip().strip("|").strip()
    inside = bracketed(side)
    if inside and inside[0] == "(":
        return all(is_name(part) for part in split(inside[1], lambda t: t == ",")[0])
    if re.fullmatch(r"[A-Z]\s*\([^()]*\)", side):
        return True
    # A ratio of names: V_1 : V_2, \frac{AB}{CD}.
    ratio = re.fullmatch(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}|([^:/]+)[:/]([^:/]+)", side)
    if ratio:
        return all(is_name(part) for part in ratio.groups() if part is not None)
    return bool(side) and bool(NAME.fullmatch(side) or (is_words(side) and not re.search(r"\d", side)))


def value_of(text: str) -> str:
    """What an equation says that a name is, if it says so: x = 5, 5 = x, x = 2+3 = 5, x \\in (0,1), \\approx 5.

    The last value of a chain counts. ``text`` as it is where an equation names nothing.
    """
    sides, found = relation_chain(text)
    if not found or not set(found) <= {"=", "~", "in"}:
        return text
    if not sides[0] and found[0] in ("~", "="):
        sides, found = sides[1:], found[1:]
        if not found:
            return sides[0]
    if len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0]) and found == ["="]:
        sides = sides[::-1]
    if "in" in found:
        return sides[-1] if found[-1] == "in" and len(sides) == 2 and is_name(sides[0]) else text
    values = sides[1:] if is_name(sides[0]) else sides
    if len(values) == len(sides) and not all(is_constant(v) for v in values):
        return text
    if len(values) == 1:
        return values[0]
    # The exact one of x = \sqrt{2} \approx 1.41.
    signs = found[len(found) - len(values) + 1 :]
    return values[signs.index("~")] if "~" in signs else values[-1]


def is_constant(text: str) -> bool:
    """Whether no letter stands in it but those of commands, e and i."""
    return bool(text) and not re.search(
        r"[A-Za-z]", re.sub(ENVIRONMENT + r"|\\[A-Za-z]+|(?<![A-Za-z])[ei](?![A-Za-z])", "", text)
    )


# Expressions ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def read(text: str):
    """The expression that a text stands for.

    Raises:
        Unreadable: there is none.
    """
    # Nor what looks like a mixed number and is none: 3 4, 3\\frac{9}{2}.
    if not text or re.search(r"\\ldots|(?<![\^_])\d\s+\d|(?<![\d.^_{])\d+\s*\\frac\{-?\d+\}\{-?\d+\}", text):
        raise Unreadable(f"no single expression: {text[:80]!r}")
    try:
        cleaned = normalize_latex(text, CLEANING)
        degrees = bool(TRIGONOMETRIC.search(text))
        found = Reader(is_real=True, convert_degrees=degrees, config=READING).parse(cleaned)
    except MemoryError:
        raise
    except Exception as e:
        # Plain Exception is how its error listener reports a syntax that it does not know; the rest are faults.
        if type(e) is Exception or isinstance(e, RecursionError):
            raise Unreadable(f"{text[:80]!r}: {str(e).splitlines()[0] if str(e) else e!r}") from e
        raise
    if not isinstance(found, (sympy.Basic, sympy.MatrixBase)):
        raise Unreadable(f"{text[:80]!r} is no expression")
    unit = [s for s in found.free_symbols if s.name == "i"]
    return found.subs(unit[0], sympy.I) if unit else found


def expressions_equal(a: str, b: str) -> bool:
    """Whether the answer ``a`` and the truth ``b`` stand for one expression; 28 % are 0.28 and 28.

    Raises:
        Unreadable: one of them stands for none.
    """
    if key(a) == key(b):
        return True
    x, percent_x = as_percentage(a)
    y, percent_y = as_percentage(b)
    x, y = read(x), read(y)
    # The percent sign may be left out; and be put in, but not below 1, for 0.5 is no 0.5 %.
    if (not percent_x or percent_y or is_above_1(y)) and same_expression(x, y):
        return True
    return percent_x != percent_y and (same_expression(x / 100, y) if percent_x else same_expression(x, y / 100))


def is_above_1(x) -> bool:
    return is_finite_number(x) and bool(abs(x.evalf(15)) > 1)


def as_percentage(text: str) -> tuple[str, bool]:
    return (text.removesuffix(r"\%").strip(), True) if text.endswith(r"\%") else (text, False)


def is_finite_number(x) -> bool:
    return (
        isinstance(x, sympy.Expr)
        and bool(x.is_number)
        and x.is_infinite is not True
        and not x.has(sympy.zoo, sympy.nan)
    )


def same_expression(x, y) -> bool:
    """Whether two expressions are equal wherever both are defined: exactly, but for decimals.

    Raises:
        Unreadable: one of them is undefined, as a division by zero, or a giant.
    """
    if isinstance(x, sympy.MatrixBase) or isinstance(y, sympy.MatrixBase):
        alike = isinstance(x, sympy.MatrixBase) and isinstance(y, sympy.MatrixBase) and x.shape == y.shape
        return alike and all(map(same_expression, x.flat(), y.flat()))
    if x.has(sympy.nan, sympy.zoo) or y.has(sympy.nan, sympy.zoo):
        raise Unreadable("a division by zero")
    if x == y:
        return True
    if isinstance(x, (sympy.Set, sympy.Tuple)) != isinstance(y, (sympy.Set, sympy.Tuple)):
        return False
    if not (isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr)):
        return bool(verify(x, y, timeout_seconds=None, raise_on_error=True))
    refuse_giants(x, y)
    x, y = x.doit(), y.doit()
    if x.is_infinite or y.is_infinite:
        return x == y
    if is_finite_number(x) and is_finite_number(y):
        return same_number(x, y)
    same = same_where_tried(x, y)
    return bool(verify(x, y, timeout_seconds=None, raise_on_error=True)) if same is None else same


def refuse_giants(*expressions) -> None:
    """Refuse what would take hours to write out: powers and factorials beyond all bounds.

    Raises:
        Unreadable: there is one.
    """
    for expression in expressions:
        for node in sympy.postorder_traversal(expression):
            size = (
                node.exp if isinstance(node, sympy.Pow) else node.args[0] if isinstance(node, sympy.factorial) else None
            )
            if size is not None and size.is_number and abs(size.evalf(5)) > GIANT:
                raise Unreadable(f"a power or factorial of {size}"[:80])


def same_number(x, y) -> bool:
    if x.has(sympy.Float) or y.has(sympy.Float):
        return decimals_agree(x, y)
    if x.is_Rational and y.is_Rational:
        return x == y
    difference, size = abs(x.evalf(PRECISION) - y.evalf(PRECISION)), sympy.Max(abs(x.evalf(15)), abs(y.evalf(15)))
    if not (difference.is_number and size.is_number):
        raise Unreadable("a number that cannot be evaluated")
    # What should be zero has no digits to compare.
    return bool(difference <= size * EXACT) or (bool(size < EXACT) and bool((x - y).equals(0)))


def same_where_tried(x, y) -> bool | None:
    """Whether two expressions with symbols agree wherever they are tried; None where that is nowhere.

    Tried at a few points of both signs; at many, and of all sizes, where a function is put together of pieces.
    """
    functions = {f: sympy.Dummy() for f in x.atoms(AppliedUndef) | y.atoms(AppliedUndef)}
    x, y = x.xreplace(functions), y.xreplace(functions)
    symbols = sorted(x.free_symbols | y.free_symbols, key=str)
    # Points whose numbers are in no simple relation to one another.
    rng = random.Random(1)
    in_pieces = x.has(*PIECES) or y.has(*PIECES)
    exact = not (x.has(sympy.Float) or y.has(sympy.Float))
    agreed = 0
    for i in range(60 if in_pieces else 6):
        size = rng.choice((1, 10, 1000)) if in_pieces else 1
        point = {s: sympy.Rational(rng.randint(89, 555) * size, 89) for s in symbols}
        negative = [s for s in symbols if i > 1 and rng.random() < 0.6]
        point |= {s: -point[s] for s in negative}
        a, b = (z.subs(point).evalf(PRECISION) for z in (x, y))
        if not (a.is_number and b.is_number) or not (a.is_finite and b.is_finite):
            continue
        if negative and not (a.is_real and b.is_real):
            # A branch of a root or a logarithm.
            continue
        if abs(a - b) > (EXACT if exact else ROUNDED) * sympy.Max(abs(a), abs(b)):
            return False
        agreed += 1
    return True if agreed >= 2 else None


def decimals_agree(x, y) -> bool:
    """Whether two numbers agree of which at least one is a decimal.

    To 6 decimals and 5 digits; or the decimal has 8 significant digits and is the other number's rounding to them.
    """
    a, b = x.evalf(30), y.evalf(30)
    difference, size = abs(a - b), sympy.Max(abs(a), abs(b))
    if not (difference.is_number and size.is_number):
        return False
    if difference <= DECIMALS and difference <= DIGITS * size:
        return True
    exact = [z for z in (x, y) if not z.has(sympy.Float) and not z.is_integer]
    shown = next((z for z in (x, y) if z.has(sympy.Float)), None)
    if len(exact) != 1:
        return False
    digits = max(significant_digits(f) for f in shown.atoms(sympy.Float))
    return digits >= ENOUGH_DIGITS and bool(difference <= size * sympy.Float(10) ** (1 - digits))


def significant_digits(number) -> int:
    return len(str(number).lower().partition("e")[0].replace(".", "").strip("-").strip("0"))


# Conditions and sets of numbers ---------------------------------------------------------------------------------------


def region(thing: Thing) -> sympy.Set | None:
    """The set of real numbers that an answer describes: interval, union, condition on one variable; None if none."""
    try:
        if thing.kind == "tuple" and len(thing.parts) == 2:
            low, high = map(read, thing.parts)
            found = sympy.Interval(low, high, thing.brackets[0] == "(", thing.brackets[1] == ")")
            return None if found is sympy.S.EmptySet else found
        if thing.kind == "set":
            return sympy.FiniteSet(*map(read, thing.parts))
        if thing.kind == "list" and all(set(relation_chain(p)[1]) & {"<", ">", "<=", ">=", "!="} for p in thing.parts):
            found = [condition(part) for part in thing.parts]
            if None in found:
                return None
            return sympy.Union(*found) if thing.joined == "or" else sympy.Intersection(*found)
        if thing.kind == "one":
            return set_of(thing.parts[0])
    except (Unreadable, TypeError, NotImplementedError, ValueError):
        pass
    return None


SETS = {r"\mathbb{R}": sympy.S.Reals, r"\mathbb{Z}": sympy.S.Integers, r"\mathbb{N}": sympy.S.Naturals}
SETS |= {r"\mathbb{Q}": sympy.S.Rationals, r"\emptyset": sympy.S.EmptySet}


def set_of(text: str) -> sympy.Set | None:
    """Of a text without commas outside of brackets."""
    if (named := SETS.get(text.replace(" ", ""))) is not None:
        return named
    for sign, combine in ((r"\cup", sympy.Union), (r"\cap", sympy.Intersection), (r"\setminus", sympy.Complement)):
        parts, found = split(text, lambda t, sign=sign: t == sign)
        if found:
            sets = [region(structure(part)) for part in parts]
            return None if None in sets else reduce(combine, sets)
    whole = bracketed(text)
    if whole and whole[0] == r"\{" and (inside := builder_condition(whole[1])) is not None:
        return region(structure(inside))
    return condition(text)


def condition(text: str) -> sympy.Set | None:
    """The real numbers that satisfy a chain of inequalities in one variable, or x \\in a set."""
    sides, found = relation_chain(text)
    if found == ["in"] and is_name(sides[0]):
        return region(structure(sides[1]))
    if not found or not set(found) <= {"<", ">", "<=", ">=", "!="}:
        return None
    read_sides = [read(side) for side in sides]
    # The values of f(x) are a variable like x.
    functions = {f: sympy.Dummy(real=True) for side in read_sides for f in side.atoms(AppliedUndef)}
    read_sides = [side.xreplace(functions) for side in read_sides]
    variables = set().union(*(side.free_symbols for side in read_sides))
    if len(variables) != 1:
        return None
    make = {"<": sympy.Lt, ">": sympy.Gt, "<=": sympy.Le, ">=": sympy.Ge, "!=": sympy.Ne}
    pairs = zip(read_sides, read_sides[1:], found, strict=False)
    return sympy.Intersection(*(make[sign](a, b).as_set() for a, b, sign in pairs))


def same_region(a: sympy.Set, b: sympy.Set) -> bool:
    if a == b:
        return True
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        ends = (a.left_open, a.right_open) == (b.left_open, b.right_open)
        return ends and same_expression(a.start, b.start) and same_expression(a.end, b.end)
    return bool(sympy.SymmetricDifference(a, b).is_empty)


def symbols_of(text: str) -> set[str]:
    """The names of what a chain of relations is about."""
    sides = [read(side) for side in relation_chain(text)[0]]
    return {str(part) for side in sides for part in side.atoms(AppliedUndef) or side.free_symbols}


def same_chain(a: str, b: str) -> bool:
    """Whether two chains of inequalities say the same, in any number of variables, side by side or mirrored."""
    (sides, signs), (others, other_signs) = relation_chain(a), relation_chain(b)
    if len(sides) != len(others):
        return False
    if signs == other_signs and all(map(equal, sides, others)):
        return True
    if [MIRRORED.get(s) for s in reversed(signs)] == other_signs and all(map(equal, reversed(sides), others)):
        return True
    if len(signs) > 1:
        return False
    # 2x - 2y > 0 is x > y.
    left, right = (read(x) - read(y) for x, y in (sides, others))
    factor = sympy.simplify(left / right)
    same = signs == other_signs and factor.is_positive
    return bool(factor.is_number and (same or ([MIRRORED.get(signs[0])] == other_signs and factor.is_negative)))


def same_equation(a: str, b: str) -> bool:
    """Whether two equations have the same solutions, for what is plain: a constant factor, or solved for a symbol."""
    (sides, signs), (others, other_signs) = relation_chain(a), relation_chain(b)
    if not signs == other_signs == ["="]:
        return False
    if is_name(sides[0]) and is_name(others[0]) and len(sides) == len(others) == 2:
        symbols = (key(sides[0]), key(others[0]))
        free = is_words(sides[0]) or is_words(others[0]) or any("(" in s for s in symbols)
        if symbols[0] == symbols[1] or (free and not all("(" in s for s in symbols)):
            return equal(sides[1], others[1])
    left, right = (read(x) - read(y) for x, y in (sides, others))
    if not left.free_symbols or left.free_symbols != right.free_symbols:
        return False
    # A constant factor, found where it can be seen and then tried.
    point = {s: sympy.Rational(997 + 3 * i * i + 71 * i, 83) for i, s in enumerate(sorted(left.free_symbols, key=str))}
    factor = (left.subs(point) / right.subs(point)).doit()
    if is_finite_number(factor) and not factor.is_zero and same_where_tried(left, factor * right):
        return True
    for symbol in sorted(left.free_symbols, key=str):
        try:
            mine, other = (set(map(sympy.simplify, sympy.solve(side, symbol))) for side in (left, right))
        except NotImplementedError:
            continue
        if mine and other:
            return mine == other
    return False


# Equal ----------------------------------------------------------------------------------------------------------------

LETTER = re.compile(r"\(?([A-J])\)?")
LABELLED = re.compile(r"(?:\(([A-J])\)|([A-J])[.):])\s*(?P<rest>[^\s+\-*/^=<>].*)", re.DOTALL)
NUMERAL = re.compile(r"(?P<sign>-?)(?P<digits>[0-9A-Z]*\d[0-9A-Z]*)_\s*\{?\s*(?P<base>\d{1,2})\s*\}?")
CLOCK = re.compile(r"\d{1,2}:\d{2}")


def answers_equal(answer: str, truth: str) -> bool:
    """Whether ``answer`` is mathematically equal to ``truth``; both as they stand in a box.

    Raises:
        Unreadable: one of them is no mathematics that can be read, and they are not the same text.
        Exception: whatever else the libraries raise; a fault of theirs.
    """
    answer, truth = normalise(answer), normalise(truth)
    if key(answer) == key(truth):
        return True
    if (chosen := same_option(answer, truth)) is not None:
        return chosen
    return equal(answer, truth)


def same_option(answer: str, truth: str) -> bool | None:
    """For a truth that is an option of a multiple choice, or an answer that is labelled as one; else None."""
    answer, truth = (re.sub(r"^\\text\s*\{([^{}]*)\}", r"\1 ", text).strip() for text in (answer, truth))
    truth_label, answer_label = LABELLED.fullmatch(truth), LABELLED.fullmatch(answer)
    if letter := LETTER.fullmatch(truth):
        if answer_label:
            return (answer_label[1] or answer_label[2]) == letter[1]
        chosen = LETTER.fullmatch(answer)
        return chosen[1] == letter[1] if chosen else None
    if re.fullmatch(r"[A-J]{2,}", truth) and re.fullmatch(
        r"\(?[A-J](?:[\s,;()]|and)*(?:[A-J](?:[\s,;()]|and)*)+", answer
    ):
        letters = re.sub(r"[^A-J]", "", answer.replace("and", ""))
        return len(letters) == len(truth) and set(letters) == set(truth)
    if truth_label or answer_label:
        texts = [
            [m["rest"], m[1] or m[2]] if m else [text] for m, text in ((answer_label, answer), (truth_label, truth))
        ]
        if truth_label and answer_label and texts[0][1] != texts[1][1]:
            return False
        # What stands beside a label, or the label itself if that is all that was said.
        answers = texts[0][:1] if answer_label else texts[0]
        return any(key(LETTER.sub(r"\1", a)) == t or equal(a, t) for a in answers for t in texts[1])
    return None


def equal(answer: str, truth: str) -> bool:
    """As :func:`answers_equal`, of normalised texts."""
    if key(answer) == key(truth):
        return True
    a, b = structure(answer), structure(truth)
    if a.kind == b.kind == "one":
        return singles_equal(a.parts[0], b.parts[0])
    # One name before all: x = 1, 2; x \in \{1, 2\}; (x, y) = (1, 2).
    values = [value_of(text) for text in (answer, truth)]
    if values != [answer, truth] and (a.kind == "one") != (b.kind == "one"):
        changed = [structure(v) for v in values]
        if changed != [a, b]:
            return equal(*values)
    if b.kind == "list" and a.kind == "one" and structure(answer, False).kind == "list":
        # 3,125 may be two numbers where two are asked for, with a space between them.
        a = structure(answer, False)
    kinds = {a.kind, b.kind}
    if kinds <= {"list", "set"}:
        return same_members(a, b, as_sets="set" in kinds) or same_regions(a, b)
    if kinds == {"tuple"}:
        return a.brackets == b.brackets and len(a.parts) == len(b.parts) and all(map(equal, a.parts, b.parts))
    if kinds == {"tuple", "list"}:
        one = a if a.kind == "tuple" else b
        in_order = one.brackets == "()" and len(a.parts) == len(b.parts) and all(map(equal, a.parts, b.parts))
        return in_order or same_regions(a, b)
    if kinds == {"one", "set"}:
        one, several = (a, b) if a.kind == "one" else (b, a)
        if len(several.parts) == 1 and not relation_chain(one.parts[0])[1]:
            return equal(*((several.parts[0], truth) if several is a else (answer, several.parts[0])))
    return same_regions(a, b)


def same_regions(a: Thing, b: Thing) -> bool:
    x, y = region(a), region(b)
    return x is not None and y is not None and same_region(x, y)


def same_members(a: Thing, b: Thing, as_sets: bool) -> bool:
    """Whether the parts are equal one to one in some order; of sets, whether each has its equal on the other side."""
    mine, others = list(a.parts), list(b.parts)
    for things in (mine, others):
        # x = 5, 6
        first, signs = relation_chain(things[0])
        if signs == ["="] and is_name(first[0]) and not any(relation_chain(t)[1] for t in things[1:]):
            things[0] = first[1]
    if as_sets:
        return all(any(equal(x, y) for y in others) for x in mine) and all(
            any(equal(x, y) for x in mine) for y in others
        )
    if len(mine) != len(others):
        return False
    left = list(others)
    for x in mine:
        found = next((y for y in left if equal(x, y)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def singles_equal(answer: str, truth: str) -> bool:
    """Two answers that are no lists."""
    chains = [relation_chain(text) for text in (answer, truth)]
    if any(signs for _, signs in chains):
        return relations_equal(answer, truth)
    clocks = [text for text in (answer, truth) if CLOCK.fullmatch(text)]
    if len(clocks) == 2 or any(text.endswith(":00") for text in clocks):
        # No ratios.
        return False
    a, unit_a = without_unit(answer)
    b, unit_b = without_unit(truth)
    if units_differ(unit_a, unit_b):
        return False
    if (a, b) != (answer, truth):
        return equal(a, b)
    if NUMERAL.fullmatch(a) or NUMERAL.fullmatch(b):
        return numerals_equal(a, b)
    if all(re.fullmatch(r"[A-Za-z][a-z]+", text) for text in (a, b)) and (len(a) > 2 or b.lower() == "no"):
        if same_words(a, b):
            return True
    if is_words(a) or is_words(b):
        return same_words(a, b)
    if any(set_like(text) for text in (a, b)):
        return same_regions(structure(a), structure(b))
    return expressions_equal(a, b)


def set_like(text: str) -> bool:
    return bool(re.search(r"\\(?:cup|cap|setminus|emptyset|mathbb)(?![A-Za-z])|\\\{", text))


def numerals_equal(a: str, b: str) -> bool:
    """101_2 and 101 (where a base is asked for, it is often left out), 5_{10} and 5; never 101_2 and 101_3."""
    x, y = NUMERAL.fullmatch(a), NUMERAL.fullmatch(b)
    if y and not x and a == y["sign"] + y["digits"]:
        return True
    try:
        decimals = [str(int(m["sign"] + m["digits"], int(m["base"]))) if m else text for m, text in ((x, a), (y, b))]
    except ValueError:
        # A digit that the base does not have.
        return False
    return (bool(x) or not y) and expressions_equal(*decimals)


def relations_equal(answer: str, truth: str) -> bool:
    """Of which at least one is an equation, an inequality or a membership."""
    a, b = value_of(answer), value_of(truth)
    if a != answer and b != truth:
        # x = 5 is not y = 5, unless they are words for it.
        names = [relation_chain(text)[0] for text in (answer, truth)]
        symbols = [next((s for s in sides if is_name(s)), "") for sides in names]
        if not all(symbols) or key(symbols[0]) == key(symbols[1]) or any(map(is_words, symbols)):
            return equal(a, b)
        return same_equation(answer, truth)
    # A name before one side's value says no more than the value; but y = 2x + 3 may be the equation y - 2x - 3 = 0.
    signs = [set(relation_chain(text)[1]) for text in (answer, truth)]
    if (a, b) != (answer, truth) and not signs == [{"="}, {"="}]:
        return equal(a, b)
    if all(s and s <= {"<", ">", "<=", ">=", "!="} for s in signs):
        return same_chain(a, b) or (symbols_of(a) == symbols_of(b) and same_regions(structure(a), structure(b)))
    if signs == [{"="}, {"="}]:
        return same_equation(answer, truth)
    return same_regions(structure(a), structure(b))
