"""What happens around each Hydra job of verl's trainers (:mod:`verl_ext.hydra_config` adds it to verl's configs).

It saves the composed settings as ``config.yaml`` in ``trainer.default_local_dir`` and shuts Ray down at the job's end.
The rest is said by the top-level node ``verl_ext``, which our YAML files write and a stock run has not:

- ``verl_ext.validator``: name of a function ``(config) -> None`` that raises ValueError to refuse the settings;
- ``verl_ext.prepare``: name of a function ``(config) -> None`` that builds what the run needs before Ray starts.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, read_write

from verl_ext import composition, cpu
from verl_ext.findings import run_checks
from verl_ext.hydra_config import DEFAULT_ALGORITHM
from verl_ext.nodes import check_nodes
from verl_ext.references import refuse_missing_reward
from verl_ext.runs import CHECKPOINT_FILE, CONFIG_FILE, FINISHED_FILE, flatten, without_hydra
from verl_ext.unread import check_unread
from verl_ext.values import check_values

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class JobCallback(Callback):
    """Sweep by our launcher; validate and prepare before a job; leave a clean process behind after it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Run the jobs by :mod:`verl_ext.sweep`, unless another launcher or directory was asked for."""
        with read_write(config):
            if config.hydra.launcher["_target_"] == BASIC_LAUNCHER:
                from hydra.core.plugins import Plugins

                from hydra_plugins.verl_ext_sweep import SweepLauncher

                Plugins.instance().register(SweepLauncher)
                config.hydra.launcher["_target_"] = f"{SweepLauncher.__module__}.{SweepLauncher.__name__}"
            # Hydra's own has the time in it, and a sweep that is started again must find its runs.
            if OmegaConf.to_container(config.hydra.sweep, resolve=False)["dir"].startswith("multirun/${now:"):
                name = config.hydra.runtime.choices.get("experiment") or config.trainer.project_name
                config.hydra.sweep.dir = f"outputs/sweeps/{name}"

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Run verl's job only if the settings hold.

        Raises:
            SystemExit: with a message that the interpreter prints. Hydra turns an Exception of a callback into a
                warning and goes on, so nothing less would stop the run.
        """
        try:
            refuse_wrong_overrides(config)
            before_job(without_hydra(config))
        except ValueError as e:
            raise SystemExit(f"verl-disco: settings refused: {e}") from e
        except Exception as e:
            traceback.print_exc()
            raise SystemExit(f"verl-disco: not started: {type(e).__name__}: {e}") from e

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note that the job has finished. Shut Ray down: verl starts it once a process, which may run several jobs."""
        folder = OmegaConf.select(config, "trainer.default_local_dir")
        if folder and job_return.status == JobStatus.COMPLETED:
            Path(folder, FINISHED_FILE).touch()
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            ray.shutdown()


def refuse_wrong_overrides(config: DictConfig) -> None:
    """Refuse what the doctor finds in the settings alone: names that nothing reads, values that cannot be right.

    A run of stock verl, without the node ``verl_ext``, is told and goes on.

    Raises:
        ValueError: names each setting, what was found and what would be right.
    """
    composed = composition.of_job(config)
    settings, wrong = composition.names(composed.config), []
    for finding in run_checks([check_unread, check_values], composed):
        # A check that fails itself bears its own name, and says nothing about the settings.
        if finding.name in settings and not finding.warning and "verl_ext" in composed.config:
            wrong.append(f"{finding.problem}; {finding.fix}")
        else:
            print(f"verl-disco: warning: {finding.problem}; {finding.fix}", flush=True)
    if wrong:
        raise ValueError("; ".join(wrong))


def before_job(config: DictConfig) -> None:
    """All that happens between the composed settings and verl's ``main``."""
    if OmegaConf.select(config, "trainer.device") == "cpu":
        cpu.request()
        cpu.check(config)
    settings = config.get("verl_ext")
    if settings:
        refuse_unsupported_trainer(config)
        refuse_wrong_asynchrony(config)
        refuse_missing_reward(config)
        if name := settings.get("validator"):
            get_method(name)(config)
        check_nodes(config)
    folder = OmegaConf.select(config, "trainer.default_local_dir")
    if folder:
        check_resumed(config, folder)
        os.makedirs(folder, exist_ok=True)
        Path(folder, FINISHED_FILE).unlink(missing_ok=True)
        OmegaConf.save(config, os.path.join(folder, CONFIG_FILE), resolve=True)
    if settings and (name := settings.get("prepare")):
        get_method(name)(config)


def check_resumed(config: DictConfig, folder: str) -> None:
    """Say in which settings a run differs from the one that it resumes.

    Raises:
        ValueError: it would go on with another algorithm, in the same folder.
    """
    saved = os.path.join(folder, CONFIG_FILE)
    resumes = OmegaConf.select(config, "trainer.resume_mode") == "auto"
    if not (resumes and os.path.exists(saved) and os.path.exists(os.path.join(folder, CHECKPOINT_FILE))):
        return
    before, now = flatten(OmegaConf.load(saved)), flatten(config)
    algorithms = [values.get("verl_ext.algorithm", DEFAULT_ALGORITHM) for values in (before, now)]
    if algorithms[0] != algorithms[1]:
        raise ValueError(
            f"trainer.default_local_dir={folder} holds a run of algorithm={algorithms[0]}, which algorithm="
            f"{algorithms[1]} would resume; choose another folder, or trainer.resume_mode=disable"
        )
    model = "actor_rollout_ref.model.path"
    if before.get(model) != now.get(model):
        raise ValueError(
            f"trainer.default_local_dir={folder} holds a run of {model}={before.get(model)}, which a run of "
            f"{now.get(model)} would resume; choose another folder, or trainer.resume_mode=disable"
        )
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            print(f"verl-disco: {folder} is resumed with {name}={now.get(name)}, was {before.get(name)}", flush=True)


def refuse_wrong_asynchrony(config: DictConfig) -> None:
    """Refuse what verl's asynchronous trainers would refuse only after Ray has started.

    Raises:
        ValueError: names the setting, what was found and what would be right.
    """
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
