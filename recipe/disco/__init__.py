"""DisCO: Discriminative Constrained Optimization (Li et al., NeurIPS 2025, arXiv 2505.12366).

:func:`disco_loss` is the method's executable definition; ``README.md`` beside this file is its page. An objective, a
score or a controller of your own inherits from its base class and registers under a name.
"""

from recipe.disco.constraint import Controller, register_controller
from recipe.disco.loss import disco_loss
from recipe.disco.objectives import Group, Objective, Sides, register_objective
from recipe.disco.questions import QuestionWeight, register_questions
from recipe.disco.scores import Score, register_score
from recipe.disco.settings import DiscoConfig

__all__ = [
    "Controller",
    "DiscoConfig",
    "Group",
    "Objective",
    "QuestionWeight",
    "Score",
    "Sides",
    "disco_loss",
    "register_controller",
    "register_objective",
    "register_questions",
    "register_score",
]
