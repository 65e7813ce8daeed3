"""Reports on runs that are written here: what the tables say must follow from the numbers put in."""

import math
import re
from pathlib import Path

import pandas as pd
import pytest

from verl_ext.report import __main__ as report
from verl_ext.report.plots import draw_all
from verl_ext.report.read import Run, differences, other_differences, read_run, read_runs, repeated_seeds
from verl_ext.report.tables import (
    difficulty_table,
    mean_and_interval,
    pass_table,
    published_tables,
    time_table,
)
from verl_ext.runs import folder as runs
from verl_ext.runs.evaluations import band_of


def read(folders: list[Path]) -> list[Run]:
    """The runs, none of them damaged."""
    found, damaged = read_runs(folders)
    assert not damaged
    return found


def test_pass_at_1_over_seeds_with_its_interval(make):
    found = read([make("disco", s, final=f) for s, f in ((1, 0.8), (2, 0.9), (3, 0.85))] + [make("ppo", 1, 0.6)])
    table = pass_table(found, last=2)
    # Student's t with 2 degrees of freedom: 4.303 * 0.05 / sqrt(3)
    assert table.loc[("disco", "final (step 20)"), "toy"] == "85.0 ± 12.4"
    assert table.loc[("disco", "start (step 0)"), "toy"] == "50.0 ± 0.0"
    assert table.loc[("disco", "best"), "toy"] == "90.0 ± 0.0"
    assert table.loc[("disco", "mean of last 2"), "toy"] == "77.5 ± 6.2"
    final = ("ppo", "final (step 20)")
    assert table.loc[final, "toy"] == "60.0" and table.loc[final, "seeds"] == 1


def test_runs_of_a_method_are_compared_at_the_last_step_that_all_have(make):
    whole, part = make("disco", 1), make("disco", 2)
    metrics = part / runs.METRICS_FILE
    # Without an evaluation at the start, and not yet at the end.
    metrics.write_text("\n".join(metrics.read_text().split("\n")[1:16]) + "\n")
    table = pass_table(read([whole, part]), last=2)
    assert table.loc[("disco", "final (step 15)"), "toy"] == "70.0 ± 0.0"
    assert not any("start" in name for _, name in table.index)


def test_the_same_seed_twice_counts_once_and_is_said(make):
    found = read([make("disco", 1), make("disco", 1, name="again")])
    assert pass_table(found, last=2).loc[("disco", "best"), "seeds"] == 1
    assert repeated_seeds(found) == ["disco, seed 1"]


def test_the_interval_is_students():
    mean, half = mean_and_interval([1.0, 3.0])
    assert mean == 2 and half == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2), rel=1e-4)
    assert math.isnan(mean_and_interval([1.0])[1])


def test_methods_are_told_apart_by_what_differs(make):
    lr = {"actor_rollout_ref.actor.optim.lr": 2e-4}
    folders = [make("disco", 1), make("disco", 2, **{"disco.score": "l_ratio"}), make("grpo", 1), make("grpo", 2)]
    assert [r.method for r in read(folders)] == ["disco (score=l_ratio)", "disco (score=log_l)", "grpo", "grpo"]
    faster = make("grpo", 3, **lr)
    assert {r.method for r in read([*folders[2:], faster])} == {"grpo (lr=0.0001)", "grpo (lr=0.0002)"}


def test_runs_that_differ_in_much_have_short_names_and_a_table(make, tmp_path):
    much = {f"actor_rollout_ref.rollout.setting_{i}": i for i in range(30)}
    other = {name: value + 1 for name, value in much.items()}
    # Two seeds of one, and a value that is long by itself.
    folders = [make("disco", s, **much, **{"data.val_files": "short"}) for s in (1, 2)]
    folders += [make("disco", 3, **other, **{"data.val_files": "long" * 100}), make("grpo", 1)]
    found = read(folders)
    assert [(r.method, r.seed) for r in found] == [
        ("disco #1", "1"),
        ("disco #1", "2"),
        ("disco #2", "3"),
        ("grpo", "1"),
    ]
    told = other_differences(found)
    for i in range(30):
        values = told[f"actor_rollout_ref.rollout.setting_{i}"]
        assert (values["disco #1"], values["disco #2"]) == (str(i), str(i + 1))
    assert report.main([*map(str, folders), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Methods with too many differences for a name are numbered." in text
    assert "actor_rollout_ref.rollout.setting\\_29" in text or "actor_rollout_ref.rollout.setting_29" in text


def test_it_says_when_runs_differ_in_more_than_the_method(make):
    equal = [make("ppo", 1), make("disco", 2)]
    assert other_differences(read(equal)) == {}
    unequal = make("grpo", 1, **{"actor_rollout_ref.actor.optim.lr": 2e-4})
    found = other_differences(read([*equal, unequal]))
    values = {"disco": "0.0001", "grpo": "0.0002", "ppo": "0.0001"}
    assert found == {"actor_rollout_ref.actor.optim.lr": values}
    assert report.describe_values(values) == "0.0001: disco, ppo; 0.0002: grpo"


def test_a_methods_setting_that_was_changed_is_a_difference(make):
    # As the algorithms set it, and as somebody changed it.
    name = "actor_rollout_ref.actor.loss_agg_mode"
    as_set = [make("grpo", 1, **{name: "seq-mean-token-mean"}), make("dapo", 1, **{name: "token-mean"})]
    assert other_differences(read([*as_set, make("ppo", 1, **{name: "token-mean"})])) == {}
    changed = make("dapo", 2, **{name: "seq-mean-token-sum"})
    assert name in other_differences(read([as_set[0], changed]))
    # What follows another setting is the method's own only as it follows.
    name, resolution = "disco.delta", "verl_ext.kl_resolution"
    follows = [make("disco", 1, **{name: 1e-3}), make("grpo", 3, **{name: None, resolution: None})]
    assert name not in other_differences(read(follows))
    assert name in other_differences(read([make("disco", 2, **{name: 0.5}), follows[1]]))
    # A knob of verl's own loss makes two methods, not two seeds.
    ratio = "actor_rollout_ref.actor.policy_loss.clip_cov_ratio"
    found = read([make("clip_cov", s, **{ratio: value}) for s, value in ((1, 2e-4), (2, 1e-2))])
    assert [r.method for r in found] == ["clip_cov (clip_cov_ratio=0.0002)", "clip_cov (clip_cov_ratio=0.01)"]


def test_texts_may_hold_any_character_and_the_last_line_may_be_half(make):
    folder = make("disco", 1, right={0: {"a\u2028b\x85": 0.5}})
    with open(folder / "validation/0.jsonl", "a") as f:
        f.write('{"input": "c", "sc')
    (found,) = read([folder])
    answers = found.answers(0)
    assert list(answers["question"]) == ["a\u2028b\x85"] and not found.faults
    assert list(answers["samples"]) == [4] and list(answers["right"]) == [2]


def test_seeds_and_places_are_no_differences():
    a = {"seed": 1, "disco.delta": 0.001, "trainer.default_local_dir": "outputs/disco-1"}
    b = a | {"seed": 2, "trainer.default_local_dir": "outputs/disco-2"}
    assert differences([a, b]) == []
    assert differences([a, b | {"disco.delta": 1.0}]) == ["disco.delta"]


def test_gain_by_difficulty_pools_the_start_of_all_runs(make):
    first = make("disco", 1, right={0: {"a": 0, "b": 0.5, "c": 1}, 20: {"a": 0.25, "b": 1, "c": 1}})
    second = make("ppo", 1, right={0: {"a": 0.5, "b": 0.5, "c": 1}, 20: {"a": 0.25, "b": 0.5, "c": 0.5}})
    # Question a: 0.25 at the start over both runs, so neither 0 nor 0.5.
    table = difficulty_table(read([first, second]))
    assert list(table.columns) == ["(0, 0.25]", "(0.25, 0.5]", "1"]
    assert table.loc["disco"].tolist() == [0.0, 0.5, 0.0]
    assert table.loc["ppo"].tolist() == [0.0, 0.0, -0.5]
    assert len(difficulty_table(read([make("grpo", 1)]))) == 0


BANDS = {0: "0", 0.01: "(0, 0.25]", 0.25: "(0, 0.25]", 0.5: "(0.25, 0.5]", 0.9: "(0.75, 1)", 1: "1"}


@pytest.mark.parametrize("share, band", BANDS.items())
def test_bands(share, band):
    assert band_of(share) == band


def test_time_leaves_out_the_first_steps(make):
    row = time_table(read([make("disco", 1)])).loc["disco"]
    assert row["step"] == 4.0 and row["update_actor"] == 1.0 and row["generation, rewards, other"] == 2.5
    assert row["update, % of step"] == 25.0 and row["tokens/s"] == 200


def test_published_figures_stand_beside_where_model_and_benchmark_match(make):
    path = {"actor_rollout_ref.model.path": "/models/DeepSeek-R1-Distill-Qwen-1.5B"}
    folder = make("disco", 1, **path)
    assert published_tables(read([folder])) == {}
    metrics = folder / runs.METRICS_FILE
    metrics.write_text(metrics.read_text().replace("val-core/toy", "val-core/AIME 2024"))
    (table,) = published_tables(read([folder])).values()
    assert table.loc[("DeepSeek-R1-Distill-Qwen-1.5B", "disco"), "AIME 2024"] == "40.4"
    assert table.loc[("DeepSeek-R1-Distill-Qwen-1.5B", "grpo"), "AIME 2024"] == "27.7"
    assert published_tables(read([make("grpo", 1)])) == {}


def test_the_command_writes_a_self_contained_page(make, tmp_path, monkeypatch, capsys):
    right = {0: {"a": 0, "b": 0.5}, 20: {"a": 1, "b": 1}}
    make("disco", 1, right=right)
    make("disco", 2, right=right)
    make("ppo", 1, finished=False, name="a <b>&c")
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--out", str(out)])
    report.main()
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert "3 runs. Not finished: a \\<b\\>&c: step 20 of 20." in text
    assert "The runs differ only in method and seed." in text
    assert "| disco | final (step 20) | 2 | 80.0 ± 0.0 |" in text
    plots = {"pass_at_1", "reward", "entropy", "kl", "length", "mixed", "difficulty"}
    assert {f.stem for f in out.glob("*.svg")} == plots
    # Self-contained: every image is inside, and nothing is loaded from elsewhere.
    assert page.count("data:image/svg+xml;base64,") == len(plots)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "a &lt;b&gt;&amp;c" in page and "<b>" not in page
    assert "written:" in capsys.readouterr().out


def test_names_are_text_and_runs_are_told_apart_by_their_paths(tmp_path):
    page = report.to_html(report.plain("![p](http://elsewhere/p.svg) <i> a|b\n# no heading `x` *y*"), tmp_path)
    body = page.split("</style>")[1]
    assert "<img" not in body and "<h1" not in body and "<em" not in body and "<code" not in body
    assert "![p](http://elsewhere/p.svg) &lt;i&gt; a|b # no heading" in body
    folders = [tmp_path / "s1/disco,seed=1", tmp_path / "s2/disco,seed=1"]
    assert list(report.short_names(folders).values()) == ["s1/disco,seed=1", "s2/disco,seed=1"]
    assert report.short_names(folders[:1]) == {folders[0]: "disco,seed=1"}


def test_there_is_a_plot_of_each_metric_that_was_logged(make, tmp_path):
    plots = draw_all(read([make("disco", 1), make("disco", 2)]), pd.DataFrame(), tmp_path)
    assert [name for name, _ in plots] == [
        f"{n}.svg" for n in ("pass_at_1", "reward", "entropy", "kl", "length", "mixed")
    ]


def test_what_is_no_run_is_refused(tmp_path, make):
    found, none = report.find_runs([tmp_path])
    assert found == [] and "holds no run: no config.yaml" in none[tmp_path]
    with pytest.raises(ValueError, match="is not a run: it has no config.yaml"):
        read_run(tmp_path)
    waiting = make("disco", 1)
    (waiting / runs.METRICS_FILE).write_text("")
    assert read_run(waiting) is None and read([waiting]) == []
