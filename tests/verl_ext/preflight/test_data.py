"""The data's rows: prompts that are no messages and truths that are none are found, with the row; the file is read
once, and quickly."""

import json
import time

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from verl_ext.preflight import data as reading
from verl_ext.preflight.composition import Run
from verl_ext.preflight.data import is_empty
from verl_ext.preflight.rows import check_columns, check_data_files, check_default_reward, check_rows, wrong_rows
from verl_ext.preflight.sizes import check_rows_of_a_step
from verl_ext.tasks.math.reward import ground_truths


def frame(**columns) -> pd.DataFrame:
    """Four good rows, with the third one's columns replaced."""
    found = [
        {
            "data_source": "mine",
            "prompt": [{"role": "user", "content": f"{i}+1?"}],
            "reward_model": {"style": "rule", "ground_truth": [str(i + 1)]},
        }
        for i in range(4)
    ]
    found[2] |= columns
    return pd.DataFrame(found)


NEEDED = ("prompt", "reward_model", "data_source")


def truth(value) -> dict:
    return {"reward_model": {"style": "rule", "ground_truth": value}}


@pytest.mark.parametrize(
    "columns, problem",
    [
        *((truth(value), "ground_truth is empty") for value in ("", " ", [], [""], [None], float("nan"), np.array([]))),
        (truth(None), " has no reward_model.ground_truth"),
        ({"reward_model": {"style": "rule"}}, " has no reward_model.ground_truth"),
        ({"reward_model": None}, "reward_model is NoneType, not a record"),
        ({"reward_model": '{"ground_truth": "3"}'}, "reward_model is str, not a record"),
        ({"prompt": ["hello"]}, "prompt is not a list of messages: str instead of role and content"),
        ({"prompt": "hello"}, "prompt is not a list of messages"),
        ({"prompt": []}, "prompt is not a list of messages"),
        ({"prompt": None}, "prompt is not a list of messages"),
        ({"prompt": {"role": "user", "content": "x"}}, "prompt is not a list of messages"),
        ({"prompt": [{"content": "x"}]}, "a message of prompt has no role"),
        ({"prompt": [{"role": "", "content": "x"}]}, "a message of prompt has no role"),
        ({"prompt": [{"role": "user"}]}, "a message of prompt has no content"),
        ({"prompt": [{"role": "user", "content": None}]}, "a message of prompt has no content"),
        ({"prompt": [{"role": "user", "content": 3}]}, "a message of prompt has a number for its content"),
        ({"prompt": [{"role": "user", "content": " "}]}, "prompt is empty"),
        ({"prompt": [{"role": "user", "content": b"x"}]}, "a message of prompt has bytes for its content"),
        ({"prompt": [{"role": "user", "content": {"text": "x"}}]}, "a message of prompt has dict for its content"),
        ({"data_source": np.array(["mine"])}, "data_source is ndarray, not a text"),
    ],
)
def test_a_wrong_row_is_named(columns, problem):
    (found,) = wrong_rows(frame(**columns), NEEDED)
    assert found.startswith(": row 2") and problem in found


@pytest.mark.parametrize(
    "columns",
    [
        *(truth(value) for value in ("3", 3, 0, 0.0, False, ["3", "4"], np.array(["3"]), {"answer": "3"})),
        {"prompt": np.array([{"role": "system", "content": ""}, {"role": "user", "content": "x"}])},
        {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]},
    ],
)
def test_a_good_row_is_no_finding(columns):
    assert list(wrong_rows(frame(**columns), NEEDED)) == []


def test_each_kind_is_named_once_with_its_count():
    wrong = frame()
    wrong["prompt"] = "text"
    assert list(wrong_rows(wrong, NEEDED)) == [": row 0: prompt is not a list of messages (4 such rows)"]


def test_a_truth_that_the_grader_refuses_is_wrong_where_it_grades():
    wrong = frame(**truth({"answer": "3"}))
    (found,) = wrong_rows(wrong, NEEDED, ground_truths)
    assert found.startswith(": row 2: the reward function refuses reward_model.ground_truth: ")
    assert list(wrong_rows(wrong, NEEDED)) == []


@pytest.mark.parametrize("value, empty", [({}, True), ([[]], True), ("0", False), (0, False), ([0], False)])
def test_empty_is_what_holds_nothing(value, empty):
    assert is_empty(value) is empty


@pytest.mark.parametrize("first", ["3", None])
def test_a_record_beside_another_value_cannot_be_joined(tmp_path, first):
    names = [str(tmp_path / f"{i}.parquet") for i in range(2)]
    for name, value in zip(names, (first, {"numbers": [1, 2], "target": 3}), strict=True):
        rows = frame()
        rows["reward_model"] = [truth(value)["reward_model"]] * 4
        rows.to_parquet(name)
    *_, problem = problems(names, [names[1]])
    assert problem.startswith(f"data.train_files: {names[1]} and {names[0]} cannot be joined: ")
    assert first or problem.endswith("a column is a record in one of them alone")


def run(train, val) -> Run:
    config = {
        "data": {"train_files": train, "val_files": val, "prompt_key": "prompt", "custom_cls": {"path": None}},
        "reward": {
            "custom_reward_function": {"path": None},
            "reward_manager": {"source": "register", "name": "naive"},
            "reward_model": {"enable": False},
        },
        "actor_rollout_ref": {
            "rollout": {"agent": {"agent_loop_config_path": None, "default_agent_loop": "single_turn_agent"}}
        },
        "trainer": {"val_only": False, "val_before_train": True, "test_freq": -1},
    }
    config["data"] |= {"train_batch_size": 4, "train_max_samples": -1}
    found = Run(OmegaConf.create(config), OmegaConf.create())
    # Resolved as it is.
    found.config = found.composed
    return found


def findings(run: Run) -> list:
    return [*check_data_files(run), *check_rows(run)]


def problems(train, val) -> list[str]:
    return [f.problem for f in findings(run(train, val)) if f.problem and not f.warning]


def test_files_that_verl_cannot_read_are_named(tmp_path):
    good = tmp_path / "good.parquet"
    frame().to_parquet(good)
    for name, text, problem in [
        ("none.parquet", None, "there is no "),
        ("rows.csv", "a,b", "verl reads files that end in .parquet, .json or .jsonl"),
        ("empty.jsonl", "", "is empty"),
        ("cut.parquet", "PAR1xxxx", "is not a whole Parquet file: it was cut off"),
        ("text.parquet", "PAR", "is not a whole Parquet file"),
        ("broken.parquet", "PAR1xxxxPAR1", "cannot be read: ArrowInvalid"),
        ("broken.jsonl", '{"prompt": [', "cannot be read: "),
    ]:
        file = tmp_path / name
        if text is not None:
            file.write_text(text)
        (found,) = problems(str(file), str(good))
        assert found.startswith("data.train_files: ") and str(file) in found and problem in found
        (found,) = problems(str(good), [str(good), str(file)])
        assert found.startswith("data.val_files: ") and str(file) in found
    assert problems([], str(good)) == problems(None, str(good))
    assert problems(None, str(good)) == ["data.train_files: no file is named"]


def test_files_of_unlike_types_are_named(tmp_path):
    files = [str(tmp_path / name) for name in ("lists.parquet", "texts.parquet")]
    frame().to_parquet(files[0])
    frame().assign(reward_model=[{"style": "rule", "ground_truth": "1"}] * 4).to_parquet(files[1])
    (found,) = problems(files, files[0])
    assert found.startswith(f"data.train_files: {files[1]} and {files[0]} cannot be joined")


def test_json_is_read_as_verl_reads_it_and_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = json.loads(frame().to_json(orient="records"))
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("".join(json.dumps(r) + "\n" for r in records))
    array.write_text(json.dumps(records))
    found = run(str(lines), str(array))
    assert [f.problem for f in findings(found) if f.problem] == []
    assert (found.data.count("train"), found.data.count("val")) == (4, 4)
    assert not (tmp_path / "cache").exists()


def test_a_file_is_read_once(tmp_path, monkeypatch):
    file = tmp_path / "rows.parquet"
    frame().to_parquet(file)
    read, count = reading._read_parquet, []
    monkeypatch.setattr(reading, "_read_parquet", lambda *a: count.append(a) or read(*a))
    found = run(str(file), [str(file)])
    list(check_data_files(found))
    assert not count, "a start looks, and reads nothing"
    list(check_rows(found))
    counts = found.data.count("train"), found.data.count("val"), len(found.data.prompts(3)), len(count)
    assert counts == (4, 4, 3, 1)


def test_many_rows_are_checked_quickly(tmp_path):
    file = tmp_path / "rows.parquet"
    pd.concat([frame()] * 10_000).to_parquet(file)
    begin = time.process_time()
    assert problems(str(file), str(file)) == []
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("column", ["prompt", "reward_model", "data_source"])
def test_a_start_names_a_missing_column_from_the_files_footer(tmp_path, monkeypatch, column):
    file = str(tmp_path / "train.parquet")
    frame().rename(columns={column: "other"}).to_parquet(file)
    asked = run(file, file)
    monkeypatch.setattr(reading, "_read", None)
    first, _ = check_columns(asked)
    assert first.problem.startswith(f"data.train_files: {file} has no column {column}")
    assert "other" in first.fix
    # The doctor reads the rows as well; it says no more than that.
    monkeypatch.undo()
    assert first.problem in [f.problem for f in check_rows(asked)]


@pytest.mark.parametrize(
    "source, given, problem",
    [
        ("openai/gsm8k", {}, ""),
        (
            "mine",
            {},
            "verl has no reward function for data_source=mine, and reward.custom_reward_function.path is null",
        ),
        ("mine", {"reward.custom_reward_function.path": "reward.py"}, ""),
        ("mine", {"reward.reward_model.enable": True}, ""),
        ("mine", {"reward.reward_manager.source": "importlib"}, ""),
        ("mine", {"reward.reward_manager.name": "mine"}, ""),
        ("mine", {"actor_rollout_ref.rollout.agent.default_agent_loop": "my_agent"}, ""),
        ("mine", {"actor_rollout_ref.rollout.agent.agent_loop_manager_class": "mine.Manager"}, ""),
        # Nothing is graded.
        ("mine", {"trainer.val_only": True, "data.val_files": []}, ""),
    ],
)
def test_a_set_that_nothing_rewards_is_refused(tmp_path, source, given, problem):
    file = str(tmp_path / "train.parquet")
    frame().assign(data_source=source).to_parquet(file)
    asked = run(file, file)
    for name, value in given.items():
        OmegaConf.update(asked.config, name, value)
    assert [f.problem for f in check_default_reward(asked)] == ([problem] if problem else [])


def test_a_file_that_cannot_be_read_does_not_end_a_start(tmp_path):
    file = tmp_path / "train.parquet"
    file.write_bytes(b"PAR1" + b"x" * 100 + b"PAR1")
    asked = run(str(file), str(file))
    assert list(check_columns(asked)) == [] and asked.data.sources("train") == []
    assert any("cannot be read" in f.problem for f in check_rows(asked))


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_columns_and_sources_are_seen_at_a_start(tmp_path, ending):
    def written(rows):
        file = str(tmp_path / f"train.{ending}")
        rows.to_parquet(file) if ending == "parquet" else rows.to_json(file, orient="records", lines=True)
        return run(file, file)

    rows = frame()
    assert list(check_columns(asked := written(rows))) == [] and asked.data.sources("train") == sorted(
        set(rows["data_source"])
    )
    found = [f.problem for f in check_columns(written(rows.drop(columns="data_source")))]
    assert found == [
        f"data.{split}_files: {tmp_path}/train.{ending} has no column data_source" for split in ("train", "val")
    ]


def test_one_array_of_records_is_left_to_the_doctor(tmp_path):
    file = tmp_path / "train.json"
    frame().to_json(file, orient="records", indent=2)
    asked = run(str(file), str(file))
    assert list(check_columns(asked)) == [] and asked.data.sources("train") == []
    assert not [f.problem for f in check_rows(asked) if f.problem]


@pytest.mark.parametrize(
    "given, needed",
    [
        ({}, True),
        ({"reward.custom_reward_function.path": "reward.py"}, True),
        ({"reward.reward_model.enable": True}, False),
        ({"reward.reward_model.enable": True, "reward.custom_reward_function.path": "reward.py"}, True),
        ({"reward.reward_manager.source": "importlib"}, False),
        ({"actor_rollout_ref.rollout.agent.agent_loop_config_path": "agents.yaml"}, False),
        ({"trainer.val_only": True}, False),
    ],
)
def test_columns_of_the_reward_are_needed_where_verls_managers_grade(tmp_path, given, needed):
    file = str(tmp_path / "train.parquet")
    frame()[["prompt"]].to_parquet(file)
    asked = run(file, [])
    for name, value in given.items():
        OmegaConf.update(asked.config, name, value)
    found = [f.problem for f in check_columns(asked)]
    assert found == [f"data.train_files: {file} has no column reward_model"] * needed
    assert any(p.endswith("has no column reward_model") for p in (f.problem for f in check_rows(asked))) == needed


def test_a_pattern_names_the_files_that_it_matches(tmp_path):
    for name in ("a", "b"):
        frame().to_parquet(tmp_path / f"{name}.parquet")
    asked = run(f"{tmp_path}/*.parquet", f"{tmp_path}/c*.parquet")
    assert asked.data.rows_of("train") == 8
    assert [f.problem for f in check_data_files(asked)] == [f"data.val_files: there is no {tmp_path}/c*.parquet"]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    "given, problem",
    [
        ({}, ""),
        ({"data.train_batch_size": 5}, "4 training rows are fewer than data.train_batch_size=5"),
        ({"data.train_max_samples": 3}, "3 training rows are fewer than data.train_batch_size=4"),
        ({"data.train_batch_size": 5, "trainer.val_only": True}, ""),
        ({"data.train_batch_size": 5, "data.custom_cls.path": "mine.py"}, ""),
    ],
)
def test_rows_for_less_than_a_step_are_refused_at_a_start(tmp_path, ending, given, problem):
    file = str(tmp_path / f"train.{ending}")
    frame().to_parquet(file) if ending == "parquet" else frame().to_json(file, orient="records", lines=True)
    asked = run(file, file)
    for name, value in given.items():
        OmegaConf.update(asked.config, name, value)
    assert [f.problem for f in check_rows_of_a_step(asked)] == [problem] * bool(problem)


def test_a_start_names_a_file_without_rows(tmp_path):
    file, some = str(tmp_path / "train.parquet"), str(tmp_path / "some.parquet")
    frame().to_parquet(some)
    frame().head(0).to_parquet(file)
    found = [f.problem for f in check_columns(run([some, file], some))]
    assert found == [f"data.train_files: {file} has no rows"]


@pytest.mark.parametrize("source", ["openai/gsm8k", "numina_aops_forum", "codecontests"])
def test_what_verl_rewards_is_told_without_grading(tmp_path, capfd, source):
    """Graders of code would run something."""
    file = str(tmp_path / "train.parquet")
    frame().assign(data_source=source).to_parquet(file)
    begin = time.process_time()
    assert list(check_default_reward(run(file, file))) == [] and time.process_time() - begin < 1
    assert capfd.readouterr().out == ""


def test_a_reward_whose_package_is_missing_here_is_a_warning(tmp_path):
    """It may be on the nodes."""
    file = str(tmp_path / "train.parquet")
    frame().assign(data_source="hiyouga/geometry3k").to_parquet(file)
    (found,) = check_default_reward(run(file, file))
    assert found.warning and "mathruler" in found.problem


def test_a_large_json_file_is_left_to_the_doctor(tmp_path, monkeypatch):
    file = str(tmp_path / "train.jsonl")
    frame().drop(columns="data_source").to_json(file, orient="records", lines=True)
    monkeypatch.setattr(reading, "LARGEST_JSON", 10)
    asked = run(file, file)
    assert list(check_columns(asked)) == [] and asked.data.rows_of("train") is None
    assert any("has no column data_source" in f.problem for f in check_rows(asked))
