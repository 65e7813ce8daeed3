"""Benchmarks that guard: results as files, their comparison, and the page that is made from them."""

import argparse
import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RECORDS = sorted(file.stem for file in (BENCHMARKS / "results").glob("*.json"))
SCRIPTS = sorted(file.stem for file in BENCHMARKS.glob("*.py") if "__main__" in file.read_text())


@pytest.fixture
def load(monkeypatch):
    """``load(name)``: a script of the folder, as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def module(name: str):
        return sys.modules.get(name) or importlib.import_module(name)

    before = set(sys.modules)
    yield module
    # Their names are too general to stay importable.
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture
def made(load):
    """``made(figures, **changes)``: a result on some machine."""
    r = load("record")

    def make(figures: dict, **changes):
        values = dict(
            date="2026-01-01",
            command="python benchmarks/x.py",
            machine={"cores": 2},
            versions={"torch": "2"},
            settings={},
        )
        return r.Result(name="x", figures=figures, **(values | changes))

    return make


@pytest.fixture
def kinds(load):
    """``kinds(before, after)``: how many lines of each kind a comparison gives."""
    return lambda *results, **options: Counter(
        kind for kind, _ in load("compare").compare(*({r.name: r} if r else {} for r in results), **options)
    )


def test_what_is_recorded_is_read_again(load, tmp_path, monkeypatch, capsys):
    r = load("record")
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "x.py"), "--data=/a/home/of/b.parquet", "/a/home/x,seed=1", "3"])
    figures = {
        "exact, all": r.Figure(1.2345678, low=1.2, high=1.3, target=1.2),
        "rate": r.Figure(5, "per second", better="higher", target=4),
    }
    file = r.record("x", figures, {"rows": 8}, folder=tmp_path)
    result = r.read_folder(tmp_path)["x"]
    assert file.name == "x.json" and result.settings == {"rows": 8}
    assert result.figures["exact, all"] == r.Figure(1.23457, low=1.2, high=1.3, target=1.2)
    assert [f.missed for f in result.figures.values()] == [True, False]
    # Repeats are raw data: in their order, on one line, and no part of a comparison.
    f = r.Figure.of([3.0, 1.0, 2.0], "s")
    assert r.Figure(**{**dataclasses.asdict(f), "repeats": None}) == f and f.repeats == [3, 1, 2]
    again = dataclasses.replace(result, figures={"x": f})
    assert '"repeats": [3.0, 1.0, 2.0]\n' in again.dump() and r.Result.load(again.dump()).figures["x"].repeats == [
        3,
        1,
        2,
    ]
    # Nothing that names this machine's user or folders.
    assert result.command == "python benchmarks/x.py --data=b.parquet x,seed=1 3"
    assert "home" not in file.read_text()
    assert result.machine.keys() == {"processor", "cores", "memory GiB", "accelerator"}
    assert {"python", "torch", "verl", "ray", "transformers", "verl-disco", "revision"} == result.versions.keys()
    assert "exact, all  1.23 (1.2 to 1.3) ratio (at most 1.2, missed)" in capsys.readouterr().out
    assert r.Figure.of(range(11), "s") == r.Figure(5, "s", low=1, high=9)
    assert r.Figure.of([3, 1, 2]) == r.Figure(2, low=1, high=3)
    assert r.Figure.of([3]) == r.Figure(3)
    with pytest.raises(ValueError, match="no figures"):
        r.record("y", {}, folder=tmp_path)
    with pytest.raises(ValueError, match="give both, in this order"):
        r.Figure(1, low=2, high=3)


@pytest.mark.parametrize(
    "before, after, expected",
    [
        # Ranges that overlap, that touch, and that do not
        ((1.20, "ratio", 1.15, 1.25), (1.28, "ratio", 1.22, 1.34), "same"),
        ((1.20, "ratio", 1.15, 1.25), (1.30, "ratio", 1.25, 1.35), "same"),
        ((1.20, "ratio", 1.15, 1.25), (1.31, "ratio", 1.26, 1.36), "worse"),
        ((1.31, "ratio", 1.26, 1.36), (1.20, "ratio", 1.15, 1.25), "better"),
        # Repeats that happened to agree: 1 % to each side
        ((1.00, "ratio", 0.9999, 1.0001), (1.019, "ratio", 1.0189, 1.0191), "same"),
        ((1.00, "ratio", 0.9999, 1.0001), (1.025, "ratio", 1.0249, 1.0251), "worse"),
        # No noise told: 5 %
        ((100.0, "MiB"), (109.0, "MiB"), "same"),
        ((100.0, "MiB"), (112.0, "MiB"), "worse"),
        # Measured once
        ((1.0, "ratio", 1.0, 1.0), (1.09, "ratio", 1.09, 1.09), "same"),
        ((1.0, "ratio", 1.0, 1.0), (1.12, "ratio", 1.12, 1.12), "worse"),
        # Exact
        ((100, "rows", 100, 100), (101, "rows", 101, 101), "worse"),
        ((100, "rows", 100, 100), (100, "rows", 100, 100), "same"),
        ((0, "failures"), (1, "failures"), "worse"),
        ((1e-6, "relative error"), (2.9e-6, "relative error"), "same"),
        ((1e-6, "relative error"), (3.1e-6, "relative error"), "worse"),
    ],
)
def test_worse_is_beyond_the_noise_of_both(load, before, after, expected):
    figure, verdict = load("record").Figure, load("compare").verdict
    assert verdict(figure(*before), figure(*after)) == expected
    opposite = {"worse": "better", "better": "worse", "same": "same"}[expected]
    assert verdict(figure(*before, better="higher"), figure(*after, better="higher")) == opposite
    assert verdict(figure(*before, better="neither"), figure(*after, better="neither")) == "same"


def test_times_are_compared_on_one_machine_only(load, made, kinds):
    figure = load("record").Figure
    units = ("s", "ms per step", "per second", "tokens/s", "ratio", "MiB", "tests", "nats per token", "%")
    before, after = ({u: figure(value, u) for u in units} for value in (1.0, 2.0))
    assert kinds(made(before), made(after)) == {"worse": 9}
    assert kinds(made(before), made(after, machine={"cores": 4})) == {"worse": 5, "skipped": 4, "note": 1}
    assert kinds(made(before), made(after), times=False) == {"worse": 5, "skipped": 4}


def test_what_is_missing_new_or_beyond_its_target_is_named(load, made):
    figure, compare = load("record").Figure, load("compare").compare
    before = made({"gone": figure(1), "stays": figure(1), "unit": figure(1, "s")}, settings={"rows": 8})
    after = made(
        {"stays": figure(1, target=0.9), "unit": figure(1, "ms"), "added": figure(1, better="higher", target=2)},
        settings={"rows": 16},
        versions={"torch": "3", "revision": "a"},
    )
    assert compare({"x": before}, {"x": after}) == [
        ("note", "x: other settings: rows 8 -> 16"),
        ("note", "x: other versions: torch 2 -> 3"),
        ("missing", "x: gone"),
        ("same", "x: stays: 1 -> 1 ratio, +0.0 %"),
        ("missing", "x: unit: s before, ms now"),
        ("new", "x: added"),
        ("target", "x: stays: 1 ratio, at most 0.9, missed"),
        ("target", "x: added: 1 ratio, at least 2, missed"),
    ]
    assert compare({"x": before}, {}) == [("missing", "x: all figures")]
    assert compare({}, {"x": before}) == [("new", "x: all figures")]


def test_the_command_finds_a_regression_between_folders_and_revisions(load, made, tmp_path):
    figure = load("record").Figure
    for name, value in (("before", 1.0), ("noise", 1.05), ("after", 1.2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(
            made({"exact": figure(value, low=value - 0.04, high=value + 0.04)}).dump()
        )

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, str(BENCHMARKS / "compare.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    code, text = run("before", "after")
    assert code == 1 and "worse    x: exact: 1 (0.96 to 1.04) -> 1.2 (1.16 to 1.24) ratio, +20.0 %\n1 worse, 0 " in text
    code, text = run("before", "noise")
    assert code == 0 and text.startswith("0 worse, 0 better, 1 within their noise")
    code, text = run("nowhere")
    assert code == 1 and text.startswith("nowhere is neither a folder nor a git revision")
    if (BENCHMARKS.parent / ".git").exists():
        code, text = run("HEAD", "HEAD")
        assert code == 0 and text.splitlines()[-1].startswith("0 worse, 0 better, ")


def test_the_page_is_made_from_text_and_files(load, made):
    r, results = load("record"), load("results")
    grid = {
        f"{row}, {column}": r.Figure(1.5, u)
        for row in ("a", "b")
        for column, u in (("time", "ratio"), ("space", "MiB"))
    }
    settings = {"rows": [8, 16], "theory": {"a": 1, "b": 2}}
    page = results.make("# T\n\n{{x}}\n\nIt takes {{x: a, space}}.\n", {"x": made(grid, settings=settings)})
    assert page.startswith(
        "# T\n\n`python benchmarks/x.py`; rows: 8, 16; theory: a 1, b 2\n\n|  | time | space |\n| --- | --- | --- |\n"
        "| a | 1.5 | 1.5 MiB |\n| b | 1.5 | 1.5 MiB |\n\nIt takes 1.5 MiB.\n\n## Where and when\n\n"
        "- cores 2; torch 2: `x` (2026-01-01, revision unknown)\n"
    )
    # A list where cells would be empty; what the text does not name is not lost.
    page = results.make("# T\n", {"x": made({"a, b": r.Figure(2.0, target=1), "c": r.Figure(3)})})
    assert (
        "## x\n\n" in page
        and "|  |  | target |\n| --- | --- | --- |\n| a, b | 2 | at most 1, missed |\n| c | 3 |  |\n" in page
    )
    two = results.make("{{x_*}}\n", {f"x_{n}": made({"f": r.Figure(n)}) for n in (1, 2)})
    assert "| f | 1 |\n\n`python benchmarks/x.py`\n" in two and two.count("| f |") == 2
    assert "Not measured yet." in results.make("{{y*}}", {})
    for text in ("{{y}}", "{{x: y}}"):
        with pytest.raises(SystemExit, match="RESULTS.in.md names"):
            results.make(text, {"x": made(grid)})


def test_the_committed_page_is_what_the_files_give(load):
    made = load("results").make((BENCHMARKS / "RESULTS.in.md").read_text(), load("record").read_folder())
    assert (BENCHMARKS / "RESULTS.md").read_text() == made, "run python benchmarks/results.py"


def test_the_text_of_the_page_says_what_its_figures_say(load):
    page, results = " ".join((BENCHMARKS / "RESULTS.in.md").read_text().split()), load("record").read_folder()
    plain, checkpointing, fits, published = (
        {key: f.value for key, f in results[name].figures.items()}
        for name in (
            "update_time_1_rank",
            "update_time_1_rank_checkpointing",
            "update_fits_1_rank",
            "published_schedule_measured",
        )
    )
    all_mixed = "exact, 100% mixed"
    missed = [r[all_mixed] - t for r, t in ((checkpointing, 1.2), (plain, 1.25))]
    assert f"misses its targets by {missed[0]:.2f} and {missed[1]:.2f}" in page
    # Of three of four mini-batches
    measuring = [r[f"measuring, of {all_mixed}"] * r[all_mixed] for r in (checkpointing, plain)]
    a, b = (m * 4 / 3 for m in measuring)
    assert f"takes {a:.2f} of a GRPO mini-batch with gradient checkpointing and {b:.2f} without" in page
    assert "All else that is ours takes less than a hundredth." in page
    assert all(r[all_mixed] - 1 - m < 0.01 for r, m in zip((checkpointing, plain), measuring, strict=True))
    per_token = {tokens: fits[f"{tokens} tokens"] / tokens for tokens in (64509, 262370)}
    assert f"262k tokens take {per_token[262370] / per_token[64509]:.1f} times as long per token as 64k" in page
    assert "is faster than ours where all groups are mixed, and slower where half are" in page
    assert published["padding removed / exact, 100% mixed"] < 1 < published["padding removed / exact, 50% mixed"]


ROOT = BENCHMARKS.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipe/disco/README.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
STATED = re.compile(r'\[([^\]]+)\]\(([^)\s]+)\s"(\w+): ([^"]+)"\)')


def test_a_figure_in_a_document_is_the_recorded_one(load):
    """[39 %](benchmarks/RESULTS.md "quickstart: pass@1, all levels, before"): the title says which figure it is.

    Its bounds may stand beside it: [1.1 (-1.4 to 3.5) points](...).
    """
    r, unitless = load("record"), load("results").UNITLESS
    results, found = r.read_folder(), 0
    for document in DOCUMENTS:
        for shown, link, name, key in STATED.findall(document.read_text()):
            figure = results[name].figures[" ".join(key.split())]
            unit = "" if figure.unit in (*unitless, "nats per token") else f" {figure.unit}"
            bounds = "" if figure.low is None else f" ({r.number(figure.low)} to {r.number(figure.high)})"
            value = r.number(figure.value)
            assert shown in (value + unit, value + bounds + unit), f"{document.name}: {name}: {key}"
            assert (document.parent / link).resolve() == BENCHMARKS / "RESULTS.md"
            found += 1
    assert found > 5


@pytest.mark.parametrize("name", RECORDS)
def test_a_recorded_command_can_be_given_again(load, name, monkeypatch):
    python, script, *arguments = shlex.split(load("record").read_folder()[name].command)
    assert python == "python" and (ROOT / script).exists()
    parse, seen = argparse.ArgumentParser.parse_args, []

    def stop(self, *given):
        seen.append(parse(self, *given))
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    # As Python does.
    monkeypatch.syspath_prepend((ROOT / script).parent)
    with pytest.raises(InterruptedError):
        load(Path(script).stem).main()
    # Raw data is committed.
    assert seen and all((ROOT / a).exists() for a in arguments if a.startswith("benchmarks/"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_says_how_it_is_called(load, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        load(name).main()
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"python benchmarks/{name}.py" in text


def run_of(folder: Path) -> Path:
    """A run of the arithmetic task with 12 steps, each slower than the one before, that learns."""
    rows = [{"step": 0, "val-core/level_1/acc/mean@1": 0.5, "val-core/level_2/acc/mean@1": 0.1}]
    for step in range(1, 13):
        times = {"step": step, "timing_s/step": 2.0 + step, "timing_s/update_actor": 1.0, "timing_s/gen": 0.1}
        rows.append(times | {"disco/measure_seconds": 0.25, "actor/entropy": 1 / step})
    rows[-1] |= {"val-core/level_1/acc/mean@1": 0.9, "val-core/level_2/acc/mean@1": 0.7}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("arithmetic: {test_size: 200}\ntrainer: {total_training_steps: 12}\n")
    return folder


@pytest.fixture
def recorded(load, monkeypatch, tmp_path):
    """``recorded(name, *arguments)``: the results that a script records, by name."""

    def run(name: str, *arguments) -> dict:
        script, record = load(name), load("record").record
        found = tmp_path / "results"
        monkeypatch.setattr(script, "record", lambda *a, **k: record(*a, **k, folder=found))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        script.main()
        return load("record").read_folder(found)

    return run


def test_a_runs_steps_and_what_it_learned(recorded, tmp_path):
    found = recorded("step_time", run_of(tmp_path), "--name", "run", "--seconds", "354", "--skip", "2")
    steps, learned = found["run_steps"].figures, found["run"].figures
    assert dataclasses.astuple(steps["step"])[:4] == (9.5, "s", 6.0, 13.0)
    assert steps["generation, rewards, other"].value == 8.5
    assert steps["measuring passes, share of update_actor"].value == 0.25
    assert steps["training, pre-training included"].missed
    # sqrt(mean of p (1 - p) / 200) is 2.81 points with p of 92 / 104 and 72 / 104, of which 1.2816 are the percentile.
    after = learned["pass@1, all levels, after"]
    assert (after.value, after.better) == (80.0, "higher") and after.high - after.value == pytest.approx(
        3.597, abs=1e-3
    )
    assert learned["pass@1, level 2, before"].value == 10
    assert learned["entropy, after"].value == pytest.approx(sum(1 / n for n in range(8, 13)) / 5, rel=1e-5)


def test_raw_data_give_the_recorded_figures(recorded, load, tmp_path):
    with tarfile.open(BENCHMARKS / "raw/quickstart.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    committed = load("record").read_folder()
    seconds = re.search(r"--seconds (\S+)", committed["quickstart"].command)[1]
    recorded("step_time", tmp_path / "disco,seed=1", "--seconds", seconds)
    found = recorded("exactness", BENCHMARKS / "raw/exactness.jsonl")
    assert sorted(found) == ["exactness", "quickstart", "quickstart_steps"]
    for name, result in found.items():
        assert (result.figures, result.settings) == (committed[name].figures, committed[name].settings), name


def test_exactness_is_the_worst_of_an_engines_cases(recorded, tmp_path):
    lines = [{"name": "two ranks", "error": e} for e in (1e-6, 3e-5)] + [{"name": "LoRA", "error": 2e-6}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = recorded("exactness", tmp_path / "a.jsonl")["exactness"].figures
    assert {n: (f.value, f.missed) for n, f in figures.items()} == {
        "two ranks": (3e-5, True),
        "LoRA": (2e-6, False),
        "all engines": (3e-5, True),
        "cases": (3, False),
    }


def test_the_suites_time(recorded, tmp_path):
    report = '<testsuites><testsuite tests="12" failures="{}" errors="0" skipped="2" time="900"/></testsuites>'
    (tmp_path / "suite.xml").write_text(report.format(0))
    figures = recorded("suite", tmp_path / "suite.xml")["suite"].figures
    assert {n: f.value for n, f in figures.items()} == {"whole suite": 15, "passed": 10, "skipped": 2}
    (tmp_path / "suite.xml").write_text(report.format(1))
    with pytest.raises(SystemExit, match="1 failures"):
        recorded("suite", tmp_path / "suite.xml")


def test_what_runs_survived_is_counted(load):
    usage = {"memory": 10.0, "handles": 5, "threads": 3}
    lines = [
        {"kind": "life", "run": "ppo", "killed": True},
        {"kind": "life", "run": "ppo", "killed": True},
        # It had all of its steps before the kill.
        {"kind": "life", "run": "ppo", "killed": False},
        {"kind": "life", "run": "disco", "killed": True},
        {"kind": "life", "run": "colocate_async", "killed": True},
        {"kind": "end", "run": "ppo", "other_rows": [], "other_files": []},
        {"kind": "end", "run": "disco", "other_rows": [3, 4], "other_files": ["actor/a.pt"]},
        {"kind": "end", "run": "colocate_async", "other_rows": [7]},
        {"kind": "process", "mode": "", "steps": 300, "name": "a", "before": usage, "after": usage | {"memory": 12.5}},
        {"kind": "process", "mode": "", "steps": 300, "name": "b", "before": usage, "after": usage | {"handles": 4}},
        {"kind": "bytes per step", "mode": "", "steps": 300, "name": "output", "before": 100, "after": 90},
    ]
    found = {name: figure.value for name, figure in load("survival").figures_of(lines).items()}
    assert found == {
        "ppo, kills": 2,
        "ppo, differences at the end": 0,
        "disco, kills": 1,
        "disco, differences at the end": 3,
        "colocate_async, kills": 1,
        "colocate_async, differences at the end": 1,
        "bit for bit, kills": 3,
        "bit for bit, differences at the end": 3,
        "300 steps: largest gain of a process, memory": 2.5,
        "300 steps: largest gain of a process, handles": 0,
        "300 steps: largest gain of a process, threads": 0,
        "300 steps: processes": 2,
        "300 steps: bytes per step, output": 90,
    }
    assert load("survival").figures_of([]) == {}
