"""Resolve what only the process that starts a job knows: relative paths, and Hydra's own interpolations.

In verl's other processes, on any of Ray's nodes, the working folder is another one and Hydra is not set up.
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
"""Interpolations that only Hydra's process can resolve."""

PLACES = re.compile(r"(.*[._])?(dir|folder|save_path|resume_from_path|timeline_json_file)|data\.(train|val)_files")
"""Full names of settings with local paths, existing or not."""

REFERENCES = re.compile(r"(.*[._])?(path|paths|file|tokenizer)|.*\.module|model")
"""Settings with a path or with the name of a model or module: a path if it exists."""

OF_THE_CLUSTER = ("trainer.", "data.", "arithmetic.", "countdown.", "gsm8k.", "math.")
"""Nodes whose paths Ray's processes open."""

NOT_OURS = re.compile(r".*\.env_vars\..*|.*_target_")


def settle(config: DictConfig) -> None:
    """Resolve a job's settings in place, as :func:`settled`."""
    for name, value in settled(config).items():
        OmegaConf.update(config, name, value)


def settled(config: DictConfig) -> dict[str, Any]:
    """Find the settings that verl's other processes would read differently: full name -> resolved value.

    Relative paths start in the folder of the command, also with ``hydra.job.chdir=true``; in a run of stock verl they
    then start in the job's folder, as verl has them.

    Args:
        config: a job's settings with Hydra's own node, before the job starts; not changed.

    Raises:
        ValueError: a relative path that would be looked up behind Ray's client, on the cluster.
    """
    # Before the copy, so that the time in it is resolved once.
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
    """Find the settings that no other process can resolve, unresolved."""
    return {name: raw for name, raw in _settings(config) if OF_HYDRA.search(str(raw))}


def _settings(config: DictConfig) -> list[tuple[str, Any]]:
    raw = full_names("", OmegaConf.to_container(without_hydra(config), resolve=False))
    # Interpolations last, after the settings that they refer to.
    return sorted(raw.items(), key=lambda item: "${" in str(item[1]))


def _changes(config: DictConfig) -> Iterator[tuple[str, Any]]:
    chdir = config.hydra.job.chdir and "verl_ext" not in config
    base = config.hydra.runtime.output_dir if chdir else os.getcwd()
    ray = OmegaConf.to_container(OmegaConf.select(config, "ray_kwargs.ray_init") or OmegaConf.create())
    client = str(cluster_address(ray)).startswith("ray://")
    # Ray unpacks this folder on each node as the working folder, so paths relative to it hold there.
    packed = bool((ray.get("runtime_env") or {}).get("working_dir"))
    for name, raw in _settings(config):
        try:
            value = plain = OmegaConf.select(config, name)
        except (OmegaConfBaseException, ValueError, TypeError):
            # The checks of the settings will report it.
            continue
        if OmegaConf.is_list(value):
            value = plain = OmegaConf.to_container(value, resolve=True)
        if not NOT_OURS.fullmatch(name):
            if PLACES.fullmatch(name) and (not packed or name.startswith("trainer.")):
                # A bare name may be a data set for a user's own class.
                value = _each(plain, lambda path, n=name: absolute(path, base, n.endswith("_files") and is_bare(path)))
            elif REFERENCES.fullmatch(name) and not packed:
                value = _each(plain, lambda path: absolute(path, base, must_exist=True))
        if client and value != plain and ("verl_ext" not in config or str(plain).startswith("~")):
            # As in verl, the cluster resolves it.
            value = plain
        if client and value != plain and name.startswith(OF_THE_CLUSTER):
            raise ValueError(
                f"{name}={plain} is relative, but with Ray's client (ray://) paths are those of the cluster; give an "
                "absolute path that each of its nodes sees"
            )
        if value != plain or OF_HYDRA.search(str(raw)):
            OmegaConf.update(config, name, value)
            yield name, value


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    return [_each(x, change) for x in value] if isinstance(value, list) else change(value)


def absolute(path: Any, base: str, must_exist: bool = False) -> Any:
    """Make a relative local path absolute; return anything else unchanged.

    Args:
        path: a setting's value.
        base: folder in which relative paths start.
        must_exist: return ``path`` unchanged if nothing is there, because it may not be a path.
    """
    if not isinstance(path, str):
        return path
    local = os.path.expanduser(path.removeprefix("file://"))
    if not local or "://" in local or os.path.isabs(path.removeprefix("file://")):
        return path
    found = os.path.normpath(os.path.join(base, local))
    return path if must_exist and not os.path.exists(found) else found


def is_bare(path: Any) -> bool:
    """Tell whether a path has no suffix, like the name of a data set."""
    return isinstance(path, str) and not os.path.splitext(path)[1]


def as_override(name: str, value: Any) -> str:
    """Write a setting as an override for Hydra's command line, whether it exists yet or not."""
    return f"++{name}={_quoted(value)}"


def _quoted(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_quoted, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    # Hydra reads backslashes literally, except before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), value) + "'"
