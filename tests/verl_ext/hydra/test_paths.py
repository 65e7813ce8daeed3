"""What a job's settings mean in verl's processes, wherever these run."""

import copy
import os
from pathlib import Path

import hydra
import pytest
import verl  # noqa: F401  (loads the plugin)
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from verl_ext.hydra.paths import absolute, as_override, settle, settled, unsettled
from verl_ext.runs.folder import flatten, full_names, without_hydra


@pytest.fixture(scope="module")
def composed():
    overrides = ["algorithm=disco", "+experiment=arithmetic_cpu", "disco.score=l_ratio"]
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", overrides, return_hydra_config=True)


@pytest.fixture
def config(composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for name in ("model", "org/model", "data", "adapter"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("reward.py", "loop.yaml", "objective.py", "data/train.parquet"):
        (tmp_path / name).touch()
    return copy.deepcopy(composed)


PLACES = {
    "trainer.default_local_dir": "runs/mine",
    "trainer.validation_data_dir": "validation",
    "trainer.rollout_data_dir": "./rollouts",
    "trainer.resume_from_path": "runs/mine/global_step_1/",
    "global_profiler.save_path": "outputs/profile",
    "ray_kwargs.timeline_json_file": "timeline.json",
    "skip.rollout.dump_dir": "~/dumps",
    "arithmetic.folder": "../assets",
    "data.train_files": ["data/train.parquet", "data/not yet.parquet"],
    "data.val_files": "data/test.parquet",
}
THERE = {
    "actor_rollout_ref.model.path": "org/model",
    "actor_rollout_ref.model.tokenizer_path": "model",
    "actor_rollout_ref.model.lora_adapter_path": "adapter",
    "actor_rollout_ref.rollout.agent.agent_loop_config_path": "loop.yaml",
    "actor_rollout_ref.rollout.multi_turn.tool_config_path": "loop.yaml",
    "critic.model.path": "model",
    "reward.custom_reward_function.path": "reward.py",
    "reward.reward_manager.module.path": "file://reward.py",
    "data.custom_cls.path": "reward.py",
    "disco.module": "objective.py",
}
NONE = {
    "actor_rollout_ref.model.path": "Qwen/Qwen3-4B",
    "actor_rollout_ref.model.tokenizer_path": "/elsewhere/model",
    "reward.custom_reward_function.path": "pkg://verl_ext.tasks.math.reward",
    "data.train_files": ["hdfs://host/x.parquet", "s3://bucket/x.parquet"],
    "trainer.default_hdfs_dir": "hdfs://host/runs",
    "actor_rollout_ref.model.external_lib": "model",
    "trainer.project_name": "data",
    "trainer.validation_data_dir": None,
}


def test_relative_paths_start_where_the_command_was_given(config, tmp_path):
    """On a cluster that is there, they started in the working folder of a node's Ray."""
    for name, value in (PLACES | THERE).items():
        OmegaConf.update(config, name, value)
    settle(config)
    assert settled(config) == {}
    found = flatten(without_hydra(config))
    for name, value in (PLACES | THERE).items():
        for path, was in zip(*[x if isinstance(x, list) else [x] for x in (found[name], value)], strict=True):
            assert path == os.path.normpath(tmp_path / Path(was.removeprefix("file://")).expanduser()), name
    # What follows from them does so still.
    assert found["actor_rollout_ref.actor.profiler.save_path"] == f"{tmp_path}/outputs/profile"
    raw = full_names("", OmegaConf.to_container(without_hydra(config), resolve=False))
    assert raw["actor_rollout_ref.actor.profiler.save_path"].startswith("${oc.select:global_profiler.save_path")


def test_what_is_no_local_path_stays(config):
    for name, value in NONE.items():
        OmegaConf.update(config, name, value)
    settle(config)
    found = flatten(without_hydra(config))
    assert {name: found[name] for name in NONE} == NONE


def test_no_setting_of_the_experiments_stays_relative(config, tmp_path):
    settle(config)
    places = [n for n, v in flatten(without_hydra(config)).items() if n.endswith(("_dir", "_files", "folder")) and v]
    found = flatten(without_hydra(config))
    assert {"trainer.default_local_dir", "data.val_files", "arithmetic.folder"} <= set(places)
    assert all(os.path.isabs(found[name]) for name in places)
    assert found["actor_rollout_ref.model.path"] == f"{tmp_path}/outputs/arithmetic/assets/model"


def test_names_that_only_hydra_knows_become_values(config, tmp_path):
    assert unsettled(without_hydra(config)) == {"trainer.experiment_name": "${verl_ext.run_name:}"}
    OmegaConf.update(config, "trainer.project_name", "at_${now:%Y-%m-%d_%H-%M-%S}")
    OmegaConf.update(config, "trainer.rollout_data_dir", "${hydra:runtime.output_dir}/${hydra.job.name}")
    settle(config)
    assert unsettled(without_hydra(config)) == {} and HydraConfig.instance().cfg is None
    assert config.trainer.experiment_name == "disco,disco.score=l_ratio,seed=1"
    # As Hydra will have it: the time in it is looked up once.
    output = tmp_path / config.hydra.run.dir
    assert config.trainer.rollout_data_dir.startswith(f"{output}/")


@pytest.mark.parametrize("stock", [True, False])
def test_in_a_run_of_stock_verl_they_follow_hydras_folder(config, tmp_path, stock):
    OmegaConf.update(config, "trainer.default_local_dir", "runs")
    OmegaConf.update(config, "trainer.experiment_name", "x")
    config.hydra.job.chdir = True
    if stock:
        OmegaConf.set_struct(config, False)
        del config.verl_ext
    folder = Path(settled(config)["trainer.default_local_dir"])
    assert folder == (tmp_path / config.hydra.run.dir / "runs" if stock else tmp_path / "runs")


def test_a_packed_working_folder_has_its_own_files(config, tmp_path):
    OmegaConf.update(config, "ray_kwargs.ray_init.runtime_env.working_dir", ".", force_add=True)
    for name in ("data.train_files", "trainer.default_local_dir", "reward.custom_reward_function.path"):
        OmegaConf.update(config, name, "reward.py")
    settle(config)
    assert config.data.train_files == config.reward.custom_reward_function.path == "reward.py"
    assert config.trainer.default_local_dir == f"{tmp_path}/reward.py"


def test_the_name_of_a_data_set_is_no_path(config):
    OmegaConf.update(config, "data.train_files", ["openai/gsm8k", "mine.parquet"])
    settle(config)
    assert config.data.train_files == ["openai/gsm8k", f"{os.getcwd()}/mine.parquet"]


@pytest.mark.parametrize("name", ["trainer.default_local_dir", "data.train_files", "arithmetic.folder"])
def test_behind_rays_client_a_relative_path_is_refused(config, monkeypatch, name):
    for place in ("trainer.default_local_dir", "arithmetic.folder", "trainer.experiment_name"):
        OmegaConf.update(config, place, "/there")
    OmegaConf.update(config, "ray_kwargs.ray_init.address", None)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    settled(config)
    OmegaConf.update(config, name, "x/y.parquet")
    with pytest.raises(ValueError, match=f"{name}=x/y.parquet is relative, but with Ray's client .* an absolute path"):
        settled(config)


@pytest.mark.parametrize(
    "path", ["a b", "it's", "a\\", "a\\'b", "a,b=[c]{d}:e", '"', "\\\\", "ü~!", "", "a'", ["x", "y,z"], None, True, 3]
)
def test_overrides_say_what_they_should(path):
    (parsed,) = OverridesParser.create().parse_overrides([as_override("a.b", path)])
    assert (parsed.key_or_group, parsed.value()) == ("a.b", path)


def test_a_path_that_must_exist_may_be_a_name(tmp_path):
    (tmp_path / "there").mkdir()
    assert absolute("there", str(tmp_path), must_exist=True) == f"{tmp_path}/there"
    assert absolute("gpt2", str(tmp_path), must_exist=True) == "gpt2"
    assert absolute("gpt2", str(tmp_path)) == f"{tmp_path}/gpt2"
    assert absolute("file:///x", str(tmp_path)) == "file:///x"
    assert absolute("", str(tmp_path)) == ""
    assert absolute(7, str(tmp_path)) == 7
