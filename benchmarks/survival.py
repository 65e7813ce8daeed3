"""How many kills runs survive, and what a long run's processes gain, from what the end-to-end tests have seen.

rm -f benchmarks/raw/survival.jsonl
SURVIVAL_FILE=$PWD/benchmarks/raw/survival.jsonl pytest --all -n 0 tests/e2e/test_kills.py tests/e2e/test_endurance.py
python benchmarks/survival.py benchmarks/raw/survival.jsonl

``kills``: lives that were ended by a kill at a random point, and what differs at the end from a run without a kill,
rows of metrics and files of the last checkpoint together. ``colocate_async`` runs are compared by their rows' number
and their questions, so they are not among ``bit for bit``: how far a response has got when the weights change depends
on time. Of a long run: the largest gain of any process from 30 to 50 % of its steps to the last fifth.
"""

import argparse
from collections import Counter, defaultdict
from pathlib import Path

from record import Figure, record

from verl_ext.runs.folder import read_json_lines


def figures_of(lines: list[dict]) -> dict[str, Figure]:
    """Summarise the tests' lines."""
    kinds = defaultdict(list)
    for line in lines:
        kinds[line["kind"]].append(line)
    kills = Counter(life["run"] for life in kinds["life"] if life["killed"])
    ended = [
        (end["run"], kills[end["run"]], sum(len(x) for name, x in end.items() if name.startswith("other_")))
        for end in kinds["end"]
    ]
    figures = {}
    if exact := [end for end in ended if "async" not in end[0]]:
        ended.append(("bit for bit", sum(n for _, n, _ in exact), sum(other for *_, other in exact)))
    for run, number, other in ended:
        figures[f"{run}, kills"] = Figure(number, "kills", better="neither")
        figures[f"{run}, differences at the end"] = Figure(other, "differences", target=0)
    for mode in dict.fromkeys(line["mode"] for line in kinds["process"]):
        own = [line for line in kinds["process"] if line["mode"] == mode]
        run = f"{own[0]['steps']} steps{mode and f', {mode}'}"
        for what, unit in (("memory", "MiB"), ("handles", "handles"), ("threads", "threads")):
            gain = max(line["after"][what] - line["before"][what] for line in own)
            figures[f"{run}: largest gain of a process, {what}"] = Figure(gain, unit)
        figures[f"{run}: processes"] = Figure(len(own), "processes", better="neither")
        for line in (line for line in kinds["bytes per step"] if line["mode"] == mode):
            figures[f"{run}: bytes per step, {line['name']}"] = Figure(line["after"], "bytes")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what the tests have written")
    args = parser.parse_args()
    record("survival", figures_of([line for _, line in read_json_lines(args.file)]))


if __name__ == "__main__":
    main()
