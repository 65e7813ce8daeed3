"""What the log says of a mini-batch: functions of the per-response table alone, the same numbers on every rank."""

import torch
from torch import Tensor

from recipe.disco.questions import Questions, by_question, pair_weights


def _mean(values: list[Tensor]) -> float | None:
    pooled = torch.cat([x.double() for x in values]) if values else torch.zeros(0)
    return float(pooled.mean()) if len(pooled) else None


def group_metrics(
    score: Tensor,
    positive: Tensor,
    question: Tensor,
    length: Tensor,
    weight: Tensor,
    questions: Questions | None = None,
) -> dict[str, float]:
    """Composition and separation of the groups of one mini-batch.

    Args:
        score, positive, question, length, questions: as in :func:`recipe.disco.objectives.evaluate`, shape (B,).
        weight: (B,) dJ/ds.

    Returns:
        Fractions of questions (``groups_*``), means over mixed groups (``score_*``, ``auc``,
        ``effective_negatives``), means over responses (``length_*``) and the count ``empty_responses``. A mean over
        nothing is left out. With graded rewards positives are those above their question's mean, ``auc`` weighs pairs
        by the difference of their rewards, and ``effective_negatives`` is of all responses that are pushed down.
    """
    if questions is None:
        questions = by_question(positive, question, length)
    positive = questions.positive
    count = max(len(questions.positives), 1)
    right, wrong = questions.positives > 0, questions.negatives > 0
    counts = {
        "mixed": questions.are_mixed,
        "all_positive": right & ~wrong,
        "all_negative": ~right & wrong,
        "empty": ~(right | wrong),
    }
    auc, effective, positives, negatives = [], [], [], []
    for _, pos, neg, reward in questions.mixed:
        s_pos, s_neg, w_neg = score[pos].contiguous(), score[neg], weight[neg]
        if reward is None:
            ordered = s_neg.sort(-1).values
            # Negatives below a positive, and those not above it: ties count by half.
            below, most = (torch.searchsorted(ordered, s_pos, side=s) for s in ("left", "right"))
            auc.append((below + most).double().mean(-1) / (2 * neg.shape[-1]))
        else:
            s = torch.cat([s_pos, s_neg], -1).double()
            right = ((s[..., :, None] - s[..., None, :]).sign() + 1) / 2
            auc.append((pair_weights(reward) * right).sum((-2, -1)))
            w_neg = -torch.relu(-torch.cat([weight[pos], w_neg], -1))
        share = w_neg / w_neg.sum(-1, keepdim=True)
        effective.append(1.0 / share.square().sum(-1))
        positives.append(s_pos.flatten())
        negatives.append(s_neg.flatten())
    scored = (question >= 0) & (length > 0)
    metrics: dict[str, float | None] = {f"groups_{k}": float(v.sum()) / count for k, v in counts.items()}
    metrics |= {
        "score_positive": _mean(positives),
        "score_negative": _mean(negatives),
        "auc": _mean(auc),
        # No share, where no negative has a weight: a squared hinge at 0.
        "effective_negatives": _mean([x[x.isfinite()] for x in effective]),
        "length_positive": _mean([length[scored & positive]]),
        "length_negative": _mean([length[scored & ~positive]]),
        "empty_responses": float(((question >= 0) & (length == 0)).sum()),
    }
    return {k: v for k, v in metrics.items() if v is not None}
