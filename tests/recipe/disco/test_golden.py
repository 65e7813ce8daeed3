"""The reference vectors of the shared folder: gradient and KL of every case and every loss, in float64."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import oracle_gradient

from recipe.disco import disco_loss

SHARED = Path(os.environ.get("VERL_DISCO_SHARED") or Path(__file__).resolve().parents[3].parent / "shared")
CASES = range(6)
LOSSES = {
    "disco_b-log_L": {"objective": "disco_b", "score": "log_l"},
    "disco_b-L_ratio": {"objective": "disco_b", "score": "l_ratio"},
    "disco-log_L": {"objective": "disco", "score": "log_l"},
    "disco-L_ratio": {"objective": "disco", "score": "l_ratio"},
}

pytestmark = pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason=f"no golden vectors below {SHARED}")


def load(case, loss):
    """(inputs, settings, gradient, kl) of one golden vector."""
    with np.load(SHARED / "golden" / f"case{case}.npz") as file:
        data = {name: file[name] for name in file.files}
    inputs = [torch.from_numpy(data[k]) for k in ("log_prob", "old_log_prob", "response_mask", "reward", "uid")]
    settings = {name: float(data[name]) for name in ("tau", "delta", "beta")}
    settings["kl_estimator"] = {"kl": "k1", "low_var_kl": "k3"}[str(data["kl_type"])]
    return inputs, settings | LOSSES[loss], torch.from_numpy(data[f"{loss}/grad"]), float(data[f"{loss}/kl"])


def assert_gradient(found, expected):
    """1e-9 relative in every element: the golden gradients have no element that is a near-cancellation."""
    assert found.dtype == torch.float64
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_disco_loss_has_the_reference_gradient(case, loss):
    (log_prob, *rest), settings, gradient, kl = load(case, loss)
    log_prob.requires_grad_()
    value, metrics = disco_loss(log_prob, *rest, **settings)
    value.backward()
    assert_gradient(log_prob.grad, gradient)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_the_tests_own_oracle_has_the_reference_gradient(case, loss):
    (log_prob, old_log_prob, mask, reward, uid), settings, gradient, kl = load(case, loss)
    _, found, facts = oracle_gradient(log_prob, old_log_prob, mask, reward, uid.tolist(), **settings)
    assert_gradient(found, gradient)
    assert facts["kl"] == pytest.approx(kl, rel=1e-9)


def test_the_cases_reach_every_branch():
    """Without a nonzero hinge, an inactive one, both estimators and unmixed groups the vectors would settle less."""
    facts = []
    for case in CASES:
        (log_prob, old_log_prob, mask, reward, uid), settings, _, kl = load(case, "disco-log_L")
        sides = {u: {r for r, v in zip(reward.tolist(), uid.tolist(), strict=True) if v == u} for u in uid.tolist()}
        mixed = sum(len(side) == 2 for side in sides.values()) / len(sides)
        facts.append((kl > settings["delta"], settings["kl_estimator"], mixed))
    assert {active for active, _, _ in facts} == {True, False}
    assert {estimator for _, estimator, _ in facts} == {"k1", "k3"}
    assert min(mixed for *_, mixed in facts) == 0 and max(mixed for *_, mixed in facts) == 1
    assert any(0 < mixed < 1 for *_, mixed in facts)
