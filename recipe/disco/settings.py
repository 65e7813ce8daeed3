"""Typed settings of the method: the node ``disco``."""

import functools
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.disco.constraint import CONTROLLERS, KL_ESTIMATORS, Controller, build_controller
from recipe.disco.objectives import OBJECTIVES, Objective, compatible
from recipe.disco.questions import QUESTIONS, QuestionWeight
from recipe.disco.registry import check, require_finite, settings_of
from recipe.disco.scores import SCORES, Score

MEASURES = {
    "exact": "scores and KL of the whole mini-batch are measured before each update; the gradient of L is exact",
    "lagged": "weights from old_log_probs and the KL of the previous mini-batch; no extra forward pass",
}


@dataclass
class DiscoConfig:
    """The ``disco`` node: the user's knobs. ``config/algorithm/disco.yaml`` gives values and sources.

    Args:
        objective: registered objective: disco (the discriminative family), disco_b, drpo, real, maxrl, conspo.
        score: registered score: log_l, l_ratio, log_ratio, log_ratio_ref.
        tau: temperature of the softmax over negatives (of the labels' logits in REAL), > 0; None: the score's
            published one.
        surrogate: of a difference of scores, for disco and disco_b: identity, logistic or squared_hinge.
        negatives: how disco aggregates over negatives: softmax, mean or topk.
        top_share: share of the negatives that topk keeps, in (0, 1].
        scale: factor of a difference of scores in the surrogate, > 0.
        length_temperature: lambda of DRPO's length weights, > 0.
        max_length: L of DRPO's length weights, tokens, > 0.
        target_margin: by how much ConSPO's positives should lead, in units of the score, >= 0.
        margin_warmup: share of the training over which that margin rises from 0, in (0, 1].
        questions: registered weights of questions: uniform, failure_rate, dgpo, grpo; None: the objective's own.
        question_temperature: T of dgpo's weights of questions, > 0.
        pairs: which responses to a question are compared: threshold or graded.
        kl_estimator: k1 or k3.
        constraint: registered controller: squared_hinge, augmented_lagrangian, fixed, none.
        delta: radius of the trust region, nats per token, >= 0.
        kl_floor: KL at the same weights, as a run logged it (``disco/kl_floor``), >= 0; null: assumed by precision.
        beta: weight of the squared hinge, >= 0.
        rho: step of the augmented Lagrangian, > 0.
        coefficient: weight of the KL for ``constraint=fixed``, >= 0.
        measure: exact or lagged.
        positive_threshold: a response is positive when its summed reward is >= this; with pairs=graded it labels
            questions with equal rewards alone, for the log.
        module: a Python file or pkg://name that every process loads first, to register objectives, scores, controllers.
        options: settings of objectives registered by ``module``, by name.

    Raises:
        ValueError: names the setting, the value found and what would be right.
    """

    objective: str = "disco"
    score: str = "log_l"
    tau: float | None = None
    surrogate: str = "identity"
    negatives: str = "softmax"
    top_share: float = 0.25
    scale: float = 1.0
    length_temperature: float = 0.1
    max_length: int = 8192
    target_margin: float = 0.01
    margin_warmup: float = 0.3
    questions: str | None = None
    question_temperature: float = 2.0
    pairs: str = "threshold"
    kl_estimator: str = "k1"
    constraint: str = "squared_hinge"
    delta: float = 1e-4
    kl_floor: float | None = None
    beta: float = 1e3
    rho: float = 1e3
    coefficient: float = 0.1
    measure: str = "exact"
    positive_threshold: float = 1.0
    module: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.module, str | None):
            raise ValueError(f"disco.module={self.module!r} is not a file or pkg://a.module")
        if not isinstance(self.options, dict):
            raise ValueError(f"disco.options={self.options!r} is not a group of settings; use disco.options.NAME=VALUE")
        load_once(self.module)
        for name, choices in (
            ("objective", OBJECTIVES),
            ("score", SCORES),
            ("kl_estimator", KL_ESTIMATORS),
            ("constraint", CONTROLLERS),
            ("measure", MEASURES),
        ):
            if getattr(self, name) not in list(choices):
                raise ValueError(f"disco.{name}={getattr(self, name)!r} is unknown; choose from {sorted(choices)}")
        self.questions = compatible(self.objective, self.questions, self.pairs)
        if self.tau is None:
            self.tau = SCORES[self.score].published_tau
        if self.tau is None and "tau" in self.used():
            raise ValueError(f"disco.score={self.score} has no published tau; set disco.tau")
        for setting, f in shipped_settings().items():
            if (value := getattr(self, setting, None)) is not None:
                check(f, value)
        self._refuse_unused()
        require_finite("disco.positive_threshold", self.positive_threshold)
        if self.kl_floor is not None:
            require_finite("disco.kl_floor", self.kl_floor, minimum=0)
        self.build_objective()
        self.build_question_weight()
        self.build_score()
        self.build_controller()
        fixed_weights = self.surrogate == "identity" and (
            self.objective in ("disco_b", "maxrl") or (self.objective, self.negatives) == ("disco", "mean")
        )
        if self.measure == "lagged" and SCORES[self.score].constant_at_old and not fixed_weights:
            raise ValueError(
                f"disco.measure=lagged with disco.score={self.score} and disco.objective={self.objective}: all scores "
                "are equal at old_log_probs, so the weights would say nothing of the responses; use "
                "disco.measure=exact, disco.score=log_l or algorithm=disco_b"
            )

    def _refuse_unused(self) -> None:
        used, flat = self.used(), self.__dataclass_fields__
        for name in (
            "surrogate",
            "negatives",
            "top_share",
            "scale",
            "length_temperature",
            "max_length",
            "target_margin",
            "margin_warmup",
            "question_temperature",
        ):
            default, value = flat[name].default, getattr(self, name)
            owner = "questions" if name == "question_temperature" else "objective"
            if name == "negatives" and self.objective in ("disco_b", "maxrl") and value == "mean":
                continue
            if value != default and name not in used:
                raise ValueError(
                    f"disco.{name}={value} has no effect with disco.{owner}={getattr(self, owner)}; leave it at "
                    f"{default}, or choose another of disco.{owner}"
                )
        for name in self.options:
            if name in flat:
                raise ValueError(f"disco.options.{name} would hide disco.{name}; set disco.{name}")
            if name not in used:
                raise ValueError(
                    f"disco.options.{name} is no setting of disco.objective={self.objective}, "
                    f"disco.questions={self.questions}, disco.score={self.score} or "
                    f"disco.constraint={self.constraint}; they read {sorted(used)}"
                )
        for name, f in used.items():
            if name in flat and f.default not in (MISSING, flat[name].default):
                raise ValueError(
                    f"the default {f.default!r} of {name!r} would never hold, as disco.{name} has one of its own "
                    f"({flat[name].default!r}); leave the default out, or give the field another name"
                )

    def used(self) -> dict[str, Field]:
        """The settings that the objective, its weights of questions, the score and the controller own, by name."""
        assert self.questions is not None
        owners = OBJECTIVES[self.objective], QUESTIONS[self.questions], SCORES[self.score], CONTROLLERS[self.constraint]
        return {name: f for owner in owners for name, f in settings_of(owner).items()}

    def settings(self) -> dict[str, Any]:
        """All settings by name, those of ``options`` among them."""
        return asdict(self) | dict(self.options)

    def chosen(self) -> dict[str, Any]:
        """The arguments of :func:`recipe.disco.disco_loss` that make it this method."""
        names = {"objective", "score", "questions", "pairs", "kl_estimator", "constraint", "positive_threshold"}
        names.update(self.used())
        return {name: value for name, value in self.settings().items() if name in names}

    def build_objective(self) -> Objective:
        """The objective with its settings."""
        return OBJECTIVES.build(self.objective, self.settings())

    def build_question_weight(self) -> QuestionWeight:
        """How much each question counts."""
        assert self.questions is not None
        return QUESTIONS.build(self.questions, self.settings())

    @property
    def graded(self) -> bool:
        """Whether every two responses with different rewards are compared."""
        return self.pairs == "graded"

    def build_score(self) -> Score:
        """The score with its settings."""
        return SCORES.build(self.score, self.settings())

    def build_controller(self) -> Controller:
        """A fresh controller for the constraint."""
        return build_controller(self.constraint, self.settings())


def shipped_settings() -> dict[str, Field]:
    """Settings of all that ships, by name, with their bounds: a wrong one is refused though it is not used."""
    shipped = [r[name] for r in (OBJECTIVES, QUESTIONS, SCORES, CONTROLLERS) for name in r]
    return {n: f for cls in shipped if cls.__module__.startswith("recipe.disco.") for n, f in settings_of(cls).items()}


@functools.cache
def load_once(module: str | None) -> None:
    """Run a user's module, once per process: it registers objectives, scores or controllers.

    Raises:
        ValueError: it cannot be loaded.
    """
    from verl.utils.import_utils import load_module

    try:
        load_module(module)
    except Exception as e:
        why = e.__cause__ or e
        raise ValueError(f"disco.module={module} cannot be loaded: {why!r}; give a file or pkg://a.module") from e


def parse(node: DictConfig | dict[str, Any]) -> DiscoConfig:
    """The ``disco`` node as typed settings.

    Raises:
        ValueError: for an unknown field or a value out of range.
    """
    values = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    values.pop("_target_", None)
    known = {f.name for f in fields(DiscoConfig)}
    if unknown := sorted(set(values) - known, key=str):
        raise ValueError(f"disco.{unknown[0]} is not a setting; the settings are {sorted(known)}")
    return DiscoConfig(**values)
