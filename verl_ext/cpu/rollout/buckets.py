"""Weights in messages of bounded size."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable

import torch
from verl.workers.rollout.utils import ensure_async_iterator


async def in_buckets(
    weights: Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]],
    limit: int,
    *,
    wanted: bool,
    dtype: torch.dtype | None = None,
) -> AsyncIterator[tuple[list[tuple[str, torch.Tensor]], bool]]:
    """The weights on the CPU, at most ``limit`` bytes at a time unless one alone is larger, and whether it is the last.

    Every rank runs through all weights, because gathering one from its shards is a collective; a rank on which they are
    not ``wanted`` gets no bucket.

    Args:
        dtype: to convert them to; None leaves them as they are.
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
