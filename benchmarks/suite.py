"""The test suite's time, from pytest's report.

bash tests/run.sh --junitxml=suite.xml; python benchmarks/suite.py suite.xml
"""

import argparse
from pathlib import Path
from xml.etree import ElementTree

from record import Figure, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="of pytest --junitxml")
    suite = ElementTree.parse(parser.parse_args().report).getroot().find("testsuite")
    count = {kind: int(suite.get(kind, 0)) for kind in ("tests", "failures", "errors", "skipped")}
    if count["failures"] or count["errors"]:
        raise SystemExit(f"a suite that fails is not timed: {count['failures']} failures, {count['errors']} errors")
    passed = count["tests"] - count["skipped"]
    figures = {
        "whole suite": Figure(float(suite.get("time")) / 60, "min", target=18),
        "passed": Figure(passed, "tests", passed, passed, better="higher"),
        "skipped": Figure(count["skipped"], "tests", count["skipped"], count["skipped"]),
    }
    record("suite", figures)


if __name__ == "__main__":
    main()
