"""verl's client of a vLLM server, in each training worker."""

import asyncio
from typing import Any

import zmq
from verl.workers.rollout.vllm_rollout import ServerAdapter

from verl_ext.cpu.vllm import check

WAIT_SECONDS = 300
"""Time limit for vLLM to load one bucket of weights (at most ``update_weights_bucket_megabytes``)."""


class CPUServerAdapter(ServerAdapter):
    """verl's own adapter, plus refusals of what a CPU does not support, and a time limit where verl waits forever."""

    def __init__(self, config, model_config, device_mesh, replica_rank: int = -1):
        check(config, model_config.hf_config)
        super().__init__(config, model_config, device_mesh, replica_rank)

    async def _execute_method(self, *args, **kwargs) -> Any:
        self._last_call = await super()._execute_method(*args, **kwargs)
        return self._last_call

    async def update_weights(self, weights, *args, **kwargs) -> None:
        """Send new weights to vLLM.

        Raises:
            TimeoutError: vLLM's worker does not answer; the cause is its own error, if it had one.
        """
        # verl waits for the answer to each bucket without a limit, even if the process is dead. Its socket is made
        # within this call, with the defaults of this context. LINGER: closing it must not wait either.
        limit = int(WAIT_SECONDS * 1000)
        options = {zmq.SNDTIMEO: limit, zmq.RCVTIMEO: limit, zmq.LINGER: 0}
        context = zmq.Context.instance()
        before = dict(context.sockopts)
        context.sockopts.update(options)
        try:
            await super().update_weights(weights, *args, **kwargs)
        except zmq.Again:
            raise TimeoutError(
                f"vLLM replica {self.replica_rank} did not load new weights within {WAIT_SECONDS} s. If its process "
                "died, see its output above; if one bucket takes longer, lower "
                "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
            ) from await self._error_of_vllm()
        finally:
            context.sockopts.clear()
            context.sockopts.update(before)

    async def _error_of_vllm(self) -> Exception | None:
        """Return the error of the call that should have received the weights; None while it still runs."""
        try:
            await asyncio.wait_for(self._last_call, timeout=1)
        except asyncio.TimeoutError:
            return None
        except Exception as error:
            return error
        return None
