"""Objectives: the scores of one question's responses -> what J gains from that question.

J = (1/Q) sum over questions of J_q, where Q counts every question of the mini-batch and a question without both a
positive and a negative response adds 0. Each objective below is J_q, written as in the paper; everything else here
holds for all of them.

An objective sees one question: the scores of its positive (P,) and of its negative (N,) responses, and their lengths in
tokens. It returns its two sides, J_q = positive - negative. What training needs, the weight w_i = dJ/ds_i of each
response, is the derivative of that function, taken by autograd on the scores alone. So an objective is defined once,
and a new one registers in one line: see :func:`register_objective`.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recipe.disco.registry import Registry


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


OBJECTIVES: Registry[Callable[..., Sides]] = Registry("objective")


def register_objective(name: str) -> Callable:
    """Decorator: register ``fn(group, *, <settings>) -> Sides`` under the name that ``disco.objective`` takes.

    Keyword-only parameters are settings, given by name from ``DiscoConfig``.
    """
    return OBJECTIVES.register(name)


@register_objective("disco_b")
def disco_b(group: Group) -> Sides:
    """DisCO-b: mean_pos s - mean_neg s. The weights are constant: 1/n+ and -1/n-."""
    return Sides(group.positive.mean(), group.negative.mean())


@register_objective("disco")
def disco(group: Group, *, tau: float) -> Sides:
    """DisCO (DRO form): mean_pos s - tau log( mean_neg exp(s / tau) ).

    For many more negatives than positives: small tau weighs the hardest negatives, each by its share of
    softmax(s / tau); tau -> infinity gives DisCO-b. A one-way partial AUC surrogate.
    """
    soft_maximum = tau * (torch.logsumexp(group.negative / tau, 0) - math.log(len(group.negative)))
    return Sides(group.positive.mean(), soft_maximum)


@dataclass
class Evaluation:
    """An objective over a mini-batch, 0-dim tensors: J, and its two sides, ``value = positive - negative``."""

    value: Tensor
    positive: Tensor
    negative: Tensor


def indices_by_question(question: Tensor) -> list[Tensor]:
    """Row indices of each question, in order of first appearance; rows with a negative id belong to none."""
    rows: dict[int, list[int]] = {}
    for i, q in enumerate(question.tolist()):
        if q >= 0:
            rows.setdefault(q, []).append(i)
    return [torch.tensor(r, device=question.device) for r in rows.values()]


def evaluate(
    objective: str,
    score: Tensor,
    positive: Tensor,
    question: Tensor,
    length: Tensor,
    settings: Mapping,
) -> Evaluation:
    """J over all questions, differentiable in ``score``.

    Args:
        objective: a registered name.
        score: (B,) one score a response.
        positive: (B,) bool, True for a positive (correct) response.
        question: (B,) int, which question a response answers, in any order; < 0 marks a padding row.
        length: (B,) response tokens; a response of length 0 has no score and is on neither side of its question.
        settings: where the objective's keyword-only parameters (tau, ...) are found by name.

    Raises:
        ValueError: for an unknown objective.
    """
    fn = OBJECTIVES[objective]
    names = [n for n, p in inspect.signature(fn).parameters.items() if p.kind is p.KEYWORD_ONLY]
    given = {n: settings[n] for n in names}
    questions = indices_by_question(question)
    # The anchor keeps the graph alive when no question is mixed.
    anchor = torch.where(length > 0, score, 0.0).sum() * 0.0
    sides = [anchor], [anchor]
    for rows in questions:
        scored = rows[length[rows] > 0]
        pos, neg = scored[positive[scored]], scored[~positive[scored]]
        if len(pos) and len(neg):
            for side, value in zip(
                sides, fn(Group(score[pos], score[neg], length[pos], length[neg]), **given), strict=True
            ):
                side.append(value)
    total = [torch.stack(side).sum() / max(len(questions), 1) for side in sides]
    return Evaluation(total[0] - total[1], *total)


def weigh(
    objective: str, score: Tensor, positive: Tensor, question: Tensor, length: Tensor, settings: Mapping
) -> tuple[Evaluation, Tensor]:
    """J and the weights w_i = dJ/ds_i, shape (B,), in float64 and without a graph. Arguments as for :func:`evaluate`.

    Positives of a mixed group get w > 0, negatives w < 0, all others 0.
    """
    with torch.enable_grad():
        leaf = score.detach().double().requires_grad_()
        result = evaluate(objective, leaf, positive, question, length, settings)
        (weight,) = torch.autograd.grad(result.value, leaf)
    return Evaluation(result.value.detach(), result.positive.detach(), result.negative.detach()), weight
