"""Finds values that cannot be right: words for numbers, sizes below one, misspelt modes.

What is right follows from the setting's dataclass, from the value that it replaces, from verl's own registries, and
from :data:`RANGES` by the setting's name.
"""

import importlib
import math
import re
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cache
from operator import attrgetter
from typing import Any, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_ext.preflight.composition import Run, Setting, walk
from verl_ext.preflight.findings import Finding, by_nearness, first_lines, nearest
from verl_ext.preflight.unread import text_of_users

ENGINE_GROUPS = ("megatron", "torchtitan", "veomni")
"""Options of verl's group ``model_engine`` that are strategies of their own."""

EXTERNAL_LIB = "actor_rollout_ref.model.external_lib"
"""Modules of the user's that verl imports."""


def check_values(run: Run) -> Iterator[Finding]:
    """Name each setting whose value has the wrong type, is out of range, or is none of a closed list."""
    config = run.composed
    plain = {s.name: s.value for s in walk(OmegaConf.to_container(run.plain, resolve=False))}
    raw = OmegaConf.to_container(config, resolve=False)
    settings = list(walk(raw))
    # The user's code may register choices of its own.
    users, external = text_of_users(raw), any(s.value for s in settings if s.name == EXTERNAL_LIB)
    for setting in settings:
        value, before = setting.value, plain.get(setting.name)
        interpolated = isinstance(value, str) and "${" in value
        # A copy of another setting, which is checked itself.
        if value == "???" or setting.name.endswith("_target_") or (interpolated and value == before):
            continue
        try:
            value = OmegaConf.select(config, setting.name) if interpolated else value
        except (OmegaConfBaseException, TypeError, ValueError) as e:
            problem = f"{setting.name}={setting.value} does not resolve: {first_lines(e)}"
            yield Finding(setting.name, "", problem, "fix the name in the interpolation")
            continue
        if isinstance(before, str) and "${" in before:
            before = None
            # It may need what only the user's values give.
            with suppress(OmegaConfBaseException, TypeError, ValueError):
                before = OmegaConf.select(run.plain, setting.name)
        wanted = out_of_range(setting.name, value) or wrong_type(setting, value, before)
        judged = not external and (value is not None or before is not None)
        if not wanted and judged and not re.search(rf"\b{re.escape(str(value))}\b", users):
            wanted = no_choice(setting, value)
        if wanted:
            fix = f"use {wanted}"
            if setting.name.endswith(".strategy") and value in ENGINE_GROUPS:
                fix = f"write model_engine={value} instead, which composes the settings of that engine"
            yield Finding(setting.name, "", f"{setting.name}={_shown(value)} is wrong", fix)


def _shown(value: Any) -> str:
    """Format a value as an override has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


# Types ----------------------------------------------------------------------------------------------------------------


def wrong_type(setting: Setting, value: Any, before: Any) -> str:
    """Say which type the setting needs, by its annotation or the value ``before``; "" if the value has it."""
    kinds = _kinds(setting.annotation)
    if not kinds and before is not None:
        kinds = {list if OmegaConf.is_list(before) else type(before)}
    if value is None:
        nullable = not kinds or types.NoneType in kinds or before in (None, {}) or NULLABLE.fullmatch(setting.name)
        return "" if nullable or not kinds & {int, float, dict} else _said(kinds)
    if not kinds or object in kinds:
        return ""
    if isinstance(value, dict) or OmegaConf.is_dict(value):
        return "" if kinds & {dict} else "a single value, not a group of them"
    if isinstance(value, list) or OmegaConf.is_list(value):
        listed = kinds & {list, tuple} or (str in kinds and (setting.annotation or SEVERAL.fullmatch(setting.name)))
        return "" if listed else _said(kinds)
    if isinstance(value, str):
        return "" if kinds & {str, list} else _said(kinds)
    if isinstance(value, bool):
        return "" if kinds & {bool, str} else _said(kinds)
    if value != value or not kinds & {int, float, str} and not (bool in kinds and value in (0, 1)):
        return _said(kinds)
    if isinstance(value, int) and abs(value) >= 2**63 and str not in kinds:
        return "a number that fits 64 bits"
    return ""


SEVERAL = re.compile(r"data\.(train|val)_files|trainer\.logger")
"""Texts that may also be lists of texts."""

NULLABLE = re.compile(
    r"data\.seed|seed|reward\.custom_reward_function|trainer\.total_training_steps|trainer\.max_(actor|critic)_ckpt_to_keep|ray_kwargs\..*"
    r"|trainer\.v1\.sampler\.max_off_policy_threshold|data\.filter_overlong_prompts_workers|.*\.loss_scale_factor"
)
"""Settings that may be null, though neither verl's value nor an annotation says so."""


def _kinds(annotation: Any) -> set[type]:
    """Return the plain types that an annotation allows: ``object`` for anything, none without annotation."""
    if annotation is None:
        return set()
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*(_kinds(a) for a in get_args(annotation)))
    found = get_origin(annotation) or annotation
    if found in (bool, int, float, str, list, tuple, dict, types.NoneType):
        return {found}
    return {dict} if hasattr(found, "__dataclass_fields__") else {object}


def _said(kinds: set[type]) -> str:
    if kinds & {int, float}:
        return "a number"
    if bool in kinds:
        return "true or false"
    if kinds & {list, tuple}:
        return "a list: [a,b]"
    return "settings below it: name.setting=value" if dict in kinds else "a text"


# Ranges ---------------------------------------------------------------------------------------------------------------


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _has_two(value: Any) -> bool:
    return (isinstance(value, (list, tuple)) or OmegaConf.is_list(value)) and len(value) == 2


COUNT = "a whole number of at least 1", _whole(1)
COUNT_OR_ZERO = "a whole number of at least 0", _whole(0)
MINUS_ONE_OR_MORE = "-1 or a whole number of at least 0", _whole(-1)
MINUS_ONE_OR_COUNT = "-1 or a whole number of at least 1", lambda x: _whole(-1)(x) and x != 0
POSITIVE = "a number above 0", lambda x: _number(x) and 0 < x < math.inf
NOT_NEGATIVE = "a number of at least 0", lambda x: _number(x) and 0 <= x < math.inf
SHARE = "a number between 0 and 1", lambda x: _number(x) and 0 <= x <= 1
PART = "a number above 0, and at most 1", lambda x: _number(x) and 0 < x <= 1
PORT = "a whole number from 0 to 65535", lambda x: _whole(0)(x) and x <= 65535
MOMENTS = "two numbers of at least 0 and below 1", lambda x: _has_two(x) and all(_number(b) and 0 <= b < 1 for b in x)

RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    # 0 is for verl's fully asynchronous trainer; check_sizes refuses it elsewhere.
    r"data\.train_batch_size": COUNT_OR_ZERO,
    r"(actor_rollout_ref\.rollout|reward\.reward_model|distillation)\.(nnodes|n_gpus_per_node)": COUNT_OR_ZERO,
    r"""trainer\.(nnodes|n_gpus_per_node|total_epochs|total_training_steps)|(.*\.)?(train|gen|val)_batch_size
        |.*_mini_batch_size|.*micro_batch_size(_per_gpu)?|.*\.(max_)?(prompt|response)_length|.*_max_token_len_per_gpu
        |.*\.max_(model_len|num_seqs|num_batched_tokens)|(.*\.)?rollout(\.val_kwargs)?\.n|.*parallel_size
        |.*\.agent\.num_workers|reward(_model)?\.num_workers|.*\.filter_overlong_prompts_workers|.*\.(rollout_n|ppo_epochs
        |entropy_from_logits_chunk_size|pad_to_length_bucket|parameter_sync_step|num_shards|group_size|topk|max_concurrent
        |update_weights_bucket_megabytes|num_data_storage_units|total_storage_size|max_inflight_gen_batches
        |memory_limit_mb|max_parallel_calls|max_tool_response_length|image_patch_size|cache_window_size
        |max_assistant_turns|max_user_turns|prefill_replicas|decode_replicas)
        |countdown\.(largest_number|largest_target|train_size|test_size)""": COUNT,
    r".*\.(nccl_timeout|ray_wait_register_center_timeout|horizon)|arithmetic\.(train_size|test_size)": POSITIVE,
    r"""(arithmetic|countdown)\.iterations|.*\.(critic_warmup|log_val_generations|dataloader_num_workers|lora_rank
        |lora\.rank|max_off_policy_threshold|moe_load_balance_metrics_interval|num_replicas)""": COUNT_OR_ZERO,
    r""".*\.(save_freq|test_freq|(train|val)_max_samples|top_k|lr_warmup_steps|max_(actor|critic)_ckpt_to_keep
        |optim\.total_training_steps|max_num_gen_batches)""": MINUS_ONE_OR_MORE,
    r".*\.fsdp_size": MINUS_ONE_OR_COUNT,
    r".*\.(gpu_memory_utilization|standalone_gpu_memory_utilization|top_p)|dapo\.overlong_buffer\.share": PART,
    r"""ray_kwargs\.ray_init\.num_[cg]pus|.*\.(val_kwargs\.temperature|lr|min_lr|lr_min|lr_warmup_init|weight_decay
        |clip_grad|grad_clip|clip_ratio(_low|_high)?|cliprange_value|(kl|kl_loss|distillation_loss)_coef
        |num_warmup_batches|esi_redundant_time|penalty_factor|mtp_loss_scaling_factor)""": NOT_NEGATIVE,
    r".*\.(temperature|repetition_penalty|lora[_.]alpha|tau_(pos|neg)|clip_ratio_c|gpu_memory|target_kl)": POSITIVE,
    r""".*\.(gamma|lam|lr_warmup_steps_ratio|min_lr_ratio|over_sample_rate|dropout|clip_cov_ratio|kl_cov_ratio
        |switch_threshold_(ratio|step_up|step_down))""": SHARE,
    r".*\.betas": MOMENTS,
    r".*\.port|.*\.bootstrap_port": PORT,
}
"""Full names of settings -> allowed values. The first match counts; null is judged by the type."""


def out_of_range(name: str, value: Any) -> str:
    """Say which values the setting may have, by its name; "" if this is one."""
    rule = _range_of(name)
    return "" if value is None or rule is None or rule[1](value) else rule[0]


@cache
def _range_of(name: str) -> tuple[str, Callable[[Any], bool]] | None:
    return next((rule for pattern, rule in RANGES.items() if re.fullmatch(pattern, name, re.VERBOSE)), None)


# Modes ----------------------------------------------------------------------------------------------------------------


def no_choice(setting: Setting, value: Any) -> str:
    """Name the values that the setting may have, nearest first; "" if this is one, or they are unknown."""
    pattern, choices_of, closed = _mode_of(setting.name)
    choices = choices_of(setting)
    named = list(dict.fromkeys(str(c) for c in choices if c is not None))
    values = value.split(",") if isinstance(value, str) and pattern == _REJECTION else value
    for one in values if isinstance(values, list) or OmegaConf.is_list(values) else [values]:
        one = one.strip() if isinstance(one, str) else one
        if choices and one not in choices and str(one) not in named and (closed or nearest(str(one), named)):
            shown = ", ".join(by_nearness(str(one), named)) + (" or null" if None in choices else "")
            return f"one of {shown}" if len(choices) > 1 else shown
    return ""


@cache
def _mode_of(name: str) -> tuple[str, Callable[[Setting], Collection], bool]:
    return next((mode for mode in MODES if re.fullmatch(mode[0], name)), ("", _of(), False))


def _registry(module: str, path: str) -> Callable[[Setting], Collection[str]]:
    """Look up the names in one of verl's registries, an attribute of a module or of a class in it."""
    return lambda setting: list(map(str, attrgetter(path)(importlib.import_module(module))))


def _of(*choices: str | None) -> Callable[[Setting], Collection[str | None]]:
    return lambda setting: choices


def _unless(name: str, choices_of: Callable[[Setting], Collection]) -> Callable[[Setting], Collection]:
    """Return no choices where the node's ``name`` brings choices of the user's own."""
    return lambda setting: () if setting.siblings.get(name) not in (None, "register") else choices_of(setting)


def _loss_modes(setting: Setting) -> Collection[str]:
    """Return verl's policy losses; a method that has its own class for the node checks it itself."""
    ours = setting.owner is not None and not setting.owner.__module__.startswith("verl.")
    return () if ours else _registry("verl.trainer.ppo.core_algos", "POLICY_LOSS_REGISTRY")(setting)


def _optimizers(setting: Setting) -> Collection[str]:
    import torch

    if "optimizer_impl" not in setting.siblings:
        return ()
    try:
        module = importlib.import_module(str(setting.siblings["optimizer_impl"]))
    except (ImportError, ValueError):
        # The checks of the code and of packages name it.
        return ()
    return [n for n, x in vars(module).items() if isinstance(x, type) and issubclass(x, torch.optim.Optimizer)]


def _loggers(setting: Setting) -> Collection[str]:
    # The last is an old name that verl still takes.
    return [*_registry("verl.utils.tracking", "Tracking.supported_backend")(setting), "tracking"]


def _schedules(setting: Setting) -> Collection[str]:
    fsdp = getattr(setting.owner, "__name__", "") == "FSDPOptimizerConfig"
    return ("constant", "cosine") if fsdp else ("constant", "cosine", "linear", "inverse-square-root")


def _strategies(setting: Setting) -> Collection[str]:
    own = str(getattr(setting.owner, "strategy", ""))
    return ("fsdp", "fsdp2", "fsdp_turbo") if own.startswith("fsdp") else (own,) if own.isalpha() else ()


def _precisions(setting: Setting) -> Collection[str | None]:
    from verl.utils import torch_dtypes as known

    return [None, *(str(x) for x in known.HALF_LIST + known.FLOAT_LIST + known.BFLOAT_LIST if "torch." not in str(x))]


_KL = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
_ROLLOUT = r"(actor_rollout_ref|reward\.reward_model)\.rollout\."
_LOAD_FORMATS = ("auto", "dummy", "safetensors", "pt", "hf", "npcache", "tensorizer", "runai_streamer", "sharded_state")
_LOAD_FORMATS += ("gguf", "bitsandbytes", "mistral", "fastsafetensors", "megatron", "dtensor", "dummy_dtensor")
_ATTENTION = ("flash_attention_2", "flash_attention_3", "sdpa", "eager", "flex_attention")
_AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
_REJECTION = r"algorithm\.rollout_correction\.rollout_rs"
"""A text of several choices, separated by commas."""
_CORRECTION = "verl.trainer.ppo.rollout_corr_helper"
_AGENTS = "verl.experimental.agent_loop.agent_loop", "_agent_loop_registry"
_REWARD_MANAGERS = "verl.experimental.reward_loop.reward_manager", "registry.REWARD_MANAGER"
_STORES = "transfer_queue.storage.managers", "base.StorageManagerFactory._registry"
_ENGINES = ("naive", "nccl", "hccl", "nixl", "mooncake", "kimi_ckpt_engine", "delta_sharded")

CLOSED: dict[str, Callable[[Setting], Collection]] = {
    r"actor_rollout_ref\.rollout\.name": _registry("verl.workers.rollout.replica", "RolloutReplicaRegistry._registry"),
    r"actor_rollout_ref\.rollout\.mode": _of("async"),
    _ROLLOUT + "dtype": _of("auto", "half", "float16", "bfloat16", "float", "float32"),
    _ROLLOUT + r"multi_turn\.format": _registry("verl.experimental.agent_loop.tool_parser", "ToolParser._registry"),
    _ROLLOUT + r"multi_turn\.tool_response_truncate_side": _of("left", "right", "middle"),
    _ROLLOUT + r"multi_turn\.tokenization_sanity_check_mode": _of("disable", "strict", "ignore_strippable"),
    _ROLLOUT + r"checkpoint_engine\.backend": _unless("custom_backend_module", _of(*_ENGINES)),
    r"data\.truncation": _of("error", "left", "right", "middle"),
    r"trainer\.v1\.trainer_mode": _registry("verl.trainer.ppo.v1", "trainer_base.TRAINER_REGISTRY"),
    r"trainer\.v1\.sampler\.max_off_policy_strategy": _of("drop", "wait"),
    r"trainer\.resume_mode": _of("auto", "disable", "resume_path"),
    r"trainer\.logger": _loggers,
    r"(actor_rollout_ref\.(actor|ref)|critic)\.strategy": _strategies,
    r"actor_rollout_ref\.actor\.policy_loss\.loss_mode": _loss_modes,
    r"actor_rollout_ref\.actor\.loss_agg_mode|critic\.loss_agg_mode": _of(*_AGGREGATIONS),
    r"actor_rollout_ref\.actor\.kl_loss_type|algorithm\.kl_penalty": _of(*_KL, *(f"{k}+" for k in _KL)),
    r"algorithm\.adv_estimator": _registry("verl.trainer.ppo.core_algos", "ADV_ESTIMATOR_REGISTRY"),
    r"algorithm\.kl_ctrl\.type": _of("fixed", "adaptive"),
    r"algorithm\.pf_ppo\.reweight_method": _of("pow", "max_min", "max_random"),
    r"algorithm\.rollout_correction\.rollout_is": _of("token", "sequence", None),
    _REJECTION: lambda s: [None, *_registry(_CORRECTION, "SUPPORTED_ROLLOUT_RS_OPTIONS")(s)],
    r"algorithm\.rollout_correction\.loss_type": _of("ppo_clip", "reinforce"),
    r".*\.optim\.optimizer": _optimizers,
    r".*\.optim\.lr_scheduler_type": _schedules,
    r".*\.optim\.lr_decay_style": _of("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    r".*\.optim\.lr_warmup_init_style|.*\.optim\.warmup_style": _of("constant", "cosine", None),
    r".*\.(fsdp_config|fsdp)\.(model_dtype|dtype)|.*\.mixed_precision\..*_dtype": _precisions,
    r".*\.megatron\.dtype": _of("bfloat16", "float16"),
    r".*\.router_replay\.mode": _of("disabled", "R2", "R3"),
    r".*\.checkpoint\.(save|load)_contents": _of("model", "optimizer", "extra", "hf_model", "hf"),
    r"reward\.reward_manager\.source": _of("register", "importlib"),
    r"reward\.reward_manager\.name|reward_model\.reward_manager": _unless("source", _registry(*_REWARD_MANAGERS)),
    r"global_profiler\.tool": _of("nsys", "npu", "torch", "torch_memory", "precision_debugger", None),
    r"transfer_queue\.backend\.storage_backend": _registry(*_STORES),
}
OPEN: dict[str, Callable[[Setting], Collection]] = {
    _ROLLOUT + "load_format": _of(*_LOAD_FORMATS),
    _ROLLOUT + "scheduling_policy": _of("fcfs", "priority", "lpm", "dfs-weight", "lof", "random", None),
    _ROLLOUT + "logprobs_mode": _of("processed_logprobs", "processed_logits", "raw_logprobs", "raw_logits", None),
    _ROLLOUT + r"agent\.default_agent_loop": _unless("agent_loop_config_path", _registry(*_AGENTS)),
    _ROLLOUT + r"trace\.backend": _of("weave", "mlflow", "trackio", "rl_insight", None),
    r"trainer\.device": _of("cuda", "cpu", "npu", "xpu", "mlu", "musa", "gcu", "mps", "hpu"),
    r".*\.override_config\.attn_implementation": _of(*_ATTENTION),
}
MODES = [(p, c, True) for p, c in CLOSED.items()] + [(p, c, False) for p, c in OPEN.items()]
"""Full names of settings -> their choices (none: unknown here), and whether the list is closed. For an open list, only
a value that resembles a choice without being one is wrong."""
