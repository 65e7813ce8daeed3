"""The summary and the progress filter, on a run written by hand."""

import json

import pytest

from verl_ext.tasks.arithmetic import progress, summary


@pytest.fixture
def run(tmp_path):
    """Two levels, evaluated before and after 12 steps whose reward is step / 12."""
    rows = [{"step": 0, "val-core/level_1/acc/mean@1": 0.8, "val-core/level_2/acc/mean@1": 0.2}]
    for step in range(1, 13):
        row = {"critic/score/mean": step / 12, "disco/kl": 1e-3 * step, "actor/entropy": 0.5}
        rows.append(row | {"step": step, "timing_s/step": 2.0 if step > 1 else 60.0})
    rows[-1] |= {"val-core/level_1/acc/mean@1": 1.0, "val-core/level_2/acc/mean@1": 0.6}
    rows[-1]["val-aux/level_2/reward/mean@1"] = 0.1
    # A crash may cut the last line short.
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 13, "critic')
    (tmp_path / "config.yaml").write_text("arithmetic: {test_size: 100}\n")
    for step in (5, 12):
        (tmp_path / f"global_step_{step}").mkdir()
    return tmp_path


def test_the_table_has_what_the_metrics_say(run):
    lines = [" ".join(line.split()) for line in summary.describe(run).splitlines()]
    assert "level 1 80.0% -> 100.0%" in lines
    assert "level 2 20.0% -> 60.0%" in lines
    # sqrt(mean of p (1 - p) / 100): 0.04 before, 0.035 after; the larger is shown.
    assert "all 50.0% -> 80.0% (standard error below 4.0%)" in lines
    # Steps 1 to 5 and 8 to 12.
    assert "reward in training 0.250 -> 0.833" in lines
    assert "KL(old || new), nats per token 3.00e-03 -> 1.00e-02" in lines
    assert "12 steps, median 2.00 s each" in lines
    # The last by number, not by name.
    assert any(line.startswith("checkpoint") and line.endswith("global_step_12") for line in lines)


def test_a_run_without_an_evaluation_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "timing_s/step": 2.0}\n')
    (tmp_path / "config.yaml").write_text("arithmetic: {test_size: 100}\n")
    assert "no evaluation followed by a finished step" in summary.describe(tmp_path)


def test_no_run_ends_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path)])
    with pytest.raises(SystemExit, match="metrics.jsonl does not exist"):
        summary.main()


def test_progress_shows_a_step_in_one_line_without_rays_prefix():
    line = "\x1b[36m(TaskRunnerV1 pid=1, ip=10.0.0.1)\x1b[0m verl-disco: step  7/100  pass@1 37.5%\n"
    assert progress.summarise(line) == "step  7/100  pass@1 37.5%"


@pytest.mark.parametrize(
    "line", ["", "(WorkerDict pid=2) FutureWarning: step by step", "ray init kwargs: {}", "step:7 - a:1"]
)
def test_progress_drops_the_rest(line):
    assert progress.summarise(line) is None


def test_progress_passes_refusals_and_pre_training_on():
    refused = "verl-disco: settings refused: disco.tau=0 must be above 0"
    assert progress.summarise(refused + "\n") == refused
    assert (
        progress.summarise("\x1b[36mpre-training 25/400: loss 3.3, 4 s\x1b[0m") == "pre-training 25/400: loss 3.3, 4 s"
    )
