"""verl's V1 trainers with whole-group mini-batches, a worker class of choice, and metrics in a JSONL file.

They stand in verl's ``TRAINER_REGISTRY`` under verl's own names, because verl asks for the mode "sync" by name in seven
places. Without a ``verl_ext`` node in the configuration they do what verl's do, and write ``metrics.jsonl``.
"""

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import orjson
import ray
import torch
import transfer_queue as tq
import verl  # noqa: F401  (first, whole: its plugins register this module's trainers while parts of it are imported)
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import SYNTHETIC_PADDING_SEQ_LEN, upsample_batch_to_divisible_size
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.utils.import_utils import load_class_from_fqn
from verl.utils.seqlen_balancing import log_seqlen_unbalance

from verl_ext.detached import DetachedWorker
from verl_ext.grouping import deal
from verl_ext.runs import METRICS_FILE


class MetricsLog:
    """verl's ``Tracking``, and a JSONL file: one object a logged step, flat metric names plus ``step``.

    A resumed run appends. Lines that do not belong to it (of steps that it runs again, or of an earlier run that is not
    resumed) are moved out of the way with the file that held them: ``metrics.jsonl.1``, ``.2`` and so on.
    """

    def __init__(self, tracking, path: str, resumed_step: int):
        self._tracking = tracking
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        found = []
        if os.path.exists(path):
            with open(path, "rb") as f:
                # Without the newline it is the half of a line that a crash left behind.
                found = [(orjson.loads(line)["step"], line) for line in f if line.endswith(b"\n")]
        kept = [(step, line) for step, line in found if 0 < resumed_step and step <= resumed_step]
        if len(kept) < len(found):
            number = next(i for i in itertools.count(1) if not os.path.exists(f"{path}.{i}"))
            os.rename(path, f"{path}.{number}")
        with open(f"{path}.new", "wb") as f:
            f.writelines(line for _, line in kept)
        os.replace(f"{path}.new", path)
        self._logged = {step for step, _ in kept}
        self._file = open(path, "ab", buffering=0)

    def log(self, data: dict[str, Any], step: int, **kwargs) -> None:
        self._tracking.log(data=data, step=step, **kwargs)
        if step in self._logged:
            # verl evaluates a checkpoint once more when it resumes.
            return
        numbers = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in data.items()}
        line = orjson.dumps({"step": step, **numbers}, option=orjson.OPT_SERIALIZE_NUMPY, default=str)
        self._file.write(line + b"\n")

    def finish(self, *args, **kwargs):
        self._file.close()
        return self._tracking.finish(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._tracking, name)


GROUP_FIELDS = (
    *("group_id", "group_size", "sample_index", "sequence_reward", "fresh_old_log_probs", "mini_batch_id"),
    *("entropy_logged", "local_step", "local_steps"),
)
"""Written by :class:`ExtendedTrainer` for workers that train on whole questions."""

TOTALS = ("training/failed_questions", "training/padding_rows", "disco/measure_seconds")
"""Metrics of which a step logs the sum, not the mean, over its local updates."""

UNREAD = {"rm_scores", "log_probs", "entropy"}
"""Tensors of a batch that no model and no loss reads: verl copies them to other names, or uses them in the trainer."""


def tensors_alone(method: Callable, without: Iterable[str] = ()) -> Callable:
    """A trainer's step that sends ``batch`` to workers, made to send the tensors that they read and nothing else.

    Texts, ground truths and the like are read by no engine and no loss, yet cost more time than a small model's forward
    pass: to fetch, and to take apart and together for each mini- and micro-batch. With a processor (images) all goes.

    Args:
        method: (trainer, batch, metrics) -> batch.
        without: names of tensors that this step does not read either, besides ``UNREAD``.
    """
    unread = UNREAD.union(without)

    @functools.wraps(method)
    def step(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if "verl_ext" not in self.config or self.processor is not None:
            return method(self, batch, metrics)
        row = tq.kv_batch_get(keys=batch.keys[:1], partition_id=batch.partition_id)
        before = batch.fields
        batch.fields = [name for name, x in row.items() if isinstance(x, torch.Tensor) and name not in unread]
        try:
            return method(self, batch, metrics)
        finally:
            batch.fields = before

    return step


for_forward_passes = functools.partial(tensors_alone, without=(*GROUP_FIELDS, "rollout_log_probs"))
"""For steps that evaluate a model on the responses and train nothing."""


class ExtendedTrainer:
    """Mixin in front of a verl trainer. The ``verl_ext`` node says what it adds:

    - ``validator``: function (config) -> None that refuses wrong settings;
    - ``actor_worker_class``: subclass of verl's ``ActorRolloutRefWorker`` to use instead;
    - ``whole_groups``: mini-batches of whole questions, tokens balanced over ranks within each;
    - ``metrics``: the worker's metrics with this prefix are logged without verl's ``actor/`` before it.
    """

    def __init__(self, config):
        if validator := OmegaConf.select(config, "verl_ext.validator"):
            load_class_from_fqn(validator, "validator")(config)
        self._whole_groups = bool(OmegaConf.select(config, "verl_ext.whole_groups", default=False))
        super().__init__(config)

    @property
    def logger(self):
        """What ``fit`` sets to verl's ``Tracking``, with the metrics file behind it."""
        return self._logger

    @logger.setter
    def logger(self, tracking) -> None:
        path = os.path.join(self.config.trainer.default_local_dir, METRICS_FILE)
        self._logger = MetricsLog(tracking, path, resumed_step=self.global_steps)

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        if worker := self._actor_worker_class():
            for role in self.role_worker_mapping:
                if "actor" in str(role):
                    self.role_worker_mapping[role] = ray.remote(worker)

    def _actor_worker_class(self) -> type | None:
        """What the actor's workers are, if not verl's own."""
        name = OmegaConf.select(self.config, "verl_ext.actor_worker_class")
        return load_class_from_fqn(name, "actor worker") if name else None

    def _balance_batch(self, batch: KVBatchMeta, metrics, logging_prefix="global_seqlen", keep_minibatch=False):
        if "verl_ext" not in self.config:
            return super()._balance_batch(batch, metrics, logging_prefix, keep_minibatch)
        group = [key.rsplit("_", 2)[0] for key in batch.keys]
        reward = self._sequence_rewards(batch)
        metrics["training/mixed_questions"] = mixed_share(group, reward)
        if not self._whole_groups:
            return super()._balance_batch(batch, metrics, logging_prefix, keep_minibatch)
        actor = self.config.actor_rollout_ref.actor
        lengths = [tag["seq_len"] for tag in batch.tags]
        plan = deal(
            group,
            lengths,
            groups_per_mini_batch=actor.ppo_mini_batch_size,
            ranks=self._actor_data_parallel_size(),
            micro_batches=self._fixed_micro_batches(),
            padding_length=SYNTHETIC_PADDING_SEQ_LEN,
            shuffle_seed=actor.data_loader_seed + self.global_steps if actor.shuffle else None,
        )
        names = {name: i for i, name in enumerate(dict.fromkeys(group))}
        size = Counter(group)
        padding = plan.num_padding
        fields = {
            "group_id": [names[g] for g in group] + [-1] * padding,
            "group_size": [size[g] for g in group] + [0] * padding,
            "sample_index": list(range(len(group) + padding)),
            "sequence_reward": reward + [0.0] * padding,
            "fresh_old_log_probs": [self._old_log_probs_are_fresh()] * (len(group) + padding),
            "entropy_logged": [not self._bypass_mode()] * (len(group) + padding),
            "local_step": [self.local_trigger_step] * (len(group) + padding),
            "local_steps": [self.parameter_sync_step] * (len(group) + padding),
        }
        # To a multiple of the size wanted: adds exactly what is missing.
        batch = upsample_batch_to_divisible_size(batch, len(group) + padding, self.tokenizer.eos_token_id)
        batch.reorder(plan.order)
        fields = {k: torch.tensor([v[i] for i in plan.order]) for k, v in fields.items()}
        fields["mini_batch_id"] = torch.tensor(plan.mini_batch)
        written = tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )
        assert list(written.keys) == list(batch.keys)

        tokens = [*lengths, *[SYNTHETIC_PADDING_SEQ_LEN] * padding]
        by_rank = [[row for part in parts for row in part] for parts in zip(*plan.partitions, strict=True)]
        metrics.update(log_seqlen_unbalance(seqlen_list=tokens, partitions=by_rank, prefix=logging_prefix))
        metrics["training/failed_questions"] = self.config.data.train_batch_size // self.parameter_sync_step - len(
            names
        )
        metrics["training/padding_rows"] = padding
        return batch

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        self._totals: Counter[str] = Counter()
        batch = super().step(metrics, timing_raw)
        # verl averages over the step's local updates.
        metrics.update(self._totals)
        return batch

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        batch = super()._step_once(metrics, timing_raw, sample_batch_size)
        self._totals.update({name: metrics[name] for name in TOTALS if name in metrics})
        return batch

    def _fixed_micro_batches(self) -> list[int]:
        """Sizes of fixed micro-batches, for training and for log-probabilities, that must divide a rank's rows."""
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        if actor.use_dynamic_bsz:
            return []
        return [actor.ppo_micro_batch_size_per_gpu, rollout.log_prob_micro_batch_size_per_gpu]

    def _sequence_rewards(self, batch: KVBatchMeta) -> list[float]:
        """Each row's summed reward, before any KL term; NaN stops the run."""
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
        reward = [float(row.sum()) for row in data["rm_scores"].unbind()]
        bad = [i for i, r in enumerate(reward) if not np.isfinite(r)]
        if bad:
            raise ValueError(
                f"the reward of sample {batch.keys[bad[0]]} (row {bad[0]}) is {reward[bad[0]]}; "
                f"{len(bad)} of {len(reward)} samples of step {self.global_steps} have no finite reward"
            )
        return reward

    def _old_log_probs_are_fresh(self) -> bool:
        """Whether old_log_probs are those of the policy that is about to be updated."""
        return not self._bypass_mode() and self.local_trigger_step == 0

    def _bypass_mode(self) -> bool:
        """Whether old_log_probs are the rollout's, so that verl makes no pass for them and logs no entropy."""
        return bool(OmegaConf.select(self.config, "algorithm.rollout_correction.bypass_mode", default=False))

    def _actor_data_parallel_size(self) -> int:
        group = self.actor_rollout_wg
        if "actor" not in group._dispatch_info:
            group._dispatch_info["actor"] = group._query_dispatch_info("actor")
        return max(group._dispatch_info["actor"]) + 1

    @for_forward_passes
    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return super()._compute_old_log_prob(batch, metrics)

    @for_forward_passes
    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return super()._compute_ref_log_prob(batch, metrics)

    @for_forward_passes
    def _compute_values(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return super()._compute_values(batch, metrics)

    @tensors_alone
    def _update_critic(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return super()._update_critic(batch, metrics)

    @tensors_alone
    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        if group := OmegaConf.select(self.config, "verl_ext.metrics"):
            for name in [k for k in metrics if k.startswith(f"actor/{group}/")]:
                metrics[name.removeprefix("actor/")] = metrics.pop(name)
        return batch


def mixed_share(group: list[str], reward: list[float]) -> float:
    """Share of the questions whose responses did not all get the same reward."""
    rewards: dict[str, set[float]] = {}
    for name, value in zip(group, reward, strict=True):
        rewards.setdefault(name, set()).add(value)
    return sum(len(values) > 1 for values in rewards.values()) / max(len(rewards), 1)


class ExtendedTrainerSync(ExtendedTrainer, PPOTrainerSync):
    """verl's ``sync`` trainer, extended."""


class ExtendedTrainerColocateAsync(ExtendedTrainer, PPOTrainerColocateAsync):
    """verl's ``colocate_async`` trainer, extended."""


class ExtendedTrainerSeparateAsync(ExtendedTrainer, PPOTrainerSeparateAsync):
    """verl's ``separate_async`` trainer, extended."""

    def _actor_worker_class(self) -> type:
        worker = super()._actor_worker_class()
        return DetachedWorker if worker is None else type(worker.__name__, (worker, DetachedWorker), {})


def register() -> None:
    """Put the extended trainers in the place of verl's."""
    for cls in (ExtendedTrainerSync, ExtendedTrainerColocateAsync, ExtendedTrainerSeparateAsync):
        stock = cls.__mro__[2]
        name = next((n for n, c in TRAINER_REGISTRY.items() if c in (stock, cls)), None)
        if name is None:
            raise RuntimeError(f"verl no longer registers its trainer {stock.__name__}; verl-disco needs an update")
        TRAINER_REGISTRY[name] = cls
