"""`disco` in verl's own registries of advantage estimators and policy losses."""

from dataclasses import dataclass, field

from verl.workers.config import PolicyLossConfig

from recipe.disco.settings import DiscoConfig


@dataclass
class DiscoPolicyLossConfig(PolicyLossConfig):
    """verl's ``actor.policy_loss`` node with the method's settings, so that workers see them."""

    disco: DiscoConfig = field(default_factory=DiscoConfig)
