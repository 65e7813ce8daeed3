"""Checks the model of a run: its memory, and its tokenizer on some of the data."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_ext.preflight.composition import Run
from verl_ext.preflight.findings import Finding, nearest
from verl_ext.preflight.memory import GIB, Shape, estimate, gpu_memory
from verl_ext.preflight.packages import ENGINES
from verl_ext.preflight.sizes import model_parallel
from verl_ext.preflight.trainer import will_build


def model_path(config: DictConfig) -> str:
    # A folder of digits is a number in YAML.
    return os.path.expanduser(str(config.actor_rollout_ref.model.path))


def is_local(path: str) -> bool:
    return os.path.isdir(path)


def check_model(run: Run) -> Iterator[Finding]:
    """Compare the model's sizes with the settings, and estimate the memory."""
    config, path = run.config, model_path(run.config)
    described = find_shape(path)
    if described is None:
        if OmegaConf.select(config, "verl_ext.prepare") and will_build(config, path):
            return
        problem, fix = f"{path} is not on this machine, so memory was not estimated", "download it and give its folder"
        folder, _, rest = path.partition("/")
        if rest and "/" not in rest and os.path.isdir(folder):
            problem = f"there is no {path} in the folder {folder}, so {path} is taken for a name on the hub"
            near = nearest(rest, (name for name in os.listdir(folder) if is_local(f"{folder}/{name}")))
            fix = "nearest: " + ", ".join(f"{folder}/{name}" for name in near) if near else fix
        yield Finding("model", path, problem, fix, warning=True)
        return
    shape, source = described
    value = f"{path}: {shape.parameters / 1e9:.2f} B parameters ({source})"
    problem = fix = ""
    if source != "config.json":
        problem = f"{path} is not on this machine: each node downloads {2 * shape.parameters / GIB:.0f} GiB first"
        fix = "download it once to a disk that all nodes see, and give its folder"
    yield Finding("model", value, problem, fix, warning=True)
    yield from split_problems(config, shape)
    engine = config.actor_rollout_ref.actor.strategy
    if engine not in ("fsdp", "fsdp2", "megatron"):
        problem = f"memory is not estimated for actor_rollout_ref.actor.strategy={engine}"
        yield Finding("memory", "", problem, warning=True)
    elif config.trainer.device != "cpu":
        yield from memory_findings(config, shape)


def find_shape(path: str) -> tuple[Shape, str] | None:
    """Find a model's shape and its source: the model's files, transformers' cache, or the table ``models.yaml``."""
    from transformers import AutoConfig

    table = OmegaConf.to_container(OmegaConf.load(Path(__file__).parent / "models.yaml"))
    try:
        return Shape.of(AutoConfig.from_pretrained(path, local_files_only=True).to_dict()), "config.json"
    except (OSError, ValueError, KeyError):
        return (Shape.of(table[path]), "its model card") if path in table else None


def split_problems(config: DictConfig, shape: Shape) -> Iterator[Finding]:
    """Name sizes that do not divide the model's heads, layers or experts, and sequences that are too long."""
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
    if rollout.name in ENGINES and positions and max(longest, rollout.max_model_len or 0) > positions:
        name = "actor_rollout_ref.rollout.max_model_len" if rollout.max_model_len else "prompt and response"
        problem = f"{name}={rollout.max_model_len or longest} is more than the model's {positions} positions"
        yield Finding("model", "", problem, "lower data.max_response_length, or use a model with more positions")
    for name, size, total in wanted:
        if size and total % size:
            divisors = ", ".join(str(d) for d in range(1, total + 1) if total % d == 0 and d <= 16)
            yield Finding("model", "", f"{name}={size} does not divide the model's {total}", f"use one of {divisors}")


LESS = {
    "training": "lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu, offload, or use more GPUs",
    "critic": "lower critic.ppo_infer_max_token_len_per_gpu, offload actor and critic, or use more GPUs",
    "weight transfer": "lower actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes, or offload",
    "generation": "lower actor_rollout_ref.rollout.gpu_memory_utilization, or offload weights and optimizer",
}
"""Moment of a run -> how to reduce its memory."""


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
        one = longest if room < longest else served
        problem = f"the KV cache holds {room:.0f} tokens, fewer than one sequence of {one}"
        fix = "raise actor_rollout_ref.rollout.gpu_memory_utilization or tensor_model_parallel_size"
        yield Finding("KV cache", "", problem, fix)
    else:
        problem = f"actor_rollout_ref.rollout.max_model_len=null stands for the model's {served} positions, of which "
        problem += f"the KV cache holds {room:.0f}, so {config.actor_rollout_ref.rollout.name} does not start"
        fix = f"set actor_rollout_ref.rollout.max_model_len={longest}, the longest prompt and response"
        yield Finding("KV cache", "", problem, fix)
    if memory.offloaded:
        host = memory.offloaded * config.trainer.n_gpus_per_node
        yield Finding("host", f"{host / GIB:.0f} GiB per node for offloaded weights and optimizer")


def check_tokenizer(run: Run) -> Iterator[Finding]:
    """Check the chat template and the lengths of some prompts, where the model is on this machine."""
    from transformers import AutoTokenizer

    config, path = run.config, model_path(run.config)
    if not is_local(path):
        return
    trusted = config.actor_rollout_ref.model.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trusted)
    if tokenizer.chat_template is None and not config.actor_rollout_ref.model.custom_chat_template:
        yield Finding("tokenizer", path, "it has no chat template", "set actor_rollout_ref.model.custom_chat_template")
        return
    prompts = run.data.prompts(1000)
    if not prompts:
        return
    as_ids = dict(add_generation_prompt=True, tokenize=True, return_dict=False)
    lengths = [len(tokenizer.apply_chat_template(list(prompt), **as_ids)) for prompt in prompts]
    limit = config.data.max_prompt_length
    over = sum(length > limit for length in lengths)
    value = f"longest of {len(prompts)} prompts: {max(lengths)} tokens, room for {limit}"
    problem = fix = ""
    if over == len(prompts):
        problem, fix = f"all {over} prompts are longer than data.max_prompt_length={limit}", "raise it"
    elif over and not config.data.filter_overlong_prompts and config.data.truncation == "error":
        problem = f"{over} prompts are longer than data.max_prompt_length={limit}"
        fix = "raise it, or filter them: data.filter_overlong_prompts=true"
    yield Finding("tokenizer", value, problem, fix)
