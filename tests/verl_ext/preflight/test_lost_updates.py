"""Updates that would get lost: adapters that verl does not send, and steps that half precision rounds away."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from verl_ext.preflight.composition import Run
from verl_ext.preflight.trainer import check_adapters, check_lost_updates

ASYNC = "trainer.v1.trainer_mode=separate_async"
MODEL = "actor_rollout_ref.model"
DTYPE = "actor_rollout_ref.actor.fsdp_config.model_dtype"


def changed(config, *overrides):
    """A copy with other values, which is much faster than to compose."""
    config = config.copy()
    for override in overrides:
        name, value = override.split("=", 1)
        OmegaConf.update(config, name, yaml.safe_load(value), force_add=True)
    return config


def left_behind(config):
    return list(check_adapters(SimpleNamespace(config=config)))


@pytest.mark.parametrize("algorithm", ["disco", "grpo"])
def test_adapters_with_separate_async_are_refused_unless_merged(compose, algorithm):
    run = compose(f"algorithm={algorithm}")
    for adapters in ("lora_rank=8", "lora.rank=8", "lora_adapter_path=some/adapter", "lora.adapter_path=some/adapter"):
        adapted = changed(run, f"{MODEL}.{adapters}")
        (finding,) = left_behind(changed(adapted, ASYNC))
        for part in (adapters, ASYNC, "rollouts would stay at the initial model", f"{MODEL}.lora.merge=True"):
            assert part in str(finding)
        assert not finding.warning
        assert not left_behind(changed(adapted, ASYNC, f"{MODEL}.lora.merge=true"))
        for mode in ("sync", "colocate_async"):
            assert not left_behind(changed(adapted, f"trainer.v1.trainer_mode={mode}"))
    assert not left_behind(changed(run, ASYNC))


def findings(config):
    return list(check_lost_updates(Run(config, config)))


@pytest.mark.parametrize(
    "dtype, lr, above", [("bf16", "2e-5", "0.005"), ("bfloat16", "2e-6", "0.0005"), ("fp16", "1e-5", "0.02")]
)
def test_training_in_half_precision_is_told_with_what_no_longer_moves(compose, dtype, lr, above):
    setting = f"{DTYPE}={dtype}"
    (finding,) = findings(compose("algorithm=grpo", setting, f"actor_rollout_ref.actor.optim.lr={lr}"))
    assert finding.warning and finding.name == DTYPE and finding.problem.startswith(setting)
    assert f"lr={float(lr):g} round to nothing for weights above {above}" in finding.problem
    assert finding.fix.startswith("use fp32")
    # The figure: a step of lr moves what is below it, and not what is twice as large.
    half = torch.float16 if dtype == "fp16" else torch.bfloat16
    for factor, moves in ((0.45, True), (2.2, False)):
        weight = torch.tensor(factor * float(lr) * 2 ** (11 if dtype == "fp16" else 8)).to(half)
        assert (weight - float(lr) != weight) == moves


def test_float32_megatron_and_critics_that_do_not_run_are_not_told(compose):
    assert not findings(compose("algorithm=grpo"))
    assert not findings(compose("algorithm=grpo", "model_engine=megatron"))
    assert not findings(compose("algorithm=grpo", "critic.fsdp.model_dtype=bf16"))
    (finding,) = findings(compose("algorithm=ppo", "critic.fsdp.model_dtype=bf16"))
    assert finding.name == "critic.fsdp.model_dtype"


def share_moved(config) -> float:
    """Share of the adapters' A that a step of Adam moves, with verl's adapters and optimizer and the run's settings."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.torch_dtypes import PrecisionType
    from verl.workers.config.optimizer import build_optimizer
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    torch.manual_seed(0)
    # As wide as the experiment's model: the spread of A follows from it.
    shape = dict(hidden_size=1536, intermediate_size=32, num_hidden_layers=1, vocab_size=32)
    shape |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape))
    base = base.to(PrecisionType.to_dtype(actor.fsdp_config.model_dtype))
    settings = OmegaConf.to_container(model, resolve=True)
    engine = SimpleNamespace(model_config=SimpleNamespace(**{"target_parameters": None} | settings))
    adapted = FSDPEngine._build_lora_module(engine, base)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(trained.values(), omega_conf_to_dataclass(actor.optim))
    before = {n: p.detach().clone() for n, p in trained.items() if "lora_A" in n}
    assert before
    for p in trained.values():
        p.grad = torch.randn_like(p) * 1e-3
    optimizer.step()
    assert {x.dtype for state in optimizer.state.values() for x in state.values() if x.dim()} == {
        PrecisionType.to_dtype(actor.fsdp_config.model_dtype)
    }
    moved = torch.cat([(trained[n] != x).flatten() for n, x in before.items()])
    return float(moved.double().mean())


def test_the_lora_experiment_moves_its_adapters(compose):
    run = ["algorithm=disco", "+experiment=deepseek_qwen_1_5b_lora"]
    assert share_moved(compose(*run)) > 0.99
    # As it was: most entries never move.
    assert share_moved(compose(*run, f"{DTYPE}=bf16")) < 0.4
    assert not findings(compose(*run))
