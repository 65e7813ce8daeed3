"""pass@1 in a row of metrics, and the bands of difficulty by which questions are told apart."""

import bisect
import itertools
import re
from collections.abc import Mapping
from typing import Any

EVALUATION = re.compile(r"^val-core/(?P<benchmark>.+)/(?:acc|reward|score)/mean@(?P<n>\d+)$")
"""verl's name for pass@1 over n samples. Its ``best@k`` is not pass@k: drawn with replacement, it is biased low."""

BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Bounds of the bands of difficulty; 0 and 1 are bands of their own: 0, (0, .25], ..., (.75, 1), 1."""

BAND_NAMES = ("0", *(f"({a:g}, {b:g}{']' if b < 1 else ')'}" for a, b in itertools.pairwise(BANDS)), "1")


def pass_at_1(row: Mapping[str, Any]) -> dict[str, float]:
    """Read pass@1 by benchmark from a row of metrics; empty without an evaluation."""
    found = ((EVALUATION.match(name), value) for name, value in row.items())
    return {match["benchmark"]: float(value) for match, value in found if match and value is not None}


def band_index(share: float) -> int:
    """Return the index in ``BAND_NAMES`` of a pass rate's band."""
    return len(BAND_NAMES) - 1 if share == 1 else bisect.bisect_left(BANDS, share)


def band_of(share: float) -> str:
    """Name the band of a pass rate."""
    return BAND_NAMES[band_index(share)]


def band_metrics(kind: str) -> tuple[str, ...]:
    """Name a metric for each band, in percent, as loggers take names: ``training/KIND_at_pass_rate/25_50``."""
    percent = [round(100 * bound) for bound in BANDS]
    ranges = ("0", *(f"{a}_{b}" for a, b in itertools.pairwise(percent)), "100")
    return tuple(f"training/{kind}_at_pass_rate/{name}" for name in ranges)


QUESTIONS, WEIGHT = band_metrics("questions"), band_metrics("weight")
"""Metrics of a training step by band: the share of its questions, and their share of its weight."""
