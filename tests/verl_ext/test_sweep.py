"""Sweeps with training replaced: directories, failures, and what a second start does."""

import os
import signal
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from verl_ext import runs
from verl_ext.sweep import LONGEST_NAME, job_name

# main_ppo's Hydra application, but for the training: it says its settings, and fails on demand.
PROGRAM = """
import sys
from pathlib import Path
import verl
import hydra

@hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base=None)
def main(config):
    print("TRAINING", config.verl_ext.algorithm, config.seed, config.trainer.experiment_name, flush=True)
    if (config.verl_ext.algorithm, config.seed) == ("grpo", 2) and not Path("repaired").exists():
        sys.exit(7)

main()
"""


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "program.py", "-m", *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout

    return run


def trained(output: str) -> list[str]:
    return [line.removeprefix("TRAINING ") for line in output.splitlines() if line.startswith("TRAINING ")]


def test_a_sweep_goes_on_after_a_failure_and_a_second_start_does_what_is_left(sweep, tmp_path):
    arguments = ["algorithm=grpo,disco", "+seed=2", "actor_rollout_ref.rollout.n=4", "trainer.project_name=mine"]
    status, output = sweep(*arguments)
    names = [f"{a},actor_rollout_ref.rollout.n=4,seed=2" for a in ("grpo", "disco")]
    assert trained(output) == [f"grpo 2 {names[0]}", f"disco 2 {names[1]}"]
    assert status == 1
    folders = [tmp_path / "outputs/sweeps/mine" / name for name in names]
    assert "FAILED with status 7" in output and "sweep: 1 of 2 jobs failed" in output
    assert [(f / runs.FINISHED_FILE).exists() for f in folders] == [False, True]
    for folder, algorithm in zip(folders, ("grpo", "disco"), strict=True):
        assert OmegaConf.load(folder / runs.CONFIG_FILE).verl_ext.algorithm == algorithm
        assert f"TRAINING {algorithm} 2" in (folder / runs.LOG_FILE).read_text()

    (tmp_path / "repaired").touch()
    status, output = sweep(*arguments)
    assert status == 0
    assert trained(output) == [f"grpo 2 {names[0]}"]
    assert "finished before" in output and "done" in output


def test_a_refused_job_does_not_end_the_sweep_and_another_directory_may_be_chosen(sweep, tmp_path):
    # n=1 contradicts both methods; its jobs are refused before they train.
    status, output = sweep("algorithm=disco", "+seed=3", "actor_rollout_ref.rollout.n=1,2", "hydra.sweep.dir=elsewhere")
    assert status == 1
    assert "settings refused: actor_rollout_ref.rollout.n=1 does not work" in output
    assert len(trained(output)) == 1
    assert (tmp_path / "elsewhere/disco,actor_rollout_ref.rollout.n=2,seed=3" / runs.FINISHED_FILE).exists()


def test_interpolations_and_the_mode_are_for_the_jobs(sweep, tmp_path):
    # Two learning rates, by name; and a config that makes a sweep of every start, as a child must not.
    rates = "actor_rollout_ref.actor.optim.lr=${disco.delta},${disco.tau}"
    status, output = sweep("algorithm=disco", "+seed=1", rates, "hydra.mode=MULTIRUN")
    assert status == 0 and len(trained(output)) == 2, output[-3000:]
    found = sorted(
        OmegaConf.load(f).actor_rollout_ref.actor.optim.lr
        for f in (tmp_path / "outputs/sweeps").glob(f"*/*/{runs.CONFIG_FILE}")
    )
    assert found == [1e-4, 10.0]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_ended_leaves_no_job_behind(tmp_path, how):
    (tmp_path / "job.py").write_text(
        "import signal, sys, time\n"
        "def end(*_):\n"
        # More than a pipe holds.
        "    print('x' * 300000)\n"
        "    sys.exit(3)\n"
        "for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, end)\n"
        "print('up', flush=True)\n"
        "time.sleep(100)\n"
    )
    program = "import signal, sys; from pathlib import Path; from verl_ext.sweep import run\n"
    # Where the tests run in the background of a shell, interrupts are ignored.
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "run([sys.executable, 'job.py'], Path('log'))"
    sweep = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert sweep.stdout.readline() == b"up\n"
    if how == signal.SIGINT:
        # As a terminal does it: to all of the foreground.
        os.killpg(sweep.pid, how)
    else:
        sweep.send_signal(how)
    sweep.communicate(timeout=30)
    assert sweep.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.killpg(sweep.pid, 0)


def test_jobs_that_would_share_a_directory_are_refused(sweep):
    status, output = sweep("algorithm=disco", "+seed=1,2", "trainer.default_local_dir=one")
    assert status == 1
    assert "several jobs of the sweep would share one" in output and not trained(output)


def test_names_are_safe_and_of_bounded_length():
    job = OmegaConf.create({"seed": 3, "verl_ext": {"algorithm": "disco"}})
    overrides = ["algorithm=disco", "seed=3", "+experiment=arithmetic_cpu", "++disco.tau=1", "trainer.nnodes=2"]
    assert job_name(job, overrides) == "disco,disco.tau=1,seed=3"
    assert job_name(OmegaConf.create({}), ["data.train_files=/a/b c.parquet"]) == "ppo,data.train_files=_a_b_c.parquet"
    swept = ["trainer.total_epochs=2", "experiment=a"]
    assert job_name(job, [*overrides, *swept], swept) == "disco,disco.tau=1,trainer.total_epochs=2,experiment=a,seed=3"
    long = [job_name(job, [f"data.train_files={'x' * 200}{end}"]) for end in "12"]
    assert long[0] != long[1] and all(len(name) == LONGEST_NAME for name in long)


def test_a_run_is_finished_only_with_the_same_settings(tmp_path):
    config = OmegaConf.create({"a": 1, "b": "${a}"})
    assert not runs.is_finished(tmp_path, config)
    OmegaConf.save(config, tmp_path / runs.CONFIG_FILE, resolve=True)
    assert not runs.is_finished(tmp_path, config)
    (tmp_path / runs.FINISHED_FILE).touch()
    assert runs.is_finished(tmp_path, config)
    assert not runs.is_finished(tmp_path, OmegaConf.create({"a": 2, "b": "${a}"}))
