"""Scores: one number per response, that says how much the policy favours it.

None is clipped: clipping in the score is what makes the entropy of GRPO collapse and that of DAPO blow up (Section 3
of the paper). Source: arXiv 2505.12366, Section 4.

Symbols: ``log_prob`` is log pi_theta(o_t | q, o_<t) and ``base_log_prob`` the same under the policy that a score
compares with, both of logits divided by the sampling temperature, in nats, shape (B, T); ``mask`` is True at response
tokens, (B, T). Every score has shape (B,). A response without any token has no score; it gets 0, and callers leave it
out.

Where the rollout's probabilities are not pi_old's (other kernels, older weights), verl's rollout correction gives each
token an importance weight rho_t = pi_old(o_t) / pi_rollout(o_t), truncated: ``rho``, (B, T), a constant. It multiplies
the token's contribution to the score where the score is trained: grad s(o) = (1/|o|) sum_t rho_t grad x_t. The value of
s(o) has no weights: it says how the policy judges a response, and a rejected token must not make a negative look hard.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from recipe.disco.registry import Component, Registry


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision raised to float32: sums over long responses keep their digits, gradients are rounded once."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` at response tokens, exactly 0 elsewhere, where neither a NaN's value nor its gradient gets through."""
    return torch.where(mask, at_least_float32(x), 0.0)


def log_ratio(log_prob: Tensor, base_log_prob: Tensor, mask: Tensor) -> Tensor:
    """log( pi_theta(o_t) / pi_base(o_t) ) at response tokens, exactly 0 elsewhere. Shape (B, T)."""
    # Masked once, after the subtraction, whose derivative is 1 whatever the values are.
    return masked(at_least_float32(log_prob) - at_least_float32(base_log_prob), mask)


def token_mean(x: Tensor, mask: Tensor, rho: Tensor | None = None) -> Tensor:
    """(1/|o|) sum_t rho_t x_t over the tokens of each response (rho = 1 by default); 0 for an empty one. Shape (B,)."""
    x = masked(x, mask) if rho is None else masked(x, mask) * masked(rho, mask)
    return x.sum(-1) / mask.sum(-1).clamp(min=1)


@dataclass(frozen=True)
class Score(Component):
    """Base class of scores: a frozen dataclass whose fields are its settings."""

    base: ClassVar[str] = "old"
    """Whose log-probabilities it compares with: "old" (the behaviour policy) or "reference" (the frozen model)."""
    constant_at_old: ClassVar[bool] = False
    """Every response has the same score where pi_theta = pi_old."""
    correctable: ClassVar[bool] = True
    """It takes importance weights of tokens, ``rho``."""
    published_tau: ClassVar[float | None] = None
    """Temperature of the softmax over negatives that was published with it."""

    def __call__(self, log_prob: Tensor, base_log_prob: Tensor, mask: Tensor, rho: Tensor | None = None) -> Tensor:
        """One score per response, (B,), with a gradient; ``rho`` is given only where :attr:`correctable` is True."""
        raise NotImplementedError


SCORES: Registry[Score] = Registry("score", Score)
register_score = SCORES.register
"""Class decorator: register a score under the name that ``disco.score`` takes."""


@register_score("log_l")
@dataclass(frozen=True)
class LogLikelihood(Score):
    """log-L: s(o) = (1/|o|) sum_t log pi_theta(o_t), in nats per token, <= 0."""

    published_tau = 10.0

    def __call__(self, log_prob: Tensor, base_log_prob: Tensor, mask: Tensor, rho: Tensor | None = None) -> Tensor:
        return token_mean(log_prob, mask, rho)


@register_score("l_ratio")
@dataclass(frozen=True)
class LikelihoodRatio(Score):
    """L-ratio: s(o) = (1/|o|) sum_t pi_theta(o_t) / pi_old(o_t), > 0, and 1 where pi_theta = pi_old."""

    constant_at_old = True
    published_tau = 1.0

    def __call__(self, log_prob: Tensor, base_log_prob: Tensor, mask: Tensor, rho: Tensor | None = None) -> Tensor:
        return token_mean(log_ratio(log_prob, base_log_prob, mask).exp(), mask, rho)


@register_score("log_ratio")
@dataclass(frozen=True)
class LogRatio(Score):
    """s(o) = (1/|o|) sum_t log( pi_theta(o_t) / pi_old(o_t) ), in nats per token; REAL's (arXiv 2602.05630)."""

    constant_at_old = True
    published_tau = 0.5

    def __call__(self, log_prob: Tensor, base_log_prob: Tensor, mask: Tensor, rho: Tensor | None = None) -> Tensor:
        return token_mean(log_ratio(log_prob, base_log_prob, mask), mask, rho)


@register_score("log_ratio_ref")
@dataclass(frozen=True)
class LogRatioToReference(LogRatio):
    """The same to the frozen reference; TRPA's (arXiv 2504.04524), which has no tau: log-L's is our choice."""

    base = "reference"
    constant_at_old = False
    published_tau = 10.0


def compute_score(
    score: Score,
    log_prob: Tensor,
    old_log_prob: Tensor,
    mask: Tensor,
    ref_log_prob: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
) -> Tensor:
    """The score of each response, shape (B,).

    Args:
        ref_log_prob: (B, T) the same under the frozen reference, for scores that compare with it.
        rollout_is_weights: (B, T) rho, the tokens' importance weights in the gradient; None where nothing is corrected.

    Raises:
        ValueError: for a missing ``ref_log_prob``, weights for a score that takes none, or what is not one score per
            response with a gradient.
    """
    base = ref_log_prob if score.base == "reference" else old_log_prob
    if base is None:
        raise ValueError(f"disco.score={score.name} compares with a reference model, but there is no ref_log_prob")
    if rollout_is_weights is None:
        return _checked(score, score(log_prob, base, mask), log_prob)
    if not score.correctable:
        raise ValueError(f"disco.score={score.name} takes no importance weights: let it multiply by rho")
    with torch.no_grad():
        s = _checked(score, score(log_prob, base, mask), log_prob)
    trained = _checked(score, score(log_prob, base, mask, rollout_is_weights.detach()), log_prob)
    return s + (trained - trained.detach())


def _checked(score: Score, s: Tensor, log_prob: Tensor) -> Tensor:
    if not isinstance(s, Tensor) or s.shape != log_prob.shape[:1] or not s.is_floating_point():
        found = f"{s.dtype} of shape {tuple(s.shape)}" if isinstance(s, Tensor) else repr(s)
        raise ValueError(
            f"disco.score={score.name} gave {found}; it must give one number per response, {len(log_prob)} here"
        )
    if log_prob.requires_grad and torch.is_grad_enabled() and not s.requires_grad:
        raise ValueError(
            f"disco.score={score.name} has no gradient, so nothing would be learned; compute it from log_prob by "
            "torch, without detach, item or numpy"
        )
    return s
