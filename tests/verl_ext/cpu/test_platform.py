"""The CPU platform is the last resort of verl's detection; never chosen on a machine or cluster with accelerators."""

import glob
import os
import subprocess
import sys

import pytest
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, platform_manager

import verl_ext.cpu
from verl_ext.cpu import platform


@pytest.mark.skipif(platform.accelerator_present() is not None, reason="needs a machine without accelerator")
def test_found_in_a_process_without_any_setting():
    """It shows as well that verl resolves no platform before it loads plugins: the answer would be verl's fallback."""
    code = "import verl; from verl.utils.device import get_device_name; print(get_device_name())"
    process = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    assert process.stdout.split() == ["cpu"]


def test_environment_variable_chooses_it(monkeypatch):
    monkeypatch.setattr(platform, "accelerator_present", lambda: "a GPU")
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert detected() == "cpu"
    assert PlatformRegistry.get("cpu") is platform.CPUPlatform


def test_request_replaces_a_platform_that_is_resolved_already(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "nvidia")
    monkeypatch.setattr(platform_manager, "_current_platform", PlatformRegistry.get("nvidia")())
    verl_ext.cpu.request()
    assert platform_manager.get_platform().device_name == "cpu"
    assert os.environ["VERL_PLATFORM"] == "cpu"  # what the processes of a local Ray cluster inherit


@pytest.fixture
def cuda_build_without_visible_gpu(monkeypatch):
    """A Ray actor that asked for no GPU (CUDA_VISIBLE_DEVICES is empty), with the usual CUDA build of torch."""
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(glob, "glob", lambda pattern: [])
    monkeypatch.setattr(PlatformBase, "check_smi_command", staticmethod(lambda cmd: False))


def detected() -> str:
    return platform_manager._detect_platform_name()


def test_no_accelerator_at_all(cuda_build_without_visible_gpu):
    assert detected() == "cpu"


def test_hidden_gpu_shows_by_its_device_file(cuda_build_without_visible_gpu, monkeypatch):
    monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    assert detected() == "nvidia"


def test_visible_gpu_without_nvidia_smi(cuda_build_without_visible_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert detected() == "nvidia"


def test_head_node_without_gpu_in_a_gpu_cluster(cuda_build_without_visible_gpu, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0})
    assert detected() == "nvidia"


def test_declared_gpus_are_no_accelerators(cuda_build_without_visible_gpu, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 2.0})
    assert detected() == "cpu"


def test_a_cpu_build_of_torch_needs_no_further_evidence(cuda_build_without_visible_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/kfd"])
    assert detected() == "cpu"


def test_another_plugins_platform_goes_first_although_registered_later(cuda_build_without_visible_gpu, monkeypatch):
    class Other(platform.CPUPlatform):
        def is_platform_available(self, use_smi_check=False):
            return True

    monkeypatch.setitem(PlatformRegistry._platforms, "other", Other)
    assert detected() == "other"


def test_device_id_means_cpu_everywhere_that_verl_uses_it():
    device = platform.CPUPlatform().current_device()
    assert torch.zeros(1).to(device).device.type == "cpu"
    assert torch.device(device).type == "cpu"
    assert torch.device(f"cpu:{device}").type == "cpu"


def test_device_module_has_what_verl_calls_in_a_training_step():
    module = platform.CPUPlatform().device_module
    module.empty_cache()
    module.synchronize()
    assert module.max_memory_allocated() == module.max_memory_reserved() == 0
    assert not module.is_available()
    state = module.get_rng_state()
    first = torch.rand(1)
    module.set_rng_state(state)
    assert torch.rand(1) == first
