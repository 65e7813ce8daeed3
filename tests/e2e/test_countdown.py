"""Countdown on the CPU, in small: built, trained and evaluated by size, through verl's whole pipeline."""

import json


def test_two_steps(main_ppo, tmp_path):
    folder = tmp_path / "run"
    run = main_ppo(
        "algorithm=disco",
        "+experiment=countdown_cpu",
        f"countdown.folder={tmp_path / 'assets'}",
        "countdown.iterations=40",
        "countdown.train_size=64",
        "countdown.test_size=16",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.rollout.n=4",
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=2",
        "trainer.test_freq=2",
        f"trainer.default_local_dir={folder}",
        f"hydra.run.dir={tmp_path}/hydra",
        bare=True,
        folder=folder,
    )
    assert run.returncode == 0, run.output[-5000:]
    assert "pre-training 40/40" in run.output
    assert len(run.metrics()) == 2
    (last,) = [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r.get("step") == 2]
    assert all(0 <= last[f"val-core/size_{size}/acc/mean@1"] <= 1 for size in (3, 4, 5, 6))
    # The reward got numbers and target, and says what it found.
    rows = [json.loads(line) for line in (folder / "validation/2.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and {row["data_source"] for row in rows} == {f"size_{size}" for size in (3, 4, 5, 6)}
    assert all(row["failure"] or row["score"] == 1.0 for row in rows)
