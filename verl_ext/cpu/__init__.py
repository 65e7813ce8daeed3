"""verl on a CPU: a platform, engines for the device "cpu", the light rollout ``actor_rollout_ref.rollout.name=hf``, and
verl's vLLM rollout on a CPU build of vLLM.

No environment variable is needed: verl's own detection finds the platform when there is no accelerator
(:mod:`verl_ext.cpu.platform`). The other parts are registered when verl imports the module that they extend.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from omegaconf import DictConfig


NEED_A_GPU = ("vllm", "sglang", "trtllm")
"""verl's rollout engines; vLLM has a CPU build, which :mod:`verl_ext.cpu.vllm` brings to verl."""


def register() -> None:
    """Register all parts; cheap, because verl's plugin entry point calls it in every process."""
    from verl_ext.cpu import patches, platform, vllm

    platform.register()
    patches.register()
    vllm.register()
    register_post_import_hook(lambda _: _register_engines(), "verl.workers.engine.fsdp.transformer_impl")
    register_post_import_hook(_register_rollout_adapter, "verl.workers.rollout.base")
    register_post_import_hook(_register_rollout_replica, "verl.workers.rollout.replica")


def request() -> None:
    """Choose the CPU platform even if an accelerator is present (``trainer.device=cpu``).

    The choice holds for this process and for the local Ray cluster that it starts. Workers of a running cluster need
    ``+ray_kwargs.ray_init.runtime_env.env_vars.VERL_PLATFORM=cpu``.
    """
    from verl.plugin.platform import get_platform, set_platform

    from verl_ext.cpu.platform import CPUPlatform

    os.environ["VERL_PLATFORM"] = "cpu"
    # verl.trainer.main_ppo resolves the platform while it is imported, before any setting is known.
    if get_platform().device_name != "cpu":
        set_platform(CPUPlatform())


def check(config: "DictConfig") -> None:
    """Refuse settings that a CPU does not support, as far as they are known before a model is loaded.

    Raises:
        ValueError: the setting, what was found and what would be right.
    """
    from verl_ext.cpu import vllm

    rollout = config.actor_rollout_ref.rollout
    if rollout.get("name") == "vllm" and vllm.cpu_build() is not None:
        vllm.check(rollout)
    elif rollout.get("name") in NEED_A_GPU:
        raise ValueError(
            f"actor_rollout_ref.rollout.name={rollout.name} needs a GPU here; use hf, or vllm with its CPU build "
            "(bash examples/setup.sh --vllm)"
        )


def _register_engines() -> None:
    from verl_ext.lazy import import_whole

    import_whole("verl_ext.cpu.engine").register()


def _register_rollout_adapter(module) -> None:
    module._ROLLOUT_REGISTRY.setdefault(("hf", "async"), "verl_ext.cpu.rollout.adapter.HFServerAdapter")


def _register_rollout_replica(module) -> None:
    registry = module.RolloutReplicaRegistry
    if "hf" not in registry._registry:
        registry.register("hf", lambda: import_module("verl_ext.cpu.rollout.replica").HFReplica)
