"""From GSM8K as its authors ship it to training, in the documentation's two commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from verl_ext.tasks.arithmetic.model import build_model, build_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def authors_file(folder: Path, name: str = "gsm8k_train.jsonl") -> Path:
    """A file in the authors' layout: reasoning with calculations in it, and the answer behind ``####``."""
    rows = [
        {
            "question": f"Tom has {i} apples. He buys {3 * i} more, and gives one away. How many has he?",
            "answer": f"He has {i} + {3 * i} = <<{i}+{3 * i}={4 * i}>>{4 * i} apples.\nThen {4 * i} - 1 = "
            f"<<{4 * i}-1={4 * i - 1:,}>>{4 * i - 1:,} are left.\n#### {4 * i - 1:,}",
        }
        for i in range(251, 267)
    ]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "whose", ["our own", pytest.param("the authors'", marks=pytest.mark.slow)], ids=["our own", "the authors"]
)
def test_two_commands(main_ppo, tmp_path, request, whose):
    if whose == "our own":
        source = authors_file(tmp_path)
    else:
        lines = (request.getfixturevalue("shared") / "data/train/gsm8k_train.jsonl").read_text().splitlines()
        source = tmp_path / "gsm8k_train.jsonl"
        source.write_text("\n".join(lines[:16]) + "\n")
    data = tmp_path / "data"
    command = [sys.executable, "-m", "verl_ext.tasks.math.prepare", "--out", data, "--train", source, "--benchmarks"]
    subprocess.run(command, check=True)
    rows = pd.read_parquet(data / "train.parquet")
    truths = [truth for row in rows["reward_model"] for truth in row["ground_truth"]]
    assert len(truths) == 16 and all(truth.replace(",", "").isdigit() for truth in truths)

    # An untrained model that now and then says the right thing: each answer in its box is one of its tokens.
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([rf"\boxed{{{truth}}}" for truth in truths])
    tokenizer.save_pretrained(tmp_path / "model")
    model = build_model(tokenizer, seed=1)
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path / "model")
    run = main_ppo(
        "algorithm=disco",
        f"actor_rollout_ref.model.path={tmp_path / 'model'}",
        f"data.train_files={data / 'train.parquet'}",
        f"data.val_files={data / 'train.parquet'}",
        "data.train_batch_size=16",
        "data.max_prompt_length=900",
        "data.max_response_length=48",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=8192",
        "actor_rollout_ref.rollout.n=8",
        "reward.custom_reward_function.path=pkg://verl_ext.tasks.math.reward",
        "reward.custom_reward_function.name=compute_score",
        "+reward.custom_reward_function.reward_kwargs.require_think=false",
    )
    assert run.returncode == 0, run.output[-5000:]
    steps = run.metrics()
    assert len(steps) == 2
    print([(step["critic/score/mean"], step["disco/groups_mixed"], step["actor/grad_norm"]) for step in steps])
    # Right answers are rewarded, so questions have positives and negatives, and the update moves.
    assert all(0 < step["critic/score/mean"] < 0.5 and step["disco/groups_mixed"] > 0 for step in steps)
    assert all(step["actor/grad_norm"] > 0 for step in steps)


@pytest.fixture
def real_model(tmp_path) -> Path:
    """A pre-trained model: $VERL_DISCO_MODEL, a Hugging Face folder or one with a GGUF file (which needs gguf)."""
    given = os.environ.get("VERL_DISCO_MODEL")
    if not given:
        pytest.skip("no model: set VERL_DISCO_MODEL to the folder of a small one, such as SmolLM2-135M-Instruct")
    folder = Path(given).resolve()
    if (folder / "config.json").exists():
        return folder
    (file,) = folder.glob("*.gguf")
    command = [sys.executable, ROOT / "examples/convert_gguf.py", file, tmp_path / "converted"]
    subprocess.run(command, check=True)
    return tmp_path / "converted"


@pytest.mark.slow
def test_a_real_model_goes_through_the_whole_job(main_ppo, real_model, toy, tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        authors_file(tmp_path, name)
    data = tmp_path / "data"
    command = [sys.executable, "-m", "verl_ext.tasks.gsm8k.prepare", "--local", tmp_path, "--out", data]
    subprocess.run(command, check=True)
    run = main_ppo(
        "algorithm=disco",
        "+task=gsm8k",
        "+backend=cpu",
        f"model={real_model}",
        f"gsm8k.folder={data}",
        # A coin: a small model solves none of these, and groups of one kind teach nothing.
        f"reward.custom_reward_function.path={toy / 'reward.py'}",
        "data.train_batch_size=4",
        "data.val_max_samples=4",
        "data.max_response_length=64",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.rollout.n=4",
        "trainer.total_training_steps=2",
        "trainer.test_freq=2",
        "trainer.save_freq=2",
        f"trainer.default_local_dir={tmp_path / 'run'}",
        f"hydra.run.dir={tmp_path}/hydra",
        bare=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.output[-5000:]
    steps = run.metrics()
    assert len(steps) == 2 and all(step["actor/grad_norm"] > 0 for step in steps)
    # The engine that trains gives the probabilities that the rollout sampled by.
    assert all(step["training/rollout_probs_diff_mean"] < 0.01 for step in steps)
    assert "val-core/gsm8k/acc/mean@1" in (run.folder / "metrics.jsonl").read_text()
    command = [sys.executable, "-m", "verl_ext.export", run.folder, "--out", tmp_path / "exported"]
    subprocess.run(command, check=True)
    assert (tmp_path / "exported/model.safetensors").stat().st_size > 1000
