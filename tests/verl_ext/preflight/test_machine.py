"""What the doctor says of a machine: right about what it is told is wrong."""

import importlib.metadata as metadata
from pathlib import Path

import pytest
from verl.workers.rollout.replica import RolloutReplicaRegistry

from verl_ext import plugin, recipes
from verl_ext.preflight import machine

ROOT = Path(plugin.__file__).parents[1]


def _problems(check) -> list[tuple[str, str]]:
    return [(f.problem, f.fix) for f in check() if f.problem]


def test_unmet_requirements_name_what_is_needed_and_found(monkeypatch):
    requires = ["verl>=0.9.1,<0.10", "torch<1", "no-such-package-here>=2", "other; extra == 'test'"]
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    assert _problems(lambda: machine.unmet_requirements("mine")) == [
        (f"mine needs torch<1, but {metadata.version('torch')} is installed", 'pip install "torch<1"'),
        (
            "mine needs no-such-package-here>=2, but no version of it is installed",
            'pip install "no-such-package-here>=2"',
        ),
    ]


def test_a_missing_distribution_is_wrong():
    ((problem, fix),) = _problems(lambda: machine.unmet_requirements("no-such-package-here"))
    assert (problem, fix) == (
        "the distribution no-such-package-here is not installed",
        'pip install "no-such-package-here"',
    )


@pytest.mark.parametrize("policy, wrong", [("auto", False), ("other, verl_disco", False), ("none", True), ("x", True)])
def test_a_policy_that_keeps_the_plugin_out_is_wrong(monkeypatch, policy, wrong):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    assert bool(_problems(machine.check_plugin)) is wrong


def test_a_missing_entry_point_is_wrong(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    assert "no entry point" in _problems(machine.check_plugin)[0][0]


def test_a_failed_plugin_is_wrong(monkeypatch):
    monkeypatch.setattr(plugin, "error", RuntimeError("provoked"))
    assert _problems(machine.check_plugin)[0][0] == "the plugin is not active: RuntimeError: provoked"
    assert [f.name for f in machine.check_algorithms()] == ["algorithms"]


def test_an_algorithm_that_does_not_compose_is_wrong(monkeypatch):
    monkeypatch.setattr(recipes, "describe_algorithms", lambda: {"nonsense": "not there"})
    ((problem, _),) = _problems(machine.check_algorithms)
    assert problem.startswith("algorithm=nonsense does not compose: In 'ppo_trainer': Could not find")


def test_no_rollout_engine_is_wrong(monkeypatch):
    monkeypatch.setattr(RolloutReplicaRegistry, "_registry", {"sglang": None})
    monkeypatch.setitem(machine.ENGINES, "sglang", "no_such_module_here")
    assert _problems(machine.check_rollout_engines)[0][0] == "nothing is installed that can generate responses"


def test_names_and_versions_are_those_of_pyproject():
    pyproject = (ROOT / "pyproject.toml").read_text()
    name, module = machine.ENTRY_POINT
    for line in (f'name = "{machine.DISTRIBUTION}"', f'{name} = "{module}"', f'"verl{plugin.SUPPORTED_VERL}"'):
        assert line in pyproject
