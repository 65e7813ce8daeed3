"""Compare runs, finished or not, in tables and plots.

    python -m verl_ext.report RUN_DIR... [--baseline METHOD] [--out report] [--last 3]

RUN_DIR is ``trainer.default_local_dir`` of a run, or a directory with several of them. Writes ``report.md``, the plots,
both as one file ``report.html``, and each table in ``tables/`` as Markdown, LaTeX and CSV. Damaged runs are named and
left out; if none is left, the exit status is 1. Two runs question by question: ``python -m verl_ext.report.compare``.
"""

import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from verl_ext.command import parser_of
from verl_ext.report.headline import choose_baseline, evaluated, headline, in_words
from verl_ext.report.page import to_html
from verl_ext.report.plots import SMOOTHING, draw_all
from verl_ext.report.read import POOLED, Run, one_line, other_differences, read_runs, repeated_seeds
from verl_ext.report.tables import (
    difficulty_table,
    pass_k_tables,
    pass_table,
    published_tables,
    time_table,
    weight_table,
    without_samples,
)
from verl_ext.runs.files import write_whole
from verl_ext.runs.folder import CONFIG_FILE, METRICS_FILE, is_run


def find_runs(folders: list[Path]) -> tuple[list[Path], dict[Path, str]]:
    """Find the directories of runs in or below ``folders``; return also the folders without any, with the reason."""
    found = {folder: list(runs_below(folder)) for folder in folders}
    once = {os.path.realpath(run): run for runs in found.values() for run in runs}
    none = {f: f"{f} holds no run: no {CONFIG_FILE} of a run is in or below it" for f in folders if not found[f]}
    return list(once.values()), none


def runs_below(folder: Path) -> Iterator[Path]:
    """Yield the directories of runs in or below ``folder``, then the unreadable ones, so that they are named."""
    closed: list[Path] = []
    for top, below, files in os.walk(folder, onerror=lambda e: closed.append(Path(e.filename))):
        here = Path(top)
        if METRICS_FILE in files or (CONFIG_FILE in files and is_run(here)):
            yield here
        below[:] = sorted(name for name in below if not is_foreign(here, name, CONFIG_FILE in files))
    yield from closed


def is_foreign(top: Path, name: str, in_run: bool) -> bool:
    """Tell whether a directory in ``top`` is Hydra's, wandb's or, in a run, a checkpoint; none of these holds runs."""
    of_wandb = top.name == "wandb" and os.path.isdir(top / name / "files")
    return of_wandb or name == ".hydra" or (in_run and name.startswith("global_step_"))


def plain(text: object) -> str:
    """Escape the markup of a name or value."""
    # Within a word, as in grpo_er, an underscore marks nothing; an ampersand may begin an entity.
    return re.sub(r"([\\`*\[\]<>|!~]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", one_line(text))


def as_texts(table: pd.DataFrame, form: str = "") -> pd.DataFrame:
    """Write a data frame's cells as text, its index among them, with ``form`` as the numbers' format."""

    def cell(x) -> str:
        if isinstance(x, float) and pd.isna(x):
            return ""
        return format(x, form) if isinstance(x, float) and form else one_line(x)

    return table.reset_index().rename(columns={"index": ""}).map(cell)


def markdown(table: pd.DataFrame, form: str = "") -> str:
    """Write a data frame as a Markdown table."""
    table = as_texts(table, form)
    rows = [
        map(plain, table.columns),
        ["---"] * table.shape[1],
        *(map(plain, r) for r in table.itertuples(index=False)),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def latex(table: pd.DataFrame, form: str = "") -> str:
    """Write a data frame as a LaTeX table for the package booktabs."""
    return as_texts(table, form).to_latex(index=False, escape=True).replace("±", r"$\pm$")


class Tables:
    """Tables to paste, in a folder: each as Markdown, LaTeX and CSV."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def add(self, name: str, table: pd.DataFrame, form: str = "", numbers: pd.DataFrame | None = None) -> str:
        """Write a table and return it as Markdown; ``numbers`` go to the CSV file instead of its cells."""
        text = markdown(table, form)
        texts = {".md": text + "\n", ".tex": latex(table, form)}
        texts[".csv"] = as_texts(table, form).to_csv(index=False) if numbers is None else numbers.to_csv()
        for ending, content in texts.items():
            write_whole(self._folder / f"{name}{ending}", content.encode())
        return text


def short_names(folders: list[Path]) -> dict[Path, str]:
    """Name each run by its path below the folder that all share."""
    resolved = {f: Path(os.path.realpath(f)) for f in folders}
    common = Path(os.path.commonpath([r.parent for r in resolved.values()]))
    return {f: one_line(r.relative_to(common)) for f, r in resolved.items()}


def describe_values(by_method: dict[str, str]) -> str:
    """Group methods by their value: ``1e-4: ppo, rloo; 2e-4: grpo``."""
    methods = {value: [m for m in by_method if by_method[m] == value] for value in by_method.values()}
    return "; ".join(f"{value}: {', '.join(names)}" for value, names in methods.items())


def faults_of(runs: list[Run], damaged: dict[Path, str]) -> list[tuple[Path, str]]:
    """List what was left out and why: whole runs, then parts of the reported ones."""
    whole = [(folder, f"left out: {fault}") for folder, fault in damaged.items()]
    parts = [(run.folder, fault) for run in runs for fault in run.faults]
    return [(folder, one_line(fault)) for folder, fault in whole + parts]


def print_faults(runs: list[Run], damaged: dict[Path, str]) -> None:
    """Print what was left out to the standard error, one line each."""
    for folder, fault in faults_of(runs, damaged):
        print(f"{one_line(folder)}: {fault}", file=sys.stderr)


def pass_k_parts(tables: dict[int, pd.DataFrame], unstored: list[str], to_paste: Tables) -> Iterator[str]:
    """Yield the report's paragraphs on pass@k for k > 1."""
    for k, table in tables.items():
        yield f"## pass@{k}, %"
        if k == min(tables):
            yield (
                "Mean over questions of 1 - C(n - c, k) / C(n, k), with n stored responses per question, c of them "
                "right, and its 95 % interval (Student's t) over seeds, or over questions for a single run. verl's "
                "`best@k` is not shown: it draws with replacement, so it is biased low."
            )
            if any(POOLED in t for t in tables.values()):
                yield (
                    f"{POOLED}: the stored responses do not name their benchmark. Let the reward function return "
                    "`data_source` to separate them."
                )
        yield to_paste.add(f"pass_at_{k}", table)
    if unstored:
        yield (
            f"No pass@k for k > 1, because no responses are stored: {', '.join(unstored)}. "
            "`trainer.validation_data_dir=FOLDER`, one folder per run, stores them."
        )


def headline_parts(runs: list[Run], baseline: str | None, to_paste: Tables) -> Iterator[str]:
    """Yield the report's first paragraphs: final pass@1 of each method and its difference to ``baseline``."""
    table = headline(runs, baseline)
    if not len(table):
        return
    yield f"## Final pass@1{f', and its difference to {plain(baseline)}' if len(table) > 1 else ''}"
    yield to_paste.add("headline", in_words(table, baseline), numbers=table)
    if len(table) == 1:
        return
    text = (
        "pass@1 is the mean over benchmarks, ± its 95 % interval over seeds (Student's t). Differences are paired by "
        "seed and question. In parentheses is their 95 % interval over both (crossed random effects, Clark 1973; the "
        "formula is in `verl_ext/report/paired.py`). One that holds 0 does not tell the two apart."
    )
    seeds = {method: set(group) for method, group in evaluated(runs).items()}
    if others := [method for method, own in seeds.items() if baseline and not own & seeds[baseline]]:
        text += f" Runs of {plain(', '.join(others))} have other seeds than the baseline's and are paired in order."
    if (table["questions"] == 0).any():
        text += " Without stored responses of the same questions it is over seeds alone."
    if (table["pairs"] == 1).any():
        text += " A single seed says nothing of other seeds: its interval is over questions alone, and too short."
    yield text


def write_report(
    runs: list[Run], waiting: list[Path], damaged: dict[Path, str], out: Path, last: int, baseline: str | None = None
) -> str:
    """Draw the plots and write the tables into ``out`` and return the report as Markdown."""
    to_paste = Tables(out / "tables")
    # Before the tables: reading stored responses drops the damaged ones.
    unstored = without_samples(runs)
    difficulty, pass_k = difficulty_table(runs), pass_k_tables(runs)
    plots = dict(draw_all(runs, difficulty, out))
    names = short_names([r.folder for r in runs] + waiting + list(damaged))
    going = [f"{plain(names[r.folder])}: {plain(r.state)}" for r in runs if r.state != "finished"]
    state = f"Not finished: {'; '.join(going)}." if going else "All finished."
    parts = ["# Comparison of runs", *headline_parts(runs, choose_baseline(runs, baseline), to_paste)]
    parts += ["## What is compared", f"{len(runs)} runs. {state}"]
    if waiting:
        parts.append(f"No metrics yet: {', '.join(plain(names[f]) for f in waiting)}.")
    if faults := faults_of(runs, damaged):
        table = pd.DataFrame([(names[folder], fault) for folder, fault in faults], columns=["run", "fault"])
        parts += ["**Left out:**", markdown(table.set_index("run"))]
    if repeated := repeated_seeds(runs):
        parts.append(f"**Runs with the same seed, counted once in intervals:** {plain('; '.join(repeated))}.")
    if others := other_differences(runs):
        numbered = (
            " Methods with too many differences for a name are numbered." if any("#" in r.method for r in runs) else ""
        )
        table = pd.DataFrame({n: {"values": describe_values(v)} for n, v in others.items()}).T
        parts += [f"**The runs differ in more than the method.**{numbered} Other differences:", markdown(table)]
    elif len({r.method for r in runs}) > 1:
        parts.append("The runs differ only in method and seed.")

    if any(len(r.pass_at_1) for r in runs):
        text = "Mean over seeds, with its 95 % interval (Student's t) if there are several."
        parts += ["## pass@1, %", text, to_paste.add("pass_at_1", pass_table(runs, last))]
    else:
        parts.append("No evaluation yet.")
    parts += pass_k_parts(pass_k, [plain(names[r.folder]) for r in unstored], to_paste)
    if tables := published_tables(runs):
        parts.append("## Published pass@1, %")
        for source, table in tables.items():
            parts += [f"For this model, from {source}.", markdown(table)]
    if "pass_at_1.svg" in plots:
        parts.append(image("pass_at_1.svg", plots))

    if len(difficulty):
        text = (
            "By a question's pass rate at step 0, over all runs from the same model. With few samples per question, "
            "regression to the mean inflates gains in the lowest band and deflates them in the highest."
        )
        parts += ["## Gain by difficulty, points of pass@1", text]
        parts += [to_paste.add("difficulty", 100 * difficulty, "+.1f"), image("difficulty.svg", plots)]
    if len(weight := weight_table(runs)):
        text = (
            "`34 of 20`: questions with this pass rate in the batch had 34 % of the weight and were 20 % of the "
            "questions. A response's weight is its mean absolute advantage over tokens, before the update clips it or "
            "divides it by a length. Right is a reward above 0."
        )
        parts += ["## The training's weight by difficulty, %", text, to_paste.add("weight", weight)]
        parts.append(image("weight.svg", plots))

    curves = [p for p in plots if p not in ("pass_at_1.svg", "difficulty.svg", "weight.svg")]
    if curves:
        text = (
            f"Thick: mean over runs; thin: single runs. Running means over {SMOOTHING} steps. For methods without a KL "
            "metric of their own it is verl's `actor/ppo_kl`, measured within the updates."
        )
        parts += ["## Training", text, *(image(p, plots) for p in curves)]
    if len(times := time_table(runs)):
        parts += [
            "## Time, seconds per step",
            "Medians, without each run's first 5 steps.",
            to_paste.add("time", times, ".2f"),
        ]

    about = {names[r.folder]: {"method": r.method, "seed": r.seed, "state": r.state} for r in runs}
    parts += ["## Runs", markdown(pd.DataFrame(about).T)]
    parts.append(f"verl {version('verl')}, verl-disco {version('verl-disco')}, torch {version('torch')}.")
    return "\n\n".join(parts) + "\n"


def image(file: str, titles: dict[str, str]) -> str:
    return f"![{titles[file]}]({file})"


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("verl_ext.report", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="trainer.default_local_dir of a run, or above"
    )
    parser.add_argument(
        "--baseline", help="method or algorithm to compare with; default: grpo, else ppo, else the first"
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to; default: report")
    parser.add_argument("--last", type=int, default=3, help="evaluations in 'mean of last'; default: 3")
    args = parser.parse_args(arguments)
    if args.last < 1:
        parser.error(f"--last {args.last} must be at least 1")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; name a directory")
    folders, none = find_runs(args.runs)
    runs, damaged = read_runs(folders)
    damaged = none | damaged
    if not runs:
        print_faults(runs, damaged)
        raise SystemExit("nothing to report: " + ("no run is readable" if damaged else "no run has logged a step yet"))
    try:
        choose_baseline(runs, args.baseline)
    except ValueError as e:
        parser.error(str(e))
    waiting = [f for f in folders if f not in damaged and f not in {r.folder for r in runs}]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        text = write_report(runs, waiting, damaged, args.out, args.last, args.baseline)
        write_whole(args.out / "report.md", text.encode())
        write_whole(args.out / "report.html", to_html(text, args.out).encode())
    except OSError as e:
        raise SystemExit(f"error: --out {args.out} cannot be written: {e}") from None
    print_faults(runs, damaged)
    print(text)
    print(f"written: {args.out / 'report.md'}, {args.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
