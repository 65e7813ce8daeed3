"""The functions of the method with objectives, scores and controllers by name and settings, as users choose them."""

from dataclasses import dataclass, make_dataclass

from recipe.disco import objectives, scores
from recipe.disco.constraint import price
from recipe.disco.objectives import OBJECTIVES, Objective
from recipe.disco.scores import SCORES, Score


def weigh(objective, score, positive, question, length, settings):
    return objectives.weigh(OBJECTIVES.build(objective, settings), score, positive, question, length)


def evaluate(objective, score, positive, question, length, settings):
    return objectives.evaluate(OBJECTIVES.build(objective, settings), score, positive, question, length)


def compute_score(score, *arguments):
    return scores.compute_score(SCORES.build(score, {}), *arguments)


def penalty(controller, kl):
    return price(controller, kl).penalty


def coefficient(controller, kl):
    return price(controller, kl).coefficient


def objective_of(fn, **attributes) -> type[Objective]:
    """An objective's class, of a function of the group."""
    members = {"__call__": lambda self, group: fn(group), **attributes}
    return make_dataclass("Mine", [], bases=(Objective,), namespace=members, frozen=True)


def score_of(fn) -> type[Score]:
    """A score's class, of a function of log_prob, base and mask."""

    @dataclass(frozen=True)
    class Mine(Score):
        correctable = False

        def __call__(self, log_prob, base_log_prob, mask, rho=None):
            return fn(log_prob, base_log_prob, mask)

    return Mine
