"""How noisy the KL of a mini-batch is by its tokens, and how often the constraint fires on noise alone.

python benchmarks/kl_noise.py FOLDER [--steps 20] [--lr 1e-4] [--delta 3e-3] [--most 1000000]
                              [--name kl_noise_arithmetic]

FOLDER is a task's assets. A DisCO run of ``--steps`` makes two policies: pi_old of the last rollout, and the policy
after its updates. pi_old then gives fresh responses, of ``--most`` tokens in all, whose mean k3 counts as the truth.
They are cut into mini-batches of 1e3, 1e4, ... tokens. ``noise``: standard deviation of the mini-batches' KL, or where
fewer than five fit, the standard error clustered by response. ``fires at D``: share of mini-batches whose KL is above
delta = D, with the truth next to it, which says how often it should: always, or never.
"""

import argparse
import copy
from pathlib import Path

import torch
from record import Figure, record
from torch import Tensor
from toy import AT_ONCE, Toy, log_probs, old_log_probs, sample, train

from recipe.disco.constraint import KL_ESTIMATORS, kl_estimate, kl_standard_error

DELTAS = (1e-4, 1e-3, 3e-3, 1e-2)
FEWEST = 5
"""Mini-batches whose spread is worth a figure."""


@torch.no_grad()
def divergences(old: Toy, new: Toy, most: int, seed: int, turn: int) -> tuple[dict[str, Tensor], Tensor]:
    """Sample from ``old`` until there are ``most`` tokens: each response's summed KL by estimator, and its tokens.

    ``turn`` and those after it are the seeds that no step of the run had.
    """
    pool, n = old.questions("train"), 8
    sums: dict[str, list[Tensor]] = {name: [] for name in KL_ESTIMATORS}
    lengths: list[Tensor] = []
    tokens = 0
    while tokens < most:
        questions = [pool[(turn * AT_ONCE // n + i) % len(pool)] for i in range(AT_ONCE // n)]
        batch = sample(old, questions, n, hash((seed, turn)))
        before, after = old_log_probs(old.model, batch), log_probs(new.model, batch)
        for name in KL_ESTIMATORS:
            sums[name].append(kl_estimate(after, before, batch.mask, name).sum(-1).double())
        lengths.append(batch.mask.sum(-1))
        tokens += int(lengths[-1].sum())
        turn += 1
    return {name: torch.cat(parts) for name, parts in sums.items()}, torch.cat(lengths)


def by_size(kl: Tensor, length: Tensor, tokens: int) -> Tensor:
    """Cut responses, in their order, into mini-batches of about ``tokens``; return the KL of each, nats per token."""
    number = (length.cumsum(0) - length) // tokens
    whole = int(length.sum()) // tokens
    sums = torch.zeros(int(number.max()) + 1, dtype=torch.double).index_add(0, number, kl)
    counts = torch.zeros_like(sums).index_add(0, number, length.double())
    return (sums / counts)[:whole]


def figures_of(sums: dict[str, Tensor], length: Tensor, most: int) -> dict[str, Figure]:
    """Summarise: noise and firing by estimator and mini-batch size."""
    true = float(sums["k3"].sum() / length.sum())
    figures = {"truth, KL": Figure(true, "nats per token", better="neither")}
    for name, kl in sums.items():
        for tokens in (t for t in (10**3, 10**4, 10**5, 10**6) if t <= most):
            each = by_size(kl, length, tokens)
            if len(each) < FEWEST:
                error = kl_standard_error(kl, length)
                noise = float("nan") if error is None else error * (float(length.sum()) / tokens) ** 0.5
            else:
                noise = float(each.std())
            row = f"{name}, {tokens:.0e} tokens".replace("e+0", "e")
            figures[f"{row}, noise"] = Figure(noise, "nats per token", better="neither")
            for delta in DELTAS:
                if len(each) >= FEWEST:
                    fires = float((each > delta).double().mean())
                    figures[f"{row}, fires at {delta:g}"] = Figure(fires, better="neither")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--delta", type=float, default=3e-3)
    parser.add_argument("--most", type=int, default=1_000_000, help="tokens to sample")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", default="kl_noise")
    args = parser.parse_args()
    torch.set_num_threads(1)
    new = Toy.load(args.folder)
    old = new
    for mini in train(new, args.steps, lr=args.lr, seed=args.seed, delta=args.delta):
        if mini.number == 0:
            old = copy.copy(new)
            old.model = copy.deepcopy(new.model)
    sums, length = divergences(old, new, args.most, args.seed, args.steps + 1)
    settings = {k: v for k, v in vars(args).items() if k not in ("folder", "name")}
    record(args.name, figures_of(sums, length, args.most), settings | {"responses": len(length)})


if __name__ == "__main__":
    main()
