"""Deal a batch's responses to mini-batches and data-parallel ranks, with whole groups in each mini-batch.

Pure functions of each response's group and length. A group may span ranks, never mini-batches. In each mini-batch every
rank gets the same number of rows (verl slices by rows) and nearly the same number of tokens, in all and of the rows
that are trained on, longest rows first; padding rows fill the gaps.
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
        order: rows in the order of verl's dispatch: rank 0's rows, mini-batch by mini-batch, then rank 1's, and so on.
            Numbers from the number of sequences on are padding rows.
        mini_batch: the mini-batch of each entry of ``order``.
        num_padding: number of padding rows.
        partitions: rows by mini-batch and rank.
    """

    order: list[int]
    mini_batch: list[int]
    num_padding: int
    partitions: list[list[list[int]]]


def values_by_group(groups: Sequence[Hashable], values: Sequence[float]) -> dict[Hashable, set[float]]:
    """Collect the different values of each group."""
    seen: dict[Hashable, set[float]] = {}
    for group, value in zip(groups, values, strict=True):
        seen.setdefault(group, set()).add(value)
    return seen


def split_evenly(items: Sequence, most: int) -> list[list]:
    """Split into as few parts of at most ``most`` items as possible, in order, with sizes differing by at most one."""
    parts = -(-len(items) // most)
    bounds = [round(i * len(items) / parts) for i in range(parts + 1)]
    return [list(items[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def balance(lengths: Sequence[int], parts: int, base: Sequence[int] | None = None) -> list[list[int]]:
    """Split items into ``parts`` of equal size and nearly equal total length, in memory linear in the items.

    Items go longest first, one to each part, the longer ones to the shorter parts. Then parts swap single items: the
    longer half with the shorter half in each round, or if that gains nothing, the longest with one other.

    Args:
        lengths: length of each item; their number is a multiple of ``parts``.
        base: length that each part has before; None: nothing.
    """
    if parts == 1 or not len(lengths) or (base is None and parts == len(lengths)):
        return np.arange(len(lengths)).reshape(parts, -1).tolist()
    size = np.asarray(lengths)
    start = np.zeros(parts, dtype=size.dtype) if base is None else np.asarray(base)
    load = start.copy()
    dealt = []
    for items in np.argsort(-size, kind="stable").reshape(-1, parts):
        dealt.append(np.empty_like(items))
        dealt[-1][load.argsort(kind="stable")] = items
        load += size[dealt[-1]]
    split = np.stack(dealt, 1)
    for _ in range(100):
        split = np.take_along_axis(split, size[split].argsort(1), 1)
        tokens = size[split]
        load = tokens.sum(1) + start
        order = load.argsort()
        full, other = order[::-1][: parts // 2], order[: parts // 2]
        miss, a, b = _best_trades(tokens[full], tokens[other], load[full] - load[other])
        chosen = miss < (load[full] - load[other]) / 2
        if not chosen[0]:
            full, other = order[[-1] * (parts - 1)], order[:-1]
            miss, a, b = _best_trades(tokens[full], tokens[other], load[full] - load[other])
            best = ((load[full] + load[other]) / 2 + miss).argmin()
            chosen = (np.arange(parts - 1) == best) & (miss < (load[full] - load[other]) / 2)
            if not chosen.any():
                break
        full, other, a, b = full[chosen], other[chosen], a[chosen], b[chosen]
        split[full, a], split[other, b] = split[other, b], split[full, a]
    return split.tolist()


def balance_both(lengths: Sequence[int], trained: Sequence[bool], parts: int) -> list[list[int]]:
    """Split items as :func:`balance` does, those that are ``trained`` by themselves, and then all of them."""
    size = np.asarray(lengths)
    order = np.argsort(-size, kind="stable")
    is_trained = np.asarray(trained, dtype=bool)[order]
    first, others = order[is_trained], order[~is_trained]
    if not len(first) or not len(others):
        return balance(lengths, parts)
    even = len(first) // parts * parts
    split = [first[part] for part in np.asarray(balance(size[first[:even]], parts)).reshape(parts, -1).astype(int)]
    if odd := len(first) - even:
        # One more row for each: the last trained ones, and the shortest others where there are none.
        last = np.concatenate([first[even:], others[odd - parts :]])
        others = others[: odd - parts]
        load = [size[part].sum() for part in split]
        for part, row in zip(np.argsort(load, kind="stable"), last, strict=True):
            split[part] = np.append(split[part], row)
    rest = balance(size[others], parts, base=[size[part].sum() for part in split])
    return [[*a.tolist(), *others[b].tolist()] for a, b in zip(split, rest, strict=True)]


def _best_trades(full: np.ndarray, other: np.ndarray, lead: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find for each pair of parts the swap of two items that brings both closest to their mean.

    Args:
        full, other: (pairs, items) lengths, sorted within each part.
        lead: (pairs,) by how much the first part is longer.

    Returns:
        (pairs,) each: the distance from the mean after the swap, and the item's index in ``full`` and in ``other``.
    """
    pair, size = np.arange(len(full)), full.shape[1]
    half = lead[:, None] / 2
    # For each item of the longer part, the items of the other part nearest to the length wanted in exchange. A shift
    # per pair makes one sorted sequence of all parts.
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
    trained: Sequence[bool] | None = None,
) -> Deal:
    """Assign whole groups to mini-batches, and each mini-batch's rows to ranks.

    Args:
        groups: group of each sequence, in any order; groups may be of any sizes.
        lengths: tokens of each sequence.
        groups_per_mini_batch: upper limit; mini-batches differ by at most one group.
        ranks: data-parallel ranks.
        micro_batches: fixed micro-batch sizes (e.g. for training and for log-probabilities). A rank's rows per
            mini-batch are a multiple of every size that they exceed.
        padding_length: tokens of a padding row.
        shuffle_seed: deal groups in a random order; None for the order of their first sequences.
        trained: which sequences are likely to be trained on; others may only be measured. Ranks get equally many of
            either kind, give or take one, with nearly the same tokens. None: all.

    Raises:
        ValueError: the batch is empty or a size is below 1.
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
        kinds = [trained is None or (row < len(groups) and trained[row]) for row in filled]
        # Sorted, because a fixed micro-batch is padded to its longest row.
        parts = [sorted(part, key=lambda i: -tokens[i]) for part in balance_both(tokens, kinds, ranks)]
        partitions.append([[filled[i] for i in part] for part in parts])
    order = [row for rank in range(ranks) for mini_batch in partitions for row in mini_batch[rank]]
    mini_batch = [m for _ in range(ranks) for m in range(len(partitions)) for _ in range(rows)]
    return Deal(order, mini_batch, padding - len(groups), partitions)
