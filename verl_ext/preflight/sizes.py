"""Checks that batch, mini-batch, groups and GPUs divide as they must, and that the data last for the steps."""

import math
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from verl_ext.preflight.composition import Run
from verl_ext.preflight.findings import Finding
from verl_ext.preflight.memory import is_known, sequence_split

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def world(config: DictConfig) -> int:
    return config.trainer.n_gpus_per_node * config.trainer.nnodes


def model_parallel(config: DictConfig) -> dict[str, int]:
    """Map settings to the number of GPUs over which they split the computation of one sequence; {} if not known."""
    actor = config.actor_rollout_ref.actor
    if not is_known(actor):
        return {}
    if actor.strategy == "megatron":
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        return {f"{ACTOR}.megatron.{n}": actor.megatron[n] for n in names}
    return {f"{ACTOR}.ulysses_sequence_parallel_size": sequence_split(actor)}


def check_sizes(run: Run) -> Iterator[Finding]:
    """Check that batch, mini-batch, groups and GPUs divide as they must."""
    config = run.config
    actor = config.actor_rollout_ref.actor
    gpus, splits = world(config), model_parallel(config)
    split = math.prod(splits.values())
    n, batch, mini = config.actor_rollout_ref.rollout.n, config.data.train_batch_size, actor.ppo_mini_batch_size
    if gpus % split:
        names = " x ".join(f"{name}={size}" for name, size in splits.items())
        yield Finding("gpus", str(gpus), f"{names} does not divide {gpus} GPUs", "choose sizes that do")
        return
    ranks = gpus // split
    updates = -(-batch // mini) * actor.ppo_epochs
    gpu_names = f"{config.trainer.nnodes} node(s) x {config.trainer.n_gpus_per_node}"
    yield Finding("gpus", f"{gpu_names}: {ranks} data-parallel" if splits else gpu_names)
    yield from _servers(config, gpus)
    if not trains(config):
        return
    # verl's fully asynchronous trainer has no batches, and wants 0.
    if not batch and "rollout" not in config:
        yield Finding("batch", "", "data.train_batch_size=0 trains on nothing", "use at least 1")
        return
    value = f"{batch} questions x {n} responses per step, {mini} questions per update, {updates} updates"
    problem = fix = ""
    if batch % mini:
        whole = OmegaConf.select(config, "verl_ext.whole_groups")
        then = "mini-batches of different sizes" if whole else "rows of padding"
        problem = f"data.train_batch_size={batch} is not a multiple of {ACTOR}.ppo_mini_batch_size={mini}: {then}"
        fix = f"use a multiple, such as {mini * max(batch // mini, 1)}"
    elif splits and mini * n % ranks:
        problem = f"{mini} questions x n={n} are {mini * n} responses for {ranks} ranks: padding fills the difference"
        fix = f"use a multiple of {ranks} to avoid padding"
    yield Finding("batch", value, problem, fix, warning=True)

    yield from _micro_batches(config)


def trains(config: DictConfig) -> bool:
    """Whether a run does more than to evaluate once."""
    return not (config.trainer.val_only and config.trainer.val_before_train)


def evaluates(config: DictConfig) -> bool:
    """Whether a run evaluates at all."""
    return bool(config.trainer.val_before_train) or config.trainer.test_freq > 0


def _micro_batches(config: DictConfig) -> Iterator[Finding]:
    """Name limits of a micro-batch's tokens into which a sequence does not fit: verl stops at the first such one."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy

    roles = config.actor_rollout_ref
    actor, rollout, ref = roles.actor, roles.rollout, roles.ref
    longest = config.data.max_prompt_length + config.data.max_response_length
    if rollout.max_model_len and rollout.max_model_len < longest:
        # verl takes what is left after the prompt for the response's limit.
        found, limit = f"{ROLLOUT}.max_model_len={rollout.max_model_len}", config.data.max_response_length
        problem = f"{found} cuts a response short of {limit} tokens where prompt plus response take more"
        yield Finding("rollout", str(rollout.max_model_len), problem, f"use {longest} or null", warning=True)
        longest = rollout.max_model_len
    limits = []
    if actor.use_dynamic_bsz:
        limits += [(ACTOR, "ppo_max_token_len_per_gpu", actor), (ROLLOUT, "log_prob_max_token_len_per_gpu", actor)]
    if ref.log_prob_use_dynamic_bsz and need_reference_policy(config):
        limits += [("actor_rollout_ref.ref", "log_prob_max_token_len_per_gpu", ref)]
    if need_critic(config):
        limits += [("critic", "ppo_infer_max_token_len_per_gpu", config.critic)]
    told: set[int] = set()
    for parent, name, node in limits:
        size = OmegaConf.select(config, f"{parent}.{name}")
        if size is None or not is_known(node) or (room := size * sequence_split(node)) in told:
            continue
        # Most take over the actor's: once is enough.
        told.add(room)
        problem = fix = ""
        if room < longest:
            problem = f"{parent}.{name}={size} is too low for a sequence of {longest} tokens"
            fix = f"use at least {-(-longest // sequence_split(node))}"
        yield Finding("micro-batch", f"{room} tokens, longest sequence {longest}", problem, fix)


def _servers(config: DictConfig, gpus: int) -> Iterator[Finding]:
    """Check that rollout servers divide the GPUs."""
    rollout = config.actor_rollout_ref.rollout
    # On other GPUs, with verl.experimental's trainers, or of several sizes.
    if "rollout" in config or OmegaConf.select(rollout, "disaggregation.enabled"):
        return
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


def check_rows_of_a_step(run: Run) -> Iterator[Finding]:
    """Name a training set with fewer rows than a step takes: with the models loaded, verl divides by its 0 steps."""
    config, rows = run.config, run.data.rows_of("train")
    batch = config.data.train_batch_size
    # check_columns names files without rows.
    if rows and trains(config) and rows < batch and not config.data.custom_cls.get("path"):
        problem = f"{rows} training rows are fewer than data.train_batch_size={batch}"
        yield Finding("steps", "", problem, f"use data.train_batch_size={rows} or less")


def check_steps(run: Run) -> Iterator[Finding]:
    """Check that the training data last for the steps."""
    config, rows = run.config, run.data.count("train")
    batch, steps = config.data.train_batch_size, config.trainer.total_training_steps
    # With fewer, check_rows_of_a_step says so.
    if not trains(config) or not batch or rows < batch or not run.data.is_whole("train"):
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
