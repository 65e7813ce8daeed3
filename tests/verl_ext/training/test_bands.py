"""Which questions a step pulls on, by their pass rates."""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from verl_ext.runs.evaluations import QUESTIONS, WEIGHT, band_metrics, band_of
from verl_ext.training import trainer
from verl_ext.training.bands import weight_by_pass_rate
from verl_ext.training.trainer import ExtendedTrainerSync


def test_questions_and_weight_are_shared_out_over_the_bands():
    # a: 0 of 4, b: 1 of 4, c: 3 of 4, d: all.
    right = {"a": 0, "b": 1, "c": 3, "d": 4}
    weight = {"a": 0.0, "b": 1.0, "c": 2.0, "d": 0.0}
    rows = [(name, float(i < right[name]), weight[name]) for i in range(4) for name in right]
    found = weight_by_pass_rate(*zip(*rows, strict=True))
    assert [found[name] for name in QUESTIONS] == [0.25, 0.25, 0, 0.25, 0, 0.25]
    assert [found[name] for name in WEIGHT] == pytest.approx([0, 1 / 3, 0, 2 / 3, 0, 0])


def test_negative_rewards_are_wrong_and_no_weight_is_no_share():
    found = weight_by_pass_rate(["a", "a"], [-1.0, -0.5], [0.0, 0.0])
    assert found[QUESTIONS[0]] == 1 and not any(found[name] for name in WEIGHT)
    assert not any(weight_by_pass_rate([], [], []).values())


def test_metrics_are_named_by_percent():
    names = ["0", "0_25", "25_50", "50_75", "75_100", "100"]
    assert [name.rsplit("/", 1)[1] for name in WEIGHT] == names
    assert band_metrics("weight")[0] == "training/weight_at_pass_rate/0"
    assert band_of(0.25) == "(0, 0.25]"


def jagged(*rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def by_pass_rate(monkeypatch, keys: list[str], columns: dict) -> dict[str, float]:
    """What the trainer logs; the last row is padding."""
    batch = SimpleNamespace(keys=keys, tags=[{}] * (len(keys) - 1) + [{"is_padding": True}])
    rows = TensorDict(columns, batch_size=len(keys))
    monkeypatch.setattr(trainer, "read", lambda batch, names: rows.select(*names))
    return ExtendedTrainerSync._weight_by_pass_rate(None, batch)


def test_the_trainer_counts_sessions(monkeypatch):
    # b_0 has three trajectories, so a right one of two sessions, in three rows of four.
    keys = ["a_0_0", "b_0_0", "b_0_2", "b_0_1", "b_1_0", "a_1_0", "p_0_0"]
    columns = {
        "advantages": jagged([1.0], [2.0], [2.0, 2.0], [2.0], [-1.0], [-1.0], [5.0]),
        "response_mask": jagged([1.0], [1.0], [1.0, 1.0], [1.0], [1.0], [1.0], [1.0]),
        "rm_scores": jagged([0.0], [1.0], [0.0, 1.0], [1.0], [0.0], [0.0], [0.0]),
    }
    found = by_pass_rate(monkeypatch, keys, columns)
    assert [found[name] for name in QUESTIONS] == [0.5, 0, 0.5, 0, 0, 0]
    assert [found[name] for name in WEIGHT] == pytest.approx([2 / 5, 0, 3 / 5, 0, 0, 0])


def test_the_trainer_weighs_by_tokens_and_leaves_padding_out(monkeypatch):
    # Response a_1 is long, with one token masked; the last row is padding.
    columns = {
        "advantages": jagged([-1.0], [3.0, 3.0, 9.0], [1.0], [-1.0], [5.0]),
        "response_mask": jagged([1.0], [1.0, 1.0, 0.0], [1.0], [1.0], [1.0]),
        "rm_scores": jagged([0.0], [0.0, 0.0, 1.0], [1.0], [1.0], [0.0]),
    }
    found = by_pass_rate(monkeypatch, ["a_0_0", "a_1_0", "b_0_0", "b_1_0", "p_0_0"], columns)
    assert [found[name] for name in QUESTIONS] == [0, 0, 0.5, 0, 0, 0.5]
    assert [found[name] for name in WEIGHT] == pytest.approx([0, 0, 4 / 6, 0, 0, 2 / 6])
