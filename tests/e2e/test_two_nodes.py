"""A Ray cluster of two nodes on this machine: each has its own address and processes, as two machines would."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest
import ray

OTHER = "127.0.0.2"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """``cluster(python, env)`` adds a node: the head, with this machine's own address, then others, on its loopback
    device. Returns the cluster's address."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    # Of its own, so that nothing else on this machine takes the cluster for its own; sockets need a short path.
    temporary = tempfile.mkdtemp(prefix="ray_", dir="/tmp")
    nodes = []
    head = ray.util.get_node_ip_address()
    with socket.socket() as s:
        s.bind((head, 0))
        port = s.getsockname()[1]
    address = f"{head}:{port}"

    def add(python: str = sys.executable, env: dict[str, str] | None = None) -> str:
        role = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={temporary}"]
        if nodes:
            role = [f"--address={address}", f"--node-ip-address={OTHER}"]
        nodes.append(
            subprocess.Popen(
                [python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *role]
                + ["--num-cpus=16", "--num-gpus=1", "--object-store-memory=200000000"],
                env=os.environ | {"RAY_worker_niceness": "0"} | (env or {}),
                stdout=(tmp_path / f"node_{len(nodes)}.txt").open("w"),
                stderr=subprocess.STDOUT,
                cwd=temporary,
                start_new_session=True,
            )
        )
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (text := (tmp_path / f"node_{len(nodes) - 1}.txt").read_text()):
            assert time.monotonic() < deadline and nodes[-1].poll() is None, text
            time.sleep(0.5)
        return address

    yield add
    for node in reversed(nodes):
        os.killpg(node.pid, signal.SIGKILL)
        node.wait(30)
    shutil.rmtree(temporary, ignore_errors=True)


def settings(address: str) -> list[str]:
    none = ["ray_kwargs.ray_init.num_cpus=null", "ray_kwargs.ray_init.num_gpus=null"]
    return ["algorithm=trpa", "trainer.nnodes=2", f"ray_kwargs.ray_init.address='{address}'", *none]


def test_the_plugin_works_on_the_node_that_did_not_start_the_driver(main_ppo, cluster):
    cluster()
    address = cluster()
    # verl's processes have the working folder of the node's Ray, not that of the command.
    run = main_ppo(*settings(address), "trainer.default_local_dir=run", ranks=1)
    assert run.returncode == 0, run.output[-5000:]
    assert (run.folder / "finished").exists() and "does not see" not in run.output
    for step in run.metrics():
        assert step["disco/questions"] == 3 and step["disco/measured"] == 0.5 and step["actor/grad_norm"] > 0
    # Each node has room for one of the two ranks; Ray names the address of those that are not the driver's.
    assert re.search(rf"\(pid=\d+, ip={OTHER}\)|WorkerDict pid=\d+, ip={OTHER}\)", run.output)


def test_a_node_without_the_plugin_is_named_before_anything_starts(main_ppo, cluster, tmp_path):
    cluster()
    # All that is installed here, but for this project.
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "verl_disco" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    python = os.path.realpath(sys.executable)
    address = cluster(python, {"PYTHONPATH": str(packages)})

    run = main_ppo(*settings(address), ranks=1)
    assert run.returncode != 0
    lines = [line for line in run.output.splitlines() if "settings refused" in line]
    assert len(lines) == 1 and f" {OTHER} (" in lines[0] and f" {address.split(':')[0]} (" not in lines[0]
    assert f"verl-disco is missing ({python})" in lines[0]
    assert "ray init kwargs" not in run.output
