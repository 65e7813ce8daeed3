"""Which checkpoint is exported, what its card says, and what is refused; the export itself is in tests/e2e."""

import json
import subprocess

import pandas as pd
import pytest
from omegaconf import OmegaConf

from verl_ext import export
from verl_ext.runs import CONFIG_FILE, METRICS_FILE


@pytest.fixture
def run(tmp_path):
    """A run of DisCO with three checkpoints, the best of them the second."""
    folder = tmp_path / "run"
    for step in (10, 20, 100):
        (folder / f"global_step_{step}" / "actor").mkdir(parents=True)
    config = OmegaConf.create()
    for name, value in {
        "seed": 1,
        "verl_ext.algorithm": "disco",
        "disco.tau": 10.0,
        "disco._target_": "x",
        "actor_rollout_ref.model.path": "org/Base-1B",
        "actor_rollout_ref.actor.strategy": "fsdp2",
    }.items():
        OmegaConf.update(config, name, value, force_add=True)
    OmegaConf.save(config, folder / CONFIG_FILE)
    shares = {0: (0.1, 0.3), 10: (0.3, 0.5), 20: (0.5, 0.7), 100: (0.6, 0.5)}
    rows = [{"step": s, "val-core/a/acc/mean@4": a, "val-core/b/acc/mean@4": b} for s, (a, b) in shares.items()]
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def merger(monkeypatch):
    """verl's model merger, replaced by one that writes a file; the commands that it was given."""
    commands = []

    def merge(command, **kwargs):
        from pathlib import Path

        commands.append(command)
        out = Path(command[command.index("--target_dir") + 1])
        out.mkdir(parents=True)
        (out / "model.safetensors").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", merge)
    return commands


@pytest.mark.parametrize(
    "evaluated, best",
    [({0: 0.9, 10: 0.3, 20: 0.6, 100: 0.5}, 20), ({0: 0.1, 20: 0.5, 100: 0.5}, 100), ({0: 0.5}, 100), ({}, 100)],
)
def test_the_best_checkpoint_else_the_last(evaluated, best):
    assert export.best_step(pd.DataFrame({"a": evaluated}), [10, 20, 100]) == best


def test_the_best_one_is_merged_and_described(run, merger, capsys):
    assert export.main([str(run)]) == 0
    out = run / "export/global_step_20"
    assert capsys.readouterr().out == f"exported to {out}\n"
    (command,) = merger
    assert command[1:6] == ["-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    assert command[command.index("--local_dir") + 1] == str(run / "global_step_20/actor")
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/Base-1B\n") and "# Base-1B, trained by disco" in card
    assert "| a | 10.0 | 50.0 |" in card and "| b | 30.0 | 70.0 |" in card
    assert "| disco.tau | 10.0 |" in card and "_target_" not in card and "| seed | 1 |" in card


def test_megatrons_checkpoints_are_merged_as_such(run, merger, tmp_path):
    config = OmegaConf.load(run / CONFIG_FILE)
    config.actor_rollout_ref.actor.strategy = "megatron"
    OmegaConf.save(config, run / CONFIG_FILE)
    (run / METRICS_FILE).unlink()
    assert export.main([str(run), "--step", "10", "--out", str(tmp_path / "out"), "--trust-remote-code"]) == 0
    assert "megatron" in merger[0] and merger[0][-1] == "--trust-remote-code"
    assert "after 10 steps" in (tmp_path / "out/README.md").read_text()


def test_what_cannot_be_exported_is_one_clear_sentence(run, merger, tmp_path, capsys, monkeypatch):
    def refused(*arguments) -> str:
        assert export.main([str(a) for a in arguments]) == 1
        return capsys.readouterr().err

    assert "is no run" in refused(tmp_path)
    assert "has no checkpoint of step 7; it has 10, 20, 100" in refused(run, "--step", 7)
    assert export.main([str(run)]) == 0
    capsys.readouterr()
    assert "is not empty" in refused(run)
    failed = subprocess.CompletedProcess([], 1, "no shards")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert "no shards" in refused(run, "--step", 10)
    for step in (10, 20, 100):
        (run / f"global_step_{step}/actor").rmdir()
    assert "has no checkpoint; train with trainer.save_freq > 0" in refused(run)
