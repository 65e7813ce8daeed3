"""Extend verl's V1 trainers: whole-group mini-batches, another worker class, metrics in a JSONL file.

The extended trainers replace verl's in ``TRAINER_REGISTRY`` under the same names, because verl compares the mode with
"sync" in seven places. Without a ``verl_ext`` node in the configuration they only add ``metrics.jsonl`` and a line per
step.
"""

import copy
import functools
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import verl  # noqa: F401  (first: its plugins import this module while parts of verl are being imported)
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import AdvantageEstimator
from verl.trainer.ppo.padding_utils import SYNTHETIC_PADDING_SEQ_LEN, upsample_batch_to_divisible_size
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync, trainer_base
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.utils.import_utils import load_class_from_fqn
from verl.utils.seqlen_balancing import log_seqlen_unbalance
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from verl_ext.recipes import installed
from verl_ext.runs.files import write_whole
from verl_ext.runs.folder import METRICS_FILE, how_to_continue
from verl_ext.training.advantages import estimating
from verl_ext.training.bands import weight_by_pass_rate
from verl_ext.training.detached import DetachedWorker
from verl_ext.training.grouping import deal, values_by_group
from verl_ext.training.metrics_log import ROW_FILE, MetricsLog, as_line, is_evaluated, read_unlogged
from verl_ext.training.progress import Progress, progress_wanted
from verl_ext.training.replay import watched
from verl_ext.training.resume import name_whole_checkpoint, remove_old_checkpoints, resume_fault, step_folder
from verl_ext.training.reward_loop import CountingRewardManager, Tally, reward_function, reward_timeout
from verl_ext.training.rows import ROW_FIELDS, BatchFacts, Rows, last_of_session, of_sessions
from verl_ext.training.seeds import seed_of, seeded
from verl_ext.training.skipping import SETTING, SkippingWorker, teaching
from verl_ext.training.transfer import Batch, RowKey, parse_key, read, write
from verl_ext.training.watch import Watch

UNREAD = {"rm_scores", "log_probs", "entropy"}
"""Tensors that no model and no loss reads: verl copies them to other names, or uses them in the trainer only."""

COUNTING_ROWS = {str(e.value) for e in AdvantageEstimator} - {AdvantageEstimator.GRPO, AdvantageEstimator.GAE}
"""verl's estimators that compare responses, or whiten over them, without asking which rows are one response."""


@functools.cache
def totals() -> tuple[str, ...]:
    """Name the metrics that a step logs as a sum over its local updates, not as a mean."""
    return ("training/failed_questions", "training/padding_rows", *(n for r in installed() for n in r.totals))


def tensors_alone(method: Callable, without: Iterable[str] = ()) -> Callable:
    """Make a trainer's method that sends ``batch`` to workers send only the tensors that they read.

    No engine and no loss reads texts or ground truths, yet fetching, slicing and joining them for each mini- and
    micro-batch costs more time than a small model's forward pass. With a processor (images) everything is sent.

    Args:
        method: (trainer, batch, metrics) -> batch.
        without: tensors that this method does not read, besides ``UNREAD``.
    """
    unread = UNREAD.union(without)

    @functools.wraps(method)
    def step(self, batch: Batch, metrics: dict) -> Batch:
        if "verl_ext" not in self.config or self.processor is not None:
            return method(self, batch, metrics)
        before = batch.fields
        batch.fields = tensor_names(read(batch, rows=slice(1)), unread)
        try:
            return method(self, batch, metrics)
        finally:
            batch.fields = before

    return step


def tensor_names(row: TensorDict, without: Collection[str]) -> list[str]:
    """List the tensors of a row, except those in ``without``."""
    return [name for name, x in row.items() if isinstance(x, torch.Tensor) and name not in without]


for_forward_passes = functools.partial(tensors_alone, without=(*ROW_FIELDS, "rollout_log_probs"))
"""For methods that run a model on the responses without training it."""


class ExtendedTrainer:
    """Mixin in front of a verl trainer, set by the ``verl_ext`` node.

    - ``validator``: function (config) -> None that refuses wrong settings;
    - ``actor_worker_class``: subclass of verl's ``ActorRolloutRefWorker`` to use instead;
    - ``whole_groups``: each mini-batch holds whole groups, with its tokens balanced over ranks;
    - ``skip_rows_without_gradient``: rows that teach nothing are left out of the training pass;
    - ``metrics``: prefix of the worker's metrics that are logged without verl's ``actor/`` in front;
    - ``max_failed_rewards``: share of a step's rewards that may fail before the run stops;
    - ``reward_timeout``: seconds after which a reward has failed;
    - ``progress``: False prints no line per step.
    """

    def __init__(self, config):
        if validator := OmegaConf.select(config, "verl_ext.validator"):
            load_class_from_fqn(validator, "validator")(config)
        self._whole_groups = bool(OmegaConf.select(config, "verl_ext.whole_groups", default=False))
        self._skip_rows = bool(OmegaConf.select(config, SETTING, default=False))
        self._most_failed_rewards, self._shows_progress = most_failed_rewards(config), progress_wanted(config)
        reward_timeout(config)
        self._rewards, self._watch = Tally(), Watch(config)
        self._checkpoints_are_elsewhere = self._sessions_told = False
        super().__init__(config)

    def _build_replay_buffer(self):
        buffer = super()._build_replay_buffer()
        if "verl_ext" not in self.config:
            return buffer
        return watched(
            buffer,
            batch_size=self.config.data.train_batch_size,
            most_batches=OmegaConf.select(self.config, "algorithm.filter_groups.max_num_gen_batches", default=0) or 0,
            on_failure=self._on_failed_questions,
        )

    @property
    def logger(self):
        """verl's ``Tracking``, which ``fit`` sets, plus the metrics file."""
        return self._logger

    @logger.setter
    def logger(self, tracking) -> None:
        trains = not self.config.trainer.get("val_only", False)
        self._logger = MetricsLog(
            tracking,
            self._folder / METRICS_FILE,
            resumed_step=self.global_steps,
            trains=trains,
            unlogged=read_unlogged(step_folder(self._folder, self.global_steps)) if self.global_steps else (),
            progress=Progress(self.config, self.total_training_steps if trains else None)
            if self._shows_progress
            else None,
        )

    @property
    def _folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir).absolute()

    def fit(self, agent_loop_manager: Any) -> None:
        """Train; first evaluate the resumed checkpoint if the run ended before its evaluation was logged."""
        trainer = self.config.trainer
        if "verl_ext" in self.config and not trainer.get("val_before_train", True):
            # verl reads val_only only after this evaluation, and would train without it.
            if trainer.get("val_only", False):
                trainer.val_before_train = True
            elif self._misses_evaluation():
                print(f"verl-disco: evaluating step {self.global_steps}: its evaluation was not logged", flush=True)
                trainer.val_before_train = True
        super().fit(agent_loop_manager)

    def _misses_evaluation(self) -> bool:
        """Tell whether the resumed checkpoint's evaluation was due and is not logged."""
        trainer, step = self.config.trainer, self.global_steps
        if step == 0 or trainer.test_freq <= 0 or trainer.resume_mode != "auto":
            return False
        due = step >= self.total_training_steps or step % trainer.test_freq == 0
        return due and not is_evaluated(self._folder / METRICS_FILE, step)

    def _load_checkpoint(self) -> None:
        trainer, actor = self.config.trainer, self.config.actor_rollout_ref.actor
        if "verl_ext" in self.config and trainer.resume_mode == "auto":
            name_whole_checkpoint(
                self._folder,
                ["actor", "critic"] if self.use_critic else ["actor"],
                megatron=actor.strategy == "megatron",
                contents=OmegaConf.select(actor, "checkpoint.load_contents") or (),
            )
        super()._load_checkpoint()

    def _save_checkpoint(self) -> None:
        """Save as verl does; remove older checkpoints afterwards, when verl's tracker names the new one."""
        if "verl_ext" not in self.config:
            return super()._save_checkpoint()
        try:
            self._keep_row()
        except Exception as e:
            # The checkpoint matters more than the metrics in it.
            print(f"verl-disco: warning: no metrics in the checkpoint of step {self.global_steps}: {e!r}", flush=True)
        later = OmegaConf.select(self.config, "actor_rollout_ref.actor.checkpoint.async_save", default=False)
        if later or self._checkpoints_are_elsewhere:
            # Only verl's engine knows when and on which node they are written.
            return super()._save_checkpoint()
        with self._all_checkpoints_kept() as keep:
            try:
                super()._save_checkpoint()
            except Exception as e:
                raise RuntimeError(self._why_unsaved(str(e))) from e
        # Without a shared disk the weights are on the workers' nodes.
        self._checkpoints_are_elsewhere = bool(
            resume_fault(
                step_folder(self._folder, self.global_steps) / "actor",
                megatron=self.config.actor_rollout_ref.actor.strategy == "megatron",
                contents=OmegaConf.select(self.config, "actor_rollout_ref.actor.checkpoint.save_contents") or (),
            )
        )
        if removed := remove_old_checkpoints(self._folder, self.global_steps, keep):
            print(f"verl-disco: removed the checkpoints of steps {', '.join(map(str, removed))}", flush=True)

    def _why_unsaved(self, error: str) -> str:
        """Say what is left of a run whose checkpoint could not be written."""
        step, free = self.global_steps, ""
        with suppress(OSError):
            free = f" (free on this node: {shutil.disk_usage(self._folder).free / 2**30:.1f} GiB)"
        if "unexpected pos" in error:
            free += ", by which torch means a full disk"
        how = how_to_continue(self._folder, self.config.trainer.resume_mode) or "the same command begins anew"
        return (
            f"the checkpoint of step {step} in {self._folder} could not be written: see the error above{free}. Once it "
            f"can be, {how}"
        )

    @contextmanager
    def _all_checkpoints_kept(self) -> Iterator[dict[str, int | None]]:
        """Keep verl from removing checkpoints inside the block; yields how many to keep, by folder."""
        trainer = self.config.trainer
        names = {role: f"max_{role}_ckpt_to_keep" for role in ("actor", "critic")}
        before = {name: trainer[name] for name in (*names.values(), "remove_previous_ckpt_in_save") if name in trainer}
        only_one = before.get("remove_previous_ckpt_in_save")
        try:
            trainer.update(dict.fromkeys(before))
            yield {role: 1 if only_one else before.get(name) for role, name in names.items()}
        finally:
            trainer.update(before)

    def _keep_row(self) -> None:
        """Save the step's metrics in its checkpoint: verl evaluates before it logs, and the run may end in between.

        With them are the rows that wait for room on the disk: a resumed run does not make them again.
        """
        batch, metrics, started = self._done
        metrics, timing = dict(metrics), self.timing_raw | {"step": time.perf_counter() - started}
        accumulator = self._rollout_moe_lb_metrics_accumulator
        self._rollout_moe_lb_metrics_accumulator = copy.deepcopy(accumulator)
        try:
            epoch = (self.global_steps - 1) // self.steps_per_epoch
            self._compute_metrics(batch, metrics, timing, global_steps=self.global_steps, epoch=epoch)
        finally:
            self._rollout_moe_lb_metrics_accumulator = accumulator
        metrics.pop(trainer_base.DAPO_FILTERED_REWARD_COUNTS_KEY, None)
        folder = step_folder(self._folder, self.global_steps)
        folder.mkdir(parents=True, exist_ok=True)
        waiting = self._logger.write_waiting()
        write_whole(folder / ROW_FILE, waiting + as_line(self.global_steps, metrics))

    def _validate(self) -> dict[str, float]:
        """Evaluate as verl does, with failed rewards counted apart from those of the training step."""
        if "verl_ext" not in self.config:
            return super()._validate()
        self._take_tally()
        before, self._rewards = self._rewards, Tally()
        where = f"the evaluation at step {self.global_steps}"
        try:
            metrics = super()._validate()
        except Exception:
            self._count_rewards(where)
            raise
        # An evaluation stops a run only if all its rewards failed: a small set can exceed the limit by a few.
        metrics["validation/failed_rewards"] = self._count_rewards(where, only_if_all=True)
        self._rewards = before
        return metrics

    def _take_tally(self) -> None:
        self._rewards += self.reward_loop_manager.take_tally()

    def _count_rewards(self, where: str, only_if_all: bool = False) -> int:
        """Count and print the failures since the last call; stop if too many, or with ``only_if_all`` all, failed."""
        self._take_tally()
        if not only_if_all or 0 < self._rewards.asked <= self._rewards.failed:
            self._refuse_failures(where)
        tally, self._rewards = self._rewards, Tally()
        if tally.failed:
            print(f"verl-disco: warning: {tally.text(where)}", flush=True)
        return tally.failed

    def _refuse_failures(self, where: str) -> None:
        """Raise ValueError if more rewards failed than ``verl_ext.max_failed_rewards`` allows."""
        if self._rewards.failed > self._most_failed_rewards * self._rewards.asked:
            raise ValueError(
                f"{self._rewards.text(where)}; at most the share verl_ext.max_failed_rewards="
                f"{self._most_failed_rewards} may fail"
            )

    def _on_failed_questions(self) -> None:
        """Check the rewards when verl replaces questions with failed responses, which it might do for ever."""
        self._take_tally()
        if self._rewards.asked >= self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n:
            self._refuse_failures(f"step {self.global_steps}")

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        workers = {role: TrainingWorker for role in self.role_worker_mapping if str(role) == "critic"}
        actor = self._actor_worker_class()
        workers |= {role: actor or ActorRolloutRefWorker for role in self.role_worker_mapping if "actor" in str(role)}
        seed = seed_of(self.config) if "verl_ext" in self.config else None
        for role, worker in workers.items():
            if seed is not None:
                self.role_worker_mapping[role] = ray.remote(seeded(worker, seed))
            elif worker is actor:
                self.role_worker_mapping[role] = ray.remote(worker)

    def _actor_worker_class(self) -> type | None:
        """Return the class of the actor's workers; None for verl's own."""
        if name := OmegaConf.select(self.config, "verl_ext.actor_worker_class"):
            return load_class_from_fqn(name, "actor worker")
        return SkippingWorker if self._skip_rows else None

    def _balance_batch(self, batch: Batch, metrics, logging_prefix="global_seqlen", keep_minibatch=False):
        if "verl_ext" not in self.config:
            return super()._balance_batch(batch, metrics, logging_prefix, keep_minibatch)
        rows = [parse_key(key) for key in batch.keys]
        group = [row.uid for row in rows]
        where = f"{reward_function(self.config)}, step {self.global_steps}"
        reward = of_sessions(rows, sequence_rewards(read(batch, ["rm_scores"])["rm_scores"], batch.keys, where))
        metrics["training/mixed_questions"], metrics["training/right_questions"] = shares(group, reward)
        if not self._whole_groups:
            return super()._balance_batch(batch, metrics, logging_prefix, keep_minibatch)
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        # Fixed sizes must divide a rank's rows.
        micro_batches = [actor.ppo_micro_batch_size_per_gpu, rollout.log_prob_micro_batch_size_per_gpu]
        lengths = [tag["seq_len"] for tag in batch.tags]
        plan = deal(
            group,
            lengths,
            groups_per_mini_batch=actor.ppo_mini_batch_size,
            ranks=self._actor_data_parallel_size(),
            micro_batches=[] if actor.use_dynamic_bsz else micro_batches,
            padding_length=SYNTHETIC_PADDING_SEQ_LEN,
            shuffle_seed=actor.data_loader_seed + self.global_steps if actor.shuffle else None,
            trained=teaching(group, reward) if self._skip_rows else None,
        )
        self._mini_batches += (max(plan.mini_batch) + 1) * actor.ppo_epochs
        padding = plan.num_padding
        # Pads the batch to exactly this size, its smallest multiple.
        batch = upsample_batch_to_divisible_size(batch, len(group) + padding, self.tokenizer.eos_token_id)
        batch.reorder(plan.order)
        write(batch, Rows.dealt(group, [(row.uid, row.session) for row in rows], reward, plan).columns())

        tokens = [*lengths, *[SYNTHETIC_PADDING_SEQ_LEN] * padding]
        by_rank = [[row for part in parts for row in part] for parts in zip(*plan.partitions, strict=True)]
        metrics.update(log_seqlen_unbalance(seqlen_list=tokens, partitions=by_rank, prefix=logging_prefix))
        asked = self.config.data.train_batch_size // self.parameter_sync_step
        metrics["training/failed_questions"] = asked - len(set(group))
        metrics["training/padding_rows"] = padding
        return batch

    def step(self, metrics: dict, timing_raw: dict) -> Batch:
        started = time.perf_counter()
        self._totals: Counter[str] = Counter()
        self._mini_batches = 0
        try:
            batch = super().step(metrics, timing_raw)
        except Exception:
            # verl's error for a batch without responses does not mention failed rewards.
            if "verl_ext" in self.config:
                self._count_rewards(f"step {self.global_steps}")
            raise
        # verl has averaged these over the step's local updates.
        metrics.update(self._totals)
        if "verl_ext" in self.config:
            metrics["training/failed_rewards"] = self._count_rewards(f"step {self.global_steps}")
            for line in self._watch.lines(metrics, self._mini_batches, fresh=not self._bypass_mode()):
                print(f"verl-disco: warning: {line}", flush=True)
        self._done = batch, metrics, started
        return batch

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> Batch:
        batch = super()._step_once(metrics, timing_raw, sample_batch_size)
        self._totals.update({name: metrics[name] for name in totals() if name in metrics})
        return batch

    def _compute_advantage(self, batch: Batch, metrics: dict) -> Batch:
        rows = [parse_key(key) for key in batch.keys]

        def column(name: str) -> torch.Tensor:
            return read(batch, [name]).to_padded_tensor()[name]

        with estimating(self.config, column, rows, self._progress_of_training()):
            batch = super()._compute_advantage(batch, metrics)
        self._tell_of_sessions(rows)
        if "verl_ext" in self.config:
            metrics.update(self._weight_by_pass_rate(batch))
        return batch

    def _progress_of_training(self) -> float:
        """Return the share of the run's steps before this one."""
        return min(max(self.global_steps - 1, 0) / max(self.total_training_steps, 1), 1.0)

    def _tell_of_sessions(self, rows: Sequence[RowKey]) -> None:
        """Say once where verl's advantages take each of a session's trajectories for a response."""
        name = self.config.algorithm.adv_estimator
        if name in COUNTING_ROWS and not self._sessions_told and any(row.trajectory for row in rows):
            self._sessions_told = True
            print(
                f"verl-disco: warning: agents return several trajectories per session here, and verl's {name} counts "
                "each as a response: a session with more of them weighs more. algorithm=grpo, maxrl and dgpo go by "
                "sessions",
                flush=True,
            )

    def _weight_by_pass_rate(self, batch: Batch) -> dict[str, float]:
        """Share the batch's |advantages| out over the pass rates of its questions."""
        data = read(batch, ["advantages", "response_mask", "rm_scores"]).to_padded_tensor()
        mask = data["response_mask"]
        columns = data["rm_scores"].sum(-1), (data["advantages"].abs() * mask).sum(-1), mask.sum(-1)
        real = [i for i, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
        rows = [parse_key(batch.keys[i]) for i in real]
        last = torch.tensor(last_of_session(rows), dtype=torch.long)
        response = last.unique()
        reward, weight, tokens = (x[real].float() for x in columns)
        weight, tokens = (torch.zeros(len(rows)).index_add(0, last, x)[response] for x in (weight, tokens))
        question = [rows[i].uid for i in response.tolist()]
        return weight_by_pass_rate(question, reward[response].tolist(), (weight / tokens.clamp(min=1)).tolist())

    def _bypass_mode(self) -> bool:
        """Tell whether old_log_probs are the rollout's: verl makes no forward pass for them and logs no entropy."""
        return bool(OmegaConf.select(self.config, "algorithm.rollout_correction.bypass_mode", default=False))

    def _actor_data_parallel_size(self) -> int:
        group = self.actor_rollout_wg
        if "actor" not in group._dispatch_info:
            group._dispatch_info["actor"] = group._query_dispatch_info("actor")
        return max(group._dispatch_info["actor"]) + 1

    @for_forward_passes
    def _compute_old_log_prob(self, batch: Batch, metrics: dict) -> Batch:
        return super()._compute_old_log_prob(batch, metrics)

    @for_forward_passes
    def _compute_ref_log_prob(self, batch: Batch, metrics: dict) -> Batch:
        return super()._compute_ref_log_prob(batch, metrics)

    @for_forward_passes
    def _compute_values(self, batch: Batch, metrics: dict) -> Batch:
        return super()._compute_values(batch, metrics)

    @tensors_alone
    def _update_critic(self, batch: Batch, metrics: dict) -> Batch:
        return super()._update_critic(batch, metrics)

    @tensors_alone
    def _update_actor(self, batch: Batch, metrics: dict) -> Batch:
        if self._whole_groups:
            facts = BatchFacts.before(
                self.local_trigger_step,
                self.parameter_sync_step,
                self._bypass_mode(),
                self._skip_rows,
                self._progress_of_training(),
            )
            batch.extra_info.update(asdict(facts))
        batch = super()._update_actor(batch, metrics)
        if group := OmegaConf.select(self.config, "verl_ext.metrics"):
            for name in [k for k in metrics if k.startswith(f"actor/{group}/")]:
                metrics[name.removeprefix("actor/")] = metrics.pop(name)
        return batch


def most_failed_rewards(config: DictConfig) -> float:
    """Read the share of a step's rewards that may fail.

    Raises:
        ValueError: it is not a number from 0 to 1.
    """
    most = OmegaConf.select(config, "verl_ext.max_failed_rewards", default=0.1)
    if type(most) not in (int, float) or not 0 <= most <= 1:
        raise ValueError(f"verl_ext.max_failed_rewards={most} must be a number from 0 (none may fail) to 1")
    return most


def sequence_rewards(scores: torch.Tensor, keys: Sequence[str], where: str) -> list[float]:
    """Sum each row's rewards, before any KL term.

    Args:
        scores: jagged, one row per response.
        keys: the rows' keys.
        where: the reward function and the step, for the message.

    Raises:
        ValueError: a sum is NaN or infinite.
    """
    reward = [float(row.sum()) for row in scores.unbind()]
    if bad := [i for i, r in enumerate(reward) if not np.isfinite(r)]:
        raise ValueError(
            f"{where}: the reward of sample {keys[bad[0]]} (row {bad[0]}) is {reward[bad[0]]}; {len(bad)} of "
            f"{len(reward)} samples have no finite reward"
        )
    return reward


def shares(group: list[str], reward: list[float]) -> tuple[float, float]:
    """Return the shares of questions whose responses got different rewards, and the same reward above 0."""
    rewards = values_by_group(group, reward)
    mixed = sum(len(values) > 1 for values in rewards.values())
    right = sum(len(values) == 1 and max(values) > 0 for values in rewards.values())
    return mixed / max(len(rewards), 1), right / max(len(rewards), 1)


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
    """Replace verl's trainers and reward workers with the extended ones."""
    for cls in (ExtendedTrainerSync, ExtendedTrainerColocateAsync, ExtendedTrainerSeparateAsync):
        stock = cls.__mro__[2]
        name = next((n for n, c in TRAINER_REGISTRY.items() if c in (stock, cls)), None)
        if name is None:
            raise RuntimeError(f"verl no longer registers its trainer {stock.__name__}; verl-disco needs an update")
        TRAINER_REGISTRY[name] = cls
    # verl has no setting for this class.
    if not issubclass(CountingRewardManager, getattr(trainer_base, "RewardLoopManager", ())):
        raise RuntimeError("verl's trainer no longer uses its RewardLoopManager; verl-disco needs an update")
    trainer_base.RewardLoopManager = CountingRewardManager
