"""verl's vLLM server, which starts the engine, and the replica that starts the server."""

import os
from typing import Any

import psutil
import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from verl_ext.cpu.vllm import head_dim


class CPUvLLMHttpServer(vLLMHttpServer):
    """verl's own server with defaults for a CPU, which ``rollout.engine_kwargs.vllm`` overrides."""

    def _post_init(self, cuda_visible_devices: str) -> None:
        super()._post_init(cuda_visible_devices)
        if self.config.enforce_eager:
            # vLLM would still compile its sampler: half a minute, and it needs a C++ compiler. Its processes inherit
            # the variable.
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

    def _get_worker_extension_cls(self) -> str:
        return "verl_ext.cpu.vllm.worker.CPUWorkerExtension"

    def _preprocess_engine_kwargs(self, engine_kwargs: dict[str, Any]) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        # verl's code sets True, but without free_cache_engine it never lets vLLM sleep.
        engine_kwargs.setdefault("enable_sleep_mode", False)
        if "kv_cache_memory_bytes" not in engine_kwargs:
            # vLLM fills this share of the machine's memory, however small the model.
            share = self.config.gpu_memory_utilization * psutil.virtual_memory().total
            if (useful := useful_cache_bytes(self.config, self.model_config.hf_config)) < share:
                engine_kwargs["kv_cache_memory_bytes"] = useful


def useful_cache_bytes(rollout: Any, hf_config: Any) -> int:
    """Compute the bytes of a float32 KV cache for ``max_num_seqs`` sequences of ``max_model_len`` tokens, the most that
    is ever used.
    """
    text = hf_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * heads * head_dim(text) * 4
    block = 128  # tokens; vLLM's default on a CPU
    return rollout.max_num_seqs * -(-rollout.max_model_len // block) * block * per_token


class CPUvLLMReplica(vLLMReplica):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(CPUvLLMHttpServer)
