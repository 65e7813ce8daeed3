"""Random results through the statistics of a report, and random texts through what shows them."""

import itertools
import math
import statistics
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from verl_ext.report.page import page, to_html
from verl_ext.report.paired import paired_interval
from verl_ext.report.read import clean, is_number, one_line
from verl_ext.report.tables import mean_and_interval, over_questions, pass_at_k, percent, plain
from verl_ext.runs.folder import read_json_lines, read_settings


@cases(200)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 2), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 8]))
def test_a_paired_interval_asks_for_no_order_and_no_side(seeds, questions, benchmarks, seed, levels):
    rng = np.random.default_rng(seed)
    d = rng.integers(-levels, levels + 1, (seeds, questions * benchmarks)) / levels
    stratum = np.arange(benchmarks).repeat(questions)
    mean, half = paired_interval(d, stratum)
    assert mean == pytest.approx(d.mean()) and (math.isnan(half) or 0 <= half < math.inf)
    assert math.isnan(half) == (seeds == questions == 1)
    order = rng.permutation(questions * benchmarks)
    for other, sign in ((d[rng.permutation(seeds)][:, order], 1), (-d[:, order], -1)):
        found = paired_interval(other, stratum[order])
        assert found == pytest.approx((sign * mean, half), nan_ok=True, abs=1e-7)
    # More of the same questions make it no wider.
    if questions > 1:
        assert paired_interval(np.hstack([d] * 3), np.hstack([stratum] * 3))[1] <= half + 1e-7


@cases(200)
@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples, data):
    right, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    draws = list(itertools.combinations([1] * right + [0] * (samples - right), k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@cases(200)
@given(st.lists(st.floats(-1, 1), max_size=6))
def test_a_mean_has_an_interval_from_two_values_on(values):
    mean, half = mean_and_interval(values)
    assert math.isnan(mean) == (not values) and math.isnan(half) == (len(values) < 2)
    assert (percent(mean, half) == "") == (not values) and "nan" not in percent(mean, half)
    assert not values or min(values) - 1e-9 <= mean <= max(values) + 1e-9


@cases(150)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.lists(st.integers(0, 8).map(lambda right: right / 8), min_size=1, max_size=5),
        min_size=1,
    )
)
def test_an_interval_over_questions_is_of_independent_benchmarks(rates):
    values = pd.Series([x for of in rates.values() for x in of], [name for name, of in rates.items() for _ in of])
    found = {name: [float(x) for x in cell.split(" ± ")] for name, cell in over_questions(values).items()}
    assert set(found) == {*rates, *["mean"] * (len(rates) > 1)}
    halves = []
    for name, of in rates.items():
        assert found[name][0] == pytest.approx(100 * statistics.fmean(of), abs=0.051)
        t = stats.t.interval(0.95, len(of) - 1, scale=stats.sem(of))[1] if len(of) > 1 and len(set(of)) > 1 else 0.0
        halves.append(100 * t if len(of) > 1 else math.nan)
        assert found[name][1:] == ([pytest.approx(halves[-1], abs=0.051)] if len(of) > 1 else [])
    if len(rates) > 1:
        # Questions are drawn apart: variances of the means add up.
        mean = statistics.fmean(map(statistics.fmean, rates.values()))
        assert found["mean"][0] == pytest.approx(100 * mean, abs=0.051)
        half = math.sqrt(sum(h * h for h in halves)) / len(halves)
        assert found["mean"][1:] == ([] if math.isnan(half) else [pytest.approx(half, abs=0.051)])


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.attributes = set(), set()

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)
        self.attributes.update(name for name, _ in attributes)


ours = {
    "p",
    "ul",
    "ol",
    "li",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "blockquote",
    "code",
    "pre",
    "em",
    "strong",
    "hr",
    "br",
}
ours |= {
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "a",
    "div",
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "script",
}
markup = st.lists(
    st.sampled_from([*"<>&\"'/ =a|`*#[]()\n!-", "<script>", "onclick=", "<img src=x", "javascript:x", "]("])
)


@cases(200)
@given(st.one_of(markup.map("".join), st.text()).filter(lambda text: "![" not in text))
def test_a_text_is_no_html(text):
    found = Tags()
    found.feed(page(text, ""))
    assert found.found <= ours
    with tempfile.TemporaryDirectory() as folder:
        found.feed(to_html(f"# {one_line(text)}\n\n{text}\n", Path(folder)))
    assert found.found <= ours and not {name for name in found.attributes if name.startswith("on")}
    assert one_line(text).count("\n") == 0 and clean(text) is not None and isinstance(plain(text), str)


@cases(200)
@given(st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=2)))
def test_a_number_is_one(value):
    assert is_number(value) == (isinstance(value, int | float) and abs(value) != math.inf)


@cases(200)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=40).map(str.encode),
        st.lists(
            st.sampled_from(
                [
                    b"{",
                    b"}",
                    b'{"a": 1}',
                    b"\n",
                    b"\r\n",
                    b"null",
                    b'"',
                    b"\xff",
                    b"\xe2\x82",
                    b"- ",
                    b": ",
                    b"${x}",
                    b"[" * 3000,
                ]
            )
        ).map(b"".join),
    )
)
def test_any_file_is_read_or_damaged(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_bytes(content)
        for read in (lambda: list(read_json_lines(Path(folder) / "config.yaml")), lambda: read_settings(Path(folder))):
            try:
                assert read() is not None
            except ValueError as e:
                assert "config.yaml" in str(e)
