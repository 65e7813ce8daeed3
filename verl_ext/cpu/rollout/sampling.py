"""Sampling settings of a request, and the draw of one token per row of a batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

NEUTRAL = {"n": 1, "stop": None, "min_p": 0, "min_tokens": 0, "presence_penalty": 0, "frequency_penalty": 0}
"""Sampling parameters that this rollout does not support, with the only value that it accepts."""

LOGPROBS_MODES = ("processed_logprobs", "raw_logprobs")

LEAST, MOST = 1e-20, 1e20
"""Bounds of what logits are multiplied or divided by: float32 holds the results, of any logits that a model gives."""


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
        for name, kind, holds, right in (
            ("max_tokens", Integral, lambda x: x >= 1, "a whole number >= 1"),
            ("temperature", Real, lambda x: x == 0 or LEAST <= x <= MOST, f"0 (greedy) or from {LEAST} to {MOST}"),
            ("top_p", Real, lambda x: 0 < x <= 1, "in (0, 1]"),
            ("top_k", Integral, lambda x: -1 <= x < 2**63, "-1 (off) or a whole number >= 1"),
            ("repetition_penalty", Real, lambda x: LEAST <= x <= MOST, f"from {LEAST} to {MOST}"),
            ("ignore_eos", bool, lambda x: True, "true or false"),
            ("stop_token_ids", tuple, lambda x: all(_is(token, Integral) for token in x), "a list of tokens' numbers"),
            ("seed", Integral | None, lambda x: True, "a whole number, or null"),
        ):
            value = getattr(self, name)
            if not (_is(value, kind) and holds(value)):
                raise ValueError(f"sampling parameter {name}={value!r} must be {right}")

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
        if isinstance(stop := given.get("stop_token_ids"), Sequence) and not isinstance(stop, str):
            given["stop_token_ids"] = tuple(stop)
        return cls(**{**defaults, **given})


def _is(value: Any, kind: Any) -> bool:
    """Tell whether a value is of this kind, where true and false are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


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

        Raises:
            ValueError: a row's logits are no numbers, or none of its tokens is possible.
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
        if (broken := ~cumulative[:, -1].isfinite()).any():
            raise ValueError(
                f"the logits of {int(broken.sum())} of {len(broken)} rows give no probabilities (NaN or infinite): the "
                "model's weights have diverged"
            )
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
        # float32 has no top_p below 1e-45: it is 0 there.
        beyond = (self.top_p < 1) & (before >= self.top_p) & (rank > 0)
        ordered = ordered.masked_fill(beyond, -torch.inf)
        return torch.empty_like(logits).scatter_(-1, index, ordered)
