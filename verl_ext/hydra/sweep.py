"""Sweeps: ``-m algorithm=ppo,grpo seed=1,2`` runs its jobs one after another, each in a process of its own.

Hydra's own launcher runs them all in one process, where one job's crash ends the others. This one goes on when a job
fails, says so at the end with exit status 1, and started again skips what is finished and resumes what is not. Each
job has its own directory ``hydra.sweep.dir/NAME`` (by default ``outputs/sweeps/EXPERIMENT/NAME``) with metrics,
checkpoints, settings and ``log.txt``, NAME being algorithm, overrides and seed.

:mod:`verl_ext.hydra.callbacks` puts it in the place of Hydra's basic launcher. Another launcher (``hydra/launcher=
joblib``) runs the jobs itself, in the directories that this one gives them.
"""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from verl_ext.hydra.identity import changes_results
from verl_ext.hydra.paths import as_override, settled
from verl_ext.recipes import DEFAULT_ALGORITHM
from verl_ext.runs.files import append_whole
from verl_ext.runs.folder import FINISHED_FILE, LOG_FILE, is_finished, without_hydra

LONGEST_NAME = 120
GRACE = 60
"""Seconds that a job has to end in when the sweep is interrupted."""

NOT_NAMED = ("experiment", "algorithm", "seed", "trainer.nnodes", "trainer.n_gpus_per_node")
"""Overrides that are not in a job's name: the experiment is in that of the folder above, algorithm and seed have their
own places, and on a cluster the number of GPUs follows from the allocation."""


def job_name(job: DictConfig, overrides: Sequence[str], swept: Collection[str] = ()) -> str:
    """``grpo,data.seed=3,seed=2``: algorithm, the overrides that change results, seed; cut, with a hash, at 120 bytes.

    Args:
        job: the job's settings.
        overrides: all of its overrides.
        swept: those overrides that not all jobs of the sweep have. They are in the name, whatever they set.
    """

    def is_named(override: str) -> bool:
        name = name_of(override)
        if override in swept:
            return name not in ("algorithm", "seed")
        return name not in NOT_NAMED and changes_results(name)

    algorithm = OmegaConf.select(job, "verl_ext.algorithm", default=DEFAULT_ALGORITHM)
    named = ",".join([str(algorithm), *(o.lstrip("+~") for o in overrides if is_named(o))])
    seed = f",seed={job.seed}" if "seed" in job else ""
    head, seed = (re.sub(r"[^\w.,=+-]", "_", part, flags=re.ASCII) for part in (named, seed))
    if len(head + seed) > LONGEST_NAME or not named.isascii():
        digest = hashlib.sha256(named.encode(errors="surrogatepass")).hexdigest()[:8]
        head = f"{head[: LONGEST_NAME - len(seed) - 9]}-{digest}"
    return head + seed


TRAINING = (
    "data.train_batch_size",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.actor.ppo_epochs",
    "actor_rollout_ref.actor.optim.lr",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.val_kwargs.do_sample",
    "actor_rollout_ref.rollout.val_kwargs.temperature",
    "actor_rollout_ref.rollout.val_kwargs.top_p",
    "actor_rollout_ref.rollout.val_kwargs.n",
    *(
        f"actor_rollout_ref.actor.optim.{name}"
        for name in ("lr_warmup_steps_ratio", "betas", "weight_decay", "clip_grad")
    ),
)
"""Settings that a preset sets, and that a comparison of methods wants alike: training and evaluation."""


def unequal(jobs: Sequence[tuple[DictConfig, Collection[str]]]) -> str:
    """Say in which training settings jobs differ though nobody swept them, since one method brings a preset.

    Args:
        jobs: of each, its settings with Hydra's own node, and those of its overrides that not all jobs have.

    Returns:
        One line with the numbers and what to do; nothing for an equal comparison.
    """
    # Jobs that were asked to differ in more than the method are not compared.
    alike: dict[tuple[str, ...], list[DictConfig]] = {}
    for job, swept in jobs:
        alike.setdefault(tuple(sorted(o for o in swept if name_of(o) != "algorithm")), []).append(job)
    for group in alike.values():
        told = []
        for name in TRAINING:
            values: list[tuple[Any, list[str]]] = []
            for job in group:
                value = OmegaConf.select(job, name)
                algorithm = str(OmegaConf.select(job, "verl_ext.algorithm", default=DEFAULT_ALGORITHM))
                # 1 and 1.0 are the same number; NaN is the same in text alone.
                same = (methods for other, methods in values if other == value or str(other) == str(value))
                if (methods := next(same, None)) is None:
                    values.append((value, methods := []))
                methods.append(algorithm)
            if len(values) > 1:
                numbers = ", ".join(f"{value} for {', '.join(methods)}" for value, methods in values)
                told.append(f"{name} ({numbers})")
        if told:
            chosen = [OmegaConf.select(job, "hydra.runtime.choices.setting") for job in group]
            preset = " or ".join(f"setting={name}" for name in dict.fromkeys(chosen) if name)
            remedy = f"give {preset} to all, or set them" if preset else "set them"
            return f"sweep: warning: besides the method, jobs differ in {'; '.join(told)}; nobody swept them: {remedy}"
    return ""


def name_of(override: str) -> str:
    """The full name of what an override sets, adds or deletes."""
    return override.lstrip("+~").split("=")[0].partition("@")[0]


def job_command(config: DictConfig) -> list[str]:
    """How this program was started, without what makes it a multirun and without the jobs' settings."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec is not None else [sys.argv[0]]
    # As typed: interpolations among them are for the jobs.
    given = OmegaConf.to_container(config.hydra.overrides, resolve=False)
    flags = [a for a in sys.argv[1:] if a not in (*given["task"], *given["hydra"], "-m", "--multirun")]
    ours = ("hydra.sweep.", "hydra.run.", "hydra.mode=")
    kept = [o for o in given["hydra"] if not o.lstrip("+").startswith(ours)]
    return [sys.executable, *program, *flags, *kept, "hydra.mode=RUN"]


def run(command: list[str], log: Path) -> int:
    """Run ``command``, its output on the terminal and at the end of ``log``; returns the exit status.

    Interrupted or terminated, it leaves no job behind.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with open(log, "ab", buffering=0) as file:
            whole = True
            while chunk := process.stdout.read1(1 << 16):
                try:
                    append_whole(file.fileno(), chunk)
                    whole = True
                except OSError as e:
                    # The job goes on, and says itself what it cannot write.
                    if whole:
                        print(f"sweep: warning: {log} lacks what follows, until it fits: {e.strerror}", flush=True)
                    whole = False
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
        return process.wait()
    except BaseException as e:
        if not isinstance(e, KeyboardInterrupt):
            # Of an interrupt the terminal has told the job as well.
            process.terminate()
        try:
            # Reads on: a full pipe would keep the job from ending.
            process.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


OUTCOME: dict[Path, str] = {}
"""How the jobs of this process's sweep ended, by directory: its sweeper may launch them in several batches."""


def sum_up() -> None:
    """Say how the jobs ended.

    Raises:
        SystemExit: with status 1, if one failed.
    """
    if not OUTCOME:
        return
    print("\n".join(["sweep:", *(f"  {state}: {shown(folder)}" for folder, state in OUTCOME.items())]), flush=True)
    if failed := sum("FAILED" in state for state in OUTCOME.values()):
        print(f"sweep: {failed} of {len(OUTCOME)} jobs failed; their output is in {LOG_FILE} of each", flush=True)
        raise SystemExit(1)


def shown(folder: Path) -> Path:
    """A path as a reader wants it: relative to where the command was given, if it is below."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


class SweepLauncher(Launcher):
    """Hydra's launcher for this package's sweeps.

    Args:
        launcher: settings of another launcher, which is to run the jobs.
    """

    def __init__(self, launcher: DictConfig | None = None):
        self.other, self.folders = launcher, set()
        self.launched: list[tuple[DictConfig, list[str]]] = []
        self.warned = False

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        OUTCOME.clear()
        task = OverridesParser.create().parse_overrides(OmegaConf.to_container(config.hydra.overrides.task))
        self.common = {name_of(o.input_line) for o in task if not o.is_sweep_override()}
        if self.other is not None:
            config = config.copy()
            with read_write(config):
                config.hydra.launcher = self.other
            self.other = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs of a sweep, or of one batch of it.

        Raises:
            ValueError: two jobs have one directory.
        """
        jobs = [self._job(list(overrides), number) for number, overrides in enumerate(job_overrides, initial_job_idx)]
        for folder, *_ in jobs:
            if folder in self.folders:
                name = "trainer.default_local_dir"
                raise ValueError(f"several jobs of the sweep would share {shown(folder)}: let {name} differ")
            self.folders.add(folder)
        # Once, also where the sweeper launches one job at a time.
        if not self.warned and (line := unequal(self.launched)):
            self.warned = True
            print(line, flush=True)
        if self.other is not None:
            return self.other.launch([overrides for *_, overrides in jobs], initial_job_idx)
        command = job_command(self.config)
        last = initial_job_idx + len(jobs)
        for number, (given, (folder, job, overrides)) in enumerate(
            zip(job_overrides, jobs, strict=True), initial_job_idx + 1
        ):
            title = f"sweep: job {number} of {last}, {shown(folder)}"
            if is_finished(folder, job):
                OUTCOME[folder] = "finished before"
                print(f"{title}: {OUTCOME[folder]}", flush=True)
                continue
            print(f"{title}: {' '.join(given)}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            status = run([*command, *overrides], folder / LOG_FILE)
            done = "done" if (folder / FINISHED_FILE).exists() else "FAILED: it ended early"
            ended = done if status == 0 else f"FAILED with status {status}"
            OUTCOME[folder] = f"{ended}, {time.monotonic() - started:.0f} s"
        return [JobReturn(overrides=o, status=JobStatus.COMPLETED, _return_value=None) for o in job_overrides]

    def _job(self, overrides: list[str], number: int) -> tuple[Path, DictConfig, list[str]]:
        """A job's directory, its settings, and all its overrides, which other processes understand, too."""
        job = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        given = {name_of(o) for o in overrides}
        swept = [o for o in overrides if name_of(o) not in self.common]
        self.launched.append((job, swept))
        name = job_name(job, overrides, swept)
        top = os.path.abspath(self.config.hydra.sweep.dir)
        places = {"trainer.default_local_dir": f"{top}/{name}", "trainer.experiment_name": name}
        places = {name: value for name, value in places.items() if name not in given}
        for setting, value in places.items():
            OmegaConf.update(job, setting, value)
        with read_write(job.hydra), open_dict(job.hydra):
            job.hydra.job.num, job.hydra.job.id = number, str(number)
            if self.other is None:
                job.hydra.run.dir = f"{top}/{name}/hydra"
            else:
                job.hydra.runtime.output_dir = f"{top}/{job.hydra.sweep.subdir}"
        places |= settled(job)
        for setting, value in places.items():
            OmegaConf.update(job, setting, value)
        folder = Path(job.trainer.default_local_dir)
        overrides = [o for o in overrides if name_of(o) not in places]
        overrides += [as_override(setting, value) for setting, value in places.items()]
        if self.other is None:
            overrides.append(as_override("hydra.run.dir", f"{top}/{name}/hydra").lstrip("+"))
        return folder, without_hydra(job), overrides
