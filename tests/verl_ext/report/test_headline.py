"""The headline: final pass@1 and paired differences, from runs that are written here; the tables to paste."""

import json
import math

import pandas as pd
import pytest

from verl_ext.report import __main__ as report
from verl_ext.report.headline import choose_baseline, headline, in_words
from verl_ext.report.read import read_runs
from verl_ext.report.tables import weight_table
from verl_ext.runs import folder as runs
from verl_ext.runs.evaluations import QUESTIONS, WEIGHT

T1, T3 = 12.706205, 3.182446
"""Student's 97.5 % points of 1 and 3 degrees of freedom."""


def read(*folders):
    found, damaged = read_runs(list(folders))
    assert not damaged
    return found


def answers(*shares):
    """Shares of right responses to questions a, b, ... at the last step, and their mean, as the run logged it."""
    return {"right": {20: dict(zip("abcdefgh", shares, strict=False))}, "final": sum(shares) / len(shares)}


def test_differences_are_paired_by_seed_and_question(make):
    base = [make("grpo", s, **answers(0, 0.25, 0.5, 0.75)) for s in (1, 2)]
    # Each question 0.25 more, with both seeds.
    better = [make("disco", s, **answers(0.25, 0.5, 0.75, 1)) for s in (1, 2)]
    found = read(*base, *better)
    table = headline(found, choose_baseline(found))
    assert list(table.index) == ["disco", "grpo"]
    row = table.loc["disco"]
    assert (row["pass_at_1"], row["difference"], row["low"], row["high"]) == (0.625, 0.25, 0.25, 0.25)
    assert (row["seeds"], row["pairs"], row["questions"], row["at_step"]) == (2, 2, 4, 20)
    words = in_words(table, "grpo")
    assert words.loc["disco"].tolist() == ["62.5 ± 0.0", "+25.0 (+25.0 to +25.0)", "2 seeds x 4 questions", "2", "20"]
    assert words.loc["grpo"].tolist() == ["37.5 ± 0.0", "baseline", "", "2", "20"]


def test_a_single_seed_is_over_questions_and_unstored_responses_over_seeds(make):
    found = read(make("grpo", 1, **answers(0, 0, 0, 0)), make("disco", 1, **answers(0, 0.25, 0.5, 0.75)))
    row = headline(found, "grpo").loc["disco"]
    # The variance of 0, 0.25, 0.5, 0.75 is 5 / 48.
    assert row["high"] - row["difference"] == pytest.approx(T3 * math.sqrt(5 / 48 / 4), rel=1e-5)
    assert in_words(headline(found, "grpo"), "grpo").loc["disco", "over"] == "1 seed x 4 questions"
    unstored = read(*(make("ppo", s, final=f) for s, f in ((1, 0.5), (2, 0.75))), make("rloo", 1), make("rloo", 2))
    row = headline(unstored, "ppo").loc["rloo"]
    # 0.3 and 0.05.
    assert row["difference"] == pytest.approx(0.175) and row["questions"] == 0
    assert row["high"] - row["difference"] == pytest.approx(T1 * 0.125, rel=1e-5)


def test_stored_responses_count_only_if_they_give_what_was_logged(make):
    other = answers(0, 0.25, 0.5, 0.75) | {"final": 0.9}
    found = read(make("grpo", 1, **answers(0, 0, 0, 0)), make("disco", 1, **other))
    row = headline(found, "grpo").loc["disco"]
    assert row["difference"] == pytest.approx(0.9) and row["questions"] == 0 and math.isnan(row["low"])
    # Other questions cannot be paired.
    apart = read(make("ppo", 1, **answers(0, 0)), make("rloo", 1, **answers(1, 1, 1, 1)))
    assert headline(apart, "ppo").loc["rloo", "questions"] == 0


def test_runs_are_compared_at_the_last_step_that_both_have(make):
    whole, part = make("grpo", 1), make("disco", 1)
    metrics = part / runs.METRICS_FILE
    metrics.write_text("\n".join(metrics.read_text().split("\n")[:16]) + "\n")
    found = read(whole, part)
    row = in_words(headline(found, "disco"), "disco").loc["grpo"]
    assert row["step"] == "20" and row["points to disco"] == "+0.0, at step 15"


def test_the_baseline_is_grpo_then_ppo_then_the_first_or_the_one_asked_for(make):
    lr = {"actor_rollout_ref.actor.optim.lr": 2e-4}
    names = ["disco", "rloo", "ppo", "grpo"]
    folders = {name: make(name, 1) for name in names}
    assert choose_baseline(read(*folders.values())) == "grpo"
    assert choose_baseline(read(*(folders[n] for n in names[:3]))) == "ppo"
    assert choose_baseline(read(*(folders[n] for n in names[:2]))) == "disco"
    assert choose_baseline(read(*folders.values()), "rloo") == "rloo"
    twice = read(*folders.values(), make("rloo", 2, **lr))
    assert choose_baseline(twice, "rloo (lr=0.0002)") == "rloo (lr=0.0002)"
    for wanted, number in (("rloo", 2), ("dapo", 0)):
        with pytest.raises(ValueError, match=f"--baseline {wanted} means {number} of the evaluated methods; name one"):
            choose_baseline(twice, wanted)
    with pytest.raises(SystemExit):
        report.main([str(folders["ppo"]), "--baseline", "dapo"])


def test_the_report_begins_with_the_headline_and_its_tables_can_be_pasted(make, tmp_path):
    folders = [make("grpo", 1, **answers(0, 0, 0, 0)), make("disco", 1, **answers(0, 0.25, 0.5, 0.75))]
    out = tmp_path / "out"
    assert report.main([*map(str, folders), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert text.split("\n\n")[1] == "## Final pass@1, and its difference to grpo"
    row = "| disco | 37.5 | +37.5 (-13.9 to +88.9) | 1 seed x 4 questions | 1 | 20 |"
    assert row in text and row in (out / "tables/headline.md").read_text()
    assert "A single seed says nothing of other seeds" in text
    tex = (out / "tables/headline.tex").read_text()
    assert r"\toprule" in tex and r"pass@1, \%" in tex
    assert r"$\pm$" not in tex and "disco & 37.5 & +37.5" in tex
    numbers = pd.read_csv(out / "tables/headline.csv", index_col="method")
    assert numbers.loc["disco", "difference"] == 0.375
    assert {f.stem for f in (out / "tables").glob("*.csv")} == {
        "headline",
        "pass_at_1",
        "pass_at_2",
        "pass_at_4",
        "time",
    }


def test_other_seeds_are_paired_in_order_and_it_says_so(make, tmp_path):
    folders = [make("grpo", 1), make("grpo", 2, final=0.7), make("disco", 3), make("disco", 4, final=0.9)]
    row = headline(read(*folders), "grpo").loc["disco"]
    assert row["pairs"] == 2 and row["difference"] == pytest.approx(0.1)
    assert report.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "Runs of disco have other seeds than the baseline's and are paired in order." in text


def test_one_method_has_no_difference(make, tmp_path):
    assert report.main([str(make("disco", 1)), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "## Final pass@1\n" in text and "difference" not in text.split("## What")[0]


def test_the_weight_by_difficulty_over_time(make):
    def log(folder, weights):
        rows = [json.loads(line) for line in (folder / runs.METRICS_FILE).read_text().splitlines()]
        for row in rows[1:]:
            w = weights[0] if row["step"] <= 7 else weights[1]
            row |= {WEIGHT[1]: w, WEIGHT[2]: 1 - w, QUESTIONS[1]: 0.25, QUESTIONS[2]: 0.5, QUESTIONS[5]: 0.25}
            row |= {name: 0.0 for name in (*WEIGHT, *QUESTIONS) if name not in row}
        (folder / runs.METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    both = [log(make("disco", 1), (0.8, 0.2)), log(make("disco", 2), (0.6, 0.2))]
    table = weight_table(read(*both, make("grpo", 1)))
    assert list(table.index) == [("disco", "1 to 7"), ("disco", "8 to 14"), ("disco", "15 to 20")]
    assert table.loc[("disco", "1 to 7")].tolist() == ["0 of 0", "70 of 25", "30 of 50", "0 of 0", "0 of 0", "0 of 25"]
    assert table.loc[("disco", "15 to 20"), "(0, 0.25]"] == "20 of 25"


def test_a_difference_at_another_step_than_the_baselines_final_one_says_so(make):
    whole, part = make("grpo", 1), make("disco", 1)
    metrics = part / runs.METRICS_FILE
    metrics.write_text("\n".join(metrics.read_text().split("\n")[:16]) + "\n")
    row = in_words(headline(read(whole, part), "grpo"), "grpo").loc["disco"]
    assert row["step"] == "15" and row["points to grpo"] == "+0.0, at step 15"


def test_means_over_other_benchmarks_are_not_compared(make):
    folders = [make("grpo", 1), make("disco", 1)]
    metrics = folders[1] / runs.METRICS_FILE
    metrics.write_text(metrics.read_text().replace("val-core/toy/", "val-core/other/"))
    row = in_words(headline(read(*folders), "grpo"), "grpo").loc["disco"]
    assert row["points to grpo"] == "no common step or benchmarks" and row["over"] == ""


def test_names_with_markup_stay_names(make, tmp_path):
    name = "_it_ __b__ &lt;i&gt; a_b%c&d$x"
    assert report.main([str(make(name, 1, name="odd")), str(make("grpo", 1)), "--out", str(tmp_path / "out")]) == 0
    assert "<td>_it_ __b__ &amp;lt;i&amp;gt; a_b%c&amp;d$x</td>" in (tmp_path / "out/report.html").read_text()
    assert r"\_it\_ \_\_b\_\_ \&lt;i\&gt; a\_b\%c\&d\$x & " in (tmp_path / "out/tables/headline.tex").read_text()
    assert pd.read_csv(tmp_path / "out/tables/headline.csv")["method"].tolist() == [name, "grpo"]
