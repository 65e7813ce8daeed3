"""`disco` in verl's own registries, where a reader looks who knows how verl's methods register.

- ``algorithm.adv_estimator=disco``: the advantage of a response is its weight dJ_q/ds at pi_old, for every token. It is
  what ``critic/advantages/*`` show; training measures the weights again, before each update (``worker.py``).
- ``actor_rollout_ref.actor.policy_loss.loss_mode=disco``: refuses, since verl calls a policy loss with the rows of one
  micro-batch, without questions and rewards. The loss is ``loss.py``'s, called by the worker.
- The KL-constraint controllers are registered by name, too, in ``constraint.py`` (``register_controller``): verl's own
  KL controllers (``get_kl_controller``) have no registry.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from verl.workers.config import PolicyLossConfig

from recipe.disco.loss import question_ids
from recipe.disco.objectives import weigh
from recipe.disco.scores import compute_score
from recipe.disco.settings import DiscoConfig, parse
from recipe.disco.update import ScoreTable, by_session, labelled, occurrences
from verl_ext.training.advantages import current
from verl_ext.training.rows import of_sessions

NAME = "disco"


@dataclass
class DiscoPolicyLossConfig(PolicyLossConfig):
    """verl's ``actor.policy_loss`` node with the method's settings, so that workers see them."""

    disco: DiscoConfig = field(default_factory=DiscoConfig)


def disco_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, config: Any = None, **unused: Any
) -> tuple[Tensor, Tensor]:
    """Each response's weight in its question's objective at pi_old, dJ_q/ds_i; all rows of a session have it.

    1/n+ for a positive of DisCO, -softmax(s / tau) for a negative, 0 in questions without both. Weights of questions
    (``disco.questions``) are here of the whole batch, in training of each mini-batch.

    Args:
        token_level_rewards: (B, T) their sum is a response's reward.
        response_mask: (B, T) nonzero at response tokens.
        index: (B,) the question of each response.

    Returns:
        Advantages and returns, (B, T) each, as verl's estimators do: the same, 0 outside the mask.

    Raises:
        ValueError: the trainer is not one of verl_ext's, or the run has no ``disco`` node.
    """
    batch = current(NAME)
    if "disco" not in batch.config:
        raise ValueError(f"algorithm.adv_estimator={NAME} needs the settings of the method; start from algorithm=disco")
    disco = parse(batch.config.disco)
    score, mask, old = disco.build_score(), response_mask.bool(), batch.read("old_log_probs")
    s = compute_score(score, old, old, mask, batch.read("ref_log_prob") if score.base == "reference" else None)
    question = torch.tensor(question_ids(index))
    reward = of_sessions(batch.rows, token_level_rewards.sum(-1).tolist())
    responses, member = by_session(
        ScoreTable(
            question=question,
            session=torch.tensor(question_ids([(row.uid, row.session) for row in batch.rows])),
            size=occurrences(question),
            index=torch.arange(len(s)),
            reward=torch.tensor(reward),
            length=mask.sum(-1),
            score=s,
            kl=torch.zeros_like(s),
            measured=torch.ones_like(s, dtype=torch.bool),
            entropy=torch.zeros_like(s),
        )
    )
    questions = labelled(responses.reward, responses.question, responses.length, disco.positive_threshold, disco.graded)
    rows = (responses.score, questions.positive, responses.question, responses.length)
    _, weight = weigh(disco.build_objective().at(batch.progress), *rows, questions, disco.build_question_weight())
    advantages = (weight[member] * len(questions.ids))[:, None].to(token_level_rewards) * mask
    return advantages, advantages


def refuse_policy_loss(*arguments: Any, **named: Any) -> tuple[Tensor, dict]:
    """What verl calls as a policy loss where the worker is not ours.

    Raises:
        ValueError: always; says what trains DisCO.
    """
    raise ValueError(
        f"actor_rollout_ref.actor.policy_loss.loss_mode={NAME} is computed by DisCO's own worker, which this run does "
        "not have; start from algorithm=disco (recipe/disco/loss.py is the loss, worker.py the worker)"
    )


def register() -> None:
    """Put both into verl's registries."""
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    register_adv_est(NAME)(disco_advantage)
    register_policy_loss(NAME)(refuse_policy_loss)
