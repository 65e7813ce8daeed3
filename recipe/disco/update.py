"""What one update is: a row per response of the mini-batch -> a weight per response and one coefficient.

    L = -J + penalty(KL),      dL/dlogp(i,t) = -w_i ds_i/dlogp(i,t) + c dKL/dlogp(i,t)

:func:`plan_update` gives L, the weights w_i = dJ/ds_i and the coefficient c = d penalty / d KL. The executable
definition (``loss.py``) and the training worker (``worker.py``) both call it, so they cannot drift apart.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from recipe.disco.constraint import Controller, kl_standard_error, price
from recipe.disco.metrics import group_metrics
from recipe.disco.objectives import Objective, evaluate, weigh
from recipe.disco.questions import UNIFORM, Questions, QuestionWeight, by_question, factors


@dataclass(frozen=True)
class ScoreTable:
    """A mini-batch, one row per response, or per part of it, columns of shape (B,).

    Attributes:
        question: which question a response answers, any integers; < 0 for a padding row.
        session: which response the row is, or is a part of (:func:`by_session`), any integers; padding rows have their
            own.
        size: how many rows its question has in the whole batch.
        index: the row's number in the batch, for messages.
        reward: the summed reward, before any KL term.
        length: response tokens.
        score: s_i of the row's tokens.
        kl: the KL's estimate, summed over the row's tokens, in nats.
        measured: whether score and kl are the policy's. Where they are not, they are 0, and no weight depends on them.
        entropy: of the policy, summed over the row's tokens, in nats; NaN where it was not measured.
    """

    question: Tensor
    session: Tensor
    size: Tensor
    index: Tensor
    reward: Tensor
    length: Tensor
    score: Tensor
    kl: Tensor
    measured: Tensor
    entropy: Tensor

    def gathered(self, gather: Callable[[Tensor], Tensor]) -> "ScoreTable":
        """The same table with the rows of all ranks.

        Args:
            gather: (B, columns) of this rank, float64 -> (all ranks' B, columns), the same on every rank.
        """
        mine = {f.name: getattr(self, f.name).to(self.score.device, torch.float64) for f in fields(self)}
        all_rows = dict(zip(mine, gather(torch.stack(list(mine.values()), -1)).unbind(-1), strict=True))
        whole = {name: all_rows[name].long() for name in ("question", "session", "size", "index", "length")}
        return ScoreTable(**all_rows | whole | {"measured": all_rows["measured"].bool()})


@dataclass(frozen=True)
class UpdatePlan:
    """How a mini-batch is trained on.

    Attributes:
        loss: L, 0-dim; with a graph if the table's scores and KL have one.
        weight: (B,) w_i = dJ/ds_i by the row's own score, float64, no graph.
        positive: (B,) bool, the labels.
        coefficient: c = d penalty / d KL.
        tokens: N, response tokens of the mini-batch; KL = (1/N) sum_i kl_i.
        kl: the KL that the penalty was taken at, nats per token.
        needs_gradient: (B,) bool: rows whose gradient is not 0, since w_i is not, or c is not.
        metrics: as ``README.md`` lists them.
    """

    loss: Tensor
    weight: Tensor
    positive: Tensor
    coefficient: float
    tokens: int
    kl: float
    needs_gradient: Tensor
    metrics: dict[str, float]


def plan_update(
    table: ScoreTable,
    objective: Objective,
    controller: Controller,
    *,
    positive_threshold: float,
    graded: bool = False,
    question_weight: QuestionWeight = UNIFORM,
    kl: float | None = None,
) -> UpdatePlan:
    """Weigh all responses of a mini-batch and price its KL.

    Args:
        table: the whole mini-batch, of all ranks.
        positive_threshold: a response is positive when its reward is >= this.
        graded: within a question every pair with different rewards counts, the higher one as the positive, weighted by
            the difference. The threshold then says of what kind questions with equal rewards are, for the log.
        question_weight: how much each question counts.
        kl: what the penalty is taken at where the table's KL was not measured; by default the table's.

    Raises:
        ValueError: NaN or infinity in the table, with the response's index; a question of which a part is missing; what
            an objective or a controller gives and cannot be used.
    """
    check_numbers(table)
    parts, (table, member) = table, by_session(table)
    # One sort for all that follows
    questions = labelled(table.reward, table.question, table.length, positive_threshold, graded)
    refuse_torn(table, questions.size)
    real = table.question >= 0
    tokens = int(table.length[real].sum())
    seen = real & table.measured
    measured = table.kl[seen].sum() / max(int(table.length[seen].sum()), 1)
    in_force = measured if kl is None else torch.full_like(measured, kl)

    rows = (table.score.double(), questions.positive, table.question, table.length)
    j, weight = weigh(objective, *rows, questions, question_weight)
    if table.score.requires_grad:
        j = evaluate(objective, *rows, questions, question_weight)
    penalty, coefficient = price(controller, in_force.item())
    # As the coefficient, in float64: in float32 a large KL's square overflows.
    loss = -j.value + controller.penalty(in_force.double())

    groups = group_metrics(table.score.detach(), *rows[1:], weight, questions)
    if parts is not table:
        # ds/ds_k = n_k / n
        weight = weight[member] * (parts.length.double() / table.length[member].clamp(min=1))
    needs_gradient = (parts.length > 0) & ((weight != 0) | (coefficient != 0))
    metrics = {
        "loss": loss.item(),
        "objective": j.value.item(),
        "objective_positive": j.positive.item(),
        "objective_negative": j.negative.item(),
        **(kl_metrics(controller, in_force.item()) if kl is not None or seen.any() else {}),
        **(kl_noise(table.kl[seen].detach(), table.length[seen]) if kl is None else {}),
        "coefficient": coefficient,
        "penalty": penalty,
        **{f"constraint_{k}": v for k, v in controller.state_dict().items() if isinstance(v, int | float)},
        **groups,
        **({} if question_weight.uniform else weight_metrics(factors(question_weight, questions)[questions.are_mixed])),
        "questions": float(len(questions.positives)),
        "rows_per_response": int((parts.question >= 0).sum()) / max(int(real.sum()), 1),
        "padding_rows": int((parts.question < 0).sum()) / max(len(parts.question), 1),
        "no_mixed_group": float(groups["groups_mixed"] == 0),
    }
    if not table.entropy.isnan().any():
        metrics["entropy"] = float(table.entropy.sum()) / max(tokens, 1)
    positive = questions.positive[member]
    return UpdatePlan(
        loss.to(table.score), weight, positive, coefficient, tokens, in_force.item(), needs_gradient, metrics
    )


def labelled(reward: Tensor, question: Tensor, length: Tensor, threshold: float, graded: bool) -> Questions:
    """Rows, (B,) each, by question and label. Arguments as for :func:`plan_update`."""
    return by_question(is_positive(reward, threshold), question, length, reward if graded else None)


def is_positive(reward: Tensor, threshold: float) -> Tensor:
    """Which responses are positive, (B,) bool. In float32, as verl keeps rewards: 0.7 reaches a threshold of 0.7."""
    return reward.float() >= threshold


def weight_metrics(c: Tensor) -> dict[str, float]:
    """Mean and maximum of the factors of mixed questions, if there are any."""
    return {"question_weight": float(c.mean()), "question_weight_max": float(c.max())} if len(c) else {}


def kl_metrics(controller: Controller, kl: float) -> dict[str, float]:
    """The KL, and whether it is over the controller's bound, if that has one."""
    delta = getattr(controller, "delta", None)
    return {"kl": kl} | ({} if delta is None else {"over_delta": float(kl > delta)})


def kl_noise(kl_sum: Tensor, length: Tensor) -> dict[str, float]:
    """The standard error of a measured KL, if there is one."""
    error = kl_standard_error(kl_sum, length)
    return {} if error is None else {"kl_standard_error": error}


def by_session(table: ScoreTable) -> tuple[ScoreTable, Tensor]:
    """The table with one row per response, and the number there of each row, (B,).

    An agent's session may leave several trajectories, a row each. It is one response: its score is the mean over the
    tokens of all its rows, s = (1/n) sum_k n_k s_k with n = sum_k n_k; tokens, KL and entropy are sums.

    Raises:
        ValueError: rows of one session with different questions or rewards; a question of which a row is missing.
    """
    ids, member = table.session.unique(return_inverse=True)
    rows = torch.arange(len(member), device=member.device)
    if len(ids) == len(rows):
        return table, rows
    refuse_torn(table, occurrences(table.question))
    first = rows.new_full((len(ids),), len(rows)).scatter_reduce(0, member, rows, "amin")
    for name, x in (("question", table.question), ("reward", table.reward)):
        if (differs := x != x[first][member]).any():
            row = int(differs.nonzero()[0])
            raise ValueError(
                f"samples {int(table.index[first[member[row]]])} and {int(table.index[row])} are of one session, but "
                f"their {name}s are {x[first[member[row]]]:g} and {x[row]:g}; a session is one response"
            )
    length = totals(table.length, member, len(ids))
    score = totals(table.length * table.score, member, len(ids)) / length.clamp(min=1)
    question = table.question[first]
    return ScoreTable(
        question=question,
        session=ids,
        size=occurrences(question),
        index=table.index[first],
        reward=table.reward[first],
        length=length,
        score=score,
        kl=totals(table.kl, member, len(ids)),
        measured=totals(table.measured.long(), member, len(ids)) > 0,
        entropy=totals(table.entropy, member, len(ids)),
    ), member


def totals(x: Tensor, member: Tensor, count: int) -> Tensor:
    """Sums of x, (B,), over the rows of each of ``count`` responses; ``member``, (B,), says of which a row is."""
    return x.new_zeros(count).index_add(0, member, x)


def occurrences(x: Tensor) -> Tensor:
    """How often each entry's value occurs in ``x``."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    return counts[inverse]


def check_numbers(table: ScoreTable) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: names the column and the first row's index.
    """
    real = table.question >= 0
    for name, x in (
        ("sequence_reward", torch.where(real, table.reward, 0.0)),
        ("the score", torch.where(real & (table.length > 0), table.score.detach(), 0.0)),
        ("KL", torch.where(real, table.kl.detach(), 0.0)),
        # Without a token the weight is 0, but 0 times NaN is NaN.
        ("the score (0, say, for a response without a token)", table.score.detach()),
    ):
        require_numbers(name, x, index=table.index)


def refuse_torn(table: ScoreTable, found: Tensor) -> None:
    """Refuse a question of which a row is missing.

    Args:
        found: (B,) how many rows the row's question has here.

    Raises:
        ValueError: names the question.
    """
    torn = (table.question >= 0) & (found != table.size)
    if torn.any():
        row = int(torn.nonzero()[0])
        raise ValueError(
            f"question {int(table.question[row])} has {int(found[row])} of its {int(table.size[row])} responses in "
            "this mini-batch: DisCO needs all of them there; train with verl_ext's trainer and do not reorder its "
            "batches"
        )


def require_numbers(name: str, x: Tensor, mask: Tensor | None = None, index: Tensor | None = None) -> None:
    """Stop on NaN or infinity (at response tokens, if ``mask`` is given).

    Args:
        index: (B,) the responses' numbers in the batch, where ``x`` holds them in another order.

    Raises:
        ValueError: names the tensor and the first response's index.
    """
    # NaN and infinity stay in a sum: mostly one pass over x is enough.
    if torch.isfinite(x.sum()):
        return
    bad = ~torch.isfinite(x)
    if mask is not None:
        bad = (bad & mask).any(-1)
    if bad.any():
        row = int(bad.nonzero()[0])
        sample = row if index is None else int(index[row])
        raise ValueError(f"{name} of sample {sample} is NaN or infinite ({int(bad.sum())} of {len(bad)} samples are)")
