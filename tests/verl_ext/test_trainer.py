"""The extended trainers, without Ray: registration, metrics file, rewards that are not numbers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

from verl_ext import trainer
from verl_ext.trainer import ExtendedTrainerSync, MetricsLog


class Recorder:
    def __init__(self):
        self.logged = []

    def log(self, data, step):
        self.logged.append((step, data))

    def finish(self, exit_code=0):
        self.code = exit_code


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_trainers_stand_in_verls_registry_under_verls_names():
    trainer.register()
    found = {name: cls.__name__ for name, cls in TRAINER_REGISTRY.items() if name in ("sync", "colocate_async")}
    assert found == {"sync": "ExtendedTrainerSync", "colocate_async": "ExtendedTrainerColocateAsync"}


def test_a_renamed_verl_trainer_is_reported(monkeypatch):
    monkeypatch.setattr(trainer, "TRAINER_REGISTRY", {})
    with pytest.raises(RuntimeError, match="no longer registers its trainer PPOTrainerSync"):
        trainer.register()


def test_metrics_go_to_verls_loggers_and_to_the_file(tmp_path):
    path, tracking = tmp_path / "run" / "metrics.jsonl", Recorder()
    log = MetricsLog(tracking, str(path), resumed_step=0)
    log.log(data={"a": 1.5, "b": np.float32(2), "c": torch.tensor(3.0)}, step=1)
    log.log(data={"a": float("nan")}, step=2)
    log.finish(exit_code=0)
    assert [s for s, _ in tracking.logged] == [1, 2] and tracking.code == 0
    assert lines(path) == [{"step": 1, "a": 1.5, "b": 2.0, "c": 3.0}, {"step": 2, "a": None}]


def test_a_resumed_run_appends_and_drops_steps_that_it_runs_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(Recorder(), str(path), resumed_step=0)
    for step in range(5):
        log.log(data={"a": step}, step=step)
    log.finish()
    with path.open("a") as f:
        f.write('{"step": 5, "a"')  # cut off in the middle of a line
    log = MetricsLog(Recorder(), str(path), resumed_step=2)
    log.log(data={"a": 30}, step=3)
    log.finish()
    assert lines(path) == [{"step": s, "a": a} for s, a in ((0, 0), (1, 1), (2, 2), (3, 30))]


def test_a_fresh_run_starts_the_file_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsLog(Recorder(), str(path), resumed_step=0).finish()
    assert path.read_text() == ""


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_stops_the_run_naming_the_sample(monkeypatch, bad):
    scores = [torch.tensor([0.0, 1.0]), torch.tensor([0.0, bad]), torch.tensor([1.0])]
    data = {"rm_scores": torch.nested.as_nested_tensor(scores, layout=torch.jagged)}
    monkeypatch.setattr(trainer.tq, "kv_batch_get", lambda **kwargs: data)
    batch = SimpleNamespace(keys=["u_0_0", "u_1_0", "v_0_0"], partition_id="train")
    with pytest.raises(ValueError, match=r"reward of sample u_1_0 \(row 1\) is (nan|inf); 1 of 3 .* step 7"):
        ExtendedTrainerSync._sequence_rewards(SimpleNamespace(global_steps=7), batch)
    scores[1] = torch.tensor([0.5, 0.25])
    data["rm_scores"] = torch.nested.as_nested_tensor(scores, layout=torch.jagged)
    assert ExtendedTrainerSync._sequence_rewards(SimpleNamespace(global_steps=7), batch) == [1.0, 0.75, 1.0]
