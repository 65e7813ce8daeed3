"""What the log says of a mini-batch: functions of the per-response table alone, the same numbers on every rank."""

import torch
from torch import Tensor

from recipe.disco.objectives import indices_by_question


def _mean(values: list[float] | Tensor) -> float | None:
    values = torch.as_tensor(values, dtype=torch.float64)
    return float(values.mean()) if len(values) else None


def group_metrics(
    score: Tensor, positive: Tensor, question: Tensor, length: Tensor, weight: Tensor
) -> dict[str, float]:
    """Composition and separation of the groups of one mini-batch.

    Args:
        score, positive, question, length: as in :func:`recipe.disco.objectives.evaluate`, shape (B,).
        weight: (B,) dJ/ds.

    Returns:
        Fractions of questions (``groups_*``), means over mixed groups (``score_*``, ``auc``,
        ``effective_negatives``), means over responses (``length_*``) and the count ``empty_responses``. A mean over
        nothing is left out.
    """
    real = question >= 0
    counts = {"mixed": 0, "all_positive": 0, "all_negative": 0, "empty": 0}
    auc, effective, positives, negatives = [], [], [], []
    questions = indices_by_question(question)
    for rows in questions:
        scored = rows[length[rows] > 0]
        pos, neg = scored[positive[scored]], scored[~positive[scored]]
        if len(pos) and len(neg):
            counts["mixed"] += 1
            difference = score[pos][:, None] - score[neg][None, :]
            auc.append(float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean()))
            share = weight[neg] / weight[neg].sum()
            effective.append(float(1.0 / share.square().sum()))
            positives.append(score[pos].double())
            negatives.append(score[neg].double())
        elif len(pos):
            counts["all_positive"] += 1
        elif len(neg):
            counts["all_negative"] += 1
        else:
            counts["empty"] += 1
    scored = real & (length > 0)
    metrics = {f"groups_{k}": v / max(len(questions), 1) for k, v in counts.items()}
    metrics |= {
        "score_positive": _mean(torch.cat(positives) if positives else []),
        "score_negative": _mean(torch.cat(negatives) if negatives else []),
        "auc": _mean(auc),
        "effective_negatives": _mean(effective),
        "length_positive": _mean(length[scored & positive]),
        "length_negative": _mean(length[scored & ~positive]),
        "empty_responses": float((real & (length == 0)).sum()),
    }
    return {k: v for k, v in metrics.items() if v is not None}
