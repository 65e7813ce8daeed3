"""Runs of verl's real main_ppo on the CPU, on an untrained model and a handful of questions."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import Background

ENVIRONMENT = {"RAY_TMPDIR": "/tmp", "HYDRA_FULL_ERROR": "1"}


@dataclass
class Run:
    """A finished run: exit status, output, and what it wrote."""

    returncode: int
    output: str
    folder: Path

    def metrics(self, job: str = "") -> list[dict]:
        """The training steps in metrics.jsonl of the job whose checkpoints are in ``job``."""
        rows = [json.loads(line) for line in (self.folder / job / "metrics.jsonl").read_text().splitlines()]
        return [r for r in rows if "actor/grad_norm" in r]


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A tiny untrained model, and questions whose reward is a coin that the response tosses: groups are mixed."""
    import random

    import pandas as pd

    from verl_ext.tasks.arithmetic.model import build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("toy")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    build_model(tokenizer, seed=1).save_pretrained(folder / "model")
    rng = random.Random(0)
    for split, count in (("train", 64), ("test", 8)):
        rows = [
            dict(
                data_source="toy",
                prompt=[{"role": "user", "content": f"{rng.randint(0, 99)}+{rng.randint(0, 99)}="}],
                ability="math",
                reward_model={"style": "rule", "ground_truth": "0"},
                extra_info={"index": i, "split": split},
            )
            for i in range(count)
        ]
        pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
    (folder / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    score = float(sum(map(ord, solution_str)) % 2)\n"
        "    return {'score': score, 'acc': score}\n"
    )
    return folder


@pytest.fixture(scope="session")
def command(toy) -> Callable[..., list[str]]:
    """``command(*overrides, folder, ranks=1)``: verl's main_ppo on the toy, in ``folder``.

    ``bare``: with these overrides and nothing else.
    """

    def make(*overrides: str, folder: Path, ranks: int = 1, bare: bool = False) -> list[str]:
        settings = [
            "+experiment=arithmetic_cpu",
            "verl_ext.prepare=null",
            f"actor_rollout_ref.model.path={toy / 'model'}",
            f"data.train_files={toy / 'train.parquet'}",
            f"data.val_files={toy / 'test.parquet'}",
            f"reward.custom_reward_function.path={toy / 'reward.py'}",
            "data.train_batch_size=6",
            "data.max_response_length=12",
            "actor_rollout_ref.actor.ppo_mini_batch_size=3",
            "actor_rollout_ref.actor.use_dynamic_bsz=true",
            "actor_rollout_ref.rollout.n=4",
            "critic.ppo_mini_batch_size=3",
            f"trainer.n_gpus_per_node={ranks}",
            "trainer.total_training_steps=2",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            "trainer.save_freq=-1",
            f"trainer.default_local_dir={folder}",
            f"hydra.run.dir={folder}/hydra",
        ]
        # Later ones win; Hydra refuses to be told twice.
        chosen = {o.lstrip("+").split("=")[0]: o for o in [*([] if bare else settings), *overrides] if "=" in o}
        flags = [o for o in overrides if "=" not in o]
        return [sys.executable, "-m", "verl.trainer.main_ppo", *flags, *chosen.values()]

    return make


@pytest.fixture(scope="module")
def background() -> Iterator[Callable[..., Background]]:
    """``background(command, folder)``: start it, with its output at the end of ``folder/log.txt``."""
    started = []

    def start(command: list[str], folder: Path) -> Background:
        started.append(Background(command, folder / "log.txt", folder, ENVIRONMENT))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def main_ppo(command, tmp_path) -> Callable[..., Run]:
    """``main_ppo(*overrides, ranks=1)``: one command, in a clean directory and a Ray session of its own."""

    def run(*overrides: str, folder: Path | None = None, timeout: int = 900, **options) -> Run:
        folder = folder or tmp_path / "run"
        done = subprocess.run(
            command(*overrides, folder=folder, **options),
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            timeout=timeout,
        )
        return Run(done.returncode, done.stdout, folder)

    yield run
    shutil.rmtree(tmp_path, ignore_errors=True)
