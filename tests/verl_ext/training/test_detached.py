"""pi_old, kept while the weights lie in host memory that a copy from the device is still filling."""

from types import SimpleNamespace

import pytest
import torch

from verl_ext.training import detached
from verl_ext.training.detached import DetachedWorker


class Device:
    """An offload that verl has started and not waited for: the host has the weights once the device was asked."""

    def __init__(self, pending: dict):
        self.pending = pending

    def synchronize(self):
        with torch.no_grad():
            for p, value in self.pending.items():
                p.copy_(value)
        self.pending = {}


@pytest.fixture
def offloaded(monkeypatch):
    """A worker whose weights will be 1, and are 0 in host memory so far."""
    module = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    device = Device({module.weight: torch.ones(1, 2)})
    monkeypatch.setattr(detached, "get_torch_device", lambda: device, raising=False)
    worker = object.__new__(DetachedWorker)
    worker.config = SimpleNamespace(actor=SimpleNamespace(strategy="fsdp2"))
    worker.actor = SimpleNamespace(engine=SimpleNamespace(module=module))
    # As verl's for fsdp2, whose parameters here are no DTensors: no copy where a weight is on the CPU already.
    worker._strategy_handlers = (
        lambda model: ({n: (p.detach().cpu(), None) for n, p in model.named_parameters()}, None),
        lambda model, state, spec: model.weight.data.copy_(state["weight"][0]),
    )
    return worker, module.weight


def test_a_model_is_saved_as_it_is_on_the_device(offloaded):
    worker, weight = offloaded
    worker.save_model_to_cpu(0)
    weight.data.fill_(5.0)
    assert worker.cpu_saved_models[0][0]["weight"][0].tolist() == [[1.0, 1.0]]


def test_a_restored_model_is_not_overwritten_by_an_older_copy(offloaded):
    worker, weight = offloaded
    worker.cpu_saved_models = {0: ({"weight": (torch.full((1, 2), 3.0), None)}, None)}
    worker.restore_model_from_cpu(0)
    detached.get_torch_device().synchronize()
    assert weight.tolist() == [[3.0, 3.0]]


def test_a_saved_model_comes_back(offloaded):
    worker, weight = offloaded
    worker.save_model_to_cpu(0)
    weight.data.fill_(5.0)
    worker.restore_model_from_cpu(0)
    assert weight.tolist() == [[1.0, 1.0]]
