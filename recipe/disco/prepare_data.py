"""Training and benchmark sets in verl's parquet format.

    python -m recipe.disco.prepare_data --out data/math                          # as published, from the hub
    python -m recipe.disco.prepare_data --out data/math --train dapo_math --benchmarks aime24 math500
    python -m recipe.disco.prepare_data --out data/math --train problems.jsonl --local downloads --benchmarks all

Writes ``OUT/train.parquet`` and one file a benchmark, ``OUT/aime24.parquet`` and so on. A row: ``data_source`` (the
benchmark's name; metrics are reported by it), ``prompt`` (one user message: the problem and the suffix), ``ability``,
``reward_model.ground_truth`` (a list of texts, of which an answer has to meet one) and ``extra_info``.

Files may be JSON, JSONL or parquet, with a problem and an answer a row, or rows in verl's own format.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from verl_ext.rewards.math import ground_truths

SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."
"""The published one (DisCO, arXiv 2505.12366)."""

QUESTION = ("problem", "question", "prompt", "Problem", "Question")
ANSWER = ("answer", "final_answer", "ground_truth", "Answer", "solution")
"""Columns, in the order in which they are looked for. Some sets have the bare answer in "solution"."""

ENDINGS = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class Source:
    """Where a set comes from."""

    hub: str
    """Name on the Hugging Face hub."""
    split: str
    config: str | None = None
    files: tuple[str, ...] = ()
    """Names, without ending, that a local copy may have besides its own."""


TRAIN = {
    # The published runs' training set, about 40.3k problems.
    "deepscaler": Source("agentica-org/DeepScaleR-Preview-Dataset", "train"),
    # DAPO's, without the hundredfold copies and the prompt around each problem that the original has.
    "dapo_math": Source("open-r1/DAPO-Math-17k-Processed", "train", config="all"),
}
BENCHMARKS = {
    "aime24": Source("HuggingFaceH4/aime_2024", "train", files=("aime",)),
    "aime25": Source("math-ai/aime25", "test"),
    "math500": Source("HuggingFaceH4/MATH-500", "test", files=("math",)),
    # AMC 12 of 2022 and 2023, which reports call AMC 2023: 83 problems.
    "amc23": Source("AI-MO/aimo-validation-amc", "train", files=("amc",)),
    "minerva": Source("math-ai/minervamath", "test"),
    "olympiadbench": Source("math-ai/olympiadbench", "test", files=("olympiad_bench",)),
}


@dataclass
class Report:
    """What became of a set's rows."""

    read: int = 0
    kept: int = 0
    rejected: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> where the first such row is."""
    duplicates: int = 0
    """Rows whose problem an earlier row has, with an equal answer."""
    conflicts: int = 0
    """The same with another answer."""
    overlap: Counter = field(default_factory=Counter)
    """Benchmark -> how many of its problems are here."""

    def reject(self, reason: str, where: str) -> None:
        self.rejected[reason] += 1
        self.examples.setdefault(reason, where)

    def lines(self, name: str) -> Iterator[str]:
        """As printed."""
        yield f"{name:16} {self.read:7} read {self.kept:7} written"
        for reason, count in self.rejected.items():
            yield f"{'':16} {count:7} rejected: {reason} (first: {self.examples[reason]})"
        for count, what in ((self.duplicates, "the same answer"), (self.conflicts, "another answer")):
            if count:
                yield f"{'':16} {count:7} repeat an earlier problem with {what}"
        for benchmark, count in self.overlap.items():
            yield f"{'':16} {count:7} problems of {benchmark} are in it"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--train", nargs="*", default=["deepscaler"], help=f"{', '.join(TRAIN)}, or files")
    parser.add_argument(
        "--benchmarks", nargs="*", default=["all"], help=f"all, {', '.join(BENCHMARKS)}, or files (named after the set)"
    )
    parser.add_argument("--local", type=Path, help="directory with copies of the sets, instead of the hub")
    parser.add_argument("--suffix", default=SUFFIX, help="what follows each problem; default: the published one")
    parser.add_argument("--drop-duplicates", action="store_true", help="keep the first row of each training problem")
    parser.add_argument(
        "--drop-overlap", action="store_true", help="leave out training problems that are in a chosen benchmark"
    )
    args = parser.parse_args(arguments)
    try:
        prepare(args)
    except DataError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


class DataError(Exception):
    """A set that cannot be had or read; the message says what to do."""


def prepare(args: argparse.Namespace) -> None:
    """Read, check and write all chosen sets, and print what became of them."""
    names = list(BENCHMARKS) if args.benchmarks == ["all"] else args.benchmarks
    tests = {Path(n).stem if is_file(n) else n: read(n, BENCHMARKS, args.local) for n in names}
    trains = {n: read(n, TRAIN, args.local) for n in args.train}

    args.out.mkdir(parents=True, exist_ok=True)
    seen: dict[str, str] = {}
    for name, records in tests.items():
        rows, report = convert(records, name, "test", args.suffix)
        mark_repeats(rows, report)
        for row in rows:
            seen.setdefault(row["key"], name)
        write(rows, args.out / f"{name}.parquet", report, name)

    everything, reports = [], {}
    for name, records in trains.items():
        label = Path(name).stem if is_file(name) else name
        rows, reports[label] = convert(records, label, "train", args.suffix)
        for row in rows:
            if row["key"] in seen:
                reports[label].overlap[seen[row["key"]]] += 1
        everything += [(label, row) for row in rows]
    first: dict[str, dict] = {}
    kept = []
    for label, row in everything:
        repeated = is_repeat(row, first, reports[label])
        if (repeated and args.drop_duplicates) or (row["key"] in seen and args.drop_overlap):
            continue
        kept.append((label, row))
    for label, report in reports.items():
        report.kept = sum(1 for other, _ in kept if other == label)
        print("\n".join(report.lines(label)))
    if kept:
        save([row for _, row in kept], args.out / "train.parquet")
    print(f"in {args.out}: " + ", ".join(sorted(p.name for p in args.out.glob("*.parquet"))))


def write(rows: list[dict], path: Path, report: Report, name: str) -> None:
    report.kept = len(rows)
    save(rows, path)
    print("\n".join(report.lines(name)))


def save(rows: list[dict], path: Path) -> None:
    pd.DataFrame([{k: v for k, v in row.items() if k != "key"} for row in rows]).to_parquet(path, index=False)


# Reading --------------------------------------------------------------------------------------------------------------


def is_file(name: str) -> bool:
    return name.endswith(ENDINGS)


def read(name: str, known: dict[str, Source], local: Path | None) -> list[dict[str, Any]]:
    """The rows of a file, or of a set by name: from ``local`` where it is given, else from the hub.

    Raises:
        DataError: there is no such file, set or copy, or the hub does not answer.
    """
    if is_file(name):
        return read_file(Path(name))
    if name not in known:
        raise DataError(f"{name} is neither a set ({', '.join(known)}) nor a file ending in {', '.join(ENDINGS)}")
    source = known[name]
    if local is not None:
        candidates = [local / f"{stem}{ending}" for stem in (name, *source.files) for ending in ENDINGS]
        for path in candidates:
            if path.exists():
                return read_file(path)
        stems = " or ".join((name, *source.files))
        raise DataError(f"{local} has no copy of {name}: expected {stems}, ending in {', '.join(ENDINGS)}")
    from datasets import load_dataset

    try:
        return load_dataset(source.hub, source.config, split=source.split).to_list()
    except Exception as e:
        raise DataError(
            f"cannot get {name} ({source.hub}) from the Hugging Face hub: {type(e).__name__}: "
            f"{str(e).splitlines()[0] if str(e) else ''}. Without a connection, download it elsewhere and give "
            f"--local DIR with {name}.parquet, .jsonl or .json in it"
        ) from e


def read_file(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON (a list of objects), JSONL or parquet file."""
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path).to_dict("records")
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.split("\n") if x.strip()]
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (OSError, ValueError) as e:
        raise DataError(f"cannot read {path}: {e}") from e
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must be a list of objects with a problem and an answer each")
    return rows


# Converting -----------------------------------------------------------------------------------------------------------


def convert(
    records: Iterable[dict[str, Any]], name: str, split: str, suffix: str
) -> tuple[list[dict[str, Any]], Report]:
    """verl's rows, each with its problem's ``key``, and what became of ``records``."""
    rows, report = [], Report()
    for number, record in enumerate(records):
        report.read += 1
        where = f"{name}, row {number}"
        try:
            problem, answer = problem_of(record, suffix), answer_of(record)
        except ValueError as e:
            report.reject(str(e), where)
            continue
        rows.append(
            {
                "data_source": name,
                "prompt": [{"role": "user", "content": f"{problem} {suffix}".strip()}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": answer},
                "extra_info": {"index": number, "split": split},
                "key": key_of(problem),
            }
        )
    return rows, report


def problem_of(record: dict[str, Any], suffix: str) -> str:
    """The problem's text, without the suffix that it may have already.

    Raises:
        ValueError: there is none, or the prompt is more than one message of the user.
    """
    value = next((record[name] for name in QUESTION if record.get(name) is not None), None)
    if value is not None and not isinstance(value, str):
        messages = list(value)
        if len(messages) != 1 or messages[0].get("role") != "user":
            raise ValueError("prompt is not one message of the user")
        value = messages[0]["content"]
    text = (value or "").strip()
    for ending in (suffix, SUFFIX):
        if ending:
            text = text.removesuffix(ending).rstrip()
    if not text:
        raise ValueError("no problem")
    return text


def answer_of(record: dict[str, Any]) -> list[str]:
    """The ground truths.

    Raises:
        ValueError: there is none.
    """
    if isinstance(record.get("reward_model"), dict):
        record = record["reward_model"]
    value = next((record[name] for name in ANSWER if name in record), None)
    try:
        return ground_truths(value)
    except ValueError:
        raise ValueError("no answer") from None


def key_of(problem: str) -> str:
    """What two copies of a problem have in common: letters, digits and signs, without case, space and dollars."""
    return re.sub(r"[\s$]+", "", problem).casefold()


def is_repeat(row: dict[str, Any], first: dict[str, dict], report: Report) -> bool:
    """Whether an earlier row has the same problem; counts it."""
    earlier = first.setdefault(row["key"], row)
    if earlier is row:
        return False
    same = set(earlier["reward_model"]["ground_truth"]) & set(row["reward_model"]["ground_truth"])
    if same:
        report.duplicates += 1
    else:
        report.conflicts += 1
    return True


def mark_repeats(rows: list[dict[str, Any]], report: Report) -> None:
    """Count a benchmark's repeats; its rows all stay, for published figures have them."""
    first: dict[str, dict] = {}
    for row in rows:
        is_repeat(row, first, report)


if __name__ == "__main__":
    sys.exit(main())
