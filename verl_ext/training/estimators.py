"""Advantage estimators of published methods that verl lacks, in verl's registry: ``algorithm.adv_estimator=NAME``.

Each compares the responses to one question by their summed rewards and gives all tokens of a response one number. An
agent's session is one response. A question whose responses all got the same reward has advantage 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_ext.training.advantages import responses

DGPO_TEMPERATURE = 2.0
"""T of DGPO's weights of questions, as published."""


def maxrl(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, config: Any = None, **unused: Any
) -> tuple[Tensor, Tensor]:
    """MaxRL: (r - mean r) / mean r within a question, 0 where mean r = 0.

    Args:
        token_level_rewards: (B, T) their sum is a response's reward, at least 0.
        response_mask: (B, T) nonzero at response tokens.
        index: (B,) the question of each response.

    Returns:
        Advantages and returns, (B, T) each, as verl's estimators do: the same, 0 outside the mask.

    Raises:
        ValueError: a reward is negative; names the first response.

    Source: arXiv 2602.02710. The authors' code divides by mean r + 1e-6.
    """
    reward, question, _, mean = by_question(token_level_rewards, index)
    if (reward < 0).any():
        row = int((reward < 0).nonzero()[0])
        raise ValueError(
            f"algorithm.adv_estimator=maxrl divides by a question's mean reward, and response {row} has the reward "
            f"{float(reward[row]):g}; use rewards of at least 0, or another estimator"
        )
    mean = mean[question]
    return on_tokens(torch.where(mean > 0, reward / mean - 1, 0.0), token_level_rewards, response_mask)


def dgpo(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, config: Any = None, **unused: Any
) -> tuple[Tensor, Tensor]:
    """DGPO: n (r - mean r) / sum |r - mean r| within a question, times M softmax(-mean r / T) over M questions.

    The M questions of the batch whose rewards differ: their factors have mean 1. With ``loss_agg_mode=token-mean`` the
    loss is the published mean over the tokens of these questions: advantages are scaled by all tokens over theirs.

    Args:
        token_level_rewards, response_mask, index: as for :func:`maxrl`; rewards may be negative.

    Returns:
        As :func:`maxrl`.

    Source: arXiv 2601.20614 and the authors' code, which adds 1e-4 to the sum.
    """
    reward, question, counts, mean = by_question(token_level_rewards, index)
    centred = reward - mean[question]
    spread = means(centred.abs(), question, counts, len(mean))
    differ = spread > 0
    factor = differ.sum() * torch.softmax(torch.where(differ, -mean / DGPO_TEMPERATURE, -torch.inf), 0)
    tokens = response_mask.bool().sum(-1).double()
    scale = tokens.sum() / tokens[differ[question]].sum().clamp(min=1)
    advantage = torch.where(differ[question], scale * (factor / spread)[question] * centred, 0.0)
    return on_tokens(advantage, token_level_rewards, response_mask)


def by_question(token_level_rewards: Tensor, index: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows by question; an agent's session is one response, whose last row counts.

    Returns:
        Rewards, (B,), in float64; each row's question, (B,) from 0; which rows count, (B,) bool; and the mean reward of
        each question, (Q,).
    """
    # As verl keeps rewards: the mean of equal ones is then the same number, and a rounding error no difference.
    reward = token_level_rewards.sum(-1).float().double()
    last = torch.tensor(responses(len(reward)), device=reward.device)
    reward, counts = reward[last], last == torch.arange(len(reward), device=reward.device)
    ids, number = np.unique(np.asarray(index), return_inverse=True)
    question = torch.from_numpy(number.reshape(-1)).to(reward.device)
    return reward, question, counts, means(reward, question, counts, len(ids))


def means(x: Tensor, question: Tensor, counts: Tensor, questions: int) -> Tensor:
    """Mean of x, (B,), over the rows of each question that count, (Q,)."""
    return x.new_zeros(questions).scatter_reduce(0, question[counts], x[counts], "mean", include_self=False)


def on_tokens(advantage: Tensor, like: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What verl's estimators return: advantages and returns, (B, T), the same."""
    tokens = advantage.to(like.dtype)[:, None] * mask
    return tokens, tokens


ESTIMATORS = {"maxrl": maxrl, "dgpo": dgpo}


def register() -> None:
    """Put them into verl's registry."""
    from verl.trainer.ppo.core_algos import register_adv_est

    for name, function in ESTIMATORS.items():
        register_adv_est(name)(function)
