"""GSM8K's two files become what the task's settings name."""

import json

import pandas as pd
import pytest

from verl_ext.tasks.gsm8k import prepare
from verl_ext.tasks.math.reward import compute_score


@pytest.mark.parametrize("stem", ["gsm8k_", ""], ids=["ours", "the authors"])
def test_both_files_of_a_folder_are_taken(tmp_path, compose, stem):
    for split, count in (("train", 3), ("test", 2)):
        lines = [{"question": f"{split} {i}?", "answer": f"It is {i}.\n#### 1,{i:03}"} for i in range(count)]
        (tmp_path / f"{stem}{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    assert prepare.main(["--local", str(tmp_path), "--out", str(out)]) == 0
    config = compose("algorithm=disco", "+experiment=gsm8k_qwen2_5_0_5b", f"gsm8k.folder={out}")
    kwargs = config.reward.custom_reward_function.reward_kwargs
    for file, count in ((config.data.train_files, 3), (config.data.val_files, 2)):
        rows = pd.read_parquet(file).to_dict("records")
        assert len(rows) == count and {row["data_source"] for row in rows} == {"gsm8k"}
        right = compute_score("gsm8k", r"So \boxed{1001}.", rows[1]["reward_model"]["ground_truth"], **kwargs)
        assert right["score"] == 1.0


def test_a_missing_file_is_named(tmp_path, capsys):
    assert prepare.main(["--local", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "has no copy of gsm8k: expected gsm8k_test or test" in capsys.readouterr().err


def test_the_authors_own_files(tmp_path, shared, capsys):
    assert prepare.main(["--local", str(shared / "data/train"), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1319 read    1319 written to gsm8k" in out and "7473 read    7473 written to train" in out


def test_a_run_on_a_cpu_ends(compose):
    config = compose("algorithm=disco", "+task=gsm8k", "+backend=cpu", "model=mine")
    assert config.trainer.total_training_steps == 100
