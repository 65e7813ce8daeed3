"""An objective of your own, complete: pairwise ranking of all responses by length as well as by correctness.

    python -m verl.trainer.main_ppo algorithm=disco +experiment=arithmetic_cpu \
        disco.module=examples/custom_objective.py disco.objective=margin_by_length +disco.options.margin=0.2

(`.venv/bin/python` where the quickstart made the environment.) Every process loads this file before it reads the
settings, so what is registered here works like what ships: whole groups, the exact measuring pass, the constraint,
metrics and checkpoints are the same. On several nodes, put it into a package and write `disco.module=pkg://name`.

An objective sees one question that has right and wrong responses, and returns J_q as two sides, J_q = first - second.
Write plain differentiable torch: the weights dJ/ds are taken by autograd on the scores, over the whole mini-batch.
"""

import torch

from recipe.disco.objectives import Group, Sides, register_objective


@register_objective("margin_by_length")
def margin_by_length(group: Group, *, margin: float, surrogate_scale: float = 10.0) -> Sides:
    """Right responses should lead wrong ones, the short ones by more.

        J_q = mean over pairs (i right, j wrong) of log sigmoid( scale (s_i - s_j - m_i) )
        m_i = margin * (shortest right length) / |o_i|

    Args:
        group: scores (P,), (N,) in nats a token, and lengths in tokens, of one question's right and wrong responses.
        margin: lead of the shortest right response, in units of the score; `+disco.options.margin=...`.
        surrogate_scale: steepness, 1 / units of the score; `+disco.options.surrogate_scale=...`.
    """
    length = group.positive_length.to(group.positive)
    lead = margin * length.min() / length
    difference = group.positive[:, None] - group.negative[None, :] - lead[:, None]
    gain = torch.nn.functional.logsigmoid(surrogate_scale * difference).mean()
    # No natural second side: all of it is the first.
    return Sides(gain, torch.zeros_like(gain))
