"""Random data rows, nodes, packages and models through the checks of a start: what is wrong is named, nothing else."""

import math
import os
import re
import socket
import tempfile
import warnings
from datetime import date, datetime
from decimal import Decimal
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzzing import cases
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from verl_ext.preflight import machine, nodes
from verl_ext.preflight.composition import Run
from verl_ext.preflight.data import is_empty, wrong_prompt
from verl_ext.preflight.memory import Shape, lora_parameters
from verl_ext.preflight.rows import check_data_files, check_rows, wrong_rows, wrong_truth
from verl_ext.tasks.arithmetic.model import build_tokenizer
from verl_ext.tasks.countdown.reward import numbers_and_target
from verl_ext.tasks.math.reward import ground_truths

# Rows -----------------------------------------------------------------------------------------------------------------


def objects(values):
    """As pandas has a list of a Parquet file."""
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


NOTHING = [None, float("nan"), "", " \n", np.float64("nan"), np.array([]), [], {}, pd.NaT, b""]
nothing = st.recursive(
    st.sampled_from(NOTHING),
    lambda x: st.one_of(
        st.lists(x, max_size=2),
        st.dictionaries(st.text(max_size=2), x, max_size=2),
        st.lists(x, max_size=2).map(objects),
    ),
    max_leaves=3,
)
"""What holds no text and no number, in the forms in which pandas returns a Parquet file's values."""

scalars = st.one_of(
    st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False), st.binary(min_size=1, max_size=2),
    st.sampled_from([np.int64(3), np.float32(0.5), np.bool_(True), np.datetime64(5, "s"), date(2020, 1, 2), Decimal(3),
                     datetime(2020, 1, 2), pd.Timestamp(3), math.inf]),
)  # fmt: skip
words = st.text(max_size=3).filter(str.strip)
anything = st.recursive(
    st.one_of(scalars, words, nothing),
    lambda x: st.one_of(
        st.lists(x, max_size=2),
        st.lists(x, min_size=1, max_size=2).map(objects),
        st.lists(st.tuples(words, x), max_size=2),
        st.dictionaries(st.sampled_from(["role", "content", "ground_truth", "numbers", "target", "x"]), x, max_size=2),
    ),
    max_leaves=4,
)


lists = st.sampled_from([list, objects])
parts = st.lists(st.builds(lambda text: {"type": "text", "text": text}, words), min_size=1, max_size=2)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.one_of(words, words, parts)}
)
prompts = st.builds(lambda form, found: form(found), lists, st.lists(message, min_size=1, max_size=2))


def broken(found, message, at, form):
    found = list(found)
    found[at % len(found)] = message
    return form(found)


number = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.sampled_from([np.int64(3), np.bool_(True), Decimal(3)])
)
wrong_message = st.one_of(
    st.builds(lambda m, key: {k: v for k, v in m.items() if k != key}, message, st.sampled_from(["role", "content"])),
    st.builds(lambda m, x: m | {"content": x}, message, st.one_of(st.none(), number)),
    st.builds(lambda m, x: m | {"role": x}, message, st.one_of(scalars, nothing, parts)),
    anything.filter(lambda x: not isinstance(x, dict)),
)
wrong_prompts = st.one_of(
    st.builds(broken, st.lists(message, min_size=1, max_size=2), wrong_message, st.integers(0, 1), lists),
    st.builds(lambda found, form: form([m | {"content": " "} for m in found]), st.lists(message, max_size=2), lists),
    anything.filter(lambda x: not isinstance(x, list | np.ndarray)),
    message,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@cases(200)
@given(prompts)
def test_a_prompt_that_is_taken_has_its_text_in_the_template(tokenizer, prompt):
    assert wrong_prompt(prompt, "prompt") == ""
    shown = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    # Parts of texts and images are for models with a processor.
    assert all(m["content"].strip() in shown for m in prompt if isinstance(m["content"], str))


@cases(300)
@given(nothing, anything, scalars, words)
def test_nothing_at_any_depth_is_empty(none, any_, scalar, word):
    assert is_empty(none) and not is_empty(word) and not is_empty({"a": [none, word]})
    assert isinstance(is_empty(any_), bool) and is_empty([any_, none]) == is_empty(any_)


reward_models = st.builds(lambda truth: {"ground_truth": truth}, anything)


@cases(200)
@given(
    st.lists(
        st.tuples(st.booleans(), prompts, wrong_prompts, st.one_of(reward_models, anything)), min_size=1, max_size=5
    ),
    st.sampled_from([None, ground_truths, numbers_and_target]),
)
def test_each_wrong_row_is_counted_under_what_is_wrong(drawn, accept):
    rows = [(good if right else wrong, truth) for right, good, wrong, truth in drawn]
    frame = pd.DataFrame(
        {"prompt": objects([p for p, _ in rows]), "reward_model": objects([t for _, t in rows]), "data_source": "x"}
    )
    told = {}
    for text in wrong_rows(frame, ("prompt", "reward_model", "data_source"), accept):
        row, problem, count = re.fullmatch(r": row (\d+)(.+?)(?: \((\d+) such rows\))?", text, re.DOTALL).groups()
        told.setdefault(problem, (int(row), int(count or 1)))
    wrong = [i for i, (right, *_) in enumerate(drawn) if not right]
    truths = [wrong_truth(truth, accept) for _, truth in rows]
    assert sum(count for _, count in told.values()) == len(wrong) + sum(map(bool, truths))
    of_prompts = {p: at for p, at in told.items() if p not in truths}
    assert all("prompt" in problem for problem in of_prompts) and (not wrong or min(of_prompts.values())[0] == wrong[0])
    for i, problem in enumerate(truths):
        truth = rows[i][1]
        held = isinstance(truth, dict) and not is_empty(truth.get("ground_truth"))
        assert held or problem
        assert not problem or told[problem] == (truths.index(problem), truths.count(problem))
        assert problem or accept is None or accept(truth["ground_truth"])


columns = st.sampled_from(
    [
        pa.array([[{"role": "user", "content": "1+1?"}]] * 3),
        pa.array([[{"role": "user", "content": "1+1?"}], None, []]),
        pa.array([[[("role", "user")]], None, []], pa.list_(pa.map_(pa.string(), pa.string()))),
        pa.array([{"ground_truth": "1"}] * 3),
        pa.array([{"ground_truth": ["1"]}, None, {"ground_truth": []}]),
        pa.array([{"ground_truth": {"numbers": [1, 2], "target": 3}}, {"ground_truth": None}, None]),
        pa.array([{"ground_truth": {"numbers": [1.5], "target": math.inf}}] * 3),
        pa.array([[("ground_truth", "1")]] * 3, pa.map_(pa.string(), pa.string())),
        pa.array(["a", None, "b"]).dictionary_encode(),
        pa.array(["a", "b", "b"]),
        pa.array([["a"], None, ["b"]]),
        pa.array([{"a": 1}, None, {"a": 2}]),
        pa.array([1, None, 3]),
        pa.array([1.5, math.nan, None]),
        pa.array([b"a", None, b""]),
        pa.array([True, False, None]),
        pa.array([Decimal(1), None, Decimal(2)]),
        pa.array([date(2020, 1, 2), None, None]),
        pa.array([datetime(2020, 1, 2), None, None]),
        pa.nulls(3),
    ]
)
tables = st.dictionaries(
    st.sampled_from(["prompt", "reward_model", "data_source", "prompt", "reward_model", "data_source", "x"]), columns
)


@cases(50)
@given(
    tables,
    tables,
    st.integers(0, 3),
    st.sampled_from([None, "pkg://verl_ext.tasks.math.reward", "pkg://verl_ext.tasks.countdown.reward"]),
)
def test_any_parquet_file_is_fit_for_training_or_named(table, other, rows, grader):
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{folder}/{i}.parquet" for i in range(2)]
        for name, columns in zip(names, (table, other), strict=True):
            pq.write_table(pa.table(dict(columns)).slice(0, rows), name)
        config = OmegaConf.create(
            {
                "data": {
                    "train_files": names,
                    "val_files": names[0],
                    "prompt_key": "prompt",
                    "custom_cls": {"path": None},
                },
                "reward": {
                    "custom_reward_function": {"path": grader},
                    "reward_manager": {"source": "register", "name": "naive"},
                    "reward_model": {"enable": False},
                },
                "actor_rollout_ref": {
                    "rollout": {"agent": {"agent_loop_config_path": None, "default_agent_loop": "single_turn_agent"}}
                },
                "trainer": {"val_only": False, "val_before_train": True, "test_freq": 1},
            }
        )
        run = Run(config, OmegaConf.create())
        run.config = config
        found = [*check_data_files(run), *check_rows(run)]
    for name, columns in zip(names, (table, other), strict=True):
        right = rows and {"prompt", "reward_model", "data_source"} <= columns.keys()
        right = right and all(isinstance(p, list) and p for p in columns["prompt"].slice(0, rows).to_pylist())
        assert right or any(name in f.problem for f in found)
    assert all(f.fix for f in found if f.problem)


# Nodes ----------------------------------------------------------------------------------------------------------------

versions = st.fixed_dictionaries(
    {name: st.sampled_from([None, "0.9.1", "0.1.0 (aaaa)"]) for name in ("verl", "verl-disco")}
    | {"python": st.sampled_from(["/a", "/b"])}
)


@cases(100)
@given(versions, versions)
def test_a_node_differs_by_its_packages_not_by_its_place(found, here):
    told = nodes.compare(found, here)
    same = {n: v for n, v in found.items() if n != "python"} == {n: v for n, v in here.items() if n != "python"}
    assert (told == "") == same
    if told:
        differ = [name for name in ("verl-disco", "verl") if found[name] != here[name]]
        assert re.findall(r"(\S+) is (.+?)(?: and| \()", told + " (") and found["python"] in told
        assert [name for name in ("verl-disco", "verl") if f"{name} is " in told] == differ


place = st.one_of(st.sampled_from(["a", "b", "c", "nowhere", "a\0"]), st.none(), st.integers(0, 2))


@cases(100)
@given(
    st.one_of(place, st.lists(place, max_size=3)),
    place,
    st.booleans(),
    st.sets(st.sampled_from(["a", "b", "c", "run"])),
    st.booleans(),
)
def test_a_node_is_asked_for_what_is_here_and_absolute(train, model, absolute, unseen, with_folder):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("a", "b", "c", "run"):
            Path(folder, name).mkdir()

        def full(value):
            return f"{folder}/{value}" if isinstance(value, str) and absolute else value

        paths = [full(x) for x in train] if isinstance(train, list) else full(train)
        config = OmegaConf.create(
            {"data": {"train_files": paths}, "actor_rollout_ref": {"model": {"path": full(model)}}}
        )

        def ask(question):
            with tempfile.TemporaryDirectory() as hidden:
                for name in unseen:
                    os.rename(f"{folder}/{name}", f"{hidden}/{name}")
                try:
                    return {"node": question(), "silent": "no answer within 300 s"}
                finally:
                    for name in unseen:
                        os.rename(f"{hidden}/{name}", f"{folder}/{name}")

        patch.setattr(nodes, "ask_nodes", ask)
        found = nodes.what_is_not_seen(config, Path(folder, "run") if with_folder else None)
        assert list(Path(folder, "run").iterdir()) == []
    expected = {"trainer.default_local_dir"} if with_folder and "run" in unseen else set()
    for name, value in (("data.train_files", train), ("actor_rollout_ref.model.path", model)):
        texts = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, str)]
        if absolute and set(texts) <= set("abc") and set(texts) & unseen:
            expected.add(name)
    assert set(found.get("node", [])) == expected and found.keys() <= {"node"}


@cases(150)
@given(
    st.sampled_from(["", "ray://", "127.0.0.1:", "[::1]:", "\0:", "x" * 70 + ":"]),
    st.text(":0123456789-x/ ", max_size=7),
)
@example("127.0.0.1:", "99999")
@example("127.0.0.1:", f"{2**70}")
def test_only_a_port_of_16_bits_is_tried(host, rest):
    tried = []

    def connect(address, timeout):
        # Numbers alone: no name is looked up.
        socket.getaddrinfo(*address, flags=socket.AI_NUMERICHOST)
        tried.append(address)
        raise ConnectionRefusedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes.socket, "create_connection", connect)
        assert nodes.is_listening(host + rest) is False
    assert all(0 < port < 2**16 and (host + rest).strip().endswith(str(port)) for _, port in tried)


# The machine ----------------------------------------------------------------------------------------------------------


@cases(150)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]),
            st.sampled_from(["", ">=1.0", "<2", "==1.5", "!=1.5", "~=1.2", "[x]>=1"]),
            st.sampled_from(["", '; extra == "x"', '; python_version < "3"', '; python_version >= "3"']),
        ),
        max_size=4,
    ),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.sampled_from(["1.0", "1.5", "2.0rc1", "2.1+cpu", "1!0.5"])),
    st.booleans(),
)
def test_what_is_required_and_missing_is_named_with_its_command(required, installed, known):
    def requires(name):
        if not known:
            raise metadata.PackageNotFoundError(name)
        return ["".join(parts) for parts in required] or None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine.metadata, "requires", requires)
        patch.setattr(machine, "version_of", installed.get)
        found = list(machine.unmet_requirements("mine"))
    if not known:
        assert [f.fix for f in found] == ['pip install "mine"']
        return
    # By hand, in the order of the versions above.
    fits = {">=1.0": "1.0 1.5 2.0rc1 2.1+cpu 1!0.5", "<2": "1.0 1.5", "==1.5": "1.5", "~=1.2": "1.5"}
    fits |= {"!=1.5": "1.0 2.0rc1 2.1+cpu 1!0.5", "[x]>=1": fits[">=1.0"], "": fits[">=1.0"]}
    wanted = [
        name
        for name, range_, marker in required
        if marker in ("", '; python_version >= "3"') and installed.get(name) not in fits[range_].split()
    ]
    assert [f.name for f in found] == wanted and all(f.problem and f.fix.startswith("pip install") for f in found)


# Memory ---------------------------------------------------------------------------------------------------------------


@cases(10)
@given(
    st.sampled_from([Qwen2Config, Qwen3Config, Qwen3MoeConfig, MixtralConfig]),
    st.tuples(*[st.integers(1, 3)] * 4, st.sampled_from([16, 40]), st.integers(1, 5), st.booleans()),
)
@example(Qwen3MoeConfig, (1, 1, 1, 1, 16, 1, False))
@example(MixtralConfig, (1, 2, 1, 1, 16, 2, True))
def test_a_model_and_its_adapters_have_the_parameters_of_its_shape(kind, drawn):
    groups, heads, layers, width, inside, rank, tied = drawn
    config = kind(
        hidden_size=8 * groups * heads * (1 if kind is Qwen2Config else width), intermediate_size=inside,
        num_hidden_layers=layers, num_attention_heads=groups * heads, num_key_value_heads=heads, vocab_size=32,
        tie_word_embeddings=tied, max_position_embeddings=32,
        **({} if kind is Qwen2Config else {"head_dim": 8}),
        **({} if kind in (Qwen2Config, Qwen3Config) else {"num_experts_per_tok": 2, "num_local_experts": 3}),
        **({"moe_intermediate_size": 4} if kind is Qwen3MoeConfig else {}),
    )  # fmt: skip
    shape = Shape.of(config.to_dict())
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"), warnings.catch_warnings():
        # peft's, of patterns that other models need.
        warnings.simplefilter("ignore", RuntimeWarning)
        model = AutoModelForCausalLM.from_config(config)
        assert shape.parameters == sum(p.numel() for p in model.parameters() if p.dim() > 1)
        trained = sum(p.numel() for p in get_peft_model(model, lora).parameters() if p.requires_grad)
    assert lora_parameters(shape, rank) == trained
