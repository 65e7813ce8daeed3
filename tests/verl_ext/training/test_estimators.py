"""Our advantage estimators in verl's registry, on numbers worked out by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from verl_ext.training.advantages import estimating
from verl_ext.training.estimators import ESTIMATORS
from verl_ext.training.trainer import ExtendedTrainerSync
from verl_ext.training.transfer import RowKey


def advantages(name: str, reward: list[float], uid: str, lengths: list[int] | None = None) -> list[float]:
    """Of each response, from verl's registry: the same for all of its tokens, 0 elsewhere."""
    length = torch.tensor(lengths or [2] * len(reward))
    mask = (torch.arange(4) < length[:, None]).long()
    rewards = torch.zeros(len(reward), 4).scatter(1, length[:, None] - 1, torch.tensor(reward).float()[:, None])
    found, returns = get_adv_estimator_fn(name)(
        token_level_rewards=rewards, response_mask=mask, index=np.array(list(uid), dtype=object), config=None
    )
    assert torch.equal(found, returns) and found.dtype == rewards.dtype
    assert torch.equal(found, found[:, :1] * mask)
    return found[:, 0].tolist()


def test_maxrl_divides_by_the_mean_reward():
    # a: 1 of 4; b: 3 of 4; c: none, so no signal; d: all.
    found = advantages("maxrl", [1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1], "aaaabbbbccdd")
    assert found == pytest.approx([3, -1, -1, -1, -1, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0])


def test_maxrl_takes_graded_rewards_in_any_order():
    assert advantages("maxrl", [0.5, 1, 0.25, 0], "abab") == pytest.approx([1 / 3, 1, -1 / 3, -1])


def test_maxrl_refuses_negative_rewards():
    with pytest.raises(ValueError, match="adv_estimator=maxrl .*response 1 has the reward -1; use rewards"):
        advantages("maxrl", [1, -1], "aa")


def test_dgpo_balances_questions_and_prefers_harder_ones():
    # n (r - mean) / sum |r - mean|: a, 1 of 4: 2 and -2/3; b, 1 of 2: 1 and -1. c does not differ.
    a, b = (2 * math.exp(-p / 2) / (math.exp(-1 / 8) + math.exp(-1 / 4)) for p in (1 / 4, 1 / 2))
    lengths = [1, 2, 3, 4, 1, 1, 2, 4]
    # Its 6 of 18 tokens are taken out of the mean over tokens.
    found = advantages("dgpo", [1, 0, 0, 0, 0, 1, 1, 1], "aaaabbcc", lengths)
    expected = [2 * a, *[-2 / 3 * a] * 3, -b, b, 0, 0]
    assert found == pytest.approx([18 / 12 * x for x in expected], rel=1e-6)


def test_dgpos_balance_is_the_same_at_every_pass_rate():
    n = 8
    for right in range(1, n):
        found = advantages("dgpo", [1.0] * right + [0.0] * (n - right), "a" * n)
        assert sum(map(abs, found)) == pytest.approx(n) and sum(found) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_a_session_is_one_response(name):
    whole = advantages(name, [1, 0, 0, 0, 1], "aaabb", [4, 2, 4, 1, 3])
    # The same tokens: the right response to a and no other has two trajectories.
    rows = [RowKey(*key) for key in (("a", 0, 1), ("a", 1, 0), ("b", 0, 0), ("a", 2, 0), ("b", 1, 0), ("a", 0, 0))]
    with estimating(None, None, rows):
        found = advantages(name, [1, 0, 0, 0, 1, 1], "aababa", [3, 2, 1, 4, 3, 1])
    assert found == pytest.approx([whole[i] for i in (0, 1, 3, 2, 4, 0)], rel=1e-6)


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
def test_without_a_difference_there_is_no_advantage(name, reward):
    assert advantages(name, [reward] * 7, "aaabbbc") == [0.0] * 7


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize("n", [3, 7, 10])
def test_a_rounding_error_is_no_difference(name, n):
    # 0.1 + 0.1 + 0.1 is not 0.3 in float64.
    rewards = torch.full((n, 1), 0.1, dtype=torch.float64)
    found, _ = get_adv_estimator_fn(name)(
        token_level_rewards=rewards, response_mask=torch.ones(n, 1), index=np.array(["a"] * n), config=None
    )
    assert not found.any()


@pytest.mark.parametrize("name, told", [("rloo", True), ("grpo", False), ("gae", False), ("dgpo", False)])
def test_verls_estimators_that_count_trajectories_are_told_once(name, told, capsys):
    trainer = SimpleNamespace(config=OmegaConf.create({"algorithm": {"adv_estimator": name}}), _sessions_told=False)
    for rows in ([RowKey("a", 0, 0)], [RowKey("a", 0, 0), RowKey("a", 0, 1)], [RowKey("a", 0, 1)]):
        ExtendedTrainerSync._tell_of_sessions(trainer, rows)
    output = capsys.readouterr().out
    assert output.count("verl's rloo counts each as a response") == told == output.count("\n")
