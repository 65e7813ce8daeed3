"""Random batches: `disco_loss` and the separable form against the tests' own oracle, and what must not matter."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from named import coefficient, compute_score, weigh
from oracle import oracle_gradient

from recipe.disco import disco_loss
from recipe.disco.constraint import build_controller, kl_estimate
from recipe.disco.loss import micro_batch_loss
from recipe.disco.scores import SCORES

EXAMPLES = cases(40)
PRECISE = cases(80)


@dataclass
class Batch:
    log_prob: torch.Tensor
    old_log_prob: torch.Tensor
    mask: torch.Tensor
    reward: torch.Tensor
    uid: list
    settings: dict = field(default_factory=dict)

    def inputs(self):
        return self.log_prob, self.old_log_prob, self.mask, self.reward, self.uid

    def rows(self, index):
        """The batch with the given rows in the given order."""
        tensors = (x[index] for x in (self.log_prob, self.old_log_prob, self.mask, self.reward))
        return Batch(*tensors, [self.uid[i] for i in index], self.settings)

    def to(self, dtype):
        return Batch(self.log_prob.to(dtype), self.old_log_prob.to(dtype), *self.inputs()[2:], self.settings)


@st.composite
def batches(draw, **fixed):
    """1 to 6 questions of 1 to 16 responses in random order, of any lengths, holes and empty responses included.

    Hypothesis chooses the structure; the numbers come from a seed that it chooses, which keeps examples cheap.
    """
    groups = draw(
        st.lists(st.tuples(st.integers(1, 16), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])), min_size=1, max_size=6)
    )
    width = draw(st.integers(1, 9))
    kept = draw(st.sampled_from(["prefix", "holes", "full"]))
    empty = draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))  # share of responses without a token
    drift = draw(st.sampled_from([0.0, 1e-3, 0.1, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    uid = np.repeat(np.arange(len(groups)), [n for n, _ in groups])
    reward = np.concatenate([rng.random(n) < share for n, share in groups]).astype(float)
    order = rng.permutation(len(uid))
    shape = (len(uid), width)
    mask = {
        "prefix": np.arange(width) < rng.integers(1, width + 1, (len(uid), 1)),
        "holes": rng.random(shape) < 0.6,
        "full": np.ones(shape, dtype=bool),
    }[kept]
    mask = mask & (rng.random((len(uid), 1)) >= empty)
    old_log_prob = -rng.exponential(1.5, shape)
    # half the drift is common to all tokens, so that the KL falls on either side of delta
    log_prob = old_log_prob - drift * (rng.normal(0, 1, shape) + rng.normal(0, 1))
    junk = rng.choice([np.nan, np.inf, -np.inf, 1e30, 0.0], shape)

    chosen = {
        "objective": draw(st.sampled_from(["disco", "disco_b"])),
        "score": draw(st.sampled_from(["log_l", "l_ratio"])),
        "kl_estimator": draw(st.sampled_from(["k1", "k3"])),
        "tau": draw(st.sampled_from([0.05, 0.5, 1.0, 10.0, 200.0])),
        "delta": draw(st.sampled_from([0.0, 1e-4, 0.02])),
        "beta": draw(st.sampled_from([0.0, 1.0, 30.0, 1e3])),
    }
    return Batch(
        torch.from_numpy(np.where(mask, log_prob, junk)),
        torch.from_numpy(np.where(mask, old_log_prob, junk)),
        torch.from_numpy(mask.astype(draw(st.sampled_from([float, np.int64, bool])))),
        torch.from_numpy(reward[order]),
        [f"question {u}" for u in uid[order]],
        chosen | fixed,
    )


def gradient(batch):
    """(loss, gradient, metrics) of disco_loss, the gradient at log_prob's own dtype."""
    leaf = batch.log_prob.clone().requires_grad_()
    loss, metrics = disco_loss(leaf, *batch.inputs()[1:], **batch.settings)
    loss.backward()
    return loss.item(), leaf.grad, metrics


def exact(batch):
    return oracle_gradient(*batch.inputs(), **batch.settings)


def slack(batch, grad, relative):
    """Absolute tolerance for an element whose two shares may cancel: relative to the largest of both shares."""
    mask = batch.mask.bool()
    if not mask.any():
        return 0.0
    drift = (batch.log_prob.double() - batch.old_log_prob.double())[mask]
    return relative * (1 + grad.abs().max().item() + batch.settings["beta"] * drift.exp().max().item() / mask.sum())


@PRECISE
@given(batches())
def test_value_gradient_and_metrics_equal_the_oracles(batch):
    loss, grad, metrics = gradient(batch)
    value, expected, facts = exact(batch)
    assert loss == pytest.approx(value, rel=1e-11, abs=1e-11)
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=slack(batch, expected, 1e-13))
    assert not grad[~batch.mask.bool()].any()
    for name, fact in facts.items():
        assert metrics[name] == pytest.approx(fact, rel=1e-9, abs=1e-10), name
    optional = {"auc", "effective_negatives", "score_positive", "score_negative", "length_positive", "length_negative"}
    assert optional & metrics.keys() == optional & facts.keys(), "a mean over nothing is left out"
    assert all(np.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@EXAMPLES
@given(batch=batches())
def test_lower_precision(dtype, batch):
    """Against the oracle on the same rounded numbers; the tolerance is float32's rounding, carried through.

    A token's drift d is exact to eps |d| and a score to a few eps |s|. A score's error moves a softmax weight by
    error / tau, and the KL's error moves the coefficient by beta times it. The gradient is stored in `dtype`, which
    rounds it once, by half a unit in the last place (in float16 also at the bottom of its range).
    """
    batch = batch.to(dtype)
    loss, grad, _ = gradient(batch)
    value, expected, facts = exact(batch)
    mask = batch.mask.bool()
    if not mask.any():
        assert loss == 0 and not grad.any()
        return
    eps = 16 * torch.finfo(torch.float32).eps
    drift = (batch.log_prob.double() - batch.old_log_prob.double())[mask]
    ratio = drift.exp().max().item()
    size = max(batch.log_prob[mask].double().abs().max().item(), ratio)
    kl_error = eps * drift.abs().mean().item()
    if batch.settings["kl_estimator"] == "k3":
        kl_error += eps * (1 + ratio)  # the ratio and 1 are added and subtracted
    coefficient_error = batch.settings["beta"] * kl_error + eps * facts["coefficient"]
    weight_error = eps * (1 + size / batch.settings["tau"])
    atol = weight_error * (1 + ratio) + coefficient_error * (1 + ratio) / mask.sum().item()
    if dtype == torch.float32:
        rtol = eps
    else:
        rtol = 1.01 * torch.finfo(dtype).eps / 2
        atol += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), expected, rtol=rtol, atol=atol)
    loss_error = eps * (size + 1 + batch.settings["tau"]) + (facts["coefficient"] + coefficient_error) * kl_error
    assert loss == pytest.approx(value, rel=eps, abs=loss_error)


@EXAMPLES
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(batch, random):
    order = list(range(len(batch.uid)))
    random.shuffle(order)
    loss, grad, metrics = gradient(batch)
    shuffled_loss, shuffled_grad, shuffled_metrics = gradient(batch.rows(order))
    assert shuffled_loss == pytest.approx(loss, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(shuffled_grad, grad[order], rtol=1e-12, atol=slack(batch, grad, 1e-13))
    assert shuffled_metrics == pytest.approx(metrics, rel=1e-9, abs=1e-10)


@EXAMPLES
@given(batches(), st.integers(0, 5), st.integers(0, 5))
def test_the_width_of_padding_does_not_matter(batch, left, right):
    def pad(x, value):
        return torch.nn.functional.pad(x, (left, right), value=value)

    wide = Batch(
        pad(batch.log_prob, float("nan")), pad(batch.old_log_prob, 7.0), pad(batch.mask, 0), *batch.inputs()[3:]
    )
    wide.settings = batch.settings
    loss, grad, metrics = gradient(batch)
    wide_loss, wide_grad, wide_metrics = gradient(wide)
    assert wide_loss == pytest.approx(loss, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(wide_grad, pad(grad, 0.0), rtol=1e-12, atol=slack(batch, grad, 1e-13))
    assert wide_metrics == pytest.approx(metrics, rel=1e-9, abs=1e-10)


@EXAMPLES
@given(batches())
def test_the_names_of_questions_do_not_matter(batch):
    numbers = torch.tensor([int(u.split()[1]) for u in batch.uid])
    loss, grad, metrics = gradient(batch)
    for uid in (numbers, 10**12 - numbers, [(int(u) * 37, None) for u in numbers]):
        renamed_loss, renamed_grad, renamed_metrics = gradient(Batch(*batch.inputs()[:4], uid, batch.settings))
        assert renamed_loss == pytest.approx(loss, rel=1e-12, abs=1e-12)
        torch.testing.assert_close(renamed_grad, grad, rtol=1e-12, atol=slack(batch, grad, 1e-13))
        assert renamed_metrics == pytest.approx(metrics, rel=1e-9, abs=1e-10)


@EXAMPLES
@given(batches(), batches())
def test_questions_do_not_see_each_other(batch, other):
    """Without a constraint, two batches of different questions in one: J adds up over questions, Q over batches."""
    parts = [Batch(*batch.inputs(), batch.settings | {"beta": 0.0})]
    parts.append(Batch(*other.inputs()[:4], [f"other {u}" for u in other.uid], parts[0].settings))
    width = max(part.log_prob.shape[1] for part in parts)
    columns = zip(*(part.inputs()[:2] for part in parts), strict=True)
    wide = [torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in pair]) for pair in columns]
    mask = torch.cat([torch.nn.functional.pad(p.mask.double(), (0, width - p.mask.shape[1])) for p in parts])
    both = Batch(*wide, mask, torch.cat([p.reward for p in parts]), parts[0].uid + parts[1].uid, parts[0].settings)
    q = [len(set(part.uid)) for part in parts]
    loss, grad, _ = gradient(both)
    apart = [gradient(part) for part in parts]
    assert loss == pytest.approx(
        sum(n * x for n, (x, _, _) in zip(q, apart, strict=True)) / sum(q), rel=1e-11, abs=1e-11
    )
    first, width = len(batch.uid), batch.log_prob.shape[1]
    torch.testing.assert_close(grad[:first, :width], apart[0][1] * q[0] / sum(q), rtol=1e-11, atol=1e-13)


@PRECISE
@given(batches(), st.integers(1, 7), st.randoms(use_true_random=False))
def test_micro_batches_add_up_to_the_gradient(batch, size, random):
    """Scalars measured once over the batch, then any rows in any order `size` at a time, each trimmed to its width."""
    log_prob, old_log_prob, mask, reward, uid = batch.inputs()
    s = batch.settings
    with torch.no_grad():
        score = compute_score(s["score"], log_prob, old_log_prob, mask.bool())
        num_tokens = int(mask.bool().sum())
        kl = kl_estimate(log_prob, old_log_prob, mask.bool(), s["kl_estimator"]).sum().item() / max(num_tokens, 1)
    question = torch.tensor([int(u.split()[1]) for u in uid])
    _, weight = weigh(s["objective"], score, reward >= 1, question, mask.bool().sum(1), s)
    c = coefficient(build_controller("squared_hinge", s), kl)

    order = list(range(len(uid)))
    random.shuffle(order)
    leaf = log_prob.clone().requires_grad_()
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        used = mask[rows].bool().any(0).nonzero().flatten()
        width = int(used[-1]) + 1 if len(used) else 1
        micro_batch_loss(
            leaf[rows, :width],
            old_log_prob[rows, :width],
            mask[rows, :width],
            weight[rows],
            c,
            max(num_tokens, 1),
            score=SCORES.build(s["score"], {}),
            kl_estimator=s["kl_estimator"],
        ).backward()
    expected = exact(batch)[1]
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-11, atol=slack(batch, expected, 1e-13))
    torch.testing.assert_close(leaf.grad, gradient(batch)[1], rtol=1e-11, atol=slack(batch, expected, 1e-13))


@EXAMPLES
@given(batches(objective="disco", tau=1e6))
def test_an_infinite_tau_is_disco_b(batch):
    """Hoeffding: 0 <= tau log mean exp(s/tau) - mean s <= spread^2 / (8 tau), the rest is rounding, of order eps tau;
    and no softmax weight is further from 1/n than by a factor of exp(spread / tau)."""
    loss, grad, _ = gradient(batch)
    flat_loss, flat_grad, _ = gradient(Batch(*batch.inputs(), batch.settings | {"objective": "disco_b"}))
    mask = batch.mask.bool()
    score = compute_score(batch.settings["score"], batch.log_prob, batch.old_log_prob, mask)
    spread = (score.max() - score.min()).item()  # a response without tokens only widens it
    assert -1e-8 <= loss - flat_loss <= spread**2 / 8e6 + 1e-8
    ratio = (batch.log_prob - batch.old_log_prob)[mask].exp().max().item() if mask.any() else 0.0
    torch.testing.assert_close(grad, flat_grad, rtol=1e-11, atol=1.1 * spread / 1e6 * (1 + ratio) + 1e-12)
