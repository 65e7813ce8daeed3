"""The study's scripts, on made-up runs of which the right answer is known."""

import importlib
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
QUESTIONS = {"a": "level_1", "b": "level_1", "c": "level_2", "d": "level_2"}
START = {"a": 0.5, "b": 0.25, "c": 0.0, "d": 0.05}
LR = "actor_rollout_ref.actor.optim.lr"


@pytest.fixture
def load(monkeypatch):
    """``load(name)``: a script of benchmarks/study, as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "study")
    before, path = set(sys.modules), list(sys.path)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]
    sys.path[:] = path


def lines_of(shares: dict[str, float], samples: int) -> str:
    """Stored responses: of each question the given share is right."""
    return "".join(
        json.dumps({"input": q, "output": "secret text", "data_source": QUESTIONS[q], "acc": float(i < s * samples)})
        + "\n"
        for q, s in shares.items()
        for i in range(samples)
    )


def mean_of(shares: dict[str, float]) -> dict[str, float]:
    by: dict[str, list[float]] = {}
    for q, s in shares.items():
        by.setdefault(QUESTIONS[q], []).append(s)
    return {f"val-core/{b}/acc/mean@1": sum(own) / len(own) for b, own in by.items()}


@pytest.fixture
def study(tmp_path):
    """``study(stage, algorithm, seed, evaluations, ...)``: a run, as the study leaves it, in ``study.folder``."""
    # Of another clone.
    folder = tmp_path / "clone/outputs/study"
    task = folder / "arithmetic"
    (task / "start").mkdir(parents=True)
    for name in ("tuning", "judging"):
        (task / f"start/{name}.jsonl").write_text(lines_of(START, 20))
    (task / "chosen.json").write_text(json.dumps({"lr": {"grpo": "1e-4", "disco": "3e-4"}}))
    searched = f"'hydra.searchpath=[file://{tmp_path}/clone/benchmarks/study/config,file://{task}/config]'"
    command = f"/usr/bin/python3.11 -m verl.trainer.main_ppo -m {searched} hydra.sweep.dir={task}/main\n"
    (task / "commands.txt").write_text(command)

    def run(stage: str, algorithm: str, seed: int, evaluations: dict[int, dict[str, float]], *, failed=False, **more):
        changed = ",".join(f"{n}={v}" for n, v in more.items() if n == LR or n.startswith("disco."))
        place = task / stage / f"{algorithm},{changed},seed={seed}"
        (place / "validation").mkdir(parents=True)
        settings = {
            "seed": seed,
            "verl_ext.algorithm": algorithm,
            LR: 1e-4,
            "data.train_batch_size": 32,
            "data.val_files": f"{task}/judging.parquet",
            "actor_rollout_ref.rollout.n": 8,
            "actor_rollout_ref.model.path": f"{task}/assets/model",
            "trainer.default_local_dir": str(place),
            "ray_kwargs.ray_init.runtime_env.env_vars.TOKEN": "hunter2",
            "reward.api_key": "hunter2",
        }
        config = OmegaConf.create()
        for name, value in (settings | {k: v for k, v in more.items() if k != "evicted"}).items():
            OmegaConf.update(config, name, value, force_add=True)
        OmegaConf.save(config, place / "config.yaml")
        rows = []
        for step in range(1, max(evaluations) + 1):
            row = {
                "step": step,
                "response_length/mean": 10.0,
                "response_length/clip_ratio": 0.25,
                "actor/entropy": 1 / step,
                "actor/loss": 0.1,
            }
            if "evicted" in more:
                row["training/filter_groups/evicted_samples"] = more["evicted"]
            rows.append(row | mean_of(evaluations.get(step, {})))
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step, shares in evaluations.items():
            (place / f"validation/{step}.jsonl").write_text(lines_of(shares, 8))
        if failed:
            (place / "log.txt").write_text(f"a line\nValueError: nothing is mixed in {place}\nthe end\n")
        else:
            (place / "finished").touch()
        return place

    run.folder = folder
    return run


@pytest.fixture
def read(load, study, tmp_path):
    """``read(stage)``: the stage's runs, collected, unpacked and read."""

    def stage(name: str):
        measures = load("measures")
        load("collect").collect(study.folder, tmp_path / "data")
        place = tmp_path / "place"
        measures.unpack(tmp_path / "data", place)
        return measures.load(place / "arithmetic" / name)

    return stage


ALL = dict.fromkeys(QUESTIONS, 1.0)


def test_the_difference_of_two_methods_is_found_at_the_budget_and_at_the_end(load, study, read):
    for seed in (1, 2):
        study("main", "grpo", seed, {60: {"a": 0.5, "b": 0.25, "c": 0.0, "d": 0.0}})
        study("main", "disco", seed, {60: ALL})
    runs, measures = read("main"), load("measures")
    # 256 responses of 10 tokens.
    assert measures.generated(runs[0])[60] == 60 * 2560
    end, half = (measures.matrices(runs, budget, 1) for budget in (math.inf, 30 * 2560))
    assert measures.compare(end["disco"], end["grpo"])[0] == pytest.approx(1 - 0.75 / 4)
    # Half way, on a straight line from the start.
    assert half["disco"].loc["1"].to_dict() == pytest.approx({(QUESTIONS[q], q): (START[q] + 1) / 2 for q in QUESTIONS})
    mean, low, high, seeds = measures.compare(half["disco"], half["grpo"])
    assert mean == pytest.approx((0.25 + 0.375 + 0.5 + 0.5) / 4) and low < mean < high and seeds == 2
    table = measures.learning_table(runs, math.inf)
    assert list(table.index) == ["disco", "grpo"] and table.loc["disco", "pass@1, %"] == "100.0 ± 0.0"
    assert table.loc["grpo", "points to grpo, pass@8"] == "baseline"
    assert table.loc["disco", "tokens of a run"] == "153,600"


def test_pass_at_8_is_unbiased_and_gains_are_by_the_starts_band(load, study, read):
    study("main", "grpo", 1, {60: {"a": 0.5, "b": 0.125, "c": 0.0, "d": 0.0}})
    runs, measures = read("main"), load("measures")
    # One of eight is right: the eight hold it. One of twenty: with 8 / 20.
    assert measures.by_question(runs[0], 60, 8)["level_1", "b"] == 1.0
    assert measures.by_question(runs[0], 0, 8)["level_2", "d"] == pytest.approx(8 / 20)
    assert measures.bands_table(runs, math.inf, 1).loc["grpo"].to_dict() == pytest.approx(
        {"0 (1)": 0.0, "(0, 0.25] (2)": 100 * (-0.125 - 0.05) / 2, "(0.25, 0.5] (1)": 0.0}
    )


def test_a_failed_run_counts_0_after_its_failure_and_an_unfinished_one_is_left_out(load, study, read):
    study("main", "disco", 1, {20: ALL}, failed=True)
    (study.folder / "arithmetic/main.done").touch()
    runs, measures = read("main"), load("measures")
    assert (runs[0].folder / "failed").read_text() == "ValueError: nothing is mixed in ...\n"
    assert measures.at_budget(runs[0], 20 * 2560, 1).tolist() == [1.0] * 4
    assert measures.at_budget(runs[0], 21 * 2560, 1).tolist() == [0.0] * 4
    assert measures.learning_table(runs, math.inf).loc["disco", "failed"] == "1"


def test_a_run_that_may_go_on_is_not_collected(study, read):
    study("main", "disco", 1, {20: ALL}, failed=True)
    assert read("main") == []


def test_replaced_questions_cost_tokens(load, study, read):
    study("main", "dapo", 1, {60: ALL}, evicted=32)
    (run,), measures = read("main"), load("measures")
    assert measures.generated(run)[60] == 2 * 60 * 2560
    # So the budget is spent at half of the steps.
    assert measures.at_budget(run, 60 * 2560, 1).mean() == pytest.approx(np.mean([(s + 1) / 2 for s in START.values()]))


def test_a_run_that_failed_at_once_is_not_left_out(load, study, read):
    place = study("main", "disco", 1, {20: ALL}, failed=True)
    (place / "metrics.jsonl").unlink()
    (place / "validation/20.jsonl").unlink()
    (study.folder / "arithmetic/main.done").touch()
    (run,), measures = read("main"), load("measures")
    assert measures.at_budget(run, 1, 1).tolist() == [0.0] * 4
    assert measures.learning_table([run], math.inf).loc["disco", "failed"] == "1"


def test_what_cannot_be_compared_is_refused(load, study, read, tmp_path):
    place = study("main", "disco", 1, {60: {q: 1.0 for q in "abc"}})
    (run,), measures = read("main"), load("measures")
    with pytest.raises(ValueError, match="steps 0 and 60 are of different questions"):
        measures.at_budget(run, 60 * 2560, 1)
    (run.folder / "validation/60.jsonl").write_text("{")
    (run,) = measures.load(run.folder.parent)
    with pytest.raises(ValueError, match="step 60: .*60.jsonl holds no responses"):
        measures.at_budget(run, 60 * 2560, 1)
    text = (place / "config.yaml").read_text()
    for name, setting, fault in (("again", "", "several runs of disco, seed 1"), ("other", "x: 1\n", "other settings")):
        other = place.with_name(name)
        other.mkdir()
        (other / "config.yaml").write_text(text + setting)
        (place / "config.yaml").write_text(text + setting.replace("1", "2"))
        (other / "metrics.jsonl").write_bytes((place / "metrics.jsonl").read_bytes())
        with pytest.raises(ValueError, match=f"main: .*{fault}"):
            measures.load(place.parent)
        (other / "config.yaml").unlink(), (other / "metrics.jsonl").unlink()


def test_the_order_of_methods_is_compared_with_the_papers(load, study, read):
    for method, share in {"disco": 1.0, "dapo_static": 0.5, "grpo": 0.25, "maxrl": 0.75}.items():
        study("main", method, 1, {60: dict.fromkeys(QUESTIONS, share)})
    runs, measures = read("main"), load("measures")
    # maxrl is not in it.
    rho, _, methods = measures.order_of_paper(runs, math.inf)
    assert (rho, methods) == (pytest.approx(1), 3)
    study("main", "dr_grpo", 1, {60: ALL})
    # The paper's last is second here, in a tie with the first: ranks 4, 3, 2, 1 against 3.5, 2, 1, 3.5.
    rho, _, methods = measures.order_of_paper(read("main"), math.inf)
    assert (rho, methods) == (pytest.approx(np.corrcoef([4, 3, 2, 1], [3.5, 2, 1, 3.5])[0, 1]), 4)


def test_two_methods_are_compared_on_hard_questions(load, study, read):
    for seed in (1, 2):
        study("main", "disco_b", seed, {60: dict.fromkeys(QUESTIONS, 0.5)})
        study("main", "disco", seed, {60: {"a": 0.5, "b": 0.25, "c": 1.0, "d": 0.75}})
    table = load("measures").pair_table({"here": (read("main"), "disco", "disco_b")}, math.inf)
    row = table.loc["disco - disco_b, here"]
    assert row["pass@1, all"].startswith("+12.5 ") and row["pass@1, 2 hard"].startswith("+37.5 ")
    # Of one level a single question: it counts as the others, not as much as a whole level.
    measures, found = load("measures"), load("measures").matrices(read("main"), math.inf, 1)
    three = [("level_1", "b"), ("level_2", "c"), ("level_2", "d")]
    mean, low, high, _ = measures.compare(found["disco"], found["disco_b"], only=three)
    assert mean == pytest.approx((-0.25 + 0.5 + 0.25) / 3) and low < mean < high
    assert math.isnan(measures.compare(found["disco"], found["disco_b"], only=[])[0])


def test_tests_without_runs_are_listed_as_such(load, study, read):
    study("main", "maxrl", 1, {60: ALL})
    measures = load("measures")
    table = measures.hypotheses_table({"arithmetic": read("main")})
    assert len(table) == 4 and set(table["verdict"]) == {"too few runs"} and set(table["seeds"]) == {"0"}
    assert measures.conclusion(table).startswith(
        "So far, with 0 to 0 of 5 seeds, the paper's ordering cannot be judged"
    )


def test_a_failed_rate_of_a_task_without_longer_runs_is_collected(load, study, read, tmp_path):
    study("tune", "grpo", 101, {20: ALL}, failed=True)
    (study.folder / "arithmetic").rename(study.folder / "countdown")
    (study.folder / "countdown/tune.done").touch()
    load("collect").collect(study.folder, tmp_path / "data")
    load("measures").unpack(tmp_path / "data", tmp_path / "place")
    (run,) = load("measures").load(tmp_path / "place/countdown/tune")
    assert load("measures").has_failed(run)


def test_an_interval_is_judged(load):
    measures = load("measures")
    assert measures.verdict(0.01, 0.1, 5) == "better" and measures.verdict(-0.1, -0.01, 5) == "worse"
    assert measures.verdict(-0.01, 0.01, 5) == "no difference of practical size"
    assert measures.verdict(-0.01, 0.03, 5) == "undecided" and measures.verdict(math.nan, math.nan, 0) == "too few runs"
    assert measures.verdict(0.01, 0.1, 1) == "too few runs"
    # What holds of both rules is told of both.
    assert measures.verdict(0.001, 0.019, 5) == "better, by less than 2 points"
    # The same in all runs: there is no variance to estimate.
    assert measures.verdict(0.0, 0.0, 5) == "no difference of practical size"
    assert measures.CONFIDENCE == 0.9875


def test_every_stage_has_its_part_of_the_report(load, study, tmp_path):
    wide = {"data.train_batch_size": 8, "actor_rollout_ref.rollout.n": 32}
    for seed in (11, 12):
        for method in ("grpo", "disco", "disco_b"):
            own = {"disco.delta": 3e-3, "disco.constraint": "squared_hinge"} if method != "grpo" else {}
            study("main", method, seed, {60: ALL if method == "disco" else START}, **own)
            study("wide", method, seed, {60: ALL if method == "disco_b" else START}, **wide)
        study("mechanisms", "grpo_free", seed, {60: START})
        study("mechanisms", "grpo_unclipped", seed, {60 if seed == 11 else 20: START}, failed=seed == 12)
        study("mechanisms", "disco", seed, {60: START}, **{"disco.delta": 3e-3, "disco.constraint": "none"})
    for rate, failed in ((1e-4, False), (3e-4, False), (1e-3, True)):
        study("tune", "grpo", 101, {20: START, 40: ALL, 200: START}, failed=failed, **{LR: rate, "grpo.kl_coef": 0.04})
    task = study.folder / "arithmetic"
    for stage in ("tune", "stability", "main", "wide", "mechanisms"):
        (task / f"{stage}.done").touch()
    chosen = {"lr": {"grpo": "0.0001", "disco": "0.0001"}, "disco.delta": "3e-3", "grpo.kl_coef": "0.04"}
    (task / "chosen.json").write_text(json.dumps(chosen))
    load("collect").collect(study.folder, tmp_path / "data")
    text, _ = load("analyse").write(tmp_path / "data", tmp_path / "report")
    # 8 questions of 32 responses are as many tokens as 32 of 8; disco is the better one there, and disco_b here.
    assert "8 questions of 32 responses per step. After 85,000 tokens; 2 seeds (11, 12), 4 questions" in text
    groups = {line.split("|")[1].strip(): line.split("|")[3] for line in text.splitlines() if "- disco_b" in line}
    assert groups["disco - disco_b, groups of 8"].strip().startswith("+43")
    assert groups["disco - disco_b, groups of 32"].strip().startswith("-43")
    # A variant that failed in one of two seeds, by half of what the others have.
    assert "| grpo_unclipped - grpo_free, groups of 8 | 2 | -10.5 (" in text
    assert "| disco | constraint=none |" in text
    # The mean of 1 / step over the five last steps that are kept, 180 to 200.
    assert "| grpo | 0.0001 | 21.9 %, 0.01 | 21.9 %, 0.01 | 0.0 %, 0.01, failed (below) | 1 of 3 |" in text
    assert "| clipping | grpo |  | 0 of 1 | 0 of 1 | 1 of 1 | 1 of 3 |" in text
    # At steps 20 and 40, the mean of 20 and 100 %.
    assert "| grpo | 60.0 (chosen) | 60.0 | 60.0 |" in text
    assert "| arithmetic | stability | 3 | 42 | 1 |" in text and "| arithmetic | mechanisms |" not in text


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (["better"] * 4, "The paper's ordering is supported"),
        (["better", "better, by less than 2 points"] * 2, "The paper's ordering is supported"),
        (["better", "worse", "better", "better"], "refuted here: disco - dapo_static in arithmetic is below 0."),
        (["worse", "too few runs", "undecided", "undecided"], "refuted here: disco - grpo in arithmetic is below 0."),
        (["no difference of practical size", "better"] * 2, "disco - grpo is of no practical size in both tasks."),
        # In one task to one of them, in the other to the other.
        (["no difference of practical size", "better", "better", "no difference of practical size"], "result is mixed"),
        (["undecided"] * 4, "better in 0 of 4 tests; 4 are undecided"),
        (["better", "better", "better", "too few runs"], "cannot be judged yet: 1 of 4 tests have too few runs."),
    ],
)
def test_the_protocols_rule_is_applied(load, verdicts, said):
    measures = load("measures")
    index = [(task, f"{a} - {b}") for task in measures.BUDGETS for a, b in measures.HYPOTHESES]
    table = pd.DataFrame({"verdict": verdicts, "seeds": "5"}, pd.MultiIndex.from_tuples(index))
    table.index.names = ["task", "difference"]
    assert said in measures.conclusion(table)
    assert measures.conclusion(table.assign(seeds="4")).startswith("So far, with 4 to 4 of 5 seeds, the ")


def test_a_single_seed_has_a_difference_and_no_interval(load, study, read):
    study("main", "grpo", 1, {60: {"a": 0.5, "b": 0.25, "c": 0.0, "d": 0.0}})
    study("main", "disco", 1, {60: {"a": 0.5, "b": 0.5, "c": 1.0, "d": 0.5}})
    measures, table = load("measures"), load("measures").learning_table(read("main"), math.inf)
    assert table.loc["disco", "points to grpo, pass@1"] == "+43.8"
    found = measures.matrices(read("main"), math.inf, 1)
    mean, low, _, seeds = measures.compare(found["disco"], found["grpo"])
    assert mean == pytest.approx(0.4375) and math.isnan(low) and seeds == 1


def test_steps_and_seconds_are_those_up_to_the_budget(load, study, read):
    study("main", "grpo", 1, {60: ALL})
    (run,), measures = read("main"), load("measures")
    # As a thinned row of a long run: of 20 steps.
    run.metrics = run.metrics.loc[[0, 20, 40, 60]].assign(**{"timing_s/step": [math.nan, 1.0, 2.0, 3.0]})
    assert measures.spent(run, 30 * 2560) == (30, pytest.approx(20 * 1 + 10 * 2))
    assert measures.spent(run, math.inf) == (60, pytest.approx(20 * (1 + 2 + 3)))
    assert measures.learning_table([run], 30 * 2560).loc["grpo", "seconds to the budget"] == "40"
    assert measures.learning_table([run], 61 * 2560).loc["grpo", "steps to the budget"] == "over 60"


def test_an_entropy_that_is_a_sum_is_made_a_mean_over_tokens(load, study, read):
    mode = "actor_rollout_ref.actor.loss_agg_mode"
    study("main", "grpo", 1, {10: ALL}, **{mode: "seq-mean-token-mean"})
    study("main", "dr_grpo", 1, {10: ALL}, **{mode: "seq-mean-token-sum-norm"})
    runs, measures = {r.method: r for r in read("main")}, load("measures")
    for run in runs.values():
        # Responses get longer, and the sum over their tokens with them.
        run.metrics["response_length/mean"] = np.r_[np.nan, np.arange(10.0, 20.0)]
    runs["dr_grpo"].metrics["actor/entropy"] *= runs["dr_grpo"].metrics["response_length/mean"] / 7
    mean, whole = (measures.entropy_of(runs[m]) for m in ("grpo", "dr_grpo"))
    assert whole.tolist() == pytest.approx(mean.tolist())
    assert mean.iloc[-1] == pytest.approx(np.mean([1 / s for s in range(6, 11)]), rel=1e-3)
    assert measures.entropy_table(list(runs.values()))["mean over"].to_dict() == {
        "dr_grpo": "tokens",
        "grpo": "each response's tokens",
    }


def test_tuning_is_told_with_what_it_chose(load, study, read):
    half = dict.fromkeys(QUESTIONS, 0.5)
    study("tune", "disco", 101, {20: half, 40: ALL}, **{LR: 3e-4, "disco.delta": 3e-3})
    study("tune", "disco", 101, {20: half, 40: half}, **{LR: 1e-4, "disco.delta": 3e-3})
    study("tune", "disco", 101, {20: ALL, 40: ALL}, **{LR: 3e-4, "disco.delta": 1e-2})
    runs, measures = read("tune"), load("measures")
    chosen = {"lr": {"disco": "0.0003", "grpo": "0.0001"}, "disco.delta": "1e-2", "grpo.kl_coef": "0.04"}
    table = measures.tuning_table(runs, 40, chosen)
    assert table.loc["disco"].to_dict() == {"0.0001": "50.0", "0.0003": "75.0 (chosen)"}
    said = measures.second_settings(runs, 40, chosen)
    assert said[0] == "disco.delta of disco: 3e-3: 75.0, 1e-2: 100.0 (chosen)."


def test_all_methods_are_compared_on_the_seeds_that_all_have(load, study, read, tmp_path):
    for seed in (11, 12, 13):
        study("main", "grpo", seed, {60: START})
        if seed < 13:
            study("main", "disco", seed, {60: ALL})
            study("main", "dapo_static", seed, {60: ALL}, evicted=0)
    study("main", "maxrl", 11, {60: START})
    read("main")
    text, figures = load("analyse").write(tmp_path / "data", tmp_path / "report")
    assert "1 seed (11), 4 questions of 2 levels, 8 responses to each. Not all methods have seed 12, 13." in text
    # The tested differences are on the seeds of their two methods.
    assert "| arithmetic | disco - grpo | +43.2 (-" in text and figures["arithmetic, disco - grpo"].low is not None
    assert "| countdown | disco - grpo |  | 0 | too few runs |" in text
    assert "| arithmetic | main | 8 | 70 | 0 | none | dapo, dgpo, disco_b, " in text
    assert figures["arithmetic, grpo"].low is None


def test_a_run_that_ends_below_its_start_is_counted(load, study, read):
    study("tune", "grpo", 101, {60: ALL, 250: ALL}, **{LR: 1e-4})
    study("tune", "grpo", 101, {60: ALL, 250: dict.fromkeys(QUESTIONS, 0.0)}, **{LR: 1e-3})
    for delta, end in ((3e-3, ALL), (1e-2, dict.fromkeys(QUESTIONS, 0.0))):
        study("tune", "disco", 101, {40: ALL, 250: end}, **{LR: 3e-4, "disco.delta": delta})
    study("tune", "disco", 101, {40: ALL}, **{LR: 1e-4, "disco.delta": 3e-3})
    (study.folder / "arithmetic/stability.done").touch()
    runs, measures = read("tune"), load("measures")
    best = {"grpo": "1e-4", "disco": "3e-4"}
    found = measures.outcomes(runs, best, 250)
    table = measures.stability_table(found, best, 250)
    # The other delta is left out, and the lowest rate is as tuned.
    assert table.loc["disco", "1 x"].startswith("100.0 %") and table.loc["disco", "0.3 x"].endswith(", 40 steps")
    assert table.loc["disco", "ended below its start"] == "0 of 2"
    # The questions' own spread is too wide for four of them: it ends at 0, but no interval says so.
    assert table.loc["grpo", "10 x"].startswith("0.0 %, 0.00") and table.loc["grpo", "1 x"].startswith("100.0 %")
    assert table.loc["grpo", "ended below its start"] == "0 of 2"
    assert "grpo" not in measures.outcomes(runs, best, 251)


def test_a_failed_run_ends_below_its_start_at_the_four_rates_alone(load, study, read):
    for rate in (1e-4, 1e-3, 3e-3, 3e-2):
        study("tune", "grpo", 101, {20: ALL}, failed=True, **{LR: rate})
    for stage in ("tune", "stability"):
        (study.folder / f"arithmetic/{stage}.done").touch()
    runs, measures = read("tune"), load("measures")
    study("tune", "disco", 101, {20: ALL}, **{LR: 1e-4, "disco.delta": 3e-3, "disco.constraint": "squared_hinge"})
    runs = read("tune")
    found = measures.outcomes(runs, {"grpo": "1e-3", "disco": "3e-4"}, 200)
    kinds = measures.kinds_table(found)
    assert kinds.loc["clipping"].tolist() == ["grpo", "", "1 of 1", "1 of 1", "", "2 of 2"]
    assert kinds.loc["a constraint on the KL", "0.3 x"] == "0 of 1"
    table = measures.stability_table({"grpo": found["grpo"]}, {"grpo": "1e-3"}, 200)
    assert table.loc["grpo", "1 x"].endswith("20 steps, failed (below)")
    # A tenth of the best rate and thirty times it were tried in tuning only.
    assert [c for c in table if c.endswith(" x")] == ["1 x", "3 x"]
    assert table.loc["grpo", "ended below its start"] == "2 of 2"


def test_a_change_is_named_and_compared_with_the_method_as_it_is(load, study, read, tmp_path):
    standard = {
        "disco.delta": 0.001,
        "disco.tau": None,
        "disco.kl_estimator": "k1",
        "disco.constraint": "squared_hinge",
    }
    standard |= {"disco.measure": "exact", "disco.questions": "null"}
    changes = {"disco.tau": 0.1, "disco.kl_estimator": "k3", "disco.constraint": "augmented_lagrangian"}
    changes |= {"disco.measure": "lagged", "disco.questions": "grpo"}
    for seed in (1, 2):
        study("main", "disco", seed, {60: START}, **standard)
        for name, value in changes.items():
            study("mechanisms", "disco", seed, {60: ALL}, **standard | {name: value})
    measures = load("measures")
    main = read("main")
    groups = measures.by_change(measures.load(tmp_path / "place/arithmetic/mechanisms"), main)
    names = {f"{name.removeprefix('disco.')}={value}" for name, value in changes.items()}
    table = measures.changes_table(groups, main, math.inf)
    assert set(table.index) == {("disco", name) for name in names}
    # Of eight responses to "d" at least one is right.
    assert table.loc[("disco", "tau=0.1"), "points to the standard"].startswith("+78.1 ")
    # The constraint's table names them alike, however many settings differ among them.
    for own in groups.values():
        for run in own:
            run.metrics["disco/kl"] = 0.5
    assert set(measures.constraint_table(groups).index) == set(table.index)


def test_the_difference_to_dapo_is_told_without_its_penalty_on_long_responses(load, study, read, tmp_path):
    analyse, on = load("analyse"), {"dapo.overlong_buffer.enable": True}
    for seed in (1, 2):
        study("main", "disco", seed, {60: ALL})
        study("main", "dapo_static", seed, {60: START}, **on)
        study("mechanisms", "dapo_static", seed, {60: ALL}, **on | {"dapo.overlong_buffer.enable": False})
    main = read("main")
    changed = load("measures").load(tmp_path / "place/arithmetic/mechanisms")
    (said,) = analyse.of_penalty("arithmetic", main, analyse.unpenalised("arithmetic", main, changed))
    assert "cuts off 25 % of disco's responses and 25 % of dapo_static's" in said and "2 seeds" in said
    assert "the difference to dapo_static is +0.0 (" in said
    assert set(load("measures").by_change(changed, main)) == {("dapo_static", "overlong_buffer.enable=False")}
    assert analyse.of_penalty("arithmetic", main, analyse.unpenalised("arithmetic", main, [])) == []


def test_nothing_of_this_machine_is_collected_and_the_same_runs_give_the_same_files(load, study, read, tmp_path):
    study("main", "disco", 1, {60: ALL})
    (run,) = read("main")
    text = "".join(f.read_text() for f in run.folder.rglob("*") if f.is_file())
    text += (tmp_path / "data/arithmetic-commands.txt").read_text()
    assert "hunter2" not in text and str(study.folder) not in text and "secret text" not in text
    assert "hydra.sweep.dir=outputs/study/arithmetic/main" in text and "actor/loss" not in text
    assert str(tmp_path) not in text
    assert "=[file://benchmarks/study/config,file://outputs/study/arithmetic/config]" in text
    versions = json.loads((tmp_path / "data/machine.json").read_text())["versions"]
    assert versions["revision"] == "unknown", "of the runs' clone, which is no repository here"
    first = (tmp_path / "data/arithmetic-main.tar.xz").read_bytes()
    load("collect").collect(study.folder, tmp_path / "again")
    assert (tmp_path / "again/arithmetic-main.tar.xz").read_bytes() == first


def test_the_report_is_written_from_the_collected_data_alone(load, study, read, tmp_path):
    for seed in (1, 2, 3):
        study("main", "grpo", seed, {60: START})
        study("main", "disco", seed, {60: ALL})
    read("main")
    text, figures = load("analyse").write(tmp_path / "data", tmp_path / "report")
    start, grpo, disco = (figures[f"arithmetic, {name}"].value for name in ("start", "grpo", "disco"))
    # 85,000 of 153,600 tokens on the way to 100 %.
    assert start == pytest.approx(20) and disco == pytest.approx(20 + 80 * 85_000 / 153_600, abs=0.05)
    found = figures["arithmetic, disco - grpo"]
    assert found.value == pytest.approx(disco - grpo, abs=0.15) and found.low < found.value < found.high
    assert "| arithmetic | disco - grpo |" in text and "(entropy.svg)" in text
    assert (tmp_path / "report/tables/arithmetic-learning.csv").exists()
    assert text.index("So far, with 0 to 3 of 5 seeds") < text.index("learning.svg") < text.index("arithmetic: ranking")
    picture = (tmp_path / "report/methods.svg").read_text()
    assert picture.index(">grpo<") < picture.index(">disco<") and "pass@1 after 85,000 generated tokens" in picture


def test_the_published_data_give_the_published_verdict(load, tmp_path):
    """Of the tested methods alone: to read the runs of all takes half a minute."""
    measures, analyse = load("measures"), load("analyse")
    docs = BENCHMARKS.parent / "docs/study"
    measures.unpack(docs / "data", tmp_path)
    tested = {method for pair in measures.HYPOTHESES for method in pair}
    for run in (*tmp_path.glob("*/main/*"), *tmp_path.glob("*/mechanisms/*")):
        if run.name.split(",")[0] not in tested:
            shutil.rmtree(run)
    main = {task: measures.load(tmp_path / task / "main") for task in measures.BUDGETS}
    found = analyse.quoted(main, main)
    recorded = load("record").read_folder()["study"].figures
    assert len(found) == 2 * (2 + 1 + 3) and found == {name: recorded[name] for name in found}
    changed = [r for r in measures.load(tmp_path / "countdown/mechanisms") if r.algorithm == "dapo_static"]
    name = "countdown, disco - dapo_static without its penalty"
    assert analyse.figure("points", *analyse.unpenalised("countdown", main["countdown"], changed)[:3]) == recorded[name]
    report = (docs / "report/README.md").read_text()
    assert f"**{measures.conclusion(measures.hypotheses_table(main))}**" in report


def test_the_best_learning_rate_is_not_at_an_end_of_the_grid(load):
    beyond = load("run").beyond
    assert beyond({"0.0001": 0.5, "0.0003": 0.7, "0.001": 0.6}) is None
    assert beyond({"0.0001": 0.8, "0.0003": 0.7, "0.001": 0.6}) == "3e-05"
    assert beyond({"0.0001": 0.5, "0.0003": 0.7, "0.001": 0.9}) == "0.003"
    assert beyond({"0.01": 0.9, "0.003": 0.8}) is None


def test_questions_of_tuning_and_judging_are_apart_and_as_hard(load):
    questions = pd.DataFrame({"data_source": ["x", "y"] * 6, "number": range(12)})
    parts = load("run").split(questions)
    assert set(parts["tuning"].number) | set(parts["judging"].number) == set(range(12))
    assert parts["tuning"].data_source.tolist() == ["x", "y"] * 2 and len(parts["judging"]) == 8


def test_tuning_reads_what_its_runs_found(load, study):
    run = load("run")
    half = dict.fromkeys(QUESTIONS, 0.5)
    study("tune", "grpo", 101, {20: half, 40: ALL, 200: START}, **{LR: 3e-4, "grpo.kl_coef": 0.04})
    study("tune", "disco", 101, {20: half, 40: ALL}, **{LR: 1e-4, "disco.delta": 3e-3})
    study("tune", "disco", 101, {20: half, 40: half}, **{LR: 1e-4, "disco.delta": 1e-2})
    study("tune", "disco", 101, {20: half}, failed=True, **{LR: 1e-3, "disco.delta": 3e-3})
    made = run.Study("arithmetic", study.folder / "arithmetic", run.PLANS["arithmetic"])
    assert made.scores() == {("grpo", "0.0003"): 0.75, ("disco", "0.0001"): 0.75}
    assert made.scores("disco.delta")["disco", "0.0001", "1e-2"] == 0.5


@pytest.mark.parametrize("task", ["arithmetic", "countdown"])
def test_every_method_takes_its_own_learning_rate(load, task, tmp_path):
    import hydra
    import verl  # noqa: F401  (its plugins add the config groups)

    run = load("run")
    best = {method: f"{1 + i}e-4" for i, method in enumerate(run.METHODS)}
    made = run.Study(task, tmp_path, run.PLANS[task])
    made._write(best, {"disco.delta": "1e-2", "grpo.kl_coef": "0.004"})
    searched = f"hydra.searchpath=[file://{run.CONFIG},file://{tmp_path}/config]"
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        for method in ("grpo", "ppo", "disco", "dapo_static", "disco_l_ratio", "grpo_free", "grpo_unclipped"):
            given = [searched, f"algorithm={method}", f"+experiment=study_{task}", "+rates=chosen"]
            config = hydra.compose("ppo_trainer", given)
            actor = config.actor_rollout_ref.actor
            assert actor.optim.lr == float(best[run.LIKE.get(method, method)])
            assert config.data.train_batch_size == 32 and config.actor_rollout_ref.rollout.n == 8
            assert config.trainer.n_gpus_per_node == 1 and actor.ppo_micro_batch_size_per_gpu == 64
            if "disco" in config and config.disco.constraint == "squared_hinge":
                assert config.disco.delta == 1e-2
            # The variants without it do not take the tuned weight over.
            assert actor.use_kl_loss is (method == "grpo")


def test_every_stage_passes_the_checks_of_a_start(load, tmp_path):
    from verl_ext.preflight.checks import examine

    run = load("run")
    made = run.Study("countdown", tmp_path, run.PLANS["countdown"])
    made._write(dict.fromkeys(run.METHODS, "0.0001"), run.STANDARD)
    searched = f"hydra.searchpath=[file://{run.CONFIG},file://{tmp_path}/config]"
    judged = tmp_path / "judging.parquet"
    row = {"prompt": [{"role": "user", "content": "1 2 3=6"}], "data_source": "size_3"}
    pd.DataFrame([row | {"reward_model": {"ground_truth": {"numbers": [1, 2, 3], "target": 6}}}]).to_parquet(judged)
    searched = [searched, f"data.val_files={judged}"]
    for overrides in (*run.MECHANISMS, *run.ADDED, ("algorithm=ppo",), ("algorithm=dapo",)):
        first = [o.partition(",")[0] for o in overrides]
        found = examine([*searched, "+experiment=study_countdown", "+rates=chosen", *first])
        assert [str(f) for f in found if f.problem and not f.warning] == []


# The toy in one process ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    from verl_ext.tasks.arithmetic.assets import build_assets

    folder = tmp_path_factory.mktemp("toy") / "assets"
    return build_assets(folder, iterations=30, train_size=64, test_size=12, seed=1)


def test_gradients_that_must_agree_do(load, assets):
    import torch

    gradients, toy_module = load("gradients"), load("toy")
    from recipe.disco import DiscoConfig

    toy, config = toy_module.Toy.load(assets), DiscoConfig(delta=1e-6)
    kl, seen = 0.0, 0
    # A model that is hardly trained answers nothing: rewards by length make groups mixed.
    toy.grade = lambda question, text: float(len(text) % 2)
    for mini in toy_module.train(toy, 2, lr=1e-3, batch_size=8, n=4, mini_batches=2, **config.chosen()):
        lagged, kl = gradients.lagged_gradient(toy, mini, config, kl if mini.number else 0.0)
        whole = gradients.by_micro_batch(toy, mini, config, 4)
        single = gradients.by_micro_batch(toy, mini, config, 1)
        assert mini.exact.norm() > 0
        torch.testing.assert_close(whole, mini.exact, rtol=1e-3, atol=1e-6)
        if mini.number == 0:
            torch.testing.assert_close(lagged, mini.exact, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(single, mini.exact, rtol=1e-3, atol=1e-6)
        else:
            # The hinge of a mean is not the mean of hinges.
            assert (single - mini.exact).norm() > 1e-3 * mini.exact.norm()
        seen += 1
    assert seen == 4


def test_the_noise_of_a_mini_batch_falls_with_the_root_of_its_tokens(load):
    import torch

    noise = load("kl_noise")
    generator = torch.Generator().manual_seed(1)
    # 10 tokens a response, whose KL is known to have a standard deviation of 1e-2 per token.
    length = torch.full((100_000,), 10)
    kl = 10 * (1e-3 + 1e-2 * torch.randn(100_000, generator=generator, dtype=torch.double))
    assert noise.by_size(kl, length, 1000).shape == (1000,)
    figures = noise.figures_of({"k1": kl, "k3": kl}, length, 10**6)
    assert figures["truth, KL"].value == pytest.approx(1e-3, abs=1e-4)
    for tokens, expected in (("1e3", 1e-3), ("1e4", 10**-3.5), ("1e5", 1e-4), ("1e6", 10**-4.5)):
        assert figures[f"k1, {tokens} tokens, noise"].value == pytest.approx(expected, rel=0.5)
    assert figures["k1, 1e3 tokens, fires at 0.001"].value == pytest.approx(0.5, abs=0.05)
    assert figures["k1, 1e4 tokens, fires at 0.01"].value == 0


@pytest.mark.parametrize("name", ["run", "collect", "analyse"])
def test_each_script_says_how_it_is_called(load, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        load(name).main()
    assert end.value.code == 0 and f"python benchmarks/study/{name}.py" in capsys.readouterr().out


def test_a_refused_sweep_is_told_from_failed_runs(load, tmp_path):
    run = load("run")
    assert not run.ran(tmp_path, 0)
    (tmp_path / "grpo,seed=1").mkdir()
    log = tmp_path / "grpo,seed=1/log.txt"
    log.write_text("ValueError: it broke\n")
    assert run.ran(tmp_path, log.stat().st_mtime) and not run.ran(tmp_path, log.stat().st_mtime + 1)
    log.write_text("verl-disco: settings refused: no\n")
    assert not run.ran(tmp_path, 0)


def test_a_second_start_skips_what_is_done_and_goes_on_with_the_rest(load, tmp_path, monkeypatch):
    run = load("run")
    study = run.Study("arithmetic", tmp_path, run.PLANS["arithmetic"], methods=("grpo", "disco"))
    commands: list[list[str]] = []

    def call(command):
        commands.append(command)
        # Killed in the first sweep of the second stage.
        return 143 if len(commands) == 2 else 0

    monkeypatch.setattr(run, "call", call)
    monkeypatch.setattr(study, "assets", lambda: None)
    monkeypatch.setattr(study, "tune", lambda: study.sweep("tune", "seed=101", rates=False))
    (tmp_path / "chosen.json").write_text(json.dumps({"lr": {"grpo": "0.0001", "disco": "0.003"}}))
    with pytest.raises(SystemExit):
        study.run(study.plan.stages)
    assert not (tmp_path / "main.done").exists() and (tmp_path / "tune.done").exists()
    study.run(study.plan.stages)
    # tune, main (killed), main, and the two methods' longer runs, which are the tuning's in the same folder.
    assert len(commands) == 5
    assert commands[1] == commands[2] and "algorithm=grpo,disco" in commands[1] and "seed=11,12,13,14,15" in commands[1]
    assert f"{LR}=0.0001,0.0003,0.001" in commands[3] and f"{LR}=0.003,0.01" in commands[4]
    assert f"hydra.sweep.dir={tmp_path}/tune" in commands[3] and "trainer.total_training_steps=200" in commands[3]
    assert len((tmp_path / "commands.txt").read_text().splitlines()) == 4
