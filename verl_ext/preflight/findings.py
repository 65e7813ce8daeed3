"""Defines findings, runs checks, and holds what several checks need."""

import contextlib
import difflib
import importlib.metadata as metadata
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """A line of the report; if it has a ``problem``, ``fix`` says what to do.

    A ``warning`` may be harmless; ``error`` is the exception with which a check itself failed.
    """

    name: str
    value: str
    problem: str = ""
    fix: str = ""
    warning: bool = False
    error: Exception | None = None

    def __str__(self) -> str:
        return f"{self.problem}; {self.fix}" if self.fix else self.problem


def run_checks(
    checks: Iterable[Callable[..., Iterator[Finding]]], *arguments: Any, hint: str = ""
) -> Iterator[Finding]:
    """Yield the findings of all checks, run silently; a check that fails is a finding, whose fix ends in ``hint``."""
    for check in checks:
        found = []
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                for finding in check(*arguments):
                    found.append(finding)
        except Exception as e:
            name = check.__name__.removeprefix("check_")
            problem = f"checking {name} failed: {type(e).__name__}: {first_lines(e)}"
            found.append(Finding(name, "", problem, f"fix the error above{hint}", error=e))
        yield from found


def first_lines(e: Exception) -> str:
    """Join the first three lines of an error's message."""
    return " ".join(" ".join(str(e).split("\n")[:3]).split())


def by_nearness(name: str, choices: Iterable[str]) -> list[str]:
    """Sort the choices by their likeness to ``name``."""
    return sorted(map(str, choices), key=lambda choice: (-_likeness(str(name), choice), choice))


def nearest(name: str, choices: Iterable[str], cutoff: float = 0.65) -> list[str]:
    """Return up to three choices that are like ``name``, the most alike first."""
    return [c for c in by_nearness(name, choices) if _likeness(str(name), c) >= cutoff][:3]


def _likeness(name: str, choice: str) -> float:
    ratio = difflib.SequenceMatcher(None, name.lower(), choice.lower()).ratio()
    words, others = set(name.split("_")), set(choice.split("_"))
    # batch_size for train_batch_size, temp for temperature.
    part = words < others or (len(name) > 2 and choice.startswith(name))
    return max(ratio, 0.7) if part else ratio


def version_of(*distributions: str) -> str | None:
    """Return the version of the first installed distribution, with its name if that is not the first."""
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name) + (f" ({name})" if name != distributions[0] else "")
    return None
