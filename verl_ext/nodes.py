"""Refuses a Ray cluster of which some node lacks this plugin, or has other versions.

verl's processes run on any node, and where the plugin is missing verl would quietly train without it, or end in an
import error that names no node.
"""

import os
import socket
from importlib.metadata import version
from typing import Any

from omegaconf import DictConfig, OmegaConf

PACKAGES = ("verl-disco", "verl")


def check_nodes(config: DictConfig) -> None:
    """Ask each node of the cluster that ``config`` will train on; on a Ray of the run's own there is nothing to ask.

    Raises:
        ValueError: names each node, what it lacks, and its Python.
    """
    address = OmegaConf.select(config, "ray_kwargs.ray_init.address") or os.environ.get("RAY_ADDRESS")
    if address in (None, "auto"):
        address = started_here()
    if address in (None, "local") or not answers(address):
        return
    import ray

    environment = OmegaConf.to_container(
        OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env") or OmegaConf.create()
    )
    try:
        # As verl will, so that what it sends to the nodes (working_dir, py_executable ...) is there.
        ray.init(
            address=address,
            runtime_env={name: value for name, value in environment.items() if value is not None},
            log_to_driver=False,
        )
    except ConnectionError:
        # No cluster: verl starts one of its own, or says why it cannot.
        return
    try:
        problems = [
            f"{node['NodeManagerAddress']} ({node['NodeID'][:8]}): {problem}"
            for node, found in ask_nodes()
            if (problem := compare(found))
        ]
    finally:
        ray.shutdown()
    if problems:
        raise ValueError(
            f"ray_kwargs.ray_init.address={address}: not every node has this plugin as this one has it; install "
            f"verl-disco {version('verl-disco')} and verl {version('verl')} there: " + "; ".join(problems)
        )


def started_here() -> str | None:
    """Address of the cluster that ``ray start`` made on this machine, as Ray itself finds it; None without one."""
    file = os.path.join(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    if not os.path.exists(file):
        return None
    with open(file) as f:
        return f.read().strip() or None


def answers(address: str) -> bool:
    """Whether something listens there: Ray would wait for minutes for a cluster that is gone."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=10):
            return True
    except (OSError, ValueError):
        return False


def ask_nodes() -> list[tuple[dict[str, Any], dict[str, str | None] | Exception]]:
    """Each living node and the versions that its workers find, by package (None: not there), and their ``python``."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    packages = PACKAGES

    # Nested, so that Ray sends its code: the node may not have this module.
    def found() -> dict[str, str | None]:
        import sys
        from importlib.metadata import PackageNotFoundError, version
        from importlib.util import find_spec

        versions = {"python": sys.executable}
        for name in packages:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                versions[name] = None
        if find_spec("verl_ext") is None:
            versions["verl-disco"] = None
        return versions

    nodes = [node for node in ray.nodes() if node["Alive"]]
    calls = [
        ray.remote(num_cpus=0, max_retries=0)(found)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote()
        for node in nodes
    ]
    answers = []
    for call in calls:
        try:
            answers.append(ray.get(call, timeout=300))
        except Exception as e:
            answers.append(e)
    return list(zip(nodes, answers, strict=True))


def compare(found: dict[str, str | None] | Exception) -> str:
    """What is wrong with a node's answer; "" if nothing is."""
    if isinstance(found, Exception):
        return f"does not answer: {type(found).__name__}: {found}"
    wrong = [
        f"{name} is {'missing' if found[name] is None else found[name]}"
        for name in PACKAGES
        if found[name] != version(name)
    ]
    return f"{' and '.join(wrong)} ({found['python']})" if wrong else ""
