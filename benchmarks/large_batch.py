"""Time and memory of planning an update and of dealing rows to ranks, for one large mini-batch, on one core.

python benchmarks/large_batch.py [--rows 8192 65536 524288] [--responses 4 8 64]

`plan_update` runs on every rank for each mini-batch, `deal` once per step in the trainer. Memory is the most that a
call holds at one time beyond its inputs, per row.
"""

import argparse
import functools
import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from loss import peak_bytes
from record import Figure, record

from recipe.disco.constraint import SquaredHinge
from recipe.disco.objectives import Disco
from recipe.disco.update import ScoreTable, plan_update
from verl_ext.training.grouping import deal

LARGE, RESPONSES = 65536, 8
"""The size that the targets are for, and the usual number of responses to a question."""
RANKS = (2, 8, 64, 1024)

Call = Callable[[], object]


def times(call: Call, repeats: int) -> list[float]:
    """Seconds of a core that each of some calls takes."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return found


def traced_peak(call: Call) -> int:
    """The most bytes that Python and numpy hold at one time during a call."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def make_table(rows: int, responses: int) -> ScoreTable:
    """A mini-batch of all ranks: 40 % of the responses are right, lengths are skewed, rows come in any order."""
    g = torch.Generator().manual_seed(0)
    question = (torch.arange(rows) // responses)[torch.randperm(rows, generator=g)]
    length = (8192 * torch.rand(rows, generator=g) ** 1.5).long().clamp(min=1)
    return ScoreTable(
        question=question,
        session=torch.arange(len(question)),
        size=question.bincount()[question],
        index=torch.arange(rows),
        reward=(torch.rand(rows, generator=g) < 0.4).double(),
        length=length,
        score=torch.randn(rows, generator=g, dtype=torch.float64),
        kl=1e-4 * length * torch.randn(rows, generator=g, dtype=torch.float64),
        measured=torch.ones(rows, dtype=torch.bool),
        entropy=length.double(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, LARGE, 524288], help="in the mini-batch")
    parser.add_argument("--responses", type=int, nargs="+", default=[4, RESPONSES, 64], help="to a question")
    args = parser.parse_args()
    # As in a worker
    torch.set_num_threads(1)
    objective, controller = Disco(tau=10.0), SquaredHinge(delta=1e-4, beta=1e3)
    figures = {}

    def measure(name: str, rows: int, call: Call, peak: Callable[[Call], int], target: float) -> None:
        call()
        bound = target if rows == LARGE else None
        milliseconds = [1e3 * x for x in times(call, 15 if rows <= LARGE else 3)]
        figures[f"{name}, time"] = Figure.of(milliseconds, "ms", target=bound)
        per_row = peak(call) / rows
        figures[f"{name}, memory"] = Figure(per_row, "bytes per row", low=per_row, high=per_row)

    for rows in args.rows:
        for responses in args.responses:
            if rows != LARGE and responses != RESPONSES:
                continue
            table = make_table(rows, responses)
            call = functools.partial(plan_update, table, objective, controller, positive_threshold=1.0)
            measure(f"plan_update: {rows} rows, {responses} to a question", rows, call, peak_bytes, 30)
        rng = random.Random(0)
        groups = [row // RESPONSES for row in range(rows)]
        lengths = [min(8192, int(rng.lognormvariate(7, 0.8)) + 1) for _ in groups]
        trained = [rng.random() < 0.5 for _ in groups]
        for ranks in RANKS:
            if rows > LARGE and ranks != 64:
                continue
            options: dict[str, Any] = dict(groups_per_mini_batch=rows, ranks=ranks, trained=trained)
            call = functools.partial(deal, groups, lengths, **options)
            measure(f"deal: {rows} rows to {ranks} ranks", rows, call, traced_peak, 500)
    record("large_batch", figures, settings=vars(args))


if __name__ == "__main__":
    main()
