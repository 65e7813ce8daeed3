"""A run that learns nothing says so once per stretch of steps, in words."""

import pytest
from omegaconf import OmegaConf

from verl_ext.training.watch import CONSTRAINT_STEPS, UNMIXED_STEPS, Watch


def config(**disco):
    return OmegaConf.create(
        {
            "verl_ext": {"metrics": "disco"},
            "disco": {"constraint": "squared_hinge", "delta": 1e-4} | disco,
            "data": {"max_response_length": 12},
            "actor_rollout_ref": {"rollout": {"n": 4, "temperature": 0.5}, "actor": {"optim": {"lr": 1e-6}}},
        }
    )


def said(watch, *steps, mini_batches=4, fresh=True):
    """The lines of these steps, with the number of the step."""
    return [(i, line) for i, m in enumerate(steps, 1) for line in watch.lines(m, mini_batches, fresh)]


def plain(mixed, right=0.0):
    return {"training/mixed_questions": mixed, "training/right_questions": right}


def disco(mixed, right=0.0, over=0.25):
    # A reward for the form makes responses differ that are all wrong.
    return plain(1.0) | {"disco/groups_mixed": mixed, "disco/groups_all_positive": right, "disco/over_delta": over}


@pytest.mark.parametrize("metrics", [plain, disco])
@pytest.mark.parametrize(
    "right, words",
    [
        (0.0, ["all responses have been wrong", "does not recognise right answers", "data.max_response_length=12"]),
        (1.0, ["all responses have been right", "accepts everything", "too easy"]),
        (0.25, ["(25% of the questions)", "rollout.temperature=0.5", "rollout.n=4"]),
    ],
)
def test_no_question_with_right_and_wrong_responses_is_told_once(metrics, right, words):
    none, some = metrics(0.0, right), metrics(0.1)
    steps = [none] * (UNMIXED_STEPS - 1) + [some] + [none] * (3 * UNMIXED_STEPS) + [some] + [none] * UNMIXED_STEPS
    lines = said(Watch(config()), *steps)
    assert [step for step, _ in lines] == [2 * UNMIXED_STEPS, 5 * UNMIXED_STEPS + 1]
    for _, line in lines:
        assert line.startswith(f"for {UNMIXED_STEPS} steps ") and all(word in line for word in words)


def test_a_single_response_per_question_is_never_mixed_and_not_told():
    settings = config()
    settings.actor_rollout_ref.rollout.n = 1
    assert not said(Watch(settings), *[plain(0.0)] * 20)


@pytest.mark.parametrize(
    "over, fresh, words",
    [
        (0.0, True, "for 20 steps the KL has never been above disco.delta=0.0001"),
        (0.75, True, "for 20 steps the KL has been above disco.delta=0.0001 after each update"),
        (1.0, False, "for 20 steps the KL has been above disco.delta=0.0001 after each update"),
        (0.7500001, True, "after each update"),
    ],
)
def test_a_constraint_that_never_or_always_binds_is_told_once(over, fresh, words):
    steps = [disco(0.5, over=over)] * (3 * CONSTRAINT_STEPS)
    ((step, line),) = said(Watch(config()), *steps, fresh=fresh)
    assert step == CONSTRAINT_STEPS and words in line and "actor.optim.lr=1e-06" in line


@pytest.mark.parametrize("over, fresh", [(0.5, True), (0.25, True), (0.75, False)])
def test_a_constraint_that_binds_at_times_is_not_told(over, fresh):
    assert not said(Watch(config()), *[disco(0.5, over=over)] * 60, fresh=fresh)
    # Or at times not at all.
    assert not said(Watch(config()), *[disco(0.5, over=x % 2 * 0.75) for x in range(60)])


def test_one_mini_batch_per_step_never_binds_and_says_why():
    lines = said(Watch(config()), *[disco(0.5, over=0.0)] * 40, mini_batches=1)
    assert len(lines) == 1 and "lower actor_rollout_ref.actor.ppo_mini_batch_size" in lines[0][1]


@pytest.mark.parametrize("constraint", ["none", "fixed"])
def test_what_is_no_constraint_is_not_told(constraint):
    assert not said(Watch(config(constraint=constraint)), *[disco(0.5, over=0.0)] * 40)


def test_steps_that_only_train_the_critic_are_not_told():
    assert not said(Watch(config()), *[plain(0.5)] * 40, mini_batches=0)
