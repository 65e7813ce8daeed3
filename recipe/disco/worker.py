"""The exact DisCO update inside verl's training worker: measure, exchange, plan, train.

One subclass of verl's ``TrainingWorker``, whatever the engine (FSDP, Megatron), micro-batching, padding or sequence
parallelism below it. Per mini-batch, on every rank:

1. measure: log-probabilities of the rank's rows under the current policy, by a forward pass without gradient; in the
   first mini-batch after a rollout they are ``old_log_probs`` and cost nothing;
2. exchange: one :class:`ScoreTable` is gathered over the data-parallel ranks;
3. plan: :func:`plan_update` gives a weight per response and one coefficient, the same on every rank;
4. train: verl's ``train_batch`` runs the micro-batches of the rows that have a gradient, each with its share of the
   separable loss.

verl's conventions that matter here: a loss function returns dp_size times its micro-batch's share of the global sum;
columns of the batch reach it as ``data[...]``.
"""

import json
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import NonTensorData, TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.padding import no_padding_2_padding

from recipe.disco.constraint import Controller, kl_estimate
from recipe.disco.loss import micro_batch_loss
from recipe.disco.scores import Score, compute_score, masked
from recipe.disco.settings import DiscoConfig
from recipe.disco.update import (
    ScoreTable,
    UpdatePlan,
    kl_metrics,
    kl_noise,
    labelled,
    plan_update,
    require_numbers,
    totals,
)
from verl_ext.runs.checkpoints import read_json
from verl_ext.runs.files import write_whole
from verl_ext.training.rows import BatchFacts, Rows
from verl_ext.training.skipping import (
    FILLER,
    fit_micro_batches,
    gathered,
    narrowed,
    of_rows,
    told_by_last_stage,
    whole_batch_terms,
)

logger = logging.getLogger(__name__)

STATE_FILE = "disco_controller.json"
WEIGHT = "disco_weight"
"""The column of w_i = dJ/ds_i that the loss reads."""


def padded(x: Tensor) -> Tensor:
    """verl's rows are jagged in its V1 trainer; (B, T), padded with 0."""
    return x.to_padded_tensor(0) if x.is_nested else x


def of_whole_questions(plan: UpdatePlan, table: ScoreTable) -> Tensor:
    """Which rows with a token are of a question that has a row with a gradient."""
    return torch.isin(table.question, table.question[plan.needs_gradient]) & (table.length > 0)


@dataclass(frozen=True)
class Passes:
    """What is run for one update.

    Attributes:
        free: no measuring pass: old_log_probs are taken for the policy's.
        with_entropy: which pass gives the policy's entropy: "measuring", "training", or None where verl has logged it.
        measure_mixed: the measuring pass is of mixed questions alone.
        train_some: the training pass is of rows with a gradient alone.
    """

    free: bool
    with_entropy: str | None
    measure_mixed: bool
    train_some: bool


def passes(facts: BatchFacts, first: bool, lagged: bool, controller: Controller, needs_all: bool) -> Passes:
    """Decide what one update runs.

    Args:
        first: no update on this rollout has come before.
        lagged: disco.measure.
        needs_all: something besides the method trains on all rows.
    """
    # At pi_theta = pi_old there is nothing to measure: scores follow from old_log_probs and the KL is 0.
    free = lagged or (first and facts.old_log_probs_fresh)
    # verl's pass for old_log_probs logs the entropy; where there is none (bypass mode), we do.
    unknown = first and not facts.entropy_logged
    with_entropy = None if not unknown or (free and not lagged) else "training" if lagged else "measuring"
    skips = facts.skip_rows and not needs_all
    # The entropy that is logged is of all rows. So is the lagged KL that a state is learned from.
    return Passes(
        free,
        with_entropy,
        measure_mixed=skips and not (free or unknown or controller.reads_kl),
        train_some=skips and not (lagged and (unknown or controller.state_dict())),
    )


@dataclass
class RolloutState:
    """The updates on one rollout, so far.

    Attributes:
        facts: what the trainer says of its batch.
        kl: the last KL measured; 0 at its start, where the policy is pi_old.
        updates: how many have begun.
    """

    facts: BatchFacts
    kl: float = 0.0
    updates: int = 0


@dataclass
class MiniBatchLoss:
    """verl's loss contract for one mini-batch, around :func:`recipe.disco.loss.micro_batch_loss`.

    Attributes:
        score, kl_estimator: as the plan's table was measured by.
        plan: of the whole mini-batch; None where nothing was measured and no loss is evaluated (early pipeline stages).
        entropy_coeff: weight of the entropy bonus.
        sums: session, KL, tokens and entropy of each row that the loss has seen, (rows, 4) per micro-batch, of fillers
            0; None where the table has them already.
    """

    score: Score
    kl_estimator: str
    plan: UpdatePlan | None
    entropy_coeff: float
    sums: list[Tensor] | None

    def __call__(self, model_output: dict[str, Any], data: TensorDict, dp_group: Any = None) -> tuple[Tensor, dict]:
        log_prob = no_padding_2_padding(model_output["log_probs"], data)
        mask, old = padded(data["response_mask"]).bool(), padded(data["old_log_probs"])
        index, plan, score = data["sample_index"], self.plan, self.score
        assert plan is not None
        require_numbers("log_prob", log_prob.detach(), mask, index)
        rho = padded(data["rollout_is_weights"]) if "rollout_is_weights" in data.keys() else None
        if rho is not None:
            require_numbers("rollout_is_weights", rho, mask, index)
        loss = micro_batch_loss(
            log_prob,
            old,
            mask,
            data[WEIGHT],
            plan.coefficient,
            plan.tokens,
            score=score,
            kl_estimator=self.kl_estimator,
            ref_log_prob=padded(data["ref_log_prob"]).float() if score.base == "reference" else None,
            rollout_is_weights=rho,
        )
        # In float16 verl scales the loss until gradients overflow, and back.
        if log_prob.requires_grad and log_prob.dtype != torch.float16:
            name = f"the gradient of disco.score={score.name} by the log-probabilities"
            log_prob.register_hook(lambda g: require_numbers(name, g.sum(-1), index=index))
        entropy = torch.zeros_like(loss)
        if "entropy" in model_output:
            entropy = masked(no_padding_2_padding(model_output["entropy"], data), mask).sum(-1)
            if self.entropy_coeff:
                loss = loss - self.entropy_coeff * entropy.sum() / max(plan.tokens, 1)
        if self.sums is not None:
            kl = kl_estimate(log_prob.detach(), old, mask, self.kl_estimator).sum(-1)
            columns = (data["session_id"].to(kl), kl, mask.sum(-1), entropy.detach().expand_as(kl))
            table = torch.stack([x.double() for x in columns], -1)
            self.sums.append(table.masked_fill(data[FILLER][:, None], 0.0))
        return loss * data["dp_size"], {}


class DiscoTrainingWorker(TrainingWorker):
    """verl's training worker with the DisCO update."""

    def configure(self, config: DiscoConfig, entropy_coeff: float = 0.0) -> None:
        """Set the method's constants, once, after the engine is built."""
        self.disco = config
        self.objective, self.score = config.build_objective(), config.build_score()
        self.question_weight = config.build_question_weight()
        self.controller = config.build_controller()
        self.entropy_coeff = entropy_coeff
        self.rollout = RolloutState(BatchFacts(old_log_probs_fresh=False, entropy_logged=True))
        needs_all = ["the entropy bonus (actor.entropy_coeff)"] * bool(entropy_coeff) + whole_batch_terms(self.engine)
        self._needs_all_rows = "; ".join(needs_all)
        self._noise_told = 0.0
        self._sides_told = self._told_of_all_rows = False

    # One rollout ----------------------------------------------------------------------------------------------------

    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """All updates on one rollout. The trainer dealt whole questions to mini-batches; keep them so."""
        data = keep_mini_batches_whole(data, self.engine.get_data_parallel_size())
        facts = BatchFacts.of(data)
        if facts.skip_rows and self._needs_all_rows and not self._told_of_all_rows and self._speaks_for_all():
            self._told_of_all_rows = True
            logger.warning(
                "verl_ext.skip_rows_without_gradient has no effect: %s needs all responses", self._needs_all_rows
            )
        # In the later ones of several local updates, disco.measure=lagged goes on from the last KL.
        self.rollout = RolloutState(facts, 0.0 if facts.at_rollout_weights else self.rollout.kl)
        output = super().train_mini_batch(data)
        if facts.ends_step:
            self.controller.end_step(self.rollout.kl)
        if output is not None:
            metrics = tu.get(output, "metrics")
            # What verl would average over the mini-batches.
            metrics["disco/measure_seconds"] = sum(metrics["disco/measure_seconds"])
            self._tell_of_noise(metrics)
        return output

    def infer_batch(self, data: TensorDict) -> TensorDict:
        """verl's own pass, with a micro-batch size that divides the rows whatever their number."""
        engine = self.engine_config
        fit_micro_batches(data, None if engine.use_dynamic_bsz else engine.infer_micro_batch_size_per_gpu)
        return super().infer_batch(data)

    # One mini-batch -------------------------------------------------------------------------------------------------

    def train_batch(self, data: TensorDict) -> TensorDict | None:
        """One optimizer step on one mini-batch, with the exact gradient of L."""
        started = time.perf_counter()
        first, lagged = self.rollout.updates == 0, self.disco.measure == "lagged"
        self.rollout.updates += 1
        run = passes(self.rollout.facts, first, lagged, self.controller, bool(self._needs_all_rows))

        every = torch.ones(len(data) * self.engine.get_data_parallel_size(), dtype=torch.bool)
        measured = ~every if run.free else self._mixed(data) if run.measure_mixed else every
        made = self._plan(data, measured, run)
        wanted = every
        if run.train_some:
            # The lagged KL is that of whole questions: responses chosen by their scores have another.
            needed = every if made is None else of_whole_questions(*made) if lagged else made[0].needs_gradient
            wanted = told_by_last_stage(needed, self.engine)
        took = time.perf_counter() - started

        lengths = tu.get(data, "global_token_num")
        data = narrowed(data, wanted, self, self.engine_config.micro_batch_size_per_gpu)
        # verl estimates the work by them.
        tu.assign_non_tensor(data, global_token_num=NonTensorData(of_rows(lengths, wanted)))
        if run.with_entropy == "training":
            tu.assign_non_tensor(data, calculate_entropy=True)
        plan = made and made[0]
        loss = MiniBatchLoss(self.score, self.disco.kl_estimator, plan, self.entropy_coeff, [] if run.free else None)
        self.set_loss_fn(loss)
        result = super().train_batch(data)
        if plan is None:
            return result
        # The lagged plan's KL is the one before.
        metrics = {k: v for k, v in plan.metrics.items() if not lagged or k not in ("kl", "over_delta")}
        metrics |= self._seen(loss, plan, run, first, lagged)
        if result is not None:
            found = tu.get(result, "metrics")
            metrics |= {"measured": float(measured.any()), "measure_seconds": took}
            metrics |= {"measured_tokens": float(sum(of_rows(lengths, measured)))}
            metrics |= {"trained_tokens": float(sum(of_rows(lengths, wanted)))}
            metrics |= {"trained_rows": float(wanted.float().mean())}
            # verl goes on without an update where the gradient is not finite.
            metrics["skipped_updates"] = float(not math.isfinite(found.get("grad_norm", 0.0)))
            # verl's "loss" is the value of the separable form, which only has L's gradient.
            found.update({f"disco/{k}": v for k, v in metrics.items()}, loss=metrics["loss"])
        return result

    def _seen(self, loss: MiniBatchLoss, plan: UpdatePlan, run: Passes, first: bool, lagged: bool) -> dict[str, float]:
        """What the passes say of the KL besides the plan; in the lagged mode, the KL of the next plan's penalty."""
        metrics, found = {}, plan.metrics
        # Empty on pipeline stages before the last.
        if loss.sums:
            found = {}
            session, *sums = gathered(torch.cat(loss.sums), self._group()).unbind(-1)
            ids, member = session.unique(return_inverse=True)
            kl_sum, length, entropy = (totals(x, member, len(ids)) for x in sums)
            if (tokens := length.sum()) > 0:
                kl = float(kl_sum.sum() / tokens)
                found = kl_metrics(self.controller, kl) | kl_noise(kl_sum, length)
                if run.with_entropy == "training":
                    metrics["entropy"] = float(entropy.sum() / tokens)
                if lagged:
                    # Coefficient and penalty stay those that were in force.
                    self.rollout.kl = kl
                    metrics |= found
        if first and self.rollout.facts.at_rollout_weights and "kl" in found:
            # No update has come between: kernels, rounding and, of a rollout, old weights.
            metrics["kl_floor"] = found["kl"]
        return metrics

    def _mixed(self, data: TensorDict) -> Tensor:
        """Which rows of all ranks are of questions with a J_q, (ranks * rows,) bool."""
        rows, length = Rows.of(data), padded(data["response_mask"]).bool().sum(-1)
        mine = torch.stack([x.double() for x in (rows.group_id, rows.sequence_reward, length)], -1)
        question, reward, length = gathered(mine.to(self.device_name), self._group()).unbind(-1)
        mixed = torch.zeros(len(question), dtype=torch.bool)
        disco = self.disco
        for part in labelled(reward, question.long(), length, disco.positive_threshold, disco.graded).mixed:
            mixed[part.positive] = mixed[part.negative] = True
        return mixed

    def _plan(self, data: TensorDict, measured: Tensor, run: Passes) -> tuple[UpdatePlan, ScoreTable] | None:
        """Measure and exchange, write each row's weight into ``data``, and return the plan and what it was made of.

        None on pipeline stages before the last that have measured something: no loss is evaluated there.

        Args:
            measured: (ranks * rows,) bool, whose scores and KL to measure.
        """
        passed, log_prob, entropy = data, padded(data["old_log_probs"]).float(), None
        if measured.any():
            passed = narrowed(data, measured, self, self.engine_config.infer_micro_batch_size_per_gpu)
            found = self._forward(passed, run.with_entropy == "measuring")
            if found is None:
                return None
            log_prob, entropy = found
        mine = self._mine(measured | run.free)
        device = log_prob.device
        rows, mask = Rows.of(data), padded(passed["response_mask"]).bool().to(device)
        old, reference = padded(passed["old_log_probs"]).float().to(device), None
        if self.score.base == "reference":
            reference = padded(passed["ref_log_prob"]).float().to(device)
        kl = kl_estimate(log_prob, old, mask, self.disco.kl_estimator).sum(-1)
        score = compute_score(self.score, log_prob, old, mask, reference)
        length = mask.sum(-1)
        if not mine.all():
            # Of this rank's rows in their order; 0 where nothing was measured.
            kept = ~passed[FILLER].to(device) if measured.any() else mine.to(device)
            score, kl = (torch.zeros(len(data)).to(x).masked_scatter(mine.to(device), x[kept]) for x in (score, kl))
            length = padded(data["response_mask"]).bool().sum(-1).to(device)
        table = ScoreTable(
            question=rows.group_id,
            session=rows.session_id,
            size=rows.group_size,
            index=rows.sample_index,
            reward=rows.sequence_reward,
            length=length,
            score=score,
            kl=kl,
            measured=mine,
            entropy=torch.full_like(kl, torch.nan) if entropy is None else masked(entropy, mask).sum(-1),
        ).gathered(lambda x: gathered(x, self._group()))
        plan = plan_update(
            table,
            self.objective.at(self.rollout.facts.progress),
            self.controller,
            positive_threshold=self.disco.positive_threshold,
            graded=self.disco.graded,
            question_weight=self.question_weight,
            # Where it is free: 0, or with disco.measure=lagged the previous mini-batch's.
            kl=self.rollout.kl if run.free else None,
        )
        self.rollout.kl = plan.kl
        self._tell_of_swapped_sides(plan)
        data[WEIGHT] = self._mine(plan.weight).float().to(rows.group_id.device)
        return plan, table

    def _mine(self, everyones: Tensor) -> Tensor:
        """This rank's rows of a column of all ranks."""
        return everyones.view(self.engine.get_data_parallel_size(), -1)[self.engine.get_data_parallel_rank()]

    def _group(self) -> dist.ProcessGroup:
        return self.engine.get_data_parallel_group()

    def _forward(self, data: TensorDict, with_entropy: bool) -> tuple[Tensor, Tensor | None] | None:
        """Log-probabilities and, on request, entropies (B, T) under the current policy, without gradient.

        None on early pipeline stages, which have no outputs.
        """
        engine = self.engine_config
        # A shallow copy: engines write into the batch that they are given.
        data = data.copy()
        tu.assign_non_tensor(
            data,
            calculate_entropy=with_entropy,
            use_remove_padding=self.model_config.get("use_remove_padding", False),
            use_fused_kernels=engine.use_fused_kernels,
            use_dynamic_bsz=engine.use_dynamic_bsz,
            max_token_len_per_gpu=engine.infer_max_token_len_per_gpu,
        )
        with self.engine.eval_mode(disable_auto_offload=True):
            # The engine's own: the worker's wrapper returns None on ranks that must weigh, too.
            output = self.engine.infer_batch(data, loss_function=None)
        output = (output or {}).get("model_output", {})
        if "log_probs" not in output:
            return None
        found = {
            name: no_padding_2_padding(output[name], data).float()
            for name in ("log_probs", "entropy")
            if name in output
        }
        return found["log_probs"], found.get("entropy")

    # What a run says of itself --------------------------------------------------------------------------------------

    def _tell_of_noise(self, metrics: dict[str, list[float]]) -> None:
        """Say when delta is below what the KL can be measured to: once, and again when that changes threefold."""
        if "delta" not in self.disco.chosen() or not self._speaks_for_all():
            return
        names = ("disco/kl_standard_error", "disco/kl_floor")
        error, floor = (sum(metrics[n]) / len(metrics[n]) if n in metrics else 0.0 for n in names)
        noise, delta = max(error, floor), self.disco.delta
        if noise <= delta or self._noise_told / 3 < noise < self._noise_told * 3:
            return
        self._noise_told = noise
        advice = [f"a disco.delta of {2 * noise:.1g}"]
        if error > delta:
            advice.append("more questions per mini-batch (the error falls with the root of the responses)")
            advice += ["disco.kl_estimator=k3 (a tenth of the error)"] * (self.disco.kl_estimator == "k1")
        if floor > delta:
            advice.append("float32, or bypass_mode=False where old_log_probs are the rollout's")
        logger.warning(
            "disco.delta=%g is below what this batch can measure: the KL's standard error is %.1e nats per token "
            "(disco/kl_standard_error), and before any update the KL is %.1e (disco/kl_floor), so the constraint acts "
            "on noise. Use %s",
            delta,
            error,
            floor,
            "; or ".join(advice),
        )

    def _speaks_for_all(self) -> bool:
        """Whether this rank is the one that says what every rank knows."""
        return self.engine.is_mp_src_rank_with_outputs() and self.engine.get_data_parallel_rank() == 0

    def _tell_of_swapped_sides(self, plan: UpdatePlan) -> None:
        """Say once when an objective of the user's favours wrong responses."""
        right, wrong = float(plan.weight[plan.positive].sum()), float(plan.weight[~plan.positive].sum())
        if (right < 0 or wrong > 0) and not self._sides_told and self._speaks_for_all():
            self._sides_told = True
            logger.warning(
                "disco.objective=%s favours wrong responses: the weights dJ/ds of right ones add up to %.2g, of wrong "
                "ones to %.2g. Its J = positive - negative should rise with the scores of right responses",
                self.disco.objective,
                right,
                wrong,
            )

    # Checkpoints ----------------------------------------------------------------------------------------------------

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None):
        """Save verl's checkpoint, plus the controller's state in ``disco_controller.json`` beside the weights."""
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)
        # Every rank with outputs holds the same state and may write it.
        if self.engine.is_mp_src_rank_with_outputs():
            os.makedirs(local_path, exist_ok=True)
            state = {"constraint": self.disco.constraint, "state": self.controller.state_dict()}
            write_whole(Path(local_path, STATE_FILE), json.dumps(state).encode(), writer=dist.get_rank())

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=False):
        """Load verl's checkpoint, plus the controller's state."""
        path = Path(local_path, STATE_FILE) if local_path else None
        saved = read_json(path) if path is not None and path.exists() else None
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load)
        # Nodes may have disks of their own, and not each holds the file: all ranks go on from the same state.
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, saved)
        saved = next((state for state in found if state is not None), None)
        if saved is not None and saved["constraint"] == self.disco.constraint:
            self.controller.load_state_dict(saved["state"])
        elif self.controller.state_dict() and local_path:
            logger.warning(
                "the checkpoint %s holds no state of disco.constraint=%s (found: %s); it starts from %s",
                local_path,
                self.disco.constraint,
                saved and saved["constraint"],
                self.controller.state_dict(),
            )


def keep_mini_batches_whole(data: TensorDict, ranks: int) -> TensorDict:
    """Make verl cut a rank's rows where the trainer dealt them, and shuffle nothing but whole mini-batches.

    Raises:
        ValueError: the rows are in another order than dealt.
    """
    mini_batch = data["mini_batch_id"]
    count = int(mini_batch.max()) + 1
    rows = len(data) // count
    if not torch.equal(mini_batch.cpu(), torch.arange(count).repeat_interleave(rows)):
        raise ValueError(
            f"the {len(data)} rows of this rank are not {count} equal runs, one per mini-batch: the batch was "
            "reordered after verl_ext.training had dealt it"
        )
    options = dict(tu.pop(data, key="dataloader_kwargs", default={}))
    if options.pop("shuffle", False):
        # verl would shuffle rows, with a seed of each rank's own, and tear questions apart.
        epochs, seed = tu.pop(data, key="epochs", default=1), tu.get(data, key="seed", default=42)
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
        data = tu.index_select_tensor_dict(data, (order[:, None] * rows + torch.arange(rows)).flatten())
        tu.assign_non_tensor(data, epochs=1)
    tu.assign_non_tensor(data, mini_batch_size=rows * ranks, dataloader_kwargs=options)
    return data


class DiscoActorRolloutRefWorker(ActorRolloutRefWorker):
    """verl's hybrid worker whose actor takes DisCO updates."""

    actor_worker_cls = DiscoTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        super().init_model()
        if self.actor is not None:
            actor = omega_conf_to_dataclass(self.config.actor)
            self.actor.configure(actor.policy_loss.disco, actor.entropy_coeff)
