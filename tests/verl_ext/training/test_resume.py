"""Which checkpoint is resumed after a kill, and which ones are kept."""

import json

import pytest
import torch

from verl_ext.runs.checkpoints import MEGATRON_MANIFEST
from verl_ext.runs.folder import CHECKPOINT_FILE
from verl_ext.training.resume import name_whole_checkpoint, remove_old_checkpoints

CONTENTS = ["model", "optimizer", "extra"]


def write_checkpoint(run, step, role="actor", ranks=2, data=True):
    """As verl's FSDP engine leaves it."""
    folder = run / f"global_step_{step}" / role
    (folder / "huggingface").mkdir(parents=True)
    (folder / "huggingface/config.json").write_text("{}")
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": ranks}))
    for rank in range(ranks):
        for kind in ("model", "optim", "extra_state"):
            torch.save({"x": torch.zeros(2)}, folder / f"{kind}_world_size_{ranks}_rank_{rank}.pt")
    if data:
        (folder.parent / "data.pt").write_bytes(b"x")
    return folder


def named(run, roles=("actor",), megatron=False, contents=CONTENTS):
    """What the tracker names after a look."""
    name_whole_checkpoint(run, roles, megatron=megatron, contents=contents)
    return (run / CHECKPOINT_FILE).read_text()


@pytest.fixture
def run(tmp_path):
    """Whole checkpoints of steps 2, 4 and 10; the tracker names the last."""
    for step in (2, 4, 10):
        write_checkpoint(tmp_path, step)
    (tmp_path / CHECKPOINT_FILE).write_text("10")
    return tmp_path


def remove(folder):
    import shutil

    shutil.rmtree(folder)


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


def test_a_whole_checkpoint_is_left_alone(run, capsys):
    assert named(run) == "10"
    # The user went back.
    (run / CHECKPOINT_FILE).write_text("4\n")
    assert named(run) == "4\n" and not capsys.readouterr().out


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda last: remove(last.parent), "names step 10, whose checkpoint is missing"),
        (lambda last: remove(last), "names step 10, whose checkpoint is broken (actor/ is missing)"),
        (lambda last: cut(last / "model_world_size_2_rank_1.pt"), "actor: model_world_size_2_rank_1.pt is cut off"),
        (lambda last: cut(last / "optim_world_size_2_rank_0.pt"), "actor: optim_world_size_2_rank_0.pt is cut off"),
        (lambda last: (last / "optim_world_size_2_rank_1.pt").unlink(), "optim_world_size_2_rank_1.pt is missing"),
        (lambda last: (last / "extra_state_world_size_2_rank_1.pt").unlink(), "extra_state_world_size_2_rank_1.pt is"),
        (lambda last: (last / "huggingface/config.json").write_text("{"), "config.json is not JSON"),
    ],
)
def test_the_newest_whole_one_is_resumed_where_the_tracker_names_none(run, capsys, damage, reason):
    damage(run / "global_step_10/actor")
    assert named(run) == "4"
    out = capsys.readouterr().out
    assert reason in out and "resuming from the newest whole one, step 4" in out


@pytest.mark.parametrize("text", ["", "ten", "-1", "1.5", "\x00\x00", "1_0", " ", "9" * 30])
def test_a_tracker_that_holds_no_step_is_named_and_fixed(run, capsys, text):
    (run / CHECKPOINT_FILE).write_text(text)
    assert named(run) == "10"
    assert "which is not a step" in capsys.readouterr().out


def test_a_kill_while_verl_rotates_with_one_to_keep_resumes_from_the_new_one(tmp_path, capsys):
    # verl 0.9.1: the new one is written, the old one removed, data.pt and the tracker come last.
    write_checkpoint(tmp_path, 4, data=False)
    (tmp_path / "global_step_2").mkdir()
    (tmp_path / "global_step_2/data.pt").write_bytes(b"x")
    (tmp_path / CHECKPOINT_FILE).write_text("2")
    assert named(tmp_path) == "4"
    assert "it has no data.pt, so the data starts from the first question" in capsys.readouterr().out


def test_one_with_the_state_of_the_questions_is_preferred(run):
    remove(run / "global_step_10/actor")
    (run / "global_step_4/data.pt").unlink()
    assert named(run) == "2"


def test_the_critic_has_to_be_whole_as_well(run):
    write_checkpoint(run, 2, role="critic")
    write_checkpoint(run, 10, role="critic")
    assert named(run, roles=("actor", "critic")) == "10"
    cut(run / "global_step_10/critic/model_world_size_2_rank_0.pt")
    assert named(run, roles=("actor", "critic")) == "2"


def test_what_is_not_loaded_need_not_be_there(run):
    (run / "global_step_10/actor/optim_world_size_2_rank_1.pt").unlink()
    assert named(run, contents=["model"]) == "10"


def test_megatrons_checkpoints_are_told_by_their_manifest(tmp_path):
    for step in (2, 4):
        model = tmp_path / f"global_step_{step}/actor/model"
        for name in ("huggingface/config.json", "dist_ckpt/.metadata"):
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            (model / name).write_text("{}")
    (tmp_path / "global_step_2/actor" / MEGATRON_MANIFEST).write_text("{}")
    (tmp_path / CHECKPOINT_FILE).write_text("4")
    assert named(tmp_path, megatron=True) == "2"


def test_no_whole_one_at_all_is_refused_with_two_ways_out(tmp_path):
    (tmp_path / CHECKPOINT_FILE).write_text("4")
    with pytest.raises(ValueError, match="whose checkpoint is missing.* remove latest_.* or choose another"):
        named(tmp_path)


def test_shards_on_another_nodes_disk_are_left_to_verl(tmp_path, capsys):
    write_checkpoint(tmp_path, 4, ranks=2)
    (tmp_path / "global_step_4/actor/model_world_size_2_rank_1.pt").unlink()
    (tmp_path / CHECKPOINT_FILE).write_text("4")
    assert named(tmp_path) == "4"
    assert "is missing) on this node" in capsys.readouterr().out


def test_checkpoints_without_a_tracker_are_told(run, capsys):
    (run / CHECKPOINT_FILE).unlink()
    name_whole_checkpoint(run, ["actor"], megatron=False, contents=CONTENTS)
    assert not (run / CHECKPOINT_FILE).exists()
    assert "although it holds checkpoints up to step 10; to resume" in capsys.readouterr().out
    name_whole_checkpoint(run / "nowhere", ["actor"], megatron=False, contents=CONTENTS)


def steps(run, role="actor"):
    return sorted(int(f.parent.name.rpartition("_")[2]) for f in run.glob(f"global_step_*/{role}"))


def test_old_ones_are_removed_whichever_process_wrote_them(run):
    write_checkpoint(run, 12)
    # An earlier run went further and was set back.
    write_checkpoint(run, 40)
    assert remove_old_checkpoints(run, 12, {"actor": 2, "critic": 2}) == [2, 4]
    assert steps(run) == [10, 12, 40]
    assert not (run / "global_step_2").exists()


@pytest.mark.parametrize("number", [None, 0, -1])
def test_all_are_kept_where_no_number_is_set(run, number):
    assert remove_old_checkpoints(run, 10, {"actor": number, "critic": number}) == []
    assert steps(run) == [2, 4, 10]


def test_actor_and_critic_are_counted_apart_and_files_of_others_stay(run):
    for step in (2, 4, 10):
        write_checkpoint(run, step, role="critic")
    (run / "global_step_2/notes.txt").write_text("mine")
    (run / "global_step_x").mkdir()
    assert remove_old_checkpoints(run, 10, {"actor": 1, "critic": 2}) == [2, 4]
    assert steps(run) == [10] and steps(run, "critic") == [4, 10]
    assert [p.name for p in (run / "global_step_2").iterdir()] == ["notes.txt"]
    assert (run / "global_step_4/data.pt").exists() and (run / "global_step_x").exists()


def test_the_one_just_written_is_never_removed(run):
    assert remove_old_checkpoints(run, 4, {"actor": 1}) == [2]
    assert steps(run) == [4, 10]
