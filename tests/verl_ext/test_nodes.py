"""What a node must have; clusters of several nodes are in tests/e2e/test_two_nodes.py."""

import socket
import time

import pytest
from omegaconf import OmegaConf

from verl_ext import nodes

HERE = {"python": "/here", "verl": "0.9.1", "verl-disco": "0.1.0 (aaaa)"}


@pytest.mark.parametrize(
    "found, problem",
    [
        (HERE | {"python": "/there"}, ""),
        (HERE | {"verl-disco": None}, "verl-disco is missing (/here)"),
        (HERE | {"verl-disco": "0.1.0 (bbbb)"}, "verl-disco is 0.1.0 (bbbb) (/here)"),
        (HERE | {"verl-disco": None, "verl": "0.9.2"}, "verl-disco is missing and verl is 0.9.2 (/here)"),
        ("no answer within 300 s", "no answer within 300 s"),
    ],
)
def test_what_a_node_lacks_is_said(found, problem):
    assert nodes.compare(found, HERE) == problem


def test_what_is_installed_here_is_found():
    found = nodes.what_is_installed()()
    assert found["verl"] and found["verl-disco"].startswith("0.1.0 (") and "python" in found["python"]


@pytest.fixture
def no_cluster(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def test_the_cluster_is_the_one_that_ray_takes(tmp_path, monkeypatch, no_cluster):
    assert nodes.cluster_address({}) is nodes.cluster_address({"address": None}) is None
    assert nodes.cluster_address({"address": "local"}) == "local"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("10.0.0.1:6379")
    assert nodes.cluster_address({"address": "auto"}) == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert nodes.cluster_address({}) == nodes.cluster_address({"address": "auto"}) == "10.0.0.2:6379"
    assert nodes.cluster_address({"address": "10.0.0.3:6379"}) == "10.0.0.3:6379"


def test_without_a_cluster_nothing_is_asked(tmp_path, no_cluster):
    config = OmegaConf.create({"ray_kwargs": {"ray_init": {"address": None, "runtime_env": None}}})
    nodes.check_nodes(config)
    # One that is gone.
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = time.monotonic()
    config.ray_kwargs.ray_init.address = f"127.0.0.1:{port}"
    nodes.check_nodes(config)
    assert time.monotonic() - started < 60
