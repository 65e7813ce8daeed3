"""Read one row of a public data set: the question as messages, and the bare answers.

Rows are read by content, because sets use the same column for different things: ``answer`` is ``72`` in one set, and a
solution that ends in ``#### 72`` in another. An unusable row raises :class:`Unusable` with the reason; changes to a
usable row are notes.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from verl_ext.tasks.math.reward import boxed_answer, ground_truths

QUESTION = ("problem", "question", "prompt", "messages", "conversations", "query", "input", "instruction")
"""Columns, the first with a value counts; in any case."""

ANSWER = (
    *("expected_answer", "reference_answer", "correct_answer", "gold_answer", "final_answer"),
    *("ground_truth", "gold", "answer"),
)
SOLUTION = ("solution", "generated_solution", "response", "output")
"""Columns that are read last: mostly long texts, but bare answers in some sets."""

MORE = ("body", "context", "passage", "instruction", "system")
"""Columns whose text may belong to the question, but is not used."""

PLACEHOLDERS = {
    *("proof", "proofomitted", "notfound", "answernotfound", "noanswer", "noanswerfound", "none", "null", "nan", "n/a"),
    *("unknown", "notavailable", "notprovided", "omitted", "missing", "todo", "tbd", "seesolution", "seeabove"),
}

LONGEST = 100_000
"""Characters of a prompt, at most: ten times what models take."""

Note = tuple[str, str]
"""A remark, in the same words for each row, and the text that it is about."""


class Unusable(ValueError):
    """A row, or one of its answers, cannot be used: the reason, in the same words for each row, and the text."""

    def __init__(self, reason: str, shown: Any = ""):
        super().__init__(reason)
        self.reason = reason
        self.shown = shown if isinstance(shown, str) else repr(shown)


# Question -------------------------------------------------------------------------------------------------------------


def question_of(record: Any, suffix: str) -> tuple[list[dict[str, str]], str, list[Note]]:
    """Return verl's messages (the row's system message, if any; the user's with the suffix), the problem, and notes.

    Other instructions about the answer's form are removed, because contradicting instructions teach neither. With an
    empty suffix the prompt stays as it is.

    Raises:
        Unusable: there is no whole question in plain text.
    """
    columns = columns_of(record)
    column, value = next(present(columns, QUESTION), ("", None))
    if value is None:
        raise Unusable("no problem", f"columns {', '.join(columns)}")
    system, asked, notes = turns_of(column, value)
    if len(asked) + len(system) > LONGEST:
        raise Unusable(f"longer than {LONGEST} characters", asked[:100])
    check_whole(columns, asked)
    problem, removed = without_instructions(asked, suffix)
    rest, also = without_instructions(system, suffix)
    if not problem:
        raise Unusable("no problem", asked)
    if suffix:
        notes += [(f'instruction removed: "{shorten(text)}"', "") for text in removed + also]
        system, asked = rest, f"{problem} {suffix}"
        left = [text for text in (*edges(problem), rest) if HINT.search(text)]
        notes += [("an instruction about the answer's form may be left", text) for text in left[:1]]
    others = [(name, text) for name, text in present(columns, MORE) if isinstance(text, str) and name != column]
    notes += [(f"column {name} is not in the prompt", text) for name, text in others]
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": asked}], problem, notes


def columns_of(record: Any) -> dict[str, Any]:
    """Map the row's column names in lower case to the values."""
    if not isinstance(record, dict):
        raise Unusable("not an object with a problem and an answer", record)
    return {str(name).lower(): value for name, value in record.items()}


def present(columns: dict[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the named columns that have a value, in the order of ``names``."""
    for name in names:
        value = columns.get(name)
        value = value.tolist() if hasattr(value, "tolist") else value
        if not is_blank(value):
            yield name, value


def is_blank(value: Any) -> bool:
    """Tell whether a cell of a table is empty."""
    if isinstance(value, (float, Decimal)):
        return str(value).lower() == "nan"
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (list, tuple, dict)) and not value)


def turns_of(column: str, value: Any) -> tuple[str, str, list[Note]]:
    """Return the system message, the user's message, and notes, from a text or a list of messages."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        parsed = parse(value)
        value = parsed if isinstance(parsed, list) and is_message(parsed[0]) else value
    if isinstance(value, str):
        return "", plain(value), []
    if not isinstance(value, (list, tuple)) or not all(is_message(turn) for turn in value):
        raise Unusable(f"{column} is neither text nor a list of messages", value)
    # "from" and "value" are ShareGPT's names.
    turns = [(str(turn.get("role", turn.get("from"))), turn.get("content", turn.get("value"))) for turn in value]
    turns = [({"human": "user", "gpt": "assistant"}.get(role, role), content) for role, content in turns]
    notes = []
    if turns[-1][0] == "assistant":
        turns, notes = turns[:-1], [("the assistant's turn is left out", "")]
    system = plain(turns[0][1] or "") if turns and turns[0][0] == "system" else ""
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["system", "user"]):
        raise Unusable(f"{column} is not one turn of the user", ", ".join(roles))
    if is_blank(turns[-1][1]):
        raise Unusable("no problem", value)
    return system, plain(turns[-1][1]), notes


def is_message(turn: Any) -> bool:
    """Tell whether a value is a message of a conversation."""
    return isinstance(turn, dict) and ("role" in turn or "from" in turn)


def parse(text: str) -> Any:
    """Parse JSON; None if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def plain(content: Any) -> str:
    """Return a message's text, or raise Unusable."""
    if not isinstance(content, str):
        parts = content if isinstance(content, (list, tuple)) else []
        if any(isinstance(part, dict) and part.get("type", "text") != "text" for part in parts):
            raise Unusable("with images: the text alone is another question", content)
        raise Unusable("content that is not plain text", content)
    try:
        content.encode()
    except UnicodeEncodeError:
        raise Unusable("text that is not Unicode (a lone surrogate)", content) from None
    return content.strip()


IMAGE_COLUMN = re.compile(r"(decoded_)?(image|video|audio|figure|picture)s?(_\d+|_path|_url)?")
IMAGE = re.compile(r"<\|?(image|video|audio)[\w ]*\|?>|!\[[^\]]{0,500}\]\(", re.IGNORECASE)


def check_whole(columns: dict[str, Any], asked: str) -> None:
    """Raise Unusable if images or choices of the question are not in its text."""
    names = tuple(name for name in columns if IMAGE_COLUMN.fullmatch(name))
    for name, value in present(columns, names):
        if not isinstance(value, bool):
            raise Unusable("with images: the text alone is another question", f"column {name}")
    if IMAGE.search(asked):
        raise Unusable("with images: the text alone is another question", asked)
    for name, value in present(columns, ("choices", "options")):
        value = value.get("text", list(value.values())) if isinstance(value, dict) else value
        choices = value if isinstance(value, (list, tuple)) else [value]
        if not all(str(choice).strip() in asked for choice in choices):
            raise Unusable(f"its {name} are not in the problem's text", choices)


# Instructions ---------------------------------------------------------------------------------------------------------

OPENERS = (
    r"(?:[Ll]et['’]s think|Let us think|Please|Put (?:your|the)|Output (?:your|the)|Remember to|Present the|Enclose|"
    r"(?:Return|Write|Give|Box|Provide) (?:your|the)|Make sure|Your (?:final )?answer)"
)
BREAK = re.compile(rf"\n\s*|(?<=[.!?])[\"'”’)\]}}$*]*\s+(?!\s|I hope)|(?<=\S)\s+(?={OPENERS})|(?<=[)\]$])\s+(?=[A-Z(])")
"""The gap between two sentences. A question may lack a full stop; "I hope it is correct" belongs to a quotation."""

EMPTY_BOX = re.compile(r"\$?\\{1,4}f?boxed\s*\{[\s.…\w<>$\[\]\\]*\}\$?")
FORM = re.compile(
    r"EMPTY_BOX|####|\banswer:|</?answer>|\bbox(?:ed)? (?:your|the final) |"
    r"\b(?:your|final) answer\b.{0,99}\bbox(?:ed)?\b",
    re.I,
)
ABOUT = re.compile(r"\b(?:answer|solution|result|response|output)s?\b", re.I)
VERB = re.compile(
    r"\b(?:put|output|give|write|present|enclose|place|provide|return|box|express|state|report|end|wrap|format|"
    r"should|must|remember|make sure|ensure|show|conclude|include|answer with)\b",
    re.I,
)
MATHS = re.compile(r"[\d=^\\$+?]")
TASK = re.compile(
    r"\b(?:find|compute|determine|calculate|evaluate|prove|simplify|how|what|who|"
    r"solve (?!(?:the|this) (?:\w+ )*?problem))",
    re.I,
)
STEPS = re.compile(
    r"(?:please |let['’]?s |let us |you should )?"
    r"(?:(?:solve|answer) (?:the|this) (?:following )?(?:math\w* )?(?:problem|question|task)|think|reason)\b"
    r"[^\d=$\\]*\bstep[- ]by[- ]step\b[^\d=$\\]*",
    re.I,
)
LEAD_IN = re.compile(
    r"(?:please|your task|you (?:are|will)|solve|answer|read|below|here is)\b[^\d=$\\]*"
    r"\b(?:problem|question|task|assistant|tutor|expert|mathematic\w*)\b[^\d=$\\]*",
    re.I,
)
HINT = re.compile(r"\\boxed|####|final answer|</?answer>|\banswer:|\banswer\b.{0,99}\bbox", re.I)


def without_instructions(text: str, suffix: str) -> tuple[str, list[str]]:
    """Remove instructions about the answer's form at either end of a prompt; return the rest and the instructions.

    The suffix is removed too, but not returned: it is added again.
    """
    removed = []
    while True:
        text = text.strip()
        if suffix and text.endswith(suffix):
            text = text.removesuffix(suffix)
            continue
        starts = [0, *(match.end() for match in BREAK.finditer(text))]
        sentences = [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
        if is_instruction(sentences[-1]):
            removed.append(sentences[-1])
            text = text[: starts[-1]]
            continue
        for n in range(min(4, len(starts) - 1), 0, -1):
            before, last = sentences[: n - 1], sentences[n - 1]
            if is_instruction(last) and all(is_instruction(s) or LEAD_IN.fullmatch(s) for s in before):
                removed.append(text[: starts[n]].strip())
                text = text[starts[n] :]
                break
        else:
            return text, removed


def is_instruction(sentence: str) -> bool:
    """Tell whether a sentence only says how to reason or in what form to answer, without a task or mathematics."""
    if TASK.search(sentence):
        return False
    if STEPS.fullmatch(sentence):
        return True
    sentence = EMPTY_BOX.sub("EMPTY_BOX", sentence)
    if not (FORM.search(sentence) and ABOUT.search(sentence) and VERB.search(sentence)):
        return False
    return not MATHS.search(re.sub(r"\$Answer\b|#### ?\$?\w*", "", sentence, flags=re.I))


def edges(text: str) -> tuple[str, str]:
    """Return the first and the last sentence."""
    sentences = [s for s in BREAK.split(text) if s] or [""]
    return sentences[0], sentences[-1]


# Answers --------------------------------------------------------------------------------------------------------------


def answers_of(record: Any) -> tuple[list[str], list[Unusable]]:
    """Return the bare answers of the first column that has one, and those in it that cannot be used.

    Raises:
        Unusable: there is no answer; the reason is that of the first column with a value.
    """
    columns = columns_of(record)
    rewards = columns.get("reward_model")
    rewards = parse(rewards) if isinstance(rewards, str) else rewards
    found = [*present(columns_of(rewards), ANSWER)] if isinstance(rewards, dict) else []
    found += present(columns, ANSWER + SOLUTION)
    reasons: list[Unusable] = []
    for column, value in found:
        truths, unusable = [], []
        for item in value if isinstance(value, (list, tuple)) else [value]:
            try:
                truths += [bare(text, column) for text in texts_of(item, column)]
            except Unusable as e:
                unusable.append(e)
        if truths:
            return list(dict.fromkeys(truths)), unusable
        reasons += unusable
        if reasons[0].reason.endswith(PLACEHOLDER):
            # The authors found no answer in the solution either.
            break
    raise reasons[0] if reasons else Unusable("no answer", f"columns {', '.join(columns)}")


def texts_of(value: Any, column: str) -> list[str]:
    """Convert a value to texts: several for a list, or for a list as JSON."""
    if isinstance(value, Decimal) and value.is_finite():
        value = f"{value:f}".rstrip("0").rstrip(".") if "." in f"{value:f}" else f"{value:f}"
    try:
        if isinstance(value, (float, Decimal)) and math.isinf(value):
            raise ValueError
        return ground_truths(value)
    except ValueError:
        raise Unusable(f"{column} is neither text nor a number", value) from None


PLACEHOLDER = "stands for a missing answer"


def bare(text: str, column: str) -> str:
    """Find the answer in a text: after ``####``, in the last box, or all of it.

    Raises:
        Unusable: the answer is prose or a placeholder, or a solution without a marked answer.
    """
    text = plain(text)
    _, marked, tail = text.rpartition("####")
    answer, failure = boxed_answer(tail, require_think=False)
    if failure == "no box" and marked:
        line, _, below = tail.strip().partition("\n")
        # In Markdown, #### starts a heading, with text below it.
        if line and not (below.strip() and prose(line)):
            return checked(line.strip(), column)
        answer, failure = boxed_answer(text, require_think=False)
    if not failure:
        return checked(answer, column)
    if failure != "no box":
        raise Unusable(f"{column} marks no answer: {failure}", text)
    if marked:
        raise Unusable(f"{column} marks no answer: nothing after ####", text)
    words = prose(text)
    wordy = words and not text.startswith(("\\", "$\\")) and (len(words) > 3 or not re.search(r"\d", text))
    if wordy and column in SOLUTION:
        raise Unusable(f"{column} is a text, without a box or ####", text)
    return checked(text, column)


def checked(answer: str, column: str) -> str:
    """Return the answer, or raise Unusable if it is not one."""
    if not any(c.isalnum() or (not c.isascii() and unicodedata.category(c) == "Sm") for c in answer):
        raise Unusable(f"{column} has neither letter nor digit", answer)
    if re.sub(r"\\text\w*|[^\w/]|_", "", answer).casefold() in PLACEHOLDERS:
        raise Unusable(f"{column} {PLACEHOLDER}", answer)
    if isinstance(parse(answer), dict):
        raise Unusable(f"{column} is an object, not an answer", answer)
    if is_sentence(answer):
        raise Unusable(f"{column} is a text, not a bare answer", answer)
    return answer


MARKS = {*"therefore thus hence because since answer".split()}
"""Words that are never in a bare answer."""
SPEECH = {*"so he she we they you there his her their our your".split()}
"""Words that a bare answer never has beside another word."""
VERBS = {*"is are was were be has have had equals gives makes gets needs costs takes becomes".split()}
"""Words that follow the subject of a sentence."""


def prose(text: str) -> list[str]:
    """List the words of a text in lower case, without LaTeX commands and adjacent variables in a formula."""
    text = re.sub(r"\\(?:text\w*|mbox|mathrm)\s*\{", " ", text)
    text = re.sub(r"\\(?:begin|end)\s*\{[^}]{0,50}\}|\\[a-zA-Z]+", " ", text)
    words = re.findall(r"[\u4e00-\u9fff]{2}|(?<![\w{^_])[^\W\d_\u4e00-\u9fff]{2,}(?:['’][^\W\d_]+)?", text)
    return [word.casefold() for word in words]


def is_sentence(text: str) -> bool:
    """Tell whether a text explains, or is a sentence, unlike ``even and positive`` or ``$ax$, where $a$ is odd``."""
    words = prose(text)
    if MARKS & set(words) or (len(words) > 1 and SPEECH & set(words)):
        return True
    # A verb after these belongs to a condition.
    main, *_ = re.split(r"\b(?:that|where|which|when|if|unless)\b", text)
    tells = re.match(r"\W*[^\W\d_]{2,}", text) and VERBS & set(prose(main))
    if tells and len(words) > (1 if re.search(r"\d", text) else 3):
        return True
    # GSM8K's solutions note their sums in << >>.
    if "。" in text or "<<" in text or ("\n" in text and words) or len(words) > 15:
        return True
    return len(words) > 4 and re.search(r"[.!?][\"'”’)}$]*($|\s+[A-Z])", text) is not None


def shorten(text: str) -> str:
    """Shorten a text to one printable line of at most 80 characters."""
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:77]}..."
