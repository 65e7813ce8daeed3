"""Objectives: the scores of one question's responses -> what J gains from that question.

J = (1/Q) sum over questions of J_q, where Q counts every question of the mini-batch and a question without both a
positive and a negative response adds 0 (``questions.py`` may weigh questions). Each objective below is J_q, written as
in the paper; everything else here holds for all of them.

An objective sees one question: the scores of its positive (P,) and of its negative (N,) responses, and their lengths in
tokens. It returns its two sides, J_q = positive - negative. What training needs, the weight w_i = dJ/ds_i of each
response, is the derivative of that function, taken by autograd on the scores alone. So an objective is defined once,
and a new one is a frozen dataclass with a formula: see ``examples/custom_objective.py``.

Those below work along the last dimension alone (``stacked``), so that questions of like sizes are evaluated at once,
(G, P) and (G, N): a loop over questions takes seconds for a large mini-batch, on every rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from recipe.disco.questions import PAIRS, QUESTIONS, Questions, QuestionWeight, by_question, factors, pair_weights
from recipe.disco.registry import Component, Registry, choice, number


class Group(NamedTuple):
    """One question's responses: scores (differentiable) and lengths (response tokens), positives and negatives.

    ``pairs``: for rewards of several levels, which an objective gets if it is ``graded``. Then both sides are all n
    responses, and pairs (n, n) weighs each as a positive with each as a negative; they sum to 1. None: all pairs alike.
    """

    positive: Tensor
    negative: Tensor
    positive_length: Tensor
    negative_length: Tensor
    pairs: Tensor | None = None


class Sides(NamedTuple):
    """The two sides of J_q = positive - negative, 0-dim tensors."""

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class Objective(Component):
    """Base class of objectives: a frozen dataclass whose fields are its settings."""

    stacked: ClassVar[bool] = False
    """It works along the last dimension alone: it may get (G, P) and (G, N) for G questions, and gives (G,) sides."""

    graded: ClassVar[bool] = False
    """It reads ``Group.pairs``, as ``disco.pairs=graded`` needs."""

    questions: ClassVar[str] = "uniform"
    """The weights of questions that it is published with, by their name in ``disco.questions``."""

    def __call__(self, group: Group) -> Sides:
        """The two sides of J_q, by differentiable torch."""
        raise NotImplementedError

    def at(self, progress: float) -> "Objective":
        """The objective as it is at this share of the training, from 0 to 1; by default the same throughout."""
        return self


OBJECTIVES: Registry[Objective] = Registry("objective", Objective)
register_objective = OBJECTIVES.register
"""Class decorator: register an objective under the name that ``disco.objective`` takes."""

SURROGATES: dict[str, Callable[[Tensor], Tensor]] = {
    # l(d) = d: the paper's choice
    "identity": lambda d: d,
    # l(d) = -log(1 + exp(-d)), preference learning's: pairs in the right order count ever less
    "logistic": torch.nn.functional.logsigmoid,
    # l(d) = -max(1 - d, 0)^2, AUC maximisation's: 0 once the positive leads by 1
    "squared_hinge": lambda d: -torch.relu(1 - d).square(),
}
"""Non-decreasing functions l(d) of a difference of scores d = s+ - s-, elementwise."""

NEGATIVES = ("softmax", "mean", "topk")
"""How the scores of a question's negatives become one number: :meth:`Disco.over_negatives`."""


def log_mean_exp(s: Tensor, tau: float, share: Tensor | None = None) -> Tensor:
    """tau log( mean exp(s / tau) ): KL-regularised DRO, whose weights are softmax(s / tau).

    Args:
        share: weights of the mean, that sum to 1 over the last dimension.
    """
    if share is not None:
        return tau * torch.logsumexp(s / tau + share.log(), -1)
    return tau * (torch.logsumexp(s / tau, -1) - math.log(s.shape[-1]))


def mean(x: Tensor, share: Tensor | None = None) -> Tensor:
    """Mean over the last dimension, weighted where there are ``share``, that sum to 1."""
    return x.mean(-1) if share is None else (share * x).sum(-1)


def shares(pairs: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What weights of pairs (..., P, N) give each positive, (..., P), and among its negatives each, (..., P, N)."""
    if pairs is None:
        return None, None
    of_positives = pairs.sum(-1)
    # The lowest rewards have no negatives, and count by 0: any shares do.
    none = (of_positives == 0)[..., None]
    return of_positives, torch.where(none, 1 / pairs.shape[-1], pairs / of_positives[..., None])


@register_objective("disco")
@dataclass(frozen=True)
class Disco(Objective):
    """DisCO (DRO form): mean_pos s - tau log( mean_neg exp(s / tau) ).

    For many more negatives than positives: small tau weighs the hardest negatives, each by its share of
    softmax(s / tau); tau -> infinity gives DisCO-b. A one-way partial AUC surrogate.

    The family around it: another aggregate over negatives, and another surrogate l of the difference of scores,
    J_q = -mean_i A_j( -l(scale (s+_i - s-_j)) ). That is no difference of two sides: it is given as the positive one.

    Graded rewards: every pair with r_i > r_j counts by the difference w_ij = max(r_i - r_j, 0). Means over a positive's
    negatives have weights w_ij / W_i, where W_i = sum_j w_ij, and the mean over positives has W_i / sum_i W_i. Rewards
    of two levels, whatever they are, make all these weights equal: the formulas above.
    """

    stacked = True
    graded = True

    tau: float = number(above=0)
    surrogate: str = choice("identity", SURROGATES)
    negatives: str = choice("softmax", NEGATIVES)
    top_share: float = number(0.25, above=0, most=1)
    scale: float = number(1.0, above=0)

    def __call__(self, group: Group) -> Sides:
        pos, neg = self.scale * group.positive, self.scale * group.negative
        of_positives, of_negatives = shares(group.pairs)
        if self.surrogate == "identity":
            hard = self.over_negatives(neg[..., None, :], of_negatives)
            return Sides(mean(pos, of_positives), mean(hard, of_positives))
        gain = SURROGATES[self.surrogate](pos[..., :, None] - neg[..., None, :])
        value = -mean(self.over_negatives(-gain, of_negatives), of_positives)
        return Sides(value, torch.zeros_like(value))

    def over_negatives(self, s: Tensor, share: Tensor | None = None) -> Tensor:
        """One number for (..., N): the paper's log-mean-exp, the mean, or the mean of the k hardest (CVaR)."""
        if self.negatives == "softmax":
            return log_mean_exp(s, self.tau, share)
        if self.negatives == "mean":
            return mean(s, share)
        # 0.3 * 10 is a little more than 3.
        if share is None:
            k = max(1, math.ceil(self.top_share * s.shape[-1] - 1e-9))
            return torch.topk(s, k, dim=-1).values.mean(-1)
        wanted = (self.top_share * (share > 0).sum(-1, keepdim=True) - 1e-9).ceil().clamp(min=1)
        hardest, order = torch.where(share > 0, s, -torch.inf).sort(-1, descending=True)
        kept = torch.arange(s.shape[-1], device=s.device) < wanted
        share = kept * share.gather(-1, order)
        return mean(torch.where(kept, hardest, 0.0), share / share.sum(-1, keepdim=True))


@register_objective("disco_b")
@dataclass(frozen=True)
class DiscoB(Objective):
    """DisCO-b: all negatives count alike. mean_pos s - mean_neg s, with the constant weights 1/n+ and -1/n-."""

    stacked = True
    graded = True

    surrogate: str = choice("identity", SURROGATES)
    scale: float = number(1.0, above=0)

    def __call__(self, group: Group) -> Sides:
        return Disco(tau=1.0, surrogate=self.surrogate, negatives="mean", scale=self.scale)(group)


@register_objective("maxrl")
@dataclass(frozen=True)
class MaxRL(DiscoB):
    """MaxRL with binary rewards: (1 - p)(mean_pos s - mean_neg s), DisCO-b times the failure rate.

    Its advantage (r - mean r) / mean r is (1 - p) / p for a positive and -1 for a negative, of which J_q is the mean
    times s. With graded rewards the two would differ. Source: arXiv 2602.02710.
    """

    graded = False
    questions = "failure_rate"


@register_objective("drpo")
@dataclass(frozen=True)
class DRPO(Objective):
    """DRPO: sum_pos w_i s_i - tau log( mean_neg exp(s / tau) ), w = softmax over positives of (1 - |o|/L) / lambda.

    DisCO that favours short right responses. L is ``max_length`` in tokens, lambda is ``length_temperature``;
    lambda -> infinity gives DisCO. Source: arXiv 2510.04474.
    """

    stacked = True

    tau: float = number(above=0)
    length_temperature: float = number(above=0)
    max_length: int = number(above=0)

    def __call__(self, group: Group) -> Sides:
        length = group.positive_length.to(group.positive)
        w = torch.softmax((1 - length / self.max_length) / self.length_temperature, -1)
        return Sides((w * group.positive).sum(-1), log_mean_exp(group.negative, self.tau))


@register_objective("real")
@dataclass(frozen=True)
class Real(Objective):
    """REAL, "Rewards as Labels": -log(1 + sum_pos exp(-s / tau)) - log(1 + sum_neg exp(s / tau)).

    A classifier of the responses, with 0 as the anchor that positives should score above and negatives below. Weights
    are bounded by 1 / tau. Source: arXiv 2602.05630, where s is the mean log-ratio (``score="log_ratio"``).
    """

    stacked = True

    tau: float = number(above=0)

    def __call__(self, group: Group) -> Sides:
        return Sides(-log_one_plus_sum_exp(-group.positive / self.tau), log_one_plus_sum_exp(group.negative / self.tau))


@register_objective("conspo")
@dataclass(frozen=True)
class ConSPO(Objective):
    """ConSPO: mean_pos tau log( e^((s - m) / tau) / (e^((s - m) / tau) + sum_neg e^(s_j / tau)) ).

    Each positive against the sum of all negatives (InfoNCE): a pair that is far apart counts ever less, a hard negative
    most. The positive should lead by the margin m: ``target_margin``, in units of the score. That is no difference of
    two sides: it is given as the positive one.

    In training the margin rises from 0 over the share ``margin_warmup`` of the steps (:meth:`at`). Source: arXiv
    2605.12969, Eq. 13 and Section 5.1; the code is not published.
    """

    stacked = True

    tau: float = number(above=0)
    target_margin: float = number(0.01, minimum=0)
    margin_warmup: float = number(0.3, above=0, most=1)

    def __call__(self, group: Group) -> Sides:
        lead = group.positive[..., :, None] - group.negative[..., None, :] - self.target_margin
        value = -self.tau * log_one_plus_sum_exp(-lead / self.tau).mean(-1)
        return Sides(value, torch.zeros_like(value))

    def at(self, progress: float) -> "ConSPO":
        """m = (M / 2) (1 - cos(pi min(progress / alpha, 1))), with M = ``target_margin``, alpha = ``margin_warmup``."""
        done = min(progress / self.margin_warmup, 1.0)
        return replace(self, target_margin=self.target_margin * (1 - math.cos(math.pi * done)) / 2)


def log_one_plus_sum_exp(x: Tensor) -> Tensor:
    """log(1 + sum exp(x)) over the last dimension, at any size of x."""
    return torch.logsumexp(torch.nn.functional.pad(x, (1, 0)), -1)


def compatible(objective: str, questions: str | None, pairs: str) -> str:
    """The name of an objective's weights of questions: those chosen, or its own.

    Raises:
        ValueError: a name is unknown, or the objective does without what it should go with; says what would be right.
    """
    cls = OBJECTIVES[objective]
    questions = cls.questions if questions is None else questions
    QUESTIONS[questions]
    if cls.questions not in ("uniform", questions):
        raise ValueError(
            f"disco.questions={questions} does not go with disco.objective={objective}, which is {cls.questions} by "
            "definition; leave it at null, or use disco.objective=disco_b"
        )
    if pairs not in list(PAIRS):
        raise ValueError(f"disco.pairs={pairs!r} is unknown; choose from {sorted(PAIRS)}")
    if pairs == "graded" and not cls.graded:
        able = sorted(name for name in OBJECTIVES if OBJECTIVES[name].graded)
        raise ValueError(
            f"disco.pairs=graded does not go with disco.objective={objective}, which does not compare pairs; use "
            f"disco.pairs=threshold, or one of the objectives {able}"
        )
    return questions


# Over a mini-batch ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """An objective over a mini-batch, 0-dim tensors: J, and its two sides, ``value = positive - negative``."""

    value: Tensor
    positive: Tensor
    negative: Tensor


def call_objective(objective: Objective, group: Group, ids: Tensor) -> Sides:
    """Both sides, (G,) each, of the questions ``ids`` of like sizes.

    Raises:
        ValueError: the objective fails, or gives something else than finite numbers; names it and the question.
    """

    def refuse(found: object, question: int, cause: Exception | None = None) -> NoReturn:
        sizes = f"{group.positive.shape[-1]} positive and {group.negative.shape[-1]} negative responses"
        raise ValueError(
            f"disco.objective={objective.name} gave {found} for question {question}, of {sizes}; it must give finite "
            "Sides(positive, negative), one number each"
        ) from cause

    found = []
    calls = [(group, ids)]
    if not objective.stacked:
        # Copies, which a function may write into.
        parts = zip(*(x for x in group if x is not None), ids, strict=True)
        calls = [(Group(*(x.clone() for x in one)), i) for *one, i in parts]
    for part, question in calls:
        first = int(question.flatten()[0])
        try:
            sides = objective(part)
        except Exception as e:
            refuse(f"an error, {type(e).__name__}: {e}", first, e)
        wanted = part.positive.shape[:-1]
        try:
            values = [torch.as_tensor(side).to(part.positive) for side in sides]
        except (TypeError, ValueError, RuntimeError) as e:
            refuse(repr(sides), first, e)
        if [value.shape for value in values] != [wanted, wanted]:
            refuse(f"sides of shape {[tuple(value.shape) for value in values]}", first)
        found.append(values)
    positive, negative = (torch.stack(side).flatten() for side in zip(*found, strict=True))
    bad = ~(positive.isfinite() & negative.isfinite())
    if bad.any():
        i = int(bad.nonzero()[0])
        refuse((positive[i].item(), negative[i].item()), int(ids[i]))
    return Sides(positive, negative)


def evaluate(
    objective: Objective,
    score: Tensor,
    positive: Tensor,
    question: Tensor,
    length: Tensor,
    questions: Questions | None = None,
    question_weight: QuestionWeight | None = None,
) -> Evaluation:
    """J over all questions, differentiable in ``score``.

    Args:
        score: (B,) one score per response.
        positive: (B,) bool, True for a positive (correct) response.
        question: (B,) int, which question a response answers, in any order; < 0 marks a padding row.
        length: (B,) response tokens; a response of length 0 has no score and is on neither side of its question.
        questions: what :func:`by_question` gives for these rows, where it is known already, or rewards are graded.
        question_weight: how much each question counts; None: all alike.

    Raises:
        ValueError: for what the objective gives and is no finite number, or has no gradient.
    """
    if questions is None:
        questions = by_question(positive, question, length)
    # The anchor keeps the graph alive when no question is mixed.
    anchor = torch.where(length > 0, score, 0.0).sum() * 0.0
    total = Sides(anchor, anchor)
    learned = not (questions.mixed and score.requires_grad and torch.is_grad_enabled())
    rows = [x for part in questions.mixed for x in (part.positive, part.negative)]
    # Looked up all at once, since the derivative of each look-up is as long as the scores.
    scores = score[torch.cat([x.flatten() for x in rows])].split([x.numel() for x in rows]) if rows else ()
    c = None if question_weight is None or question_weight.uniform else factors(question_weight, questions)
    for (which, pos, neg, reward), s_pos, s_neg in zip(questions.mixed, scores[::2], scores[1::2], strict=True):
        group = Group(s_pos.view_as(pos), s_neg.view_as(neg), length[pos], length[neg])
        if reward is not None:
            s, n = torch.cat(group[:2], -1), torch.cat(group[2:4], -1)
            group = Group(s, s, n, n, pair_weights(reward).to(s))
        sides = call_objective(objective, group, questions.ids[which])
        if c is not None:
            sides = Sides(*(c[which].to(side) * side for side in sides))
        total = Sides(total.positive + sides.positive.sum(), total.negative + sides.negative.sum())
        learned |= sides.positive.requires_grad or sides.negative.requires_grad
    count = max(len(questions.positives), 1)
    result = Evaluation((total.positive - total.negative) / count, total.positive / count, total.negative / count)
    if not learned and result.value != 0:
        raise ValueError(
            f"disco.objective={objective.name} gave {float(result.value)} without a gradient, so nothing would be "
            "learned; compute its sides from group.positive and group.negative by torch, without detach, item or numpy"
        )
    return result


def weigh(
    objective: Objective,
    score: Tensor,
    positive: Tensor,
    question: Tensor,
    length: Tensor,
    questions: Questions | None = None,
    question_weight: QuestionWeight | None = None,
) -> tuple[Evaluation, Tensor]:
    """J and the weights w_i = dJ/ds_i, shape (B,), in float64 and without a graph. Arguments as for :func:`evaluate`.

    With the objectives above, positives of a mixed group get w >= 0, negatives w <= 0, all others 0.

    Raises:
        ValueError: as :func:`evaluate`, or a weight is NaN or infinite.
    """
    with torch.enable_grad():
        leaf = score.detach().double().requires_grad_()
        result = evaluate(objective, leaf, positive, question, length, questions, question_weight)
        (w,) = torch.autograd.grad(result.value, leaf)
    bad = ~w.isfinite()
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"disco.objective={objective.name} has the derivative {w[i].item()} by a score ({leaf[i].item()}) of "
            f"question {int(question[i])}; {int(bad.sum())} of {len(bad)} weights are not finite"
        )
    return Evaluation(result.value.detach(), result.positive.detach(), result.negative.detach()), w
