"""The loss of a training micro-batch against verl's vanilla PPO loss: time and peak extra memory.

python benchmarks/loss.py [--rows 256] [--tokens 8192] [--device cpu] [--threads 1] [--repeats 9]

Forward and backward to the log-probabilities, float32, skewed lengths:

- function: `micro_batch_loss` against `compute_policy_loss_vanilla`, on padded (rows, tokens);
- contract: `MiniBatchLoss` against verl's `ppo_loss`, which call these, on jagged rows as verl's engines give them.

A time is the median ratio of steps that took turns. Extra memory is the most that a step holds at one time beyond its
inputs, the gradient included.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from record import Figure, record
from tensordict import NonTensorData, TensorDict
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from recipe.disco.loss import micro_batch_loss
from recipe.disco.scores import SCORES
from recipe.disco.update import UpdatePlan
from recipe.disco.worker import WEIGHT, MiniBatchLoss
from verl_ext.training.skipping import FILLER

PROMPT = 64
"""Tokens of each prompt."""


class Case(NamedTuple):
    """What a micro-batch's loss has to do."""

    coefficient: float = 0.0
    kl_estimator: str = "k1"
    corrected: bool = False
    logs_kl: bool = False


CASES = {
    "KL <= delta": Case(),
    "KL > delta, k1": Case(0.5),
    "KL > delta, k3": Case(0.5, "k3"),
    "KL > delta, k3, rollout correction": Case(0.5, "k3", corrected=True),
    "first mini-batch, logs k1": Case(logs_kl=True),
    "first mini-batch, logs k3": Case(kl_estimator="k3", logs_kl=True),
}
SCORE_NAMES = ("log_l", "l_ratio")

Step = Callable[[], object]


def make_rows(rows: int, tokens: int, device: str) -> dict[str, Tensor]:
    """A micro-batch's inputs, (rows, tokens), the longest response full, and ``lengths`` and ``weight`` (rows,)."""
    g = torch.Generator().manual_seed(0)
    # A mean of 40 % of the maximum
    lengths = (tokens * torch.rand(rows, generator=g) ** 1.5).long().clamp(min=1)
    lengths[0] = tokens
    old = -torch.empty(rows, tokens).exponential_(generator=g)
    found = {
        "lengths": lengths,
        "mask": torch.arange(tokens) < lengths[:, None],
        "old": old,
        "log_prob": old + 0.1 * torch.randn(rows, tokens, generator=g),
        "advantages": torch.randn(rows, 1, generator=g).expand(rows, tokens).contiguous(),
        "rho": torch.rand(rows, tokens, generator=g),
        "weight": torch.randn(rows, generator=g) / rows,
    }
    return {name: x.to(device) for name, x in found.items()}


def actor(tokens: int, rows: int) -> ActorConfig:
    """verl's settings of the loss, as its ``ppo_loss`` completes them."""
    config = ActorConfig(strategy="fsdp", rollout_n=8, use_dynamic_bsz=True)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=tokens, global_batch_size=rows)
    return config


def backward_of(loss: Callable[[], Tensor], leaf: Tensor) -> Step:
    """Both passes, which leave nothing behind."""

    def step() -> None:
        loss().backward()
        leaf.grad = None

    return step


def function_steps(x: dict[str, Tensor], case: Case) -> dict[str, Step]:
    """A step with each loss function on padded rows, vanilla first."""
    leaf, tokens = x["log_prob"].clone().requires_grad_(), int(x["lengths"].sum())
    config, rho = actor(tokens, len(leaf)), x["rho"] if case.corrected else None

    def vanilla() -> Tensor:
        rows = (x["old"], leaf, x["advantages"], x["mask"])
        return compute_policy_loss_vanilla(*rows, config=config, rollout_is_weights=rho)[0]

    def disco(name: str) -> Callable[[], Tensor]:
        score, rows = SCORES.build(name, {}), (leaf, x["old"], x["mask"], x["weight"])
        options: dict[str, Any] = dict(score=score, kl_estimator=case.kl_estimator, rollout_is_weights=rho)
        return lambda: micro_batch_loss(*rows, case.coefficient, tokens, **options)

    losses = {"vanilla": vanilla} | {name: disco(name) for name in SCORE_NAMES}
    return {name: backward_of(loss, leaf) for name, loss in losses.items()}


def contract_steps(x: dict[str, Tensor], case: Case) -> dict[str, Step]:
    """A step with each loss as verl's engines call it, on jagged rows, vanilla first."""
    lengths, device = x["lengths"].tolist(), x["old"].device
    tokens, rows = sum(lengths), len(lengths)

    def jagged(padded: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor(
            [row[:n] for row, n in zip(padded, lengths, strict=True)], layout=torch.jagged
        )

    ids = torch.zeros(rows, x["old"].shape[1] + PROMPT, dtype=torch.long, device=device)
    columns = {
        "prompts": torch.nested.as_nested_tensor([row[:PROMPT] for row in ids], layout=torch.jagged),
        "responses": jagged(ids),
        "response_mask": jagged(x["mask"].long()),
        "old_log_probs": jagged(x["old"]),
        "advantages": jagged(x["advantages"]),
        "sample_index": torch.arange(rows, device=device),
        WEIGHT: x["weight"],
        FILLER: torch.zeros(rows, dtype=torch.bool, device=device),
        **({"rollout_is_weights": jagged(x["rho"])} if case.corrected else {}),
        "dp_size": NonTensorData(1),
        "batch_num_tokens": NonTensorData(tokens),
        "global_batch_size": NonTensorData(rows),
    }
    data = TensorDict(columns, batch_size=rows)
    # The model's outputs for prompts and responses: those of a response begin at the prompt's last token.
    prompt, last = torch.zeros(PROMPT - 1, device=device), torch.zeros(1, device=device)
    outputs = [torch.cat([prompt, row[:n], last]) for row, n in zip(x["log_prob"], lengths, strict=True)]
    leaf = torch.cat(outputs).requires_grad_()
    config = actor(tokens, rows)
    plan = UpdatePlan(
        loss=torch.zeros(()),
        weight=x["weight"],
        positive=x["weight"] > 0,
        coefficient=case.coefficient,
        tokens=tokens,
        kl=0.0,
        needs_gradient=x["weight"] != 0,
        metrics={},
    )

    def disco(name: str) -> Callable[[], Tensor]:
        score = SCORES.build(name, {})

        def loss() -> Tensor:
            of_batch = MiniBatchLoss(score, case.kl_estimator, plan, 0.0, [] if case.logs_kl else None)
            return of_batch({"log_probs": leaf}, data)[0]

        return loss

    losses = {"vanilla": lambda: ppo_loss(config, {"log_probs": leaf}, data)[0]}
    losses |= {name: disco(name) for name in SCORE_NAMES}
    return {name: backward_of(loss, leaf) for name, loss in losses.items()}


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """The most that a step holds at one time beyond what there was before it, in bytes, as allocated."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def seconds(step: Step, device: str) -> float:
    started = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(steps: dict[str, Step], device: str, repeats: int) -> dict[str, tuple[list[float], int]]:
    """Seconds, and peak extra bytes, of each step; the steps take turns."""
    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            spent = seconds(step, device)
            if turn:
                times[name].append(spent)
    return {name: (times[name], peaks[name]) for name in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192, help="of the longest response")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = make_rows(args.rows, args.tokens, args.device)
    figures = {}
    for what, build in (("function", function_steps), ("contract", contract_steps)):
        for label, case in CASES.items():
            if case.logs_kl and what == "function":
                continue
            found = compare(build(x, case), args.device, args.repeats)
            vanilla, most = found.pop("vanilla")
            if case == Case():
                figures[f"{what}: verl's vanilla, time"] = Figure.of(vanilla, "s", better="neither")
                figures[f"{what}: verl's vanilla, extra memory"] = Figure(most / 2**20, "MiB", better="neither")
            for name, (times, peak) in found.items():
                ratios = [ours / theirs for ours, theirs in zip(times, vanilla, strict=True)]
                figures[f"{what}: {name}, {label}, time"] = Figure.of(ratios, target=1.0)
                memory = peak / most
                figures[f"{what}: {name}, {label}, extra memory"] = Figure(memory, low=memory, high=memory, target=1.0)
    record("loss", figures, settings=vars(args))


if __name__ == "__main__":
    main()
