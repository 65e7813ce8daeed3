"""A row gives the question without other sets' instructions, and bare answers; or the reason why it cannot be used."""

import json
import time
from decimal import Decimal

import numpy as np
import pytest

from verl_ext.tasks.math.layouts import Unusable, answers_of, question_of
from verl_ext.tasks.math.prepare import SUFFIX

ASKED = {"role": "user", "content": "1+1?"}
LONE = "bad \ud800 text"


def reason(function, *arguments) -> str:
    with pytest.raises(Unusable) as error:
        function(*arguments)
    return error.value.reason


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, truths",
    [
        # GSM8K: a solution, then the answer; also with MetaMath's line after it.
        ({"answer": "He has 3 + 4 = <<3+4=7>>7.\n#### 7"}, ["7"]),
        ({"answer": "It is <<1200*2=2400>>2400.\r\n#### 2,400 \r\n"}, ["2,400"]),
        ({"answer": "Lost.\n####-$5.50"}, ["-$5.50"]),
        ({"response": "So 110.\n#### 110\nThe answer is: 110"}, ["110"]),
        # A heading in Markdown marks nothing.
        ({"solution": "#### Sum\nIt is \\boxed{7}."}, ["7"]),
        ({"solution": "It is \\boxed{7}.\n#### Remark\nThat was easy."}, ["7"]),
        # The last box, with braces in it.
        ({"solution": "First $\\boxed{1}$, then $\\boxed{\\frac{1}{2}}$, as 1/2 = 0.5."}, ["\\frac{1}{2}"]),
        ({"answer": "\\boxed{72}"}, ["72"]),
        # Columns, in any case: bare answers before long texts.
        ({"expected_answer": "3", "solution": "so it is three"}, ["3"]),
        ({"expected_answer": "3", "solution": "so \\boxed{4}"}, ["3"]),
        ({"answer": "We add them to get four.", "final_answer": "4"}, ["4"]),
        ({"answer": "We add them to get four.", "solution": "4"}, ["4"]),
        ({"answer": None, "final_answer": "5"}, ["5"]),
        ({"answer": float("nan"), "solution": "7"}, ["7"]),
        ({"ANSWER": " 5 "}, ["5"]),
        ({"solution": "\\text{east}"}, ["\\text{east}"]),
        # verl's rows, also with JSON text.
        ({"reward_model": {"ground_truth": "2", "style": "rule"}, "answer": "3"}, ["2"]),
        ({"reward_model": '{"ground_truth":"2"}'}, ["2"]),
        ({"reward_model": {"ground_truth": '["2"]'}}, ["2"]),
        ({"reward_model": {"ground_truth": '["\\\\frac{1}{2}", "0.5"]'}}, ["\\frac{1}{2}", "0.5"]),
        ({"reward_model": {"ground_truth": None}, "answer": "7"}, ["7"]),
        ({"reward_model": "rule", "answer": "7"}, ["7"]),
        # Lists, numbers, NumPy.
        ({"answer": ["2", "3", "2"]}, ["2", "3"]),
        ({"answer": [["2"], ["3"]]}, ["2", "3"]),
        ({"answer": '["2", "3"]'}, ["2", "3"]),
        ({"answer": np.array(["9.6\n"], dtype=object)}, ["9.6"]),
        ({"answer": np.int64(5)}, ["5"]),
        ({"answer": 142.0}, ["142"]),
        ({"answer": 10**400}, ["1" + "0" * 400]),
        ({"answer": Decimal("2.50")}, ["2.5"]),
        ({"answer": Decimal("1E+3")}, ["1000"]),
        # An interval is not a list of answers.
        ({"answer": "[0, \\infty)"}, ["[0, \\infty)"]),
    ],
)
def test_the_bare_answer_is_found_by_content(row, truths):
    assert answers_of(row) == (truths, [])


@pytest.mark.parametrize(
    "answer",
    [
        *("\\text{east}", "Evelyn", "June 20", "odd", "2 hours 30 minutes", "x = 3 or x = 5", "all real numbers", "A"),
        *("(-\\infty, 2) \\cup (3, \\infty)", "even and positive", "no solution", "all real numbers except 0"),
        "n is odd",
        *("10:30 a.m.", "e^{it} + e^{is}", "ab+it", "-(ab + ac + bc)", "34\\text{ sq. units}", "SRAC=LRAC", "∞"),
        *("\\text{Softball, Kickball, Picnic}", "7 \\text{ distinct integers}", "The first player wins", "undefined"),
        "$f(x)=ax+b$, where $b$ is an arbitrary integer and $a$ is an arbitrary positive integer with $a > 1$",
        "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}",
    ],
)
def test_answers_in_words_stay(answer):
    assert answers_of({"answer": answer}) == ([answer], [])


@pytest.mark.parametrize(
    "answer",
    [
        "Since he is fifth, four people crossed before him. Therefore 4 people.",
        *("The answer is 5.", "Answer: 5", "Therefore 4", "She has 12 apples left.", "He needs 5", "There are 4 ways"),
        *("The total is four dollars", "Tom has 7 apples", "so it is three", "\\text{Thus the sum is } 5", "答案是5。"),
        *("Adding both sides gives the wanted identity.", "Sum: <<1+2=3>>3 apples", "Monday: 5\nTuesday: 6"),
        "\\boxed{\\text{The answer is 5}}",
        "It follows.\n#### We have 5",
    ],
)
def test_a_text_is_not_an_answer(answer):
    assert reason(answers_of, {"answer": answer}) == "answer is a text, not a bare answer"


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"answer": None, "solution": "long text"}, "solution is a text, without a box or ####"),
        ({"answer": None, "solution": ".."}, "solution has neither letter nor digit"),
        ({"solution": "Hence \\boxed{5"}, "solution marks no answer: box not closed"),
        ({"solution": "Hence\n####"}, "solution marks no answer: nothing after ####"),
        ({"answer": "#### Step 3\nThe answer is 5"}, "answer marks no answer: nothing after ####"),
        *(
            ({"answer": x}, "answer stands for a missing answer")
            for x in ("proof", "notfound", "Not found.", "N/A", "None")
        ),
        # Who marked a proof saw the solution.
        ({"answer": "proof", "solution": "\\boxed{1=1}"}, "answer stands for a missing answer"),
        *(({"answer": x}, "no answer") for x in (None, float("nan"), "", " \n", [], Decimal("NaN"))),
        ({"label": "5"}, "no answer"),
        *(({"answer": x}, "answer is neither text nor a number") for x in (True, np.bool_(False), {"a": 1}, b"5")),
        *(({"answer": x}, "answer is neither text nor a number") for x in (float("inf"), Decimal("-Infinity"), [None])),
        ({"reward_model": {"ground_truth": '{"inputs": ["1"]}'}}, "ground_truth is an object, not an answer"),
        ({"answer": LONE}, "text that is not Unicode (a lone surrogate)"),
        ("not a row", "not an object with a problem and an answer"),
    ],
)
def test_rows_without_an_answer_say_why(row, expected):
    assert reason(answers_of, row) == expected


def test_one_of_several_answers_may_be_left_out():
    truths, left_out = answers_of({"answer": ["2", "the answer is 3", None]})
    assert truths == ["2"]
    reasons = ["answer is a text, not a bare answer", "answer is neither text nor a number"]
    assert [e.reason for e in left_out] == reasons


# Questions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        *({name: "1+1?"} for name in ("problem", "Question", "PROMPT", "input", "query", "instruction")),
        {"problem": None, "question": " ", "prompt": "1+1?"},
        {"prompt": [ASKED]},
        {"prompt": np.array([ASKED], dtype=object)},
        {"prompt": json.dumps([ASKED])},
        {"messages": [ASKED, {"role": "assistant", "content": "2"}]},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
        {"prompt": [{"role": "system", "content": " "}, ASKED]},
        {"problem": "1+1?", "images": None, "image_1": "", "options": []},
    ],
)
def test_the_question_is_found(row):
    messages, problem, _ = question_of(row, SUFFIX)
    assert messages == [{"role": "user", "content": f"1+1? {SUFFIX}"}] and problem == "1+1?"


def test_a_system_message_stays_and_an_instruction_in_it_does_not():
    row = {"prompt": [{"role": "system", "content": "Think."}, ASKED]}
    user = {"role": "user", "content": f"1+1? {SUFFIX}"}
    assert question_of(row, SUFFIX)[0] == [{"role": "system", "content": "Think."}, user]
    row["prompt"][0]["content"] = "You are kind.\nEnclose the final answer in <answer> </answer> tags."
    messages, _, notes = question_of(row, SUFFIX)
    assert messages[0] == {"role": "system", "content": "You are kind."}
    assert [what for what, _ in notes] == [
        'instruction removed: "Enclose the final answer in <answer> </answer> tags."'
    ]
    # An instruction that is not recognised is noted.
    row["prompt"][0]["content"] = "Reply with <answer>5</answer> in the end."
    messages, _, notes = question_of(row, SUFFIX)
    assert messages[0]["content"] == "Reply with <answer>5</answer> in the end."
    assert notes == [("an instruction about the answer's form may be left", messages[0]["content"])]


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
LLAMA = (
    "Solve the following math problem efficiently and clearly.  The last line of your response should be of the "
    "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. "
    "Think step by step before answering.\n\n"
)


@pytest.mark.parametrize(
    "before, after",
    [
        (DAPO, '\n\nRemember to put your answer on its own line after "Answer:".'),
        (DAPO.replace("$Answer (", "\\boxed{$Answer} ("), ""),
        (LLAMA, ""),
        ("Please reason step by step, and put your final answer within \\boxed{}.\n", ""),
        ("Solve the following math problem. Make sure to put the answer (and only answer) inside \\boxed{}.\n\n", ""),
        ("You are a math tutor. Solve the following problem step by step and put the answer in \\boxed{}. ", ""),
        ("", ' Let\'s think step by step and output the final answer after "####".'),
        ("", "\n\nPresent the answer in LaTex format: \\boxed{Your answer}"),
        ("", " Please reason step by step, and put your final answer within \\boxed{}."),
        ("", " Put your final answer within $\\boxed{}$"),
        ("", " (Provide your final answer as \\boxed{...}.)"),
        ("", " Return your final response within \\boxed{}. Let's think step by step."),
        ("", ' Show your work, then give the final answer on the last line as "Answer: <number>".'),
        ("", " let's think step by step and output the final answer within \\boxed{}."),
    ],
)
@pytest.mark.parametrize(
    "problem", ["What is $2+2$?", "Tom has a box.\nHow many boxes has he?", "Compute $x_1$ if $x=3$"]
)
def test_other_instructions_are_removed_and_told(before, problem, after):
    messages, bare, notes = question_of({"problem": before + problem + after}, SUFFIX)
    assert messages[0]["content"] == f"{problem} {SUFFIX}" and bare == problem
    assert notes and all(what.startswith("instruction removed: ") for what, _ in notes)


def test_the_suffix_is_there_once():
    for text in (f"1+1? {SUFFIX}", f"1+1?\n{SUFFIX} {SUFFIX}", f"1+1 {SUFFIX}"):
        messages, problem, notes = question_of({"problem": text}, SUFFIX)
        assert messages[0]["content"] == f"{problem} {SUFFIX}" and problem in ("1+1?", "1+1") and not notes
    # Another suffix takes its place; without one, prompts stay as they are.
    messages, problem, notes = question_of({"problem": f"1+1? {SUFFIX}"}, "In a box, please.")
    assert messages[0]["content"] == "1+1? In a box, please." and len(notes) == 1
    assert question_of({"problem": f"1+1? {SUFFIX}"}, "")[:2] == (
        [{"role": "user", "content": f"1+1? {SUFFIX}"}],
        "1+1?",
    )


@pytest.mark.parametrize(
    "problem",
    [
        *("What is 1/2+1/2? Express your answer as a common fraction.", "Solve. Put your answer in interval notation."),
        *("He put the answer sheets in a box. How many fit?", "A square has side $2$. Work out its area step by step."),
        "Consider primes. Find the least and put your final answer in \\boxed{}.",
        "Fill in: $3 + \\boxed{} = 5$.",
    ],
)
def test_what_belongs_to_the_question_stays(problem):
    messages, _, notes = question_of({"problem": problem}, SUFFIX)
    assert messages[0]["content"] == f"{problem} {SUFFIX}"
    seems = "boxed" in problem or "box" in problem
    assert [what for what, _ in notes] == ["an instruction about the answer's form may be left"] * seems


def test_other_text_that_the_prompt_lacks_is_told():
    row = {"instruction": "Solve it.", "input": "1+1?", "system": "Think."}
    assert question_of(row, "")[2] == [
        ("column instruction is not in the prompt", "Solve it."),
        ("column system is not in the prompt", "Think."),
    ]
    row = {"prompt": [ASKED, {"role": "assistant", "content": "2"}]}
    assert question_of(row, "")[2] == [("the assistant's turn is left out", "")]


IMAGES = "with images: the text alone is another question"


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"problem": 5}, "problem is neither text nor a list of messages"),
        ({"problem": ["1+1?"]}, "problem is neither text nor a list of messages"),
        *(({"problem": x}, "no problem") for x in (None, float("nan"), "", " \n", [])),
        ({"text": "1+1?"}, "no problem"),
        ({"problem": SUFFIX}, "no problem"),
        ({"problem": LONE}, "text that is not Unicode (a lone surrogate)"),
        ({"prompt": [{"role": "system", "content": LONE}, ASKED]}, "text that is not Unicode (a lone surrogate)"),
        ({"prompt": [{"role": "user", "content": None}]}, "no problem"),
        ({"prompt": [ASKED | {"content": [{"type": "text", "text": "1+1?"}]}]}, "content that is not plain text"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, IMAGES),
        ({"prompt": [ASKED, ASKED]}, "prompt is not one turn of the user"),
        ({"messages": [ASKED, {"role": "assistant", "content": "2"}, ASKED]}, "messages is not one turn of the user"),
        ({"messages": [{"role": "assistant", "content": "2"}]}, "messages is not one turn of the user"),
        ({"prompt": [{"role": ["user"], "content": "1+1?"}]}, "prompt is not one turn of the user"),
        ({"problem": "Area?", "images": ["x"]}, IMAGES),
        ({"problem": "Area?", "Image_1": {"bytes": b"x"}}, IMAGES),
        ({"problem": "<image> Area?"}, IMAGES),
        ({"problem": "Area? ![](https://example.com/a.png)"}, IMAGES),
        ({"question": "Which?", "choices": ["one", "two"], "answer": 1}, "its choices are not in the problem's text"),
        ({"question": "Which?", "options": {"text": ["one"]}}, "its options are not in the problem's text"),
        ({"problem": "1+1?" * 30_000}, "longer than 100000 characters"),
        ([1], "not an object with a problem and an answer"),
        (None, "not an object with a problem and an answer"),
    ],
)
def test_rows_without_a_whole_question_say_why(row, expected):
    assert reason(question_of, row, SUFFIX) == expected


@pytest.mark.parametrize("text", [" ", "\\", "answer ", "![", "\\begin{", "Then. ", "\n", "$", "Please ", "\\boxed{"])
def test_a_long_odd_text_takes_no_time(text):
    long = "Q" + text * (90_000 // len(text)) + "?"
    started = time.process_time()
    for function in (lambda: question_of({"problem": long}, SUFFIX), lambda: answers_of({"answer": long})):
        try:
            function()
        except Unusable:
            pass
    assert time.process_time() - started < 5
