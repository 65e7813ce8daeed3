"""Surrogates, aggregates over negatives and the relatives of DisCO: value and weights, each written out again."""

import math
from dataclasses import dataclass

import pytest
import torch
from named import coefficient, weigh

from recipe.disco import Controller, QuestionWeight, disco_loss, objectives, register_controller, register_questions
from recipe.disco.objectives import NEGATIVES, SURROGATES, Disco
from recipe.disco.questions import DGPO, GRPO, QUESTIONS, FailureRate, Uniform, by_question
from recipe.disco.settings import DiscoConfig, load_once

SURROGATE = {
    "identity": lambda d: d,
    "logistic": lambda d: -math.log(1 + math.exp(-d)),
    "squared_hinge": lambda d: -(max(1 - d, 0.0) ** 2),
}
SLOPE = {
    "identity": lambda d: 1.0,
    "logistic": lambda d: 1 / (1 + math.exp(d)),
    "squared_hinge": lambda d: 2 * max(1 - d, 0.0),
}


def shares(negatives: str, gains: list[float], tau: float, top_share: float) -> list[float]:
    """What each negative's gain counts for a positive: the derivative of the aggregate."""
    if negatives == "mean":
        return [1 / len(gains)] * len(gains)
    if negatives == "softmax":
        e = [math.exp(-(g - min(gains)) / tau) for g in gains]
        return [x / sum(e) for x in e]
    k = math.ceil(top_share * len(gains))
    hardest = sorted(range(len(gains)), key=gains.__getitem__)[:k]
    return [1 / k if j in hardest else 0.0 for j in range(len(gains))]


def aggregate(negatives: str, gains: list[float], tau: float, top_share: float) -> float:
    if negatives == "softmax":
        return -tau * math.log(sum(math.exp(-g / tau) for g in gains) / len(gains))
    return sum(w * g for w, g in zip(shares(negatives, gains, tau, top_share), gains, strict=True))


@pytest.mark.parametrize("surrogate", list(SURROGATES))
@pytest.mark.parametrize("negatives", list(NEGATIVES))
@pytest.mark.parametrize("right, wrong", [(1, 1), (3, 5), (6, 2)])
def test_value_and_weights_have_the_closed_form(surrogate, negatives, right, wrong):
    settings = dict(surrogate=surrogate, negatives=negatives, tau=0.7, top_share=0.4, scale=1.5)
    score = torch.randn(right + wrong, generator=torch.Generator().manual_seed(right), dtype=torch.float64)
    positive = torch.arange(right + wrong) < right
    result, weight = weigh(
        "disco", score, positive, torch.zeros(len(score), dtype=torch.long), torch.ones(len(score)), settings
    )
    s = score.tolist()
    value, expected = 0.0, [0.0] * len(s)
    for i in range(right):
        differences = [1.5 * (s[i] - s[j]) for j in range(right, len(s))]
        gains = [SURROGATE[surrogate](d) for d in differences]
        value += aggregate(negatives, gains, 0.7, 0.4) / right
        for j, (d, share) in enumerate(zip(differences, shares(negatives, gains, 0.7, 0.4), strict=True)):
            slope = 1.5 * share * SLOPE[surrogate](d) / right
            expected[i] += slope
            expected[right + j] -= slope
    assert float(result.value) == pytest.approx(value, rel=1e-12)
    assert weight.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_surrogates_do_not_decrease():
    d = torch.linspace(-5, 5, 101, dtype=torch.float64)
    for fn in SURROGATES.values():
        assert (fn(d).diff() >= 0).all()


@pytest.mark.parametrize("share, n, kept", [(0.25, 8, 2), (0.25, 7, 2), (0.01, 7, 1), (1.0, 3, 3), (0.3, 10, 3)])
def test_topk_keeps_a_share_of_the_negatives_and_at_least_one(share, n, kept):
    score = torch.arange(n + 1.0, dtype=torch.float64)
    settings = dict(surrogate="identity", negatives="topk", tau=1.0, top_share=share, scale=1.0)
    positive = torch.arange(n + 1) == 0
    _, weight = weigh("disco", score, positive, torch.zeros(n + 1, dtype=torch.long), torch.ones(n + 1), settings)
    # The hardest are those that score highest.
    assert (weight < 0).tolist() == [False] + [False] * (n - kept) + [True] * kept


def test_drpo_prefers_short_positives_and_turns_into_disco():
    score = torch.tensor([-0.5, -0.5, -0.7], dtype=torch.float64)
    positive, question = torch.tensor([True, True, False]), torch.zeros(3, dtype=torch.long)
    length = torch.tensor([100, 300, 200])
    settings = dict(tau=10.0, length_temperature=0.1, max_length=1000)
    _, weight = weigh("drpo", score, positive, question, length, settings)
    assert weight[0] / weight[1] == pytest.approx(math.exp((300 - 100) / 1000 / 0.1))
    assert float(weight[:2].sum()) == pytest.approx(1) and float(weight[2]) == pytest.approx(-1)
    _, flat = weigh("drpo", score, positive, question, length, settings | {"length_temperature": 1e9})
    _, disco = weigh("disco", score, positive, question, length, {"tau": 10.0})
    torch.testing.assert_close(flat, disco)


def test_reals_weights_are_bounded_by_one_over_tau():
    for far in (-1e3, 0.0, 1e3):
        score = torch.tensor([-far, 0.1, far, -0.2], dtype=torch.float64)
        positive = torch.tensor([True, True, False, False])
        _, weight = weigh("real", score, positive, torch.zeros(4, dtype=torch.long), torch.ones(4), {"tau": 0.5})
        assert weight.isfinite().all() and weight.abs().max() <= 2


def batch(seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    shape = (8, 5)
    log_prob = -torch.rand(shape, generator=g, dtype=torch.float64)
    return dict(
        log_prob=log_prob,
        old_log_prob=log_prob + 0.1 * torch.randn(shape, generator=g, dtype=torch.float64),
        response_mask=torch.ones(shape),
        reward=torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0]),
        uid=[0, 0, 0, 0, 1, 1, 1, 1],
    )


def test_a_score_against_a_reference_needs_one():
    with pytest.raises(ValueError, match="log_ratio_ref compares with a reference .*, but there is no ref_log_prob"):
        disco_loss(**batch(), score="log_ratio_ref")


def test_reference_and_behaviour_policy_give_the_same_where_they_are_the_same():
    data = batch()
    by_reference, _ = disco_loss(**data, tau=1.0, score="log_ratio_ref", ref_log_prob=data["old_log_prob"])
    assert by_reference == disco_loss(**data, tau=1.0, score="log_ratio")[0]


def test_nan_of_the_reference_names_the_sample():
    data = batch()
    reference = data["old_log_prob"].clone()
    reference[3, 1] = float("nan")
    with pytest.raises(ValueError, match="ref_log_prob of sample 3 is NaN"):
        disco_loss(**data, score="log_ratio_ref", ref_log_prob=reference)


@pytest.mark.parametrize("setting", [dict(surogate="logistic"), dict(objective="drpo", surrogate="logistic")])
def test_a_setting_that_nothing_uses_is_refused(setting):
    with pytest.raises(ValueError, match=r"sur+ogate is no setting of objective="):
        disco_loss(**batch(), **setting)


def test_a_missing_setting_is_named():
    with pytest.raises(ValueError, match=r"drpo needs the setting 'length_temperature'"):
        disco_loss(**batch(), objective="drpo")


def test_a_users_module_registers_an_objective_with_settings_of_its_own(tmp_path):
    module = tmp_path / "mine.py"
    module.write_text(
        "from dataclasses import dataclass\n"
        "from recipe.disco import Objective, Sides, register_objective\n"
        "@register_objective('only_positives')\n"
        "@dataclass(frozen=True)\n"
        "class OnlyPositives(Objective):\n"
        "    factor: float\n"
        "    def __call__(self, group):\n"
        "        return Sides(self.factor * group.positive.mean(), 0 * group.negative.mean())\n"
    )
    with pytest.raises(
        ValueError, match=r"needs the setting 'factor'; give it \(in a run: .*\+disco.options.factor=VALUE "
    ):
        DiscoConfig(objective="only_positives", module=str(module))
    config = DiscoConfig(objective="only_positives", module=str(module), options={"factor": 3.0})
    _, metrics = disco_loss(**batch(), **config.chosen())
    s = batch()["log_prob"].mean(-1)
    assert metrics["objective"] == pytest.approx(3 * float((s[[0, 3]].mean() + s[5]) / 2))


def scored(seed: int, rewards: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    score = torch.randn(len(rewards), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return score.requires_grad_(), torch.tensor(rewards, dtype=torch.float64)


@pytest.mark.parametrize("surrogate", list(SURROGATES))
@pytest.mark.parametrize("negatives", list(NEGATIVES))
def test_graded_pairs_have_the_closed_form_whatever_shift_and_scale_of_the_rewards(surrogate, negatives):
    score, reward = scored(3, [0.0, 0.25, 0.25, 1.0, 0.5, 0.0, 0.75])
    objective = Disco(surrogate=surrogate, negatives=negatives, tau=0.7, top_share=0.4, scale=1.5)
    value = total = 0.0
    s, r = score.tolist(), reward.tolist()
    for high, top in zip(s, r, strict=True):
        below = [(top - q, SURROGATE[surrogate](1.5 * (high - low))) for low, q in zip(s, r, strict=True) if q < top]
        if not below:
            continue
        apart = sum(w for w, _ in below)
        if negatives == "softmax":
            gain = -0.7 * math.log(sum(w * math.exp(-g / 0.7) for w, g in below) / apart)
        else:
            if negatives == "topk":
                below = sorted(below, key=lambda pair: pair[1])[: math.ceil(0.4 * len(below))]
            gain = sum(w * g for w, g in below) / sum(w for w, _ in below)
        value, total = value + apart * gain, total + apart
    zeros = torch.zeros(len(s), dtype=torch.long)
    for rewards in (reward, 4 * reward - 1):
        questions = by_question(rewards >= 1, zeros, zeros + 1, rewards)
        result, weight = objectives.weigh(objective, score, questions.positive, zeros, zeros + 1, questions)
        assert float(result.value) == pytest.approx(value / total, rel=1e-12)
        # Those above their mean are pulled up on the whole, and nothing moves the sum.
        assert float(weight[reward > reward.mean()].sum()) >= 0 and float(weight.sum()) == pytest.approx(0, abs=1e-12)


def test_graded_rewards_are_compared_as_verl_keeps_them():
    reward = torch.tensor([0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.long)
    assert not by_question(reward >= 1, zeros, zeros + 1, reward).mixed


def test_a_response_without_a_token_counts_in_no_rate():
    reward, zeros = torch.tensor([1.0, 0.5, 0.0, 0.0]), torch.zeros(4, dtype=torch.long)
    length = torch.tensor([3, 3, 3, 0])
    assert float(by_question(reward >= 1, zeros, length).rate) == pytest.approx(1 / 3)
    assert float(by_question(reward >= 1, zeros, length, reward).rate) == pytest.approx(1 / 2)


def test_a_question_counts_by_its_factor_and_q_counts_all():
    data = batch()
    plain = disco_loss(**data, objective="disco_b", constraint="none")[1]
    for name, c in (("uniform", (1, 1)), ("failure_rate", (0.5, 0.75)), ("grpo", (0.5, math.sqrt(3) / 4))):
        _, metrics = disco_loss(**data, objective="disco_b", constraint="none", questions=name)
        s = data["log_prob"].mean(-1)
        of_a = s[[0, 3]].mean() - s[[1, 2]].mean()
        of_b = s[5] - s[[4, 6, 7]].mean()
        assert metrics["objective"] == pytest.approx(float(c[0] * of_a + c[1] * of_b) / 2)
        assert metrics["auc"] == plain["auc"] and ("question_weight" in metrics) == (name != "uniform")


@pytest.mark.parametrize("pairs", ["threshold", "graded"])
@pytest.mark.parametrize("question_weight", [Uniform(), FailureRate(), DGPO(0.5), GRPO()])
def test_factors_do_not_depend_on_the_order_of_rows_or_on_padding(question_weight, pairs):
    g = torch.Generator().manual_seed(1)
    reward = torch.randint(0, 3, (40,), generator=g) / 2
    question, length = torch.randint(0, 6, (40,), generator=g), torch.randint(0, 4, (40,), generator=g)
    score = torch.randn(40, generator=g, dtype=torch.float64)

    def weights(reward, question, length, score):
        questions = by_question(reward >= 1, question, length, reward if pairs == "graded" else None)
        rows = (score, questions.positive, question, length)
        return objectives.weigh(Disco(tau=0.5), *rows, questions, question_weight)[1]

    rows, order = (reward, question, length, score), torch.randperm(40, generator=g)
    found = weights(*rows)
    torch.testing.assert_close(weights(*(x[order] for x in rows)), found[order], rtol=1e-12, atol=1e-15)
    padding = [torch.cat([x, x.new_full((3,), y)]) for x, y in zip(rows, (5.0, -1, 2, 7.0), strict=True)]
    torch.testing.assert_close(weights(*padding)[:40], found, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "rewards, questions, message",
    [
        ([-1.0, 1, 0.5, -1], "grpo", "disco.questions=grpo gave nan for question 0, .* 0.* need rewards from 0 to 1"),
        ([3.0, 1, 2, 2], "failure_rate", r"failure_rate gave -1\.0 for question 0, whose .* is 2"),
    ],
)
def test_factors_that_are_no_weights_are_refused(rewards, questions, message):
    data = batch() | {"reward": torch.tensor([*rewards, 0, 0, 0, 0]), "uid": [0] * 4 + [1] * 4}
    with pytest.raises(ValueError, match=message):
        disco_loss(**data, pairs="graded", questions=questions)


def test_a_users_weights_of_questions_have_settings_of_their_own():
    @register_questions("mine")
    @dataclass(frozen=True)
    class Mine(QuestionWeight):
        power: float

        def __call__(self, p, n, mixed):
            return (1 - p) ** self.power

    try:
        with pytest.raises(
            ValueError, match=r"questions=mine needs the setting .power.; .*\+disco.options.power=VALUE"
        ):
            DiscoConfig(questions="mine")
        config = DiscoConfig(questions="mine", options={"power": 1.0})
        expected = disco_loss(**batch(), questions="failure_rate")
        assert disco_loss(**batch(), **config.chosen()) == expected
    finally:
        del QUESTIONS._items["mine"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(question_temperature=1.0), "disco.question_temperature=1.0 has no effect with disco.questions=uniform"),
        (
            dict(objective="maxrl", questions="dgpo"),
            "questions=dgpo does not go with disco.objective=maxrl, which is fai",
        ),
        (dict(objective="maxrl", pairs="graded"), r"pairs=graded does not go with .*=maxrl.*\['disco', 'disco_b'\]"),
        (dict(objective="real", pairs="graded"), "pairs=graded does not go with disco.objective=real"),
        (dict(objective="drpo", pairs="graded"), "pairs=graded does not go with disco.objective=drpo"),
        (dict(pairs="gradual"), r"disco.pairs='gradual' is unknown; choose from \['graded', 'threshold'\]"),
        (dict(questions="hard"), "disco.questions='hard' is unknown; choose from .*'dgpo'"),
        (dict(questions="dgpo", question_temperature=0), "disco.question_temperature=0 is not a finite number > 0"),
    ],
)
def test_pairs_and_questions_that_do_not_go_with_the_objective_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiscoConfig(**settings)
    if "has no effect" not in message:
        with pytest.raises(ValueError, match=message):
            disco_loss(**batch(), **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(objective="drpo", surrogate="logistic"), "disco.surrogate=logistic has no effect with .*=drpo"),
        (dict(objective="real", scale=2.0), "disco.scale=2.0 has no effect with disco.objective=real"),
        (dict(max_length=100), "disco.max_length=100 has no effect with disco.objective=disco"),
        (dict(objective="disco_b", negatives="topk"), "disco.negatives=topk has no effect"),
        (
            dict(options={"margn": 1}),
            r"disco.options.margn is no setting of .*read \['beta', 'delta', 'negatives'",
        ),
        (dict(options={"tau": -5}), "disco.options.tau would hide disco.tau"),
    ],
)
def test_settings_without_an_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiscoConfig(**settings)


def test_a_registered_controller_may_have_settings_of_its_own():
    from recipe.disco.constraint import CONTROLLERS

    @register_controller("mine")
    @dataclass
    class Mine(Controller):
        gain: float
        power: float = 2.0

        def penalty(self, kl):
            return self.gain**self.power * kl

    try:
        with pytest.raises(ValueError, match=r"constraint=mine needs the setting .gain.; .*\+disco.options.gain=VALUE"):
            DiscoConfig(constraint="mine")
        assert coefficient(DiscoConfig(constraint="mine", options={"gain": 3.0}).build_controller(), 0.0) == 9.0
    finally:
        del CONTROLLERS._items["mine"]


def test_a_module_that_does_not_load_is_refused_by_name(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    for path in ("nowhere.py", str(tmp_path / "broken.py")):
        with pytest.raises(ValueError, match=f"disco.module={path} cannot be loaded"):
            load_once(path)
