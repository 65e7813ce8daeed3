"""Sampling settings of a request, and the draw of one token per row of a batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

NEUTRAL = {"n": 1, "stop": None, "min_p": 0, "min_tokens": 0, "presence_penalty": 0, "frequency_penalty": 0}
"""Sampling parameters that this rollout does not support, with the only value that it accepts."""

LOGPROBS_MODES = ("processed_logprobs", "raw_logprobs")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings under the names that verl and vLLM use."""

    max_tokens: int
    """Response tokens, at most."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 or 0 is off."""
    repetition_penalty: float = 1.0
    """Over the prompt's and the response's tokens."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the response, besides the end-of-sequence tokens; part of the response."""
    logprobs: bool = False
    seed: int | None = None
    """With a seed, the response depends on the seed, the prompt and the weights only."""

    def __post_init__(self):
        for name, holds, right in (
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= -1, "-1 (off) or >= 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "> 0"),
        ):
            if not holds:
                raise ValueError(f"sampling parameter {name}={getattr(self, name)} must be {right}")

    @classmethod
    def parse(cls, params: dict[str, Any], **defaults: Any) -> "SamplingParams":
        """Parse the dict that a client sends, over ``defaults``; a value of None counts as not given.

        Raises:
            ValueError: a parameter is unknown, or unsupported and not at its neutral value.
        """
        known = {f.name for f in fields(cls)}
        given = {name: value for name, value in params.items() if value is not None}
        for name in given.keys() - known:
            if name not in NEUTRAL:
                raise ValueError(f"rollout.name=hf has no sampling parameter {name}; it has {sorted(known)}")
            if given.pop(name) not in (NEUTRAL[name], []):
                raise ValueError(
                    f"rollout.name=hf does not support {name}={params[name]}, only {name}={NEUTRAL[name]}"
                    + (" (the number of responses is rollout.n)" if name == "n" else "")
                )
        # vLLM's 0: the sampled token's log-probability only, which is what this rollout returns.
        if "logprobs" in given:
            given["logprobs"] = given["logprobs"] is not False
        given["stop_token_ids"] = tuple(given.get("stop_token_ids", ()))
        return cls(**{**defaults, **given})


def uniforms(key: tuple, count: int) -> np.ndarray:
    """Draw ``count`` numbers in [0, 1) that depend on ``key`` (numbers, strings and tuples of them) only."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


class Sampler:
    """Draw the next tokens of a batch.

    ``processed_logprobs`` (the default, as in verl's vLLM rollout) are those of the distribution that the token was
    drawn from: the logits after repetition penalty, temperature, top-k and top-p. Without filters, as in training, that
    is the log-softmax of logits / temperature, the actor's old_log_probs. ``raw_logprobs`` are those of the unchanged
    logits. Greedy rows count as temperature 1.

    Args:
        params: settings of each row.
        vocab_size: tokens from here on are padding of the embedding and never drawn.
        logprobs_mode: one of ``LOGPROBS_MODES``.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        vocab_size: int,
        logprobs_mode: str = "processed_logprobs",
        device: torch.device | str = "cpu",
    ):
        def column(name: str, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=device)[:, None]

        temperature = column("temperature", torch.float32)
        self.greedy = temperature == 0
        self.temperature = torch.where(self.greedy, 1.0, temperature)
        self.top_k = column("top_k", torch.long)
        self.top_p = column("top_p", torch.float32)
        self.penalty = column("repetition_penalty", torch.float32)
        self.vocab_size = vocab_size
        self.raw = logprobs_mode == "raw_logprobs"
        # Checked once, so that the common case skips the filters.
        self._any_greedy = bool(self.greedy.any())
        self._unit_temperature = bool((self.temperature == 1).all())
        self._top_k = bool((self.top_k > 0).any())
        self._top_p = bool((self.top_p < 1).any())
        self.penalised = bool((self.penalty != 1).any())

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows (int64 indices) only."""
        for name in ("greedy", "temperature", "top_k", "top_p", "penalty"):
            setattr(self, name, getattr(self, name)[rows])

    def __call__(
        self, logits: torch.Tensor, uniform: torch.Tensor, seen: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a token per row.

        Args:
            logits: (rows, vocabulary), any float dtype.
            uniform: (rows,) float64 in [0, 1); the token at which the cumulative probability exceeds it is drawn.
            seen: (rows, vocabulary) bool, tokens of prompt and response; needed if ``penalised``.

        Returns:
            tokens (rows,) int64 and their log-probabilities (rows,) float32.
        """
        logits = logits.float()
        if self.vocab_size < logits.shape[-1]:
            padding = torch.arange(self.vocab_size, logits.shape[-1], device=logits.device)
            logits = logits.index_fill(-1, padding, -torch.inf)
        raw = logits
        if self.penalised:
            logits = torch.where(seen, torch.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)
        if not self._unit_temperature:
            logits = logits / self.temperature
        if self._top_k or self._top_p:
            logits = self._filter(logits)
        logp = logits.log_softmax(-1)
        # float64: the error of a float32 sum over 150 thousand tokens is larger than many of their probabilities.
        cumulative = logp.exp().cumsum(-1, dtype=torch.float64)
        # right=True: a token of probability 0 is never drawn.
        token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        if self._any_greedy:
            token = torch.where(self.greedy, logits.argmax(-1, keepdim=True), token)
        return token.squeeze(-1), (raw.log_softmax(-1) if self.raw else logp).gather(-1, token).squeeze(-1)

    def _filter(self, logits: torch.Tensor) -> torch.Tensor:
        """Keep the top-k tokens, then the smallest set of the most probable ones that reaches top-p (at least one)."""
        ordered, index = logits.sort(-1, descending=True)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        ordered = ordered.masked_fill((self.top_k > 0) & (rank >= self.top_k), -torch.inf)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p
        ordered = ordered.masked_fill((self.top_p < 1) & (before >= self.top_p), -torch.inf)
        return torch.empty_like(logits).scatter_(-1, index, ordered)
