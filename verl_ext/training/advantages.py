"""What verl's advantage estimators cannot see: the settings outside ``algorithm``, and the batch's log-probabilities.

verl calls an estimator with rewards, mask, questions and the ``algorithm`` node alone. Our trainers hold the rest here
meanwhile, for estimators that ask.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from omegaconf import DictConfig
from torch import Tensor


@dataclass(frozen=True)
class Estimation:
    """A batch whose advantages are being estimated.

    Attributes:
        config: the run's settings.
        read: name of a column -> (B, T), padded with 0, rows as the estimator has them.
    """

    config: DictConfig
    read: Callable[[str], Tensor]


_CURRENT: ContextVar[Estimation | None] = ContextVar("estimation", default=None)


@contextmanager
def estimating(config: DictConfig, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Offer these to estimators."""
    token = _CURRENT.set(Estimation(config, read))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current(estimator: str) -> Estimation:
    """What an estimator asks for.

    Raises:
        ValueError: another trainer calls it; names the estimator and the trainers that work.
    """
    found = _CURRENT.get()
    if found is None:
        raise ValueError(
            f"algorithm.adv_estimator={estimator} needs the batch's log-probabilities, which this trainer does not "
            "offer; run python -m verl.trainer.main_ppo with trainer.v1.trainer_mode=sync, colocate_async or "
            "separate_async"
        )
    return found
