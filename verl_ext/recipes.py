"""Find recipes: methods in packages of their own, each announced by an entry point that names a :class:`Recipe`.

    [project.entry-points."verl_ext.recipes"]
    NAME = "package.plugin:RECIPE"

They are loaded only when needed, because this package's plugin runs in every process.
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
"""Package of this package's config groups, one directory each."""

DEFAULT_ALGORITHM = "ppo"
"""The option of ``algorithm`` that leaves verl's own settings as they are."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe tells this package.

    Args:
        package: its Python package.
        config: package (with an ``__init__.py``) of its Hydra config groups, one directory each.
        registering: modules whose ``register()`` is called once verl has its registries of advantages and losses.
        estimators: options of ``algorithm.adv_estimator`` that need the recipe's settings.
        losses: ``actor.policy_loss.loss_mode`` -> loss of a whole mini-batch, for methods that verl's ``ppo_loss`` does
            not compute; with the signature of :func:`verl_ext.report.weights.batch_loss`.
        compared: options of ``algorithm`` that are drawn beside verl's own methods.
        metrics: ``kl``, ``entropy``, ``coefficient`` or ``lengths`` -> the recipe's metrics for it.
        totals: metrics that a step logs as a sum over its local updates, not as a mean.
        kl_bound: a run's settings by full name -> highest KL without a penalty; None if the method has none.
        unread: a run's settings by full name -> patterns of full names of settings that its loss does not read, each
            with what to do instead.
        copies: prefixes of settings that repeat or follow from others.
        optional: prefixes of settings that are in a config only if they were given.
        published: file in ``config`` with published pass@1: model -> method -> benchmark.
        source: citation of the published results.
    """

    package: str
    config: str
    registering: tuple[str, ...] = ()
    estimators: tuple[str, ...] = ()
    losses: Mapping[str, "Callable[..., Tensor]"] = field(default_factory=dict)
    compared: tuple[str, ...] = ()
    metrics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    totals: tuple[str, ...] = ()
    kl_bound: Callable[[Mapping[str, Any]], float | None] = lambda settings: None
    unread: Callable[[Mapping[str, Any]], Mapping[str, str]] = lambda settings: {}
    copies: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    published: str | None = None
    source: str = ""


def entry_points() -> list[metadata.EntryPoint]:
    """List the entry points of the installed distributions, without importing them.

    ``importlib.metadata.entry_points`` reads only one record per distribution: in a checkout that of its last build,
    which may be older than the installed one.
    """
    points = [point for found in metadata.distributions() for point in found.entry_points if point.group == GROUP]
    return list({point.value: point for point in points}.values())


@cache
def installed() -> tuple[Recipe, ...]:
    """Load the recipes of this environment.

    Raises:
        RuntimeError: an entry point does not load or is not a recipe.
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
    """List the packages with config groups: this package's, then the recipes'."""
    return (CONFIG, *(recipe.config for recipe in installed()))


def _files(pattern: str) -> list[Path]:
    return [f for package in config_packages() for f in Path(str(resources.files(package))).glob(pattern)]


def options(group: str) -> dict[str, Path]:
    """Find the options of a config group: name -> YAML file, sorted by name."""
    # Of two options with the same name, Hydra takes the first.
    return dict(sorted({file.stem: file for file in reversed(_files(f"{group}/*.yaml"))}.items()))


def describe_algorithms() -> dict[str, str]:
    """Describe each option of ``algorithm`` by the second line of its YAML file, a comment."""
    return {name: file.read_text().splitlines()[1].lstrip("# ") for name, file in options("algorithm").items()}


def groups() -> set[str]:
    """Name the config groups."""
    return {file.parent.name for file in _files("*/*.yaml")}


def metric_names(curve: str, *stock: str) -> tuple[str, ...]:
    """List the metrics for a curve: verl's own, then the recipes' (see :attr:`Recipe.metrics`)."""
    return (*stock, *(name for recipe in installed() for name in recipe.metrics.get(curve, ())))


def kl_metrics(algorithm: str) -> tuple[str, ...]:
    """List the metrics for KL(old || new), in nats per token, in a run of ``algorithm``."""
    # verl logs kl_cov's mean |log ratio| under the same name.
    return () if algorithm == "kl_cov" else metric_names("kl", "actor/ppo_kl")
