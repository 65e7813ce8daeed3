"""Recipes are methods in packages of their own; each announces itself by an entry point, which names a :class:`Recipe`.

    [project.entry-points."verl_ext.recipes"]
    NAME = "package.plugin:RECIPE"

They are loaded where something of theirs is needed, because this package's plugin runs in every process.
"""

import importlib.metadata as metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "verl_ext.recipes"
"""Group of the entry points."""

CONFIG = "verl_ext.config"
"""Package of our own config groups, one directory each."""

DEFAULT_ALGORITHM = "ppo"
"""The option of ``algorithm`` that leaves verl's own settings as they are."""


@dataclass(frozen=True)
class Recipe:
    """What this package has to know of a recipe.

    Args:
        package: its Python package.
        config: package (with an ``__init__.py``) of its Hydra config groups, one directory each.
        registering: modules whose ``register()`` is called once verl has its registries of advantages and losses.
        losses: ``actor.policy_loss.loss_mode`` -> the loss of a whole mini-batch, for methods that verl's ``ppo_loss``
            does not compute; called as :func:`verl_ext.report.weights.batch_loss`.
        compared: options of ``algorithm`` that are drawn beside verl's own methods.
        metrics: ``kl``, ``entropy``, ``coefficient`` or ``lengths`` -> the recipe's metrics that show it.
        totals: metrics of which a step logs the sum, not the mean, over its local updates.
        kl_bound: a run's settings by full name -> largest KL that costs nothing, if the method has one.
        copies: beginnings of settings that repeat others or follow from them.
        optional: beginnings of settings that stand in a config only where they were given.
        published: file in ``config`` with published pass@1: model -> method -> benchmark.
        source: where they were published.
    """

    package: str
    config: str
    registering: tuple[str, ...] = ()
    losses: Mapping[str, "Callable[..., Tensor]"] = field(default_factory=dict)
    compared: tuple[str, ...] = ()
    metrics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    totals: tuple[str, ...] = ()
    kl_bound: Callable[[Mapping[str, Any]], float | None] = lambda settings: None
    copies: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    published: str | None = None
    source: str = ""


def entry_points() -> list[metadata.EntryPoint]:
    """What the installed distributions announce, without importing it.

    ``importlib.metadata.entry_points`` reads one record of a distribution: in a checkout that of its last build, which
    may be older than what is installed.
    """
    points = [point for found in metadata.distributions() for point in found.entry_points if point.group == GROUP]
    return list({point.value: point for point in points}.values())


@cache
def installed() -> tuple[Recipe, ...]:
    """Load the recipes of this environment.

    Raises:
        RuntimeError: an entry point leads to no recipe; says which, why, and what to do.
    """
    found = []
    for point in sorted(entry_points(), key=lambda point: point.name):
        name = point.dist.name if point.dist else "an unknown distribution"
        where = f"the recipe {point.name} = {point.value} of {name} (entry points {GROUP})"
        try:
            recipe = point.load()
        except Exception as e:
            raise RuntimeError(f"{where} does not load: {type(e).__name__}: {e}; install {name} again") from e
        if not isinstance(recipe, Recipe):
            raise RuntimeError(f"{where} is a {type(recipe).__name__}; it must be a {__name__}.{Recipe.__name__}")
        found.append(recipe)
    return tuple(found)


def config_packages() -> tuple[str, ...]:
    """Packages with config groups: ours, then the recipes'."""
    return (CONFIG, *(recipe.config for recipe in installed()))


def options(group: str) -> dict[str, Path]:
    """Find the options of a config group: name -> YAML file, by name."""
    folders = [Path(str(resources.files(package))) / group for package in config_packages()]
    # Of two of a name, Hydra takes the first.
    found = {file.stem: file for folder in reversed(folders) for file in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def describe_algorithms() -> dict[str, str]:
    """Options of ``algorithm=NAME`` -> the comment in the second line of its YAML file (the first is the package)."""
    return {name: file.read_text().splitlines()[1].lstrip("# ") for name, file in options("algorithm").items()}


def groups() -> set[str]:
    """Names of the config groups."""
    folders = [Path(str(resources.files(package))) for package in config_packages()]
    return {file.parent.name for folder in folders for file in folder.glob("*/*.yaml")}


def metric_names(curve: str, *stock: str) -> tuple[str, ...]:
    """Give the metrics that show a curve: verl's, then the recipes' (see :attr:`Recipe.metrics`)."""
    return (*stock, *(name for recipe in installed() for name in recipe.metrics.get(curve, ())))
