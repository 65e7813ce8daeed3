"""Settings of verl's next releases, as its open pull requests name them, under which our extensions would go wrong."""

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from verl_ext.preflight.composition import Run, walk
from verl_ext.preflight.findings import Finding

SHARED_PREFIXES = ("use_prefix_tree", "use_prefix_grouper")
"""They compute what the responses to a question share once, and so pack and order rows anew (verl 6689, 4368)."""

DATA_BACKEND = "rollout_data_backend"
"""What keeps the rows of a batch (verl 7415)."""


def check_next_verl(run: Run) -> Iterator[Finding]:
    """Name what this verl can do and our extensions cannot, at whatever node it stands."""
    whole_groups = OmegaConf.select(run.config, "verl_ext.whole_groups")
    for setting in walk(OmegaConf.to_container(run.config)):
        name, key, value = setting.name, setting.name.rpartition(".")[2], setting.value
        if key in SHARED_PREFIXES and value and whole_groups:
            problem = f"{name}={value} packs and orders rows anew, and verl_ext.whole_groups deals them to mini-batches"
            yield Finding(key, "", problem, f"set {name}=False")
        elif key == DATA_BACKEND and not _is_transfer_queue(value):
            problem = f"{name}={value} keeps the rows of a batch, and verl-disco reads and writes TransferQueue alone"
            yield Finding(key, "", problem, "set it to transfer_queue")


def _is_transfer_queue(value: Any) -> bool:
    if isinstance(value, dict):
        value = next((value[key] for key in ("name", "backend", "type") if key in value), value)
    return value is None or str(value).replace("_", "").lower() == "transferqueue"
