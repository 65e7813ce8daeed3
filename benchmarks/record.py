"""Write a benchmark's figures as JSON, with what they depend on: machine, versions, settings.

    from record import Figure, record
    record("update_time", {"exact": Figure(1.19, "ratio", low=1.17, high=1.21, target=1.20)}, {"mini-batches": 4})

`benchmarks/compare.py` compares such files, `benchmarks/results.py` makes RESULTS.md from them.
"""

import datetime
import importlib.metadata as metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "verl", "ray", "transformers", "verl-disco")


@dataclass(frozen=True)
class Figure:
    """A measured value with its noise.

    Args:
        value: the median of the repeats.
        unit: such as ``ratio``, ``s``, ``ms``, ``MiB``, ``%``, ``per second``. Times hold on one machine only.
        low: 10th percentile, or the minimum of few repeats; equal to a whole ``value`` that has no noise (a count).
        high: 90th percentile, or the maximum of few repeats.
        target: upper bound; lower bound with ``better="higher"``.
        better: ``neither`` for a figure that is told, but cannot get worse.
        repeats: the raw data, where there are several; no part of a comparison.
    """

    value: float
    unit: str = "ratio"
    low: float | None = None
    high: float | None = None
    target: float | None = None
    better: Literal["lower", "higher", "neither"] = "lower"
    repeats: Sequence[float] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.better not in ("lower", "higher", "neither"):
            raise ValueError(f"better={self.better!r}: lower, higher or neither")
        if (self.low is None) != (self.high is None) or (
            self.low is not None and not self.low <= self.value <= self.high
        ):
            raise ValueError(f"low {self.low}, value {self.value}, high {self.high}: give both, in this order")

    @classmethod
    def of(cls, values: Sequence[float], unit: str = "ratio", **more: Any) -> "Figure":
        """Summarise repeats: median, and 10th and 90th percentile (of fewer than 10, minimum and maximum)."""
        if len(values) == 1:
            return cls(values[0], unit, **more)
        ordered, tenth = sorted(values), len(values) // 10
        bounds = ordered[tenth], ordered[-1 - tenth]
        return cls(statistics.median(values), unit, *bounds, repeats=[float(v) for v in values], **more)

    @property
    def missed(self) -> bool:
        """Whether the value is beyond the target."""
        if self.target is None:
            return False
        return self.value < self.target if self.better == "higher" else self.value > self.target

    def __str__(self) -> str:
        exact = self.low is None or self.high is None or self.low == self.high
        return number(self.value) + ("" if exact else f" ({number(self.low)} to {number(self.high)})")

    def bound(self) -> str:
        """Name the target, in words for a table; empty without one."""
        if self.target is None:
            return ""
        side = "at least" if self.better == "higher" else "at most"
        return f"{side} {number(self.target)}{', missed' if self.missed else ''}"


@dataclass(frozen=True)
class Result:
    """One file of `benchmarks/results`."""

    name: str
    date: str
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)

    @classmethod
    def load(cls, text: str) -> "Result":
        """Read what :func:`record` wrote."""
        values = json.loads(text)
        return cls(**{**values, "figures": {name: Figure(**f) for name, f in values["figures"].items()}})

    def dump(self) -> str:
        """Write as JSON: six digits, without what a figure does not have, lists of numbers on one line."""
        values = asdict(self)
        for name, figure in values["figures"].items():
            rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in figure.items()}
            if figure["repeats"]:
                rounded["repeats"] = [float(f"{v:.6g}") for v in figure["repeats"]]
            values["figures"][name] = {k: v for k, v in rounded.items() if v is not None}
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
        return re.sub(r"\[[\s\d.,e+-]+\]", lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text) + "\n"


def read_folder(folder: Path = RESULTS) -> dict[str, Result]:
    """Read the results in a folder, by name."""
    return {file.stem: Result.load(file.read_text()) for file in sorted(folder.glob("*.json"))}


def number(value: float) -> str:
    """Write with three significant digits, or all that stand before the decimal point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def record(
    name: str,
    figures: Mapping[str, Figure],
    settings: Mapping[str, Any] | None = None,
    folder: Path = RESULTS,
) -> Path:
    """Write ``folder/name.json`` and print its figures.

    Args:
        name: of the file, in place of an older one.
        figures: by what they measure.
        settings: what the figures depend on besides machine and versions.
    """
    if not figures:
        raise ValueError(f"{name}: no figures")
    result = Result(
        name=name,
        date=datetime.date.today().isoformat(),
        command=command(sys.argv),
        machine=machine(),
        versions=versions(),
        settings=dict(settings or {}),
        figures=dict(figures),
    )
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(result.dump())
    width = max(map(len, figures))
    for key, figure in figures.items():
        bound = figure.bound()
        print(f"{key:{width}}  {figure} {figure.unit}{bound and f' ({bound})'}")
    print(f"{file.name} is written; `python benchmarks/results.py` takes it into RESULTS.md")
    return file


def command(argv: Sequence[str]) -> str:
    """Write a command line without this machine's folders."""

    def plain(argument: str) -> str:
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        path = Path(value).resolve()
        if Path(value).is_absolute() or ".." in Path(value).parts:
            value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        return option + equals + value

    script = Path(argv[0]).resolve()
    return shlex.join(["python", plain(str(script)), *map(plain, argv[1:])])


def machine() -> dict[str, Any]:
    """Describe the machine: processor, cores that this process may use, memory, accelerator. No names or paths."""
    import torch

    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            lines = (line.partition(":") for line in file)
            info = {key.strip(): value.strip() for key, _, value in lines}
        if "model name" in info:
            processor = f"{info['model name']} (family {info.get('cpu family', '?')}, model {info.get('model', '?')})"
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def versions() -> dict[str, str]:
    """List Python's, the packages' and this repository's versions."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"revision": revision()}


def revision(root: Path = ROOT) -> str:
    """Name a repository's git revision, with ``dirty`` if tracked files differ from it, results apart."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!*.md")
        return git("rev-parse", "--short=12", "HEAD") + (" dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
