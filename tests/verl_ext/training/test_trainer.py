"""The extended trainers, without Ray: registration, rewards that fail, evaluations, checkpoints."""

import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.utils import tensordict_utils as tu

from verl_ext.training import trainer
from verl_ext.training.metrics_log import as_line
from verl_ext.training.reward_loop import CountingRewardManager, Tally
from verl_ext.training.skipping import SkippingWorker
from verl_ext.training.trainer import ExtendedTrainerSync
from verl_ext.training.watch import Watch


def test_trainers_stand_in_verls_registry_under_verls_names():
    trainer.register()
    found = {name: cls.__name__ for name, cls in TRAINER_REGISTRY.items() if name in ("sync", "colocate_async")}
    assert found == {"sync": "ExtendedTrainerSync", "colocate_async": "ExtendedTrainerColocateAsync"}


def test_actors_and_critics_draw_from_the_runs_seed(bare, monkeypatch):
    def fill(self):
        self.role_worker_mapping = dict.fromkeys((Role.ActorRollout, Role.Critic, Role.RefPolicy), "verl's")

    monkeypatch.setattr(trainer.ray, "remote", lambda worker: worker)
    monkeypatch.setattr(trainer, "seeded", lambda worker, seed: (worker.__name__, seed))
    this, found = bare(_init_resource_pool_mgr=fill), {}
    for seed, skips in ((None, False), (None, True), (3, False), (3, True)):
        this.config.seed, this._skip_rows = seed, skips
        this._init_resource_pool_mgr()
        found[seed, skips] = [*this.role_worker_mapping.values()]
    assert found == {
        (None, False): ["verl's", "verl's", "verl's"],
        (None, True): [SkippingWorker, "verl's", "verl's"],
        (3, False): [("ActorRolloutRefWorker", 3), ("TrainingWorker", 3), "verl's"],
        (3, True): [("SkippingWorker", 3), ("TrainingWorker", 3), "verl's"],
    }


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


def test_the_shares_of_mixed_questions_and_of_right_ones():
    assert trainer.shares(["a", "b", "a", "b", "c"], [1.0, 0.0, 0.0, 0.0, 1.0]) == (1 / 3, 1 / 3)
    assert trainer.shares(["a", "a", "b"], [-1.0, -1.0, 0.0]) == (0, 0)
    assert trainer.shares([], []) == (0, 0)


def test_workers_fetch_the_tensors_that_they_read():
    names = ("group_id", "ids", "rm_scores", "entropy")
    row = tu.get_tensordict({name: torch.zeros(1, 3) for name in names} | {"uid": ["a"]})
    assert sorted(trainer.tensor_names(row, trainer.UNREAD)) == ["group_id", "ids"]


def test_a_reward_that_is_no_number_stops_the_run_naming_the_sample():
    def jagged(*rows):
        return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    keys = ["u_0_0", "u_1_0", "v_0_0"]
    for bad in ("nan", "inf"):
        message = rf"r.py:score, step 7: the reward of sample u_1_0 \(row 1\) is {bad}; 1 of 3 samples"
        with pytest.raises(ValueError, match=message):
            trainer.sequence_rewards(jagged([0.0, 1.0], [0.0, float(bad)], [1.0]), keys, "r.py:score, step 7")
    assert trainer.sequence_rewards(jagged([0.0, 1.0], [0.5, 0.25], [1.0]), keys, "") == [1.0, 0.75, 1.0]


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


@pytest.mark.parametrize("skips", [True, False])
def test_the_deal_and_the_workers_are_told_what_may_be_left_out(bare, monkeypatch, skips):
    told = {}

    def deal(groups, lengths, **options):
        told.update(options)
        raise StopIteration

    scores = torch.nested.as_nested_tensor([torch.tensor([r]) for r in (1.0, 1.0, 0.0, 1.0)], layout=torch.jagged)
    rows = tu.get_tensordict({"rm_scores": scores})
    monkeypatch.setattr(trainer, "read", lambda *arguments, **options: rows)
    monkeypatch.setattr(trainer, "deal", deal)
    this = bare(_update_actor=lambda self, batch, metrics: batch)
    actor = {"ppo_mini_batch_size": 2, "ppo_micro_batch_size_per_gpu": 1, "use_dynamic_bsz": True, "shuffle": False}
    rollout = {"log_prob_micro_batch_size_per_gpu": 1, "agent": {"default_agent_loop": "single_turn_agent"}}
    this.config.actor_rollout_ref = OmegaConf.merge(this.config.actor_rollout_ref, {"actor": actor, "rollout": rollout})
    this._whole_groups, this._skip_rows, this._actor_data_parallel_size = True, skips, lambda: 2
    this.processor, this.local_trigger_step, this.parameter_sync_step = None, 0, 1
    batch = SimpleNamespace(
        keys=["u_0_0", "u_1_0", "v_0_0", "v_1_0"], tags=[{"seq_len": 3}] * 4, extra_info={}, fields=None
    )
    with pytest.raises(StopIteration):
        this._balance_batch(batch, {})
    # Only the second question is mixed.
    assert told["trained"] == ([False, False, True, True] if skips else None)
    assert this._update_actor(batch, {}).extra_info["skip_rows"] == skips


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
    message = "5 of 20 rewards of step 7 failed, the first with r.py: KeyError; at most the share verl_ext"
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
    this._done, this._logger = ("batch", metrics, 0.0), SimpleNamespace(write_waiting=lambda: b"")
    this._save_checkpoint()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step_4", "global_step_7"]
    assert this.config.trainer.max_actor_ckpt_to_keep == 2
    # What verl computes of the step once more does not count twice.
    assert this._rollout_moe_lb_metrics_accumulator == [] and "critic/score/mean" not in metrics


@pytest.mark.parametrize(
    "tracker, mode, rest",
    [
        ("2", "auto", "can be, the same command continues from global_step_2"),
        ("2", "disable", "the same command with trainer.resume_mode=auto continues from global_step_2"),
        (None, "auto", "the same command begins anew"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_says_what_is_left(bare, tmp_path, tracker, mode, rest):
    def fail(self):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0")

    (tmp_path / "global_step_2/actor").mkdir(parents=True)
    if tracker:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    options = {"default_local_dir": str(tmp_path), "max_actor_ckpt_to_keep": 1, "resume_mode": mode}
    this = bare(**options, _save_checkpoint=fail)
    this._keep_row = lambda: None
    with pytest.raises(
        RuntimeError, match=f"of step 7 in .* could not be written.* GiB.*, by which torch means a full disk.*{rest}"
    ):
        this._save_checkpoint()
    # Older ones stay, and so does the setting.
    assert (tmp_path / "global_step_2/actor").is_dir() and this.config.trainer.max_actor_ckpt_to_keep == 1


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
