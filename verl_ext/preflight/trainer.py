"""Trainers and modes of verl's that cannot do what the settings ask for; verl would say so after Ray has started."""

from collections.abc import Iterator

from omegaconf import OmegaConf

from verl_ext.preflight.composition import Run
from verl_ext.preflight.findings import Finding

EXTENSIONS = ("actor_worker_class", "whole_groups")
"""Settings of the node ``verl_ext`` that only our trainers read."""


def check_trainer(run: Run) -> Iterator[Finding]:
    """Name a trainer that would ignore the extensions which the node ``verl_ext`` asks for."""
    config = run.config
    wanted = next((f"verl_ext.{key}" for key in EXTENSIONS if OmegaConf.select(config, f"verl_ext.{key}")), None)
    if wanted is None:
        return
    if config.trainer.get("use_v1") is False:
        problem = f"trainer.use_v1=False is verl's legacy trainer, which knows nothing of {wanted}"
        yield Finding("trainer", "", problem, "set trainer.use_v1=True")
        return
    # The node that tells the configs of verl.experimental's trainers from those of main_ppo.
    if "rollout" in config:
        problem = f"verl.experimental's trainers know nothing of {wanted}"
        yield Finding("trainer", "", problem, "run python -m verl.trainer.main_ppo")
        return
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    from verl_ext.training.trainer import ExtendedTrainer

    mode = config.trainer.v1.trainer_mode
    extended = sorted(name for name, trainer in TRAINER_REGISTRY.items() if issubclass(trainer, ExtendedTrainer))
    if mode not in extended:
        found = TRAINER_REGISTRY.get(mode)
        trainer = f"{found.__module__}.{found.__qualname__}" if found else "registered by nothing here"
        problem = f"trainer.v1.trainer_mode={mode} is {trainer}, which knows nothing of {wanted}"
        yield Finding("trainer", "", problem, f"use one of {', '.join(extended)}")


def check_asynchrony(run: Run) -> Iterator[Finding]:
    """Name settings that verl's asynchronous trainers refuse, or that make their runs wait."""
    mode = OmegaConf.select(run.config, "trainer.v1.trainer_mode")
    if mode not in ("colocate_async", "separate_async"):
        return
    config, where, rollout = run.config, f"trainer.v1.trainer_mode={mode}", "actor_rollout_ref.rollout"
    settings = config.actor_rollout_ref.rollout
    manager = str(settings.agent.get("agent_loop_manager_class"))
    if manager.endswith("BatchAgentLoopManager"):
        name = f"{rollout}.agent.agent_loop_manager_class={manager}"
        problem = f"{name} waits until a whole batch is generated, and {where} trains meanwhile"
        yield Finding("trainer", "", problem, "set it to null")
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
