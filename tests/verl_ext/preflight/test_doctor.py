"""``python -m verl_ext.doctor``: right about this environment, loaded once, and plain about what is wrong."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import verl

from verl_ext import doctor, recipes
from verl_ext.preflight import machine
from verl_ext.preflight.findings import Finding

ROOT = Path(doctor.__file__).parents[1]


def test_this_environment_is_ok(tmp_path):
    # As ``python -m`` runs it; whoever imported it would load it a second time.
    code = "import runpy, sys; runpy.run_module('verl_ext.doctor', run_name='__main__', alter_sys=True)"
    code = f"try: exec({code!r})\nexcept SystemExit as e: print(e.code, 'verl_ext.doctor' in __import__('sys').modules)"
    run = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    process = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.splitlines()[-2:] == ["OK", "0 False"], process.stdout + process.stderr
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in process.stdout.splitlines() if "  " in line)
    assert rows["verl"] == verl.__version__
    assert rows["torch"] == torch.__version__
    assert rows["plugin"] == "active"
    assert "hf" in rows["rollout engines"].split(", ")
    for name, description in recipes.describe_algorithms().items():
        assert rows[f"algorithm={name}"] == description


def test_wrong_findings_are_listed_with_their_fix(monkeypatch, capsys):
    def wrong():
        yield Finding("good", "fine")
        yield Finding("bad", "broken", "it is broken", "fix it")

    def crash():
        yield Finding("before", "seen")
        raise RuntimeError("boom")

    monkeypatch.setattr(machine, "CHECKS", [wrong, crash])
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 problem(s)"
    assert lines.index("  fix: fix it") == lines.index("WRONG: it is broken") + 1
    assert "WRONG: checking crash failed: RuntimeError: boom" in lines


def test_nothing_imports_the_doctor():
    for folder in ("verl_ext", "recipe", "hydra_plugins"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    imported = [f"{getattr(node, 'module', '')}.{name.name}".lstrip(".") for name in node.names]
                    assert not any("verl_ext.doctor" in name for name in imported), file


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_no_error(capsys, flag):
    assert doctor.main([flag]) == 0
    assert "python -m verl_ext.doctor experiment" in capsys.readouterr().out


def test_a_run_without_the_word_before_it_is_told(capsys):
    assert doctor.main(["algorithm=disco", "+backend=cpu"]) == 1
    assert "did you mean: experiment algorithm=disco +backend=cpu" in capsys.readouterr().out


def test_an_unknown_argument_is_answered_with_the_usage(capsys):
    assert doctor.main(["nonsense"]) == 1
    assert "unknown argument nonsense" in (out := capsys.readouterr().out) and "verl_ext.doctor experiment" in out
