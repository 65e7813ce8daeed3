"""Reads an expression by math-verify's parser, and tells whether two are equal."""

import random
import re
from collections.abc import Sequence
from functools import lru_cache, reduce

import sympy
from latex2sympy2_extended.antlr_parser import PSParser
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from sympy.core.function import AppliedUndef

from verl_ext.tasks.math.normalise import key
from verl_ext.tasks.math.units import TRIGONOMETRIC

if not hasattr(PSParser.AtomContext, "FUNC_GAMMA"):
    # The parser for antlr 4.9.3, the version that Hydra needs, lacks what latex2sympy2_extended 1.11 asks of each atom
    # that is none of the kinds before, a percentage among them. As its parsers for other versions have it.
    PSParser.AtomContext.FUNC_GAMMA = lambda self: self.getToken(PSParser.FUNC_GAMMA, 0)

# Units are ours, since the library takes a last letter for one; \boxed is gone.
CLEANING = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
READING = ConversionConfig(lowercase_symbols=False)

DECIMALS, DIGITS = 5e-7, 1e-5
"""A short decimal is equal to what agrees with it to 6 decimals and to 5 digits."""

SHORT, LONG = 6, 8
"""Significant digits below which a decimal is no rounding of another one, and from which on all its digits count."""

ROUNDED = 1e-9
"""How far expressions with symbols may differ, relatively, where decimals are in them."""

PRECISION, EXACT = 40, sympy.Float("1e-30")
"""Digits to which exact expressions are evaluated, and how far they may differ, relatively."""

GIANT = 100_000
"""Exponents and arguments of factorials up to which numbers are written out."""

STEPS = (sympy.floor, sympy.ceiling, sympy.Mod)
PIECES = (*STEPS, sympy.Abs, sympy.sign, sympy.Max, sympy.Min, sympy.Piecewise)
"""Functions that may agree in one place and differ in another."""

WHOLE = set("ijklmnNpq")
"""Symbols that mostly stand for integers, which matters to steps."""

NO_EXPRESSION = re.compile(
    # A sequence; two numbers side by side; what looks like a mixed number and is none; a base; a cross product; a
    # divisor of letters.
    r"\\ldots|(?<![\^_])\d\s+\d|(?<![\d.^_{])\d+\s*\\frac\{-?\d+\}\{-?\d+\}|\d\s*_|\\vec.*\\times"
    r"|(?:\\|\{\s*)(?:gcd|lcm)[^\d]*(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])"
)


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


@lru_cache(maxsize=256)
def read(text: str):
    """The expression that a text stands for.

    Raises:
        Unreadable: there is none.
    """
    # The library drops primes: f' is a name of its own.
    named = re.sub(r"([A-Za-z])('+)", lambda m: f"{m[1]}_{{{'q' * len(m[2])}}}", text)
    if not named or NO_EXPRESSION.search(named) or "'" in named.rstrip("'"):
        raise Unreadable(f"no single expression: {text[:80]!r}")
    try:
        cleaned = normalize_latex(named, CLEANING)
        degrees = bool(TRIGONOMETRIC.search(named))
        found = Reader(is_real=True, convert_degrees=degrees, config=READING).parse(cleaned)
    except (RecursionError, sympy.matrices.exceptions.ShapeError, sympy.SympifyError) as e:
        raise Unreadable(f"{text[:80]!r}: {type(e).__name__}") from e
    except MemoryError:
        raise
    except Exception as e:
        # Plain Exception is how its error listener reports a syntax that it does not know; the rest are faults.
        if type(e) is Exception or "Matrix" in str(e):
            raise Unreadable(f"{text[:80]!r}: {str(e).splitlines()[0] if str(e) else e!r}") from e
        raise
    if not isinstance(found, (sympy.Basic, sympy.MatrixBase)):
        raise Unreadable(f"{text[:80]!r} is no expression")
    # dy/dx is a name, and not 0 because y is another symbol than x.
    names = {d: sympy.Symbol(str(d), real=True) for d in found.atoms(sympy.Derivative) if d.expr.is_Symbol}
    found = found.xreplace(names) if names else found
    unit = [symbol for symbol in found.free_symbols if symbol.name == "i"]
    return found.subs(unit[0], sympy.I) if unit else found


def expressions_equal(answer: str, truth: str) -> bool:
    """Whether two texts stand for one expression; 28 % are 0.28, and 28.

    Raises:
        Unreadable: one of them stands for none.
    """
    if key(answer) == key(truth):
        return True
    x, percent_x = as_percentage(answer)
    y, percent_y = as_percentage(truth)
    x, y = read(x), read(y)
    # The percent sign may be left out; and be put in, where a whole number is asked for: 0.5 is no 0.5 %.
    if (not percent_x or percent_y or (y.is_Integer and y > 1)) and same_expression(x, y):
        return True
    if percent_x == percent_y or not (isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr)):
        return False
    return same_expression(x / 100, y) if percent_x else same_expression(x, y / 100)


def as_percentage(text: str) -> tuple[str, bool]:
    return (text.removesuffix(r"\%").strip(), True) if text.endswith(r"\%") else (text, False)


def is_finite_number(x) -> bool:
    finite = isinstance(x, sympy.Expr) and bool(x.is_number) and x.is_infinite is not True
    return finite and not x.has(sympy.zoo, sympy.nan)


def same_expression(x, y) -> bool:
    """Whether two expressions are equal wherever both are defined: exactly, but for decimals.

    Raises:
        Unreadable: one of them is undefined, as a division by zero, or a giant.
    """
    x, y = (z.doit() if isinstance(z, sympy.MatrixExpr) else z for z in (x, y))
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
    if x.has(sympy.nan, sympy.zoo) or y.has(sympy.nan, sympy.zoo):
        raise Unreadable("a value that is not defined")
    if x.has(sympy.oo, -sympy.oo) or y.has(sympy.oo, -sympy.oo):
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
            sizes = (
                [node.exp] if isinstance(node, sympy.Pow) else node.args if isinstance(node, sympy.factorial) else ()
            )
            for size in sizes:
                value = size.evalf(5) if size.is_number else None
                if value is not None and value.is_extended_real and abs(value) > GIANT:
                    raise Unreadable(f"a power or factorial of {value}")


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


def decimals_agree(x, y) -> bool:
    """Whether two numbers agree of which at least one is a decimal.

    A whole number is met exactly, and a short decimal by another decimal. A decimal of 8 significant digits or more
    must be right to all but the last, a shorter one to 6 decimals and 5 digits.
    """
    a, b = x.evalf(30), y.evalf(30)
    difference, size = abs(a - b), sympy.Max(abs(a), abs(b))
    if not (difference.is_number and size.is_number):
        return False
    shown = [max(map(significant_digits, z.atoms(sympy.Float))) for z in (x, y) if z.has(sympy.Float)]
    if any(z.is_Integer for z in (x, y)) or (len(shown) == 2 and min(shown) < SHORT):
        return bool(difference <= size * sympy.Float("1e-12"))
    shown = min(shown)
    if shown >= LONG:
        return bool(difference <= size * sympy.Float(10) ** (1 - min(shown, 14)))
    return bool(difference <= DECIMALS and difference <= DIGITS * size)


def significant_digits(number) -> int:
    return len(str(number).lower().partition("e")[0].replace(".", "").strip("-").strip("0"))


def same_where_tried(x, y) -> bool | None:
    """Whether two expressions with symbols agree wherever they are tried; None where that is nowhere.

    Tried at a few points of both signs, where all roots and logarithms are real; at many, and of all sizes, where a
    function is put together of pieces; at integers, where it has steps and the symbol is one for integers.
    """
    functions = {f: sympy.Dummy() for f in x.atoms(AppliedUndef) | y.atoms(AppliedUndef)}
    x, y = x.xreplace(functions), y.xreplace(functions)
    symbols = sorted(x.free_symbols | y.free_symbols, key=str)
    in_pieces, in_steps = (x.has(*kinds) or y.has(*kinds) for kinds in (PIECES, STEPS))
    exact = not (x.has(sympy.Float) or y.has(sympy.Float))
    nodes = x.atoms(sympy.Pow, sympy.log) | y.atoms(sympy.Pow, sympy.log)
    within = {n.args[0] for n in nodes if isinstance(n, sympy.log) or (n.exp.is_Rational and not n.exp.is_Integer)}
    # Points whose numbers are in no simple relation to one another.
    rng = random.Random(1)
    agreed = 0
    for i in range(60 if in_pieces else 6):
        size = rng.choice((1, 10, 1000)) if in_pieces else 1
        point = {s: sympy.Rational(rng.randint(89, 555) * size, 89) for s in symbols}
        negative = {s for s in symbols if i > 1 and rng.random() < 0.6}
        if in_steps:
            whole = {s for s in symbols if str(s)[0] in WHOLE or i % 2}
            point |= {s: sympy.Integer(rng.randint(1, 60)) for s in whole}
        point = {s: -value if s in negative else value for s, value in point.items()}
        if negative and any(part.subs(point).evalf(5).is_negative for part in within):
            continue
        a, b = (z.subs(point).evalf(PRECISION) for z in (x, y))
        if not (a.is_number and b.is_number) or not (a.is_finite and b.is_finite):
            continue
        if negative and not (a.is_real and b.is_real):
            continue
        if abs(a - b) > (EXACT if exact else ROUNDED) * sympy.Max(abs(a), abs(b)):
            return False
        agreed += 1
    return True if agreed >= 2 else None
