"""Time of a step's actor update (4 mini-batches), DisCO's against that of verl's GRPO by the same engine and data.

python benchmarks/update_time.py [--only ratios fits ranks] [--checkpointing] [--ranks 2] [--mixed 0 0.5 1]

``ratios``: 16 questions with 8 responses of skewed length, methods in turns, at several shares of mixed groups. The
constraint is not active and the first mini-batch is on a fresh rollout, so it needs no measuring pass.
``fits``: the exact update's time against tokens and group size. ``ranks``: its speed against ranks, of one thread each
and with equal tokens.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from engine import (
    METHODS,
    MINI_BATCHES,
    Bench,
    Responses,
    Seconds,
    arguments,
    fit,
    in_turns,
    launch,
    skewed_lengths,
    start,
)
from record import Figure, record

PROMPT, SPEEDS = 32, "BENCHMARK_SPEEDS"
# By the share of mixed groups and the method; exact: with gradient checkpointing, without.
TARGETS = {(1.0, "exact"): (1.20, 1.25), (1.0, "lagged"): (1.02, 1.02)}
TARGETS |= {(0.5, "exact"): (0.80, 0.80), (0.5, "lagged"): (0.60, 0.60)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=["ratios", "fits", "ranks"], default=["ratios"])
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--mixed", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="shares of mixed groups")
    parser.add_argument("--max-response", type=int, default=256, help="tokens of the longest response")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**12, 2**14, 2**16, 2**18], help="for fits")
    args = parser.parse_args()
    settings = {k: v for k, v in vars(args).items() if k not in ("only", "tokens", "mixed", "ranks")}
    if SPEEDS in os.environ:
        launch(args)
        speeds(bench_of(args), args)
        return
    if "ranks" in args.only and "RANK" not in os.environ:
        record("update_ranks", ranks(args), settings)
    parts = {"ratios": ratios, "fits": fits}
    if parts.keys() & set(args.only) and launch(args):
        bench = bench_of(args)
        for part in sorted(parts.keys() & set(args.only)):
            figures, more = parts[part](bench, args)
            if bench.rank == 0:
                suffix = f"{args.ranks}_rank{'s' * (args.ranks > 1)}{'_checkpointing' * args.checkpointing}"
                name = f"update_{'time' if part == 'ratios' else part}_{suffix}"
                record(name, figures, {"ranks": args.ranks} | settings | more)


def bench_of(args: argparse.Namespace) -> Bench:
    # Twice the longest sequence
    return Bench(checkpointing=args.checkpointing, budget=2 * (args.max_response + PROMPT))


def ratios(bench: Bench, args: argparse.Namespace) -> tuple[dict[str, Figure], dict]:
    """Compare all methods with GRPO."""
    figures, theory = {}, {}
    for mixed in args.mixed:
        responses = Responses.make(skewed_lengths(128, args.max_response), 8, mixed, PROMPT)
        data = bench.batch(responses)
        shares: list[float] = []

        def update(method: str, data=data, shares=shares) -> Seconds:
            took, metrics = bench.update(method, data)
            if method == "exact":
                shares.append(metrics["disco/measure_seconds"] / took.wall)
            return took

        times = in_turns({m: functools.partial(update, m) for m in ("grpo", *METHODS)}, args)
        column = f"{mixed:.0%} mixed"
        figures[f"grpo, {column}"] = Figure.of([t.wall for t in times["grpo"]], "s")
        for method in METHODS:
            bound = TARGETS.get((mixed, method), (None, None))[not args.checkpointing]
            pairs = list(zip(times[method], times["grpo"], strict=True))
            figures[f"{method}, {column}"] = Figure.of([a.wall / b.wall for a, b in pairs], target=bound)
            if not torch.cuda.is_available():
                ratio = [a.core / b.core for a, b in pairs]
                figures[f"{method} (processor time), {column}"] = Figure.of(ratio, target=bound)
        # The first update is to warm up.
        figures[f"measuring, of exact, {column}"] = Figure.of(shares[1:])
        measuring = (MINI_BATCHES - 1) / MINI_BATCHES / (4 if args.checkpointing else 3)
        theory[f"exact, {column}"] = round(responses.trained + measuring, 3)
        theory[f"lagged, {column}"] = round(responses.trained, 3)
    return figures, {"tokens": responses.tokens, "theory (a forward pass is 1, a backward pass 2)": theory}


def fits(bench: Bench, args: argparse.Namespace) -> tuple[dict[str, Figure], dict]:
    """Fit lines to the exact update's time."""
    figures = {}
    mean = 0.4 * args.max_response + PROMPT
    # Whole groups of 8 in each mini-batch.
    counts = [max(round(tokens / mean / 32), 1) * 32 for tokens in args.tokens]
    batches = [Responses.make(skewed_lengths(n, args.max_response), 8, 1.0, PROMPT) for n in counts]
    data = {f"{r.tokens}": bench.batch(r) for r in batches}
    times = in_turns({n: lambda d=d: bench.update("exact", d)[0].wall for n, d in data.items()}, args)
    tokens = [r.tokens for r in batches]
    seconds = [statistics.median(times[f"{n}"]) for n in tokens]
    slope, intercept, r2 = fit(tokens, seconds)
    for n in tokens:
        figures[f"{n} tokens"] = Figure.of(times[f"{n}"], "s")
    figures["tokens: slope"] = Figure(slope * 1e6, "s per million tokens")
    figures["tokens: intercept"] = Figure(intercept, "s")
    figures["tokens: R2"] = Figure(r2, target=0.99, better="higher")

    lengths = skewed_lengths(256, args.max_response)
    sizes = [4, 8, 16, 32, 64]
    data = {f"{n}": bench.batch(Responses.make(lengths, n, 1.0, PROMPT)) for n in sizes}
    times = in_turns({n: lambda d=d: bench.update("exact", d)[0].wall for n, d in data.items()}, args)
    seconds = [statistics.median(times[f"{n}"]) for n in sizes]
    slope, intercept, r2 = fit(sizes, seconds)
    for n in sizes:
        figures[f"groups of {n}"] = Figure.of(times[f"{n}"], "s")
    figures["group size: slope"] = Figure(slope * 1e3, "ms per response", better="neither")
    figures["group size: intercept"] = Figure(intercept, "s")
    figures["group size: R2"] = Figure(r2, better="neither")
    return figures, {"tokens": tokens, "responses, group size": len(lengths)}


def ranks(args: argparse.Namespace) -> dict[str, Figure]:
    """Compare the speed on one and more ranks, started in turns."""
    found: dict[int, list[float]] = {n: [] for n in range(1, len(os.sched_getaffinity(0)) + 1)}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2):
            for n in found:
                file = Path(folder) / f"{turn} {n}"
                start(args, n, 1, **{SPEEDS: str(file)})
                found[n] += json.loads(file.read_text())
    figures = {f"{n} rank{'s' * (n > 1)}": Figure.of(v, "tokens/s", better="higher") for n, v in found.items()}
    slope, intercept, r2 = fit([n for n, v in found.items() for _ in v], [x for v in found.values() for x in v])
    figures["slope"] = Figure(slope, "tokens/s per rank", better="higher")
    figures["intercept"] = Figure(intercept, "tokens/s", better="neither")
    return figures | {"R2": Figure(r2, better="higher")}


def speeds(bench: Bench, args: argparse.Namespace) -> None:
    """Write the tokens per second of some exact updates, with equally many responses on each rank."""
    responses = Responses.make(skewed_lengths(64 * bench.ranks, args.max_response), 8, 1.0, PROMPT)
    data = bench.batch(responses)
    times = in_turns({"exact": lambda: bench.update("exact", data)[0].wall}, args)
    if bench.rank == 0:
        Path(os.environ[SPEEDS]).write_text(json.dumps([responses.tokens / t for t in times["exact"]]))


if __name__ == "__main__":
    main()
