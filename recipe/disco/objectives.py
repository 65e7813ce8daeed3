"""Objectives: the scores of one question's responses -> what J gains from that question.

J = (1/Q) sum over questions of J_q, where Q counts every question of the mini-batch and a question without both a
positive and a negative response adds 0. Each objective below is J_q, written as in the paper; everything else here
holds for all of them.

An objective sees one question: the scores of its positive (P,) and of its negative (N,) responses, and their lengths in
tokens. It returns its two sides, J_q = positive - negative. What training needs, the weight w_i = dJ/ds_i of each
response, is the derivative of that function, taken by autograd on the scores alone. So an objective is defined once,
and a new one is a frozen dataclass with a formula: see ``examples/custom_objective.py``.

Those below work along the last dimension alone (``stacked``), so that questions of like sizes are evaluated at once,
(G, P) and (G, N): a loop over questions takes seconds for a large mini-batch, on every rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from recipe.disco.registry import Component, Registry, choice, number


class Group(NamedTuple):
    """One question's responses: scores (differentiable) and lengths (response tokens), positives and negatives."""

    positive: Tensor
    negative: Tensor
    positive_length: Tensor
    negative_length: Tensor


class Sides(NamedTuple):
    """The two sides of J_q = positive - negative, 0-dim tensors."""

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class Objective(Component):
    """Base class of objectives: a frozen dataclass whose fields are its settings."""

    stacked: ClassVar[bool] = False
    """It works along the last dimension alone: it may get (G, P) and (G, N) for G questions, and gives (G,) sides."""

    def __call__(self, group: Group) -> Sides:
        """The two sides of J_q, by differentiable torch."""
        raise NotImplementedError


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


def log_mean_exp(s: Tensor, tau: float) -> Tensor:
    """tau log( mean exp(s / tau) ): KL-regularised DRO, whose weights are softmax(s / tau)."""
    return tau * (torch.logsumexp(s / tau, -1) - math.log(s.shape[-1]))


@register_objective("disco")
@dataclass(frozen=True)
class Disco(Objective):
    """DisCO (DRO form): mean_pos s - tau log( mean_neg exp(s / tau) ).

    For many more negatives than positives: small tau weighs the hardest negatives, each by its share of
    softmax(s / tau); tau -> infinity gives DisCO-b. A one-way partial AUC surrogate.

    The family around it: another aggregate over negatives, and another surrogate l of the difference of scores,
    J_q = -mean_i A_j( -l(scale (s+_i - s-_j)) ). That is no difference of two sides: it is given as the positive one.
    """

    stacked = True

    tau: float = number(above=0)
    surrogate: str = choice("identity", SURROGATES)
    negatives: str = choice("softmax", NEGATIVES)
    top_share: float = number(0.25, above=0, most=1)
    scale: float = number(1.0, above=0)

    def __call__(self, group: Group) -> Sides:
        pos, neg = self.scale * group.positive, self.scale * group.negative
        if self.surrogate == "identity":
            return Sides(pos.mean(-1), self.over_negatives(neg))
        gain = SURROGATES[self.surrogate](pos[..., :, None] - neg[..., None, :])
        value = -self.over_negatives(-gain).mean(-1)
        return Sides(value, torch.zeros_like(value))

    def over_negatives(self, s: Tensor) -> Tensor:
        """One number for (..., N): the paper's log-mean-exp, the mean, or the mean of the k hardest (CVaR)."""
        if self.negatives == "softmax":
            return log_mean_exp(s, self.tau)
        if self.negatives == "mean":
            return s.mean(-1)
        # 0.3 * 10 is a little more than 3.
        k = max(1, math.ceil(self.top_share * s.shape[-1] - 1e-9))
        return torch.topk(s, k, dim=-1).values.mean(-1)


@register_objective("disco_b")
@dataclass(frozen=True)
class DiscoB(Objective):
    """DisCO-b: all negatives count alike. mean_pos s - mean_neg s, with the constant weights 1/n+ and -1/n-."""

    stacked = True

    surrogate: str = choice("identity", SURROGATES)
    scale: float = number(1.0, above=0)

    def __call__(self, group: Group) -> Sides:
        return Disco(tau=1.0, surrogate=self.surrogate, negatives="mean", scale=self.scale)(group)


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


def log_one_plus_sum_exp(x: Tensor) -> Tensor:
    """log(1 + sum exp(x)) over the last dimension, at any size of x."""
    return torch.logsumexp(torch.nn.functional.pad(x, (1, 0)), -1)


# Over a mini-batch ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """An objective over a mini-batch, 0-dim tensors: J, and its two sides, ``value = positive - negative``."""

    value: Tensor
    positive: Tensor
    negative: Tensor


class Questions(NamedTuple):
    """How a mini-batch's rows answer its questions.

    Attributes:
        size: (B,) how many rows the question of a row has; 0 for a padding row.
        positives, negatives: (Q,) numbers of a question's responses of either kind; one without a token is of neither.
        mixed: questions with both, those of like sizes together: their ids (G,), and the rows of their positives (G, P)
            and of their negatives (G, N).
    """

    size: Tensor
    positives: Tensor
    negatives: Tensor
    mixed: list[tuple[Tensor, Tensor, Tensor]]


def by_question(positive: Tensor, question: Tensor, length: Tensor) -> Questions:
    """Sort rows by question and kind. Arguments as for :func:`evaluate`."""
    rows = (question >= 0).nonzero().flatten()
    ids, member, count = question[rows].unique(return_inverse=True, return_counts=True)
    size = torch.zeros_like(question).index_copy(0, rows, count[member])
    scored = length[rows] > 0
    rows = rows[scored]
    kind = 2 * member[scored] + ~positive[rows]
    rows = rows[kind.argsort(stable=True)]
    counts = kind.bincount(minlength=2 * len(ids)).view(-1, 2)
    start = counts.sum(1).cumsum(0) - counts.sum(1)
    both = (counts > 0).all(1).nonzero().flatten()
    splits, which = (counts[both, 0] * (len(rows) + 1) + counts[both, 1]).unique(return_inverse=True)
    mixed = []
    for i, split in enumerate(splits.tolist()):
        p, n = divmod(split, len(rows) + 1)
        alike = both[which == i]
        members = rows[start[alike][:, None] + torch.arange(p + n, device=rows.device)]
        mixed.append((ids[alike], members[:, :p], members[:, p:]))
    return Questions(size, counts[:, 0], counts[:, 1], mixed)


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
        calls = [(Group(*(x.clone() for x in one)), i) for *one, i in zip(*group, ids, strict=True)]
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
) -> Evaluation:
    """J over all questions, differentiable in ``score``.

    Args:
        score: (B,) one score per response.
        positive: (B,) bool, True for a positive (correct) response.
        question: (B,) int, which question a response answers, in any order; < 0 marks a padding row.
        length: (B,) response tokens; a response of length 0 has no score and is on neither side of its question.
        questions: what :func:`by_question` gives for these rows, where it is known already.

    Raises:
        ValueError: for what the objective gives and is no finite number, or has no gradient.
    """
    if questions is None:
        questions = by_question(positive, question, length)
    # The anchor keeps the graph alive when no question is mixed.
    anchor = torch.where(length > 0, score, 0.0).sum() * 0.0
    total = Sides(anchor, anchor)
    learned = not (questions.mixed and score.requires_grad and torch.is_grad_enabled())
    rows = [x for _, *both in questions.mixed for x in both]
    # Looked up all at once, since the derivative of each look-up is as long as the scores.
    scores = score[torch.cat([x.flatten() for x in rows])].split([x.numel() for x in rows]) if rows else ()
    for (ids, pos, neg), s_pos, s_neg in zip(questions.mixed, scores[::2], scores[1::2], strict=True):
        group = Group(s_pos.view_as(pos), s_neg.view_as(neg), length[pos], length[neg])
        sides = call_objective(objective, group, ids)
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
) -> tuple[Evaluation, Tensor]:
    """J and the weights w_i = dJ/ds_i, shape (B,), in float64 and without a graph. Arguments as for :func:`evaluate`.

    With the objectives above, positives of a mixed group get w >= 0, negatives w <= 0, all others 0.

    Raises:
        ValueError: as :func:`evaluate`, or a weight is NaN or infinite.
    """
    with torch.enable_grad():
        leaf = score.detach().double().requires_grad_()
        result = evaluate(objective, leaf, positive, question, length, questions)
        (weight,) = torch.autograd.grad(result.value, leaf)
    bad = ~weight.isfinite()
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"disco.objective={objective.name} has the derivative {weight[i].item()} by a score ({leaf[i].item()}) of "
            f"question {int(question[i])}; {int(bad.sum())} of {len(bad)} weights are not finite"
        )
    return Evaluation(result.value.detach(), result.positive.detach(), result.negative.detach()), weight
