"""Names trainers, modes and settings under which a run would not train as asked, before Ray starts."""

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.utils.torch_dtypes import PrecisionType

from verl_ext import recipes
from verl_ext.preflight.composition import Run, walk
from verl_ext.preflight.findings import Finding

EXTENSIONS = ("actor_worker_class", "whole_groups", "skip_rows_without_gradient")
"""Settings of the node ``verl_ext`` that only our trainers read."""

SHARED_PREFIXES = ("use_prefix_tree", "use_prefix_grouper")
"""Settings that compute shared prefixes once and reorder rows for it; the first is verl's open pull request 6689."""

DATA_BACKEND = "rollout_data_backend"
"""Setting of verl's open pull request 7415: where the rows of a batch are kept."""


def check_trainer(run: Run) -> Iterator[Finding]:
    """Name a trainer that would ignore the extensions which the node ``verl_ext`` asks for."""
    config = run.config
    wanted = next((f"verl_ext.{key}" for key in EXTENSIONS if OmegaConf.select(config, f"verl_ext.{key}")), None)
    if wanted is None:
        return
    if config.trainer.get("use_v1") is False:
        problem = f"trainer.use_v1=False is verl's legacy trainer, which does not read {wanted}"
        yield Finding("trainer", "", problem, "set trainer.use_v1=True")
        return
    # Only the configs of verl.experimental's trainers have this node.
    if "rollout" in config:
        problem = f"verl.experimental's trainers do not read {wanted}"
        yield Finding("trainer", "", problem, "run python -m verl.trainer.main_ppo")
        return
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    from verl_ext.training.trainer import ExtendedTrainer

    mode = config.trainer.v1.trainer_mode
    extended = sorted(name for name, trainer in TRAINER_REGISTRY.items() if issubclass(trainer, ExtendedTrainer))
    if mode not in extended:
        problem = f"trainer.v1.trainer_mode={mode} is not registered"
        if found := TRAINER_REGISTRY.get(mode):
            trainer = f"{found.__module__}.{found.__qualname__}"
            problem = f"trainer.v1.trainer_mode={mode} is {trainer}, which does not read {wanted}"
        yield Finding("trainer", "", problem, f"use one of {', '.join(extended)}")


def check_val_only(run: Run) -> Iterator[Finding]:
    """Name a run that is to evaluate alone, and would train: verl stops after the first evaluation, if there is one."""
    trainer = run.config.trainer
    if trainer.val_only and not trainer.val_before_train:
        problem = "trainer.val_only=True with trainer.val_before_train=False trains"
        problem += ": verl stops after the first evaluation"
        fix = "set trainer.val_before_train=True to evaluate, or trainer.val_only=False"
        yield Finding("trainer", "", problem, fix)


def check_own_settings(run: Run) -> Iterator[Finding]:
    """Name settings of the node ``verl_ext`` that our trainers would refuse after Ray has started."""
    from verl_ext.training.progress import progress_wanted
    from verl_ext.training.reward_loop import reward_timeout
    from verl_ext.training.seeds import seed_of
    from verl_ext.training.trainer import most_failed_rewards

    # The workers of a stock run are not seeded.
    for read in (most_failed_rewards, progress_wanted, reward_timeout, *[seed_of] * ("verl_ext" in run.config)):
        try:
            read(run.config)
        except ValueError as e:
            yield Finding("verl_ext", "", str(e))


def check_task(run: Run) -> Iterator[Finding]:
    """Name what the task that builds its files would refuse: its module's ``refuse(config)``, if there is one."""
    try:
        getattr(_task(run.config), "refuse", lambda config: None)(run.config)
    except ValueError as e:
        yield Finding("task", "", str(e))


def will_build(config: DictConfig, missing: str) -> str | None:
    """Return the file or folder in the text ``missing`` that the task builds: its module's ``builds(config)`` names it.

    Returns:
        "" for a file that the task does not build; None where that is not known, as the task is not ours.
    """
    task = _task(config)
    return None if task is None else next((name for name in task.builds(config) if name in missing), "")


def _task(config: DictConfig) -> ModuleType | None:
    """Import the module of ``verl_ext.prepare``, if it is ours: code of others is imported by their start alone."""
    module, _, _ = str(OmegaConf.select(config, "verl_ext.prepare", default="") or "").rpartition(".")
    return importlib.import_module(module) if module.startswith("verl_ext.") else None


def check_asynchrony(run: Run) -> Iterator[Finding]:
    """Name settings that verl's asynchronous trainers refuse, or that make their runs wait."""
    mode = OmegaConf.select(run.config, "trainer.v1.trainer_mode")
    if mode not in ("colocate_async", "separate_async"):
        return
    config, where, rollout = run.config, f"trainer.v1.trainer_mode={mode}", "actor_rollout_ref.rollout"
    settings = config.actor_rollout_ref.rollout
    if mode != "separate_async":
        return
    batch, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    steps = config.trainer.v1.separate_async.parameter_sync_step
    if batch != steps * mini:
        right = f"trainer.v1.separate_async.parameter_sync_step={steps} x "
        right += f"actor_rollout_ref.actor.ppo_mini_batch_size={mini} = {steps * mini}"
        yield Finding("trainer", "", f"data.train_batch_size={batch} does not work with {where}", f"set it to {right}")
    for name in ("nnodes", "n_gpus_per_node"):
        if settings[name] <= 0:
            problem = f"{rollout}.{name}={settings[name]} leaves no devices for the rollouts of {where}"
            yield Finding("trainer", "", problem, "use at least 1")
    if settings.checkpoint_engine.backend == "naive":
        problem = f"{rollout}.checkpoint_engine.backend=naive does not reach the rollouts of {where}"
        fix = "use nccl, or on a CPU ray with custom_backend_module=verl_ext.cpu.checkpoint_engine"
        yield Finding("trainer", "", problem, fix)


def check_critic(run: Run) -> Iterator[Finding]:
    """Name advantages of values in a run without a critic, which fail in the first step."""
    algorithm, critic = run.config.algorithm, run.config.critic
    if algorithm.adv_estimator == "gae" and critic.get("enable") is False:
        problem = "critic.enable=False does not work with algorithm.adv_estimator=gae, which reads a critic's values"
        yield Finding("critic.enable", "", problem, "use null, or an algorithm without a critic, such as grpo")


def check_adapters(run: Run) -> Iterator[Finding]:
    """Name LoRA settings with which verl 0.9.1 sends its rollouts the frozen base weights alone."""
    if OmegaConf.select(run.config, "trainer.v1.trainer_mode") != "separate_async":
        return
    model = "actor_rollout_ref.model"
    for name in ("lora_rank", "lora.rank", "lora_adapter_path", "lora.adapter_path"):
        found = OmegaConf.select(run.config, f"{model}.{name}")
        if found and not OmegaConf.select(run.config, f"{model}.lora.merge"):
            problem = f"{model}.{name}={found} does not work with trainer.v1.trainer_mode=separate_async: verl sends "
            problem += "the frozen base weights without the adapters, so rollouts would stay at the initial model"
            fix = f"set {model}.lora.merge=True, or use trainer.v1.trainer_mode=sync or colocate_async"
            yield Finding(f"{model}.{name}", "", problem, fix)
            return


def check_lost_updates(run: Run) -> Iterator[Finding]:
    """Name weights that FSDP trains in half precision, where most of Adam's steps round to nothing.

    New adapters get the dtype of the frozen weights. Megatron keeps float32 copies of what it trains.
    """
    from verl.trainer.ppo.utils import need_critic

    config = run.composed
    for role, engine in (("actor_rollout_ref.actor", "fsdp_config"), ("critic", "fsdp")):
        if role == "critic" and not need_critic(config):
            continue
        name = f"{role}.{engine}.model_dtype"
        found, lr = OmegaConf.select(config, name), OmegaConf.select(config, f"{role}.optim.lr")
        half = PrecisionType.is_bf16(found) or PrecisionType.is_fp16(found)
        if not half or not str(OmegaConf.select(config, f"{role}.strategy")).startswith("fsdp"):
            continue
        # Half of the distance between neighbours: 2^-8 of a number in bfloat16, 2^-11 in float16.
        moved = lr * 2 ** (8 if PrecisionType.is_bf16(found) else 11)
        problem = f"{name}={found} keeps trained weights, LoRA adapters too, and Adam's states in half precision: "
        problem += f"steps of lr={lr:g} round to nothing for weights above {moved:.1g}"
        fix = "use fp32; fsdp_config.mixed_precision computes in bfloat16 all the same"
        yield Finding(name, "", problem, fix, warning=True)


def check_recipes_worker(run: Run) -> Iterator[Finding]:
    """Name a recipe's loss or advantage estimator in a run without the recipe's worker and whole groups."""
    config = run.config
    loss_mode = OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss.loss_mode")
    for recipe in recipes.installed():
        of_recipe = {"actor_rollout_ref.actor.policy_loss.loss_mode": recipe.losses}
        of_recipe["algorithm.adv_estimator"] = recipe.estimators
        used = [name for name, own in of_recipe.items() if OmegaConf.select(config, name) in own]
        ours = str(OmegaConf.select(config, "verl_ext.actor_worker_class")).startswith(f"{recipe.package}.")
        if used and not (ours and loss_mode in recipe.losses and config.verl_ext.whole_groups):
            name, value = used[0], OmegaConf.select(config, used[0])
            problem = f"{name}={value} needs {recipe.package}'s own worker, loss and whole groups, which this run lacks"
            yield Finding(name, "", problem, f"start from algorithm={value}, or use one of verl's own")


def check_next_verl(run: Run) -> Iterator[Finding]:
    """Name settings that our extensions do not support, at any node."""
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
