"""Verl's replay buffers on a stand-in for TransferQueue: the order of the questions, and an end to replacing them."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from verl.trainer.ppo.v1 import replay_buffer
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from verl_ext.training.replay import STOP_AFTER, WARN_AFTER, WatchedReplayBuffer, watched

BATCH = 4


class Queue:
    """Questions and their responses; each question that is asked for is answered at once."""

    def __init__(self, monkeypatch, rewards, names=None):
        """rewards: number of the question -> rewards of its responses, None for one that failed."""
        self.rewards, self.names = rewards, names or (lambda number: f"q{number}")
        self.partition, self.value, self.count = {}, {}, 0
        monkeypatch.setattr(replay_buffer, "tq", self)

    def ask(self, number):
        for _ in range(number):
            uid, rewards = self.names(self.count), self.rewards(self.count)
            status = "failure" if None in rewards else "finished"
            self.partition[uid] = {"is_prompt": True, "status": status, "global_steps": 1}
            for i, reward in enumerate(rewards):
                if reward is not None:
                    self.partition[f"{uid}_{i}_0"] = {"seq_len": 1}
                    self.value[f"{uid}_{i}_0"] = torch.tensor([0.0, reward])
            self.count += 1
            assert self.count < 1000, "replaced for ever"

    def kv_list(self):
        return {"train": dict(self.partition)}

    def kv_clear(self, partition_id, keys):
        for key in keys:
            self.partition.pop(key, None)

    def kv_batch_get(self, keys, partition_id, select_fields):
        return {"rm_scores": [self.value[key] for key in keys]}


@pytest.fixture(params=[ReplayBuffer, ReplayBufferAsync])
def sample(request, monkeypatch):
    """``sample(rewards, ...)``: the keys of a sampled batch, and the queue."""

    def run(rewards, names=None, asked=BATCH, most_batches=0, filtered=True, on_failure=lambda: None):
        queue = Queue(monkeypatch, rewards, names)
        buffer = request.param(
            trainer_mode="sync",
            trainer_config={},
            max_off_policy_threshold=None,
            max_off_policy_strategy="drop",
            sampler_kwargs={},
            poll_interval=0,
            refill_fn=queue.ask,
            filter_groups_metric="reward" if filtered else None,
            train_batch_size=BATCH,
            gen_batch_size=1,
            sync_refill_failed_groups=True,
        )
        buffer = watched(buffer, batch_size=BATCH, most_batches=most_batches, on_failure=on_failure)
        assert type(buffer).__name__ == request.param.__name__ and isinstance(buffer, request.param)
        queue.ask(asked)
        batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=BATCH)
        return batch.keys, queue

    return run


def test_the_first_questions_are_taken_where_there_are_more_than_wanted(sample):
    # Names in an order that is neither theirs nor a set's.
    keys, _ = sample(lambda number: (0.0, 1.0), names=lambda number: f"{-number * 7919 % 101:03d}", asked=40)
    assert keys == [f"{-number * 7919 % 101:03d}_{i}_0" for number in range(BATCH) for i in (0, 1)]


def test_equal_rewards_for_ever_are_told_and_end_the_run(sample, capsys):
    with pytest.raises(ValueError) as error:
        sample(lambda number: (0.0, 0.0))
    for part in (
        "step 1: ",
        "had the same reward for all their responses (0 in ",
        "algorithm.filter_groups",
        "the reward function gives every response the same reward, or the questions are too hard or too easy",
        f"The run stops: none was kept in {STOP_AFTER} batches of questions",
    ):
        assert part in str(error.value)
    out = capsys.readouterr().out
    assert out.count("questions were replaced") == 1
    told = int(out.split("step 1: ")[1].split()[0])
    assert WARN_AFTER * BATCH <= told < (WARN_AFTER + 3) * BATCH


def test_a_run_that_keeps_some_goes_on_without_a_word(sample, capsys):
    # Two of the first batches', and then none for four batches.
    keys, queue = sample(lambda number: (0.0, 1.0) if number in (3, 5, 22, 23) else (1.0, 1.0))
    assert sorted({key.split("_")[0] for key in keys}) == ["q22", "q23", "q3", "q5"]
    assert not capsys.readouterr().out


def test_a_run_that_has_kept_some_ends_too(sample, capsys):
    with pytest.raises(ValueError, match=f"none was kept in {STOP_AFTER} batches of questions"):
        sample(lambda number: (0.0, 1.0) if number in (3, 5) else (1.0, 1.0))
    assert capsys.readouterr().out.count("questions were replaced") == 1


def test_verls_own_setting_for_the_most_batches_is_kept(sample):
    rewards = lambda number: (0.0, 1.0) if number == 0 else (1.0, 1.0)  # noqa: E731
    with pytest.raises(ValueError, match=r"1 in \d+; .*max_num_gen_batches=3 allows no more; raise it, or set it to 0"):
        sample(rewards, most_batches=3)
    sample(lambda number: (0.0, 1.0) if number > 6 else (1.0, 1.0), most_batches=3)


def test_a_batch_that_is_complete_asks_for_no_more_and_ends_nothing():
    buffer = WatchedReplayBuffer.__new__(WatchedReplayBuffer)
    buffer.filter_groups_metric = "acc"
    buffer._batch_size, buffer._most_batches, buffer._warned = BATCH, 3, False
    buffer._since_kept, buffer._replaced = Counter(), Counter({1.0: 3 * BATCH})
    buffer._judge(1, complete=True)
    with pytest.raises(ValueError, match="max_num_gen_batches=3 allows no more"):
        buffer._judge(1, complete=False)


def test_failed_responses_for_ever_end_the_run(sample):
    looks = []
    with pytest.raises(ValueError, match=r"80 questions were replaced: 80 had a response that failed"):
        sample(lambda number: (None, None), filtered=False, on_failure=lambda: looks.append(1))
    assert looks


def test_the_trainers_look_at_failed_responses_can_end_the_run(sample):
    def refuse():
        raise ValueError("5 of 9 rewards failed")

    with pytest.raises(ValueError, match="5 of 9 rewards failed"):
        sample(lambda number: (None, None) if number % 2 else (0.0, 1.0), on_failure=refuse)


def test_a_buffer_of_ones_own_stays():
    own = SimpleNamespace(sample=1)
    assert watched(own, batch_size=4, most_batches=0, on_failure=None) is own and type(own) is SimpleNamespace
