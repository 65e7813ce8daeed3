"""Scores: one number a response, that says how much the policy favours it.

Neither is clipped: clipping in the score is what makes the entropy of GRPO collapse and that of DAPO blow up (Section 3
of the paper). Source: arXiv 2505.12366, Section 4.

Symbols: ``log_prob`` is log pi_theta(o_t | q, o_<t) and ``old_log_prob`` the same under the behaviour policy pi_old,
both of logits divided by the sampling temperature, in nats, shape (B, T); ``mask`` is True at response tokens, (B, T).
Every function returns shape (B,). A response without any token has no score; it gets 0, and callers leave it out.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision raised to float32: sums over long responses keep their digits, gradients are rounded once."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` at response tokens, exactly 0 elsewhere, where neither a NaN's value nor its gradient gets through."""
    return torch.where(mask, at_least_float32(x), 0.0)


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(1/|o|) sum_t x_t over the tokens of each response; 0 for an empty one. Shape (B,)."""
    return masked(x, mask).sum(-1) / mask.sum(-1).clamp(min=1)


def log_likelihood(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> Tensor:
    """log-L: s(o) = (1/|o|) sum_t log pi_theta(o_t), in nats a token, <= 0."""
    return token_mean(log_prob, mask)


def likelihood_ratio(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> Tensor:
    """L-ratio: s(o) = (1/|o|) sum_t pi_theta(o_t) / pi_old(o_t), > 0, and 1 where pi_theta = pi_old."""
    return token_mean((masked(log_prob, mask) - masked(old_log_prob, mask)).exp(), mask)


SCORES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "log_l": log_likelihood,
    "l_ratio": likelihood_ratio,
}
"""Scores by the name that ``disco.score`` takes."""
