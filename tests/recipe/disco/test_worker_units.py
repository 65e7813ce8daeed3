"""Parts of the worker that need no engine."""

import json
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from recipe.disco import worker
from recipe.disco.config import DiscoConfig
from recipe.disco.worker import DiscoTrainingWorker, largest_divisor, refuse_torn_questions


def test_largest_divisor():
    assert [largest_divisor(n, limit) for n, limit in ((12, 5), (12, 64), (7, 3), (8, 8), (1, 4))] == [4, 12, 1, 8, 1]


def test_a_torn_question_is_refused_with_the_numbers():
    question = torch.tensor([0, 0, 1, -1, 1, 1])
    refuse_torn_questions(question, torch.tensor([2, 2, 3, 0, 3, 3]))
    with pytest.raises(ValueError, match="question 1 has 3 of its 4 responses in this mini-batch"):
        refuse_torn_questions(question, torch.tensor([2, 2, 4, 0, 4, 4]))


def test_rows_that_were_reordered_after_the_deal_are_refused():
    data = {"mini_batch_id": torch.tensor([0, 1, 0, 1])}
    rows = type("Rows", (dict,), {"__len__": lambda self: 4})(data)
    fake = SimpleNamespace(engine=SimpleNamespace(get_data_parallel_size=lambda: 1))
    with pytest.raises(ValueError, match="the 4 rows of this rank are not 2 equal runs"):
        DiscoTrainingWorker.train_mini_batch(fake, rows)


class Stub(DiscoTrainingWorker):
    """A worker without an engine's weights: saving and loading reach only what is ours."""

    def __init__(self, constraint="none", writes=True, **settings):
        self.engine = SimpleNamespace(
            save_checkpoint=lambda *a: None,
            load_checkpoint=lambda *a: None,
            is_mp_src_rank_with_outputs=lambda: writes,
            get_data_parallel_group=lambda: None,
            get_data_parallel_rank=lambda: 0,
        )
        self.configure(DiscoConfig(constraint=constraint, rho=2.0, delta=0.25, **settings))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(worker.dist, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr(worker.dist, "all_gather", lambda parts, mine, group=None: parts[0].copy_(mine))
    monkeypatch.setattr(worker.dist, "all_gather_object", lambda found, mine: found.__setitem__(0, mine))


def test_the_controllers_state_is_in_the_checkpoint(tmp_path):
    trained = Stub("augmented_lagrangian")
    trained.controller.end_step(1.0)
    trained.save_checkpoint(str(tmp_path))
    assert json.loads((tmp_path / "disco_controller.json").read_text()) == {
        "constraint": "augmented_lagrangian",
        "state": {"multiplier": 1.5},
    }
    resumed = Stub("augmented_lagrangian")
    resumed.load_checkpoint(str(tmp_path))
    assert resumed.controller.multiplier == 1.5


def test_ranks_without_outputs_do_not_write(tmp_path):
    Stub("augmented_lagrangian", writes=False).save_checkpoint(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_constraint_is_reported(tmp_path, caplog, monkeypatch):
    # Hydra, run in this process by another test, disables the loggers that it finds and raises the root's level.
    monkeypatch.setattr(worker.logger, "disabled", False)
    caplog.set_level("WARNING", logger=worker.logger.name)
    Stub("squared_hinge").save_checkpoint(str(tmp_path))
    resumed = Stub("augmented_lagrangian")
    resumed.load_checkpoint(str(tmp_path))
    assert resumed.controller.multiplier == 0.0
    assert "holds no state of disco.constraint=augmented_lagrangian (found: squared_hinge)" in caplog.text
    caplog.clear()
    Stub("squared_hinge").load_checkpoint(str(tmp_path / "absent"))
    assert not caplog.text


def mini_batch(rewards, log_prob):
    """One question with a response of one token for each reward, in the reverse of the batch's order."""
    from verl.utils import tensordict_utils as tu

    count = len(rewards)
    columns = {
        "group_id": torch.zeros(count, dtype=torch.long),
        "group_size": torch.full((count,), count),
        "sample_index": torch.arange(count).flip(0),
        "sequence_reward": torch.tensor(rewards),
        "response_mask": torch.ones(count, 1, dtype=torch.long),
        "old_log_probs": log_prob.clone(),
    }
    return tu.get_tensordict(columns)


@pytest.mark.parametrize("threshold", [0.7, 0.9, 1.0])
def test_a_reward_at_the_threshold_is_positive(threshold):
    # 0.7 is not a float32: compared in another precision, the reward would be below its own threshold.
    log_prob = torch.tensor([[-1.0], [-2.0]])
    data = mini_batch([threshold, 0.0], log_prob)
    Stub(positive_threshold=threshold)._weigh(data, log_prob, None)
    assert data["disco_weight"].tolist() == [1.0, -1.0]


def test_nan_log_probs_stop_the_run_with_the_samples_index():
    log_prob = torch.tensor([[-1.0], [-2.0], [float("nan")]])
    data = mini_batch([1.0, 0.0, 0.0], torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"score of sample 0 is NaN or infinite \(1 of 3"):
        Stub()._weigh(data, log_prob, None)
    data["old_log_probs"] = log_prob
    with pytest.raises(ValueError, match=r"KL of sample 0 is NaN or infinite \(1 of 3"):
        Stub()._weigh(data, torch.zeros(3, 1), None)
    with pytest.raises(ValueError, match=r"sequence_reward of sample 2 is NaN or infinite \(1 of 3"):
        Stub()._weigh(mini_batch([float("nan"), 0.0, 0.0], torch.zeros(3, 1)), torch.zeros(3, 1), None)


def test_a_node_without_the_file_gets_the_state_from_another(tmp_path, monkeypatch):
    saved = {"constraint": "augmented_lagrangian", "state": {"multiplier": 1.5}}
    monkeypatch.setattr(worker.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        worker.dist, "all_gather_object", lambda found, mine: found.__setitem__(slice(None), [mine, saved])
    )
    resumed = Stub("augmented_lagrangian")
    resumed.load_checkpoint(str(tmp_path))
    assert resumed.controller.multiplier == 1.5


def test_the_local_updates_of_a_step_are_one_step_for_the_controller(monkeypatch):
    kl_before, kl_after = [], iter([0.5, 1.25])

    def train(self, data):
        kl_before.append(self._last_kl)
        self._last_kl = next(kl_after)

    monkeypatch.setattr(worker.TrainingWorker, "train_mini_batch", train)
    stub = Stub("augmented_lagrangian")
    stub.engine.get_data_parallel_size = lambda: 1
    stub._last_kl = 7.0
    multipliers = []
    for step in range(2):
        columns = {"mini_batch_id": [0, 0], "local_step": [step] * 2, "local_steps": [2, 2]}
        stub.train_mini_batch(TensorDict({k: torch.tensor(v) for k, v in columns.items()}, batch_size=2))
        multipliers.append(stub.controller.multiplier)
    # A step begins at pi_old, and its second update goes on where the first one ended.
    assert kl_before == [0.0, 0.5]
    # rho (KL - delta), at the step's end alone.
    assert multipliers == [0.0, 2.0]
