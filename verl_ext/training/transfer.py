"""Read and write the rows of a batch in verl's TransferQueue.

The only module that calls TransferQueue or knows how verl names rows. A batch is a ``KVBatchMeta``: keys, a tag (dict)
per row, and facts about the whole batch in ``extra_info``.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta as Batch

KEY = re.compile(r"([^_]+)_(\d+)_(\d+)")


class RowKey(NamedTuple):
    """The parts of a row's key ``{uid}_{session}_{trajectory}``.

    Attributes:
        uid: of the question.
        session: index of the response to that question.
        trajectory: index of the part of that response; an agent loop may return several.
    """

    uid: str
    session: int
    trajectory: int

    def __str__(self) -> str:
        return f"{self.uid}_{self.session}_{self.trajectory}"


def parse_key(key: str) -> RowKey:
    """Split a row's key into its parts.

    Raises:
        ValueError: the key has another form, so the row's question is unknown.
    """
    match = KEY.fullmatch(key)
    if match is None:
        raise ValueError(
            f"the key {key!r} of a batch is not of the form uid_session_trajectory (as in 4f2a_0_0), which tells the "
            "question of a response; this verl names its rows differently, and verl-disco needs an update"
        )
    return RowKey(match[1], int(match[2]), int(match[3]))


def read(batch: Batch, fields: Sequence[str] | None = None, rows: slice = slice(None)) -> TensorDict:
    """Fetch ``rows`` of a batch, in its order, with the columns ``fields`` (None: all)."""
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
        partition: "train" or "val".
        keys: of responses :class:`RowKey`, of questions their uid.
        tags, fields: one tag and one row of columns per key.
    """
    tq.kv_batch_put(keys=list(keys), partition_id=partition, tags=tags, fields=fields)
