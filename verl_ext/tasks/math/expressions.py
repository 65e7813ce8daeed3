"""Parse expressions by math-verify, and compare them."""

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
    # The parser for antlr 4.9.3, which Hydra needs, lacks a method that latex2sympy2_extended 1.11 calls for some
    # atoms, such as percentages. This is the one of its parsers for other versions.
    PSParser.AtomContext.FUNC_GAMMA = lambda self: self.getToken(PSParser.FUNC_GAMMA, 0)

# Units are handled here, since the library mistakes a last letter for one; \boxed is already removed.
CLEANING = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
READING = ConversionConfig(lowercase_symbols=False)

DECIMALS, DIGITS = 5e-7, 1e-5
"""A short decimal equals a number that agrees with it to 6 decimals and to 5 digits."""

SHORT, LONG = 6, 8
"""With fewer significant digits, a decimal is not a rounding of another one; with this many, all its digits count."""

ROUNDED = 1e-9
"""Relative tolerance of expressions with symbols and decimals."""

PRECISION, EXACT = 40, sympy.Float("1e-30")
"""Digits to which exact expressions are evaluated, and their relative tolerance."""

GIANT = 100_000
"""The largest exponent or argument of a factorial that is evaluated."""

STEPS = (sympy.floor, sympy.ceiling, sympy.Mod)
PIECES = (*STEPS, sympy.Abs, sympy.sign, sympy.Max, sympy.Min, sympy.Piecewise)
"""Functions that may agree at some points and differ at others."""

WHOLE = set("ijklmnNpq")
"""Symbols that mostly stand for integers, which matters for ``STEPS``."""

NO_EXPRESSION = re.compile(
    # A sequence; two adjacent numbers; an invalid mixed number; a base; a cross product; a divisor of letters.
    r"\\ldots|(?<![\^_])\d\s+\d|(?<![\d.^_{])\d+\s*\\frac\{-?\d+\}\{-?\d+\}|\d\s*_|\\vec.*\\times"
    r"|(?:\\|\{\s*)(?:gcd|lcm)[^\d]*(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])"
)


class Unreadable(ValueError):
    """A text is not mathematics that can be compared."""


class Reader(_Latex2Sympy):
    """The library's converter, with two corrections."""

    def convert_postfix_list(self, arr: Sequence, i: int = 0):
        """Multiply neighbours; the library adds neighbours that are numbers, as if 2(5) were the mixed number 2 5/1."""
        if len(arr) > 1 and i == 0:
            parts = [self.convert_postfix(part) for part in arr]
            if all(isinstance(part, sympy.Expr) and not part.is_Matrix for part in parts):
                return reduce(self.mul_flat, parts)
        return super().convert_postfix_list(arr, i)

    def convert_atom_expr(self, atom_expr):
        """Read I as a symbol like others; :func:`read` replaces i by the imaginary unit."""
        found = super().convert_atom_expr(atom_expr)
        return sympy.Symbol("I", real=True) if found is sympy.I else found


@lru_cache(maxsize=256)
def read(text: str):
    """Parse the expression in a text.

    Raises:
        Unreadable: there is none.
    """
    # The library drops primes, but f' is another name than f.
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
        # The library's error listener raises Exception itself for unknown syntax; subclasses are bugs.
        if type(e) is Exception or "Matrix" in str(e):
            raise Unreadable(f"{text[:80]!r}: {str(e).splitlines()[0] if str(e) else e!r}") from e
        raise
    if not isinstance(found, (sympy.Basic, sympy.MatrixBase)):
        raise Unreadable(f"{text[:80]!r} is not an expression")
    # dy/dx is a name; SymPy would evaluate it to 0, because y is another symbol than x.
    names = {d: sympy.Symbol(str(d), real=True) for d in found.atoms(sympy.Derivative) if d.expr.is_Symbol}
    found = found.xreplace(names) if names else found
    unit = [symbol for symbol in found.free_symbols if symbol.name == "i"]
    return found.subs(unit[0], sympy.I) if unit else found


def expressions_equal(answer: str, truth: str) -> bool:
    """Tell whether two texts are equal as expressions; 28 % equals 0.28 and 28.

    Raises:
        Unreadable: one of them is not an expression.
    """
    if key(answer) == key(truth):
        return True
    percent_x, percent_y = (text.endswith(r"\%") for text in (answer, truth))
    x, y = (read(text.removesuffix(r"\%").strip()) for text in (answer, truth))
    # The percent sign may be missing, or be added to a whole number above 1: 0.5 % is not 0.5.
    if (not percent_x or percent_y or (y.is_Integer and y > 1)) and same_expression(x, y):
        return True
    if percent_x == percent_y or not (isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr)):
        return False
    return same_expression(x / 100, y) if percent_x else same_expression(x, y / 100)


def is_finite_number(x) -> bool:
    """Tell whether an expression is a finite number."""
    finite = isinstance(x, sympy.Expr) and bool(x.is_number) and x.is_infinite is not True
    return finite and not x.has(sympy.zoo, sympy.nan)


def same_expression(x, y) -> bool:
    """Tell whether two expressions are equal wherever both are defined: exactly, except for decimals.

    Raises:
        Unreadable: one of them is undefined, as a division by zero, or too large.
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
        raise Unreadable("an undefined value")
    if x.has(sympy.oo, -sympy.oo) or y.has(sympy.oo, -sympy.oo):
        return x == y
    if is_finite_number(x) and is_finite_number(y):
        return same_number(x, y)
    same = same_where_tried(x, y)
    return bool(verify(x, y, timeout_seconds=None, raise_on_error=True)) if same is None else same


def refuse_giants(*expressions) -> None:
    """Raise Unreadable for powers and factorials beyond ``GIANT``, which would take hours to evaluate."""
    for expression in expressions:
        sizes = [node.exp for node in expression.atoms(sympy.Pow)]
        sizes += [node.args[0] for node in expression.atoms(sympy.factorial)]
        for size in sizes:
            value = size.evalf(5) if size.is_number else None
            if value is not None and value.is_extended_real and abs(value) > GIANT:
                raise Unreadable(f"a power or factorial of {value}")


def same_number(x, y) -> bool:
    """Tell whether two finite numbers are equal.

    Raises:
        Unreadable: one of them cannot be evaluated.
    """
    if x.has(sympy.Float) or y.has(sympy.Float):
        return decimals_agree(x, y)
    if x.is_Rational and y.is_Rational:
        return x == y
    difference, size = abs(x.evalf(PRECISION) - y.evalf(PRECISION)), sympy.Max(abs(x.evalf(15)), abs(y.evalf(15)))
    if not (difference.is_number and size.is_number):
        raise Unreadable("a number that cannot be evaluated")
    # Values near zero have no digits to compare.
    return bool(difference <= size * EXACT) or (bool(size < EXACT) and bool((x - y).equals(0)))


def decimals_agree(x, y) -> bool:
    """Tell whether two numbers agree, at least one of which is a decimal.

    A whole number must match exactly, and so must two decimals if one is short. A decimal of at least 8 significant
    digits must be right in all but the last, a shorter one to 6 decimals and 5 digits.
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
    """Tell whether two expressions with symbols agree at trial points; None if fewer than two points were possible.

    A few points of both signs at which all roots and logarithms are real; many points of all sizes for functions in
    ``PIECES``; integers for functions in ``STEPS``, if the symbol is in ``WHOLE``.
    """
    functions = {f: sympy.Dummy() for f in x.atoms(AppliedUndef) | y.atoms(AppliedUndef)}
    x, y = x.xreplace(functions), y.xreplace(functions)
    symbols = sorted(x.free_symbols | y.free_symbols, key=str)
    in_pieces, in_steps = (x.has(*kinds) or y.has(*kinds) for kinds in (PIECES, STEPS))
    exact = not (x.has(sympy.Float) or y.has(sympy.Float))
    nodes = x.atoms(sympy.Pow, sympy.log) | y.atoms(sympy.Pow, sympy.log)
    within = {n.args[0] for n in nodes if isinstance(n, sympy.log) or (n.exp.is_Rational and not n.exp.is_Integer)}
    # Random points, whose numbers have no simple relation.
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
