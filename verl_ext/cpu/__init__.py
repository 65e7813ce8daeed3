"""verl on a CPU: a platform, engines for the device "cpu", the light rollout ``actor_rollout_ref.rollout.name=hf``, and
verl's vLLM rollout on a CPU build of vLLM.

No environment variable is needed: verl's own detection finds the platform when there is no accelerator
(:mod:`verl_ext.cpu.platform`). The other parts are registered when verl imports the module that they extend.
"""

import os
from importlib import import_module

from wrapt import register_post_import_hook


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


def _register_engines() -> None:
    from verl_ext.lazy import import_whole

    import_whole("verl_ext.cpu.engine").register()


def _register_rollout_adapter(module) -> None:
    module._ROLLOUT_REGISTRY.setdefault(("hf", "async"), "verl_ext.cpu.rollout.adapter.HFServerAdapter")


def _register_rollout_replica(module) -> None:
    registry = module.RolloutReplicaRegistry
    if "hf" not in registry._registry:
        registry.register("hf", lambda: import_module("verl_ext.cpu.rollout.replica").HFReplica)
