"""Rows are taken apart by verl's keys and no others; batches keep their order; one module makes the calls."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transfer_queue
from tensordict import TensorDict

from verl_ext.training import transfer
from verl_ext.training.transfer import RowKey, parse_key

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "key, parts",
    [
        ("0f3a-77_0_0", ("0f3a-77", 0, 0)),
        ("0f3a-77_12_3", ("0f3a-77", 12, 3)),
        ("pad0f3a_5_0", ("pad0f3a", 5, 0)),
    ],
)
def test_verls_keys_are_taken_apart_and_put_together(key, parts):
    assert parse_key(key) == RowKey(*parts)
    assert str(parse_key(key)) == key


# The marker of a session, as verl may store it among the rows; a question's own entry; a part more, or less.
@pytest.mark.parametrize(
    "key", ["u_sess0", "u_sess1_0", "u_sess1_0_0", "u_0_sess1", "u", "u_0", "u_0_0_0", "u_0_x", "u_0_-1", "_0_0", ""]
)
def test_keys_of_another_shape_are_refused_by_name(key):
    with pytest.raises(ValueError, match=f"the key {key!r} of a batch"):
        parse_key(key)


def test_a_batch_is_read_and_written_under_its_keys(monkeypatch):
    calls = []

    def answer(**call):
        calls.append(call)
        return SimpleNamespace(keys=call["keys"])

    monkeypatch.setattr(transfer_queue, "kv_batch_get", answer)
    monkeypatch.setattr(transfer_queue, "kv_batch_put", answer)
    batch = SimpleNamespace(keys=["b_0_0", "a_0_0"], partition_id="train")
    fields = TensorDict({"x": torch.zeros(2)}, batch_size=2)
    transfer.read(batch)
    transfer.read(batch, ("x",), rows=slice(1))
    transfer.write(batch, fields)
    transfer.put("val", ("a",), [{"status": "finished"}])
    assert calls == [
        {"keys": ["b_0_0", "a_0_0"], "partition_id": "train", "select_fields": None},
        {"keys": ["b_0_0"], "partition_id": "train", "select_fields": ["x"]},
        {"keys": ["b_0_0", "a_0_0"], "partition_id": "train", "fields": fields},
        {"keys": ["a"], "partition_id": "val", "tags": [{"status": "finished"}], "fields": None},
    ]


def test_rows_that_come_back_in_another_order_are_noticed(monkeypatch):
    monkeypatch.setattr(transfer_queue, "kv_batch_put", lambda **call: SimpleNamespace(keys=call["keys"][::-1]))
    batch = SimpleNamespace(keys=["b_0_0", "a_0_0"], partition_id="train")
    with pytest.raises(AssertionError):
        transfer.write(batch, TensorDict({}, batch_size=2))


def test_no_other_module_imports_transfer_queue():
    found = set()
    for path in (p for top in ("recipe", "verl_ext", "hydra_plugins") for p in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            if any(name.split(".")[0] == "transfer_queue" for name in names):
                found.add(str(path.relative_to(ROOT)))
    assert found == {"verl_ext/training/transfer.py"}
