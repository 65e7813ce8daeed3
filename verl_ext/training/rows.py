"""The typed contract of what a batch carries for workers that train on whole groups; written by the trainer."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from verl_ext.training.grouping import Deal
from verl_ext.training.transfer import RowKey


@dataclass(frozen=True)
class Rows:
    """Facts about each row, columns of shape (B,).

    Attributes:
        group_id: int, number of the row's question; -1 for a padding row.
        group_size: int, rows of that question in the whole batch; 0 for a padding row.
        session_id: int, number of the response that the row is, or is a part of; a padding row has its own, < 0.
        sample_index: int, the row's index in the batch before it was dealt.
        sequence_reward: float, the summed reward of the session, before any KL term.
        mini_batch_id: int, the row's mini-batch.
    """

    group_id: Tensor
    group_size: Tensor
    session_id: Tensor
    sample_index: Tensor
    sequence_reward: Tensor
    mini_batch_id: Tensor

    @classmethod
    def dealt(
        cls, group: Sequence[Hashable], session: Sequence[Hashable], reward: Sequence[float], plan: Deal
    ) -> "Rows":
        """Make the columns in the order of ``plan``, padding rows included.

        Args:
            group: question of each row, in the batch's own order.
            session: response of each row, in the same order.
            reward: summed reward of each row's session, in the same order.
            plan: where each row goes.
        """
        number = {name: i for i, name in enumerate(dict.fromkeys(group))}
        response = {name: i for i, name in enumerate(dict.fromkeys(session))}
        size, padding, order = Counter(group), plan.num_padding, torch.tensor(plan.order)
        return cls(
            group_id=torch.tensor([number[g] for g in group] + [-1] * padding)[order],
            group_size=torch.tensor([size[g] for g in group] + [0] * padding)[order],
            session_id=torch.tensor([response[s] for s in session] + [-1 - i for i in range(padding)])[order],
            sample_index=order,
            sequence_reward=torch.tensor([*reward, *[0.0] * padding])[order],
            mini_batch_id=torch.tensor(plan.mini_batch),
        )

    @classmethod
    def of(cls, data: TensorDict) -> "Rows":
        """Read the columns of a batch on a worker."""
        return cls(**{f.name: data[f.name] for f in fields(cls)})

    def columns(self) -> TensorDict:
        """Return the columns by name, as they are stored."""
        return TensorDict(asdict(self), batch_size=len(self.group_id))


ROW_FIELDS = tuple(f.name for f in fields(Rows))


@dataclass(frozen=True)
class BatchFacts:
    """Facts about a whole batch, which travel beside its rows (``KVBatchMeta.extra_info``).

    Attributes:
        old_log_probs_fresh: old_log_probs are those of the policy about to be updated.
        entropy_logged: verl's forward pass for old_log_probs has logged the policy's entropy.
        local_step: index of this update since the last weight synchronisation.
        local_steps: number of updates between two synchronisations.
        skip_rows: rows without a gradient may be left out of a pass.
        progress: the share of the run's steps before this one, from 0 to 1.
    """

    old_log_probs_fresh: bool
    entropy_logged: bool
    local_step: int = 0
    local_steps: int = 1
    skip_rows: bool = False
    progress: float = 0.0

    @classmethod
    def of(cls, data: TensorDict) -> "BatchFacts":
        """Read the facts of a batch on a worker."""
        return cls(**{f.name: tu.get(data, f.name) for f in fields(cls)})

    @classmethod
    def before(
        cls, local_step: int, local_steps: int, bypass_mode: bool, skip_rows: bool = False, progress: float = 0.0
    ) -> "BatchFacts":
        """Derive the facts before an update.

        Args:
            bypass_mode: old_log_probs are the rollout's; verl makes no forward pass for them and logs no entropy.
        """
        fresh = not bypass_mode and local_step == 0
        return cls(fresh, not bypass_mode, local_step, local_steps, skip_rows, progress)

    @property
    def at_rollout_weights(self) -> bool:
        """Whether the policy generated the responses, apart from updates on this batch."""
        return self.local_step == 0

    @property
    def ends_step(self) -> bool:
        """Whether this is the last update before the next weight synchronisation."""
        return self.local_step == self.local_steps - 1


def last_of_session(rows: Sequence[RowKey]) -> list[int]:
    """Return for each row the position in ``rows`` of its session's last trajectory.

    A session is one response: it has the reward of that row, and that row counts for it.
    """
    last: dict[tuple[str, int], int] = {}
    for i, row in enumerate(rows):
        found = last.setdefault((row.uid, row.session), i)
        if row.trajectory > rows[found].trajectory:
            last[row.uid, row.session] = i
    return [last[row.uid, row.session] for row in rows]


def of_sessions(rows: Sequence[RowKey], reward: Sequence[float]) -> list[float]:
    """Return for each row the reward of its session."""
    return [reward[i] for i in last_of_session(rows)]
