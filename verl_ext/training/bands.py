"""The training's weight by difficulty: which questions a step's advantages pull on."""

from collections.abc import Hashable, Sequence

from verl_ext.runs.evaluations import QUESTIONS, WEIGHT, band_index


def weight_by_pass_rate(
    question: Sequence[Hashable], reward: Sequence[float], weight: Sequence[float]
) -> dict[str, float]:
    """Share a step's questions and its weight out over the bands of their pass rates.

    Args:
        question: (B,) of each response.
        reward: (B,) summed; right means above 0, as for ``training/right_questions``.
        weight: (B,) each response's mean |advantage| over its tokens, before what the loss itself divides by.

    Returns:
        ``QUESTIONS`` and ``WEIGHT``: shares that sum to 1; those of the weight are 0 if no response has any.
    """
    rows: dict[Hashable, list[int]] = {}
    for i, name in enumerate(question):
        rows.setdefault(name, []).append(i)
    found = dict.fromkeys((*QUESTIONS, *WEIGHT), 0.0)
    total = sum(weight)
    for members in rows.values():
        band = band_index(sum(reward[i] > 0 for i in members) / len(members))
        found[QUESTIONS[band]] += 1 / len(rows)
        found[WEIGHT[band]] += sum(weight[i] for i in members) / total if total > 0 else 0.0
    return found
