"""What is refused before anything expensive starts, and why."""

import torch
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.utils.torch_dtypes import PrecisionType

from recipe.disco.scores import SCORES
from recipe.disco.settings import DiscoConfig, parse

ENGINES = ("fsdp", "fsdp2", "megatron")
"""verl's training engines that the exact update is made for."""

BYPASS_FLOOR = 1e-3
"""KL of a bfloat16 rollout to the actor of the same weights, nats per token: assumed; a public run showed 1.6e-3."""

K3_FLOOR = 2e-4
"""What k3 says of two bfloat16 passes with the same weights: sigma^2, sigma the rounding noise of each log-probability.

So 1e-4 for sigma = 0.01, 4e-4 for 0.02; assumed between them. Of k1, such noise has mean 0.
"""


def validate(config: DictConfig) -> None:
    """Refuse what would not train as asked, before Ray or a model starts.

    Args:
        config: the composed configuration of ``main_ppo``.

    Raises:
        ValueError: names the setting, the value found and what would be right.
    """
    disco = parse(config.disco)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout

    def get(path: str, default=None):
        return OmegaConf.select(config, path, default=default)

    def refuse(setting: str, found, right: str) -> None:
        raise ValueError(f"{setting}={found} does not work with DisCO: {right}")

    if rollout.n < 2:
        refuse("actor_rollout_ref.rollout.n", rollout.n, "a question needs a positive and a negative; use n >= 2")
    if actor.policy_loss.loss_mode != "disco":
        refuse("actor_rollout_ref.actor.policy_loss.loss_mode", actor.policy_loss.loss_mode, "leave it at disco")
    if get("algorithm.use_kl_in_reward", False):
        refuse("algorithm.use_kl_in_reward", True, "labels come before any KL term; it has no effect, use false")
    if SCORES[disco.score].base == "reference":
        if not actor.use_kl_loss:
            refuse(
                "actor_rollout_ref.actor.use_kl_loss",
                False,
                f"disco.score={disco.score} needs a reference model, which verl starts for a KL loss; use true",
            )
    elif actor.use_kl_loss:
        refuse("actor_rollout_ref.actor.use_kl_loss", True, "the constraint replaces a KL loss; use false")
    if get("critic.enable"):
        refuse("critic.enable", True, "there are no values to learn; use null")
    if get("critic.enable") is None and config.algorithm.adv_estimator == "gae":
        refuse("algorithm.adv_estimator", "gae", "it starts a critic, and DisCO has no values; leave it at disco")
    if get("distillation.enabled", False):
        refuse("distillation.enabled", True, "its loss would be ignored; use false")
    _refuse_corrections_without_effect(disco, get, refuse)
    _refuse_delta_below_the_floor(disco, get, refuse)
    if actor.strategy not in ENGINES:
        refuse("actor_rollout_ref.actor.strategy", actor.strategy, f"it is not tested; use one of {', '.join(ENGINES)}")
    virtual = get("actor_rollout_ref.actor.megatron.virtual_pipeline_model_parallel_size")
    if actor.strategy == "megatron" and virtual and not actor.use_dynamic_bsz:
        refuse(
            "actor_rollout_ref.actor.megatron.virtual_pipeline_model_parallel_size",
            virtual,
            "interleaved pipelining needs a micro-batch count divisible by the pipeline size, which groups of varying "
            "size cannot guarantee; "
            "set actor_rollout_ref.actor.use_dynamic_bsz=True",
        )
    if get("actor_rollout_ref.actor.megatron.dynamic_context_parallel", False):
        refuse("actor_rollout_ref.actor.megatron.dynamic_context_parallel", True, "it re-deals rows; use false")
    _refuse_torn_or_wrong_parallelism(config, get, refuse)


def _refuse_corrections_without_effect(disco: DiscoConfig, get, refuse) -> None:
    node = "algorithm.rollout_correction"
    chosen = {name: get(f"{node}.{name}") for name in ("rollout_is", "rollout_rs")}
    bypass = get(f"{node}.bypass_mode")
    if (bypass or any(chosen.values())) and not get("actor_rollout_ref.rollout.calculate_log_probs"):
        refuse(
            "actor_rollout_ref.rollout.calculate_log_probs",
            False,
            f"{node} (bypass_mode={bypass}, rollout_is={chosen['rollout_is']}, rollout_rs={chosen['rollout_rs']}) "
            "reads the rollout's log-probabilities; use true",
        )
    for name, found in chosen.items():
        if found is None:
            continue
        if bypass:
            refuse(
                f"{node}.{name}",
                found,
                f"with {node}.bypass_mode=True old_log_probs are the rollout's own, so nothing is left to correct; use "
                "null, or bypass_mode=False",
            )
        # verl corrects nothing without it, in silence.
        if get(f"{node}.{name}_threshold") is None:
            refuse(f"{node}.{name}_threshold", None, f"{node}.{name}={found} needs one; 2.0, say")
    try:
        one = torch.zeros(1, 1)
        names = ("rollout_is", "rollout_is_threshold", "rollout_rs", "rollout_rs_threshold")
        compute_rollout_correction_and_rejection_mask(one, one, one + 1, **{n: get(f"{node}.{n}") for n in names})
    except (TypeError, ValueError) as e:
        refuse(node, OmegaConf.to_container(get(node), resolve=True), f"verl says: {e}")
    if chosen["rollout_is"] and not SCORES[disco.score].correctable:
        refuse(f"{node}.rollout_is", chosen["rollout_is"], f"disco.score={disco.score} takes no weights; use null")


def _refuse_delta_below_the_floor(disco: DiscoConfig, get, refuse) -> None:
    if "delta" not in disco.chosen():
        return
    if get("actor_rollout_ref.actor.strategy") == "megatron":
        engine, default = "actor_rollout_ref.actor.megatron.dtype", "bfloat16"
    else:
        engine = "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype"
        default = "fp32" if get("trainer.device") == "cpu" else "bf16"
    rollout = "actor_rollout_ref.rollout.dtype"
    found = {engine: get(engine) or default, rollout: get(rollout)}
    coarse = [f"{name}={value}" for name, value in found.items() if PrecisionType.is_bf16(value)]
    if quantized := get("actor_rollout_ref.rollout.quantization"):
        coarse.append(f"actor_rollout_ref.rollout.quantization={quantized}")
    bypass = "algorithm.rollout_correction.bypass_mode"
    if disco.kl_floor is not None:
        floor, why, cure = disco.kl_floor, f"disco.kl_floor={disco.kl_floor:g}", ""
    elif get(bypass) and coarse:
        floor, why = BYPASS_FLOOR, f"{bypass}=True and {', '.join(coarse)}"
        cure = f"{bypass}=False, float32 for the rollout and the engine, "
    elif disco.kl_estimator == "k3" and PrecisionType.is_bf16(found[engine]):
        floor, why = K3_FLOOR, f"disco.kl_estimator=k3 and {engine}={found[engine]}"
        cure = "disco.kl_estimator=k1, "
    else:
        return
    if disco.delta < floor:
        refuse(
            "disco.delta",
            disco.delta,
            f"with {why} the KL is about {floor:g} nats per token before any update, so the constraint would chase "
            f"noise; use {cure}a disco.delta of at least {floor:g}, or set disco.kl_floor to what a run with "
            "disco.constraint=none logs as disco/kl_floor",
        )


def _refuse_torn_or_wrong_parallelism(config: DictConfig, get, refuse) -> None:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    world = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if actor.strategy == "megatron":
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        model_parallel = 1
        for name in names:
            model_parallel *= get(f"actor_rollout_ref.actor.megatron.{name}", 1) or 1
    else:
        ulysses = get("actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size", 1) or 1
        model_parallel = max(ulysses, get("actor_rollout_ref.actor.ulysses_sequence_parallel_size", 1) or 1)
        attention = get("actor_rollout_ref.model.override_config.attn_implementation", "flash_attention_2")
        if model_parallel > 1 and not str(attention).startswith("flash_attention"):
            refuse(
                "actor_rollout_ref.model.override_config.attn_implementation",
                attention,
                f"with ulysses_sequence_parallel_size={model_parallel} verl patches flash attention only, and others "
                "compute wrong log-probabilities; use flash_attention_2 or ulysses_sequence_parallel_size=1",
            )
    data_parallel = max(world // model_parallel, 1)
    questions, batch = actor.ppo_mini_batch_size, config.data.train_batch_size
    if questions > batch:
        refuse(
            "actor_rollout_ref.actor.ppo_mini_batch_size",
            questions,
            f"it is more questions than data.train_batch_size={batch}; use at most {batch}",
        )
    if questions * rollout.n < data_parallel:
        refuse(
            "actor_rollout_ref.actor.ppo_mini_batch_size",
            questions,
            f"{questions} questions x n={rollout.n} are {questions * rollout.n} responses for {data_parallel} "
            f"data-parallel ranks, so ranks would stand idle; use at least {-(-data_parallel // rollout.n)}",
        )
