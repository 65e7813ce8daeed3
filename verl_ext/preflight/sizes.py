"""Checks that batch, mini-batch, groups and GPUs divide as they must, and that the data last for the steps."""

import math
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from verl_ext.preflight.composition import Run
from verl_ext.preflight.findings import Finding
from verl_ext.preflight.memory import sequence_split

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def world(config: DictConfig) -> int:
    return config.trainer.n_gpus_per_node * config.trainer.nnodes


def model_parallel(config: DictConfig) -> dict[str, int]:
    """Map settings to the number of GPUs over which they split the computation of one sequence."""
    actor = config.actor_rollout_ref.actor
    if actor.strategy == "megatron":
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        return {f"{ACTOR}.megatron.{n}": actor.megatron[n] for n in names}
    return {f"{ACTOR}.ulysses_sequence_parallel_size": sequence_split(actor)}


def check_sizes(run: Run) -> Iterator[Finding]:
    """Check that batch, mini-batch, groups and GPUs divide as they must."""
    config = run.config
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
    value = f"{batch} questions x {n} responses per step, {mini} questions per update, {updates} updates"
    problem = fix = ""
    if batch % mini:
        whole = OmegaConf.select(config, "verl_ext.whole_groups")
        then = "mini-batches of different sizes" if whole else "rows of padding"
        problem = f"data.train_batch_size={batch} is not a multiple of {ACTOR}.ppo_mini_batch_size={mini}: {then}"
        fix = f"use a multiple, such as {mini * max(batch // mini, 1)}"
    elif mini * n % ranks:
        problem = f"{mini} questions x n={n} are {mini * n} responses for {ranks} ranks: padding fills the difference"
        fix = f"use a multiple of {ranks} to avoid padding"
    yield Finding("batch", value, problem, fix, warning=True)

    longest = config.data.max_prompt_length + config.data.max_response_length
    if actor.use_dynamic_bsz:
        room = actor.ppo_max_token_len_per_gpu * sequence_split(actor)
        problem = fix = ""
        if room < longest:
            found = f"{ACTOR}.ppo_max_token_len_per_gpu={actor.ppo_max_token_len_per_gpu}"
            problem = f"{found} is too low for a sequence of {longest} tokens"
            fix = f"use at least {-(-longest // sequence_split(actor))}"
        yield Finding("micro-batch", f"{room} tokens, longest sequence {longest}", problem, fix)
    if rollout.max_model_len and rollout.max_model_len < longest:
        # verl takes what is left after the prompt for the response's limit.
        found, limit = f"{ROLLOUT}.max_model_len={rollout.max_model_len}", config.data.max_response_length
        problem = f"{found} cuts a response short of {limit} tokens where prompt plus response take more"
        yield Finding("rollout", str(rollout.max_model_len), problem, f"use {longest} or null", warning=True)
    server = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
    pools = [gpus]
    if OmegaConf.select(config, "trainer.v1.trainer_mode") == "separate_async":
        # Rollouts have GPUs of their own; those that train generate, too, unless told not to.
        hybrid = config.actor_rollout_ref.get("hybrid_engine", True)
        pools = [gpus] * bool(hybrid) + [rollout.nnodes * rollout.n_gpus_per_node]
    for pool in pools:
        if pool % server:
            problem = f"a rollout server of {server} GPU(s) does not divide {pool}"
            fix = f"choose {ROLLOUT}.tensor_model_parallel_size so that it does"
            yield Finding("rollout", f"{server} GPU(s) per server", problem, fix)
        else:
            yield Finding("rollout", f"{rollout.get('name')}, {pool // server} server(s) of {server} GPU(s)")


def check_steps(run: Run) -> Iterator[Finding]:
    """Check that the training data last for the steps."""
    config, rows = run.config, run.data.count("train")
    batch, steps = config.data.train_batch_size, config.trainer.total_training_steps
    if config.trainer.val_only or not rows or not run.data.is_whole("train"):
        return
    if rows < batch:
        problem = f"{rows} training rows are fewer than data.train_batch_size={batch}"
        yield Finding("steps", "", problem, f"use data.train_batch_size={rows} or less")
        return
    per_epoch, epochs = rows // batch, config.trainer.total_epochs
    total = steps or per_epoch * epochs
    problem = fix = ""
    if per_epoch * epochs < total:
        problem = f"trainer.total_epochs={epochs} ends after {per_epoch * epochs} steps"
        fix = f"use trainer.total_epochs={-(-total // per_epoch)}"
    yield Finding("steps", f"{total}, {total / per_epoch:.1f} passes over the training data", problem, fix)


def check_first_evaluation(run: Run) -> Iterator[Finding]:
    """Say how much the evaluation before the first step generates."""
    config, rollout = run.config, run.config.actor_rollout_ref.rollout
    if config.trainer.val_before_train and not config.trainer.val_only:
        count = run.data.count("val") * rollout.val_kwargs.n
        if not count:
            return
        step = config.data.train_batch_size * rollout.n
        value = f"{count} responses of up to {config.data.max_response_length} tokens before the first step"
        problem = fix = ""
        if count > 10 * step:
            problem = f"the evaluation before training generates as much as about {count / step:.0f} steps"
            fix = "set trainer.val_before_train=false, or use fewer data.val_files"
        yield Finding("first evaluation", value, problem, fix, warning=True)
