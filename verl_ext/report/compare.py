"""Compare two runs question by question: what one solved and the other did not, with the texts.

    python -m verl_ext.report.compare RUN_A RUN_B [--step N] [--out report] [--most 50]

Needs the responses that verl stores with ``trainer.validation_data_dir=FOLDER`` (our tasks and
``+experiment=evaluate`` set it), one folder per run. Without ``--step`` it takes the last evaluation that both have.
Writes ``compare.html``, and ``compare.csv`` with all questions.
"""

import html
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from verl_ext.command import parser_of
from verl_ext.report.page import page
from verl_ext.report.paired import paired_interval
from verl_ext.report.read import Run, one_line, read_responses, read_run
from verl_ext.runs.files import write_whole

KEY = ["benchmark", "question", "occurrence"]
"""What tells questions apart, in both runs alike: a text may occur several times."""

LONGEST_TEXT = 20_000
"""Characters of a response on the page; its middle is left out beyond."""

GROUPS = {
    (True, False): "Solved by A, not by B",
    (False, True): "Solved by B, not by A",
    (False, False): "Solved by neither",
    (True, True): "Solved by both",
}
"""Questions by whether A and B solved them."""


def questions_of(run: Run, step: int) -> pd.DataFrame:
    """Read a step's stored responses by question, indexed by ``KEY``.

    Returns:
        Columns ``truth``; ``rate``, the mean score; ``solved``, by at least half of the responses; and ``text``, the
        first right response of a solved question and the first wrong one of another.
    """
    responses = read_responses(run.dumps[step], run.unnamed_benchmark, texts=True)
    rows = []
    for _, group in responses.groupby("number", sort=False):
        rate = group["right"].mean()
        shown = group[(group["right"] >= 0.5) == (rate >= 0.5)]
        first = group.iloc[0]
        rows.append(
            {
                "benchmark": first["benchmark"],
                "question": first["question"],
                "truth": first["truth"],
                "rate": rate,
                "solved": rate >= 0.5,
                "text": (shown if len(shown) else group)["output"].iloc[0],
            }
        )
    table = pd.DataFrame(rows)
    table["occurrence"] = table.groupby(KEY[:2]).cumcount()
    return table.set_index(KEY)


def last_common_step(a: Run, b: Run, step: int | None = None) -> int:
    """Return ``step``, or the last evaluation whose responses both runs have stored.

    Raises:
        ValueError: there is none; names the run, what it has and what stores responses.
    """
    common = set(a.dumps) & set(b.dumps)
    if step in common or (step is None and common):
        return max(common) if step is None else step
    have = [f"{run.folder} has stored responses of {sorted(run.dumps) or 'no step'}" for run in (a, b)]
    wanted = "a step of both" if step is None else f"step {step} of both"
    raise ValueError(
        f"{'; '.join(have)}: {wanted} is needed. trainer.validation_data_dir=FOLDER, one folder per run, stores them"
    )


def side_by_side(a: Run, b: Run, step: int) -> pd.DataFrame:
    """Join two runs' questions at a step: the columns of :func:`questions_of`, with ``_a`` and ``_b`` at the end.

    ``attrs`` counts the questions of "A" and of "B" that the other has not.

    Raises:
        ValueError: they have no question in common, or a file is damaged.
    """
    of_a, of_b = questions_of(a, step).add_suffix("_a"), questions_of(b, step).add_suffix("_b")
    table = of_a.join(of_b, how="inner")
    if not len(table):
        raise ValueError(f"{a.folder} and {b.folder} have no question in common at step {step}")
    table.attrs |= {"A": len(of_a) - len(table), "B": len(of_b) - len(table)}
    return table


def name_of(run: Run) -> str:
    return f"{run.algorithm}, seed {run.seed}, in {one_line(run.folder)}"


def shortened(text: str) -> str:
    """Leave out the middle of a long text."""
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


def body_of(table: pd.DataFrame, a: Run, b: Run, step: int, most: int) -> Iterator[str]:
    """Yield the page's parts, with at most ``most`` questions of each group whose texts differ in success."""
    benchmark = table.index.get_level_values("benchmark").to_numpy()
    mean, half = paired_interval((table["rate_a"] - table["rate_b"]).to_numpy()[None], benchmark)
    interval = "" if math.isnan(half) else f" ({100 * (mean - half):+.1f} to {100 * (mean + half):+.1f})"
    yield "<h1>Two runs, question by question</h1>"
    names = "".join(f"{side}: {html.escape(name_of(run))}.<br>" for side, run in (("A", a), ("B", b)))
    yield f"<p>{names}Step {step}, {len(table)} questions{left_out(table)}.</p>"
    yield (
        f"<p>pass@1 of A minus B: {100 * mean:+.1f}{interval} points, with its 95 % interval over questions alone. "
        "Solved means by at least half of the responses.</p>"
    )
    lines = telling_lines(table)
    by_group = table.groupby(["solved_a", "solved_b"])
    groups = {key: by_group.get_group(key) for key in GROUPS if key in by_group.groups}
    yield '<div class="table"><table><thead><tr><th></th><th>questions</th></tr></thead><tbody>'
    yield from (f"<tr><td>{title}</td><td>{len(groups.get(key, ()))}</td></tr>" for key, title in GROUPS.items())
    yield "</tbody></table></div>"
    for key in [key for key in ((True, False), (False, True)) if key in groups]:
        rows = groups[key]
        # The clearest first.
        rows = rows.loc[(rows["rate_a"] - rows["rate_b"]).abs().sort_values(ascending=False, kind="stable").index]
        more = f", the first {most}" if len(rows) > most else ""
        yield f"<h2>{GROUPS[key]}: {len(rows)}{more}</h2>"
        yield from (question_html(key, row, lines[key]) for key, row in rows[:most].iterrows())


def left_out(table: pd.DataFrame) -> str:
    """Say how many questions only one of the runs has."""
    alone = [f"{table.attrs[side]} of {side} alone" for side in "AB" if table.attrs.get(side)]
    return f" of both; {' and '.join(alone)} are left out" if alone else ""


def telling_lines(table: pd.DataFrame) -> dict[tuple, str]:
    """Map each question to a line of it, without what all questions of its benchmark begin and end with."""
    found = {}
    for _, group in table.groupby(level="benchmark", sort=False):
        words = {key: one_line(key[1]).split() for key in group.index}
        different = set(map(tuple, words.values()))
        first = len(os.path.commonprefix([*different]))
        last = len(os.path.commonprefix([w[first:][::-1] for w in different]))
        for key, own in words.items():
            # All the same, or some a part of others: as it is.
            line = " ".join(own[first : len(own) - last] if len(different) > 1 else own) or " ".join(own)
            found[key] = line[:150]
    return found


def question_html(key: tuple, row: pd.Series, line: str) -> str:
    """Write a question with a response of each run, folded."""
    # Questions and responses are other people's texts, and a model's.
    title, question = html.escape(f"{key[0]}: {line}"), html.escape(shortened(key[1]))
    sides = "".join(
        f"<div>{side}: {row[f'rate_{end}']:.0%} right<pre>{html.escape(shortened(row[f'text_{end}']))}</pre></div>"
        for side, end in (("A", "a"), ("B", "b"))
    )
    truth = html.escape(shortened(row["truth_a"]))
    return (
        f"<details><summary>{title}</summary><pre>{question}</pre><p>Expected: <code>{truth}</code></p>"
        f'<div class="pair">{sides}</div></details>'
    )


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("verl_ext.report.compare", __doc__)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="trainer.default_local_dir of a run")
    parser.add_argument("--step", type=int, help="default: the last evaluation that both have")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to; default: report")
    parser.add_argument("--most", type=int, default=50, help="questions with texts in each direction; default: 50")
    args = parser.parse_args(arguments)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; name a directory")
    try:
        found = [read_run(folder) for folder in args.runs]
        if empty := [str(folder) for folder, run in zip(args.runs, found, strict=True) if run is None]:
            raise ValueError(f"{', '.join(empty)} has logged no step yet")
        a, b = found
        step = last_common_step(a, b, args.step)
        table = side_by_side(a, b, step)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    title = "Two runs, question by question"
    rates = table[["truth_a", "rate_a", "rate_b"]].rename(columns={"truth_a": "truth"})
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write_whole(args.out / "compare.html", page(title, "\n".join(body_of(table, a, b, step, args.most))).encode())
        write_whole(args.out / "compare.csv", rates.to_csv().encode())
    except OSError as e:
        print(f"error: --out {args.out} cannot be written: {e}", file=sys.stderr)
        return 1
    for key, title in GROUPS.items():
        print(f"{title:22} {int(((table['solved_a'] == key[0]) & (table['solved_b'] == key[1])).sum()):6d}")
    if more := left_out(table):
        print(f"{len(table)} questions{more}")
    print(f"written: {args.out / 'compare.html'}, {args.out / 'compare.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
