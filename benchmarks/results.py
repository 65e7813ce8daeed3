"""Make RESULTS.md from RESULTS.in.md and the figures in `benchmarks/results`.

    python benchmarks/results.py            # write it
    python benchmarks/results.py --check    # exit status 1 if it is not what the files give

In the text, `{{NAME}}` on a line of its own is the table of `results/NAME.json`, `{{PART*}}` the tables of all files
whose names begin so, and `{{NAME: FIGURE}}` one figure. Names like "ROW, COLUMN" make a table of rows and columns if
none of its cells is empty. Files that the text does not name follow at the end.
"""

import argparse
import fnmatch
import re
from pathlib import Path
from typing import Any

from record import Figure, Result, read_folder

TABLE, FIGURE = re.compile(r"^\{\{(\w+\*?)\}\}$", re.M), re.compile(r"\{\{(\w+): ([^}]+)\}\}")
UNITLESS = ("ratio", "relative error")


def make(text: str, results: dict[str, Result]) -> str:
    """Put the figures into the text."""
    used = []

    def result(name: str) -> Result:
        if name not in results:
            raise SystemExit(f"RESULTS.in.md names {name}; there is no {name}.json in benchmarks/results")
        used.append(name)
        return results[name]

    def figure(match: re.Match) -> str:
        figures = result(match[1]).figures
        if match[2] not in figures:
            raise SystemExit(f"RESULTS.in.md names {match[2]!r} of {match[1]}; there are {', '.join(figures)}")
        return with_unit(figures[match[2]])

    def tables(match: re.Match) -> str:
        names = fnmatch.filter(sorted(results), match[1]) if match[1].endswith("*") else [match[1]]
        return "\n\n".join(section(result(name)) for name in names) or "Not measured yet."

    text = FIGURE.sub(figure, TABLE.sub(tables, text)).strip()
    for name in sorted(results.keys() - set(used)):
        text += f"\n\n## {name}\n\n{section(results[name])}"
    return f"{text}\n\n## Where and when\n\n{places(results)}\n"


def places(results: dict[str, Result]) -> str:
    """List machines with versions, and which results come from there."""
    found: dict[str, list[str]] = {}
    for r in results.values():
        machine = ", ".join(f"{key} {value}" for key, value in r.machine.items())
        versions = ", ".join(f"{key} {value}" for key, value in r.versions.items() if key != "revision")
        revision = r.versions.get("revision", "unknown")
        found.setdefault(f"{machine}; {versions}", []).append(f"`{r.name}` ({r.date}, revision {revision})")
    return "\n".join(f"- {place}: {', '.join(names)}" for place, names in found.items())


def section(result: Result) -> str:
    """Write a result's command, settings and table."""
    settings = "".join(f"; {key}: {plain(value)}" for key, value in result.settings.items())
    return f"`{result.command}`{settings}\n\n{figures_table(result.figures)}"


def plain(value: Any) -> str:
    """Write a setting without brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def figures_table(figures: dict[str, Figure]) -> str:
    names = [name.rpartition(", ") for name in figures]
    rows, columns = (
        list(dict.fromkeys(part)) for part in zip(*((row, column) for row, _, column in names), strict=True)
    )
    if len(columns) > 1 and len(rows) > 1 and len(rows) * len(columns) == len(figures):
        cells = [[row, *(cell(figures[f"{row}, {column}"]) for column in columns)] for row in rows]
        return table(("", *columns), cells)
    header = ["", "", "target"] if any(f.target is not None for f in figures.values()) else ["", ""]
    return table(header, [[name, with_unit(f), f.bound()][: len(header)] for name, f in figures.items()])


def cell(figure: Figure) -> str:
    bound = figure.bound()
    return with_unit(figure) + (f"; {bound}" if bound else "")


def with_unit(figure: Figure) -> str:
    return str(figure) if figure.unit in UNITLESS else f"{figure} {figure.unit}"


def table(header, rows) -> str:
    """Write a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    here = Path(__file__).parent
    text, page = make((here / "RESULTS.in.md").read_text(), read_folder()), here / "RESULTS.md"
    if not args.check:
        page.write_text(text)
    elif page.read_text() != text:
        raise SystemExit("RESULTS.md is not what the files give; run python benchmarks/results.py")


if __name__ == "__main__":
    main()
