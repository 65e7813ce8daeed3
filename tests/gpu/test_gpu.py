"""What needs an accelerator: half precision at the size of a real model, and the main job on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("size", ["0.5b", pytest.param("1.5b", marks=pytest.mark.slow)])
def test_an_update_in_bfloat16(size, tmp_path):
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        + [str(ROOT / "tests/gpu/update.py"), "--size", size, "--out", str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests/recipe/disco")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    result = json.loads(out.read_text())
    print(torch.cuda.get_device_name(), json.dumps(result))
    # bfloat16 has 8 bits: a product is off by 2^-9, and an update adds many.
    assert result["error"] < 0.05
    # The measuring pass holds no activations.
    assert result["disco"]["peak_gib"] < 1.1 * result["grpo"]["peak_gib"]


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
