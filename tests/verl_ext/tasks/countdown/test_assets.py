"""The files of countdown: schema, prompts, reproducible, and built as the settings say."""

import pandas as pd
import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from verl_ext.tasks.arithmetic import assets as arithmetic
from verl_ext.tasks.countdown import assets
from verl_ext.tasks.countdown.assets import build_assets, ensure_assets
from verl_ext.tasks.countdown.reward import compute_score

TAGS = dict(style="tags", sizes=[3, 4, 5, 6], largest_number=99, largest_target=100, use_all=True)
TAGS |= dict(iterations=0, train_size=40, test_size=16, seed=1)
BARE = TAGS | dict(style="bare", largest_number=9, largest_target=99)


def rows(folder, split: str) -> list[dict]:
    return pd.read_parquet(folder / f"{split}.parquet").to_dict("records")


@pytest.mark.parametrize("parameters", [TAGS, BARE], ids=["tags", "bare"])
def test_rows_follow_verls_schema_and_can_be_graded(tmp_path, parameters):
    folder = build_assets(tmp_path / "a", **parameters)
    for split, size in (("train", 40), ("test", 16)):
        found = rows(folder, split)
        assert len(found) == size
        for i, row in enumerate(found):
            (message,) = row["prompt"]
            truth = row["reward_model"]["ground_truth"]
            assert message["role"] == "user" and all(str(n) in message["content"] for n in truth["numbers"])
            assert row["data_source"] == f"size_{len(truth['numbers'])}" == f"size_{row['extra_info']['size']}"
            assert (row["extra_info"]["split"], row["extra_info"]["index"]) == (split, i)
            assert compute_score("", f"<answer>{truth['target']}</answer>", truth)["failure"] == "other numbers"
    assert not (folder / "model").exists()
    again = build_assets(tmp_path / "b", **parameters)
    assert all((folder / f).read_bytes() == (again / f).read_bytes() for f in ("train.parquet", "test.parquet"))


def test_the_prompt_says_what_the_reward_asks(tmp_path):
    for use_all, words in ((True, "exactly once"), (False, "at most once")):
        folder = build_assets(tmp_path / words, **TAGS | {"use_all": use_all})
        text = rows(folder, "train")[0]["prompt"][0]["content"]
        assert words in text and "<think> </think>" in text and "<answer>" in text


def test_the_toy_model_is_trained_on_what_is_not_held_out(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(assets, "fit", lambda model, tokenizer, n, draw: seen.append((n, draw)))
    folder = build_assets(tmp_path / "a", **BARE | {"iterations": 3})
    ((iterations, draw),) = seen
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    truths = [row["reward_model"]["ground_truth"] for row in rows(folder, "test")]
    held_out = {(int(t["target"]), *sorted(t["numbers"])) for t in truths}
    assert iterations == 3 and len(held_out) == 16
    for careless in (False, True):
        for prompt, response in draw(careless):
            numbers, _, target = prompt.partition("=")
            assert (int(target), *sorted(map(int, numbers.split()))) not in held_out
            assert len(tokenizer.encode(response)) == len(response)


def test_the_task_prepares_what_its_settings_say(compose, tmp_path):
    folder = tmp_path / "assets"
    config = compose("algorithm=disco", "+task=countdown", "+backend=cpu", "model=mine", f"countdown.folder={folder}")
    OmegaConf.update(config, "countdown.train_size", 16)
    OmegaConf.update(config, "countdown.test_size", 4)
    ensure_assets(config)
    assert {f.name for f in folder.iterdir()} == {"train.parquet", "test.parquet", "assets.json"}
    assert config.reward.custom_reward_function.reward_kwargs == {"use_all": True, "style": "tags"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"style": "words"}, "countdown.style=words must be one of tags, bare"),
        ({"sizes": [2, 3]}, r"countdown.sizes=\[2, 3\] must be among 3, 4, 5, 6"),
        ({"sizes": []}, r"countdown.sizes=\[\] must be among"),
        ({"largest_number": 0}, "countdown.largest_number=0 must be 1 to 999999"),
        ({"largest_number": 1_000_000}, "countdown.largest_number=1000000 must be 1 to 999999"),
        ({"largest_target": 0}, "countdown.largest_target=0 must be a whole number, at least 1"),
        ({"train_size": -2}, "countdown.train_size=-2 must be a whole number, at least 1"),
        ({"test_size": 0}, "countdown.test_size=0 must be a whole number, at least 1"),
        ({"iterations": 5}, "countdown.iterations=5 pre-trains a toy model, which needs style=bare"),
    ],
    ids=str,
)
def test_wrong_parameters_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build_assets(tmp_path / "a", **TAGS | change)
    assert not (tmp_path / "a").exists()


def test_a_folder_of_another_task_is_refused_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "pretrain", lambda *args: None)
    folder = arithmetic.build_assets(tmp_path / "a", iterations=1, train_size=16, test_size=8, seed=1)
    with pytest.raises(ValueError, match=f"countdown.folder={folder} holds .*, not the countdown task"):
        build_assets(folder, **TAGS)
    assert (folder / "model").is_dir()


def test_the_command_has_the_settings_as_flags(tmp_path, monkeypatch):
    flags = ["--sizes", "3", "4", "--no-use-all", "--train-size", "8", "--test-size", "4", "--style", "tags"]
    monkeypatch.setattr("sys.argv", ["assets", "--folder", str(tmp_path / "a"), *flags])
    assets.main()
    assert {r["data_source"] for r in rows(tmp_path / "a", "train")} == {"size_3", "size_4"}
