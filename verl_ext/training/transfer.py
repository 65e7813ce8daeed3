"""What a batch is while it is not on a worker: rows in verl's TransferQueue, each under a key of its own.

The only module that calls TransferQueue, and the only one that knows how verl names rows. A batch is a ``KVBatchMeta``:
keys, a tag (dict) per row, and facts about the whole batch in ``extra_info``.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta as Batch

KEY = re.compile(r"([^_]+)_(\d+)_(\d+)")


class RowKey(NamedTuple):
    """A row's key in its parts, ``{uid}_{session}_{trajectory}``."""

    uid: str
    """Of the question."""
    session: int
    """Which of the question's responses."""
    trajectory: int
    """Which part of that response: an agent loop may return several."""

    def __str__(self) -> str:
        return f"{self.uid}_{self.session}_{self.trajectory}"


def parse_key(key: str) -> RowKey:
    """Take a row's key apart.

    Raises:
        ValueError: the key has another shape, so that its question cannot be told; names the key.
    """
    match = KEY.fullmatch(key)
    if match is None:
        raise ValueError(
            f"the key {key!r} of a batch is not of the shape uid_session_trajectory (as in 4f2a_0_0) by which the "
            "responses to one question are found; this verl names its rows otherwise, and verl-disco needs an update"
        )
    return RowKey(match[1], int(match[2]), int(match[3]))


def read(batch: Batch, fields: Sequence[str] | None = None, rows: slice = slice(None)) -> TensorDict:
    """Fetch rows of a batch, in its order.

    Args:
        fields: names of the columns; None for all.
        rows: which of the batch's.
    """
    return tq.kv_batch_get(
        keys=batch.keys[rows], partition_id=batch.partition_id, select_fields=None if fields is None else list(fields)
    )


def write(batch: Batch, fields: TensorDict) -> None:
    """Add columns to the rows of a batch, in its order."""
    written = tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
    assert list(written.keys) == list(batch.keys)


def put(partition: str, keys: Sequence[str], tags: list[dict[str, Any]], fields: TensorDict | None = None) -> None:
    """Store new rows, or new tags of stored ones.

    Args:
        partition: verl's name of what they are for, "train" or "val".
        keys: of responses as :class:`RowKey` names them, of questions their uid.
    """
    tq.kv_batch_put(keys=list(keys), partition_id=partition, tags=tags, fields=fields)
