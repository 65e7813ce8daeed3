"""Parts of the worker that need no engine."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from recipe.disco import worker
from recipe.disco.objectives import OBJECTIVES, Sides
from recipe.disco.scores import SCORES, Score, masked
from recipe.disco.settings import DiscoConfig
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

    def __init__(self, constraint="none", writes=True, delta=0.25, **settings):
        self.engine = SimpleNamespace(
            save_checkpoint=lambda *a: None,
            load_checkpoint=lambda *a: None,
            is_mp_src_rank_with_outputs=lambda: writes,
            get_data_parallel_group=lambda: None,
            get_data_parallel_rank=lambda: 0,
        )
        self.engine_config = SimpleNamespace(use_dynamic_bsz=True, micro_batch_size_per_gpu=None)
        self.configure(DiscoConfig(constraint=constraint, rho=2.0, delta=delta, **settings))


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


# A mini-batch through train_batch, whose engine is two micro-batches of plain autograd --------------------------------

LENGTHS = [4, 1, 3, 0, 2, 4]


@pytest.fixture
def trained(monkeypatch):
    """``trained(stub, log_prob, old, fresh, ...)``: metrics of one mini-batch: two questions, a padding row."""
    from verl.utils import tensordict_utils as tu

    monkeypatch.setattr(worker, "no_padding_2_padding", lambda x, data: x)

    def run(stub, log_prob, old, fresh=True, local_step=0, grad_norm=1.0, entropy=None):
        count = len(LENGTHS) + 1
        mask = torch.arange(4) < torch.tensor([*LENGTHS, 0])[:, None]
        data = tu.get_tensordict(
            {
                "group_id": torch.tensor([0, 0, 0, 1, 1, 1, -1]),
                "group_size": torch.tensor([3] * 6 + [0]),
                "sample_index": torch.arange(count).flip(0),
                "sequence_reward": torch.tensor([1.0, 0, 0, 0, 1, 0, 0]),
                "response_mask": mask.long(),
                "old_log_probs": old,
                "current": log_prob,
                "fresh_old_log_probs": torch.full((count,), fresh),
                "entropy_logged": torch.full((count,), entropy is None),
                "local_step": torch.full((count,), local_step),
            }
        )

        def train_batch(self, data):
            tu.assign_non_tensor(data, dp_size=1)
            for rows in ([5, 0, 2], [6, 1, 4, 3]):
                part = tu.index_select_tensor_dict(data, torch.tensor(rows))
                output = {"log_probs": part["current"].clone().requires_grad_()}
                if entropy is not None:
                    output["entropy"] = torch.full_like(part["current"], entropy)
                loss, _ = self._loss(output, part)
                loss.backward()
            return tu.get_tensordict({}, {"metrics": {"loss": 0.0, "grad_norm": grad_norm}})

        monkeypatch.setattr(worker.TrainingWorker, "train_batch", train_batch)
        monkeypatch.setattr(stub, "_forward", lambda data, with_entropy: (data["current"], None), raising=False)
        metrics = tu.get(stub.train_batch(data), "metrics")
        return {k.removeprefix("disco/"): v for k, v in metrics.items()}

    return run


def log_probs(seed, spread=0.1):
    """Log-probabilities of the mini-batch above under two policies, and numpy's KL (k1) with its standard error."""
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, (7, 4))
    new = old - rng.normal(0.02, spread, (7, 4))
    length = np.array([*LENGTHS, 0])
    sums = np.where(np.arange(4) < length[:, None], old - new, 0).sum(1)
    kl = sums.sum() / length.sum()
    units = (length > 0).sum()
    error = math.sqrt(units / (units - 1) * ((sums - length * kl) ** 2).sum()) / length.sum()
    return torch.tensor(new), torch.tensor(old), pytest.approx(kl, rel=1e-5), pytest.approx(error, rel=1e-5)


def test_a_measured_mini_batch_logs_the_standard_error_of_its_kl(trained):
    new, old, kl, error = log_probs(0)
    stub = Stub("squared_hinge")
    trained(stub, old, old)
    metrics = trained(stub, new, old)
    assert (metrics["kl"], metrics["kl_standard_error"], metrics["measured"]) == (kl, error, 1.0)
    assert "kl_floor" not in metrics


def test_the_free_mini_batch_logs_the_floor_from_its_training_pass(trained):
    new, old, kl, _ = log_probs(1)
    metrics = trained(Stub("squared_hinge"), new, old)
    # For the constraint it is pi_old still.
    assert (metrics["kl"], metrics["coefficient"], metrics["measured"]) == (0.0, 0.0, 0.0)
    assert metrics["kl_floor"] == kl and "kl_standard_error" not in metrics


def test_in_bypass_mode_the_first_mini_batch_is_the_floor(trained):
    new, old, kl, error = log_probs(2)
    stub = Stub("squared_hinge")
    metrics = trained(stub, new, old, fresh=False)
    assert (metrics["kl"], metrics["kl_floor"], metrics["kl_standard_error"]) == (kl, kl, error)
    assert "kl_floor" not in trained(stub, new, old, fresh=False)
    # After updates that no rollout has seen, it is no floor.
    assert "kl_floor" not in trained(Stub("squared_hinge"), new, old, fresh=False, local_step=1)


def test_the_lagged_mode_logs_them_from_its_training_pass(trained):
    stub = Stub("squared_hinge", measure="lagged")
    new, old, kl, error = log_probs(3)
    metrics = trained(stub, new, old, fresh=False, entropy=0.5)
    assert (metrics["kl"], metrics["kl_floor"], metrics["kl_standard_error"]) == (kl, kl, error)
    assert metrics["entropy"] == pytest.approx(0.5)
    assert stub._last_kl == kl


def test_nan_in_a_users_gradient_names_the_score_and_the_sample(trained, monkeypatch):
    # Finite where it is measured, and 0 / 0 in the gradient of a response without a token.
    def rooted(log_prob, old, mask):
        return -(-(log_prob * mask).sum(-1)).sqrt()

    monkeypatch.setitem(SCORES._items, "rooted", Score(rooted))
    new, old, *_ = log_probs(4)
    with pytest.raises(ValueError, match="the gradient of disco.score=rooted .* of sample [03] is NaN or infinite"):
        trained(Stub("squared_hinge", score="rooted"), new, old)


def test_nan_for_a_response_without_a_token_stops_the_run(trained, monkeypatch):
    def divided(log_prob, old, mask):
        return masked(log_prob, mask).sum(-1) / mask.sum(-1)

    monkeypatch.setitem(SCORES._items, "divided", Score(divided))
    new, old, *_ = log_probs(4)
    with pytest.raises(ValueError, match=r"disco.score=divided \(0, say, for a response without a token\) of sample 3"):
        trained(Stub("squared_hinge", score="divided"), new, old)


def test_an_objective_that_is_nan_stops_with_its_name_and_the_question(trained, monkeypatch):
    def broken(group):
        return Sides((group.positive - group.positive).sum().sqrt() / group.positive.sum() * math.inf, 0.0)

    monkeypatch.setitem(OBJECTIVES._items, "broken", broken)
    new, old, *_ = log_probs(4)
    with pytest.raises(
        ValueError, match=r"disco.objective=broken gave \(nan, 0.0\) for question 1, of 1 positive and 1 "
    ):
        trained(Stub(objective="broken"), new, old)


def test_updates_that_verl_skips_are_counted(trained):
    new, old, *_ = log_probs(5)
    assert trained(Stub(), new, old)["skipped_updates"] == 0.0
    for grad_norm in (math.nan, math.inf):
        assert trained(Stub(), new, old, grad_norm=grad_norm)["skipped_updates"] == 1.0


@pytest.fixture
def told(caplog, monkeypatch):
    """What the worker's log has said since it was last asked."""
    # Hydra, run in this process by another test, disables the loggers that it finds and raises the root's level.
    monkeypatch.setattr(worker.logger, "disabled", False)
    caplog.set_level("WARNING", logger=worker.logger.name)

    def since():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return since


def test_an_objective_that_favours_wrong_responses_is_told_once(trained, told, monkeypatch):
    def swapped(group):
        return Sides(group.negative.mean(), group.positive.mean())

    monkeypatch.setitem(OBJECTIVES._items, "swapped", swapped)
    new, old, *_ = log_probs(6)
    stub = Stub(objective="swapped")
    trained(stub, new, old)
    (message,) = told()
    assert "disco.objective=swapped favours wrong responses" in message
    trained(stub, new, old)
    trained(Stub(), new, old)
    assert not told()


def noise(stub, error, floor):
    stub._tell_of_noise({"disco/kl_standard_error": [0.5 * error, 1.5 * error], "disco/kl_floor": [floor]})


def test_a_delta_below_the_noise_is_told_once_and_when_that_changes_much(told):
    stub = Stub("squared_hinge", delta=1e-4)
    noise(stub, 2e-3, 0.0)
    (message,) = told()
    assert message.startswith(
        "disco.delta=0.0001 is below what this batch can measure: the KL's standard error is 2.0e-03"
    )
    assert "a disco.delta of 0.004" in message and "more questions" in message and "kl_estimator=k3" in message
    noise(stub, 2.5e-3, 0.0)
    noise(stub, 1e-3, 0.0)
    assert not told()
    noise(stub, 7e-3, 0.0)
    assert "7.0e-03" in told()[0]
    noise(stub, 0.0, 1e-3)
    (message,) = told()
    assert "before any update the KL is 1.0e-03" in message and "bypass_mode=False" in message


@pytest.mark.parametrize(
    "stub",
    [
        lambda: Stub("squared_hinge", delta=1e-2),
        lambda: Stub("none", delta=1e-4),
        lambda: Stub("fixed", delta=1e-4),
        lambda: Stub("squared_hinge", delta=1e-4, writes=False),
    ],
)
def test_a_delta_above_the_noise_or_without_use_is_not_told(stub, told):
    noise(stub(), 2e-3, 1e-3)
    stub()._tell_of_noise({})
    assert not told()


def test_every_other_rank_keeps_quiet(told):
    stub = Stub("squared_hinge", delta=1e-4)
    stub.engine.get_data_parallel_rank = lambda: 1
    noise(stub, 2e-3, 1e-3)
    assert not told()
