"""A run's settings as ``verl.trainer.main_ppo`` composes them, and what they would be without the user's values."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf

from verl_ext.preflight.findings import Finding, by_nearness, first_lines, nearest
from verl_ext.runs.folder import full_names, without_hydra

PRIMARY = "ppo_trainer"


@dataclass(frozen=True)
class Composition:
    """``config`` as composed, interpolations and all; ``plain``: the same groups (algorithm, experiment ...) alone."""

    config: DictConfig
    plain: DictConfig


def compose(overrides: Sequence[str]) -> Composition:
    """Compose what ``main_ppo`` would get.

    Raises:
        Exception: of Hydra's; :func:`explain` says what it means.
    """
    with _verl_configs():
        import hydra

        return Composition(hydra.compose(PRIMARY, overrides=list(overrides)), _plain(PRIMARY, overrides))


def of_job(config: DictConfig) -> Composition:
    """The same for the job that Hydra is about to start."""
    plain = _plain(config.hydra.job.config_name, config.hydra.overrides.task)
    return Composition(without_hydra(config), plain)


def resolved(composition: Composition) -> DictConfig:
    """The settings as verl's trainer sees them: all interpolations resolved, old names of the reward's settings moved.

    Raises:
        ValueError: a setting that the run needs has no value.
        omegaconf.errors.OmegaConfBaseException: an interpolation does not resolve.
    """
    from verl.experimental.reward_loop import migrate_legacy_reward_impl

    for setting in walk(OmegaConf.to_container(composition.config, resolve=False)):
        # A rollout engine of a reward model that is not used, and the like, may be missing.
        if setting.value == "???" and not setting.name.startswith(("reward", "distillation.", "critic.model")):
            raise ValueError(f"{setting.name} is not set; give {setting.name}=...")
    config = composition.config.copy()
    OmegaConf.resolve(config)
    return migrate_legacy_reward_impl(config)


def names(config: DictConfig) -> set[str]:
    """Full names of all settings and of the nodes above them."""
    leaves = full_names("", OmegaConf.to_container(config, resolve=False))
    parts = [name.split(".") for name in leaves]
    return {".".join(p[:i]) for p in parts for i in range(1, len(p) + 1)} - {""}


def _verl_configs():
    import hydra
    import verl  # noqa: F401  (loads the plugin, which makes the config groups)

    return hydra.initialize_config_module("verl.trainer.config", version_base=None)


def _plain(primary: str, overrides: Sequence[str]) -> DictConfig:
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    exists = GlobalHydra.instance().config_loader().repository.group_exists
    groups = [
        o.input_line
        for o in OverridesParser.create().parse_overrides(list(overrides))
        # As Hydra tells them apart.
        if exists(o.key_or_group) and not isinstance(o.value(), dict)
    ]
    return hydra.compose(primary, overrides=groups)


# Dataclasses ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A setting or a node: its full name, its value unresolved, and the dataclass and annotation that it belongs to."""

    name: str
    value: Any
    owner: type | None
    annotation: Any
    siblings: dict[str, Any]
    """The node that it stands in, itself included."""


def walk(node: dict[str, Any], owner: type | None = None, prefix: str = "") -> Iterator[Setting]:
    """All settings and nodes of a plain dictionary, nodes before what they hold."""
    owner = _dataclass_named(node.get("_target_")) or owner
    for key, value in node.items():
        annotation = hints(owner).get(str(key))
        yield Setting(f"{prefix}{key}", value, owner, annotation, node)
        if isinstance(value, dict):
            below = next((t for t in (annotation, *get_args(annotation)) if is_dataclass(t)), None)
            yield from walk(value, below, f"{prefix}{key}.")


@cache
def hints(owner: type | None) -> dict[str, Any]:
    """Fields of a dataclass -> their annotations."""
    if owner is None:
        return {}
    try:
        known = get_type_hints(owner)
    except NameError:
        known = {}
    return {f.name: known.get(f.name, Any) for f in fields(owner)}


@cache
def _dataclass_named(target: str | None) -> type | None:
    from hydra.utils import get_class

    if not isinstance(target, str):
        return None
    try:
        found = get_class(target)
    except Exception:
        # A wrong _target_ is named where the dataclass is made.
        return None
    return found if is_dataclass(found) else None


# Hydra's errors -------------------------------------------------------------------------------------------------------


def explain(e: Exception, overrides: Sequence[str]) -> Finding:
    """What keeps the overrides from composing, in one sentence, with the nearest that would."""
    from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException

    text, fix = first_lines(e).split(" See https://hydra.cc")[0], "fix the override that it names"
    if isinstance(e, MissingConfigException) and e.options:
        group, _, name = (e.missing_cfg_file or "").rpartition("/")
        text = f"there is no {group}={name}"
        fix = f"use one of {', '.join(by_nearness(name, e.options))}"
    elif isinstance(e, OverrideParseException):
        text = f"the override {e.override!r} cannot be read: {text}"
        fix = "write name=value; quote a value with commas, brackets, spaces or signs: \"name='value'\""
    elif isinstance(e, ConfigCompositionException):
        override = next((o for o in overrides if f"'{_name(o)}'" in text), "")
        if "No match in the defaults list" in text:
            text, fix = f"the group {_name(override)} has no option yet", f"write +{override}"
        elif "Could not override" in text and override:
            text, fix = _unknown(override, overrides)
        elif "Could not append" in text:
            fix = f"drop the +, or write ++{override.lstrip('+')}"
        elif "Could not delete" in text:
            near = nearest(_name(override), names(_plain_of(overrides)))
            fix = f"nearest: ~{', ~'.join(near)}" if near else fix
        elif "Multiple values for" in text:
            group = text.split("Multiple values for ")[1].split(".")[0]
            text, fix = f"{group} has a value already, so + does not fit it", f"write {group}=NAME, without the +"
        elif "Ambiguous value" in text:
            fix = "write a list as name=[a,b]; sweeps are for python -m verl.trainer.main_ppo -m"
    return Finding("settings", "", f"the settings do not compose: {text}", fix)


def _name(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


def _plain_of(overrides: Sequence[str]) -> DictConfig:
    with _verl_configs():
        return _plain(PRIMARY, overrides)


def _unknown(override: str, overrides: Sequence[str]) -> tuple[str, str]:
    """Problem and fix of an override, without a plus, of what the configuration has not."""
    from verl_ext.preflight.unread import is_read, names_of_groups, suggestions

    name = _name(override)
    plain = _plain_of(overrides)
    if OmegaConf.select(plain, name, throw_on_missing=False) is not None:
        return f"{override} adds keys to {name}", f"write ++{override}"
    if is_read(name, plain):
        return f"{name} is not in the configuration, though verl reads it", f"write +{override}"
    if name in names_of_groups():
        fix = "leave it out, or choose what has it; in a sweep over both, write ++"
        return f"{name} is not in this run, but in another algorithm or experiment", fix
    near = suggestions(name, plain)
    return f"there is no setting {name}", f"nearest: {', '.join(near)}" if near else "leave it out"
