"""Random batches, metrics files, settings and checkpoints through the pure functions of a run."""

import asyncio
import inspect
import io
import json
import math
import random as random_numbers
import re
import string
import tempfile
import threading
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fuzzing import cases
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tensordict import NonTensorData, TensorDict
from verl.utils import tensordict_utils as tu

from verl_ext.hydra.identity import changes_results, differences
from verl_ext.hydra.paths import absolute, as_override
from verl_ext.hydra.sweep import job_name, name_of
from verl_ext.runs import evaluations
from verl_ext.runs.checkpoints import find_checkpoints, fsdp_fault, megatron_fault
from verl_ext.runs.evaluations import BAND_NAMES, QUESTIONS, WEIGHT, band_index, band_of
from verl_ext.runs.folder import CHECKPOINT_FILE, full_names, read_metrics
from verl_ext.training import trainer
from verl_ext.training.advantages import current, estimating, responses
from verl_ext.training.bands import weight_by_pass_rate
from verl_ext.training.estimators import dgpo, maxrl
from verl_ext.training.grouping import deal, split_evenly, values_by_group
from verl_ext.training.metrics_log import MetricsLog, as_line, is_evaluated, read_rows, read_unlogged
from verl_ext.training.progress import duration, step_line
from verl_ext.training.resume import checkpoint_steps, name_whole_checkpoint, remove_old_checkpoints
from verl_ext.training.reward_loop import as_number, bounded, describe, one_line, reward_function
from verl_ext.training.rows import BatchFacts, Rows, last_of_session, of_sessions
from verl_ext.training.seeds import seed_of, seeded
from verl_ext.training.skipping import (
    FILLER,
    largest_divisor,
    narrow,
    narrowed,
    of_rows,
    rows_per_rank,
    teaching,
    whole_batch_terms,
)
from verl_ext.training.trainer import sequence_rewards, shares
from verl_ext.training.transfer import RowKey, parse_key
from verl_ext.training.watch import Stretch

# Batches --------------------------------------------------------------------------------------------------------------

questions = st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), min_size=1, max_size=20)
"""Question and reward of each response."""


def columns(rows):
    return [q for q, _ in rows], [r for _, r in rows]


@cases(200)
@given(questions, st.randoms(use_true_random=False))
def test_advantages_compare_the_responses_to_a_question(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    for estimator in (maxrl, dgpo):

        def advantages(rows, estimator=estimator):
            index, reward = columns(rows)
            tokens = torch.tensor(reward, dtype=torch.float64)[:, None] * torch.tensor([[0.0, 1.0, 0.0]])
            mask = torch.tensor([[1, 1, 0]] * len(rows))
            found, returns = estimator(tokens, mask, np.array([f"q{i}" for i in index], dtype=object))
            assert torch.equal(found, returns) and found.isfinite().all() and not found[:, 2].any()
            return found[:, 0]

        found = advantages(rows)
        for name in {q for q, _ in rows}:
            of = [i for i, (q, _) in enumerate(rows) if q == name]
            near = 1e-9 * (1 + found[of].abs().max().item())
            assert found[of].sum().item() == pytest.approx(0, abs=near)
            if len({rows[i][1] for i in of}) == 1:
                assert found[of].abs().max() < 1e-9
            # A higher reward, no lower advantage.
            ordered = found[sorted(of, key=lambda i: rows[i][1])]
            assert (ordered.diff() >= -near).all()
        torch.testing.assert_close(advantages([rows[i] for i in order]), found[order], rtol=1e-9, atol=1e-9)


@cases(200)
@given(questions, st.randoms(use_true_random=False))
def test_shares_by_band_sum_to_one(rows, random):
    question, reward = columns(rows)
    weight = [random.choice([0.0, 1.0, 1e-3]) for _ in rows]
    found = weight_by_pass_rate(question, reward, weight)
    assert sum(found[name] for name in QUESTIONS) == pytest.approx(1)
    assert sum(found[name] for name in WEIGHT) == pytest.approx(float(any(weight)))
    assert found == pytest.approx(weight_by_pass_rate(question[::-1], reward[::-1], weight[::-1]))
    mixed, right = shares(question, reward)
    assert 0 <= mixed <= 1 and 0 <= right <= 1 - mixed + 1e-9
    assert mixed * len(set(question)) == pytest.approx(
        len({q for q, t in zip(question, teaching(question, reward), strict=True) if t})
    )
    assert set().union(*values_by_group(question, reward).values()) == set(reward)


@cases(200)
@given(st.floats(0, 1))
def test_a_pass_rate_has_one_band(share):
    name = band_of(share)
    assert name == BAND_NAMES[band_index(share)]
    below, above = (float(x) for x in (name.strip("()[]").split(", ") * 2)[:2])
    assert below == share == above if "," not in name else below < share <= above and share < 1
    bounds = [float(x) / 100 for x in QUESTIONS[band_index(share)].rpartition("/")[2].split("_")]
    assert (bounds[0], bounds[-1]) == (below, above) and len(set(QUESTIONS)) == len(BAND_NAMES)


@cases(150)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=24, unique=True),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([(), (2,), (3, 4)]),
)
def test_a_dealt_batch_says_what_each_row_is(keys, per_mini_batch, ranks, micro_batches):
    rows = [parse_key(str(RowKey(f"q{a}", b, c))) for a, b, c in keys]
    assert rows == [(f"q{a}", b, c) for a, b, c in keys]
    group, session = [r.uid for r in rows], [(r.uid, r.session) for r in rows]
    reward = of_sessions(rows, [float(i) for i in range(len(rows))])
    last = last_of_session(rows)
    assert all(
        session[i] == session[last[i]] and rows[i].trajectory <= rows[last[i]].trajectory for i in range(len(rows))
    )
    plan = deal(group, [1 + i % 5 for i in range(len(rows))], groups_per_mini_batch=per_mini_batch, ranks=ranks,
                micro_batches=micro_batches, padding_length=7)  # fmt: skip
    found = Rows.dealt(group, session, reward, plan)
    real = found.group_id >= 0
    assert int(real.sum()) == len(rows) and len(real) == len(rows) + plan.num_padding
    assert sorted(found.sample_index.tolist()) == list(range(len(real)))
    assert len(found.session_id.unique()) == len(set(session)) + plan.num_padding
    for name in found.group_id[real].unique():
        of = found.group_id == name
        assert len(found.mini_batch_id[of].unique()) == 1
        assert found.group_size[of].tolist() == [int(of.sum())] * int(of.sum())
    for i, row in enumerate(found.sample_index.tolist()):
        assert float(found.sequence_reward[i]) == (reward[row] if row < len(rows) else 0.0)
    assert torch.equal(Rows.of(found.columns()).group_id, found.group_id)


@cases(150)
@given(st.integers(1, 4), st.integers(1, 12), st.sampled_from([None, 1, 2, 3, 5]), st.data())
def test_rows_left_out_keep_ranks_in_step(ranks, rows, micro_batch, data):
    wanted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=ranks * rows, max_size=ranks * rows)))
    size = micro_batch and largest_divisor(rows, micro_batch)
    count = rows_per_rank(wanted, ranks, SimpleNamespace(), size)
    assert max(1, int(wanted.view(ranks, -1).sum(1).max())) <= count <= rows
    assert size is None or count % size == 0 or count < size
    for mine in wanted.view(ranks, -1):
        lengths = data.draw(st.lists(st.integers(1, 5), min_size=rows, max_size=rows))
        tokens = torch.nested.nested_tensor([torch.full((n,), i) for i, n in enumerate(lengths)], layout=torch.jagged)
        batch = TensorDict({"input_ids": tokens, "row": torch.arange(rows)}, batch_size=[rows])
        found = narrow(batch, mine, count)
        assert len(found) == count and found["row"][~found[FILLER]].tolist() == mine.nonzero().flatten().tolist()
        assert not mine[found["row"][found[FILLER]]].any()
        kept = [int(x[0]) for x in found["input_ids"].unbind()]
        assert kept == found["row"].tolist()
        assert of_rows(lengths, mine) == [lengths[i] for i in mine.nonzero().flatten().tolist()]


@cases(100)
@given(
    st.integers(1, 3), st.integers(1, 12), st.sampled_from([None, 1, 2, 3, 5]), st.booleans(),
    st.sampled_from([0, 2, 3]), st.data(),
)  # fmt: skip
def test_all_ranks_run_their_wanted_rows_in_equally_many_micro_batches(ranks, rows, micro_batch, dynamic, stages, data):
    wanted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=ranks * rows, max_size=ranks * rows)))
    config = SimpleNamespace(use_dynamic_bsz=dynamic, pipeline_model_parallel_size=stages or 1)
    config.virtual_pipeline_model_parallel_size = 2 if stages else None
    runs = set()
    for rank, mine in enumerate(wanted.view(ranks, -1)):
        engine = SimpleNamespace(get_data_parallel_size=lambda: ranks, get_data_parallel_rank=lambda rank=rank: rank)
        lengths = data.draw(st.lists(st.integers(1, 5), min_size=rows, max_size=rows))
        tokens = torch.nested.nested_tensor([torch.full((n,), i) for i, n in enumerate(lengths)], layout=torch.jagged)
        batch = TensorDict({"input_ids": tokens, "row": torch.arange(rows)}, batch_size=[rows])
        found = narrowed(batch, wanted, SimpleNamespace(engine=engine, engine_config=config), micro_batch)
        assert found["row"][~found[FILLER]].tolist() == mine.nonzero().flatten().tolist()
        size = tu.get(found, "micro_batch_size_per_gpu", None)
        # Cut by tokens, there is no size.
        assert (size is None) == (dynamic or micro_batch is None)
        assert size is None or len(found) % size == 0 and size <= micro_batch
        whole = rows // largest_divisor(rows, micro_batch) if size else rows
        # Interleaved stages need a multiple of them, where all rows have one.
        assert not stages or whole % stages or (len(found) // (size or 1)) % stages == 0
        runs.add((len(found), size))
    assert len(runs) == 1


ALL_ROWS = {
    "moe_router_load_balancing_type=": {"moe_aux_loss_coeff": 0.1},
    "moe_z_loss_coeff=": {"moe_z_loss_coeff": 0.1},
    "moe_router_bias_update_rate=": {"moe_router_enable_expert_bias": True},
    "moe_expert_capacity_factor=": {"moe_expert_capacity_factor": 1.0},
}
"""What an engine's term for all rows is told by, and the settings that switch it on."""


@cases(100)
@given(
    st.sets(st.sampled_from([*ALL_ROWS])),
    st.sampled_from([None, 8]),
    st.sampled_from(["aux_loss", "none", "sinkhorn", ["aux_loss"], ["none", "seq_aux_loss"]]),
    st.booleans(),
    st.booleans(),
)
def test_an_engine_names_each_term_of_all_rows(on, experts, kind, enable, train):
    config = dict(num_moe_experts=experts, moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0)
    config |= dict(moe_z_loss_coeff=None, moe_router_enable_expert_bias=False, moe_router_bias_update_rate=1e-3)
    config["moe_expert_capacity_factor"] = None
    for name in on:
        config |= ALL_ROWS[name]
    if isinstance(kind, list):
        config["moe_aux_loss_coeff"] = [config["moe_aux_loss_coeff"]] * len(kind)
    mtp = SimpleNamespace(enable=enable, enable_train=train)
    engine = SimpleNamespace(tf_config=SimpleNamespace(**config), model_config=SimpleNamespace(mtp=mtp))
    found = whole_batch_terms(engine)
    balanced = [*ALL_ROWS][0]
    # No loss is taken of none; sinkhorn balances without one.
    wanted = on - {balanced} if kind == "none" else on | {balanced} if kind == "sinkhorn" else on
    wanted = {name for name in ALL_ROWS if experts and name in wanted} | (
        {"enable_train"} if enable and train else set()
    )
    assert len(found) == len(wanted) and all(any(name in term for term in found) for name in wanted)
    assert whole_batch_terms(SimpleNamespace()) == []


@cases(100)
@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 60))
def test_parts_and_divisors(n, limit, items):
    d = largest_divisor(n, limit)
    assert n % d == 0 and d <= limit and not any(n % k == 0 for k in range(d + 1, min(n, limit) + 1))
    parts = split_evenly(range(items), limit) if items else []
    assert [x for part in parts for x in part] == list(range(items)) and len(parts) == -(-items // limit)
    assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1 and max(map(len, parts)) <= limit


@cases(100)
@given(st.integers(0, 5), st.integers(1, 5), st.booleans(), st.booleans())
def test_one_update_of_a_step_is_its_last(step, steps, bypass, skip):
    facts = [BatchFacts.before(i, steps, bypass, skip) for i in range(steps)]
    assert [f.ends_step for f in facts] == [False] * (steps - 1) + [True]
    assert [f.at_rollout_weights for f in facts] == [True] + [False] * (steps - 1)


@cases(100)
@given(st.integers(1, 6), st.lists(st.booleans(), max_size=40))
def test_a_stretch_is_told_once(steps, held):
    stretch = Stretch(steps)
    told = [stretch.reaches(x) for x in held]
    for i, now in enumerate(told):
        begins = next((k for k in range(i, -1, -1) if not held[k]), -1) + 1
        assert now == (held[i] and i - begins + 1 == steps)


@cases(150)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 3), st.integers(0, 3)), min_size=1))
def test_a_session_in_several_rows_has_the_advantage_of_one_response(drawn):
    """Question, session, rows and reward of each response; the reward is in its last row."""
    drawn = list({(q, s): (q, s, rows, reward) for q, s, rows, reward in drawn}.values())
    rows = [RowKey(f"q{q}", s, t) for q, s, count, _ in drawn for t in range(count)]
    rewards = [r * (t == count - 1) for *_, count, r in drawn for t in range(count)]
    last = [t == count - 1 for _, _, count, _ in drawn for t in range(count)]

    def advantages(estimator, rewards, rows):
        tokens = torch.tensor(rewards, dtype=torch.float64)[:, None]
        return estimator(tokens, torch.ones(len(rows), 1), [row.uid for row in rows])[0][:, 0]

    for estimator in (maxrl, dgpo):
        with estimating(OmegaConf.create(), {}.__getitem__, rows):
            found = advantages(estimator, rewards, rows)
        alone = advantages(estimator, [r for *_, r in drawn], [row for row, end in zip(rows, last, strict=True) if end])
        expected = torch.tensor(
            [a for a, (*_, count, _) in zip(alone.tolist(), drawn, strict=True) for _ in range(count)]
        )
        if estimator is dgpo and expected.any():
            # Its scale counts the tokens of all rows.
            at = int(expected.abs().argmax())
            expected = expected * (found[at] / expected[at])
            assert found[at] * alone.abs().sum() != 0
        torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-9)


@cases(100)
@given(st.lists(st.sampled_from("abc"), max_size=4), st.booleans())
def test_a_batch_is_lent_to_its_own_block(names, fails):
    def nested(names):
        for name in names[:1]:
            with pytest.raises(ZeroDivisionError) if fails else nullcontext():
                with estimating(OmegaConf.create({"name": name}), {}.__getitem__, [RowKey(name, 0, 0)] * 2, 0.5):
                    assert current("mine").config.name == name and responses(2) == [0, 0]
                    nested(names[1:])
                    assert current("mine").config.name == name
                    1 / (not fails)

    nested(names)
    assert responses(3) == [0, 1, 2]
    with pytest.raises(ValueError, match="algorithm.adv_estimator=mine needs"):
        current("mine")


tensor_rows = st.lists(st.lists(st.floats(width=32), max_size=3), min_size=1, max_size=5)


@cases(150)
@given(tensor_rows)
def test_a_reward_is_the_sum_of_its_row_or_named(rows):
    scores = torch.nested.nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)
    keys = [f"q{i}_0_0" for i in range(len(rows))]
    sums = [float(torch.tensor(row, dtype=torch.float32).sum()) for row in rows]
    bad = [i for i, x in enumerate(sums) if not math.isfinite(x)]
    try:
        assert sequence_rewards(scores, keys, "mine.py:score, step 3") == sums and not bad
    except ValueError as e:
        assert f"mine.py:score, step 3: the reward of sample q{bad[0]}_0_0 " in str(e)
        assert f"{len(bad)} of {len(rows)} samples" in str(e)


@cases(100)
@given(
    st.dictionaries(st.sampled_from(["input_ids", "rm_scores", "entropy", "uid", "values", "x"]), st.booleans()),
    st.sets(st.sampled_from(["values", "x"])),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_workers_get_the_tensors_that_they_read(columns, without, extended, images, fails):
    row = TensorDict({n: torch.ones(1) if tensor else NonTensorData("a") for n, tensor in columns.items()}, [1])
    batch = SimpleNamespace(fields=None)
    trainer_ = SimpleNamespace(config={"verl_ext": {}} if extended else {}, processor=object() if images else None)
    sent = []

    def method(self, batch, metrics):
        sent.append(batch.fields)
        if fails:
            raise RuntimeError
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "read", lambda given, rows: row)
        with pytest.raises(RuntimeError) if fails else nullcontext():
            assert trainer.tensors_alone(method, without)(trainer_, batch, {}) is batch
    # As it came, also after an error.
    assert batch.fields is None
    read = {n for n, tensor in columns.items() if tensor} - without - {"rm_scores", "entropy"}
    assert [None if given is None else set(given) for given in sent] == [read if extended and not images else None]


# Metrics --------------------------------------------------------------------------------------------------------------

names = st.text(string.ascii_letters + "/_@", min_size=1, max_size=8).filter(lambda name: name != "step")
values = st.one_of(
    st.floats(), st.integers(-(2**63), 2**63 - 1), st.none(), st.booleans(), st.text(max_size=5),
    st.floats(width=32).map(np.float32), st.floats(width=32).map(torch.tensor), st.lists(st.integers(0, 9), max_size=3),
)  # fmt: skip
metrics = st.dictionaries(names, values, max_size=4)


@cases(300)
@given(st.integers(0, 2**53 - 1), metrics)
def test_a_row_is_one_line_that_reads_back(step, row):
    line = as_line(step, row)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    (found,), damaged = read_rows(line)
    assert found.step == step and found.line == line and not damaged
    for name, value in row.items():
        value = value.item() if isinstance(value, torch.Tensor | np.generic) else value
        finite = not isinstance(value, float) or math.isfinite(value)
        # Digits that tell a float32 from its neighbours.
        read = (
            float(np.float32(found.values[name]))
            if finite and isinstance(row[name], np.float32)
            else found.values[name]
        )
        assert read == (value if finite else None)


junk = st.one_of(
    st.binary(max_size=12), st.sampled_from([b"{", b'{"step":', b'{"step":2}', b"null", b"[" * 2000, b"\r"])
)


@cases(200)
@given(
    st.lists(st.tuples(st.integers(0, 9), metrics, junk, st.integers(0, 200)), max_size=8),
    st.integers(0, 9),
    st.booleans(),
)
def test_a_log_goes_on_from_any_file(lines, resumed, trains):
    """Rows that were cut off anywhere, with junk between them: whole rows stay, and new ones come whole."""
    content = b"".join(as_line(step, row)[:cut] + extra for step, row, extra, cut in lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.jsonl")
        path.write_bytes(content)
        rows, _ = read_rows(content)
        log = MetricsLog(SimpleNamespace(log=lambda **_: None, finish=lambda: None), path, resumed, trains=trains)
        log.log({"a": 1}, resumed + 1)
        log.finish()
        kept = [r.step for r in rows if not trains or 0 < resumed and r.step <= resumed]
        found, damaged = read_rows(path.read_bytes())
        assert [r.step for r in found] == [*kept, resumed + 1] and not damaged
        assert [r["step"] for r in read_metrics(Path(folder))] == sorted({*kept, resumed + 1})
        # Nothing was lost: the old file is either a beginning of the new one or aside.
        aside = Path(folder, "metrics.jsonl.1")
        assert aside.read_bytes() == content if aside.exists() else path.read_bytes().startswith(content)


@cases(150)
@given(
    st.lists(st.tuples(metrics, st.sampled_from(["written", "waiting", "written later"])), min_size=1, max_size=6),
    st.sampled_from([b"", b"\n", b"{", b"[" * 2000]),
    st.booleans(),
)
def test_each_row_that_waited_in_a_checkpoint_is_logged_once(steps, junk, goes_on):
    """Steps from 1 on, some of which the disk had no room for; the last one's is in the checkpoint in any case."""
    lines = [as_line(step, row) for step, (row, _) in enumerate(steps, 1)]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        path, kept = Path(folder, "metrics.jsonl"), Path(folder, "metrics.json")
        path.write_bytes(b"".join(line for line, (_, when) in zip(lines, steps, strict=True) if when != "waiting"))
        own = lines[-1:] if steps[-1][1] == "written" else []
        waiting = [line for line, (_, when) in zip(lines, steps, strict=True) if when != "written"]
        kept.write_bytes(junk + b"\n" + b"".join([*waiting, *own]))
        unlogged = read_unlogged(Path(folder))
        assert [row.step for row in unlogged] == [read_rows(line)[0][0].step for line in [*waiting, *own]]
        tracking = SimpleNamespace(log=lambda **_: None, finish=lambda: None)
        log = MetricsLog(tracking, path, len(steps), unlogged=unlogged)
        if goes_on:
            log.log({"a": 1}, len(steps) + 1)
        log.finish()
        found = [row for row in read_rows(path.read_bytes())[0]]
        assert sorted(row.step for row in found) == [*range(1, len(steps) + 1 + goes_on)]
        by_step = {row.step: row.values for row in found}
        for step, line in enumerate(lines, 1):
            assert by_step[step] == read_rows(line)[0][0].values
            assert is_evaluated(path, step) == any(name.startswith("val-") for name in steps[step - 1][0])
    assert read_unlogged(Path(folder)) == []


numbers = st.one_of(st.none(), st.floats(-1e30, 1e30), st.sampled_from([math.nan, math.inf]), st.integers(-5, 10**12))


@cases(300)
@given(
    st.integers(0, 10**6),
    st.one_of(st.none(), st.integers(0, 10**6)),
    st.dictionaries(st.sampled_from(["critic/score/mean", "training/mixed_questions", "actor/ppo_kl", "actor/entropy",
                                     "timing_s/step", "perf/total_num_tokens"]), numbers),
    st.one_of(st.none(), st.floats(0, 1e12)),
)  # fmt: skip
def test_a_step_is_one_line(step, total, row, left):
    line = step_line(step, total, row, delta=1e-4, evaluated=(step, 0.5), seconds_left=left)
    assert line.startswith("step ") and line.isprintable() and "nan" not in line and len(line) < 800


@cases(200)
@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_a_longer_time_reads_longer(a, b):
    units = {"s": 1, "min": 60, "h": 3600, "d": 86400}

    def seconds(text):
        parts = text.split()
        return sum(int(n) * units[u] for n, u in zip(parts[::2], parts[1::2], strict=True))

    a, b = sorted((a, b))
    assert seconds(duration(a)) <= seconds(duration(b))
    assert seconds(duration(a)) == pytest.approx(a, rel=0.35, abs=1) and len(duration(a).split()) <= 4


# Rewards --------------------------------------------------------------------------------------------------------------


@cases(200)
@given(st.one_of(values, st.binary(max_size=3), st.complex_numbers(), st.lists(st.floats(), max_size=2).map(np.array)))
def test_a_reward_is_a_finite_number_or_refused(value):
    try:
        found = as_number(value)
    except (TypeError, ValueError, OverflowError):
        return
    assert type(found) is float and math.isfinite(found)


class Odd(BaseException):
    """Not even an Exception."""


@cases(150)
@given(
    st.one_of(st.integers(), st.none(), st.text(max_size=3)),
    st.sampled_from([None, ValueError("x"), StopIteration(3), Odd(), SystemExit(2), TimeoutError("own")]),
    st.booleans(),
    st.sampled_from([None, 60, 1e9]),
)
def test_a_bounded_reward_answers_and_fails_as_it_would(answer, error, waits, seconds):
    def score(*args, **kwargs):
        if error is not None:
            raise error
        return answer, args, kwargs

    async def later(*args, **kwargs):
        return score(*args, **kwargs)

    call = bounded(later if waits else score, seconds)
    assert inspect.iscoroutinefunction(call) == waits
    # What asyncio cannot pass on.
    wanted = RuntimeError if isinstance(error, StopIteration) else type(error)
    try:
        found = call("a", b=3)
        assert (asyncio.run(found) if waits else found) == (answer, ("a",), {"b": 3}) and error is None
    except BaseException as e:
        if error is None or type(e) is not wanted:
            raise


@pytest.mark.parametrize("waits", [False, True])
def test_a_reward_that_hangs_fails_by_the_settings_name(waits):
    call = bounded(asyncio.sleep if waits else threading.Event().wait, 0.05)
    with pytest.raises(TimeoutError, match=r"no answer in 0.05 s \(verl_ext.reward_timeout\)"):
        asyncio.run(call(60)) if waits else call(5)


@cases(100)
@given(
    st.sampled_from([None, {}, {"path": None, "name": "f"}, {"path": "a.py", "name": "f"}]),
    st.booleans(),
    st.sampled_from([None, "m"]),
)
def test_a_reward_is_named_by_the_setting_that_chooses_it(custom, model, path):
    reward = {"reward_model": {"enable": model, "model_path": path}, "reward_manager": {"name": "naive"}}
    config = OmegaConf.create({"reward": reward if custom is None else reward | {"custom_reward_function": custom}})
    name, value = re.search(r"(reward\.\w+(?:\.\w+)?)=([\w.]+)", reward_function(config)).groups()
    chosen = OmegaConf.select(config, name)
    assert str(chosen.path if name.endswith("function") else chosen) == value
    # Without it another one would be named.
    rest = config.copy()
    OmegaConf.update(rest, name, {} if name.endswith("function") else "other", merge=False)
    assert reward_function(rest) != reward_function(config)


seeds = st.one_of(
    st.none(), st.integers(), st.sampled_from([2**63 - 1, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 1.0, True, "3"])
)


@cases(150)
@given(seeds, seeds)
@example("a", None)
@example(None, 2**64)
def test_a_runs_seed_seeds_its_workers_or_is_refused(seed, of_data):
    try:
        found = seed_of(OmegaConf.create({"seed": seed, "data": {"seed": of_data}}))
    except ValueError as e:
        assert str(e).startswith(f"seed={seed} " if seed is not None else f"data.seed={of_data} ")
        return
    assert found == (of_data if seed is None else seed) and type(found) in (int, type(None))
    if found is not None:

        class Worker:
            def __init__(self):
                self.drawn = random_numbers.random(), np.random.rand(), torch.rand(()).item()

        with torch.random.fork_rng():
            worker = seeded(Worker, found)
            assert worker().drawn == worker().drawn != seeded(Worker, found ^ 1)().drawn


@cases(200)
@given(st.text())
def test_an_error_is_one_printable_line(text):
    for line in (one_line(text), describe(ValueError(text))):
        assert "\n" not in line and line.isprintable() and len(line) < 600


# Settings -------------------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False), st.text(max_size=8)
)
trees = st.recursive(
    scalars, lambda x: st.dictionaries(st.text(string.ascii_lowercase, min_size=1, max_size=3), x, max_size=3)
)


@cases(200)
@given(st.dictionaries(st.text(string.ascii_lowercase, min_size=1, max_size=3), trees, min_size=1, max_size=4))
def test_full_names_lead_to_the_values(tree):
    for name, value in full_names("", tree).items():
        found = tree
        for part in name.split("."):
            found = found[part]
        assert found == value


def setting(value):
    (override,) = OverridesParser.create().parse_overrides([as_override("a.b", value)])
    return override.value()


@cases(300)
@given(st.one_of(scalars, st.lists(scalars, max_size=3)))
def test_an_override_says_what_it_should(value):
    found = setting(value)
    assert (found, type(found)) == (value, type(value)) or str(value) in ("inf", "-inf") and str(found) == str(value)


paths = st.text(string.ascii_letters + "/.~: é", max_size=12)


@cases(200)
@given(st.one_of(paths, st.none(), st.integers()))
def test_a_path_made_absolute_stays(path):
    found = absolute(path, "/base")
    assert absolute(found, "/other") == found
    assert absolute(path, "/base", must_exist=True) in (path, found)


settings = st.dictionaries(
    st.sampled_from(
        ["seed", "data.train_files", "trainer.nnodes", "trainer.n_gpus_per_node", "disco.tau", "trainer.x"]
    ),
    st.one_of(scalars, st.just("/base/a")),
)


@cases(200)
@given(settings, settings)
def test_differences_of_settings_are_symmetric(a, b):
    assert differences(a, a) == {}
    assert differences(a, b) == {name: (x, y) for name, (y, x) in differences(b, a).items()}
    assert all(isinstance(changes_results(name), bool) for name in a)


@cases(200)
@given(st.text(max_size=30))
def test_any_name_may_be_a_setting(name):
    assert isinstance(changes_results(name), bool)
    assert evaluations.pass_at_1({name: 1.0}) in ({}, {name.partition("/")[2].rsplit("/", 2)[0]: 1.0})


@cases(200)
@given(st.lists(st.tuples(names, st.text(max_size=30)), max_size=5), st.text(max_size=40), st.integers(0, 99))
def test_a_jobs_name_is_one_folders_name(overrides, algorithm, seed):
    given = [f"{name}={value}" for name, value in overrides]
    job = OmegaConf.create({"verl_ext": {"algorithm": algorithm.replace("$", "")}, "seed": seed})
    name = job_name(job, given, given)
    assert re.fullmatch(r"[\w.,=+-]+", name, re.ASCII) and len(name) <= 120 and name.endswith(f",seed={seed}")
    assert [name_of(override) for override in given] == [n.partition("@")[0] for n, _ in overrides]


# Checkpoints ----------------------------------------------------------------------------------------------------------

FILES = [f"actor/{kind}_world_size_1_rank_0.pt" for kind in ("model", "optim", "extra_state")]
FILES += ["actor/huggingface/config.json", "actor/fsdp_config.json", "data.pt", "metrics.json"]
WHOLE = {"config.json": b"{}", "fsdp_config.json": b'{"world_size": 1}'}
ZIP = b"PK\x05\x06" + bytes(18)


@cases(150)
@given(
    st.dictionaries(st.integers(0, 12), st.tuples(*[st.sampled_from(["whole", "missing", "cut"])] * 7), max_size=4),
    st.one_of(st.none(), st.integers(0, 12).map(str), st.text(max_size=3)),
    st.integers(0, 3),
)
def test_the_tracker_names_a_whole_checkpoint_or_none(steps, text, keep):
    with tempfile.TemporaryDirectory() as folder:
        run, whole = Path(folder), set()
        for step, states in steps.items():
            for name, state in zip(FILES, states, strict=True):
                file = run / f"global_step_{step}" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                content = WHOLE.get(file.name, ZIP)
                if state != "missing":
                    file.write_bytes(content if state == "whole" else content[: len(content) // 2])
            if states[:4] == ("whole",) * 4 and states[4] in ("whole", "missing"):
                whole.add(step)
            assert isinstance(megatron_fault(run / f"global_step_{step}/actor"), str)
            assert (fsdp_fault(run / f"global_step_{step}/actor") == "") >= (step in whole)
        found = find_checkpoints(run, megatron=False)
        assert [c.step for c in found] == sorted(s for s in steps if (run / f"global_step_{s}/actor").is_dir())
        assert whole <= {c.step for c in found if not c.fault}
        tracker = run / CHECKPOINT_FILE
        if text is not None:
            tracker.write_text(text)
        try:
            name_whole_checkpoint(run, ["actor"], megatron=False, contents=["model", "optimizer", "extra"])
        except ValueError as e:
            assert not whole and "choose another trainer.default_local_dir" in str(e)
            return
        if text is None:
            assert not tracker.exists()
            return
        named = int(tracker.read_text())
        assert named in whole or (not whole and named in steps)
        assert (
            (named == int(text)) if text.strip().isascii() and text.strip().isdigit() and int(text) in whole else True
        )
        # What is removed is old; the last ones, and those after the one named, stay.
        remove_old_checkpoints(run, named, {"actor": keep})
        with_actor = [s for s in checkpoint_steps(run) if (run / f"global_step_{s}/actor").is_dir()]
        assert named in with_actor and {s for s in steps if s > named} <= set(with_actor)
        assert not keep or len([s for s in with_actor if s <= named]) <= keep


@cases(100)
@given(st.text(), st.binary(max_size=30))
def test_any_bytes_are_a_damaged_shard(name, content):
    with tempfile.TemporaryDirectory() as folder:
        actor = Path(folder)
        (actor / "fsdp_config.json").write_bytes(content)
        (actor / "model_world_size_1_rank_0.pt").write_bytes(content)
        assert isinstance(fsdp_fault(actor), str) and fsdp_fault(actor)
        (actor / "fsdp_config.json").write_text(json.dumps({"world_size": name}))
        assert "is not a number of ranks" in fsdp_fault(actor)
