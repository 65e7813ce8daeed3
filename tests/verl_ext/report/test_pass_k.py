"""pass@k from stored responses: against counting, against the closed form, and where it cannot be told."""

import itertools
import json
import math
import random
import uuid
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from verl_ext.report import __main__ as report
from verl_ext.report.read import POOLED, Run, read_answers, read_run, read_runs
from verl_ext.report.tables import difficulty_table, pass_at_k, pass_k_table, pass_k_tables, without_samples


def store(run: Path, step: int, counts: list[tuple], verl: bool = True) -> Path:
    """Write stored responses as verl does: for each (text, samples, right, benchmark) a question with its samples."""
    lines = []
    for text, samples, right, *benchmark in counts:
        question = uuid.uuid4()
        for i in range(samples):
            line = {"input": text, "output": "", "gts": "", "score": float(i < right), "acc": float(i < right)}
            line |= {"uid": f"{question}_{i}_0"} if verl else {}
            line |= {"data_source": benchmark[0]} if benchmark else {}
            lines.append(line)
    random.Random(0).shuffle(lines)
    file = run / "validation" / f"{step}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def only(folder: Path) -> Run:
    (run,), damaged = read_runs([folder])
    assert not damaged
    return run


def test_it_is_the_share_of_all_draws_without_replacement_that_hold_a_right_one():
    assert pass_at_k(16, 1, 16) == 1.0
    for n, c, k in itertools.product(range(1, 8), range(8), range(1, 8)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    # Neither factorials nor products overflow.
    assert pass_at_k(4096, 1, 2048) == pytest.approx(0.5)


def test_one_right_of_16_gives_pass_at_16_of_1_not_verls_bootstrap(make):
    folder = make("disco", 1)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("best@4/mean", "best@16/mean").replace("mean@4", "mean@16"))
    store(folder, 20, [("q", 16, 1)])
    tables = pass_k_tables([only(folder)])
    assert list(tables) == [2, 4, 8, 16]
    values = [tables[k].loc[("disco", "final (step 20)"), "toy"] for k in tables]
    assert values == ["12.5", "25.0", "50.0", "100.0"]


def test_its_mean_over_evaluations_is_the_closed_form(make, tmp_path):
    chance = np.linspace(0.02, 0.6, 40)
    draw = np.random.default_rng(1)
    folder = make("disco", 1)
    found = {2: [], 8: []}
    for _ in range(200):
        rights = draw.binomial(8, chance)
        for k in found:
            found[k].append(np.mean([pass_at_k(8, int(c), k) for c in rights]))
    for k, values in found.items():
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        assert abs(np.mean(values) - np.mean(1 - (1 - chance) ** k)) < 4 * error and error < 0.01
    # The same through the files, for the last of them.
    store(folder, 20, [(f"q{i}", 8, int(c)) for i, c in enumerate(rights)])
    cell = pass_k_table([only(folder)], 8).loc[("disco", "final (step 20)"), "toy"]
    assert cell.startswith(f"{100 * found[8][-1]:.1f} ± ")


def test_the_interval_is_over_seeds(make):
    folders = [make("disco", seed) for seed in (1, 2, 3)]
    for folder, right in zip(folders, (1, 2, 3), strict=True):
        store(folder, 0, [("a", 4, 1), ("b", 4, 0)])
        store(folder, 20, [("a", 4, right), ("b", 4, 4)])
    runs, _ = read_runs(folders)
    table = pass_k_table(runs, 2)
    # C(3, 2) / C(4, 2) = 1/2, 1/6, 0; then the mean with b.
    values = [(1 + 1 - wrong) / 2 for wrong in (1 / 2, 1 / 6, 0)]
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / math.sqrt(3)
    expected = f"{100 * np.mean(values):.1f} ± {100 * half:.1f}"
    assert table.loc[("disco", "final (step 20)"), "toy"] == expected
    assert table.loc[("disco", "start (step 0)"), "toy"] == "25.0 ± 0.0"
    assert table.loc[("disco", "final (step 20)"), "seeds"] == 3


def test_the_interval_of_a_single_run_is_over_questions_of_each_benchmark(make):
    folder = make("disco", 1)
    a, b = [(f"a{i}", 2, i % 2, "a") for i in range(10)], [(f"b{i}", 2, int(i < 3), "b") for i in range(20)]
    store(folder, 20, a + b)
    row = pass_k_table([only(folder)], 2).loc[("disco", "final (step 20)")]
    half = {
        name: stats.t.ppf(0.975, len(v) - 1) * np.std(v, ddof=1) / math.sqrt(len(v))
        for name, v in {"a": [0, 1] * 5, "b": [1] * 3 + [0] * 17}.items()
    }
    assert row["a"] == f"50.0 ± {100 * half['a']:.1f}" and row["b"] == f"15.0 ± {100 * half['b']:.1f}"
    assert row["mean"] == f"32.5 ± {100 * math.hypot(*half.values()) / 2:.1f}"


def test_what_verl_writes_is_read(make):
    from verl.trainer.ppo.v1 import PPOTrainerSync

    folder = make("disco", 1)
    scores = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    more = {"acc": scores, "data_source": ["a"] * 4 + ["b"] * 2, "uid": [f"{i // 2}-x_{i % 2}_0" for i in range(6)]}
    texts = ["1 + 1\u2028?"] * 4 + ["2 + 2?"] * 2
    PPOTrainerSync._write_generations(texts, ["0"] * 6, ["0"] * 6, scores, more, str(folder / "validation"), 20)
    table, faults = read_answers(folder / "validation/20.jsonl", "toy")
    assert table.values.tolist() == [
        ["1 + 1\u2028?", "a", 2, 1.0, 2],
        ["1 + 1\u2028?", "a", 2, 1.0, 2],
        ["2 + 2?", "b", 2, 2.0, 2],
    ]
    assert not faults


def test_questions_of_one_text_stay_two_and_samples_of_several_turns_count_once(make):
    file = store(make("disco", 1), 20, [("same", 4, 1), ("same", 4, 4)])
    table, faults = read_answers(file, "toy")
    assert list(table["samples"]) == [4, 4] and sorted(table["right"]) == [1, 4] and not faults
    # A sample of three turns: an output each, all with its score.
    line = json.loads(file.read_text().split("\n")[0])
    sample = line["uid"].rpartition("_")[0]
    with open(file, "a") as f:
        f.writelines(json.dumps(line | {"uid": f"{sample}_{i}", "input": f"turn {i}"}) + "\n" for i in (1, 2))
    again, faults = read_answers(file, "toy")
    assert again.equals(table) and not faults


def test_questions_of_one_text_without_uid_are_one_with_more_samples(make):
    file = store(make("disco", 1), 20, [("same", 4, 1), ("same", 4, 3), ("other", 4, 0)], verl=False)
    table, _ = read_answers(file, "toy")
    assert dict(zip(table["question"], table["samples"], strict=True)) == {"same": 8, "other": 4}
    assert dict(zip(table["question"], table["right"], strict=True)) == {"same": 4, "other": 0}


def test_a_question_with_fewer_samples_is_left_out_above_their_number_and_counted(make):
    folder = make("disco", 1)
    store(folder, 20, [("a", 8, 0), ("b", 8, 8), ("c", 3, 3)])
    run = only(folder)
    tables = pass_k_tables([run])
    final = ("disco", "final (step 20)")
    assert list(tables) == [2, 4, 8]
    assert tables[2].loc[final, "toy"].startswith("66.7") and tables[8].loc[final, "toy"].startswith("50.0")
    (fault,) = run.faults
    assert "20.jsonl: 1 of 3 questions have fewer samples than most" in fault


def test_benchmarks_may_have_other_numbers_of_samples(make):
    folder = make("disco", 1)
    store(folder, 20, [("a", 8, 1, "aime"), ("b", 8, 1, "aime"), ("c", 2, 0, "math"), ("d", 2, 0, "math")])
    run = only(folder)
    tables = pass_k_tables([run])
    assert list(tables[2].columns) == ["seeds", "aime", "math", "mean"] and list(tables[8].columns) == ["seeds", "aime"]
    assert not run.faults


def test_graded_scores_have_no_pass_at_k_and_it_is_said(make):
    folder = make("disco", 1)
    file = store(folder, 20, [("a", 4, 1, "x"), ("b", 4, 4, "x"), ("c", 4, 2, "y")])
    file.write_text(file.read_text().replace('"acc": 0.0, "uid"', '"acc": 0.25, "uid"', 1))
    lines = [json.loads(line) for line in file.read_text().split("\n") if line]
    (graded,) = {line["data_source"] for line in lines if line["acc"] == 0.25}
    (other,) = {"x", "y"} - {graded}
    run = only(folder)
    assert list(pass_k_table([run], 2).columns) == ["seeds", other]
    (fault,) = run.faults
    assert f"scores of {graded} are graded (0.25)" in fault


def test_scores_of_minus_1_are_graded_and_have_no_gain_by_difficulty(make, tmp_path):
    folder = make("disco", 1)
    for step in (0, 20):
        file = store(folder, step, [("a", 4, 1, "x"), ("b", 4, step // 5, "y")])
        lines = [json.loads(line) for line in file.read_text().split("\n") if line]
        for line in lines:
            if line["data_source"] == "x":
                line |= {"acc": None, "score": 2 * line["score"] - 1}
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = only(folder)
    table = difficulty_table([run])
    assert table.to_dict() == {"0": {"disco": 1.0}}
    assert list(pass_k_table([run], 2).columns) == ["seeds", "y"]
    assert ["scores of x are graded (-1)" in fault for fault in run.faults] == [True, True]


def test_score_stands_in_for_acc(make):
    folder = make("disco", 1)
    file = store(folder, 20, [("a", 4, 1)])
    file.write_text(file.read_text().replace('"acc": 0.0', '"acc": null').replace('"acc": 1.0', '"acc": true'))
    table, _ = read_answers(file, "toy")
    assert list(table["right"]) == [1] and list(table["largest_k"]) == [4]


def test_benchmarks_that_cannot_be_told_apart_are_pooled_by_name(make, tmp_path):
    folder = make("disco", 1)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"val-core/toy/acc/mean@4": 0', '"val-core/b/acc/mean@4": 0', 1))
    store(folder, 20, [("a", 4, 1), ("b", 4, 0)])
    table = pass_k_table([only(folder)], 2)
    assert list(table.columns) == ["seeds", POOLED]
    assert report.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "all benchmarks: the stored responses do not name their benchmark. Let" in text and "`data_source`" in text


def test_without_stored_responses_there_is_no_pass_at_k_but_the_setting_that_gives_it(make, tmp_path):
    folder = make("disco", 1)
    assert without_samples([read_run(folder)])
    assert report.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## pass@1, %" in text and "## pass@4" not in text and "70.0" not in text and "95.0" not in text
    assert "disco-1. `trainer.validation_data_dir=FOLDER`, one folder per run, stores them." in text
    # With them, it is told how it is computed.
    store(folder, 20, [("a", 4, 1), ("b", 4, 1)])
    assert report.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "1 - C(n - c, k) / C(n, k), with n stored" in text and "| disco | final (step 20) | 1 | 50.0 ± 0.0 |" in text
    assert "validation_data_dir" not in text


def test_a_folder_of_stored_responses_that_several_runs_write_to_is_not_read(make, tmp_path):
    place = {"trainer.validation_data_dir": str(tmp_path / "validation")}
    folders = [make("disco", 1, **place), make("disco", 2, **place), make("ppo", 1)]
    store(tmp_path, 20, [("a", 4, 1)])
    store(folders[2], 20, [("a", 4, 1)])
    runs, _ = read_runs(folders)
    assert {r.method for r in runs if r.dumps} == {"ppo"}
    assert ["is shared by several runs" in f for r in runs for f in r.faults] == [True, True]
    # For one alone, it is where its responses are.
    assert list(only(folders[0]).dumps) == [20]


def test_runs_are_compared_at_the_last_step_that_all_have_stored(make):
    whole, part = make("disco", 1), make("disco", 2)
    for step in (0, 10, 20):
        store(whole, step, [("a", 2, step // 10)])
    for step in (0, 10):
        store(part, step, [("a", 2, step // 10)])
    # Of a step that was never logged, left by a run that was not resumed.
    store(part, 50, [("a", 2, 0)])
    runs, _ = read_runs([whole, part])
    assert [step for _, step in pass_k_table(runs, 2).index] == ["start (step 0)", "final (step 10)"]
