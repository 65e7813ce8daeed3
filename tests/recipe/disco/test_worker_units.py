"""What one update logs, says and saves, through the real worker and engine on one rank."""

import json
import math
import socket
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import DEFAULTS, build_worker, make_model, to_batch
from named import objective_of, score_of

from recipe.disco import worker as module
from recipe.disco.constraint import build_controller
from recipe.disco.objectives import OBJECTIVES, Sides
from recipe.disco.scores import SCORES, masked
from recipe.disco.settings import DiscoConfig
from recipe.disco.worker import passes
from verl_ext.training.grouping import deal
from verl_ext.training.rows import BatchFacts

LENGTHS = [4, 1, 3, 0, 2, 4]
REWARDS = [1.0, 0, 0, 0, 1, 0]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One FSDP2 engine on one gloo rank, and its model's weights."""
    import verl  # noqa: F401  (activates the plugin)

    folder = str(tmp_path_factory.mktemp("model"))
    make_model(folder)
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        environment = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1")
        for name, value in (environment | {"MASTER_PORT": free.getsockname()[1]}).items():
            patch.setenv(name, str(value))
        free.close()
        worker = build_worker(folder, {})
        yield worker, [p.detach().clone() for p in worker.engine.module.parameters()]
    dist.destroy_process_group()


@pytest.fixture
def configured(engine):
    """``configured(**settings)``: the worker as at a run's start, with these settings of the method."""
    worker, initial = engine

    def configure(**settings):
        with torch.no_grad():
            for p, start in zip(worker.engine.module.parameters(), initial, strict=True):
                p.copy_(start)
        worker.configure(DiscoConfig(**{"delta": 0.25, "rho": 2.0, "tau": 0.5} | settings))
        object.__setattr__(worker.engine_config, "use_dynamic_bsz", True)
        return worker

    return configure


def batch(worker, noise=0.1, mini_batches=1, **facts):
    """Two questions of three responses, old log-probabilities ``noise`` away from the policy's, and their KL (k1).

    Returns:
        The batch, and numpy's KL of it with its standard error.
    """
    g = torch.Generator().manual_seed(0)
    rows = []
    for i, length in enumerate(LENGTHS):
        n = max(length, 1)
        ids = torch.randint(4, 64, (5 + n,), generator=g)
        rows.append(dict(uid=f"q{i // 3}", prompt=ids[:5], response=ids[5:], reward=REWARDS[i]))
        rows[-1] |= dict(mask=torch.full((n,), int(length > 0)), ref=torch.zeros(n), rho=torch.ones(n))
    drift = [noise * (0.2 + torch.randn(len(r["response"]), generator=g)) for r in rows]
    with torch.no_grad():
        for r, d in zip(rows, drift, strict=True):
            logits = worker.engine.module(torch.cat([r["prompt"], r["response"]])[None]).logits[0, 4:-1]
            log_prob = torch.log_softmax(logits.float() / DEFAULTS["temperature"], -1)
            r["old"] = log_prob.gather(-1, r["response"][:, None])[:, 0] + d
    dealt = deal([r["uid"] for r in rows], [9] * 6, groups_per_mini_batch=2 // mini_batches, ranks=1)
    data = to_batch(rows, dealt, 1, 0, DEFAULTS)
    for name, value in asdict(BatchFacts(**{"old_log_probs_fresh": True, "entropy_logged": True} | facts)).items():
        module.tu.assign_non_tensor(data, **{name: value})
    length = np.array(LENGTHS)
    sums = np.array([float(d.sum()) for d in drift]) * (length > 0)
    kl, units = sums.sum() / length.sum(), (length > 0).sum()
    error = math.sqrt(units / (units - 1) * ((sums - length * kl) ** 2).sum()) / length.sum()
    return data, pytest.approx(kl, rel=1e-3, abs=1e-6), pytest.approx(error, rel=1e-3)


def train(worker, data) -> dict[str, list[float]]:
    """The metrics of all updates on a batch, each with a value per mini-batch."""
    metrics = module.tu.get(worker.train_mini_batch(data), "metrics")
    return {k.removeprefix("disco/"): v for k, v in metrics.items()}


def test_rows_that_were_reordered_after_the_deal_are_refused(configured):
    worker = configured()
    data, *_ = batch(worker, mini_batches=2)
    data["mini_batch_id"] = torch.tensor([0, 1, 0, 1, 0, 1])
    with pytest.raises(ValueError, match="the 6 rows of this rank are not 2 equal runs"):
        worker.train_mini_batch(data)


def test_a_measured_mini_batch_logs_its_kl_which_is_the_floor_in_bypass_mode(configured):
    worker = configured()
    data, kl, error = batch(worker, old_log_probs_fresh=False)
    metrics = train(worker, data)
    assert (metrics["kl"], metrics["kl_standard_error"], metrics["measured"]) == ([kl], [error], [1.0])
    assert metrics["kl_floor"] == [kl] and metrics["loss"] == [pytest.approx(-metrics["objective"][0])]


def test_the_free_mini_batch_logs_the_floor_from_its_training_pass(configured):
    worker = configured(delta=0.0)
    data, kl, _ = batch(worker, mini_batches=2)
    metrics = train(worker, data)
    # For the constraint the first is pi_old still; the second is measured.
    assert metrics["measured"] == [0.0, 1.0]
    assert (metrics["kl"][0], metrics["coefficient"][0], metrics["over_delta"][0]) == (0.0, 0.0, 0.0)
    assert len(metrics["kl_floor"]) == len(metrics["kl_standard_error"]) == 1 and metrics["kl_floor"][0] != 0.0


def test_after_updates_that_no_rollout_has_seen_there_is_no_floor(configured):
    worker = configured()
    data, *_ = batch(worker, old_log_probs_fresh=False, local_step=1, local_steps=2)
    assert "kl_floor" not in train(worker, data)


def test_the_lagged_mode_logs_them_from_its_training_pass(configured):
    worker = configured(measure="lagged")
    data, kl, error = batch(worker, old_log_probs_fresh=False, entropy_logged=False)
    metrics = train(worker, data)
    assert (metrics["kl"], metrics["kl_floor"], metrics["kl_standard_error"]) == ([kl], [kl], [error])
    assert 0 < metrics["entropy"][0] < math.log(64)
    # The next update's hinge is at this KL.
    assert worker.rollout.kl == kl


def test_in_bypass_mode_the_entropy_is_logged_by_the_measuring_pass(configured):
    worker = configured()
    data, *_ = batch(worker, old_log_probs_fresh=False, entropy_logged=False)
    assert 0 < train(worker, data)["entropy"][0] < math.log(64)


def test_the_local_updates_of_a_step_are_one_step_for_the_controller(configured):
    worker = configured(constraint="augmented_lagrangian", delta=0.0)
    multipliers, kls = [], []
    for step in range(2):
        data, *_ = batch(worker, noise=-0.1, old_log_probs_fresh=False, local_step=step, local_steps=2)
        kls += train(worker, data)["kl"]
        multipliers.append(worker.controller.multiplier)
    # rho (KL - delta), at the step's end alone.
    assert multipliers == [0.0, pytest.approx(2.0 * kls[1])]


def test_a_later_local_update_goes_on_from_the_last_kl(configured):
    worker = configured(measure="lagged", delta=0.0)
    worker.rollout.kl = 0.5
    data, *_ = batch(worker, old_log_probs_fresh=False, local_step=1, local_steps=2)
    assert train(worker, data)["coefficient"] == [pytest.approx(500.0)]
    data, *_ = batch(worker, old_log_probs_fresh=False)
    assert train(worker, data)["coefficient"] == [0.0]


@pytest.fixture
def mine(monkeypatch):
    """Registers an objective or a score of a function under the name "mine", for one test."""
    for registry in (OBJECTIVES, SCORES):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    return lambda registry, cls: registry.register("mine")(cls)


def test_nan_in_a_users_gradient_names_the_score_and_the_sample(mine, configured):
    # Finite where it is measured, and 0 / 0 in the gradient of a response without a token.
    mine(SCORES, score_of(lambda log_prob, old, mask: -(-(log_prob * mask).sum(-1)).sqrt()))
    worker = configured(score="mine")
    with pytest.raises(ValueError, match="the gradient of disco.score=mine .* of sample 3 is NaN or infinite"):
        train(worker, batch(worker)[0])


def test_nan_for_a_response_without_a_token_stops_the_run(mine, configured):
    mine(SCORES, score_of(lambda log_prob, old, mask: masked(log_prob, mask).sum(-1) / mask.sum(-1)))
    worker = configured(score="mine")
    with pytest.raises(ValueError, match=r"the score \(0, say, for a response without a token\) of sample 3"):
        train(worker, batch(worker)[0])


def test_updates_that_verl_skips_are_counted(configured, monkeypatch):
    worker = configured()
    assert train(worker, batch(worker)[0])["skipped_updates"] == [0.0]
    for norm in (math.nan, math.inf):
        monkeypatch.setattr(worker.engine, "optimizer_step", lambda norm=norm: norm)
        assert train(worker, batch(worker)[0])["skipped_updates"] == [1.0]


# Which rows it trains on ----------------------------------------------------------------------------------------------


def test_what_has_no_gradient_is_not_trained_on_and_without_a_price_not_measured(configured):
    # Of the second question only a wrong response has a weight, if it has one of either kind; one is empty.
    worker = configured(delta=9.0)
    data, *_ = batch(worker, old_log_probs_fresh=False, skip_rows=True)
    data["sequence_reward"][data["group_id"] == 1] = 1.0
    tokens = data["input_ids"].offsets().diff().tolist()
    mixed = [n for n, q in zip(tokens, data["group_id"].tolist(), strict=True) if q == 0]
    metrics = train(worker, data.clone())
    assert metrics["trained_tokens"] == [sum(mixed)] and metrics["measured_tokens"] == [sum(tokens)]
    assert metrics["trained_rows"] == [0.5]
    worker = configured(constraint="none")
    metrics = train(worker, data.clone())
    assert metrics["measured_tokens"] == metrics["trained_tokens"] == [sum(mixed)]
    everything = train(worker, data.clone())["kl"]
    # None is mixed: nothing is measured, and no KL is made up.
    data["sequence_reward"][:] = 0.0
    metrics = train(worker, data.clone())
    assert metrics["measured_tokens"] == metrics["trained_rows"] == metrics["measured"] == [0.0]
    assert "kl" not in metrics and everything
    # Off
    module.tu.assign_non_tensor(data, skip_rows=False)
    metrics = train(worker, data.clone())
    assert metrics["measured_tokens"] == metrics["trained_tokens"] == [sum(tokens)]


FACTS = {
    "fresh": BatchFacts(old_log_probs_fresh=True, entropy_logged=True, skip_rows=True),
    "bypass": BatchFacts(old_log_probs_fresh=False, entropy_logged=False, skip_rows=True),
    "off": BatchFacts(old_log_probs_fresh=True, entropy_logged=True),
}


@pytest.mark.parametrize(
    "facts, first, lagged, constraint, needs_all, expected",
    [
        # free, which pass gives the entropy, measure mixed questions alone, train rows with a gradient alone
        ("fresh", True, False, "squared_hinge", False, (True, None, False, True)),
        ("fresh", False, False, "squared_hinge", False, (False, None, False, True)),
        ("fresh", False, False, "none", False, (False, None, True, True)),
        ("fresh", False, False, "none", True, (False, None, False, False)),
        ("off", False, False, "none", False, (False, None, False, False)),
        ("bypass", True, False, "none", False, (False, "measuring", False, True)),
        ("bypass", False, False, "none", False, (False, None, True, True)),
        ("bypass", True, True, "squared_hinge", False, (True, "training", False, False)),
        ("fresh", True, True, "squared_hinge", False, (True, None, False, True)),
        # A multiplier learns from the KL of all responses.
        ("fresh", True, True, "augmented_lagrangian", False, (True, None, False, False)),
        ("fresh", False, False, "augmented_lagrangian", False, (False, None, False, True)),
    ],
)
def test_what_an_update_runs(facts, first, lagged, constraint, needs_all, expected):
    controller = build_controller(constraint, {"delta": 0.1, "beta": 1.0, "rho": 1.0})
    run = passes(FACTS[facts], first, lagged, controller, needs_all)
    assert (run.free, run.with_entropy, run.measure_mixed, run.train_some) == expected


def test_a_score_that_needs_a_token_sees_those_of_fillers(mine, configured):
    mine(SCORES, score_of(lambda log_prob, old, mask: (log_prob * mask).sum(-1) / mask.sum(-1)))
    worker = configured(score="mine", delta=9.0)
    data, *_ = batch(worker, old_log_probs_fresh=False, skip_rows=True)
    for name in ("response_mask", "loss_mask"):
        data[name].values()[:] = 1
    data["sequence_reward"][:] = 1.0
    assert train(worker, data)["trained_rows"] == [0.0]


def test_the_lagged_mode_logs_no_kl_where_nothing_is_trained_on(configured):
    worker = configured(measure="lagged")
    data, *_ = batch(worker, skip_rows=True)
    data["sequence_reward"][:] = 1.0
    metrics = train(worker, data)
    assert not {"kl", "over_delta", "kl_floor"} & set(metrics) and metrics["trained_rows"] == [0.0]


@pytest.mark.parametrize("delta, trained", [(9.0, 0.5), (0.0, 5 / 6)])
def test_a_price_of_the_kl_needs_every_response_with_a_token(configured, delta, trained):
    worker = configured(delta=delta)
    data, *_ = batch(worker, noise=-0.1, old_log_probs_fresh=False, skip_rows=True)
    data["sequence_reward"][data["group_id"] == 1] = 1.0
    metrics = train(worker, data)
    assert (metrics["coefficient"][0] > 0) == (delta == 0.0)
    assert metrics["trained_rows"] == [pytest.approx(trained)]


# What it says ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(caplog, monkeypatch):
    """What the worker's log has said since it was last asked."""
    # Hydra, run in this process by another test, disables the loggers that it finds and raises the root's level.
    monkeypatch.setattr(module.logger, "disabled", False)
    caplog.set_level("WARNING", logger=module.logger.name)

    def since():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return since


def test_an_objective_that_favours_wrong_responses_is_told_once(mine, configured, told):
    mine(OBJECTIVES, objective_of(lambda group: Sides(group.negative.mean(), group.positive.mean())))
    worker = configured(objective="mine")
    train(worker, batch(worker)[0])
    (message,) = told()
    assert "disco.objective=mine favours wrong responses" in message
    train(worker, batch(worker)[0])
    worker = configured()
    train(worker, batch(worker)[0])
    assert not told()


def test_an_entropy_bonus_trains_on_all_rows_and_says_so_once(configured, told):
    worker = configured(delta=9.0)
    worker.configure(worker.disco, entropy_coeff=0.1)
    for _ in range(2):
        data, *_ = batch(worker, skip_rows=True)
        module.tu.assign_non_tensor(data, calculate_entropy=True)
        assert train(worker, data)["trained_rows"] == [1.0]
    (message,) = told()
    assert "has no effect: the entropy bonus (actor.entropy_coeff) needs all responses" in message


def noise(worker, error, floor):
    worker._tell_of_noise({"disco/kl_standard_error": [0.5 * error, 1.5 * error], "disco/kl_floor": [floor]})


def test_a_delta_below_the_noise_is_told_once_and_when_that_changes_much(configured, told):
    worker = configured(delta=1e-4)
    noise(worker, 2e-3, 0.0)
    (message,) = told()
    assert message.startswith(
        "disco.delta=0.0001 is below what this batch can measure: the KL's standard error is 2.0e-03"
    )
    assert "a disco.delta of 0.004" in message and "more questions" in message and "kl_estimator=k3" in message
    noise(worker, 2.5e-3, 0.0)
    noise(worker, 1e-3, 0.0)
    assert not told()
    noise(worker, 7e-3, 0.0)
    assert "7.0e-03" in told()[0]
    noise(worker, 0.0, 1e-3)
    (message,) = told()
    assert "before any update the KL is 1.0e-03" in message and "bypass_mode=False" in message


@pytest.mark.parametrize(
    "settings",
    [
        {"delta": 1e-2},
        {"constraint": "none", "delta": 1e-4},
        {"constraint": "fixed", "delta": 1e-4},
    ],
)
def test_a_delta_above_the_noise_or_without_use_is_not_told(configured, settings, told):
    worker = configured(**settings)
    noise(worker, 2e-3, 1e-3)
    worker._tell_of_noise({})
    assert not told()


@pytest.mark.parametrize("method, value", [("get_data_parallel_rank", 1), ("is_mp_src_rank_with_outputs", False)])
def test_every_other_rank_keeps_quiet(configured, told, monkeypatch, method, value):
    worker = configured(delta=1e-4)
    monkeypatch.setattr(worker.engine, method, lambda: value)
    noise(worker, 2e-3, 1e-3)
    assert not told()


# What it saves --------------------------------------------------------------------------------------------------------


def test_the_controllers_state_is_in_the_checkpoint(configured, tmp_path):
    worker = configured(constraint="augmented_lagrangian")
    worker.controller.end_step(1.0)
    worker.save_checkpoint(str(tmp_path))
    assert json.loads((tmp_path / "disco_controller.json").read_text()) == {
        "constraint": "augmented_lagrangian",
        "state": {"multiplier": 1.5},
    }
    worker = configured(constraint="augmented_lagrangian")
    worker.load_checkpoint(str(tmp_path))
    assert worker.controller.multiplier == 1.5


def test_a_full_disk_keeps_the_controllers_earlier_state_and_names_the_file(
    configured, tmp_path, full_disk, monkeypatch
):
    worker = configured(constraint="augmented_lagrangian")
    monkeypatch.setattr(module.TrainingWorker, "save_checkpoint", lambda *arguments: None)
    worker.save_checkpoint(str(tmp_path))
    before = (tmp_path / "disco_controller.json").read_bytes()
    worker.controller.end_step(1.0)
    with full_disk(10), pytest.raises(OSError, match="File too large: .*disco_controller.json"):
        worker.save_checkpoint(str(tmp_path))
    assert [f.name for f in tmp_path.iterdir()] == ["disco_controller.json"]
    assert (tmp_path / "disco_controller.json").read_bytes() == before


def test_a_broken_state_is_named(configured, tmp_path):
    (tmp_path / "disco_controller.json").write_text('{"constraint": "augm')
    with pytest.raises(ValueError, match="disco_controller.json is not JSON"):
        configured(constraint="augmented_lagrangian").load_checkpoint(str(tmp_path))


def test_ranks_without_outputs_do_not_write(configured, tmp_path, monkeypatch):
    worker = configured(constraint="augmented_lagrangian")
    monkeypatch.setattr(worker.engine, "is_mp_src_rank_with_outputs", lambda: False)
    worker.save_checkpoint(str(tmp_path))
    assert not (tmp_path / "disco_controller.json").exists()


def test_a_checkpoint_of_another_constraint_is_reported(configured, tmp_path, told):
    configured().save_checkpoint(str(tmp_path))
    worker = configured(constraint="augmented_lagrangian")
    worker.load_checkpoint(str(tmp_path))
    assert worker.controller.multiplier == 0.0
    (message,) = told()
    assert "holds no state of disco.constraint=augmented_lagrangian (found: squared_hinge)" in message
    configured().load_checkpoint(str(tmp_path))
    assert not told()


def test_a_node_without_the_file_gets_the_state_from_another(configured, tmp_path, monkeypatch):
    saved = {"constraint": "augmented_lagrangian", "state": {"multiplier": 1.5}}
    worker = configured(constraint="augmented_lagrangian")
    worker.save_checkpoint(str(tmp_path))
    (tmp_path / "disco_controller.json").unlink()
    gather = dist.all_gather_object
    monkeypatch.setattr(
        module.dist, "all_gather_object", lambda found, mine: gather(found, mine) or found.__setitem__(0, saved)
    )
    worker.load_checkpoint(str(tmp_path))
    assert worker.controller.multiplier == 1.5
