"""Explains why overrides do not compose, with the nearest ones that would."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from verl_ext.preflight.composition import PRIMARY, groups_alone, names, verl_configs
from verl_ext.preflight.findings import Finding, by_nearness, first_lines, nearest
from verl_ext.preflight.unread import is_read, names_of_groups, suggestions


def explain(e: Exception, overrides: Sequence[str]) -> Finding:
    """Say in one sentence why the overrides do not compose, and which would."""
    from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException

    text, fix = first_lines(e).split(" See https://hydra.cc")[0], "fix the override that it names"
    # What has two plus signs may be there.
    added = [_name(o) for o in overrides if o.startswith("+") and not o.startswith("++") and "." not in _name(o)]
    if twice := next((name for name in added if added.count(name) > 1), ""):
        text = f"{twice} is added twice: {', '.join(o for o in overrides if _name(o) == twice)}"
        fix = "keep one of them"
    elif isinstance(e, MissingConfigException) and e.options:
        group, _, name = (e.missing_cfg_file or "").rpartition("/")
        text = f"there is no {group}={name}"
        fix = f"use one of {', '.join(by_nearness(name, e.options))}"
    elif isinstance(e, OverrideParseException):
        text = f"the override {e.override!r} cannot be read: {text}"
        fix = "write name=value, without spaces around =; "
        fix += "quote a value with commas, brackets, spaces or signs: \"name='value'\""
    elif isinstance(e, ConfigCompositionException):
        override = next((o for o in overrides if f"'{_name(o)}'" in text), "")
        if "No match in the defaults list" in text:
            text, fix = f"the group {_name(override)} has no option yet", f"write +{override}"
        elif "Could not override" in text and override:
            text, fix = _unknown(override, overrides)
        elif "Could not append" in text:
            fix = f"drop the +, or write ++{override.lstrip('+')}"
        elif "Could not delete" in text:
            near = nearest(_name(override), names(_plain(overrides)))
            fix = f"nearest: ~{', ~'.join(near)}" if near else fix
        elif "Multiple values for" in text:
            group = text.split("Multiple values for ")[1].split(".")[0]
            text, fix = f"{group} has a value already, so + does not fit it", f"write {group}=NAME, without the +"
        elif "Ambiguous value" in text:
            fix = "write a list as name=[a,b]; sweeps are for python -m verl.trainer.main_ppo -m"
    return Finding("settings", "", f"the settings do not compose: {text}", fix)


def _name(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


def _plain(overrides: Sequence[str]) -> DictConfig:
    with verl_configs():
        return groups_alone(PRIMARY, overrides)


def _unknown(override: str, overrides: Sequence[str]) -> tuple[str, str]:
    """Return problem and fix of an override, without a plus, whose name is not in the configuration."""
    name, plain = _name(override), _plain(overrides)
    if OmegaConf.select(plain, name, throw_on_missing=False) is not None:
        return f"{override} adds keys to {name}", f"write ++{override}"
    if is_read(name, plain):
        return f"{name} can be set, but has no value to override", f"write +{override}"
    if name in names_of_groups():
        fix = "leave it out, or choose the one that has it; in a sweep over both, write ++"
        return f"{name} is not in this run, but in another algorithm or experiment", fix
    near = suggestions(name, plain)
    return f"there is no setting {name}", f"nearest: {', '.join(near)}" if near else "leave it out"
