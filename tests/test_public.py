"""What others build on: names, signatures and types of `recipe.disco`. A change here is one for CHANGELOG.md."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import recipe.disco
from recipe.disco import constraint, objectives, questions, scores

ROOT = Path(__file__).resolve().parents[1]

EXPORTS = {
    "Controller": "()",
    "Controller.end_step": "(self, kl)",
    "Controller.load_state_dict": "(self, state)",
    "Controller.penalty": "(self, kl)",
    "Controller.state_dict": "(self)",
    "DiscoConfig": "(objective='disco', score='log_l', tau=None, surrogate='identity', negatives='softmax', "
    "top_share=0.25, scale=1.0, length_temperature=0.1, max_length=8192, target_margin=0.01, "
    "margin_warmup=0.3, questions=None, question_temperature=2.0, pairs='threshold', kl_estimator='k1', "
    "constraint='squared_hinge', delta=0.0001, kl_floor=None, beta=1000.0, rho=1000.0, coefficient=0.1, "
    "measure='exact', positive_threshold=1.0, module=None, options=<factory>)",
    "DiscoConfig.build_controller": "(self)",
    "DiscoConfig.build_objective": "(self)",
    "DiscoConfig.build_question_weight": "(self)",
    "DiscoConfig.build_score": "(self)",
    "DiscoConfig.chosen": "(self)",
    "Group": "(positive, negative, positive_length, negative_length, pairs=None)",
    "Objective": "()",
    "Objective.__call__": "(self, group)",
    "QuestionWeight": "()",
    "QuestionWeight.__call__": "(self, p, n, mixed)",
    "Score": "()",
    "Score.__call__": "(self, log_prob, base_log_prob, mask, rho=None)",
    "Sides": "(positive, negative)",
    "disco_loss": "(log_prob, old_log_prob, response_mask, reward, uid, *, session=None, objective='disco', "
    "score='log_l', tau=None, delta=0.0001, beta=1000.0, kl_estimator='k1', positive_threshold=1.0, ref_log_prob=None, "
    "rollout_is_weights=None, constraint='squared_hinge', questions=None, pairs='threshold', progress=1.0, **settings)",
    "register_controller": "(name)",
    "register_objective": "(name)",
    "register_questions": "(name)",
    "register_score": "(name)",
}


def _signature(thing: Callable) -> str:
    empty = inspect.Parameter.empty
    found = inspect.signature(thing)
    parameters = [p.replace(annotation=empty) for p in found.parameters.values()]
    return str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def test_the_exports_have_these_signatures():
    assert sorted(recipe.disco.__all__) == sorted({name.partition(".")[0] for name in EXPORTS})
    found = {}
    for name in EXPORTS:
        thing = recipe.disco
        for part in name.split("."):
            thing = getattr(thing, part)
        found[name] = _signature(thing)
    assert found == EXPORTS


def test_the_names_that_settings_take_stay():
    shipped = {
        registry.setting: {n for n in registry if registry[n].__module__.startswith("recipe.disco.")}
        for registry in (objectives.OBJECTIVES, questions.QUESTIONS, scores.SCORES, constraint.CONTROLLERS)
    }
    assert shipped == {
        "objective": {"disco", "disco_b", "drpo", "real", "maxrl", "conspo"},
        "questions": {"uniform", "failure_rate", "dgpo", "grpo"},
        "score": {"log_l", "l_ratio", "log_ratio", "log_ratio_ref"},
        "constraint": {"squared_hinge", "augmented_lagrangian", "fixed", "none"},
    }


USER = """
from dataclasses import dataclass

import torch

from recipe.disco import Group, Objective, Sides, disco_loss, register_objective


@register_objective("mine")
@dataclass(frozen=True)
class Mine(Objective):
    margin: float

    def __call__(self, group: Group) -> Sides:
        return Sides(group.positive.mean() - self.margin, group.negative.mean())


x = torch.zeros(2, 3)
loss, metrics = disco_loss(x, x, x, x[:, 0], ["a", "b"])
kl: float = metrics["kl"]
reveal_type(loss)
reveal_type(Mine(margin=0.1).margin)
disco_loss(x, x, x, x[:, 0], ["a", "b"], tau="10")
Mine(margin="wide")
"""


def test_a_type_checker_sees_the_types_of_a_users_code(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", tmp_path / "user.py"]
    env = {**os.environ, "MYPYPATH": str(ROOT), "NO_COLOR": "1"}
    said = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120).stdout
    assert [line.split(": ", 1)[1] for line in said.splitlines() if "user.py" in line] == [
        'note: Revealed type is "torch._tensor.Tensor"',
        'note: Revealed type is "float"',
        'error: Argument "tau" to "disco_loss" has incompatible type "str"; expected "float | None"  [arg-type]',
        'error: Argument "margin" to "Mine" has incompatible type "str"; expected "float"  [arg-type]',
    ], said
