"""Decode one batch by a transformers model with a KV cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from verl_ext.cpu.rollout.sampling import Sampler, SamplingParams, uniforms


@dataclass
class Request:
    """A prompt of at least one token, sampling settings, and the key that determines its random numbers."""

    prompt_ids: list[int]
    params: SamplingParams
    key: tuple


@dataclass
class Response:
    token_ids: list[int]
    """Include the token that ended the response, if one did."""
    log_probs: list[float]
    aborted: bool = False
    """``should_stop`` ended it."""


@torch.inference_mode()
def generate(
    model: torch.nn.Module,
    requests: Sequence[Request],
    *,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    logprobs_mode: str = "processed_logprobs",
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Response]:
    """Decode all requests in one batch, each with its own settings and random numbers.

    Up to floating point, a response depends on its request and the weights only, not on the other requests.
    Equal prompts are read once. Finished rows leave the batch when they are half of it.
    """
    if not requests:
        return []
    device = next(model.parameters()).device
    total = len(requests)
    limit = max(r.params.max_tokens for r in requests)

    # 1. Read the distinct prompts, left-padded. Then the cache gets one row per request.
    prompts: dict[tuple, int] = {}
    owner = [prompts.setdefault(tuple(r.prompt_ids), len(prompts)) for r in requests]
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros((len(prompts), width + limit), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1  # the response's positions too
    ids, mask, owner = ids.to(device), mask.to(device), torch.tensor(owner, device=device)
    length = mask[:, :width].sum(-1)
    cache = DynamicCache(config=model.config)

    def forward(tokens: torch.Tensor, positions: torch.Tensor, until: int) -> torch.Tensor:
        return model(
            input_ids=tokens,
            attention_mask=mask[:, :until] if padded else None,  # no mask is faster
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    padded = bool((length < width).any())
    logits = forward(ids, (mask[:, :width].cumsum(-1) - 1).clamp(min=0), width)[owner]
    if len(prompts) < total:
        cache.batch_select_indices(owner)
    ids, mask, length = ids[owner], mask[owner], length[owner]

    # 2. Decode.
    sampler = Sampler([r.params for r in requests], vocab_size, logprobs_mode, device)
    random = torch.from_numpy(np.stack([uniforms(r.key, limit) for r in requests])).to(device)
    budget = torch.tensor([r.params.max_tokens for r in requests], device=device)
    enders = _enders(requests, eos_token_ids).to(device)
    seen = None
    if sampler.penalised:
        seen = torch.zeros((total, logits.shape[-1] + 1), dtype=torch.bool, device=device)
        seen = seen.scatter_(-1, ids.masked_fill(mask[:, :width] == 0, logits.shape[-1]), True)[:, :-1]
    tokens = torch.zeros((total, limit), dtype=torch.long, device=device)
    log_probs = torch.zeros((total, limit), device=device)
    lengths = torch.full((total,), limit, device=device)
    rows = torch.arange(total, device=device)
    running = torch.ones(total, dtype=torch.bool, device=device)
    aborted = False

    for step in range(limit):
        token, log_prob = sampler(logits, random[rows, step], seen)
        tokens[rows, step], log_probs[rows, step] = token, log_prob
        ended = running & ((enders[rows] == token[:, None]).any(-1) | (budget[rows] == step + 1))
        lengths[rows[ended]] = step + 1
        running &= ~ended
        left = int(running.sum())
        if left == 0:
            break
        if aborted := should_stop():
            lengths[rows[running]] = step + 1
            break
        if left <= len(rows) // 2:
            keep = running.nonzero().squeeze(-1)
            rows, token, mask, length, running = rows[keep], token[keep], mask[keep], length[keep], running[keep]
            seen = None if seen is None else seen[keep]
            sampler.select(keep)
            cache.batch_select_indices(keep)
            padded = bool((length < width).any())
        if seen is not None:
            seen.scatter_(-1, token[:, None], True)
        logits = forward(token[:, None], (length + step)[:, None], width + step + 1)

    unfinished = set(rows[running].tolist()) if aborted else set()
    tokens, log_probs = tokens.tolist(), log_probs.tolist()
    return [Response(tokens[i][:n], log_probs[i][:n], aborted=i in unfinished) for i, n in enumerate(lengths.tolist())]


def _enders(requests: Sequence[Request], eos_token_ids: Sequence[int]) -> torch.Tensor:
    """List the tokens that end each response: (requests, tokens) int64, padded with -1."""
    rows = [[*r.params.stop_token_ids, *(() if r.params.ignore_eos else eos_token_ids)] for r in requests]
    most = max(map(len, rows))
    return torch.tensor([row + [-1] * (most - len(row)) for row in rows], dtype=torch.long).view(len(rows), most)
