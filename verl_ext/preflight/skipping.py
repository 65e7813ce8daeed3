"""Names settings for which leaving rows with advantage 0 out of the training pass would change the update."""

from collections.abc import Iterator

from omegaconf import OmegaConf

from verl_ext.preflight.composition import Run
from verl_ext.preflight.findings import Finding

PROPORTIONAL = ("vanilla", "gspo", "sapo", "gpg", "cispo", "dppo_tv", "dppo_kl")
"""verl's policy losses that are sums over tokens, to which those of advantage 0 add nothing.

Others average over a micro-batch (geo_mean), choose tokens by all rows (clip_cov, kl_cov) or pull to pi_old (dro).
"""


def check_skipping(run: Run) -> Iterator[Finding]:
    """Name what verl's own method would train on rows that ``verl_ext.skip_rows_without_gradient`` leaves out.

    A recipe's worker decides by itself.
    """
    config, setting = run.config, "verl_ext.skip_rows_without_gradient"
    if not OmegaConf.select(config, setting) or OmegaConf.select(config, "verl_ext.actor_worker_class"):
        return
    actor, where, model = config.actor_rollout_ref.actor, "actor_rollout_ref.actor", "actor_rollout_ref.model"
    found = []
    if actor.policy_loss.loss_mode not in PROPORTIONAL:
        problem = "needs rows with advantage 0, too"
        found.append((f"{where}.policy_loss.loss_mode", problem, f"use one of {', '.join(PROPORTIONAL)}"))
    if actor.entropy_coeff:
        found.append((f"{where}.entropy_coeff", "trains on all rows", "set it to 0"))
    elif actor.calculate_entropy:
        found.append((f"{where}.calculate_entropy", "logs the entropy of all rows", "set it to false"))
    for name in (f"{where}.use_kl_loss", "distillation.enabled", f"{model}.mtp.enable_train"):
        on = OmegaConf.select(config, name) and (".mtp." not in name or OmegaConf.select(config, f"{model}.mtp.enable"))
        if on:
            found.append((name, "trains on all rows", "set it to false"))
    if actor.loss_agg_mode == "seq-mean-token-sum-norm" and not actor.loss_scale_factor:
        fix = "set it to a constant, such as data.max_response_length"
        found.append((f"{where}.loss_scale_factor", "divides by the width of each micro-batch", fix))
    if actor.strategy == "megatron" and OmegaConf.select(config, f"{where}.megatron.dynamic_context_parallel"):
        found.append((f"{where}.megatron.dynamic_context_parallel", "deals rows anew", "set it to false"))
    for name, problem, fix in found:
        value = OmegaConf.select(config, name)
        yield Finding(
            name, "", f"{name}={value} {problem}, which {setting}=True leaves out", f"{fix}, or {setting}=false"
        )
