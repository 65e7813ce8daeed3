"""verl's real training worker and FSDP2 engine on torchrun's ranks, without Ray, and batches of made-up responses.

A benchmark calls :func:`launch` first; it then runs in each rank and builds one :class:`Bench`, whose worker trains by
DisCO and by verl's own losses with the same engine.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

MINI_BATCHES = 4
METHODS = {
    "exact": {"objective": "disco"},
    "disco_b": {"objective": "disco_b"},
    "lagged": {"objective": "disco", "measure": "lagged"},
}
"""By their `disco` settings."""
MODEL = "BENCHMARK_MODEL"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the arguments of every benchmark that runs an engine."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=512, help="the model's width")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5, help="repeats, after one to warm up")
    parser.add_argument("--seconds", type=float, default=150, help="begin no further turn of a comparison after these")
    return parser


def launch(args: argparse.Namespace) -> bool:
    """Start this script again on each rank, the machine's cores divided among them; return True in the ranks."""
    if "RANK" not in os.environ:
        start(args, args.ranks, max(len(os.sched_getaffinity(0)) // args.ranks, 1))
        return False
    warnings.filterwarnings("ignore")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return True


def start(args: argparse.Namespace, ranks: int, threads: int, **env: str) -> None:
    """Make a model, and start this script on each rank; leave with the ranks if they fail."""
    env |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    # As verl_ext/config/backend/cpu.yaml sets them
    env |= {"MALLOC_MMAP_THRESHOLD_": "268435456", "MALLOC_TRIM_THRESHOLD_": "268435456"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, args)
        if subprocess.run([*torchrun, *sys.argv], env=os.environ | env | {MODEL: folder}).returncode:
            raise SystemExit(1)


def make_model(folder: str, args: argparse.Namespace) -> None:
    """Save an untrained Qwen3 with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"pad": 0, "eos": 1, "unk": 2}, unk_token="unk"))
    tokens = {"pad_token": "pad", "eos_token": "eos", "unk_token": "unk"}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=max(args.hidden // 64, 1),
        head_dim=32,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def attention() -> str:
    """Name an attention by which packed sequences cost what they cost apart: FlashAttention's, or one in plain torch.

    SDPA, verl's choice where there is no FlashAttention, spends the square of the packed length.
    """
    if importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("packed", attend)
    AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)
    return "packed"


def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **more: Any) -> Any:
    """Attend causally within each sequence; (rows, heads, tokens, width) -> (rows, tokens, heads, width).

    A single row holds packed sequences, each from where ``position_ids`` is 0. Several are padded at their ends, where
    nothing reads what comes out.
    """
    repeat, ends = query.shape[1] // key.shape[1], [query.shape[2]]
    if len(query) == 1:
        ends = (more["position_ids"].flatten() == 0).nonzero().flatten().tolist()[1:] + ends
    pieces = []
    for a, b in zip([0, *ends], ends, strict=False):
        q, k, v = (x[:, :, a:b] for x in (query, key, value))
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        pieces.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
    return torch.cat(pieces, 2).transpose(1, 2).contiguous(), None


def skewed_lengths(count: int, maximum: int, mean: float = 0.4, seed: int = 0) -> np.ndarray:
    """Draw log-normal lengths, cut at ``maximum``, whose mean is the share ``mean`` of it."""
    normal = np.random.default_rng(seed).standard_normal(count)
    low, high = 0.0, np.log(maximum)
    for _ in range(40):
        middle = (low + high) / 2
        lengths = np.exp(middle + 0.8 * normal).clip(1, maximum)
        low, high = (middle, high) if lengths.mean() < mean * maximum else (low, middle)
    return lengths.round().astype(int)


@dataclass
class Responses:
    """Made-up responses, whole questions one after another.

    Attributes:
        lengths: tokens of each response.
        question, reward: of each response.
        prompt: tokens of each prompt.
    """

    lengths: np.ndarray
    question: np.ndarray
    reward: np.ndarray
    prompt: int

    @classmethod
    def make(cls, lengths: np.ndarray, group: int, mixed: float, prompt: int) -> "Responses":
        """Group the lengths; the share ``mixed`` of the groups, evenly spread, has right and wrong responses.

        The others are right or wrong in turns.
        """
        reward, unmixed = [], 0
        for q in range(len(lengths) // group):
            if int((q + 1) * mixed) > int(q * mixed):
                # 1 to group - 1 right ones
                reward += [float(i <= q % (group - 1)) for i in range(group)]
            else:
                reward += [float(unmixed % 2)] * group
                unmixed += 1
        return cls(lengths, np.arange(len(lengths)) // group, np.array(reward), prompt)

    @property
    def tokens(self) -> int:
        """Tokens of prompts and responses."""
        return int(self.lengths.sum() + self.prompt * len(self.lengths))

    @property
    def trained(self) -> float:
        """Share of the tokens that are in mixed groups."""
        groups = self.reward.reshape(-1, len(self.question) // (self.question.max() + 1))
        mixed = (groups.min(1) != groups.max(1))[self.question]
        return float((self.lengths + self.prompt)[mixed].sum() / self.tokens)


class Bench:
    """A worker with an engine, and updates by it.

    Args:
        checkpointing: gradient checkpointing.
        budget: tokens of a micro-batch, at most.
        optimizer: of torch.optim.
    """

    def __init__(self, *, checkpointing: bool, budget: int, optimizer: str = "AdamW", lr: float = 1e-6):
        import verl  # noqa: F401  (activates the plugin)
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import (
            FSDPActorConfig,
            FSDPEngineConfig,
            FSDPOptimizerConfig,
            HFModelConfig,
            TrainingWorkerConfig,
        )
        from verl.workers.engine_workers import TrainingWorker
        from verl.workers.utils.losses import ppo_loss

        from recipe.disco.worker import DiscoTrainingWorker

        config = TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=os.environ[MODEL],
                enable_gradient_checkpointing=checkpointing,
                override_config={"attn_implementation": attention()},
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                use_torch_compile=torch.cuda.is_available(),
                use_dynamic_bsz=True,
                max_token_len_per_gpu=budget,
                infer_max_token_len_per_gpu=budget,
            ),
            optimizer_config=FSDPOptimizerConfig(
                optimizer=optimizer, lr=lr, lr_scheduler_type="constant", lr_warmup_steps=0, total_training_steps=10**6
            ),
            checkpoint_config=CheckpointConfig(),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            self.worker = DiscoTrainingWorker(config)
            self.worker.reset()
        self.engine = self.worker.engine
        self.ranks, self.rank = self.engine.get_data_parallel_size(), self.engine.get_data_parallel_rank()
        # verl's own worker with the same engine
        self.verl = copy.copy(self.worker)
        self.verl.__class__ = TrainingWorker
        actor = FSDPActorConfig(strategy="fsdp2", rollout_n=8, use_dynamic_bsz=True)
        self.verl.set_loss_fn(functools.partial(ppo_loss, config=actor))
        self.initial = [p.detach().clone() for p in self.engine.module.parameters()]

    def batch(self, responses: Responses, plan: Any = None) -> Any:
        """Return this rank's rows as verl hands them to a worker: random tokens, log-probabilities of the policy.

        Args:
            plan: where each row goes; by default as ``verl_ext`` deals them.
        """
        from tensordict import TensorDict
        from verl.utils import tensordict_utils as tu
        from verl.workers.utils.padding import no_padding_2_padding, response_to_nested

        from verl_ext.training.grouping import deal
        from verl_ext.training.rows import BatchFacts, Rows
        from verl_ext.training.skipping import teaching

        questions = int(responses.question.max()) + 1
        plan = plan or deal(
            responses.question.tolist(),
            (responses.lengths + responses.prompt).tolist(),
            groups_per_mini_batch=questions // MINI_BATCHES,
            ranks=self.ranks,
            trained=teaching(responses.question.tolist(), responses.reward.tolist()),
        )
        if plan.num_padding or len(plan.partitions) != MINI_BATCHES:
            raise ValueError(f"{len(responses.lengths)} responses do not divide into {MINI_BATCHES} x {self.ranks}")
        rows = Rows.dealt(responses.question.tolist(), responses.reward.tolist(), plan).columns()
        share = len(plan.order) // self.ranks
        mine = slice(self.rank * share, (self.rank + 1) * share)
        rows, length = rows[mine], responses.lengths[plan.order[mine]]
        group = responses.reward.reshape(questions, -1)
        advantage = (group - group.mean(1, keepdims=True)) / (group.std(1, ddof=1, keepdims=True) + 1e-6)
        vocabulary = self.worker.model_config.hf_config.vocab_size

        def tokens(seed: int, n: int) -> torch.Tensor:
            return torch.randint(3, vocabulary, (n,), generator=torch.Generator().manual_seed(seed))

        def jagged(row: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
            return torch.nested.as_nested_tensor(
                [row(i, int(n)) for i, n in zip(plan.order[mine], length, strict=True)], layout=torch.jagged
            )

        prompts = jagged(lambda i, n: tokens(int(responses.question[i]), responses.prompt))
        answers = jagged(lambda i, n: tokens(questions + i, n))
        ids = [torch.cat(pair) for pair in zip(prompts.unbind(), answers.unbind(), strict=True)]
        data = TensorDict(
            {
                "prompts": prompts,
                "responses": answers,
                "input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged),
                "position_ids": torch.nested.as_nested_tensor([torch.arange(len(i)) for i in ids], layout=torch.jagged),
                "response_mask": jagged(lambda i, n: torch.ones(n, dtype=torch.long)),
                "loss_mask": jagged(lambda i, n: torch.ones(n, dtype=torch.long)),
                "advantages": jagged(lambda i, n: torch.full((n,), float(advantage.flat[i]))),
                **rows,
            },
            batch_size=[share],
        )
        tu.assign_non_tensor(
            data,
            temperature=1.0,
            calculate_entropy=False,
            global_batch_size=len(plan.order) // MINI_BATCHES,
            mini_batch_size=len(plan.order) // MINI_BATCHES,
            epochs=1,
            seed=42,
            dataloader_kwargs={"shuffle": False},
            global_token_num=None,
            compute_loss=False,
            **asdict(BatchFacts(old_log_probs_fresh=True, entropy_logged=True, skip_rows=True)),
        )
        self.restore()
        found = self.verl.infer_batch(data.copy())["log_probs"]
        data["old_log_probs"] = response_to_nested(no_padding_2_padding(found, data), data["response_mask"]).float()
        return data

    def configure(self, method: str) -> None:
        """Set the worker's method, with a constraint that is not active, as in 99 % of a run's mini-batches."""
        from recipe.disco.settings import DiscoConfig

        self.worker.configure(DiscoConfig(delta=1.0, **METHODS[method]))

    def moved(self) -> torch.Tensor:
        """Return how far all parameters are from the initial ones, as one vector."""
        now = zip(self.engine.module.parameters(), self.initial, strict=True)
        return torch.cat([full(p.detach() - start).flatten().double() for p, start in now])

    def restore(self) -> None:
        """Go back to the initial parameters."""
        with torch.no_grad():
            for p, start in zip(self.engine.module.parameters(), self.initial, strict=True):
                p.copy_(start)

    def update(self, method: str, data: Any) -> tuple["Seconds", dict[str, Any]]:
        """Take one step's update from the initial parameters; return its time and metrics.

        Args:
            method: of ``METHODS``, or grpo for verl's own.
        """
        from verl.utils import tensordict_utils as tu

        self.restore()
        if method != "grpo":
            self.configure(method)
        worker = self.verl if method == "grpo" else self.worker
        seconds, output = self.timed(lambda: worker.train_mini_batch(data.copy()))
        metrics = tu.get(output, "metrics")
        if any(metrics.get("disco/coefficient", [])):
            raise RuntimeError(f"{method}: the constraint is active: {metrics['disco/coefficient']}")
        return seconds, metrics

    def timed(self, call: Callable[[], Any]) -> tuple["Seconds", Any]:
        """Call on all ranks at once; return the time until the last is done, and what the call returns."""
        torch.distributed.barrier()
        wall, core = time.perf_counter(), time.process_time()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        core = time.process_time() - core
        torch.distributed.barrier()
        return Seconds(time.perf_counter() - wall, core), result


def full(p: torch.Tensor) -> torch.Tensor:
    """Gather a parameter's shards."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


class Seconds(NamedTuple):
    """How long a call took on this rank.

    Attributes:
        wall: until the last rank was done.
        core: of this rank's threads, which other processes on the machine disturb less.
    """

    wall: float
    core: float


def in_turns(calls: dict[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, list[Any]]:
    """Make the calls in turns, after one turn to warm up; return what each returned, turn by turn.

    Args:
        args: ``turns`` and ``seconds``; two turns are made however long they take.
    """
    found: dict[str, list[Any]] = {name: [] for name in calls}
    started = time.perf_counter()
    for turn in range(args.turns + 1):
        spent = [time.perf_counter() - started]
        # Ranks must agree.
        torch.distributed.broadcast_object_list(spent)
        if turn > 1 and spent[0] > args.seconds:
            break
        # Not always in the same order: a neighbour on the machine may have a rhythm.
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            found[name].append(calls[name]())
    return {name: values[1:] for name, values in found.items()}


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Fit a line by least squares; return slope, intercept and R squared."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = np.asarray(y) - slope * np.asarray(x) - intercept
    return float(slope), float(intercept), float(1 - (rest**2).sum() / ((y - np.mean(y)) ** 2).sum())
