"""Refuses settings of verl's own methods that contradict each other and would silently train something else."""

from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

from verl_ext.training.estimators import ESTIMATORS

GROUP_ESTIMATORS = ("grpo", "grpo_vectorized", "grpo_passk", "gdpo", "rloo", "rloo_vectorized", "gpg", "opo")
GROUP_ESTIMATORS += ("reinforce_plus_plus_baseline", *ESTIMATORS)
"""Advantage estimators that compare the responses to one question."""


def validate(config: DictConfig) -> None:
    """Refuse contradictions in the composed configuration of ``main_ppo``, before Ray or a model starts.

    Raises:
        ValueError: names the setting, the value found and what would be right.
    """
    algorithm, actor, rollout = config.algorithm, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    estimator, loss_mode = str(algorithm.adv_estimator), actor.policy_loss.loss_mode

    def refuse(setting: str, found, right: str) -> None:
        raise ValueError(f"{setting}={found} does not work here: {right}")

    # A user's module may register more, in the workers.
    own = OmegaConf.select(config, "actor_rollout_ref.model.external_lib")
    if not own and estimator not in [*ADV_ESTIMATOR_REGISTRY, "gae"]:
        refuse("algorithm.adv_estimator", estimator, f"verl has {sorted(ADV_ESTIMATOR_REGISTRY)}")
    if not own and loss_mode not in POLICY_LOSS_REGISTRY:
        refuse("actor_rollout_ref.actor.policy_loss.loss_mode", loss_mode, f"verl has {sorted(POLICY_LOSS_REGISTRY)}")
    if estimator in GROUP_ESTIMATORS and rollout.n < 2:
        right = f"algorithm.adv_estimator={estimator} compares the responses to a question; use n >= 2"
        refuse("actor_rollout_ref.rollout.n", rollout.n, right)
    if not own and estimator != "gae" and OmegaConf.select(config, "critic.enable"):
        refuse("critic.enable", True, f"algorithm.adv_estimator={estimator} reads no values; use null")
    if actor.use_kl_loss and algorithm.use_kl_in_reward:
        right = "with actor_rollout_ref.actor.use_kl_loss the KL to the reference would count twice; use one of them"
        refuse("algorithm.use_kl_in_reward", True, right)
    if actor.use_kl_loss and actor.kl_loss_coef == 0:
        right = "kl_loss_coef=0: the reference model would be loaded but unused; use false"
        refuse("actor_rollout_ref.actor.use_kl_loss", True, right)
    if estimator in ESTIMATORS and algorithm.use_kl_in_reward:
        right = f"with a KL term rewards are negative and all differ, but algorithm.adv_estimator={estimator} goes by "
        right += "pass rates; use false, or actor_rollout_ref.actor.use_kl_loss=true"
        refuse("algorithm.use_kl_in_reward", True, right)
    overlong = "reward.reward_kwargs.overlong_buffer_cfg.enable"
    if estimator == "maxrl" and config.reward.reward_manager.name == "dapo" and OmegaConf.select(config, overlong):
        refuse(overlong, True, "a wrong response that is too long gets a negative reward, and maxrl needs 0; use false")
    if loss_mode == "sapo" and actor.loss_agg_mode != "seq-mean-token-mean":
        right = "verl's SAPO always averages over a response's tokens, then over responses; use seq-mean-token-mean"
        refuse("actor_rollout_ref.actor.loss_agg_mode", actor.loss_agg_mode, right)
    if estimator == "dgpo" and actor.loss_agg_mode != "token-mean":
        right = "algorithm.adv_estimator=dgpo scales for a mean over tokens; use token-mean"
        refuse("actor_rollout_ref.actor.loss_agg_mode", actor.loss_agg_mode, right)
    if actor.loss_agg_mode == "seq-mean-token-sum-norm" and not actor.loss_scale_factor:
        right = (
            "verl would divide by the width of each padded micro-batch, so the update would depend on how the batch "
        )
        right += "is split; use a constant, such as data.max_response_length"
        refuse("actor_rollout_ref.actor.loss_scale_factor", actor.loss_scale_factor, right)
