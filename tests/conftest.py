"""Shared by all tests: the long suite's switch, the shared data folder, and verl's configs composed in this process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Before torch, transformers and Ray are imported, here or in a child.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(name, value)

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--fuzz", type=int, metavar="N", help="try each property on N times as many cases, new ones")


def pytest_configure(config: pytest.Config) -> None:
    # Before the tests are imported, whose decorators read it.
    if config.getoption("--fuzz"):
        os.environ["VERL_DISCO_FUZZ"] = str(config.getoption("--fuzz"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long suite: bash tests/run.sh --all"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference vectors and data that do not live in the repository: $VERL_DISCO_SHARED, else ../shared."""
    folder = Path(os.environ.get("VERL_DISCO_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder}; set VERL_DISCO_SHARED")
    return folder


@pytest.fixture
def full_disk() -> Callable:
    """``with full_disk(size):`` no file can grow beyond ``size`` bytes, as on a disk that fills up: a write is cut."""
    import resource
    import signal

    @contextmanager
    def run(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)

    return run


@pytest.fixture
def compose() -> Callable:
    """``compose(*overrides, config_name="ppo_trainer")``: what ``verl.trainer.main_ppo`` would get."""
    import hydra
    import verl  # noqa: F401  (loads the plugin)

    def run(*overrides: str, config_name: str = "ppo_trainer"):
        with hydra.initialize_config_module("verl.trainer.config", version_base=None):
            return hydra.compose(config_name, overrides=list(overrides))

    return run
