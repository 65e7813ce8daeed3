"""`disco_loss` against the vectors in this folder, which make.py computes another way: values, prices, gradients."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipe.disco import disco_loss
from recipe.disco.constraint import AugmentedLagrangian

HERE = Path(__file__).parent
BATCHES = {
    name: json.loads((HERE / f"{name}.json").read_text()) for name in ("uneven", "unmixed", "pair", "far", "graded")
}
CASES = [(name, i) for name, batch in BATCHES.items() for i in range(len(batch["variants"]))]
# Relative to the largest of a gradient, and of a value.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5}


def padded(rows: list[list[float]], dtype: torch.dtype) -> torch.Tensor:
    """Rows with a token's place of padding on either side, which holds no number."""
    width = max(map(len, rows)) + 2
    return torch.tensor([[float("nan"), *row, *[float("nan")] * (width - 1 - len(row))] for row in rows], dtype=dtype)


def run(batch: dict, settings: dict, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, float], torch.Tensor]:
    log_prob, old, ref, rho = (
        padded(batch[k], dtype) for k in ("log_prob", "old_log_prob", "ref", "rollout_is_weights")
    )
    log_prob.requires_grad_()
    more = {"rollout_is_weights": rho} if settings.get("rollout_is_weights") else {}
    if settings.get("score") == "log_ratio_ref":
        more["ref_log_prob"] = ref
    reward = torch.tensor(batch["reward"], dtype=dtype)
    loss, metrics = disco_loss(log_prob, old, ~log_prob.isnan(), reward, batch["uid"], **settings | more)
    loss.backward()
    return loss, metrics, log_prob.grad


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name, i", CASES)
def test_the_loss_is_as_computed_in_decimal_arithmetic(name, i, dtype):
    batch = BATCHES[name]
    variant = batch["variants"][i]
    tau, rtol = variant["settings"].get("tau", 1), TOLERANCE[dtype]
    loss, metrics, found = run(batch, variant["settings"], dtype)
    assert loss.dtype == found.dtype == dtype
    # tau log(1 + x / tau) loses digits by tau.
    atol = max(rtol, 4 * torch.finfo(dtype).eps * tau)
    for key in ("objective", "kl", "penalty", "coefficient"):
        assert metrics[key] == pytest.approx(variant[key], rel=rtol, abs=atol), key
    assert loss.item() == pytest.approx(variant["loss"], rel=rtol, abs=atol)
    expected = padded(variant["gradient"], dtype)
    assert (found[expected.isnan()] == 0).all()
    expected = expected.nan_to_num()
    # Shares of exp(s / tau) have an error of that of s / tau.
    share = max(rtol, 8 * torch.finfo(dtype).eps / tau)
    torch.testing.assert_close(found, expected, rtol=share, atol=share * float(expected.abs().max()))
    # Questions of one kind have no part in the loss where the constraint costs nothing. (1e-25: a share too small for
    # the difference to show.)
    assert (found[expected == 0].abs() < 1e-25).all()


def test_the_vectors_reach_every_branch():
    """Without active and inactive constraints, empty rows and unmixed questions they would settle less."""
    variants = [v for batch in BATCHES.values() for v in batch["variants"]]
    for name, wanted in {
        "objective": {"disco", "disco_b", "drpo", "real", "maxrl", "conspo"},
        "questions": {"failure_rate", "dgpo", "grpo", None},
        "pairs": {"graded", None},
        "score": {"log_l", "l_ratio", "log_ratio", "log_ratio_ref", None},
        "surrogate": {"identity", "logistic", "squared_hinge", None},
        "negatives": {"softmax", "mean", "topk", None},
        "constraint": {"augmented_lagrangian", "fixed", "none", None},
        "kl_estimator": {"k1", "k3", None},
    }.items():
        assert {v["settings"].get(name) for v in variants} == wanted
    by_hinge = [v["coefficient"] > 0 for v in variants if "constraint" not in v["settings"]]
    assert set(by_hinge) == {True, False}
    assert any(not row for row in BATCHES["uneven"]["log_prob"])
    assert all(v["objective"] == 0 for v in BATCHES["unmixed"]["variants"])


def test_the_multiplier_goes_as_computed_in_decimal_arithmetic():
    file = json.loads((HERE / "augmented_lagrangian.json").read_text())
    controller = AugmentedLagrangian(delta=file["delta"], rho=file["rho"])
    for step in file["steps"]:
        kl = torch.tensor(step["kl"], dtype=torch.float64, requires_grad=True)
        penalty = controller.penalty(kl)
        penalty.backward()
        controller.end_step(step["kl"])
        found = (penalty.item(), kl.grad.item(), controller.multiplier)
        assert found == pytest.approx([step[k] for k in ("penalty", "coefficient", "multiplier_after")], rel=1e-12)
    assert {step["multiplier_after"] > 0 for step in file["steps"]} == {True, False}


def test_the_script_writes_these_files(tmp_path):
    subprocess.run([sys.executable, "-I", "-S", str(HERE / "make.py"), str(tmp_path)], check=True, timeout=120)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in HERE.glob("*.json")}
