"""verl's checkpoint engine "ray": sends weights to separate rollout servers through Ray's object store.

verl's own engines (nccl, nixl, ...) need accelerators. This one lets ``trainer.v1.trainer_mode=separate_async`` run on
a CPU; for large models it is slow::

    actor_rollout_ref.rollout.checkpoint_engine.backend=ray
    actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=verl_ext.cpu.checkpoint_engine
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import ray
import torch
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

from verl_ext.cpu.rollout.buckets import NamedTensor, Weights, in_buckets

BUCKETS_UNDER_WAY = 2
"""Buckets that wait for the slowest reader before the trainer waits too."""


class Mailbox:
    """A Ray actor that hands each bucket of weights to each reader, in order."""

    async def open(self, readers: int) -> None:
        self._queues = [asyncio.Queue(BUCKETS_UNDER_WAY) for _ in range(readers)]

    async def put(self, bucket: list[NamedTensor] | None) -> None:
        for queue in self._queues:
            await queue.put(bucket)

    async def get(self, reader: int) -> list[NamedTensor] | None:
        return await self._queues[reader].get()


@CheckpointEngineRegistry.register("ray")
class RayCheckpointEngine(CheckpointEngine):
    """One end of the transfer: the first training rank sends, all rollout workers receive.

    Args:
        bucket_size: bytes of weights in one message.
        is_master: this is the training rank that sends.
    """

    def __init__(self, bucket_size: int, is_master: bool = False):
        self.bucket_size, self.is_master = bucket_size, is_master
        self._mailbox: Any = None
        self._reader = -1

    def prepare(self) -> Any:
        return ray.remote(num_cpus=0)(Mailbox).remote() if self.is_master else None

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        mailbox = next(m for m in metadata if m is not None)
        ray.get(mailbox.open.remote(rollout_world_size))
        actors = {"mailbox": [mailbox] * actor_wg_world_size, "reader": [-1] * actor_wg_world_size}
        return actors, {"mailbox": [mailbox] * rollout_world_size, "reader": list(range(rollout_world_size))}

    def init_process_group(self, mailbox: Any, reader: int) -> None:
        self._mailbox, self._reader = mailbox, reader

    def finalize(self) -> None:
        self._mailbox = None  # Ray ends the actor with its last handle

    @torch.no_grad()
    async def send_weights(self, weights: Weights, global_steps: int | None = None) -> None:
        async for bucket, _ in in_buckets(weights, self.bucket_size, wanted=self.is_master):
            await self._mailbox.put.remote(bucket)
        if self.is_master:
            await self._mailbox.put.remote(None)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[NamedTensor]:
        while (bucket := await self._mailbox.get.remote(self._reader)) is not None:
            for name_and_tensor in bucket:
                yield name_and_tensor
