"""The newcomer's command, in small: everything that it does, and that a second start does it no more."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_ext.export import __main__ as export
from verl_ext.export.push import plan

ROOT = Path(__file__).resolve().parents[2]

SMALL = (
    "arithmetic.iterations=30",
    "arithmetic.train_size=64",
    "arithmetic.test_size=16",
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "trainer.total_training_steps=2",
    "trainer.test_freq=2",
    "trainer.save_freq=2",
)


@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="no .venv: it would be made, which takes minutes")
def test_it_trains_and_summarises_and_a_second_start_only_summarises(tmp_path):
    run = tmp_path / "run"

    def start(*overrides: str, status: int = 0) -> str:
        settings = (f"arithmetic.folder={tmp_path / 'assets'}", *SMALL, *overrides)
        done = subprocess.run(
            ["bash", str(ROOT / "examples/quickstart.sh"), *settings],
            env=os.environ | {"RUN": str(run)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == status, done.stdout[-5000:]
        return done.stdout

    first = start()
    assert "pre-training 30/30" in first
    assert "\nstep 0/2  pass@1 " in first and "\nstep 1/2  pass@1 " in first and "\nstep 2/2  pass@1 " in first
    assert "before (step 0) and after (step 2)" in first
    for name in ("reward in training", "KL(old || new)", "entropy", f"checkpoint   {run / 'global_step_2'}"):
        assert name in first
    written = ("global_step_2/actor/disco_controller.json", "metrics.jsonl", "config.yaml", "log.txt")
    for name in (*written, "report/report.html"):
        assert (run / name).stat().st_size > 0

    # Two ranks' shards become one model, with a card, of which all could go to the hub.
    assert export.main([str(run), "--out", str(tmp_path / "exported")]) == 0
    assert plan(tmp_path / "exported").left_out == []
    card = (tmp_path / "exported/README.md").read_text()
    assert (
        "after 2 steps of reinforcement learning with the method `disco`" in card and "| disco.delta | 0.001 |" in card
    )
    assert "- float32, as in the checkpoint." in card and "- Log-probabilities of 155 tokens" in card
    folders = (tmp_path / "assets/model", tmp_path / "exported")
    started, trained = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in folders)
    shards = [torch.load(f, weights_only=True) for f in sorted(run.glob("global_step_2/actor/model_*.pt"))]
    assert len(shards) == 2 and trained.keys() == shards[0].keys()
    for name, tensor in trained.items():
        # By its defaults the quickstart shards nothing: each rank has all.
        assert all(torch.equal(tensor, shard[name].to_local()) for shard in shards)
        # Four updates by AdamW move a weight by the learning rate each, at most.
        assert tensor.dtype == torch.float32 and 0 < float((tensor - started[name]).abs().max()) <= 5e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").chat_template

    before = (run / "metrics.jsonl").read_bytes()
    second = start()
    assert "finished before" in second and "pre-training" not in second
    assert "before (step 0) and after (step 2)" in second
    assert (run / "metrics.jsonl").read_bytes() == before

    # Another run is not taken for this one.
    other = start("disco.score=l_ratio", status=1)
    assert f"{run} holds another run: disco.score=l_ratio (that run: log_l)" in other and "step 1/2" not in other
    assert (run / "metrics.jsonl").read_bytes() == before and (run / "finished").exists()
