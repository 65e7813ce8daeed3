"""Warn when a step's metrics show that a run learns nothing, once per stretch of steps."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

UNMIXED_STEPS = 5
"""Steps in a row without a question that has right and wrong responses, after which a warning is printed."""
CONSTRAINT_STEPS = 20
"""The same for a constraint that never, or always, binds."""

WITHOUT_LIMIT = ("none", "fixed")
"""Values of ``constraint`` without a bound on the KL."""


class Stretch:
    """Counts steps in a row for which a condition holds."""

    def __init__(self, steps: int):
        self._steps, self._count = steps, 0

    def reaches(self, holds: bool) -> bool:
        """Count a step; return True once per stretch, at its ``steps``-th step."""
        self._count = self._count + 1 if holds else 0
        return self._count == self._steps


class Watch:
    """Reads each step's metrics, given a run's settings, and says in words what is wrong."""

    def __init__(self, config: DictConfig):
        self._config = config
        self._lr = config.actor_rollout_ref.actor.optim.lr
        self._group = OmegaConf.select(config, "verl_ext.metrics") or ""
        self._unmixed = Stretch(UNMIXED_STEPS)
        self._never, self._always = Stretch(CONSTRAINT_STEPS), Stretch(CONSTRAINT_STEPS)

    def lines(self, metrics: Mapping[str, Any], mini_batches: int, fresh: bool) -> Iterator[str]:
        """Yield a warning per problem with the last steps.

        Args:
            metrics: of the step, with ``training/mixed_questions`` and ``training/right_questions``.
            mini_batches: number of optimizer steps.
            fresh: whether the first mini-batch is measured at the policy of the old log-probabilities.
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
        # At the policy of the old log-probabilities the KL is 0, so that mini-batch cannot exceed delta.
        mini_batches = max(mini_batches, 1)
        most = 1 - fresh / mini_batches
        if self._always.reaches(over > max(0, most - 0.5 / mini_batches)):
            yield (
                f"for {CONSTRAINT_STEPS} steps the KL has been above {self._group}.delta={delta} after each update: "
                f"the constraint always binds. Likely: actor_rollout_ref.actor.optim.lr={self._lr} is too high, or "
                f"{self._group}.delta is below what a mini-batch of this size can measure"
            )

    def _shares(self, metrics: Mapping[str, Any]) -> tuple[float | None, float]:
        """Return the shares of questions with mixed and with only right responses, as the method counts them."""
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
                f"to DIR), responses are cut off at data.max_response_length={data.max_response_length} (see "
                "response_length/clip_ratio), or the questions are too hard for the model"
            )
        elif right == 1:
            what = "all responses have been right"
            likely = "the reward function accepts everything, or the questions are too easy for the model"
        else:
            what = f"the responses to each question have been all right ({right:.0%} of the questions) or all wrong"
            likely = (
                "responses to a question are too similar (actor_rollout_ref.rollout.temperature="
                f"{rollout.temperature}) or too few (actor_rollout_ref.rollout.n={rollout.n}), or each question is too "
                "easy or too hard"
            )
        return f"for {UNMIXED_STEPS} steps {what}, so comparing them teaches nothing. Likely: {likely}"

    def _why_never(self, delta: Any, only_one: bool) -> str:
        why = f"Likely: {self._group}.delta is too high, or actor_rollout_ref.actor.optim.lr={self._lr} is too low"
        if only_one:
            why = (
                "Each step has one mini-batch, measured before its update, when the KL is 0; lower "
                "actor_rollout_ref.actor.ppo_mini_batch_size to get several"
            )
        return (
            f"for {CONSTRAINT_STEPS} steps the KL has never been above {self._group}.delta={delta}, so the constraint "
            f"does nothing. {why}"
        )
