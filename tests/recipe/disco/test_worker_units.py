"""Parts of the worker that need no engine."""

import json
from types import SimpleNamespace

import pytest
import torch

from recipe.disco import worker
from recipe.disco.config import DiscoConfig
from recipe.disco.worker import DiscoTrainingWorker, drop_objects, largest_divisor, refuse_torn_questions


def test_largest_divisor():
    assert [largest_divisor(n, limit) for n, limit in ((12, 5), (12, 64), (7, 3), (8, 8), (1, 4))] == [4, 12, 1, 8, 1]


@pytest.mark.parametrize("images, kept", [([{}, {}], set()), ([{}, {"pixels": 1}], {"multi_modal_inputs"})])
def test_objects_that_no_engine_reads_are_dropped(images, kept):
    from verl.utils import tensordict_utils as tu

    data = tu.get_tensordict(
        {"group_id": torch.arange(2), "uid": ["a", "b"], "multi_modal_inputs": images}, {"epochs": 1}
    )
    drop_objects(data)
    assert set(data.keys()) == {"group_id", "epochs"} | kept


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

    def __init__(self, constraint, writes=True):
        self.engine = SimpleNamespace(
            save_checkpoint=lambda *a: None,
            load_checkpoint=lambda *a: None,
            is_mp_src_rank_with_outputs=lambda: writes,
        )
        self.configure(DiscoConfig(constraint=constraint, rho=2.0, delta=0.25))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(worker.dist, "get_world_size", lambda: 1)
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


def test_a_checkpoint_of_another_constraint_is_reported(tmp_path, caplog):
    Stub("squared_hinge").save_checkpoint(str(tmp_path))
    resumed = Stub("augmented_lagrangian")
    resumed.load_checkpoint(str(tmp_path))
    assert resumed.controller.multiplier == 0.0
    assert "holds no state of disco.constraint=augmented_lagrangian (found: squared_hinge)" in caplog.text
    caplog.clear()
    Stub("squared_hinge").load_checkpoint(str(tmp_path / "absent"))
    assert not caplog.text
