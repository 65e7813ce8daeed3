"""What a node must have; clusters of several nodes are in tests/e2e/test_two_nodes.py."""

import socket
import time

import pytest
from omegaconf import OmegaConf

from verl_ext.preflight import nodes

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


def test_the_cluster_is_the_one_that_ray_takes(tmp_path, monkeypatch):
    assert nodes.cluster_address({}) is nodes.cluster_address({"address": None}) is None
    assert nodes.cluster_address({"address": "local"}) == "local"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("10.0.0.1:6379")
    assert nodes.cluster_address({"address": "auto"}) == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert nodes.cluster_address({}) == nodes.cluster_address({"address": "auto"}) == "10.0.0.2:6379"
    assert nodes.cluster_address({"address": "10.0.0.3:6379"}) == "10.0.0.3:6379"


def test_without_a_cluster_nothing_is_asked():
    config = OmegaConf.create({"ray_kwargs": {"ray_init": {"address": None, "runtime_env": None}}})
    assert list(nodes.ask_cluster(config)) == []
    # One that is gone.
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = time.monotonic()
    config.ray_kwargs.ray_init.address = f"127.0.0.1:{port}"
    assert list(nodes.ask_cluster(config)) == []
    assert time.monotonic() - started < 60


def test_a_node_that_does_not_see_the_files_is_named(tmp_path, monkeypatch):
    for name in ("train.parquet", "model", "run"):
        (tmp_path / name).mkdir()
    config = OmegaConf.create(
        {
            "data": {"train_files": [f"{tmp_path}/train.parquet"], "val_files": f"{tmp_path}/to be built.parquet"},
            "actor_rollout_ref": {"model": {"path": f"{tmp_path}/model"}},
        }
    )

    def ask(question):
        seen = question()
        (tmp_path / "model").rmdir()
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        try:
            return {"shares": seen, "shares not": question(), "silent": "no answer within 300 s"}
        finally:
            (tmp_path / "elsewhere").rename(tmp_path / "run")

    monkeypatch.setattr(nodes, "ask_nodes", ask)
    unseen = nodes.what_is_not_seen(config, tmp_path / "run")
    assert unseen == {"shares not": ["actor_rollout_ref.model.path", "trainer.default_local_dir"]}
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "ray://10.0.0.1:10001"])
def test_what_a_cluster_does_not_share_is_said(tmp_path, monkeypatch, address):
    import ray

    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray, name, lambda **kwargs: None)
    monkeypatch.setattr(nodes, "is_listening", lambda address: True)
    monkeypatch.setattr(nodes, "ask_nodes", lambda question: {"a": question()})
    monkeypatch.setattr(nodes, "what_is_not_seen", lambda config, folder: {"b": ["data.train_files"]})
    config = OmegaConf.create(
        {"ray_kwargs": {"ray_init": {"address": address}}, "trainer": {"default_local_dir": str(tmp_path)}}
    )
    found, told = nodes.ask_cluster(config, tmp_path)
    assert found.value == f"1 at {address} have what this one has" and told.warning
    if address.startswith("ray://"):
        assert f"trainer.default_local_dir={tmp_path} there cannot be seen from here" in told.problem
    else:
        assert told.problem.startswith("node b does not see data.train_files of this one: what its processes write")
