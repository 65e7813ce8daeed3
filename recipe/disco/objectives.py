"""Objectives: the scores of one question's responses -> what J gains from that question.

J = (1/Q) sum over questions of J_q, where Q counts every question of the mini-batch and a question without both a
positive and a negative response adds 0. Each objective below is J_q, written as in the paper; everything else here
holds for all of them.

An objective sees one question: the scores of its positive (P,) and of its negative (N,) responses, and their lengths in
tokens. It returns its two sides, J_q = positive - negative. What training needs, the weight w_i = dJ/ds_i of each
response, is the derivative of that function, taken by autograd on the scores alone. So an objective is defined once,
and a new one registers in one line: see :func:`register_objective`.

Those below work along the last dimension alone, so that questions of like sizes are evaluated at once, (G, P) and
(G, N): a loop over questions takes seconds for a large mini-batch, on every rank.
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
STACKED: set[str] = set()
"""Objectives that take many questions of like sizes at once."""


def register_objective(name: str, *, stacked: bool = False) -> Callable:
    """Decorator: register ``fn(group, *, <settings>) -> Sides`` under the name that ``disco.objective`` takes.

    Keyword-only parameters are settings, given by name from ``DiscoConfig`` and its ``options``.

    Args:
        stacked: ``fn`` works along the last dimension alone, so it may get (G, P) and (G, N) for G questions of like
            sizes, and gives (G,) sides. Otherwise it is called for one question after another.
    """

    def add(fn: Callable[..., Sides]) -> Callable[..., Sides]:
        OBJECTIVES.register(name)(fn)
        if stacked:
            STACKED.add(name)
        return fn

    return add


SURROGATES: Registry[Callable[[Tensor], Tensor]] = Registry("surrogate")
"""Non-decreasing functions l(d) of a difference of scores d = s+ - s-, elementwise."""


@SURROGATES.register("identity")
def identity(d: Tensor) -> Tensor:
    """l(d) = d: the paper's choice."""
    return d


@SURROGATES.register("logistic")
def logistic(d: Tensor) -> Tensor:
    """l(d) = -log(1 + exp(-d)): preference learning's; at most 0, and pairs in the right order count ever less."""
    return torch.nn.functional.logsigmoid(d)


@SURROGATES.register("squared_hinge")
def squared_hinge(d: Tensor) -> Tensor:
    """l(d) = -max(1 - d, 0)^2: AUC maximisation's; 0 once the positive leads by 1."""
    return -torch.clamp(1 - d, min=0).square()


NEGATIVES: Registry[Callable[..., Tensor]] = Registry("negatives")
"""How the gains l(d_ij) over a question's negatives j, shape (..., N), become one number for a positive, (...)."""


@NEGATIVES.register("mean")
def mean_of_negatives(gain: Tensor) -> Tensor:
    """mean_j l_j: all negatives count alike."""
    return gain.mean(-1)


@NEGATIVES.register("softmax")
def soft_minimum_of_negatives(gain: Tensor, *, tau: float) -> Tensor:
    """-tau log mean_j exp(-l_j / tau): KL-regularised DRO, weights softmax(-l / tau); the mean for tau -> infinity."""
    return -tau * (torch.logsumexp(-gain / tau, -1) - math.log(gain.shape[-1]))


@NEGATIVES.register("topk")
def mean_of_hardest_negatives(gain: Tensor, *, top_share: float) -> Tensor:
    """CVaR: the mean of the k smallest l_j, k = ceil(top_share N): the hardest negatives alike, no others."""
    k = max(1, math.ceil(top_share * gain.shape[-1] - 1e-9))
    return torch.topk(gain, k, dim=-1, largest=False).values.mean(-1)


def select(fn: Callable, settings: Mapping) -> dict:
    """Those of ``settings`` that ``fn`` names as keyword-only parameters; one with a default may be missing.

    Raises:
        ValueError: for a missing setting without a default.
    """
    wanted = {n: p for n, p in inspect.signature(fn).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name, parameter in wanted.items():
        if name not in settings and parameter.default is parameter.empty:
            raise ValueError(f"{fn.__name__} needs the setting {name!r}; give it as +disco.options.{name}=VALUE")
    return {n: settings[n] for n in wanted if n in settings}


@register_objective("disco", stacked=True)
def disco(
    group: Group,
    *,
    tau: float,
    surrogate: str = "identity",
    negatives: str = "softmax",
    top_share: float = 0.25,
    scale: float = 1.0,
) -> Sides:
    """The discriminative family: mean_i A_j l(scale (s+_i - s-_j)), A an aggregate over negatives, l a surrogate.

    With the defaults, identity and softmax, it is DisCO (DRO form): mean_pos s - tau log( mean_neg exp(s / tau) ). For
    many more negatives than positives: small tau weighs the hardest negatives, each by its share of softmax(s / tau);
    tau -> infinity gives DisCO-b. A one-way partial AUC surrogate.

    With another surrogate J_q is no difference of two sides: it is given as the positive one, and the negative is 0.
    """
    settings = {"tau": tau, "top_share": top_share}
    aggregate = NEGATIVES[negatives]
    chosen = select(aggregate, settings)
    if surrogate == "identity":
        return Sides(scale * group.positive.mean(-1), -aggregate(-scale * group.negative, **chosen))
    gain = SURROGATES[surrogate](scale * (group.positive[..., :, None] - group.negative[..., None, :]))
    value = aggregate(gain, **chosen).mean(-1)
    return Sides(value, torch.zeros_like(value))


@register_objective("disco_b", stacked=True)
def disco_b(group: Group, *, surrogate: str = "identity", scale: float = 1.0) -> Sides:
    """DisCO-b: all negatives count alike. mean_pos s - mean_neg s, with the constant weights 1/n+ and -1/n-."""
    return disco(group, tau=math.inf, surrogate=surrogate, negatives="mean", scale=scale)


@register_objective("drpo", stacked=True)
def drpo(group: Group, *, tau: float, length_temperature: float, max_length: int) -> Sides:
    """DRPO: sum_pos w_i s_i - tau log( mean_neg exp(s / tau) ), w = softmax over positives of (1 - |o|/L) / lambda.

    DisCO that favours short right responses. L is ``max_length`` in tokens, lambda is ``length_temperature``;
    lambda -> infinity gives DisCO. Source: arXiv 2510.04474.
    """
    share = torch.softmax((1 - group.positive_length.to(group.positive) / max_length) / length_temperature, -1)
    return Sides((share * group.positive).sum(-1), -soft_minimum_of_negatives(-group.negative, tau=tau))


@register_objective("real", stacked=True)
def real(group: Group, *, tau: float) -> Sides:
    """REAL, "Rewards as Labels": -log(1 + sum_pos exp(-s / tau)) - log(1 + sum_neg exp(s / tau)).

    A classifier of the responses, with 0 as the anchor that positives should score above and negatives below. Weights
    are bounded by 1 / tau. Source: arXiv 2602.05630, where s is the mean log-ratio (``score="log_ratio"``).
    """

    def log_one_plus_sum_exp(x: Tensor) -> Tensor:
        return torch.logsumexp(torch.nn.functional.pad(x, (1, 0)), -1)

    return Sides(-log_one_plus_sum_exp(-group.positive / tau), log_one_plus_sum_exp(group.negative / tau))


@dataclass
class Evaluation:
    """An objective over a mini-batch, 0-dim tensors: J, and its two sides, ``value = positive - negative``."""

    value: Tensor
    positive: Tensor
    negative: Tensor


class Questions(NamedTuple):
    """How a mini-batch's rows answer its questions.

    Attributes:
        positives, negatives: (Q,) numbers of a question's responses of either kind; one without a token is of neither.
        mixed: questions with both, those of like sizes together: their ids (G,), and the rows of their positives (G, P)
            and of their negatives (G, N).
    """

    positives: Tensor
    negatives: Tensor
    mixed: list[tuple[Tensor, Tensor, Tensor]]


def by_question(positive: Tensor, question: Tensor, length: Tensor) -> Questions:
    """Sort rows by question and kind. Arguments as for :func:`evaluate`."""
    rows = (question >= 0).nonzero().flatten()
    ids, number = question[rows].unique(return_inverse=True)
    scored = length[rows] > 0
    rows = rows[scored]
    kind = 2 * number[scored] + ~positive[rows]
    rows = rows[kind.argsort(stable=True)]
    counts = kind.bincount(minlength=2 * len(ids)).view(-1, 2)
    start = counts.sum(1).cumsum(0) - counts.sum(1)
    both = (counts > 0).all(1).nonzero().flatten()
    sizes, which = (counts[both, 0] * (len(rows) + 1) + counts[both, 1]).unique(return_inverse=True)
    mixed = []
    for i, size in enumerate(sizes.tolist()):
        p, n = divmod(size, len(rows) + 1)
        alike = both[which == i]
        members = rows[start[alike][:, None] + torch.arange(p + n, device=rows.device)]
        mixed.append((ids[alike], members[:, :p], members[:, p:]))
    return Questions(*counts.unbind(1), mixed)


def call_objective(objective: str, group: Group, ids: Tensor, settings: Mapping) -> Sides:
    """Both sides, (G,) each, of the questions ``ids`` of like sizes.

    Raises:
        ValueError: the objective fails, or gives something else than finite numbers; names it and the question.
    """

    def refuse(found: object, question: int, cause: Exception | None = None) -> None:
        sizes = f"{group.positive.shape[-1]} positive and {group.negative.shape[-1]} negative responses"
        raise ValueError(
            f"disco.objective={objective} gave {found} for question {question}, of {sizes}; it must give finite "
            "Sides(positive, negative), one number each"
        ) from cause

    fn, found = OBJECTIVES[objective], []
    calls = [(group, ids)]
    if objective not in STACKED:
        # Copies, which a function may write into.
        calls = zip((Group(*(x.clone() for x in one)) for one in zip(*group, strict=True)), ids, strict=True)
    for part, question in calls:
        first = int(question.flatten()[0])
        try:
            sides = fn(part, **settings)
        except Exception as e:
            refuse(f"an error, {type(e).__name__}: {e}", first, e)
        wanted = part.positive.shape[:-1]
        try:
            sides = [torch.as_tensor(side).to(part.positive) for side in sides]
        except (TypeError, ValueError, RuntimeError) as e:
            refuse(repr(sides), first, e)
        if [side.shape for side in sides] != [wanted, wanted]:
            refuse(f"sides of shape {[tuple(side.shape) for side in sides]}", first)
        found.append(sides)
    both = [torch.stack(side).flatten() for side in zip(*found, strict=True)]
    bad = ~(both[0].isfinite() & both[1].isfinite())
    if bad.any():
        i = int(bad.nonzero()[0])
        refuse(tuple(side[i].item() for side in both), int(ids[i]))
    return Sides(*both)


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
        ValueError: for an unknown objective, a setting that it needs and is not there, or what is no finite number of
            its making.
    """
    given = select(OBJECTIVES[objective], settings)
    questions = by_question(positive, question, length)
    # The anchor keeps the graph alive when no question is mixed.
    anchor = torch.where(length > 0, score, 0.0).sum() * 0.0
    total = [anchor, anchor]
    learned = not (questions.mixed and score.requires_grad and torch.is_grad_enabled())
    rows = [x for _, *both in questions.mixed for x in both]
    # Looked up all at once, since the derivative of each look-up is as long as the scores.
    scores = score[torch.cat([x.flatten() for x in rows])].split([x.numel() for x in rows]) if rows else ()
    for (ids, pos, neg), s_pos, s_neg in zip(questions.mixed, scores[::2], scores[1::2], strict=True):
        group = Group(s_pos.view_as(pos), s_neg.view_as(neg), length[pos], length[neg])
        sides = call_objective(objective, group, ids, given)
        total = [before + side.sum() for before, side in zip(total, sides, strict=True)]
        learned |= any(side.requires_grad for side in sides)
    count = max(len(questions.positives), 1)
    total = [side / count for side in total]
    value = total[0] - total[1]
    if not learned and value != 0:
        raise ValueError(
            f"disco.objective={objective} gave {float(value)} without a gradient, so nothing would be learned; compute "
            "its sides from group.positive and group.negative by torch, without detach, item or numpy"
        )
    return Evaluation(value, *total)


def weigh(
    objective: str, score: Tensor, positive: Tensor, question: Tensor, length: Tensor, settings: Mapping
) -> tuple[Evaluation, Tensor]:
    """J and the weights w_i = dJ/ds_i, shape (B,), in float64 and without a graph. Arguments as for :func:`evaluate`.

    Positives of a mixed group get w >= 0, negatives w <= 0, all others 0.

    Raises:
        ValueError: as :func:`evaluate`, or a weight is NaN or infinite.
    """
    with torch.enable_grad():
        leaf = score.detach().double().requires_grad_()
        result = evaluate(objective, leaf, positive, question, length, settings)
        (weight,) = torch.autograd.grad(result.value, leaf)
    bad = ~weight.isfinite()
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"disco.objective={objective} has the derivative {weight[i].item()} by a score ({leaf[i].item()}) of "
            f"question {int(question[i])}; {int(bad.sum())} of {len(bad)} weights are not finite"
        )
    return Evaluation(result.value.detach(), result.positive.detach(), result.negative.detach()), weight
