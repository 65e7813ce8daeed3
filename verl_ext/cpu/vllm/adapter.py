"""verl's client of a vLLM server, in each training worker."""

import asyncio
from typing import Any

import zmq
from verl.workers.rollout.vllm_rollout import ServerAdapter
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from verl_ext.cpu.vllm import check

WAIT_SECONDS = 300
"""How long vLLM may take to load one bucket of weights (at most ``update_weights_bucket_megabytes``)."""


class CPUServerAdapter(ServerAdapter):
    """verl's, which refuses what a CPU cannot do, and fails where verl's would hang."""

    def __init__(self, config, model_config, device_mesh, replica_rank: int = -1):
        text_config = model_config.hf_config.get_text_config()
        head_dim = getattr(text_config, "head_dim", None)
        head_dim = head_dim or text_config.hidden_size // text_config.num_attention_heads
        check(config, head_dim, CPUAttentionBackend.get_supported_head_sizes())
        super().__init__(config, model_config, device_mesh, replica_rank)

    async def _execute_method(self, *args, **kwargs) -> Any:
        self._call = await super()._execute_method(*args, **kwargs)
        return self._call

    async def update_weights(self, weights, **kwargs) -> None:
        """Send new weights to vLLM.

        Raises:
            TimeoutError: when vLLM's process does not answer, with its own error as the cause if it had one.
        """
        # verl waits for the answer to each bucket without a limit. Its socket is made within the call and takes the
        # context's defaults.
        context = zmq.Context.instance()
        context.setsockopt(zmq.RCVTIMEO, WAIT_SECONDS * 1000)
        try:
            await super().update_weights(weights, **kwargs)
        except zmq.Again:
            raise TimeoutError(
                f"vLLM replica {self.replica_rank} has not taken the new weights within {WAIT_SECONDS} s; either its "
                "process is dead (its output is in the log above), or a bucket of weights takes it longer: set "
                "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes lower"
            ) from await self._error_of_vllm()
        finally:
            del context.sockopts[zmq.RCVTIMEO]

    async def _error_of_vllm(self) -> Exception | None:
        try:
            await asyncio.wait_for(self._call, timeout=5)
        except asyncio.TimeoutError:
            pass
        except Exception as error:
            return error
        return None
