"""Folders of runs with checkpoints, as verl leaves them."""

import json

import torch
from omegaconf import OmegaConf

from verl_ext.runs.folder import CONFIG_FILE

SETTINGS = {
    "seed": 1,
    "verl_ext.algorithm": "disco",
    "disco.tau": 10.0,
    "disco._target_": "x",
    "actor_rollout_ref.model.path": "org/Base-1B",
    "actor_rollout_ref.actor.strategy": "fsdp2",
}


def write_settings(folder, **more):
    config = OmegaConf.create()
    for name, value in (SETTINGS | more).items():
        OmegaConf.update(config, name, value, force_add=True)
    OmegaConf.save(config, folder / CONFIG_FILE)


def write_checkpoint(folder, step, ranks=2):
    """What verl's FSDP engine leaves, with no tensors in it."""
    actor = folder / f"global_step_{step}/actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface/config.json").write_text("{}")
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": ranks}))
    for rank in range(ranks):
        torch.save({"a": torch.ones(1000)}, actor / f"model_world_size_{ranks}_rank_{rank}.pt")
    return actor
