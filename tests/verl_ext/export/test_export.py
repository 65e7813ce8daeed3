"""The choice of the checkpoint, the card, and refusals; test_model.py tests the weights."""

import pandas as pd
import pytest
import torch
import yaml
from written_runs import write_checkpoint, write_settings

from verl_ext.export import __main__ as export
from verl_ext.runs.checkpoints import ExportError, find_checkpoints
from verl_ext.runs.folder import CHECKPOINT_FILE, CONFIG_FILE, METRICS_FILE


@pytest.mark.parametrize(
    "evaluated, best",
    [
        ({0: 0.9, 10: 0.3, 20: 0.6, 100: 0.5}, 20),
        ({0: 0.1, 20: 0.5, 100: 0.5}, 100),
        ({0: 0.5}, 100),
        ({}, 100),
        ({10: 0.3, 20: float("nan"), 100: 0.2}, 10),
    ],
)
def test_the_best_checkpoint_else_the_last(evaluated, best):
    assert export.best_step(pd.DataFrame({"a": evaluated}), [10, 20, 100]) == best


def test_a_step_without_the_hard_benchmark_is_not_the_best():
    evaluations = pd.DataFrame({"easy": {10: 0.8, 20: 0.9}, "hard": {10: 0.2}})
    assert export.best_step(evaluations, [10, 20]) == 10


def test_the_best_one_is_exported_and_described(run, exported, capsys):
    assert export.main([str(run)]) == 0
    out = run / "export/global_step_20"
    stdout, stderr = capsys.readouterr()
    assert stdout == f"step 20\nfloat32, as in the checkpoint.\nChecked.\nexported to {out}\n" and stderr == ""
    ((checkpoint, dtype, trust_remote_code),) = exported
    assert (checkpoint.step, checkpoint.folder) == (20, run / "global_step_20/actor")
    assert dtype is None and trust_remote_code is False
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/Base-1B\n") and "# Base-1B, trained by disco" in card
    assert "| benchmark | before | step 20 |\n|---|---|---|\n| a | 10.0 | 50.0 |\n| b | 30.0 | 70.0 |\n" in card
    assert "## Weights\n\n- float32, as in the checkpoint.\n- Checked.\n" in card
    assert "| disco.tau | 10.0 |" in card and "_target_" not in card and "| seed | 1 |" in card
    assert (out / "model.safetensors").exists() and not out.with_name("global_step_20.unfinished").exists()


def test_options_reach_the_export(run, exported, tmp_path):
    arguments = ["--step", "10", "--out", str(tmp_path / "out"), "--trust-remote-code", "--dtype", "bfloat16"]
    assert export.main([str(run), *arguments]) == 0
    assert [(c.step, d, t) for c, d, t in exported] == [(10, torch.bfloat16, True)]
    assert "after 10 steps" in (tmp_path / "out/README.md").read_text()


def cut(file):
    file.write_bytes(file.read_bytes()[:-500])


@pytest.mark.parametrize(
    "damage, fault",
    [
        (lambda a: [f.unlink() for f in a.rglob("*") if f.is_file()], "no shards (model_world_size_N_rank_R.pt)"),
        (lambda a: (a / "model_world_size_2_rank_1.pt").unlink(), "model_world_size_2_rank_1.pt is missing"),
        (lambda a: cut(a / "model_world_size_2_rank_1.pt"), "model_world_size_2_rank_1.pt is cut off"),
        (lambda a: (a / "model_world_size_2_rank_0.pt").write_bytes(b""), "model_world_size_2_rank_0.pt is cut off"),
        (lambda a: (a / "huggingface/config.json").unlink(), "config.json is missing"),
        (lambda a: (a / "huggingface/config.json").write_text('{"a'), "config.json is not JSON"),
        (lambda a: (a / "huggingface/config.json").write_bytes(b"\xff\xfe"), "config.json is not JSON"),
        (lambda a: (a / "fsdp_config.json").write_text(""), "fsdp_config.json is not JSON"),
        (lambda a: (a / "fsdp_config.json").write_text("[2]"), "fsdp_config.json holds no JSON object"),
        (lambda a: (a / "fsdp_config.json").write_text('{"world_size": "2"}'), "world_size='2' in fsdp_config.json"),
        (lambda a: (a / "fsdp_config.json").write_text('{"world_size": 4}'), "model_world_size_4_rank_0.pt is missing"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_left_out_and_named(run, exported, capsys, refused, damage, fault):
    """The newest one, and no evaluations: the last whole one is the one before."""
    (run / METRICS_FILE).unlink()
    damage(write_checkpoint(run, 150))
    assert export.main([str(run)]) == 0
    assert [c.step for c, *_ in exported] == [100]
    assert f"note: left out as not whole: step 150: {fault}" in capsys.readouterr().err
    error = refused(run, "--step", 150)
    assert "the checkpoint of step 150 is not whole: " in error and fault in error


def test_a_whole_one_counts_whatever_the_tracker_says(run, exported, capsys):
    (run / METRICS_FILE).unlink()
    write_checkpoint(run, 150)
    for tracker in ("100", None, ""):
        (run / CHECKPOINT_FILE).unlink(missing_ok=True)
        if tracker is not None:
            (run / CHECKPOINT_FILE).write_text(tracker)
        assert export.main([str(run), "--out", str(run / f"out{tracker}")]) == 0
        assert exported[-1][0].step == 150 and capsys.readouterr().err == ""
    for tracker in ("200", "x\n", "\xff"):
        (run / CHECKPOINT_FILE).write_text(tracker, encoding="latin-1")
        assert export.main([str(run), "--out", str(run / f"out{ord(tracker[0])}")]) == 0
        assert "which has no whole checkpoint" in capsys.readouterr().err


def test_the_best_one_is_not_taken_if_it_is_not_whole(run, exported):
    (run / "global_step_20/actor/model_world_size_2_rank_0.pt").unlink()
    assert export.main([str(run)]) == 0
    assert exported[0][0].step == 100
    assert "| a | 10.0 | 60.0 |" in (run / "export/global_step_100/README.md").read_text()


def test_folders_with_other_names_are_ignored(run, exported):
    for name in ("tmp", "500.bak", "0700", "-800", " 900", "9_0", "٥٠٠", "99999999999999999999"):
        write_checkpoint(run, name)
    (run / "global_step_400").touch()
    (run / "global_step_300").mkdir()
    assert [c.step for c in find_checkpoints(run, megatron=False)] == [10, 20, 100]
    assert export.main([str(run)]) == 0


def test_shards_of_an_earlier_number_of_ranks_do_not_count(run):
    actor = write_checkpoint(run, 200, ranks=2)
    for rank in range(3):
        torch.save({}, actor / f"model_world_size_4_rank_{rank}.pt")
    assert find_checkpoints(run, megatron=False)[-1].fault == ""
    (actor / "fsdp_config.json").unlink()
    assert find_checkpoints(run, megatron=False)[-1].fault.startswith("shards of 2 and 4 ranks")


def test_megatrons_checkpoints_are_whole_with_their_table_of_contents(run, exported, refused):
    write_settings(run, **{"actor_rollout_ref.actor.strategy": "megatron"})
    assert "has no whole checkpoint (step 10: ckpt_contents.json is missing" in refused(run)
    actor = run / "global_step_10/actor"
    (actor / "ckpt_contents.json").write_text("{}")
    assert "model/ holds no weights" in refused(run, "--step", 10)
    (actor / "model/huggingface").mkdir(parents=True)
    (actor / "model/huggingface/config.json").write_text("{}")
    assert "model/ holds no weights" in refused(run, "--step", 10)
    (actor / "model/dist_ckpt").mkdir()
    (actor / "model/dist_ckpt/.metadata").touch()
    assert export.main([str(run)]) == 0
    assert exported[0][0].megatron and exported[0][0].huggingface == actor / "model/huggingface"


@pytest.mark.parametrize(
    "settings",
    [b"", b"a: [1", b"- 1\n- 2\n", b"just text", b"\xff\xfe\x00", b"a: ${b}\n", b"actor_rollout_ref: 3\n", b"a: *x"],
)
@pytest.mark.parametrize("metrics", [True, False])
def test_damaged_settings_are_one_sentence(run, exported, refused, settings, metrics):
    (run / CONFIG_FILE).write_bytes(settings)
    if not metrics:
        (run / METRICS_FILE).unlink()
    assert str(run / CONFIG_FILE) in refused(run)


@pytest.mark.parametrize("name", ["actor_rollout_ref.model.path", "actor_rollout_ref.actor.strategy"])
@pytest.mark.parametrize("value", [None, 5, {}])
def test_a_setting_that_is_no_text_is_named(run, exported, refused, name, value):
    write_settings(run, **{name: value})
    assert f"has {name}=" in refused(run)


def test_what_cannot_be_exported_is_one_sentence(run, exported, refused, tmp_path):
    assert "is not a run" in refused(tmp_path)
    assert "is not a run" in refused(tmp_path / "nowhere")
    assert "is not a run" in refused(run / CONFIG_FILE)
    assert "has no checkpoint of step 7; it has 10, 20, 100" in refused(run, "--step", 7)
    assert export.main([str(run)]) == 0
    assert "is not empty" in refused(run)
    for step in (10, 20, 100):
        (run / f"global_step_{step}/actor/fsdp_config.json").write_text("")
    assert "has no whole checkpoint (step 10: fsdp_config.json is not JSON" in refused(run)
    for step in (10, 20, 100):
        (run / f"global_step_{step}").rename(run / f"old_{step}")
    assert "has no checkpoint; train with trainer.save_freq > 0" in refused(run)


def test_a_folder_that_cannot_be_written_is_one_sentence(run, exported, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert "file is a file" in refused(run, "--out", tmp_path / "file")
    assert "is a file" in refused(run, "--out", tmp_path / "link")
    assert "cannot be written: Not a directory" in refused(run, "--out", tmp_path / "file/below")
    assert "cannot be written: File name too long" in refused(run, "--out", tmp_path / ("x" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop" in refused(run, "--out", tmp_path / "loop")
    assert "is not empty" in refused(run, "--out", run)
    assert "is inside a checkpoint" in refused(run, "--out", run / "global_step_20/actor/huggingface/out")
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished/mine").touch()
    assert "out.unfinished belongs to a running" in refused(run, "--out", tmp_path / "out")
    assert (tmp_path / "out.unfinished/mine").exists() and (tmp_path / "file").read_text() == "mine"
    assert not exported


def test_an_empty_folder_and_a_link_to_one_are_used(run, exported, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    for name in ("empty", "link"):
        assert export.main([str(run), "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name / "README.md").exists()


@pytest.mark.parametrize("error", [ExportError("not the trained model"), RuntimeError("two\nlines"), Exception()])
def test_an_export_that_fails_leaves_no_folder(run, refused, monkeypatch, error):
    def fail(checkpoint, out, *_):
        (out / "model.safetensors").touch()
        raise error

    monkeypatch.setattr(export, "export_model", fail)
    message = refused(run)
    assert " ".join(str(error).split()) in message
    assert list((run / "export").iterdir()) == []


def test_the_card_gives_the_scores_of_its_step_alone(run, exported):
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 30, "val-core/a/acc/mean@4": 0.9, "val-core/b/acc/mean@4": NaN}\n')
    for step in (30, 40):
        write_checkpoint(run, step)
        assert export.main([str(run), "--step", str(step)]) == 0
    card = (run / "export/global_step_30/README.md").read_text()
    assert "| a | 10.0 | 90.0 |" in card and "| b |" not in card and "nan" not in card
    assert "pass@1" not in (run / "export/global_step_40/README.md").read_text()


def test_odd_characters_do_not_break_the_card(run, exported):
    base = 'models/it: "base" # 1'
    write_settings(run, **{"actor_rollout_ref.model.path": base, "disco.note": "a | b\nc"})
    assert export.main([str(run)]) == 0
    card = (run / "export/global_step_20/README.md").read_text()
    # Only the hub's own names are the base of a card.
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1]) and f"`{base}` after 20 steps" in card
    assert "| disco.note | a \\| b c |" in card


@pytest.mark.parametrize("fits", [0, 2000])
def test_a_full_disk_leaves_no_half_export(run, monkeypatch, refused, full_disk, fits):
    def write(checkpoint, out, *others):
        (out / "model.safetensors").write_bytes(b"x" * 1000)
        return ["as it was"]

    monkeypatch.setattr(export, "export_model", write)
    monkeypatch.setattr(export, "model_card", lambda *_: "x" * 3000)
    before = sorted(run.rglob("*"))
    with full_disk(fits):
        error = refused(run)
    assert "global_step_20/actor cannot be exported: OSError: [Errno 27] File too large" in error
    assert [f for f in sorted(run.rglob("*")) if f not in before] == [run / "export"]
    assert export.main([str(run)]) == 0 and (run / "export/global_step_20/README.md").exists()
