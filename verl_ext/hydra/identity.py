"""A run's identity is its settings: those that change its results. A folder is one run's, and others are refused there.

``python -m verl_ext.hydra.identity OVERRIDES`` prints the folder of that run and whether it is finished there.
"""

import os
import re
import reprlib
import sys
from collections.abc import Collection, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.recipes import DEFAULT_ALGORITHM
from verl_ext.runs.folder import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    FINISHED_FILE,
    METRICS_FILE,
    flatten,
    full_names,
    is_finished,
    is_run,
    read_settings,
    without_hydra,
)

WITHOUT_EFFECT = (
    # Where a run lies, what it is called, how long it goes on, what it logs, evaluates and keeps meanwhile.
    r"trainer\.(?!(critic_warmup|device|nnodes|n_gpus_per_node|use_v1|v1)\b).*",
    r"(arithmetic|math)\.folder|base_model|data\.cache_dir|skip\.\w+\.dump_dir",
    r"data\.(val_\w+|validation_shuffle)|.*\.val_kwargs\..*|.*sandbox_fusion\..*",
    r"verl_ext\.(gpu_memory|same_run|max_failed_rewards|metrics|prepare|validator)",
    r"(.*\.)?(global_profiler|profiler|prometheus|trace)(\..*)?|.*\.(calculate_log_probs|disable_log_stats)",
    # Which machines and processes do the work. The number of ranks counts, see below.
    r"(ray_kwargs|transfer_queue)(\..*)?|.*\.(checkpoint|checkpoint_engine)\..*",
    r"(.*\.)?(num_workers|filter_overlong_prompts_workers|nccl_timeout|use_shm|trust_remote_code)",
    r"actor_rollout_ref\.rollout\.(nnodes|n_gpus_per_node|\w*parallel_size|agent\.agent_loop_manager_class)",
    r"(distillation|reward\.reward_model)\.(nnodes|n_gpus_per_node)|reward\.reward_model\.rollout\.\w*parallel_size",
    r".*\.engine_kwargs\..*|reward\.max_concurrent|.*\.ulysses_sequence_parallel_size|.*\.ref\.megatron\..*parallel_size",
    # How a batch is cut: sums over it do not depend on that.
    r".*micro_batch_size(_per_gpu)?|.*max_token_len_per_gpu|.*use_dynamic_bsz|data\.val_batch_size",
    # What memory and speed depend on.
    r".*(offload|offload_policy|gradient_checkpointing|entropy_checkpointing|use_torch_compile|use_remove_padding)",
    r".*\.(entropy_from_logits_\w+|recompute_\w+|pad_to_length\w*|pad_bshd_to_minibatch_max|tiled_mlp\..*)",
    r".*\.(use_fused_kernels|fused_kernel_options\..*|reshard_after_forward|forward_prefetch|wrap_policy\..*|fused)",
    r".*\.(use_no_sync_for_gradient_accumulation|(standalone_)?gpu_memory_utilization|max_num_seqs|max_model_len)",
    r".*\.(max_num_batched_tokens|enforce_eager|free_cache_engine|enable_sleep_mode|enable_chunked_prefill)",
    r".*\.(enable_prefix_caching|cudagraph_capture_sizes|load_format|layered_summon|multi_stage_wake_up)",
    r".*\.(scheduling_policy|update_weights_bucket_megabytes)",
)
"""Full names of settings in which a run may differ from the one that it resumes. All others change its results."""

RANKS = "trainer.nnodes x trainer.n_gpus_per_node"

LOADED = re.compile(
    rf"{RANKS}|model_engine|trainer\.v1\.trainer_mode|data\.dataloader_num_workers|.*\.(actor|critic)\.strategy"
    r"|.*\.(megatron|fsdp_config|fsdp)\.((?!ulysses).*parallel_size|fsdp_size)|.*\.lora(\.|_)rank|.*\.optim\.optimizer(_impl)?"
)
"""Settings without which a checkpoint cannot be loaded, wherever the run goes on from it."""

WHOLE = ("actor_rollout_ref", "data", "algorithm", "trainer", "ray_kwargs")
"""Nodes that all runs' settings have, the last one near the end of the file."""

ALGORITHM = "verl_ext.algorithm"

STOCK_IDENTITY = {ALGORITHM, "actor_rollout_ref.model.path", "trainer.resume_from_path"}
"""Settings in which even runs of stock verl may not differ, besides those of ``LOADED``."""

SECRET = re.compile(r"\.env_vars\.|api_key|secret|password|token$", re.IGNORECASE)

MOST_TOLD = 8

_WITHOUT_EFFECT = re.compile("|".join(WITHOUT_EFFECT))


def changes_results(name: str) -> bool:
    """Tell whether runs that differ in this setting are different runs."""
    return not _WITHOUT_EFFECT.fullmatch(name)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Find the settings that are not the same, by full name: (before, now).

    The numbers of nodes and of GPUs are one setting. Paths are the same if they lead to the same place, from the
    working folder or from that of the run: a project may have been moved.
    """
    roots = [str(settings.get("trainer.default_local_dir")) for settings in (before, now)]
    before, now = _with_ranks(before), _with_ranks(now)
    pairs = {name: (before.get(name), now.get(name)) for name in sorted(before.keys() | now.keys())}
    return {name: pair for name, pair in pairs.items() if not _is_same(*pair, *roots)}


def _with_ranks(settings: Mapping[str, Any]) -> dict[str, Any]:
    nodes, gpus = settings.get("trainer.nnodes"), settings.get("trainer.n_gpus_per_node")
    if not (isinstance(nodes, int) and isinstance(gpus, int)):
        return dict(settings)
    rest = {n: v for n, v in settings.items() if n not in ("trainer.nnodes", "trainer.n_gpus_per_node")}
    return rest | {RANKS: nodes * gpus}


def _is_same(before: Any, now: Any, *roots: str) -> bool:
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(_is_same(*pair, *roots) for pair in zip(before, now, strict=True))
    if isinstance(before, str) and isinstance(now, str) and os.path.isabs(now):
        if os.path.abspath(os.path.expanduser(before)) == os.path.normpath(now):
            return True
        moved = len(roots) == 2 and os.path.isabs(before)
        return moved and os.path.relpath(before, roots[0]) == os.path.relpath(now, roots[1])
    if type(before) in (int, float, str) and type(now) in (int, float, str) and str(before) == str(now):
        # A number in quotes, or not a number.
        return True
    return before == now or (before in (None, {}) and now in (None, {}))


def holds_run(folder: Path) -> bool:
    """Tell whether a folder has results of a run: metrics, or a checkpoint."""
    metrics = folder / METRICS_FILE
    if (metrics.exists() and metrics.stat().st_size > 0) or (folder / CHECKPOINT_FILE).exists():
        return True
    return any(folder.glob("global_step_*"))


def take_folder(config: DictConfig, folder: Path, given: Collection[str] = ()) -> None:
    """See that ``folder`` is this run's: new, or with a run of the same settings; tell in what else they differ.

    With ``trainer.resume_mode=disable`` the files of the run that is there are moved aside.

    Args:
        config: the settings, interpolations and all.
        folder: ``trainer.default_local_dir``.
        given: full names of what the command line sets.

    Raises:
        ValueError: the folder holds another run, its settings cannot be read, or the run cannot go on from there.
    """
    mode = OmegaConf.select(config, "trainer.resume_mode")
    if mode == "disable" and OmegaConf.select(config, "trainer.val_only") and any(folder.glob("global_step_*")):
        raise ValueError(
            f"trainer.default_local_dir={folder} holds a trained run, and trainer.val_only=true with "
            "trainer.resume_mode=disable evaluates the model before it; choose another folder, or "
            "trainer.resume_mode=auto"
        )
    if mode == "disable" and holds_run(folder):
        print(f"verl-disco: trainer.resume_mode=disable: the run in {folder} is now in {set_aside(folder)}", flush=True)
    if (folder / CONFIG_FILE).exists() and not is_run(folder):
        raise ValueError(
            f"trainer.default_local_dir={folder} has a {CONFIG_FILE} that is no run's, and a run would replace it; "
            "choose another folder"
        )
    if mode == "disable":
        return
    source = _checkpoint_named(config) if mode == "resume_path" else None
    elsewhere = source is not None and source.parent.resolve() != folder.resolve()
    if elsewhere:
        _check_source(config, source, given)
    if holds_run(folder):
        _check_run(config, folder, given, source if elsewhere else None)
    _check_length(config, source or latest_checkpoint(folder))


def _check_run(config: DictConfig, folder: Path, given: Collection[str], origin: Path | None) -> None:
    """Refuse to go on in the folder of a run with other settings, or with another ``origin``, and tell the rest."""
    latest = latest_checkpoint(folder)
    if not (folder / CONFIG_FILE).exists():
        print(f"verl-disco: warning: {folder} holds a run without {CONFIG_FILE}: its settings cannot be compared")
        _check_shards(config, latest)
        return
    before = _settings_of(folder)
    changed, told = compare(before, config, given)
    if origin is not None and not _is_same(before.get("trainer.resume_from_path"), str(origin)):
        changed["trainer.resume_from_path"] = before.get("trainer.resume_from_path"), str(origin)
    same = bool(OmegaConf.select(config, "verl_ext.same_run"))
    if same or "verl_ext" not in config:
        # A run of stock verl goes on as verl would, but for another method or model.
        refused = {name for name in changed if LOADED.fullmatch(name) or (not same and name in STOCK_IDENTITY)}
        told |= {name: pair for name, pair in changed.items() if name not in refused}
        changed = {name: pair for name, pair in changed.items() if name in refused}
    if changed:
        on = (
            ". To go on from its checkpoint: another folder, with trainer.resume_mode=resume_path "
            f"trainer.resume_from_path={latest}; or here, with ++verl_ext.same_run=true"
        )
        on = on if latest else ""
        raise ValueError(
            f"trainer.default_local_dir={folder} holds another run: {describe(changed)}; choose another folder, or "
            f"trainer.resume_mode=disable, which starts anew there and moves that run's files aside{on}"
        )
    for name, (old, new) in told.items() if latest else ():
        print(f"verl-disco: {folder} is resumed with {name}={_shown(new, name)}, was {_shown(old, name)}", flush=True)


def compare(before: Mapping[str, Any], config: DictConfig, given: Collection[str]) -> tuple[dict, dict]:
    """What of ``config`` differs from a run's settings: what changes results, and the rest."""
    before, now = ({ALGORITHM: DEFAULT_ALGORITHM} | settings for settings in (before, flatten(config)))
    found = differences(before, now)
    changed = {
        # A setting that the run does not have, and nobody gave, is of another version of this package or of verl.
        name: pair
        for name, pair in found.items()
        if changes_results(name) and (name in before or name == RANKS or name in now and _is_given(name, given))
    }
    raw = full_names("", OmegaConf.to_container(config, resolve=False))
    follow = tuple(f"{name}." for name, value in raw.items() if "${" in str(value))
    # What follows from a setting that is named needs no naming.
    own = {name: pair for name, pair in changed.items() if not f"{name}.".startswith(follow)}
    return own or changed, {name: pair for name, pair in found.items() if name not in changed}


def _is_given(name: str, given: Collection[str]) -> bool:
    return any(name == g or name.startswith(f"{g}.") for g in given)


def describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """``seed=2, there 1; algorithm.gamma=0.9, there 1.0``"""
    told = [f"{name}={_shown(new, name)}, there {_shown(old, name)}" for name, (old, new) in changed.items()]
    more = [f"and {len(told) - MOST_TOLD} more"] if len(told) > MOST_TOLD else []
    return "; ".join(told[:MOST_TOLD] + more)


def _shown(value: Any, name: str = "") -> str:
    if SECRET.search(name):
        return "***"
    if value is None:
        return "(not set)"
    return value if isinstance(value, str) and len(value) < 200 else reprlib.repr(value)


def _settings_of(folder: Path) -> dict[str, Any]:
    """Read the settings of the run in a folder.

    Raises:
        ValueError: they cannot be read, or the file ends too early.
    """
    try:
        settings = read_settings(folder)
        nodes = {name.partition(".")[0] for name in settings}
        if missing := [node for node in WHOLE if node not in nodes]:
            raise ValueError(f"{folder / CONFIG_FILE} has nothing of {', '.join(missing)}")
    except ValueError as e:
        raise ValueError(
            f"{e}; it is broken, so nothing tells whether the run in {folder} is this one: repair it, choose another "
            "trainer.default_local_dir, or start anew there by trainer.resume_mode=disable"
        ) from None
    return settings


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that verl's tracker names, if there is one."""
    try:
        return folder / f"global_step_{int((folder / CHECKPOINT_FILE).read_text())}"
    except (OSError, ValueError):
        return None


def _check_length(config: DictConfig, checkpoint: Path | None) -> None:
    """Say that nothing is left to train after a checkpoint.

    Raises:
        ValueError: the run's length is less than its step.
    """
    total = OmegaConf.select(config, "trainer.total_training_steps")
    if checkpoint is None or total is None or OmegaConf.select(config, "trainer.val_only"):
        return
    step = int(checkpoint.name.rpartition("_")[2])
    if step > total:
        raise ValueError(
            f"trainer.total_training_steps={total}, but {checkpoint.parent} is at step {step} already; give at least "
            f"{step}, or another trainer.default_local_dir"
        )
    if step == total:
        print(f"verl-disco: {checkpoint.parent} is at step {step} of {total}: nothing is left to train", flush=True)


# Another run's checkpoint ---------------------------------------------------------------------------------------------


def _checkpoint_named(config: DictConfig) -> Path:
    """What ``trainer.resume_from_path`` names.

    Raises:
        ValueError: it is no folder of a checkpoint.
    """
    value = OmegaConf.select(config, "trainer.resume_from_path")
    source = Path(str(value))
    if value is None or not re.fullmatch(r"global_step_\d+", source.name) or not source.is_dir():
        raise ValueError(
            f"trainer.resume_from_path={value} is no checkpoint; trainer.resume_mode=resume_path needs an existing "
            "folder .../global_step_N"
        )
    return source


def _check_source(config: DictConfig, source: Path, given: Collection[str]) -> None:
    """Tell in what the run that a checkpoint of another one starts differs from that one.

    Raises:
        ValueError: the checkpoint cannot be loaded with these settings.
    """
    if not (source.parent / CONFIG_FILE).exists():
        _check_shards(config, source)
        return
    changed, _ = compare(_settings_of(source.parent), config, given)
    if unloadable := {name: pair for name, pair in changed.items() if LOADED.fullmatch(name)}:
        raise ValueError(
            f"trainer.resume_from_path={source} cannot be loaded with {describe(unloadable)}; use the same, or export "
            "the model (python -m verl_ext.export) and start from that"
        )
    if changed:
        print(f"verl-disco: starts from {source} with other settings: {describe(changed)}", flush=True)


def _check_shards(config: DictConfig, checkpoint: Path | None) -> None:
    """Refuse another number of ranks than a checkpoint without settings was written by."""
    from verl_ext.runs.checkpoints import shard_files

    try:
        there = len(shard_files(checkpoint / "actor")) if checkpoint else 0
    except (OSError, ValueError):
        return
    ranks = _with_ranks(flatten(config)).get(RANKS)
    if there and ranks and there != ranks:
        raise ValueError(f"{RANKS}={ranks}, but {checkpoint} is of {there} ranks; use as many")


# Files of a run -------------------------------------------------------------------------------------------------------


def set_aside(folder: Path) -> Path:
    """Move the files of the run in ``folder`` into a new one below it, ``earlier_1`` or the next that is free."""
    aside = next(f for i in count(1) if not (f := folder / f"earlier_{i}").exists())
    try:
        settings = read_settings(folder)
    except ValueError:
        settings = {}
    dumps = [settings.get(f"trainer.{kind}_data_dir") for kind in ("validation", "rollout")]
    inside = [Path(d) for d in dumps if isinstance(d, str) and Path(d).absolute().parent == folder.absolute()]
    patterns = (f"{METRICS_FILE}*", CONFIG_FILE, FINISHED_FILE, CHECKPOINT_FILE, "global_step_*", "validation")
    found = {f.name: f for pattern in patterns for f in folder.glob(pattern)} | {f.name: f for f in inside}
    aside.mkdir()
    for name, file in found.items():
        if file.exists():
            os.rename(file, aside / name)
    return aside


def main(overrides: list[str]) -> int:
    """Print ``finished FOLDER`` or ``unfinished FOLDER`` for the run with these overrides.

    Returns:
        1 if what is in the folder cannot be read, else 0.
    """
    import hydra
    import verl  # noqa: F401  (loads the plugin)

    from verl_ext.hydra.paths import settle

    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", overrides, return_hydra_config=True)
    try:
        settle(config)
        config = without_hydra(config)
        folder = Path(config.trainer.default_local_dir)
        finished = is_finished(folder, config)
    except ValueError as e:
        print(f"verl-disco: {e}", file=sys.stderr)
        return 1
    print("finished" if finished else "unfinished", folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
