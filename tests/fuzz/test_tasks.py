"""Random answers through the graders: right ones are right in any spelling, and any text costs bounded time."""

import contextlib
import itertools
import json
import math
import random as randoms
import re
import string
import tempfile
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
from fuzzing import cases
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_ext.preflight.rows import wrong_rows
from verl_ext.tasks import assets
from verl_ext.tasks.arithmetic import assets as arithmetic_assets
from verl_ext.tasks.arithmetic import progress, summary
from verl_ext.tasks.arithmetic import reward as arithmetic
from verl_ext.tasks.arithmetic.model import build_tokenizer
from verl_ext.tasks.arithmetic.pretrain import collate, encode
from verl_ext.tasks.arithmetic.task import LEVELS, respond
from verl_ext.tasks.arithmetic.task import draw as draw_sum
from verl_ext.tasks.countdown import assets as countdown_assets
from verl_ext.tasks.countdown import reward as countdown
from verl_ext.tasks.countdown import task as countdown_task
from verl_ext.tasks.countdown.expression import Malformed, evaluate
from verl_ext.tasks.countdown.task import SIZES, Limits, draw_many
from verl_ext.tasks.math import reward as mathematics
from verl_ext.tasks.math.grader import BY_WEIGHT, Grader, plainly_equal
from verl_ext.tasks.math.layouts import Unusable, answers_of, question_of, shorten
from verl_ext.tasks.math.normalise import key, normalise
from verl_ext.tasks.math.structure import (
    bracketed,
    is_name,
    plus_minus,
    relation_chain,
    split,
    structure,
    tokens,
    value_of,
    without_braces,
)
from verl_ext.tasks.math.units import units_differ, without_unit
from verl_ext.tasks.math.words import is_words, same_words

PIECES = [
    *"0123456789.,;:+-*/^_=<>|()[]{}%$&'\"~ \n\\", *"xyzabijnAEI", r"\frac", r"\frac{1}{2}", r"\sqrt", r"\sqrt[3]{2}",
    "{", "}", r"\left(", r"\right)", r"\text{", r"\text{ cm}", r"\pm", r"\cup", r"\in", r"\mathbb{R}", r"\infty",
    r"\pi", r"\%", r"\ldots", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\{", r"\}", "^2", "_1", r"^\circ", "e^x",
    r"\leq", r"\neq", r"\sin", r"\log_2", "!", r"\binom{5}{2}", r"\int_0^1", r"\sum_{k=1}^{9}", r"\lim_{x\to0}",
    r"\overline{3}", r"\cdot", "or", " and ", "base", "x=", "f(x)=", r"\boxed{", "</think>", r"\vec{a}", r"\times", "π",
    "½", "²", "−", "∞", "10^", "mod", r"\pmod{5}", r"\lfloor", r"\rfloor", r"\gcd", "9999999999", "1e9", "No",
    r"\emptyset", r"\mid",
]  # fmt: skip
latex = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
texts = st.one_of(latex, st.text(max_size=40))


@pytest.fixture(scope="module")
def grader():
    one = Grader(memory_mb=512)
    yield one
    one.close()


# Mathematics ----------------------------------------------------------------------------------------------------------


@st.composite
def calculations(draw, depth=2):
    """(LaTeX, value) of a calculation with rational numbers, spelled at random; None where it divides by zero."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        n = draw(st.integers(0, 99))
        return str(n), Fraction(n)
    (a, x), (b, y) = (draw(calculations(depth=depth - 1)) for _ in range(2))
    left, right = draw(st.sampled_from([("(", ")"), (r"\left(", r"\right)"), (r"\left( ", r"\,\right)")]))
    kind, space = draw(st.sampled_from("+-*/f^")), draw(st.sampled_from(["", " ", r"\,"]))
    if x is None or y is None or (kind in "/f" and y == 0):
        return "0", None
    if kind == "f":
        return draw(st.sampled_from([r"\frac", r"\dfrac", r"\tfrac"])) + f"{{{a}}}{{{b}}}", x / y
    if kind == "^":
        return f"{left}{a}{right}^{{{2}}}", x * x
    if kind == "*":
        sign = draw(st.sampled_from([r"\cdot ", r"\times ", "*"]))
        return f"{left}{a}{right}{sign}{left}{b}{right}", x * y
    if kind == "/":
        return f"{left}{a}{right}/{left}{b}{right}", x / y
    return f"{left}{a}{right}{space}{kind}{space}{left}{b}{right}", x + y if kind == "+" else x - y


def as_text(value):
    return str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


@cases(150)
@given(calculations(), st.sampled_from([Fraction(1), Fraction(-1), Fraction(1, 7), Fraction(1, 1000)]))
def test_a_calculation_equals_its_value_and_no_other(grader, calculation, other):
    text, value = calculation
    if value is None:
        return
    assert grader.grade(text, [as_text(value)], 20) == (True, "")
    assert grader.grade(as_text(value), [text], 20) == (True, "")
    assert grader.grade(text, [as_text(value + other)], 20) == (False, "wrong")
    if other != -1:
        assert plainly_equal(text, as_text(value + other)) is not True


@cases(250)
@given(latex, st.sampled_from(["42", r"\frac{1}{2}", "x+1", "(1,2)", r"\{1,2\}", "x>2", r"\text{east}", "50\\%"]))
def test_any_latex_is_graded_and_no_fault_of_the_grader(grader, answer, truth):
    started = time.monotonic()
    equal, reason = grader.grade(answer, [truth], 5)
    assert reason in {*BY_WEIGHT, "", "timeout"} - {"grader error"} and equal == (reason == "")
    assert time.monotonic() - started < 5 + 30


@cases(300)
@given(texts)
def test_an_answer_equals_itself(text):
    assert plainly_equal(text, text) is True
    assert key(normalise(text)) == key(normalise(text)) and normalise(text).count("\n") == 0
    assert same_words(text, text) in (True, False) and isinstance(is_words(text), bool)


@cases(300)
@given(texts)
def test_the_structure_of_any_text_loses_nothing_to_errors(text):
    found = structure(text)
    assert found.kind in ("one", "list", "set", "tuple") and all(isinstance(part, str) for part in found.parts)
    assert (len(found.parts) == 1) if found.kind == "one" else True
    parts, seps = split(text, {",", ";"}.__contains__)
    assert len(parts) == len(seps) + 1 and all(part in text for part in parts)
    sides, signs = relation_chain(text)
    assert len(sides) == len(signs) + 1
    inside = bracketed(text)
    assert inside is None or text.startswith(inside[0]) and text.endswith(inside[2]) and inside[1] in text
    assert without_braces(without_braces(text)) == without_braces(text)
    assert all(0 <= depth and text[start:end] for _, start, end, depth in tokens(text))
    assert len(plus_minus([text, "1"])) == len(plus_minus([text])) + 1 <= 3
    assert isinstance(value_of(text), str) and isinstance(is_name(text), bool)
    value, unit = without_unit(text)
    assert value in text and not units_differ(unit, unit)


@cases(300)
@given(texts, texts, st.booleans())
def test_the_box_is_found_in_any_response(before, answer, require_think):
    found, failure = mathematics.boxed_answer(before + answer, require_think)
    assert (failure in mathematics.NO_ANSWER and not found) or (not failure and found)
    opens = Counter(c for c in answer if c in "{}")
    if not opens and "\\" not in answer and answer.strip() and len(answer) < 2000 and "</think>" not in answer:
        # Text before </think> does not matter, nor does text without a box behind it.
        response = f"{before}</think> \\boxed{{{answer}}} so it is."
        assert mathematics.boxed_answer(response, require_think) == (answer.strip(), "")


truths = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.decimals()),
    lambda x: st.lists(x, max_size=3),
)


@cases(200)
@given(truths)
def test_a_ground_truth_is_texts_or_refused(value):
    try:
        found = mathematics.ground_truths(value)
    except ValueError as e:
        assert "ground truth" in str(e)
        return
    assert found and all(isinstance(text, str) and text.strip() == text != "" for text in found)
    assert mathematics.ground_truths(found) == found


names = st.sampled_from(
    ["problem", "question", "prompt", "answer", "solution", "reward_model", "messages", "images", "choices", "x"]
)
contents = st.recursive(
    st.one_of(truths, texts, st.just({"role": "user", "content": "1+1?"})),
    lambda x: st.one_of(
        st.lists(x, max_size=2),
        st.dictionaries(st.sampled_from(["role", "content", "ground_truth", "from", "value", "type"]), x, max_size=3),
    ),
    max_leaves=5,
)


@cases(300)
@given(st.one_of(st.dictionaries(names, contents, max_size=4), contents))
def test_any_record_is_read_or_unusable_with_a_reason(record):
    try:
        messages, problem, notes = question_of(record, "Box it.")
        assert problem.strip() == problem != "" and messages[-1]["content"].endswith("Box it.")
        json.dumps(messages, ensure_ascii=False).encode()
        # What was written is read the same.
        assert question_of({"prompt": messages}, "Box it.")[:2] == (messages, problem)
    except Unusable as e:
        assert e.reason
    try:
        found, left_out = answers_of(record)
        assert found and all(found) and all(e.reason for e in left_out)
    except Unusable as e:
        assert e.reason


@cases(200)
@given(st.text())
def test_a_shortened_text_is_a_line(text):
    line = shorten(text)
    assert len(line) <= 80 and "\n" not in line and line.encode() is not None


# Countdown and arithmetic ---------------------------------------------------------------------------------------------


@cases(200)
@given(st.integers(0, 2**32), st.integers(3, 6), st.booleans(), st.sampled_from(["tags", "bare"]), texts)
def test_a_solution_is_right_and_a_change_is_not(seed, size, chain, style, noise):
    rng = randoms.Random(seed)
    (question,) = draw_many(rng, [size], Limits(largest_number=20, largest_target=99, chain=chain))
    text = question.solution.text
    assert evaluate(text) == (question.target, evaluate(text)[1])
    assert Counter(evaluate(text)[1]) == Counter(question.numbers)
    noise = noise.replace("#", "")
    wrap = (lambda x: f"{noise}<answer>{x}</answer>") if style == "tags" else (lambda x: f"{noise}#{x}")

    def grade(answer, truth=question.truth):
        return countdown.compute_score("", wrap(answer), truth, style=style)

    assert grade(text)["score"] == 1.0 and grade(f" ({text}) ")["failure"] == ""
    assert grade(text, question.truth | {"target": question.target + 1})["failure"] == "wrong"
    assert grade(f"{text}+1")["failure"] == "other numbers"
    assert grade(noise)["failure"] in countdown.FAILURES


@cases(300)
@given(texts, st.booleans(), st.sampled_from(["tags", "bare"]))
def test_any_response_to_countdown_is_graded(text, use_all, style):
    for response in (text, f"<answer>{text}</answer>", f"#{text}"):
        found = countdown.compute_score("", response, {"numbers": [1, 2], "target": 3}, use_all=use_all, style=style)
        assert found["failure"] in countdown.FAILURES and found["score"] == float(found["failure"] == "")
    try:
        value, numbers = evaluate(text)
        assert isinstance(value, Fraction) and all(isinstance(n, int) for n in numbers)
    except Malformed as e:
        assert str(e) in countdown.FAILURES


@cases(200)
@given(st.integers(0, 2**32), st.text(string.digits + "+=# ", max_size=12))
def test_arithmetic_takes_one_number_behind_one_mark(seed, text):
    found = arithmetic.compute_score("", text, "7")
    assert found["score"] == float(text.count("#") == 1 and text.partition("#")[2] == "7")
    assert draw_sum(randoms.Random(seed), 3)


# Their data -----------------------------------------------------------------------------------------------------------


def as_trained_on(rows, accept=None):
    """Rows as verl's data set reads them from the Parquet file, in which a start's check finds nothing wrong."""
    with tempfile.TemporaryDirectory() as folder:
        assets.save_rows(Path(folder), "train", rows)
        frame = pd.read_parquet(Path(folder, "train.parquet"))
    assert list(wrong_rows(frame, ("prompt", "reward_model", "data_source"), accept)) == []
    return frame.to_dict("records")


@cases(30)
@given(
    st.integers(0, 2**32), st.integers(1, 20), st.one_of(st.integers(1, 30), st.just(arithmetic_assets.MOST_HELD_OUT))
)
def test_arithmetics_questions_are_right_and_none_is_held_out_and_trained_on(seed, train_size, test_size):
    train, test = arithmetic_assets.draw_splits(train_size, test_size, seed)
    assert (len(train), len(test)) == (train_size, test_size)
    held_out = {q.text for q in test}
    assert len(held_out) == test_size and not held_out & {q.text for q in train}
    for questions in (train, test):
        levels = Counter(q.level for q in questions)
        assert max(levels.values()) - min(levels[n] for n in LEVELS) <= 1
    questions = [*train, *test[:20]]
    rows = as_trained_on([arithmetic_assets.to_row(q, i, "train") for i, q in enumerate(questions)])
    for question, row in zip(questions, rows, strict=True):
        first, *digits = re.findall(r"[+-]?\d", row["prompt"][0]["content"])
        totals = list(itertools.accumulate(map(int, digits), initial=int(first)))[1:]
        assert min(totals) >= 0 and question.solution == f"{' '.join(map(str, totals))}#{totals[-1]}"
        truth = row["reward_model"]["ground_truth"]
        assert arithmetic.compute_score("", question.solution, truth)["score"] == 1
        assert arithmetic.compute_score("", respond([totals[-1] + 1]), truth)["score"] == 0
        assert row["data_source"] == f"level_{len(totals)}"


@cases(40)
@given(
    st.integers(0, 2**32),
    st.sets(st.sampled_from(SIZES), min_size=1).map(sorted),
    st.builds(Limits, st.integers(1, 12), st.integers(1, 60), st.booleans()),
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from(countdown.STYLES),
    st.booleans(),
)
def test_countdowns_questions_are_solvable_and_all_different(
    seed, sizes, limits, train_size, test_size, style, use_all
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(countdown_task, "MOST_DRAWS", 300)
        try:
            train, test = countdown_task.draw_splits(train_size, test_size, sizes, limits, seed)
        except ValueError as e:
            assert f"countdown.largest_number={limits.largest_number}" in str(e)
            return
    assert (len(train), len(test)) == (train_size, test_size)
    questions = train + test
    assert len({(q.target, *sorted(q.numbers)) for q in questions}) == len(questions)
    for part in (train, test):
        counts = Counter(len(q.numbers) for q in part)
        assert set(counts) <= set(sizes) and max(counts.values()) - min(counts[n] for n in sizes) <= 1
    rows = [countdown_assets.to_row(q, i, "train", style, use_all) for i, q in enumerate(questions)]
    for question, row in zip(questions, as_trained_on(rows, countdown.numbers_and_target), strict=True):
        assert all(1 <= n <= limits.largest_number for n in question.numbers)
        assert 1 <= question.target <= limits.largest_target and question.target not in question.numbers
        prompt = row["prompt"][0]["content"]
        shown = [int(n) for n in re.findall(r"\d+", prompt)][: len(question.numbers) + 1]
        assert shown == [*question.numbers, question.target]
        assert style == "bare" or ("exactly once" in prompt) == use_all
        text = question.solution.text
        response = f"#{text}" if style == "bare" else f"<answer>{text}</answer>"
        truth = row["reward_model"]["ground_truth"]
        assert countdown.compute_score("", response, truth, style=style, use_all=use_all)["score"] == 1


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@cases(60)
@given(
    st.lists(
        st.tuples(st.text("0123456789+-= ", max_size=6), st.text("0123456789 #", max_size=6)), min_size=1, max_size=4
    )
)
def test_the_toy_model_learns_the_next_token_of_responses_alone(tokenizer, pairs):
    rows = [encode(tokenizer, *pair) for pair in pairs]
    ids, labels = collate(rows, tokenizer.pad_token_id)
    for (question, response), (prompt, answer), row, wanted in zip(pairs, rows, ids, labels, strict=True):
        assert question in tokenizer.decode(prompt) and tokenizer.decode(answer) == f"{response}<|im_end|>"
        assert row.tolist() == [*prompt, *answer] + [tokenizer.pad_token_id] * (len(row) - len(prompt) - len(answer))
        at = (wanted != -100).nonzero().flatten()
        assert row[at + 1].tolist() == wanted[at].tolist() == answer


parameters = st.dictionaries(
    st.sampled_from(["style", "sizes", "largest_number", "largest_target", "iterations", "train_size", "test_size"]),
    st.one_of(
        st.integers(-1, 9),
        st.sampled_from([None, True, 1.0, 2.5, "3", "tags", [], [3, 3], [3, "4"], [[3]], [7], {3: 4}, 10**30, 751]),
    ),
    max_size=2,
)


@cases(200)
@given(st.sampled_from([arithmetic_assets, countdown_assets]), parameters)
@example(arithmetic_assets, {"test_size": 751})
@example(countdown_assets, {"sizes": [[3]]})
@example(countdown_assets, {"iterations": -1, "style": "bare", "largest_number": 9, "largest_target": 9})
def test_a_tasks_parameters_are_refused_by_name_or_can_be_drawn(task, changes):
    right = {"style": "tags", "sizes": [3], "largest_number": 9, "largest_target": 20, "iterations": 0}
    right |= {"train_size": 2, "test_size": 2} | changes
    name = "arithmetic" if task is arithmetic_assets else "countdown"
    try:
        task.refuse(OmegaConf.create({name: right}))
    except ValueError as e:
        assert any(f"{name}.{changed}=" in str(e) for changed in changes)
        return
    # What was not tried out is large alone.
    most = {size: min(right[size], 9) for size in ("train_size", "test_size")}
    if task is arithmetic_assets:
        train, test = task.draw_splits(**most, seed=1)
    else:
        limits = Limits(right["largest_number"], right["largest_target"], right["style"] == "bare")
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ValueError):
            patch.setattr(countdown_task, "MOST_DRAWS", 100)
            train, test = countdown_task.draw_splits(**most, sizes=right["sizes"], limits=limits, seed=1)
            assert (len(train), len(test)) == tuple(most.values())


stamp = st.one_of(
    st.binary(max_size=9),
    st.just(b"[" * 10**5),
    st.sampled_from(
        [b"null", b"[]", b"{}", b'{"seed": 1}', b'{"seed": 1, "size": [2]}', b'{"seed": 1, "size": NaN, "x": 1}']
    ),
)


@cases(100)
@given(stamp)
@example(b"[" * 10**5)
def test_any_file_is_a_stamp_of_these_parameters_or_none(content):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, assets.STAMP).write_bytes(content)
        found = assets.read_stamp(Path(folder), {"seed": 3, "size": 4})
        assert found is None or (found.keys() == {"seed", "size"} and json.loads(content) == found)
        # No one's file is removed.
        if found is None:
            with pytest.raises(ValueError, match="toy.folder=.* holds assets.json"):
                assets.build(folder, "toy", {"seed": 3, "size": 4}, lambda partial: None)
            assert Path(folder, assets.STAMP).read_bytes() == content


evaluation = st.dictionaries(
    st.sampled_from(["val-core/level_1/acc/mean@4", "val-core/level_2/acc/mean@4", "val-core/level_x/acc/mean@4",
                     "val-core/mine/acc/mean@4", "val-aux/level_1/acc/mean@4", "actor/entropy", "critic/score/mean",
                     "val-core/level_2/acc/best@4/mean", "timing_s/step", "training/mixed_questions"]),
    st.one_of(st.none(), st.floats(0, 1)),
)  # fmt: skip


@cases(100)
@given(
    st.lists(evaluation, max_size=6), st.lists(st.sampled_from(["global_step_3", "global_step_12", "global_step_x"]))
)
@example(
    [{"val-core/level_x/acc/mean@4": 0.5, "val-core/level_1/acc/mean@4": 0.5, "timing_s/step": None}] * 2
    + [{"timing_s/step": 1.0}],
    ["global_step_x"],
)
def test_a_summary_says_what_any_metrics_hold(rows, folders):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        for name in folders:
            (run / name).mkdir(exist_ok=True)
        (run / "config.yaml").write_text("arithmetic: {test_size: 100}")
        (run / "metrics.jsonl").write_text("".join(json.dumps(r | {"step": i}) + "\n" for i, r in enumerate(rows)))
        text = summary.describe(run)
    levels = [{n: r.get(f"val-core/level_{n}/acc/mean@4") for n in (1, 2)} for r in rows]
    levels = [found for r in levels if (found := {n: p for n, p in r.items() if p is not None})]
    if not levels or not any(r.get("timing_s/step") is not None for r in rows):
        assert "no evaluation followed by a finished step" in text
        return
    for n in (1, 2):
        told = n in levels[0] and n in levels[-1]
        line = f"level {n}    {levels[0].get(n, 0):6.1%} -> {levels[-1].get(n, 0):6.1%}"
        assert (line in text) == told and (f"level {n} " in text) == told
    last = max((f for f in folders if f != "global_step_x"), key=lambda f: int(f[12:]), default="none")
    assert re.search(rf"^checkpoint .*\b{last}$", text, re.MULTILINE)


@cases(100)
@given(st.dictionaries(st.integers(1, 6), st.floats(0, 1), min_size=1), st.integers(1, 50))
def test_the_error_of_a_mean_over_levels(levels, each):
    mean, error = summary.overall(levels, each * len(levels))
    assert mean == pytest.approx(sum(levels.values()) / len(levels))
    # Of independent questions, equally many per level.
    assert error**2 == pytest.approx(sum(p * (1 - p) / each for p in levels.values()) / len(levels) ** 2)


@cases(100)
@given(
    st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1),
    st.sampled_from(["TaskRunner", "Worker_1"]),
    st.integers(0),
)
def test_our_own_lines_are_shown_without_rays_prefix(text, actor, pid):
    for line in (f"verl-disco: {text}", f"({actor} pid={pid}) verl-disco: {text}",
                 f"\x1b[36m({actor} pid={pid}, ip=10.0.0.1)\x1b[0m verl-disco: {text}\n"):  # fmt: skip
        assert progress.summarise(line) == f"verl-disco: {text}"
        assert progress.summarise(line.replace("verl-disco: ", "verl-disco: step ")) == f"step {text}"


# A corpus of hostile answers ------------------------------------------------------------------------------------------

HOSTILE = [
    json.loads(line)
    for line in Path(__file__).with_name("hostile.jsonl").read_text().splitlines()
    if not line.startswith("//")
]
"""Each a name and parts, ``[text, how often]``. What a fuzzed grader stumbled over belongs there."""


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case["what"])
def test_a_hostile_answer_costs_bounded_time_and_memory(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = "".join(text * times for text, times in case["parts"])
    limits = dict(timeout=1.0, memory_mb=512, processes=1)
    started, used = time.monotonic(), time.process_time()
    result = mathematics.compute_score("", rf"</think> \boxed{{{answer}}}", "42", **limits)
    # This process only finds the box and spells it; the child has a second, and two to start.
    assert time.process_time() - used < 2 and time.monotonic() - started < 30
    assert result["score"] == 0.0 and result["failure"] in {*mathematics.FAILURES} - {"", "grader error"}
    assert countdown.compute_score("", f"<answer>{answer}</answer>", {"numbers": [42], "target": 42})["score"] == 0.0
    assert arithmetic.compute_score("", f"#{answer}", "42")["score"] == 0.0
    # The next answer is graded.
    assert (
        mathematics.compute_score("", r"</think> \boxed{\frac{84}{2}}", "42", **limits | {"timeout": 20})["score"] == 1
    )
    assert not list(tmp_path.iterdir()) and math.isfinite(result["score"])
