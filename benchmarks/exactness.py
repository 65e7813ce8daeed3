"""Worst error of an update per engine, from the engine matrix of `tests/recipe/disco/test_worker.py`.

rm -f benchmarks/raw/exactness.jsonl
EXACTNESS_FILE=$PWD/benchmarks/raw/exactness.jsonl pytest -n 0 tests/recipe/disco/test_worker.py
python benchmarks/exactness.py benchmarks/raw/exactness.jsonl

A line per case: ``name`` of the engine, ``error`` relative to the update itself.
"""

import argparse
from pathlib import Path

from record import Figure, record

from verl_ext.runs.folder import read_json_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="+", type=Path, help="results of the test")
    args = parser.parse_args()
    errors: dict[str, list[float]] = {}
    for file in args.file:
        for _, result in read_json_lines(file):
            errors.setdefault(result["name"], []).append(result["error"])
    errors["all engines"] = [error for found in errors.values() for error in found]
    # The bound of the test.
    figures = {name: Figure(max(found), "relative error", target=2e-5) for name, found in errors.items()}
    figures["cases"] = Figure(len(errors["all engines"]), "cases", better="neither")
    record("exactness", figures)


if __name__ == "__main__":
    main()
