"""Sampling settings of a request, and the draw of one token for each row of a batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

NEUTRAL = {"n": 1, "stop": None, "min_p": 0, "min_tokens": 0, "presence_penalty": 0, "frequency_penalty": 0}
"""Settings that this rollout has not, with the value that asks for nothing."""

LOGPROBS_MODES = ("processed_logprobs", "raw_logprobs")


@dataclass(frozen=True)
class SamplingParams:
    """What verl asks for, under the names that verl (and vLLM) use."""

    max_tokens: int
    """Upper limit of response tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 or 0 is off."""
    repetition_penalty: float = 1.0
    """Over the prompt's and the response's tokens."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the response besides the end-of-sequence tokens; the last token of the response then."""
    logprobs: bool = False
    seed: int | None = None
    """With a seed the response depends on nothing but the seed, the prompt and the weights."""

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
        """From the dict that a client sends, over ``defaults``; a value of None counts as not given.

        Raises:
            ValueError: names a parameter that is unknown, or of which only the neutral value is possible.
        """
        known = {f.name for f in fields(cls)}
        given = {name: value for name, value in params.items() if value is not None}
        for name in given.keys() - known:
            if name not in NEUTRAL:
                raise ValueError(f"rollout.name=hf has no sampling parameter {name}; it has {sorted(known)}")
            if given.pop(name) not in (NEUTRAL[name], []):
                raise ValueError(
                    f"rollout.name=hf has no {name}={params[name]}, only {name}={NEUTRAL[name]}"
                    + (" (the number of responses is rollout.n)" if name == "n" else "")
                )
        # 0 asks vLLM for the sampled token's log-probability and no others: that is all there is here.
        if "logprobs" in given:
            given["logprobs"] = given["logprobs"] is not False
        given["stop_token_ids"] = tuple(given.get("stop_token_ids", ()))
        return cls(**{**defaults, **given})


def uniforms(key: tuple, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1) that are a function of ``key`` (numbers, strings and tuples of them) alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


class Sampler:
    """Draws the next tokens of a batch.

    Log-probabilities are by default (``processed_logprobs``, as verl's vLLM rollout has them) those of the distribution
    that the token was drawn from: of logits after repetition penalty, temperature, top-k and top-p. Without filters, as
    verl trains, that is the log-softmax of logits / temperature: the actor's old_log_probs. ``raw_logprobs`` are of the
    bare logits. Greedy rows count as temperature 1.

    Args:
        params: settings, one a row.
        vocab_size: tokens from here on are padding of the embedding, and never drawn.
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
        # Settled once, and so that the common case pays for nothing.
        self._any_greedy = bool(self.greedy.any())
        self._unit_temperature = bool((self.temperature == 1).all())
        self._top_k = bool((self.top_k > 0).any())
        self._top_p = bool((self.top_p < 1).any())
        self.penalised = bool((self.penalty != 1).any())

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows (int64 indices)."""
        for name in ("greedy", "temperature", "top_k", "top_p", "penalty"):
            setattr(self, name, getattr(self, name)[rows])

    def __call__(
        self, logits: torch.Tensor, uniform: torch.Tensor, seen: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a token for each row.

        Args:
            logits: (rows, vocabulary), any float dtype.
            uniform: (rows,) float64 in [0, 1); the token is where the cumulative probability passes it.
            seen: (rows, vocabulary) bool, tokens of prompt and response; needed where ``penalised``.

        Returns:
            tokens (rows,) int64 and their log-probabilities (rows,) float32.
        """
        logits = logits.float()
        if self.vocab_size < logits.shape[-1]:
            logits = logits.index_fill(
                -1, torch.arange(self.vocab_size, logits.shape[-1], device=logits.device), -torch.inf
            )
        bare = logits
        if self.penalised:
            logits = torch.where(seen, torch.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)
        if not self._unit_temperature:
            logits = logits / self.temperature
        if self._top_k or self._top_p:
            logits = self._filter(logits)
        logp = logits.log_softmax(-1)
        # float64: a float32 sum over a vocabulary of 150 thousand is off by more than many probabilities are large.
        cumulative = logp.exp().cumsum(-1, dtype=torch.float64)
        # `right`: past the value, so that a token of probability 0 is never drawn.
        token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        if self._any_greedy:
            token = torch.where(self.greedy, logits.argmax(-1, keepdim=True), token)
        return token.squeeze(-1), (bare.log_softmax(-1) if self.raw else logp).gather(-1, token).squeeze(-1)

    def _filter(self, logits: torch.Tensor) -> torch.Tensor:
        """Top-k, then the smallest set of the most probable tokens that reaches top-p (at least one)."""
        ordered, index = logits.sort(-1, descending=True)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        ordered = ordered.masked_fill((self.top_k > 0) & (rank >= self.top_k), -torch.inf)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p
        ordered = ordered.masked_fill((self.top_p < 1) & (before >= self.top_p), -torch.inf)
        return torch.empty_like(logits).scatter_(-1, index, ordered)
