"""The files that a run starts from: schema, disjoint splits, determinism, and building them once."""

import hashlib
import sys
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_ext.tasks.arithmetic import assets
from verl_ext.tasks.arithmetic.assets import build_assets, draw_splits, ensure_assets
from verl_ext.tasks.arithmetic.task import LEVELS
from verl_ext.tasks.assets import STAMP

PARAMETERS = dict(iterations=2, train_size=160, test_size=32, seed=1)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_assets(tmp_path_factory.mktemp("built") / "assets", **PARAMETERS)


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the training; counts its calls."""
    calls = []
    monkeypatch.setattr(assets, "pretrain", lambda *args, **kwargs: calls.append(args))
    return calls


def test_splits_are_disjoint_and_hold_all_levels_alike():
    train, test = draw_splits(train_size=780, test_size=156, seed=1)
    assert len(train) == 780 and len(test) == 156
    texts = [q.text for q in test]
    assert len(set(texts)) == len(texts)
    assert not set(texts) & {q.text for q in train}
    for split in (train, test):
        counts = [sum(q.level == level for q in split) for level in LEVELS]
        assert counts == [len(split) // len(LEVELS)] * len(LEVELS)


def test_rows_follow_verls_schema(built):
    for split, size in (("train", 160), ("test", 32)):
        rows = pd.read_parquet(built / f"{split}.parquet").to_dict("records")
        assert len(rows) == size
        for i, row in enumerate(rows):
            (message,) = row["prompt"]
            assert message["role"] == "user" and message["content"].endswith("=")
            level = row["extra_info"]["level"]
            assert row["data_source"] == f"level_{level}"
            assert sum(message["content"].count(sign) for sign in "+-") == level
            assert row["extra_info"]["split"] == split and row["extra_info"]["index"] == i
            assert row["reward_model"]["style"] == "rule"
            # The ground truth is the sum of the question's own signed digits.
            terms = message["content"].rstrip("=").replace("-", "+-").split("+")
            assert int(row["reward_model"]["ground_truth"]) == sum(map(int, terms))


def test_verls_dataset_reads_every_row(built, tmp_path):
    from verl.utils.dataset.rl_dataset import RLHFDataset

    config = OmegaConf.create(
        {"max_prompt_length": 32, "filter_overlong_prompts": True, "truncation": "error", "cache_dir": str(tmp_path)}
    )
    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    dataset = RLHFDataset(str(built / "train.parquet"), tokenizer, config)
    assert len(dataset) == 160
    row = dataset[0]
    assert row["raw_prompt"][0]["role"] == "user" and row["data_source"].startswith("level_")


def test_the_model_and_its_tokenizer_load(built):
    model = AutoModelForCausalLM.from_pretrained(built / "model")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(built / "model"))


def test_the_same_parameters_make_the_same_files(built, tmp_path):
    assert hashes(build_assets(tmp_path / "again", **PARAMETERS)) == hashes(built)


def test_a_second_call_builds_nothing(built, trained):
    before = hashes(built)
    assert build_assets(built, **PARAMETERS) == built
    assert not trained and hashes(built) == before


@pytest.mark.parametrize("change", [{"seed": 2}, {"iterations": 3}, {"train_size": 168}, {"test_size": 40}], ids=str)
def test_a_changed_parameter_builds_anew(tmp_path, trained, change):
    folder = build_assets(tmp_path / "assets", **PARAMETERS)
    (folder / "stale").touch()
    build_assets(folder, **PARAMETERS | change)
    assert len(trained) == 2
    assert not (folder / "stale").exists()


@pytest.mark.parametrize("held", [["notes.txt"], [STAMP], ["a/b.bin"], ["train.parquet", "test.parquet", "x", "y"]])
def test_a_folder_of_the_users_is_refused_and_stays(tmp_path, trained, held):
    folder = tmp_path / "mine"
    for name in held:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"mine": 1}')
    before = hashes(folder)
    with pytest.raises(ValueError, match=rf"arithmetic.folder={folder} holds .*; building would remove that"):
        build_assets(folder, **PARAMETERS)
    assert hashes(folder) == before and not trained
    # Through a link too.
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="would remove that"):
        build_assets(tmp_path / "link", **PARAMETERS)
    assert hashes(folder) == before


def test_a_file_is_refused_and_stays(tmp_path, trained):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        build_assets(tmp_path / "file", **PARAMETERS)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_is_built_and_one_beside_it_stays(tmp_path, trained):
    folder, other = tmp_path / "assets", tmp_path / "assets.partial"
    folder.mkdir()
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    assert build_assets(tmp_path / "link", **PARAMETERS) == folder
    assert (folder / STAMP).exists() and (tmp_path / "link").is_symlink()
    assert (other / "notes.txt").read_text() == "mine"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["assets", "assets.lock", "assets.partial", "link"]


def test_what_a_user_puts_into_a_built_folder_is_kept_when_it_is_built_anew(tmp_path, trained):
    folder = build_assets(tmp_path / "assets", **PARAMETERS)
    for seed in (2, 3):
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint" / "weights").write_text(f"of seed {seed}")
        build_assets(folder, **PARAMETERS | {"seed": seed})
    assert not (folder / "checkpoint").exists()
    kept = [tmp_path / f"assets.old{n}" / "checkpoint" / "weights" for n in (1, 2)]
    assert [f.read_text() for f in kept] == ["of seed 2", "of seed 3"]


def test_what_comes_while_the_model_is_trained_stays(tmp_path, monkeypatch):
    folder = tmp_path / "assets"

    def write(*args, **kwargs):
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")

    monkeypatch.setattr(assets, "pretrain", write)
    with pytest.raises(ValueError, match="holds notes.txt"):
        build_assets(folder, **PARAMETERS)
    assert [f.name for f in folder.iterdir()] == ["notes.txt"]


def test_the_command_says_why_it_builds_nothing(tmp_path, trained, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["assets", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"not built: arithmetic.folder={tmp_path} holds notes.txt"):
        assets.main()


def test_an_interrupted_build_leaves_nothing_that_looks_built(tmp_path, trained, monkeypatch):
    folder = tmp_path / "assets"
    with monkeypatch.context() as m:
        m.setattr(assets, "pretrain", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_assets(folder, **PARAMETERS)
    assert not folder.exists()
    build_assets(folder, **PARAMETERS)
    assert len(trained) == 1 and (folder / STAMP).exists()


def test_the_experiment_prepares_what_its_settings_say(tmp_path, trained):
    folder = tmp_path / "assets"
    ensure_assets(OmegaConf.create({"arithmetic": {"folder": str(folder), **PARAMETERS}}))
    assert {f.name for f in folder.iterdir()} == {"model", "train.parquet", "test.parquet", STAMP}
