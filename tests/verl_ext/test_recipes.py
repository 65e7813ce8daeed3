"""Recipes are found by their entry points, and loaded where something of theirs is needed."""

import importlib.metadata as metadata
import subprocess
import sys
import types

import pytest
from omegaconf import OmegaConf

from verl_ext import recipes
from verl_ext.preflight import unread
from verl_ext.preflight.machine import check_recipes
from verl_ext.report import plots, read, tables


def _run(code: str) -> list[str]:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout.split()


def test_they_are_loaded_once_verl_has_its_registries_and_no_sooner():
    code = """
import sys, verl
assert sys.modules["verl_ext.plugin"].error is None and "recipe.disco" not in sys.modules
from verl.trainer.ppo import core_algos
print("recipe.disco.estimator" in sys.modules, core_algos.POLICY_LOSS_REGISTRY["disco"].__module__)
"""
    assert _run(code) == ["True", "recipe.disco.estimator"]


def test_a_recipes_module_can_be_imported_first():
    code = """
import sys
import recipe.disco.estimator as e
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
print(sys.modules["recipe.disco.estimator"] is e, ADV_ESTIMATOR_REGISTRY["disco"] is e.disco_advantage)
"""
    assert _run(code) == ["True", "True"]


@pytest.fixture
def announce(monkeypatch):
    """``announce(name=value)``: entry points of the only distribution that has any; reads them afresh."""

    def to(**points: str) -> None:
        found = types.SimpleNamespace(
            name="mine", entry_points=[metadata.EntryPoint(n, v, recipes.GROUP) for n, v in points.items()]
        )
        found.entry_points.append(metadata.EntryPoint("x", "not.there", "another.group"))
        monkeypatch.setattr(recipes, "metadata", types.SimpleNamespace(distributions=lambda: [found, found]))
        forget()

    def forget() -> None:
        for cached in (recipes.installed, tables.published, unread.packages, read.own_settings):
            cached.cache_clear()

    yield to
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(
    "value, fault",
    [
        ("not.there:RECIPE", "does not load: ModuleNotFoundError: No module named 'not'; install"),
        ("verl_ext.recipes:MISSING", "does not load: AttributeError: .*MISSING.*; install"),
        ("verl_ext.recipes:GROUP", "is a str; it must be a verl_ext.recipes.Recipe"),
    ],
)
def test_a_broken_one_is_reported(announce, value, fault):
    announce(broken=value)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^the recipe broken = {value} of .* {fault}"):
            recipes.installed()


def test_without_any_there_are_verls_methods(announce):
    announce()
    (finding,) = check_recipes()
    assert finding.warning and finding.fix == "install the project again: pip install -e ."
    assert recipes.installed() == () and "disco" not in recipes.options("algorithm")
    assert "grpo" in recipes.options("algorithm") and recipes.metric_names("kl", "actor/ppo_kl") == ("actor/ppo_kl",)


def test_what_another_recipe_says_is_used(announce, monkeypatch, tmp_path, compose):
    """One that is no part of this project: its options compose, its figures and curves are in reports."""
    package = tmp_path / "mine"
    (package / "config/algorithm").mkdir(parents=True)
    for folder in (package, package / "config"):
        (folder / "__init__.py").touch()
    (package / "config/algorithm/grpo_mine.yaml").write_text(
        "# @package _global_\n# GRPO, my own\ndefaults: [grpo, _self_]\nmine: {limit: 3}\nverl_ext: {algorithm: mine}\n"
    )
    (package / "config/figures.yaml").write_text("a_model: {mine: {aime24: .5}}\n")
    (package / "plugin.py").write_text(
        "from verl_ext.recipes import Recipe\n"
        "RECIPE = Recipe('mine', 'mine.config', metrics={'kl': ('mine/kl',)}, copies=('mine.copy',),\n"
        "    kl_bound=lambda settings: settings.get('mine.limit'), published='figures.yaml', source='my paper')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    announce(mine="mine.plugin:RECIPE")
    assert compose("algorithm=grpo_mine").mine.limit == 3
    assert recipes.describe_algorithms()["grpo_mine"] == "GRPO, my own"
    assert "mine" in unread.packages() and "mine.config" in recipes.config_packages()
    assert read.own_settings("grpo_mine")["mine.limit"] == 3
    assert read.differences([{"mine.copy.x": 1, "a": 1}, {"mine.copy.x": 2, "a": 2}]) == ["a"]
    assert tables.published() == {"my paper": {"a_model": {"mine": {"aime24": 0.5}}}}
    assert recipes.metric_names("kl", *plots.CURVES["kl"][1:]) == ("actor/ppo_kl", "mine/kl")


@pytest.mark.parametrize(
    "settings, bound",
    [
        ({"disco.constraint": "squared_hinge", "disco.delta": 1e-4}, 1e-4),
        ({"disco.constraint": "augmented_lagrangian", "disco.delta": 1e-3}, 1e-3),
        ({"disco.constraint": "fixed", "disco.delta": 1e-4}, None),
        ({"disco.constraint": "of a user's", "disco.delta": 1e-4}, None),
        ({}, None),
    ],
)
def test_discos_bound_of_the_kl_is_delta_where_its_constraint_has_one(settings, bound):
    (disco,) = recipes.installed()
    assert disco.kl_bound(settings) == bound


def test_what_disco_says_is_there():
    (disco,) = recipes.installed()
    assert [f.value for f in check_recipes()] == [disco.package]
    assert set(disco.compared) <= set(recipes.options("algorithm"))
    settings = OmegaConf.load(recipes.options("algorithm")["disco"])
    assert all(OmegaConf.select(settings, name.rstrip(".")) is not None for name in (*disco.copies, *disco.optional))
