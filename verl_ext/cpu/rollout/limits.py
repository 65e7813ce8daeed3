"""Says what whole-batch generation cannot do; cheap to import, as every start and the doctor ask."""

from omegaconf import DictConfig, OmegaConf

MANAGER = "actor_rollout_ref.rollout.agent.agent_loop_manager_class"
AGENT = "single_turn_agent"
"""The only agent loop that it stands for."""


def samples_batches(config: DictConfig) -> bool:
    """Whether :class:`verl_ext.cpu.rollout.batch_loop.BatchAgentLoopManager` generates this run's responses."""
    return str(OmegaConf.select(config, MANAGER)).endswith(".BatchAgentLoopManager")


def refuse_unsupported(config: DictConfig) -> None:
    """Raise ValueError for the first setting that needs verl's own agent-loop manager."""
    rollout = config.actor_rollout_ref.rollout
    for name, found, right in (
        ("actor_rollout_ref.rollout.name", rollout.get("name") or "hf", "hf"),
        ("trainer.v1.trainer_mode", config.trainer.v1.trainer_mode, "sync"),
        ("actor_rollout_ref.rollout.agent.default_agent_loop", rollout.agent.default_agent_loop, AGENT),
        ("actor_rollout_ref.rollout.agent.agent_loop_config_path", rollout.agent.agent_loop_config_path, None),
        ("actor_rollout_ref.rollout.multi_turn.enable", rollout.multi_turn.enable, False),
        ("actor_rollout_ref.rollout.multi_turn.tool_config_path", rollout.multi_turn.tool_config_path, None),
        ("actor_rollout_ref.rollout.multi_turn.function_tool_path", rollout.multi_turn.function_tool_path, None),
        ("distillation.enabled", bool(OmegaConf.select(config, "distillation.enabled")), False),
    ):
        if found != right:
            raise ValueError(
                f"{name}={found} does not work with {MANAGER}=BatchAgentLoopManager, which samples whole batches, one "
                f"turn each, with transformers; set {MANAGER}=null"
            )
