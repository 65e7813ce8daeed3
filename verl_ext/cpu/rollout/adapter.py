"""The training workers' side of the rollout: sends the actor's weights to the server."""

import os
from typing import Any

import numpy as np
import ray
import torch
from torch.distributed.device_mesh import DeviceMesh
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout

from verl_ext.cpu.rollout.buckets import NamedTensor, Weights, in_buckets
from verl_ext.cpu.rollout.replica import server_name


class HFServerAdapter(BaseRollout):
    """A training worker's client of its replica's server; only the first rank of a replica calls the server."""

    def __init__(
        self, config: RolloutConfig, model_config: HFModelConfig, device_mesh: DeviceMesh, replica_rank: int = -1
    ):
        super().__init__(config, model_config, device_mesh)
        rank, ranks = int(os.environ["RANK"]), self.config.tensor_model_parallel_size
        self.replica_rank = rank // ranks if replica_rank == -1 else replica_rank
        self.is_leader_rank = rank % ranks == 0
        self.dtype = getattr(torch, self.config.dtype)
        self._server: ray.actor.ActorHandle | None = None

    @property
    def server(self) -> ray.actor.ActorHandle:
        # The server starts after this adapter.
        if self._server is None:
            self._server = ray.get_actor(server_name(self.replica_rank))
        return self._server

    async def resume(self, tags: list[str]) -> None:
        if self.config.free_cache_engine and self.is_leader_rank:
            await self.server.wake_up.remote(tags=tags)

    async def release(self) -> None:
        if self.config.free_cache_engine and self.is_leader_rank:
            await self.server.sleep.remote()

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Weights,
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Send all weights, in buckets of ``checkpoint_engine.update_weights_bucket_megabytes``, and their version.

        Raises:
            ValueError: the weights are LoRA adapters or differences.
        """
        if peft_config is not None:
            raise ValueError("rollout.name=hf needs full weights, not LoRA adapters; set model.lora.merge=True")
        if wire_format != "named_tensors":
            raise ValueError(f"rollout.name=hf needs wire_format=named_tensors, not {wire_format}")
        limit = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        first = True
        async for bucket, last in in_buckets(weights, limit, wanted=self.is_leader_rank, dtype=self.dtype):
            await self._send(bucket, first, last)
            first = False
        if self.is_leader_rank:
            await self.server.set_global_steps.remote(global_steps)

    async def _send(self, bucket: list[NamedTensor], first: bool, last: bool) -> None:
        # As bytes, because numpy has no bfloat16.
        data = [tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for _, tensor in bucket]
        await self.server.update_weights.remote(
            [name for name, _ in bucket], [tuple(t.shape) for _, t in bucket], np.concatenate(data), first, last
        )
