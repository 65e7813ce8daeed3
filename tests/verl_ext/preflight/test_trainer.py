"""Trainers and modes that would ignore what the settings ask for are refused by name."""

from types import SimpleNamespace

import hydra
import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, PPOTrainer

from verl_ext.hydra.callbacks import JobCallback
from verl_ext.preflight.checks import examine
from verl_ext.preflight.composition import compose
from verl_ext.preflight.trainer import EXTENSIONS, check_recipes_worker, check_trainer
from verl_ext.training.trainer import ExtendedTrainerSync

WORKER = {"actor_worker_class": "a.Worker"}


def found(settings: dict | None, mode: str = "sync", **trainer) -> list[str]:
    config = {"trainer": {"use_v1": True, "v1": {"trainer_mode": mode}} | trainer}
    config = OmegaConf.create(config if settings is None else config | {"verl_ext": settings})
    return [str(f) for f in check_trainer(SimpleNamespace(config=config))]


@pytest.fixture
def fancy(monkeypatch) -> type:
    """A mode of a plugin's, or of a later verl."""

    class FancyTrainer(PPOTrainer):
        pass

    monkeypatch.setitem(TRAINER_REGISTRY, "fancy", FancyTrainer)
    return FancyTrainer


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_mode_that_is_not_extended_is_refused_by_name(fancy, extension):
    (refusal,) = found({extension: "a.Worker"}, "fancy")
    assert refusal == (
        f"trainer.v1.trainer_mode=fancy is {__name__}.{fancy.__qualname__}, which does not read "
        f"verl_ext.{extension}; use one of colocate_async, separate_async, sync"
    )


def test_a_mode_that_nothing_registers_is_refused():
    (refusal,) = found(WORKER, "missing")
    assert "trainer.v1.trainer_mode=missing is not registered" in refusal


def test_a_mode_on_top_of_ours_and_a_run_that_needs_none_of_it_may_start(fancy, monkeypatch):
    for settings in (None, {}, {"whole_groups": False}):
        assert found(settings, "fancy") == found(settings, "fancy", use_v1=False) == []
    for mode in ("sync", "colocate_async", "separate_async"):
        assert found(WORKER, mode) == []
    monkeypatch.setitem(TRAINER_REGISTRY, "fancy", type("Finer", (ExtendedTrainerSync,), {}))
    assert found(WORKER, "fancy") == []


def test_the_legacy_trainer_is_refused_and_a_verl_without_its_switch_is_not():
    assert found(WORKER, use_v1=False)[0].startswith("trainer.use_v1=False is verl's legacy trainer")
    config = OmegaConf.create({"trainer": {"v1": {"trainer_mode": "sync"}}, "verl_ext": WORKER})
    assert list(check_trainer(SimpleNamespace(config=config))) == []


def test_start_and_doctor_refuse_the_mode_in_the_same_words(fancy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    overrides = ["algorithm=disco", "+experiment=arithmetic_cpu", "trainer.v1.trainer_mode=fancy"]
    # The CPU's own manager of agent loops knows the mode sync alone.
    overrides.append("actor_rollout_ref.rollout.agent.agent_loop_manager_class=null")
    problem = f"trainer.v1.trainer_mode=fancy is {__name__}.{fancy.__qualname__}, which does not read verl_ext."
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", overrides, return_hydra_config=True)
        JobCallback().on_run_start(config)
        with pytest.raises(SystemExit) as e:
            JobCallback().on_job_start(config)
    (finding,) = [f for f in examine(overrides) if f.problem.startswith(problem)]
    assert e.value.code == f"verl-disco: settings refused: {finding}" and not finding.warning
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "overrides, name",
    [
        (["algorithm=grpo", "setting=disco_paper", "algorithm.adv_estimator=disco"], "algorithm.adv_estimator=disco"),
        (["algorithm=ppo", "actor_rollout_ref.actor.policy_loss.loss_mode=disco"], "policy_loss.loss_mode=disco"),
        (["algorithm=disco", "verl_ext.whole_groups=false"], "policy_loss.loss_mode=disco"),
        (["algorithm=disco", "verl_ext.actor_worker_class=null"], "policy_loss.loss_mode=disco"),
    ],
)
def test_a_recipes_loss_or_estimator_without_its_worker_is_refused(overrides, name):
    (finding,) = check_recipes_worker(compose(["+experiment=arithmetic_cpu", *overrides]))
    assert finding.problem.startswith((name, f"actor_rollout_ref.actor.{name}")) and "algorithm=disco" in finding.fix
    assert list(check_recipes_worker(compose(["+experiment=arithmetic_cpu", "algorithm=disco"]))) == []
    assert list(check_recipes_worker(compose(["algorithm=grpo"]))) == []
