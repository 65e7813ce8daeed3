"""The whole family of methods on random mini-batches: what must not matter does not, and nothing becomes NaN."""

import math
from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
import pytest
import torch
from fuzzing import cases
from hypothesis import assume, example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tensordict import NonTensorData, TensorDict
from verl.utils import tensordict_utils as tu

from recipe.disco import DiscoConfig, disco_loss
from recipe.disco.constraint import CONTROLLERS, Controller, build_controller, kl_estimate, kl_standard_error, price
from recipe.disco.estimator import disco_advantage
from recipe.disco.loss import micro_batch_loss, question_ids
from recipe.disco.objectives import OBJECTIVES
from recipe.disco.plugin import RECIPE
from recipe.disco.questions import QUESTIONS, by_question, factors, pair_weights
from recipe.disco.registry import Component, Registry, choice, number, require_finite, settings_of
from recipe.disco.scores import SCORES, compute_score
from recipe.disco.settings import parse
from recipe.disco.update import ScoreTable, by_session, plan_update
from recipe.disco.worker import keep_mini_batches_whole, of_whole_questions, padded, passes
from verl_ext.report import weights
from verl_ext.training.advantages import estimating
from verl_ext.training.rows import BatchFacts
from verl_ext.training.transfer import RowKey


def shipped(registry):
    """Names in order; other tests register more."""
    return sorted(name for name in registry if registry[name].__module__.startswith("recipe.disco."))


VALUES = {
    "tau": [1e-3, 0.5, 1.0, 10.0, 1e6],
    "surrogate": ["identity", "logistic", "squared_hinge"],
    "negatives": ["softmax", "mean", "topk"],
    "top_share": [1e-6, 0.25, 0.5, 1.0],
    "scale": [1e-3, 1.0, 10.0],
    "length_temperature": [1e-3, 0.1, 10.0],
    "max_length": [1, 8, 8192],
    "question_temperature": [1e-3, 2.0, 1e3],
    "target_margin": [0.0, 0.01, 1.0],
    "margin_warmup": [1e-3, 0.3, 1.0],
    "delta": [0.0, 1e-4, 0.02],
    "beta": [0.0, 1.0, 1e3],
    "rho": [1e-3, 1.0, 1e3],
    "coefficient": [0.0, 0.1, 10.0],
}
"""Of each setting, values at and between its bounds."""


@st.composite
def methods(draw):
    """Arguments of `disco_loss` that name a method of the family, with settings of those that it uses."""
    objective, score = draw(st.sampled_from(shipped(OBJECTIVES))), draw(st.sampled_from(shipped(SCORES)))
    constraint, cls = draw(st.sampled_from(shipped(CONTROLLERS))), OBJECTIVES[objective]
    questions = draw(st.sampled_from(shipped(QUESTIONS))) if cls.questions == "uniform" else cls.questions
    owners = cls, SCORES[score], CONTROLLERS[constraint], QUESTIONS[questions]
    used = {name for owner in owners for name in settings_of(owner)}
    return {
        "objective": objective,
        "score": score,
        "constraint": constraint,
        "questions": questions,
        "pairs": draw(st.sampled_from(["threshold", "graded"])) if cls.graded else "threshold",
        "kl_estimator": draw(st.sampled_from(["k1", "k3"])),
        **{name: draw(st.sampled_from(VALUES[name])) for name in sorted(used)},
    }


@dataclass
class Batch:
    """Rows of a mini-batch, (B, T) or (B,)."""

    log_prob: torch.Tensor
    old_log_prob: torch.Tensor
    ref_log_prob: torch.Tensor
    rho: torch.Tensor
    mask: torch.Tensor
    reward: torch.Tensor
    uid: torch.Tensor
    session: torch.Tensor

    def rows(self, index):
        return Batch(*(getattr(self, f.name)[index] for f in fields(self)))


@st.composite
def batches(draw, drifts=(0.0, 1e-3, 0.1, 1.0), sizes=(1.5,), levels=(2, 3, 1000), parts=(1, 3)):
    """1 to 5 questions of 1 to 9 responses in rows of any lengths, empty ones among them; rewards from 0 to 1."""
    responses = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    width, level, most = draw(st.integers(1, 7)), draw(st.sampled_from(levels)), draw(st.sampled_from(parts))
    empty, drift = draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.sampled_from(drifts))
    size, rng = draw(st.sampled_from(sizes)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    session = np.arange(sum(responses)).repeat(rng.integers(1, most + 1, sum(responses)))
    uid, reward = np.arange(len(responses)).repeat(responses), rng.integers(0, level, sum(responses)) / (level - 1)
    order, shape = rng.permutation(len(session)), (len(session), width)
    session = session[order]
    mask = (rng.random(shape) < 0.7) & (rng.random((len(session), 1)) >= empty)
    old = -rng.exponential(size, shape)
    columns = (
        old - drift * (rng.normal(0, 1, shape) + rng.normal(0, 1)),
        old,
        old + 0.1 * rng.normal(0, 1, shape),
        rng.choice([0.0, 0.5, 1.0, 2.0], shape),
    )
    junk = rng.choice([np.nan, np.inf, -np.inf, 1e30], shape)
    tokens = [torch.from_numpy(np.where(mask, x, junk)) for x in columns]
    return Batch(*tokens, *(torch.from_numpy(x) for x in (mask, reward[session], uid[session], session)))


def defined(batch, method, corrected):
    """Loss, gradient and metrics of the definition."""
    leaf = batch.log_prob.clone().requires_grad_()
    loss, metrics = disco_loss(
        leaf,
        batch.old_log_prob,
        batch.mask,
        batch.reward,
        batch.uid,
        session=batch.session,
        ref_log_prob=batch.ref_log_prob,
        rollout_is_weights=batch.rho if corrected else None,
        **method,
    )
    loss.backward()
    return loss.item(), leaf.grad, metrics


def table_of(batch, method, corrected):
    """What a worker measures."""
    mask = batch.mask.bool()
    score, rho = SCORES.build(method["score"], {}), batch.rho if corrected else None
    return ScoreTable(
        question=batch.uid,
        session=batch.session,
        size=batch.uid.bincount()[batch.uid],
        index=torch.arange(len(batch.uid)),
        reward=batch.reward,
        length=mask.sum(-1),
        score=compute_score(score, batch.log_prob, batch.old_log_prob, mask, batch.ref_log_prob, rho),
        kl=kl_estimate(batch.log_prob, batch.old_log_prob, mask, method["kl_estimator"]).sum(-1),
        measured=torch.ones(len(mask), dtype=torch.bool),
        entropy=torch.full((len(mask),), torch.nan, dtype=torch.float64),
    )


def planned(table, method):
    return plan_update(
        table,
        OBJECTIVES.build(method["objective"], method),
        build_controller(method["constraint"], method),
        positive_threshold=1.0,
        graded=method["pairs"] == "graded",
        question_weight=QUESTIONS.build(method["questions"], method),
    )


def near(found, expected, relative=1e-9):
    """Equal but for rounding, relative to the largest entry."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=relative, atol=relative * (1 + largest))


def rounding(method):
    """By how much sums in another order may differ: exp(s / tau) magnifies, and tau log(...) for a large tau."""
    tau = method.get("tau", 1.0)
    return 1e-11 * max(1.0, 10 / tau, tau / 1e4) * max(1.0, method.get("scale", 1.0))


def same(a, b, method):
    """Equal results, but for rounding. Where two scores are nearly a tie, order and top-k are free."""
    near(a[0], b[0], rounding(method))
    near(a[1], b[1], rounding(method))
    assert a[2].keys() == b[2].keys()
    for name in a[2].keys() - {"auc", "effective_negatives"}:
        near(a[2][name], b[2][name], 1e-6)


@cases(250)
@given(batches(), methods(), st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(batch, method, corrected, random):
    order = list(range(len(batch.uid)))
    random.shuffle(order)
    loss, grad, metrics = defined(batch, method, corrected)
    same(defined(batch.rows(order), method, corrected), (loss, grad[order], metrics), method)


@cases(250)
@given(batches(), methods(), st.booleans(), st.integers(1, 5), st.randoms(use_true_random=False))
def test_micro_batches_of_any_rows_add_up_to_the_definition(batch, method, corrected, size, random):
    with torch.no_grad():
        plan = planned(table_of(batch, method, corrected), method)
    order = list(range(len(batch.uid)))
    random.shuffle(order)
    leaf = batch.log_prob.clone().requires_grad_()
    for start in range(0, len(order), size):
        # Rows that need no backward pass are left out.
        rows = [i for i in order[start : start + size] if plan.needs_gradient[i]]
        part = batch.rows(rows)
        if rows:
            micro_batch_loss(
                leaf[rows],
                part.old_log_prob,
                part.mask,
                plan.weight[rows],
                plan.coefficient,
                plan.tokens,
                score=SCORES.build(method["score"], {}),
                kl_estimator=method["kl_estimator"],
                ref_log_prob=part.ref_log_prob,
                rollout_is_weights=part.rho if corrected else None,
            ).backward()
    loss, grad, metrics = defined(batch, method, corrected)
    near(plan.loss.item(), loss, rounding(method))
    near(torch.zeros_like(grad) if leaf.grad is None else leaf.grad, grad, rounding(method))
    assert not grad[~batch.mask].any() and all(np.isfinite(value) for value in metrics.values())


@cases(150)
@given(batches(parts=(1,)), methods(), st.booleans(), st.integers(1, 6))
def test_a_response_in_parts_is_one_response(batch, method, corrected, cut):
    """Its tokens in two rows of one session: the same loss, and each token's gradient."""
    loss, grad, metrics = defined(batch, method, corrected)
    first = torch.arange(batch.mask.shape[1]) < cut
    parts = Batch(*(torch.cat([getattr(batch, f.name)] * 2) for f in fields(batch)))
    parts = replace(parts, mask=torch.cat([batch.mask & first, batch.mask & ~first]))
    found, parts_grad, parts_metrics = defined(parts, method, corrected)
    near(found, loss, rounding(method))
    near(sum(parts_grad.chunk(2)), grad, rounding(method))
    assert parts_metrics["rows_per_response"] == 2 * metrics["rows_per_response"] == 2


@cases(150)
@given(batches(levels=(2,)), methods(), st.sampled_from([(0.0, 1.0), (-3.0, 1.0), (1.0, 7.5)]))
def test_graded_rewards_of_two_levels_are_labels(batch, method, levels):
    assume(OBJECTIVES[method["objective"]].graded and method["questions"] == "uniform")
    graded = replace(batch, reward=torch.tensor(levels, dtype=torch.float64)[batch.reward.long()])
    found, expected = (
        defined(b, method | {"pairs": pairs}, True) for b, pairs in ((graded, "graded"), (batch, "threshold"))
    )
    near(found[0], expected[0], rounding(method))
    near(found[1], expected[1], rounding(method))


@cases(200)
@given(batches(), methods(), st.integers(1, 4), st.integers(0, 3))
def test_ranks_and_padding_rows_do_not_matter(batch, method, ranks, padding):
    """The plan of rows that are dealt over ranks, in turn, and gathered is the plan of the batch."""
    table = table_of(batch, method, False)
    expected = planned(table, method)
    extra = torch.arange(padding)
    values = {"question": -1 - extra * 0, "session": -1 - extra, "index": 1000 + extra, "score": extra * 50.0}
    columns = {}
    for f in fields(table):
        x = getattr(table, f.name)
        fill = values.get(f.name, extra * 0).to(x.dtype)
        columns[f.name] = torch.cat([x, fill])
    size = len(batch.uid) + padding
    shares = [list(range(rank, size, ranks)) for rank in range(ranks)]
    tables = [ScoreTable(**{name: x[rows] for name, x in columns.items()}) for rows in shares]
    parts = []
    for one in tables:
        one.gathered(lambda mine: parts.append(mine) or mine)
    found = planned(tables[0].gathered(lambda mine: torch.cat(parts)), method)
    order = [row for rows in shares for row in rows]
    real = [i for i, row in enumerate(order) if row < len(batch.uid)]
    near(found.weight[real], expected.weight[[order[i] for i in real]], rounding(method))
    assert not found.weight[[i for i in range(size) if i not in real]].any()
    near(found.loss, expected.loss, rounding(method))
    assert (found.tokens, found.coefficient) == (expected.tokens, pytest.approx(expected.coefficient, 1e-9, 1e-12))


NAMED = r"log_prob|score|KL|objective|constraint|weight|gradient"


@cases(400)
@given(
    batches(drifts=(0.0, 1.0, 50.0, 1e3, 1e30), sizes=(1e-30, 1.0, 1e4, 1e30)),
    methods(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_extreme_numbers_give_numbers_or_an_error_that_names_them(batch, method, corrected, dtype):
    tokens = {name: getattr(batch, name).to(dtype) for name in ("log_prob", "old_log_prob", "ref_log_prob", "rho")}
    try:
        loss, grad, metrics = defined(replace(batch, **tokens), method, corrected)
    except ValueError as e:
        assert any(word in str(e) for word in NAMED.split("|")), e
        return
    # A standard error is a root of squares.
    finite = {name: value for name, value in metrics.items() if name != "kl_standard_error" or metrics["kl"] < 1e100}
    assert grad.dtype == dtype and all(np.isfinite(value) for value in finite.values())
    # Half precision is computed in float32, where more than its largest number is infinite.
    largest = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).max
    assert not np.isnan(loss) and np.isfinite(loss) == (abs(metrics["loss"]) <= largest)
    assert not grad.isnan().any()
    assert not grad[~batch.mask].any()


numbers = st.one_of(
    st.floats(),
    st.integers(-5, 5),
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.sampled_from([10**400, -(10**400)]),
)
anything = st.one_of(numbers, st.lists(numbers, max_size=2), st.dictionaries(st.text(max_size=3), numbers, max_size=2))


@cases(300)
@given(
    st.dictionaries(st.sampled_from([f.name for f in fields(DiscoConfig)]), anything, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "objective": st.sampled_from(shipped(OBJECTIVES)),
            "score": st.sampled_from(shipped(SCORES)),
            "constraint": st.sampled_from(shipped(CONTROLLERS)),
            "questions": st.sampled_from(shipped(QUESTIONS)),
            "measure": st.sampled_from(["exact", "lagged"]),
        },
    ),
)
@example({"tau": 10**400}, {})
@example({"surrogate": ["identity"]}, {})
@example({"module": ["a"]}, {})
@example({"options": 5}, {})
def test_settings_are_built_or_refused_by_name(values, names):
    values |= names
    try:
        config = DiscoConfig(**values)
    except ValueError as e:
        assert "disco." in str(e)
        return
    log_prob = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], dtype=torch.float64, requires_grad=True)
    try:
        loss, _ = disco_loss(
            log_prob, log_prob.detach() + 0.1, torch.ones(2, 2), torch.tensor([1.0, 0.0]), [0, 0],
            ref_log_prob=log_prob.detach(), **config.chosen(),
        )  # fmt: skip
    except ValueError as e:
        # Beyond the numbers that there are.
        assert "disco." in str(e) and any(isinstance(x, float) and not 1e-9 < abs(x) < 1e9 for x in values.values())
        return
    assert loss.isfinite()


@cases(100)
@given(
    st.dictionaries(
        st.one_of(st.sampled_from(["tau", "beta", "_target_"]), st.text(max_size=3), st.integers()), numbers
    )
)
def test_a_node_has_known_settings_alone(values):
    unknown = [name for name in values if name not in ("tau", "beta", "_target_")]
    try:
        parse(values)
    except ValueError as e:
        assert any(f"disco.{name}" in str(e) for name in unknown or values)
        return
    assert not unknown


@cases(100)
@given(st.one_of(st.none(), anything), st.one_of(st.none(), anything), st.booleans(), anything)
def test_a_registered_class_gets_its_own_settings_or_names_what_is_wrong(size, kind, given, name):
    registry = Registry("thing", Component)

    @registry.register("mine")
    @dataclass(frozen=True)
    class Mine(Component):
        size: float = number(minimum=0, most=3)
        kind: str = choice("a", {"a": 1, "b": 2})

    settings = {"other": 1} | ({"size": size} if given else {}) | ({} if kind is None else {"kind": kind})
    try:
        found = registry.build("mine", settings)
        assert 0 <= found.size <= 3 and found.kind in ("a", "b") and found.name == "mine"
    except ValueError as e:
        assert "disco." in str(e) and any(word in str(e) for word in ("size", "kind"))
    with pytest.raises(ValueError, match="registered already"):
        registry.register("mine")(dataclass(frozen=True)(type("Mine", (Component,), {})))
    with pytest.raises(ValueError, match="disco.thing=.* is unknown; choose from .'mine'"):
        registry[name]
    assert list(registry) == ["mine"]


@cases(200)
@given(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=14),
    st.booleans(),
    st.sampled_from(shipped(QUESTIONS)),
)
def test_questions_are_counted_by_hand(rows, graded, weight):
    question, level, length = (torch.tensor(x) for x in zip(*rows, strict=True))
    reward = level.double() / 4
    found = by_question(reward >= 1, question, length, reward if graded else None)
    ids = sorted({q for q, *_ in rows if q >= 0})
    assert found.ids.tolist() == ids
    assert found.size.tolist() == [sum(q == other for other, *_ in rows) if q >= 0 else 0 for q, *_ in rows]
    seen = []
    for i, q in enumerate(ids):
        scored = [k for k, (other, _, n) in enumerate(rows) if other == q and n]
        levels = [rows[k][1] / 4 for k in scored]
        mean = sum(levels) / max(len(levels), 1)
        differ = graded and len(set(levels)) > 1
        right = [k for k, x in zip(scored, levels, strict=True) if (x > mean if differ else x >= 1)]
        assert (int(found.positives[i]), int(found.negatives[i])) == (len(right), len(scored) - len(right))
        assert found.rate[i].item() == pytest.approx(mean if graded else len(right) / max(len(scored), 1))
        if 0 < len(right) < len(scored):
            stacks = [(s, s.which.tolist().index(i)) for s in found.mixed if i in s.which]
            ((stack, at),) = stacks
            assert sorted(stack.positive[at].tolist()) == right
            assert sorted(stack.negative[at].tolist()) == sorted({*scored} - {*right})
            assert (stack.reward is not None) == (graded and len(set(levels)) > 2)
            seen.append(i)
    assert sum(len(s.which) for s in found.mixed) == len(seen) == int(found.are_mixed.sum())
    c = factors(QUESTIONS.build(weight, {"question_temperature": 2.0}), found)
    assert c.shape == found.rate.shape and c.isfinite().all() and (c >= 0).all() and (c[~found.are_mixed] == 1).all()
    p = found.rate[found.are_mixed]
    hand = {"uniform": p * 0 + 1, "failure_rate": 1 - p, "grpo": (p * (1 - p)).sqrt()}
    hand["dgpo"] = len(p) * (-p / 2).exp() / (-p / 2).exp().sum()
    near(c[found.are_mixed], hand[weight])


@cases(300)
@given(st.sampled_from(shipped(CONTROLLERS)), st.data(), st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8))
def test_a_controller_pays_for_more_kl_and_keeps_its_state(kind, data, kls):
    settings = {name: data.draw(st.sampled_from(VALUES[name])) for name in ("delta", "beta", "rho", "coefficient")}
    controller, other = (build_controller(kind, settings) for _ in range(2))
    for kl in kls:
        low, high = price(controller, kl), price(controller, kl + 1e-3)
        assert 0 <= low.coefficient <= high.coefficient and low.penalty <= high.penalty
        # Convex: the slope lies between those of the ends.
        rise = (high.penalty - low.penalty) / 1e-3
        slack = 1e-6 * (1 + abs(high.coefficient)) + 1e-10 * abs(high.penalty)
        assert low.coefficient - slack <= rise <= high.coefficient + slack
        controller.end_step(kl)
        other.load_state_dict(controller.state_dict())
        assert other == controller and price(other, kl) == price(controller, kl)


@cases(200)
@given(batches(parts=(3,)), methods())
def test_sessions_keep_sums(batch, method):
    table = table_of(batch, method, False)
    whole, member = by_session(table)
    assert whole.length.sum() == table.length.sum() and len(whole.session) == len(set(batch.session.tolist()))
    near(whole.kl.sum(), table.kl.sum())
    near((whole.score * whole.length).sum(), (table.score * table.length).sum())
    assert (whole.question[member] == table.question).all() and (whole.reward[member] == table.reward).all()


@cases(200)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 9)), max_size=12), st.floats(-100, 100))
def test_the_standard_error_of_the_kl(rows, scale):
    kl, length = torch.tensor([x for x, _ in rows], dtype=torch.float64), torch.tensor([n for _, n in rows])
    error = kl_standard_error(kl, length)
    assert (error is None) == (sum(n > 0 for _, n in rows) < 2)
    if error is not None:
        assert 0 <= error < float("inf")
        rounded = 1e-12 * (1 + float(kl.abs().max())) * (1 + abs(scale))
        assert kl_standard_error(kl.flip(0), length.flip(0)) == pytest.approx(error, 1e-9, rounded)
        assert kl_standard_error(scale * kl, length) == pytest.approx(abs(scale) * error, 1e-9, rounded)
        # Every response with the same KL per token: no error.
        near(kl_standard_error(length * 0.25, length), 0.0)


@cases(200)
@given(
    st.lists(st.floats(0, 1, width=16), min_size=2, max_size=9).filter(lambda x: len(set(x)) > 1), st.floats(0.1, 10)
)
def test_weights_of_pairs(reward, scale):
    reward = torch.tensor(reward, dtype=torch.float64)
    pairs = pair_weights(reward)
    near(pairs.sum(), 1.0)
    assert (pairs >= 0).all() and (pairs * pairs.T == 0).all()
    near(pair_weights(scale * reward - 3), pairs, 1e-8)


@cases(200)
@given(st.lists(st.one_of(st.integers(), st.text(max_size=2), st.tuples(st.integers(), st.none())), max_size=20))
def test_questions_are_numbered_by_first_appearance(uid):
    numbers = question_ids(uid)
    assert [uid.index(u) for u in uid] == [numbers.index(n) for n in numbers]
    assert sorted(set(numbers)) == list(range(len(set(numbers))))


@cases(200)
@given(numbers, st.one_of(st.none(), st.floats(allow_nan=False)), st.one_of(st.none(), st.floats(allow_nan=False)))
def test_a_finite_number_within_bounds(value, minimum, above):
    try:
        found = require_finite("a", value, minimum=minimum, above=above)
    except ValueError as e:
        assert str(e).startswith("a=")
        return
    assert np.isfinite(found) and found == value and (minimum is None or found >= minimum)
    assert above is None or found > above


# What trainer and worker call -----------------------------------------------------------------------------------------


def settings_node(method):
    """As the run's settings hold them."""
    return OmegaConf.create({"disco": method})


@cases(100)
@given(batches(), methods(), st.booleans())
def test_the_loss_under_a_runs_settings_is_the_definitions(batch, method, corrected):
    tensors = dict(log_prob=batch.log_prob, old_log_prob=batch.old_log_prob, response_mask=batch.mask)
    tensors |= dict(reward=batch.reward, uid=batch.uid, session=batch.session, ref_log_prob=batch.ref_log_prob)
    tensors["rollout_is_weights"] = batch.rho if corrected else None
    assert RECIPE.losses["disco"](settings_node(method), **tensors).item() == defined(batch, method, corrected)[0]
    bound = RECIPE.kl_bound({f"disco.{name}": value for name, value in method.items()})
    assert bound == (method["delta"] if "delta" in settings_of(CONTROLLERS[method["constraint"]]) else None)


@cases(150)
@given(batches(parts=(1,)), methods(), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_advantage_is_the_weight_of_the_update_at_pi_old(batch, method, progress):
    """Each response's dJ/ds, times the questions over which J is a mean."""
    at_old = replace(batch, log_prob=batch.old_log_prob)
    expected = plan_update(
        table_of(at_old, method, False),
        OBJECTIVES.build(method["objective"], method).at(progress),
        build_controller(method["constraint"], method),
        positive_threshold=1.0,
        graded=method["pairs"] == "graded",
        question_weight=QUESTIONS.build(method["questions"], method),
    )
    rows = [RowKey(f"q{q}", s, 0) for q, s in zip(batch.uid.tolist(), batch.session.tolist(), strict=True)]
    rewards = torch.zeros(batch.mask.shape, dtype=torch.float64)
    rewards[:, 0] = batch.reward
    columns = {"old_log_probs": batch.old_log_prob, "ref_log_prob": batch.ref_log_prob}
    with estimating(settings_node(method), columns.__getitem__, rows, progress):
        found, returns = disco_advantage(rewards, batch.mask, batch.uid.tolist())
    assert torch.equal(found, returns) and not found[~batch.mask].any()
    count = len(set(batch.uid.tolist()))
    near(found, expected.weight[:, None] * count * batch.mask, max(1e-6, rounding(method)))
    # Any other trainer is told what is missing.
    with pytest.raises(ValueError, match="algorithm.adv_estimator=disco needs the batch's log-probabilities"):
        disco_advantage(rewards, batch.mask, batch.uid.tolist())


FORMULAS = {
    # verl divides by the sample's standard deviation, hence (n - 1) / n.
    "grpo": lambda p, n: math.sqrt(p * (1 - p) * (n - 1) / n),
    "dgpo": lambda p, n: 0.5 * (n - 1) * math.exp(-p / 2) / sum(math.exp(-i / n / 2) for i in range(1, n)),
    "disco": lambda p, n: 1.0,
}
composed = cache(weights.compose)


@cases(12)
@given(st.sampled_from([*FORMULAS]), st.integers(2, 20))
def test_a_question_has_the_weight_of_its_formula_at_any_group_size(algorithm, n):
    found = weights.question_weights(composed(algorithm, f"data.max_response_length={weights.TOKENS}"), n)
    assert found == pytest.approx([FORMULAS[algorithm](right / n, n) for right in range(1, n)], rel=1e-5)


class Reads(Controller):
    """A controller that reads the KL or not, and learns or not."""

    def __init__(self, reads, state):
        self.reads_kl, self._state = reads, state

    def penalty(self, kl):
        return kl

    def state_dict(self):
        return self._state


@cases(200)
@given(*[st.booleans()] * 7, st.sampled_from([{}, {"multiplier": 1.0}]))
def test_what_is_left_out_of_a_pass_is_not_needed(local, bypass, skip, first, lagged, needs_all, reads, state):
    facts = BatchFacts.before(int(local), 2, bypass, skip)
    run = passes(facts, first, lagged, Reads(reads, state), needs_all)
    # A KL that is not 0 is measured, or the last one's; where it may act, or be learned from, on all rows.
    at_pi_old = first and not bypass and not local
    assert run.free == (lagged or at_pi_old)
    assert not run.measure_mixed or not (run.free or reads)
    assert not run.train_some or not (lagged and state)
    # Entropy is logged once per rollout, by verl or by a pass that runs and sees all rows.
    assert (run.with_entropy is not None) == (first and bypass)
    assert run.with_entropy != "measuring" or not (run.free or run.measure_mixed)
    assert run.with_entropy != "training" or lagged and not run.train_some
    if needs_all or not skip:
        assert not run.measure_mixed and not run.train_some
    elif at_pi_old and not lagged:
        assert run.train_some


@cases(150)
@given(batches(), methods())
def test_rows_of_whole_questions(batch, method):
    table = table_of(batch, method, False)
    plan = planned(table, method)
    found = of_whole_questions(plan, table)
    trained = {q for q, needed in zip(batch.uid.tolist(), plan.needs_gradient.tolist(), strict=True) if needed}
    tokens = batch.mask.any(-1).tolist()
    assert found.tolist() == [q in trained and some for q, some in zip(batch.uid.tolist(), tokens, strict=True)]
    assert not (plan.needs_gradient & ~found).any()


@cases(100)
@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=5), min_size=1, max_size=5))
def test_padding_is_zero_and_at_the_end(rows):
    jagged = torch.nested.nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)
    found = padded(jagged)
    assert found.shape == (len(rows), max(map(len, rows)))
    assert found.tolist() == [row + [0.0] * (found.shape[1] - len(row)) for row in rows]
    assert padded(found) is found


@cases(150)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 9),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_mini_batches_stay_whole_in_any_order(count, rows, ranks, epochs, shuffle, seed, random):
    size = count * rows
    mini_batch = torch.arange(count).repeat_interleave(rows)

    def batch(order):
        data = TensorDict({"mini_batch_id": mini_batch[order], "row": torch.arange(size)}, batch_size=[size])
        options = {"shuffle": shuffle, "x": 1}
        tu.assign_non_tensor(data, dataloader_kwargs=NonTensorData(options), epochs=epochs, seed=seed)
        return data

    found = keep_mini_batches_whole(batch(list(range(size))), ranks)
    assert tu.get(found, "mini_batch_size") == rows * ranks and tu.get(found, "dataloader_kwargs") == {"x": 1}
    passes_of_verl = tu.get(found, "epochs")
    seen = found["row"].view(-1, rows).tolist() * passes_of_verl
    whole = torch.arange(size).view(count, rows).tolist()
    assert len(seen) == count * epochs
    for epoch in range(epochs):
        now = seen[epoch * count : (epoch + 1) * count]
        assert sorted(now) == whole and (shuffle or now == whole)
    # Every rank takes the same order.
    again = keep_mini_batches_whole(batch(list(range(size))), ranks)
    assert torch.equal(again["row"], found["row"])
    order = list(range(size))
    random.shuffle(order)
    if mini_batch[order].tolist() != mini_batch.tolist():
        with pytest.raises(ValueError, match="reordered after verl_ext.training had dealt it"):
            keep_mini_batches_whole(batch(order), ranks)
