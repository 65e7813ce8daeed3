"""What happens around each Hydra job of verl's trainers; :mod:`verl_ext.hydra.config_source` adds it to their configs.

It makes paths absolute, takes ``trainer.default_local_dir`` for the run (and refuses where it is another run's), saves
the composed settings there as ``config.yaml``, marks the run as finished once it is, and shuts Ray down at the job's
end. The rest is said by the top-level node ``verl_ext``, which our YAML files write and a stock run has not:

- ``verl_ext.validator``: name of a function ``(config) -> None`` that raises ValueError to refuse the settings;
- ``verl_ext.prepare``: name of a function ``(config) -> None`` that builds what the run needs before Ray starts.
"""

import sys
import traceback
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, read_write

from verl_ext import cpu
from verl_ext.hydra import sweep
from verl_ext.hydra.identity import take_folder
from verl_ext.hydra.lock import hold
from verl_ext.hydra.paths import settle, unsettled
from verl_ext.preflight import composition
from verl_ext.preflight.findings import run_checks
from verl_ext.preflight.lost_updates import check_lost_updates, refuse_adapters_left_behind
from verl_ext.preflight.nodes import check_nodes
from verl_ext.preflight.references import refuse_missing_reward
from verl_ext.preflight.unread import check_unread
from verl_ext.preflight.values import check_values
from verl_ext.runs.files import write_whole
from verl_ext.runs.folder import CONFIG_FILE, FINISHED_FILE, what_is_left, without_hydra

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class JobCallback(Callback):
    """Sweep by our launcher; settle, validate and prepare before a job; leave a clean process behind after it."""

    _lock: BaseFileLock | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Run the jobs by :mod:`verl_ext.hydra.sweep`, which hands them to another launcher where one was asked for."""
        from hydra.core.plugins import Plugins

        from hydra_plugins.verl_ext_sweep import SweepLauncher

        Plugins.instance().register(SweepLauncher)
        ours = f"{SweepLauncher.__module__}.{SweepLauncher.__name__}"
        with read_write(config):
            if config.hydra.launcher["_target_"] == BASIC_LAUNCHER:
                config.hydra.launcher["_target_"] = ours
            else:
                given = OmegaConf.to_container(config.hydra.launcher, resolve=False)
                config.hydra.launcher = {"_target_": ours, "_recursive_": False, "launcher": given}
            # Hydra's own has the time in it, and a sweep that is started again must find its runs.
            if OmegaConf.to_container(config.hydra.sweep, resolve=False)["dir"].startswith("multirun/${now:"):
                name = config.hydra.runtime.choices.get("experiment") or config.trainer.project_name
                config.hydra.sweep.dir = f"outputs/sweeps/{name if isinstance(name, str) else '+'.join(name)}"

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Say how the jobs ended.

        Raises:
            SystemExit: with status 1, if one failed.
        """
        sweep.sum_up()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Settle what verl's processes cannot know; a sweep's jobs come settled.

        Raises:
            SystemExit: as :meth:`on_job_start`.
        """
        with _refusals():
            settle(config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Run verl's job only if the settings hold.

        Raises:
            SystemExit: with a message that the interpreter prints. Hydra turns an Exception of a callback into a
                warning and goes on, so nothing less would stop the run.
        """
        with _refusals():
            refuse_wrong_overrides(config)
            given = {sweep.name_of(o) for o in OmegaConf.to_container(config.hydra.overrides.task)}
            self._lock = before_job(without_hydra(config), given)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Mark a run that is finished. Shut Ray down: verl starts it once a process, which may run several jobs."""
        folder = OmegaConf.select(config, "trainer.default_local_dir")
        try:
            if folder and job_return.status == JobStatus.COMPLETED:
                mark_finished(config, Path(folder))
        finally:
            if self._lock is not None:
                self._lock.release()
            ray = sys.modules.get("ray")
            if ray is not None and ray.is_initialized():
                ray.shutdown()


@contextmanager
def _refusals() -> Iterator[None]:
    """End the process by a message where an exception would be a warning of Hydra's."""
    try:
        yield
    except ValueError as e:
        raise SystemExit(f"verl-disco: settings refused: {e}") from e
    except Exception as e:
        traceback.print_exc()
        raise SystemExit(f"verl-disco: not started: {type(e).__name__}: {e}") from e


def mark_finished(config: DictConfig, folder: Path) -> None:
    """Write the file that marks a finished run, or say what is left to do."""
    try:
        left = what_is_left(folder, config)
    except ValueError as e:
        left = str(e)
    if left:
        print(f"verl-disco: warning: {folder} is not marked as finished: {left}", flush=True)
    else:
        (folder / FINISHED_FILE).touch()


def refuse_wrong_overrides(config: DictConfig) -> None:
    """Refuse what the doctor finds in the settings alone: names that nothing reads, values that cannot be right.

    A run of stock verl, without the node ``verl_ext``, is told and goes on.

    Raises:
        ValueError: names each setting, what was found and what would be right.
    """
    composed = composition.of_job(config)
    settings, wrong = composition.names(composed.config), []
    for finding in run_checks([check_unread, check_values, check_lost_updates], composed):
        # A check that fails itself bears its own name, and says nothing about the settings.
        if finding.name in settings and not finding.warning and "verl_ext" in composed.config:
            wrong.append(f"{finding.problem}; {finding.fix}")
        else:
            print(f"verl-disco: warning: {finding.problem}; {finding.fix}", flush=True)
    if wrong:
        raise ValueError("; ".join(wrong))


def before_job(config: DictConfig, given: Collection[str] = ()) -> BaseFileLock | None:
    """All that happens between the composed settings and verl's ``main``.

    Args:
        config: the settings.
        given: full names of what the command line sets.

    Returns:
        The lock on the run's folder; None without a folder.

    Raises:
        ValueError: the settings are refused, or the folder is.
    """
    if OmegaConf.select(config, "trainer.device") == "cpu":
        cpu.request()
        cpu.check(config)
    settings = config.get("verl_ext")
    for name, value in unsettled(config).items():
        raise ValueError(f"{name}={value} is known to Hydra's own process only; give its value")
    if settings:
        refuse_unsupported_trainer(config)
        refuse_wrong_asynchrony(config)
        refuse_missing_reward(config)
        if name := settings.get("validator"):
            get_method(name)(config)
    with ExitStack() as undo:
        lock = folder = None
        if place := OmegaConf.select(config, "trainer.default_local_dir"):
            folder = Path(place)
            try:
                lock = hold(folder)
            except OSError as e:
                raise ValueError(f"trainer.default_local_dir={folder} cannot be used: {e.strerror}") from e
            if lock is not None:
                undo.callback(lock.release)
        if settings:
            check_nodes(config, folder)
        if folder is not None:
            take_folder(config, folder, given)
            (folder / FINISHED_FILE).unlink(missing_ok=True)
            write_whole(folder / CONFIG_FILE, OmegaConf.to_yaml(config, resolve=True).encode())
        if settings and (name := settings.get("prepare")):
            get_method(name)(config)
        undo.pop_all()
    return lock


def refuse_wrong_asynchrony(config: DictConfig) -> None:
    """Refuse what verl's asynchronous trainers would refuse only after Ray has started, or train to no effect.

    Raises:
        ValueError: names the setting, what was found and what would be right.
    """
    refuse_adapters_left_behind(config)
    mode = OmegaConf.select(config, "trainer.v1.trainer_mode")
    if mode not in ("colocate_async", "separate_async"):
        return
    where = f"trainer.v1.trainer_mode={mode}"
    rollout = config.actor_rollout_ref.rollout
    manager = str(rollout.agent.get("agent_loop_manager_class"))
    if manager.endswith("BatchAgentLoopManager"):
        raise ValueError(
            f"actor_rollout_ref.rollout.agent.agent_loop_manager_class={manager} waits until a whole batch is "
            f"generated, and {where} trains meanwhile; set it to null"
        )
    if mode != "separate_async":
        return
    batch, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    steps = config.trainer.v1.separate_async.parameter_sync_step
    if batch != steps * mini:
        raise ValueError(
            f"data.train_batch_size={batch} does not work with {where}: it must be "
            f"trainer.v1.separate_async.parameter_sync_step={steps} x "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={mini} = {steps * mini}"
        )
    for name in ("nnodes", "n_gpus_per_node"):
        if rollout[name] <= 0:
            raise ValueError(
                f"actor_rollout_ref.rollout.{name}={rollout[name]} leaves no devices for the rollouts of {where}; use "
                "at least 1"
            )
    if rollout.checkpoint_engine.backend == "naive":
        raise ValueError(
            f"actor_rollout_ref.rollout.checkpoint_engine.backend=naive does not reach the rollouts of {where}; use "
            "nccl, or on a CPU ray with custom_backend_module=verl_ext.cpu.checkpoint_engine"
        )


def refuse_unsupported_trainer(config: DictConfig) -> None:
    """Refuse verl's trainers that would ignore the extensions which the node ``verl_ext`` asks for.

    Raises:
        ValueError: names the setting, what was found and what would be right.
    """
    wanted = [key for key in ("actor_worker_class", "whole_groups") if config.verl_ext.get(key)]
    if not wanted:
        return
    if not config.trainer.use_v1:
        raise ValueError(
            f"trainer.use_v1=False is verl's legacy trainer, which knows nothing of verl_ext.{wanted[0]}; "
            "set trainer.use_v1=True"
        )
    # The node that tells the configs of verl.experimental's trainers from those of main_ppo.
    if "rollout" in config:
        raise ValueError(
            f"verl.experimental's trainers know nothing of verl_ext.{wanted[0]}; run python -m verl.trainer.main_ppo"
        )
