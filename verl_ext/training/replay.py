"""Extend verl's replay buffers: take questions in their order, and stop when questions are replaced without end."""

from collections import Counter
from collections.abc import Callable
from typing import Any

WARN_AFTER = 5
"""Batches of questions replaced in a row, with none kept, after which a warning is printed."""
STOP_AFTER = 20
"""The same number, after which the run stops."""


class WatchedReplayBuffer:
    """Mixin in front of one of verl's replay buffers."""

    def watch(self, batch_size: int, most_batches: int, on_failure: Callable[[], None]) -> None:
        """Set the limits.

        Args:
            batch_size: questions per batch.
            most_batches: batches of questions that may be replaced for one batch; 0: no limit while some are kept.
            on_failure: called when questions are replaced because a response failed.
        """
        self._batch_size, self._most_batches, self._on_failure = batch_size, most_batches, on_failure
        self._replaced: Counter[float | None] = Counter()
        self._since_kept: Counter[float | None] = Counter()
        """Number of questions by the value that all their responses have; None: a response failed."""
        self._warned, self._kept = False, 0

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict]:
        """Sample a batch, as verl does."""
        if partition_id != "val":
            self._replaced.clear()
        return super().sample(global_steps, partition_id, batch_size)

    def _select_prompt_uids(self, partition_id: str, sampleable_keys: set[str], batch_size: int) -> Any:
        # verl sorts by step alone, and uids are random: if there are more questions than needed, runs with equal seeds
        # would choose differently. TransferQueue lists questions in the order in which they were requested.
        in_order = [uid for uid in self.prompt_global_steps[partition_id] if uid in sampleable_keys]
        return super()._select_prompt_uids(partition_id, in_order, batch_size)

    def _evict_terminal_groups(self, global_steps: int, partition_id: str, eviction_reasons: tuple) -> tuple:
        result = super()._evict_terminal_groups(global_steps, partition_id, eviction_reasons)
        if partition_id == "val":
            return result
        _, _, failed, same_value = eviction_reasons
        if failed:
            self._on_failure()
        for counter in (self._replaced, self._since_kept):
            counter.update(same_value)
            counter.update([None] * len(failed))
        kept = len(self.finished_keys[partition_id])
        if kept > self._kept:
            self._since_kept.clear()
            self._warned = False
        # Fewer, where a step has taken them.
        self._kept = kept
        self._judge(global_steps, complete=kept >= self._batch_size)
        return result

    def _judge(self, step: int, complete: bool) -> None:
        """Warn or stop if too many questions were replaced.

        Args:
            step: the training step.
            complete: whether the step has all its questions and will request no more.

        Raises:
            ValueError: too many questions were replaced; names the setting and the likely reasons.
        """
        batch, without = self._batch_size, self._since_kept.total()
        if without >= STOP_AFTER * batch:
            raise ValueError(
                f"{self._reasons(step, self._since_kept)}. The run stops: none was kept in {STOP_AFTER} batches of "
                "questions"
            )
        if complete:
            return
        if 0 < self._most_batches * batch <= self._replaced.total():
            raise ValueError(
                f"{self._reasons(step, self._replaced)}. algorithm.filter_groups.max_num_gen_batches="
                f"{self._most_batches} allows no more; raise it, or set it to 0 for no limit"
            )
        if without >= WARN_AFTER * batch and not self._warned:
            self._warned = True
            print(f"verl-disco: warning: {self._reasons(step, self._since_kept)}", flush=True)

    def _reasons(self, step: int, replaced: Counter[float | None]) -> str:
        failed, parts = replaced[None], []
        alike = {value: number for value, number in replaced.items() if value is not None}
        if alike:
            most = sorted(alike, key=alike.__getitem__, reverse=True)[:3]
            values = ", ".join(f"{value:g} in {alike[value]}" for value in most)
            parts.append(
                f"{sum(alike.values())} had the same {self.filter_groups_metric} for all their responses ({values}; "
                "algorithm.filter_groups). Likely: the reward function gives every response the same reward, or the "
                "questions are too hard or too easy"
            )
        if failed:
            parts.append(f"{failed} had a response that failed (see its error above)")
        return f"step {step}: {replaced.total()} questions were replaced: {'; '.join(parts)}"


def watched(buffer: Any, *, batch_size: int, most_batches: int, on_failure: Callable[[], None]) -> Any:
    """Add the mixin to the buffer that verl has built; a user's class that extends none of verl's is left unchanged."""
    # Imported here, because verl's trainers import this module.
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    if isinstance(buffer, ReplayBuffer):
        # verl has no setting for our class: it builds ReplayBuffer, ReplayBufferAsync or the user's subclass.
        buffer.__class__ = type(type(buffer).__name__, (WatchedReplayBuffer, type(buffer)), {})
        buffer.watch(batch_size, most_batches, on_failure)
    return buffer
