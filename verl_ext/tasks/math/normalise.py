"""Normalise the spelling of answers by a list of rules, each with an example.

A rule replaces text by text and never evaluates. With all rules, its example ``before`` becomes ``after``. The tests
try each example, and that hostile answers take little time.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

LOOKS_LIKE = {
    "–": "-", "—": "-", "−": "-", "‐": "-", "‑": "-", "﹣": "-",
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "∓": r"\mp ",
    "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "≡": r"\equiv ",
    "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∞": r"\infty ", "∖": r"\setminus ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "π": r"\pi ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "θ": r"\theta ", "λ": r"\lambda ",
    "μ": r"\mu ", "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ", "σ": r"\sigma ",
    "°": r"^\circ ", "º": r"^\circ ", "∘": r"\circ ", "…": r"\ldots ", "√": r"\sqrt ", "∠": r"\angle ",
    "½": r" \frac{1}{2}", "⅓": r" \frac{1}{3}", "⅔": r" \frac{2}{3}", "¼": r" \frac{1}{4}", "¾": r" \frac{3}{4}",
    "⅕": r" \frac{1}{5}", "⅙": r" \frac{1}{6}", "⅛": r" \frac{1}{8}", "⅜": r" \frac{3}{8}", "⅝": r" \frac{5}{8}",
    "⅞": r" \frac{7}{8}", "“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " ", "\u200b": "",
    **{c: f"^{{{i}}}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}, "⁻": "^{-}", "ⁿ": "^{n}",
    **{c: f"_{{{i}}}" for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    **dict.fromkeys("€£¥₹￥", ""),
}  # fmt: skip
"""Characters and their LaTeX; NFKC handles Unicode's own variants (１)."""

TRANSLATION = str.maketrans(LOOKS_LIKE)

# Parts of the patterns below.
START = r"(?<![\\A-Za-z])"
END = r"(?![A-Za-z])"
SAID = r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|result|solution)\s*"
SAID += r"(?:is\s*:?|[:=])"
NESTED = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"
DIGITS = "zero one two three four five six seven eight nine ten eleven twelve".split()
BASES = {word: DIGITS.index(word) for word in DIGITS[2:11]} | {"sixteen": 16}
TEMPERATURES = {"C": "celsius", "F": "fahrenheit"}
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SMALL = 15
"""The most digits of a fraction's parts that are compared as numbers."""


@dataclass(frozen=True)
class Rule:
    """``pattern`` becomes ``replacement``; all rules together make ``before`` into ``after``."""

    pattern: re.Pattern[str]
    replacement: str | Callable[[re.Match[str]], str]
    before: str
    after: str


def _repeating(whole: str, once: str, again: str) -> str:
    """Write 0.1666... as ``\\frac{16-1}{90}``: exact, without converting a model's text to a number."""
    return rf"\frac{{{whole}{once}{again}-{whole}{once}}}{{{'9' * len(again)}{'0' * len(once)}}}"


def _until_the_dots(match: re.Match[str]) -> str:
    """Continue a decimal that ends in dots: a digit repeats if it is there three times, several digits if twice."""
    whole, digits = match["whole"], match["digits"]
    for size in range(1, len(digits) // 2 + 1):
        again, times = digits[-size:], 3 if size == 1 else 2
        if digits.endswith(again * times):
            once = digits
            while once.endswith(again):
                once = once[:-size]
            return _repeating(whole, once, again)
    return match[0]


def _mixed(match: re.Match[str]) -> str:
    """Write ``3 1/2`` and ``3\\frac{1}{2}`` as a sum, if the fraction is a proper one."""
    top, bottom = match["top"], match["bottom"]
    proper = len(bottom) <= SMALL and len(top) <= SMALL and 0 < int(top) < int(bottom)
    return rf"({match['whole']}+\frac{{{top}}}{{{bottom}}})" if proper else match[0]


def _rule(pattern: str, replacement, before: str, after: str, flags: int = 0) -> Rule:
    return Rule(re.compile(pattern, flags), replacement, before, after)


RULES = [
    # Mark-up -----------------------------------------------------------------------------------------------------
    _rule(r"\*\*([^*]+)\*\*$|^`([^`]*)`$", lambda m: m[1] or m[2], "**73**", "73"),
    _rule(r"\\(?:text)?color\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}", "", r"{\color{blue}45}", "{45}"),
    _rule(r"\\(?:boxed|fbox|underline|boldsymbol|bm|mathbf|mathit|mathsf|mathnormal|displaystyle|textstyle|limits|"
          r"nolimits|hfill)" + END, "", r"\boldsymbol{45}", "{45}"),
    _rule(r"\\(?:[bB]igg?[lrm]?|left|right|middle)(?![a-zA-Z])\s*\.?", "", r"\left[1,2\right)", "[1,2)"),
    _rule(r"\\[hv]?phantom\s*\{[^{}]*\}", "", r"5\phantom{0}", "5"),
    _rule(r"\{\s*\\rm\s+([^{}]*)\}", r"\\text{\1}", r"5{\rm cm}", r"5\text{cm}"),
    _rule(r"\\mathrm\s*\{\s*([eid])\s*\}", r"\1", r"\mathrm{e}", "e"),
    _rule(r"\\(?:textbf|textit|textrm|textsf|texttt|textnormal|emph|mathrm|mbox|hbox)\s*(?=\{)", r"\\text",
          r"\textit{Friday}", r"\text{Friday}"),
    _rule(r"\\text\s*\{([^{}^]*[A-Za-z])\s*\^\s*(?:\{\s*)?(-?\d)\s*(?:\}\s*)?\}", r"\\text{\1}^{\2}", r"5\text{ m/s^2}",
          r"5\text{ m/s}^{2}"),
    _rule(r"\\text\s*\{(?:[^{}A-Za-z]|\\%)*\}", lambda m: m[0][m[0].index("{") + 1 : -1], r"\text{-}5", "-5"),
    _rule(r"\\text\s*\{\s*([-+]?\d+(?:[.,]\d+)*)(?:st|nd|rd|th)?\s*(?:\}|\s(?=[A-Za-z]))",
          lambda m: m[1] + ("" if m[0].endswith("}") else r"\text{"), r"\text{12 apples}", r"12\text{apples}"),
    _rule(r"\}\s*\\cdot\s*\\text\s*\{", " ", r"5\text{ N}\cdot\text{m}", r"5\text{ N m}"),
    # Options of a multiple choice are letters: \text{A, C} is A, C.
    _rule(r"^\\text\s*\{\s*(\(?[A-Z]\)?(?:\s*(?:,|;|&|and)\s*\(?[A-Z]\)?)*[.,]?)\s*\}", r"\1 ", r"\text{(A) }\ 12",
          "(A) 12"),
    # Words around the answer --------------------------------------------------------------------------------------
    _rule(rf"^\s*\\text\s*\{{\s*{SAID}\s*\}}\s*(?=\S)", "", r"\text{The answer is } 45", "45", re.IGNORECASE),
    _rule(rf"^\s*\\text\s*\{{\s*{SAID}\s*(?=[^{{}}\s])", r"\\text{", r"\text{Answer: east}", r"\text{east}",
          re.IGNORECASE),
    _rule(rf"^\s*{SAID}\s*(?=\S)", "", "The final answer is 45", "45", re.IGNORECASE),
    _rule(r"^\s*(?:\\text\s*\{)?\s*(?:there (?:is|are) )?(?:no (?:real |integer )?solutions?|(?:the )?empty set)\s*"
          r"\}?$", r"\\emptyset", r"\text{no solution}", r"\emptyset", re.IGNORECASE),
    _rule(r"^\s*(?:\\text\s*\{)?\s*all (?:real numbers|reals)\s*\}?$", r"\\mathbb{R}", r"\text{all real numbers}",
          r"\mathbb{R}", re.IGNORECASE),
    _rule(r"^\s*(?:\\text\s*\{)?\s*all integers\s*\}?$", r"\\mathbb{Z}", r"\text{all integers}", r"\mathbb{Z}",
          re.IGNORECASE),
    _rule(r"^\s*(?:\\text\s*\{)?\s*(" + "|".join(DIGITS) + r")\s*\}?$", lambda m: str(DIGITS.index(m[1].lower())),
          r"\text{seven}", "7", re.IGNORECASE),
    # The range of a formula's variable.
    _rule(r"^((?:(?!\\[lg]eq|\\neq|[<>]).)*[^\s(,{|])\s*[,(]\s*(?:\\text\s*\{\s*(?:where|for|with)?\s*\}\s*)?[A-Za-z]\s*"
          r"\\in\s*\\math(?:bb|bf)\s*\{[A-Z]\}\s*(?:[\^_]\s*\{?\s*[*+]\s*\}?)?\s*\)?\s*$", r"\1",
          r"4k+1, k \in \mathbb{Z}", "4k+1"),
    _rule(r"(?<=[^\s(,{|])\s*,?\s*(?:\\text\s*\{\s*for (?:all|any|every|each)\b[^{}]*\}|\\forall)[^,|]*$", "",
          r"f(x)=2x \text{ for all } x", "f(x)=2x"),
    _rule(r"^((?:(?!\\[lg]eq|\\neq|[<>,]).)+),\s*[a-z]\s*(?:\\geq|\\ge|>)\s*\d+$", r"\1", r"2^n-1, n\ge1", "2^n-1"),
    # Money --------------------------------------------------------------------------------------------------------
    _rule(r"(?:\b(?:US|HK|NT)\s*)?\\?\$|^\s*(?:Rs\.?|USD|EUR|RMB)\s*(?=\d)", "", r"\$5", "5"),
    # Spaces -------------------------------------------------------------------------------------------------------
    _rule(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\!)\s*(?=\d{3}(?!\d))", ",", "1{,}234", "1,234"),
    _rule(r"\\\\\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]", r"\\\\", r"1\\[4pt]2", r"1\\2"),
    _rule(r"\\\(|\\\)|\\\[|\\\]", " ", r"\(5\)", "5"),
    _rule(r"\\!", "", r"\sqrt{\!2}", r"\sqrt{2}"),
    _rule(r"(?<!\\)\\[,;:> ]|(?<!\\)~|\\hspace\*?\s*\{[^{}]*\}|\\\\\s*$|\\(?:thinspace|enspace|space)" + END, " ",
          r"2\;x", "2x"),
    _rule(r"\\q?quad\s*(?=\\text|$)", " ", r"5\quad\text{cm}", r"5\text{cm}"),
    # Symbols of several names -------------------------------------------------------------------------------------
    _rule(r"\\(?:[dtc]frac)" + END, r"\\frac", r"\dfrac{1}{2}", r"\frac{1}{2}"),
    _rule(r"\\frac\s*(\d|[a-z])\s*(\d|[a-z])" + END, r"\\frac{\1}{\2}", r"\frac12", r"\frac{1}{2}"),
    _rule(r"\\frac\s*(\d|[a-z])\s*(?=\{)", r"\\frac{\1}", r"\frac1{22}", r"\frac{1}{22}"),
    _rule(r"(\\frac\s*\{[^{}]*\})\s*(\d|[a-z])" + END, r"\1{\2}", r"\frac{22}7", r"\frac{22}{7}"),
    _rule(r"\\sqrt\s+(?=[\d({])|\\sqrt(?=\d)",  r"\\sqrt", "√2", r"\sqrt{2}"),
    _rule(r"\\sqrt(\d+)", lambda m: rf"\sqrt{{{m[1]}}}" , r"\sqrt8", r"\sqrt{8}"),
    _rule(r"\\sqrt\s*([a-z])" + END, r"\\sqrt{\1}", r"\sqrt x", r"\sqrt{x}"),
    _rule(START + r"sqrt\s*(\d+|[a-z](?![a-z]))", r"\\sqrt{\1}", "2 sqrt 3", r"2 \sqrt{3}"),
    _rule(r"\*\*", "^", "x**2", "x^2"),
    _rule("==", "=", "y == 2", "y = 2"),
    _rule(rf"\\?sqrt\s*\(({NESTED})\)", r"\\sqrt{\1}", "sqrt((x+1)/2)", r"\sqrt{(x+1)/2}"),
    _rule(rf"\^\s*\(({NESTED})\)", r"^{\1}", "2**(1/(n+1))", r"2^{1/(n+1)}"),
    _rule(START + r"(pi|sin|cos|tan|cot|sec|csc|ln|log|exp|arcsin|arccos|arctan|sinh|cosh|tanh|alpha|beta|theta|phi|"
          r"lambda|sigma|omega|rho)" + END, r"\\\1 ", "2pi", r"2\pi"),
    _rule(r"\\(?:le|leqslant|leqq)" + END + "|<=", r"\\leq ", r"x\le 2", r"x\leq 2"),
    _rule(r"\\(?:ge|geqslant|geqq)" + END + "|>=", r"\\geq ", "x>=2", r"x\geq 2"),
    _rule(r"\\ne" + END + r"|!=|\\not\s*=", r"\\neq ", r"x\ne2", r"x\neq 2"),
    _rule(r"\\lt" + END, "<", r"x\lt2", "x<2"),
    _rule(r"\\gt" + END, ">", r"x\gt2", "x>2"),
    _rule(r"\\(?:ldots|dots[a-z]?|cdots)" + END + r"|\.{3,}", r"\\ldots ", "1,2,...", r"1,2,\ldots"),
    _rule(START + r"(?:infinity|infty|inf)" + END, r"\\infty ", "(0, inf)", r"(0, \infty)"),
    _rule(r"(^|[(\[,\s])\+\s*(?=\\infty)", r"\1", r"(0,+\infty)", r"(0,\infty)"),
    _rule(r"\\varnothing|\\empty" + END + r"|\\\{\s*\\\}", r"\\emptyset ", r"\varnothing", r"\emptyset"),
    _rule(r"\\(?:mid|vert|lvert|rvert)" + END, "|", r"\{x \mid x>0\}", r"\{x | x>0\}"),
    _rule(r"\\(?:lbrace)" + END, r"\\{", r"\lbrace 1\}", r"\{ 1\}"),
    _rule(r"\\(?:rbrace)" + END, r"\\}", r"\{1\rbrace", r"\{1\}"),
    _rule(r"\\R" + END, r"\\mathbb{R}", r"\R", r"\mathbb{R}"),
    _rule(r"(?<=[)\]])\s*U\s*(?=[(\[])", r" \\cup ", "(0,1) U (2,3)", r"(0,1) \cup (2,3)"),
    _rule(r"\\backslash" + END, r"\\setminus ", r"\mathbb{R}\backslash\{0\}", r"\mathbb{R}\setminus \{0\}"),
    _rule(r"(?<=\})\s*-\s*(?=\\\{)", r"\\setminus ", r"\mathbb{R}-\{0\}", r"\mathbb{R}\setminus \{0\}"),
    _rule(r"\\mathbb\s*\{R\}\s*[\^_]\s*\{?\s*\+\s*\}?", r"(0,\\infty)", r"\mathbb{R}^+", r"(0,\infty)"),
    _rule(r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}", r"\\binom{\1}{\2}", r"{10 \choose 3}", r"\binom{10}{3}"),
    # antlr 4.9.3's grammar has it as a function only.
    _rule(r"\\gamma" + END, r"\\text{gamma}", r"2\gamma", r"2\text{gamma}"),
    _rule(r"\^\s*\{\s*((?:\\prime\s*)+)\}|\^\s*\\prime" + END, lambda m: "'" * (m[1] or "1").count("\\") or "'",
          r"f^{\prime\prime}", "f''"),
    # A subscript is a name.
    _rule(r"((?<![A-Za-z])[A-Za-z]\s*_\s*\{[^{}\\]*)\\([A-Za-z]+)\s*(?=[^{}\\]*\})", r"\1\2", r"a_{\max}", r"a_{max}"),
    # The grammar's own E takes no subscript.
    _rule(START + r"([EI])(?=\s*_)", r"\\text{\1}", "E_0", r"\text{E}_0"),
    _rule(r"\\hbar" + END, r"\\text{hbar}", r"\hbar", r"\text{hbar}"),
    _rule(r"\(?\s*(?:\\pmod|\\bmod|\\mod" + END + r"|\bmod)\s*\{?\s*(\w+)\s*\}?\s*\)?", r" \\pmod{\1}",
          r"x \equiv 1 (mod 4)", r"x \equiv 1 \pmod{4}"),
    _rule(r"_\s*(?:\{\s*\\text\s*\{\s*(\w+)\s*\}\s*\}|\\text\s*\{\s*(\w+)\s*\})",
          lambda m: f"_{{{BASES[word]}}}" if (word := m[1] or m[2]) in BASES else m[0], r"101_{\text{two}}", "101_{2}"),
    _rule(r"(?<=\d)_\s*\{\s*\(\s*(\d+)\s*\)\s*\}", r"_{\1}", "101_{(2)}", "101_{2}"),
    _rule(r"^\((\w*\d\w*)\)\s*(?=_)", r"\1", "(101)_2", "101_2"),
    _rule(r"(?<=\w)\s*\(?(?:\\text\s*\{\s*(?:in )?base\s*(?:\}\s*)?|(?:in )?base\s+)(\d+)\s*[)}]?$", r"_{\1}",
          r"101\text{ base }2", "101_{2}"),
    # Percent, degrees, ordinals, large numbers --------------------------------------------------------------------
    _rule(r"\s*(?:\\text\s*\{\s*(?:\\?%|percent(?:age)?|pct)\.?\s*\}|\\?%|" + START + r"(?:percent(?:age)?|pct)" + END
          + ")", r"\\%", "28 percent", r"28\%"),
    _rule(r"\s*(?:\^\s*\{\s*\\(?:circ|degree)\s*\}|\^\s*\\(?:circ|degree)" + END + r"|\\degrees?" + END
          + r"|\\text\s*\{\s*degrees?\s*\}|(?<=\d)\s*degrees?" + END + ")", r"^\\circ ", r"90\degree", r"90^\circ"),
    _rule(r"\^\\circ\s*(?:\\text\s*\{\s*([CF])\s*\}|([CF]))\s*\.?$",
          lambda m: rf"\text{{{TEMPERATURES[m[1] or m[2]]}}}", r"20^\circ C", r"20\text{celsius}"),
    _rule(r"(?<=\d)(?:\^\s*\{\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}|\^\s*\{\s*(?:st|nd|rd|th)\s*\}|"
          r"\^?\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}|(?:st|nd|rd|th)" + END + ")", "", r"5^{\text{th}}", "5"),
    _rule(r"\\text\s*\{\s*(hundred|thousand|million|billion|trillion)s?\s*", r" \1 \\text{", r"2\text{ million}",
          r"2 \times 10^{6}"),
    _rule(r"\\text\s*\{\s*\}", "", r"3\text{ million}", r"3 \times 10^{6}"),
    _rule(r"(?<=\d)\s*(hundred|thousand|million|billion|trillion)s?" + END, lambda m: rf" \times 10^{{{POWERS[m[1]]}}}",
          "1 million", r"1 \times 10^{6}"),
    # Numbers ------------------------------------------------------------------------------------------------------
    _rule(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?!\w)", r"\1 \\times 10^{\2}", "1.5e3", r"1.5 \times 10^{3}"),
    _rule(r"\^\s*(-\d+)", r"^{\1}", "10^-3", "10^{-3}"),
    _rule(r"(?P<whole>\d*)\.(?P<once>\d*)\\(?:overline|bar|overset\{\\cdot\}|dot|widehat)\s*(?:\{(?P<some>\d+)\}|"
          r"(?P<one>\d))(?!\d|\\dot)", lambda m: _repeating(m["whole"] or "0", m["once"], m["some"] or m["one"]),
          r".1\overline{6}", r"\frac{016-01}{90}"),
    _rule(r"(?P<whole>\d+)\.(?P<once>\d*)\\dot\s*\{?(?P<first>\d)\}?(?P<more>\d*)\\dot\s*\{?(?P<last>\d)\}?",
          lambda m: _repeating(m["whole"], m["once"], m["first"] + m["more"] + m["last"]), r"0.\dot{1}\dot{2}",
          r"\frac{012-0}{99}"),
    _rule(r"(?P<whole>\d+)\.(?P<digits>\d{3,})\\ldots", _until_the_dots, "0.1666...", r"\frac{016-01}{90}"),
    _rule(r"(?<![\d.,])(\d{1,3})((?:[ ]\d{3})+)(?![\d.])", lambda m: m[1] + m[2].replace(" ", ""), "1 234", "1234"),
    _rule(r"(?<=\{)(?<!\\\{)(\d{1,3}(?:,\d{3})+)(?=\})", lambda m: m[1].replace(",", ""), r"\frac{1,000}{3}",
          r"\frac{1000}{3}"),
    _rule(r"(?<![\d.^_])(?<![\^_]\{)(?P<whole>\d+)\s+(?P<top>\d+)\s*/\s*(?P<bottom>\d+)(?![\d.])", _mixed, "3 1/2",
          r"(3+\frac{1}{2})"),
    _rule(r"(?<![\d.^_])(?P<whole>\d+)\s*\\frac\s*\{\s*(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}", _mixed,
          r"2\frac13", r"(2+\frac{1}{3})"),
    _rule(r"(?P<whole>\d+)\.(?P<once>\d*)\((?P<again>\d+)\)", lambda m: _repeating(m["whole"], m["once"], m["again"]),
          "0.1(6)", r"\frac{016-01}{90}"),
    # Read from left to right: 1/2 x is half of x.
    _rule(r"(?<![\w.^/])(\d+)/(\d+)(?=\s*(?:\\(?:pi|sqrt|ln|log|sin|cos|tan|theta|text)|\(|[a-zA-Z]))",
          r"\\frac{\1}{\2}", r"3/4x", r"\frac{3}{4}x"),
    _rule(r"(?<![\d])\.(?=\d)", "0.", ".5", "0.5"),
    # The end ------------------------------------------------------------------------------------------------------
    _rule(r"(?:[\s.,;:]|\\\\)+(?=\}?$)|\\\s*$", "", r"7\text{ hours.}", r"7\text{ hours}"),
    _rule(r"^\s+|\s+(?=\s)|\s+$", "", " a  b ", "a b"),
]  # fmt: skip


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """Apply every rule to ``text``."""
    text = unicodedata.normalize("NFKC", text.translate(TRANSLATION))
    # Join powers of several digits, each from its own character.
    text = re.sub(r"([\^_])\{([-\d])\}(?:\1\{[-\d]\})+", lambda m: m[1] + "{" + re.sub(r"[^-\d]", "", m[0]) + "}", text)
    text = re.sub(r"\s+", " ", text)
    for rule in RULES:
        text = rule.pattern.sub(rule.replacement, text)
    return text


def key(text: str) -> str:
    """Reduce spellings of the same text to one key; spaces count between digits only."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    # \times is \cdot beside a number only: a cross product is not a product of numbers.
    text = re.sub(r"(?<=\d)\s*(?:\\times(?![A-Za-z])|\*)|(?:\\times(?![A-Za-z])|\*)(?=\s*\d)", r"\\cdot", text)
    text = re.sub(r"\s*(\\[A-Za-z]+)\s*", r"\1 ", text)
    # 1, 234 is a list, 1,234 a number.
    text = re.sub(r"(?<=\d),\s+(?=\d{3}(?!\d))", ";", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    return re.sub(r"(?<!\\)\{(\w)\}", r"\1", text)
