"""How far cheaper gradients are from the exact one of L, along a DisCO run of a toy model.

python benchmarks/gradients.py FOLDER [--steps 60] [--lr 1e-4] [--delta 3e-3] [--name gradients_arithmetic]

FOLDER is a task's assets. Of each mini-batch, at the policy before its update: cosine with, and distance to, the exact
gradient, in units of its norm. ``lagged``: weights at old_log_probs, and the KL of the mini-batch before, of its
questions that were trained on (disco.measure=lagged). ``N groups``: the mean gradient of micro-batches of N whole
groups, each with a loss of its own, as in the published code. The run itself follows the exact gradient.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from record import Figure, record
from torch import Tensor
from toy import Batch, MiniBatch, Toy, gradient, log_probs, train

from recipe.disco import DiscoConfig, disco_loss
from recipe.disco.constraint import kl_estimate
from recipe.disco.loss import micro_batch_loss
from recipe.disco.scores import compute_score
from recipe.disco.update import ScoreTable, plan_update
from recipe.disco.worker import of_whole_questions

GROUPS = (1, 2, 4)


def lagged_gradient(toy: Toy, mini: MiniBatch, config: DiscoConfig, kl: float) -> tuple[Tensor, float]:
    """Compute the gradient with weights at pi_old and the penalty at ``kl``; return also the next one's KL."""
    batch, score = mini.batch, config.build_score()
    zero = torch.zeros_like(batch.reward)
    table = ScoreTable(
        question=batch.question,
        session=torch.arange(len(batch.reward)),
        size=batch.question.unique(return_counts=True)[1][batch.question - batch.question.min()],
        index=torch.arange(len(batch.reward)),
        reward=batch.reward,
        length=batch.mask.sum(-1),
        score=compute_score(score, mini.old, mini.old, batch.mask, None),
        kl=zero,
        measured=zero.bool(),
        entropy=zero + torch.nan,
    )
    plan = plan_update(table, config.build_objective(), config.build_controller(), positive_threshold=1.0, kl=kl)
    log_prob = log_probs(toy.model, batch)
    loss = micro_batch_loss(
        log_prob,
        mini.old,
        batch.mask,
        plan.weight,
        plan.coefficient,
        plan.tokens,
        score=score,
        kl_estimator=config.kl_estimator,
    )
    found = kl_estimate(log_prob.detach(), mini.old, batch.mask, config.kl_estimator)
    trained = of_whole_questions(plan, table)
    kl = float(found[trained].sum() / batch.mask[trained].sum()) if trained.any() else kl
    return gradient(toy.model, loss), kl


def by_micro_batch(toy: Toy, mini: MiniBatch, config: DiscoConfig, groups: int) -> Tensor:
    """Compute the mean of the gradients of micro-batches of ``groups`` whole groups."""
    batch, found = mini.batch, []
    for part in batch.question.unique().split(groups):
        rows = torch.isin(batch.question, part)
        few: Batch = batch.rows(rows)
        loss, _ = disco_loss(
            log_probs(toy.model, few), mini.old[rows], few.mask, few.reward, few.question, **config.chosen()
        )
        found.append(gradient(toy.model, loss))
    return torch.stack(found).mean(0)


def measure(toy: Toy, config: DiscoConfig, steps: int, lr: float, seed: int) -> dict[str, list[tuple[float, float]]]:
    """Run, and compare: kind and number of the mini-batch within its step -> (cosine, relative distance) of each."""
    found = defaultdict(list)
    kl = 0.0
    for mini in train(toy, steps, lr=lr, seed=seed, **config.chosen()):
        lagged, kl = lagged_gradient(toy, mini, config, kl if mini.number else 0.0)
        others = {"lagged": lagged} | {f"{g} groups": by_micro_batch(toy, mini, config, g) for g in GROUPS}
        norm = mini.exact.norm()
        if norm == 0:
            # No question has right and wrong responses, and the KL costs nothing.
            continue
        for kind, other in others.items():
            cosine = torch.nn.functional.cosine_similarity(mini.exact, other, 0)
            found[f"{kind}, mini-batch {mini.number + 1}"].append(
                (float(cosine), float((other - mini.exact).norm() / norm))
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--delta", type=float, default=3e-3)
    parser.add_argument("--estimator", choices=["k1", "k3"], default="k1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", default="gradients")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = DiscoConfig(delta=args.delta, kl_estimator=args.estimator)
    found = measure(Toy.load(args.folder), config, args.steps, args.lr, args.seed)
    figures = {}
    for kind, pairs in found.items():
        cosines, distances = zip(*pairs, strict=True)
        figures[f"{kind}, cosine"] = Figure.of(cosines, better="higher")
        figures[f"{kind}, distance"] = Figure.of(distances)
    record(args.name, figures, {k: v for k, v in vars(args).items() if k not in ("folder", "name")})


if __name__ == "__main__":
    main()
