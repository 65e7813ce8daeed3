"""The entry point: active in a fresh process at little cost, loud when it fails."""

import os
import subprocess
import sys

import pytest
import verl

from verl_ext import plugin


def _python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


def test_import_verl_activates_it_without_hydra_or_the_trainers():
    code = """
import sys, verl
plugin = sys.modules["verl_ext.plugin"]
assert plugin.error is None, plugin.error
heavy = [m for m in ("hydra", "verl.trainer.ppo.v1", "verl.workers", "vllm") if m in sys.modules]
assert not heavy, heavy
print("active")
"""
    process = _python(code)
    assert process.stdout.split() == ["active"], process.stderr


def test_a_failure_is_printed_although_verl_swallows_it(tmp_path):
    (tmp_path / "wrapt.py").write_text("raise ImportError('provoked by a test')")
    code = "import sys, verl; print(type(sys.modules['verl_ext.plugin'].error).__name__)"
    process = _python(code, PYTHONPATH=str(tmp_path))
    assert process.returncode == 0
    assert process.stdout.split() == ["ImportError"]
    assert "verl-disco: the plugin is NOT active in this process: provoked by a test\n" in process.stderr
    assert "Traceback" in process.stderr


def test_the_trainers_can_be_imported_first():
    code = """
import verl_ext.training.trainer
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
import sys
assert sys.modules["verl_ext.plugin"].error is None
assert sys.modules["verl_ext.training.trainer"] is verl_ext.training.trainer
print(TRAINER_REGISTRY["sync"] is verl_ext.training.trainer.ExtendedTrainerSync, len(TRAINER_REGISTRY))
"""
    process = _python(code)
    assert process.stdout.split() == ["True", "3"], process.stderr
    process = _python("import verl_ext.cpu.engine as e, sys; print(sys.modules['verl_ext.plugin'].error, e.register)")
    assert process.stdout.startswith("None <function register"), process.stderr


@pytest.mark.parametrize(
    "file, hidden",
    [
        ("recipe/__init__.py", "recipe.disco"),
        ("recipe.py", "recipe.disco"),
        ("recipe/disco/__init__.py", "recipe.disco"),
        ("hydra_plugins/__init__.py", "hydra_plugins.verl_ext_sweep"),
        ("recipe/mine/__init__.py", None),
    ],
)
def test_what_hides_ours_in_the_working_folder_is_named(tmp_path, monkeypatch, file, hidden):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for package in ("recipe", "hydra_plugins"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    if hidden is None:
        plugin.check_not_hidden()
    else:
        with pytest.raises(RuntimeError, match=f"^{tmp_path / file} hides verl-disco's {hidden}, "):
            plugin.activate()


@pytest.mark.parametrize("found", ["0.9.1", "0.9.1.post1", "0.9.5"])
def test_supported_versions(found):
    plugin.check_verl_version(found)


@pytest.mark.parametrize("found", ["0.9.0", "0.8.0", "0.10.0", "1.0.0"])
def test_an_unsupported_version_is_refused_with_both_versions(monkeypatch, found):
    monkeypatch.setattr(verl, "__version__", found)
    with pytest.raises(RuntimeError, match=rf"supports verl >=0.9.1,<0.10, but verl {found} is installed"):
        plugin.activate()
