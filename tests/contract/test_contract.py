"""The contract with verl: as the installed verl has it, as our sources use it, and how a change of verl is reported."""

import ast
import inspect
import re
from dataclasses import fields, replace

import installed
import pytest
from contract import FILE, TODO, Contract, changes, rewrite, unused, unwritten
from uses import find_uses
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import seqlen_balancing

TRAINER = "verl.trainer.ppo.v1.trainer_base.PPOTrainer"


@pytest.fixture(scope="module")
def contract():
    return Contract.load()


@pytest.fixture(scope="module")
def uses(contract):
    return contract.uses()


def lines(found):
    return "\n".join(["", *found])


def test_the_installed_verl_is_as_the_contract_says(contract, uses):
    changed = list(changes(contract, uses))
    assert not changed, lines(changed)


def test_the_contract_lists_all_that_we_use_and_nothing_else(contract, uses):
    wrong = [*unwritten(contract, uses), *unused(contract, uses)]
    assert not wrong, lines(wrong)


def test_everything_has_a_reason(contract):
    reasons = {n: r for n, (_, r) in (*contract.names.items(), *contract.texts.items())}
    reasons |= contract.settings | contract.data
    assert not [n for n, r in reasons.items() if not r or r == TODO]


# What a reader is told ------------------------------------------------------------------------------------------------


def told(contract, uses, name):
    """What is reported of this entry."""
    parts = {f.name: getattr(contract, f.name) for f in fields(contract) if f.name not in ("types", "parameters")}
    alone = {k: {n: x for n, x in part.items() if n == name} for k, part in parts.items() if isinstance(part, dict)}
    (text,) = changes(Contract(**alone), uses)
    return text


def test_other_parameters_are_reported_with_both_and_the_places(contract, uses, monkeypatch):
    def log_seqlen_unbalance(seqlen_list, partitions, prefix, *, ranks=None):
        pass

    monkeypatch.setattr(seqlen_balancing, "log_seqlen_unbalance", log_seqlen_unbalance)
    text = told(contract, uses, "verl.utils.seqlen_balancing.log_seqlen_unbalance")
    assert "was (seqlen_list, partitions, prefix), is (seqlen_list, partitions, prefix, *, ranks=None)" in text
    assert "for: verl's metrics of the balance" in text
    assert "used in: verl_ext/training/trainer.py:" in text


def test_a_method_that_is_gone_is_reported_with_what_has_almost_its_name(contract, uses, monkeypatch):
    monkeypatch.setattr(PPOTrainer, "_balance_batches", PPOTrainer._balance_batch, raising=False)
    monkeypatch.delattr(PPOTrainer, "_balance_batch")
    text = told(contract, uses, f"{TRAINER}._balance_batch")
    assert "is missing (nearest: _balance_batches" in text and "used in: verl_ext/training/trainer.py:" in text


def test_an_attribute_that_instances_no_longer_have_is_reported(contract, uses, monkeypatch):
    source = inspect.getsourcefile(PPOTrainer)
    tree = ast.parse(open(source).read().replace("self.global_steps", "self.step_number"))
    real = installed._tree
    monkeypatch.setattr(installed, "_tree", lambda file: tree if str(file) == source else real(file))
    assert "is missing" in told(contract, uses, f"{TRAINER}.global_steps")


def test_a_renamed_setting_is_reported_with_the_new_name(contract, uses, monkeypatch):
    known = {n.replace("trainer.test_freq", "trainer.eval_test_freq") for n in installed.settings()}
    monkeypatch.setattr(installed, "settings", lambda: known)
    text = told(contract, uses, "trainer.test_freq")
    assert "is no setting (nearest: trainer.eval_test_freq" in text
    assert re.search(r"used in: .*verl_ext/runs/folder.py:", text)


def test_a_column_and_a_file_that_verl_no_longer_names_are_reported(contract, uses, monkeypatch):
    gone = {"rm_scores", "data.pt"}
    real = installed.texts
    monkeypatch.setattr(installed, "texts", lambda part: real(part) - gone)
    text = told(contract, uses, "rm_scores")
    assert "'rm_scores' is in none of verl's files" in text and "used in: verl_ext/training/trainer.py:" in text
    text = told(contract, uses, "data.pt")
    assert "'data.pt' is not in verl.trainer" in text and "used in: verl_ext/training/resume.py:" in text


# What is found in sources ---------------------------------------------------------------------------------------------

SOURCE = '''
"""trainer.in_a_docstring"""
from omegaconf import OmegaConf, DictConfig
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import TrainingWorker
import verl.utils.model


class Mixin:
    def mixed(self):
        return self.of_verl, self.mine


class Worker(Mixin, TrainingWorker):
    mine = 1

    def train_batch(self, data):
        self.engine.get_data_parallel_group()
        tu.pop(data, key="a_fact")
        return super().train_batch(data["a_column"])


def read(config: DictConfig, flag):
    trainer, rate = config.trainer, config.trainer.v1.get("rate")
    verl.utils.model.load_valuehead_model = None
    setattr(TrainingWorker, "infer_batch", None)
    OmegaConf.select(config, "algorithm.chosen")
    if trainer.nested.flag and "in_it" in config.data:
        raise ValueError(f"set actor_rollout_ref.rollout.told={flag}")
    return ["verl.a_module", "VERL_SWITCH=1"]
'''


@pytest.fixture(scope="module")
def small(contract):
    worker = "verl.workers.engine_workers.TrainingWorker"
    return find_uses(contract.types, {"Mixin": worker, "config": "settings"}, {"a.py": ast.parse(SOURCE)})


def test_names_of_verl_are_followed(small):
    worker = "verl.workers.engine_workers.TrainingWorker"
    assert set(small["names"]) == {
        "verl.a_module",
        "verl.utils.model.load_valuehead_model",
        "verl.utils.tensordict_utils.pop",
        *(f"{worker}.{name}" for name in ("engine", "infer_batch", "of_verl", "mine", "train_batch")),
        "verl.workers.engine.fsdp.transformer_impl.FSDPEngine.get_data_parallel_group",
    }
    assert {f"{worker}.train_batch", f"{worker}.mixed", f"{worker}.mine"} == set(small["overrides"])
    assert small["names"]["verl.a_module"] == {"a.py:30"}


def test_settings_and_data_are_followed(small):
    assert set(small["settings"]) == {
        *("trainer.v1.rate", "trainer.nested.flag", "algorithm.chosen", "data.in_it"),
        "actor_rollout_ref.rollout.told",
    }
    assert {"a_fact", "a_column", "key"} <= set(small["words"]) and set(small["variables"]) == {"VERL_SWITCH"}


MORE = """
from verl.workers.engine_workers import TrainingWorker

class Worker(TrainingWorker):
    def train_batch(self, data):
        self.reset()

def read(config):
    return config.trainer.use_legacy
"""


def test_what_the_contract_does_not_list_is_named_with_its_place(contract):
    worker = "verl.workers.engine_workers.TrainingWorker"
    uses = find_uses(contract.types, contract.parameters, {"a.py": ast.parse(MORE)})
    names = {n: x for n, x in contract.names.items() if n != f"{worker}.train_batch"}
    assert list(unwritten(replace(contract, names=names), uses)) == [
        f"{name} is used in a.py:{line}, but not in contract.yaml"
        for name, line in ((f"{worker}.reset", 6), (f"{worker}.train_batch", 4), ("trainer.use_legacy", 9))
    ]


def test_what_nothing_uses_any_more_is_named(contract, uses):
    contract = Contract.load()
    contract.names["verl.utils.device.get_device_id"] = "()", "no reason"
    contract.settings["trainer.v1.gone"] = contract.data["gone_column"] = "no reason"
    contract.texts["gone.txt"] = "verl", "no reason"
    assert list(unused(contract, uses)) == [
        f"{name} is in contract.yaml, but used nowhere"
        for name in ("verl.utils.device.get_device_id", "trainer.v1.gone", "gone_column", "'gone.txt'")
    ]


# Reading verl ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("verl.utils.seqlen_balancing.log_seqlen_unbalance", f"{TRAINER}._balance_batch", f"{TRAINER}.global_steps"),
        *(f"{TRAINER}.gone", "verl.no_module", "verl.workers.engine_workers.TrainingWorker.save_checkpoint"),
    ],
)
def test_a_module_that_cannot_be_imported_is_read_alike(name, monkeypatch):
    imported = installed.describe(name)

    def fail(name):
        raise ValueError("vllm version None not supported")

    monkeypatch.setattr(installed, "_imported", fail)
    assert installed.describe(name) == imported


def test_what_every_class_has_is_none_of_verls():
    assert installed.describe(f"{TRAINER}.__eq__") is None


def test_the_file_is_brought_up_to_date_and_keeps_its_reasons(uses, tmp_path, contract):
    file = tmp_path / "contract.yaml"
    text = FILE.read_text()
    old = text.replace("log_seqlen_unbalance(seqlen_list,", "log_seqlen_unbalance(lengths,")
    file.write_text(old.replace("    get_torch_device(): waits for copies from the device\n", "    gone: x\n"))
    rewrite(uses, file)
    names = Contract.load(file).names
    assert names["verl.utils.device.get_torch_device"] == ("()", TODO)
    del names["verl.utils.device.get_torch_device"]
    assert names == {n: x for n, x in contract.names.items() if n != "verl.utils.device.get_torch_device"}
