"""What a batch carries: made from the deal, and read back as the same types."""

from dataclasses import asdict, fields

import pytest
import torch
from verl.utils import tensordict_utils as tu

from verl_ext.training.grouping import deal
from verl_ext.training.rows import ROW_FIELDS, BatchFacts, Rows, of_sessions
from verl_ext.training.transfer import parse_key

# Question "a-b" has three responses, "c" and "d" two.
GROUP = ["a-b", "c", "a-b", "d", "c", "a-b", "d"]


def test_whole_questions_are_carried_as_they_were_dealt():
    plan = deal(GROUP, [10, 20, 30, 40, 50, 60, 70], groups_per_mini_batch=2, ranks=2)
    # The last two rows are one response.
    rows = Rows.dealt(GROUP, [0, 1, 2, 3, 4, 5, 5], [float(i) for i in range(7)], plan)
    assert rows.sample_index.tolist() == plan.order and rows.mini_batch_id.tolist() == plan.mini_batch
    of_question = {}
    for index, group, size, reward, mini_batch in zip(
        rows.sample_index.tolist(),
        rows.group_id.tolist(),
        rows.group_size.tolist(),
        rows.sequence_reward.tolist(),
        rows.mini_batch_id.tolist(),
        strict=True,
    ):
        if index >= len(GROUP):
            assert (group, size, reward) == (-1, 0, 0.0)
            continue
        assert size == GROUP.count(GROUP[index]) and reward == index
        of_question.setdefault(GROUP[index], set()).add((group, mini_batch))
    sessions = dict(zip(rows.sample_index.tolist(), rows.session_id.tolist(), strict=True))
    assert [sessions[i] for i in range(7)] == [0, 1, 2, 3, 4, 5, 5]
    padding = [session for i, session in sessions.items() if i >= 7]
    assert padding and len(set(padding)) == len(padding) and max(padding) < 0
    # One number and one mini-batch per question, no number twice.
    assert all(len(found) == 1 for found in of_question.values())
    assert len({group for found in of_question.values() for group, _ in found}) == 3
    # Rank after rank, each with the same number of rows of each mini-batch.
    half = len(plan.order) // 2
    assert rows.mini_batch_id[:half].tolist() == rows.mini_batch_id[half:].tolist() == sorted(plan.mini_batch[:half])


def test_a_worker_reads_what_the_trainer_wrote():
    plan = deal(GROUP, [1] * 7, groups_per_mini_batch=3, ranks=2)
    rows, facts = Rows.dealt(GROUP, range(7), [0.5] * 7, plan), BatchFacts(True, False, 1, 3)
    data = rows.columns()
    assert tuple(data.keys()) == ROW_FIELDS
    tu.assign_non_tensor(data, **asdict(facts))
    found = Rows.of(data)
    assert all(torch.equal(getattr(found, f.name), getattr(rows, f.name)) for f in fields(Rows))
    assert BatchFacts.of(data) == facts
    # A rank's part, and a mini-batch of it, carry the same facts.
    assert BatchFacts.of(tu.index_select_tensor_dict(data, torch.tensor([3, 1]))) == facts


@pytest.mark.parametrize(
    "bypass, step, fresh, logged", [(False, 0, True, True), (True, 0, False, False), (False, 1, False, True)]
)
def test_old_log_probs_are_fresh_unless_they_are_the_rollouts_or_an_update_came_between(bypass, step, fresh, logged):
    facts = BatchFacts.before(local_step=step, local_steps=2, bypass_mode=bypass)
    assert (facts.old_log_probs_fresh, facts.entropy_logged) == (fresh, logged)
    assert (facts.at_rollout_weights, facts.ends_step) == (step == 0, step == 1)


def test_a_session_has_the_reward_of_its_last_trajectory():
    rows = [parse_key(key) for key in ("a_0_1", "a_1_0", "a_0_0", "b_0_0", "a_0_10")]
    assert of_sessions(rows, [0.5, 0.0, 0.25, 1.0, 0.75]) == [0.75, 0.0, 0.75, 1.0, 0.75]
