"""Settles what only the process that starts a job knows: relative paths, and Hydra's own interpolations.

verl's processes run where Ray puts them: their working folder is that of the node's Ray, not the one where the command
was given, and Hydra is not set up there.
"""

import copy
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from verl_ext.preflight.nodes import cluster_address
from verl_ext.runs.folder import full_names, without_hydra

OF_HYDRA = re.compile(r"\$\{(hydra[.:]|now:|python_version:|verl_ext\.run_name:)")
"""Interpolations that only Hydra's process resolves."""

PLACES = re.compile(r"(.*[._])?(dir|folder|save_path|resume_from_path|timeline_json_file)|data\.(train|val)_files")
"""Full names of settings with local paths, there or yet to be made."""

REFERENCES = re.compile(r"(.*[._])?(path|paths|file|tokenizer)|.*\.module|model")
"""Settings with a path or with the name of a model: a path if something is there."""

NOT_OURS = re.compile(r".*\.env_vars\..*|.*_target_")


def settle(config: DictConfig) -> None:
    """Settle all settings of a job, in place.

    Raises:
        ValueError: as :func:`settled`.
    """
    for name, value in settled(config).items():
        OmegaConf.update(config, name, value)


def settled(config: DictConfig) -> dict[str, Any]:
    """Find the settings that mean something else in verl's processes: full name -> value that does not.

    Relative paths start where the command was given, also with ``hydra.job.chdir=true``; in a run of stock verl then in
    Hydra's folder of the job, as verl would have them.

    Args:
        config: a job's settings with Hydra's own node, before the job starts; it stays as it is.

    Raises:
        ValueError: a path that Ray's client cannot make absolute.
    """
    # Read first: the time in it is kept with the settings.
    output_dir = os.path.abspath(config.hydra.run.dir)
    config = copy.deepcopy(config)
    hydra = config.hydra
    if OmegaConf.is_missing(hydra.runtime, "output_dir"):
        with read_write(hydra), open_dict(hydra):
            hydra.runtime.output_dir = output_dir
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        return dict(_changes(config))
    finally:
        HydraConfig.instance().cfg = before


def unsettled(config: DictConfig) -> dict[str, Any]:
    """Find the settings that no other process can resolve, as they are written."""
    return {name: raw for name, raw in _settings(config) if OF_HYDRA.search(str(raw))}


def _settings(config: DictConfig) -> Iterator[tuple[str, Any]]:
    raw = full_names("", OmegaConf.to_container(without_hydra(config), resolve=False))
    # Those that others follow come first.
    return iter(sorted(raw.items(), key=lambda item: "${" in str(item[1])))


def _changes(config: DictConfig) -> Iterator[tuple[str, Any]]:
    chdir = config.hydra.job.chdir and "verl_ext" not in config
    base = config.hydra.runtime.output_dir if chdir else os.getcwd()
    ray = OmegaConf.to_container(OmegaConf.select(config, "ray_kwargs.ray_init") or OmegaConf.create())
    client = str(cluster_address(ray)).startswith("ray://")
    # Ray unpacks it on each node, as the working folder: what is named relative to it is there.
    packed = bool((ray.get("runtime_env") or {}).get("working_dir"))
    for name, raw in _settings(config):
        try:
            value = plain = OmegaConf.select(config, name)
        except (OmegaConfBaseException, ValueError, TypeError):
            # Named where the settings are checked.
            continue
        if OmegaConf.is_list(value):
            value = plain = OmegaConf.to_container(value, resolve=True)
        if not NOT_OURS.fullmatch(name):
            if PLACES.fullmatch(name) and (not packed or name.startswith("trainer.")):
                # A data set may be a name that a class of the user's knows.
                value = _each(plain, lambda path, n=name: absolute(path, base, n.endswith("_files") and is_bare(path)))
            elif REFERENCES.fullmatch(name) and not packed:
                value = _each(plain, lambda path: absolute(path, base, must_exist=True))
        if client and value != plain and ("verl_ext" not in config or str(plain).startswith("~")):
            # Left to the cluster, as verl does.
            value = plain
        if client and value != plain and name.startswith(("trainer.", "data.", "arithmetic.", "math.")):
            raise ValueError(
                f"{name}={plain} is relative, and behind Ray's client (ray://) paths are the cluster's; give an "
                "absolute one that each of its nodes sees"
            )
        if value != plain or OF_HYDRA.search(str(raw)):
            OmegaConf.update(config, name, value)
            yield name, value


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    return [_each(x, change) for x in value] if isinstance(value, list) else change(value)


def absolute(path: Any, base: str, must_exist: bool = False) -> Any:
    """Make a relative local path absolute; whatever is none stays.

    Args:
        path: of a setting.
        base: where relative paths start.
        must_exist: whether it may be something else than a path where there is nothing.
    """
    if not isinstance(path, str):
        return path
    local = os.path.expanduser(path.removeprefix("file://"))
    if not local or "://" in local or os.path.isabs(path.removeprefix("file://")):
        return path
    found = os.path.normpath(os.path.join(base, local))
    return path if must_exist and not os.path.exists(found) else found


def is_bare(path: Any) -> bool:
    """Tell whether a path has no ending, as the name of a data set has none."""
    return isinstance(path, str) and not os.path.splitext(path)[1]


def as_override(name: str, value: Any) -> str:
    """Write a setting as Hydra reads it on the command line, whether it has a value yet or not."""
    return f"++{name}={_quoted(value)}"


def _quoted(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_quoted, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    # Backslashes are themselves, but before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), value) + "'"
