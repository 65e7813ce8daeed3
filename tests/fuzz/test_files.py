"""Random files of runs, checkpoints, exports and data sets: each is read whole, or named, and nothing is lost."""

import contextlib
import csv
import io
import json
import logging
import math
import os
import re
import tempfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from fuzzing import cases
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3Config, Qwen3ForCausalLM
from written_runs import write_checkpoint

from verl_ext.export.__main__ import choose, is_export, make_folder, model_card
from verl_ext.export.model import adapter_config, export_model, uses_adapter
from verl_ext.export.push import ALLOWED, SECRET, describe, is_hub_name, plan
from verl_ext.report import compare
from verl_ext.report.__main__ import Tables, as_texts, find_runs, headline_parts, markdown, pass_k_parts, write_report
from verl_ext.report.headline import choose_baseline, headline
from verl_ext.report.page import page, to_html
from verl_ext.report.read import ANSWERS, Run, clean, one_line, read_answers, read_run, read_runs
from verl_ext.report.tables import difficulty_table, pass_k_tables, pass_table, time_table, weight_table
from verl_ext.runs.checkpoints import Checkpoint, ExportError, SafeTensors, Shards
from verl_ext.runs.files import append_whole, write_whole
from verl_ext.tasks import assets
from verl_ext.tasks.arithmetic.model import build_tokenizer
from verl_ext.tasks.math import prepare as preparation
from verl_ext.tasks.math.prepare import Chosen, DataError, convert

# Writing --------------------------------------------------------------------------------------------------------------


@cases(60)
@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=30)), max_size=6), st.integers(0, 60))
def test_a_full_disk_leaves_whole_content(full_disk, writes, room):
    with tempfile.TemporaryDirectory() as folder:
        log, whole = Path(folder, "log"), Path(folder, "whole")
        lines, content, old = b"", b"old", b"old"
        whole.write_bytes(old)
        with open(log, "ab", buffering=0) as file, full_disk(room):
            for append, content in writes:
                with contextlib.suppress(OSError):
                    if append:
                        append_whole(file.fileno(), content)
                        lines += content
                    else:
                        write_whole(whole, content)
                        old = content
        assert log.read_bytes() == lines and whole.read_bytes() == old and len(os.listdir(folder)) == 2


@cases(60)
@given(
    st.dictionaries(st.sampled_from(["train.parquet", "assets.json", "model", "mine.txt", "x"]), st.binary(max_size=9)),
    st.dictionaries(st.sampled_from(["seed", "size"]), st.integers(0, 2), max_size=2),
    st.booleans(),
)
def test_building_a_task_removes_no_file_of_others(files, stamp, built):
    """Whether a task was built there before with other parameters or not."""
    made = {"seed": 1, "size": 1}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "task")

        def make(partial):
            (partial / "train.parquet").write_text("made")

        if built:
            assets.build(place, "toy", dict.fromkeys(made, 0) | stamp, make)
        for name, text in files.items():
            place.mkdir(exist_ok=True)
            (place / name).write_bytes(text)
        try:
            assert assets.build(place, "toy", made, make) == place.resolve()
            assert json.loads((place / "assets.json").read_text()) == made
        except ValueError as e:
            assert f"toy.folder={place}" in str(e)
            assert all((place / name).read_bytes() == text for name, text in files.items())
        left = {f.name: f.read_bytes() for f in Path(folder).rglob("*") if f.is_file() and f.name in ("mine.txt", "x")}
        assert left == {name: text for name, text in files.items() if name in ("mine.txt", "x")}


# Checkpoints and exports ----------------------------------------------------------------------------------------------

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
layouts = st.sampled_from([Replicate(), Shard(0), Shard(1)])
meshes = st.sampled_from([(1,), (2,), (3,), (2, 2), (1, 2), (4,)])


@pytest.fixture(autouse=True)
def quiet_meshes(caplog):
    """torch warns at each tensor of a shard that there is no process group."""
    caplog.set_level(logging.ERROR, "torch.distributed.device_mesh")


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).tolist()


def part(tensor, placements, mesh, place):
    """What a rank at ``place`` of the mesh has of a tensor: split by the first dimension of the mesh, then the next."""
    for placement, size, at in zip(placements, mesh, place, strict=True):
        if isinstance(placement, Shard):
            chunks = tensor.chunk(size, placement.dim)
            tensor = chunks[at] if at < len(chunks) else tensor.narrow(placement.dim, 0, 0)
    return tensor


def write_shards(actor, state, mesh):
    """Tensors with their placements (None: not sharded) as the ranks of a mesh save them."""
    world = torch.Size(mesh).numel()
    for rank in range(world):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=tuple("abc"[: len(mesh)]))
            shard = {}
            for name, (whole, placements) in state.items():
                if placements is None:
                    shard[name] = whole
                    continue
                mine = part(whole, placements, mesh, device_mesh.get_coordinate()).clone()
                shape = dict(shape=whole.shape, stride=whole.stride())
                shard[name] = DTensor.from_local(mine, device_mesh, placements, run_check=False, **shape)
            torch.save(shard, actor / f"model_world_size_{world}_rank_{rank}.pt")
        finally:
            torch.distributed.destroy_process_group()
    (actor / "fsdp_config.json").write_text(json.dumps({"world_size": world}))


@cases(40)
@given(
    meshes,
    st.lists(
        st.tuples(
            st.tuples(st.integers(0, 5), st.integers(0, 4)), DTYPES, st.one_of(st.none(), st.tuples(layouts, layouts))
        ),
        max_size=4,
    ),
    st.integers(0, 99),
    st.booleans(),
)
def test_joined_shards_are_the_whole_tensors(mesh, tensors, seed, diverged):
    torch.manual_seed(seed)
    state = {}
    for i, (shape, dtype, placements) in enumerate(tensors):
        whole = torch.randn(shape).mul(9).to(dtype)
        if diverged and dtype.is_floating_point and whole.numel():
            whole[0, 0] = torch.nan
        state[f"w{i}"] = whole, None if placements is None else placements[: len(mesh)]
    with tempfile.TemporaryDirectory() as folder:
        actor = Path(folder)
        write_shards(actor, state, mesh)
        found = Shards(actor)
        assert list(found) == list(state)
        for name, (whole, _) in state.items():
            assert bits(found[name]) == bits(whole)
            assert (found.meta(name).shape, found.meta(name).dtype) == (whole.shape, whole.dtype)
        # A damaged file is named, or its damage is in a value.
        file = actor / f"model_world_size_{torch.Size(mesh).numel()}_rank_0.pt"
        content = bytearray(file.read_bytes())
        at = seed * len(content) // 100
        content[at] ^= 0xFF
        file.write_bytes(content[: at + 1] if seed % 2 else content)
        try:
            damaged = Shards(actor)
            assert {n: damaged[n].shape for n in damaged} == {n: whole.shape for n, (whole, _) in state.items()}
        except ValueError as e:
            assert str(actor) in str(e) or any(name in str(e) for name in state)


index = st.one_of(
    st.none(),
    st.binary(max_size=20),
    st.recursive(
        st.one_of(st.none(), st.integers(), st.text(max_size=4), st.sampled_from(["model.safetensors", "a", ".."])),
        lambda x: st.one_of(
            st.lists(x, max_size=2), st.dictionaries(st.sampled_from(["weight_map", "w", "metadata"]), x, max_size=2)
        ),
        max_leaves=4,
    ).map(lambda value: json.dumps(value).encode()),
)


@cases(60)
@given(index, st.one_of(st.none(), st.binary(max_size=20), st.integers(0, 200)))
def test_weights_in_a_folder_are_read_or_named(index, content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        if index is not None:
            Path(folder, "model.safetensors.index.json").write_bytes(index)
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            save_file({"w": torch.arange(3.0), "scalar": torch.tensor(2, dtype=torch.int64)}, file)
            file.write_bytes(file.read_bytes()[:content])
        try:
            found = SafeTensors(Path(folder))
            assert found.sizes() == {n: t.numel() for n, t in found.items()}
            assert found.dtypes() == {n: t.dtype for n, t in found.items()}
        except ValueError as e:
            assert folder in str(e) or "index.json" in str(e)


@cases(4)
@given(
    st.booleans(),
    meshes,
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, torch.float32, torch.bfloat16]),
    st.integers(0, 99),
    st.sampled_from([1, 2]),
)
def test_an_export_holds_the_whole_tensors(tied, mesh, stored, wanted, seed, layers):
    torch.manual_seed(seed)
    shape = dict(hidden_size=16, intermediate_size=24, head_dim=8, vocab_size=278, max_position_embeddings=64)
    config = Qwen3Config(num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, **shape)
    config.tie_word_embeddings, config.architectures = tied, ["Qwen3ForCausalLM"]
    model = Qwen3ForCausalLM(config).to(stored)
    by_rows = (Replicate(),) * (len(mesh) - 1) + (Shard(0),)
    state = {name: (tensor, by_rows) for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        actor, out, base = Path(folder, "actor"), Path(folder, "out"), Path(folder, "base")
        (actor / "huggingface").mkdir(parents=True)
        config.save_pretrained(actor / "huggingface")
        build_tokenizer().save_pretrained(actor / "huggingface")
        write_shards(actor, state, mesh)
        Qwen3ForCausalLM(config).save_pretrained(base)
        out.mkdir()
        checkpoint = Checkpoint(1, actor, megatron=False)
        export_model(checkpoint, out, {"actor_rollout_ref.model.path": str(base)}, wanted, trust_remote_code=False)
        found = load_file(out / "model.safetensors")
        assert found.keys() == state.keys() - ({"lm_head.weight"} if tied else set())
        for name, tensor in found.items():
            assert bits(tensor) == bits(state[name][0].to(wanted or stored))
        chosen = plan_of(out)
        assert "model.safetensors" in chosen.files


def plan_of(folder):
    (folder / "README.md").write_text("A card.")
    return plan(folder)


RANK, ALPHA = "actor_rollout_ref.model.lora_rank", "actor_rollout_ref.model.lora_alpha"
START = "actor_rollout_ref.model.lora_adapter_path"
anything = st.one_of(
    st.integers(-1, 9), st.sampled_from([None, True, "8", 8.0, 2.5, math.nan, math.inf, [], {}, 10**400])
)


@cases(100)
@given(
    st.fixed_dictionaries(
        {}, optional={RANK: anything, ALPHA: anything, START: st.sampled_from([None, "", "/nowhere", 5])}
    ),
    st.one_of(st.none(), st.dictionaries(st.sampled_from(["r", "lora_alpha"]), anything)),
)
@example({RANK: 8, ALPHA: math.nan}, None)
def test_an_adapter_has_the_rank_and_scale_of_its_run_or_is_refused(settings, noted):
    with tempfile.TemporaryDirectory() as folder:
        if noted is not None:
            Path(folder, "lora_train_meta.json").write_text(json.dumps(noted))
        try:
            found = adapter_config(Checkpoint(1, Path(folder), False), settings)
        except ExportError as e:
            assert any(name in str(e) for name in (RANK, ALPHA, START)) or noted is not None and "lora_train" in str(e)
            return
    assert type(found.r) is int and 0 < found.r == settings[RANK]
    assert 0 < found.lora_alpha == settings[ALPHA] < math.inf and not settings.get(START)
    assert noted is None or (noted["r"], noted["lora_alpha"]) == (found.r, int(found.lora_alpha))


@cases(100)
@given(
    st.one_of(
        st.binary(max_size=9),
        st.just(b"[" * 10**5),
        st.recursive(
            st.sampled_from([None, True, 1, "true"]),
            lambda x: st.one_of(st.lists(x, max_size=1), st.dictionaries(st.sampled_from(["backend", "peft"]), x)),
            max_leaves=3,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_a_manifest_says_whether_there_is_an_adapter(content):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ckpt_contents.json").write_bytes(content)
        try:
            found = uses_adapter(Checkpoint(1, Path(folder), True))
        except ValueError as e:
            assert "ckpt_contents.json" in str(e)
            return
    value = json.loads(content).get("backend")
    assert found == (isinstance(value, dict) and value.get("peft") in (True,) and type(value["peft"]) is bool)


SCORES_OF_A_STEP = st.sampled_from([0.25, 0.75, 0.75, 0.75, math.nan])


@cases(60)
@given(
    st.dictionaries(st.sampled_from([1, 2, 3, 10, 20]), st.sampled_from([True, True, False]), max_size=4),
    st.dictionaries(st.sampled_from([0, 1, 2, 3, 10, 20]), st.tuples(SCORES_OF_A_STEP, st.just(0.5)), max_size=6),
    st.one_of(st.none(), st.sampled_from([1, 2, 3, 4])),
    st.one_of(st.none(), st.integers(0, 30).map(str), st.binary(max_size=4)),
)
def test_the_best_whole_checkpoint_is_exported(steps, scores, step, latest):
    evaluations = pd.DataFrame.from_dict(scores, orient="index", columns=["a", "b"], dtype=float)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as said:
        run = Path(folder)
        for number, whole in steps.items():
            actor = write_checkpoint(run, number)
            if not whole:
                (actor / "model_world_size_2_rank_1.pt").unlink()
        if latest is not None:
            (run / "latest_checkpointed_iteration.txt").write_bytes(
                latest if isinstance(latest, bytes) else latest.encode()
            )
        try:
            found = choose(run, False, evaluations, step)
        except ExportError as e:
            assert not any(steps.values()) if step is None else not steps.get(step)
            assert str(run) in str(e) or f"step {step}" in str(e)
            return
    assert steps[found.step] and found.folder == run / f"global_step_{found.step}/actor"
    if step is not None:
        assert found.step == step
        return
    means = {n: sum(x) / 2 for n, x in scores.items() if steps.get(n) and not math.isnan(sum(x))}
    best = max(means.values(), default=None)
    # Of equally good ones the last; without an evaluation the last of all.
    right = [n for n in means if means[n] == best] if means else [n for n, whole in steps.items() if whole]
    assert found.step == max(right)
    left_out = re.findall(r"left out as not whole: step (\d+)", said.getvalue())
    assert sorted(map(int, left_out)) == sorted(n for n, whole in steps.items() if not whole)


@cases(100)
@given(
    st.sampled_from(["whole", "none", "edited", "other step", "other settings", "not UTF-8"]),
    st.one_of(
        st.none(),
        st.sampled_from([b"[]", b"null", b"[" * 10**5, b"\xff", b"{"]),
        st.dictionaries(
            st.sampled_from(["dtype", "torch_dtype"]), st.sampled_from(["float32", "bfloat16", None, 5, []])
        ),
    ),
    st.sampled_from(["checkpoint", "float32", "bfloat16"]),
)
@example("whole", b"[]", "checkpoint")
def test_an_export_is_known_by_its_card_and_its_type(state, config, dtype):
    settings = {"actor_rollout_ref.model.path": "org/Base", "verl_ext.algorithm": "disco", "seed": 1}
    card = model_card(settings, pd.DataFrame(), 4, [])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        other = {"other step": model_card(settings, pd.DataFrame(), 5, []), "edited": f"Mine.\n{card}\nMore."}
        other["other settings"] = model_card(settings | {"seed": 2}, pd.DataFrame(), 4, [])
        if state == "not UTF-8":
            (out / "README.md").write_bytes(b"\xff" + card.encode())
        elif state != "none":
            (out / "README.md").write_text(other.get(state, card))
        if config is not None:
            (out / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
        found = is_export(out, card, dtype)
        right = state in ("whole", "edited") and isinstance(config, dict)
        if right and dtype != "checkpoint":
            right = (config.get("dtype") or config.get("torch_dtype")) == dtype
        assert found == right
        # A folder in use is not taken, and loses nothing.
        before = {f: f.read_bytes() for f in out.iterdir()}
        unfinished = out / "x.unfinished"
        try:
            make_folder(out, unfinished)
            assert not before and unfinished.is_dir()
        except ExportError as e:
            assert str(out) in str(e) and before == {f: f.read_bytes() for f in out.iterdir()} != {}


names = st.one_of(
    st.sampled_from(
        [
            *(
                "model.safetensors",
                "model-00001-of-00002.safetensors",
                "config.json",
                "tokenizer.json",
                "modeling_x.py",
            ),
            *("optim.pt", "metrics.jsonl", "README.md.bak", ".env", "adapter_model.safetensors", "a\nb", "merges.txt"),
            *("README.md", "x.jinja", "config.json\n", "é"),
        ]
    ),
    st.text("ab.\n", min_size=1, max_size=4).filter(lambda name: name.strip(".")),
)
contents = st.sampled_from(
    [b"", b"{}", b"text\n" * 40, b"\xff\xfe", b"key: hf_" + b"a" * 34, b"-----BEGIN RSA PRIVATE KEY-----",
     b"https://me:secret@host/", b"sk-" + b"b" * 24]
)  # fmt: skip


@cases(100)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["", "lora_adapter", "additional_chat_templates", "x"]), names), contents
    ),
    st.sampled_from(["weights", "weights", "weights", "link", "loop", "folder"]),
    contents,
    st.booleans(),
)
def test_a_push_takes_what_is_allowed_and_no_secret(files, more, card, private):
    with tempfile.TemporaryDirectory() as place:
        folder, outside = Path(place, "out"), Path(place, "secret.safetensors")
        outside.write_bytes(b"secret")
        for (below, name), content in files.items():
            with contextlib.suppress(OSError):
                (folder / below).mkdir(parents=True, exist_ok=True)
                (folder / below / name).write_bytes(content)
        folder.mkdir(exist_ok=True)
        if not (folder / "README.md").exists():
            (folder / "README.md").write_bytes(card)
        if more in ("weights", "loop", "folder"):
            (folder / "model.safetensors").write_bytes(b"w")
        if more == "link" and not (folder / "model.safetensors").exists():
            (folder / "model.safetensors").symlink_to(outside)
        elif more == "loop":
            (folder / "loop.jinja").symlink_to(folder / "loop.jinja")
        elif more == "folder" and not (folder / "vocab.txt").exists():
            (folder / "vocab.txt").mkdir()
        real = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_symlink() or f.is_file()}
        try:
            found = plan(folder)
        except ExportError as e:
            assert str(folder) in str(e)
            return
        assert sorted(found.files + found.left_out) == sorted(real)
        for name in found.files:
            assert ALLOWED.fullmatch(name) and "\n" not in name and not (folder / name).is_symlink()
            text = (folder / name).read_bytes().decode(errors="replace")
            assert name.endswith(".safetensors") or not SECRET.search(text)
        told = describe(folder, "me/model", private, found).splitlines()
        # A line for each file; no name makes another.
        assert told[0].endswith("private:" if private else "PUBLIC: everybody can read it:")
        assert [line.split()[-1] for line in told[1 : 1 + len(found.files)]] == found.files
        assert told[1 + len(found.files)].endswith(f"in {len(found.files)} files")
        more_lines = told[2 + len(found.files) :]
        assert more_lines[0].startswith("not pushed: " if found.left_out else "the card:")
        assert more_lines[bool(found.left_out)] == "the card:"
        assert all(line.startswith("  | ") for line in more_lines[1 + bool(found.left_out) :])


@cases(150)
@given(st.text(max_size=8), st.text("ab/-._", max_size=100))
def test_a_name_on_the_hub_has_at_most_an_owner_and_plain_letters(text, like):
    for name in (text, like):
        assert not is_hub_name(name) or re.fullmatch(r"([\w.-]+/)?[\w.-]{1,96}", name, re.ASCII)


hostile = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["a|b", "a\nb", "</td><script>x</script>", "`", "**a**", "---", "a: b", "| x | y |", "![x](y.svg)", "[a](b)",
         "/home/me/secret place/model", "/home/me/model", "~/models/x", "C:\\x", "&lt;", "a\x00b", "\u202eb", "#",
         "_a_", "$x$", "<img src=x onerror=y>", "'", '"', "a\\|b", "\ud800"]
    ),
)  # fmt: skip


def cells_of(text):
    """The cells of the Markdown tables in a text, as a reader sees them."""

    class Cells(HTMLParser):
        def __init__(self):
            super().__init__()
            self.rows, self.tags, self.inside = [], set(), False

        def handle_starttag(self, tag, attributes):
            self.tags.add(tag)
            if tag == "tr":
                self.rows.append([])
            elif tag in ("td", "th"):
                self.rows[-1].append("")
                self.inside = True

        def handle_endtag(self, tag):
            self.inside = self.inside and tag not in ("td", "th")

        def handle_data(self, data):
            if self.inside:
                self.rows[-1][-1] += data

    parser = Cells()
    parser.feed(MarkdownIt("commonmark", {"html": False}).enable("table").render(text))
    return parser.rows, parser.tags


@cases(150)
@given(
    hostile,
    hostile.filter(lambda name: "home" not in name),
    hostile,
    st.dictionaries(hostile, st.tuples(*[st.floats(0, 1)] * 2), max_size=2),
)
@example("/home/me/secret place/model", "grpo", "", {})
@example("a\nb", "a\n---\nb: c", "", {})
def test_a_card_says_what_was_trained_and_where_no_one_lives(path, algorithm, value, scores):
    settings = {"actor_rollout_ref.model.path": path, "verl_ext.algorithm": algorithm, "seed": value}
    settings |= {"data.train_files": [value, path], f"{algorithm}.tau": value}
    table = pd.DataFrame({one_line(n): list(s) for n, s in scores.items()}, index=[0, 4])
    card = model_card(settings, table, 4, [f"3 of 4 tensors differ from `{path}`."])
    assert card.encode("utf-8", "replace")
    assert not re.search(r"home|secret place", card)
    start, front, rest = card.split("---\n", 2)
    assert start == "" and {"library_name", "tags"} <= yaml.safe_load(front).keys()
    rows, tags = cells_of(rest)
    assert "script" not in tags
    assert {len(row) for row in rows} <= {2, 3}
    assert ["seed"] in [row[:1] for row in rows]


# Reports --------------------------------------------------------------------------------------------------------------


@cases(80)
@given(
    st.lists(st.lists(hostile, min_size=2, max_size=2), min_size=1, max_size=3),
    st.lists(hostile, min_size=2, max_size=2, unique=True),
)
def test_a_table_shows_its_cells(rows, columns):
    """Texts of files: without lone surrogates."""
    rows, columns = [[clean(x) for x in row] for row in rows], [one_line(f"{x}{i}") for i, x in enumerate(columns)]
    table = pd.DataFrame(rows, columns=columns).set_index(columns[0])
    texts = as_texts(table)
    found, tags = cells_of(markdown(table))
    assert tags <= {"table", "thead", "tbody", "tr", "th", "td"}
    wanted = [list(map(one_line, columns)), *texts.values.tolist()]
    assert [[" ".join(cell.split()) for cell in row] for row in found] == [[x.strip() for x in row] for row in wanted]
    with tempfile.TemporaryDirectory() as folder:
        Tables(Path(folder, "t")).add("x", table)
        read = list(csv.reader(io.StringIO(Path(folder, "t/x.csv").read_text())))
        assert [len(row) for row in read] == [2] * (1 + len(rows))


scores = st.one_of(
    st.sampled_from([0, 1, 0.0, 1.0, True, 0.5]), st.sampled_from([None, "1", [1], float("nan"), 10**400])
)
answer = st.fixed_dictionaries(
    {"input": st.sampled_from(["1+1?", "2+2?", "<b>", "\ud800"]), "score": scores},
    optional={
        "data_source": st.one_of(hostile, st.none()),
        "uid": st.sampled_from(["a_0_0", "a_0_1", "a_1_0", "b_0_0", "b", "_0_0"]),
        "acc": scores,
        "output": st.one_of(hostile, st.none(), st.integers()),
        "gts": st.one_of(hostile, st.lists(hostile, max_size=2)),
    },
)
right_answer = st.builds(
    lambda row, score: row | {"score": score, "acc": score},
    answer.filter(lambda row: isinstance(row["input"], str)),
    st.sampled_from([0, 1]),
)


@cases(150)
@given(st.lists(st.one_of(answer, right_answer), max_size=6))
def test_stored_responses_are_all_counted_or_the_file_is_damaged(rows):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "4.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            found, faults = read_answers(file, "toy")
        except ValueError as e:
            assert str(file) in str(e)
            return
        # Turns of one sample, which verl numbers at the end, are one response.
        uids = [row.get("uid", "") for row in rows]
        turns = Counter(uid.rpartition("_")[0] for uid in uids if uid.count("_") == 2 and uid[0] != "_")
        assert found["samples"].sum() == len(rows) - turns.total() + len(turns) and list(found) == ANSWERS
        assert ((found["right"] >= 0) & (found["right"] <= found["samples"])).all()
        assert all(str(file) in fault for fault in faults)


metric = st.one_of(st.floats(0, 1), st.sampled_from([0, 1, None, "x", True, 10**400, float("nan"), float("inf")]))
row = st.dictionaries(
    st.one_of(
        st.sampled_from(["val-core/toy/acc/mean@4", "val-core/b/acc/mean@1", "timing_s/step", "critic/score/mean"]),
        st.builds(lambda name: f"val-core/{name}/acc/mean@2", hostile),
        st.builds(lambda name: f"training/{name}", hostile),
    ),
    metric,
    max_size=4,
)
settings_of_run = st.fixed_dictionaries(
    {
        "seed": st.one_of(st.integers(0, 2), hostile),
        "verl_ext.algorithm": st.sampled_from(["grpo", "disco", "<b>", "a|b"]),
    },
    optional={
        "disco.tau": st.one_of(st.floats(), hostile, st.lists(hostile, max_size=2)),
        "actor_rollout_ref.model.path": st.one_of(hostile, st.just("models/toy")),
        "trainer.total_training_steps": st.one_of(st.none(), st.integers(), hostile),
        "trainer.validation_data_dir": st.one_of(st.none(), st.integers(), hostile, st.just("/nowhere")),
        "data.train_batch_size": st.integers(1, 3),
    },
)
steps = st.lists(st.tuples(st.integers(0, 4), row), max_size=5)
dumps = st.dictionaries(
    st.sampled_from(["0", "2", "4", "04", "٤", "x", "9" * 30]), st.lists(st.one_of(right_answer, answer), max_size=4)
)
one_run = st.tuples(settings_of_run, steps, dumps)


def write_run(folder, run):
    settings, steps, dumps = run
    folder.mkdir()
    config = {}
    for name, value in settings.items():
        node = config
        *above, last = name.split(".")
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    (folder / "config.yaml").write_bytes(yaml.safe_dump(config).encode(errors="replace"))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s} | r) + "\n" for s, r in steps))
    (folder / "validation").mkdir()
    for name, rows in dumps.items():
        (folder / f"validation/{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_runs(place, drawn):
    folders = [place / str(i) for i in range(len(drawn))]
    for folder, run in zip(folders, drawn, strict=True):
        write_run(folder, run)
    return folders


KINDS = {
    "run": {"config.yaml": "trainer: {nnodes: 1}", "metrics.jsonl": '{"step": 1}\n'},
    "waiting": {"config.yaml": "trainer: {nnodes: 1}"},
    "damaged": {"config.yaml": "{"},
    "of hydra": {"config.yaml": "trainer: {nnodes: 1}", "overrides.yaml": "[]"},
    "of wandb": {"config.yaml": "trainer: {value: {nnodes: 1}, desc: null}"},
    "other": {"config.yaml": "model: 1"},
    "empty": {},
}


@cases(80)
@given(
    st.dictionaries(
        st.lists(st.sampled_from(["a", "b", ".hydra", "global_step_3"]), max_size=3).map(tuple),
        st.sampled_from([*KINDS]),
        max_size=5,
    ),
    st.lists(st.sampled_from([(), ("a",), ("b",), ("nowhere",)]), min_size=1, max_size=3),
    st.booleans(),
)
def test_each_run_is_found_once_wherever_it_is(made, given_, linked):
    with tempfile.TemporaryDirectory() as place:
        top = Path(place, "top")
        for parts, kind in made.items():
            top.joinpath(*parts).mkdir(parents=True, exist_ok=True)
            for name, text in KINDS[kind].items():
                top.joinpath(*parts, name).write_text(text)
        top.mkdir(exist_ok=True)
        folders = [top.joinpath(*parts) for parts in given_]
        if linked:
            Path(place, "link").symlink_to(top)
            folders.append(Path(place, "link"))
        found, none = find_runs(folders)

        def is_hidden(below, parts):
            """In Hydra's folder, or in a checkpoint of what has settings, below the folder that was given."""
            at = [(parts[:i], parts[i]) for i in range(below, len(parts))]
            return any(
                name == ".hydra" or name == "global_step_3" and made.get(up, "empty") != "empty" for up, name in at
            )

        right = {
            parts
            for above in [*given_, *[()] * linked]
            for parts, kind in made.items()
            if kind in ("run", "waiting", "damaged")
            and parts[: len(above)] == above
            and not is_hidden(len(above), parts)
        }
        # What is not there is named later, as unreadable.
        missing = {parts for parts in given_ if not top.joinpath(*parts).exists()}
        places = [Path(os.path.realpath(run)) for run in found]
        assert sorted(places) == sorted({Path(os.path.realpath(top.joinpath(*parts))) for parts in right | missing})
        runs_there = {Path(os.path.realpath(top.joinpath(*parts))) for parts in right}
        for folder, why in none.items():
            assert str(folder) in why
            assert not any(run.is_relative_to(os.path.realpath(folder)) for run in runs_there)
        runs, damaged = read_runs(found)
        assert {r.folder for r in runs} <= set(found) and len(runs) == sum(made.get(p) == "run" for p in right)


@cases(100)
@given(*[st.sets(st.integers(0, 5), max_size=4)] * 2, st.one_of(st.none(), st.integers(0, 6)))
def test_two_runs_are_compared_at_the_last_step_of_both(of_a, of_b, step):
    a, b = (
        Run(Path(name), {}, pd.DataFrame(), dumps={n: Path() for n in of}) for name, of in (("/a", of_a), ("/b", of_b))
    )
    try:
        found = compare.last_common_step(a, b, step)
    except ValueError as e:
        assert not of_a & of_b if step is None else step not in of_a & of_b
        assert all(word in str(e) for word in ("/a has", "/b has", "trainer.validation_data_dir"))
        return
    assert found in of_a & of_b and (found == step or step is None and not any(n > found for n in of_a & of_b))


@cases(60)
@given(st.lists(one_run, min_size=1, max_size=3))
def test_tables_of_any_runs(drawn):
    with tempfile.TemporaryDirectory() as place:
        folders = write_runs(Path(place), drawn)
        runs, damaged = read_runs(folders)
        assert all(str(folder) in fault for folder, fault in damaged.items())
        # Each has metrics, or is damaged, or has logged nothing yet.
        waiting = [f for f in folders if f not in damaged and f not in {r.folder for r in runs}]
        assert all(not drawn[folders.index(f)][1] for f in waiting)
        for run in runs:
            logged = dict(drawn[folders.index(run.folder)][1])
            assert list(run.metrics.index) == sorted(logged)
        baseline = choose_baseline(runs)
        table = headline(runs, baseline)
        assert list(table["pass_at_1"]) == sorted(table["pass_at_1"], reverse=True)
        assert ((table["pass_at_1"] >= -1e-9) & (table["pass_at_1"] <= 1 + 1e-9)).all()
        assert (table.index != baseline).all() or pd.isna(table["difference"].get(baseline, float("nan")))
        for values in pass_k_tables(runs).values():
            assert len(values)
        shown = [
            markdown(t) for t in (pass_table(runs, 3), difficulty_table(runs), weight_table(runs), time_table(runs))
        ]
        to_paste = Tables(Path(place, "tables"))
        shown += [*headline_parts(runs, baseline, to_paste), *pass_k_parts(pass_k_tables(runs), [], to_paste)]
        _, tags = cells_of("\n\n".join(shown))
        assert not tags & {"script", "img", "a", "b"}


@cases(3)
@given(st.lists(one_run.filter(lambda run: run[1]), min_size=1, max_size=2))
@example(
    [
        (
            {"seed": "![x](y.svg)", "verl_ext.algorithm": "<b>", "trainer.total_training_steps": "![x](y.svg)"},
            [(1, {"val-core/![x](y.svg)/acc/mean@4": 0.5, "timing_s/step": "![x](y.svg)"})],
            {},
        )
    ]
)
def test_a_report_of_any_runs_loads_and_runs_nothing(drawn):
    with tempfile.TemporaryDirectory() as place:
        runs, damaged = read_runs(write_runs(Path(place), drawn))
        if not runs:
            return
        out = Path(place, "out")
        out.mkdir()
        text = write_report(runs, [], damaged, out, 3)
        html = to_html(text, out)
        _, tags = cells_of(text)
        assert not tags & {"script", "b", "a"}
        assert html.count("<script>") == page("", "").count("<script>")
        assert all(source.startswith("data:image/svg+xml;base64,") for source in re.findall(r'<img src="([^"]*)', html))


@cases(40)
@given(st.lists(right_answer, min_size=1, max_size=5), st.lists(right_answer, min_size=1, max_size=5))
def test_two_runs_are_compared_on_all_common_questions(rows, others):
    with tempfile.TemporaryDirectory() as place:
        for name, answers in (("a", rows), ("b", others)):
            settings = {"seed": 1, "verl_ext.algorithm": "<b>"}
            write_run(Path(place, name), (settings, [(4, {"val-core/toy/acc/mean@4": 0.5})], {"4": answers}))
        a, b = (read_run(Path(place, name)) for name in "ab")
        of_a, of_b = (compare.questions_of(run, 4) for run in (a, b))
        try:
            table = compare.side_by_side(a, b, 4)
        except ValueError as e:
            assert "no question in common" in str(e) and not set(of_a.index) & set(of_b.index)
            return
        assert set(table.index) == set(of_a.index) & set(of_b.index) and table.index.is_unique
        assert len(table) + table.attrs["A"] == len(of_a) and len(table) + table.attrs["B"] == len(of_b)
        html = page("x", "\n".join(compare.body_of(table, a, b, 4, 50)))
        assert html.count("<script>") == 1 and not re.search(r"<(b|img)\b", html)


# Data sets ------------------------------------------------------------------------------------------------------------

cell = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), hostile, st.just(10**30), st.just("42")),
    lambda x: st.lists(x, max_size=2),
    max_leaves=3,
)
record = st.one_of(
    st.dictionaries(st.sampled_from(["problem", "Answer", "answer", "solution", "images", "prompt", "id"]), cell),
    st.builds(
        lambda a, b, more: {"problem": a, "answer": b} | more,
        st.sampled_from(["One?", "one ?", "Two?", "a\nb\u2028c"]),
        st.sampled_from(["1", 1, ["1", "2"], "#### 7", "\\boxed{3}", "{"]),
        st.dictionaries(st.sampled_from(["id", "solution"]), cell),
    ),
    cell,
)


def graded(truths):
    """Of the grader, which other tests try: unbalanced answers fail."""
    truths = list(truths)
    return {t: "braces do not match" if t.count("{") != t.count("}") else "" for t in truths}, set()


PIECES = [b"{", b"}", b"[", b"]", b",", b"\n"]


def write_rows(path, rows, form):
    whole = json.dumps({"data": rows} if form == "below" else rows)
    # A single line with one list may also be the whole set.
    path.write_text("\n".join(map(json.dumps, rows)) if form == "jsonl" and len(rows) > 1 else whole)


@cases(80)
@given(
    st.lists(record, min_size=1, max_size=6),
    st.lists(record, min_size=1, max_size=3),
    st.sampled_from(["json", "jsonl", "below"]),
    st.booleans(),
    st.booleans(),
)
def test_each_row_of_a_set_is_kept_or_counted(rows, others, form, drop, overlap):
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "self_graded", graded)
        train, test, out = (Path(place, name) for name in ("mine.json", "test.json", "out"))
        write_rows(train, rows, form)
        write_rows(test, others, form)
        try:
            kept, report = convert(Chosen("mine", "mine", train), "train", "Box it.")
            tested, _ = convert(Chosen("test", "test", test), "test", "Box it.")
        except DataError as e:
            assert place in str(e)
            return
        assert report.read == len(rows) == len(kept) + report.rejected.total()
        assert set(report.first) == set(report.rejected) | set(report.notes)
        flags = ["--drop-duplicates"] * drop + ["--drop-overlap"] * overlap
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            named = ["--train", str(train), "--benchmarks", str(test), "--suffix", "Box it."]
            status = preparation.main(["--out", str(out), *named, *flags])
        if status:
            assert "error: " in said.getvalue() and not list(out.glob("*.parquet"))
            return
        found = {name: pd.read_parquet(out / f"{name}.parquet").to_dict("records") for name in ("train", "test")}
        assert len(found["test"]) == len(tested)
        seen, wanted = set(), []
        for row in kept:
            if not (drop and row["key"] in seen) and not (overlap and row["key"] in {r["key"] for r in tested}):
                wanted.append(row)
            seen.add(row["key"])
        assert [row["extra_info"]["index"] for row in found["train"]] == [row["extra_info"]["index"] for row in wanted]
        for row, right in zip(found["train"], wanted, strict=True):
            assert list(row["reward_model"]["ground_truth"]) == right["reward_model"]["ground_truth"]
            assert list(row["prompt"]) == right["prompt"]
        assert f"{len(rows):7} read {len(wanted):7} written" in said.getvalue()


@cases(150)
@given(
    st.one_of(
        st.binary(max_size=30),
        st.text(max_size=30).map(str.encode),
        st.just(b"[" * 5000),
        st.lists(st.sampled_from([*PIECES, b'{"problem": "1?"}', b"1" * 5000, b"\xef\xbb\xbf"])).map(b"".join),
    ),
    st.sampled_from([".json", ".jsonl", ".parquet", ".json.gz", ".JSON", ".parquet.gz"]),
)
def test_any_data_file_is_read_or_named(content, ending):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x{ending}")
        path.write_bytes(content)
        try:
            rows = list(preparation.read(Chosen("x", "x", path)))
        except DataError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            return
        assert all(where.startswith(path.name) for where, _ in rows)
        assert len({where for where, _ in rows}) == len(rows)
