"""Prepares and ends each Hydra job of verl's trainers; :mod:`verl_ext.hydra.config_source` adds it to their configs.

It makes paths absolute, takes ``trainer.default_local_dir`` for the run (and refuses another run's folder), saves the
composed settings there as ``config.yaml``, marks a finished run, and shuts Ray down at the job's end. Our YAML files
set the rest in the top-level node ``verl_ext``, which a stock run lacks:

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
from verl_ext.hydra.inputs import check_data, save_data
from verl_ext.hydra.lock import hold
from verl_ext.hydra.paths import settle, unsettled
from verl_ext.preflight import composition
from verl_ext.preflight.checks import Needs, refuse
from verl_ext.preflight.composition import Run
from verl_ext.runs.files import write_whole
from verl_ext.runs.folder import CONFIG_FILE, FINISHED_FILE, how_to_continue, what_is_left

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class JobCallback(Callback):
    """Sweep by our launcher; settle, validate and prepare a job; clean up the process after it."""

    _lock: BaseFileLock | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Run the jobs by :mod:`verl_ext.hydra.sweep`, which passes them to the chosen launcher."""
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
            # Hydra's default contains the time, but a sweep that is started again must find its runs.
            if OmegaConf.to_container(config.hydra.sweep, resolve=False)["dir"].startswith("multirun/${now:"):
                name = config.hydra.runtime.choices.get("experiment") or config.trainer.project_name
                config.hydra.sweep.dir = f"outputs/sweeps/{name if isinstance(name, str) else '+'.join(name)}"

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Say how the jobs ended; exit with status 1 if one failed."""
        sweep.sum_up()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Settle what verl's processes cannot know; a sweep has settled its jobs. Refuse as :meth:`on_job_start`."""
        with _refusals():
            settle(config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Run verl's job only if the settings are right.

        Raises:
            SystemExit: with a message. Hydra turns a callback's Exception into a warning, so nothing less stops it.
        """
        with _refusals():
            given = {sweep.name_of(o) for o in OmegaConf.to_container(config.hydra.overrides.task)}
            self._lock = before_job(composition.of_job(config), given)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Mark a finished run. Shut Ray down: verl starts it once per process, which may run several jobs."""
        folder = OmegaConf.select(config, "trainer.default_local_dir")
        try:
            if folder and job_return.status == JobStatus.COMPLETED:
                mark_finished(config, Path(folder))
            elif folder and "verl_ext" in config:
                if how := how_to_continue(Path(folder), config.trainer.resume_mode):
                    print(f"verl-disco: the run in {folder} ended early, by the error below; {how}", flush=True)
        finally:
            if self._lock is not None:
                self._lock.release()
            ray = sys.modules.get("ray")
            if ray is not None and ray.is_initialized():
                ray.shutdown()


@contextmanager
def _refusals() -> Iterator[None]:
    """End the process with a message, since Hydra would turn an exception into a warning."""
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


def before_job(run: Run, given: Collection[str] = ()) -> BaseFileLock | None:
    """Check the settings, take the run's folder and prepare the run, before verl's ``main``.

    Args:
        run: the run, whose ``folder`` this sets.
        given: full names of the settings on the command line.

    Returns:
        The lock on the run's folder; None without a folder.

    Raises:
        ValueError: the settings or the folder are refused.
    """
    config = run.composed
    if OmegaConf.select(config, "trainer.device") == "cpu":
        cpu.request()
    refuse(run, Needs.OVERRIDES)
    # What our experiments follow; verl names its own.
    for name in (name for name in composition.unset(config) if "." not in name):
        raise ValueError(f"{name} is not set; give {name}=...")
    for name, value in unsettled(config).items():
        raise ValueError(f"{name}={value} is known to Hydra's own process only; give its value")
    refuse(run, Needs.CODE, Needs.SETTINGS)
    prepare = OmegaConf.select(config, "verl_ext.prepare")
    if not prepare:
        refuse(run, Needs.FILES)
    with ExitStack() as undo:
        lock = None
        if place := OmegaConf.select(config, "trainer.default_local_dir"):
            run.folder = Path(place)
            try:
                lock = hold(run.folder)
            except OSError as e:
                raise ValueError(f"trainer.default_local_dir={place} cannot be used: {e.strerror}") from e
            if lock is not None:
                undo.callback(lock.release)
        refuse(run, Needs.CLUSTER)
        if run.folder is not None:
            take_folder(config, run.folder, given)
            data = {} if run.is_stock else check_data(config, run.folder)
            (run.folder / FINISHED_FILE).unlink(missing_ok=True)
            write_whole(run.folder / CONFIG_FILE, OmegaConf.to_yaml(config, resolve=True).encode())
        if prepare:
            get_method(prepare)(config)
            refuse(run, Needs.FILES)
        if run.folder is not None and not run.is_stock:
            # What was built only now is compared now.
            save_data(check_data(config, run.folder) if prepare else data, run.folder)
        undo.pop_all()
    return lock
