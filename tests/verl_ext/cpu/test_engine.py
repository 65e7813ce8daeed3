"""verl's engines for the device "cpu": registered where verl looks, with settings that a CPU needs, and refusals."""

import types

import pytest
import torch
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine import EngineRegistry

from verl_ext.cpu import engine


def config(**settings):
    return FSDPEngineConfig(**({"strategy": "fsdp2"} | settings))


@pytest.mark.parametrize("backend", ["fsdp", "fsdp2"])
def test_verl_finds_them(backend):
    assert EngineRegistry._engines["language_model"][backend]["cpu"] is engine.CPUEngineWithLMHead
    assert EngineRegistry._engines["value_model"][backend]["cpu"] is engine.CPUEngineWithValueHead


def test_other_backends_for_the_device_cpu_can_still_be_registered(monkeypatch):
    monkeypatch.setattr(EngineRegistry, "_engines", {m: dict(b) for m, b in EngineRegistry._engines.items()})
    EngineRegistry.register("language_model", "megatron", "cpu")(engine.CPUEngineWithLMHead)
    engine.register()  # a second time changes nothing
    assert EngineRegistry._engines["language_model"]["megatron"]["cpu"] is engine.CPUEngineWithLMHead


def test_defaults_become_those_of_a_cpu():
    given = config()
    got = engine.settings_for_cpu(given, "sdpa")
    assert got.mixed_precision == engine.FLOAT32 and got.use_torch_compile is False
    assert given.mixed_precision is None and given.use_torch_compile is True  # the caller's own stays as it is


def test_what_the_user_set_stays():
    precision = {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    assert engine.settings_for_cpu(config(mixed_precision=precision), "sdpa").mixed_precision == precision


@pytest.mark.parametrize(
    "settings, attention, message",
    [
        ({"strategy": "fsdp"}, "sdpa", "strategy=fsdp does not run on a CPU.*actor.strategy=fsdp2.*critic.strategy"),
        ({"offload_policy": True}, "sdpa", "offload_policy=True.*set it to False"),
        ({"ulysses_sequence_parallel_size": 2}, "sdpa", "ulysses_sequence_parallel_size=2 with attn_impl.*=sdpa"),
    ],
)
def test_refusals(settings, attention, message):
    with pytest.raises(ValueError, match=message):
        engine.settings_for_cpu(config(**settings), attention)


def test_ulysses_is_left_to_flash_attention():
    engine.settings_for_cpu(config(ulysses_sequence_parallel_size=2), "flash_attention_2")


def test_attention_is_sdpa_unless_the_user_says_otherwise():
    assert engine.default_attention(types.SimpleNamespace(override_config={})) == "sdpa"
    eager = types.SimpleNamespace(override_config={"attn_implementation": "eager"})
    assert engine.default_attention(eager) == "eager"


def test_reference_policy_is_built_without_offload(monkeypatch):
    seen = []

    def build(self, module):
        seen.append(self.engine_config.forward_only)

    monkeypatch.setattr(engine.FSDPEngineWithLMHead, "_build_fsdp_module", build)
    reference = object.__new__(engine.CPUEngineWithLMHead)
    reference.engine_config = engine.settings_for_cpu(config(forward_only=True), "sdpa")
    reference._build_fsdp_module(None)
    assert seen == [False] and reference.engine_config.forward_only is True


def test_micro_batches_reach_verls_forward_step_unmoved(monkeypatch):
    monkeypatch.setattr(engine.FSDPEngineWithLMHead, "forward_step", lambda self, batch, *_: batch.to("cpu"))
    micro_batch = object()
    for engine_class in (engine.CPUEngineWithLMHead, engine.CPUEngineWithValueHead):
        assert object.__new__(engine_class).forward_step(micro_batch, None, True) is micro_batch


def test_critic_loads_with_the_configured_attention(model_path, monkeypatch):
    import verl.utils.model
    from transformers import AutoConfig

    def build(self):
        settings = AutoConfig.from_pretrained(model_path, attn_implementation="sdpa", num_labels=1)
        return verl.utils.model.load_valuehead_model(model_path, torch.float32, settings, False)

    original = verl.utils.model.load_valuehead_model
    monkeypatch.setattr(engine.FSDPEngineWithValueHead, "_build_module", build)
    critic = object.__new__(engine.CPUEngineWithValueHead)._build_module()
    assert critic(torch.tensor([[3, 4]])).logits.shape == (1, 2, 1)
    assert critic.config._attn_implementation == "sdpa"
    assert verl.utils.model.load_valuehead_model is original
