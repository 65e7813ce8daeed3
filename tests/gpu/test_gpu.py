"""Half precision at the size of a real model and the main job, on an accelerator; the former rehearsed on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def run_update(folder: Path, *arguments: str) -> dict:
    out = folder / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        + [str(ROOT / "tests/gpu/update.py"), *arguments, "--out", str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests/recipe/disco")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return json.loads(out.read_text())


def test_the_update_at_tiny_size_on_the_cpu(tmp_path):
    tiny = ["--size", "tiny", "--questions", "4", "--responses", "4", "--prompt", "8", "--response", "24"]
    result = run_update(tmp_path, *tiny, "--device", "cpu")
    # bfloat16 has 8 bits: a product is off by 2^-9, and an update adds many; something is off at all.
    assert all(1e-4 < error < 0.05 for error in result["error"].values()), result
    # A free mini-batch's table and what its update saw, a measured one's.
    assert result["exchanged_on"] == ["cpu"] * 3
    assert result["log_probs"]["largest_difference"] == 0 and not result["triton_cross_entropy"]


@on_gpu
@pytest.mark.parametrize("size", ["0.5b", pytest.param("1.5b", marks=pytest.mark.slow)])
def test_an_update_in_bfloat16(size, tmp_path):
    result = run_update(tmp_path, "--size", size)
    print(torch.cuda.get_device_name(), json.dumps(result))
    assert result["error"]["objective"] < 0.05 and result["error"]["constraint"] < 0.05
    # The batch is on the CPU: gloo carries tables of log-probabilities that came with it, NCCL those of measured ones.
    assert result["exchanged_on"] == ["cpu", "cpu", "cuda"]
    # The measuring pass holds no activations.
    assert result["disco"]["peak_gib"] < 1.1 * result["grpo"]["peak_gib"]
    assert result["triton_cross_entropy"], "flash-attn is missing: log-probabilities were computed row by row"
    assert result["log_probs"]["seconds"] < result["log_probs"]["seconds_row_by_row"]
    assert result["log_probs"]["largest_difference"] < 0.01


@on_gpu
def test_the_main_job(tmp_path):
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", "algorithm=disco", "+experiment=arithmetic_cpu"]
        + ["trainer.device=cuda", "trainer.n_gpus_per_node=1", "trainer.total_training_steps=20"]
        + ["arithmetic.iterations=300", f"arithmetic.folder={tmp_path / 'assets'}"]
        + [f"trainer.default_local_dir={run}", f"hydra.run.dir={tmp_path / 'hydra'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 20 and steps[-1]["actor/grad_norm"] > 0 and steps[-1]["disco/measured"] == 0.5
