"""What a start refuses from the overrides alone, before anything expensive."""

import hydra
import pytest
import verl  # noqa: F401  (loads the plugin)

from verl_ext.hydra.callbacks import JobCallback, before_job
from verl_ext.preflight import composition
from verl_ext.preflight.checks import Needs, examine, refuse


def start(*overrides: str) -> None:
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", list(overrides), return_hydra_config=True)
        refuse(composition.of_job(config), Needs.OVERRIDES)


DISCO = ("algorithm=disco", "+experiment=arithmetic_cpu")


@pytest.mark.parametrize(
    "override, message",
    [
        ("++data.train_batchsize=64", "data.train_batchsize is read by nothing; nearest: data.train_batch_size"),
        ("trainer.n_gpus_per_node=eight", "trainer.n_gpus_per_node=eight is wrong; use a whole number of at least 1"),
        ("data.train_batch_size=null", "data.train_batch_size=null is wrong; use a number"),
        ("data.truncation=middel", "data.truncation=middel is wrong; use one of middle, "),
    ],
)
def test_a_wrong_override_is_refused(override, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        start(*DISCO, override)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (
            ["disco.rho=10"],
            "disco.rho=10 has no effect: algorithm=disco does not read it; disco.constraint=squared_hinge",
        ),
        (["disco.constraint=none", "disco.beta=1"], "disco.beta=1 has no effect: algorithm=disco does not read it"),
        (
            ["actor_rollout_ref.actor.clip_ratio_high=0.28"],
            "has no effect: algorithm=disco does not read it; DisCO clips",
        ),
        (["actor_rollout_ref.actor.kl_loss_coef=0.01"], "does not read it; set disco.delta and disco.beta"),
        (["disco.constraint=none"], ""),
        (["disco.constraint=fixed", "disco.coefficient=1"], ""),
    ],
)
def test_what_the_method_does_not_read_is_said_at_the_start(capsys, overrides, said):
    start(*DISCO, *overrides)
    out = capsys.readouterr().out
    assert said in out and bool(said) == bool(out)


def test_what_another_method_reads_is_not_said(capsys):
    start("algorithm=grpo", "+experiment=arithmetic_cpu", "actor_rollout_ref.actor.clip_ratio_high=0.28")
    assert capsys.readouterr().out == ""


def test_right_overrides_start(capsys):
    start(*DISCO, "+data.cache_dir=/tmp", "++disco.delta=1e-3", "trainer.total_training_steps=null")
    assert capsys.readouterr().out == ""


def test_a_sweep_over_methods_goes_on(capsys):
    """README: write a method's own setting with ++, as not every job has it."""
    start("algorithm=grpo", "+experiment=arithmetic_cpu", "++disco.rho=1e-3", "++dapo.dynamic_sampling=false")
    assert "verl-disco: warning: dapo.dynamic_sampling is read by nothing in this run" in capsys.readouterr().out


@pytest.mark.parametrize("run", [DISCO, ()])
def test_what_verl_ignores_is_said_at_the_start(capsys, run):
    start(*run, "trainer.balance_batch=false", "actor_rollout_ref.actor.grad_clip=0.5")
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "verl-disco: warning: actor_rollout_ref.actor.grad_clip=0.5 has no effect: verl does not read it; set "
        "actor_rollout_ref.actor.optim.clip_grad",
        "verl-disco: warning: trainer.balance_batch=false has no effect: verl does not read it; the V1 trainers "
        "always balance: leave it out",
    ]


def test_a_stock_run_is_told_and_goes_on(capsys):
    start("++data.train_batchsize=64")
    assert "verl-disco: warning: data.train_batchsize is read by nothing; nearest: " in capsys.readouterr().out


def test_the_job_does_not_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        overrides = [*DISCO, "++data.train_batchsize=64"]
        config = hydra.compose("ppo_trainer", overrides, return_hydra_config=True)
        with pytest.raises(SystemExit, match="settings refused: data.train_batchsize is read by nothing"):
            JobCallback().on_job_start(config)
    assert list(tmp_path.iterdir()) == []


def test_options_in_a_folder_of_the_users_start(tmp_path, monkeypatch):
    """The settings of the groups alone, which overrides are compared with, need that folder, too."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "config/algorithm"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\ndefaults: [disco, _self_]\ndisco: {negatives: mean}\n")
    overrides = ["algorithm=mine", "+experiment=arithmetic_cpu", "hydra.searchpath=[file://config]"]
    start(*overrides)
    found = [f.problem for f in examine([*overrides, "disco.tauu=1"]) if f.problem]
    assert "there is no setting disco.tauu" in found[0]


def test_a_model_that_is_not_given_is_named():
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        overrides = ["algorithm=disco", "+backend=cpu"]
        config = hydra.compose("ppo_trainer", overrides, return_hydra_config=True)
        with pytest.raises(ValueError, match="model is not set; give model=..."):
            before_job(composition.of_job(config))
