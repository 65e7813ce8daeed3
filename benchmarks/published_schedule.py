"""The exact update against the published schedule: same engine, same gradient; then by simulation on many ranks.

python benchmarks/published_schedule.py [--only measured simulated] [--ranks 2] [--checkpointing]
python benchmarks/published_schedule.py --read ROLLOUT_DATA_DIR TOKENIZER

The published schedule: each micro-batch has a fixed number of sequences, in whole groups, each padded to the longest
that is allowed; ranks take the questions as they come; the scores of a micro-batch are gathered from all ranks, and its
loss is that of the gathered groups. So it needs no measuring pass. ``--read`` records lengths of a run's responses.
"""

import copy
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import MINI_BATCHES, Bench, Responses, Seconds, arguments, in_turns, launch, skewed_lengths
from record import Figure, record
from torch.nn.functional import pad

from verl_ext.training.grouping import Deal, deal

PROMPT, GROUP = 32, 8
RECORDED = Path(__file__).parent / "arithmetic_lengths.json"
RANKS = (8, 64, 512, 1024)
ROWS = 16
"""Responses per rank and mini-batch, in the simulation."""


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(ranks=2, turns=3)
    parser.add_argument("--only", nargs="+", choices=["measured", "simulated"], default=["measured", "simulated"])
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--max-response", type=int, default=256, help="tokens of the longest response, when measured")
    parser.add_argument("--read", nargs=3, metavar=("ROLLOUTS", "TOKENIZER", "MAXIMUM"), help="record a run's lengths")
    args = parser.parse_args()
    if args.read:
        read_lengths(Path(args.read[0]), Path(args.read[1]), int(args.read[2]))
    elif launch(args):
        # As many tokens as a published micro-batch
        budget = GROUP * (args.max_response + PROMPT)
        bench = Bench(checkpointing=args.checkpointing, budget=budget, optimizer="SGD", lr=0.1)
        settings = {k: v for k, v in vars(args).items() if k not in ("only", "read")}
        for part in args.only:
            figures, more = {"measured": measured, "simulated": simulated}[part](bench, args)
            if bench.rank == 0:
                record(f"published_schedule_{part}", figures, settings | more)


def read_lengths(rollouts: Path, tokenizer: Path, maximum: int) -> None:
    """Write the tokens of a run's responses, by question.

    Args:
        rollouts: verl's ``trainer.rollout_data_dir``.
        tokenizer: of the run's model.
        maximum: the run's ``data.max_response_length``.
    """
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer).encode
    groups: dict[str, list[int]] = {}
    for file in sorted(rollouts.glob("*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            # And the end of the sequence, if there was room for it.
            tokens = min(len(encode(row["output"])) + 1, maximum)
            groups.setdefault(f"{file.stem} {row['uid'].rsplit('_', 2)[0]}", []).append(tokens)
    RECORDED.write_text(json.dumps({"maximum": maximum, "lengths": list(groups.values())}) + "\n")
    print(f"{RECORDED}: {sum(map(len, groups.values()))} lengths of {len(groups)} questions")


# Measured ---------------------------------------------------------------------------------------------------------


def in_order(responses: Responses, ranks: int) -> Deal:
    """Give each rank its questions as they come; the mini-batches are those that :func:`deal` makes."""
    parts = np.arange(len(responses.lengths)).reshape(MINI_BATCHES, ranks, -1)
    order = parts.transpose(1, 0, 2)
    mini_batch = np.broadcast_to(np.arange(MINI_BATCHES)[None, :, None], order.shape)
    return Deal(order.ravel().tolist(), mini_batch.ravel().tolist(), 0, parts.tolist())


@dataclass
class GatheredLoss:
    """The loss of the groups that all ranks' micro-batches hold together, in verl's loss contract.

    Attributes:
        worker: whose objective, score and constraint to use.
        micro_batches: of a mini-batch.
    """

    worker: Any
    micro_batches: int

    def __call__(self, model_output: dict[str, Any], data: Any, dp_group: Any = None) -> tuple[torch.Tensor, dict]:
        from verl.workers.utils.padding import no_padding_2_padding

        from recipe.disco.constraint import kl_estimate
        from recipe.disco.scores import compute_score
        from recipe.disco.update import ScoreTable, plan_update
        from verl_ext.training.rows import Rows
        from verl_ext.training.skipping import gathered

        worker, rows = self.worker, Rows.of(data)
        log_prob = no_padding_2_padding(model_output["log_probs"], data)
        mask, old = data["response_mask"].to_padded_tensor(0).bool(), data["old_log_probs"].to_padded_tensor(0)
        score, kl = compute_score(worker.score, log_prob, old, mask, None), kl_estimate(log_prob, old, mask).sum(-1)
        own = torch.stack([score, kl], -1).double()
        columns = (rows.group_id, rows.group_size, rows.sample_index, rows.sequence_reward, mask.sum(-1))
        table = torch.cat([torch.stack([c.double() for c in columns], -1), own.detach()], -1)
        table = gathered(table, worker.engine.get_data_parallel_group()).to(own.device)
        # Only this rank's have a gradient here.
        rank = worker.engine.get_data_parallel_rank()
        scores = torch.cat([table[: rank * len(own), -2:], own, table[(rank + 1) * len(own) :, -2:]])
        question, size, index, _, length = table[:, :5].long().unbind(-1)
        plan = plan_update(
            ScoreTable(
                question=question,
                size=size,
                index=index,
                reward=table[:, 3],
                length=length,
                score=scores[:, 0],
                kl=scores[:, 1],
                measured=torch.ones_like(question, dtype=torch.bool),
                entropy=torch.full_like(table[:, 3], torch.nan),
            ),
            worker.objective,
            worker.controller,
            positive_threshold=worker.disco.positive_threshold,
        )
        return plan.loss / self.micro_batches * data["dp_size"], {}


class Published:
    """The published schedule by a bench's engine.

    Args:
        bench: of which it takes engine and data.
        maximum: tokens to pad each sequence to; None: remove padding, as the authors' framework could.
    """

    def __init__(self, bench: Bench, maximum: int | None):
        self.bench, self.maximum, self.worker = bench, maximum, copy.copy(bench.verl)

    def batch(self, responses: Responses) -> Any:
        """Return this rank's rows in the order of the questions."""
        from verl.utils import tensordict_utils as tu

        data = self.bench.batch(responses, in_order(responses, self.bench.ranks))
        tu.assign_non_tensor(
            data,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=GROUP,
            use_remove_padding=self.maximum is None,
            # verl's own cut of a rank's rows
            mini_batch_size=len(data) // MINI_BATCHES * self.bench.ranks,
        )
        self.worker.set_loss_fn(GatheredLoss(self.bench.worker, len(data) // MINI_BATCHES // GROUP))
        return data

    def update(self, data: Any) -> Any:
        """Take one step's update from the initial parameters; return its time."""
        bench, prepare = self.bench, self.bench.engine.prepare_model_inputs
        bench.configure("exact")
        bench.restore()
        if self.maximum is not None:
            bench.engine.prepare_model_inputs = functools.partial(self._padded, prepare)
        try:
            return bench.timed(lambda: self.worker.train_mini_batch(data.copy()))[0]
        finally:
            bench.engine.prepare_model_inputs = prepare

    def _padded(self, prepare: Any, micro_batch: Any) -> Any:
        inputs, outputs = prepare(micro_batch)
        return {n: pad(x, (0, self.maximum - x.shape[-1])) for n, x in inputs.items()}, outputs


def measured(bench: Bench, args: Any) -> tuple[dict[str, Figure], dict]:
    """Compare the times of an update, and the updates."""
    figures, settings = {}, {}
    longest = args.max_response + PROMPT
    schedules = {"published": Published(bench, longest), "padding removed": Published(bench, None)}
    for mixed in (1.0, 0.5):
        responses = Responses.make(skewed_lengths(128, args.max_response), GROUP, mixed, PROMPT)
        ours = bench.batch(responses)
        theirs = {name: schedule.batch(responses) for name, schedule in schedules.items()}
        calls = {"exact": lambda d=ours: bench.update("exact", d)[0]}
        calls |= {n: functools.partial(s.update, theirs[n]) for n, s in schedules.items()}
        updates: dict[str, torch.Tensor] = {}

        def update(name: str, calls=calls, updates=updates) -> Seconds:
            took = calls[name]()
            if name not in updates:
                updates[name] = bench.moved()
            return took

        times = in_turns({name: functools.partial(update, name) for name in calls}, args)
        column = f"{mixed:.0%} mixed"
        figures[f"exact, {column}"] = Figure.of([t.wall for t in times["exact"]], "s")
        for name in schedules:
            # Padding to the maximum is what was published.
            bound = {"target": 1.5, "better": "higher"} if name == "published" else {"better": "neither"}
            pairs = list(zip(times[name], times["exact"], strict=True))
            figures[f"{name} / exact, {column}"] = Figure.of([a.wall / b.wall for a, b in pairs], **bound)
            ratio = [a.core / b.core for a, b in pairs]
            figures[f"{name} / exact (processor time), {column}"] = Figure.of(ratio, **bound)
            difference = float((updates[name] - updates["exact"]).norm() / updates["exact"].norm())
            figures[f"{name}: update, {column}"] = Figure(difference, "relative difference", target=1e-4)
        settings["tokens"] = responses.tokens
    return figures, settings


# Simulated --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Seconds of a rank for a sequence: by its tokens, of attention by their square, and for the sequence as such."""

    token: float
    square: float
    sequence: float = 0.0

    @classmethod
    def fit(cls, length: np.ndarray, seconds: np.ndarray) -> "Cost":
        """Fit to the seconds per token at each length."""
        columns = np.stack([np.ones(len(length)), length, 1 / length], 1) / seconds[:, None]
        token, square, sequence = np.linalg.lstsq(columns, np.ones(len(length)))[0]
        if min(token, square) < 0:
            raise RuntimeError(f"cannot be extrapolated to longer sequences: {seconds} s per token at {length} tokens")
        return cls(token, square, sequence)

    def __call__(self, length: Any) -> Any:
        return self.sequence + self.token * length + self.square * length**2


def costs(bench: Bench, args: Any) -> tuple[Cost, Cost, dict[str, float]]:
    """Measure what an update and a pass without gradient cost; return the fits, and the first one's errors."""
    # Always as many tokens, in full micro-batches
    budget = bench.worker.engine_config.max_token_len_per_gpu
    length = budget // np.array([16, 8, 4, 2, 1])
    rows = 4 * budget // length * bench.ranks
    calls = {}
    for n, count in zip(length, rows, strict=True):
        data = bench.batch(Responses.make(np.full(count, n - PROMPT), 2, 1.0, PROMPT))
        calls[f"train {n}"] = lambda d=data: bench.update("grpo", d)[0].core
        calls[f"measure {n}"] = lambda d=data: bench.timed(lambda: bench.verl.infer_batch(d.copy()))[0].core
    times = in_turns(calls, args)
    train, measure = (
        np.array([np.median(times[f"{kind} {n}"]) for n in length]) / (4 * budget) for kind in ("train", "measure")
    )
    fits = Cost.fit(length, train), Cost.fit(length, measure)
    errors = {f"{n} tokens": round(float(fits[0](n) / n / x - 1), 3) for n, x in zip(length, train, strict=True)}
    return *fits, errors


def simulate(groups: np.ndarray, maximum: int, ranks: int, train: Cost, measure: Cost) -> dict[str, float]:
    """Simulate a step: the slowest rank counts, in each mini-batch or gathered micro-batch.

    Args:
        groups: (questions, responses) tokens of each response; all questions are mixed.
        maximum: tokens to pad to, by the published schedule.

    Returns:
        Seconds, and shares of tokens wasted by padding and waiting, by schedule; seconds to deal.
    """
    rng = np.random.default_rng(ranks)
    lengths = groups[rng.integers(len(groups), size=ranks * ROWS * MINI_BATCHES // GROUP)].ravel()
    question = (np.arange(len(lengths)) // GROUP).tolist()
    sequence = lengths.tolist()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        plan = deal(question, sequence, groups_per_mini_batch=ranks * ROWS // GROUP, ranks=ranks)
        seconds.append(time.perf_counter() - started)
    found = {"deal": float(np.median(seconds))}
    dealt = lengths[np.array(plan.order)].reshape(ranks, MINI_BATCHES, ROWS)
    gathered = lengths.reshape(MINI_BATCHES, ranks, ROWS // GROUP, GROUP)

    def slowest(cost: Any, parts: np.ndarray, axis: int) -> np.ndarray:
        return cost(parts).sum(-1).max(axis)

    # The first mini-batch needs no measuring pass.
    found["exact"] = float(slowest(train, dealt, 0).sum() + slowest(measure, dealt, 0)[1:].sum())
    found["padding removed"] = float(slowest(train, gathered, 1).sum())
    found["published"] = float(train(maximum) * ROWS * MINI_BATCHES)
    slots = {"exact": slowest(lambda n: n, dealt, 0).sum(), "published": maximum * ROWS * MINI_BATCHES}
    slots["padding removed"] = slowest(lambda n: n, gathered, 1).sum()
    return found | {f"wasted by {name}": float(1 - lengths.sum() / ranks / n) for name, n in slots.items()}


def simulated(bench: Bench, args: Any) -> tuple[dict[str, Figure], dict]:
    """Simulate the schedules on many ranks by costs measured on this one."""
    train, measure, errors = costs(bench, args)
    recorded = json.loads(RECORDED.read_text())
    proportions = Cost(train.token, train.token / 24576), Cost(measure.token, measure.token / 24576)
    cases = {
        "arithmetic": (np.array(recorded["lengths"]), recorded["maximum"], train, measure),
        "8k": (skewed_lengths(65536, 8192).reshape(-1, GROUP), 8192, train, measure),
    }
    cases["8k, a 7B model's attention"] = (*cases["8k"][:2], *proportions)
    figures = {}
    for name, case in cases.items():
        for ranks in RANKS:
            found = simulate(*case[:2], ranks, *case[2:])
            for key, value in found.items():
                wasted = key.startswith("wasted")
                figure = Figure(
                    100 * value if wasted else value,
                    "%" if wasted else "s",
                    better="lower" if "exact" in key or key == "deal" else "neither",
                )
                figures[f"{name}: {key}, {ranks} ranks"] = figure
            ratio = found["published"] / found["exact"]
            figures[f"{name}: published / exact, {ranks} ranks"] = Figure(ratio, better="higher")
    return figures, {
        "arithmetic": f"{sum(map(len, recorded['lengths']))} responses of a run",
        "8k": "log-normal, cut at 8192, mean 40 %",
        "prompts": "left out",
        "us per token, trained and measured": [round(1e6 * c.token, 2) for c in (train, measure)],
        "ns per token squared": [round(1e9 * c.square, 3) for c in (train, measure)],
        "us per sequence": [round(1e6 * c.sequence, 1) for c in (train, measure)],
        "error of the fit": errors,
    }


if __name__ == "__main__":
    main()
