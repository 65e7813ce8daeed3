"""verl's reward workers, which count the rewards that fail and name the function that gave them.

A response whose reward fails is left out of the batch by verl: the others of its question are trained on as if nothing
had happened. The trainer asks for the counts once per step (:mod:`verl_ext.training.trainer`).
"""

import asyncio
import inspect
import numbers
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from omegaconf import DictConfig
from verl.experimental.reward_loop.reward_loop import RewardLoopManager, RewardLoopWorker
from verl.experimental.reward_loop.reward_manager.limited import RateLimitedRewardManager
from verl.protocol import DataProto

LONGEST_TEXT = 500

GIVEN_UP = ({"acc", "error"}, {"acc", "timeout"})
"""All that verl's "rate_limited" manager says of a reward that failed."""


class RewardError(Exception):
    """A response without a reward: which function should have given it, and what happened."""


@dataclass
class Tally:
    """Rewards asked for, how many of them failed, and the first failure's text."""

    asked: int = 0
    failed: int = 0
    first: str = ""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.asked + other.asked, self.failed + other.failed, self.first or other.first)

    def text(self, where: str) -> str:
        """Say what failed, in the step or evaluation ``where``."""
        return f"{self.failed} of {self.asked} rewards of {where} failed, the first with {self.first}"


def reward_function(config: DictConfig) -> str:
    """Name what gives the rewards, by the settings that choose it."""
    custom = config.reward.get("custom_reward_function") or {}
    if path := custom.get("path"):
        return f"reward.custom_reward_function={path}:{custom.get('name')}"
    if config.reward.reward_model.enable:
        return f"reward.reward_model.model_path={config.reward.reward_model.get('model_path')}"
    return (
        f"verl's reward for the question's data_source (reward.reward_manager.name={config.reward.reward_manager.name})"
    )


def as_number(value: Any) -> float:
    """Read a reward: a number of Python, numpy or torch, a truth value, or an array that holds one of these.

    Raises:
        TypeError: it is something else; shows what.
    """
    value = plain(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"it returned {reprlib.repr(value)} ({type(value).__name__}), which is no number")
    return float(value)


def plain(value: Any) -> Any:
    """Turn a scalar of numpy or torch, or an array of one value, into Python's; anything else stays."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor) and np.prod(value.shape) == 1:
        return value.item()
    return value


def describe(error: BaseException) -> str:
    """Say in one line what was raised, and where."""
    # verl's "remote" reward manager grades in another process.
    error = getattr(error, "cause", None) or error
    frame, where = error.__traceback__, ""
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        where = "" if file == __file__ else f" ({os.path.basename(file)}:{frame.tb_lineno})"
        frame = frame.tb_next
    try:
        text = one_line(str(error))
    except Exception:
        text = "(its text cannot be read)"
    return f"{type(error).__name__}: {text}{where}"


def one_line(text: str) -> str:
    """Cut a text to the start of one line without control characters: it may quote a response."""
    line = " ".join(text[: 2 * LONGEST_TEXT].split())[:LONGEST_TEXT]
    return "".join(c if c.isprintable() else "?" for c in line)


def without_stop_iteration(score: Callable[..., Any]) -> Callable[..., Any]:
    """A reward function whose StopIteration is another error: asyncio cannot hand it on, and would wait for ever."""

    def compute_score(*args: Any, **kwargs: Any) -> Any:
        try:
            return score(*args, **kwargs)
        except StopIteration as e:
            raise RuntimeError("the reward function raised StopIteration") from e

    return compute_score


class CountingRewardWorker(RewardLoopWorker):
    """verl's worker: rewards become numbers of Python, failures are counted and name the reward function."""

    def __init__(self, config: DictConfig, reward_router_address: str | None = None):
        super().__init__(config, reward_router_address)
        self._tally = Tally()
        score = getattr(self.reward_manager, "compute_score", None)
        if score is not None and not inspect.iscoroutinefunction(score):
            self.reward_manager.compute_score = without_stop_iteration(score)

    async def compute_score(self, data: DataProto) -> dict[str, Any]:
        """Grade one response.

        Raises:
            RewardError: the reward failed, or is no number.
        """
        self._tally.asked += 1
        try:
            result = await super().compute_score(data)
            extra = {name: plain(value) for name, value in result.get("reward_extra_info", {}).items()}
            if isinstance(self.reward_manager, RateLimitedRewardManager) and extra.keys() in GIVEN_UP:
                # This manager gives the reward 0 where the function failed.
                why = extra.get("error", f"TimeoutError: no answer in {self.reward_manager.timeout} s")
                self._tally += Tally(0, 1, f"{reward_function(self.config)}: {one_line(why)}")
            return result | {"reward_score": as_number(result["reward_score"]), "reward_extra_info": extra}
        except (Exception, SystemExit) as e:
            text = f"{reward_function(self.config)}: {describe(e)}"
            self._tally += Tally(0, 1, text)
            # The text alone: another process may not be able to load the error.
            raise RewardError(text) from None

    async def compute_scores(self, data: DataProto) -> list[dict[str, Any] | BaseException]:
        """Grade a batch: a result or an error per response."""
        rows = (self.compute_score(data[i : i + 1]) for i in range(len(data)))
        return await asyncio.gather(*rows, return_exceptions=True)

    async def take_tally(self) -> Tally:
        """Give the counts since the last call."""
        tally, self._tally = self._tally, Tally()
        return tally


SECONDS_TO_COUNT = 60.0
"""What a worker gets to tell its counts: it may have more rewards in hand than Ray lets it run at a time."""


class CountingRewardManager(RewardLoopManager):
    """verl's manager with these workers."""

    _asked: tuple | list = ()

    def _init_reward_loop_workers(self) -> None:
        self.reward_loop_workers_class = ray.remote(CountingRewardWorker)
        super()._init_reward_loop_workers()

    def take_tally(self) -> Tally:
        """Give the counts of all workers since the last call; of one that is too busy to answer, at a later one."""
        asked = [*self._asked, *(worker.take_tally.remote() for worker in self.reward_loop_workers)]
        answered, self._asked = ray.wait(asked, num_returns=len(asked), timeout=SECONDS_TO_COUNT)
        return sum(ray.get(answered), Tally())
