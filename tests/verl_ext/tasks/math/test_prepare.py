"""Sets in the formats of public data sets become verl's parquet, and changes to rows are reported."""

import gzip
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

from verl_ext.tasks.math import prepare as preparation
from verl_ext.tasks.math.prepare import PUBLISHED, SUFFIX
from verl_ext.tasks.math.reward import compute_score


@pytest.fixture
def prepare(tmp_path, capsys):
    """``prepare(*arguments)``: exit status, standard output, standard error."""

    def run(*arguments):
        status = preparation.main(["--out", str(tmp_path / "out"), *map(str, arguments)])
        return status, *capsys.readouterr()

    run.out = tmp_path / "out"
    return run


def rows_of(path: Path) -> list[dict]:
    return pd.read_parquet(path).to_dict("records")


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_every_format_and_type_of_answer(prepare, tmp_path, ending):
    rows = [
        {"problem": "One?", "answer": "1", "solution": "A long text with \\boxed{1}."},
        {"problem": "Two? " + SUFFIX, "answer": "2"},
        {"problem": "Half?\u2028", "answer": "0.5"},
    ]
    path = tmp_path / f"mine{ending}"
    if ending == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
        path.write_text(json.dumps(rows) if ending == ".json" else lines)
    status, out, _ = prepare("--train", path, "--benchmarks")
    assert status == 0 and "3 read       3 written" in out
    written = rows_of(prepare.out / "train.parquet")
    assert [row["prompt"][0]["content"] for row in written] == [f"{q}? {SUFFIX}" for q in ("One", "Two", "Half")]
    assert [list(row["reward_model"]["ground_truth"]) for row in written] == [["1"], ["2"], ["0.5"]]
    assert all(row["data_source"] == "mine" and row["ability"] == "math" for row in written)
    assert written[1]["extra_info"] == {"index": 1, "split": "train"}


def test_verls_own_rows_and_numbers_and_lists(prepare, tmp_path):
    truths = [70, 142.0, "204", ["0.01", "0.02"], np.array(["9.6\n"], dtype=object)]
    rows = [
        {
            "data_source": "",
            "prompt": [{"role": "user", "content": f"Question {i}? {SUFFIX}"}],
            "reward_model": {"style": "rule", "ground_truth": [str(x) for x in np.atleast_1d(truth)]},
        }
        for i, truth in enumerate(truths)
    ]
    path = tmp_path / "aime25.parquet"
    pd.DataFrame(rows).to_parquet(path)
    assert prepare("--train", "--benchmarks", path)[0] == 0
    written = rows_of(prepare.out / "aime25.parquet")
    expected = [["70"], ["142.0"], ["204"], ["0.01", "0.02"], ["9.6"]]
    assert [list(row["reward_model"]["ground_truth"]) for row in written] == expected
    # As numbers, in JSON.
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps([{"question": str(i), "answer": x} for i, x in enumerate([70, 142.0, 0.5, [1, "2"]])]))
    assert prepare("--train", path, "--benchmarks")[0] == 0
    written = rows_of(prepare.out / "train.parquet")
    assert [list(row["reward_model"]["ground_truth"]) for row in written] == [["70"], ["142"], ["0.5"], ["1", "2"]]
    for row in written:
        truths = row["reward_model"]["ground_truth"]
        assert compute_score("numbers", f"</think> \\boxed{{{truths[-1]}}}", truths)["score"] == 1.0


ODD = [
    '{"problem": 5, "answer": "1"}',
    '{"prompt": ["1+1?"], "answer": "2"}',
    '{"prompt": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}], "answer": "2"}',
    '{"prompt": [{"role": "user", "content": null}], "answer": "2"}',
    '{"problem": NaN, "answer": "1"}',
    '{"problem": "bad \\ud800 text", "answer": "1"}',
    '{"problem": "Q?", "answer": Infinity}',
    '{"problem": "Q?", "answer": 1%s}' % ("0" * 5000),
    '{"problem": 1%s, "answer": 5}' % ("0" * 5000),
    '{"problem": "Q?", "answer": "1} {2"}',
    '{"problem": "Q?", "answer": {"a": [1]}}',
    '{"problem": "<image> Q?", "answer": "1"}',
    '["Q?", "1"]',
    "null",
    "{}",
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_an_odd_row_is_rejected_with_its_place_and_the_others_stay(prepare, tmp_path, odd):
    good = '{"problem": "Fine?", "answer": "1"}'
    (tmp_path / "mine.jsonl").write_text(f"{good}\n\n{odd}\n{odd}\n")
    status, out, _ = prepare("--train", tmp_path / "mine.jsonl", "--benchmarks")
    assert status == 0 and "3 read       1 written" in out
    assert re.search(r" 2 rejected: [^\n]+ \(first: mine\.jsonl, line 3[:)]", out)
    assert "lines count from 1" in out and len(rows_of(prepare.out / "train.parquet")) == 1
    # In a list it has a row number; a set of this row only is unusable.
    (tmp_path / "list.json").write_text(f"[{good}, {odd}]")
    out = prepare("--train", tmp_path / "list.json", "--benchmarks")[1]
    assert re.search(r" 1 rejected: [^\n]+ \(first: list\.json, row 1[:)]", out) and "rows from 0" in out
    (tmp_path / "odd.json").write_text(f"[{odd}]")
    assert prepare("--train", tmp_path / "odd.json", "--benchmarks")[0] == 1


def test_reasons_are_counted_and_shown(prepare, tmp_path):
    rows = [
        {"problem": "No answer?", "answer": None, "note": "long"},
        {"problem": "Empty?", "answer": " "},
        {"problem": "  ", "answer": "1"},
        {"problem": "Crossed?", "answer": "Since he is fifth, four people crossed before him. Therefore 4 people."},
        {"problem": "One?\nPut your final answer within \\boxed{}.", "answer": ["1", "the answer is one", "}1{"]},
        {"problem": "Two? Put your final answer within \\boxed{}.", "answer": "2"},
    ]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rows))
    status, out, _ = prepare("--train", path, "--benchmarks")
    assert status == 0 and f"6 read       2 written to train.parquet, from {path}" in out
    assert "2 rejected: no answer (first: mine.json, row 0: columns problem, answer, note)" in out
    assert "1 rejected: no problem (first: mine.json, row 2: columns problem, answer)" in out
    assert "1 rejected: answer is a text, not a bare answer (first: mine.json, row 3: Since he is fifth, four" in out
    assert '2 noted: instruction removed: "Put your final answer within \\boxed{}." (first: mine.json, row 4)' in out
    without = "1 noted: without one of its answers: "
    assert f"{without}answer is a text, not a bare answer (first: mine.json, row 4: the" in out
    assert f"{without}not graded right in its own box: empty box (first: mine.json, row 4: }}1{{)" in out
    written = rows_of(prepare.out / "train.parquet")
    assert [list(row["reward_model"]["ground_truth"]) for row in written] == [["1"], ["2"]]
    assert [row["prompt"][0]["content"] for row in written] == [f"One? {SUFFIX}", f"Two? {SUFFIX}"]


def test_each_answer_is_graded_against_itself_and_once(monkeypatch):
    graded = []

    def grade(source, text, truths, require_think):
        assert source == "" and not require_think
        if truths == [preparation.ANOTHER]:
            return {"pred": "", "failure": "unreadable" if "odd" in text else "wrong"}
        graded.append(text)
        assert text == f"\\boxed{{{truths[0]}}}"
        return {"pred": truths[0].partition("}")[0], "failure": "timeout" if truths[0] == "hard" else ""}

    monkeypatch.setattr(preparation, "compute_score", grade)
    failures, as_text = preparation.self_graded(["1", "hard", "1", "2} {3", "hard", "odd"])
    assert failures == {"1": "", "hard": "timeout", "2} {3": "braces do not match", "odd": ""}
    assert sorted(graded) == ["\\boxed{1}", "\\boxed{2} {3}", "\\boxed{hard}", "\\boxed{odd}"]
    assert as_text == {"odd"}


def test_answers_that_cannot_be_read_are_told(prepare, tmp_path):
    rows = [{"problem": f"{answer}?", "answer": answer} for answer in ("1", "$t(0,4]$", r"\frac{1}{2}", r"\text{east}")]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    status, out, _ = prepare("--train", tmp_path / "mine.json", "--benchmarks")
    assert status == 0 and "4 written" in out
    assert "1 noted: an answer that is right in its own spelling alone (first: mine.json, row 1: $t(0,4]$)" in out


def test_system_messages_and_verls_own_rows_are_one_schema(prepare, tmp_path):
    with_system = {
        "prompt": [{"role": "system", "content": "think"}, {"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
    }
    (tmp_path / "mine.json").write_text(json.dumps([with_system, {"problem": "1+2?", "answer": "3"}]))
    assert prepare("--train", tmp_path / "mine.json", "--benchmarks")[0] == 0
    rows = datasets.Dataset.from_parquet(str(prepare.out / "train.parquet")).to_list()
    assert [[m["role"] for m in row["prompt"]] for row in rows] == [["system", "user"], ["user"]]
    assert rows[0]["prompt"][1]["content"] == f"1+1? {SUFFIX}"


# Names and places -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sets(tmp_path):
    """Folders A and B with sets of 3 and 5 rows under the same names."""
    for folder, count in (("A", 3), ("B", 5)):
        (tmp_path / folder).mkdir()
        for name in ("train", "test", "aime24", "TEST"):
            rows = [{"problem": f"{folder} {name} {i}?", "answer": str(i)} for i in range(count)]
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--train", "--benchmarks", "A/test.json", "B/test.json"], ["A/test.json", "B/test.json", "rename one"]),
        (["--train", "--benchmarks", "A/test.json", "B/TEST.json"], ["A/test.json", "B/TEST.json"]),
        (["--train", "--benchmarks", "A/test.json", "A/test.json"], ["A/test.json", "rename one"]),
        (["--train", "A/train.json", "--benchmarks", "B/train.json"], ["B/train.json", "train.parquet", "rename it"]),
        (["--train", "--benchmarks", "aime24", "A/aime24.json", "--local", "B"], ["A/aime24.json", "B/aime24.json"]),
        (["--train", "A/train.json", "A/../A/train.json", "--benchmarks"], ["2 times"]),
        (["--train", "--benchmarks"], ["nothing to prepare"]),
    ],
)
def test_sets_that_would_overwrite_each_other_are_refused(prepare, sets, monkeypatch, arguments, told):
    monkeypatch.chdir(sets)
    status, out, error = prepare(*arguments)
    assert status == 1 and not out and error.count("\n") == 1 and all(text in error for text in told), error
    assert not prepare.out.exists()


def test_no_input_is_overwritten(sets, capsys):
    before = {p: p.read_bytes() for p in sets.glob("*/*")}
    pd.DataFrame({"problem": ["1+1?"], "answer": ["2"]}).to_parquet(sets / "A" / "train.parquet")
    pd.DataFrame({"problem": ["1+1?"], "answer": ["2"]}).to_parquet(sets / "A" / "test.parquet")
    for arguments in (["--benchmarks", "--train"], ["--train", "--benchmarks"]):
        name = "train" if arguments[-1] == "--train" else "test"
        path = sets / "A" / f"{name}.parquet"
        assert preparation.main(["--out", str(sets / "A"), *arguments, str(path)]) == 1
        assert f"{path} would be overwritten" in capsys.readouterr().err
        assert list(pd.read_parquet(path)) == ["problem", "answer"]
    assert before.items() <= {p: p.read_bytes() for p in sets.glob("*/*")}.items()


def test_training_files_of_one_name_are_counted_each(prepare, sets):
    paths = [sets / folder / "train.json" for folder in "AB"]
    status, out, _ = prepare("--train", *paths, "--benchmarks")
    assert status == 0
    for path, count in zip(paths, (3, 5), strict=True):
        assert f"{path}       {count} read       {count} written" in out
    sources = [row["data_source"] for row in rows_of(prepare.out / "train.parquet")]
    assert sources == [str(paths[0])] * 3 + [str(paths[1])] * 5


# Nothing kept ---------------------------------------------------------------------------------------------------------


def test_nothing_kept_is_an_error_and_an_older_file_does_not_pass_for_the_result(prepare, sets):
    good, bench = sets / "A" / "train.json", sets / "A" / "test.json"
    bad = sets / "bad.json"
    bad.write_text('[{"problem": "Prove it.", "answer": "proof"}]')
    assert prepare("--train", good, "--benchmarks", bench)[0] == 0
    older = {p.name: p.read_bytes() for p in prepare.out.iterdir()}
    # Benchmarks would be fine, but a mixture of old and new is not.
    status, out, error = prepare("--train", good, bad, "--benchmarks", sets / "B" / "test.json")
    assert status == 1 and "1 rejected: answer stands for a missing answer (first: bad.json, row 0: proof)" in out
    assert " written" not in out
    assert error == (
        f"error: no usable row in {bad}; see above. Nothing was written; the older {prepare.out / 'train.parquet'} "
        "is now train.parquet.old\n"
    )
    kept = {p.name: p.read_bytes() for p in prepare.out.iterdir()}
    assert kept == {"train.parquet.old": older["train.parquet"], "test.parquet": older["test.parquet"]}
    # One of that name stays, too; and a benchmark is as a training set is.
    assert prepare("--train", good, "--benchmarks")[0] == 0
    assert prepare("--train", bad, "--benchmarks")[0] == 1
    assert prepare("--train", good, "--benchmarks", bad)[0] == 1
    assert sorted(p.name for p in prepare.out.iterdir()) == ["test.parquet", "train.parquet.old", "train.parquet.old2"]


def test_nothing_left_by_the_flags(prepare, sets):
    path = sets / "A" / "test.json"
    assert prepare("--train", path, "--benchmarks", path, "--drop-overlap")[2].startswith(
        "error: no usable row in the training sets; see above"
    )
    # While other sets give rows, it is what was asked for.
    copy = sets / "copy.json"
    copy.write_bytes(path.read_bytes())
    status, out, _ = prepare("--train", path, copy, "--benchmarks", "--drop-duplicates")
    assert status == 0 and "copy                   3 read       0 written" in out


def test_a_failure_while_writing_leaves_the_older_files(prepare, sets, monkeypatch):
    assert prepare("--train", sets / "A" / "train.json", "--benchmarks", sets / "A" / "test.json")[0] == 0
    older = {p.name: p.read_bytes() for p in prepare.out.iterdir()}
    write = pd.DataFrame.to_parquet

    def fail(frame, path, **kwargs):
        if path.name == "train.parquet":
            raise OSError("No space left on device")
        write(frame, path, **kwargs)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    status, _, error = prepare("--train", sets / "B" / "train.json", "--benchmarks", sets / "B" / "test.json")
    assert status == 1 and error == f"error: cannot write to {prepare.out}: No space left on device\n"
    assert {p.name: p.read_bytes() for p in prepare.out.iterdir()} == older


def test_files_of_another_call_stay_and_are_told(prepare, sets):
    assert prepare("--train", sets / "A" / "train.json", "--benchmarks")[0] == 0
    status, out, _ = prepare("--train", "--benchmarks", sets / "A" / "test.json")
    assert status == 0
    assert out.endswith(f"written to {prepare.out}: test.parquet\nalready there: train.parquet\n")
    assert len(rows_of(prepare.out / "train.parquet")) == 3


@pytest.mark.parametrize(
    "flags, kept",
    [
        ([], ["A", "a ", "$a$", "B", "C"]),
        (["--drop-duplicates"], ["A", "B", "C"]),
        (["--drop-overlap"], ["A", "a ", "$a$", "C"]),
        (["--drop-duplicates", "--drop-overlap"], ["A", "C"]),
    ],
)
def test_duplicates_and_overlap_are_told_and_can_be_left_out(prepare, tmp_path, flags, kept):
    train, more, test = (tmp_path / f"{name}.json" for name in ("train", "more", "bench"))
    train.write_text(json.dumps([{"problem": p, "answer": a} for p, a in (("A", "1"), ("a ", "1"), ("$a$", "2"))]))
    more.write_text(json.dumps([{"problem": p, "answer": "3"} for p in ("B", "C")]))
    test.write_text(json.dumps([{"problem": "b", "answer": "3"}, {"problem": "b", "answer": "3"}]))
    status, out, _ = prepare("--train", train, more, "--benchmarks", test, *flags)
    assert status == 0
    assert out.count("1 repeat an earlier problem with the same answer") == 2
    assert "1 repeat an earlier problem with another answer" in out
    assert "1 problems of bench are in it" in out
    written = rows_of(prepare.out / "train.parquet")
    assert [row["prompt"][0]["content"].removesuffix(SUFFIX).strip() for row in written] == [k.strip() for k in kept]
    # A benchmark keeps all its rows.
    assert len(rows_of(prepare.out / "bench.parquet")) == 2


def test_without_the_hub_the_error_names_the_way_out(prepare, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    status, _, error = prepare("--benchmarks", "math500", "--train")
    assert status == 1
    assert error == (
        "error: cannot get math500 (HuggingFaceH4/MATH-500) from the Hugging Face hub: ConnectionError: Couldn't reach "
        "it. Without a connection, download it elsewhere and give --local DIR with math500.parquet, .jsonl or .json in "
        "it\n"
    )


def test_the_hub_is_asked_for_what_the_tables_say(prepare, monkeypatch):
    asked = []

    def load(hub, config, split):
        asked.append((hub, config, split))
        return datasets.Dataset.from_list([{"problem": f"From {hub}?", "answer": "1"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert prepare()[0] == 0
    assert ("agentica-org/DeepScaleR-Preview-Dataset", None, "train") in asked and len(asked) == 7
    assert sorted(p.stem for p in prepare.out.glob("*.parquet")) == sorted([*PUBLISHED, "train"])


ROWS = [{"problem": f"Q{i}?", "answer": str(i)} for i in range(3)]
LINES = "\n".join(map(json.dumps, ROWS))


FILES = {
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "lines.json": LINES.encode(),
    "list.jsonl": json.dumps(ROWS, indent=1).encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "below.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "T.JSONL": LINES.encode(),
    "T.Json": json.dumps(ROWS).encode(),
    "z.jsonl.gz": gzip.compress(LINES.encode()),
    "Z.JSON.GZ": gzip.compress(json.dumps(ROWS).encode()),
    "p.parquet.gz": gzip.compress(pd.DataFrame(ROWS).to_parquet()),
    "P.PARQUET": pd.DataFrame(ROWS).to_parquet(),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_by_their_content(prepare, tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    status, out, _ = prepare("--train", tmp_path / name, "--benchmarks")
    assert status == 0 and "3 read       3 written" in out
    rows = rows_of(prepare.out / "train.parquet")
    assert [list(row["reward_model"]["ground_truth"]) for row in rows] == [["0"], ["1"], ["2"]]
    assert {row["data_source"] for row in rows} == {name.split(".")[0]}


def test_one_line_is_a_row(prepare, tmp_path):
    (tmp_path / "one.json").write_text('{"problem": "a", "answer": "1"}\n')
    assert prepare("--train", tmp_path / "one.json", "--benchmarks")[0] == 0


def test_whole_numbers_in_a_parquet_column_with_gaps_stay_exact(prepare, tmp_path):
    table = pyarrow.table({"problem": ["A?", "B?"], "answer": [2**53 + 1, None]})
    pyarrow.parquet.write_table(table, tmp_path / "mine.parquet")
    assert prepare("--train", tmp_path / "mine.parquet", "--benchmarks")[0] == 0
    (row,) = rows_of(prepare.out / "train.parquet")
    assert list(row["reward_model"]["ground_truth"]) == ["9007199254740993"]


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--train", "deepscalar"], "deepscalar is neither a set (deepscaler, dapo_math, gsm8k) nor a file ending in"),
        (["--train", "rows.csv"], "rows.csv is neither a set"),
        (["--train", "none.json"], "there is no file none.json"),
        (["--train", "deepscaler", "--local", "."], ". has no copy of deepscaler: expected deepscaler, ending in"),
        (["--train", "broken.jsonl"], "cannot read broken.jsonl: line 2: "),
        (["--train", "broken.json"], "cannot read broken.json: "),
        (["--train", "empty.jsonl"], "cannot read empty.jsonl: it is empty"),
        (["--train", "splits.json"], "cannot read splits.json: it has 2 lists of rows (train, test); make it one list"),
        (["--train", "number.json"], "cannot read number.json: it must be a list of objects"),
        (["--train", "deep.json"], "cannot read deep.json: "),
        (["--train", "latin.json"], "cannot read latin.json: 'utf-8' codec can't decode"),
        (["--train", "not.parquet"], "cannot read not.parquet: "),
        (["--train", "cut.jsonl.gz"], "cannot read cut.jsonl.gz: "),
    ],
)
def test_what_cannot_be_read_is_one_clear_sentence(prepare, tmp_path, monkeypatch, arguments, error):
    monkeypatch.chdir(tmp_path)
    files = {
        "broken.jsonl": b'{"problem": "a", "answer": "1"}\n{"problem": \n',
        "broken.json": b'[{"problem": "a", "answer": "1"}',
        "empty.jsonl": b" \n",
        "splits.json": json.dumps({"train": ROWS, "test": ROWS}).encode(),
        "number.json": b"5",
        "deep.json": b"[" * 200000,
        "latin.json": '[{"problem": "é"}]'.encode("latin-1"),
        "not.parquet": b"<html>",
        "cut.jsonl.gz": gzip.compress(LINES.encode())[:-9],
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    status, _, stderr = prepare("--benchmarks", *arguments)
    assert status == 1 and stderr.startswith(f"error: {error}") and stderr.count("\n") == 1
    assert not prepare.out.exists()


# GSM8K and the published sets -----------------------------------------------------------------------------------------

GSM8K = {
    "train": [{"question": "3 + 4?", "answer": "It is 3 + 4 = <<3+4=7>>7.\n#### 7"}],
    "test": [{"question": "1200 twice?", "answer": "It is <<1200*2=2400>>2400.\n#### 2,400"}],
}


def test_gsm8k_from_the_hub_and_from_copies(prepare, tmp_path, monkeypatch):
    asked = []

    def load(hub, config, split):
        asked.append((hub, config, split))
        return datasets.Dataset.from_list(GSM8K[split])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert prepare("--train", "gsm8k", "--benchmarks", "gsm8k")[0] == 0
    assert sorted(asked) == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    from_hub = {name: rows_of(prepare.out / f"{name}.parquet") for name in ("train", "gsm8k")}
    assert {row["data_source"] for rows in from_hub.values() for row in rows} == {"gsm8k"}
    truths = [row["reward_model"]["ground_truth"].tolist() for rows in from_hub.values() for row in rows]
    assert truths == [["7"], ["2,400"]]
    for pattern in ("{}.jsonl", "gsm8k_{}.jsonl"):
        for split, rows in GSM8K.items():
            (tmp_path / pattern.format(split)).write_text("\n".join(map(json.dumps, rows)))
        assert prepare("--train", "gsm8k", "--benchmarks", "gsm8k", "--local", tmp_path)[0] == 0
        out = prepare("--train", "gsm8k", "--benchmarks", "--local", tmp_path)[1]
        assert f"from {tmp_path / pattern.format('train')}" in out
        for name, rows in from_hub.items():
            both = (rows_of(prepare.out / f"{name}.parquet"), rows)
            written, expected = (
                [(row["prompt"][0]["content"], *row["reward_model"]["ground_truth"]) for row in part] for part in both
            )
            assert written == expected


def test_gsm8k_as_its_authors_ship_it(prepare, shared):
    folder = shared / "data/train"
    status, out, _ = prepare("--train", folder / "gsm8k_train.jsonl", "--benchmarks", folder / "gsm8k_test.jsonl")
    assert status == 0 and "rejected" not in out
    for file, source, count in (("train", "gsm8k_train", 7473), ("gsm8k_test", "gsm8k_test", 1319)):
        rows = rows_of(prepare.out / f"{file}.parquet")
        assert len(rows) == count
        lines = (folder / f"{source}.jsonl").read_text().splitlines()
        for row, line in zip(rows, lines, strict=True):
            (truth,) = row["reward_model"]["ground_truth"]
            assert re.fullmatch(r"-?[\d,]+(\.\d+)?", truth) and json.loads(line)["answer"].endswith(f"#### {truth}")
    for row, line in zip(rows[:300], lines, strict=False):
        response, truth = f"So \\boxed{{{line.split()[-1][:-2]}}}", row["reward_model"]["ground_truth"]
        assert compute_score("", response, truth, require_think=False)["score"] == 1.0


def test_the_six_benchmarks_and_two_training_sets(prepare, shared):
    train = [shared / f"data/train/{name}.json" for name in ("aime", "math")]
    status, out, _ = prepare("--local", shared / "data/benchmarks", "--train", *train)
    assert status == 0 and "4 rejected: no answer (first: math.json, row 886: columns problem, " in out
    assert out.count("rejected") == 1 and "instruction removed" not in out
    counts = {p.stem: len(rows_of(p)) for p in prepare.out.glob("*.parquet")}
    benchmarks = dict(aime24=30, aime25=30, math500=500, amc23=83, minerva=272, olympiadbench=675)
    assert counts == benchmarks | {"train": 975 + 7470}
    # verl reads several files as one data set.
    parts = [datasets.Dataset.from_parquet(str(prepare.out / f"{name}.parquet")) for name in counts]
    assert len(datasets.concatenate_datasets(parts)) == sum(counts.values())
    for name in benchmarks:
        for row in rows_of(prepare.out / f"{name}.parquet"):
            assert row["data_source"] == name and row["prompt"][0]["content"].count(SUFFIX) == 1


CASES = {
    "answer_none_solution.json": [["5"], ["7"]],
    "dapo.json": [["2"], ["2"], ["2"]],
    "dict.json": [["0"], ["1"], ["2"]],
    "ea.json": [["2"], ["3"]],
    "eurus.json": [["2"]],
    "gsm8k_layout.jsonl": [["7"], ["2,400"]],
    "gv.json": [["2"]],
    "huge_int.json": [["1" + "0" * 400], ["1" + "0" * 20]],
    "image.json": [],
    "intproblem.json": [],
    "limo.json": [["2"]],
    "ml.json": [["2"], ["\\frac{1}{2}"]],
    "n15.json": [["2"]],
    "nc.json": [["2"]],
    "orca.json": [],
    "prompt_json_string.json": [["2"]],
    "prompt_none_content.json": [],
    "prompt_str_list.json": [],
    "reward_model_json.json": [["2"]],
    "rlvr.json": [["2"]],
    "sky.json": [["2"], ["\\frac{1}{2}", "0.5"]],
    "suffix_variants.json": [["2"], ["3"], ["4"]],
    "surr.json": [],
    "tw.json": [["0"], ["1"], ["2"]],
}


@pytest.mark.parametrize("name", CASES)
def test_small_files_in_the_layouts_of_public_sets(prepare, shared, name):
    status, out, _ = prepare("--train", shared / "cases/data" / name, "--benchmarks")
    if not CASES[name]:
        assert status == 1 and "1 rejected: " in out and f"(first: {name}, " in out and not prepare.out.exists()
        return
    rows = rows_of(prepare.out / "train.parquet")
    assert status == 0 and [list(row["reward_model"]["ground_truth"]) for row in rows] == CASES[name]
    for row in rows:
        *_, asked = row["prompt"]
        assert asked["content"].endswith(f" {SUFFIX}")
        assert not re.search(r"boxed|####|Answer:|step by step|role", asked["content"].removesuffix(SUFFIX))
        truths = row["reward_model"]["ground_truth"]
        assert compute_score("", f"\\boxed{{{truths[-1]}}}", truths, require_think=False)["score"] == 1.0
