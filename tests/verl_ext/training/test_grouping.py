"""Whole-group mini-batches: every group whole, every sequence once, tokens balanced over the ranks."""

import math
import random
import tracemalloc
from itertools import combinations

import pytest
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from verl.utils.seqlen_balancing import get_seqlen_balanced_partitions

from verl_ext.training.grouping import balance, deal, split_evenly

batches = st.lists(
    st.lists(st.integers(1, 8192), min_size=1, max_size=16), min_size=1, max_size=40
)  # token lengths by question


def flatten(batch, seed):
    """Sequences of a batch in an arbitrary order: (group, length)."""
    rows = [(f"q{g}", length) for g, lengths in enumerate(batch) for length in lengths]
    random.Random(seed).shuffle(rows)
    return [g for g, _ in rows], [length for _, length in rows]


@cases(200)
@given(
    batches,
    st.integers(0, 3),
    st.integers(1, 16),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([(), (2,), (4, 5), (4, 8), (16, 16)]),
    st.sampled_from([None, 0, 7]),
    st.sampled_from([None, 0.0, 0.4, 1.0]),
)
def test_every_group_whole_and_every_sequence_once(
    batch, seed, per_mini_batch, ranks, micro_batches, shuffle_seed, share
):
    groups, lengths = flatten(batch, seed)
    trained = None if share is None else [hash(g) % 10 < 10 * share for g in groups]
    plan = deal(
        groups,
        lengths,
        groups_per_mini_batch=per_mini_batch,
        ranks=ranks,
        micro_batches=micro_batches,
        padding_length=128,
        shuffle_seed=shuffle_seed,
        trained=trained,
    )
    # Every sequence once, and each padding row once.
    assert sorted(plan.order) == list(range(len(groups) + plan.num_padding))
    # Each group in one mini-batch.
    home = {}
    for row, mini_batch in zip(plan.order, plan.mini_batch, strict=True):
        if row < len(groups):
            assert home.setdefault(groups[row], mini_batch) == mini_batch
    sizes = [sum(m == i for m in home.values()) for i in range(len(plan.partitions))]
    assert max(sizes) <= per_mini_batch and max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-len(batch) // per_mini_batch)
    # Rank-major, and the same number of rows for each rank in each mini-batch.
    rows = {len(part) for parts in plan.partitions for part in parts}
    assert len(rows) == 1
    (rows,) = rows
    assert all(rows % size == 0 or rows <= size for size in micro_batches)
    for rank in range(ranks):
        for m in range(len(sizes)):
            start = (rank * len(sizes) + m) * rows
            assert plan.order[start : start + rows] == plan.partitions[m][rank]
            assert set(plan.mini_batch[start : start + rows]) == {m}
            tokens = [lengths[row] if row < len(groups) else 128 for row in plan.partitions[m][rank]]
            assert tokens == sorted(tokens, reverse=True)
    for parts in plan.partitions if trained else ():
        counts = [sum(row < len(groups) and trained[row] for row in part) for part in parts]
        assert max(counts) - min(counts) <= 1
    # No more padding than the fullest mini-batch and the micro-batches ask for.
    fullest = max(sum(row < len(groups) for part in parts for row in part) for parts in plan.partitions)
    needed = -(-fullest // ranks)
    assert rows - needed < math.lcm(*(size for size in micro_batches if size < rows))


def best_two_way(lengths):
    half = len(lengths) // 2
    total = sum(lengths)
    return min(max(sum(c), total - sum(c)) for c in combinations(lengths, half))


@cases(300)
@given(st.lists(st.integers(1, 8192), min_size=2, max_size=12).filter(lambda x: len(x) % 2 == 0))
def test_two_ranks_within_10_percent_of_the_best_partition(lengths):
    heaviest = max(sum(lengths[i] for i in part) for part in balance(lengths, 2))
    assert heaviest <= 1.10 * best_two_way(lengths)


@cases(100)
@given(st.integers(2, 16), st.integers(8, 32), st.integers(0, 10**6))
def test_many_ranks_within_10_percent_of_the_lower_bound(ranks, rows, seed):
    rng = random.Random(seed)
    lengths = [min(8192, int(rng.lognormvariate(7, 0.8)) + 1) for _ in range(ranks * rows)]
    parts = balance(lengths, ranks)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert {len(part) for part in parts} == {rows}
    # As many rows for each rank: the longest comes with the shortest others at least.
    ordered = sorted(lengths)
    bound = max(sum(lengths) / ranks, ordered[-1] + sum(ordered[: rows - 1]))
    assert max(sum(lengths[i] for i in part) for part in parts) <= 1.10 * bound


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_what_is_trained_is_balanced_and_what_is_measured_too(ranks, share):
    rng = random.Random(ranks)
    groups = [f"q{i // 8}" for i in range(32 * ranks)]
    lengths = [min(8192, int(rng.lognormvariate(7, 0.8)) + 1) for _ in groups]
    mixed = {g: rng.random() < share for g in sorted(set(groups))}
    trained = [mixed[g] for g in groups]

    def heaviest_to_mean(plan, rows):
        tokens = [sum(lengths[row] for row in part if row in rows) for part in plan.partitions[0]]
        return max(tokens) / (sum(tokens) / ranks)

    everything = set(range(len(groups)))
    teaching = {row for row in everything if trained[row]}
    plan, before = (
        deal(groups, lengths, groups_per_mini_batch=4 * ranks, ranks=ranks, trained=t) for t in (trained, None)
    )
    counts = [sum(row in teaching for row in part) for part in plan.partitions[0]]
    assert max(counts) - min(counts) <= 1
    # As many rows for each rank: the longest comes with the shortest others at least.
    ordered = sorted(lengths[row] for row in teaching)
    bound = max(1.0, (ordered[-1] + sum(ordered[: min(counts) - 1])) / (sum(ordered) / ranks))
    assert heaviest_to_mean(plan, teaching) <= min(1.15 * bound, heaviest_to_mean(before, teaching))
    # What is only measured makes up for it, as far as there is such.
    assert heaviest_to_mean(plan, everything) <= (1.001 if share < 0.9 else 1.12)


def test_balance_is_better_than_slicing():
    lengths = [8000, 7000, 6000, 5000, 400, 300, 200, 100]
    heaviest = max(sum(lengths[i] for i in part) for part in balance(lengths, 2))
    assert heaviest == 13500


def heaviest(lengths, parts):
    return max(sum(lengths[i] for i in part) for part in parts)


@pytest.mark.parametrize("ranks, rows", [(2, 3), (8, 4), (64, 4), (64, 8), (256, 4)])
def test_balance_is_no_worse_than_verls_partition(ranks, rows):
    rng = random.Random(ranks)
    for _ in range(5):
        lengths = [min(8192, int(rng.lognormvariate(7, 0.8)) + 1) for _ in range(ranks * rows)]
        verls = get_seqlen_balanced_partitions(lengths, ranks, equal_size=True)
        assert heaviest(lengths, balance(lengths, ranks)) <= 1.002 * heaviest(lengths, verls)


@pytest.mark.parametrize("lengths", [[0] * 12, [5] * 12, [1] * 11 + [8192], [0, 1] * 6, [8192] * 6 + [1] * 6])
def test_balance_of_odd_lengths(lengths):
    for parts in (1, 2, 3, 4, 12):
        split = balance(lengths, parts)
        assert sorted(i for part in split for i in part) == list(range(12))
        assert {len(part) for part in split} == {12 // parts}
        assert heaviest(lengths, split) - min(sum(lengths[i] for i in part) for part in split) <= max(lengths)


def test_the_memory_of_a_deal_is_linear_in_the_rows():
    # A table of all trades between two ranks' rows would take 0.5 GiB.
    count, ranks = 16384, 4
    rng = random.Random(0)
    lengths = [rng.randint(1, 8192) for _ in range(count)]
    tracemalloc.start()
    plan = deal([i // 8 for i in range(count)], lengths, groups_per_mini_batch=count, ranks=ranks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**11 * count
    (parts,) = plan.partitions
    assert heaviest(lengths, parts) - sum(lengths) / ranks < 2


def test_split_evenly_keeps_order_and_balances():
    assert split_evenly(list("abcdefg"), 3) == [["a", "b"], ["c", "d", "e"], ["f", "g"]]
    assert split_evenly(list("abcd"), 4) == [["a", "b", "c", "d"]]


def test_shuffle_changes_the_deal_and_is_seeded():
    groups = [f"q{i}" for i in range(32)]
    one, two, other = (
        deal(groups, [10] * 32, groups_per_mini_batch=8, ranks=1, shuffle_seed=s).order for s in (1, 1, 2)
    )
    assert one == two != other
    assert deal(groups, [10] * 32, groups_per_mini_batch=8, ranks=1).order == list(range(32))


def test_two_micro_batch_sizes_share_the_padding():
    groups = [f"q{i}" for i in range(37)]
    plan = deal(groups, [10] * 37, groups_per_mini_batch=37, ranks=1, micro_batches=(1, 16))
    assert plan.num_padding == 48 - 37
    assert deal(groups, [10] * 37, groups_per_mini_batch=37, ranks=1, micro_batches=(64,)).num_padding == 0


def test_refuses_nothing_to_deal():
    with pytest.raises(ValueError, match="cannot deal 0 sequences to mini-batches of 4 groups over 2 ranks"):
        deal([], [], groups_per_mini_batch=4, ranks=2)
    with pytest.raises(ValueError, match="cannot deal 1 sequences .* by micro-batches of 0"):
        deal(["q"], [1], groups_per_mini_batch=4, ranks=2, micro_batches=(0,))
