"""What the entry point tells verl_ext of this recipe; cheap to import, so what needs verl is imported when called."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from verl_ext.recipes import Recipe


def batch_loss(config: DictConfig, **batch: Any) -> Tensor:
    """The loss of a mini-batch, the tensors of :func:`recipe.disco.disco_loss`, under the settings ``config.disco``."""
    from recipe.disco import disco_loss
    from recipe.disco.settings import parse

    return disco_loss(**batch, **parse(config.disco).chosen())[0]


def kl_bound(settings: Mapping[str, Any]) -> float | None:
    """``disco.delta``, where the constraint knows one."""
    from recipe.disco.constraint import CONTROLLERS
    from recipe.disco.registry import settings_of

    name = settings.get("disco.constraint")
    bounded = name in list(CONTROLLERS) and "delta" in settings_of(CONTROLLERS[name])
    return settings.get("disco.delta") if bounded else None


def unread(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings of verl's losses that DisCO has no use for, and those of constraints that were not chosen."""
    from recipe.disco.constraint import CONTROLLERS
    from recipe.disco.registry import settings_of

    actor = r"actor_rollout_ref\.actor\."
    found = {
        actor + r"(clip_ratio(_low|_high|_c)?|loss_agg_mode|loss_scale_factor)": "DisCO clips nothing, and its mean is "
        "over questions: leave it out",
        actor + r"kl_loss_(coef|type)": "set disco.delta and disco.beta, or disco.constraint=fixed and "
        "disco.coefficient",
        r"algorithm\.(norm_adv_by_std_in_grpo|gamma|lam)": "advantages are for the log alone: leave it out",
    }
    name = settings.get("disco.constraint")
    if name in list(CONTROLLERS):
        reads = settings_of(CONTROLLERS[name])
        for other in {key for one in CONTROLLERS for key in settings_of(CONTROLLERS[one])} - set(reads):
            found[rf"disco\.{other}"] = f"disco.constraint={name} reads {', '.join(sorted(reads)) or 'none'}"
    return found


RECIPE = Recipe(
    package="recipe.disco",
    config="recipe.disco.config",
    registering=("recipe.disco.estimator",),
    estimators=("disco",),
    losses={"disco": batch_loss},
    compared=("disco", "real", "conspo"),
    metrics={
        "entropy": ("disco/entropy",),
        "kl": ("disco/kl",),
        "coefficient": ("disco/coefficient",),
    },
    totals=("disco/measure_seconds",),
    kl_bound=kl_bound,
    unread=unread,
    copies=("actor_rollout_ref.actor.policy_loss.disco.",),
    optional=("disco.options",),
    published="published.yaml",
    source="the DisCO paper (arXiv 2505.12366)",
)
