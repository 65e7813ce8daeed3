"""The loss L, twice: as a definition in plain autograd, and in the separable form that training uses.

    L = -J + penalty(KL)          (published: penalty = (beta/2) max(KL - delta, 0)^2)

Once J's derivatives w_i = dJ/ds_i and the penalty's derivative c are known for the whole mini-batch, the gradient of L
is a sum over responses,

    dL/dlogp(i,t) = -w_i ds_i/dlogp(i,t) + c dKL/dlogp(i,t),

so micro-batches may hold any rows, in any order, on any rank. :func:`micro_batch_loss` is one micro-batch's share.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from recipe.disco.constraint import CONTROLLERS, build_controller, kl_estimate
from recipe.disco.objectives import OBJECTIVES, compatible
from recipe.disco.questions import QUESTIONS
from recipe.disco.registry import require_finite, settings_of
from recipe.disco.scores import SCORES, Score, at_least_float32, compute_score
from recipe.disco.update import ScoreTable, plan_update, require_numbers


def disco_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    response_mask: Tensor,
    reward: Tensor,
    uid: Sequence[Hashable] | Tensor,
    *,
    session: Sequence[Hashable] | Tensor | None = None,
    objective: str = "disco",
    score: str = "log_l",
    tau: float | None = None,
    delta: float = 1e-4,
    beta: float = 1e3,
    kl_estimator: str = "k1",
    positive_threshold: float = 1.0,
    ref_log_prob: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
    constraint: str = "squared_hinge",
    questions: str | None = None,
    pairs: str = "threshold",
    progress: float = 1.0,
    **settings: Any,
) -> tuple[Tensor, dict[str, float]]:
    """The DisCO loss of one mini-batch: its executable definition, by plain autograd.

        L = -(1/Q) sum_q c_q [ mean_pos s - neg ] + (beta/2) max(KL - delta, 0)^2

    where: Q counts the questions of the mini-batch; the sum runs over those with both a positive and a negative
    response; neg = mean_neg s (``objective="disco_b"``) or tau log mean_neg exp(s / tau) (``"disco"``); s is
    log-L (``score="log_l"``) or L-ratio (``"l_ratio"``); c_q = 1 (``questions="uniform"``);
    KL = KL(pi_old || pi_theta) averaged over all response tokens.

    Args:
        log_prob: (B, T) log pi_theta of the response tokens, in nats, of logits divided by the sampling temperature.
        old_log_prob: (B, T) the same under the behaviour policy.
        response_mask: (B, T) nonzero at response tokens. Values elsewhere, NaN included, do not matter.
        reward: (B,) a response is positive when its reward is >= ``positive_threshold``.
        uid: (B,) the question that a response answers: hashables or an integer tensor, in any order; groups may be
            of any sizes.
        session: (B,) the response that a row is a part of, where an agent's response has several rows: its score is
            the mean over the tokens of all of them. By default each row is one.
        objective, score, kl_estimator: names; see :mod:`~recipe.disco.objectives`, :mod:`~recipe.disco.scores`,
            :mod:`~recipe.disco.constraint`.
        tau: temperature of the negatives' softmax, in units of the score; > 0. By default the score's
            published one: 10 (log-L), 1 (L-ratio).
        delta: radius of the trust region, in nats per token; >= 0. Published: 1e-4.
        beta: weight of the squared hinge; >= 0. Published: 1e3.
        ref_log_prob: (B, T) log-probabilities under the frozen reference, for scores that compare with it.
        rollout_is_weights: (B, T) importance weights of the tokens in the scores' gradient (a rollout correction); the
            KL, which is about the tokens that are trained on, has none.
        constraint: a controller without state, whose settings are among those above and ``settings``.
        questions: how much each question counts, by name (:mod:`~recipe.disco.questions`); None: the objective's own.
        pairs: ``"graded"``: within a question all pairs with different rewards count, weighted by the difference.
        progress: the share of the training that is done, from 0 to 1, for an objective that changes with it (ConSPO's
            margin).
        settings: of the objective, its weights of questions, the score and the constraint, by name: ``surrogate``,
            ``negatives``, ``top_share``, ``scale``, ``length_temperature``, ``target_margin``, ``coefficient``, ...

    Returns:
        The true value of L, a 0-dim tensor of at least float32, and the metrics that ``README.md`` lists. A response
        without a token has no score: it is on neither side, is counted, and its question still counts in Q.

    Raises:
        ValueError: for an unknown name, one of ``settings`` that nothing uses, a constant out of range, shapes that do
            not fit, or NaN in the data.

    Source: arXiv 2505.12366, Section 4 (DRO form and squared hinge penalty).
    """
    questions = compatible(objective, questions, pairs)
    owners = OBJECTIVES[objective], QUESTIONS[questions], SCORES[score], CONTROLLERS[constraint]
    if unused := sorted(set(settings).difference(*map(settings_of, owners))):
        raise ValueError(f"{unused[0]} is no setting of {objective=}, {questions=}, {score=} or {constraint=}")
    settings |= {"delta": delta, "beta": beta}
    tau = SCORES[score].published_tau if tau is None else tau
    if tau is not None:
        settings["tau"] = tau
    require_finite("positive_threshold", positive_threshold)
    require_finite("progress", progress, minimum=0, most=1)
    j, s, penalty = (
        OBJECTIVES.build(objective, settings).at(progress),
        SCORES.build(score, settings),
        build_controller(constraint, settings),
    )

    mask = response_mask.bool()
    check_inputs(log_prob, old_log_prob, mask, reward, uid, ref_log_prob, rollout_is_weights)
    if session is not None and (len(session) != len(log_prob) or getattr(session, "ndim", 1) != 1):
        found = tuple(getattr(session, "shape", (len(session),)))
        raise ValueError(f"session has shape {found} for {len(log_prob)} rows; it names the response of each")
    log_prob, old_log_prob = at_least_float32(log_prob), at_least_float32(old_log_prob).detach()
    if ref_log_prob is not None:
        ref_log_prob = at_least_float32(ref_log_prob).detach()
    question = torch.tensor(question_ids(uid), dtype=torch.long, device=log_prob.device)
    sessions = range(len(log_prob)) if session is None else question_ids(session)
    table = ScoreTable(
        question=question,
        session=torch.tensor(sessions, dtype=torch.long, device=log_prob.device),
        size=question.bincount()[question],
        index=torch.arange(len(log_prob)),
        reward=reward,
        length=mask.sum(-1),
        score=compute_score(s, log_prob, old_log_prob, mask, ref_log_prob, rollout_is_weights),
        kl=kl_estimate(log_prob, old_log_prob, mask, kl_estimator).sum(-1),
        measured=torch.ones_like(question, dtype=torch.bool),
        entropy=torch.full_like(reward, torch.nan, dtype=torch.float64),
    )
    plan = plan_update(
        table,
        j,
        penalty,
        positive_threshold=positive_threshold,
        graded=pairs == "graded",
        question_weight=QUESTIONS.build(questions, settings),
    )
    return plan.loss, plan.metrics


def question_ids(uid: Sequence[Hashable] | Tensor) -> list[int]:
    """Number the questions 0, 1, ... in order of first appearance."""
    uid = uid.tolist() if hasattr(uid, "tolist") else list(uid)
    number: dict[Hashable, int] = {}
    # Tensors are equal to themselves alone.
    return [number.setdefault(u.item() if isinstance(u, Tensor) else u, len(number)) for u in uid]


def check_inputs(
    log_prob: Tensor,
    old_log_prob: Tensor,
    mask: Tensor,
    reward: Tensor,
    uid: Sequence[Hashable] | Tensor,
    ref_log_prob: Tensor | None,
    rollout_is_weights: Tensor | None,
) -> None:
    """Refuse inputs of :func:`disco_loss` whose shapes do not fit, or that are no numbers at response tokens.

    Raises:
        ValueError: names the tensor, and the shapes or the first response.
    """
    tokens = {"log_prob": log_prob, "old_log_prob": old_log_prob, "ref_log_prob": ref_log_prob}
    tokens |= {"rollout_is_weights": rollout_is_weights}
    shapes = {name: (x, log_prob.shape) for name, x in tokens.items() if x is not None}
    shapes |= {"response_mask": (mask, log_prob.shape), "reward": (reward, log_prob.shape[:1])}
    for name, (x, shape) in shapes.items():
        if x.shape != shape or log_prob.dim() != 2:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, log_prob {tuple(log_prob.shape)}; log_prob, old_log_prob and "
                "response_mask are (responses, tokens), reward is (responses,)"
            )
    if len(uid) != len(log_prob) or getattr(uid, "ndim", 1) != 1:
        raise ValueError(f"uid has shape {tuple(getattr(uid, 'shape', (len(uid),)))} for {len(log_prob)} responses")
    require_numbers("reward", reward)
    for name, values in tokens.items():
        if values is not None:
            require_numbers(name, values.detach(), mask)


def micro_batch_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    response_mask: Tensor,
    weight: Tensor,
    coefficient: float,
    num_tokens: int,
    *,
    score: Score,
    kl_estimator: str = "k1",
    ref_log_prob: Tensor | None = None,
    rollout_is_weights: Tensor | None = None,
) -> Tensor:
    """One micro-batch's share of the separable loss; shares of a partition add up to the gradient of L.

        - sum_i w_i s_i + (c / N) sum_{i,t} kl(i,t)

    Its value is not L (the weights are frozen); its gradient is, exactly.

    Args:
        log_prob, old_log_prob, response_mask, ref_log_prob, rollout_is_weights: (b, T), the micro-batch's rows, as in
            :func:`disco_loss`.
        weight, coefficient, num_tokens: w_i (b,), c and N of the :class:`~recipe.disco.update.UpdatePlan` of the whole
            mini-batch.
        score: as the plan's table was measured by.
        kl_estimator: its name.
    """
    mask, log_prob = response_mask.bool(), at_least_float32(log_prob)
    s = compute_score(score, log_prob, old_log_prob, mask, ref_log_prob, rollout_is_weights)
    loss = -(weight.to(s) * s).sum()
    if coefficient:
        kl = kl_estimate(log_prob, old_log_prob, mask, kl_estimator).sum()
        loss = loss + coefficient * kl / max(num_tokens, 1)
    return loss
