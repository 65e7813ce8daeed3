"""Leave rows without a gradient out of a pass: the same gradient, to the last term, for less work.

A response teaches nothing where its loss has no gradient: in GRPO and its kin, where its advantage is 0 (all responses
to the question got the same reward), and on padding rows. :func:`narrow` takes such rows out of a batch before the
engine cuts it into micro-batches. Ranks stay in step: each keeps equally many rows, and one with fewer repeats its
shortest row without a gradient as a filler (column ``is_filler``), for sums over rows to leave out.

:class:`SkippingWorker` does so for verl's own losses, if ``verl_ext.skip_rows_without_gradient`` asks for it.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from tensordict import NonTensorData, TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from verl_ext.training.grouping import values_by_group

FILLER = "is_filler"
SETTING = "verl_ext.skip_rows_without_gradient"


def teaching(groups: Sequence[Hashable], rewards: Sequence[float]) -> list[bool]:
    """Tell which rows belong to a group whose rewards differ: others have advantage 0 and no weight."""
    seen = values_by_group(groups, rewards)
    return [len(seen[group]) > 1 for group in groups]


def gathered(table: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the rows of all ranks of a group, which have equally many, on the CPU; the same on every rank."""
    parts = [torch.empty_like(table) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, table.contiguous(), group=group)
    return torch.cat(parts).cpu()


def of_rows(lengths: Sequence[int], wanted: Tensor) -> list[int]:
    """Return those of the wanted rows."""
    return [n for n, keep in zip(lengths, wanted.tolist(), strict=True) if keep]


def largest_divisor(n: int, limit: int) -> int:
    """Return the largest divisor of ``n`` that is at most ``limit``."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)


def fit_micro_batches(data: TensorDict, size: int | None) -> None:
    """Set a fixed micro-batch size, at most ``size``, that divides the rows; None: they are cut by tokens."""
    if size:
        tu.assign_non_tensor(data, micro_batch_size_per_gpu=largest_divisor(len(data), size))


def rows_per_rank(wanted: Tensor, ranks: int, mcore: Any, micro_batch: int | None) -> int:
    """Count the rows that each rank keeps: those of the rank that wants most, in whole micro-batches.

    Args:
        wanted: (ranks * rows,) bool, rank by rank.
        mcore: the engine's config, Megatron's or another.
        micro_batch: rows of a micro-batch; None where they are cut by tokens.
    """
    rows = len(wanted) // ranks
    kept = max(int(wanted.view(ranks, rows).sum(1).max()), 1)
    unit = micro_batch or 1
    if getattr(mcore, "virtual_pipeline_model_parallel_size", None):
        # Interleaved pipelining runs micro-batches by the number of stages.
        unit *= mcore.pipeline_model_parallel_size
    elif kept < unit:
        unit = 1
    return min(-(-kept // unit) * unit, rows)


def narrowed(data: TensorDict, wanted: Tensor, worker: TrainingWorker, micro_batch: int | None) -> TensorDict:
    """Keep this rank's wanted rows, filled up to as many as any rank has, in micro-batches that fit.

    Args:
        data: this rank's rows; ``input_ids`` is jagged.
        wanted: (ranks * rows,) bool, rank by rank, the same on every rank.
        worker: whose engine runs them.
        micro_batch: rows of a micro-batch, where it does not cut by tokens.

    Returns:
        Another batch, whose column ``is_filler`` is True at rows that only keep ranks in step.
    """
    ranks, size = worker.engine.get_data_parallel_size(), None if worker.engine_config.use_dynamic_bsz else micro_batch
    size = size and largest_divisor(len(data), size)
    count = rows_per_rank(wanted, ranks, worker.engine_config, size)
    data = narrow(data, wanted.view(ranks, -1)[worker.engine.get_data_parallel_rank()], count)
    fit_micro_batches(data, size)
    return data


def narrow(data: TensorDict, wanted: Tensor, count: int) -> TensorDict:
    """Keep the wanted rows of this rank, in their order, and fill up to ``count`` rows.

    Args:
        data: this rank's rows; ``input_ids`` is jagged.
        wanted: (rows,) bool, at most ``count`` of them.
        count: as :func:`rows_per_rank` gives.

    Returns:
        Another batch, whose column ``is_filler`` is True at rows that only keep ranks in step.
    """
    keep, rest = wanted.nonzero().flatten(), (~wanted).nonzero().flatten()
    if count < len(data):
        lengths = data["input_ids"].offsets().diff().cpu()
        # A rank without a row to spare wants all of its own, and then so many are kept.
        filler = rest[lengths[rest].argmin()].expand(count - len(keep)) if len(keep) < count else rest[:0]
        data = tu.index_select_tensor_dict(data, torch.cat([keep, filler]))
        is_filler = torch.arange(count) >= len(keep)
    else:
        data, is_filler = data.copy(), ~wanted
    data[FILLER] = is_filler.to(data["input_ids"].device)
    return data


def told_by_last_stage(wanted: Tensor, engine: Any) -> Tensor:
    """Return on all stages of a pipeline which rows, (rows,) bool, its last stage wants: it alone has outputs."""
    if getattr(engine.engine_config, "pipeline_model_parallel_size", 1) == 1:
        return wanted
    from megatron.core import parallel_state

    flags = wanted.to(get_device_name(), torch.uint8)
    last, group = parallel_state.get_pipeline_model_parallel_last_rank, parallel_state.get_pipeline_model_parallel_group
    dist.broadcast(flags, last(), group=group())
    return flags.bool().cpu()


def whole_batch_terms(engine: Any) -> list[str]:
    """Name what an engine itself trains on all rows: a mixture's balancing, further tokens (Megatron alone has them).

    FSDP engines take their loss from the loss function alone.
    """
    config, model = getattr(engine, "tf_config", None), getattr(engine, "model_config", None)
    terms = []
    if config is not None and config.num_moe_experts:
        kind, weight = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
        kinds, weights = (x if isinstance(x, list) else [x] for x in (kind, weight))
        if any(w and k != "none" for k, w in zip(kinds, weights, strict=True)) or "sinkhorn" in kinds:
            terms.append(f"the router's balancing (moe_router_load_balancing_type={kind})")
        if config.moe_z_loss_coeff:
            terms.append(f"the router's z-loss (moe_z_loss_coeff={config.moe_z_loss_coeff})")
        if config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate:
            terms.append(f"the router's bias (moe_router_bias_update_rate={config.moe_router_bias_update_rate})")
        if config.moe_expert_capacity_factor is not None:
            terms.append(f"the experts' capacity (moe_expert_capacity_factor={config.moe_expert_capacity_factor})")
    mtp = getattr(model, "mtp", None)
    if mtp is not None and mtp.enable and mtp.enable_train:
        terms.append("multi-token prediction (model.mtp.enable_train)")
    return terms


class SkippingTrainingWorker(TrainingWorker):
    """verl's training worker that leaves rows with advantage 0 out of the training pass."""

    loss_fn: Callable

    def train_batch(self, data: TensorDict) -> TensorDict | None:
        """Take one optimizer step on one mini-batch, with the gradient and the denominators of all of its rows."""
        mask = data["response_mask"].to_padded_tensor(0).bool()
        mine = (mask & (data["advantages"].to_padded_tensor(0) != 0)).any(-1)
        loss_tokens = data["loss_mask"].to_padded_tensor(0).sum(-1)
        table = torch.stack([x.double().to(self.device_name) for x in (mine, loss_tokens)], -1)
        flags, loss_tokens = gathered(table, self.engine.get_data_parallel_group()).unbind(-1)
        wanted, lengths = flags.bool(), tu.get(data, "global_token_num")
        data = narrowed(data, wanted, self, self.engine_config.micro_batch_size_per_gpu)
        trained = of_rows(lengths, wanted)
        # verl estimates the work by them.
        tu.assign_non_tensor(data, global_token_num=NonTensorData(trained))
        loss, self.loss_fn = self.loss_fn, _of_whole_batch(self.loss_fn, int(loss_tokens.sum()))
        try:
            result = super().train_batch(data)
        finally:
            self.loss_fn = loss
        if result is not None:
            tu.get(result, "metrics").update(trained_rows=float(flags.mean()), trained_tokens=float(sum(trained)))
        return result


def _of_whole_batch(loss_fn: Callable, tokens: int) -> Callable:
    """Make a loss of verl's contract that divides by the tokens of the whole mini-batch."""

    def loss(model_output: dict[str, Any], data: TensorDict, dp_group: Any = None) -> tuple[Tensor, dict]:
        tu.assign_non_tensor(data, batch_num_tokens=tokens)
        return loss_fn(model_output=model_output, data=data, dp_group=dp_group)

    return loss


class SkippingWorker(ActorRolloutRefWorker):
    """verl's hybrid worker whose actor trains on no row with advantage 0."""

    actor_worker_cls = SkippingTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        """Build the model as verl does.

        Raises:
            ValueError: the engine trains on all rows by itself.
        """
        super().init_model()
        if self.actor is not None and (terms := whole_batch_terms(self.actor.engine)):
            raise ValueError(
                f"{SETTING}=True would change the update: {'; '.join(terms)} depends on all rows; use false"
            )
