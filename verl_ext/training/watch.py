"""What a step's metrics say when a run learns nothing: one line in words, once per stretch of steps."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

UNMIXED_STEPS = 5
"""Steps without a question that has right and wrong responses, after which that is said."""
CONSTRAINT_STEPS = 20
"""Steps in which the constraint never, or always, binds, after which that is said."""

WITHOUT_LIMIT = ("none", "fixed")
"""Constraints that no KL exceeds."""


class Stretch:
    """Steps in a row for which something holds."""

    def __init__(self, steps: int):
        self._steps, self._count = steps, 0

    def reaches(self, holds: bool) -> bool:
        """Count a step; True once, when it is the last of so many in a row."""
        self._count = self._count + 1 if holds else 0
        return self._count == self._steps


class Watch:
    """Looks at each step's metrics.

    Args:
        config: the run's settings.
    """

    def __init__(self, config: DictConfig):
        self._config = config
        self._group = OmegaConf.select(config, "verl_ext.metrics") or ""
        self._unmixed = Stretch(UNMIXED_STEPS)
        self._never, self._always = Stretch(CONSTRAINT_STEPS), Stretch(CONSTRAINT_STEPS)

    def lines(self, metrics: Mapping[str, Any], mini_batches: int, fresh: bool) -> Iterator[str]:
        """Say what is wrong with the last steps.

        Args:
            metrics: the step's, with ``training/mixed_questions`` and ``training/right_questions``.
            mini_batches: optimizer steps in it.
            fresh: whether the first one starts from the policy that gave the old log-probabilities.
        """
        mixed, right = self._shares(metrics)
        if self._unmixed.reaches(mixed == 0):
            yield self._why_unmixed(right)
        over = metrics.get(f"{self._group}/over_delta")
        if over is None or OmegaConf.select(self._config, f"{self._group}.constraint") in WITHOUT_LIMIT:
            return
        delta = OmegaConf.select(self._config, f"{self._group}.delta")
        if self._never.reaches(over == 0):
            yield self._why_never(delta, only_one=fresh and mini_batches == 1)
        # At the policy of the old log-probabilities the KL is 0.
        mini_batches = max(mini_batches, 1)
        most = 1 - fresh / mini_batches
        if self._always.reaches(over > max(0, most - 0.5 / mini_batches)):
            yield (
                f"the KL has been above {self._group}.delta={delta} after every update for {CONSTRAINT_STEPS} steps: "
                "the constraint holds the policy back all the time. Likely: "
                f"actor_rollout_ref.actor.optim.lr={self._config.actor_rollout_ref.actor.optim.lr} is too high, or "
                f"{self._group}.delta is below what a mini-batch of this size can measure"
            )

    def _shares(self, metrics: Mapping[str, Any]) -> tuple[float | None, float]:
        """Shares of questions with right and wrong responses, and with right ones alone; the method's own if it has."""
        if self._config.actor_rollout_ref.rollout.n < 2:
            return None, 0.0
        if f"{self._group}/groups_mixed" in metrics:
            return metrics[f"{self._group}/groups_mixed"], metrics[f"{self._group}/groups_all_positive"]
        return metrics["training/mixed_questions"], metrics["training/right_questions"]

    def _why_unmixed(self, right: float) -> str:
        rollout, data = self._config.actor_rollout_ref.rollout, self._config.data
        if right == 0:
            what = "all responses have been wrong"
            likely = (
                "the reward function does not recognise right answers (trainer.rollout_data_dir=DIR writes responses "
                f"to DIR), responses are cut at data.max_response_length={data.max_response_length} (see "
                "response_length/clip_ratio), or the questions are too hard for the model"
            )
        elif right == 1:
            what = "all responses have been right"
            likely = "the reward function accepts everything, or the questions are too easy for the model"
        else:
            what = f"all responses to each question have been right ({right:.0%} of the questions), or all wrong"
            likely = (
                f"responses to a question are too much alike (actor_rollout_ref.rollout.temperature="
                f"{rollout.temperature}) or too few (actor_rollout_ref.rollout.n={rollout.n}), or the questions are "
                "either too easy or too hard"
            )
        return f"for {UNMIXED_STEPS} steps {what}: comparing responses to a question teaches nothing. Likely: {likely}"

    def _why_never(self, delta: Any, only_one: bool) -> str:
        head = (
            f"the KL has never been above {self._group}.delta={delta} in {CONSTRAINT_STEPS} steps: the constraint does "
        )
        if only_one:
            return (
                f"{head}nothing. A step has one mini-batch, measured before its update, where the KL is 0; lower "
                "actor_rollout_ref.actor.ppo_mini_batch_size for several"
            )
        return (
            f"{head}nothing. Likely: {self._group}.delta is too large, or actor_rollout_ref.actor.optim.lr="
            f"{self._config.actor_rollout_ref.actor.optim.lr} too low"
        )
