"""The patches of verl: what they fix, that they act on a CPU only, and that a change of verl is noticed."""

import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import verl.utils.distributed
import verl.utils.model
import verl.utils.torch_functional
from verl.workers.engine.fsdp import transformer_impl

from verl_ext.cpu import patches


def original(function):
    return inspect.unwrap(function)


def test_process_group_patch_is_in_place_and_still_needed():
    patched = verl.utils.distributed.initialize_global_process_group_ray
    # verl's default names the device's backend next to "cpu:gloo". When it no longer does, drop the patch.
    assert 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in inspect.getsource(original(patched))
    assert patched is not original(patched)


@pytest.mark.parametrize(
    "device, given, passed_on", [("cpu", None, "cpu:gloo"), ("cpu", "gloo", "gloo"), ("cuda", None, None)]
)
def test_process_group_patch_acts_on_a_cpu_only(device, given, passed_on):
    calls = []

    def initialize_global_process_group_ray(timeout_second=None, backend=None):
        calls.append((timeout_second, backend))

    module = types.SimpleNamespace(
        initialize_global_process_group_ray=initialize_global_process_group_ray, get_device_name=lambda: device
    )
    patches.patch_process_group(module)
    module.initialize_global_process_group_ray(timeout_second=7, backend=given)
    assert calls == [(7, passed_on)]


def test_log_probs_patch_is_in_place_and_reached():
    module = verl.utils.torch_functional
    patched = module.logprobs_from_logits_v2
    assert patched is not original(patched)
    assert "logprobs_from_logits_v2" in inspect.getsource(module.logprobs_from_logits)
    # The loop over rows that makes it slow. When it is gone, drop the patch.
    assert "for logit in logits" in inspect.getsource(original(patched))


@pytest.mark.parametrize("shape", [(5, 11), (2, 3, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_probs_equal_verls(shape, dtype):
    torch.manual_seed(0)
    logits = (4 * torch.randn(shape)).to(dtype)
    labels = torch.randint(shape[-1], shape[:-1])
    results = []
    patched = verl.utils.torch_functional.logprobs_from_logits_v2
    for function in (patched, original(patched)):
        leaf = logits.clone().requires_grad_()
        log_probs = function(leaf, labels)
        log_probs.sum().backward()
        results.append((log_probs.detach(), leaf.grad))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    for ours, verls in zip(*results, strict=True):
        assert ours.shape == verls.shape and ours.dtype == verls.dtype
        torch.testing.assert_close(ours, verls, rtol=tolerance, atol=tolerance)


def test_unknown_function_is_left_alone_and_reported(capsys):
    def logprobs_from_logits_v2(logits, labels, chunk_size):
        pass

    module = types.SimpleNamespace(logprobs_from_logits_v2=logprobs_from_logits_v2)
    patches.patch_log_probs(module)
    assert module.logprobs_from_logits_v2 is logprobs_from_logits_v2
    assert "logprobs_from_logits_v2 has changed" in capsys.readouterr().err


def test_verl_still_looks_its_value_model_loader_up_when_called():
    """``CPUEngineWithValueHead`` exchanges it in ``verl.utils.model`` for the time of a call."""
    assert "from verl.utils.model import load_valuehead_model" in inspect.getsource(
        transformer_impl.FSDPEngine._build_module
    )
    assert 'attn_implementation="flash_attention_2"' in inspect.getsource(verl.utils.model.load_valuehead_model)


def test_verl_still_moves_a_micro_batch_before_it_looks_at_it():
    """``_OnCPU.forward_step`` replaces that call only."""
    body = inspect.getsource(transformer_impl.FSDPEngineWithLMHead.forward_step).split("):", 1)[1]
    assert next(line.strip() for line in body.splitlines() if "micro_batch" in line) == (
        "micro_batch = micro_batch.to(get_device_id())"
    )


def test_verl_still_forces_the_reference_policy_into_pinned_memory():
    """The reason for ``_OnCPU._build_fsdp_module``."""
    source = inspect.getsource(transformer_impl.FSDPEngine._build_fsdp_module)
    assert "if self.engine_config.offload_policy or self.engine_config.forward_only:" in source
    assert "CPUOffloadPolicy(pin_memory=True)" in source


def test_no_process_imports_vllm_for_an_engine_that_needs_an_npu():
    program = (
        "import sys, verl.workers.engine_workers\n"
        "from verl.checkpoint_engine import CheckpointEngineRegistry as registry\n"
        "assert 'hccl_checkpoint_engine' in registry._import_errors\n"
        "assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_verls_ascend_engine_still_needs_an_npu_and_still_imports_vllm_first():
    # When it no longer does, drop the patch.
    source = Path(verl.utils.distributed.__file__).parents[1] / "checkpoint_engine/hccl_checkpoint_engine.py"
    text = source.read_text()
    assert text.index("from vllm") < text.index("if not is_torch_npu_available(check_device=False):\n    raise Import")
