"""Checks for packages that a run's settings need and that verl imports only after Ray has started."""

import importlib.util
import re
from collections.abc import Iterator
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from verl_ext.preflight.composition import Run
from verl_ext.preflight.findings import Finding, version_of

WHEELHOUSE = "https://verl-project.github.io/verl-wheelhouse/simple/"
"""verl's index of wheels for torch 2.11, CUDA 13 and Python 3.12, from its pyproject.toml."""
FROM_WHEELHOUSE = f"pip install --no-deps --index-url {WHEELHOUSE} "
INSTALL = {
    "flash-attn": FROM_WHEELHOUSE + "flash-attn==2.8.3",
    "transformer-engine": FROM_WHEELHOUSE + "transformer-engine",
    "megatron-bridge": FROM_WHEELHOUSE + "megatron-bridge==0.5.2",
    "megatron-core": "pip install 'git+https://github.com/NVIDIA/Megatron-LM.git@core_v0.18.0'",
    "cupy": "pip install cupy-cuda13x==14.0.1",
    "vllm": "pip install -r requirements-gpu.txt",
}
"""Package -> command that installs a build for torch 2.11 and CUDA 13."""

LOGGERS = {name: name for name in ("wandb", "mlflow", "swanlab", "tensorboard", "clearml", "trackio", "rl_insight")}
LOGGERS |= {"tracking": "wandb", "vemlp_wandb": "volcengine_ml_platform"}
ENGINES = {"vllm": "vllm", "sglang": "sglang", "trtllm": "tensorrt_llm"}
"""verl's rollout engines -> module that each imports. Each needs a GPU (vLLM has a CPU build, too) and reserves
``gpu_memory_utilization`` of it, whatever it needs."""
TRANSPORTS = {
    "nccl": ("cupy",),
    "delta_sharded": ("cupy",),
    "nixl": ("cupy", "nixl"),
    "mooncake": ("mooncake",),
    "kimi_ckpt_engine": ("checkpoint_engine",),
}
"""Checkpoint engines, which carry weights to rollout servers on other GPUs -> modules that each imports."""


class Need(NamedTuple):
    """A module to import, and the setting that asks for it, with its value."""

    module: str
    setting: str

    @property
    def package(self) -> str:
        """The name to install it by."""
        return "flash-attn-3" if self.module == "flash_attn_interface" else re.sub("[._]", "-", self.module)


def needs(config: DictConfig) -> Iterator[Need]:
    """Yield what this run imports besides verl's own requirements."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy

    loggers = config.trainer.logger or []
    for logger in [loggers] if isinstance(loggers, str) else loggers:
        if logger in LOGGERS:
            yield Need(LOGGERS[logger], f"trainer.logger={logger}")
    if config.trainer.device == "cpu":
        return
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    if rollout.name in ENGINES:
        yield Need(ENGINES[rollout.name], f"actor_rollout_ref.rollout.name={rollout.name}")
    # Each worker makes it, whether the trainer uses it or not.
    backend = rollout.checkpoint_engine.backend
    for module in TRANSPORTS.get(backend, ()):
        yield Need(module, f"actor_rollout_ref.rollout.checkpoint_engine.backend={backend}")
    roles = {"actor_rollout_ref.actor": (config.actor_rollout_ref.actor, model)}
    if need_reference_policy(config):
        roles["actor_rollout_ref.ref"] = (config.actor_rollout_ref.ref, model)
    if need_critic(config):
        roles["critic"] = (config.critic, config.critic.model)
    for name, (node, its_model) in roles.items():
        yield from _by_megatron(name, node) if node.strategy == "megatron" else _by_fsdp(name, node, its_model)


def _by_fsdp(name: str, node: DictConfig, model: DictConfig) -> Iterator[Need]:
    attention = (model.get("override_config") or {}).get("attn_implementation", "flash_attention_2")
    # verl loads a value model with FlashAttention 2 alone.
    if attention == "flash_attention_2" or name == "critic":
        yield Need("flash_attn", f"{name}'s attention, flash_attention_2,")
    elif attention == "flash_attention_3":
        yield Need("flash_attn_interface", f"{name}'s attention, flash_attention_3,")
    if model.get("use_liger"):
        yield Need("liger_kernel", f"use_liger of {name}'s model")
    if implementation := OmegaConf.select(node, "optim.optimizer_impl"):
        module = str(implementation).partition(".")[0]
        yield Need(module, f"{name}.optim.optimizer_impl={implementation}")


def _by_megatron(name: str, node: DictConfig) -> Iterator[Need]:
    where = f"{name}.strategy=megatron"
    yield Need("megatron.core", where)
    # It implements the layers of all of verl's models on Megatron.
    yield Need("transformer_engine", where)
    if node.megatron.use_mbridge and node.megatron.vanilla_mbridge:
        yield Need("mbridge", f"{name}.megatron.vanilla_mbridge=true")
    elif node.megatron.use_mbridge:
        yield Need("megatron.bridge", f"{name}.megatron.vanilla_mbridge=false")
    if node.megatron.override_transformer_config.get("attention_backend") == "flash":
        yield Need("flash_attn", f"{name}.megatron.override_transformer_config.attention_backend=flash")


def is_installed(need: Need) -> bool:
    """Whether the module can be imported; for vLLM, in a build for GPUs."""
    if need.package == "vllm":
        return "cpu" not in (version_of("vllm") or "cpu")
    try:
        return importlib.util.find_spec(need.module) is not None
    except (ImportError, ValueError):
        # A package above it is missing.
        return False


def check_packages(run: Run) -> Iterator[Finding]:
    """Name each package that this run's settings need and this machine lacks, once."""
    import torch

    config = run.config
    seen = set()
    # The nodes that train may have what is missing here.
    elsewhere = config.trainer.device != "cpu" and not torch.cuda.is_available()
    for need in needs(config):
        if need.package in seen or is_installed(need):
            continue
        seen.add(need.package)
        fix = f"{need.setting} needs it: {INSTALL.get(need.package, f'install {need.package}')}"
        yield Finding(need.package, "not installed", f"{need.package} is not installed here", fix, warning=elsewhere)
    slow = config.trainer.device != "cpu" and config.actor_rollout_ref.actor.strategy != "megatron"
    if slow and "flash-attn" not in seen and importlib.util.find_spec("flash_attn") is None:
        problem = "flash-attn is not installed here, without which verl computes log-probabilities row by row"
        yield Finding("flash-attn", "not installed", problem, INSTALL["flash-attn"], warning=True)
