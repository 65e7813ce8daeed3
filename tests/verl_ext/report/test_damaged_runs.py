"""Damaged runs and what is no run: each is named with its fault, and the others are reported."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from verl_ext.report import __main__ as report
from verl_ext.report.read import read_run, read_runs
from verl_ext.report.tables import pass_table
from verl_ext.runs import folder as runs

METRICS = {
    "no step": (b'{"critic/score/mean": 1}\n', "line 22, has no step"),
    "null": (b"null\n", "line 22, is not a JSON object"),
    "number": (b"17\n", "line 22, is not a JSON object"),
    "list": (b'[{"step": 21}]\n', "line 22, is not a JSON object"),
    "text as step": (b'{"step": "21"}\n', "line 22, has step='21'"),
    "null as step": (b'{"step": null}\n', "line 22, has step=None"),
    "truth as step": (b'{"step": true}\n', "line 22, has step=True"),
    "NaN as step": (b'{"step": NaN}\n', "line 22, has step=nan"),
    "half a step": (b'{"step": 20.5}\n', "line 22, has step=20.5"),
    "negative step": (b'{"step": -1}\n', "line 22, has step=-1"),
    "huge step": (b'{"step": 1' + 400 * b"0" + b"}\n", "line 22, has step=1000"),
    "infinite step": (b'{"step": 1e999}\n', "line 22, has step=inf"),
    "no UTF-8": (b'{"step": 21, "a": "\xff\xfe"}\n', "line 22, is not UTF-8: invalid start byte"),
    "no UTF-8, no line end": (b"\xff\xfe{", "line 22, is not UTF-8"),
    "no UTF-8 in half a line": (b'{"step": 21, "\xff', "line 22, is not UTF-8"),
    "zeros": (512 * b"\0", "line 22, is not JSON"),
    "half a line, and others": (b'{"step": 21, "cri\n{"step": 22}\n', "line 22, is not JSON"),
    "deep": (b'{"step":' + 100_000 * b"[" + b"\n", "line 22, is not JSON"),
    "long number": (b'{"step": ' + 5000 * b"1" + b"}\n", "line 22, is not JSON"),
}

CONFIGS = {
    "empty": (b"", "holds no settings"),
    "null": (b"null\n", "holds no settings"),
    "list": (b"- a\n- b\n", "holds no settings"),
    "text": (b"seed\n", "holds no settings"),
    "number": (b"5\n", "cannot be read: Invalid loaded object type: int"),
    "broken": (b"a: [1\n", "cannot be read as settings: line 2: expected ',' or ']'"),
    "tab": (b"a:\n\t- b\n", "cannot be read as settings: line 2: found character '\\t'"),
    "twice": (b"a: 1\na: 2\n", "cannot be read as settings: line 2: found duplicate key a"),
    "no UTF-8": (b"a: \xff\n", "cannot be read as settings: 'utf-8' codec can't decode byte 0xff"),
    "no such key": (b"a: ${b}\n", "cannot be read as settings: Interpolation key 'b' not found full_key: a"),
    "no such resolver": (b"a: ${nope:1}\n", "cannot be read as settings: Unsupported interpolation type nope"),
    "no interpolation": (b"a: '${'\n", "cannot be read as settings: no viable alternative"),
    "itself": (b"&a\nx: *a\n", "cannot be read as settings: maximum recursion depth"),
    "python": (b"a: !!python/object/apply:os.getcwd []\n", "cannot be read as settings: line 1: could not determine"),
    "odd value": (b"a: !!timestamp x\n", "cannot be read as settings"),
}

DUMPS = {
    "no score": (b'{"input": "a"}\n', "line 9, has acc or score=None; it must be a number"),
    "null as score": (b'{"input": "a", "score": null}\n', "line 9, has acc or score=None"),
    "text as score": (b'{"input": "a", "score": 1.0, "acc": "1"}\n', "line 9, has acc='1'"),
    "NaN as score": (b'{"input": "a", "score": NaN}\n', "line 9, has score=nan"),
    "infinite score": (b'{"input": "a", "score": Infinity}\n', "line 9, has score=inf"),
    "list as score": (b'{"input": "a", "acc": [1]}\n', "line 9, has acc=[1]"),
    "no input": (b'{"score": 1.0}\n', "line 9, has no text as input"),
    "messages as input": (b'{"input": [{"role": "user"}], "score": 1.0}\n', "line 9, has no text as input"),
    "null": (b"null\n", "line 9, is not a JSON object"),
    "no JSON": (b'{"input": "a", "sco\n', "line 9, is not JSON"),
    "no UTF-8": (b'{"input": "\xe4", "score": 1.0}\n', "line 9, is not UTF-8"),
}


def run_report(tmp_path: Path, *folders: Path) -> tuple[int, str, str]:
    """The command's status, report.md and report.html."""
    status = report.main([*map(str, folders), "--out", str(tmp_path / "out")])
    return status, *((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))


@pytest.fixture
def damage(make):
    """``damage(name)``: a run damaged in the way of that name, and what its fault says."""

    def run(name: str) -> tuple[Path, str]:
        folder = make("disco", 1, name=name.replace(",", "").replace(" ", "_"))
        kind, _, which = name.partition(": ")
        if kind == "metrics":
            with open(folder / runs.METRICS_FILE, "ab") as f:
                f.write(METRICS[which][0])
            return folder, f"{runs.METRICS_FILE}, {METRICS[which][1]}"
        if kind == "settings":
            (folder / runs.CONFIG_FILE).write_bytes(CONFIGS[which][0])
            return folder, f"{runs.CONFIG_FILE} {CONFIGS[which][1]}"
        (folder / which).unlink()
        if kind == "missing":
            return folder, f"is not a run: it has no {which}; give trainer.default_local_dir of runs"
        (folder / which).mkdir()
        return folder, f"{which} cannot be read: Is a directory"

    return run


DAMAGED = (
    *(f"metrics: {name}" for name in METRICS),
    *(f"settings: {name}" for name in CONFIGS),
    *(f"directory: {file}" for file in (runs.CONFIG_FILE, runs.METRICS_FILE)),
    f"missing: {runs.CONFIG_FILE}",
)


@pytest.mark.parametrize("name", DAMAGED)
def test_the_fault_of_a_damaged_run_is_one_sentence_with_its_file(damage, name):
    folder, fault = damage(name)
    with pytest.raises(ValueError) as error:
        read_run(folder)
    message = str(error.value)
    assert message.startswith(str(folder)) and fault in message and "\n" not in message


def test_damaged_runs_are_named_and_left_out_of_a_report_of_the_others(make, damage, tmp_path, capsys):
    make("ppo", 1, name="whole")
    faults = dict(damage(name) for name in DAMAGED)
    status, text, page = run_report(tmp_path, tmp_path)
    assert status == 0 and "1 runs. All finished." in text and "| ppo | final (step 20) | 1 | 80.0 |" in text
    error = capsys.readouterr().err.rstrip("\n").split("\n")
    assert len(error) == len(faults) == text.count("| left out: ") == page.count("<td>left out: ")
    for folder, fault in faults.items():
        rows = [line for line in text.split("\n") if line.startswith(f"| {report.plain(folder.name)} | left out: ")]
        assert len(rows) == 1 and report.plain(fault) in rows[0]
        assert f"<td>{folder.name}</td>" in page
        assert any(line.startswith(f"{folder}: left out: ") and report.one_line(fault) in line for line in error)


def test_what_may_not_be_read_is_named(make, monkeypatch):
    folder, opened = make("disco", 1), open

    def refuse(file, *args, **kwargs):
        if str(file) == str(folder / runs.METRICS_FILE):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *args, **kwargs)

    # For root, every file is readable.
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"metrics\.jsonl cannot be read: Permission denied$"):
        read_run(folder)


@pytest.mark.parametrize("name", DUMPS)
def test_a_damaged_dump_costs_a_run_its_stored_responses_alone(make, name):
    line, fault = DUMPS[name]
    folder = make("disco", 1, right={0: {"a": 0.5, "b": 0.25}, 20: {"a": 1, "b": 0.5}})
    with open(folder / "validation/20.jsonl", "ab") as f:
        f.write(line)
    (run,), damaged = read_runs([folder])
    assert not damaged and not run.faults and len(run.answers(0)) == 2
    assert not len(run.answers(20)) and not len(run.answers(0)) and not run.dumps
    assert run.faults == [f"{folder}/validation/20.jsonl, {run.faults[0].split('.jsonl, ')[1]}"]
    assert fault in run.faults[0] and run.faults[0].endswith("; its stored responses are left out")


def test_a_run_with_a_damaged_dump_is_reported_without_the_tables_from_it(make, tmp_path, capsys):
    right = {0: {"a": 0.5, "b": 0.25}, 20: {"a": 1, "b": 0.5}}
    damaged = make("disco", 1, right=right)
    make("ppo", 1, right=right)
    with open(damaged / "validation/20.jsonl", "a") as f:
        f.write('{"input": "a"}\n')
    status, text, _ = run_report(tmp_path, tmp_path)
    assert status == 0 and "2 runs. All finished." in text and "| disco | final (step 20) | 1 | 80.0 |" in text
    row = next(line for line in text.split("\n") if line.startswith("| disco-1 | "))
    assert "20.jsonl, line 9, has acc or score=None; it must be a number; its stored responses are left out |" in row
    # pass@2 of 4 and of 2 right of 4: (1 + 5/6) / 2
    assert "| ppo | final (step 20) | 1 | 91.7" in text and "| ppo | +25.0 | +50.0 |" in text
    for table in ("## pass@2", "## pass@4", "## Gain by difficulty"):
        assert "disco" not in text.split(table)[1].split("## ")[0].replace("DisCO", "")
    assert "line 9, has acc or score=None" in capsys.readouterr().err
    assert "validation_data_dir" not in text


def test_an_empty_dump_is_damaged(make):
    folder = make("disco", 1, right={0: {"a": 0.5}, 20: {"a": 1}})
    (folder / "validation/0.jsonl").write_text("")
    (run,), _ = read_runs([folder])
    assert not len(run.answers(0)) and not len(run.answers(20)) and not run.dumps
    assert run.faults == [f"{folder}/validation/0.jsonl holds no responses; its stored responses are left out"]


HALVES = [b'{"step": 21, "cri', b"{", '{"step": 21, "é'.encode()[:-1], b'{"step": 2']


@pytest.mark.parametrize("half", HALVES)
def test_half_a_last_line_is_no_damage(make, half):
    folder = make("disco", 1, name="going")
    with open(folder / runs.METRICS_FILE, "ab") as f:
        f.write(half)
    (run,), damaged = read_runs([folder])
    assert not damaged and not run.faults and run.metrics.index.max() == 20


def test_a_last_line_without_its_end_empty_lines_and_a_byte_order_mark_are_read(make):
    folder = make("disco", 1)
    metrics = folder / runs.METRICS_FILE
    metrics.write_bytes(b"\xef\xbb\xbf" + metrics.read_bytes() + b'\r\n\n{"step": 21.0, "critic/score/mean": 7}')
    (run,), damaged = read_runs([folder])
    assert not damaged and run.metrics.loc[21, "critic/score/mean"] == 7 and 0 in run.metrics.index


def test_of_a_step_logged_twice_the_last_stands(make):
    folder = make("disco", 1)
    with open(folder / runs.METRICS_FILE, "a") as f:
        # As verl evaluates a checkpoint again on resuming, and as a run goes on from there.
        f.write('{"step": 20, "val-core/toy/acc/mean@4": 0.6}\n{"step": 15, "critic/score/mean": 0.1}\n')
    (run,), damaged = read_runs([folder])
    assert not damaged and list(run.metrics.index) == list(range(21))
    assert run.metrics.loc[20, "val-core/toy/acc/mean@4"] == 0.6 and run.metrics.loc[20, "critic/score/mean"] == 1
    assert run.metrics.loc[15, "critic/score/mean"] == 0.1
    assert pass_table([run], last=2).loc[("disco", "final (step 20)"), "toy"] == "60.0"


def test_values_that_are_no_numbers_are_left_out_and_counted(make, tmp_path):
    folder = make("disco", 1)
    row = {"step": 21, "critic/score/mean": "<b>", "timing_s/step": None, "a": [1], "actor/entropy": 10**400}
    with open(folder / runs.METRICS_FILE, "a") as f:
        f.write(json.dumps(row) + '\n{"step": 22, "critic/score/mean": NaN, "disco/kl": -Infinity}\n')
    status, text, _ = run_report(tmp_path, folder)
    assert status == 0
    assert "4 values that are not numbers are left out, first critic/score/mean='\\<b\\>' at step 21 |" in text
    (run,), _ = read_runs([folder])
    assert run.column("critic/score/mean").index.max() == 20 and run.column("disco/kl").index.max() == 20


def test_another_number_of_samples_after_resuming_keeps_the_evaluations_before(make):
    folder = make("disco", 1)
    with open(folder / runs.METRICS_FILE, "a") as f:
        f.write('{"step": 21, "val-core/toy/acc/mean@16": 0.65}\n')
    (run,), _ = read_runs([folder])
    assert run.pass_at_1["toy"].to_dict() == {0: 0.5, 10: 0.9, 15: 0.7, 20: 0.8, 21: 0.65}


def test_with_no_run_left_the_status_is_1_and_each_is_named(make, tmp_path, capsys):
    (make("disco", 1, name="a") / runs.CONFIG_FILE).write_text("")
    (make("disco", 2, name="b") / runs.METRICS_FILE).write_text("null\n")
    with pytest.raises(SystemExit) as ended:
        report.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert ended.value.code == "nothing to report: no run is readable"
    error = capsys.readouterr().err
    assert "a/config.yaml holds no settings" in error and "b/metrics.jsonl, line 1, is not a JSON object" in error
    assert not (tmp_path / "out").exists()


def test_folders_without_runs_are_named_and_the_others_reported(make, tmp_path, capsys):
    whole, empty, file = make("disco", 1), tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.touch()
    status, text, _ = run_report(tmp_path, whole, empty, tmp_path / "missing", file)
    assert status == 0 and "1 runs." in text
    assert "| empty | left out: " in text and "empty holds no run: no config.yaml of a run is in or below it" in text
    error = capsys.readouterr().err
    assert (
        "missing is not a run: it has no config.yaml" in error and "file is not a run: it has no config.yaml" in error
    )


def test_a_folder_that_cannot_be_listed_is_named_and_the_others_reported(make, tmp_path, capsys, monkeypatch):
    make("disco", 1)
    closed, listed = tmp_path / "closed", os.scandir
    closed.mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    def refuse(path="."):
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    # For root, every folder is open.
    monkeypatch.setattr("os.scandir", refuse)
    status, text, _ = run_report(tmp_path, tmp_path, tmp_path / "loop")
    assert status == 0 and "1 runs." in text and "| closed | left out: " in text and "| loop | left out: " in text
    assert "closed is not a run" in capsys.readouterr().err


def test_folders_of_wandb_hydra_and_checkpoints_are_no_runs(make, tmp_path, capsys):
    run = make("disco", 1)
    wandb = {"seed": {"desc": None, "value": 1}, "trainer": {"desc": None, "value": {"default_local_dir": "x"}}}
    settings = (run / runs.CONFIG_FILE).read_text()
    for folder, text in {
        "wandb/run-20260101_000000-abc/files": json.dumps(wandb),
        "wandb/offline-run-20260101_000000-abd/files": "a: [",
        "elsewhere": json.dumps(wandb),
        "lightning": "model: x",
        "disco-1/wandb/run-20260101_000000-abe/files": json.dumps(wandb),
        "disco-1/hydra/.hydra": settings,
        "disco-1/hydra/named": settings,
        "disco-1/global_step_10/actor/huggingface": settings,
    }.items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / runs.CONFIG_FILE).write_text(text)
        if "wandb" in folder or "global_step" in folder:
            # As wandb.save copies it.
            shutil.copy(run / runs.METRICS_FILE, tmp_path / folder)
    (tmp_path / "disco-1/hydra/named/overrides.yaml").write_text("[]")
    assert report.find_runs([tmp_path]) == ([run], {})
    assert report.find_runs([tmp_path / "wandb"])[0] == []
    assert "1 runs. All finished." in run_report(tmp_path, tmp_path)[1] and capsys.readouterr().err == ""
    # What is below a run, or is called like a checkpoint, may be a run all the same.
    for name in ("disco-1/evaluation", "evaluate/global_step_40"):
        shutil.copytree(run, tmp_path / name, ignore=lambda folder, names: [n for n in names if n != "config.yaml"])
    found, _ = report.find_runs([tmp_path])
    assert {str(f.relative_to(tmp_path)) for f in found} == {"disco-1", "disco-1/evaluation", "evaluate/global_step_40"}


def test_a_run_that_is_named_twice_counts_once(make, tmp_path):
    run = make("disco", 1)
    (tmp_path / "link").symlink_to(run)
    assert len(report.find_runs([run, tmp_path, tmp_path / "link"])[0]) == 1


def test_odd_values_of_settings_are_text_and_stop_nothing(make, tmp_path):
    odd = {
        "data.seed": [1, 2],
        "disco.constraint": "squared_hinge",
        "disco.delta": "wide",
        "trainer.validation_data_dir": 5,
        "trainer.total_training_steps": "<i>",
    }
    make("../../x", 1, name="a", **odd)
    make("$\\frac{$", 1, name="b", **{"disco.score": "$\\nope{|\ud800\x1b[31m"})
    third = make("$\\frac{$", 2, name="c\udcff\n# d", finished=False)
    metrics = (third / runs.METRICS_FILE).read_text()
    (third / runs.METRICS_FILE).write_text(metrics.replace("val-core/toy", "val-core/\\ud800 | <u>\\u001b"))
    (third / "validation").mkdir()
    line = {"input": "\ud800", "data_source": "\udfff", "score": 1}
    (third / "validation/20.jsonl").write_text(2 * (json.dumps(line) + "\n") + "null\n" + "{}\n")
    (third / "validation/0.jsonl").write_text(2 * (json.dumps(line) + "\n"))
    (run,), _ = read_runs([third])
    assert list(run.answers(0)["samples"]) == [2]
    status, text, page = run_report(tmp_path, tmp_path)
    assert status == 0 and "3 runs." in text and "\x1b" not in text and "\n# d" not in text
    assert "| c� # d | $\\\\frac{$ (score=log_l) | 2 |" in text and "val-core" not in text
    assert not re.search("<[iu]>", page.split("</style>")[1])


def test_wrong_arguments_are_refused(make, tmp_path, capsys):
    run = make("disco", 1)
    (tmp_path / "file").touch()
    for arguments, message in ((["--last", "0"], "--last 0 must be at least 1"), (["--out", "file"], "is a file")):
        arguments = [str(tmp_path / a) if a == "file" else a for a in arguments]
        with pytest.raises(SystemExit) as ended:
            report.main([str(run), *arguments])
        assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("fits", [0, 1000, 20_000])
def test_a_full_disk_is_named_and_the_earlier_report_stays(make, tmp_path, full_disk, fits):
    make("grpo", 1), make("grpo", 2)
    arguments = [str(tmp_path), "--out", str(tmp_path / "report")]
    assert report.main(arguments) == 0
    before = {f: f.read_bytes() for f in sorted((tmp_path / "report").rglob("*")) if f.is_file()}
    with full_disk(fits), pytest.raises(SystemExit, match="error: --out .* cannot be written: .*File too large"):
        report.main(arguments)
    assert {f: f.read_bytes() for f in sorted((tmp_path / "report").rglob("*")) if f.is_file()} == before
