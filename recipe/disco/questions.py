"""The questions of a mini-batch: which rows answer them, and how much each counts.

    J = (1/Q) sum_q c_q J_q

Q counts every question of the mini-batch, whatever c. The factors c come from the pass rates of all its questions, on
top of any objective, and have no gradient. Pass rates are of the rollout, so c is the same in every epoch. Factors are
not normalised, so they also set how large J is beside the constraint: ``dgpo``'s have mean 1, those of ``failure_rate``
and ``grpo`` are at most 1 and 1/2.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from recipe.disco.registry import Component, Registry, number

PAIRS = {
    "threshold": "every positive with every negative, as positive_threshold tells them apart",
    "graded": "every two responses with different rewards, weighted by the difference; for disco and disco_b",
}
"""What ``disco.pairs`` takes: which responses to a question are compared."""


class Mixed(NamedTuple):
    """Mixed questions of like sizes, stacked.

    Attributes:
        which: (G,) their positions among all questions.
        positive: (G, P) the rows of their positives.
        negative: (G, N) the rows of their negatives.
        reward: (G, P + N) rewards in the order of both, where every pair with different rewards counts; else None.
    """

    which: Tensor
    positive: Tensor
    negative: Tensor
    reward: Tensor | None


class Questions(NamedTuple):
    """How a mini-batch's rows answer its questions.

    Attributes:
        ids: (Q,) their numbers.
        size: (B,) how many rows the question of a row has; 0 for a padding row.
        positive: (B,) bool, the rows' labels.
        positives, negatives: (Q,) numbers of a question's responses of either kind; one without a token is of neither.
        rate: (Q,) share of a question's responses that are positive, or their mean reward; 0 without responses.
        mixed: questions with both.
    """

    ids: Tensor
    size: Tensor
    positive: Tensor
    positives: Tensor
    negatives: Tensor
    rate: Tensor
    mixed: list[Mixed]

    @property
    def are_mixed(self) -> Tensor:
        """(Q,) bool, those with positives and negatives."""
        return (self.positives > 0) & (self.negatives > 0)


def by_question(positive: Tensor, question: Tensor, length: Tensor, reward: Tensor | None = None) -> Questions:
    """Sort rows by question and kind.

    Args:
        positive, question, length: (B,) each, as for :func:`recipe.disco.objectives.evaluate`.
        reward: (B,) where within a question every pair with different rewards counts.
    """
    rows = (question >= 0).nonzero().flatten()
    ids, member, count = question[rows].unique(return_inverse=True, return_counts=True)
    size = torch.zeros_like(question).index_copy(0, rows, count[member])
    scored = length[rows] > 0
    rows, member = rows[scored], member[scored]
    several = torch.zeros_like(ids, dtype=torch.bool)
    mean_reward = None
    if reward is not None:
        # As verl keeps rewards: 0.1 + 0.2 is 0.3.
        reward = reward.float().double()
        positive, several, mean_reward = by_reward(reward[rows], member, len(ids), positive, rows)
    kind = 2 * member + ~positive[rows]
    rows = rows[kind.argsort(stable=True)]
    counts = kind.bincount(minlength=2 * len(ids)).view(-1, 2)
    total = counts.sum(1)
    start = total.cumsum(0) - total
    both = (counts > 0).all(1).nonzero().flatten()
    codes = 2 * (counts[both, 0] * (len(rows) + 1) + counts[both, 1]) + several[both]
    splits, which = codes.unique(return_inverse=True)
    mixed = []
    for i, split in enumerate(splits.tolist()):
        p, n = divmod(split // 2, len(rows) + 1)
        alike = both[which == i]
        members = rows[start[alike][:, None] + torch.arange(p + n, device=rows.device)]
        levels = reward[members] if reward is not None and split % 2 else None
        mixed.append(Mixed(alike, members[:, :p], members[:, p:], levels))
    rate = counts[:, 0].double() / total.clamp(min=1) if mean_reward is None else mean_reward
    return Questions(ids, size, positive, counts[:, 0], counts[:, 1], rate, mixed)


def by_reward(
    reward: Tensor, member: Tensor, questions: int, positive: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels where every pair with different rewards counts: positive is a reward above its question's mean.

    Over the responses above the mean, the weights dJ/ds add up to 0 or more, whatever the levels; with two levels they
    are the higher. Where all rewards of a question are the same, labels stay.

    Args:
        reward, member, rows: (R,) of each row with a token: its reward, its question's position, its place in (B,).
        positive: (B,) labels by the threshold.

    Returns:
        (B,) labels; (Q,) whether rewards have more than two levels; (Q,) mean rewards.
    """
    empty = reward.new_zeros(questions)
    low, high = (empty.scatter_reduce(0, member, reward, side, include_self=False) for side in ("amin", "amax"))
    mean_reward = empty.scatter_reduce(0, member, reward, "mean", include_self=False)
    differ = (high > low)[member]
    positive = positive.index_copy(0, rows, torch.where(differ, reward > mean_reward[member], positive[rows]))
    between = (reward > low[member]) & (reward < high[member])
    several = torch.zeros_like(empty, dtype=torch.bool).index_fill(0, member[between], True)
    return positive, several, mean_reward


def pair_weights(reward: Tensor) -> Tensor:
    """Weights of the pairs (i, j) of responses with the rewards (..., n): max(r_i - r_j, 0), over their sum."""
    w = torch.relu(reward[..., :, None] - reward[..., None, :])
    return w / w.sum((-2, -1), keepdim=True)


# How much each counts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuestionWeight(Component):
    """Base class: a frozen dataclass whose fields are its settings."""

    uniform: ClassVar[bool] = False
    """All factors are 1, so there is nothing to compute or to log."""

    def __call__(self, p: Tensor, n: Tensor, mixed: Tensor) -> Tensor:
        """The factors c, (Q,), finite and at least 0; those of questions that are not mixed do not matter.

        Args:
            p: (Q,) share of a question's responses that are positive; with ``disco.pairs=graded`` their mean reward.
            n: (Q,) number of its responses that have a token.
            mixed: (Q,) bool, whether it has a J_q: positive and negative responses, or different rewards.
        """
        raise NotImplementedError


QUESTIONS: Registry[QuestionWeight] = Registry("questions", QuestionWeight)
register_questions = QUESTIONS.register
"""Class decorator: register factors under the name that ``disco.questions`` takes."""


@register_questions("uniform")
@dataclass(frozen=True)
class Uniform(QuestionWeight):
    """c = 1. DisCO: every mixed question counts alike."""

    uniform = True

    def __call__(self, p: Tensor, n: Tensor, mixed: Tensor) -> Tensor:
        return torch.ones_like(p)


UNIFORM = Uniform()


@register_questions("failure_rate")
@dataclass(frozen=True)
class FailureRate(QuestionWeight):
    """c = 1 - p. MaxRL's: questions that are seldom solved count most."""

    def __call__(self, p: Tensor, n: Tensor, mixed: Tensor) -> Tensor:
        return 1 - p


@register_questions("dgpo")
@dataclass(frozen=True)
class DGPO(QuestionWeight):
    """c = M softmax(-p / T) over the M mixed questions. DGPO's: harder ones count more, 1 on average.

    T is ``question_temperature``. Sources: arXiv 2601.20614; the authors' code multiplies by the number of questions
    whose rewards differ.
    """

    question_temperature: float = number(2.0, above=0)

    def __call__(self, p: Tensor, n: Tensor, mixed: Tensor) -> Tensor:
        return mixed.sum() * torch.softmax(torch.where(mixed, -p / self.question_temperature, -torch.inf), -1)


@register_questions("grpo")
@dataclass(frozen=True)
class GRPO(QuestionWeight):
    """c = sqrt(p (1 - p)). GRPO's difficulty bias (DisCO's Proposition 1), as an ablation."""

    def __call__(self, p: Tensor, n: Tensor, mixed: Tensor) -> Tensor:
        return (p * (1 - p)).sqrt()


def factors(weight: QuestionWeight, questions: Questions) -> Tensor:
    """The factors of all questions, (Q,), float64, without a gradient; 1 where the question is not mixed.

    Raises:
        ValueError: they are no finite numbers of at least 0; names the question and its pass rate.
    """
    mixed, total = questions.are_mixed, questions.positives + questions.negatives
    found = torch.as_tensor(weight(questions.rate.clone(), total, mixed)).detach()
    if found.shape != mixed.shape:
        raise ValueError(
            f"disco.questions={weight.name} gave factors of shape {tuple(found.shape)} for {len(mixed)} questions; "
            "it must give one for each"
        )
    found = torch.where(mixed, found.to(questions.rate), 1.0)
    bad = ~(found.isfinite() & (found >= 0))
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"disco.questions={weight.name} gave {float(found[i])} for question {int(questions.ids[i])}, whose rate of "
            f"success (mean reward) is {float(questions.rate[i]):g}; factors must be finite and at least 0, and with "
            "disco.pairs=graded most need rewards from 0 to 1"
        )
    return found
