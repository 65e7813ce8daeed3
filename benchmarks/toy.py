"""A toy model of the arithmetic or countdown task in one process: sampling, grading, log-probabilities, DisCO's steps.

No Ray and no engine, so that a gradient or a KL can be looked at. The functions that are measured are the project's.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from recipe.disco import disco_loss
from verl_ext.cpu.rollout.generate import Request, generate
from verl_ext.cpu.rollout.sampling import SamplingParams
from verl_ext.tasks.arithmetic.pretrain import encode
from verl_ext.tasks.arithmetic.reward import compute_score as grade_arithmetic
from verl_ext.tasks.countdown.reward import compute_score as grade_countdown

AT_ONCE = 1024
"""Responses that are decoded, or read, in one batch."""


@dataclass
class Toy:
    """A task's model and questions.

    Attributes:
        folder: as :func:`verl_ext.tasks.assets.build` leaves it.
        limit: tokens of a response, at most.
    """

    folder: Path
    limit: int
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path) -> "Toy":
        """Load a task's folder; its questions say which task it is."""
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        toy = cls(folder, 0, model, tokenizer)
        # As in the tasks' settings
        toy.limit = 80 if toy.is_countdown(toy.questions("test")[0]) else 32
        return toy

    def questions(self, split: str) -> list[dict[str, Any]]:
        """Read the rows of a split."""
        return pd.read_parquet(self.folder / f"{split}.parquet").to_dict("records")

    @staticmethod
    def is_countdown(question: dict[str, Any]) -> bool:
        return question["data_source"].startswith("size")

    def grade(self, question: dict[str, Any], text: str) -> float:
        """Grade a response by the task's own reward."""
        truth = question["reward_model"]["ground_truth"]
        if not self.is_countdown(question):
            return grade_arithmetic(question["data_source"], text, truth)["score"]
        truth = {"numbers": [int(n) for n in truth["numbers"]], "target": int(truth["target"])}
        return grade_countdown(question["data_source"], text, truth, style="bare")["score"]


@dataclass
class Batch:
    """Sampled responses, right-padded.

    Attributes:
        ids: (B, T) prompt and response.
        mask: (B, T - 1) the places whose next token is of the response.
        reward: (B,).
        question: (B,) numbers, equal for the responses to one question.
    """

    ids: Tensor
    mask: Tensor
    reward: Tensor
    question: Tensor

    def rows(self, index: Tensor | slice) -> "Batch":
        """Take some rows."""
        return Batch(self.ids[index], self.mask[index], self.reward[index], self.question[index])


def sample(toy: Toy, questions: Sequence[dict[str, Any]], n: int, seed: int) -> Batch:
    """Sample ``n`` responses to each question at temperature 1, and grade them."""
    prompts = [encode(toy.tokenizer, q["prompt"][0]["content"], "")[0] for q in questions]
    requests = [
        Request(p, SamplingParams(max_tokens=toy.limit), (seed, i, k)) for i, p in enumerate(prompts) for k in range(n)
    ]
    responses = []
    for start in range(0, len(requests), AT_ONCE):
        part = requests[start : start + AT_ONCE]
        eos = [toy.tokenizer.eos_token_id]
        responses += generate(toy.model, part, eos_token_ids=eos, vocab_size=len(toy.tokenizer))
    width = max(len(r.prompt_ids) + len(o.token_ids) for r, o in zip(requests, responses, strict=True))
    ids = torch.full((len(requests), width), toy.tokenizer.pad_token_id)
    mask = torch.zeros(len(requests), width - 1, dtype=torch.bool)
    for i, (r, o) in enumerate(zip(requests, responses, strict=True)):
        start, end = len(r.prompt_ids), len(r.prompt_ids) + len(o.token_ids)
        ids[i, :end] = torch.tensor(r.prompt_ids + o.token_ids)
        mask[i, start - 1 : end - 1] = True
    texts = [toy.tokenizer.decode(o.token_ids, skip_special_tokens=True) for o in responses]
    reward = torch.tensor([toy.grade(questions[i // n], text) for i, text in enumerate(texts)])
    return Batch(ids, mask, reward, torch.arange(len(questions)).repeat_interleave(n))


def log_probs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Compute log pi of the next token at every place, (B, T - 1)."""
    # Causal attention: padding on the right is not seen.
    logits = model(input_ids=batch.ids[:, :-1]).logits.float()
    return logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None]).squeeze(-1)


@torch.no_grad()
def old_log_probs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Compute the same without a graph, in parts."""
    starts = range(0, len(batch.ids), AT_ONCE)
    return torch.cat([log_probs(model, batch.rows(slice(s, s + AT_ONCE))) for s in starts])


def gradient(model: PreTrainedModel, loss: Tensor) -> Tensor:
    """Compute the gradient by all parameters, as one vector."""
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


@dataclass
class MiniBatch:
    """Of a run: the responses, log pi_old and the exact gradient at the policy before the update.

    Attributes:
        step: of the run, from 1.
        number: of the mini-batch within the step, from 0: the policy has made as many updates since the rollout.
    """

    step: int
    number: int
    batch: Batch
    old: Tensor
    exact: Tensor
    metrics: dict[str, float]


def train(
    toy: Toy,
    steps: int,
    *,
    lr: float,
    seed: int = 1,
    batch_size: int = 32,
    n: int = 8,
    mini_batches: int = 4,
    **loss: Any,
) -> Iterator[MiniBatch]:
    """Train the toy's model by DisCO as a run does; yield each mini-batch before its update.

    Args:
        batch_size: questions per step.
        mini_batches: per step, each an optimizer step.
        loss: arguments of :func:`recipe.disco.disco_loss`.
    """
    # As verl's defaults
    optimizer = torch.optim.AdamW(toy.model.parameters(), lr, betas=(0.9, 0.999), weight_decay=0.01)
    rng, pool = random.Random(seed), toy.questions("train")
    for step in range(1, steps + 1):
        whole = sample(toy, rng.sample(pool, batch_size), n, hash((seed, step)))
        old = old_log_probs(toy.model, whole)
        rows = len(old) // mini_batches
        for number in range(mini_batches):
            part = slice(number * rows, (number + 1) * rows)
            batch = whole.rows(part)
            value, metrics = disco_loss(
                log_probs(toy.model, batch), old[part], batch.mask, batch.reward, batch.question, **loss
            )
            exact = gradient(toy.model, value)
            yield MiniBatch(step, number, batch, old[part], exact, metrics | {"reward": float(whole.reward.mean())})
            place = 0
            for p in toy.model.parameters():
                p.grad = exact[place : place + p.numel()].view_as(p).clone()
                place += p.numel()
            torch.nn.utils.clip_grad_norm_(toy.model.parameters(), 1.0)
            optimizer.step()
