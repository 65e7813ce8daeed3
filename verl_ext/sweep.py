"""Sweeps: ``-m algorithm=ppo,disco seed=1,2`` runs its jobs one after another, each in a process of its own.

Hydra's own launcher runs them all in one process, where one job's crash ends the others. This one goes on when a job
fails, says so at the end with exit status 1, and started again skips what is finished and resumes what is not. Each
job has its own directory ``hydra.sweep.dir/NAME`` (by default ``outputs/sweeps/EXPERIMENT/NAME``) with metrics,
checkpoints, settings and ``log.txt``, NAME being algorithm, overrides and seed.

:mod:`verl_ext.hydra_callbacks` puts it in the place of Hydra's basic launcher; another launcher is left alone.
"""

import hashlib
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from verl_ext.hydra_config import DEFAULT_ALGORITHM
from verl_ext.runs import LOG_FILE, is_finished, without_hydra

LONGEST_NAME = 120
GRACE = 60
"""Seconds that a job has to end in when the sweep is interrupted."""

NOT_NAMED = ("experiment", "algorithm", "seed", "trainer", "ray_kwargs", "hydra", "verl_ext")
"""First parts of overrides that go into a job's name only where the jobs of a sweep differ in them."""


def job_name(job: DictConfig, overrides: Sequence[str], swept: Collection[str] = ()) -> str:
    """``disco,disco.tau=1,seed=2``: algorithm, overrides, seed; with a hash at the end where it would be too long.

    Args:
        job: the job's settings.
        overrides: all of its overrides.
        swept: those overrides that not all jobs of the sweep have.
    """

    def is_named(override: str) -> bool:
        first = re.split(r"[./@=]", override.lstrip("+~"))[0]
        return first not in NOT_NAMED or (override in swept and first not in ("algorithm", "seed"))

    parts = [o.lstrip("+~") for o in overrides if is_named(o)]
    if "seed" in job:
        parts.append(f"seed={job.seed}")
    algorithm = OmegaConf.select(job, "verl_ext.algorithm", default=DEFAULT_ALGORITHM)
    name = re.sub(r"[^\w.,=+-]", "_", ",".join([algorithm, *parts]))
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


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
        with open(log, "ab") as file:
            while chunk := process.stdout.read1(1 << 16):
                file.write(chunk)
                file.flush()
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


class SweepLauncher(Launcher):
    """Hydra's launcher for this package's sweeps."""

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs of a sweep.

        Raises:
            ValueError: two jobs have one directory.
            SystemExit: with status 1 at the end, if a job failed.
        """
        common = set.intersection(*map(set, job_overrides))
        jobs = [self._job(list(overrides), set(overrides) - common) for overrides in job_overrides]
        shared = [folder for folder, count in Counter(folder for folder, *_ in jobs).items() if count > 1]
        if shared:
            raise ValueError(f"several jobs of the sweep would share {shared[0]}: let trainer.default_local_dir differ")
        outcome: dict[Path, str] = {}
        command = job_command(self.config)
        for number, (folder, job, overrides) in enumerate(jobs, 1):
            title = f"sweep: job {number} of {len(jobs)}, {folder}"
            if is_finished(folder, job):
                outcome[folder] = "finished before"
                print(f"{title}: {outcome[folder]}", flush=True)
                continue
            print(f"{title}: {' '.join(overrides)}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            started = time.time()
            status = run([*command, *overrides, f"hydra.run.dir='{folder}/hydra'"], folder / LOG_FILE)
            ended = "done" if status == 0 else f"FAILED with status {status}"
            outcome[folder] = f"{ended}, {time.time() - started:.0f} s"
        print("\n".join(["sweep:", *(f"  {state}: {folder}" for folder, state in outcome.items())]), flush=True)
        failed = sum("FAILED" in state for state in outcome.values())
        if failed:
            print(f"sweep: {failed} of {len(jobs)} jobs failed; their output is in {LOG_FILE} of each", flush=True)
            raise SystemExit(1)
        return [JobReturn(overrides=o, status=JobStatus.COMPLETED, _return_value=None) for o in job_overrides]

    def _job(self, overrides: list[str], swept: set[str]) -> tuple[Path, DictConfig, list[str]]:
        """A job's directory, its settings, and all its overrides."""
        compose = self.hydra_context.config_loader.load_sweep_config
        given = {o.lstrip("+").split("=")[0] for o in overrides}
        name = job_name(compose(self.config, overrides), overrides, swept)
        if "trainer.default_local_dir" not in given:
            overrides = [*overrides, f"trainer.default_local_dir='{self.config.hydra.sweep.dir}/{name}'"]
        if "trainer.experiment_name" not in given:
            overrides = [*overrides, f"trainer.experiment_name='{name}'"]
        job = without_hydra(compose(self.config, overrides))
        return Path(job.trainer.default_local_dir), job, overrides
