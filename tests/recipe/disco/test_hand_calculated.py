"""Small batches whose loss, gradient and metrics are worked out in the docstrings."""

import math

import pytest
import torch

from recipe.disco import disco_loss

LN2, LN3 = math.log(2), math.log(3)
PAD = float("nan")  # padding holds no number on purpose: nothing may depend on it


def batch(rows, old_rows):
    """Ragged token log-probabilities -> (log_prob leaf, old_log_prob, response_mask), padded with NaN."""
    width = max(max(map(len, rows)), 1)
    padded = [[row + [PAD] * (width - len(row)) for row in side] for side in (rows, old_rows)]
    log_prob, old_log_prob = (torch.tensor(side, dtype=torch.float64) for side in padded)
    return log_prob.requires_grad_(), old_log_prob, (~log_prob.isnan()).double()


def run(rows, old_rows, reward, uid, **settings):
    log_prob, old_log_prob, mask = batch(rows, old_rows)
    loss, metrics = disco_loss(log_prob, old_log_prob, mask, torch.tensor(reward, dtype=torch.float64), uid, **settings)
    loss.backward()
    return loss.item(), [g[: len(row)].tolist() for g, row in zip(log_prob.grad, rows, strict=True)], metrics


def approx(rows):
    return [pytest.approx(row, rel=1e-12, abs=1e-12) for row in rows]


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-12)


def test_disco_b_log_l_with_an_active_hinge():
    """Two questions, one of them without a positive; rows in mixed order.

    scores      a+: (-1-3)/2 = -2     a-: -4 and (-1-1-4)/3 = -2, mean -3     b: unmixed, adds 0
    J           1/2 * (-2 - -3) = 1/2, of which -1 is the positive side and -3/2 the negative side
    KL (k1)     old - new sums to .1+.1 + .3 + 0 + .1+.2 = .8 over 2+1+3+2 = 8 tokens, so .1
    hinge       .1 - .02 = .08;  penalty 100/2 * .08^2 = .32;  coefficient 100 * .08 = 8
    L           -1/2 + .32 = -.18
    gradient    of -J: a+ -1/2 * 1/2 a token; a- +1/2 * 1/2 * 1/|o|; b 0;  of the penalty: 8 * -1/8 = -1 a token
    """
    new = [[-4.0], [-1.0, -2.0], [-1.0, -3.0], [-1.0, -1.0, -4.0]]
    old = [[-3.7], [-0.9, -1.8], [-0.9, -2.9], [-1.0, -1.0, -4.0]]
    loss, grad, metrics = run(
        new, old, [0, 0, 1, 0], ["a", "b", "a", "a"], objective="disco_b", score="log_l", delta=0.02, beta=100.0
    )
    assert loss == close(-0.18)
    assert grad == approx([[0.25 - 1], [-1, -1], [-0.25 - 1] * 2, [1 / 12 - 1] * 3])
    expected = {
        "objective": 0.5,
        "objective_positive": -1.0,
        "objective_negative": -1.5,
        "score_positive": -2.0,
        "score_negative": -3.0,
        "kl": 0.1,
        "coefficient": 8.0,
        "penalty": 0.32,
        "groups_mixed": 0.5,
        "groups_all_positive": 0.0,
        "groups_all_negative": 0.5,
        "effective_negatives": 2.0,
        "auc": 0.75,  # -2 beats -4 and ties with -2
        "length_positive": 2.0,
        "length_negative": 2.0,  # (1 + 2 + 3) / 3, the unmixed question's response included
        "empty_responses": 0,
    }
    assert {name: metrics[name] for name in expected} == {name: close(value) for name, value in expected.items()}
    assert all(type(value) is float for value in metrics.values())


def test_disco_weighs_negatives_by_the_softmax():
    """One question, tau 2, log-L, no drift.

    negatives   -4 and -4 + 2 ln 3, so exp(s/tau) = e^-2 and 3 e^-2: weights 1/4 and 3/4
    neg         2 * ln((e^-2 + 3 e^-2) / 2) = -4 + 2 ln 2
    J           -2 - neg = 2 - 2 ln 2
    gradient    positive -1 over 2 tokens, negatives 1/4 over 1 token and 3/4 over 2
    effective   1 / (1/16 + 9/16) = 1.6;  the positive beats -4 but not -4 + 2 ln 3 = -1.80: AUC 1/2
    """
    rows = [[-4.0], [-2.5, -1.5], [-4.0 + 4 * LN3, -4.0]]
    loss, grad, metrics = run(rows, rows, [0, 1, 0], [7, 7, 7], objective="disco", score="log_l", tau=2.0)
    assert loss == close(2 * LN2 - 2)
    assert grad == approx([[1 / 4], [-1 / 2] * 2, [3 / 8] * 2])
    assert metrics["objective"] == close(2 - 2 * LN2)
    assert metrics["objective_positive"] == close(-2)
    assert metrics["objective_negative"] == close(-4 + 2 * LN2)
    assert metrics["score_negative"] == close(-4 + LN3)
    assert metrics["effective_negatives"] == close(1.6)
    assert metrics["auc"] == close(0.5)


def test_l_ratio_with_k3():
    """One question, scores are means of probability ratios new/old.

    scores      + (2 + 1)/2 = 3/2     - 1/2 and (1+1+1+3)/4 = 3/2, mean 1
    J           3/2 - 1 = 1/2
    gradient    of -J: a token's ratio times -1/2 (positive), +1/2 (first negative), +1/2 * 1/4 (second)
    KL (k3)     ratio - 1 - ln ratio summed: 9.5 - 7 - ln(2 * 1/2 * 3) = 2.5 - ln 3, over 7 tokens, = .2001982
    hinge       delta = KL - 1/10, beta 70: coefficient 7, penalty 35/100; a token's gradient 7 * (ratio - 1)/7
    L           -1/2 + .35 = -.15
    AUC         3/2 beats 1/2 and ties with 3/2: 3/4
    """
    old = [[-1.0, -2.0], [-1.0], [-3.0, -1.0, -2.0, -1.5]]
    new = [[-1.0 + LN2, -2.0], [-1.0 - LN2], [-3.0, -1.0, -2.0, -1.5 + LN3]]
    kl = (2.5 - LN3) / 7
    loss, grad, metrics = run(
        new,
        old,
        [1, 0, 0],
        [("q", 1)] * 3,
        objective="disco_b",
        score="l_ratio",
        kl_estimator="k3",
        delta=kl - 0.1,
        beta=70.0,
    )
    assert loss == close(-0.15)
    assert grad == approx([[-1 + 1, -0.5 + 0], [0.25 - 0.5], [1 / 8, 1 / 8, 1 / 8, 3 / 8 + 2]])
    assert metrics["kl"] == close(kl)
    assert metrics["coefficient"] == close(7)
    assert metrics["auc"] == close(0.75)


def test_l_ratio_under_the_softmax():
    """tau 1/2, negatives of ratio 1 and 1 + ln(2)/2: exp(s/tau) = e^2 and 2 e^2, weights 1/3 and 2/3.

    neg = 1/2 * ln(3 e^2 / 2) = 1 + ln(3/2)/2; the positive's ratio is 2; gradient = weight * ratio.
    """
    r = 1 + LN2 / 2
    loss, grad, _ = run(
        [[-1.0 + LN2], [-1.0], [-1.0 + math.log(r)]],
        [[-1.0], [-1.0], [-1.0]],
        [1, 0, 0],
        [0, 0, 0],
        objective="disco",
        score="l_ratio",
        tau=0.5,
        beta=0.0,
    )
    assert loss == close(-(2 - 1 - math.log(1.5) / 2))
    assert grad == approx([[-2.0], [1 / 3], [2 / 3 * r]])


def test_several_positives_share_their_weight():
    """Three positives, one negative: -1/3 each, +1; then a second, unmixed question halves everything."""
    rows, reward = [[-1.0], [-2.0], [-6.0], [-5.0]], [1, 1, 1, 0]
    loss, grad, _ = run(rows, rows, reward, ["q"] * 4, objective="disco")
    assert loss == close(-(-3 - -5))
    assert grad == approx([[-1 / 3], [-1 / 3], [-1 / 3], [1.0]])
    loss, grad, _ = run(rows + [[-9.0]], rows + [[-9.0]], reward + [1], ["q"] * 4 + ["r"], objective="disco")
    assert loss == close(-1)
    assert grad == approx([[-1 / 6], [-1 / 6], [-1 / 6], [1 / 2], [0.0]])


def test_questions_are_not_pooled():
    """a: -1 against -2, b: -5 against -9. Per question J = (1 + 4)/2 = 5/2, and every weight is 1/2.

    Pooling all responses would weigh the negatives -2 and -9 against each other under a small tau.
    """
    rows = [[-1.0], [-2.0], [-5.0], [-9.0]]
    loss, grad, metrics = run(rows, rows, [1, 0, 1, 0], ["a", "a", "b", "b"], objective="disco", tau=0.1)
    assert loss == close(-2.5)
    assert grad == approx([[-0.5], [0.5], [-0.5], [0.5]])
    assert metrics["effective_negatives"] == close(1)
    assert metrics["auc"] == close(1)


@pytest.mark.parametrize("objective", ["disco", "disco_b"])
@pytest.mark.parametrize("score", ["log_l", "l_ratio"])
def test_an_unmixed_batch_feels_only_the_constraint(objective, score):
    """KL = (.3 + .1)/2 = .2, hinge .1, beta 10: penalty 5 * .01, coefficient 1, gradient -1/2 a token (k1)."""
    loss, grad, metrics = run(
        [[-1.3], [-2.1]], [[-1.0], [-2.0]], [1, 0], ["a", "b"], objective=objective, score=score, delta=0.1, beta=10.0
    )
    assert loss == close(0.05)
    assert grad == approx([[-0.5], [-0.5]])
    assert (metrics["groups_mixed"], metrics["groups_all_positive"], metrics["groups_all_negative"]) == (0, 0.5, 0.5)
    assert metrics["objective"] == 0


@pytest.mark.parametrize("drift", [-0.5, 0.0, 0.1])
def test_the_hinge_sleeps_up_to_delta(drift):
    """KL (k1) = drift <= delta = .1 (a negative estimate too): no penalty, no gradient from the constraint."""
    loss, grad, metrics = run([[-1.0 - drift]], [[-1.0]], [1], ["a"], delta=0.1 + 1e-12, beta=1e3)
    assert (loss, grad) == (0, [[0.0]])
    assert metrics["kl"] == close(drift)
    assert (metrics["coefficient"], metrics["penalty"]) == (0, 0)


def test_a_response_without_tokens_has_no_score():
    """a: + -2, - -3, and an empty negative that must not halve the negative's weight;
    b: a positive and an empty negative, so not mixed; c: nothing but an empty response. Q = 3.

    J = 1/3 * (-2 + 3); KL (k1) over the 3 tokens that exist = (0 + .3 + 0)/3 = .1, hinge .1, coefficient .1 * 30 = 3.
    """
    new, old = [[-2.0], [-3.3], [], [-1.0], [], []], [[-2.0], [-3.0], [], [-1.0], [], []]
    loss, grad, metrics = run(
        new, old, [1, 0, 0, 1, 0, 1], list("aaabbc"), objective="disco", tau=1.0, delta=0.0, beta=30.0
    )
    assert loss == close(-1.3 / 3 + 15 * 0.01)
    assert grad == approx([[-1 / 3 - 1], [1 / 3 - 1], [], [-1.0], [], []])
    assert metrics["groups_mixed"] == close(1 / 3)
    assert metrics["groups_all_positive"] == close(1 / 3)
    assert metrics["groups_all_negative"] == 0
    assert metrics["empty_responses"] == 3


def test_a_batch_without_any_token_still_has_a_graph():
    log_prob = torch.full((2, 3), PAD, dtype=torch.float64, requires_grad=True)
    loss, metrics = disco_loss(log_prob, torch.full((2, 3), PAD), torch.zeros(2, 3), torch.tensor([1.0, 0.0]), [0, 0])
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(log_prob.grad, torch.zeros(2, 3, dtype=torch.float64))
    assert metrics["empty_responses"] == 2
    assert (metrics["kl"], metrics["coefficient"], metrics["penalty"]) == (0, 0, 0)


def test_positive_means_at_or_above_the_threshold():
    """Rewards 1, .5 and .4 at threshold .5: two positives, one negative. At the default threshold 1: one and two."""
    rows, reward, uid = [[-1.0], [-2.0], [-4.0]], [1.0, 0.5, 0.4], ["q"] * 3
    _, grad, _ = run(rows, rows, reward, uid, objective="disco_b", positive_threshold=0.5)
    assert grad == approx([[-0.5], [-0.5], [1.0]])
    _, grad, _ = run(rows, rows, reward, uid, objective="disco_b")
    assert grad == approx([[-1.0], [0.5], [0.5]])


def test_the_defaults_are_the_published_constants():
    """DisCO, log-L, tau 10, delta 1e-4, beta 1e3, k1, as in the paper's scripts."""
    rows, old = [[-1.0], [-2.0], [-12.0]], [[-0.9], [-2.1], [-11.5]]
    default = run(rows, old, [1, 0, 0], [0, 0, 0])
    explicit = {"objective": "disco", "score": "log_l", "tau": 10.0, "delta": 1e-4, "beta": 1e3, "kl_estimator": "k1"}
    assert default == run(rows, old, [1, 0, 0], [0, 0, 0], **explicit, positive_threshold=1.0)
    for other in (
        {"objective": "disco_b"},
        {"tau": 1.0},
        {"delta": 1e-3},
        {"beta": 5e2},
        {"kl_estimator": "k3"},
        {"score": "l_ratio"},
    ):
        assert default[0] != run(rows, old, [1, 0, 0], [0, 0, 0], **{**explicit, **other})[0]


@pytest.mark.parametrize(
    "score, objective, gradient",
    [
        # -2 against -4
        ("log_l", 2.0, [[-0.5, -0.25], [2.0]]),
        # ratios are e^-.1, e^-.2 and 1
        (
            "l_ratio",
            (math.exp(-0.1) + math.exp(-0.2)) / 2 - 1,
            [[-math.exp(-0.1) / 2, -math.exp(-0.2) / 4], [2.0]],
        ),
    ],
)
def test_importance_weights_multiply_the_tokens_parts_of_the_gradient_alone(score, objective, gradient):
    """A positive of two tokens with weights 1 and .5, a negative of one with 2; J and KL (.1 + .2 + 0) / 3 as ever."""
    rho = torch.tensor([[1, 0.5], [2, PAD]], dtype=torch.float64)
    loss, grad, metrics = run(
        *([[-1.0, -3.0], [-4.0]], [[-0.9, -2.8], [-4.0]], [1, 0], ["a", "a"]),
        **dict(objective="disco_b", score=score, beta=0.0, rollout_is_weights=rho),
    )
    assert loss == close(-objective)
    assert grad == approx(gradient)
    assert metrics["kl"] == close(0.1)


def test_importance_weights_that_are_no_numbers_are_refused():
    for rho, message in (([[1, PAD], [2, 1]], "rollout_is_weights of sample 0 is NaN"), ([[1], [2]], "has shape")):
        with pytest.raises(ValueError, match=message):
            run(
                *([[-1.0, -3.0], [-4.0]], [[-1.0, -3.0], [-4.0]], [1, 0], ["a", "a"]),
                rollout_is_weights=torch.tensor(rho, dtype=torch.float64),
            )


def test_maxrl_is_disco_b_times_the_failure_rate():
    """a: one right of four, -1 against a mean of -3; b: one of two, -2 against -4; c: all wrong. Q = 3.

    J = 1/3 * (3/4 * 2 + 1/2 * 2) = 5/6; per question the positive weighs c/3 and its negatives share -c/3.
    MaxRL's advantages (r - mean)/mean: a 3 and -1, b 1 and -1; over n responses 3/4 and -1/4, 1/2 and -1/2: the same.
    """
    rows = [[-1.0], [-2.0], [-3.0], [-4.0], [-2.0], [-4.0], [-9.0]]
    reward, uid = [1, 0, 0, 0, 1, 0, 0], list("aaaabbc")
    loss, grad, metrics = run(rows, rows, reward, uid, objective="maxrl")
    assert loss == close(-5 / 6)
    assert grad == approx([[-1 / 4], [1 / 12], [1 / 12], [1 / 12], [-1 / 6], [1 / 6], [0.0]])
    assert (metrics["question_weight"], metrics["question_weight_max"]) == (close(5 / 8), close(3 / 4))
    by_door = run(rows, rows, reward, uid, objective="disco_b", questions="failure_rate")
    assert by_door == (loss, grad, metrics)


def test_conspo_tells_each_positive_from_all_negatives():
    """One right response, -1, and two wrong ones, -2 and -3, with tau = 1/ln 3 and a margin of 1: 3^-2 to 3^-2 + 3^-3.

    P = 3/7 at the target margin, so J = tau ln(3/7); the positive weighs 4/7, its negatives 3/7 and 1/7.
    """
    rows, reward, uid = [[-1.0], [-2.0], [-3.0]], [1, 0, 0], list("aaa")
    settings = dict(objective="conspo", tau=1 / LN3, target_margin=1.0)
    loss, grad, _ = run(rows, rows, reward, uid, **settings)
    assert loss == close(math.log(7 / 3) / LN3)
    assert grad == approx([[-4 / 7], [3 / 7], [1 / 7]])
    # At the start there is no margin, P = 9/13; at half of the rise, half of it.
    for progress, margin in ((0.0, 0.0), (0.15, 0.5), (0.3, 1.0), (0.9, 1.0)):
        p = 3**-1 / 3**margin
        _, grad, _ = run(rows, rows, reward, uid, progress=progress, **settings)
        assert grad[0] == approx([-(1 - p / (p + 4 / 27))])
    with pytest.raises(ValueError, match="progress=1.5 is not a finite number >= 0 and <= 1"):
        run(rows, rows, reward, uid, progress=1.5, **settings)


def test_dgpo_weighs_questions_by_a_softmax_over_the_batch():
    """p = 1/2 and p = 1 - 1/4 with T = 1/(4 ln 3): exp(-p/T) = 1/9 and 1/27, so 3/4 and 1/4, times 2 questions.

    The third question, all wrong, takes no share; Q = 3. J = 1/3 * (3/2 * 2 + 1/2 * 1) = 7/6.
    """
    rows = [[-1.0], [-3.0], [-2.0], [-2.0], [-2.0], [-3.0], [-9.0]]
    reward, uid = [1, 0, 1, 1, 1, 0, 0], list("aabbbbc")
    settings = dict(questions="dgpo", question_temperature=1 / (4 * LN3), tau=1e6)
    for objective in ("disco_b", "disco"):
        loss, grad, metrics = run(rows, rows, reward, uid, objective=objective, **settings)
        assert loss == pytest.approx(-7 / 6, rel=1e-6)
        assert metrics["question_weight"] == close(1)
        assert metrics["question_weight_max"] == close(3 / 2)
    assert grad == [pytest.approx(row) for row in ([-1 / 2], [1 / 2], *[[-1 / 18]] * 3, [1 / 6], [0.0])]


def test_grpos_difficulty_bias_as_an_ablation():
    """p = 1/2 and 1/5: sqrt(p(1-p)) = 1/2 and 2/5. J = 1/2 * (1/2 * 2 + 2/5 * 5) = 3/2."""
    rows = [[-1.0], [-3.0], [-1.0], [-6.0], [-6.0], [-6.0], [-6.0]]
    loss, _, _ = run(rows, rows, [1, 0, 1, 0, 0, 0, 0], list("aabbbbb"), objective="disco_b", questions="grpo")
    assert loss == close(-3 / 2)


def test_graded_rewards_compare_every_two_that_differ_by_the_difference():
    """a: rewards 1, 1/2, 0 and 0, scores -1, -2, -4, -6; b: all 1/2, so nothing to compare. Q = 2.

    pairs      1 over 1/2: weight 1/2, gain 1;  1 over 0: weight 1 each, gains 3 and 5;  1/2 over 0: 1/2 each, 2 and 4
    J_a        (1/2 + 3 + 5 + 1 + 2) / 3.5 = 11.5 / 3.5;  J = J_a / 2
    weights    of J_a, over 3.5: 1/2 + 1 + 1 = 5/2;  -1/2 + 1/2 + 1/2 = 1/2;  -1 - 1/2 = -3/2 for each 0
    metrics    positive is above the mean reward, 3/8: -1 and -2; all pairs are in the right order
    """
    rows, reward, uid = [[-1.0], [-2.0], [-4.0], [-6.0], [-5.0], [-5.0]], [1, 0.5, 0, 0, 0.5, 0.5], list("aaaabb")
    loss, grad, metrics = run(rows, rows, reward, uid, objective="disco_b", pairs="graded")
    assert loss == close(-11.5 / 7)
    assert grad == approx([[-5 / 14], [-1 / 14], [3 / 14], [3 / 14], [0.0], [0.0]])
    assert (metrics["score_positive"], metrics["score_negative"]) == (close(-1.5), close(-5))
    assert (metrics["auc"], metrics["effective_negatives"]) == (close(1), close(2))
    assert (metrics["groups_mixed"], metrics["groups_all_negative"], metrics["groups_all_positive"]) == (0.5, 0.5, 0)


def test_graded_disco_weighs_the_hardest_lower_ones_of_each():
    """Rewards 1, 1/2 and 0, scores -1, -2 and -2 - ln 3; tau = 1.

    1:    lower ones have the shares 1/3 and 2/3; mean exp = e^-2 (1/3 + 2/3 * 1/3) = 5/9 e^-2;  weight 3/2
    1/2:  one lower, -2 - ln 3;  weight 1/2
    J     3/4 * (-1 + 2 - ln 5/9) + 1/4 * ln 3
    """
    rows = [[-1.0], [-2.0], [-2 - LN3]]
    loss, grad, metrics = run(rows, rows, [1, 0.5, 0], ["q"] * 3, objective="disco", tau=1.0, pairs="graded")
    assert loss == close(-0.75 * (1 - math.log(5 / 9)) - LN3 / 4)
    # Of 1's push down 3/5 is on 1/2 and 2/5 on 0.
    assert grad == approx([[-0.75], [0.75 * 0.6 - 0.25], [0.75 * 0.4 + 0.25]])


@pytest.mark.parametrize("settings", [{"objective": "disco", "tau": 0.3}, {"objective": "disco_b"}])
@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.1, 0.7)])
def test_graded_pairs_of_two_levels_are_positives_and_negatives_to_the_bit(settings, low, high):
    rows = [[-1.0], [-1.3, -2.0], [-0.2], [-3.1], [-0.7], [-0.9]]
    reward, uid = [high, low, low, high, low, high], list("aaabba")
    plain = run(rows, rows, reward, uid, **settings, positive_threshold=high)
    assert run(rows, rows, reward, uid, **settings, positive_threshold=high, pairs="graded") == plain
