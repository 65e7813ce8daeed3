"""Refuses a Ray cluster if a node lacks this plugin, or has another version of it or of verl.

Without the plugin a node's processes would train by verl alone, or end in an import error that names no node. Nodes
that do not see the run's files are named, too.
"""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.preflight.findings import Finding
from verl_ext.recipes import installed

SECONDS_TO_ANSWER = 300.0


def ask_cluster(config: DictConfig, folder: Path | None = None) -> Iterator[Finding]:
    """Compare each node of the cluster that ``config`` names with this one; do nothing for a cluster of the run's own.

    Args:
        config: the settings.
        folder: the run's folder, which exists.

    Yields:
        Nodes that differ, with their Python, and nodes that do not see some of the run's files.
    """
    settings = ray_settings(config)
    address = cluster_address(settings)
    if address in (None, "local") or not is_listening(address):
        return
    import ray

    # verl's runtime environment, so that what it sends to the nodes (working_dir, py_executable ...) is there.
    environment = {name: value for name, value in (settings.get("runtime_env") or {}).items() if value is not None}
    try:
        ray.init(address=address, runtime_env=environment, log_to_driver=False)
    except ConnectionError:
        # verl will say why it cannot connect.
        return
    try:
        here, answers = what_is_installed()(), ask_nodes(what_is_installed())
        unseen = {} if address.startswith("ray://") else what_is_not_seen(config, folder)
    finally:
        ray.shutdown()
    if problems := [f"{node}: {problem}" for node, found in answers.items() if (problem := compare(found, here))]:
        has = f"verl-disco {here['verl-disco']} and verl {here['verl']}"
        problem = f"ray_kwargs.ray_init.address={address}: not every node has what this one has: {has}"
        yield Finding("nodes", "", problem, f"install the same there: {'; '.join(problems)}")
        return
    yield Finding("nodes", f"{len(answers)} at {address} have what this one has")
    if address.startswith("ray://"):
        place = f"trainer.default_local_dir={OmegaConf.select(config, 'trainer.default_local_dir')}"
        problem = f"behind Ray's client ({address}) files are the cluster's: {place} there cannot be seen from here"
        yield Finding("nodes", "", problem, "make sure that all its nodes share it", warning=True)
    for node, names in unseen.items():
        problem = f"node {node} does not see {', '.join(names)} of this one: what its processes write stays there, and "
        problem += "what they read must be there, too"
        yield Finding("nodes", "", problem, "use a disk that all nodes share", warning=True)


def what_is_not_seen(config: DictConfig, folder: Path | None) -> dict[str, list[str]]:
    """Ask each node of the connected cluster for the run's files: node -> settings whose files it does not see."""
    places = {}
    for name in ("data.train_files", "data.val_files", "actor_rollout_ref.model.path"):
        value = OmegaConf.select(config, name)
        paths = [path for path in (value if OmegaConf.is_list(value) else [value]) if os.path.isabs(str(path))]
        # Files that are yet to be built are nowhere.
        if paths and all(map(os.path.exists, paths)):
            places[name] = paths
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".seen_") as mark:
        if folder is not None:
            places["trainer.default_local_dir"] = [mark.name]

        def unseen() -> list[str]:
            import os

            return [name for name, paths in places.items() if not all(map(os.path.exists, paths))]

        answers = ask_nodes(unseen)
    return {node: found for node, found in answers.items() if isinstance(found, list) and found}


def ray_settings(config: DictConfig) -> dict[str, Any]:
    """Return what verl passes to ``ray.init``."""
    return OmegaConf.to_container(OmegaConf.select(config, "ray_kwargs.ray_init") or OmegaConf.create())


def cluster_address(settings: dict[str, Any]) -> str | None:
    """Return the address that ``ray.init(**settings)`` will connect to; None if it starts a cluster of its own."""
    address = settings.get("address")
    if address not in (None, "auto"):
        return address
    if found := os.environ.get("RAY_ADDRESS"):
        return found
    # `ray start` writes it there.
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    file = os.path.join(settings.get("_temp_dir") or os.path.join(folder, "ray"), "ray_current_cluster")
    return Path(file).read_text().strip() or None if os.path.exists(file) else None


def is_listening(address: str) -> bool:
    """Try to connect, since Ray would wait for minutes for a cluster that is gone."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        # Of a larger number the system would take the last 16 bits.
        if not 0 < int(port) < 2**16:
            return False
        with socket.create_connection((host, int(port)), timeout=10):
            return True
    except (OSError, ValueError):
        return False


def what_is_installed():
    """Make the function that each node runs; Ray sends it as code, since a node may not have this module.

    It returns the Python, and the version of each package or None. The plugin's version ends in a digest of its files
    and of the recipes' files, because a checkout that was not updated has the same number.
    """
    packages = ["verl_ext", *(recipe.package for recipe in installed())]

    def found() -> dict[str, str | None]:
        import hashlib
        import pathlib
        import sys
        from importlib.metadata import PackageNotFoundError, version
        from importlib.util import find_spec

        def of(package: str) -> str | None:
            try:
                return version(package)
            except PackageNotFoundError:
                return None

        versions = {"python": sys.executable, "verl": of("verl"), "verl-disco": of("verl-disco")}
        if versions["verl-disco"] is None:
            return versions
        digest = hashlib.sha256()
        for name in packages:
            try:
                folder = pathlib.Path(find_spec(name).origin).parent
            except (ModuleNotFoundError, AttributeError):
                return versions | {"verl-disco": f"{versions['verl-disco']} without {name}"}
            for file in sorted(f for kind in ("py", "yaml") for f in folder.rglob(f"*.{kind}")):
                digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
        return versions | {"verl-disco": f"{versions['verl-disco']} ({digest.hexdigest()[:8]})"}

    return found


def ask_nodes(question: Callable[[], Any]) -> dict[str, Any]:
    """Call a function on each living node of the connected cluster: address and id -> result, or error as text."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    calls = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ask = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(question)
            calls[f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"] = ask.remote()
    done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=SECONDS_TO_ANSWER)
    answers = {}
    for node, call in calls.items():
        if call not in done:
            answers[node] = f"no answer within {SECONDS_TO_ANSWER:.0f} s"
            continue
        try:
            answers[node] = ray.get(call)
        except Exception as e:
            answers[node] = f"{type(e).__name__}: {e}"
    return answers


def compare(found: dict[str, str | None] | str, here: dict[str, str | None]) -> str:
    """Say what is wrong with a node's answer; "" if nothing is."""
    if isinstance(found, str):
        return found
    wrong = [f"{name} is {found[name] or 'missing'}" for name in ("verl-disco", "verl") if found[name] != here[name]]
    return f"{' and '.join(wrong)} ({found['python']})" if wrong else ""
