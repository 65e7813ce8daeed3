"""The extended trainers, without Ray: registration, rewards that fail, evaluations, checkpoints."""

import json
from types import SimpleNamespace

import pytest
import torch
import transfer_queue
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.utils import tensordict_utils as tu

from verl_ext.training import trainer
from verl_ext.training.metrics_log import as_line
from verl_ext.training.reward_loop import CountingRewardManager, Tally
from verl_ext.training.trainer import ExtendedTrainerSync
from verl_ext.training.watch import Watch


def test_trainers_stand_in_verls_registry_under_verls_names():
    trainer.register()
    found = {name: cls.__name__ for name, cls in TRAINER_REGISTRY.items() if name in ("sync", "colocate_async")}
    assert found == {"sync": "ExtendedTrainerSync", "colocate_async": "ExtendedTrainerColocateAsync"}


def test_a_renamed_verl_trainer_is_reported(monkeypatch):
    monkeypatch.setattr(trainer, "TRAINER_REGISTRY", {})
    with pytest.raises(RuntimeError, match="no longer registers its trainer PPOTrainerSync"):
        trainer.register()


def test_verls_trainers_build_the_reward_workers_that_count(monkeypatch):
    trainer.register()
    assert trainer_base.RewardLoopManager is CountingRewardManager
    monkeypatch.delattr(trainer_base, "RewardLoopManager")
    with pytest.raises(RuntimeError, match="no longer uses its RewardLoopManager"):
        trainer.register()


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

    monkeypatch.setattr(transfer_queue, "kv_batch_put", put)
    monkeypatch.setattr(trainer, "upsample_batch_to_divisible_size", pad)
    actor = dict(ppo_mini_batch_size=questions, use_dynamic_bsz=True, shuffle=False, data_loader_seed=1, ppo_epochs=1)
    rollout = {"agent": {"default_agent_loop": "my_agent"}}
    this = SimpleNamespace(
        _whole_groups=True,
        config=OmegaConf.create(
            {"actor_rollout_ref": {"actor": actor, "rollout": rollout}, "data": {"train_batch_size": 8}, "verl_ext": {}}
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
        _mini_batches=0,
    )
    batch = Batch(keys=list(keys), tags=[{"seq_len": n} for n in lengths], partition_id="train")
    metrics = {}
    return ExtendedTrainerSync._balance_batch(this, batch, metrics), written, metrics


@pytest.mark.parametrize(
    "keys",
    [["a_0_0", "a_0_1"], ["a-b_0_0", "c_0_0", "a-b_1_0", "c_1_0", "c_1_2"], ["a_0_3", "b_0_0", "a_0_0"]],
)
def test_several_trajectories_in_a_session_are_refused(monkeypatch, keys):
    message = (
        r"2 trajectories for one session \((a_0|c_1)\).* actor_rollout_ref.rollout.agent.default_agent_loop=my_agent"
    )
    with pytest.raises(ValueError, match=message):
        balanced(monkeypatch, keys, [10] * len(keys))


def test_a_key_of_unknown_shape_is_refused_not_taken_for_a_group(monkeypatch):
    with pytest.raises(ValueError, match=r"the key 'a_sess1_0' of a batch is not of the shape"):
        balanced(monkeypatch, ["a_0_0", "a_sess1_0"], [10, 10])


def test_whole_questions_with_failures_are_dealt(monkeypatch):
    # verl's keys are uid_session_trajectory. Question "a-b" has three responses, the fourth question failed.
    keys = ["a-b_0_0", "c_0_0", "a-b_10_0", "d_0_0", "c_1_0", "a-b_1_0", "d_1_0"]
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


def test_the_shares_of_mixed_questions_and_of_right_ones():
    assert trainer.shares(["a", "b", "a", "b", "c"], [1.0, 0.0, 0.0, 0.0, 1.0]) == (1 / 3, 1 / 3)
    assert trainer.shares(["a", "a", "b"], [-1.0, -1.0, 0.0]) == (0, 0)
    assert trainer.shares([], []) == (0, 0)


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
    monkeypatch.setattr(transfer_queue, "kv_batch_get", lambda **kwargs: row)
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
    monkeypatch.setattr(transfer_queue, "kv_batch_get", lambda **kwargs: data)
    batch = SimpleNamespace(keys=["u_0_0", "u_1_0", "v_0_0"], partition_id="train")
    this = SimpleNamespace(global_steps=7, config=settings())
    message = r"custom_reward_function=r.py:score: the reward of sample u_1_0 \(row 1\) is (nan|inf); 1 of 3 .* step 7"
    with pytest.raises(ValueError, match=message):
        ExtendedTrainerSync._sequence_rewards(this, batch)
    scores[1] = torch.tensor([0.5, 0.25])
    data["rm_scores"] = torch.nested.as_nested_tensor(scores, layout=torch.jagged)
    assert ExtendedTrainerSync._sequence_rewards(this, batch) == [1.0, 0.75, 1.0]


def settings(**trainer):
    reward = {
        "custom_reward_function": {"path": "r.py", "name": "score"},
        "reward_model": {"enable": False},
        "reward_manager": {"name": "naive"},
    }
    rollout = {"n": 4, "temperature": 1.0}
    actor = {"strategy": "fsdp2", "checkpoint": {"load_contents": ["model"]}, "optim": {"lr": 1e-6}}
    return OmegaConf.create(
        {
            "verl_ext": {},
            "reward": reward,
            "data": {"train_batch_size": 4, "max_response_length": 12},
            "actor_rollout_ref": {"rollout": rollout, "actor": actor},
            "trainer": {"val_before_train": False, "val_only": False, "test_freq": -1, "resume_mode": "auto"} | trainer,
        }
    )


@pytest.fixture
def bare(monkeypatch):
    """``bare(tallies, trainer settings..., name=verl's method)``: a trainer without what its constructor starts."""

    def make(tallies=(), **options):
        verls = {k: v for k, v in options.items() if callable(v)}
        for name, function in verls.items():
            monkeypatch.setattr(trainer.PPOTrainerSync, name, function)
        this = ExtendedTrainerSync.__new__(ExtendedTrainerSync)
        this.config = settings(**{k: v for k, v in options.items() if k not in verls})
        this._rewards, this._watch, this._checkpoints_are_elsewhere = Tally(), Watch(this.config), False
        this._most_failed_rewards = trainer.most_failed_rewards(this.config)
        this.global_steps, this.total_training_steps, this.use_critic = 7, 10, False
        tallies = list(tallies)
        this.reward_loop_manager = SimpleNamespace(take_tally=lambda: tallies.pop(0) if tallies else Tally())
        return this

    return make


MIXED = {"training/mixed_questions": 0.5, "training/right_questions": 0.0}


def test_a_step_logs_the_totals_of_its_local_updates(bare, monkeypatch):
    def step(self, metrics, timing_raw):
        for i in range(2):
            self._step_once({"training/padding_rows": i + 1, "disco/kl": 1.0}, timing_raw, 4)
        # verl's means.
        metrics.update({"training/padding_rows": 1.5, "disco/kl": 1.0} | MIXED)

    monkeypatch.setattr(trainer.PPOTrainerSync, "_step_once", lambda self, metrics, timing_raw, size: None)
    metrics = {}
    bare(step=step).step(metrics, {})
    assert metrics == {"training/padding_rows": 3, "disco/kl": 1.0, "training/failed_rewards": 0} | MIXED


def test_failed_rewards_are_counted_and_the_first_ones_text_is_shown_once_per_step(bare, capsys):
    tallies = [Tally(20, 1, "r.py: KeyError"), Tally(20, 0), Tally(20, 2, "r.py: TypeError")]
    this = bare(tallies, step=lambda self, metrics, timing: metrics.update(MIXED))
    counts = []
    for step in (7, 8, 9):
        this.global_steps, metrics = step, {}
        this.step(metrics, {})
        counts.append(metrics["training/failed_rewards"])
    assert counts == [1, 0, 2]
    lines = [line for line in capsys.readouterr().out.splitlines() if "rewards" in line]
    assert lines == [
        "verl-disco: warning: 1 of 20 rewards of step 7 failed, the first with r.py: KeyError",
        "verl-disco: warning: 2 of 20 rewards of step 9 failed, the first with r.py: TypeError",
    ]


@pytest.mark.parametrize("most, stops", [(None, True), (0.5, False), (0.0, True), (1.0, False), (0.2, True)])
def test_a_run_with_too_many_failed_rewards_stops(bare, most, stops):
    this = bare([Tally(20, 5, "r.py: KeyError")], step=lambda self, metrics, timing: metrics.update(MIXED))
    if most is not None:
        this.config.verl_ext.max_failed_rewards = most
        this._most_failed_rewards = trainer.most_failed_rewards(this.config)
    if not stops:
        return this.step({}, {})
    message = "5 of 20 rewards of step 7 failed, the first with r.py: KeyError; verl_ext.max_failed_rewards="
    with pytest.raises(ValueError, match=message):
        this.step({}, {})


@pytest.mark.parametrize("most", [-0.1, 1.5, "many", float("nan"), True, [0.1]])
def test_a_share_of_failed_rewards_that_is_none_is_refused(most):
    with pytest.raises(ValueError, match="verl_ext.max_failed_rewards=.* must be a number from 0"):
        trainer.most_failed_rewards(OmegaConf.create({"verl_ext": {"max_failed_rewards": most}}))


def test_failed_rewards_are_told_where_verl_finds_no_response_at_all(bare):
    def step(self, metrics, timing_raw):
        raise RuntimeError("selected terminal groups with no materializable trajectories")

    with pytest.raises(ValueError, match="16 of 16 rewards of step 7 failed, the first with r.py: KeyError"):
        bare([Tally(16, 16, "r.py: KeyError")], step=step).step({}, {})
    with pytest.raises(RuntimeError, match="no materializable"):
        bare([Tally(16, 0)], step=step).step({}, {})


def test_verls_endless_replacing_of_questions_with_failed_rewards_is_stopped(bare):
    this = bare([Tally(8, 8, "r.py: KeyError"), Tally(8, 2, "later")])
    # Too few to judge by: a batch has 4 questions of 4 responses.
    this._on_failed_questions()
    with pytest.raises(ValueError, match="10 of 16 rewards of step 7 failed, the first with r.py: KeyError"):
        this._on_failed_questions()
    # What was looked at in between is in the step's count.
    this = bare([Tally(8, 1, "first"), Tally(32, 1, "second")], step=lambda self, m, timing: m.update(MIXED))
    this._on_failed_questions()
    metrics = {}
    this.step(metrics, {})
    assert metrics["training/failed_rewards"] == 2


def test_failed_rewards_of_an_evaluation_are_counted_apart(bare, capsys):
    def validate(self):
        return {"val-core/x": 1.0}

    tallies = [Tally(5, 0), Tally(20, 1, "r.py: KeyError"), Tally(11, 1, "r.py: TypeError")]
    this = bare(tallies, _validate=validate, step=lambda self, metrics, timing: metrics.update(MIXED))
    assert this._validate() == {"val-core/x": 1.0, "validation/failed_rewards": 1}
    assert "1 of 20 rewards of the evaluation at step 7 failed" in capsys.readouterr().out
    metrics = {}
    this.step(metrics, {})
    assert metrics["training/failed_rewards"] == 1
    assert "1 of 16 rewards of step 7" in capsys.readouterr().out
    with pytest.raises(ValueError, match="9 of 9 rewards of the evaluation at step 7 failed"):
        bare([Tally(), Tally(9, 9, "x")], _validate=validate)._validate()


def test_a_step_says_in_words_when_nothing_is_mixed(bare, capsys):
    def step(self, metrics, timing_raw):
        metrics.update({"training/mixed_questions": 0.0, "training/right_questions": 0.0})

    this = bare(step=step)
    for _ in range(12):
        this.step({}, {})
    assert capsys.readouterr().out.count("verl-disco: warning: for 5 steps all responses have been wrong") == 1


@pytest.mark.parametrize(
    "options, logged, evaluates",
    [
        (dict(test_freq=5), [(10, {"a": 1})], True),
        (dict(test_freq=3), [], True),
        (dict(test_freq=3), [(10, {"val-core/x": 1})], False),
        (dict(test_freq=-1), [], False),
        (dict(test_freq=3, resume_mode="disable"), [], False),
        (dict(val_only=True), [(10, {"val-core/x": 1})], True),
        (dict(val_only=True, val_before_train=True), [], True),
    ],
    ids=["interrupted", "last step", "done", "none wanted", "not resumed", "val_only", "verl's val_only"],
)
def test_the_evaluation_that_was_interrupted_is_made_up_for(bare, tmp_path, options, logged, evaluates):
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(as_line(*row) for row in logged))
    seen = []
    this = bare(
        default_local_dir=str(tmp_path),
        fit=lambda self, manager: seen.append(self.config.trainer.val_before_train),
        **options,
    )
    this.global_steps = 10
    this.fit(None)
    assert seen == [evaluates]


def test_a_step_in_the_middle_is_evaluated_only_where_it_was_to_be(bare, tmp_path):
    seen = []
    for step in (0, 4, 5):
        this = bare(
            default_local_dir=str(tmp_path),
            test_freq=2,
            fit=lambda self, manager: seen.append(self.config.trainer.val_before_train),
        )
        this.global_steps = step
        this.fit(None)
    assert seen == [False, True, False]


def test_a_step_is_in_its_checkpoint_before_verl_names_it_and_old_ones_go_after(bare, tmp_path):
    def save(self):
        # verl must not remove any: it would do that before its tracker names the new one.
        assert self.config.trainer.max_actor_ckpt_to_keep is None
        folder = tmp_path / f"global_step_{self.global_steps}"
        row = json.loads((folder / "metrics.json").read_text())
        assert row == {"step": self.global_steps, "loss": 1.0, "critic/score/mean": 0.5, "epoch": 2, "timed": True}
        (folder / "actor").mkdir()
        assert (tmp_path / "global_step_2/actor").is_dir()

    def compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        self._rollout_moe_lb_metrics_accumulator.append(batch)
        metrics.update({"critic/score/mean": 0.5, "epoch": epoch, "timed": timing_raw["step"] > 0})

    for step in (2, 4):
        (tmp_path / f"global_step_{step}/actor").mkdir(parents=True)
    this = bare(
        default_local_dir=str(tmp_path),
        max_actor_ckpt_to_keep=2,
        _save_checkpoint=save,
        _compute_metrics=compute_metrics,
    )
    this.steps_per_epoch, this.timing_raw, this._rollout_moe_lb_metrics_accumulator = 3, {}, []
    metrics = {"loss": 1.0, trainer_base.DAPO_FILTERED_REWARD_COUNTS_KEY: {0.0: 1}}
    this._done = "batch", metrics, 0.0
    this._save_checkpoint()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step_4", "global_step_7"]
    assert this.config.trainer.max_actor_ckpt_to_keep == 2
    # What verl computes of the step once more does not count twice.
    assert this._rollout_moe_lb_metrics_accumulator == [] and "critic/score/mean" not in metrics


def test_verls_deprecated_setting_keeps_one_checkpoint(bare, tmp_path):
    this = bare(default_local_dir=str(tmp_path), max_actor_ckpt_to_keep=3, remove_previous_ckpt_in_save=True)
    with this._all_checkpoints_kept() as keep:
        assert not this.config.trainer.remove_previous_ckpt_in_save
    assert keep == {"actor": 1, "critic": 1} and this.config.trainer.remove_previous_ckpt_in_save


def test_verl_removes_checkpoints_itself_where_this_node_does_not_see_them(bare, tmp_path):
    kept = []
    this = bare(
        default_local_dir=str(tmp_path),
        max_actor_ckpt_to_keep=1,
        _save_checkpoint=lambda self: kept.append(self.config.trainer.max_actor_ckpt_to_keep),
    )
    this._keep_row = lambda: None
    for _ in range(2):
        this._save_checkpoint()
    assert kept == [None, 1]


def test_verl_loads_what_is_whole(bare, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(trainer, "name_whole_checkpoint", lambda *args, **kwargs: looked.append((args, kwargs)))
    this = bare(default_local_dir=str(tmp_path), _load_checkpoint=lambda self: looked.append("verl"))
    this.use_critic = True
    this._load_checkpoint()
    whole = (tmp_path, ["actor", "critic"]), dict(megatron=False, contents=["model"])
    assert looked == [whole, "verl"]
    this.config.trainer.resume_mode = "resume_path"
    this._load_checkpoint()
    assert looked == [whole, "verl", "verl"]
