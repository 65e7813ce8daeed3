"""What the entry point tells verl_ext of this recipe; cheap to import, so what needs verl is imported when called."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from verl_ext.recipes import Recipe


def batch_loss(
    config: DictConfig,
    *,
    log_prob: Tensor,
    old_log_prob: Tensor,
    response_mask: Tensor,
    reward: Tensor,
    uid: Sequence,
    ref_log_prob: Tensor | None,
) -> Tensor:
    """The loss of a mini-batch under the settings ``config.disco``: see :func:`recipe.disco.disco_loss`."""
    from recipe.disco import disco_loss
    from recipe.disco.settings import parse

    settings = parse(config.disco).chosen()
    return disco_loss(log_prob, old_log_prob, response_mask, reward, uid, ref_log_prob=ref_log_prob, **settings)[0]


def kl_bound(settings: Mapping[str, Any]) -> float | None:
    """``disco.delta``, where the constraint knows one."""
    from recipe.disco.constraint import CONTROLLERS
    from recipe.disco.registry import settings_of

    name = settings.get("disco.constraint")
    bounded = name in list(CONTROLLERS) and "delta" in settings_of(CONTROLLERS[name])
    return settings.get("disco.delta") if bounded else None


RECIPE = Recipe(
    package="recipe.disco",
    config="recipe.disco.config",
    registering=("recipe.disco.estimator",),
    estimators=("disco",),
    losses={"disco": batch_loss},
    compared=("disco", "real"),
    metrics={
        "entropy": ("disco/entropy",),
        "kl": ("disco/kl",),
        "coefficient": ("disco/coefficient",),
    },
    totals=("disco/measure_seconds",),
    kl_bound=kl_bound,
    copies=("actor_rollout_ref.actor.policy_loss.disco.",),
    optional=("disco.options",),
    published="published.yaml",
    source="the DisCO paper (arXiv 2505.12366)",
)
