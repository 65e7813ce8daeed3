"""Runs for reports, written as a training run leaves them."""

import json

import pytest
from omegaconf import OmegaConf

from verl_ext.runs import folder as runs


def settings(algorithm: str, seed: int, **more) -> dict:
    flat = {
        "seed": seed,
        "data.seed": seed,
        "verl_ext.algorithm": algorithm,
        "disco.delta": 0.001,
        "verl_ext.kl_resolution": 0.001,
        "disco.score": "log_l",
        "algorithm.adv_estimator": {"ppo": "gae", "disco": "disco"}.get(algorithm, "grpo"),
        "actor_rollout_ref.model.path": "models/toy",
        "actor_rollout_ref.actor.optim.lr": 1e-4,
        "trainer.total_training_steps": 20,
        "trainer.default_local_dir": f"outputs/{algorithm}-{seed}",
    }
    return flat | more


@pytest.fixture
def make(tmp_path):
    """``make(algorithm, seed, final, ...)``: a run whose pass@1 rises from 0.5 to ``final`` on one benchmark."""

    def run(algorithm: str, seed: int, final: float = 0.8, *, finished: bool = True, right=None, name=None, **more):
        folder = tmp_path / (name or f"{algorithm}-{seed}")
        folder.mkdir()
        config = OmegaConf.create()
        for key, value in settings(algorithm, seed, **more).items():
            OmegaConf.update(config, key, value, force_add=True)
        OmegaConf.save(config, folder / runs.CONFIG_FILE)
        rows = [{"step": 0, "val-core/toy/acc/mean@4": 0.5, "val-core/toy/acc/best@4/mean": 0.7}]
        for step in range(1, 21):
            rows.append(
                {
                    "step": step,
                    "critic/score/mean": step / 20,
                    "actor/entropy": 1 / step,
                    "disco/kl": 1e-4,
                    "response_length/mean": 10.0,
                    "training/mixed_questions": 0.5,
                    "timing_s/step": 100.0 if step < 6 else 4.0,
                    "timing_s/update_actor": 1.0,
                    "timing_s/old_log_prob": 0.5,
                    "perf/total_num_tokens": 800,
                }
            )
        rows[10]["val-core/toy/acc/mean@4"] = 0.9
        rows[15]["val-core/toy/acc/mean@4"] = 0.7
        rows[20] |= {"val-core/toy/acc/mean@4": final, "val-core/toy/acc/best@4/mean": 0.95}
        text = "\n".join(json.dumps(r) for r in rows) + "\n"
        # A run that is still going may be in the middle of a line.
        (folder / runs.METRICS_FILE).write_text(text if finished else text + '{"step": 21, "cri')
        if finished:
            (folder / runs.FINISHED_FILE).touch()
        for step, shares in (right or {}).items():
            (folder / "validation").mkdir(exist_ok=True)
            lines = [
                {"input": question, "score": float(i < share * 4), "acc": float(i < share * 4)}
                for question, share in shares.items()
                for i in range(4)
            ]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / "validation" / f"{step}.jsonl").write_text(text)
        return folder

    return run
