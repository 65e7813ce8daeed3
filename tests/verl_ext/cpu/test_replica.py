"""The server's settings from verl's configuration, and the refusal of settings that the rollout does not support."""

import pytest
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class

from verl_ext.cpu.rollout.adapter import HFServerAdapter
from verl_ext.cpu.rollout.replica import HFReplica, server_spec


@pytest.fixture
def make(hf_config):
    def spec(*overrides, device="cpu"):
        node = hf_config("data.max_prompt_length=10", "data.max_response_length=20", *overrides).actor_rollout_ref
        rollout = omega_conf_to_dataclass(node.rollout)
        return server_spec(rollout, omega_conf_to_dataclass(node.model, HFModelConfig), 3, device)

    return spec


def test_verl_finds_the_rollout_by_its_name():
    assert get_rollout_class("hf") is HFServerAdapter
    assert get_rollout_replica_class("hf") is HFReplica


def test_the_name_is_verls_own_for_no_rollout(monkeypatch):
    """verl ships workers/rollout/hf_rollout.py, but registers it nowhere; ours must not hide a registered one."""
    import importlib

    import verl.workers.rollout.base as base

    import verl_ext.cpu

    fresh = dict(_ROLLOUT_REGISTRY)
    assert fresh.pop(("hf", "async")) == "verl_ext.cpu.rollout.adapter.HFServerAdapter"
    assert not any(name == "hf" for name, _ in fresh)
    monkeypatch.setattr(base, "_ROLLOUT_REGISTRY", {("hf", "async"): "verl.own"})
    verl_ext.cpu._register_rollout_adapter(importlib.import_module("verl.workers.rollout.base"))
    assert base._ROLLOUT_REGISTRY["hf", "async"] == "verl.own"


def test_settings_of_the_server(make, model_path):
    spec = make(
        "actor_rollout_ref.rollout.dtype=float32",
        "actor_rollout_ref.rollout.max_num_seqs=32",
        "actor_rollout_ref.rollout.seed=5",
        "actor_rollout_ref.rollout.engine_kwargs.hf.num_threads=2",
    )
    assert (spec.model_path, spec.dtype, spec.device) == (model_path, "float32", "cpu")
    assert spec.attn_implementation == "sdpa"
    assert (spec.prompt_length, spec.response_length, spec.max_model_len) == (10, 20, 64)
    assert (spec.max_num_seqs, spec.seed, spec.replica_rank, spec.num_threads) == (32, 5, 3, 2)
    assert spec.eos_token_ids == [1, 2]  # the tokenizer's, and the generation config's
    assert spec.vocab_size == 23 and spec.load_format == "dummy"
    assert spec.logprobs_mode == "processed_logprobs" and not spec.release_memory


def test_on_an_accelerator_the_actors_attention_and_memory_release(make):
    spec = make(device="cuda")
    assert (spec.device, spec.attn_implementation, spec.release_memory) == ("cuda", "flash_attention_2", True)
    assert not make("actor_rollout_ref.rollout.free_cache_engine=False", device="cuda").release_memory


@pytest.mark.parametrize(
    "override, message",
    [
        ("actor_rollout_ref.rollout.dtype=fp8", "rollout.dtype=fp8; possible: float32, bfloat16, float16"),
        ("actor_rollout_ref.rollout.logprobs_mode=raw_logits", "rollout.logprobs_mode=raw_logits; possible"),
        ("actor_rollout_ref.rollout.data_parallel_size=2", "rollout.data_parallel_size=2; possible: 1"),
        ("actor_rollout_ref.rollout.pipeline_model_parallel_size=2", "pipeline_model_parallel_size=2"),
        ("actor_rollout_ref.rollout.quantization=fp8", "rollout.quantization=fp8; possible: None"),
        ("actor_rollout_ref.rollout.enable_rollout_routing_replay=True", "enable_rollout_routing_replay=True"),
        ("actor_rollout_ref.rollout.prometheus.enable=True", "rollout.prometheus.enable=True"),
        ("actor_rollout_ref.model.lora_rank=8", "model.lora.merge=False; possible: True"),
        ("actor_rollout_ref.rollout.max_model_len=65", "max_model_len=65 exceeds .* max_position_embeddings=64"),
        ("actor_rollout_ref.rollout.engine_kwargs.hf.threads=2", "engine_kwargs.hf has no option .'threads'"),
    ],
)
def test_refusals_name_setting_value_and_what_is_right(make, override, message):
    with pytest.raises(ValueError, match=message):
        make(override)


def test_merged_lora_is_fine(make):
    make("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora.merge=True")
