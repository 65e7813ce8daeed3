"""verl's FSDP2 engines for the device "cpu": actor, reference policy and critic.

They are verl's own engines with the defaults that a CPU needs where the user set none (float32, SDPA, no compilation).
Three settings that cannot work are refused.
"""

import copy
from typing import Any

import verl.utils.model
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

FLOAT32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def default_attention(model_config: Any) -> str:
    """Read ``override_config.attn_implementation``; by default SDPA, because FlashAttention 2 needs a GPU."""
    return model_config.override_config.get("attn_implementation", "sdpa")


def settings_for_cpu(engine_config: Any, attention: str) -> Any:
    """Copy verl's ``FSDPEngineConfig`` with settings that run on a CPU.

    Raises:
        ValueError: the setting that cannot work, what was found and what would be right.
    """
    if engine_config.strategy != "fsdp2":
        raise ValueError(
            f"strategy={engine_config.strategy} does not run on a CPU (FSDP1 synchronises its states on an accelerator "
            "only); set actor_rollout_ref.actor.strategy=fsdp2, and critic.strategy=fsdp2 where there is a critic"
        )
    if engine_config.offload_policy:
        raise ValueError("fsdp_config.offload_policy=True pins memory for an accelerator; set it to False on a CPU")
    if engine_config.ulysses_sequence_parallel_size > 1 and attention != "flash_attention_2":
        raise ValueError(
            f"ulysses_sequence_parallel_size={engine_config.ulysses_sequence_parallel_size} with "
            f"attn_implementation={attention}: verl parallelises FlashAttention 2 only, and any other attention would "
            "see just its own rank's part of each sequence; set ulysses_sequence_parallel_size=1"
        )
    config = copy.copy(engine_config)
    if config.use_torch_compile:
        object.__setattr__(config, "use_torch_compile", False)
    if config.mixed_precision is None:
        object.__setattr__(config, "mixed_precision", FLOAT32)
    return config


class _AlreadyThere:
    """A micro-batch whose ``.to(device)`` returns it as it is.

    On a CPU nothing moves, but TensorDict would visit every string and dict of every row: 0.1 s for 128 rows, a third
    of a small model's forward pass.
    """

    def __init__(self, micro_batch):
        self._micro_batch = micro_batch

    def to(self, device):
        return self._micro_batch


class _OnCPU:
    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        attention = default_attention(model_config)
        model_config.hf_config._attn_implementation = attention
        super().__init__(model_config, settings_for_cpu(engine_config, attention), optimizer_config, checkpoint_config)

    def _build_fsdp_module(self, module):
        # verl offloads a forward-only engine (the reference policy) to pinned memory, which needs an accelerator.
        # The configuration is this engine's own copy.
        forward_only, self.engine_config.forward_only = self.engine_config.forward_only, False
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config.forward_only = forward_only

    def forward_step(self, micro_batch, loss_function, forward_only):
        return super().forward_step(_AlreadyThere(micro_batch), loss_function, forward_only)


class CPUEngineWithLMHead(_OnCPU, FSDPEngineWithLMHead):
    """Actor and reference policy."""


class CPUEngineWithValueHead(_OnCPU, FSDPEngineWithValueHead):
    """The critic."""

    def _build_module(self):
        # verl's loader hard-codes FlashAttention 2. verl looks it up when called, so it can be replaced for this call.
        original = verl.utils.model.load_valuehead_model
        verl.utils.model.load_valuehead_model = _load_value_model
        try:
            return super()._build_module()
        finally:
            verl.utils.model.load_valuehead_model = original


def _load_value_model(local_path, torch_dtype, model_config, trust_remote_code):
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(
        pretrained_model_name_or_path=local_path,
        dtype=torch_dtype,
        config=model_config,
        attn_implementation=model_config._attn_implementation,
        trust_remote_code=trust_remote_code,
    )


def register() -> None:
    """Register the engines, unless verl already has engines for "cpu"."""
    for model_type, engine in {"language_model": CPUEngineWithLMHead, "value_model": CPUEngineWithValueHead}.items():
        for backend in ("fsdp", "fsdp2"):
            if "cpu" not in EngineRegistry._engines[model_type][backend]:
                EngineRegistry.register(model_type=model_type, backend=backend, device="cpu")(engine)
