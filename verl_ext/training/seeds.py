"""Seed the random numbers of training workers, which verl leaves to chance.

Weights that no checkpoint has come from them: a critic's value head, a new adapter.
"""

import random
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf


def seed_of(config: DictConfig) -> int | None:
    """Return the run's seed: ``seed``, else ``data.seed``; None if neither is set.

    Raises:
        ValueError: it is no whole number, or torch cannot take it.
    """
    found = {name: OmegaConf.select(config, name) for name in ("seed", "data.seed")}
    for name, seed in found.items():
        if seed is not None:
            if type(seed) is not int or not -(2**63) <= seed < 2**64:
                raise ValueError(f"{name}={seed} must be a whole number that fits 64 bits")
            return seed
    return None


def seeded(worker: type, seed: int) -> type:
    """Make a worker's class that seeds Python, numpy and torch first, with the same seed on each rank."""

    class Seeded(worker):
        def __init__(self, *args: Any, **kwargs: Any):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            super().__init__(*args, **kwargs)

    # Ray shows it.
    Seeded.__name__, Seeded.__qualname__ = worker.__name__, worker.__qualname__
    return Seeded
