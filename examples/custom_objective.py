"""An objective of your own, complete: pairwise ranking of all responses by length as well as by correctness.

    python -m verl.trainer.main_ppo algorithm=disco +experiment=arithmetic_cpu \
        disco.module=examples/custom_objective.py disco.objective=margin_by_length +disco.options.margin=0.2

(`.venv/bin/python` where the quickstart made the environment.) Every process loads this file before it reads the
settings, so what is registered here works like what ships: whole groups, the exact measuring pass, the constraint,
metrics and checkpoints are the same. On several nodes, put it into a package and write `disco.module=pkg://name`.

An objective sees one question that has right and wrong responses, and returns J_q as two sides, J_q = first - second.
Write plain differentiable torch: the weights dJ/ds are taken by autograd on the scores, over the whole mini-batch.
"""

from dataclasses import dataclass

import torch

from recipe.disco import Group, Objective, Sides, register_objective


@register_objective("margin_by_length")
@dataclass(frozen=True)
class MarginByLength(Objective):
    """Right responses should lead wrong ones, the short ones by more.

        J_q = mean over pairs (i right, j wrong) of log sigmoid( scale (s_i - s_j - m_i) )
        m_i = margin * (shortest right length) / |o_i|

    Args:
        margin: lead of the shortest right response, in units of the score; `+disco.options.margin=...`.
        surrogate_scale: steepness, 1 / units of the score; `+disco.options.surrogate_scale=...`.
    """

    margin: float
    surrogate_scale: float = 10.0

    def __call__(self, group: Group) -> Sides:
        """Compute J_q from scores (P,), (N,) in nats per token and lengths in tokens."""
        length = group.positive_length.to(group.positive)
        lead = self.margin * length.min() / length
        difference = group.positive[:, None] - group.negative[None, :] - lead[:, None]
        gain = torch.nn.functional.logsigmoid(self.surrogate_scale * difference).mean()
        # No natural second side: all of it is the first.
        return Sides(gain, torch.zeros_like(gain))
