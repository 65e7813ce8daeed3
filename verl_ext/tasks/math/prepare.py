"""Convert training and benchmark sets to verl's parquet format.

    python -m verl_ext.tasks.math.prepare --out data/math                          # as published, from the hub
    python -m verl_ext.tasks.math.prepare --out data/math --train dapo_math --benchmarks aime24 math500
    python -m verl_ext.tasks.math.prepare --out data/gsm8k --train gsm8k --benchmarks gsm8k
    python -m verl_ext.tasks.math.prepare --out data/math --train problems.jsonl --local downloads --benchmarks all

Writes ``OUT/train.parquet`` and one file per benchmark, such as ``OUT/aime24.parquet``; no file at all if a set cannot
be used. Fields of a row: ``data_source`` (the set's name, by which metrics are reported), ``prompt`` (the set's system
message, if any, and a user message with the problem and the suffix), ``ability``, ``reward_model.ground_truth`` (a list
of alternatives) and ``extra_info``.

Files may be JSON, JSONL or parquet, also compressed (.gz), with a problem and an answer per row, or rows in verl's own
format (:mod:`verl_ext.tasks.math.layouts`). Changes to rows are counted, with the first place: lines count from 1, rows
of other files from 0.
"""

import argparse
import gzip
import io
import json
import os
import re
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet

from verl_ext.command import parser_of
from verl_ext.tasks.math.layouts import QUESTION, Unusable, answers_of, columns_of, question_of, shorten
from verl_ext.tasks.math.reward import compute_score

SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."
"""The published suffix (arXiv 2505.12366)."""

ENDINGS = ".parquet, .jsonl or .json (also .gz of them)"
ENDING = re.compile(r"(?<=[^/\\])\.(parquet|jsonl|json)(\.gz)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """The source of a set."""

    hub: str
    """Name on the Hugging Face hub."""
    split: str
    config: str | None = None
    files: tuple[str, ...] = ()
    """File names of a local copy, without ending, best first; by default the set's name."""


TRAIN = {
    # The published runs' training set, about 40.3k problems.
    "deepscaler": Source("agentica-org/DeepScaleR-Preview-Dataset", "train"),
    # DAPO's set without the original's hundred copies of each problem and the prompt around it.
    "dapo_math": Source("open-r1/DAPO-Math-17k-Processed", "train", config="all"),
    "gsm8k": Source("openai/gsm8k", "train", config="main", files=("gsm8k_train", "train")),
}
BENCHMARKS = {
    "aime24": Source("HuggingFaceH4/aime_2024", "train", files=("aime24", "aime")),
    "aime25": Source("math-ai/aime25", "test"),
    "math500": Source("HuggingFaceH4/MATH-500", "test", files=("math500", "math")),
    # AMC 12 of 2022 and 2023, 83 problems; papers call it AMC 2023.
    "amc23": Source("AI-MO/aimo-validation-amc", "train", files=("amc23", "amc")),
    "minerva": Source("math-ai/minervamath", "test"),
    "olympiadbench": Source("math-ai/olympiadbench", "test", files=("olympiadbench", "olympiad_bench")),
    "gsm8k": Source("openai/gsm8k", "test", config="main", files=("gsm8k_test", "test")),
}
PUBLISHED = [name for name in BENCHMARKS if name != "gsm8k"]
"""The six benchmarks of the paper."""


MOST_NOTES = 8


class DataError(Exception):
    """A set cannot be found, read or used; the message says what to do."""


@dataclass
class Report:
    """Counts of a set's rows."""

    read: int = 0
    kept: int = 0
    rejected: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)
    """Changes and remarks on rows that are kept."""
    first: dict[str, str] = field(default_factory=dict)
    """The place of the first row with each reason or note."""
    duplicates: int = 0
    """Rows that repeat an earlier problem with an equal answer."""
    conflicts: int = 0
    """Rows that repeat an earlier problem with another answer."""
    overlap: Counter = field(default_factory=Counter)
    """Rows with a problem of each benchmark."""

    def add(self, counter: Counter, what: str, where: str, shown: str = "") -> None:
        """Count one row in ``rejected`` or ``notes``."""
        counter[what] += 1
        self.first.setdefault(what, f"{where}: {shorten(shown)}" if shown else where)

    def lines(self, name: str, done: str, origin: str) -> Iterator[str]:
        """Format the report for printing."""
        yield f"{name:16} {self.read:7} read {self.kept:7} {done}, from {origin}"
        for reason, count in self.rejected.most_common():
            yield f"{'':16} {count:7} rejected: {reason} (first: {self.first[reason]})"
        for note, count in self.notes.most_common(MOST_NOTES):
            yield f"{'':16} {count:7} noted: {note} (first: {self.first[note]})"
        rest = self.notes.most_common()[MOST_NOTES:]
        if rest:
            yield f"{'':16} {sum(count for _, count in rest):7} noted: {len(rest)} other such texts"
        for count, what in ((self.duplicates, "the same answer"), (self.conflicts, "another answer")):
            if count:
                yield f"{'':16} {count:7} repeat an earlier problem with {what}"
        for benchmark, count in self.overlap.items():
            yield f"{'':16} {count:7} problems of {benchmark} are in it"


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("verl_ext.tasks.math.prepare", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, math.folder of the run")
    parser.add_argument(
        "--train", nargs="*", default=["deepscaler"], help=f"{', '.join(TRAIN)}, or files; default: deepscaler"
    )
    parser.add_argument(
        "--benchmarks",
        nargs="*",
        default=["all"],
        help=f"all (the paper's six), {', '.join(BENCHMARKS)}, or files (named after the set)",
    )
    parser.add_argument("--local", type=Path, help="directory with copies of the sets, instead of the hub")
    parser.add_argument(
        "--suffix",
        type=str.strip,
        default=SUFFIX,
        help="text after each problem; replaces other instructions about the answer's form; default: the published "
        "suffix; with '' prompts stay as they are",
    )
    parser.add_argument("--drop-duplicates", action="store_true", help="keep the first row of each training problem")
    parser.add_argument(
        "--drop-overlap", action="store_true", help="drop training problems that are in a chosen benchmark"
    )
    args = parser.parse_args(arguments)
    try:
        prepare(args)
    except DataError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def prepare(args: argparse.Namespace) -> None:
    """Read, check and write all chosen sets, and print a report.

    Raises:
        DataError: a set cannot be found, read or used, or two would have the same file. Nothing is written.
    """
    names = PUBLISHED if args.benchmarks == ["all"] else args.benchmarks
    tests = [choose(name, BENCHMARKS, args.local) for name in names]
    trains = [choose(name, TRAIN, args.local) for name in args.train]
    labels = Counter(chosen.label.lower() for chosen in trains)
    trains = [replace(c, label=c.given) if labels[c.label.lower()] > 1 else c for c in trains]
    check_names(tests, trains, args.out)

    files: dict[str, list[dict[str, Any]]] = {}
    reports: list[tuple[Chosen, str, Report]] = []
    seen: dict[str, str] = {}
    for chosen in tests:
        rows, report = convert(chosen, "test", args.suffix)
        # A benchmark keeps all its rows, repeats too, because published figures include them.
        first: dict[str, dict] = {}
        for row in rows:
            is_repeat(row, first, report)
            seen.setdefault(row["key"], chosen.label)
        report.kept = len(rows)
        files[chosen.label] = rows
        reports.append((chosen, chosen.label, report))
    first = {}
    for chosen in trains:
        rows, report = convert(chosen, "train", args.suffix)
        kept = files.setdefault("train", [])
        for row in rows:
            repeated, benchmark = is_repeat(row, first, report), seen.get(row["key"])
            if benchmark:
                report.overlap[benchmark] += 1
            if not (repeated and args.drop_duplicates) and not (benchmark and args.drop_overlap):
                kept.append(row)
                report.kept += 1
        reports.append((chosen, "train", report))

    # The user's flags may drop all rows of a set, as long as the file has rows.
    unusable = [(chosen.given, file) for chosen, file, report in reports if report.read == report.rejected.total()]
    if "train" in files and not files["train"] and not any(file == "train" for _, file in unusable):
        unusable.append(("the training sets", "train"))
    for chosen, file, report in reports:
        done = "kept" if unusable else f"written to {file}.parquet"
        print("\n".join(report.lines(chosen.label, done, chosen.origin)))
    if any(report.first for *_, report in reports):
        print("lines count from 1, rows from 0")
    if unusable:
        aside = set_aside(args.out, {file for _, file in unusable})
        names = ", ".join(name for name, _ in unusable)
        raise DataError(f"no usable row in {names}; see above. Nothing was written{aside}")
    try:
        save(files, args.out)
    except OSError as e:
        raise DataError(f"cannot write to {args.out}: {e}") from e
    print(f"written to {args.out}: " + ", ".join(f"{file}.parquet" for file in sorted(files)))
    others = sorted(path.name for path in args.out.glob("*.parquet") if path.stem not in files)
    if others:
        print(f"already there: {', '.join(others)}")


def save(files: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Write all files to a temporary folder and then move them, so that a failure leaves no mixture of old and new."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".preparing-") as folder:
        for name, rows in files.items():
            frame = pd.DataFrame(rows).drop(columns="key")
            frame.to_parquet(Path(folder) / f"{name}.parquet", index=False)
        for name in files:
            os.replace(Path(folder) / f"{name}.parquet", out / f"{name}.parquet")


def set_aside(out: Path, names: set[str]) -> str:
    """Rename older files of these names, which could be mistaken for the result; return a note on them."""
    told = ""
    for path in (out / f"{name}.parquet" for name in sorted(names)):
        if path.exists():
            olds = (path.with_name(f"{path.name}.old{number}") for number in ["", *range(2, 1000)])
            old = next(old for old in olds if not old.exists())
            path.rename(old)
            told += f"; the older {path} is now {old.name}"
    return told


# Choosing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """A set to prepare."""

    given: str
    """The user's name for it."""
    label: str
    """``data_source``, and the name of a benchmark's file."""
    path: Path | None
    """Its file; None for the hub."""
    source: Source | None = None

    @property
    def origin(self) -> str:
        """The file or the name on the hub."""
        return str(self.path) if self.path else self.source.hub


def choose(name: str, known: dict[str, Source], local: Path | None) -> Chosen:
    """Find a set by its name, or a file.

    Raises:
        DataError: there is no such set, copy or file.
    """
    if ENDING.search(name):
        path = Path(name)
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        return Chosen(name, ENDING.sub("", path.name), path)
    if name not in known:
        raise DataError(f"{name} is neither a set ({', '.join(known)}) nor a file ending in {ENDINGS}")
    source = known[name]
    if local is None:
        return Chosen(name, name, None, source)
    stems = [stem.lower() for stem in source.files or (name,)]
    copies = [path for path in sorted(local.glob("*"), reverse=True) if ENDING.search(path.name) and path.is_file()]
    # Best name first, then parquet before JSONL before JSON.
    found = [path for stem in stems for path in copies if ENDING.sub("", path.name).lower() == stem]
    if not found:
        raise DataError(f"{local} has no copy of {name}: expected {' or '.join(stems)}, ending in {ENDINGS}")
    return Chosen(name, name, found[0], source)


def check_names(tests: list[Chosen], trains: list[Chosen], out: Path) -> None:
    """Raise DataError if sets would overwrite each other, or the files that they are read from."""
    if not tests and not trains:
        raise DataError("nothing to prepare: give --train or --benchmarks a set or a file")
    # In lower case, because some file systems ignore case.
    taken: dict[str, str] = {}
    for chosen in tests:
        place = str(chosen.path or chosen.given)
        name = chosen.label.lower()
        if name == "train":
            raise DataError(f"the benchmark {place} would be {out / 'train.parquet'}, the training set; rename it")
        if name in taken:
            raise DataError(f"{taken[name]} and {place} would both be {out / chosen.label}.parquet; rename one")
        taken[name] = place
    places = [chosen.path.resolve() if chosen.path else chosen.given for chosen in trains]
    for place, count in Counter(places).items():
        if count > 1:
            raise DataError(f"--train has {place} {count} times; give it once")
    written = {(out / f"{chosen.label}.parquet").resolve() for chosen in tests}
    written |= {(out / "train.parquet").resolve()} if trains else set()
    for chosen in (*tests, *trains):
        if chosen.path and chosen.path.resolve() in written:
            raise DataError(f"{chosen.path} would be overwritten by its own result; give another --out than {out}")


# Reading --------------------------------------------------------------------------------------------------------------


def read(chosen: Chosen) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a set, each with its place.

    Raises:
        DataError: the file cannot be read, or the hub does not answer.
    """
    if chosen.path:
        try:
            for place, row in read_file(chosen.path):
                yield f"{chosen.path.name}, {place}", row
        except (OSError, ValueError, EOFError, zlib.error, RecursionError, pyarrow.ArrowException) as e:
            raise DataError(f"cannot read {chosen.path}: {' '.join(str(e).split()) or type(e).__name__}") from e
        return
    from datasets import load_dataset

    name, source = chosen.given, chosen.source
    try:
        rows = load_dataset(source.hub, source.config, split=source.split).to_list()
    except Exception as e:
        raise DataError(
            f"cannot get {name} ({source.hub}) from the Hugging Face hub: {type(e).__name__}: "
            f"{''.join(str(e).splitlines()[:1])}. Without a connection, download it elsewhere and give --local DIR "
            f"with {(source.files or (name,))[0]}.parquet, .jsonl or .json in it"
        ) from e
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a JSON, JSONL or parquet file, each with its place in it.

    JSON (a list of objects, or one list below a key) and JSONL (an object per line) are distinguished by content.

    Raises:
        ValueError: the content does not fit the ending.
    """
    kind, packed = ENDING.search(path.name).groups()
    data = gzip.decompress(path.read_bytes()) if packed else None
    if kind.lower() == "parquet":
        # Not by pandas, which converts integers in a column with gaps to floats.
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data) if packed else path)
        rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
        yield from ((f"row {number}", row) for number, row in enumerate(rows))
        return
    # utf-8-sig: Windows writes a byte order mark.
    text = (data if packed else path.read_bytes()).decode("utf-8-sig")
    if not text.strip():
        raise ValueError("it is empty")
    try:
        value = json.loads(text, parse_int=whole)
    except json.JSONDecodeError:
        if text.lstrip().startswith("["):
            raise
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line, parse_int=whole)
                except json.JSONDecodeError as e:
                    raise ValueError(f"line {number}: {e}") from None
        return
    if isinstance(value, dict) and any(name in QUESTION for name in columns_of(value)):
        yield "line 1", value
        return
    below = ""
    if isinstance(value, dict):
        lists = {key: rows for key, rows in value.items() if isinstance(rows, list)}
        if len(lists) != 1:
            raise ValueError(f"it has {len(lists)} lists of rows ({', '.join(value)}); make it one list of objects")
        ((key, value),) = lists.items()
        below = f"{key}, "
    if not isinstance(value, list):
        raise ValueError("it must be a list of objects with a problem and an answer each")
    yield from ((f"{below}row {number}", row) for number, row in enumerate(value))


def whole(digits: str) -> int | Decimal:
    """Parse an integer in JSON, exactly even if Python refuses its length."""
    try:
        return int(digits)
    except ValueError:
        return Decimal(digits)


# Converting -----------------------------------------------------------------------------------------------------------


def convert(chosen: Chosen, split: str, suffix: str) -> tuple[list[dict[str, Any]], Report]:
    """Convert a set to verl's rows, each with its problem's ``key``, and a report.

    Raises:
        DataError: the set cannot be read, or no answer can be graded.
    """
    drafts, report = [], Report()
    for number, (where, record) in enumerate(read(chosen)):
        report.read += 1
        try:
            messages, problem, notes = question_of(record, suffix)
            truths, left_out = answers_of(record)
        except Unusable as e:
            report.add(report.rejected, e.reason, where, e.shown)
            continue
        notes += [(f"without one of its answers: {e.reason}", e.shown) for e in left_out]
        drafts.append((number, where, messages, problem, truths, notes))

    failures, as_text = self_graded(truth for *_, truths, _ in drafts for truth in truths)
    rows = []
    for number, where, messages, problem, truths, notes in drafts:
        right = [truth for truth in truths if not failures[truth]]
        wrong = [(f"not graded right in its own box: {failures[t]}", t) for t in truths if failures[t]]
        if not right:
            report.add(report.rejected, wrong[0][0], where, wrong[0][1])
            continue
        notes += [(f"without one of its answers: {reason}", truth) for reason, truth in wrong]
        notes += [("an answer that is right in its own spelling alone", truth) for truth in right if truth in as_text]
        for what, shown in notes:
            report.add(report.notes, what, where, shown)
        rows.append(
            {
                "data_source": chosen.label,
                "prompt": messages,
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": right},
                "extra_info": {"index": number, "split": split},
                "key": key_of(problem),
            }
        )
    return rows, report


def self_graded(truths: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Grade each truth in a box against itself.

    Returns:
        For each truth the failure, or "" if it is right; and the truths that the grader cannot read, for which no other
        spelling is right.

    Raises:
        DataError: no grading process can be started.
    """
    different = list(dict.fromkeys(truths))
    failures, as_text, told = {}, set(), time.monotonic()

    def grade(truth: str) -> tuple[str, bool]:
        result = compute_score("", f"\\boxed{{{truth}}}", [truth], require_think=False)
        if result["failure"]:
            return result["failure"], False
        # With unbalanced braces, the box holds a part of the truth, which may be equal to it.
        if result["pred"] != truth:
            return "braces do not match", False
        other = compute_score("", f"\\boxed{{{truth}}}", [ANOTHER], require_think=False)
        return "", other["failure"] not in ("", "wrong")

    # The threads wait for child processes, two at a time.
    with ThreadPoolExecutor(4) as pool:
        try:
            for truth, (failure, unread) in zip(different, pool.map(grade, different), strict=True):
                failures[truth] = failure
                if unread:
                    as_text.add(truth)
                if time.monotonic() - told > 10:
                    told = time.monotonic()
                    print(f"graded {len(failures)} of {len(different)} different answers", file=sys.stderr)
        except RuntimeError as e:
            raise DataError(str(e)) from e
    return failures, as_text


ANOTHER = "-987.5"
"""Compared with an answer to test whether the answer can be read."""


def key_of(problem: str) -> str:
    """Reduce copies of a problem to one key: without case, spaces and dollar signs."""
    return re.sub(r"[\s$]+", "", problem).casefold()


def is_repeat(row: dict[str, Any], first: dict[str, dict], report: Report) -> bool:
    """Tell whether an earlier row has the same problem, and count it."""
    earlier = first.setdefault(row["key"], row)
    if earlier is row:
        return False
    if set(earlier["reward_model"]["ground_truth"]) & set(row["reward_model"]["ground_truth"]):
        report.duplicates += 1
    else:
        report.conflicts += 1
    return True


if __name__ == "__main__":
    sys.exit(main())
