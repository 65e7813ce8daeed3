"""metrics.jsonl: whole lines, nothing lost, on full disks, after kills, and over restarts."""

import errno
import json
import os

import numpy as np
import pytest
import torch

from verl_ext.runs import files
from verl_ext.runs.folder import read_metrics
from verl_ext.training import metrics_log
from verl_ext.training.metrics_log import ROW_FILE, MetricsLog, as_line, is_evaluated, read_rows, read_unlogged


class Recorder:
    def __init__(self):
        self.logged = []

    def log(self, data, step):
        self.logged.append((step, data))

    def finish(self, exit_code=0):
        self.code = exit_code


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(path, *rows, resumed_step=0, **options):
    """What is in the file after a run that logs these rows."""
    log = MetricsLog(Recorder(), path, resumed_step, **options)
    for step, data in rows:
        log.log(data=data, step=step)
    log.finish()
    return lines(path)


def test_metrics_go_to_verls_loggers_and_to_the_file(tmp_path):
    path, tracking = tmp_path / "run" / "metrics.jsonl", Recorder()
    log = MetricsLog(tracking, str(path), resumed_step=0)
    log.log(data={"a": 1.5, "b": np.float32(2), "c": torch.tensor(3.0)}, step=1)
    log.log(data={"a": float("nan")}, step=2)
    log.finish(exit_code=0)
    assert [s for s, _ in tracking.logged] == [1, 2] and tracking.code == 0
    assert lines(path) == [{"step": 1, "a": 1.5, "b": 2.0, "c": 3.0}, {"step": 2, "a": None}]


def test_a_resumed_run_appends_and_drops_steps_that_it_runs_again(path, capsys):
    logged(path, *[(step, {"a": step}) for step in range(5)])
    with path.open("a") as f:
        f.write('{"step": 5, "a"')  # cut off in the middle of a line
    before = path.read_bytes()
    expected = [{"step": s, "a": a} for s, a in ((0, 0), (1, 1), (2, 2), (3, 30))]
    assert logged(path, (3, {"a": 30}), resumed_step=2) == expected
    assert (path.parent / "metrics.jsonl.1").read_bytes() == before
    assert f"kept as {path}.1; rows of steps to run again: 2; unreadable lines: 1" in capsys.readouterr().out


def test_a_fresh_run_starts_the_file_anew_and_keeps_the_old_ones(path):
    for run in (1, 2):
        path.write_text(f'{{"step":{run}}}\n')
        assert logged(path) == []
        assert (path.parent / f"metrics.jsonl.{run}").read_text() == f'{{"step":{run}}}\n'


def test_nothing_is_renamed_where_nothing_has_to_go(path):
    path.write_bytes(as_line(1, {"a": 1}))
    logged(path, (2, {"a": 2}), resumed_step=1)
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_an_evaluation_of_a_step_that_is_logged_is_not_dropped(path):
    path.write_bytes(as_line(1, {"a": 1}) + as_line(2, {"a": 2, "val-core/x": 1}))
    logged(path, (2, {"val-core/x": 5, "val-core/y": 6}), (3, {"a": 3}), resumed_step=2)
    rows = read_metrics(path.parent)
    assert rows == [{"step": 1, "a": 1}, {"step": 2, "a": 2, "val-core/x": 5, "val-core/y": 6}, {"step": 3, "a": 3}]
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_an_evaluation_alone_leaves_the_steps_of_a_half_trained_run(path):
    rows = b"".join(as_line(step, {"a": step}) for step in (1, 2, 3))
    path.write_bytes(rows)
    logged(path, (2, {"val-core/x": 5}), resumed_step=2, trains=False)
    assert [row["step"] for row in read_metrics(path.parent)] == [1, 2, 3]
    assert read_metrics(path.parent)[1] == {"step": 2, "a": 2, "val-core/x": 5}
    assert path.read_bytes().startswith(rows) and not (path.parent / "metrics.jsonl.1").exists()


@pytest.mark.parametrize(
    "after, expected",
    [
        ([(2, {"val-core/x": 5})], [{"step": 1, "a": 1}, {"step": 2, "a": 2, "val-core/x": 5}]),
        ([(3, {"a": 3})], [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 3, "a": 3}]),
        ([], [{"step": 1, "a": 1}, {"step": 2, "a": 2}]),
    ],
    ids=["evaluated", "trained", "stopped"],
)
def test_a_kill_between_checkpoint_and_logging_leaves_no_hole(path, after, expected):
    path.write_bytes(as_line(1, {"a": 1}))
    checkpoint = path.parent / "global_step_2"
    checkpoint.mkdir()
    (checkpoint / ROW_FILE).write_bytes(as_line(2, {"a": 2}))
    assert logged(path, *after, resumed_step=2, unlogged=read_unlogged(checkpoint)) == expected
    # Once it is logged the checkpoint's is not needed.
    assert logged(path, resumed_step=2, unlogged=read_rows(as_line(2, {"a": 7}))[0])[:2] == expected[:2]


@pytest.mark.parametrize(
    "damaged, steps",
    [
        (b'{"step":2,"a":1.{"step":3,"a":3}\n{"step":4,"a":4}\n', [1, 3, 4]),
        (b'{"step":2,"a"\n{"step":3,"a":3}\n', [1, 3]),
        (b'{"step":2,"a":2}', [1, 2]),
        (b'null\n[]\n7\n{"a":1}\n{"step":null}\n{"step":-1}\n{"step":true}\n{"step":2.5}\n{"step":"2"}\n', [1]),
        (b'\xff\xfe\x00\n{"step":3,"a":3}\n', [1, 3]),
        (b'\x00\x00\x00\x00{"step":3,"a":3}\n', [1, 3]),
        (b'\r\n\n{"step":2,"a":2}\r\n', [1, 2]),
        (b'{"step":2,"a":NaN}\n{"step":3}\n', [1, 3]),
        (b'{"step":2,"b":{"step":9}}\n', [1, 2]),
        (b"[" * 100_000 + b"\n", [1]),
    ],
    ids=["swallowed", "half", "no newline", "other values", "binary", "zeros", "CRLF", "NaN", "nested", "deep"],
)
def test_a_damaged_file_is_resumed_and_kept(path, damaged, steps):
    content = as_line(1, {"a": 1}) + damaged
    path.write_bytes(content)
    assert [row["step"] for row in logged(path, (9, {"a": 9}), resumed_step=8)] == [*steps, 9]
    kept = [p for p in path.parent.iterdir() if p.name != "metrics.jsonl"]
    assert [p.read_bytes() for p in kept] == ([] if damaged == b'{"step":2,"b":{"step":9}}\n' else [content])


def test_a_short_write_leaves_no_half_line_and_the_row_is_written_later(path, full_disk, capsys):
    log = MetricsLog(Recorder(), path, resumed_step=0)
    log.log(data={"a": 1}, step=1)
    size = path.stat().st_size
    # Ten bytes fit.
    with full_disk(size + 10):
        log.log(data={"a": 2}, step=2)
        log.log(data={"a": 3}, step=3)
        assert path.stat().st_size == size
        with pytest.raises(OSError, match="2 rows could not be written to .*metrics.jsonl: File too large"):
            log.finish()
    assert [row["step"] for row in lines(path)] == [1]
    assert (
        "metrics.jsonl cannot be written (File too large); 2 rows wait for the next attempt" in capsys.readouterr().out
    )


def test_rows_that_waited_are_written_in_order(path, monkeypatch):
    real, full = os.write, [True]

    def write(file, data):
        if full[0]:
            if len(data) > 4:
                return real(file, data[:4])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(files.os, "write", write)
    log = MetricsLog(Recorder(), path, resumed_step=0)
    for step in (1, 2, 3):
        full[0] = step < 3
        log.log(data={"a": step}, step=step)
    assert [row["step"] for row in lines(path)] == [1, 2, 3]
    log.finish()


def test_rows_that_wait_when_a_checkpoint_is_saved_are_in_it(path, full_disk, capsys):
    """A kill after it, with the disk still full, leaves no hole."""
    log = MetricsLog(Recorder(), path, resumed_step=0)
    log.log(data={"a": 1}, step=1)
    with full_disk(path.stat().st_size):
        log.log(data={"a": 2}, step=2)
        log.log(data={"a": 3}, step=3)
        waiting = log.write_waiting()
    checkpoint = path.parent / "global_step_4"
    checkpoint.mkdir()
    (checkpoint / ROW_FILE).write_bytes(waiting + as_line(4, {"a": 4}))
    expected = [{"step": step, "a": step} for step in (1, 2, 3, 4)]
    assert logged(path, resumed_step=4, unlogged=read_unlogged(checkpoint)) == expected
    # Once they are in the file, not again.
    assert logged(path, (5, {"a": 5}), resumed_step=4, unlogged=read_unlogged(checkpoint))[:-1] == expected


def test_a_restart_on_a_full_disk_leaves_the_file_as_it_was(path, monkeypatch):
    content = as_line(1, {"a": 1}) + as_line(2, {"a": 2})
    path.write_bytes(content)

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"):
        MetricsLog(Recorder(), path, resumed_step=1)
    assert os.listdir(path.parent) == ["metrics.jsonl"] and path.read_bytes() == content


def test_where_there_are_no_hard_links_the_old_file_is_copied(path, monkeypatch):
    def link(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    path.write_bytes(as_line(3, {}))
    monkeypatch.setattr(metrics_log.os, "link", link)
    assert logged(path, (1, {})) == [{"step": 1}]
    assert lines(path.parent / "metrics.jsonl.1") == [{"step": 3}]


def test_a_logger_that_fails_costs_no_row(path):
    class Broken(Recorder):
        def log(self, data, step):
            raise ConnectionError("no route to host")

    log = MetricsLog(Broken(), path, resumed_step=0)
    with pytest.raises(ConnectionError):
        log.log(data={"a": 1}, step=1)
    assert lines(path) == [{"step": 1, "a": 1}]


def test_whether_a_step_was_evaluated(path):
    assert not is_evaluated(path, 1)
    path.write_bytes(as_line(1, {"a": 1}) + as_line(2, {"val-aux/x": 1}) + b'{"step":3')
    assert [is_evaluated(path, step) for step in (1, 2, 3)] == [False, True, False]
