"""Extend verl's reward workers to count failed rewards and name the function that failed.

verl silently leaves a response whose reward fails out of the batch and trains on the rest of its group. The trainer
asks for the counts once per step. A reward that hangs, for which verl would wait for ever, fails as well.
"""

import asyncio
import faulthandler
import inspect
import math
import numbers
import os
import queue
import reprlib
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from omegaconf import DictConfig, OmegaConf
from verl.experimental.reward_loop.reward_loop import RewardLoopManager, RewardLoopWorker
from verl.experimental.reward_loop.reward_manager.limited import RateLimitedRewardManager
from verl.protocol import DataProto

LONGEST_TEXT = 500
"""Characters of an error's text that are shown."""

GIVEN_UP = ({"acc", "error"}, {"acc", "timeout"})
"""Names in ``reward_extra_info`` by which verl's "rate_limited" manager marks a failed reward, graded 0."""


class RewardError(Exception):
    """A failed reward: the reward function's name and its error."""


@dataclass
class Tally:
    """Number of rewards requested and failed, and the text of the first failure."""

    asked: int = 0
    failed: int = 0
    first: str = ""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.asked + other.asked, self.failed + other.failed, self.first or other.first)

    def text(self, where: str) -> str:
        """Describe the failures in ``where``, a step or an evaluation."""
        return f"{self.failed} of {self.asked} rewards of {where} failed, the first with {self.first}"


def reward_function(config: DictConfig) -> str:
    """Name the reward function or model by the setting that chooses it."""
    custom = config.reward.get("custom_reward_function") or {}
    if path := custom.get("path"):
        return f"reward.custom_reward_function={path}:{custom.get('name')}"
    if config.reward.reward_model.enable:
        return f"reward.reward_model.model_path={config.reward.reward_model.get('model_path')}"
    return (
        f"verl's reward for the question's data_source (reward.reward_manager.name={config.reward.reward_manager.name})"
    )


def as_number(value: Any) -> float:
    """Convert a reward to float: a number or truth value of Python, numpy or torch, or an array with one such value.

    Raises:
        TypeError: ``value`` is anything else.
        ValueError: it is NaN or infinite.
    """
    value = plain(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"it returned {reprlib.repr(value)} ({type(value).__name__}), which is not a number")
    if not math.isfinite(number := float(value)):
        raise ValueError(f"it returned {number}, which is not a finite number")
    return number


def plain(value: Any) -> Any:
    """Convert a numpy or torch array with a single value to a Python scalar; return anything else unchanged."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor) and np.prod(value.shape) == 1:
        return value.item()
    return value


def describe(error: BaseException) -> str:
    """Describe an error in one line, with the place that raised it."""
    # verl's "remote" reward manager wraps errors of another process.
    error = getattr(error, "cause", None) or error
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        where = "" if file == __file__ else f" ({os.path.basename(file)}:{line})"
    try:
        text = one_line(str(error))
    except Exception:
        text = "(its text cannot be read)"
    return f"{type(error).__name__}: {text}{where}"


def one_line(text: str) -> str:
    """Shorten a text to one line without control characters, because an error may quote a response."""
    line = " ".join(text[: 2 * LONGEST_TEXT].split())[:LONGEST_TEXT]
    return "".join(c if c.isprintable() else "?" for c in line)


LONGEST = 1e9
"""Seconds. Waiting for a thread raises OverflowError from nine times as much on."""


def reward_timeout(config: DictConfig) -> float | None:
    """Read the seconds after which a reward has failed; None in a run of stock verl.

    Raises:
        ValueError: it is not a number above 0, or longer than a thread can wait.
    """
    if "verl_ext" not in config:
        return None
    seconds = OmegaConf.select(config, "verl_ext.reward_timeout", default=300)
    if type(seconds) not in (int, float) or not 0 < seconds <= LONGEST:
        raise ValueError(
            f"verl_ext.reward_timeout={seconds} must be a number of seconds above 0, at most {LONGEST:.0e}"
        )
    return seconds


async def before(end: Callable[[], float], call: Coroutine, late: str) -> Any:
    """Wait for ``call`` until the clock ``time.monotonic`` is at ``end()``, which may move; infinity for no limit.

    Raises:
        TimeoutError: it has no result then; ``late`` says so.
    """
    task = asyncio.ensure_future(call)
    try:
        while not task.done():
            if (left := end() - time.monotonic()) <= 0:
                raise TimeoutError(late)
            await asyncio.wait([task], timeout=None if left == math.inf else left)
        return task.result()
    finally:
        # Also if verl's rate-limited manager gives up first. One that catches it is left behind.
        task.cancel()


def bounded(score: Callable[..., Any], seconds: float | None) -> Callable[..., Any]:
    """Make a reward function fail after ``seconds``; its thread is left behind, since Python cannot end one.

    Its StopIteration becomes RuntimeError: asyncio cannot pass it on and would wait for ever.
    """
    late = f"no answer in {seconds} s (verl_ext.reward_timeout)"

    if inspect.iscoroutinefunction(score):

        async def awaited(*args: Any, **kwargs: Any) -> Any:
            end = math.inf if seconds is None else time.monotonic() + seconds
            return await before(lambda: end, score(*args, **kwargs), late)

        return awaited

    def compute_score(*args: Any, **kwargs: Any) -> Any:
        answer: queue.SimpleQueue = queue.SimpleQueue()

        def work() -> None:
            try:
                answer.put((score(*args, **kwargs), None))
            except BaseException as e:
                answer.put((None, e))

        threading.Thread(target=work, daemon=True).start()
        try:
            result, error = answer.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(late) from None
        if isinstance(error, StopIteration):
            raise RuntimeError("the reward function raised StopIteration") from error
        if error is not None:
            raise error
        return result

    return compute_score


BEAT, GRACE = 5.0, 60.0
"""Seconds between two signs of life, and how much later than a reward's time limit the worker ends without one."""


class CountingRewardWorker(RewardLoopWorker):
    """verl's reward worker, plus: rewards become Python numbers, and failures are counted with the function's name.

    A reward that hangs fails. One that also keeps Python's lock, as a regular expression may, ends the process, with
    the traceback of all threads in the log: no other thread could.
    """

    def __init__(self, config: DictConfig, reward_router_address: str | None = None):
        super().__init__(config, reward_router_address)
        self._tally, self._running, self._seconds = Tally(), 0, reward_timeout(config)
        self._beating: asyncio.Future | None = None
        self._answered = 0.0
        reward = config.reward
        # verl asks its own reward model without the reward manager.
        self._asks_model = reward.reward_model.enable and reward.custom_reward_function.path is None
        if score := getattr(self.reward_manager, "compute_score", None):
            self.reward_manager.compute_score = bounded(score, self._seconds)

    async def _beat(self, seconds: float) -> None:
        """Put off the end of this process, by ``seconds``, while rewards are computed and its event loop runs."""
        while self._running:
            faulthandler.dump_traceback_later(seconds, exit=True)
            await asyncio.sleep(BEAT)
        faulthandler.cancel_dump_traceback_later()

    async def _while_answered(self, call: Coroutine, seconds: float) -> Any:
        """Wait for a reward model as long as it answers some request in time: this one may have to queue.

        Raises:
            TimeoutError: no request was answered for ``seconds``.
        """
        began, late = time.monotonic(), f"the reward model answered nothing for {seconds} s (verl_ext.reward_timeout)"
        result = await before(lambda: max(began, self._answered) + seconds, call, late)
        self._answered = time.monotonic()
        return result

    async def compute_score(self, data: DataProto) -> dict[str, Any]:
        """Grade one response.

        Raises:
            RewardError: the reward failed or is not a finite number.
        """
        self._tally.asked += 1
        self._running += 1
        # One at a time: the last one may still wait for its next beat.
        if self._seconds is not None and (self._beating is None or self._beating.done()):
            self._beating = asyncio.ensure_future(self._beat(self._seconds + GRACE))
        try:
            call = super().compute_score(data)
            if self._asks_model and self._seconds is not None:
                call = self._while_answered(call, self._seconds)
            result = await call
            extra = {name: plain(value) for name, value in result.get("reward_extra_info", {}).items()}
            if isinstance(self.reward_manager, RateLimitedRewardManager) and extra.keys() in GIVEN_UP:
                why = extra.get("error", f"TimeoutError: no answer in {self.reward_manager.timeout} s")
                self._tally += Tally(0, 1, f"{reward_function(self.config)}: {one_line(why)}")
            return result | {"reward_score": as_number(result["reward_score"]), "reward_extra_info": extra}
        except (Exception, SystemExit) as e:
            text = f"{reward_function(self.config)}: {describe(e)}"
            self._tally += Tally(0, 1, text)
            # Only the text: another process may be unable to load the error's class.
            raise RewardError(text) from None
        finally:
            self._running -= 1

    async def compute_scores(self, data: DataProto) -> list[dict[str, Any] | BaseException]:
        """Grade a batch; return a result or an error per response."""
        rows = (self.compute_score(data[i : i + 1]) for i in range(len(data)))
        return await asyncio.gather(*rows, return_exceptions=True)

    async def take_tally(self) -> Tally:
        """Return the counts since the last call."""
        tally, self._tally = self._tally, Tally()
        return tally


SECONDS_TO_COUNT = 60.0
"""Time for a worker to report its counts; it may have more rewards in progress than Ray runs at a time."""


class CountingRewardManager(RewardLoopManager):
    """verl's manager of reward workers, with :class:`CountingRewardWorker`."""

    _asked: tuple | list = ()

    def _init_reward_loop_workers(self) -> None:
        self.reward_loop_workers_class = ray.remote(CountingRewardWorker)
        super()._init_reward_loop_workers()

    def take_tally(self) -> Tally:
        """Return the workers' counts since the last call; those of a busy worker come with a later call.

        Raises:
            RuntimeError: a worker has ended.
        """
        asked = [*self._asked, *(worker.take_tally.remote() for worker in self.reward_loop_workers)]
        answered, self._asked = ray.wait(asked, num_returns=len(asked), timeout=SECONDS_TO_COUNT)
        try:
            return sum(ray.get(answered), Tally())
        except ray.exceptions.RayActorError as e:
            raise RuntimeError(
                f"a process that computes rewards by {reward_function(self.config)} has ended: it crashed, was killed, "
                f"or a reward kept it from answering for verl_ext.reward_timeout={reward_timeout(self.config)} s; its "
                "last lines are above"
            ) from e
