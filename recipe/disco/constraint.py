"""The trust region KL(pi_old || pi_theta) <= delta: estimators of the KL, and controllers that turn it into a penalty.

A controller maps the KL measured over a whole mini-batch to the penalty's value and to its derivative, the
coefficient of grad KL in the training step. The paper's is :class:`SquaredHinge`. Evaluating it on the whole mini-batch
matters: the mean of squared hinges over micro-batches is not the squared hinge of the mean.

Register another with :func:`register_controller`; its constructor's parameters are fields of ``DiscoConfig`` or among
its ``options``.
"""

import inspect
import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from recipe.disco.registry import Registry, require_finite
from recipe.disco.scores import masked

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
    return KL_ESTIMATORS[estimator](masked(log_prob, mask) - masked(old_log_prob, mask))


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


def relu(x):
    """max(x, 0) for floats and, with a gradient, for tensors."""
    return torch.clamp(x, min=0) if isinstance(x, Tensor) else max(x, 0.0)


class Controller:
    """Turns the measured KL into a penalty. Subclasses say how; one without state need not say more.

    ``penalty`` takes a float or a 0-dim tensor (then with a gradient), ``coefficient`` is its derivative.
    """

    def penalty(self, kl):
        """Value of the penalty added to -J."""
        raise NotImplementedError

    def coefficient(self, kl: float) -> float:
        """d penalty / d KL."""
        raise NotImplementedError

    def end_step(self, kl: float) -> None:
        """Learn from ``kl``, the last KL measured in a training step (all updates on one rollout)."""

    def state_dict(self) -> dict:
        """State that a checkpoint must hold, JSON-serialisable; empty for a controller without state."""
        return {}

    def load_state_dict(self, state: Mapping) -> None:
        """Restore what :meth:`state_dict` gave."""


CONTROLLERS: Registry[type[Controller]] = Registry("constraint")


def register_controller(name: str) -> Callable[[type[Controller]], type[Controller]]:
    """Class decorator: register a controller under the name that ``disco.constraint`` takes."""
    return CONTROLLERS.register(name)


@register_controller("squared_hinge")
class SquaredHinge(Controller):
    """The paper's: (beta/2) max(KL - delta, 0)^2, with coefficient beta max(KL - delta, 0).

    The published scripts' beta = 1e3 is in this convention; the paper writes beta [.]^2 without the half.
    """

    def __init__(self, delta: float, beta: float):
        self.delta = require_finite("delta", delta, minimum=0)
        self.beta = require_finite("beta", beta, minimum=0)

    def penalty(self, kl):
        return self.beta / 2 * relu(kl - self.delta) ** 2

    def coefficient(self, kl: float) -> float:
        return self.beta * relu(kl - self.delta)


@register_controller("augmented_lagrangian")
class AugmentedLagrangian(Controller):
    """Augmented Lagrangian of an inequality: (max(0, lambda + rho (KL - delta))^2 - lambda^2) / (2 rho).

    Its coefficient is max(0, lambda + rho (KL - delta)). The multiplier is updated once per training step,
    lambda <- max(0, lambda + rho (KL - delta)), so it settles where the constraint holds without a large rho.
    """

    def __init__(self, delta: float, rho: float):
        self.delta = require_finite("delta", delta, minimum=0)
        self.rho = require_finite("rho", rho, above=0)
        self.multiplier = 0.0

    def penalty(self, kl):
        return (relu(self.multiplier + self.rho * (kl - self.delta)) ** 2 - self.multiplier**2) / (2 * self.rho)

    def coefficient(self, kl: float) -> float:
        return relu(self.multiplier + self.rho * (kl - self.delta))

    def end_step(self, kl: float) -> None:
        self.multiplier = relu(self.multiplier + self.rho * (kl - self.delta))

    def state_dict(self) -> dict:
        return {"multiplier": self.multiplier}

    def load_state_dict(self, state: Mapping) -> None:
        self.multiplier = require_finite("multiplier", state["multiplier"], minimum=0)


@register_controller("fixed")
class Fixed(Controller):
    """coefficient * KL: plain KL regularisation towards pi_old, no trust region."""

    def __init__(self, coefficient: float):
        self._coefficient = require_finite("coefficient", coefficient, minimum=0)

    def penalty(self, kl):
        return self._coefficient * kl

    def coefficient(self, kl: float) -> float:
        return self._coefficient


@register_controller("none")
class Unconstrained(Controller):
    """No penalty; the KL is still measured and logged."""

    def penalty(self, kl):
        return 0.0 * kl

    def coefficient(self, kl: float) -> float:
        return 0.0


def price(controller: Controller, kl: float) -> tuple[float, float]:
    """The penalty at ``kl`` and its derivative, the coefficient.

    Raises:
        ValueError: one of them is no finite number; names the controller and the KL.
    """
    found = []
    for part in ("penalty", "coefficient"):
        value = getattr(controller, part)(kl)
        if isinstance(value, Tensor):
            value = value.item() if value.numel() == 1 else value.tolist()
        found.append(require_finite(f"disco.constraint ({type(controller).__name__}): {part}({kl:g})", value))
    return tuple(found)


def build_controller(kind: str, settings: Mapping) -> Controller:
    """The controller registered as ``kind``, with those of ``settings`` that its constructor names.

    Raises:
        ValueError: for an unknown kind, a setting that is missing or out of range, or a state that no checkpoint can
            hold, naming it.
    """
    cls = CONTROLLERS[kind]
    wanted = inspect.signature(cls).parameters
    for name, parameter in wanted.items():
        if name not in settings and parameter.default is parameter.empty:
            raise ValueError(f"constraint={kind} needs the setting {name!r}; give it as +disco.options.{name}=VALUE")
    controller = cls(**{n: settings[n] for n in wanted if n in settings})
    try:
        json.dumps(controller.state_dict(), allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ValueError(f"constraint={kind} has a state that JSON cannot hold ({e}): {controller.state_dict()}") from e
    return controller
