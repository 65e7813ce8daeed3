"""Lend verl's advantage estimators what verl does not pass them: all settings, and the batch's log-probabilities.

verl calls an estimator with rewards, mask, question ids and the ``algorithm`` node only. While one of our trainers
makes that call, :func:`current` returns the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from omegaconf import DictConfig
from torch import Tensor

from verl_ext.training.rows import last_of_session
from verl_ext.training.transfer import RowKey


@dataclass(frozen=True)
class Estimation:
    """The batch whose advantages are being estimated.

    Attributes:
        config: the run's settings.
        read: column name -> (B, T), padded with 0, in the estimator's row order.
        rows: the rows' keys, in that order.
        progress: the share of the run's steps before this one, from 0 to 1.
    """

    config: DictConfig
    read: Callable[[str], Tensor]
    rows: Sequence[RowKey]
    progress: float


_CURRENT: ContextVar[Estimation | None] = ContextVar("estimation", default=None)


@contextmanager
def estimating(
    config: DictConfig, read: Callable[[str], Tensor], rows: Sequence[RowKey], progress: float = 0.0
) -> Iterator[None]:
    """Lend a batch to the estimators that are called inside the block."""
    token = _CURRENT.set(Estimation(config, read, rows, progress))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def responses(rows: int) -> list[int]:
    """Return for each row which row counts for its response: its session's last trajectory; itself outside a trainer.

    Args:
        rows: how many an estimator was given.
    """
    found = _CURRENT.get()
    return list(range(rows)) if found is None else last_of_session(found.rows)


def current(estimator: str) -> Estimation:
    """Return the batch for which verl is calling ``estimator``, its name in verl's registry.

    Raises:
        ValueError: another trainer than ours is calling it.
    """
    if found := _CURRENT.get():
        return found
    raise ValueError(
        f"algorithm.adv_estimator={estimator} needs the batch's log-probabilities, which this trainer does not offer; "
        "run python -m verl.trainer.main_ppo with trainer.v1.trainer_mode=sync, colocate_async or separate_async"
    )
