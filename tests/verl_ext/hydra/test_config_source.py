"""The config group ``algorithm`` on verl's own primary configs, and the callback around each job."""

import json
import os
import re
import subprocess
import sys
import types
from importlib import resources
from pathlib import Path

import hydra
import pandas as pd
import pytest
import verl
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager
from verl.trainer import main_ppo
from verl.trainer.ppo.reward import resolve_reward_manager_cls
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.config import omega_conf_to_dataclass

from recipe.disco.settings import parse
from verl_ext import recipes
from verl_ext.hydra import callbacks
from verl_ext.hydra import config_source as hydra_config
from verl_ext.preflight import checks, composition
from verl_ext.runs import folder as runs
from verl_ext.tasks.arithmetic.model import build_model, build_tokenizer

VERL = Path(verl.__file__).parent
ALGORITHMS = list(recipes.options("algorithm"))

# Every primary config with a node `algorithm` that verl ships -> its directory in verl.
PRIMARY = {
    "ppo_trainer": "trainer/config",
    "ppo_megatron_trainer": "trainer/config",
    "fully_async_ppo_trainer": "experimental/fully_async_policy/config",
    "fully_async_ppo_megatron_trainer": "experimental/fully_async_policy/config",
    "one_step_off_ppo_trainer": "experimental/one_step_off_policy/config",
    "one_step_off_ppo_megatron_trainer": "experimental/one_step_off_policy/config",
}

# One process for all, because `import verl` takes seconds: argv[1] is a JSON list of command lines of a Hydra
# application, each after its config directory; prints a JSON list of what each wrote to stdout.
RUN_COMMANDS = """
import contextlib, io, json, sys
import verl
import hydra
outputs = []
for directory, *arguments in json.loads(sys.argv[1]):
    sys.argv = ["main", *arguments]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        hydra.main(config_path=directory, version_base=None)(lambda config: None)()
    outputs.append(out.getvalue())
print(json.dumps(outputs))
"""


def _start(commands: list[list[str]], plugins: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RUN_COMMANDS, json.dumps(commands)],
        env={**os.environ, "VERL_USE_EXTERNAL_PLUGINS": plugins},
        stdout=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen) -> list[str]:
    stdout, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(stdout.splitlines()[-1])


def test_the_list_of_primary_configs_is_complete():
    files = [file for file in VERL.glob("**/config/*.yaml") if "\ndefaults:" in file.read_text()]
    inherit = [file.stem for file in files if "\n  - ppo_trainer" in file.read_text()]
    define = [file.stem for file in files if "algorithm" in OmegaConf.load(file)]
    assert {*inherit, *define} == set(PRIMARY)


def test_without_an_override_every_primary_config_is_stock_verls():
    commands = []
    for name, directory in PRIMARY.items():
        # Some of the experimental configs name verl's directory relative to a source checkout.
        search = [] if name.startswith("ppo") else ["hydra.searchpath=[pkg://verl.trainer.config]"]
        commands.append([f"{VERL}/{directory}", "--config-name", name, "--cfg", "job", *search])
    overrides = ["model_engine=megatron", "algorithm.gamma=0.9"]
    commands.append([f"{VERL}/trainer/config", "--config-name", "ppo_trainer", "--cfg", "job", "--resolve", *overrides])

    with _start(commands, "none") as stock, _start(commands, "auto") as ours:
        for command, expected, got in zip(commands, _finish(stock), _finish(ours), strict=True):
            assert "adv_estimator: gae" in expected
            assert got == expected, command


def test_the_module_run_as_a_script_knows_the_group(tmp_path):
    run = [sys.executable, "-m", "verl.trainer.main_ppo", "algorithm=nonsense"]
    process = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 1
    _, _, options = process.stderr.partition("Available options in 'algorithm':\n")
    assert options.splitlines()[: len(ALGORITHMS)] == [f"\t{name}" for name in ALGORITHMS]
    assert "rollout_correction" not in options


@pytest.mark.parametrize("engine", ["dp", "megatron"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_makes_verls_dataclasses(compose, name, engine):
    micro_batches = ("actor.ppo", "rollout.log_prob")
    config = compose(
        f"algorithm={name}",
        "setting=disco_paper",
        f"model_engine={engine}",
        "actor_rollout_ref.rollout.name=vllm",
        *(f"actor_rollout_ref.{m}_micro_batch_size_per_gpu=1" for m in micro_batches),
    )
    OmegaConf.to_container(config, resolve=True)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert actor.strategy.startswith({"dp": "fsdp", "megatron": "megatron"}[engine])
    assert actor.rollout_n == omega_conf_to_dataclass(config.actor_rollout_ref.rollout).n
    omega_conf_to_dataclass(config.algorithm)
    if validator := OmegaConf.select(config, "verl_ext.validator"):
        hydra.utils.get_method(validator)(config)


def test_unknown_names_list_the_choices(compose):
    with pytest.raises(MissingConfigException) as e:
        compose("algorithm=nonsense")
    assert e.value.options == ALGORITHMS


def test_values_on_the_command_line_win(compose):
    config = compose("algorithm=disco", "algorithm.gamma=0.9", "actor_rollout_ref.rollout.n=4", "disco.delta=1e-3")
    assert (config.algorithm.gamma, config.actor_rollout_ref.rollout.n, config.disco.delta) == (0.9, 4, 1e-3)


def test_primary_megatron_config_has_the_group(compose):
    config = compose("algorithm=disco", config_name="ppo_megatron_trainer")
    assert config.actor_rollout_ref.actor.strategy == "megatron"
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "disco"


def test_other_hydra_applications_are_left_alone(tmp_path):
    (tmp_path / "app.yaml").write_text("defaults: [_self_]\nalgorithm: {lr: 1}\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        config = hydra.compose("app", return_hydra_config=True)
        assert config.hydra.callbacks == {}
        assert "algorithm" not in config.hydra.runtime.choices
        assert [s.provider for s in config.hydra.runtime.config_sources] == ["hydra", "main", "schema"]
        assert hydra.compose("app", overrides=["algorithm=disco"]) == {"algorithm": "disco"}


@pytest.mark.parametrize("path", ["verl/trainer/config", "file://verl/trainer/config", "pkg://verl.trainer/config"])
def test_verls_directory_is_recognised_in_each_form(path, monkeypatch):
    monkeypatch.chdir(VERL.parent)
    assert hydra_config._verl_directory(path) == VERL / "trainer" / "config"


@pytest.mark.parametrize("path", ["/verl/trainer/config", "pkg://verl_ext.config", "pkg://hydra.conf", "structured://"])
def test_other_directories_are_not_verls(path):
    assert hydra_config._verl_directory(path) is None


def test_disco_reaches_the_workers_and_needs_nothing_else(compose):
    config = compose("algorithm=disco")
    carried = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss).disco
    assert (carried.objective, carried.score, carried.beta) == ("disco", "log_l", 1000.0)
    assert (carried.constraint, carried.delta, carried.beta) == ("squared_hinge", 1e-4, 1000.0)
    assert not config.actor_rollout_ref.actor.use_kl_loss and not config.algorithm.use_kl_in_reward


@pytest.mark.parametrize(
    "overrides, tau",
    [([], 10.0), (["disco.score=l_ratio"], 1.0), (["disco.score=l_ratio", "disco.tau=3"], 3), (["disco.tau=3"], 3)],
)
def test_tau_follows_the_score_unless_it_is_set(compose, overrides, tau):
    carried = compose("algorithm=disco", *overrides).actor_rollout_ref.actor.policy_loss.disco
    assert parse(carried).tau == tau


def test_disco_b_differs_from_disco_in_the_objective_alone(compose):
    disco, disco_b = compose("algorithm=disco"), compose("algorithm=disco_b")
    assert disco_b.disco.objective == "disco_b" and disco_b.disco.negatives == "mean"
    assert disco_b.verl_ext.algorithm == "disco_b"
    disco_b.disco.objective = disco_b.verl_ext.algorithm = "disco"
    disco_b.disco.negatives = "softmax"
    assert disco_b == disco


SHARED = ["data", "actor_rollout_ref.rollout", "actor_rollout_ref.actor.optim", "actor_rollout_ref.actor.ppo_epochs"]
SHARED += ["actor_rollout_ref.actor.ppo_mini_batch_size", "trainer"]
"""What no method sets."""


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"ppo"}))
def test_a_method_is_what_it_is_and_a_preset_is_chosen_besides(compose, name):
    stock, paper = compose(), compose("algorithm=disco")
    alone, chosen = compose(f"algorithm={name}"), compose(f"algorithm={name}", "setting=disco_paper")
    brings_preset = "disco" in alone
    for path in SHARED:
        wanted, found = (OmegaConf.select(config, path) for config in (paper if brings_preset else stock, alone))
        assert found == wanted, path
        assert OmegaConf.select(chosen, path) == OmegaConf.select(paper, path), path
    assert (paper.data.train_batch_size, paper.actor_rollout_ref.rollout.n) == (128, 8)


@pytest.mark.parametrize(
    "overrides, size, temperature",
    [
        (["algorithm=disco"], 128, 0.6),
        (["algorithm=drpo", "setting=small"], 16, 1.0),
        (["algorithm=disco", "+backend=cpu"], 16, 1.0),
        (["+backend=cpu", "algorithm=grpo", "setting=disco_paper"], 128, 0.6),
        # The experiment is the paper's, wherever it runs.
        (["algorithm=grpo", "+experiment=deepseek_qwen_7b", "backend=cpu"], 128, 0.6),
        (["algorithm=disco", "~setting"], 1024, 1.0),
    ],
)
def test_a_preset_is_the_command_lines_or_the_experiments_or_the_backends_or_the_methods(
    compose, overrides, size, temperature
):
    config = compose(*overrides)
    assert (config.data.train_batch_size, config.actor_rollout_ref.rollout.temperature) == (size, temperature)


@pytest.mark.parametrize("order", [("+backend=cpu", "+task=arithmetic"), ("+task=arithmetic", "+backend=cpu")])
def test_a_run_is_a_task_a_backend_and_a_model(compose, order):
    whole = runs.flatten(compose("algorithm=disco", "+experiment=arithmetic_cpu"))
    given = ("model=${arithmetic.folder}/model", "trainer.project_name=arithmetic")
    parts = runs.flatten(compose("algorithm=disco", *order, *given))
    # A small model's learning rates and micro-batches.
    model = {"actor.optim.lr", "actor.ppo_micro_batch_size_per_gpu", "actor.use_dynamic_bsz", "critic.optim.lr"}
    model |= {"rollout.log_prob_micro_batch_size_per_gpu", "critic.ppo_micro_batch_size_per_gpu"}
    followed = ("critic.forward_micro", "critic.use_dynamic", "log_prob_use_dynamic")
    differ = {name.removeprefix("actor_rollout_ref.") for name in whole if whole[name] != parts[name]}
    assert {name for name in differ if not any(part in name for part in followed)} == model


@pytest.mark.parametrize("backend, strategy", [("cpu", "fsdp2"), ("fsdp2", "fsdp2"), ("megatron", "megatron")])
def test_a_model_of_ones_own_is_followed_on_every_backend(compose, backend, strategy):
    for override in ("model=mine/some-model", "actor_rollout_ref.model.path=mine/some-model"):
        config = compose("algorithm=disco", f"+backend={backend}", override)
        assert config.actor_rollout_ref.model.path == config.critic.model.path == "mine/some-model"
        assert config.trainer.project_name == "some-model" and config.actor_rollout_ref.actor.strategy == strategy
        assert "arithmetic" not in config and "math" not in config
        assert composition.unset(config) == []


@pytest.mark.parametrize("backend", ["cpu", "fsdp2"])
def test_a_model_data_and_reward_of_ones_own_pass_the_doctor(tmp_path, backend):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    build_model(tokenizer, seed=1).save_pretrained(tmp_path)
    row = {"data_source": "mine", "prompt": [{"role": "user", "content": "1+1="}]}
    row["reward_model"] = {"style": "rule", "ground_truth": "2"}
    pd.DataFrame([row] * 256).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"
    )
    own = [f"model={tmp_path}", f"reward.custom_reward_function.path={tmp_path}/reward.py"]
    own += [f"data.{split}_files={tmp_path}/data.parquet" for split in ("train", "val")]
    lengths = ["data.max_prompt_length=64", "data.max_response_length=64"]
    found = list(checks.examine(["algorithm=disco", f"+backend={backend}", *own, *lengths]))
    assert [str(f) for f in found if f.problem and not f.warning] == []
    batch = {"cpu": "16 questions x 8 responses", "fsdp2": "128 questions x 8 responses"}[backend]
    assert any(f.name == "batch" and f.value.startswith(batch) for f in found)


def _fields(file: Path) -> list[tuple[int, str, list[str]]]:
    """Each field of a YAML file: line, text, and the comment above it."""
    found, comment = [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if number > 2 and line.strip().startswith("#"):
            comment.append(line.strip("# "))
        elif ":" in line and number > 2 and not line.strip().startswith("- "):
            found.append((number, line, comment))
            comment = []
        else:
            comment = []
    return found


OURS = sorted(f for package in recipes.config_packages() for f in resources.files(package).rglob("*/*.yaml"))


@pytest.mark.parametrize("file", OURS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_yaml_follows_verls_conventions_and_its_comments_say_more_than_their_keys(file):
    lines = file.read_text().splitlines()
    assert lines[0] == "# @package _global_" and lines[1].startswith("# ") and max(map(len, lines)) <= 120
    for number, line, comment in _fields(file):
        assert lines[number - 2 - len(comment)] == "", f"{number}: a blank line belongs above {line.strip()}"
        assert " #" not in line.split('"')[-1], f"{number}: {line.strip()} has a comment inline"
        words = set(re.findall(r"[a-z]+", " ".join(comment).lower())) - {"a", "an", "the", "of", "for", "in", "its"}
        key = set(re.findall(r"[a-z]+", line.lower()))
        assert not comment or words - key, f"{number}: {comment} says no more than {line.strip()}"


@pytest.mark.parametrize("coefficient, reference", [("0.04", True), ("0", False)])
def test_grpo_runs_without_a_reference_when_its_coefficient_is_zero(compose, coefficient, reference):
    micro_batch = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4"
    config = compose("algorithm=grpo", f"grpo.kl_coef={coefficient}", micro_batch)
    assert main_ppo.need_reference_policy(config) is reference
    assert config.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu == 4


def test_dapo_settings_reach_verls_reward_manager_and_group_filter(compose):
    config = compose("algorithm=dapo", "data.max_response_length=20480")
    manager = resolve_reward_manager_cls(config)(config, tokenizer=None, compute_score=None)
    assert isinstance(manager, DAPORewardManager)
    buffer = manager.overlong_buffer_cfg
    assert (manager.max_resp_len, buffer.enable, buffer.len, buffer.penalty_factor) == (20480, True, 4096, 1.0)
    assert PPOTrainer._resolve_filter_groups_metric(types.SimpleNamespace(config=config)) == "acc"

    config = compose("algorithm=dapo", "dapo.dynamic_sampling=false", "dapo.overlong_buffer.enable=false")
    assert not config.reward.reward_kwargs.overlong_buffer_cfg.enable
    assert PPOTrainer._resolve_filter_groups_metric(types.SimpleNamespace(config=config)) is None


def test_dynamic_sampling_is_one_override_of_disco_and_has_an_end(compose):
    off, on = compose("algorithm=disco"), compose("algorithm=disco", "algorithm.filter_groups.enable=true")
    resolve = PPOTrainer._resolve_filter_groups_metric
    assert [resolve(types.SimpleNamespace(config=c)) for c in (off, on)] == [None, "reward"]
    # What verl_ext.training.replay stops at; tests/verl_ext/training/test_replay.py
    assert on.algorithm.filter_groups.max_num_gen_batches == 10


def test_a_share_is_at_least_one():
    assert [hydra_config.share(0.2, total) for total in (20480, 32, 3)] == [4096, 6, 1]


def test_experiments_come_from_the_same_search_path(compose):
    names = list(recipes.options("experiment"))
    with pytest.raises(MissingConfigException) as e:
        compose("+experiment=nonsense")
    assert (e.value.options or []) == names


def test_a_kill_while_a_checkpoint_is_replaced_leaves_another():
    """With one checkpoint to keep, verl's rotation had none for a moment."""
    texts = [f.read_text() for group in recipes.groups() for f in recipes.options(group).values()]
    kept = [int(n) for text in texts for n in re.findall(r"max_(?:actor|critic)_ckpt_to_keep: (\d+)", text)]
    assert len(kept) >= 4 and min(kept) >= 2


def test_one_seed_seeds_everything(compose):
    config = runs.flatten(compose("algorithm=ppo", "+experiment=arithmetic_cpu", "seed=77"))
    seeds = {name: value for name, value in config.items() if name.split(".")[-1].endswith("seed")}
    # The model that all runs start from has its own.
    assert seeds.pop("arithmetic.seed") == 1
    assert len(seeds) > 5 and set(seeds.values()) == {77}


def test_descriptions_are_the_second_line_of_each_file():
    descriptions = recipes.describe_algorithms()
    assert sorted(descriptions) == ALGORITHMS
    assert all(len(text) > 20 for text in descriptions.values())


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """``jobs(*arguments)``: run ``main_ppo``'s Hydra application with training replaced; the configs that it got."""
    got = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VERL_PLATFORM", "cpu")

    def run(*arguments: str, train=lambda config, task_runner_class: None) -> list:
        logging = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
        places = [f"hydra.run.dir={tmp_path}/hydra", f"hydra.sweep.dir={tmp_path}/sweep"]
        monkeypatch.setattr(sys, "argv", ["main_ppo", *arguments, *logging, *places])
        # No model and no data are there.
        monkeypatch.setitem(checks.CHECKS, checks.Needs.FILES, [])
        monkeypatch.setattr(main_ppo, "validate_config", lambda **kwargs: None)
        monkeypatch.setattr(main_ppo, "run_ppo", lambda config, **kwargs: (got.append(config), train(config, **kwargs)))
        main_ppo.main()
        return got

    run.got = got
    yield run
    HydraConfig.instance().cfg = None


CALLS = []


def accept(config) -> None:
    """Named by ``verl_ext.prepare`` and ``verl_ext.validator`` below."""
    assert "hydra" not in config
    CALLS.append(config.trainer.project_name)


def refuse(config) -> None:
    raise ValueError(f"trainer.nnodes={config.trainer.nnodes} is odd; use an even number")


def crash(config) -> None:
    raise KeyError("a bug")


def _here(name: str) -> str:
    sys.modules.setdefault("callback_functions", sys.modules[__name__])
    return f"callback_functions.{name}"


def test_a_users_config_on_top_of_verls_has_the_group(jobs, tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\ntrainer: {total_epochs: 3}\n")
    (config,) = jobs("--config-dir", str(tmp_path), "--config-name", "mine", "algorithm=disco")
    assert (config.trainer.total_epochs, config.disco.objective) == (3, "disco")


def test_a_users_own_directory_asks_for_the_group_by_its_search_path(jobs, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, _self_]\n"
        "hydra: {searchpath: ['verl-ext://trainer/config']}\n"
        "trainer: {total_epochs: 3}\n"
    )
    (config,) = jobs("--config-path", str(tmp_path), "--config-name", "mine", "algorithm=disco")
    assert (config.trainer.total_epochs, config.disco.objective) == (3, "disco")


DISCO = ("algorithm=disco", "+experiment=arithmetic_cpu", "verl_ext.prepare=null")


def test_each_run_has_a_folder_of_its_settings(jobs, tmp_path):
    """The quickstart, and the same run with another score or seed, used one folder."""
    for overrides in ([], ["disco.score=l_ratio", "seed=2"]):
        jobs(*DISCO, *overrides)
    names = ["disco,seed=1", "disco,disco.score=l_ratio,seed=2"]
    for config, name in zip(jobs.got, names, strict=True):
        assert config.trainer.default_local_dir == f"{tmp_path}/outputs/arithmetic/{name}"
        assert config.trainer.experiment_name == name
        folder = tmp_path / "outputs/arithmetic" / name
        assert OmegaConf.load(folder / runs.CONFIG_FILE).trainer.default_local_dir == str(folder)
        assert (folder / runs.FINISHED_FILE).exists()


def test_what_a_job_gets_means_the_same_in_every_process(jobs, tmp_path):
    folder = "trainer.default_local_dir=${hydra:runtime.output_dir}/run_${now:%Y}"
    (config,) = jobs(*DISCO, folder, "hydra.job.chdir=true", "trainer.rollout_data_dir=rollouts")
    assert Path.cwd() == tmp_path
    text = OmegaConf.to_yaml(config)
    assert "hydra:" not in text and "now:" not in text
    run = Path(config.trainer.default_local_dir)
    assert run.parent == tmp_path / "hydra" and (run / runs.CONFIG_FILE).exists()
    # Not below Hydra's folder, which is the working folder of the job.
    assert config.trainer.rollout_data_dir == f"{tmp_path}/rollouts"
    assert config.data.train_files == f"{tmp_path}/outputs/arithmetic/assets/train.parquet"


def test_a_stock_run_is_refused_in_the_folder_of_another(jobs, tmp_path, capsys):
    jobs()
    run = tmp_path / "checkpoints/verl_examples/gsm8k"
    before = (run / runs.CONFIG_FILE).read_bytes()
    (run / runs.METRICS_FILE).write_text('{"step": 1, "actor/lr": 1}\n')
    with pytest.raises(
        SystemExit, match=f"{run} holds another run: actor_rollout_ref.model.path=x .that run: .*; choose"
    ):
        jobs("actor_rollout_ref.model.path=x")
    with pytest.raises(SystemExit, match=f"{run} holds another run: .*=2 .that run: 8.; choose another"):
        jobs("trainer.n_gpus_per_node=2")
    assert (run / runs.CONFIG_FILE).read_bytes() == before and len(jobs.got) == 1
    # Otherwise it goes on as verl would, and is told where there is something to go on from.
    (run / runs.CHECKPOINT_FILE).write_text("1")
    jobs("algorithm.gamma=0.9")
    assert "with algorithm.gamma=0.9, was 1.0" in capsys.readouterr().out


def test_a_job_that_ends_early_is_not_finished(jobs, tmp_path, capsys):
    """An evaluation alone in the folder of a half-trained run made it ``finished``."""
    run = tmp_path / "run"

    def train(config, task_runner_class):
        row = {"step": 50, "actor/lr": 1, "val-core/level_1/acc/mean@1": 0.5}
        (run / runs.METRICS_FILE).write_text(json.dumps(row) + "\n")

    jobs(*DISCO, f"trainer.default_local_dir={run}", "trainer.val_only=true", train=train)
    assert not (run / runs.FINISHED_FILE).exists()
    assert f"{run} is not marked as finished: step 50 of 100 is the last in metrics.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("step", [None, 40])
def test_a_job_that_fails_says_where_it_goes_on(jobs, tmp_path, capsys, step):
    run = tmp_path / "run"

    def train(config, task_runner_class):
        if step is not None:
            (run / runs.CHECKPOINT_FILE).write_text(str(step))
        raise RuntimeError("the actor died")

    with pytest.raises((SystemExit, RuntimeError)):
        jobs(*DISCO, f"trainer.default_local_dir={run}", train=train)
    told = (
        f"verl-disco: the run in {run} ended early, by the error below; the same command continues from global_step_40"
    )
    assert (told in capsys.readouterr().out) == (step is not None)
    assert not (run / runs.FINISHED_FILE).exists()


def test_an_interrupted_run_is_not_finished_and_gives_its_folder_back(jobs, tmp_path):
    def interrupted(config, task_runner_class):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs(*DISCO, train=interrupted)
    assert not list(tmp_path.rglob(runs.FINISHED_FILE)) and list(tmp_path.rglob(runs.CONFIG_FILE))


def test_prepare_runs_after_the_validator_and_before_the_job(jobs):
    CALLS.clear()
    settings = [f"+verl_ext.{step}={_here('accept')}" for step in ("validator", "prepare")]
    assert len(jobs("trainer.project_name=mine", *settings)) == 1
    assert CALLS == ["mine", "mine"]


def test_a_refusal_ends_the_run_with_its_message_alone(jobs, capsys):
    with pytest.raises(SystemExit) as e:
        jobs(f"+verl_ext.validator={_here('refuse')}", f"+verl_ext.prepare={_here('crash')}")
    assert e.value.code == "verl-disco: settings refused: trainer.nnodes=1 is odd; use an even number"
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_in_a_validator_does_not_let_the_run_go_on(jobs, capsys):
    with pytest.raises(SystemExit, match="verl-disco: not started: KeyError: 'a bug'"):
        jobs(f"+verl_ext.validator={_here('crash')}")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, message", [("trainer.use_v1=false", "trainer.use_v1=False"), ("+rollout.nnodes=1", "verl.experimental")]
)
def test_trainers_that_would_ignore_the_extensions_are_refused(jobs, override, message):
    with pytest.raises(
        SystemExit, match=f"settings refused: {message}.* (do|does) not read verl_ext.actor_worker_class"
    ):
        jobs("algorithm=disco", override)
    assert len(jobs("algorithm=grpo", "setting=disco_paper", override)) == 1


ASYNC = "trainer.v1.trainer_mode=separate_async"
ROLLOUT = "actor_rollout_ref.rollout"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.train_batch_size=128"], r"data.train_batch_size=128 .*parameter_sync_step=4 x .*=16 = 64"),
        (["data.train_batch_size=64"], f"{ROLLOUT}.nnodes=0 leaves no devices .* at least 1"),
        (["data.train_batch_size=64", f"{ROLLOUT}.nnodes=1"], f"{ROLLOUT}.checkpoint_engine.backend=naive .* use nccl"),
        (
            [f"+{ROLLOUT}.agent.agent_loop_manager_class=verl_ext.cpu.rollout.batch_loop.BatchAgentLoopManager"],
            f"trainer_mode=separate_async does not work .* set {ROLLOUT}.agent.agent_loop_manager_class=null",
        ),
        (["actor_rollout_ref.model.lora_rank=8"], "actor_rollout_ref.model.lora_rank=8 does not work with .*=separate"),
    ],
)
def test_what_the_asynchronous_trainers_would_refuse_later_is_refused(jobs, overrides, message):
    common = ["algorithm=grpo", "setting=disco_paper", ASYNC, "actor_rollout_ref.actor.ppo_mini_batch_size=16"]
    with pytest.raises(SystemExit, match=f"settings refused: .*{message}"):
        jobs(*common, *overrides)


def test_an_asynchronous_trainer_starts_with_the_right_settings(jobs):
    jobs(
        *("algorithm=disco", ASYNC, "actor_rollout_ref.actor.ppo_mini_batch_size=16", "data.train_batch_size=64"),
        *(f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.nnodes=1", f"{ROLLOUT}.checkpoint_engine.backend=nccl"),
    )


@pytest.mark.parametrize("initialized", [True, False])
def test_ray_is_shut_down_after_a_job(monkeypatch, initialized):
    shut_down = []
    ray = types.SimpleNamespace(is_initialized=lambda: initialized, shutdown=lambda: shut_down.append(True))
    monkeypatch.setitem(sys.modules, "ray", ray)
    callbacks.JobCallback().on_job_end(OmegaConf.create(), JobReturn())
    assert bool(shut_down) is initialized
