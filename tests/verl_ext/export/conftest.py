"""A run with three checkpoints, and the command without the weights."""

import json

import pytest
from written_runs import write_checkpoint, write_settings

from verl_ext.export import __main__ as export
from verl_ext.runs.folder import CHECKPOINT_FILE, METRICS_FILE


@pytest.fixture
def run(tmp_path):
    """A run of DisCO with three checkpoints, the best of them the second."""
    folder = tmp_path / "run"
    for step in (10, 20, 100):
        write_checkpoint(folder, step)
    (folder / CHECKPOINT_FILE).write_text("100")
    write_settings(folder)
    shares = {0: (0.1, 0.3), 10: (0.3, 0.5), 20: (0.5, 0.7), 100: (0.6, 0.5)}
    rows = [{"step": s, "val-core/a/acc/mean@4": a, "val-core/b/acc/mean@4": b} for s, (a, b) in shares.items()]
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def exported(monkeypatch):
    """Replace the export of the weights by a function that writes a file; returns its arguments."""
    calls = []

    def write(checkpoint, out, settings, dtype, trust_remote_code):
        calls.append((checkpoint, dtype, trust_remote_code))
        (out / "model.safetensors").touch()
        return ["float32, as in the checkpoint.", "Checked."]

    monkeypatch.setattr(export, "export_model", write)
    return calls


@pytest.fixture
def refused(capsys):
    """``refused(*arguments)``: the one sentence on stderr, after notes."""

    def main(*arguments) -> str:
        capsys.readouterr()
        assert export.main([str(a) for a in arguments]) == 1
        out, err = capsys.readouterr()
        *notes, error = err.splitlines()
        assert error.startswith("error: ") and all(n.startswith("note: ") for n in notes)
        # Only a push has something to refuse after that.
        assert "exported" not in out or "--push" in arguments
        return error

    return main
