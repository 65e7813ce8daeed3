"""Composes a run's settings as ``verl.trainer.main_ppo`` does, with and without the user's values."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_ext.preflight.data import Data
from verl_ext.preflight.nodes import cluster_address, ray_settings
from verl_ext.runs.folder import full_names, without_hydra

PRIMARY = "ppo_trainer"


@dataclass
class Run:
    """The run that checks judge.

    Args:
        composed: the settings as composed, with interpolations.
        plain: the same groups (algorithm, experiment ...) without the user's values.
        folder: the run's folder, once a start has it.
    """

    composed: DictConfig
    plain: DictConfig
    folder: Path | None = None

    @cached_property
    def config(self) -> DictConfig:
        """The settings as verl's trainer sees them: interpolations resolved, the reward's old names replaced.

        Raises:
            omegaconf.errors.OmegaConfBaseException: an interpolation does not resolve.
        """
        from verl.experimental.reward_loop import migrate_legacy_reward_impl

        config = self.composed.copy()
        OmegaConf.resolve(config)
        return migrate_legacy_reward_impl(config)

    @cached_property
    def data(self) -> Data:
        return Data(self.config)

    @property
    def is_stock(self) -> bool:
        """Whether the run uses none of our extensions."""
        if "verl_ext" in self.composed:
            return False
        # The checks name a trainer or a device that does not resolve.
        with suppress(OmegaConfBaseException, TypeError, ValueError):
            return OmegaConf.select(self.composed, "trainer.device") != "cpu"
        return True

    def is_elsewhere(self, path: str) -> bool:
        """Whether a path is the cluster's: behind Ray's client, or in the folder that Ray unpacks on each node."""
        ray = ray_settings(self.config)
        packed = bool((ray.get("runtime_env") or {}).get("working_dir"))
        behind_client = str(cluster_address(ray)).startswith("ray://")
        return behind_client or (packed and not os.path.isabs(os.path.expanduser(path)))


def compose(overrides: Sequence[str]) -> Run:
    """Compose what ``main_ppo`` would get.

    Raises:
        Exception: Hydra's own, which :func:`verl_ext.preflight.errors.explain` explains.
    """
    with verl_configs():
        import hydra

        return Run(hydra.compose(PRIMARY, overrides=list(overrides)), groups_alone(PRIMARY, overrides))


def of_job(config: DictConfig) -> Run:
    """Compose the same for the job that Hydra is about to start."""
    overrides = [*config.hydra.overrides.hydra, *config.hydra.overrides.task]
    return Run(without_hydra(config), groups_alone(config.hydra.job.config_name, overrides))


def unset(config: DictConfig) -> list[str]:
    """List the settings that a run needs and that have no value."""
    # An unused reward model needs no rollout engine, and the like.
    unused = ("reward", "distillation.", "critic.model")
    raw = OmegaConf.to_container(config, resolve=False)
    missing = [s.name for s in walk(raw) if s.value == "???" and not s.name.startswith(unused)]
    # ``model`` only gives its value to others, which may be set themselves.
    return [name for name in missing if "." in name or f"${{{name}}}" in str(raw)]


def names(config: DictConfig) -> set[str]:
    """Return the full names of all settings and of the nodes above them."""
    parts = [name.split(".") for name in full_names("", OmegaConf.to_container(config, resolve=False))]
    return {".".join(p[:i]) for p in parts for i in range(1, len(p) + 1)} - {""}


def verl_configs():
    """Open a context in which Hydra composes verl's configs."""
    import hydra
    import verl  # noqa: F401  (loads the plugin, which makes the config groups)

    return hydra.initialize_config_module("verl.trainer.config", version_base=None)


def groups_alone(primary: str, overrides: Sequence[str]) -> DictConfig:
    """Compose the groups among these overrides, without the values; needs an initialised Hydra."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    exists = GlobalHydra.instance().config_loader().repository.group_exists
    groups = [
        o.input_line
        for o in OverridesParser.create().parse_overrides(list(overrides))
        # As Hydra tells groups from values. Options may lie in a folder of the user's.
        if o.key_or_group == "hydra.searchpath" or (exists(o.key_or_group) and not isinstance(o.value(), dict))
    ]
    return hydra.compose(primary, overrides=groups)


# Dataclasses ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A setting or a node: its full name, its unresolved value, and the dataclass and annotation of its field."""

    name: str
    value: Any
    owner: type | None
    annotation: Any
    siblings: dict[str, Any]
    """The node that holds it."""


def walk(node: dict[str, Any], owner: type | None = None, prefix: str = "") -> Iterator[Setting]:
    """Yield all settings and nodes of a plain dictionary, nodes before their contents."""
    target = node.get("_target_")
    owner = (_dataclass_named(target) if isinstance(target, str) else None) or owner
    for key, value in node.items():
        annotation = hints(owner).get(str(key))
        yield Setting(f"{prefix}{key}", value, owner, annotation, node)
        if isinstance(value, dict):
            below = next((t for t in (annotation, *get_args(annotation)) if is_dataclass(t)), None)
            if below and get_origin(annotation) is dict:
                # Its keys are names of the user's.
                for name, entry in value.items():
                    if isinstance(entry, dict):
                        yield from walk(entry, below, f"{prefix}{key}.{name}.")
                continue
            yield from walk(value, below, f"{prefix}{key}.")


@cache
def hints(owner: type | None) -> dict[str, Any]:
    """Map a dataclass's fields to their annotations."""
    known = {}
    with suppress(NameError):
        known = get_type_hints(owner) if owner else {}
    return {f.name: known.get(f.name, Any) for f in fields(owner)} if owner else {}


@cache
def _dataclass_named(target: str) -> type | None:
    from hydra.utils import get_class

    # A wrong _target_ is named where the dataclass is made.
    with suppress(Exception):
        return found if is_dataclass(found := get_class(target)) else None
    return None
