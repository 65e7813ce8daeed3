"""Two runs question by question, and what any page of a report must be."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest

from verl_ext.report import compare
from verl_ext.report.page import page, to_html


class Page(HTMLParser):
    """Text, open tags and links of a page; fails on tags that do not match."""

    VOID = {"meta", "br", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture
def two(make):
    """Two runs on three questions; the texts look like HTML."""
    folders = [make(name, 1, right={20: {"x": 0}}) for name in ("disco", "grpo")]
    for folder, right in zip(folders, ((1, 0, 1), (0, 1, 1)), strict=True):
        lines = [
            {"input": f"<b>q{i}</b>", "output": f"<script>{folder.name} {r}</script>", "gts": "7", "score": float(r)}
            for i, r in enumerate(right)
        ]
        (folder / "validation/20.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folders


def test_what_one_solved_and_the_other_did_not_with_the_texts(two, tmp_path, capsys):
    out = tmp_path / "out"
    assert compare.main([*map(str, two), "--out", str(out)]) == 0
    text = (out / "compare.html").read_text()
    found = Page(text)
    shown = " ".join(found.text.split())
    assert "pass@1 of A minus B: +0.0 (-248.4 to +248.4) points" in shown
    assert "Solved by A, not by B: 1" in shown and "Solved by B, not by A: 1" in shown
    assert "Solved by neither" in shown and found.tags.count("details") == 2
    # Texts stay texts.
    assert "<script>disco-1 1</script>" in shown and "<script>grpo-1 0</script>" in shown and "<b>q0</b>" in shown
    assert found.tags.count("script") == 1 and "b" not in found.tags and found.links == []
    table = pd.read_csv(out / "compare.csv")
    assert table["rate_a"].tolist() == [1, 0, 1] and table["rate_b"].tolist() == [0, 1, 1]
    assert table["truth"].tolist() == [7, 7, 7]
    printed = " ".join(capsys.readouterr().out.split())
    assert "Solved by A, not by B 1 Solved by B, not by A 1 Solved by neither 0 Solved by both 1" in printed


def test_of_several_responses_the_text_is_one_that_tells(make, tmp_path):
    folders = [make(name, 1, right={20: {"x": 0}}) for name in ("disco", "grpo")]
    for folder, scores in zip(folders, ((0, 1, 1, 1), (1, 0, 0, 0)), strict=True):
        lines = [{"input": "q", "output": f"{folder.name} {i}", "score": s} for i, s in enumerate(scores)]
        (folder / "validation/20.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    shown = Page((tmp_path / "out/compare.html").read_text()).text
    assert "A: 75% rightdisco-1 1" in shown and "B: 25% rightgrpo-1 1" in shown


def test_long_texts_are_cut_in_the_middle():
    text = compare.shortened("a" * 15_000 + "b" * 15_000)
    assert len(text) < 20_100 and "[... 10000 characters ...]" in text and text[0] + text[-1] == "ab"


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "grpo-1 has stored responses of no step: a step of both is needed. trainer.validation_data_dir=FOLDER"),
        (["--step", "7"], "step 7 of both is needed"),
    ],
)
def test_it_says_what_to_switch_on(make, tmp_path, options, message, capsys):
    folders = [make("disco", 1, right={20: {"a": 1}}), make("grpo", 1)]
    assert compare.main([*map(str, folders), *options]) == 1
    assert message in capsys.readouterr().err


def test_runs_without_a_common_question_are_refused(make, capsys):
    assert compare.main([str(make(name, 1, right={20: {name: 1}})) for name in ("disco", "grpo")]) == 1
    assert "have no question in common at step 20" in capsys.readouterr().err


def test_a_questions_line_is_what_it_has_of_its_own_and_others_are_counted(make, tmp_path, capsys):
    words = "Here are the numbers {}. Write an expression that equals {}. " + "Use each number exactly once. " * 9
    folders = [make(name, 1, right={20: {"x": 0}}) for name in ("disco", "grpo")]
    for folder, targets in zip(folders, ((95, 12, 7), (95, 12)), strict=True):
        lines = [
            {"input": f"user\n{words.format('38, 3, 54', t)}", "output": "x", "score": float(folder == folders[0])}
            for t in targets
        ]
        (folder / "validation/20.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/compare.html").read_text()
    assert re.findall("<summary>(.*?)</summary>", text) == ["toy: 95.", "toy: 12."]
    assert "Step 20, 2 questions of both; 1 of A alone are left out." in text
    assert "2 questions of both; 1 of A alone are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "texts, lines",
    [(["same"], ["same"]), (["a b", "a b c"], ["a b", "c"]), (["x 1 y 2 z", "x 3 y 4 z"], ["1 y 2", "3 y 4"])],
)
def test_lines_without_what_all_share(texts, lines):
    index = pd.MultiIndex.from_tuples([("toy", text, 0) for text in texts], names=compare.KEY)
    assert list(compare.telling_lines(pd.DataFrame({"rate": 0.0}, index=index)).values()) == lines


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_in_a_browser_tables_sort_and_a_telephone_need_not_scroll_sideways(tmp_path):
    text = "| method | points |\n|---|---|\n| b | +9.5 (1 to 2) |\n| c | baseline |\n| a | -1,000.0 |\n| d | +10.0 |\n"
    text += "\n|" + " wide |" * 60 + "\n|" + "---|" * 60 + "\n"
    clicks = """<script>
      const rows = column => [...document.querySelector('tbody').rows].map(row => row.cells[column].textContent).join();
      const heads = document.querySelectorAll('th'), found = [];
      for (const [head, column] of [[1, 1], [1, 1], [0, 0], [0, 0]]) { heads[head].click(); found.push(rows(0)); }
      document.title = found.join(' ') + ' ' + (document.documentElement.scrollWidth <= innerWidth);
    </script>"""
    (tmp_path / "page.html").write_text(to_html(text, tmp_path).replace("</body>", clicks + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,800", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    # Down, up, by name down and up; what is no number comes last.
    assert re.search("<title>(.*?)</title>", shown)[1] == "d,b,a,c a,b,d,c d,c,b,a a,b,c,d true"


def test_a_page_is_for_any_screen_and_loads_nothing():
    text = page("a < b", "<p>x</p>")
    found = Page(text)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "a < b" in found.text and found.links == [] and "http" not in text and "@import" not in text
