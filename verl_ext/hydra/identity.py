"""Refuse a run in the folder of another run, where "another" means other settings that change its results.

``python -m verl_ext.hydra.identity OVERRIDES`` prints a run's folder and whether the run is finished there.
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
    INPUTS_FILE,
    METRICS_FILE,
    flatten,
    full_names,
    is_finished,
    is_run,
    latest_checkpoint,
    read_settings,
    without_hydra,
)

WITHOUT_EFFECT = (
    # A run's folder, name and length, and what it logs, evaluates and keeps.
    r"trainer\.(?!(critic_warmup|device|nnodes|n_gpus_per_node|use_v1|v1)\b).*",
    r"(arithmetic|countdown|gsm8k|math)\.folder|base_model|data\.cache_dir|skip\.\w+\.dump_dir",
    r"data\.(val_\w+|validation_shuffle)|.*\.val_kwargs\..*|.*sandbox_fusion\..*",
    r"verl_ext\.(gpu_memory|same_run|max_failed_rewards|metrics|prepare|progress|reward_timeout|validator)",
    r"(.*\.)?(global_profiler|profiler|prometheus|trace)(\..*)?|.*\.(calculate_log_probs|disable_log_stats)",
    # Machines and processes. The number of ranks counts, see RANKS.
    r"(ray_kwargs|transfer_queue)(\..*)?|.*\.(checkpoint|checkpoint_engine)\..*",
    r"(.*\.)?(num_workers|filter_overlong_prompts_workers|nccl_timeout|use_shm|trust_remote_code)",
    r"actor_rollout_ref\.rollout\.(nnodes|n_gpus_per_node|\w*parallel_size|agent\.agent_loop_manager_class)",
    r"(distillation|reward\.reward_model)\.(nnodes|n_gpus_per_node)|reward\.reward_model\.rollout\.\w*parallel_size",
    r".*\.engine_kwargs\..*|reward\.max_concurrent|.*\.ulysses_sequence_parallel_size|.*\.ref\.megatron\..*parallel_size",
    # Micro-batches: sums over a batch do not depend on them.
    r".*micro_batch_size(_per_gpu)?|.*max_token_len_per_gpu|.*use_dynamic_bsz|data\.val_batch_size",
    # Memory and speed.
    r".*(offload|offload_policy|gradient_checkpointing|entropy_checkpointing|use_torch_compile|use_remove_padding)",
    r".*\.(entropy_from_logits_\w+|recompute_\w+|pad_to_length\w*|pad_bshd_to_minibatch_max|tiled_mlp\..*)",
    r".*\.(use_fused_kernels|fused_kernel_options\..*|reshard_after_forward|forward_prefetch|wrap_policy\..*|fused)",
    r".*\.(use_no_sync_for_gradient_accumulation|(standalone_)?gpu_memory_utilization|max_num_seqs|max_model_len)",
    r".*\.(max_num_batched_tokens|enforce_eager|free_cache_engine|enable_sleep_mode|enable_chunked_prefill)",
    r".*\.(enable_prefix_caching|cudagraph_capture_sizes|load_format|layered_summon|multi_stage_wake_up)",
    r".*\.(scheduling_policy|update_weights_bucket_megabytes)",
)
"""Full names of settings that may change when a run resumes. All others change its results."""

RANKS = "trainer.nnodes x trainer.n_gpus_per_node"

LOADED = re.compile(
    rf"{RANKS}|model_engine|trainer\.v1\.trainer_mode|data\.dataloader_num_workers|.*\.(actor|critic)\.strategy"
    r"|.*\.(megatron|fsdp_config|fsdp)\.((?!ulysses).*parallel_size|fsdp_size)|.*\.lora(\.|_)rank|.*\.optim\.optimizer(_impl)?"
)
"""Settings that must not change for a checkpoint to load, in any folder."""

WHOLE = ("actor_rollout_ref", "data", "algorithm", "trainer", "ray_kwargs")
"""Nodes that every settings file has, the last one near its end."""

ALGORITHM = "verl_ext.algorithm"

STOCK_IDENTITY = {ALGORITHM, "actor_rollout_ref.model.path", "trainer.resume_from_path"}
"""Settings that must not change even in runs of stock verl, besides ``LOADED``."""

SECRET = re.compile(r"\.env_vars\.|api_key|secret|password|token$", re.IGNORECASE)

MOST_SHOWN = 8

_WITHOUT_EFFECT = re.compile("|".join(WITHOUT_EFFECT))


def changes_results(name: str) -> bool:
    """Tell whether a change of this setting makes another run."""
    return not _WITHOUT_EFFECT.fullmatch(name)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Find the settings that differ: full name -> (before, now).

    The numbers of nodes and GPUs count as one setting, their product. Paths are equal if they are equal relative to the
    working folder or to the run's folder, because a project may have been moved.
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
        # A number in quotes, or NaN.
        return True
    return before == now or (before in (None, {}) and now in (None, {}))


def holds_run(folder: Path) -> bool:
    """Tell whether a folder has metrics or a checkpoint of a run."""
    metrics = folder / METRICS_FILE
    logged = metrics.exists() and metrics.stat().st_size > 0
    return logged or (folder / CHECKPOINT_FILE).exists() or any(folder.glob("global_step_*"))


def take_folder(config: DictConfig, folder: Path, given: Collection[str] = ()) -> None:
    """Check that ``folder`` is new or holds this run; print the changed settings that do not matter.

    With ``trainer.resume_mode=disable`` the files of the run in the folder are moved aside.

    Args:
        config: the settings, with unresolved interpolations.
        folder: ``trainer.default_local_dir``.
        given: full names of the settings on the command line.

    Raises:
        ValueError: the folder holds another run, its settings cannot be read, or the run cannot resume there.
    """
    mode = OmegaConf.select(config, "trainer.resume_mode")
    if mode == "disable" and OmegaConf.select(config, "trainer.val_only") and any(folder.glob("global_step_*")):
        raise ValueError(
            f"trainer.default_local_dir={folder} holds a trained run, but trainer.val_only=true with "
            "trainer.resume_mode=disable would evaluate the untrained model; choose another folder, or "
            "trainer.resume_mode=auto"
        )
    if mode == "disable" and holds_run(folder):
        print(f"verl-disco: trainer.resume_mode=disable: moved the run in {folder} to {set_aside(folder)}", flush=True)
    if (folder / CONFIG_FILE).exists() and not is_run(folder):
        raise ValueError(
            f"trainer.default_local_dir={folder} has a {CONFIG_FILE} that does not belong to a run and would be "
            "overwritten; choose another folder"
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
    """Refuse to resume with changed settings or another ``origin``; print the changes that do not matter."""
    latest = latest_checkpoint(folder)
    if not (folder / CONFIG_FILE).exists():
        print(f"verl-disco: warning: the run in {folder} has no {CONFIG_FILE}, so its settings cannot be compared")
        _check_shards(config, latest)
        return
    before = _settings_of(folder)
    changed, harmless = compare(before, config, given)
    if origin is not None and not _is_same(before.get("trainer.resume_from_path"), str(origin)):
        changed["trainer.resume_from_path"] = before.get("trainer.resume_from_path"), str(origin)
    same = bool(OmegaConf.select(config, "verl_ext.same_run"))
    if same or "verl_ext" not in config:
        # As in verl itself, runs of stock verl may change anything but method and model.
        refused = {name for name in changed if LOADED.fullmatch(name) or (not same and name in STOCK_IDENTITY)}
        harmless |= {name: pair for name, pair in changed.items() if name not in refused}
        changed = {name: pair for name, pair in changed.items() if name in refused}
    if changed:
        resume = (
            ". To train on from its checkpoint: another folder with trainer.resume_mode=resume_path "
            f"trainer.resume_from_path={latest}, or this folder with ++verl_ext.same_run=true"
        )
        raise ValueError(
            f"trainer.default_local_dir={folder} holds another run: {describe(changed)}; choose another folder, or "
            "trainer.resume_mode=disable to start from step 0 there, with that run's files moved aside"
            + (resume if latest else "")
        )
    for name, (old, new) in harmless.items() if latest else ():
        print(f"verl-disco: resuming {folder} with {name}={_shown(new, name)}, was {_shown(old, name)}", flush=True)


def compare(before: Mapping[str, Any], config: DictConfig, given: Collection[str]) -> tuple[dict, dict]:
    """Find what differs from a run's settings: the differences that change results, and the others."""
    before, now = ({ALGORITHM: DEFAULT_ALGORITHM} | settings for settings in (before, flatten(config)))
    found = differences(before, now)
    # A setting that the run lacks and that was not given is one of another version of this package or of verl.
    set_here = tuple(f"{name}." for name in given)
    known = {n for n in found if n in before or n == RANKS or (n in now and f"{n}.".startswith(set_here))}
    changed = {name: found[name] for name in found if name in known and changes_results(name)}
    raw = full_names("", OmegaConf.to_container(config, resolve=False))
    follow = tuple(f"{name}." for name, value in raw.items() if "${" in str(value))
    # A setting that follows from others by interpolation is named only if these did not change.
    own = {name: pair for name, pair in changed.items() if not f"{name}.".startswith(follow)}
    return own or changed, {name: pair for name, pair in found.items() if name not in changed}


def describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Write differences in one line: ``seed=2 (that run: 1); algorithm.gamma=0.9 (that run: 1.0)``."""
    shown = [f"{name}={_shown(new, name)} (that run: {_shown(old, name)})" for name, (old, new) in changed.items()]
    more = [f"and {len(shown) - MOST_SHOWN} more"] if len(shown) > MOST_SHOWN else []
    return "; ".join(shown[:MOST_SHOWN] + more)


def _shown(value: Any, name: str = "") -> str:
    if SECRET.search(name):
        return "***"
    if value is None:
        return "(not set)"
    return value if isinstance(value, str) and len(value) < 200 else reprlib.repr(value)


def _settings_of(folder: Path) -> dict[str, Any]:
    """Read the settings of the run in a folder; refuse a file that is unreadable or ends too early."""
    try:
        settings = read_settings(folder)
        if missing := set(WHOLE) - {name.partition(".")[0] for name in settings}:
            raise ValueError(f"{folder / CONFIG_FILE} has no {', '.join(sorted(missing))}")
    except ValueError as e:
        raise ValueError(
            f"{e}; without it the run in {folder} cannot be compared with this one: repair it, choose another "
            "trainer.default_local_dir, or start from step 0 there with trainer.resume_mode=disable"
        ) from None
    return settings


def _check_length(config: DictConfig, checkpoint: Path | None) -> None:
    """Refuse a run that is shorter than its checkpoint's step; print that one of equal length has nothing to train."""
    total = OmegaConf.select(config, "trainer.total_training_steps")
    if checkpoint is None or total is None or OmegaConf.select(config, "trainer.val_only"):
        return
    step = int(checkpoint.name.rpartition("_")[2])
    if step > total:
        raise ValueError(
            f"trainer.total_training_steps={total}, but {checkpoint.parent} is already at step {step}; give at least "
            f"{step}, or another trainer.default_local_dir"
        )
    if step == total:
        print(f"verl-disco: {checkpoint.parent} is at step {step} of {total}: nothing is left to train", flush=True)


# Another run's checkpoint ---------------------------------------------------------------------------------------------


def _checkpoint_named(config: DictConfig) -> Path:
    """Return ``trainer.resume_from_path``; refuse anything but a checkpoint's folder."""
    value = OmegaConf.select(config, "trainer.resume_from_path")
    source = Path(str(value))
    if value is None or not re.fullmatch(r"global_step_\d+", source.name) or not source.is_dir():
        raise ValueError(
            f"trainer.resume_from_path={value} is not a checkpoint; trainer.resume_mode=resume_path needs an existing "
            "folder .../global_step_N"
        )
    return source


def _check_source(config: DictConfig, source: Path, given: Collection[str]) -> None:
    """Print how this run differs from the one whose checkpoint it starts from; refuse what cannot load it."""
    if not (source.parent / CONFIG_FILE).exists():
        _check_shards(config, source)
        return
    changed, _ = compare(_settings_of(source.parent), config, given)
    if unloadable := {name: pair for name, pair in changed.items() if LOADED.fullmatch(name)}:
        raise ValueError(
            f"trainer.resume_from_path={source} cannot be loaded with {describe(unloadable)}; use that run's values or "
            "export its model (python -m verl_ext.export) and start from that"
        )
    if changed:
        print(f"verl-disco: starting from {source} with other settings: {describe(changed)}", flush=True)


def _check_shards(config: DictConfig, checkpoint: Path | None) -> None:
    """Refuse another number of ranks than that of a checkpoint whose run has no settings file."""
    from verl_ext.runs.checkpoints import shard_files

    try:
        there = len(shard_files(checkpoint / "actor")) if checkpoint else 0
    except (OSError, ValueError):
        return
    ranks = _with_ranks(flatten(config)).get(RANKS)
    if there and ranks and there != ranks:
        raise ValueError(f"{RANKS}={ranks}, but {checkpoint} was written by {there} ranks; use the same number")


# Files of a run -------------------------------------------------------------------------------------------------------


def set_aside(folder: Path) -> Path:
    """Move the run in ``folder`` into a subfolder ``earlier_1``, or the next free number, and return that."""
    aside = next(f for i in count(1) if not (f := folder / f"earlier_{i}").exists())
    try:
        settings = read_settings(folder)
    except ValueError:
        settings = {}
    dumps = [settings.get(f"trainer.{kind}_data_dir") for kind in ("validation", "rollout")]
    inside = [Path(d) for d in dumps if isinstance(d, str) and Path(d).absolute().parent == folder.absolute()]
    patterns = (f"{METRICS_FILE}*", CONFIG_FILE, INPUTS_FILE, FINISHED_FILE, CHECKPOINT_FILE)
    patterns += ("global_step_*", "validation")
    found = {f.name: f for pattern in patterns for f in folder.glob(pattern)} | {f.name: f for f in inside}
    aside.mkdir()
    for name, file in found.items():
        if file.exists():
            os.rename(file, aside / name)
    return aside


def main(overrides: list[str]) -> int:
    """Print ``finished FOLDER`` or ``unfinished FOLDER`` for the run with these overrides; return the exit status."""
    import hydra
    import verl  # noqa: F401  (loads the plugin)
    from hydra.errors import HydraException

    from verl_ext.hydra.paths import settle

    try:
        with hydra.initialize_config_module("verl.trainer.config", version_base=None):
            config = hydra.compose("ppo_trainer", overrides, return_hydra_config=True)
    except HydraException as e:
        from verl_ext.preflight.errors import explain

        print(f"verl-disco: {explain(e, overrides)}", file=sys.stderr)
        return 1
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
