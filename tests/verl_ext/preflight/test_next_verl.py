"""verl's known next steps meet a refusal, not a wrong result."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf, open_dict

from verl_ext.preflight.checks import CHECKS, Needs
from verl_ext.preflight.trainer import check_next_verl, check_trainer
from verl_ext.preflight.unread import check_ignored


def found(config, whole_groups=True):
    run = SimpleNamespace(config=OmegaConf.create({"verl_ext": {"whole_groups": whole_groups}} | config))
    return [str(f) for f in check_next_verl(run)]


def test_it_is_among_the_checks_of_every_start():
    assert check_next_verl in CHECKS[Needs.SETTINGS]


@pytest.mark.parametrize("key", ["use_prefix_tree", "use_prefix_grouper"])
def test_shared_prefixes_are_refused_for_whole_groups_alone(key):
    on = {"actor_rollout_ref": {"model": {key: True}}}
    (text,) = found(on)
    assert f"actor_rollout_ref.model.{key}=True" in text and f"set actor_rollout_ref.model.{key}=False" in text
    assert not found(on, whole_groups=False)
    assert not found({"actor_rollout_ref": {"model": {key: False}}})


@pytest.mark.parametrize("node", ["", "trainer", "actor_rollout_ref.rollout"])
@pytest.mark.parametrize(
    "value, refused",
    [
        *[("mooncake", True), ({"name": "mooncake"}, True), ({"pool": 4}, True)],
        *[("transfer_queue", False), ("TransferQueue", False), ({"name": "transfer_queue"}, False), (None, False)],
    ],
)
def test_another_data_backend_is_refused_wherever_it_stands(node, value, refused):
    name = f"{node}.rollout_data_backend".lstrip(".")
    config = OmegaConf.create()
    OmegaConf.update(config, name, value, force_add=True)
    texts = found(OmegaConf.to_container(config), whole_groups=False)
    assert len(texts) == refused
    assert all(f"{name}={value}" in text and "set it to transfer_queue" in text for text in texts)


def test_the_installed_verl_passes(compose):
    assert not list(check_next_verl(SimpleNamespace(config=compose("algorithm=disco"))))


def test_a_verl_without_the_legacy_trainer_needs_no_switch(compose):
    config = compose("algorithm=disco").copy()
    with open_dict(config):
        del config.trainer["use_v1"]
    assert not list(check_trainer(SimpleNamespace(config=config)))
    # What only the legacy trainer reads is read by nothing then.
    other = config.copy()
    other.trainer.balance_batch = not config.trainer.balance_batch
    (finding,) = check_ignored(SimpleNamespace(composed=other, plain=config))
    assert "trainer.balance_batch" in str(finding)
