"""Split a value and its unit: ``5\\text{ cm}^2``, ``80 km/h``, ``5 apples``, ``90^\\circ``; not ``2t`` or ``5ab``."""

import re

from verl_ext.tasks.math.words import is_words

SAME_UNIT = """
cm centimeter centimetre; mm millimeter millimetre; km kilometer kilometre; m meter metre; nm nanometer; ft foot feet;
in inch inches; yd yard; mi mile; kg kilogram; mg milligram; g gram; lb pound; oz ounce; ton tonne; l liter litre;
ml milliliter; gal gallon; s sec second; min minute; h hr hour; day; week; month; yr year; am; pm; mph; kmh kph; hz;
khz; dollar; cent; euro; yuan; rupee; radian rad; degree deg; celsius; fahrenheit; n newton; j joule; kj kilojoule;
w watt; v volt; k kelvin; pa pascal; ev; kev; mev; gev
"""
UNIT = {name: group.split()[0] for group in SAME_UNIT.split(";") for name in group.split()}
"""Names of units of measurement, each with one of its names. Different units are unequal; nouns are not compared."""

SHAPES = {"sq": "2", "square": "2", "cu": "3", "cubic": "3"}
"""Words for powers of the next unit."""

BARE_UNITS = {name for name in UNIT if len(name) > 1} | {*SHAPES, "per", "units", "unit"}
"""Units that differ from variables even without ``\\text{}``."""

NO_UNITS = set(
    """
    more less fewer squared cubed factorial mod times half dozen if for is not to plus minus over choose base when where
    with and or ten tens hundred hundreds thousand lakh crore point below above wrong doubled tripled twice thirds third
    quarters quarter fifths tenths hundredths zero one two three four five six seven eight nine gamma hbar pi sqrt sin
    cos tan cot sec csc log ln exp max gcd lcm
    """.split()
)
"""Words after a number that change it, or that are functions or names."""

POWER = r"(?:\s*\^\s*\{?\s*(?P<power>-?\d)\s*\}?)?"
TEXT_UNIT = re.compile(rf"(?P<value>.*\S)\s*\\text\s*\{{(?P<unit>[^{{}}\d]*)\}}{POWER}$", re.DOTALL)
WORD_UNIT = re.compile(
    rf"(?P<value>.*[\d}})%])(?P<space>\s*)(?P<unit>[A-Za-z][A-Za-z./ ]*[A-Za-z.]){POWER}$", re.DOTALL
)
FOREIGN_UNIT = re.compile(r"(?P<value>.*[\d})%])\s*(?P<unit>[\u4e00-\u9fff]+)$", re.DOTALL)
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")


def without_unit(text: str) -> tuple[str, str]:
    """Split a text into a value and its unit's words, "5 apples" into "5" and "apples"; without a unit, ""."""
    if text.endswith(r"^\circ") and not TRIGONOMETRIC.search(text):
        return text.removesuffix(r"^\circ").strip(), "degree"
    for pattern in (TEXT_UNIT, WORD_UNIT, FOREIGN_UNIT):
        match = pattern.fullmatch(text)
        if not match:
            continue
        value, words = match["value"], re.findall(r"[^\W\d_]+", match["unit"].lower().replace(".", ""))
        if not words or NO_UNITS & set(words):
            continue
        known = all(singular(word) in UNIT or word in BARE_UNITS for word in words)
        if pattern is WORD_UNIT:
            known = all(singular(word) in BARE_UNITS for word in words) or re.fullmatch(r"k?m/[hs]", match["unit"])
            if not known and not (match["space"] and all(len(w) >= 4 or w in BARE_UNITS for w in words)):
                continue
        elif not known and any(len(word) == 1 and word.isascii() for word in words):
            continue
        if known or (re.search(r"\d", value) and not is_words(value)):
            deeper, more = without_unit(value)
            return deeper, " ".join(filter(None, (more, *words, match.groupdict().get("power"))))
    return text, ""


def singular(word: str) -> str:
    """Remove a final s, unless it belongs to the unit's name."""
    return word if word in UNIT or word in BARE_UNITS else word.removesuffix("s")


def units_differ(a: str, b: str) -> bool:
    """Tell whether both are units of measurement, and different."""
    a, b = ([spelled(word) for word in unit.split()] for unit in (a, b))
    if not a or not b or "?" in a + b:
        return False
    # Degrees may be those of a temperature.
    return sorted(a) != sorted(b) and {*a, *b} not in ({"degree", "celsius"}, {"degree", "fahrenheit"})


def spelled(word: str) -> str:
    """Return one name for a unit or a power; ? for a noun."""
    return SHAPES.get(word) or (word if re.fullmatch(r"-?\d", word) else UNIT.get(singular(word), "?"))
