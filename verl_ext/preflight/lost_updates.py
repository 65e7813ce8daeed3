"""Settings with which a run trains, and its updates get lost: on the way to the rollouts, or in rounding."""

from collections.abc import Iterator

from omegaconf import OmegaConf
from verl.utils.torch_dtypes import PrecisionType

from verl_ext.preflight.composition import Run
from verl_ext.preflight.findings import Finding


def check_adapters(run: Run) -> Iterator[Finding]:
    """Name LoRA settings with which verl 0.9.1 sends its rollouts the frozen base weights alone."""
    if OmegaConf.select(run.config, "trainer.v1.trainer_mode") != "separate_async":
        return
    model = "actor_rollout_ref.model"
    for name in ("lora_rank", "lora.rank", "lora_adapter_path", "lora.adapter_path"):
        found = OmegaConf.select(run.config, f"{model}.{name}")
        if found and not OmegaConf.select(run.config, f"{model}.lora.merge"):
            yield Finding(
                f"{model}.{name}",
                "",
                f"{model}.{name}={found} does not work with trainer.v1.trainer_mode=separate_async: verl sends the "
                "frozen base weights without the adapters, so rollouts would stay at the initial model",
                f"set {model}.lora.merge=True, or use trainer.v1.trainer_mode=sync or colocate_async",
            )
            return


def check_lost_updates(run: Run) -> Iterator[Finding]:
    """Name weights that FSDP trains in half precision, where most of Adam's steps round to nothing.

    verl gives new adapters the dtype of the frozen weights. Megatron keeps float32 copies of what it trains.
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
        yield Finding(
            name,
            "",
            f"{name}={found} keeps what is trained, LoRA adapters too, and Adam's states in half precision: steps of "
            f"lr={lr:g} round to nothing for weights above {moved:.1g}",
            "use fp32; fsdp_config.mixed_precision computes in bfloat16 all the same",
            warning=True,
        )
