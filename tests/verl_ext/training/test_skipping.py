"""Rows without a gradient are left out of the training pass; the update stays the same for each of verl's methods."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import make_model
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

from verl_ext.preflight.composition import compose
from verl_ext.preflight.skipping import PROPORTIONAL, check_skipping
from verl_ext.recipes import describe_algorithms
from verl_ext.training.skipping import FILLER, largest_divisor, narrow, rows_per_rank, teaching, whole_batch_terms

HERE = Path(__file__).parent
DEFAULTS = dict(mixed=0.3, dynamic=True, groups_per_mini_batch=5, loss_mode="vanilla", loss_agg_mode="token-mean")
DEFAULTS |= dict(per_token=0.0, weights=False, dealt=True)
AGGREGATES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
CASES = [dict(loss_mode=mode, dynamic=dynamic) for mode in PROPORTIONAL for dynamic in (True, False)]
CASES += [dict(loss_agg_mode=mode) for mode in AGGREGATES]
CASES += [dict(mixed=share, dynamic=dynamic) for share in (0.0, 0.1, 1.0) for dynamic in (True, False)]
CASES += [dict(per_token=1.0), dict(weights=True), dict(groups_per_mini_batch=2), dict(dealt=False, dynamic=False)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skipping")
    make_model(str(folder / "model"))
    (folder / "cases.json").write_text(json.dumps([DEFAULTS | case for case in CASES]))
    arguments = [str(folder / "model"), str(folder / "cases.json"), str(folder / "results.jsonl")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + [str(HERE / "skipping_ranks.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1] / "recipe/disco")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = (folder / "results.jsonl").read_text().splitlines() if done.returncode == 0 else []
    assert len(lines) == len(CASES), done.stderr[-3000:]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[",".join(f"{k}={v}" for k, v in c.items()) for c in CASES])
def test_the_update_is_the_same_without_rows_of_advantage_0(results, number):
    result = results[number]
    case, ours, stock = result["case"], result["ours"], result["stock"]
    assert (result["moved"] > 0) == (case["mixed"] > 0) and result["error"] < 2e-5
    assert min(ours["trained_rows"]) < 1 and "trained_rows" not in stock
    if case["mixed"] == 0:
        assert ours["trained_rows"] == [0.0] * len(ours["trained_rows"]) and ours["trained_tokens"][0] == 0
    # The loss is of the whole mini-batch, too.
    assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-4, abs=1e-6)
    assert ours["grad_norm"] == pytest.approx(stock["grad_norm"], rel=1e-4)


def test_rows_of_a_group_teach_if_its_rewards_differ():
    assert teaching(["a", "b", "a", "b", "c"], [1, 0, 0, 0, 1]) == [True, False, True, False, False]


def batch(lengths):
    ids = torch.nested.as_nested_tensor([torch.full((n,), n) for n in lengths], layout=torch.jagged)
    return TensorDict({"input_ids": ids, "row": torch.arange(len(lengths))}, batch_size=len(lengths))


def test_largest_divisor():
    assert [largest_divisor(n, limit) for n, limit in ((12, 5), (12, 64), (7, 3), (8, 8), (1, 4))] == [4, 12, 1, 8, 1]


def test_each_rank_keeps_the_rows_of_the_one_that_wants_most():
    wanted = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0]).bool()
    plain, stages = (
        SimpleNamespace(),
        SimpleNamespace(virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_size=4),
    )
    # In micro-batches of 2 they are filled up; in one of 8 they fit.
    assert [rows_per_rank(wanted, 2, plain, m) for m in (None, 2, 3, 8)] == [3, 4, 3, 3]
    assert rows_per_rank(wanted, 2, stages, None) == 4
    # Fixed micro-batches come in multiples of the stages, too.
    assert [rows_per_rank(torch.arange(16) < n, 1, stages, 2) for n in (1, 8, 9)] == [8, 8, 16]
    # At least one row, so that no rank stands still; never more than there are.
    assert rows_per_rank(torch.zeros(12).bool(), 2, plain, None) == 1
    assert rows_per_rank(torch.ones(6).bool(), 2, stages, None) == 3


def test_a_rank_with_fewer_rows_repeats_its_shortest_without_a_gradient():
    wanted = torch.tensor([False, True, False, True, False])
    found = narrow(batch([9, 5, 4, 2, 7]), wanted, 4)
    assert found["row"].tolist() == [1, 3, 2, 2] and found[FILLER].tolist() == [False, False, True, True]
    assert [len(row) for row in found["input_ids"].unbind()] == [5, 2, 4, 4]
    everything = narrow(batch([9, 5, 4, 2, 7]), wanted, 5)
    assert everything["row"].tolist() == [0, 1, 2, 3, 4] and everything[FILLER].tolist() == (~wanted).tolist()


@pytest.mark.parametrize(
    "changes, term",
    [
        ({}, None),
        ({"moe_aux_loss_coeff": 0.01}, "router's balancing"),
        ({"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "none"}, None),
        (
            {"moe_aux_loss_coeff": [0.0, 0.1], "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"]},
            "balancing",
        ),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "router's balancing"),
        ({"moe_z_loss_coeff": 1e-3}, "z-loss"),
        ({"moe_router_enable_expert_bias": True}, "router's bias"),
        ({"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0}, None),
        ({"moe_expert_capacity_factor": 1.0}, "capacity"),
        ({"num_moe_experts": None, "moe_aux_loss_coeff": 0.01}, None),
    ],
)
def test_what_an_engine_trains_on_all_rows_is_named(changes, term):
    config = dict(num_moe_experts=8, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.0)
    config |= dict(moe_z_loss_coeff=None, moe_router_enable_expert_bias=False, moe_router_bias_update_rate=1e-3)
    config |= dict(moe_expert_capacity_factor=None)
    terms = whole_batch_terms(SimpleNamespace(tf_config=SimpleNamespace(**config | changes)))
    assert term in terms[0] if term else terms == []
    mtp = SimpleNamespace(enable=True, enable_train=True)
    assert "multi-token" in whole_batch_terms(SimpleNamespace(model_config=SimpleNamespace(mtp=mtp)))[0]
    assert whole_batch_terms(SimpleNamespace()) == []


def test_a_loss_of_verls_is_known_or_refused():
    losses = {name for name, f in POLICY_LOSS_REGISTRY.items() if f.__module__.startswith("verl.")}
    assert losses - set(PROPORTIONAL) == {"geo_mean", "clip_cov", "kl_cov", "dro", "bypass_mode"}


def refused(*overrides: str) -> list[str]:
    setting = "++verl_ext.skip_rows_without_gradient=true"
    return [
        f.name.rpartition(".")[2] for f in check_skipping(compose(["+experiment=arithmetic_cpu", setting, *overrides]))
    ]


def test_it_is_off_for_verls_own_methods_and_on_for_disco():
    on = {}
    for name in describe_algorithms():
        config = compose(["+experiment=arithmetic_cpu", f"algorithm={name}"]).config.verl_ext
        on[name] = bool(config.get("skip_rows_without_gradient"))
    assert {name for name, value in on.items() if value} == {"disco", "disco_b", "drpo", "real", "trpa", "conspo"}


@pytest.mark.parametrize(
    "name", ["dapo", "dr_grpo", "gpg", "rloo", "gspo", "sapo", "cispo", "ppo", "reinforce_pp", "maxrl", "dgpo", "disco"]
)
def test_methods_that_it_applies_to_may_start(name):
    assert refused(f"algorithm={name}") == []


@pytest.mark.parametrize(
    "overrides, setting",
    [
        (["algorithm=grpo"], "use_kl_loss"),
        (["algorithm=grpo_er"], "entropy_coeff"),
        (["algorithm=kl_cov"], "loss_mode"),
        (["algorithm=clip_cov"], "loss_mode"),
        (["algorithm=dapo", "actor_rollout_ref.actor.policy_loss.loss_mode=dro"], "loss_mode"),
        (["algorithm=dapo", "actor_rollout_ref.actor.calculate_entropy=true"], "calculate_entropy"),
        (["algorithm=dr_grpo", "actor_rollout_ref.actor.loss_scale_factor=null"], "loss_scale_factor"),
    ],
)
def test_what_would_train_on_rows_left_out_is_refused(overrides, setting):
    assert setting in refused(*overrides)
    assert refused(*overrides, "verl_ext.skip_rows_without_gradient=false") == []
