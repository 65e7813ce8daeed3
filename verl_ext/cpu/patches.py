"""Patches of two functions of verl that fail or are very slow on a CPU, and of an import that no CPU needs.

The patched functions behave differently on a CPU only. A patch that does not know verl's function leaves it alone and
prints a warning, and ``tests/verl_ext/cpu/test_patches.py`` fails.
"""

import functools
import importlib.util
import inspect
import sys
from types import ModuleType

import torch
from wrapt import register_post_import_hook


def register() -> None:
    skip_ascend_engine()
    register_post_import_hook(patch_process_group, "verl.utils.distributed")
    register_post_import_hook(patch_log_probs, "verl.utils.torch_functional")


def skip_ascend_engine() -> None:
    """Block verl's weight transfer for Ascend NPUs, which imports vLLM before it finds that there is no NPU.

    With vLLM installed, that takes seconds in each process of a run. verl handles the ImportError either way.
    """
    if importlib.util.find_spec("torch_npu") is None:
        sys.modules.setdefault("verl.checkpoint_engine.hccl_checkpoint_engine", None)


def patch_process_group(module: ModuleType) -> None:
    """Name gloo once: of verl's ``cpu:gloo,{device}:{backend}`` torch refuses "cpu:gloo,cpu:gloo" as a duplicate."""
    original = module.initialize_global_process_group_ray
    if not _known(original, ["timeout_second", "backend"]):
        return

    @functools.wraps(original)
    def initialize_global_process_group_ray(timeout_second=None, backend=None):
        if backend is None and module.get_device_name() == "cpu":
            backend = "cpu:gloo"
        return original(timeout_second=timeout_second, backend=backend)

    module.initialize_global_process_group_ray = initialize_global_process_group_ray


def patch_log_probs(module: ModuleType) -> None:
    """Compute log-probabilities in one call: without flash-attn verl loops in Python over the logits of every token."""
    original = module.logprobs_from_logits_v2
    if not _known(original, ["logits", "labels"]):
        return

    @functools.wraps(original)
    def logprobs_from_logits_v2(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if logits.device.type != "cpu":
            return original(logits, labels)
        flat = logits.reshape(-1, logits.shape[-1])
        return -torch.nn.functional.cross_entropy(flat, labels.reshape(-1), reduction="none").view(labels.shape)

    module.logprobs_from_logits_v2 = logprobs_from_logits_v2


def _known(function, parameters: list[str]) -> bool:
    """Tell whether verl's function still takes ``parameters`` and is not patched yet."""
    if list(inspect.signature(function).parameters) == parameters:
        return not hasattr(function, "__wrapped__")
    name = f"{function.__module__}.{function.__name__}"
    print(f"verl-disco: {name} has changed; running on a CPU needs a new patch of it", file=sys.stderr, flush=True)
    return False
