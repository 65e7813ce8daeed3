"""The trust region KL(pi_old || pi_theta) <= delta: estimators of the KL, and controllers that turn it into a penalty.

A controller is a penalty, a function of the KL measured over a whole mini-batch; the penalty's derivative, taken by
autograd, is the coefficient of grad KL in the training step. The paper's is :class:`SquaredHinge`. The whole mini-batch
matters: the mean of squared hinges over micro-batches is not the squared hinge of the mean.

Register another with :func:`register_controller`; its fields are settings: fields of ``DiscoConfig`` or ``options``.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from recipe.disco.registry import Component, Registry, number, require_finite
from recipe.disco.scores import log_ratio

KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    # k1 = -log r, unbiased, of either sign
    "k1": lambda log_ratio: -log_ratio,
    # k3 = r - 1 - log r, unbiased and >= 0
    "k3": lambda log_ratio: torch.expm1(log_ratio) - log_ratio,
}
"""Estimators of KL(pi_old || pi_theta) from a token of pi_old, as functions of log r, r = pi_theta / pi_old."""


def kl_estimate(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, estimator: str = "k1") -> Tensor:
    """Estimate of KL(pi_old || pi_theta) at each response token, in nats; 0 outside ``mask``. Shape (B, T).

    The constraint's KL is the average over all response tokens of a mini-batch, unmixed groups included.

    Raises:
        ValueError: for an estimator other than k1 and k3.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator={estimator!r} is unknown; choose from {sorted(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[estimator](log_ratio(log_prob, old_log_prob, mask))


def kl_standard_error(kl_sum: Tensor, length: Tensor) -> float | None:
    """Standard error of a mini-batch's KL, in nats per token; None for fewer than two responses with tokens.

        KL = sum_i k_i / N,    SE^2 = m/(m-1) sum_i (k_i - n_i KL)^2 / N^2,    N = sum_i n_i

    Responses are the units: the tokens of one share a context and move together, so they count as a cluster. It is the
    variance of a ratio of two sums over independent units (Cochran, Sampling Techniques, 1977, chapter 6).

    Args:
        kl_sum: (B,) k_i, the estimates summed over a response's tokens, in nats.
        length: (B,) n_i, its tokens; responses without any do not count.
    """
    counted = length > 0
    units, tokens = int(counted.sum()), length.sum()
    if units < 2:
        return None
    residual = torch.where(counted, kl_sum - length * (kl_sum[counted].sum() / tokens), 0.0)
    return float((units / (units - 1) * residual.double().square().sum()).sqrt() / tokens)


@dataclass
class Controller(Component):
    """Base class of controllers: a dataclass whose fields are its settings, and perhaps a state."""

    reads_kl: ClassVar[bool] = True
    """The penalty depends on the KL, so that of all responses is measured."""

    def penalty(self, kl: Tensor) -> Tensor:
        """What is added to -J: a differentiable function of the KL, a 0-dim tensor."""
        raise NotImplementedError

    def end_step(self, kl: float) -> None:
        """Learn from ``kl``, the last KL measured in a training step (all updates on one rollout)."""

    def state_dict(self) -> dict[str, Any]:
        """State that a checkpoint must hold, JSON-serialisable; empty for a controller without state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""


CONTROLLERS: Registry[Controller] = Registry("constraint", Controller)
register_controller = CONTROLLERS.register
"""Class decorator: register a controller under the name that ``disco.constraint`` takes."""


@register_controller("squared_hinge")
@dataclass
class SquaredHinge(Controller):
    """The paper's: (beta/2) max(KL - delta, 0)^2, with coefficient beta max(KL - delta, 0).

    The published scripts' beta = 1e3 is in this convention; the paper writes beta [.]^2 without the half.
    """

    delta: float = number(minimum=0)
    beta: float = number(minimum=0)

    def penalty(self, kl: Tensor) -> Tensor:
        return self.beta / 2 * torch.relu(kl - self.delta) ** 2


@register_controller("augmented_lagrangian")
@dataclass
class AugmentedLagrangian(Controller):
    """Augmented Lagrangian of an inequality: (max(0, lambda + rho (KL - delta))^2 - lambda^2) / (2 rho).

    Its coefficient is max(0, lambda + rho (KL - delta)). The multiplier is updated once per training step,
    lambda <- max(0, lambda + rho (KL - delta)), so it settles where the constraint holds without a large rho.
    """

    delta: float = number(minimum=0)
    rho: float = number(above=0)
    multiplier: float = field(default=0.0, init=False)

    def penalty(self, kl: Tensor) -> Tensor:
        return (torch.relu(self.multiplier + self.rho * (kl - self.delta)) ** 2 - self.multiplier**2) / (2 * self.rho)

    def end_step(self, kl: float) -> None:
        self.multiplier = max(0.0, self.multiplier + self.rho * (kl - self.delta))

    def state_dict(self) -> dict[str, Any]:
        return {"multiplier": self.multiplier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.multiplier = require_finite("multiplier", state["multiplier"], minimum=0)


@register_controller("fixed")
@dataclass
class Fixed(Controller):
    """coefficient * KL: plain KL regularisation towards pi_old, no trust region."""

    coefficient: float = number(minimum=0)

    def penalty(self, kl: Tensor) -> Tensor:
        return self.coefficient * kl


@register_controller("none")
@dataclass
class Unconstrained(Controller):
    """No penalty; the KL that is logged is that of the responses whose scores are measured."""

    reads_kl = False

    def penalty(self, kl: Tensor) -> Tensor:
        return 0.0 * kl


class Price(NamedTuple):
    """A controller's penalty at a KL, and its derivative there, the coefficient of grad KL."""

    penalty: float
    coefficient: float


def price(controller: Controller, kl: float) -> Price:
    """The penalty at ``kl`` and d penalty / d KL.

    Raises:
        ValueError: one of them is no finite number; names the controller and the KL.
    """

    def refuse(found: object) -> None:
        raise ValueError(
            f"disco.constraint={controller.name}: {found} at a KL of {kl:g}; penalty(kl) must be a finite number, "
            "computed from kl by torch"
        )

    with torch.enable_grad():
        leaf = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
        penalty = controller.penalty(leaf)
        if not isinstance(penalty, Tensor) or penalty.shape != () or not penalty.requires_grad:
            refuse(f"its penalty is {penalty}")
        (coefficient,) = torch.autograd.grad(penalty, leaf)
    found = Price(penalty.item(), coefficient.item())
    for name, value in found._asdict().items():
        if not math.isfinite(value):
            refuse(f"its {name} is {value}")
    return found


def build_controller(kind: str, settings: Mapping[str, Any]) -> Controller:
    """A fresh controller of the kind registered as ``kind``, with those of ``settings`` that it owns.

    Raises:
        ValueError: for an unknown kind, a setting that is missing or out of range, or a state that no checkpoint can
            hold, or a penalty that reads a KL which is not measured, naming it.
    """
    controller = CONTROLLERS.build(kind, settings)
    try:
        json.dumps(controller.state_dict(), allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"disco.constraint={kind} has a state that JSON cannot hold ({e}): {controller.state_dict()}"
        ) from e
    slopes = [] if controller.reads_kl else [price(controller, kl).coefficient for kl in (-1.0, 0.0, 1.0)]
    if len(set(slopes)) > 1:
        raise ValueError(
            f"disco.constraint={kind} has reads_kl = False, but its penalty's derivative depends on the KL ({slopes} "
            "at -1, 0, 1), which would be measured on a part of the responses; set reads_kl = True"
        )
    return controller
