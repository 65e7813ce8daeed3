"""Weights in messages of bounded size."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable

import torch
from verl.workers.rollout.utils import ensure_async_iterator

NamedTensor = tuple[str, torch.Tensor]
Weights = Iterable[NamedTensor] | AsyncIterable[NamedTensor]


async def in_buckets(
    weights: Weights, limit: int, *, wanted: bool, dtype: torch.dtype | None = None
) -> AsyncIterator[tuple[list[NamedTensor], bool]]:
    """Yield buckets of weights on the CPU, each with a flag that is True for the last one.

    Args:
        limit: bytes per bucket, at most, unless one tensor alone is larger.
        wanted: False: the weights are read, because gathering a shard is a collective of all ranks, but not yielded.
        dtype: to convert the weights to; None leaves them as they are.
    """
    bucket, size = [], 0
    async for name, tensor in ensure_async_iterator(weights):
        if not wanted:
            continue
        tensor = tensor.detach().to("cpu", dtype=dtype)
        if bucket and size + tensor.nbytes > limit:
            yield bucket, False
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if wanted:
        yield bucket, True
