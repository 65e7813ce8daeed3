"""``python -m verl_ext.doctor``: right about this environment, and right about what it is told is wrong."""

import importlib.metadata as metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import verl
from verl.workers.rollout.replica import RolloutReplicaRegistry

from verl_ext import doctor, plugin
from verl_ext.hydra import config_source as hydra_config

ROOT = Path(doctor.__file__).parents[1]


def _problems(check) -> list[tuple[str, str]]:
    return [(f.problem, f.fix) for f in check() if f.problem]


def test_this_environment_is_ok(tmp_path):
    run = [sys.executable, "-m", "verl_ext.doctor"]
    process = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.splitlines()[-1] == "OK"
    # As a module it would be loaded twice, and Python says so.
    assert "RuntimeWarning" not in process.stderr
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in process.stdout.splitlines() if "  " in line)
    assert rows["verl"] == verl.__version__
    assert rows["torch"] == torch.__version__
    assert rows["plugin"] == "active"
    assert "hf" in rows["rollout engines"].split(", ")
    for name, description in hydra_config.describe_algorithms().items():
        assert rows[f"algorithm={name}"] == description


def test_wrong_findings_are_listed_with_their_fix(monkeypatch, capsys):
    def wrong():
        yield doctor.Finding("good", "fine")
        yield doctor.Finding("bad", "broken", "it is broken", "fix it")

    def crash():
        yield doctor.Finding("before", "seen")
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "CHECKS", [wrong, crash])
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 problem(s)"
    assert lines.index("  fix: fix it") == lines.index("WRONG: it is broken") + 1
    assert "WRONG: checking crash failed: RuntimeError: boom" in lines


def test_unmet_requirements_name_what_is_needed_and_found(monkeypatch):
    requires = ["verl>=0.9.1,<0.10", "torch<1", "no-such-package-here>=2", "other; extra == 'test'"]
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    assert _problems(lambda: doctor.unmet_requirements("mine")) == [
        (f"mine needs torch<1, but {metadata.version('torch')} is installed", 'pip install "torch<1"'),
        (
            "mine needs no-such-package-here>=2, but no version of it is installed",
            'pip install "no-such-package-here>=2"',
        ),
    ]


def test_a_missing_distribution_is_wrong():
    ((problem, fix),) = _problems(lambda: doctor.unmet_requirements("no-such-package-here"))
    assert (problem, fix) == (
        "the distribution no-such-package-here is not installed",
        'pip install "no-such-package-here"',
    )


@pytest.mark.parametrize("policy, wrong", [("auto", False), ("other, verl_disco", False), ("none", True), ("x", True)])
def test_a_policy_that_keeps_the_plugin_out_is_wrong(monkeypatch, policy, wrong):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    assert bool(_problems(doctor.check_plugin)) is wrong


def test_a_missing_entry_point_is_wrong(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    assert "no entry point" in _problems(doctor.check_plugin)[0][0]


def test_a_failed_plugin_is_wrong(monkeypatch):
    monkeypatch.setattr(plugin, "error", RuntimeError("provoked"))
    assert _problems(doctor.check_plugin)[0][0] == "the plugin is not active: RuntimeError: provoked"
    assert [f.name for f in doctor.check_algorithms()] == ["algorithms"]


def test_an_algorithm_that_does_not_compose_is_wrong(monkeypatch):
    monkeypatch.setattr(hydra_config, "describe_algorithms", lambda: {"nonsense": "not there"})
    ((problem, _),) = _problems(doctor.check_algorithms)
    assert problem.startswith("algorithm=nonsense does not compose: In 'ppo_trainer': Could not find")


def test_no_rollout_engine_is_wrong(monkeypatch):
    monkeypatch.setattr(RolloutReplicaRegistry, "_registry", {"sglang": None})
    monkeypatch.setitem(doctor.ENGINE_MODULES, "sglang", "no_such_module_here")
    assert _problems(doctor.check_rollout_engines)[0][0] == "verl has nothing to generate responses with"


def test_names_and_versions_are_those_of_pyproject():
    pyproject = (ROOT / "pyproject.toml").read_text()
    name, module = doctor.ENTRY_POINT
    for line in (f'name = "{doctor.DISTRIBUTION}"', f'{name} = "{module}"', f'"verl{plugin.SUPPORTED_VERL}"'):
        assert line in pyproject
