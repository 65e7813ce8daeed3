"""What a user's objective, score or constraint gives is checked: what is wrong stops the run, by its name."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from named import evaluate, objective_of, score_of, weigh

from recipe.disco import disco_loss
from recipe.disco.constraint import CONTROLLERS, Controller, Unconstrained, build_controller
from recipe.disco.metrics import group_metrics
from recipe.disco.objectives import OBJECTIVES, Disco, Objective, Sides
from recipe.disco.scores import SCORES, Score, masked, token_mean
from recipe.disco.settings import DiscoConfig


@pytest.fixture
def mine(monkeypatch):
    """Registers implementations under the name "mine", for one test."""
    for registry in (OBJECTIVES, SCORES, CONTROLLERS):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    return lambda registry, item: registry.register("mine")(item)


# Question 7 has no negative; 4 and 9 are mixed, 1:2 and 2:1.
QUESTION = torch.tensor([7, 4, 9, 4, 9, 4, 9])
POSITIVE = torch.tensor([True, True, True, False, True, False, False])
SCORE = torch.tensor([-0.1, -0.5, -0.2, -0.9, -0.4, -0.3, -0.8], dtype=torch.float64)
LENGTH = torch.tensor([3, 2, 4, 1, 5, 2, 6])


def weigh_mine(**settings):
    return weigh("mine", SCORE, POSITIVE, QUESTION, LENGTH, settings)


def difference(group):
    return group.positive.mean() - group.negative.mean()


@pytest.mark.parametrize(
    "objective, found",
    [
        (lambda g: Sides(difference(g) * math.nan, g.negative.sum() * 0), r"\(nan, -?0.0\)"),
        (lambda g: Sides(difference(g) / (len(g.positive) - 2), 0.0), r"\(-?inf, 0.0\)|\(nan, 0.0\)"),
        (lambda g: Sides(g.positive, g.negative), r"sides of shape \[\(\d,\), \(\d,\)\]"),
        (lambda g: Sides(difference(g)[None], torch.zeros(1)), r"sides of shape \[\(1,\), \(1,\)\]"),
        (lambda g: (difference(g),), r"sides of shape \[\(\)\]"),
        (lambda g: (difference(g), 0.0, 0.0), r"sides of shape \[\(\), \(\), \(\)\]"),
        (lambda g: difference(g), r"tensor\("),
        (lambda g: None, "None"),
        (lambda g: {"positive": difference(g), "negative": 0.0}, r"\{'positive': "),
        (lambda g: 1 / 0, "an error, ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_result_of_an_objective_stops_with_its_name_and_the_question(mine, objective, found):
    mine(OBJECTIVES, objective_of(objective))
    with pytest.raises(ValueError, match=rf"disco.objective=mine gave ({found}).* for question [49], .*finite Sides"):
        weigh_mine()


def test_nan_for_some_questions_names_the_first_of_them(mine):
    mine(OBJECTIVES, objective_of(lambda g: Sides(difference(g) * (math.nan if len(g.positive) == 2 else 1.0), 0.0)))
    with pytest.raises(ValueError, match="for question 9, of 2 positive and 1 negative responses"):
        weigh_mine()
    with pytest.raises(ValueError, match="disco.objective=mine gave .*nan.* for question 2"):
        disco_loss(-torch.rand(7, 3), -torch.rand(7, 3), torch.ones(7, 3), POSITIVE.float(), QUESTION, objective="mine")


def test_an_infinite_derivative_names_the_question(mine):
    # Finite, yet its derivative at 0 is not.
    mine(OBJECTIVES, objective_of(lambda g: Sides(torch.sqrt((g.positive - g.positive.detach()).sum()), 0.0)))
    with pytest.raises(ValueError, match=r"disco.objective=mine has the derivative (nan|inf) by a score .* question 4"):
        weigh_mine()


@pytest.mark.parametrize(
    "objective",
    [
        lambda g: Sides(torch.tensor(difference(g).item()), 0.0),
        lambda g: Sides(difference(g).detach(), torch.zeros(())),
        lambda g: Sides(float(np.mean(g.positive.detach().numpy())), 0),
    ],
)
def test_an_objective_without_a_gradient_is_refused(mine, objective):
    mine(OBJECTIVES, objective_of(objective))
    with pytest.raises(
        ValueError, match="disco.objective=mine gave .* without a gradient, so nothing would be learned"
    ):
        weigh_mine()
    with torch.no_grad():
        # Where none is asked for, the value is all there is.
        assert evaluate("mine", SCORE.clone().requires_grad_(), POSITIVE, QUESTION, LENGTH, {}).value != 0


def test_an_objective_may_leave_questions_out_and_give_plain_numbers(mine):
    mine(OBJECTIVES, objective_of(lambda g: Sides(difference(g), 0) if len(g.positive) > 1 else Sides(0.0, 0.0)))
    result, weight = weigh_mine()
    assert float(result.value) == pytest.approx((-0.3 + 0.8) / 3)
    assert (weight != 0).tolist() == [False, False, True, False, True, False, True]
    metrics = group_metrics(SCORE, POSITIVE, QUESTION, LENGTH, weight)
    # Question 4 has no weight to take shares of.
    assert metrics["effective_negatives"] == 1.0 and all(map(math.isfinite, metrics.values()))


def test_a_squared_hinge_at_rest_leaves_the_metrics_finite():
    score = torch.tensor([5.0, 0.0, -1.0])
    table = (score, torch.tensor([True, False, False]), torch.zeros(3, dtype=torch.long), torch.ones(3))
    _, weight = weigh("disco", *table, {"tau": 1.0, "surrogate": "squared_hinge", "negatives": "mean"})
    assert not weight.any()
    metrics = group_metrics(*table, weight)
    assert "effective_negatives" not in metrics and all(map(math.isfinite, metrics.values()))


def test_a_stacked_objective_sees_questions_of_like_sizes_at_once(mine):
    shapes = []

    def difference_of_means(group):
        shapes.append((tuple(group.positive.shape), tuple(group.negative.shape)))
        return Sides(group.positive.mean(-1), group.negative.mean(-1))

    mine(OBJECTIVES, objective_of(difference_of_means, stacked=True))

    question = torch.arange(5).repeat_interleave(3)
    positive = torch.tensor([True, False, False]).repeat(5)
    score = torch.linspace(-1, 0, 15, dtype=torch.float64) ** 3
    _, weight = weigh("mine", score, positive, question, torch.ones(15), {})
    _, expected = weigh("disco_b", score, positive, question, torch.ones(15), {})
    assert shapes == [((5, 1), (5, 2))] and torch.equal(weight, expected)
    del OBJECTIVES._items["mine"]
    mine(OBJECTIVES, objective_of(lambda g: Sides(g.positive.mean(), g.negative.mean()), stacked=True))
    with pytest.raises(ValueError, match=r"disco.objective=mine gave sides of shape \[\(\), \(\)\] for question 0"):
        weigh("mine", score, positive, question, torch.ones(15), {})


def loss_of_mine(score="mine", constraint="squared_hinge", **settings):
    g = torch.Generator().manual_seed(0)
    log_prob, old = (-torch.rand(7, 3, generator=g) for _ in range(2))
    return disco_loss(
        log_prob.requires_grad_(),
        old,
        torch.ones(7, 3),
        POSITIVE.float(),
        QUESTION,
        score=score,
        tau=1.0,
        constraint=constraint,
        **settings,
    )


@pytest.mark.parametrize(
    "score, message",
    [
        (
            lambda lp, old, mask: masked(lp, mask),
            r"gave torch.float32 of shape \(7, 3\); it must give one number per res",
        ),
        (lambda lp, old, mask: masked(lp, mask).sum(), r"gave torch.float32 of shape \(\);"),
        (lambda lp, old, mask: masked(lp, mask).sum(-1, keepdim=True), r"gave torch.float32 of shape \(7, 1\);"),
        (lambda lp, old, mask: mask.sum(-1), r"gave torch.int64 of shape \(7,\);"),
        (lambda lp, old, mask: lp.sum(-1).tolist(), r"gave \[-"),
        (lambda lp, old, mask: None, "gave None;"),
        (lambda lp, old, mask: masked(lp, mask).sum(-1).detach(), "has no gradient, so nothing would be learned"),
        (lambda lp, old, mask: token_mean(lp, mask) * math.nan, None),
        (lambda lp, old, mask: token_mean(lp, mask) / 0, None),
    ],
)
def test_a_wrong_result_of_a_score_stops_with_its_name(mine, score, message):
    mine(SCORES, score_of(score))
    with pytest.raises(ValueError, match=f"score=mine {message}" if message else "the score of sample 0 is NaN or inf"):
        loss_of_mine()


def controller_of(fn, state=None) -> type[Controller]:
    @dataclass
    class Mine(Controller):
        def penalty(self, kl):
            return fn(kl)

        def state_dict(self):
            return state or {}

    return Mine


@pytest.mark.parametrize(
    "penalty, message",
    [
        (lambda kl: torch.sqrt(kl - kl), r"its coefficient is (nan|inf)"),
        (lambda kl: kl / 0, r"its penalty is -?(inf|nan)"),
        (lambda kl: kl * math.nan, "its penalty is nan"),
        (lambda kl: kl.expand(2), r"its penalty is tensor\(\["),
        (lambda kl: 0.0 * float(kl), r"its penalty is -?0.0 "),
        (lambda kl: kl.detach(), r"its penalty is -?\d.*computed from kl by torch"),
        (lambda kl: None, "its penalty is None"),
    ],
)
def test_a_wrong_result_of_a_constraint_stops_with_its_name(mine, penalty, message):
    mine(CONTROLLERS, controller_of(penalty))
    with pytest.raises(ValueError, match=rf"disco.constraint=mine: {message}"):
        loss_of_mine("log_l", "mine")


def test_a_state_that_no_checkpoint_can_hold_is_refused_at_the_start(mine):
    for state in ({"seen": torch.zeros(1)}, {"gain": math.inf}):
        CONTROLLERS._items.pop("mine", None)
        mine(CONTROLLERS, controller_of(lambda kl: 0 * kl, state))
        with pytest.raises(ValueError, match="disco.constraint=mine has a state that JSON cannot hold"):
            build_controller("mine", {})


def test_what_is_registered_is_a_dataclass_of_the_right_kind():
    @dataclass(frozen=True)
    class Right(Objective):
        margin: float = 1.0

    class WithoutDecorator(Right):
        power: float = 2.0

    for registry, cls in ((OBJECTIVES, WithoutDecorator), (OBJECTIVES, controller_of(None)), (SCORES, Right)):
        with pytest.raises(TypeError, match=f"disco.{registry.setting}=mine: .* must be a dataclass that inh"):
            registry.register("mine")(cls)


def test_a_score_without_a_published_tau_asks_for_one(mine):
    mine(SCORES, score_of(lambda lp, old, mask: token_mean(lp, mask)))
    with pytest.raises(ValueError, match="disco.score=mine has no published tau; set disco.tau"):
        DiscoConfig(score="mine")
    with pytest.raises(ValueError, match="disco.objective=disco needs the setting .tau."):
        disco_loss(SCORE[:, None], SCORE[:, None], torch.ones(7, 1), POSITIVE.float(), QUESTION, score="mine")
    # DisCO-b reads none.
    assert DiscoConfig(score="mine", objective="disco_b").tau is None
    assert DiscoConfig(score="mine", tau=3.0).build_objective() == Disco(tau=3.0)


def test_a_default_that_would_never_hold_is_refused(mine):
    @dataclass(frozen=True)
    class Mine(Objective):
        scale: float = 10.0

    mine(OBJECTIVES, Mine)
    with pytest.raises(ValueError, match=r"the default 10.0 of 'scale' would never hold, .* \(1.0\)"):
        DiscoConfig(objective="mine")


def test_settings_of_a_score_have_an_effect_whatever_the_objective(mine):
    @dataclass(frozen=True)
    class Mine(Score):
        scale: float = 1.0

    mine(SCORES, Mine)
    assert DiscoConfig(score="mine", objective="real", tau=1.0, scale=2.0).build_score().scale == 2.0


@pytest.mark.parametrize("name, value", [("negatives", "maen"), ("surrogate", "logitsic")])
def test_a_misspelt_choice_is_refused_wherever_it_is_made(name, value):
    with pytest.raises(ValueError, match=rf"disco.{name}='{value}' is unknown; choose from \["):
        Disco(tau=1.0, **{name: value})
    with pytest.raises(ValueError, match=rf"disco.{name}='{value}' is unknown; choose from \["):
        DiscoConfig(**{name: value})


def test_a_number_as_text_is_refused():
    with pytest.raises(ValueError, match="disco.tau='10' is not a finite number > 0"):
        DiscoConfig(tau="10")


def test_a_penalty_that_reads_a_kl_which_is_not_measured_is_refused(monkeypatch):
    monkeypatch.setattr(CONTROLLERS, "_items", dict(CONTROLLERS._items))

    @CONTROLLERS.register("gentle")
    @dataclass
    class Gentle(Unconstrained):
        def penalty(self, kl):
            return 500 * torch.relu(kl) ** 2

    with pytest.raises(ValueError, match="disco.constraint=gentle has reads_kl = False, .* set reads_kl = True"):
        build_controller("gentle", {})
    Gentle.reads_kl = True
    assert build_controller("gentle", {}).reads_kl
    assert not build_controller("none", {}).reads_kl
