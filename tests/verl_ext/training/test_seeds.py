"""A training worker's random numbers come from the run's seed, also in the process that it is sent to."""

import random
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from verl_ext.training.seeds import seed_of, seeded


class Worker:
    def __init__(self, scale):
        self.drawn = scale * torch.rand(()).item(), np.random.rand(), random.random()


def test_equal_seeds_draw_alike():
    first, again, other = (seeded(Worker, seed)(2.0).drawn for seed in (1, 1, 2))
    assert first == again != other and first[0] <= 2.0
    assert seeded(Worker, 1).__name__ == "Worker" and issubclass(seeded(Worker, 1), Worker)


def test_another_process_draws_the_same(tmp_path):
    """As Ray sends classes that were made in a function."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    (tmp_path / "worker.pkl").write_bytes(cloudpickle.dumps(seeded(Worker, 3)))
    script = "import pickle; print(pickle.load(open('worker.pkl', 'rb'))(1.0).drawn)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    assert eval(done.stdout) == seeded(Worker, 3)(1.0).drawn


@pytest.mark.parametrize(
    "config, seed",
    [({"seed": 2, "data": {"seed": 1}}, 2), ({"data": {"seed": 7}}, 7), ({"data": {"seed": None}}, None)],
)
def test_the_runs_seed(config, seed):
    assert seed_of(OmegaConf.create(config)) == seed
