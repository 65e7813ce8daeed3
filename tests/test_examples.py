"""The cluster scripts, with Slurm, Ray and Python replaced by programs that write down how they were called."""

import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

STUBS = {
    # Training ends with the status that the test asks for; Ray's status shows as many nodes as were started.
    "python": """#!/usr/bin/env bash
echo "python $*" >>"$CALLS"
case "$*" in
  *scripts\\ status*)
    grep "^srun.*scripts start" "$CALLS" | sed 's/.*/ 1 node_x/' ;;
  *main_ppo*) exit "${STATUS:-0}" ;;
esac
""",
    "srun": """#!/usr/bin/env bash
echo "srun $*" >>"$CALLS"
case "$*" in *hostname*) echo "10.0.0.1 fe80::1" ;; esac
""",
    "scontrol": "#!/usr/bin/env bash\nprintf 'node1\\nnode2\\nnode3\\n'\n",
}


@pytest.fixture
def start(tmp_path):
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(script: str, *arguments: str, **environment: str) -> tuple[int, list[str], str]:
        calls.write_text("")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RAY_"))}
        done = subprocess.run(
            ["bash", str(ROOT / "examples" / script), *arguments],
            env=clean
            | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "CALLS": str(calls)}
            | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, calls.read_text().splitlines(), done.stderr

    return run


@pytest.mark.parametrize("task, method, seed", [(0, "grpo", 1), (1, "disco", 1), (2, "grpo", 2), (3, "disco", 2)])
def test_each_task_of_the_array_is_a_method_and_a_seed(start, task, method, seed):
    environment = dict(METHODS="grpo disco", SEEDS="1 2", EXPERIMENT="mine", SLURM_ARRAY_TASK_ID=str(task))
    status, calls, _ = start("slurm/sweep.sbatch", "disco.tau=1", **environment, SLURM_GPUS_ON_NODE="8")
    assert status == 0 and len(calls) == 1
    wanted = [
        f"algorithm={method}",
        "+experiment=mine",
        f"seed={seed}",
        "trainer.nnodes=1",
        "trainer.n_gpus_per_node=8",
    ]
    wanted += [f"trainer.default_local_dir='outputs/sweeps/slurm/{method},seed={seed}'"]
    assert set(wanted) <= set(calls[0].split())


def test_a_task_beyond_the_pairs_is_refused_with_the_numbers(start):
    status, calls, error = start("slurm/sweep.sbatch", METHODS="grpo disco", SEEDS="1 2 3", SLURM_ARRAY_TASK_ID="6")
    assert status == 1 and not calls
    assert "2 methods x 3 seeds: use --array=0-5" in error


@pytest.mark.parametrize("training", ["0", "3"])
def test_several_nodes_make_one_ray_cluster_before_training_starts(start, training):
    status, calls, _ = start(
        "ray/run.sh", "algorithm=disco", SLURM_JOB_NUM_NODES="3", SLURM_JOB_NODELIST="node[1-3]", STATUS=training
    )
    assert status == int(training)
    started = [c for c in calls if c.startswith("srun") and "scripts start" in c]
    assert len(started) == 3 and sum("--head" in c for c in started) == 1
    assert {next(w for w in c.split() if w.startswith("--nodelist=")) for c in started} == {
        f"--nodelist=node{i}" for i in (1, 2, 3)
    }
    assert sum("--address=10.0.0.1:6379" in c for c in started) == 2
    # With a token of their own, also where Slurm is told to export nothing.
    assert all("--export=ALL" in c for c in started)
    (trained,) = [i for i, c in enumerate(calls) if "main_ppo" in c]
    ray = "++ray_kwargs.ray_init."
    assert f"{ray}address='10.0.0.1:6379' {ray}num_cpus=null {ray}num_gpus=null algorithm=disco" in calls[trained]
    assert trained > max(calls.index(c) for c in started)


def test_a_cluster_that_is_there_is_used(start):
    status, calls, _ = start("ray/run.sh", "algorithm=disco", RAY_ADDRESS="head:6379")
    assert status == 0
    assert len(calls) == 1 and "main_ppo ++ray_kwargs.ray_init.address='head:6379'" in calls[0]


def test_a_cluster_that_does_not_come_up_ends_the_run(start):
    environment = dict(SLURM_JOB_NUM_NODES="5", SLURM_JOB_NODELIST="node[1-5]", RAY_TIMEOUT="1")
    status, calls, error = start("ray/run.sh", "algorithm=disco", **environment)
    assert status == 1 and not any("main_ppo" in c for c in calls)
    assert "no Ray cluster of 5 nodes within 1 s" in error


def test_the_custom_objective_is_registered_and_checked():
    from recipe.disco.objectives import weigh
    from recipe.disco.settings import DiscoConfig

    module = str(ROOT / "examples/custom_objective.py")
    with pytest.raises(ValueError, match="needs the setting 'margin'"):
        DiscoConfig(objective="margin_by_length", module=module)
    config = DiscoConfig(objective="margin_by_length", module=module, options={"margin": 0.2})
    score = torch.tensor([-0.5, -0.5, -0.4], dtype=torch.float64)
    positive, length = torch.tensor([True, True, False]), torch.tensor([5, 20, 9])
    _, weight = weigh(config.build_objective(), score, positive, torch.zeros(3, dtype=torch.long), length)
    # d/ds of log sigmoid(10 (s_i - s_j - m_i)) is 10 sigmoid(-10 (...)), over two pairs.
    pull = [5 / (1 + math.exp(10 * (-0.1 - 0.2 * 5 / n))) for n in (5, 20)]
    assert weight.tolist() == pytest.approx([*pull, -sum(pull)])
