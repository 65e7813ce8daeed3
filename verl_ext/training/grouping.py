"""Deal a batch's sequences to mini-batches and data-parallel ranks, with all responses to a question in one mini-batch.

Pure: sequences are known by their group and length alone. A question may span ranks, never mini-batches. Within each
mini-batch every rank gets the same number of rows (verl slices by rows) and, as nearly as can be, the same number of
tokens, longest rows first; padding rows fill what is missing.
"""

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Deal:
    """Where each row goes.

    Attributes:
        order: rows in the order that verl's dispatch wants: rank 0's rows, all its mini-batches one after another,
            then rank 1's. Row numbers >= the number of sequences dealt are padding rows.
        mini_batch: the mini-batch of each entry of ``order``.
        num_padding: padding rows needed.
        partitions: rows by mini-batch and rank.
    """

    order: list[int]
    mini_batch: list[int]
    num_padding: int
    partitions: list[list[list[int]]]


def split_evenly(items: Sequence, most: int) -> list[list]:
    """Fewest parts of at most ``most`` items, sizes differing by at most one, order kept."""
    parts = -(-len(items) // most)
    bounds = [round(i * len(items) / parts) for i in range(parts + 1)]
    return [list(items[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Split items into ``parts`` of equal size and nearly equal total length. Takes memory linear in the items.

    The longest go first, one to each part, the longer ones to the parts with less so far. Then parts trade pairs of
    items: in each round the fuller half with the emptier half, or where that gains nothing, the fullest with another.

    Args:
        lengths: length of each item; their number is a multiple of ``parts``.
    """
    if len(lengths) == parts:
        return [[i] for i in range(parts)]
    if parts == 1:
        return [list(range(len(lengths)))]
    size = np.asarray(lengths)
    load = np.zeros(parts, dtype=size.dtype)
    dealt = []
    for items in np.argsort(-size, kind="stable").reshape(-1, parts):
        dealt.append(np.empty_like(items))
        dealt[-1][load.argsort(kind="stable")] = items
        load += size[dealt[-1]]
    split = np.stack(dealt, 1)
    for _ in range(100):
        split = np.take_along_axis(split, size[split].argsort(1), 1)
        tokens = size[split]
        load = tokens.sum(1)
        order = load.argsort()
        full, other = order[::-1][: parts // 2], order[: parts // 2]
        miss, a, b = _best_trades(tokens[full], tokens[other])
        chosen = miss < (load[full] - load[other]) / 2
        if not chosen[0]:
            full, other = order[[-1] * (parts - 1)], order[:-1]
            miss, a, b = _best_trades(tokens[full], tokens[other])
            best = ((load[full] + load[other]) / 2 + miss).argmin()
            chosen = (np.arange(parts - 1) == best) & (miss < (load[full] - load[other]) / 2)
            if not chosen.any():
                break
        full, other, a, b = full[chosen], other[chosen], a[chosen], b[chosen]
        split[full, a], split[other, b] = split[other, b], split[full, a]
    return split.tolist()


def _best_trades(full: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pair of parts, the trade of an item for an item that brings the two closest to their mean.

    Args:
        full, other: (pairs, items) lengths, sorted within each part.

    Returns:
        How far from the mean both are then, and the item's place in ``full`` and in ``other``, (pairs,) each.
    """
    pair, size = np.arange(len(full)), full.shape[1]
    half = (full.sum(1) - other.sum(1))[:, None] / 2
    # The item of the other part that would be right for each of the full one, and its neighbours there. Shifted, all
    # parts are one sorted sequence.
    wanted, shift = full - half, pair[:, None] * (2.0 * max(full.max(), other.max()) + 1)
    found = np.searchsorted((other + shift).ravel(), (np.maximum(wanted, 0) + shift).ravel())
    found = found.reshape(full.shape) - pair[:, None] * size
    near = np.concatenate([found - 1, found], 1).clip(0, size - 1)
    miss = np.abs(np.concatenate([wanted, wanted], 1) - np.take_along_axis(other, near, 1))
    best = miss.argmin(1)
    return miss[pair, best], best % size, near[pair, best]


def deal(
    groups: Sequence[Hashable],
    lengths: Sequence[int],
    *,
    groups_per_mini_batch: int,
    ranks: int,
    micro_batches: Sequence[int] = (),
    padding_length: int = 0,
    shuffle_seed: int | None = None,
) -> Deal:
    """Assign whole groups to mini-batches, and each mini-batch's rows to ranks.

    Args:
        groups: group of each sequence, in any order; groups may be of any sizes.
        lengths: tokens of each sequence.
        groups_per_mini_batch: most groups in a mini-batch; where it does not divide their number, mini-batches differ
            by at most one group.
        ranks: data-parallel ranks.
        micro_batches: fixed micro-batch sizes (of training and of measuring, say). Rows of a rank in a mini-batch are a
            multiple of each of them that they exceed.
        padding_length: tokens of a padding row.
        shuffle_seed: deal groups in a random order instead of that of their first sequence.

    Raises:
        ValueError: for an empty batch or a size below 1.
    """
    if not len(groups) or min(groups_per_mini_batch, ranks, *micro_batches) < 1:
        raise ValueError(
            f"cannot deal {len(groups)} sequences to mini-batches of {groups_per_mini_batch} groups over {ranks} ranks"
            + (f" by micro-batches of {', '.join(map(str, micro_batches))}" if micro_batches else "")
        )
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    names = list(members)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(names)
    mini_batches = [
        [row for name in part for row in members[name]] for part in split_evenly(names, groups_per_mini_batch)
    ]
    rows = -(-max(map(len, mini_batches)) // ranks)
    for size in sorted(micro_batches):
        if rows > size:
            multiple = math.lcm(*(s for s in micro_batches if s <= size))
            rows = -(-rows // multiple) * multiple

    padding = len(groups)
    partitions = []
    for mini_batch in mini_batches:
        missing = rows * ranks - len(mini_batch)
        filled = mini_batch + list(range(padding, padding + missing))
        padding += missing
        tokens = [lengths[row] if row < len(groups) else padding_length for row in filled]
        # Rows of like length next to each other: a fixed micro-batch is padded to its longest.
        parts = [sorted(part, key=lambda i: -tokens[i]) for part in balance(tokens, ranks)]
        partitions.append([[filled[i] for i in part] for part in parts])
    order = [row for rank in range(ranks) for mini_batch in partitions for row in mini_batch[rank]]
    mini_batch = [m for _ in range(ranks) for m in range(len(partitions)) for _ in range(rows)]
    return Deal(order, mini_batch, padding - len(groups), partitions)
