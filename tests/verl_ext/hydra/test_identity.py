"""Whose folder a run may use: what counts as another run, what is told, and what becomes of the files there."""

import copy
import json
import os
import shutil
from pathlib import Path

import hydra
import pytest
import verl  # noqa: F401  (loads the plugin)
import yaml
from omegaconf import OmegaConf

from verl_ext.hydra import identity, inputs
from verl_ext.hydra.callbacks import before_job
from verl_ext.hydra.identity import changes_results, differences, take_folder
from verl_ext.hydra.lock import hold
from verl_ext.preflight import checks
from verl_ext.preflight.composition import Run
from verl_ext.runs import folder as runs

EVALUATION = "val-core/level_1/acc/mean@1"
HALF = {"step": 50, "actor/lr": 1, EVALUATION: 0.5}
LAST = HALF | {"step": 100}


@pytest.mark.parametrize(
    "name",
    """
    seed data.seed verl_ext.algorithm disco.score disco.delta disco.options.margin grpo.kl_coef algorithm.gamma
    algorithm.rollout_correction.bypass_mode data.train_files data.train_batch_size
    data.max_response_length data.shuffle data.dataloader_num_workers actor_rollout_ref.model.path
    actor_rollout_ref.model.lora_rank actor_rollout_ref.actor.optim.lr actor_rollout_ref.actor.optim.betas
    actor_rollout_ref.actor.ppo_mini_batch_size actor_rollout_ref.actor.ppo_epochs actor_rollout_ref.actor.strategy
    actor_rollout_ref.actor.fsdp_config.model_dtype actor_rollout_ref.actor.fsdp_config.fsdp_size
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size actor_rollout_ref.rollout.n
    actor_rollout_ref.rollout.temperature actor_rollout_ref.rollout.name
    critic.optim.lr critic.model.path reward.custom_reward_function.path trainer.nnodes trainer.n_gpus_per_node
    trainer.v1.trainer_mode trainer.v1.separate_async.parameter_sync_step trainer.critic_warmup
    reward.custom_reward_function.reward_kwargs.timeout arithmetic.iterations model
    countdown.use_all skip.rollout.enable
    """.split(),
)
def test_what_changes_results(name):
    assert changes_results(name)


@pytest.mark.parametrize(
    "name",
    """
    trainer.logger trainer.save_freq trainer.test_freq trainer.total_training_steps trainer.total_epochs
    trainer.project_name trainer.experiment_name trainer.default_local_dir trainer.validation_data_dir
    trainer.max_actor_ckpt_to_keep trainer.val_before_train trainer.val_only trainer.resume_mode
    trainer.ray_wait_register_center_timeout ray_kwargs.ray_init.num_cpus ray_kwargs.ray_init.runtime_env.env_vars.X
    transfer_queue.backend.SimpleStorage.num_data_storage_units global_profiler.steps
    actor_rollout_ref.actor.profiler.save_path actor_rollout_ref.nccl_timeout
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu actor_rollout_ref.actor.ppo_max_token_len_per_gpu
    actor_rollout_ref.actor.use_dynamic_bsz actor_rollout_ref.actor.fsdp_config.param_offload
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity
    actor_rollout_ref.model.enable_gradient_checkpointing actor_rollout_ref.rollout.gpu_memory_utilization
    actor_rollout_ref.rollout.max_num_seqs actor_rollout_ref.rollout.tensor_model_parallel_size
    actor_rollout_ref.rollout.checkpoint_engine.backend actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu
    actor_rollout_ref.rollout.agent.num_workers reward.num_workers reward.sandbox_fusion.url
    data.val_files data.val_max_samples actor_rollout_ref.rollout.val_kwargs.n
    actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size actor_rollout_ref.rollout.engine_kwargs.vllm.x
    actor_rollout_ref.ref.megatron.tensor_model_parallel_size verl_ext.same_run
    verl_ext.reward_timeout verl_ext.gpu_memory verl_ext.prepare arithmetic.folder math.folder
    countdown.folder gsm8k.folder critic.ppo_micro_batch_size_per_gpu
    """.split(),
)
def test_what_does_not(name):
    assert not changes_results(name)


def test_a_setting_is_the_same_however_it_is_written():
    before = {"a": 10, "n": "1", "b": [1, 2.0], "c": None, "d": {}, "f": float("nan"), "p": "data/x", "q": "~/x"}
    now = {"a": 10.0, "n": 1, "b": [1.0, 2], "d": None, "e": {}, "f": float("nan"), "p": f"{os.getcwd()}/data/x"}
    assert differences(before, now | {"q": os.path.expanduser("~/x")}) == {}
    assert differences({"a": "1", "b": [1], "c": False}, {"a": 2, "b": [1, 2], "c": None}).keys() == {"a", "b", "c"}
    ranks = [{"trainer.nnodes": n, "trainer.n_gpus_per_node": g} for n, g in ((1, 8), (2, 4), (2, 8))]
    assert differences(*ranks[:2]) == {} and differences(*ranks[1:]) == {identity.RANKS: (8, 16)}


def test_a_project_may_be_moved():
    def settings(root: str, data: str) -> dict:
        return {"trainer.default_local_dir": f"{root}/out/run", "data.train_files": [f"{root}/{data}"]}

    assert differences(settings("/old", "a"), settings("/new/place", "a")) == {}
    assert differences(settings("/old", "a"), settings("/new", "b")).keys() == {"data.train_files"}


def test_secrets_are_not_shown():
    name = "ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY"
    assert identity.describe({name: ("old-secret", "new-secret")}) == f"{name}=*** (that run: ***)"


# Starts ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed():
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", ["algorithm=disco", "+experiment=arithmetic_cpu", "verl_ext.prepare=null"])


@pytest.fixture
def start(composed, tmp_path, monkeypatch, capsys):
    """``start("seed=2", ...)``: what a job does before verl's main, in ``tmp_path/run``; what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    # Model and data are not there.
    monkeypatch.setitem(checks.CHECKS, checks.Needs.FILES, [])

    def run(*overrides: str) -> str:
        config = copy.deepcopy(composed)
        given = dict(
            o.split("=", 1)
            for o in (f"trainer.default_local_dir={tmp_path}/run", "trainer.experiment_name=x", *overrides)
        )
        for name, value in given.items():
            OmegaConf.update(config, name, yaml.safe_load(value), force_add=True)
        before_job(Run(config, config), given).release()
        return capsys.readouterr().out

    return run


@pytest.fixture
def half(start, tmp_path) -> Path:
    """The folder of a run that got to step 50 of 100."""
    start()
    run = tmp_path / "run"
    logged(run)
    return run


def logged(run: Path, *rows: dict) -> None:
    """As if the run there had got so far, with a checkpoint of the last row's step."""
    rows = rows or (HALF,)
    (run / runs.METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / runs.CHECKPOINT_FILE).write_text(str(rows[-1]["step"]))
    (run / f"global_step_{rows[-1]['step']}/actor").mkdir(parents=True, exist_ok=True)


def content(folder: Path) -> dict[str, bytes]:
    files = [f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".lock")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


ASYNC = ("trainer.v1.trainer_mode=colocate_async", "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null")


@pytest.mark.parametrize("mode", ["auto", "resume_path"])
@pytest.mark.parametrize(
    "overrides, message",
    [
        (["disco.score=l_ratio"], "another run: disco.score=l_ratio .that run: log_l.; choose another folder, or"),
        (["seed=2"], "another run: seed=2 .that run: 1.; choose another folder, or trainer.resume_mode=disable to"),
        (["verl_ext.algorithm=grpo"], "another run: verl_ext.algorithm=grpo .that run: disco.; choose"),
        (["trainer.nnodes=2"], r"another run: trainer.nnodes x trainer.n_gpus_per_node=4 .that run: 2.; choose"),
        (ASYNC, "another run: .*trainer.v1.trainer_mode=colocate_async .that run: sync.; choose"),
        (["reward.custom_reward_function.reward_kwargs.x=1"], r"kwargs.x=1 .that run: \(not set\).; choose"),
        (["trainer.total_training_steps=49"], "trainer.total_training_steps=49, but .*/run is already at step 50"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_nothing_is_changed(start, half, overrides, message, mode):
    """The finished run was "resumed", nothing trained, and its settings were replaced."""
    before = content(half)
    mode = [f"trainer.resume_mode={mode}", f"trainer.resume_from_path={half}/global_step_50"]
    with pytest.raises(ValueError, match=message):
        start(*mode, *overrides)
    assert content(half) == before
    # The run itself goes on.
    start(*mode)


def test_many_differences_are_counted(start, half):
    many = [f"disco.{name}=7" for name in ("beta", "coefficient", "delta", "rho", "scale", "tau", "top_share")]
    with pytest.raises(ValueError) as e:
        start(*many[:6], "data.shuffle=false", "seed=2", "data.train_batch_size=8", "data.truncation=left")
    assert str(e.value).count(" (that run: ") == identity.MOST_SHOWN and "; and 2 more; choose" in str(e.value)


def test_a_run_without_a_checkpoint_is_not_replaced_either(start, half):
    (half / runs.CHECKPOINT_FILE).unlink()
    shutil.rmtree(half / "global_step_50")
    with pytest.raises(ValueError, match="holds another run: seed=2 .that run: 1"):
        start("seed=2")
    # Of one that never trained, nothing can be lost.
    (half / runs.METRICS_FILE).write_text("")
    start("seed=2")


def test_what_another_version_sets_does_not_count(start, half):
    config = OmegaConf.load(half / runs.CONFIG_FILE)
    del config.disco["delta"]
    del config.actor_rollout_ref.actor.policy_loss.disco["delta"]
    OmegaConf.save(config, half / runs.CONFIG_FILE)
    assert f"resuming {half} with disco.delta=0.001, was (not set)" in start()


def test_what_changes_no_results_is_told(start, half):
    out = start("trainer.total_training_steps=200", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8")
    assert f"verl-disco: resuming {half} with trainer.total_training_steps=200, was 100" in out
    assert f"resuming {half} with actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8, was 32" in out
    assert "is at step 50 of 50: nothing is left to train" in start("trainer.total_training_steps=50")


def test_a_run_that_starts_anew_moves_the_old_ones_files_aside(start, half):
    (half / "validation").mkdir()
    for name in ("validation/50.jsonl", "global_step_50/actor/x", "metrics.jsonl.1", "log.txt", "mine.txt"):
        (half / name).write_text(name)
    before = content(half)
    out = start("trainer.resume_mode=disable", "seed=2")
    assert f"moved the run in {half} to {half}/earlier_1" in out
    stays = {"log.txt", "mine.txt"}
    assert content(half / "earlier_1") == {n: b for n, b in before.items() if n not in stays}
    assert content(half).keys() - {f"earlier_1/{n}" for n in before} == {*stays, runs.CONFIG_FILE, runs.INPUTS_FILE}
    assert OmegaConf.load(half / runs.CONFIG_FILE).seed == 2
    logged(half)
    start("trainer.resume_mode=disable", "seed=3")
    assert OmegaConf.load(half / "earlier_2" / runs.CONFIG_FILE).seed == 2


def test_a_checkpoint_of_another_run_is_a_new_runs_start(start, half, tmp_path):
    (half / "global_step_10").mkdir()
    common = [f"trainer.default_local_dir={tmp_path}/new", "trainer.resume_mode=resume_path"]
    at = f"trainer.resume_from_path={half}/global_step"
    for wrong in (f"{at}_60", f"trainer.resume_from_path={half}", "trainer.resume_from_path=null"):
        with pytest.raises(ValueError, match="is not a checkpoint; .* needs an existing folder"):
            start(*common, wrong)
    for unloadable in ("trainer.n_gpus_per_node=1", "actor_rollout_ref.model.lora_rank=8", ASYNC[0]):
        with pytest.raises(ValueError, match="/global_step_50 cannot be loaded with .*that run: (2|0|sync).; use"):
            start(*common, f"{at}_50", ASYNC[1], unloadable)
    out = start(*common, f"{at}_50", "seed=2")
    assert f"starting from {half}/global_step_50 with other settings: seed=2 (that run: 1)" in out
    logged(tmp_path / "new", HALF | {"step": 60})
    with pytest.raises(ValueError, match=f"new holds another run: trainer.resume_from_path={half}/global_step_10 "):
        start(*common, f"{at}_10", "seed=2")
    # By itself it goes on.
    start(*common[:1], "seed=2")


def test_where_the_settings_are_unknown_the_shards_tell_the_number_of_ranks(start, half):
    (half / runs.CONFIG_FILE).unlink()
    for rank in range(2):
        (half / f"global_step_50/actor/model_world_size_2_rank_{rank}.pt").touch()
    with pytest.raises(ValueError, match=r"trainer.n_gpus_per_node=4, but .*/global_step_50 was written by 2 ranks"):
        start("trainer.nnodes=2")
    assert f"the run in {half} has no config.yaml, so its settings cannot be compared" in start()


@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 0.7, "lines", "a: [b\n"])
def test_a_broken_file_of_settings_is_named(start, half, part):
    """A truncated one was a run of algorithm=ppo."""
    file = half / runs.CONFIG_FILE
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    broken = {"lines": "".join(lines[: lines.index("trainer:\n")]), "a: [b\n": "a: [b\n"}
    file.write_text(broken.get(part) or text[: int(part * len(text))])
    with pytest.raises(ValueError, match=f"{file} .*; without it the run in {half} cannot be compared"):
        start()
    before = file.read_bytes()
    start("trainer.resume_mode=disable")
    assert (half / "earlier_1" / runs.CONFIG_FILE).read_bytes() == before


def test_settings_are_written_whole_or_not_at_all(start, half, monkeypatch):
    before = content(half)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        start("trainer.total_training_steps=200")
    assert content(half) == before


def test_a_file_of_the_users_own_is_not_replaced(start, tmp_path):
    (tmp_path / "config.yaml").write_text("optimizer: {lr: 1}\n")
    with pytest.raises(ValueError, match="has a config.yaml that does not belong to a run"):
        start(f"trainer.default_local_dir={tmp_path}")
    assert (tmp_path / "config.yaml").read_text() == "optimizer: {lr: 1}\n"


def test_a_folder_in_use_is_refused(start, tmp_path):
    lock = hold(tmp_path / "run")
    with pytest.raises(ValueError, match=f"{tmp_path}/run is in use by process {os.getpid()} on "):
        start()
    lock.release()
    # A start that was refused gives it back.
    with pytest.raises(ValueError, match="is not a checkpoint"):
        start("trainer.resume_mode=resume_path")
    start()


def test_a_folder_that_cannot_be_is_named(start, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"trainer.default_local_dir={tmp_path}/file/run cannot be "):
        start(f"trainer.default_local_dir={tmp_path}/file/run")


def test_a_folder_of_which_nothing_is_known_is_free(composed, tmp_path):
    take_folder(composed, tmp_path / "nothing")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    take_folder(composed, tmp_path / "mine")


# Finished -------------------------------------------------------------------------------------------------------------

VAL_ONLY = {"val_only": True}


@pytest.mark.parametrize(
    "rows, settings, left",
    [
        ([HALF, LAST], {}, ""),
        ([HALF, LAST], VAL_ONLY, ""),
        ([HALF, LAST], {"total_training_steps": None}, ""),
        ([HALF | {"step": 0}, HALF], {}, "step 50 of 100 is the last in metrics.jsonl"),
        ([HALF | {"step": 0}, HALF], VAL_ONLY, "step 50 of 100 is the last in metrics.jsonl"),
        ([HALF, {"step": 100, "actor/lr": 1}], {}, "the evaluation of step 100 is not in metrics.jsonl"),
        ([HALF, {"step": 100, "actor/lr": 1}, {"step": 100, EVALUATION: 0}], {}, ""),
        ([HALF, {"step": 100, "actor/lr": 1}], {"test_freq": -1}, ""),
        ([{"step": 0, EVALUATION: 0.5}], VAL_ONLY, ""),
        ([{"step": 0, EVALUATION: 0.5, "validation/failed_rewards": 0}], VAL_ONLY, ""),
        ([{"step": 0, EVALUATION: 0.5}], {}, "step 0 of 100 is the last in metrics.jsonl"),
        ([{"step": 1, "actor/lr": 1}], VAL_ONLY, "no evaluation is in metrics.jsonl"),
        ([], {}, "step 0 of 100 is the last in metrics.jsonl"),
    ],
)
def test_a_run_is_finished_when_its_metrics_say_so(tmp_path, rows, settings, left):
    """An evaluation alone in the folder of a half-trained run, or none at its end, made it ``finished``."""
    logged(tmp_path, *rows) if rows else (tmp_path / runs.METRICS_FILE).touch()
    trainer = {"val_only": False, "total_training_steps": 100, "test_freq": 25} | settings
    assert runs.what_is_left(tmp_path, OmegaConf.create({"trainer": trainer})) == left


def test_damaged_metrics_are_no_end_of_a_run(tmp_path):
    (tmp_path / runs.METRICS_FILE).write_text('{"step": "x"}\n')
    with pytest.raises(ValueError, match="line 1, has step='x'"):
        runs.what_is_left(tmp_path, OmegaConf.create({"trainer": {"test_freq": -1}}))


def test_the_quickstart_asks_for_a_runs_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    overrides = ["algorithm=disco", "+experiment=arithmetic_cpu", "disco.tau=3"]
    assert identity.main(overrides) == 0
    folder = tmp_path / "outputs/arithmetic/disco,disco.tau=3,seed=1"
    assert capsys.readouterr().out.splitlines()[-1] == f"unfinished {folder}"
    overrides.append(f"trainer.default_local_dir='{tmp_path}/a run'")
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / runs.FINISHED_FILE).touch()
    (tmp_path / "a run" / runs.CONFIG_FILE).write_text("a: [b\n")
    assert identity.main(overrides) == 1
    assert "config.yaml cannot be read as settings" in capsys.readouterr().err


def test_what_says_that_it_is_the_same_run_goes_on(start, half):
    with pytest.raises(ValueError, match="or this folder with [+][+]verl_ext.same_run=true"):
        start("data.train_batch_size=8")
    out = start("data.train_batch_size=8", "verl_ext.same_run=true")
    assert f"resuming {half} with data.train_batch_size=8, was 16" in out


def test_an_evaluation_does_not_move_a_trained_run_aside(start, half):
    (half / "global_step_50").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="trainer.val_only=true with trainer.resume_mode=disable would evaluate"):
        start("trainer.val_only=true", "trainer.resume_mode=disable")
    assert not list(half.glob("earlier_*"))


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> list[str]:
    for split in ("train", "val"):
        (tmp_path / f"{split}.parquet").write_bytes(split.encode() * 1000)
    return [f"data.{split}_files={tmp_path}/{split}.parquet" for split in ("train", "val")]


def test_changed_training_data_is_refused_and_changed_test_data_is_told(start, data, tmp_path):
    start(*data)
    run = tmp_path / "run"
    logged(run)
    (run / runs.FINISHED_FILE).touch()
    start(*data)
    (tmp_path / "val.parquet").write_bytes(b"other")
    assert f"warning: {data[1]} changed since the run in {run} began" in start(*data)
    assert "warning" not in start(*data)
    (tmp_path / "train.parquet").write_bytes(b"other")
    before = content(run)
    with pytest.raises(ValueError, match="train.parquet changed since the run in .* restore the data, choose another"):
        start(*data)
    assert content(run) == before
    start(*data, "verl_ext.same_run=true")
    start(*data)


def test_an_evaluation_on_changed_training_data_does_not_make_it_the_runs(start, data, tmp_path):
    start(*data)
    logged(tmp_path / "run")
    (tmp_path / "train.parquet").write_bytes(b"other")
    assert f"warning: {data[0]} changed" in start(*data, "trainer.val_only=true")
    with pytest.raises(ValueError, match="train.parquet changed since"):
        start(*data)


def test_data_that_is_built_anew_is_compared(start, data, tmp_path, monkeypatch):
    file, name = tmp_path / "train.parquet", "verl_ext.tasks.arithmetic.assets.ensure_assets"

    def build(content):
        file.unlink()
        monkeypatch.setattr(name, lambda config: file.write_bytes(content))
        start(*data, f"verl_ext.prepare={name}")

    build(b"one")
    logged(tmp_path / "run")
    build(b"one")
    with pytest.raises(ValueError, match="train.parquet changed since"):
        build(b"another")


def test_a_run_that_began_without_a_local_file_takes_it(start, data, tmp_path):
    start(*data)
    run = tmp_path / "run"
    logged(run)
    (run / runs.INPUTS_FILE).write_text('{"train": [], "val": []}')
    assert "changed" not in start(*data)
    assert json.loads((run / runs.INPUTS_FILE).read_text())["train"]


def test_each_data_file_is_read_once_at_a_start(start, data, tmp_path, monkeypatch):
    read = []
    digest = inputs._digest
    monkeypatch.setattr(inputs, "_digest", lambda path: read.append(path) or digest(path))
    start(*data)
    logged(tmp_path / "run")
    start(*data)
    assert sorted(read) == sorted([f"{tmp_path}/train.parquet", f"{tmp_path}/val.parquet"] * 2)


def test_data_that_cannot_be_compared_is_told_and_a_new_run_takes_any(start, data, tmp_path):
    start(*data)
    run = tmp_path / "run"
    # Before its first step it is no run yet.
    (tmp_path / "train.parquet").write_bytes(b"other")
    start(*data)
    logged(run)
    (run / runs.INPUTS_FILE).write_text("{")
    assert "warning" in start(*data) and json.loads((run / runs.INPUTS_FILE).read_text())["train"]
    (tmp_path / "train.parquet").write_bytes(b"another")
    start(*data, "trainer.resume_mode=disable")
    assert json.loads((run / "earlier_1" / runs.INPUTS_FILE).read_text())["train"]


def test_the_quickstart_answers_a_misspelt_setting_with_the_nearest(capsys):
    from verl_ext.hydra import identity

    assert identity.main(["algorithm=disco", "+experiment=arithmetic_cpu", "disco.detla=1"]) == 1
    assert "there is no setting disco.detla; nearest: disco.delta" in capsys.readouterr().err
