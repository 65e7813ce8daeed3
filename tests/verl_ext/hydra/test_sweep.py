"""Sweeps with training replaced: directories, failures, and what a second start does."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf
from verl.trainer import main_ppo

import verl_ext.hydra.sweep
from verl_ext.hydra.sweep import LONGEST_NAME, job_name
from verl_ext.preflight import checks
from verl_ext.runs import folder as runs

# main_ppo's Hydra application, but for the training: it says its settings, and fails on demand.
PROGRAM = """
import sys
from pathlib import Path
import verl
import hydra
from verl_ext.preflight import checks

# No model and no data are there.
checks.CHECKS[checks.Needs.FILES] = []

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
    # One job a batch: what fails in one must not keep the next from starting.
    arguments.append("hydra.sweeper.max_batch_size=1")
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
    rates = "actor_rollout_ref.actor.optim.lr=${disco.delta},${disco.beta}"
    status, output = sweep("algorithm=disco", "+seed=1", rates, "hydra.mode=MULTIRUN")
    assert status == 0 and len(trained(output)) == 2, output[-3000:]
    found = sorted(
        OmegaConf.load(f).actor_rollout_ref.actor.optim.lr
        for f in (tmp_path / "outputs/sweeps").glob(f"*/*/{runs.CONFIG_FILE}")
    )
    assert found == [1e-4, 1000.0]


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
    program = "import signal, sys; from pathlib import Path; from verl_ext.hydra.sweep import run\n"
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


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """``in_process(*arguments)``: a sweep whose jobs are not started; the overrides that each would be started with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    started = []

    def run(command: list[str], log: Path) -> int:
        started.append(dict(o.lstrip("+").split("=", 1) for o in command if "=" in o))
        (log.parent / runs.FINISHED_FILE).touch()
        return 0

    def sweep(*arguments: str) -> list[dict[str, str]]:
        logging = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
        monkeypatch.setattr(sys, "argv", ["main_ppo", "-m", *arguments, *logging])
        monkeypatch.setattr(verl_ext.hydra.sweep, "run", run)
        main_ppo.main()
        return started

    yield sweep
    HydraConfig.instance().cfg = None


TOY = ("algorithm=disco", "+experiment=arithmetic_cpu", "verl_ext.prepare=null")


@pytest.mark.parametrize("batch", ["1", "null"])
def test_what_is_swept_is_in_the_name_whatever_it_is(in_process, tmp_path, batch):
    """Of one job a batch, nothing was swept, and both jobs had one folder."""
    swept = ["trainer.total_training_steps=4,5", "algorithm.gamma=0.9,1.0"]
    jobs = in_process(*TOY, *swept, "actor_rollout_ref.rollout.n=4", f"hydra.sweeper.max_batch_size={batch}")
    names = [
        f"disco,trainer.total_training_steps={steps},algorithm.gamma={gamma},actor_rollout_ref.rollout.n=4,seed=1"
        for steps in (4, 5)
        for gamma in (0.9, 1.0)
    ]
    folder = f"{tmp_path}/outputs/sweeps/arithmetic_cpu"
    assert [job["trainer.default_local_dir"] for job in jobs] == [f"'{folder}/{name}'" for name in names]
    assert [job["trainer.experiment_name"] for job in jobs] == [f"'{name}'" for name in names]


def test_a_job_that_changes_its_folder_stays_where_the_sweep_is(in_process, tmp_path):
    """With hydra.job.chdir=true, or Hydra's folder in a setting, the sweep looked elsewhere than its jobs."""
    dump = "trainer.rollout_data_dir=${hydra:runtime.output_dir}/dumps"
    (job,) = in_process(*TOY, "hydra.job.chdir=true", dump, "hydra.sweep.dir=elsewhere", "seed=7")
    folder = f"{tmp_path}/elsewhere/disco,seed=7"
    assert job["trainer.default_local_dir"] == f"'{folder}'"
    assert job["hydra.run.dir"] == f"'{folder}/hydra'" and job["trainer.rollout_data_dir"] == f"'{folder}/hydra/dumps'"
    assert job["arithmetic.folder"] == f"'{tmp_path}/outputs/arithmetic/assets'"


def test_another_launcher_runs_the_jobs_in_folders_of_their_own(in_process, tmp_path, monkeypatch):
    """With hydra/launcher=joblib all jobs had the default folder of one run."""

    class OtherLauncher(BasicLauncher):
        """Runs jobs in this process, as joblib's does in others."""

        def __init__(self, workers: int):
            super().__init__()
            assert workers == 3

    module = types.ModuleType("hydra_plugins.other")
    module.OtherLauncher = OtherLauncher
    OtherLauncher.__module__, OtherLauncher.__qualname__ = module.__name__, "OtherLauncher"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    Plugins.instance().register(OtherLauncher)
    node = {"_target_": "hydra_plugins.other.OtherLauncher", "workers": 3}
    ConfigStore.instance().store(group="hydra/launcher", name="other", node=node)
    got = []
    monkeypatch.setitem(checks.CHECKS, checks.Needs.FILES, [])
    monkeypatch.setattr(main_ppo, "validate_config", lambda **kwargs: None)
    monkeypatch.setattr(main_ppo, "run_ppo", lambda config, task_runner_class: got.append(config))
    in_process(*TOY, "hydra/launcher=other", "seed=1,2", "+data.cache_dir=cache")
    for seed, config in enumerate(got, 1):
        folder = tmp_path / f"outputs/sweeps/arithmetic_cpu/disco,seed={seed}"
        assert (config.seed, config.trainer.default_local_dir) == (seed, str(folder))
        assert (folder / runs.FINISHED_FILE).exists() and config.data.cache_dir == f"{tmp_path}/cache"
    assert len(got) == 2


def test_jobs_that_differ_in_more_than_the_method_are_told_once(in_process, capsys):
    """One method brings its paper's preset, and the other takes verl's batch sizes, unless something sets both."""
    arguments = ["algorithm=grpo,disco", "actor_rollout_ref.rollout.n=4", "++seed=1"]
    arguments += ["trainer.project_name=mine", "hydra.sweeper.max_batch_size=1"]

    def warnings(*more: str) -> list[str]:
        in_process(*arguments, *more)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("sweep: warning:")]

    (line,) = warnings()
    for part in (
        "data.train_batch_size (1024 for grpo, 128 for disco)",
        "rollout.temperature (1.0 for grpo, 0.6 for disco)",
        "rollout.val_kwargs.n (1 for grpo, 16 for disco)",
        "give setting=disco_paper to all, or set them",
    ):
        assert part in line
    assert "rollout.n (" not in line
    assert warnings("setting=disco_paper") == []
    set_by_hand = ["data.train_batch_size=64", "actor_rollout_ref.actor.ppo_mini_batch_size=32"]
    evaluation = dict(do_sample="true", temperature=1, top_p=1, n=4)
    set_by_hand += [f"actor_rollout_ref.rollout.val_kwargs.{name}={value}" for name, value in evaluation.items()]
    assert warnings(*set_by_hand, "actor_rollout_ref.rollout.temperature=1") == []
    assert warnings("+experiment=arithmetic_cpu", "verl_ext.prepare=null") == []


def test_what_is_swept_may_differ(in_process, capsys):
    in_process("algorithm=disco", "+seed=1", "data.train_batch_size=64,128", "setting=small,disco_paper")
    assert "warning: besides" not in capsys.readouterr().out


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
    # What is cut is neither the method nor the seed.
    assert all(name.startswith("disco,data.train_files=xxx") and name.endswith(",seed=3") for name in long)
    # In bytes; and what has no place in a name is not the same in another.
    odd = [job_name(job, [f"data.train_files={text}"]) for text in ("é" * 100, "ü" * 100, "日", "本", "\udcff")]
    assert len(set(odd)) == 5 and all(len(name.encode()) <= LONGEST_NAME for name in odd)
    # What changes no results is not in it, unless it is swept; what does is, wherever it stands.
    free = ["trainer.save_freq=3", "actor_rollout_ref.actor.use_dynamic_bsz=true", "ray_kwargs.ray_init.num_cpus=3"]
    assert job_name(job, [*free, "algorithm.gamma=0.9", "~data.x"]) == "disco,algorithm.gamma=0.9,data.x,seed=3"
    assert "trainer.save_freq=3" in job_name(job, free, free[:1])
    mode = "trainer.v1.trainer_mode=colocate_async"
    assert job_name(job, [mode]) == f"disco,{mode},seed=3"


def test_a_run_is_finished_only_with_the_same_settings(tmp_path):
    config = OmegaConf.create({"a": 1, "b": "${a}"})
    assert not runs.is_finished(tmp_path, config)
    OmegaConf.save(config, tmp_path / runs.CONFIG_FILE, resolve=True)
    assert not runs.is_finished(tmp_path, config)
    (tmp_path / runs.FINISHED_FILE).touch()
    assert runs.is_finished(tmp_path, config)
    assert not runs.is_finished(tmp_path, OmegaConf.create({"a": 2, "b": "${a}"}))


def test_a_full_disk_does_not_end_a_job_whose_output_no_longer_fits(tmp_path):
    (tmp_path / "job.py").write_text("import os\nfor i in range(300): os.write(1, b'%099d\\n' % i)")
    program = "import resource, signal, sys; from pathlib import Path; from verl_ext.hydra.sweep import run\n"
    program += (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1050, 1050))\n"
    )
    program += "sys.exit(run([sys.executable, 'job.py'], Path('log')))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0
    # All of it on the terminal, whole pieces in the file.
    assert all(str(i).zfill(99).encode() in done.stdout for i in range(300))
    # Told once, or after each piece that still fits, not at each line.
    assert 1 <= done.stdout.count(b"log lacks what follows, until it fits: File too large") <= 11
    log = (tmp_path / "log").read_bytes()
    assert len(log) <= 1000 and done.stdout.startswith(log) and (not log or log.endswith(b"\n"))
