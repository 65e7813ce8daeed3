"""What the benchmarks of the update assume of lengths, and the simulation of schedules on many ranks."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def schedules(monkeypatch):
    """``benchmarks/published_schedule.py`` as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("published_schedule")
    # Their names are too general to stay importable.
    for name in ("published_schedule", "engine", "record"):
        sys.modules.pop(name)


def test_lengths_are_skewed_with_the_mean_that_was_asked_for(schedules):
    lengths = schedules.skewed_lengths(4096, 8192)
    assert abs(lengths.mean() / 8192 - 0.4) < 1e-3 and lengths.max() == 8192
    assert np.median(lengths) < lengths.mean()


def test_mixed_groups_are_spread_evenly_and_are_the_share_that_was_asked_for(schedules):
    responses = schedules.Responses.make(np.full(128, 10), 8, 0.5, 2)
    groups = responses.reward.reshape(4, 4, 8)
    assert ((groups.min(-1) != groups.max(-1)).sum(-1) == 2).all() and responses.trained == 0.5


def test_costs_are_found_again(schedules):
    length = np.array([96, 192, 384, 768])
    cost = schedules.Cost.fit(length, 2e-4 + 3e-7 * length + 5e-3 / length)
    assert (cost.token, cost.square, cost.sequence) == pytest.approx((2e-4, 3e-7, 5e-3))
    assert cost(1000) == pytest.approx(0.505)
    with pytest.raises(RuntimeError, match="extrapolated"):
        schedules.Cost.fit(length, 2e-4 - 1e-7 * length)


def test_without_spread_the_schedules_differ_by_the_measuring_pass_alone(schedules):
    train, measure = schedules.Cost(4.0, 0.0), schedules.Cost(1.0, 0.0)
    found = schedules.simulate(np.full((9, 8), 100), 100, 8, train, measure)
    assert found["exact"] / found["published"] == pytest.approx((4 + 0.75) / 4)
    assert found["padding removed"] == found["published"] == 4 * 100 * schedules.ROWS * schedules.MINI_BATCHES
    assert {v for k, v in found.items() if k.startswith("wasted")} == {0.0}


def test_skewed_lengths_cost_the_published_schedule_its_padding_and_ours_next_to_nothing(schedules):
    train, measure = schedules.Cost(4.0, 0.0), schedules.Cost(1.0, 0.0)
    groups = schedules.skewed_lengths(4096, 8192).reshape(-1, 8)
    found = schedules.simulate(groups, 8192, 64, train, measure)
    assert found["wasted by published"] == pytest.approx(0.6, abs=0.02)
    assert found["wasted by exact"] < 0.02 < 0.1 < found["wasted by padding removed"]
