"""Pre-train the toy model, half a minute on a CPU: on correct solutions, and in the end on careless ones.

The model can then work a chain out, but mostly guesses, and slips when it does not. Reinforcement learning has to find
out which habit pays.
"""

import math
import random
import time
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from verl_ext.tasks.arithmetic.task import LEVELS, draw_many

BATCH, LEARNING_RATE, WARM_UP = 32, 1e-2, 50
CARELESS = 0.2
"""Share of the iterations, the last ones, on careless solutions."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for weight matrices: momentum, orthogonalised by Newton-Schulz steps.

    A tiny model learns in far fewer steps than with AdamW. torch's own Muon uses bfloat16, which is slow on a CPU.
    Updates are scaled to the size of AdamW's (0.2 sqrt(max side)), so that one learning rate serves both.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[tuple, list[tuple[Tensor, Tensor, bool]]] = {}
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update, tall = p.grad.lerp(average, group["momentum"]), p.size(0) > p.size(1)
                update = update.T if tall else update
                alike.setdefault(tuple(update.shape), []).append((p, update, tall))
            for shape, entries in alike.items():
                x = torch.stack([u for _, u, _ in entries])
                x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
                for (p, _, tall), u in zip(entries, x, strict=True):
                    p.add_(u.T if tall else u, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def encode(tokenizer: PreTrainedTokenizerFast, question: str, response: str) -> tuple[list[int], list[int]]:
    """Return the token ids of prompt and response, as in verl's rollout."""
    message = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
    return prompt, tokenizer.encode(response) + [tokenizer.eos_token_id]


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """Return right-padded ids (B, T), and labels: the next token where that is of the response, -100 elsewhere."""
    width = max(len(p) + len(r) for p, r in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    for i, (p, r) in enumerate(rows):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        labels[i, len(p) - 1 : len(p) + len(r) - 1] = torch.tensor(r)
    return ids, labels


def pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    iterations: int,
    seed: int,
    exclude: Collection[str] = (),
) -> list[float]:
    """Train ``model`` in place on random questions that are not in ``exclude``; return the losses in nats per token."""
    rng = random.Random(seed)

    def draw(careless: bool) -> list[tuple[str, str]]:
        questions = draw_many(rng, rng.choices(LEVELS, k=BATCH), exclude)
        return [(q.text, q.careless_solution(rng) if careless else q.solution) for q in questions]

    return fit(model, tokenizer, iterations, draw)


def fit(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    iterations: int,
    draw: Callable[[bool], list[tuple[str, str]]],
) -> list[float]:
    """Train ``model`` in place on any task; return the losses in nats per token.

    Args:
        draw: makes a batch of questions with responses; its argument asks for careless responses.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [Muon(matrices, LEARNING_RATE), torch.optim.AdamW(others, LEARNING_RATE, (0.9, 0.98))]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1.0, (i + 1) / WARM_UP) * (1 - 0.95 * i / iterations))
        for o in optimizers
    ]
    losses, started, pad = [], time.monotonic(), tokenizer.pad_token_id
    model.train()
    for i in range(iterations):
        rows = draw(i >= (1 - CARELESS) * iterations)
        encoded = sorted((encode(tokenizer, *row) for row in rows), key=lambda e: len(e[0]) + len(e[1]))
        asked = sum(len(response) for _, response in encoded)
        model.zero_grad()
        losses.append(0.0)
        # The short half and the long half: a batch of all levels in one gradient, with little padding.
        for half in (encoded[: len(rows) // 2], encoded[len(rows) // 2 :]):
            ids, labels = collate(half, pad)
            hidden = model.model(input_ids=ids).last_hidden_state
            logits = model.lm_head(hidden[labels >= 0])
            loss = torch.nn.functional.cross_entropy(logits, labels[labels >= 0], reduction="sum") / asked
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in (*optimizers, *schedules):
            step.step()
        if (i + 1) % 25 == 0 or i + 1 == iterations:
            mean = sum(losses[-25:]) / len(losses[-25:])
            print(f"pre-training {i + 1}/{iterations}: loss {mean:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    model.eval()
    return losses
