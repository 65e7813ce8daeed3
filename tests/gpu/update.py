"""One actor update of DisCO and one of GRPO through verl's FSDP2 engine: seconds, peak memory, and DisCO's errors.

Run by test_gpu.py, or by hand, with the folder tests/recipe/disco on PYTHONPATH:

    torchrun --standalone --nproc-per-node 1 tests/gpu/update.py --size 0.5b --out result.json

As in a run, the batch stays on the CPU, so that the ranks exchange their tables by gloo where nothing is measured and
by NCCL where something is; the engine has verl's settings of main_ppo.

Errors are those of bfloat16: |update - update in float32| / |update in float32| over all parameters, by plain SGD; of
the objective alone (beta = 0), and of the constraint alone (all responses right, so that no question is mixed, under
old log-probabilities that are higher). Log-probabilities are compared with those of PyTorch, row by row; flash-attn's
Triton kernel makes the others, where it is installed. Seconds and memory are those of AdamW. The model is a random
Qwen2, so it says nothing of learning.

On a CPU, to rehearse: --device cpu --size tiny --questions 4 --responses 4 --prompt 8 --response 24
"""

import argparse
import functools
import gc
import json
import os
import statistics
import tempfile
import time

import torch
from harness import DEFAULTS, full, settings_of, to_batch
from tensordict import TensorDict

SIZES = {
    "tiny": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=512),
    "0.5b": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, vocab_size=151936
    ),
    "1.5b": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, vocab_size=151936
    ),
}
REPEATS = 3


def make_model(folder: str, size: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(8)}, unk_token="t3"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1").save_pretrained(folder)
    torch.manual_seed(1)
    config = Qwen2Config(
        **SIZES[size],
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make_rows(args: argparse.Namespace) -> list[dict]:
    """``questions`` x ``responses``, of random tokens and lengths, a third of them right."""
    g = torch.Generator().manual_seed(0)
    vocabulary, rows = SIZES[args.size]["vocab_size"], []
    for q in range(args.questions):
        prompt = torch.randint(4, vocabulary, (args.prompt,), generator=g)
        for i in range(args.responses):
            length = int(torch.randint(args.response // 2, args.response + 1, (1,), generator=g))
            rows.append(
                dict(
                    uid=f"q{q}",
                    prompt=prompt,
                    response=torch.randint(4, vocabulary, (length,), generator=g),
                    reward=float(i % 3 == 0),
                    mask=torch.ones(length, dtype=torch.long),
                )
            )
            rows[-1] |= {name: torch.zeros(length) for name in ("old", "ref")}
            rows[-1]["rho"] = torch.ones(length)
    return rows


def worker_config(args: argparse.Namespace, folder: str, dtype: str, optimizer: str):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig

    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=folder,
            use_remove_padding=False,
            enable_gradient_checkpointing=True,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            # The dataclass would defer the exchange of gradients; main_ppo's YAML does not.
            use_no_sync_for_gradient_accumulation=False,
            use_dynamic_bsz=True,
            max_token_len_per_gpu=args.micro_batch_tokens,
            infer_max_token_len_per_gpu=args.micro_batch_tokens,
            mixed_precision=dict(param_dtype=dtype, reduce_dtype="fp32", buffer_dtype="fp32"),
        ),
        optimizer_config=FSDPOptimizerConfig(
            optimizer=optimizer,
            optimizer_impl="torch.optim",
            lr=1e-6 if optimizer == "AdamW" else 1.0,
            lr_scheduler_type="constant",
            total_training_steps=100,
            clip_grad=1e9,
            weight_decay=0.0,
        ),
        checkpoint_config=CheckpointConfig(),
    )


def batch_of(
    worker, args: argparse.Namespace, rows: list[dict], case: dict, *, mini_batches: int = 2, offset: float = 0.0
) -> TensorDict:
    """The batch as the trainer sends it, on the CPU.

    Args:
        offset: of the old log-probabilities over the worker's own, so the KL per token.
    """
    from verl_ext.training.grouping import deal

    plan = deal(
        [r["uid"] for r in rows],
        [len(r["prompt"]) + len(r["response"]) for r in rows],
        groups_per_mini_batch=args.questions // mini_batches,
        ranks=1,
        micro_batches=(),
        padding_length=8,
    )
    data = to_batch(rows, plan, 1, 0, case)
    log_prob = worker._forward(data, with_entropy=False)[0].cpu()
    lengths = [len(r["response"]) for r in rows]
    old = [log_prob[i, : lengths[index]] + offset for i, index in enumerate(plan.order)]
    data["old_log_probs"] = torch.nested.as_nested_tensor(old, layout=torch.jagged)
    return data


def disco_worker(args: argparse.Namespace, folder: str, dtype: str, optimizer: str, case: dict):
    from recipe.disco.worker import DiscoTrainingWorker

    worker = DiscoTrainingWorker(worker_config(args, folder, dtype, optimizer))
    worker.reset()
    worker.configure(settings_of(case))
    return worker


def grpo_worker(args: argparse.Namespace, folder: str):
    from verl.workers.config import ActorConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    worker = TrainingWorker(worker_config(args, folder, "bf16", "AdamW"))
    worker.reset()
    actor = ActorConfig(strategy="fsdp2", rollout_n=args.responses, use_dynamic_bsz=True)
    worker.set_loss_fn(functools.partial(ppo_loss, config=actor))
    return worker


def clean(device: str) -> None:
    # A worker and its loss function refer to each other.
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def timed(call, device: str) -> float:
    """Median seconds of a call, after one to warm up."""
    seconds = []
    for _ in range(1 + REPEATS):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measure(worker, data: TensorDict, device: str) -> dict[str, float]:
    """Seconds and peak GiB of an update."""
    seconds = timed(lambda: worker.train_mini_batch(data.copy()), device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return {"seconds": seconds, "peak_gib": peak}


def log_probabilities(worker, data: TensorDict, device: str) -> dict[str, float]:
    """Seconds of a forward pass by verl's fastest log-probabilities and row by row, and how far they are apart."""

    def forward():
        return worker._forward(data, with_entropy=False)[0]

    found = {"seconds": timed(forward, device)}
    fast = forward()
    os.environ["VERL_DISABLE_FLASH_ATTN_CE"] = "1"
    try:
        found["seconds_row_by_row"] = timed(forward, device)
        found["largest_difference"] = float((forward() - fast).abs().max())
    finally:
        del os.environ["VERL_DISABLE_FLASH_ATTN_CE"]
    return found


def tables_of(worker, data: TensorDict) -> list[str]:
    """On which device each mini-batch's table was exchanged."""
    from recipe.disco import worker as module

    devices, gather = [], module.gathered

    def spied(table, group):
        devices.append(table.device.type)
        return gather(table, group)

    module.gathered = spied
    try:
        worker.train_mini_batch(data.copy())
    finally:
        module.gathered = gather
    return devices


def update(
    args: argparse.Namespace, folder: str, rows: list[dict], dtype: str, case: dict, offset: float
) -> list[torch.Tensor]:
    """What one mini-batch of DisCO adds to each parameter, on the CPU."""
    worker = disco_worker(args, folder, dtype, "SGD", case)
    before = [full(p).cpu() for p in worker.engine.module.parameters()]
    # In a second mini-batch, each type would be at weights of its own.
    worker.train_mini_batch(batch_of(worker, args, rows, case, mini_batches=1, offset=offset))
    clean(args.device)
    return [full(p).cpu() - b for p, b in zip(worker.engine.module.parameters(), before, strict=True)]


def relative_error(low: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    difference = sum(float((a - b).square().sum()) for a, b in zip(low, exact, strict=True))
    return (difference / sum(float(b.square().sum()) for b in exact)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--response", type=int, default=1024, help="tokens at most; half of it at least")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--out", default="/dev/stdout")
    args = parser.parse_args()
    import verl  # noqa: F401  (activates the plugin)
    from verl.utils import tensordict_utils as tu
    from verl.utils.torch_functional import FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE

    case = DEFAULTS | dict(tau=10.0, delta=1e-4, beta=1e3, temperature=0.6, fresh=False)
    rows, result = make_rows(args), {"size": args.size, "tokens": 0}
    result["tokens"] = sum(len(r["prompt"]) + len(r["response"]) for r in rows)
    result["triton_cross_entropy"] = FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, args.size)
        all_right = [r | {"reward": 1.0} for r in rows]
        parts = {"objective": (rows, case | {"beta": 0.0}, 0.0), "constraint": (all_right, case, 0.01)}
        result["error"] = {
            name: relative_error(*(update(args, folder, chosen, dtype, c, offset) for dtype in ("bf16", "fp32")))
            for name, (chosen, c, offset) in parts.items()
        }

        clean(args.device)
        worker = disco_worker(args, folder, "bf16", "AdamW", case)
        data = batch_of(worker, args, rows, case | {"fresh": True})
        result["log_probs"] = log_probabilities(worker, data, args.device)
        result["exchanged_on"] = tables_of(worker, data)
        clean(args.device)
        result["disco"] = measure(worker, data, args.device)
        del worker

        clean(args.device)
        worker = grpo_worker(args, folder)
        data["advantages"] = torch.nested.as_nested_tensor(
            [x * 0 + r - 1 / 3 for x, r in zip(data["old_log_probs"].unbind(), data["sequence_reward"], strict=True)],
            layout=torch.jagged,
        )
        tu.assign_non_tensor(data, mini_batch_size=len(data) // 2, global_batch_size=len(data) // 2)
        result["grpo"] = measure(worker, data, args.device)
    with open(args.out, "w") as f:
        json.dump(result, f, indent=1)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
