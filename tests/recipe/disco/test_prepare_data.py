"""Sets in the formats that are found in the wild become verl's parquet, and what happens to each row is told."""

import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from recipe.disco import prepare_data
from recipe.disco.prepare_data import BENCHMARKS, SUFFIX
from verl_ext.rewards.math import compute_score


@pytest.fixture
def prepare(tmp_path, capsys):
    """``prepare(*arguments)``: exit status, standard output, standard error."""

    def run(*arguments):
        status = prepare_data.main(["--out", str(tmp_path / "out"), *map(str, arguments)])
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
    if ending == ".json":
        path.write_text(json.dumps(rows))
    elif ending == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    else:
        pd.DataFrame(rows).to_parquet(path)
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


def test_rows_that_cannot_be_used_are_counted_and_shown(prepare, tmp_path):
    two = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]
    rows = [
        {"problem": "No answer?", "answer": None, "solution": "long"},
        {"problem": "Empty?", "answer": " "},
        {"problem": "  ", "answer": "1"},
        {"prompt": two, "answer": "1"},
        {"problem": "Fine?", "answer": "1"},
    ]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rows))
    status, out, _ = prepare("--train", path, "--benchmarks")
    assert status == 0 and "5 read       1 written" in out
    assert "2 rejected: no answer (first: mine, row 0)" in out
    assert "1 rejected: no problem (first: mine, row 2)" in out
    assert "1 rejected: prompt is not one message of the user (first: mine, row 3)" in out


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
    assert sorted(p.stem for p in prepare.out.glob("*.parquet")) == sorted([*BENCHMARKS, "train"])


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--train", "deepscalar"], "deepscalar is neither a set (deepscaler, dapo_math) nor a file"),
        (["--train", "none.json"], "there is no file none.json"),
        (["--train", "deepscaler", "--local", "."], ". has no copy of deepscaler: expected deepscaler, ending in"),
        (["--train", "broken.jsonl"], "cannot read broken.jsonl: "),
        (["--train", "object.json"], "object.json must be a list of objects"),
    ],
)
def test_what_cannot_be_read_is_one_clear_sentence(prepare, tmp_path, monkeypatch, arguments, error):
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"problem": \n')
    Path("object.json").write_text('{"problem": "a", "answer": "1"}')
    status, _, stderr = prepare("--benchmarks", *arguments)
    assert status == 1 and stderr.startswith(f"error: {error}") and stderr.count("\n") == 1
    assert not prepare.out.exists()


def test_the_six_benchmarks_and_two_training_sets(prepare, shared):
    train = [shared / f"data/train/{name}.json" for name in ("aime", "math")]
    status, out, _ = prepare("--local", shared / "data/benchmarks", "--train", *train)
    assert status == 0 and "4 rejected: no answer (first: math, row 886)" in out
    counts = {p.stem: len(rows_of(p)) for p in prepare.out.glob("*.parquet")}
    benchmarks = dict(aime24=30, aime25=30, math500=500, amc23=83, minerva=272, olympiadbench=675)
    assert counts == benchmarks | {"train": 975 + 7470}
    # verl reads several files as one data set.
    parts = [datasets.Dataset.from_parquet(str(prepare.out / f"{name}.parquet")) for name in counts]
    assert len(datasets.concatenate_datasets(parts)) == sum(counts.values())
    for name in benchmarks:
        for row in rows_of(prepare.out / f"{name}.parquet"):
            assert row["data_source"] == name and row["prompt"][0]["content"].count(SUFFIX) == 1
