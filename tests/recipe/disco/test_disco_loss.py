"""The contract of `disco_loss` around the formula: what it accepts, what it ignores, what it refuses and how."""

import math

import numpy as np
import pytest
import torch
from named import compute_score, weigh
from oracle import oracle_gradient

from recipe.disco import disco_loss
from recipe.disco.loss import micro_batch_loss
from recipe.disco.scores import SCORES

UIDS = [0, 1, 0, 1, 2, 0, 1, 2]
SETTINGS = {
    "objective": "disco",
    "score": "log_l",
    "tau": 0.7,
    "delta": 1e-3,
    "beta": 50.0,
    "kl_estimator": "k1",
}


def example(seed=0):
    """8 responses of 3 questions: two mixed, one all negative; lengths 1..6; KL well above delta."""
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(np.arange(6) < np.array([6, 1, 3, 4, 2, 5, 6, 3])[:, None]).double()
    old_log_prob = torch.from_numpy(-rng.exponential(1.5, (8, 6)))
    log_prob = old_log_prob - torch.from_numpy(rng.normal(0.2, 0.3, (8, 6)))
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    return log_prob, old_log_prob, mask, reward, list(UIDS)


def gradient(log_prob, *rest, **settings):
    """(loss, gradient, metrics) of disco_loss at log_prob's own dtype."""
    leaf = log_prob.detach().clone().requires_grad_()
    loss, metrics = disco_loss(leaf, *rest, **settings)
    loss.backward()
    return loss, leaf.grad, metrics


def test_loss_is_a_scalar_and_metrics_are_floats():
    loss, grad, metrics = gradient(*example(), **SETTINGS)
    assert loss.shape == () and grad.abs().sum() > 0
    assert {type(v) for v in metrics.values()} == {float}
    assert {
        "objective",
        "objective_positive",
        "objective_negative",
        "score_positive",
        "score_negative",
        "kl",
        "coefficient",
        "penalty",
        "groups_mixed",
        "groups_all_positive",
        "groups_all_negative",
        "effective_negatives",
        "auc",
        "length_positive",
        "length_negative",
        "empty_responses",
    } <= metrics.keys()


@pytest.mark.parametrize("objective", ["disco", "disco_b"])
@pytest.mark.parametrize("score", ["log_l", "l_ratio"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
def test_the_value_is_what_the_gradient_is_the_gradient_of(objective, score, kl_estimator):
    """Finite differences on the returned value: a surrogate with the right gradient and a wrong value fails here."""
    log_prob, *rest = example()
    settings = SETTINGS | {"objective": objective, "score": score, "kl_estimator": kl_estimator}
    leaf = log_prob.clone().requires_grad_()
    loss, metrics = disco_loss(leaf, *rest, **settings)
    assert metrics["coefficient"] > 0, "the example no longer reaches the hinge"
    assert torch.autograd.gradcheck(lambda x: disco_loss(x, *rest, **settings)[0], leaf)
    assert loss.item() == pytest.approx(metrics["penalty"] - metrics["objective"], rel=1e-12)
    assert metrics["objective"] == pytest.approx(metrics["objective_positive"] - metrics["objective_negative"])


@pytest.mark.parametrize("score", ["log_l", "l_ratio"])
def test_the_behaviour_policy_is_a_constant(score):
    """On policy a caller may hand in one tensor twice; if it counted as pi_old's too, every ratio's gradient were 0."""
    log_prob, _, *rest = example()
    settings = SETTINGS | {"score": score, "delta": 0.0}
    _, expected, _ = gradient(log_prob, log_prob.clone(), *rest, **settings)
    leaf = log_prob.clone().requires_grad_()
    disco_loss(leaf, leaf, *rest, **settings)[0].backward()
    assert expected.any() and torch.equal(leaf.grad, expected)


def test_evaluating_without_a_graph_gives_the_same_numbers():
    inputs = example()
    loss, _, metrics = gradient(*inputs, **SETTINGS)
    with torch.no_grad():
        value, same_metrics = disco_loss(*inputs, **SETTINGS)
    assert torch.equal(value, loss) and same_metrics == metrics and not value.requires_grad


def test_inputs_are_not_modified():
    inputs = example()
    before = [x.clone() for x in inputs[:4]]
    gradient(*inputs, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs[:4], strict=True))
    assert inputs[4] == UIDS


@pytest.mark.parametrize(
    "as_uid",
    [
        pytest.param(lambda u: [f"q{x}" for x in u], id="str"),
        pytest.param(lambda u: [("set", x) for x in u], id="pair"),
        pytest.param(lambda u: tuple(x - 5 for x in u), id="negative-int"),
        pytest.param(lambda u: [None if x == 0 else x for x in u], id="none"),
        pytest.param(lambda u: [{0: 1, 1: "1", 2: "01"}[x] for x in u], id="equal-only-as-text"),
        pytest.param(lambda u: np.array([f"q{x}" for x in u], dtype=object), id="object-array"),
        pytest.param(lambda u: np.array([f"q{x}" for x in u]), id="str-array"),
        pytest.param(lambda u: np.array(u), id="int-array"),
        pytest.param(lambda u: torch.tensor(u), id="int64"),
        pytest.param(lambda u: torch.tensor(u, dtype=torch.int32), id="int32"),
        pytest.param(lambda u: torch.tensor(u) + 2**53, id="int64-beyond-float64"),
    ],
)
def test_uid_may_be_anything_that_tells_questions_apart(as_uid):
    *inputs, uid = example()
    loss, grad, metrics = gradient(*inputs, uid, **SETTINGS)
    same_loss, same_grad, same_metrics = gradient(*inputs, as_uid(uid), **SETTINGS)
    assert torch.equal(loss, same_loss) and torch.equal(grad, same_grad) and metrics == same_metrics


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16])
def test_the_mask_may_have_any_dtype(dtype):
    log_prob, old_log_prob, mask, reward, uid = example()
    _, expected, _ = gradient(log_prob, old_log_prob, mask, reward, uid, **SETTINGS)
    _, found, _ = gradient(log_prob, old_log_prob, mask.to(dtype), reward, uid, **SETTINGS)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64, torch.bfloat16])
def test_the_reward_may_have_any_dtype(dtype):
    log_prob, old_log_prob, mask, reward, uid = example()
    _, expected, _ = gradient(log_prob, old_log_prob, mask, reward, uid, **SETTINGS)
    _, found, _ = gradient(log_prob, old_log_prob, mask, reward.to(dtype), uid, **SETTINGS)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("score", ["log_l", "l_ratio"])
def test_bfloat16_is_accumulated_in_float32(score):
    """64 responses of 3000 tokens with a drift of 1/64 a token, exact in bfloat16. A bfloat16 sum of so many terms
    stops growing long before its end, and a bfloat16 result is off by 2^-8; a float32 accumulation is at 1e-5."""
    rng = np.random.default_rng(0)
    old_log_prob = torch.from_numpy(-rng.integers(8, 64, (64, 3000)) / 32).bfloat16()
    log_prob = old_log_prob - torch.tensor(1 / 64, dtype=torch.bfloat16)
    log_prob = torch.where(old_log_prob > -1, log_prob, old_log_prob)
    mask = torch.ones(64, 3000)
    reward, uid = torch.from_numpy(rng.integers(0, 2, 64)), np.arange(64) // 8
    settings = SETTINGS | {"score": score, "beta": 1e3}
    loss, grad, metrics = gradient(log_prob, old_log_prob, mask, reward, uid, **settings)
    value, exact, facts = oracle_gradient(log_prob, old_log_prob, mask, reward, uid.tolist(), **settings)
    assert grad.dtype == torch.bfloat16
    assert loss.dtype in (torch.float32, torch.float64)
    assert loss.item() == pytest.approx(value, rel=1e-5, abs=1e-5)
    assert metrics["kl"] == pytest.approx(facts["kl"], rel=1e-5)
    # the gradient is stored in bfloat16, so rounded once, by up to half a unit in its last place, 2^-8;
    # more would mean that the objective's and the constraint's share were rounded before they were added
    torch.testing.assert_close(grad.double(), exact, rtol=1.01 * 2**-8, atol=1e-10)

    kept = mask.bool()
    scores = compute_score(score, log_prob, old_log_prob, kept)
    assert scores.dtype == torch.float32
    _, weight = weigh("disco", scores, reward >= 1, torch.from_numpy(uid), kept.sum(1), settings)
    leaf = log_prob.clone().requires_grad_()
    share = micro_batch_loss(
        leaf, old_log_prob, mask, weight, facts["coefficient"], mask.numel(), score=SCORES.build(score, {})
    )
    share.backward()
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=1.01 * 2**-8, atol=1e-10)


def test_small_tau_neither_overflows_nor_underflows():
    """Scores of -900 and -1 at tau 1e-3: exp(s/tau) is 0 in any float; neg is the larger score less tau ln 2."""
    log_prob = torch.tensor([[-2.0], [-900.0], [-1.0]], dtype=torch.float64)
    args = (log_prob, torch.ones(3, 1), torch.tensor([1.0, 0.0, 0.0]), [0, 0, 0])
    loss, grad, metrics = gradient(log_prob, *args, tau=1e-3)
    assert loss.item() == pytest.approx(-(-2 - (-1 - 1e-3 * math.log(2))), rel=1e-12)
    assert grad.flatten().tolist() == [-1, 0, 1]
    assert metrics["effective_negatives"] == pytest.approx(1)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30, 0.0])
@pytest.mark.parametrize("score", ["log_l", "l_ratio"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
def test_masked_positions_do_not_exist(junk, score, kl_estimator):
    log_prob, old_log_prob, mask, reward, uid = example()
    settings = SETTINGS | {"score": score, "kl_estimator": kl_estimator}
    loss, grad, metrics = gradient(log_prob, old_log_prob, mask, reward, uid, **settings)
    hidden = mask == 0
    for fill in ((junk, junk), (junk, -1.0), (-1.0, junk)):
        new, old = (x.masked_fill(hidden, v) for x, v in zip((log_prob, old_log_prob), fill, strict=True))
        dirty_loss, dirty_grad, dirty_metrics = gradient(new, old, mask, reward, uid, **settings)
        assert torch.equal(dirty_loss, loss) and torch.equal(dirty_grad, grad) and dirty_metrics == metrics
    assert not grad[hidden].any() and grad[~hidden].all()


def test_a_hole_in_the_mask_is_not_padding():
    """Tokens of a tool's answer in the middle of a response: neither scored nor constrained nor counted."""
    log_prob, old_log_prob, mask, reward, uid = example()
    mask[0, 1:4] = 0
    kept = torch.tensor([0, 4, 5])
    log_prob[0, :3], old_log_prob[0, :3] = log_prob[0, kept], old_log_prob[0, kept]
    moved = mask.clone()
    moved[0] = torch.tensor([1, 1, 1, 0, 0, 0])
    _, expected, _ = gradient(log_prob, old_log_prob, moved, reward, uid, **SETTINGS)
    log_prob[0, kept], old_log_prob[0, kept] = log_prob[0, :3].clone(), old_log_prob[0, :3].clone()
    log_prob[0, 1:4], old_log_prob[0, 1:4] = float("nan"), float("nan")
    _, found, _ = gradient(log_prob, old_log_prob, mask, reward, uid, **SETTINGS)
    torch.testing.assert_close(found[0, kept], expected[0, :3], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-12, atol=0)
    assert not found[0, 1:4].any()


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("argument", ["log_prob", "old_log_prob"])
@pytest.mark.parametrize("sample", [0, 5])
def test_no_number_at_a_response_token_names_the_sample(argument, sample, bad):
    inputs = list(example())
    inputs[["log_prob", "old_log_prob"].index(argument)][sample, 0] = bad
    with pytest.raises(ValueError, match=rf"(?i)\b{argument}\b.*\b{sample}\b"):
        disco_loss(*inputs, **SETTINGS)


@pytest.mark.parametrize("sample", [0, 5])
def test_nan_reward_names_the_sample(sample):
    log_prob, old_log_prob, mask, reward, uid = example()
    reward[sample] = float("nan")
    with pytest.raises(ValueError, match=rf"(?i)reward.*\b{sample}\b"):
        disco_loss(log_prob, old_log_prob, mask, reward, uid, **SETTINGS)


@pytest.mark.parametrize(
    ("setting", "value", "choices"),
    [
        ("objective", "grpo", ["disco", "disco_b"]),
        ("score", "log_L", ["log_l", "l_ratio"]),
        ("kl_estimator", "low_var_kl", ["k1", "k3"]),
        ("tau", 0.0, []),
        ("tau", -1.0, []),
        ("tau", float("nan"), []),
        ("delta", -1e-4, []),
        ("delta", float("nan"), []),
        ("beta", -1.0, []),
        ("beta", float("nan"), []),
    ],
)
def test_wrong_settings_are_refused_by_name_and_value(setting, value, choices):
    with pytest.raises(ValueError) as error:
        disco_loss(*example(), **SETTINGS | {setting: value})
    message = str(error.value)
    for part in [setting, str(value), *choices]:
        assert part in message, message


def test_zero_is_a_legal_delta_and_beta():
    """The boundary of the refusals above: delta 0 constrains every drift, beta 0 none."""
    _, _, metrics = gradient(*example(), **SETTINGS | {"delta": 0.0})
    assert metrics["coefficient"] == pytest.approx(50 * metrics["kl"])
    loss, _, metrics = gradient(*example(), **SETTINGS | {"beta": 0.0})
    assert loss.item() == pytest.approx(-metrics["objective"])


@pytest.mark.parametrize(
    ("argument", "wrong", "shape"),
    [
        (0, torch.zeros(8), r"\(8,\)|\[8\]"),
        (1, torch.zeros(8, 5), r"8, 5"),
        (1, torch.zeros(1, 6), r"1, 6"),  # would broadcast in silence
        (2, torch.ones(8, 1), r"8, 1"),  # would broadcast in silence
        (2, torch.ones(7, 6), r"7, 6"),
        (3, torch.zeros(7), r"\b7\b"),
        (3, torch.zeros(8, 1), r"8, 1"),
        (3, torch.zeros(1), r"\(1,\)|\[1\]"),  # would broadcast in silence
        (4, [0] * 7, r"\b7\b"),
        (4, [0] * 9, r"\b9\b"),
        (4, torch.zeros(8, 1, dtype=torch.int64), r"8, 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name_and_shape(argument, wrong, shape):
    inputs = list(example())
    inputs[argument] = wrong
    name = ["log_prob", "old_log_prob", "response_mask", "reward", "uid"][argument]
    with pytest.raises(ValueError, match=rf"(?s)\b{name}\b.*({shape})"):
        disco_loss(*inputs, **SETTINGS)


@pytest.mark.parametrize("session", [range(7), torch.zeros(8, 1, dtype=torch.int64)])
def test_sessions_that_do_not_fit_are_refused(session):
    with pytest.raises(ValueError, match=r"session has shape \((7,|8, 1)\) for 8 rows"):
        disco_loss(*example(), session=session, **SETTINGS)


def test_questions_may_be_a_list_of_tensors():
    """Tensors are equal to themselves alone: each response would be a question of its own, and the loss 0."""
    log_prob = -torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    arguments = (log_prob, log_prob, torch.ones(4, 3), torch.tensor([1.0, 0, 1, 0]))
    expected, metrics = disco_loss(*arguments, [5, 5, 2, 2])
    assert metrics["groups_mixed"] == 1
    assert disco_loss(*arguments, list(torch.tensor([5, 5, 2, 2])))[0] == expected


@pytest.mark.parametrize("score, tau", [("log_l", 10.0), ("l_ratio", 1.0), ("log_ratio", 0.5), ("log_ratio_ref", 10.0)])
def test_tau_is_the_scores_published_one(score, tau):
    g = torch.Generator().manual_seed(0)
    log_prob, old, ref = (-torch.rand(4, 3, generator=g) for _ in range(3))
    arguments = (log_prob, old, torch.ones(4, 3), torch.tensor([1.0, 0, 0, 0]), [0] * 4)
    found = disco_loss(*arguments, score=score, ref_log_prob=ref)[0]
    assert found == disco_loss(*arguments, score=score, ref_log_prob=ref, tau=tau)[0]
    assert found != disco_loss(*arguments, score=score, ref_log_prob=ref, tau=2 * tau)[0]
