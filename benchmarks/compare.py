"""Say which figures got worse by more than their noise. Exit status 1 if any did.

    python benchmarks/compare.py                 # the working tree's results against the committed ones
    python benchmarks/compare.py BEFORE [AFTER]  # folders of JSON files, or git revisions; AFTER: the working tree

A figure changed when the two ranges, low to high, do not overlap. A range reaches at least 1 % of the value to each
side; of a figure without low and high, or measured once, 5 %. Rounding errors (`relative error`) have to triple. A
whole number without width is exact, such as a count: any change counts.

Times and rates are compared on the same machine only: processor, cores, memory, accelerator. Other units (`ratio`, `%`,
`MiB`, ...) are compared in any case.
"""

import argparse
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from record import RESULTS, ROOT, Figure, Result, read_folder

MEASURED, UNMEASURED, ROUNDING = 0.01, 0.05, 0.5
"""Least share of the value to each side: with low and high, without, of a rounding error."""
TIME = re.compile(r"(^|/|per )(ns|us|µs|ms|s|min|h|seconds?|minutes?|hours?)\b")


def margin(figure: Figure, end: float | None) -> float:
    """How far the value may be off towards ``end``, its ``low`` or ``high``."""
    once = figure.low == figure.high
    if end is None or once:
        exact = end is not None and isinstance(figure.value, int)
        share = 0.0 if exact else ROUNDING if figure.unit == "relative error" else UNMEASURED
        return share * abs(figure.value)
    return max(MEASURED * abs(figure.value), abs(end - figure.value))


def verdict(before: Figure, after: Figure) -> str:
    """Tell ``worse`` and ``better`` from ``same``: within the noise of both, or neither better nor worse."""
    change = after.value - before.value
    if change > 0:
        noise = margin(before, before.high) + margin(after, after.low)
    else:
        noise = margin(before, before.low) + margin(after, after.high)
    # Decimal fractions are not exact in binary.
    if after.better == "neither" or abs(change) <= noise * (1 + 1e-9):
        return "same"
    return "worse" if (change > 0) == (after.better == "lower") else "better"


def compare(before: dict[str, Result], after: dict[str, Result], times: bool = True) -> list[tuple[str, str]]:
    """Compare results by name. Each line has its kind: worse, better, same, skipped, missing, new, target, note."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            lines.append(("missing" if new is None else "new", f"{name}: all figures"))
        else:
            lines += [(kind, f"{name}: {text}") for kind, text in compare_result(old, new, times)]
        for key, figure in new.figures.items() if new else ():
            if figure.missed:
                lines.append(("target", f"{name}: {key}: {figure} {figure.unit}, {figure.bound()}"))
    return lines


def compare_result(old: Result, new: Result, times: bool = True) -> Iterator[tuple[str, str]]:
    machines = differences(old.machine, new.machine)
    if machines:
        yield "note", f"another machine, so no times: {machines}"
    for kind in ("settings", "versions"):
        if found := differences(getattr(old, kind), getattr(new, kind)):
            yield "note", f"other {kind}: {found}"
    for key in old.figures | new.figures:
        before, after = old.figures.get(key), new.figures.get(key)
        if before is None or after is None:
            yield "missing" if after is None else "new", key
        elif before.unit != after.unit:
            yield "missing", f"{key}: {before.unit} before, {after.unit} now"
        elif TIME.search(after.unit) and (machines or not times):
            yield "skipped", key
        else:
            percent = f", {100 * (after.value / before.value - 1):+.1f} %" if before.value else ""
            yield verdict(before, after), f"{key}: {before} -> {after} {after.unit}{percent}"


def differences(before: dict, after: dict) -> str:
    """Name what differs, the git revision apart."""
    keys = [key for key in before | after if key != "revision" and before.get(key) != after.get(key)]
    return "; ".join(f"{key} {before.get(key)} -> {after.get(key)}" for key in keys)


def read(source: str) -> dict[str, Result]:
    """Read the results in a folder, or those of a git revision, by name."""
    if Path(source).is_dir():
        return read_folder(Path(source))

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{source} is neither a folder nor a git revision: {done.stderr.strip()}")
        return done.stdout

    files = git("ls-tree", "--name-only", source, f"{RESULTS.relative_to(ROOT).as_posix()}/").splitlines()
    return {Path(f).stem: Result.load(git("show", f"{source}:{f}")) for f in files if f.endswith(".json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", default="HEAD", help="a folder or a git revision (HEAD)")
    parser.add_argument("after", nargs="?", default=str(RESULTS), help="the same (benchmarks/results)")
    parser.add_argument("--no-times", action="store_true", help="for a machine whose speed varies: leave times out")
    args = parser.parse_args()
    lines = compare(read(args.before), read(args.after), times=not args.no_times)
    for kind, text in lines:
        if kind not in ("same", "skipped"):
            print(f"{kind:8} {text}")
    count = Counter(kind for kind, _ in lines)
    print(
        f"{count['worse']} worse, {count['better']} better, {count['same']} within their noise; {count['missing']} "
        f"missing, {count['new']} new, {count['skipped']} times not compared, {count['target']} beyond their target"
    )
    raise SystemExit(1 if count["worse"] else 0)


if __name__ == "__main__":
    main()
