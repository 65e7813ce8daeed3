"""Random settings and run folders through what is checked before a run starts."""

import contextlib
import io
import json
import math
import os
import re
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from fuzzing import cases
from hydra.conf import HydraConf, JobConf, RunDir
from hydra.core.utils import setup_globals
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_ext.hydra import sweep
from verl_ext.hydra.identity import holds_run, take_folder
from verl_ext.hydra.inputs import check_data, save_data
from verl_ext.hydra.paths import settle, settled, unsettled
from verl_ext.preflight import checks, composition
from verl_ext.preflight.checks import CHECKS, Needs, examine, refuse
from verl_ext.preflight.composition import Run, walk
from verl_ext.preflight.findings import run_checks
from verl_ext.runs.folder import flatten, how_to_continue, is_finished, what_is_left, without_hydra

# Settings -------------------------------------------------------------------------------------------------------------

RUNS = (
    ("algorithm=disco", "+experiment=arithmetic_cpu"),
    ("algorithm=ppo", "+experiment=deepseek_qwen_7b_megatron", "math.folder=/nowhere"),
)
WORDS = ["word", "", "~/x", "x" * 300, "a\nb", "1e-6", "pkg://nowhere", "verl_ext.nowhere.f", "/etc/passwd", ".", "\0"]
VALUES = [*WORDS, None, True, False, 0, -1, 1.5, math.nan, math.inf, 10**30, -(10**30), 10**400, [], [1, "a"], [[1]]]
VALUES += [["???"], "???", "${nowhere.x}", "${oc.env:NOPE}", "${trainer.nnodes}"]
"""Wrong values of most settings, right ones of some."""
GROUPS = [{}, {"a": 1}]
"""Values that are groups of settings, of names that nothing reads."""


@pytest.fixture(autouse=True)
def no_cluster(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


@cache
def composed(overrides):
    return composition.compose(overrides)


@cache
def settings_of(overrides):
    """All settings and nodes by name, and the names that the checks read among them."""
    found = {s.name: s for s in walk(OmegaConf.to_container(composed(overrides).composed, resolve=False))}
    folder = Path(composition.__file__).parent
    words = set(re.findall(r"\w+", " ".join(f.read_text() for f in sorted(folder.glob("*.py")))))
    return found, [name for name in found if name.rpartition(".")[2] in words]


@st.composite
def changes(draw, most, values):
    """Overrides of a run, and up to ``most`` other values of its settings and nodes."""
    overrides = draw(st.sampled_from(RUNS))
    known, read = settings_of(overrides)
    names = st.one_of(st.sampled_from(read), st.sampled_from([*known]))
    return overrides, draw(st.dictionaries(names, st.sampled_from(values), min_size=1, max_size=most))


def changed(overrides, values):
    """The run with these values, and those of them that hold."""
    base = composed(overrides)
    config = base.composed.copy()
    OmegaConf.set_struct(config, False)
    held = {}
    for name, value in values.items():
        try:
            OmegaConf.update(config, name, value, merge=False, force_add=True)
        except (OmegaConfBaseException, TypeError, ValueError, OverflowError):
            # Below a setting that was changed before.
            continue
        held = {n: v for n, v in held.items() if not n.startswith(f"{name}.")} | {name: value}
    return Run(config, base.plain), held


def shown(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


@cases(20)
@given(changes(8, VALUES))
@example((RUNS[0], {"trainer": "${oc.env:NOPE}", "actor_rollout_ref.actor.optim.lr": "word"}))
def test_each_wrong_value_is_named(drawn):
    run, held = changed(*drawn)
    findings = list(run_checks(CHECKS[Needs.OVERRIDES], run))
    said = [f.problem for f in findings if f.problem and not f.error]
    known, _ = settings_of(drawn[0])
    for name, value in held.items():
        before = known[name]
        if not isinstance(before.value, int | float) or isinstance(before.value, bool):
            continue
        # What was a number cannot be a word, a list or a group, unless its dataclass says so.
        if isinstance(value, str) and "${" not in value and value != "???" or isinstance(value, list | dict):
            if before.annotation in (int, float, int | None, float | None):
                text = f"{name}={shown(value) or chr(39) * 2} is wrong"
                assert any(problem.startswith(text) for problem in said), (text, said)
    for finding in findings:
        assert not finding.error or finding.name == "lost_updates", finding
        assert not finding.problem or finding.fix, finding
    # A start says the same.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            refuse(run, Needs.OVERRIDES)
        except ValueError as e:
            assert said and any(problem in str(e) for problem in said)


@cases(30)
@given(changes(2, VALUES + GROUPS))
@example((RUNS[0], {"actor_rollout_ref.actor.optim._target_": []}))
@example((RUNS[0], {"actor_rollout_ref.actor.optim.optimizer_impl": "torch.optimm"}))
@example((RUNS[0], {"actor_rollout_ref.model.custom_chat_template": math.inf}))
@example((RUNS[0], {"disco.tau": 0}))
@example((RUNS[0], {"model": 10**30}))
@example((RUNS[0], {"reward": "a\nb"}))
@example((RUNS[0], {"trainer.total_training_steps": 10**400}))
@example((RUNS[0], {"actor_rollout_ref.model": [1, "a"]}))
def test_a_doctor_examines_any_settings(drawn):
    run, held = changed(*drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks.composition, "compose", lambda given: run)
        findings = list(examine(drawn[0]))
    for finding in findings:
        # A check fails only where a part is missing that it reads, and says which.
        assert not finding.error or any(name.rpartition(".")[2] in finding.problem for name in held), finding
        assert finding.problem or finding.value, finding
    assert findings


override = st.one_of(
    st.sampled_from(
        [
            "",
            "=",
            "a",
            "a=b",
            "+a=b",
            "++a.b=1",
            "~a",
            "~trainer",
            "~trainer.nnodes",
            "trainer=1",
            "trainer={}",
            "x y=1",
        ]
        + ["+trainer.nnodes=1", "algorithm=nope", "+algorithm=ppo", "experiment=arithmetic_cpu", "+experiment=nope"]
        + [
            "trainer.nnodes=[1",
            "trainer.nnodes=1,2",
            "trainer.n_gpu_per_node=1",
            "trainer.nnodes=${x}",
            "'a'=1",
            "a=\0",
        ]
        + [
            "hydra.searchpath=[/nowhere]",
            "+a=${b}",
            "data.train_files='a",
            "trainer.nnodes={a: b}",
            "~algorithm",
            "@=1",
        ]
        + ["+experiment=arithmetic_cpu", "algorithm=disco", "data.train_batch_size=1e3", "trainer.nnodes=choice(1,2)"]
    ),
    st.text("a=.+~[]{}$:,' \\", max_size=8),
)


@cases(8)
@given(st.lists(override, min_size=1, max_size=2))
@example(["+algorithm=ppo"])
def test_any_overrides_compose_or_a_finding_says_which_do_not(given_):
    findings = list(examine(given_))
    said = [f for f in findings if f.problem]
    # Without a rollout engine and the like, verl's own defaults are no run.
    assert (said or "+experiment=arithmetic_cpu" in given_) and all(f.fix or f.warning for f in said), given_
    assert all(not f.error or f.name == "settings" for f in said), said


# The run's folder -----------------------------------------------------------------------------------------------------

GAMMA = "algorithm.gamma"
FILES = ["metrics.jsonl", "inputs.json", "finished", "latest_checkpointed_iteration.txt", "global_step_3/actor/a.pt"]
FILES += ["global_step_12/data.pt", "validation/0.jsonl", "earlier_1/metrics.jsonl", "mine.txt", "config.yaml"]
FILES += ["dumps/0.jsonl", "overrides.yaml", "metrics.jsonl.1"]


def settings(folder, **more):
    values = {
        "trainer": {"default_local_dir": str(folder), "nnodes": 1, "n_gpus_per_node": 2, "total_training_steps": 20},
        "actor_rollout_ref": {"model": {"path": "toy"}, "rollout": {"n": 8}},
        "data": {"train_files": "train.parquet", "val_files": []},
        "algorithm": {"gamma": 1.0},
        "ray_kwargs": {"ray_init": {}},
        "verl_ext": {"algorithm": "grpo"},
    }
    config = OmegaConf.create(values)
    for name, value in more.items():
        OmegaConf.update(config, name, value, force_add=True)
    return config


def tree(folder):
    """Relative names of all files, with their contents."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@cases(150)
@given(
    st.dictionaries(st.sampled_from(FILES), st.binary(max_size=6), max_size=7),
    st.sampled_from(["whole", "other", "cut", "as drawn"]),
    st.sampled_from(["auto", "disable", "resume_path", None, "word"]),
    st.sampled_from([None, "global_step_3", "global_step_99", "/nowhere/global_step_3", "word", 5]),
    st.booleans(),
    st.sampled_from([None, 2, 3, 20]),
)
def test_a_start_takes_a_folder_and_loses_nothing_in_it(files, stored, mode, source, val_only, total):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "run")
        folder.mkdir()
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        dumps = {"trainer.validation_data_dir": str(folder / "dumps")}
        if stored != "as drawn" and "config.yaml" in files:
            gamma = {GAMMA: 0.5} if stored == "other" else {}
            text = OmegaConf.to_yaml(settings(folder, **dumps, **gamma))
            (folder / "config.yaml").write_text(text[: len(text) // 2] if stored == "cut" else text)
        if isinstance(source, str) and source.startswith("global"):
            source = str(folder / source)
        changes = {"resume_mode": mode, "resume_from_path": source, "val_only": val_only, "total_training_steps": total}
        config = settings(folder, **dumps, **{f"trainer.{name}": value for name, value in changes.items()})
        before, held = tree(folder), holds_run(folder)
        try:
            take_folder(config, folder)
        except ValueError as e:
            assert tree(folder) == before or mode == "disable"
            assert Counter(tree(folder).values()) == Counter(before.values())
            assert "trainer." in str(e) and "\n" not in str(e).strip()
            return
        after = tree(folder)
        if mode != "disable":
            assert after == before
            # Another run's folder is not taken.
            whole = "config.yaml" in files and stored == "other"
            assert not (held and whole and "overrides.yaml" not in files)
        else:
            assert Counter(after.values()) == Counter(before.values()) and not holds_run(folder)
            assert all(
                after[name] == before[name] for name in before if name in ("mine.txt", "earlier_1/metrics.jsonl")
            )


data_files = st.lists(st.sampled_from([b"", b"a", b"b"]), max_size=3)


@cases(100)
@given(data_files, data_files, data_files, data_files, st.booleans(), st.one_of(st.none(), st.binary(max_size=9)))
def test_changed_training_data_is_refused_and_moved_data_is_not(train, val, new_train, new_val, val_only, damaged):
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()) as said:
        folder = Path(place, "run")
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("{}")

        def config(kind, **contents):
            found = {"trainer.val_only": val_only}
            for split, parts in contents.items():
                names = [Path(place, f"{kind}-{split}-{i}") for i in range(len(parts))]
                for name, content in zip(names, parts, strict=True):
                    name.write_bytes(content)
                # A missing file is not compared.
                found[f"data.{split}_files"] = [*map(str, names), f"{place}/nowhere"]
            return settings(folder, **found)

        old = check_data(config("old", train=train, val=val), folder)
        save_data(old, folder)
        if damaged is not None:
            (folder / "inputs.json").write_bytes(damaged)
        # Under other names.
        now = config("new", train=new_train, val=new_val)
        changed = bool(train and new_train) and new_train != train
        try:
            kept = check_data(now, folder)
            # What training asks for at the next start: an evaluation does not change it, nor do missing files.
            assert damaged is not None or not train or kept["train"] == old["train"]
            assert damaged is not None or val_only or not changed
        except ValueError as e:
            assert (changed or damaged is not None) and not val_only and "data.train_files" in str(e)
            return
        told = damaged is None and (bool(val and new_val) and new_val != val or changed)
        assert told == ("data." in said.getvalue()) or damaged is not None


PLACES = ["trainer.default_local_dir", "data.train_files", "data.val_files", "math.folder", "data.cache_dir"]
PLACES += ["actor_rollout_ref.model.path", "ray_kwargs.ray_init.runtime_env.env_vars.X_dir", "trainer.experiment_name"]
path = st.one_of(
    st.sampled_from(
        ["a", "a/b.parquet", "./a", "../x", "~/x", "/abs/x", "hdfs://x/y", "file://a/b", "", ".", "a\0b", "é"]
    ),
    st.text("ab/.~: ", max_size=6),
    st.none(),
    st.integers(0, 3),
)


@cases(50)
@given(
    st.dictionaries(st.sampled_from(PLACES), st.one_of(path, st.lists(path, max_size=2))), st.booleans(), st.booleans()
)
def test_settled_settings_stay_and_mean_the_same_place(values, client, exists):
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        here = os.getcwd()
        if exists:
            Path("a").mkdir()
        hydra = OmegaConf.structured(HydraConf(run=RunDir("outputs"), job=JobConf(chdir=False)))
        values = {"data.train_files": []} | values
        config = settings(Path(here, "run"), **values)
        if client:
            config.ray_kwargs.ray_init.address = "ray://127.0.0.1:1"
        config = OmegaConf.create({**config, "hydra": hydra})
        before = OmegaConf.to_container(without_hydra(config))
        try:
            found = settled(config)
        except ValueError as e:
            assert client and any(str(e).startswith(f"{name}=") for name in values)
            return
        assert OmegaConf.to_container(without_hydra(config)) == before
        for name, value in found.items():
            assert name in values and "env_vars" not in name and name != "trainer.experiment_name"
            for old, new in zip(*(x if isinstance(x, list) else [x] for x in (values[name], value)), strict=True):
                # The same file, from any folder.
                assert new == old or os.path.isabs(new)
                assert new == old or new == os.path.normpath(
                    os.path.join(here, os.path.expanduser(old.removeprefix("file://")))
                )
        settle(config)
        os.chdir("/")
        assert settled(config) == {}
        os.chdir(here)


LATER = ["${hydra:runtime.output_dir}/x", "${now:%Y}", "a-${python_version:major}", "${hydra:job.num}"]
"""What Hydra's own process alone can resolve."""


@cases(30)
@given(
    st.dictionaries(
        st.sampled_from(PLACES),
        st.one_of(
            st.sampled_from(LATER), st.sampled_from(["a", "/b", "${trainer.nnodes}"]),
            st.lists(st.sampled_from([*LATER, "a", "/b"]), max_size=2),
        ),
    )
)  # fmt: skip
def test_settled_settings_can_be_resolved_by_any_process(values):
    setup_globals()
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        hydra = OmegaConf.structured(HydraConf(run=RunDir("outputs"), job=JobConf(chdir=False, num=3)))
        config = OmegaConf.create({**settings(Path(place, "run"), **{"data.train_files": []} | values), "hydra": hydra})
        assert set(unsettled(config)) == {name for name, value in values.items() if any(x in str(value) for x in LATER)}
        settle(config)
        assert unsettled(config) == {}
        # As on another node, without Hydra.
        assert all("${" not in str(x) for x in flatten(without_hydra(config)).values())


word = st.one_of(
    st.text(max_size=4),
    st.sampled_from(["1e-6", "yes", "null", "~", "1_000", "0x1", "a: b", "# x", "\u2028", "012", "="]),
)
value = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), word.filter(lambda text: "$" not in text), st.just(1e-6),
    st.lists(word.filter(lambda text: "$" not in text), max_size=2),
)  # fmt: skip


@cases(150)
@given(
    st.dictionaries(st.sampled_from(["algorithm.gamma", "disco.tau", "data.train_files", "seed", "trainer.x"]), value),
    st.sampled_from(["algorithm.gamma", "disco.tau", "trainer.x"]),
    value,
    st.booleans(),
    st.booleans(),
)
@example({"disco.tau": math.nan}, "trainer.x", 1, True, True)
def test_a_run_is_finished_under_its_own_settings_alone(values, name, other, marked, stored):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = settings(folder, **values)
        if marked:
            (folder / "finished").touch()
        if stored:
            (folder / "config.yaml").write_bytes(OmegaConf.to_yaml(config, resolve=True).encode())
        assert is_finished(folder, config) == (marked and stored)
        changed = config.copy()
        OmegaConf.update(changed, name, other, force_add=True)
        differ = str(flatten(changed)) != str(flatten(config))
        assert not differ or not is_finished(folder, changed)


@cases(150)
@given(st.integers(1, 5), st.integers(-1, 3), st.booleans(), st.integers(0, 8), st.booleans(), st.integers(0, 5))
def test_a_run_that_stopped_anywhere_has_something_left(total, test_freq, before, missing, resumed, only):
    """Rows in the order in which verl logs them; a resumed checkpoint is evaluated in a line of its own."""
    rows = [{"step": 0, "val-core/x/acc/mean@1": 0.5}] if before else []
    for step in range(1, total + 1):
        row = {"step": step, "actor/grad_norm": 1.0, "timing_s/step": 2.0}
        evaluated = {"val-core/x/acc/mean@1": 0.5} if test_freq > 0 and (step % test_freq == 0 or step == total) else {}
        if evaluated and resumed:
            rows += [row, {"step": step} | evaluated]
        else:
            rows.append(row | evaluated)
    events = max(len(rows) - missing, 0)
    trainer = {"total_training_steps": total, "test_freq": test_freq, "val_only": False}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "metrics.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:events]))
        left = what_is_left(Path(place), OmegaConf.create({"trainer": trainer}))
        assert (left == "") == (events >= len(rows)), left
        assert not left or "metrics.jsonl" in left
        # An evaluation alone is over with its row.
        path.write_text(
            "".join(json.dumps({"step": only} | row) + "\n" for row in [{"val-core/x/acc/mean@1": 0.5}][:events])
        )
        left = what_is_left(Path(place), OmegaConf.create({"trainer": trainer | {"val_only": True}}))
        assert (left == "") == (events > 0)
        path.unlink()
        assert what_is_left(Path(place), OmegaConf.create({"trainer": trainer})) == ""


@cases(100)
@given(
    st.one_of(st.none(), st.integers(0, 20).map(str), st.text(max_size=3), st.just("9" * 5000)),
    st.sampled_from(["auto", "disable", "resume_path"]),
)
def test_how_a_run_goes_on_names_its_checkpoint(text, mode):
    with tempfile.TemporaryDirectory() as place:
        if text is not None:
            Path(place, "latest_checkpointed_iteration.txt").write_text(text)
        how = how_to_continue(Path(place), mode)
    if text is None or not text.strip().isdecimal() or len(text) > 4000:
        assert how == "" or text.strip().lstrip("+-").isdecimal()
    else:
        assert how.endswith(f" continues from global_step_{int(text)}")
        assert ("trainer.resume_mode=auto" in how) == (mode != "auto")


# Sweeps ---------------------------------------------------------------------------------------------------------------

TRIED = ["data.train_batch_size", "actor_rollout_ref.rollout.temperature", "actor_rollout_ref.actor.optim.betas"]
a_job = st.tuples(
    st.dictionaries(st.sampled_from(TRIED), st.sampled_from([1, 1.0, 0.5, None, math.nan, [0.9, 1], [0.9, 1.0]])),
    st.sampled_from(["grpo", "dapo"]),
    st.sets(st.sampled_from(["algorithm=grpo", "algorithm=dapo", "+x=1", "x=2"]), max_size=2),
)  # fmt: skip


def alike(a, b):
    return a == b or str(a) == str(b) == "nan"


@cases(150)
@given(st.lists(a_job, max_size=4))
@example([({TRIED[1]: 1}, "grpo", set()), ({TRIED[1]: 1.0}, "dapo", set())])
def test_an_unequal_comparison_is_told_with_its_numbers(drawn):
    jobs = []
    for values, algorithm, swept in drawn:
        config = OmegaConf.create({"verl_ext": {"algorithm": algorithm}})
        for name, x in values.items():
            OmegaConf.update(config, name, x, force_add=True)
        jobs.append((config, swept))
    line = sweep.unequal(jobs)
    pairs = [
        {name for name in TRIED if not alike(a.get(name), b.get(name))}
        for a, _, of_a in drawn
        for b, _, of_b in drawn
        if {o for o in of_a if "algorithm" not in o} == {o for o in of_b if "algorithm" not in o}
    ]
    assert (line == "") == (not any(pairs)) and "\n" not in line
    told = {name for name in TRIED if f"{name} (" in line}
    assert not line or told and any(told >= pair for pair in pairs if pair) and told <= set().union(*pairs)


@cases(60)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b/c", "/nowhere/d"]),
        st.sampled_from(["done, 3 s", "finished before", "FAILED with status 1, 2 s", "FAILED: it ended early, 1 s"]),
    )
)
def test_a_sweep_fails_if_a_job_did(outcome):
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "OUTCOME", {Path.cwd() / name: state for name, state in outcome.items()})
        failed = [name for name, state in outcome.items() if state.startswith("FAILED")]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            with pytest.raises(SystemExit, match="1") if failed else contextlib.nullcontext():
                sweep.sum_up()
    lines = said.getvalue().splitlines()
    assert lines[:1] == ["sweep:"] * bool(outcome)
    assert lines[1 : len(outcome) + 1] == [f"  {state}: {name}" for name, state in outcome.items()]
    assert not failed or f"{len(failed)} of {len(outcome)} jobs failed" in lines[-1]
