"""Settings: what composes, and each refusal by its message."""

from functools import cache
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from named import score_of
from omegaconf import OmegaConf

import verl_ext.plugin  # noqa: F401  (registers the config group)
from recipe.disco import settings
from recipe.disco.estimator import DiscoPolicyLossConfig
from recipe.disco.scores import SCORES, masked, register_score
from recipe.disco.settings import DiscoConfig, parse
from recipe.disco.validate import validate

RUN = ["algorithm=disco", "actor_rollout_ref.rollout.name=hf", "trainer.n_gpus_per_node=8"]


@cache
def base(*groups):
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*RUN, *groups])


def composed(*overrides):
    """Composed once for each choice of groups; values are set on a copy, which is much faster."""
    groups = [o for o in overrides if o.split("=")[0] in ("algorithm", "model_engine")]
    config = base(*groups).copy()
    for override in overrides:
        if override not in groups:
            name, value = override.lstrip("+").split("=", 1)
            OmegaConf.update(config, name, yaml.safe_load(value), force_add=override.startswith("+"))
    return config


def refusal(*overrides) -> str:
    with pytest.raises(ValueError) as e:
        validate(composed(*overrides))
    return str(e.value)


def test_the_published_constants():
    config = composed()
    validate(config)
    assert parse(config.disco) == DiscoConfig(
        objective="disco", score="log_l", tau=10.0, kl_estimator="k1", delta=1e-4, beta=1000.0, measure="exact"
    )
    assert config.actor_rollout_ref.rollout.n == 8


def test_tau_follows_the_score_unless_given():
    assert parse(composed("disco.score=l_ratio").disco).tau == 1.0
    assert parse(composed("disco.score=l_ratio", "disco.tau=3").disco).tau == 3.0
    assert parse(composed("disco.tau=0.5").disco).tau == 0.5


def test_workers_see_the_settings():
    from verl.utils.config import omega_conf_to_dataclass

    config = composed("disco.delta=1.0e-3", "algorithm=disco_b")
    OmegaConf.resolve(config)
    loss = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    assert isinstance(loss, DiscoPolicyLossConfig)
    assert (loss.disco.delta, loss.disco.objective, loss.loss_mode) == (1e-3, "disco_b", "disco")


@pytest.mark.parametrize(
    "setting, right",
    [
        ("objective=dico", r"choose from \['conspo', 'disco', 'disco_b'"),
        ("score=likelihood", r"choose from \['l_ratio', 'log_l', "),
        ("kl_estimator=k2", r"choose from \['k1', 'k3'\]"),
        ("constraint=hinge", r"choose from \['augmented_lagrangian', 'fixed', 'none', 'squared_hinge'\]"),
        ("questions=dgop", r"choose from \['dgpo', 'failure_rate', 'grpo', 'uniform'\]"),
        ("questions=[dgpo]", r"choose from \['dgpo', "),
        ("pairs=Graded", r"choose from \['graded', 'threshold'\]"),
        ("question_temperature=0", "finite number > 0"),
        ("measure=never", r"choose from \['exact', 'lagged'\]"),
        ("tau=0", "finite number > 0"),
        ("tau=-1", "finite number > 0"),
        ("tau=.nan", "finite number > 0"),
        ("delta=-1.0e-4", "finite number >= 0"),
        ("beta=-1", "finite number >= 0"),
        ("rho=0", "finite number > 0"),
        ("coefficient=-1", "finite number >= 0"),
        ("positive_threshold=.inf", "a finite number"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(setting, right):
    name, value = setting.split("=")
    with pytest.raises(ValueError, match=rf"disco\.{name}=.*{right}"):
        validate(composed(f"disco.{setting}"))


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="disco.gamma is not a setting; the settings are .*'beta'"):
        parse({"gamma": 1})


def test_lagged_weights_of_ratios_are_refused_but_for_disco_b():
    message = refusal("disco.measure=lagged", "disco.score=l_ratio")
    assert "all scores are equal at old_log_probs" in message and "disco.measure=exact" in message
    validate(composed("disco.measure=lagged"))
    validate(composed("algorithm=disco_b", "disco.measure=lagged", "disco.score=l_ratio"))


@pytest.mark.parametrize(
    "override, message",
    [
        ("actor_rollout_ref.rollout.n=1", "actor_rollout_ref.rollout.n=1 .* use n >= 2"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=vanilla", "loss_mode=vanilla .* leave it at disco"),
        ("algorithm.use_kl_in_reward=true", "algorithm.use_kl_in_reward=True .* use false"),
        ("actor_rollout_ref.actor.use_kl_loss=true", "use_kl_loss=True .* use false"),
        ("critic.enable=true", "critic.enable=True .* use null"),
        ("distillation.enabled=true", "distillation.enabled=True .* use false"),
        ("algorithm.rollout_correction.rollout_is=word", "rollout_correction=.*'word'.* verl says: Invalid rollout_is"),
        ("algorithm.rollout_correction.rollout_rs=seq_mean_k1", "rollout_rs_threshold=None .* needs one"),
        ("algorithm.adv_estimator=gae", "adv_estimator=gae .* starts a critic"),
        ("actor_rollout_ref.actor.strategy=veomni", "strategy=veomni .* use one of fsdp, fsdp2, megatron"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size=256", "256 .* more questions than data.train_batch_size=128"),
    ],
)
def test_a_setting_that_contradicts_the_method_is_refused_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        validate(composed(override))


def test_a_rollout_correction_without_effect_is_refused():
    node = "algorithm.rollout_correction"
    weights, rejection = f"{node}.rollout_is=token", f"{node}.rollout_rs=seq_mean_k1"
    validate(composed(weights, rejection, f"{node}.rollout_rs_threshold=0.5_2.0"))
    for setting in (weights, f"{node}.bypass_mode=true"):
        message = refusal(setting, "actor_rollout_ref.rollout.calculate_log_probs=false")
        assert "calculate_log_probs=False" in message and "reads the rollout's log-probabilities" in message
    message = refusal(rejection, f"{node}.rollout_rs_threshold=0.5_2.0", f"{node}.bypass_mode=true")
    assert "rollout_rs=seq_mean_k1" in message and "nothing is left to correct" in message
    message = refusal(f"{node}.rollout_rs=sequence", f"{node}.rollout_rs_threshold=2.0")
    assert "'sequence'" in message and "verl says: Invalid rollout_rs" in message
    message = refusal(weights, f"{node}.rollout_is_threshold=null")
    assert "rollout_is_threshold=None" in message and "2.0, say" in message


def test_a_score_without_weights_refuses_a_rollout_correction(monkeypatch):
    monkeypatch.setattr(SCORES, "_items", dict(SCORES._items))
    register_score("plain")(score_of(lambda log_prob, base, mask: masked(log_prob, mask).sum(-1)))
    validate(composed("disco.score=plain", "disco.tau=1"))
    message = refusal("disco.score=plain", "disco.tau=1", "algorithm.rollout_correction.rollout_is=token")
    assert "disco.score=plain takes no weights" in message


def test_too_few_responses_for_the_ranks_are_refused_with_the_numbers():
    message = refusal("actor_rollout_ref.actor.ppo_mini_batch_size=1", "trainer.nnodes=2")
    assert "1 questions x n=8 are 8 responses for 16 data-parallel ranks" in message and "use at least 2" in message
    # Model parallelism leaves fewer ranks to fill.
    validate(
        composed(
            "actor_rollout_ref.actor.ppo_mini_batch_size=1",
            "trainer.nnodes=2",
            "model_engine=megatron",
            "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2",
        )
    )


def test_ulysses_without_flash_attention_is_refused():
    ulysses = "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"
    message = refusal(ulysses, "+actor_rollout_ref.model.override_config.attn_implementation=sdpa")
    assert "attn_implementation=sdpa" in message and "flash_attention_2" in message
    validate(composed(ulysses))


def test_a_virtual_pipeline_needs_dynamic_micro_batches():
    name = "actor_rollout_ref.actor.megatron.virtual_pipeline_model_parallel_size"
    message = refusal("model_engine=megatron", f"{name}=2")
    assert f"{name}=2" in message and "use_dynamic_bsz=True" in message
    validate(composed("model_engine=megatron", f"{name}=2", "actor_rollout_ref.actor.use_dynamic_bsz=true"))


def test_megatrons_dynamic_context_parallel_is_refused():
    message = refusal("model_engine=megatron", "++actor_rollout_ref.actor.megatron.dynamic_context_parallel=true")
    assert "dynamic_context_parallel=True" in message


BYPASS = "algorithm.rollout_correction.bypass_mode=true"
ENGINE = "actor_rollout_ref.actor.fsdp_config.mixed_precision"
FLOAT32 = ("actor_rollout_ref.rollout.dtype=float32", f"+{ENGINE}.param_dtype=fp32")


@pytest.mark.parametrize(
    "overrides, floor, names",
    [
        ((BYPASS,), "0.001", ("bypass_mode=True", "rollout.dtype=bfloat16", "param_dtype=bf16", "bypass_mode=False")),
        ((BYPASS, "disco.delta=5.0e-4"), "0.001", ("disco.delta=0.0005",)),
        ((BYPASS, FLOAT32[0]), "0.001", ("bypass_mode=True and actor_rollout_ref.actor.fsdp_config",)),
        ((BYPASS, FLOAT32[1]), "0.001", ("bypass_mode=True and actor_rollout_ref.rollout.dtype=bfloat16",)),
        ((BYPASS, *FLOAT32, "actor_rollout_ref.rollout.quantization=fp8"), "0.001", ("rollout.quantization=fp8",)),
        ((BYPASS, "trainer.device=cpu"), "0.001", ("bypass_mode=True and actor_rollout_ref.rollout.dtype=bfloat16",)),
        ((BYPASS, "model_engine=megatron"), "0.001", ("actor.megatron.dtype=bfloat16",)),
        ((BYPASS, "disco.constraint=augmented_lagrangian"), "0.001", ()),
        (("disco.kl_estimator=k3",), "0.0002", ("kl_estimator=k3", "param_dtype=bf16", "use disco.kl_estimator=k1")),
        (("disco.kl_estimator=k3", f"+{ENGINE}.param_dtype=bfloat16"), "0.0002", ("param_dtype=bfloat16",)),
        (("disco.kl_estimator=k3", "model_engine=megatron"), "0.0002", ("actor.megatron.dtype=bfloat16",)),
        (("disco.kl_estimator=k3", BYPASS), "0.001", ("bypass_mode=True",)),
        (("disco.kl_floor=3.0e-4",), "0.0003", ("disco.kl_floor=0.0003",)),
    ],
)
def test_a_delta_below_the_kls_floor_is_refused(overrides, floor, names):
    message = refusal(*overrides)
    assert message.startswith("disco.delta=0.000") and f"about {floor} nats per token before any update" in message
    for name in (*names, f"a disco.delta of at least {floor}", "disco.kl_floor"):
        assert name in message, message


@pytest.mark.parametrize(
    "overrides",
    [
        (BYPASS, "disco.delta=1.0e-3"),
        (BYPASS, *FLOAT32),
        (BYPASS, "actor_rollout_ref.rollout.dtype=float16", f"+{ENGINE}.param_dtype=fp16"),
        (BYPASS, FLOAT32[0], "trainer.device=cpu"),
        (BYPASS, "disco.constraint=none"),
        (BYPASS, "disco.constraint=fixed"),
        ("disco.kl_estimator=k3", "disco.delta=2.0e-4"),
        ("disco.kl_estimator=k3", f"+{ENGINE}.param_dtype=fp32"),
        ("disco.kl_estimator=k3", "trainer.device=cpu"),
        # What was measured wins.
        (BYPASS, "disco.kl_floor=5.0e-5"),
        ("disco.kl_estimator=k3", "disco.kl_floor=0"),
    ],
)
def test_a_delta_that_can_work_is_not_refused(overrides):
    validate(composed(*overrides))


def test_a_floor_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"disco.kl_floor=-1.* is not a finite number >= 0"):
        validate(composed("disco.kl_floor=-1"))


def test_the_page_names_every_setting():
    page = (Path(settings.__file__).parent / "README.md").read_text()
    for name in DiscoConfig.__dataclass_fields__:
        assert f"`disco.{name}`" in page, name
