"""A line per step for whoever watches: where training stands, and when it ends."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.recipes import DEFAULT_ALGORITHM, installed, kl_metrics, metric_names
from verl_ext.runs.evaluations import pass_at_1
from verl_ext.runs.folder import flatten


def progress_wanted(config: DictConfig) -> bool:
    """Read ``verl_ext.progress``, which is true unless set.

    Raises:
        ValueError: it is neither true nor false.
    """
    wanted = OmegaConf.select(config, "verl_ext.progress", default=True)
    if not isinstance(wanted, bool):
        raise ValueError(f"verl_ext.progress={wanted} must be true (a line per step) or false")
    return wanted


def kl_bound(config: DictConfig) -> float | None:
    """Return the highest KL without a penalty, of the recipe that has one."""
    settings = flatten(config)
    bounds = (recipe.kl_bound(settings) for recipe in installed())
    return next((float(bound) for bound in bounds if isinstance(bound, int | float)), None)


def duration(seconds: float) -> str:
    """Write a time in two units at most: ``45 s``, ``12 min``, ``3 h 05 min``, ``2 d 07 h``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


def finite(value: Any) -> float | None:
    """Return a metric as a number; None for what is none, which must not end a run."""
    try:
        return number if math.isfinite(number := float(value)) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def step_line(
    step: int,
    total: int | None,
    values: Mapping[str, Any],
    *,
    kl: Sequence[str] = ("actor/ppo_kl",),
    delta: float | None = None,
    evaluated: tuple[int, float] | None = None,
    seconds_left: float | None = None,
) -> str:
    """Write a step's metrics in one line; what the method does not log is left out.

    Args:
        total: steps of the whole run; None for an evaluation alone.
        values: a row of metrics, of a training step or of an evaluation.
        kl: names of the metric KL(old || new); the first that was logged counts.
        delta: the KL's bound.
        evaluated: step and pass@1, the mean over benchmarks, of the last evaluation.
    """

    def number(*names: str) -> float | None:
        return finite(next((values[name] for name in names if values.get(name) is not None), None))

    parts = [f"step {step}" if total is None else f"step {step:{len(str(total))}d}/{total}"]
    if evaluated is not None and math.isfinite(evaluated[1]):
        parts.append(f"pass@1 {evaluated[1]:.1%}" + ("" if evaluated[0] == step else f" (step {evaluated[0]})"))
    if (reward := number("critic/score/mean")) is not None:
        parts.append(f"reward {reward:.3f}")
    if (mixed := number("training/mixed_questions")) is not None:
        parts.append(f"mixed {mixed:.0%}")
    if (nats := number(*kl)) is not None:
        parts.append(f"KL {nats:.1e}" + ("" if delta is None else f" of {delta:.1e}"))
    if (entropy := number(*metric_names("entropy", "actor/entropy"))) is not None:
        parts.append(f"entropy {entropy:.3f}")
    seconds, tokens = number("timing_s/step"), number("perf/total_num_tokens")
    if seconds:
        parts += [f"{tokens / seconds:,.0f} tok/s"] if tokens is not None else []
        parts.append(f"{seconds:.1f} s")
    if seconds_left and seconds_left > 0:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


class Progress:
    """Make the line of each logged step.

    Args:
        config: the run's settings.
        total: steps of the whole run; None for an evaluation alone.
        clock: seconds; those of this process alone tell the time left, evaluations and checkpoints included.
    """

    def __init__(self, config: DictConfig, total: int | None, clock: Callable[[], float] = time.monotonic):
        algorithm = OmegaConf.select(config, "verl_ext.algorithm", default=DEFAULT_ALGORITHM)
        self._total, self._clock = total, clock
        self._kl, self._delta = kl_metrics(algorithm), kl_bound(config)
        self._evaluated: tuple[int, float] | None = None
        self._first: tuple[int, float] | None = None

    def note(self, step: int, values: Mapping[str, Any]) -> None:
        """Remember the evaluation in a row of metrics, also of one that an earlier process has logged."""
        if found := pass_at_1(values):
            self._evaluated = step, sum(found.values()) / len(found)

    def line(self, step: int, values: Mapping[str, Any]) -> str:
        """Make the line of a step, given in order."""
        self.note(step, values)
        return step_line(
            step,
            self._total,
            values,
            kl=self._kl,
            delta=self._delta,
            evaluated=self._evaluated,
            seconds_left=self._seconds_left(step, values),
        )

    def _seconds_left(self, step: int, values: Mapping[str, Any]) -> float | None:
        """Estimate by the steps after this process's first one, which starts things up; until then by that one."""
        seconds = finite(values.get("timing_s/step"))
        if self._total is None or seconds is None:
            return None
        now = self._clock()
        self._first = self._first or (step, now)
        first, then = self._first
        each = (now - then) / (step - first) if step > first else seconds
        return each * (self._total - step)
