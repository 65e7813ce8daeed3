"""Compares runs, finished or still going: tables and plots of what their metrics files say.

    python -m verl_ext.report RUN_DIR... [--out report] [--last 3]

RUN_DIR is ``trainer.default_local_dir`` of a run, or a directory with several of them. Writes ``report.md``, the same
as one file ``report.html``, and the plots.
"""

import argparse
import base64
import html
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from markdown_it import MarkdownIt

from verl_ext.report.plots import SMOOTHING, draw_all
from verl_ext.report.read import Run, other_differences, read_runs, repeated_seeds
from verl_ext.report.tables import difficulty_table, pass_table, published_table, time_table
from verl_ext.runs import CONFIG_FILE

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{display:block;overflow-x:auto;border-collapse:collapse;margin:1em 0;font-variant-numeric:tabular-nums}"
    "td,th{border:1px solid #ccc;padding:.25em .6em;text-align:right}td:first-child,th:first-child{text-align:left}"
    "img{max-width:49%}code{background:#f3f3f3}"
)


def find_runs(folders: list[Path]) -> list[Path]:
    """The directories of runs in or below ``folders``.

    Raises:
        SystemExit: there is none in one of them.
    """
    found = []
    for folder in folders:
        here = sorted(f.parent for f in folder.rglob(CONFIG_FILE) if ".hydra" not in f.parts)
        if not here:
            raise SystemExit(f"{folder} holds no run: there is no {CONFIG_FILE} in or below it")
        found += here
    return list(dict.fromkeys(found))


def plain(text) -> str:
    """Names and values as text: no markup, no line ends."""
    return re.sub(r"([\\`*\[\]<>|!~])", r"\\\1", " ".join(str(text).split()))


def markdown(table: pd.DataFrame, form: str = "") -> str:
    """A data frame as a Markdown table; numbers by ``form``."""

    def cell(x) -> str:
        if isinstance(x, float) and pd.isna(x):
            return ""
        return format(x, form) if isinstance(x, float) and form else plain(x)

    table = table.reset_index()
    lines = [" | ".join("" if str(c) == "index" else cell(c) for c in table.columns)]
    lines.append(" | ".join(["---"] * table.shape[1]))
    lines += [" | ".join(cell(x) for x in row) for row in table.itertuples(index=False)]
    return "\n".join(f"| {line} |" for line in lines)


def short_names(folders: list[Path]) -> dict[Path, str]:
    """Runs by their path below what all have in common."""
    resolved = {f: f.resolve() for f in folders}
    common = Path(os.path.commonpath([r.parent for r in resolved.values()]))
    return {f: str(r.relative_to(common)) for f, r in resolved.items()}


def describe_values(by_method: dict[str, str]) -> str:
    """``1e-4: disco, ppo; 2e-4: grpo``"""
    methods: dict[str, list[str]] = {}
    for method, value in by_method.items():
        methods.setdefault(value, []).append(method)
    return "; ".join(f"{value}: {', '.join(names)}" for value, names in methods.items())


def write_report(runs: list[Run], waiting: list[Path], out: Path, last: int) -> str:
    """Draw the plots into ``out``; returns the report as Markdown."""
    difficulty = difficulty_table(runs)
    plots = dict(draw_all(runs, difficulty, out))
    parts = ["# Comparison of runs"]
    names = short_names([r.folder for r in runs] + waiting)
    going = [f"{plain(names[r.folder])}: {r.state}" for r in runs if r.state != "finished"]
    parts.append(f"{len(runs)} runs." + (f" Not finished: {'; '.join(going)}." if going else " All finished."))
    if waiting:
        parts.append(f"Without metrics yet: {', '.join(plain(names[f]) for f in waiting)}.")
    if repeated := repeated_seeds(runs):
        parts.append(f"**The same seed twice, counted once in intervals:** {plain('; '.join(repeated))}.")
    others = other_differences(runs)
    if others:
        parts.append("**The runs differ in more than the method.** What else is not the same:")
        parts.append(markdown(pd.DataFrame({n: {"values": describe_values(v)} for n, v in others.items()}).T))
    elif len({r.method for r in runs}) > 1:
        parts.append("The runs differ in method and seed alone.")

    ks = sorted({k for r in runs for k in r.pass_at})
    for k in ks:
        parts.append(f"## pass@{k}, %")
        parts.append("Mean over seeds, with its 95 % interval (Student's t) where there are several.")
        parts.append(markdown(pass_table(runs, k, last)))
    if len(table := published_table(runs)):
        parts += ["## Published pass@1, %", "The DisCO paper's (arXiv 2505.12366), for this model.", markdown(table)]
    if not ks:
        parts.append("There is no evaluation yet.")
    if "pass_at_1.png" in plots:
        parts.append(image("pass_at_1.png", plots))

    if len(difficulty):
        parts.append("## Gain by difficulty, points of pass@1")
        parts.append(
            "By a question's share of right responses at step 0, over all runs from the same model. Few samples a "
            "question flatter the lowest bands and wrong the highest: by chance alone, it moves towards its true share."
        )
        parts += [markdown(100 * difficulty, "+.1f"), image("difficulty.png", plots)]

    curves = [p for p in plots if p not in ("pass_at_1.png", "difficulty.png")]
    if curves:
        parts.append("## Training")
        parts.append(
            f"Thick: mean over runs; thin: the runs. Running means of {SMOOTHING} steps. For methods outside DisCO's "
            "family the KL is verl's `actor/ppo_kl`, measured within the updates."
        )
        parts.append("\n".join(image(p, plots) for p in curves))
    if len(times := time_table(runs)):
        parts += ["## Time, seconds a step", "Medians, without the first 5 steps of each run.", markdown(times, ".2f")]

    parts.append("## Runs")
    about = {names[r.folder]: {"method": r.method, "seed": r.seed, "state": r.state} for r in runs}
    parts.append(markdown(pd.DataFrame(about).T))
    parts.append(f"verl {version('verl')}, verl-disco {version('verl-disco')}, torch {version('torch')}.")
    return "\n\n".join(parts) + "\n"


def image(file: str, titles: dict[str, str]) -> str:
    return f"![{titles[file]}]({file})"


def to_html(text: str, folder: Path) -> str:
    """The report in one file, its images inside."""
    # Names of runs and settings are text, never markup: HTML in Markdown stays off.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)

    def embed(match: re.Match) -> str:
        data = base64.b64encode((folder / html.unescape(match[1])).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([\w.]+\.png)"', embed, body)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison of runs</title>'
        f"<style>{STYLE}</style>{body}</html>\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("report"))
    parser.add_argument("--last", type=int, default=3, help="evaluations in 'mean of last'")
    args = parser.parse_args(arguments)
    folders = find_runs(args.runs)
    runs = read_runs(folders)
    if not runs:
        raise SystemExit("none of the runs has logged a step yet")
    args.out.mkdir(parents=True, exist_ok=True)
    waiting = [f for f in folders if f not in {r.folder for r in runs}]
    text = write_report(runs, waiting, args.out, args.last)
    (args.out / "report.md").write_text(text)
    (args.out / "report.html").write_text(to_html(text, args.out))
    print(text)
    print(f"written: {args.out / 'report.md'}, {args.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
