"""Random batches, metrics files, settings and checkpoints through the pure functions of a run."""

import json
import math
import re
import string
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fuzzing import cases
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tensordict import TensorDict

from verl_ext.hydra.identity import changes_results, differences
from verl_ext.hydra.paths import absolute, as_override
from verl_ext.hydra.sweep import job_name, name_of
from verl_ext.runs import evaluations
from verl_ext.runs.checkpoints import fsdp_fault, megatron_fault
from verl_ext.runs.evaluations import BAND_NAMES, QUESTIONS, WEIGHT, band_index, band_of
from verl_ext.runs.folder import CHECKPOINT_FILE, full_names, read_metrics
from verl_ext.training.bands import weight_by_pass_rate
from verl_ext.training.estimators import dgpo, maxrl
from verl_ext.training.grouping import deal, split_evenly, values_by_group
from verl_ext.training.metrics_log import MetricsLog, as_line, read_rows
from verl_ext.training.progress import duration, step_line
from verl_ext.training.resume import checkpoint_steps, name_whole_checkpoint, remove_old_checkpoints
from verl_ext.training.reward_loop import as_number, describe, one_line
from verl_ext.training.rows import BatchFacts, Rows, last_of_session, of_sessions
from verl_ext.training.skipping import FILLER, largest_divisor, narrow, of_rows, rows_per_rank, teaching
from verl_ext.training.trainer import shares
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
