"""Take updates of verl's own methods with and without rows of advantage 0, and compare the parameters.

Run by test_skipping.py under torchrun:

    torchrun --nproc-per-node 2 tests/verl_ext/training/skipping_ranks.py MODEL CASES.json RESULTS.jsonl

Rank 0 adds a JSON line per case: ``error``, the distance of the parameters relative to the update, and the metrics.
"""

import functools
import json
import sys
import warnings

import torch
from harness import DEFAULTS, fsdp_config, make_rows, parameters, to_batch, whole_parameters

warnings.filterwarnings("ignore")


def make_batch(worker, case: dict):
    """Give each question of some responses, by number, advantages or none."""
    from verl_ext.training.grouping import deal
    from verl_ext.training.skipping import teaching

    engine = worker.engine
    ranks, rank = engine.get_data_parallel_size(), engine.get_data_parallel_rank()
    rows = make_rows(case["mixed"])
    noise = torch.Generator().manual_seed(3)
    mean = {r["uid"]: [] for r in rows}
    for r in rows:
        mean[r["uid"]].append(r["reward"])
    for r in rows:
        n = len(r["response"])
        r["old"] = -4 + 0.5 * torch.randn(n, generator=noise)
        r["rho"] = torch.rand(n, generator=noise) + 0.5
        r["ref"] = torch.zeros(n)
        each = 1 + case["per_token"] * torch.rand(n, generator=noise)
        r["advantage"] = (r["reward"] - sum(mean[r["uid"]]) / len(mean[r["uid"]])) * each
    rows[0]["mask"][:] = 0
    groups = [r["uid"] for r in rows]
    plan = deal(
        groups,
        [len(r["prompt"]) + len(r["response"]) for r in rows],
        groups_per_mini_batch=case["groups_per_mini_batch"],
        ranks=ranks,
        micro_batches=() if case["dynamic"] else (2,),
        # Rows as verl deals them, which knows no advantages.
        trained=teaching(groups, [r["reward"] for r in rows]) if case["dealt"] else None,
        padding_length=8,
    )
    data = to_batch(rows, plan, ranks, rank, DEFAULTS | {"correction": case["weights"]})
    padding = [torch.zeros(1)] * plan.num_padding
    share = len(plan.order) // ranks
    advantages = [r["advantage"] for r in rows] + padding
    mine = [advantages[i] for i in plan.order[rank * share : (rank + 1) * share]]
    data["advantages"] = torch.nested.as_nested_tensor(mine, layout=torch.jagged)
    size = len(plan.order) // len(plan.partitions)
    from verl.utils import tensordict_utils as tu

    options = dict(global_batch_size=size, mini_batch_size=size, epochs=2, dataloader_kwargs={})
    tu.assign_non_tensor(data, **options, calculate_entropy=False)
    return data


def train(worker, case: dict, skip: bool) -> tuple[dict, dict]:
    """Return all parameters, and on ranks with outputs the metrics, after two updates on each mini-batch."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=2,
        policy_loss=PolicyLossConfig(loss_mode=case["loss_mode"]),
        loss_agg_mode=case["loss_agg_mode"],
        loss_scale_factor=16,
    )
    worker.set_loss_fn(functools.partial(ppo_loss, config=actor))
    object.__setattr__(worker.engine_config, "use_dynamic_bsz", case["dynamic"])
    object.__setattr__(worker.engine_config, "micro_batch_size_per_gpu", 2)
    with torch.no_grad():
        for p, start in zip(parameters(worker.engine), worker.initial, strict=True):
            p.copy_(start)
    if not skip:
        worker.train_batch = functools.partial(TrainingWorker.train_batch, worker)
    output = worker.train_mini_batch(make_batch(worker, case))
    worker.__dict__.pop("train_batch", None)
    return whole_parameters(worker.engine), {} if output is None else tu.get(output, "metrics")


def distance(a: dict, b: dict) -> float:
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


def main() -> None:
    import verl  # noqa: F401  (activates the plugin)

    from verl_ext.training.skipping import SkippingTrainingWorker

    model, cases, results = sys.argv[1:]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    worker = SkippingTrainingWorker(fsdp_config(model, {}))
    worker.reset()
    worker.initial = [p.detach().clone() for p in parameters(worker.engine)]
    start = whole_parameters(worker.engine)
    with open(cases) as f:
        cases = json.load(f)
    for case in cases:
        whole, stock = train(worker, case, skip=False)
        ours, metrics = train(worker, case, skip=True)
        moved = distance(whole, start)
        result = {"case": case, "moved": moved, "error": distance(ours, whole) / (moved or 1.0)}
        if torch.distributed.get_rank() == 0:
            result["stock"], result["ours"] = (
                {k: m[k] for k in sorted(m) if "loss" in k or "trained" in k or k == "grad_norm"}
                for m in (stock, metrics)
            )
            with open(results, "a") as f:
                f.write(json.dumps(result, default=str) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
