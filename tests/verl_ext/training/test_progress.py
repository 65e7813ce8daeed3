"""The line per step: from any method's row of metrics, and the time left in new and resumed runs."""

import pytest
from omegaconf import OmegaConf

from verl_ext.preflight.trainer import check_own_settings
from verl_ext.training.metrics_log import MetricsLog, as_line
from verl_ext.training.progress import Progress, duration, progress_wanted, step_line
from verl_ext.training.trainer import ExtendedTrainerSync

ROW = {
    "critic/score/mean": 0.625,
    "training/mixed_questions": 0.5,
    "disco/kl": 3.14e-4,
    "actor/entropy": 0.25,
    "timing_s/step": 2.0,
    "perf/total_num_tokens": 9000,
}
DISCO = {"verl_ext": {"algorithm": "disco"}, "disco": {"constraint": "squared_hinge", "delta": 1e-3}}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_has_the_step_at_a_glance():
    progress = Progress(OmegaConf.create(DISCO), total=100, clock=Clock())
    assert (
        progress.line(0, {"val-core/a/acc/mean@4": 0.5, "val-core/b/reward/mean@4": 0.25})
        == "step   0/100  pass@1 37.5%"
    )
    assert progress.line(1, ROW) == (
        "step   1/100  pass@1 37.5% (step 0)  reward 0.625  mixed 50%  KL 3.1e-04 of 1.0e-03  entropy 0.250"
        "  4,500 tok/s  2.0 s  3 min left"
    )


@pytest.mark.parametrize(
    "algorithm, row, shown",
    [
        ("ppo", {"actor/ppo_kl": 2e-3, "actor/entropy": 0.5}, "KL 2.0e-03  entropy 0.500"),
        ("kl_cov", {"actor/ppo_kl": 2e-3}, ""),
        ("grpo", {"actor/ppo_kl": float("nan"), "critic/score/mean": None}, ""),
        ("disco", {"disco/kl": 2e-3, "disco/entropy": 0.5}, "KL 2.0e-03  entropy 0.500"),
    ],
)
def test_every_method_has_its_line_and_only_a_bound_that_it_has(algorithm, row, shown):
    progress = Progress(OmegaConf.create({"verl_ext": {"algorithm": algorithm}}), total=9)
    assert progress.line(3, row) == "  ".join(filter(None, ["step 3/9", shown]))


def test_stock_verl_has_its_line_too():
    assert Progress(OmegaConf.create({}), total=9).line(3, {"actor/ppo_kl": 1e-3}) == "step 3/9  KL 1.0e-03"


def test_the_time_left_is_by_this_processs_steps_after_its_first():
    clock = Clock()
    progress = Progress(OmegaConf.create({}), total=50, clock=clock)
    lefts = []
    # Resumed at step 40; the first step takes long, and every second one evaluates for 20 s.
    for step, seconds in ((41, 300), (42, 30), (43, 10), (44, 30), (45, 10)):
        clock.now += seconds
        lefts.append(progress.line(step, {"timing_s/step": 300 if step == 41 else 10}).split("  ")[-1])
    # 9 steps of 300 s; then 8 of 30, 7 of 20, 6 of 70 / 3, 5 of 20 s.
    assert lefts == ["45 min left", "4 min left", "2 min left", "2 min left", "2 min left"]
    assert "left" not in progress.line(50, {"timing_s/step": 10})


def test_durations():
    times = {45: "45 s", 119: "2 min", 89: "89 s", 3600: "1 h 00 min", 11100: "3 h 05 min", 198000: "2 d 07 h"}
    assert {seconds: duration(seconds) for seconds in times} == times


def test_a_resumed_run_knows_the_last_evaluation_and_an_evaluation_alone_has_no_total(tmp_path, capsys):
    class Tracking:
        def log(self, data, step):
            pass

        finish = log

    path = tmp_path / "metrics.jsonl"
    evaluation = {"val-core/a/acc/mean@1": 0.5}
    path.write_bytes(as_line(4, evaluation) + as_line(5, {"critic/score/mean": 1.0}) + as_line(7, evaluation))
    log = MetricsLog(Tracking(), path, resumed_step=5, progress=Progress(OmegaConf.create({}), total=9))
    log.log(data={"critic/score/mean": 0.5}, step=6)
    assert "verl-disco: step 6/9  pass@1 50.0% (step 4)  reward 0.500" in capsys.readouterr().out
    assert step_line(0, None, {}, evaluated=(0, 0.5)) == "step 0  pass@1 50.0%"


@pytest.mark.parametrize("given, shown", [({}, True), ({"verl_ext": {"progress": False}}, False)])
def test_the_trainers_lines_are_on_unless_switched_off(tmp_path, given, shown, monkeypatch, capsys):
    monkeypatch.setattr(
        ExtendedTrainerSync.__mro__[2], "__init__", lambda self, config: setattr(self, "config", config)
    )
    rollout, actor = {"n": 4, "temperature": 1.0}, {"optim": {"lr": 1e-6}}
    base = {"trainer": {"default_local_dir": str(tmp_path)}, "actor_rollout_ref": {"rollout": rollout, "actor": actor}}
    trainer = ExtendedTrainerSync(OmegaConf.create(base | {"data": {"max_response_length": 9}} | given))
    trainer.global_steps, trainer.total_training_steps = 0, 20
    trainer.logger = type("Tracking", (), {"log": lambda self, **kwargs: None})()
    trainer.logger.log(data={"critic/score/mean": 1}, step=2)
    assert ("verl-disco: step  2/20  reward 1.000" in capsys.readouterr().out) == shown


@pytest.mark.parametrize(
    "name, value", [("progress", "often"), ("progress", 1), ("max_failed_rewards", 2), ("reward_timeout", 0)]
)
def test_other_values_are_refused_before_ray_starts(name, value):
    config = OmegaConf.create({"verl_ext": {name: value}})
    run = type("Run", (), {"config": config})()
    (finding,) = check_own_settings(run)
    assert f"verl_ext.{name}={value} must be" in finding.problem
    if name == "progress":
        with pytest.raises(ValueError, match="must be true"):
            progress_wanted(config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "odd", [1, 2], None])
def test_what_is_no_number_is_left_out_and_ends_no_run(value):
    progress = Progress(OmegaConf.create({}), total=9)
    assert progress.line(0, {"val-core/a/acc/mean@1": 0.5, "val-core/b/acc/mean@1": float("nan")}) == "step 0/9"
    row = {"critic/score/mean": value, "timing_s/step": value, "perf/total_num_tokens": value, "actor/entropy": 0.5}
    assert progress.line(1, row) == "step 1/9  entropy 0.500"


def test_no_time_is_left_after_the_last_step():
    assert Progress(OmegaConf.create({}), total=9).line(12, {"timing_s/step": 2.0}) == "step 12/9  2.0 s"
