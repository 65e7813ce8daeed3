"""Milliseconds of a core that the method itself takes at a large mini-batch: weights, metrics, dealing rows to ranks.

python benchmarks/large_batch.py [--rows 8192 65536] [--responses 8]
"""

import argparse
import random
import time
import tracemalloc
from collections.abc import Callable

import torch

from recipe.disco.metrics import group_metrics
from recipe.disco.objectives import Disco, weigh
from verl_ext.training.grouping import deal

DISCO = Disco(tau=10.0)


def fastest(call: Callable[[], object], repeats: int = 5) -> float:
    """Milliseconds of a core that the fastest of some calls takes."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 65536], help="responses in the mini-batch")
    parser.add_argument("--responses", type=int, default=8, help="responses to a question")
    args = parser.parse_args()
    # As in a worker
    torch.set_num_threads(1)
    print(f"{args.responses} responses to a question; milliseconds")
    for rows in args.rows:
        g, rng = torch.Generator().manual_seed(0), random.Random(0)
        question = (torch.arange(rows) // args.responses)[torch.randperm(rows, generator=g)]
        positive, score = torch.rand(rows, generator=g) < 0.4, torch.randn(rows, generator=g, dtype=torch.float64)
        table = (score, positive, question, torch.ones(rows, dtype=torch.long))
        _, weight = weigh(DISCO, *table)
        print(f"{rows:6} rows: weigh {fastest(lambda t=table: weigh(DISCO, *t)):.1f}", end=", ")
        print(f"group_metrics {fastest(lambda t=table, w=weight: group_metrics(*t, w)):.1f}")
        groups = question.tolist()
        lengths = [min(8192, int(rng.lognormvariate(7, 0.8)) + 1) for _ in groups]
        for ranks in (2, 8, 64):

            def plan(ranks: int = ranks, groups: list = groups, lengths: list = lengths) -> None:
                deal(groups, lengths, groups_per_mini_batch=len(groups), ranks=ranks)

            milliseconds = fastest(plan, 1)
            tracemalloc.start()
            plan()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            print(f"{rows:6} rows: deal to {ranks} ranks {milliseconds:.1f}, at most {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
