"""Draw the per-question gradient weight of a method as a function of the pass rate p.

    python -m verl_ext.report.weights [--out weights.png] [ALGORITHM[,OVERRIDE...] ...]

The weight is the sum of dJ_q/ds over a question's right responses, where s is the mean log-probability of a response's
tokens and J = mean_q J_q is minus the method's loss: how strongly an update raises right responses. It is measured: the
method's own estimator and loss, as ``algorithm=NAME`` composes them, are called on a batch with one question for each
p = 1/n, 2/n, ..., and differentiated.
"""

from collections.abc import Sequence
from pathlib import Path

import hydra
import numpy as np
import torch
import verl  # noqa: F401  (first: loads the plugin)
from hydra.errors import HydraException
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from verl.protocol import DataProto
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from verl_ext.command import parser_of
from verl_ext.recipes import installed

TOKENS = 8
"""Length of the constructed responses."""


def compose(algorithm: str, *overrides: str) -> DictConfig:
    """Compose the settings of ``python -m verl.trainer.main_ppo algorithm=ALGORITHM OVERRIDES``."""
    common = [f"algorithm={algorithm}", "actor_rollout_ref.rollout.name=hf"]
    common += [f"actor_rollout_ref.{m}_micro_batch_size_per_gpu=1" for m in ("actor.ppo", "rollout.log_prob")]
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", overrides=[*common, *overrides])


def batch_loss(
    config: DictConfig,
    *,
    log_prob: Tensor,
    old_log_prob: Tensor,
    response_mask: Tensor,
    reward: Tensor,
    uid: Sequence,
    ref_log_prob: Tensor | None = None,
    values: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Tensor:
    """Compute a method's loss on one mini-batch, with the functions that trainer and worker call.

    Args:
        config: a composed configuration.
        log_prob, old_log_prob, ref_log_prob: (B, T) nats, of the policy, the behaviour policy and the reference model.
        response_mask: (B, T), ones from the left.
        reward: (B,), given at each response's last token.
        uid: (B,), question of each response.
        values: (B, T), of a critic, for GAE.
        entropy: (B, T) nats, for an entropy bonus.
    """
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    losses = {mode: loss for recipe in installed() for mode, loss in recipe.losses.items()}
    if loss := losses.get(actor.policy_loss.loss_mode):
        return loss(
            config,
            log_prob=log_prob,
            old_log_prob=old_log_prob,
            response_mask=response_mask,
            reward=reward,
            uid=uid,
            ref_log_prob=ref_log_prob,
        )

    length = response_mask.sum(-1).long()
    rewards = torch.zeros_like(log_prob).scatter(1, length[:, None] - 1, reward[:, None].to(log_prob.dtype))
    tensors = {"token_level_rewards": rewards, "response_mask": response_mask.long(), "old_log_probs": old_log_prob}
    if values is not None:
        tensors["values"] = values
    data = DataProto.from_dict(tensors, non_tensors={"uid": np.array(uid, dtype=object)})
    data = compute_advantage(
        data,
        config.algorithm.adv_estimator,
        config.algorithm.gamma,
        config.algorithm.lam,
        norm_adv_by_std_in_grpo=config.algorithm.norm_adv_by_std_in_grpo,
        config=config.algorithm,
    )

    # The engine's layout: one prompt token per row, and each token's log-probability at the position before it.
    ones = torch.ones(len(log_prob), 1, dtype=torch.long)
    fields = {
        "prompts": ones,
        "responses": response_mask.long(),
        "attention_mask": torch.cat([ones, response_mask.long()], 1),
        "response_mask": response_mask,
        "old_log_probs": old_log_prob,
        "advantages": data.batch["advantages"],
    }
    if ref_log_prob is not None:
        fields["ref_log_prob"] = ref_log_prob
    batch = TensorDict(fields, batch_size=len(log_prob))
    tu.assign_non_tensor(
        batch, dp_size=1, batch_num_tokens=int(length.sum()), global_batch_size=len(log_prob), max_response_len=-1
    )

    def flat(x: Tensor) -> Tensor:
        return torch.cat([torch.cat([row[:n], row.new_zeros(1)]) for row, n in zip(x, length, strict=True)])

    output = {"log_probs": flat(log_prob)} | ({} if entropy is None else {"entropy": flat(entropy)})
    return ppo_loss(actor, output, batch)[0]


def question_weights(config: DictConfig, n: int) -> list[float]:
    """Sum dJ_q/ds over right responses, for questions with 1, ..., n - 1 of n right, at pi_theta = pi_old."""
    uid = [right for right in range(1, n) for _ in range(n)]
    log_prob = torch.full((len(uid), TOKENS), -0.5, dtype=torch.float64).requires_grad_()
    reward = torch.tensor([float(i < right) for right in range(1, n) for i in range(n)], dtype=torch.float64)
    loss = batch_loss(
        config,
        log_prob=log_prob,
        old_log_prob=log_prob.detach(),
        ref_log_prob=log_prob.detach(),
        response_mask=torch.ones(log_prob.shape, dtype=torch.long),
        reward=reward,
        uid=uid,
    )
    (gradient,) = torch.autograd.grad(loss, log_prob)
    # s is a mean over tokens, so dJ/ds is the sum of their derivatives; J is a mean over the n - 1 questions.
    right = -(n - 1) * gradient.sum(-1) * reward
    return right.reshape(n - 1, n).sum(-1).tolist()


def draw(algorithms: Sequence[str], sizes: Sequence[int], path: Path) -> None:
    """Draw the weights of each ``NAME[,OVERRIDE...]`` for each group size, divided by their maximum."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 4), layout="constrained", sharey=True)
    for n, axis in zip(sizes, np.atleast_1d(axes), strict=True):
        for i, algorithm in enumerate(algorithms):
            # With the responses' own length, a constant length normaliser scales nothing.
            common = [f"data.max_response_length={TOKENS}", f"actor_rollout_ref.rollout.n={n}"]
            weights = np.array(question_weights(compose(*algorithm.split(","), *common), n))
            style = ("-", "--", ":", "-.")[i % 4]
            axis.plot(np.arange(1, n) / n, weights / weights.max(), marker=".", linestyle=style, label=algorithm)
        axis.set(title=f"n = {n}", xlabel="pass rate p", ylim=(0, 1.08), xlim=(0, 1))
    np.atleast_1d(axes)[0].set_ylabel("per-question gradient weight, relative to its maximum")
    np.atleast_1d(axes)[-1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = parser_of("verl_ext.report.weights", __doc__)
    default = ["grpo", "dr_grpo", "maxrl", "dgpo", *(name for recipe in installed() for name in recipe.compared)]
    parser.add_argument(
        "algorithms",
        nargs="*",
        default=default,
        metavar="ALGORITHM[,OVERRIDE...]",
        help=f"default: {' '.join(default)}",
    )
    parser.add_argument("--out", type=Path, default=Path("weights.png"), help="picture to write; default: weights.png")
    parser.add_argument("--n", type=int, nargs="+", default=[8, 16], help="responses per question; default: 8 16")
    args = parser.parse_args()
    if "ppo" in args.algorithms:
        parser.error("ppo's weights come from a critic, and there is none here; name other algorithms")
    try:
        draw(args.algorithms, args.n, args.out)
    except HydraException as e:
        from verl_ext.preflight.errors import explain

        given = [o for algorithm in args.algorithms for o in algorithm.split(",")]
        parser.error(str(explain(e, [o if "=" in o else f"algorithm={o}" for o in given])))
    print(args.out)


if __name__ == "__main__":
    main()
