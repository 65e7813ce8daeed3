"""The exact DisCO update inside verl's training worker: measure, exchange, weigh, train.

One subclass of verl's ``TrainingWorker``, whatever the engine (FSDP, Megatron), micro-batching, padding or sequence
parallelism below it. Per mini-batch, on every rank:

1. measure: log-probabilities of the rank's rows under the current policy, by a forward pass without gradient; in the
   first mini-batch after a rollout they are ``old_log_probs`` and cost nothing;
2. exchange: one small table (question, label, score, tokens, KL sum) is gathered over the data-parallel ranks;
3. weigh: the objective gives a weight per response, the controller one coefficient, the same on every rank;
4. train: verl's ``train_batch`` runs the micro-batches, each with its share of the separable loss.

Rows carry what ``verl_ext.training`` wrote: ``group_id``, ``group_size``, ``sample_index``, ``sequence_reward``,
``mini_batch_id``, ``fresh_old_log_probs``, ``entropy_logged``, and ``local_step`` of ``local_steps`` for trainers that
update several times between two weight synchronisations. verl's conventions that matter here: a loss function returns
dp_size times its micro-batch's share of the global sum; fields of the batch reach it as ``data[...]``.
"""

import json
import logging
import math
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.padding import no_padding_2_padding

from recipe.disco.constraint import kl_estimate, kl_standard_error, price
from recipe.disco.loss import micro_batch_loss, require_numbers
from recipe.disco.metrics import group_metrics
from recipe.disco.objectives import weigh
from recipe.disco.scores import SCORES, compute_score, masked
from recipe.disco.settings import DiscoConfig

logger = logging.getLogger(__name__)

STATE_FILE = "disco_controller.json"


def padded(x: Tensor) -> Tensor:
    """verl's rows are jagged in its V1 trainer; (B, T), padded with 0."""
    return x.to_padded_tensor(0) if x.is_nested else x


def largest_divisor(n: int, limit: int) -> int:
    """Largest divisor of ``n`` that is at most ``limit``."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)


class DiscoTrainingWorker(TrainingWorker):
    """verl's training worker with the DisCO update."""

    def configure(self, config: DiscoConfig, entropy_coeff: float = 0.0) -> None:
        """Set the method's constants, once, after the engine is built."""
        self.disco = config
        self.controller = config.controller()
        self.entropy_coeff = entropy_coeff
        self._first_after_rollout = True
        self._last_kl = 0.0
        self._noise_told = 0.0
        self._sides_told = False
        self.set_loss_fn(self._loss)

    # One rollout ----------------------------------------------------------------------------------------------------

    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        """All updates on one rollout. The trainer dealt whole questions to mini-batches; keep them so."""
        mini_batch = data["mini_batch_id"]
        count = int(mini_batch.max()) + 1
        rows, ranks = len(data) // count, self.engine.get_data_parallel_size()
        if not torch.equal(mini_batch.cpu(), torch.arange(count).repeat_interleave(rows)):
            raise ValueError(
                f"the {len(data)} rows of this rank are not {count} equal runs, one a mini-batch: the batch was "
                "reordered after verl_ext.training.trainer had dealt it"
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

        self._first_after_rollout = True
        if bool((data["local_step"] == 0).all()):
            # What disco.measure=lagged begins with: the policy is pi_old.
            self._last_kl = 0.0
        ends_step = bool((data["local_step"] == data["local_steps"] - 1).all())
        output = super().train_mini_batch(data)
        if ends_step:
            self.controller.end_step(self._last_kl)
        if output is not None:
            metrics = tu.get(output, "metrics")
            # What verl would average over the mini-batches.
            metrics["disco/measure_seconds"] = sum(metrics["disco/measure_seconds"])
            self._tell_of_noise(metrics)
        return output

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
            advice.append("more questions a mini-batch (the error falls with the root of the responses)")
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

    def infer_batch(self, data: TensorDict) -> TensorDict:
        """verl's, with a micro-batch size that divides the rows whatever their number."""
        self._fit_micro_batches(data, self.engine_config.infer_micro_batch_size_per_gpu)
        return super().infer_batch(data)

    # One mini-batch -------------------------------------------------------------------------------------------------

    def train_batch(self, data: TensorDict) -> TensorDict | None:
        """One optimizer step on one mini-batch, with the exact gradient of L."""
        started = time.perf_counter()
        lagged = self.disco.measure == "lagged"
        first, self._first_after_rollout = self._first_after_rollout, False
        # At pi_theta = pi_old there is nothing to measure: scores follow from old_log_probs and the KL is 0.
        fresh = bool(data["fresh_old_log_probs"].all())
        free = lagged or (first and fresh)
        # No update has come between: what the KL differs from 0 by is kernels, rounding and, of a rollout, old weights.
        same_weights = first and bool((data["local_step"] == 0).all())
        # verl's pass for old_log_probs logs the entropy; where there is none (bypass mode), we do.
        entropy_unknown = first and not bool(data["entropy_logged"].all())
        if free:
            log_prob, entropy = padded(data["old_log_probs"]).float(), None
        else:
            log_prob, entropy = self._forward(data, with_entropy=entropy_unknown)
        # None on pipeline stages before the last: no loss is evaluated there.
        metrics = {} if log_prob is None else self._weigh(data, log_prob, entropy, free)
        measured = time.perf_counter() - started

        self._fit_micro_batches(data, self.engine_config.micro_batch_size_per_gpu)
        if lagged and entropy_unknown:
            tu.assign_non_tensor(data, calculate_entropy=True)
        # What the loss sees of each response, where nothing was measured before.
        self._trained: list[Tensor] | None = [] if free else None
        result = super().train_batch(data)
        seen = metrics
        # Not on pipeline stages before the last.
        if self._trained:
            # Coefficient and penalty stay those that were in force.
            kl_sum, length, entropy_sum = self._gather(torch.cat(self._trained).to(log_prob.device)).unbind(-1)
            seen = self._kl_metrics(kl_sum, length)
            if lagged:
                self._last_kl = seen["kl"]
                metrics |= seen | {"over_delta": float(self._last_kl > self.disco.delta)}
                metrics |= {"entropy": float(entropy_sum.sum()) / max(self._tokens, 1)} if entropy_unknown else {}
        if same_weights and seen:
            metrics["kl_floor"] = seen["kl"]
        if result is not None:
            found = tu.get(result, "metrics")
            metrics |= {"measured": float(not free), "measure_seconds": measured}
            # verl goes on without an update where the gradient is not finite.
            metrics["skipped_updates"] = float(not math.isfinite(found.get("grad_norm", 0.0)))
            # verl's "loss" is the value of the separable form, which only has L's gradient.
            found.update({f"disco/{k}": v for k, v in metrics.items()}, loss=metrics["loss"])
        return result

    def _gather(self, table: Tensor) -> Tensor:
        """The rows of all data-parallel ranks, which have equally many, on the CPU; the same on every rank."""
        group = self.engine.get_data_parallel_group()
        parts = [torch.empty_like(table) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, table, group=group)
        return torch.cat(parts).cpu()

    @staticmethod
    def _kl_metrics(kl_sum: Tensor, length: Tensor) -> dict[str, float]:
        """The mini-batch's KL and its standard error, from each response's sum and tokens."""
        error = kl_standard_error(kl_sum, length)
        kl = float(kl_sum.sum()) / max(int(length.sum()), 1)
        return {"kl": kl, **({} if error is None else {"kl_standard_error": error})}

    def _fit_micro_batches(self, data: TensorDict, size: int | None) -> None:
        if not self.engine_config.use_dynamic_bsz and size:
            tu.assign_non_tensor(data, micro_batch_size_per_gpu=largest_divisor(len(data), size))

    def _forward(self, data: TensorDict, with_entropy: bool) -> tuple[Tensor | None, Tensor | None]:
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
        self._fit_micro_batches(data, engine.infer_micro_batch_size_per_gpu)
        with self.engine.eval_mode(disable_auto_offload=True):
            # The engine's own: the worker's wrapper returns None on ranks that must weigh, too.
            output = self.engine.infer_batch(data, loss_function=None)
        output = (output or {}).get("model_output", {})
        names = ("log_probs", "entropy")
        return tuple(no_padding_2_padding(output[n], data).float() if n in output else None for n in names)

    def _reference(self, data: TensorDict, device: torch.device) -> Tensor | None:
        """Log-probabilities (B, T) under the frozen reference, for a score that compares with it."""
        if SCORES[self.disco.score].base != "reference":
            return None
        return padded(data["ref_log_prob"]).float().to(device)

    def _weigh(
        self, data: TensorDict, log_prob: Tensor, entropy: Tensor | None, free: bool = False
    ) -> dict[str, float]:
        """Exchange the table, write each row's weight and the coefficient into ``data``; return the metrics.

        Args:
            free: ``log_prob`` are old_log_probs, which say nothing of the KL.
        """
        mask = padded(data["response_mask"]).bool().to(log_prob.device)
        old = padded(data["old_log_probs"]).float().to(log_prob.device)
        columns = {
            "question": data["group_id"],
            "size": data["group_size"],
            "index": data["sample_index"],
            "reward": data["sequence_reward"],
            "length": mask.sum(-1),
            "score": compute_score(self.disco.score, log_prob, old, mask, self._reference(data, log_prob.device)),
            "kl": kl_estimate(log_prob, old, mask, self.disco.kl_estimator).sum(-1),
            "entropy": masked(log_prob if entropy is None else entropy, mask).sum(-1),
        }
        table = torch.stack([x.to(log_prob.device, torch.float64) for x in columns.values()], -1)
        question, size, index, reward, length, score, kl_sum, entropy_sum = self._gather(table).unbind(-1)
        question, length = question.long(), length.long()

        real = question >= 0
        for name, x in (("sequence_reward", reward), ("score", torch.where(length > 0, score, 0.0)), ("KL", kl_sum)):
            require_numbers(name, torch.where(real, x, 0.0), index=index)
        # Without a token the weight is 0, but 0 times NaN is NaN.
        require_numbers(f"disco.score={self.disco.score} (0, say, for a response without a token)", score, index=index)
        refuse_torn_questions(question, size.long())

        # In the rewards' own precision, as in disco_loss: a reward of 0.7 reaches a threshold of 0.7.
        positive = reward.float() >= self.disco.positive_threshold
        settings = self.disco.settings()
        value, weight = weigh(self.disco.objective, score, positive, question, length, settings)
        self._tell_of_swapped_sides(weight, positive)
        self._tokens = int(length.sum())
        # Where it is free: 0, or with disco.measure=lagged the previous mini-batch's.
        measured = {"kl": self._last_kl} if free else self._kl_metrics(kl_sum, length)
        kl = self._last_kl = measured["kl"]
        penalty, coefficient = price(self.controller, kl)

        rank, rows = self.engine.get_data_parallel_rank(), len(data)
        data["disco_weight"] = weight[rank * rows : (rank + 1) * rows].float().to(data["group_id"].device)
        tu.assign_non_tensor(data, disco_coefficient=coefficient, disco_tokens=self._tokens)
        return {
            "loss": penalty - float(value.value),
            "objective": float(value.value),
            "objective_positive": float(value.positive),
            "objective_negative": float(value.negative),
            **measured,
            "coefficient": coefficient,
            "penalty": penalty,
            "over_delta": float(kl > self.disco.delta),
            **{f"constraint_{k}": v for k, v in self.controller.state_dict().items() if isinstance(v, int | float)},
            **group_metrics(score, positive, question, length, weight),
            "questions": float(len(question[real].unique())),
            "padding_rows": float((~real).double().mean()),
            "no_mixed_group": float(not bool(weight.any())),
            **({} if entropy is None else {"entropy": float(entropy_sum.sum()) / max(self._tokens, 1)}),
        }

    def _tell_of_swapped_sides(self, weight: Tensor, positive: Tensor) -> None:
        """Say once when an objective of the user's favours wrong responses."""
        right, wrong = float(weight[positive].sum()), float(weight[~positive].sum())
        if (right < 0 or wrong > 0) and not self._sides_told and self._speaks_for_all():
            self._sides_told = True
            logger.warning(
                "disco.objective=%s favours wrong responses: the weights dJ/ds of right ones add up to %.2g, of wrong "
                "ones to %.2g. Its J = positive - negative should rise with the scores of right responses",
                self.disco.objective,
                right,
                wrong,
            )

    # One micro-batch ------------------------------------------------------------------------------------------------

    def _loss(self, model_output: dict[str, Any], data: TensorDict, dp_group=None) -> tuple[Tensor, dict]:
        """verl's loss contract around :func:`recipe.disco.loss.micro_batch_loss`."""
        log_prob = no_padding_2_padding(model_output["log_probs"], data)
        mask = padded(data["response_mask"]).bool()
        old, tokens = padded(data["old_log_probs"]), tu.get(data, "disco_tokens")
        require_numbers("log_prob", log_prob.detach(), mask, data["sample_index"])
        rho = padded(data["rollout_is_weights"]) if "rollout_is_weights" in data.keys() else None
        if rho is not None:
            require_numbers("rollout_is_weights", rho, mask, data["sample_index"])
        loss = micro_batch_loss(
            log_prob,
            old,
            mask,
            data["disco_weight"],
            tu.get(data, "disco_coefficient"),
            tokens,
            score=self.disco.score,
            kl_estimator=self.disco.kl_estimator,
            ref_log_prob=self._reference(data, log_prob.device),
            rollout_is_weights=rho,
        )
        # In float16 verl scales the loss until gradients overflow, and back.
        if log_prob.requires_grad and log_prob.dtype != torch.float16:
            name = f"the gradient of disco.score={self.disco.score} by the log-probabilities"
            log_prob.register_hook(lambda g: require_numbers(name, g.sum(-1), index=data["sample_index"]))
        entropy = torch.zeros_like(loss)
        if "entropy" in model_output:
            entropy = masked(no_padding_2_padding(model_output["entropy"], data), mask).sum(-1)
            if self.entropy_coeff:
                loss = loss - self.entropy_coeff * entropy.sum() / max(tokens, 1)
        if self._trained is not None:
            kl = kl_estimate(log_prob.detach(), old, mask, self.disco.kl_estimator).sum(-1)
            columns = (kl, mask.sum(-1), entropy.detach().expand_as(kl))
            self._trained.append(torch.stack([x.double() for x in columns], -1))
        return loss * data["dp_size"], {}

    # Checkpoints ----------------------------------------------------------------------------------------------------

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None):
        """verl's, plus the controller's state in ``disco_controller.json`` beside the weights."""
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)
        # Every rank with outputs holds the same state and may write it.
        if self.engine.is_mp_src_rank_with_outputs():
            os.makedirs(local_path, exist_ok=True)
            temporary = os.path.join(local_path, f".{STATE_FILE}.{dist.get_rank()}")
            with open(temporary, "w") as f:
                json.dump({"constraint": self.disco.constraint, "state": self.controller.state_dict()}, f)
            os.replace(temporary, os.path.join(local_path, STATE_FILE))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=False):
        """verl's, plus the controller's state."""
        path = os.path.join(local_path, STATE_FILE) if local_path else ""
        saved = None
        if os.path.exists(path):
            with open(path) as f:
                saved = json.load(f)
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


def refuse_torn_questions(question: Tensor, size: Tensor) -> None:
    """Stop when a mini-batch holds only a part of a question's responses.

    Args:
        question: (B,) int, < 0 for padding rows.
        size: (B,) how many responses the row's question has in the whole batch.

    Raises:
        ValueError: names the first torn question and the numbers.
    """
    ids, inverse, counts = question.unique(return_inverse=True, return_counts=True)
    torn = (question >= 0) & (counts[inverse] != size)
    if torn.any():
        row = int(torn.nonzero()[0])
        raise ValueError(
            f"question {int(question[row])} has {int(counts[inverse][row])} of its {int(size[row])} responses in this "
            "mini-batch: DisCO needs all of them there; train with verl_ext's trainer and do not reorder its batches"
        )


class DiscoActorRolloutRefWorker(ActorRolloutRefWorker):
    """verl's hybrid worker whose actor takes DisCO updates."""

    actor_worker_cls = DiscoTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        super().init_model()
        if self.actor is not None:
            actor = omega_conf_to_dataclass(self.config.actor)
            self.actor.configure(actor.policy_loss.disco, actor.entropy_coeff)
