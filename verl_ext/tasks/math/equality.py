"""Compare two mathematical answers: first by their structure, then part by part, by math-verify.

math-verify parses and compares expressions. Forms that it confuses are handled here: lists, sets, pairs and intervals;
conditions; names before a value; units; percentages; numerals with a base; options of a multiple choice; words.
Time and memory are unlimited here; :mod:`verl_ext.tasks.math.grader` limits them.
"""

import re
from functools import reduce

import sympy
from sympy.core.function import AppliedUndef

from verl_ext.tasks.math.expressions import (
    Unreadable,
    expressions_equal,
    is_finite_number,
    read,
    same_expression,
    same_where_tried,
)
from verl_ext.tasks.math.normalise import key, normalise
from verl_ext.tasks.math.structure import (
    INEQUALITIES,
    Thing,
    bracketed,
    builder,
    is_constant,
    is_name,
    relation_chain,
    split,
    structure,
    value_of,
    without_braces,
)
from verl_ext.tasks.math.units import units_differ, without_unit
from verl_ext.tasks.math.words import ANSWERS, is_words, same_words

MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}
LETTER = re.compile(r"\(?([A-J])\)?")
LABELLED = re.compile(r"(?:\(([A-J])\)|([A-J])[.):])\s*(?P<rest>[^\s+\-*/^=<>].*)", re.DOTALL)
OTHER_LABEL = re.compile(r"\([A-J]\)|(?<![A-Za-z])[A-J](?:[.):]|$)")
NUMERAL = re.compile(r"(?P<sign>-?)(?P<digits>[0-9A-Z]*\d[0-9A-Z]*)_\s*\{?\s*(?P<base>\d{1,2})\s*\}?")
CLOCK = re.compile(r"\d{1,2}:\d{2}")


def answers_equal(answer: str, truth: str) -> bool:
    """Tell whether ``answer`` is mathematically equal to ``truth``; both are the content of a box.

    Raises:
        Unreadable: one of them cannot be read as mathematics, and the texts differ.
        Exception: any error of the libraries, a bug of theirs.
    """
    answer, truth = (without_braces(normalise(text)) for text in (answer, truth))
    if key(answer) == key(truth):
        return True
    if (chosen := same_option(answer, truth)) is not None:
        return chosen
    return equal(answer, truth)


def same_option(answer: str, truth: str) -> bool | None:
    """Compare a truth that is an option of a multiple choice, or an answer labelled as one; None for others."""
    unwrapped = (re.sub(r"^\\text\s*\{([^{}]*)\}", r"\1 ", text).strip() for text in (answer, truth))
    answer, truth = (re.sub(r"^(?:option|choice)\s+(?=\(?[A-J]\b)", "", text, flags=re.I) for text in unwrapped)
    truth_label, answer_label = LABELLED.fullmatch(truth), LABELLED.fullmatch(answer)
    if answer_label and OTHER_LABEL.search(answer_label["rest"]):
        return False
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
    if not truth_label and not answer_label:
        return None
    # The answer's text without its label may equal the truth's label, or the text beside it.
    said = answer_label["rest"] if answer_label else LETTER.sub(r"\1", answer)
    if not truth_label:
        return key(said) == key(truth) or equal(said, truth)
    letter = truth_label[1] or truth_label[2]
    if answer_label and (answer_label[1] or answer_label[2]) != letter:
        return False
    return said == letter or key(said) == key(truth_label["rest"]) or equal(said, truth_label["rest"])


def equal(answer: str, truth: str) -> bool:
    """Compare as :func:`answers_equal`, but normalised texts."""
    if key(answer) == key(truth):
        return True
    a, b = structure(answer), structure(truth)
    if a.kind == b.kind == "one":
        return singles_equal(a.parts[0], b.parts[0])
    # One name before all values: x = 1, 2; x \in \{1, 2\}; (x, y) = (1, 2).
    values = [value_of(answer, sums=True), value_of(truth)]
    if values != [answer, truth] and (a.kind == "one") != (b.kind == "one"):
        if [structure(v) for v in values] != [a, b]:
            return equal(*values)
    if b.kind == "list" and a.kind == "one" and structure(answer, False).kind == "list":
        # If two numbers are expected, 3,125 may be two, as in "3, 125".
        a = structure(answer, False)
    kinds = {a.kind, b.kind}
    if kinds <= {"list", "set"}:
        return same_members(a, b, as_sets="set" in kinds) or same_regions(a, b)
    if kinds == {"tuple"}:
        return a.brackets == b.brackets and len(a.parts) == len(b.parts) and all(map(equal, a.parts, b.parts))
    if kinds == {"tuple", "list"}:
        pair = a if a.kind == "tuple" else b
        in_order = pair.brackets == "()" and len(a.parts) == len(b.parts) and all(map(equal, a.parts, b.parts))
        return in_order or same_regions(a, b)
    if kinds == {"one", "set"}:
        one, several = (a, b) if a.kind == "one" else (b, a)
        if len(several.parts) == 1 and not set_like(one.parts[0]) and not relation_chain(one.parts[0])[1]:
            return equal(several.parts[0], truth) if several is a else equal(answer, several.parts[0])
    return same_regions(a, b)


def same_members(a: Thing, b: Thing, as_sets: bool) -> bool:
    """Tell whether the parts are equal one to one in any order; of sets, whether each part has an equal one."""
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
    for x in mine:
        found = next((y for y in others if equal(x, y)), None)
        if found is None:
            return False
        others.remove(found)
    return True


def singles_equal(answer: str, truth: str) -> bool:
    """Compare two answers that are not lists."""
    if any(relation_chain(text)[1] for text in (answer, truth)):
        return relations_equal(answer, truth)
    clocks = [text for text in (answer, truth) if CLOCK.fullmatch(text)]
    if len(clocks) == 2 or any(text.endswith(":00") for text in clocks):
        # Clock times are not ratios.
        return False
    a, unit_a = without_unit(answer)
    b, unit_b = without_unit(truth)
    if {unit_a, unit_b} == {"degree", ""} and (r"\pi" in (a, b)[unit_a == "degree"]):
        degrees, radians = (a, b) if unit_a else (b, a)
        return expressions_equal(rf"({degrees})\cdot\frac{{\pi}}{{180}}", radians)
    if units_differ(unit_a, unit_b):
        return False
    if (a, b) != (answer, truth):
        return equal(a, b)
    if NUMERAL.fullmatch(a) or NUMERAL.fullmatch(b):
        return numerals_equal(a, b)
    if is_words(a) or is_words(b) or ANSWERS & {a.lower(), b.lower()}:
        return same_words(a, b)
    if all(re.fullmatch(r"[A-Za-z][a-z]{2,}", text) for text in (a, b)) and same_words(a, b):
        return True
    ratios = [split(text, ":".__eq__)[0] for text in (a, b)]
    if max(map(len, ratios)) > 2:
        x, y = ([read(part) for part in ratio] for ratio in ratios)
        return len(x) == len(y) and all(same_expression(p * y[0], q * x[0]) for p, q in zip(x, y, strict=True))
    if set_like(a) or set_like(b):
        return same_regions(structure(a), structure(b))
    return expressions_equal(a, b)


def set_like(text: str) -> bool:
    """Tell whether a text has a symbol of sets."""
    return bool(re.search(r"\\(?:cup|cap|setminus|emptyset|mathbb)(?![A-Za-z])|\\\{", text))


def numerals_equal(a: str, b: str) -> bool:
    """Compare numerals: 101_2 equals 101 (an expected base is often left out), 5_{10} equals 5, 101_2 is not 101_3."""
    x, y = NUMERAL.fullmatch(a), NUMERAL.fullmatch(b)
    if y and not x and a == y["sign"] + y["digits"]:
        return True
    try:
        decimals = [str(int(m["sign"] + m["digits"], int(m["base"]))) if m else text for m, text in ((x, a), (y, b))]
    except ValueError:
        # A digit that the base does not have.
        return False
    return (bool(x) or not y) and expressions_equal(*decimals)


# Equations and inequalities -------------------------------------------------------------------------------------------


def relations_equal(answer: str, truth: str) -> bool:
    """Compare two answers, at least one of which is an equation, an inequality or a membership."""
    a, b = value_of(answer, sums=True), value_of(truth)
    if a != answer and b != truth:
        # x = 5 is not y = 5, unless the names are words.
        symbols = [next((s for s in relation_chain(text)[0] if is_name(s)), "") for text in (answer, truth)]
        if not all(symbols) or key(symbols[0]) == key(symbols[1]) or any(map(is_words, symbols)):
            return equal(a, b)
        return same_equation(answer, truth)
    sides, signs = relation_chain(answer)
    if a != answer and set(signs) == {"="} and all(map(is_constant, sides)):
        # 1 = 2 is not 2.
        return all(equal(side, b) for side in sides if r"\pmod" not in side)
    # A name before a value adds nothing to it; but y = 2x + 3 may be the equation y - 2x - 3 = 0.
    signs = [set(relation_chain(text)[1]) for text in (answer, truth)]
    if (a, b) != (answer, truth) and signs != [{"="}, {"="}]:
        return equal(a, b)
    if all(s and s <= INEQUALITIES for s in signs):
        return same_chain(a, b) or (symbols_of(a) == symbols_of(b) and same_regions(structure(a), structure(b)))
    if signs == [{"="}, {"="}]:
        return same_equation(answer, truth)
    return same_regions(structure(a), structure(b))


def symbols_of(text: str) -> set[str]:
    """List the symbols and functions in a chain of relations."""
    sides = [read(side) for side in relation_chain(text)[0]]
    return {str(part) for side in sides for part in side.atoms(AppliedUndef) or side.free_symbols}


def same_chain(a: str, b: str) -> bool:
    """Tell whether two chains of inequalities are equivalent side by side or mirrored, in any number of variables."""
    (sides, signs), (others, other_signs) = relation_chain(a), relation_chain(b)
    if len(sides) != len(others):
        return False
    if signs == other_signs and all(map(equal, sides, others)):
        return True
    mirrored = [MIRRORED[s] for s in reversed(signs)] == other_signs
    if mirrored and all(map(equal, reversed(sides), others)):
        return True
    if len(signs) > 1:
        return False
    # 2x - 2y > 0 is x > y.
    left, right = (read(x) - read(y) for x, y in (sides, others))
    factor = sympy.simplify(left / right)
    return bool(
        factor.is_number and ((signs == other_signs and factor.is_positive) or (mirrored and factor.is_negative))
    )


def same_equation(a: str, b: str) -> bool:
    """Tell whether two equations are equal up to a constant factor, or have the same solution for a symbol."""
    (sides, signs), (others, other_signs) = relation_chain(a), relation_chain(b)
    if not signs == other_signs == ["="]:
        return False
    if value_of(a) == sides[1] and value_of(b) == others[1]:
        names = (key(sides[0]), key(others[0]))
        # y = 2x and f(x) = 2x
        free = sum("(" in name for name in names) == 1 or is_words(sides[0]) or is_words(others[0])
        if names[0] == names[1] or free:
            return equal(sides[1], others[1])
    left, right = (read(x) - read(y) for x, y in (sides, others))
    if not left.free_symbols or left.free_symbols != right.free_symbols:
        return False
    # A constant factor, computed at one point and tried at others.
    point = {s: sympy.Rational(997 + 3 * i * i + 71 * i, 83) for i, s in enumerate(sorted(left.free_symbols, key=str))}
    factor = (left.subs(point) / right.subs(point)).doit()
    if is_finite_number(factor) and not factor.is_zero and same_where_tried(left, factor * right):
        return True
    agreed = []
    for symbol in sorted(left.free_symbols, key=str):
        try:
            mine, other = (set(map(sympy.simplify, sympy.solve(side, symbol))) for side in (left, right))
        except NotImplementedError:
            continue
        if mine and other:
            agreed.append(mine == other)
    return bool(agreed) and all(agreed)


# Sets of numbers ------------------------------------------------------------------------------------------------------

SETS = {r"\mathbb{R}": sympy.S.Reals, r"\mathbb{Z}": sympy.S.Integers, r"\mathbb{N}": sympy.S.Naturals}
SETS |= {r"\mathbb{Q}": sympy.S.Rationals, r"\emptyset": sympy.S.EmptySet}
INEQUALITY = {"<": sympy.Lt, ">": sympy.Gt, "<=": sympy.Le, ">=": sympy.Ge, "!=": sympy.Ne}


def same_regions(a: Thing, b: Thing) -> bool:
    """Tell whether two answers describe the same set of real numbers."""
    x, y = region(a), region(b)
    if x is None or y is None:
        return False
    if x == y:
        return True
    if isinstance(x, sympy.Interval) and isinstance(y, sympy.Interval):
        ends = (x.left_open, x.right_open) == (y.left_open, y.right_open)
        return ends and same_expression(x.start, y.start) and same_expression(x.end, y.end)
    return bool(sympy.SymmetricDifference(x, y).is_empty)


def region(thing: Thing) -> sympy.Set | None:
    """Read the set of real numbers that an answer describes: interval, union, condition on one variable; else None."""
    try:
        if thing.kind == "tuple" and len(thing.parts) == 2:
            low, high = map(read, thing.parts)
            found = sympy.Interval(low, high, thing.brackets[0] == "(", thing.brackets[1] == ")")
            return None if found is sympy.S.EmptySet else found
        if thing.kind == "set":
            return sympy.FiniteSet(*map(read, thing.parts))
        if thing.kind == "list":
            return region_of_list(thing)
        if thing.kind == "one":
            return set_of(thing.parts[0])
    except (Unreadable, TypeError, NotImplementedError, ValueError):
        pass
    return None


def region_of_list(thing: Thing) -> sympy.Set | None:
    """Read conditions on one variable, x < 0 or x = 1; or intervals with "or" between them."""
    if {structure(part).kind for part in thing.parts} == {"tuple"}:
        if thing.joined != "or" and r"\infty" not in "".join(thing.parts):
            return None  # these may be points
        found = [region(structure(part)) for part in thing.parts]
        return None if None in found else sympy.Union(*found)
    signs = [set(relation_chain(part)[1]) for part in thing.parts]
    if not all(signs) or not any(s & INEQUALITIES for s in signs):
        return None
    if len(set().union(*map(symbols_of, thing.parts))) > 1:
        return None
    found = [condition(part) for part in thing.parts]
    if None in found:
        return None
    both = sympy.Intersection(*found)
    # x < 1, x > 2 means one of the two.
    return sympy.Union(*found) if thing.joined == "or" or (not thing.joined and both.is_empty) else both


def set_of(text: str) -> sympy.Set | None:
    """Read a set from a text without commas outside brackets."""
    if (named := SETS.get(text.replace(" ", ""))) is not None:
        return named
    for sign, combine in ((r"\cup", sympy.Union), (r"\cap", sympy.Intersection), (r"\setminus", sympy.Complement)):
        parts, found = split(text, sign.__eq__)
        if found:
            sets = [region(structure(part)) for part in parts]
            return None if None in sets else reduce(combine, sets)
    whole = bracketed(text)
    if whole and whole[0] == r"\{" and (within := builder(whole[1])):
        domain, inside = within
        numbers = SETS.get(domain.replace(" ", "")) if domain else sympy.S.Reals
        found = region(structure(inside))
        return None if None in (numbers, found) else sympy.Intersection(numbers, found)
    return condition(text)


def condition(text: str) -> sympy.Set | None:
    """Solve a chain of inequalities in one variable, x = a value, or x \\in a set, for real numbers."""
    sides, found = relation_chain(text)
    if found == ["in"] and is_name(sides[0]):
        return region(structure(sides[1]))
    if found == ["="] and is_name(sides[0]):
        return sympy.FiniteSet(read(sides[1]))
    if not found or not set(found) <= INEQUALITIES:
        return None
    read_sides = [read(side) for side in sides]
    # f(x) counts as a variable like x.
    functions = {f: sympy.Dummy(real=True) for side in read_sides for f in side.atoms(AppliedUndef)}
    read_sides = [side.xreplace(functions) for side in read_sides]
    variables = set().union(*(side.free_symbols for side in read_sides))
    if len(variables) != 1:
        return None
    pairs = zip(read_sides, read_sides[1:], found, strict=False)
    return sympy.Intersection(sympy.S.Reals, *(INEQUALITY[sign](a, b).as_set() for a, b, sign in pairs))
