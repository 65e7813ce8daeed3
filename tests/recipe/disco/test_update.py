"""The plan of an update: what is refused, what needs a gradient, and that rows may come in any order from any rank."""

from dataclasses import fields, replace

import pytest
import torch

from recipe.disco.constraint import build_controller
from recipe.disco.objectives import OBJECTIVES
from recipe.disco.update import ScoreTable, plan_update

HINGE = {"delta": 0.01, "beta": 100.0}


def table(**columns) -> ScoreTable:
    """Question 0 is mixed, 1 all right, 2 all wrong; a response without a token, and a padding row."""
    found = dict(
        question=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, -1]),
        size=torch.tensor([3, 3, 3, 2, 2, 3, 3, 3, 0]),
        index=torch.tensor([8, 7, 6, 5, 4, 3, 2, 1, 0]),
        reward=torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0, 0]),
        length=torch.tensor([3, 2, 4, 5, 1, 2, 2, 0, 0]),
        score=torch.tensor([-0.5, -0.25, -1.0, -0.3, -0.1, -2.0, -1.5, 0, 0], dtype=torch.float64),
        kl=torch.tensor([0.01, 0.02, -0.03, 0.05, 0, 0.1, 0, 0, 0], dtype=torch.float64),
        measured=torch.ones(9, dtype=torch.bool),
        session=torch.arange(9),
        entropy=torch.full((9,), torch.nan),
    )
    return ScoreTable(**found | columns)


def plan(rows=None, constraint="squared_hinge", settings=HINGE, objective="disco", threshold=1.0, **options):
    return plan_update(
        rows or table(),
        OBJECTIVES.build(objective, {"tau": 0.5, **settings}),
        build_controller(constraint, settings),
        positive_threshold=threshold,
        **options,
    )


def test_a_plan_in_numbers():
    """Tokens 19, KL .15/19 = 7.9e-3 <= delta; weights of question 0 over three questions: 1/3, and -softmax(s/.5)/3."""
    found = plan()
    share = torch.softmax(torch.tensor([-0.25, -1.0], dtype=torch.float64) / 0.5, 0)
    assert found.weight.tolist() == pytest.approx([1 / 3, *(-share / 3).tolist(), 0, 0, 0, 0, 0, 0])
    assert (found.tokens, found.kl, found.coefficient) == (19, pytest.approx(0.15 / 19), 0.0)
    assert found.loss.item() == pytest.approx(-found.metrics["objective"])
    over = plan(settings={"delta": 1e-3, "beta": 100.0})
    assert over.coefficient == pytest.approx(100 * (0.15 / 19 - 1e-3))
    assert over.loss.item() == pytest.approx(-found.metrics["objective"] + 50 * (0.15 / 19 - 1e-3) ** 2)
    assert (found.metrics["over_delta"], over.metrics["over_delta"]) == (0.0, 1.0)


def test_what_needs_a_gradient():
    """Responses with a weight; all with a token where the coefficient is not 0; never one without a token."""
    mixed = [True] * 3 + [False] * 6
    assert plan().needs_gradient.tolist() == mixed
    everything = plan(settings={"delta": 1e-3, "beta": 100.0})
    assert everything.needs_gradient.tolist() == [True] * 7 + [False] * 2
    assert plan(constraint="none").needs_gradient.tolist() == mixed
    # Of two negatives the hardest alone.
    hardest = plan(settings=HINGE | {"negatives": "topk", "top_share": 0.5})
    assert hardest.needs_gradient.tolist() == [True, True, False] + [False] * 6


def in_parts() -> tuple[ScoreTable, ScoreTable]:
    """Responses 1 (wrong, of question 0) and 4 (right, of question 1) in two rows each; and each in one row."""
    parts = table(
        question=torch.tensor([0, 0, 0, 1, 1, 1, 0, -1, -1]),
        session=torch.tensor([0, 1, 2, 3, 4, 4, 1, -1, -2]),
        size=torch.tensor([4, 4, 4, 3, 3, 3, 4, 0, 0]),
        reward=torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0, 0]),
        length=torch.tensor([3, 2, 4, 5, 1, 0, 6, 0, 0]),
    )
    # (2 (-.25) + 6 (-1.5)) / 8, (1 (-.1) + 0) / 1
    columns = dict(
        question=torch.tensor([0, 0, 0, 1, 1]),
        session=torch.arange(5),
        size=torch.tensor([3, 3, 3, 2, 2]),
        index=torch.arange(5),
        reward=torch.tensor([1.0, 0, 0, 1, 1]),
        length=torch.tensor([3, 8, 4, 5, 1]),
        score=torch.tensor([-0.5, -9.5 / 8, -1.0, -0.3, -0.1], dtype=torch.float64),
        kl=torch.tensor([0.01, 0.02, -0.03, 0.05, 0.1], dtype=torch.float64),
        measured=torch.ones(5, dtype=torch.bool),
        entropy=torch.full((5,), torch.nan),
    )
    return parts, ScoreTable(**columns)


def test_a_session_is_one_response():
    parts, whole = in_parts()
    parts.kl[[5, 6]] = torch.tensor([0.1, 0.0], dtype=torch.float64)
    ours, theirs = plan(parts, settings={"delta": 0.0, "beta": 9.0}), plan(whole, settings={"delta": 0.0, "beta": 9.0})
    w = theirs.weight.tolist()
    # A row has its share of the response's tokens.
    assert ours.weight.tolist() == pytest.approx([w[0], w[1] * 2 / 8, w[2], w[3], w[4], 0, w[1] * 6 / 8, 0, 0])
    assert ours.needs_gradient.tolist() == [True] * 5 + [False, True, False, False]
    assert (ours.tokens, ours.coefficient) == (theirs.tokens, pytest.approx(theirs.coefficient))
    assert ours.metrics.pop("rows_per_response") == 7 / 5 and theirs.metrics.pop("rows_per_response") == 1.0
    assert ours.metrics.pop("padding_rows") == 2 / 9 and theirs.metrics.pop("padding_rows") == 0.0
    assert ours.metrics == pytest.approx(theirs.metrics)


def test_a_part_of_a_session_has_its_share_of_the_weight_in_float64():
    """Shares of 3 and 7 of 10 tokens; in float32 they would be off by 1e-8."""
    rows = table(session=torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, -1]), reward=torch.tensor([1.0, 1, 0, 1, 1, 0, 0, 0, 0]))
    rows = replace(rows, length=torch.tensor([3, 7, 4, 5, 1, 2, 2, 0, 0]))
    assert plan(rows).weight[:3].tolist() == pytest.approx([0.3 / 3, 0.7 / 3, -1 / 3], rel=1e-15)


def test_a_kl_whose_square_is_no_float32_is_still_a_number_in_the_log():
    rows = replace(table(), score=table().score.float(), kl=torch.full((9,), 1e30))
    found = plan(rows)
    assert found.loss.dtype == torch.float32 and found.loss.isinf()
    assert found.metrics["loss"] == pytest.approx(50 * (8e30 / 19) ** 2, rel=1e-6)


def test_a_session_with_two_rewards_or_questions_or_a_missing_row_is_refused():
    parts, _ = in_parts()
    with pytest.raises(ValueError, match="samples 7 and 2 are of one session, but their rewards are 0 and 1"):
        plan(replace(parts, reward=torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 0, 0])))
    question, size = torch.tensor([0, 0, 0, 1, 1, 1, 1, -1, -1]), torch.tensor([3, 3, 3, 4, 4, 4, 4, 0, 0])
    with pytest.raises(ValueError, match="samples 7 and 2 are of one session, but their questions are 0 and 1"):
        plan(replace(parts, question=question, size=size))
    with pytest.raises(ValueError, match="question 0 has 4 of its 5"):
        plan(replace(parts, size=torch.tensor([5, 5, 5, 3, 3, 3, 5, 0, 0])))


def test_the_kl_in_force_may_be_another_ones():
    found = plan(kl=0.03)
    assert (found.kl, found.coefficient) == (pytest.approx(0.03), pytest.approx(100 * 0.02))
    assert found.metrics["kl"] == pytest.approx(0.03) and "kl_standard_error" not in found.metrics
    assert "kl_standard_error" in plan().metrics


def test_the_entropy_is_logged_where_it_was_measured():
    assert "entropy" not in plan().metrics
    assert plan(table(entropy=torch.arange(9.0))).metrics["entropy"] == pytest.approx(36 / 19)


def test_rows_come_in_any_order_and_from_any_rank():
    whole, order = table(), torch.tensor([8, 3, 0, 7, 5, 1, 2, 6, 4])
    shuffled = ScoreTable(**{f.name: getattr(whole, f.name)[order] for f in fields(ScoreTable)})
    first, second = (
        ScoreTable(**{f.name: getattr(shuffled, f.name)[rows] for f in fields(ScoreTable)})
        for rows in (slice(0, 4), slice(4, 9))
    )
    # As an all-gather does: every rank sees its own rows and the others' as they were sent.
    sent = []
    second.gathered(lambda x: sent.append(x) or x)
    gathered = first.gathered(lambda x: torch.cat([x, *sent]))
    assert gathered.question.dtype == gathered.length.dtype == torch.int64
    one, other = plan(whole), plan(gathered)
    torch.testing.assert_close(other.weight, one.weight[order], rtol=1e-14, atol=0)
    assert other.metrics == pytest.approx(one.metrics, rel=1e-12)


@pytest.mark.parametrize("threshold", [0.7, 0.9, 1.0])
def test_a_reward_at_the_threshold_is_positive(threshold):
    # 0.7 is not a float32: compared in another precision, the reward would be below its own threshold.
    rows = table(reward=torch.tensor([threshold] + [0.0] * 8).double())
    assert plan(rows, threshold=threshold).weight[0] > 0


@pytest.mark.parametrize(
    "column, row, message",
    [
        ("score", 1, "the score of sample 7 is NaN or infinite (1 of 9"),
        ("kl", 4, "KL of sample 4 is NaN or infinite"),
        ("reward", 2, "sequence_reward of sample 6 is NaN or infinite"),
        ("score", 7, "the score (0, say, for a response without a token) of sample 1 is NaN"),
    ],
)
def test_what_is_no_number_stops_the_run_with_the_samples_index(column, row, message):
    rows = table()
    values = getattr(rows, column).clone()
    values[row] = torch.nan
    with pytest.raises(ValueError) as error:
        plan(replace(rows, **{column: values}))
    assert message in str(error.value)


def test_padding_rows_may_hold_anything():
    rows = table()
    columns = {name: getattr(rows, name).clone() for name in ("reward", "kl")}
    for x in columns.values():
        x[8] = 0.0 if x is columns["kl"] else torch.nan
    torch.testing.assert_close(plan(replace(rows, **columns)).weight, plan().weight)


def test_a_torn_question_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="question 1 has 2 of its 4 responses in this mini-batch"):
        plan(table(size=torch.tensor([3, 3, 3, 4, 4, 3, 3, 3, 0])))


def test_mixed_groups_without_a_weight_are_mixed():
    """A squared hinge at rest: nothing is learned from them, yet they are there."""
    rows = table(score=torch.tensor([9.0, -9.0, -9.0] + [0.0] * 6, dtype=torch.float64))
    found = plan(rows, settings=HINGE | {"surrogate": "squared_hinge", "negatives": "mean"})
    assert not found.weight.any() and not found.needs_gradient.any()
    assert (found.metrics["no_mixed_group"], found.metrics["groups_mixed"]) == (0.0, pytest.approx(1 / 3))


def test_padding_counts_nowhere():
    rows = table()
    columns = {name: getattr(rows, name).clone() for name in ("length", "kl")}
    columns["length"][8], columns["kl"][8] = 7, 70.0
    found, expected = plan(replace(rows, **columns)), plan()
    assert (found.tokens, found.kl) == (expected.tokens, expected.kl)
    nothing = ScoreTable(**{f.name: getattr(rows, f.name)[:0] for f in fields(ScoreTable)})
    assert all(value == value for value in plan(nothing).metrics.values())


def test_the_value_keeps_its_digits_at_a_large_tau():
    """tau times a logarithm near 0: in float32 it would be -0.565 for -0.1102."""
    rows = table(score=table().score.float().requires_grad_())
    found = plan(rows, settings=HINGE | {"tau": 1e7})
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(plan(settings=HINGE | {"tau": 1e7}).loss.item(), rel=1e-6)
    (grad,) = torch.autograd.grad(found.loss, rows.score)
    torch.testing.assert_close(-grad.double(), found.weight, rtol=1e-6, atol=1e-9)
