"""What is published: the wheel and the sdist, a fresh environment with the wheel alone, and verl-recipe's checkout."""

import importlib.metadata as metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from verl_ext.plugin import SUPPORTED_VERL

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("recipe", "verl_ext", "hydra_plugins")
ASIDE = (
    "__pycache__",
    "*.pyc",
    "*.egg-info",
    ".git",
    ".venv",
    ".*_cache",
    ".hypothesis",
    "build",
    "outputs",
    "checkpoints",
)


def _run(*command: str | Path, cwd: Path, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _sources(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for part in PACKAGES for p in (folder / part).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The files of the repository, and what a working tree collects besides."""
    tree = tmp_path_factory.mktemp("package") / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*ASIDE))
    for stray in ("outputs/run/config.yaml", ".venv/lib/x.py", "checkpoints/x.yaml", "tests/__pycache__/x.pyc"):
        (tree / stray).parent.mkdir(parents=True, exist_ok=True)
        (tree / stray).touch()
    return tree


@pytest.fixture(scope="module")
def built(tree) -> tuple[Path, Path]:
    """Wheel and sdist; the wheel is made from the sdist."""
    folder = tree.parent / "dist"
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=tree, PIP_NO_INDEX="1")
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """A fresh environment that has the wheel, and sees all other packages of this one."""
    venv = tmp_path_factory.mktemp("venv")
    _run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    python = venv / "bin/python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    _run(*pip, "install", "--no-deps", "--no-index", built[0], cwd=venv)
    (site,) = venv.glob("lib/python3*/site-packages")
    (others,) = (p for p in sys.path if p.startswith(sys.prefix) and p.endswith("site-packages"))
    # A folder named here is searched last, and its own .pth files, such as that of this project, are not read.
    (site / "others.pth").write_text(others)
    return python


def test_wheel_and_sdist_are_whole_and_pass_the_check(tree, built):
    wheel, sdist = built
    _run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=tree)
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert inside == _sources(tree)
    assert {"recipe/disco/py.typed", "verl_ext/py.typed"} <= inside
    assert any(n.endswith("/licenses/LICENSE") for n in zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as file:
        names = {n.partition("/")[2] for n in file.getnames()}
    for name in ("CITATION.cff", "tests/run.sh", "tests/golden/far.json", ".ci/run", "requirements-gpu.txt"):
        assert name in names
    assert not [n for n in names if n.startswith(("outputs", ".venv", "checkpoints")) or n.endswith(".pyc")]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """verl's repository with verl-recipe as its submodule: recipes beside each other, some with an __init__.py."""
    for file in ("recipe/README.md", "recipe/retool/__init__.py", "recipe/spo/train.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


IN_A_CHECKOUT = """
import importlib, os, sys
import hydra, verl, recipe.disco.worker, recipe.retool, recipe.spo.train
plugin = sys.modules["verl_ext.plugin"]
assert plugin.error is None
with hydra.initialize_config_module("verl.trainer.config", version_base=None):
    config = hydra.compose("ppo_trainer", overrides=["algorithm=disco"])
ours = recipe.disco.__path__[0]
os.symlink(ours, "recipe/disco")
importlib.invalidate_caches()
plugin.check_not_hidden()
print(ours, config.disco.beta, config.actor_rollout_ref.actor.policy_loss.loss_mode)
"""


def test_the_wheel_alone_makes_the_method_a_choice_beside_the_recipes_of_a_checkout(python, checkout):
    path, beta, mode = _run(python, "-W", "ignore", "-c", IN_A_CHECKOUT, cwd=checkout).split()[-3:]
    assert Path(path).is_relative_to(python.parents[1])
    assert (beta, mode) == ("1000.0", "disco")


def test_a_copy_in_a_checkout_is_refused_in_words(python, checkout):
    copy = shutil.copytree(ROOT / "recipe/disco", checkout / "recipe/disco")
    said = _run(python, "-c", "import verl", cwd=checkout)
    assert f"the plugin is NOT active in this process: {copy}/__init__.py hides verl-disco's recipe.disco, " in said


def test_the_versions_of_verl_are_the_same_everywhere():
    lines = (ROOT / "recipe/disco/REQUIRED_VERL.txt").read_text().splitlines()
    required = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    (declared,) = (
        r.specifier for r in map(Requirement, metadata.requires("verl-disco")) if r.name == "verl" and not r.extras
    )
    assert SpecifierSet(required["VERSION"]) == declared == SpecifierSet(SUPPORTED_VERL)
    assert required["PIP_INSTALL"] == f"pip install 'verl{required['VERSION']}'"
    assert required["RECIPE_FOLDER"] == "disco" and (ROOT / "recipe/disco").is_dir()
