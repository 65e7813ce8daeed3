"""The reference that the rollout is held against: one request, no cache, no padding."""

import torch

from verl_ext.cpu.rollout.generate import Request
from verl_ext.cpu.rollout.sampling import Sampler, uniforms

VOCABULARY = 23
"""Tokens of conftest.py's model."""

EOS = [1, 2]


@torch.no_grad()
def plain(model: torch.nn.Module, request: Request) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities; the whole sequence goes through the model for every token."""
    ids, log_probs = list(request.prompt_ids), []
    sampler = Sampler([request.params], VOCABULARY)
    for u in torch.from_numpy(uniforms(request.key, request.params.max_tokens)):
        seen = torch.zeros(1, VOCABULARY, dtype=torch.bool)
        seen[0, ids] = True
        token, log_prob = sampler(model(torch.tensor([ids])).logits[:, -1], u[None], seen)
        ids.append(int(token))
        log_probs.append(float(log_prob))
        if ids[-1] in request.params.stop_token_ids or (ids[-1] in EOS and not request.params.ignore_eos):
            break
    return ids[len(request.prompt_ids) :], log_probs
