"""Pushing to the hub, which a class stands in for: what goes up, who sees it, and what never does."""

import json
from types import SimpleNamespace

import pytest
from written_runs import write_settings

from verl_ext.export import __main__ as export
from verl_ext.export.push import plan
from verl_ext.runs.checkpoints import ExportError

pytestmark = pytest.mark.usefixtures("exported")


class Hub:
    """A hub with these repositories, name -> private, and what was sent to it."""

    def __init__(self, **repositories):
        self.repositories, self.calls, self.files = repositories, [], []

    def create_repo(self, repo_id, *, private, exist_ok, repo_type):
        assert exist_ok and repo_type == "model"
        self.calls.append("create_repo")
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.repositories.setdefault(name.split("/")[1], private)
        return SimpleNamespace(repo_id=name)

    def repo_info(self, repo_id, *, repo_type):
        return SimpleNamespace(private=self.repositories[repo_id.split("/")[1]])

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message, repo_type):
        self.calls.append("upload_folder")
        self.files = allow_patterns
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch):
    hub = Hub(open=False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    return hub


def test_without_push_nothing_is_sent(run, hub):
    assert export.main([str(run)]) == 0
    assert hub.calls == []


def test_a_dry_run_shows_what_would_go_up_and_sends_nothing(run, hub, capsys):
    assert export.main([str(run), "--push", "me/model", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "to https://huggingface.co/me/model, private:" in shown
    assert "0 B  model.safetensors" in shown and "in 2 files" in shown
    assert "  | base_model: org/Base-1B" in shown and "dry run: nothing was sent" in shown
    assert hub.calls == []


def test_a_push_after_a_dry_run_sends_the_same_files_to_a_private_repository(run, hub, exported, capsys):
    (run / "export").mkdir()
    for dry in (["--dry-run"], []):
        assert export.main([str(run), "--push", "model", *dry]) == 0
        (run / "export/global_step_20/config.json").write_text('{"dtype": "float32"}')
    assert len(exported) == 1
    assert hub.repositories["model"] is True and hub.files == ["README.md", "config.json", "model.safetensors"]
    assert "pushed: https://hub/me/model/commit/1" in capsys.readouterr().out


def test_a_public_one_is_asked_for(run, hub, capsys):
    assert export.main([str(run), "--push", "me/model", "--public"]) == 0
    assert hub.repositories["model"] is False and "PUBLIC: everybody can read it" in capsys.readouterr().out


@pytest.mark.parametrize("options, there", [([], "open"), (["--public"], "closed")])
def test_a_repository_that_others_see_otherwise_is_refused(run, hub, refused, options, there):
    hub.repositories["closed"] = True
    error = refused(run, "--push", f"me/{there}", *options)
    assert f"me/{there} exists and is" in error and "nothing was pushed" in error
    assert hub.calls == ["create_repo"]


def test_what_the_hub_refuses_is_told(run, hub, refused, monkeypatch):
    def create_repo(*arguments, **options):
        raise OSError("Token is required,\nbut no token found")

    monkeypatch.setattr(hub, "create_repo", create_repo)
    error = refused(run, "--push", "me/model")
    assert "the hub did not take me/model: OSError: Token is required, but no token found; log in with" in error


@pytest.mark.parametrize("options", [["--dry-run"], ["--public"], ["--push", "a/b/c"], ["--push", "../x"]])
def test_options_that_make_no_sense_end_at_once(run, hub, exported, options):
    with pytest.raises(SystemExit):
        export.main([str(run), *options])
    assert exported == [] and hub.calls == []


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "out"
    (folder / "lora_adapter").mkdir(parents=True)
    for name in (
        "README.md",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "lora_adapter/adapter_config.json",
    ):
        (folder / name).write_text("{}")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_bytes(b"\0")
    return folder


def test_only_a_models_own_files_go_up(folder, tmp_path):
    wanted = plan(folder).files
    assert len(wanted) == 7 and plan(folder).left_out == []
    (tmp_path / "secret.json").write_text("{}")
    others = ["optim_world_size_1_rank_0.pt", "log.txt", "metrics.jsonl", "config.yaml", ".env", "trainer_state.json"]
    others += ["training_args.bin", "pytorch_model.bin", "notes.py", ".git/config", "optimizer.safetensors"]
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "vocab.json").symlink_to(tmp_path / "secret.json")
    assert plan(folder).files == wanted
    assert sorted(plan(folder).left_out) == sorted([*others, "vocab.json"])


@pytest.mark.parametrize(
    "text", ["hf_" + "aB3" * 11, "AKIA" + "A" * 16, "https://me:word@host/x", "-----BEGIN RSA PRIVATE KEY-----"]
)
def test_a_secret_in_a_text_stops_the_push(folder, text):
    (folder / "config.json").write_text(json.dumps({"note": text}))
    with pytest.raises(ExportError, match="config.json holds what looks like a token, a key or a password"):
        plan(folder)


def test_what_is_no_export_is_refused(folder):
    (folder / "README.md").unlink()
    with pytest.raises(ExportError, match="needs README.md and safetensors"):
        plan(folder)


@pytest.mark.parametrize("change", [{"seed": 2}, {"verl_ext.algorithm": "grpo"}])
def test_another_runs_model_of_the_same_step_is_not_pushed(run, hub, refused, change, tmp_path):
    out = tmp_path / "models"
    assert export.main([str(run), "--out", str(out)]) == 0
    (out / "config.json").write_text('{"dtype": "float32"}')
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card + "\nA sentence of my own.\n")
    assert export.main([str(run), "--out", str(out), "--push", "me/model", "--dry-run"]) == 0
    write_settings(run, **change)
    assert "is not empty; choose another --out" in refused(run, "--out", out, "--push", "me/model")
    assert hub.calls == []


def test_the_card_has_no_folders_of_this_machine(run, exported):
    files = ["/home/me/data/gsm8k/train.parquet", "data/b.parquet"]
    write_settings(run, **{"actor_rollout_ref.model.path": "/home/me/Base-1B", "data.train_files": files})
    assert export.main([str(run)]) == 0
    card = (run / "export/global_step_20/README.md").read_text()
    assert "/home" not in card and "`.../Base-1B` after 20 steps" in card
    assert "| data.train_files | ['.../train.parquet', 'data/b.parquet'] |" in card
