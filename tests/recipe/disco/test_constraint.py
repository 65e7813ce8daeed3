"""KL estimators and controllers: direction and scale from first principles, coefficients from finite differences."""

import json
import math

import numpy as np
import pytest
import torch
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from named import coefficient, penalty

from recipe.disco import disco_loss
from recipe.disco.constraint import build_controller, kl_estimate, kl_standard_error

KINDS = {
    "squared_hinge": {"delta": 0.02, "beta": 30.0},
    "augmented_lagrangian": {"delta": 0.02, "rho": 30.0},
    "fixed": {"coefficient": 0.7},
    "none": {},
}
ONES = torch.ones(1, 4, dtype=torch.bool)


def policies():
    """Two distributions over 4 tokens, as log-probabilities, and KL(old || new) by its definition."""
    old = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    new = torch.tensor([[0.25, 0.25, 0.3, 0.2]], dtype=torch.float64)
    return new.log(), old.log(), (old * (old / new).log()).sum().item()


@pytest.mark.parametrize("sigma, floor", [(0.01, 1e-4), (0.02, 4e-4)])
def test_rounding_noise_is_a_floor_of_k3_and_not_of_k1(sigma, floor):
    """Two passes of the same weights, each with noise of spread sigma in its log-probabilities: k3 says sigma^2."""
    torch.manual_seed(0)
    new, old = sigma * torch.randn(2, 1000, 1000, dtype=torch.float64)
    mask = torch.ones_like(new, dtype=torch.bool)
    assert kl_estimate(new, old, mask, "k3").mean() == pytest.approx(floor, rel=0.01)
    assert abs(kl_estimate(new, old, mask, "k1").mean()) < 0.2 * floor


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_estimate_is_unbiased_for_kl_old_new(estimator):
    """Weighted by pi_old the estimates are exactly KL(pi_old || pi_theta); the other direction would be another number.

    So is their gradient that of the KL, at pi_theta's own softmax parameters.
    """
    new, old, kl = policies()
    reverse = (new.exp() * (new - old)).sum().item()
    assert abs(kl - reverse) > 1e-3
    logits = new.clone().requires_grad_()
    estimate = (old.exp() * kl_estimate(logits.log_softmax(-1), old, ONES, estimator)).sum()
    assert estimate.item() == pytest.approx(kl, rel=1e-12)
    (grad,) = torch.autograd.grad(estimate, logits)
    torch.testing.assert_close(grad, new.exp() - old.exp(), rtol=1e-12, atol=1e-14)  # d KL(p || softmax(z)) / dz


def test_k1_and_k3_token_by_token():
    """Ratios 2, 1/2, 1 and e: k1 is -ln ratio, k3 is ratio - 1 - ln ratio."""
    old = torch.tensor([[-3.0, -1.0, -2.0, -4.0]], dtype=torch.float64)
    ln2 = math.log(2)
    new = old + torch.tensor([[ln2, -ln2, 0.0, 1.0]], dtype=torch.float64)
    assert kl_estimate(new, old, ONES, "k1")[0].tolist() == pytest.approx([-ln2, ln2, 0, -1], abs=1e-15)
    k3 = kl_estimate(new, old, ONES, "k3")[0].tolist()
    assert k3 == pytest.approx([1 - ln2, ln2 - 1 / 2, 0, math.e - 2], abs=1e-15)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
@cases(100)
def test_k3_is_never_negative_and_exceeds_k1_by_the_ratio_less_one(drift):
    drift = torch.tensor([drift], dtype=torch.float64)
    old, mask = torch.full_like(drift, -6.0), torch.ones_like(drift, dtype=torch.bool)
    k1, k3 = (kl_estimate(old + drift, old, mask, name) for name in ("k1", "k3"))
    assert (k3 >= -1e-14).all()
    torch.testing.assert_close(k3 - k1, ((old + drift) - old).exp() - 1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_small_drifts_keep_their_digits_in_float32(estimator):
    """k3 of a drift of -7e-4 is 2.7e-7, 4.5 times float32's spacing below 1: as r - 1 - log r it is 10 % off."""
    old = torch.full((1, 4), -0.5)
    drift = 3 * 2.0**-12
    new = old - drift
    exact = {"k1": drift, "k3": math.expm1(-drift) + drift}[estimator]
    found = kl_estimate(new, old, ONES, estimator)
    assert found.tolist() == [pytest.approx([exact] * 4, rel=1e-3)]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_before_the_difference(estimator, dtype):
    """-1 and -32 exactly: the ratio e^31 is beyond float16, and e - 2 beyond bfloat16's eight bits."""
    old = torch.full((1, 4), -32.0, dtype=dtype)
    new = torch.tensor([[-1.0, -32.0, -31.0, -30.0]], dtype=dtype)
    found = kl_estimate(new, old, ONES, estimator)
    assert found.dtype == torch.float32
    expected = kl_estimate(new.double(), old.double(), ONES, estimator)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_tokens_are_exactly_zero(estimator, junk):
    new = torch.tensor([[-1.0, junk, junk, -2.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.5, junk, -1.0, -1.0]], dtype=torch.float64)
    estimate = kl_estimate(new, old, torch.tensor([[True, False, False, True]]), estimator)
    estimate.sum().backward()
    assert estimate[0, 1:3].tolist() == [0, 0] and new.grad[0, 1:3].tolist() == [0, 0]
    assert estimate[0, [0, 3]].all() and new.grad[0, [0, 3]].all()


def test_unknown_estimators_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"(?s)kl_estimator.*k2.*k1.*k3"):
        kl_estimate(*policies()[:2], ONES, "k2")


def controller(kind, **other):
    return build_controller(kind, KINDS[kind] | other)


@pytest.mark.parametrize("multiplier_steps", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kl", [-0.5, -0.01, 0.0, 0.019, 0.021, 0.3, 4.0])
def test_the_coefficient_is_the_penaltys_derivative(kind, kl, multiplier_steps):
    """By central differences, before and after updates of the state."""
    c = controller(kind)
    for _ in range(multiplier_steps):
        c.end_step(0.034)
    h = 1e-6
    slope = (penalty(c, kl + h) - penalty(c, kl - h)) / (2 * h)
    assert coefficient(c, kl) == pytest.approx(slope, rel=1e-6, abs=1e-8)
    assert type(coefficient(c, kl)) is type(penalty(c, kl)) is float


def test_squared_hinge_in_numbers():
    """beta 30, delta .02: at KL .12 the coefficient is 30 * .1 and the penalty 15 * .01; up to delta both are 0."""
    c = controller("squared_hinge")
    assert (coefficient(c, 0.12), penalty(c, 0.12)) == (pytest.approx(3.0), pytest.approx(0.15))
    for kl in (-1.0, 0.0, 0.02):
        assert (coefficient(c, kl), penalty(c, kl)) == (0, 0)


def test_augmented_lagrangian_in_numbers():
    """rho 30, delta .02, lambda from 0. At KL .12: max(0, 0 + 30 * .1) = 3, penalty 9/60.
    After a step at .12 lambda is 3: at .02 the coefficient is 3 and the penalty 0; at -.18 it is max(0, 3 - 6) = 0 and
    the penalty -9/60. A step at .0 lowers lambda by .6; one at -1 takes it to 0, not below."""
    c = controller("augmented_lagrangian")
    assert (coefficient(c, 0.12), penalty(c, 0.12)) == (pytest.approx(3.0), pytest.approx(0.15))
    assert (coefficient(c, 0.0), penalty(c, 0.0)) == (0, 0)
    c.end_step(0.12)
    assert (coefficient(c, 0.02), penalty(c, 0.02)) == (pytest.approx(3.0), pytest.approx(0.0, abs=1e-15))
    assert (coefficient(c, -0.18), penalty(c, -0.18)) == (0, pytest.approx(-0.15))
    c.end_step(0.0)
    assert coefficient(c, 0.02) == pytest.approx(2.4)
    c.end_step(-1.0)
    assert coefficient(c, 0.02) == 0
    assert coefficient(c, 0.12) == pytest.approx(3.0)


def test_measuring_does_not_change_the_multiplier():
    """Once per step: several mini-batches may ask for the coefficient before the step ends."""
    c = controller("augmented_lagrangian")
    c.end_step(0.05)
    first = coefficient(c, 0.04)
    assert [coefficient(c, 0.04), penalty(c, 0.5) * 0 + coefficient(c, 0.04)] == [first, first]


def test_fixed_and_none_in_numbers():
    fixed, none = controller("fixed"), controller("none")
    for kl in (-0.3, 0.0, 0.01, 2.0):
        assert (coefficient(fixed, kl), penalty(fixed, kl)) == (0.7, pytest.approx(0.7 * kl))
        assert (coefficient(none, kl), penalty(none, kl)) == (0, 0)


def test_the_multiplier_meets_the_bound_where_the_hinge_cannot():
    """Maximise -(x - 1)^2 / 2 under KL(x) = x <= delta = .2: the best x is delta, with multiplier 1 - delta = .8.

    Each step solves (x - 1) + coefficient(x) = 0 by bisection. The hinge alone stops at (1 + rho delta)/(1 + rho).
    """

    def solve(c):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if middle - 1 + coefficient(c, middle) > 0 else (middle, high)
        return low

    hinge = build_controller("squared_hinge", {"delta": 0.2, "beta": 2.0})
    assert solve(hinge) == pytest.approx(1.4 / 3)
    multiplier = build_controller("augmented_lagrangian", {"delta": 0.2, "rho": 2.0})
    for _ in range(40):
        multiplier.end_step(solve(multiplier))
    assert solve(multiplier) == pytest.approx(0.2, abs=1e-9)
    assert coefficient(multiplier, 0.2) == pytest.approx(0.8, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_controller_goes_on_as_an_uninterrupted_one(kind):
    """Through JSON, as a checkpoint would; every number after the break is the same to the last bit."""
    history = [0.0312345678, math.sqrt(0.005), 1 / 90, 0.2, 0.004, 0.05]

    def follow(c, kls):
        out = []
        for kl in kls:
            out.append((coefficient(c, kl), penalty(c, kl)))
            c.end_step(kl)
        return out

    whole = follow(controller(kind), history)
    before, after = controller(kind), controller(kind)
    first = follow(before, history[:3])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert first + follow(after, history[3:]) == whole


def test_only_the_multiplier_needs_a_state():
    changed = {}
    for kind in KINDS:
        c = controller(kind)
        before = json.dumps(c.state_dict())
        c.end_step(0.5)
        changed[kind] = json.dumps(c.state_dict()) != before
    assert changed == {"squared_hinge": False, "augmented_lagrangian": True, "fixed": False, "none": False}


def test_a_checkpoint_without_the_multiplier_is_refused():
    """Starting over from 0 in silence would not be what an uninterrupted run does."""
    with pytest.raises((KeyError, ValueError)):
        controller("augmented_lagrangian").load_state_dict({})


def test_the_default_is_the_constraint_of_the_executable_definition():
    from recipe.disco import disco_loss

    old, new, _ = policies()
    settings = {"delta": 0.01, "beta": 40.0}
    _, metrics = disco_loss(new, old, ONES, torch.ones(1), [0], **settings)
    c = build_controller("squared_hinge", settings)
    kl = kl_estimate(new, old, ONES, "k1").mean().item()
    assert coefficient(c, kl) > 0
    assert metrics["coefficient"] == pytest.approx(coefficient(c, kl))
    assert metrics["penalty"] == pytest.approx(penalty(c, kl))


def test_settings_that_a_kind_does_not_use_are_left_alone():
    """All of `disco:` is handed over; only the kind's own constants count."""
    everything = {"delta": 0.1, "beta": 2.0, "rho": -1.0, "coefficient": math.nan, "tau": 1.0}
    assert coefficient(build_controller("squared_hinge", everything), 0.6) == pytest.approx(1.0)


def test_an_unknown_kind_is_refused_with_the_choices():
    with pytest.raises(ValueError) as error:
        build_controller("hinge", KINDS["squared_hinge"])
    for part in ["constraint", "hinge", *KINDS]:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("squared_hinge", "delta", -0.1),
        ("squared_hinge", "delta", math.nan),
        ("squared_hinge", "beta", -1.0),
        ("squared_hinge", "beta", math.inf),
        ("augmented_lagrangian", "delta", -0.1),
        ("augmented_lagrangian", "rho", 0.0),  # the penalty divides by it
        ("augmented_lagrangian", "rho", -2.0),
        ("augmented_lagrangian", "rho", math.nan),
        ("fixed", "coefficient", -0.5),
        ("fixed", "coefficient", math.nan),
        ("fixed", "coefficient", "a lot"),
    ],
)
def test_constants_out_of_range_are_refused_by_name_and_value(kind, setting, value):
    with pytest.raises(ValueError) as error:
        controller(kind, **{setting: value})
    assert setting in str(error.value) and str(value) in str(error.value), str(error.value)


def clusters(rng, responses, between, within):
    """Responses' sums of a token quantity of mean 0 whose tokens share a part, and their lengths."""
    length = rng.integers(1, 60, responses)
    shared = rng.normal(0, between, responses)
    return np.array([n * s + within * rng.normal(0, n**0.5) for n, s in zip(length, shared, strict=True)]), length


def test_the_standard_error_is_that_of_a_ratio_of_sums_over_responses():
    kl_sum, length = clusters(np.random.default_rng(0), 40, 0.02, 0.1)
    m, tokens, kl = len(length), length.sum(), kl_sum.sum() / length.sum()
    expected = math.sqrt(m / (m - 1) * sum((k - n * kl) ** 2 for k, n in zip(kl_sum, length, strict=True))) / tokens
    # A response without a token and padding change nothing.
    padded = (torch.tensor([*kl_sum, 0.0, 7.0]), torch.tensor([*length, 0, 0]))
    assert kl_standard_error(*padded) == pytest.approx(expected, rel=1e-12)
    assert kl_standard_error(torch.tensor([0.3]), torch.tensor([5])) is None
    assert kl_standard_error(torch.tensor([0.3, 0.0]), torch.tensor([5, 0])) is None
    # Every token the same: known exactly.
    assert kl_standard_error(torch.tensor([0.5, 1.5]), torch.tensor([1, 3])) == 0


@pytest.mark.parametrize("between, within", [(0.02, 0.1), (0.0, 0.1), (0.05, 0.01)])
def test_the_standard_error_is_the_spread_over_mini_batches(between, within):
    rng = np.random.default_rng(1)
    found = []
    for _ in range(2000):
        kl_sum, length = clusters(rng, 64, between, within)
        error = kl_standard_error(torch.from_numpy(kl_sum), torch.from_numpy(length))
        found.append((kl_sum.sum() / length.sum(), error))
    spread, stated = np.std([kl for kl, _ in found]), np.mean([error for _, error in found])
    assert stated == pytest.approx(spread, rel=0.06)
    if between:
        # Tokens as if they were independent would promise far more.
        independent = math.hypot(between, within) / math.sqrt(64 * 30)
        assert independent < 0.75 * spread


def test_the_loss_logs_the_standard_error():
    g = torch.Generator().manual_seed(0)
    log_prob, old = (-torch.rand(6, 5, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([5, 3, 0, 1, 4, 2])[:, None]
    _, metrics = disco_loss(log_prob, old, mask, torch.tensor([1.0, 0, 0, 1, 0, 0]), [0, 0, 0, 1, 1, 1])
    expected = kl_standard_error(torch.where(mask, old - log_prob, 0).sum(1), mask.sum(1))
    assert metrics["kl_standard_error"] == pytest.approx(expected, rel=1e-12)
    _, single = disco_loss(log_prob[:1], old[:1], mask[:1], torch.ones(1), [0])
    assert "kl_standard_error" not in single
