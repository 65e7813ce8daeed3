"""verl's vLLM server, which starts the engine, and the replica that starts the server."""

import os
from typing import Any

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica


class CPUvLLMHttpServer(vLLMHttpServer):
    def _post_init(self, cuda_visible_devices: str) -> None:
        super()._post_init(cuda_visible_devices)
        if self.config.enforce_eager:
            # vLLM compiles its sampler all the same: half a minute, and it needs a C++ compiler. Its processes inherit
            # this.
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

    def _get_worker_extension_cls(self) -> str:
        return "verl_ext.cpu.vllm.worker.CPUWorkerExtension"

    def _preprocess_engine_kwargs(self, engine_kwargs: dict[str, Any]) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        # True in verl, outside its YAML. Without free_cache_engine verl never lets vLLM sleep.
        engine_kwargs.setdefault("enable_sleep_mode", False)


class CPUvLLMReplica(vLLMReplica):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(CPUvLLMHttpServer)
