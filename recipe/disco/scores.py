"""Scores: one number a response, that says how much the policy favours it.

Neither is clipped: clipping in the score is what makes the entropy of GRPO collapse and that of DAPO blow up (Section 3
of the paper). Source: arXiv 2505.12366, Section 4.

Symbols: ``log_prob`` is log pi_theta(o_t | q, o_<t) and ``old_log_prob`` the same under the behaviour policy pi_old,
both of logits divided by the sampling temperature, in nats, shape (B, T); ``mask`` is True at response tokens, (B, T).
Every function returns shape (B,). A response without any token has no score; it gets 0, and callers leave it out.

Where the rollout's probabilities are not pi_old's (other kernels, older weights), verl's rollout correction gives each
token an importance weight rho_t = pi_old(o_t) / pi_rollout(o_t), truncated: ``rho``, (B, T), a constant. It multiplies
the token's contribution to the score where the score is trained: grad s(o) = (1/|o|) sum_t rho_t grad x_t. The value of
s(o) has no weights: it says how the policy judges a response, and a rejected token must not make a negative look hard.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor

from recipe.disco.registry import Registry


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision raised to float32: sums over long responses keep their digits, gradients are rounded once."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` at response tokens, exactly 0 elsewhere, where neither a NaN's value nor its gradient gets through."""
    return torch.where(mask, at_least_float32(x), 0.0)


def token_mean(x: Tensor, mask: Tensor, rho: Tensor | None = None) -> Tensor:
    """(1/|o|) sum_t rho_t x_t over the tokens of each response (rho = 1 by default); 0 for an empty one. Shape (B,)."""
    x = masked(x, mask) if rho is None else masked(x, mask) * masked(rho, mask)
    return x.sum(-1) / mask.sum(-1).clamp(min=1)


def log_likelihood(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, rho: Tensor | None = None) -> Tensor:
    """log-L: s(o) = (1/|o|) sum_t log pi_theta(o_t), in nats a token, <= 0."""
    return token_mean(log_prob, mask, rho)


def likelihood_ratio(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, rho: Tensor | None = None) -> Tensor:
    """L-ratio: s(o) = (1/|o|) sum_t pi_theta(o_t) / pi_old(o_t), > 0, and 1 where pi_theta = pi_old."""
    return token_mean((masked(log_prob, mask) - masked(old_log_prob, mask)).exp(), mask, rho)


def mean_log_ratio(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, rho: Tensor | None = None) -> Tensor:
    """s(o) = (1/|o|) sum_t log( pi_theta(o_t) / pi_old(o_t) ), in nats a token; REAL's (arXiv 2602.05630)."""
    return token_mean(masked(log_prob, mask) - masked(old_log_prob, mask), mask, rho)


@dataclass(frozen=True)
class Score:
    """A score and what it compares the policy with.

    Args:
        fn: ``(log_prob, base_log_prob, mask) -> (B,)``; with a fourth argument ``rho`` it allows a rollout correction.
        base: whose log-probabilities ``base_log_prob`` are: "old" (the behaviour policy) or "reference" (the frozen
            model that the run started from).
        constant_at_old: every response has the same score where pi_theta = pi_old.
    """

    fn: Callable[..., Tensor]
    base: str = "old"
    constant_at_old: bool = False

    @property
    def correctable(self) -> bool:
        """Whether it takes importance weights of tokens."""
        return "rho" in signature(self.fn).parameters


SCORES: Registry[Score] = Registry("score")
"""Scores by the name that ``disco.score`` takes. ``SCORES.register("mine")(Score(fn))`` adds one."""

SCORES.register("log_l")(Score(log_likelihood))
SCORES.register("l_ratio")(Score(likelihood_ratio, constant_at_old=True))
SCORES.register("log_ratio")(Score(mean_log_ratio, constant_at_old=True))
SCORES.register("log_ratio_ref")(Score(mean_log_ratio, base="reference"))


def compute_score(
    score: str,
    log_prob: Tensor,
    old_log_prob: Tensor,
    mask: Tensor,
    ref_log_prob: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
) -> Tensor:
    """The score registered as ``score``, one a response, shape (B,).

    Args:
        ref_log_prob: (B, T) the same under the frozen reference, for scores that compare with it.
        rollout_is_weights: (B, T) rho, the tokens' importance weights in the gradient; None where nothing is corrected.

    Raises:
        ValueError: for an unknown score, a missing ``ref_log_prob``, weights for a score that takes none, or what is
            not one score a response with a gradient.
    """
    chosen = SCORES[score]
    if chosen.base == "reference" and ref_log_prob is None:
        raise ValueError(f"score={score!r} compares with a reference model, but there is no ref_log_prob")
    base = ref_log_prob if chosen.base == "reference" else old_log_prob
    s = _call(score, log_prob, base, mask)
    if rollout_is_weights is None:
        return s
    if not chosen.correctable:
        raise ValueError(f"score={score!r} takes no importance weights: give its function a fourth argument, rho")
    trained = _call(score, log_prob, base, mask, rollout_is_weights.detach())
    return s.detach() + (trained - trained.detach())


def _call(score: str, log_prob: Tensor, *arguments: Tensor) -> Tensor:
    s = SCORES[score].fn(log_prob, *arguments)
    if not isinstance(s, Tensor) or s.shape != log_prob.shape[:1] or not s.is_floating_point():
        found = f"{s.dtype} of shape {tuple(s.shape)}" if isinstance(s, Tensor) else repr(s)
        raise ValueError(f"disco.score={score} gave {found}; it must give one number a response, {len(log_prob)} here")
    if log_prob.requires_grad and torch.is_grad_enabled() and not s.requires_grad:
        raise ValueError(
            f"disco.score={score} has no gradient, so nothing would be learned; compute it from log_prob by torch, "
            "without detach, item or numpy"
        )
    return s
