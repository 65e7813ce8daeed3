"""Register everything that this package adds to verl; entry point of the group ``verl.plugins``.

verl imports this module at the end of ``import verl`` in every process (driver, TaskRunner, each Ray worker), so it
must be cheap: what needs large parts of verl is registered once verl imports them. verl logs a plugin's exception only
at DEBUG level, so errors are printed here.
"""

import sys
import traceback
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

SUPPORTED_VERL = ">=0.9.1,<0.10"
"""Supported versions of verl, as a PEP 440 specifier."""

error: BaseException | None = None
"""Why the plugin is not active in this process, if it is not; ``verl_ext.doctor`` shows it."""


def check_verl_version(found: str) -> None:
    """Raise RuntimeError for a version of verl that is not supported."""
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(SUPPORTED_VERL).contains(found, prereleases=True):
        raise RuntimeError(
            f"verl-disco supports verl {SUPPORTED_VERL}, but verl {found} is installed; "
            f'run: pip install "verl{SUPPORTED_VERL}"'
        )


def check_not_hidden() -> None:
    """Raise RuntimeError if another package, such as one in the working folder, hides our launcher or a recipe.

    They are in namespace packages, which other distributions may share; one with an ``__init__.py`` hides all others.
    """
    from verl_ext import recipes

    root = Path(__file__).resolve().parents[1]
    modules = {point.module.rpartition(".")[0] for point in recipes.entry_points()}
    for name in ("hydra_plugins.verl_ext_sweep", *sorted(modules)):
        package, _, part = name.partition(".")
        mine = [root / package / f"{part}.py", root / package / part / "__init__.py"]
        if not any(map(Path.exists, mine)):
            continue  # a recipe of another distribution
        try:
            outer = find_spec(package)
        except ValueError:
            outer = None  # a module without a spec, put into sys.modules by hand
        places = outer.submodule_search_locations if outer else None
        inner = PathFinder.find_spec(name, list(places)) if places else None
        if inner and inner.origin and Path(inner.origin).resolve() in mine:
            continue
        hiding = (inner and inner.origin) or (outer and outer.origin) or f"sys.modules['{package}']"
        raise RuntimeError(
            f"{hiding} hides verl-disco's {name}, because Python takes the first {package} on sys.path; rename it, or "
            "start in another folder"
        )


def activate() -> None:
    """Register all extensions."""
    import verl

    check_verl_version(verl.__version__)
    check_not_hidden()

    from wrapt import register_post_import_hook

    from verl_ext import cpu
    from verl_ext.hydra import config_source as hydra_config

    cpu.register()
    hydra_config.register()
    register_post_import_hook(_register_trainers, "verl.trainer.ppo.v1")
    register_post_import_hook(_register_estimators, "verl.trainer.ppo.core_algos")
    register_post_import_hook(_register_recipes, "verl.trainer.ppo.core_algos")


def _register_trainers(_module) -> None:
    from verl_ext.lazy import import_whole

    import_whole("verl_ext.training.trainer").register()


def _register_estimators(_module) -> None:
    from verl_ext.lazy import import_whole

    import_whole("verl_ext.training.estimators").register()


def _register_recipes(_module) -> None:
    from verl_ext.lazy import import_whole
    from verl_ext.recipes import installed

    for recipe in installed():
        for name in recipe.registering:
            import_whole(name).register()


try:
    activate()
except Exception as e:
    error = e
    traceback.print_exc()
    print(f"verl-disco: the plugin is NOT active in this process: {e}", file=sys.stderr, flush=True)
