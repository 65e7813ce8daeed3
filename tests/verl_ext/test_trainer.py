"""The extended trainers, without Ray: registration, metrics file, rewards that are not numbers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.utils import tensordict_utils as tu

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


def test_a_fresh_run_starts_the_file_anew_and_keeps_the_old_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for run in (1, 2):
        path.write_text(f'{{"step": {run}}}\n')
        MetricsLog(Recorder(), str(path), resumed_step=0).finish()
        assert path.read_text() == ""
        assert (tmp_path / f"metrics.jsonl.{run}").read_text() == f'{{"step": {run}}}\n'


def test_a_checkpoint_evaluated_again_is_not_logged_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "val": 1}\n')
    log = MetricsLog(Recorder(), str(path), resumed_step=2)
    for step in (2, 3):
        log.log(data={"val": 5}, step=step)
    log.finish()
    assert lines(path) == [{"step": 2, "val": 1}, {"step": 3, "val": 5}]
    assert not (tmp_path / "metrics.jsonl.1").exists()


class Batch(SimpleNamespace):
    """As much of a KVBatchMeta as is asked for."""

    def __len__(self):
        return len(self.keys)

    def reorder(self, order):
        self.keys, self.tags = [self.keys[i] for i in order], [self.tags[i] for i in order]


def balanced(monkeypatch, keys, lengths, ranks=2, questions=2):
    """The batch after ``_balance_batch``, the columns written for it, and the metrics; rewards are 0, 1, 2 ..."""
    written = {}

    def put(keys, fields, partition_id):
        written.update({name: column.tolist() for name, column in fields.items()}, keys=list(keys))
        return SimpleNamespace(keys=keys)

    def pad(batch, size, eos):
        missing = size - len(batch)
        batch.keys += [f"pad{i}_0_0" for i in range(missing)]
        batch.tags += [{"seq_len": 129, "is_padding": True}] * missing
        return batch

    monkeypatch.setattr(trainer.tq, "kv_batch_put", put)
    monkeypatch.setattr(trainer, "upsample_batch_to_divisible_size", pad)
    actor = dict(ppo_mini_batch_size=questions, use_dynamic_bsz=True, shuffle=False, data_loader_seed=1)
    this = SimpleNamespace(
        _whole_groups=True,
        config=OmegaConf.create(
            {"actor_rollout_ref": {"actor": actor}, "data": {"train_batch_size": 8}, "verl_ext": {}}
        ),
        _sequence_rewards=lambda batch: [float(i) for i in range(len(batch))],
        _old_log_probs_are_fresh=lambda: True,
        _bypass_mode=lambda: False,
        _actor_data_parallel_size=lambda: ranks,
        _fixed_micro_batches=lambda: [],
        tokenizer=SimpleNamespace(eos_token_id=0),
        global_steps=1,
        local_trigger_step=1,
        parameter_sync_step=2,
    )
    batch = Batch(keys=list(keys), tags=[{"seq_len": n} for n in lengths], partition_id="train")
    metrics = {}
    return ExtendedTrainerSync._balance_batch(this, batch, metrics), written, metrics


def test_whole_questions_of_several_trajectories_with_failures_are_dealt(monkeypatch):
    # verl's keys are uid_session_trajectory. Question "a_b" has two trajectories in one session, the fourth failed.
    keys = ["a_b_0_0", "c_0_0", "a_b_0_1", "d_0_0", "c_1_0", "a_b_1_0", "d_1_0"]
    batch, written, metrics = balanced(monkeypatch, keys, [10, 20, 30, 40, 50, 60, 70])
    assert written["keys"] == batch.keys
    rows = {key: {name: written[name][i] for name in written} for i, key in enumerate(batch.keys)}
    question = {key: key.rsplit("_", 2)[0] for key in keys}
    for key in keys:
        row = rows[key]
        assert row["group_size"] == sum(q == question[key] for q in question.values())
        assert row["sequence_reward"] == row["sample_index"] == keys.index(key)
        same = {rows[k]["mini_batch_id"] for k in keys if question[k] == question[key]}
        assert same == {row["mini_batch_id"]}
        assert {k for k in keys if rows[k]["group_id"] == row["group_id"]} == {
            k for k in keys if question[k] == question[key]
        }
    assert all((row["local_step"], row["local_steps"], row["entropy_logged"]) == (1, 2, True) for row in rows.values())
    # Two mini-batches on two ranks, rank after rank, each with the same number of rows.
    assert written["mini_batch_id"] == sorted(written["mini_batch_id"][: len(batch) // 2]) * 2
    padding = [row for key, row in rows.items() if key.startswith("pad")]
    assert len(padding) == metrics["training/padding_rows"] == len(batch) - len(keys)
    assert all((row["group_id"], row["group_size"]) == (-1, 0) for row in padding)
    assert metrics["training/failed_questions"] == 1
    # Rewards are 0, 1, 2 ..., all different; all three questions that are left have several responses.
    assert metrics["training/mixed_questions"] == 1


def test_the_share_of_mixed_questions():
    assert trainer.mixed_share(["a", "b", "a", "b", "c"], [1.0, 0.0, 0.0, 0.0, 1.0]) == 1 / 3
    assert trainer.mixed_share([], []) == 0


@pytest.mark.parametrize(
    "decorator, processor, extension, seen",
    [
        (trainer.tensors_alone, None, {"verl_ext": {}}, ["group_id", "ids"]),
        (trainer.for_forward_passes, None, {"verl_ext": {}}, ["ids"]),
        (trainer.tensors_alone, 1, {"verl_ext": {}}, None),
        (trainer.tensors_alone, None, {}, None),
    ],
)
def test_workers_fetch_the_tensors_they_read_unless_there_are_images(
    monkeypatch, decorator, processor, extension, seen
):
    names = ("group_id", "ids", "rm_scores", "entropy")
    row = tu.get_tensordict({name: torch.zeros(1, 3) for name in names} | {"uid": ["a"]})
    monkeypatch.setattr(trainer.tq, "kv_batch_get", lambda **kwargs: row)
    batch = Batch(keys=["a_0_0", "b_0_0"], partition_id="train", fields=None)
    during = []
    this = SimpleNamespace(config=OmegaConf.create(extension), processor=processor)
    decorator(lambda self, batch, metrics: during.append(batch.fields and sorted(batch.fields)))(this, batch, {})
    assert during == [seen] and batch.fields is None


@pytest.mark.parametrize("bypass, trigger, fresh", [(False, 0, True), (True, 0, False), (False, 1, False)])
def test_old_log_probs_are_fresh_unless_they_are_the_rollouts_or_an_update_came_between(bypass, trigger, fresh):
    config = OmegaConf.create({"algorithm": {"rollout_correction": {"bypass_mode": bypass}}})
    # Without what a trainer's constructor starts.
    this = ExtendedTrainerSync.__new__(ExtendedTrainerSync)
    this.config, this.local_trigger_step = config, trigger
    assert ExtendedTrainerSync._old_log_probs_are_fresh(this) is fresh


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


def test_a_step_logs_the_totals_of_its_local_updates(monkeypatch):
    def step(self, metrics, timing_raw):
        for i in range(2):
            self._step_once({"training/padding_rows": i + 1, "disco/kl": 1.0}, timing_raw, 4)
        # verl's means.
        metrics.update({"training/padding_rows": 1.5, "disco/kl": 1.0})

    monkeypatch.setattr(trainer.PPOTrainerSync, "step", step)
    monkeypatch.setattr(trainer.PPOTrainerSync, "_step_once", lambda self, metrics, timing_raw, size: None)
    metrics = {}
    ExtendedTrainerSync.__new__(ExtendedTrainerSync).step(metrics, {})
    assert metrics == {"training/padding_rows": 3, "disco/kl": 1.0}
