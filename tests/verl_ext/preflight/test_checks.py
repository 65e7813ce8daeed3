"""``python -m verl_ext.doctor experiment``: passes what we ship, for any algorithm, and names what is wrong."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pandas as pd
import pytest

from verl_ext import preflight, recipes
from verl_ext.preflight import checks, composition, machine, settings, sizes
from verl_ext.preflight.checks import Needs, examine
from verl_ext.preflight.memory import lora_parameters
from verl_ext.preflight.model import find_shape
from verl_ext.preflight.unread import check_ignored, check_unread

EXPERIMENTS = list(recipes.options("experiment"))
SHIPPED = [e for e in EXPERIMENTS if e not in ("arithmetic_cpu", "countdown_cpu", "evaluate")]
RUN = ("algorithm=disco", "+experiment=deepseek_qwen_1_5b")
SETS = ("train", "aime24", "aime25", "math500", "amc23", "minerva", "olympiadbench", "gsm8k")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("math")
    for name in SETS:
        rows = [
            {
                "data_source": name,
                "prompt": [{"role": "user", "content": f"{i}+1?"}],
                "reward_model": {"style": "rule", "ground_truth": [str(i + 1)]},
            }
            for i in range(256 if name == "train" else 3)
        ]
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from verl_ext.tasks.arithmetic.model import build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    small = build_model(tokenizer, seed=1)
    # Room for the prompts and responses of math_8k.
    small.config.max_position_embeddings = 16384
    small.save_pretrained(folder)
    return folder


def run(*overrides) -> tuple[list[str], list[str], dict[str, str]]:
    """Problems, warnings, and what else was found, by name."""
    findings = list(examine([str(o) for o in overrides]))
    problems = [f.problem for f in findings if f.problem and not f.warning]
    warnings = [f.problem for f in findings if f.problem and f.warning]
    return problems, warnings, {f.name: f.value for f in findings}


def test_every_check_is_in_the_list_once():
    modules = [import_module(f"{preflight.__name__}.{m.name}") for m in iter_modules(preflight.__path__)]
    defined = {x for m in modules for n, x in vars(m).items() if n.startswith("check_") and x.__module__ == m.__name__}
    listed = [check for of_one_need in checks.CHECKS.values() for check in of_one_need] + machine.CHECKS
    # A part of check_unread.
    assert sorted(c.__name__ for c in listed) == sorted(c.__name__ for c in defined - {check_ignored})
    assert set(checks.CHECKS) == set(Needs)


@pytest.mark.parametrize("experiment", SHIPPED)
def test_every_shipped_experiment_passes(data, experiment):
    task = "gsm8k" if experiment.startswith("gsm8k") else "math"
    problems, warnings, found = run("algorithm=disco", f"+experiment={experiment}", f"{task}.folder={data}")
    assert problems == []
    assert "is not on this machine: each node downloads" in warnings[0]
    assert found["batch"].endswith("4 updates") and "passed for" in found["checks"]
    assert int(found["dataclasses"].split()[0]) >= 7


@pytest.mark.parametrize(
    "algorithm, experiment",
    [("disco", "gsm8k_qwen2_5_0_5b"), ("grpo", "gsm8k_qwen2_5_0_5b"), ("ppo", "gsm8k_qwen2_5_0_5b")]
    + [("disco", "gsm8k_qwen2_5_1_5b_lora"), ("grpo", "gsm8k_qwen2_5_1_5b_lora")],
)
def test_the_first_hour_fits_a_gpu_of_24_gb_by_any_method(data, algorithm, experiment):
    problems, _, found = run(f"algorithm={algorithm}", f"+experiment={experiment}", f"gsm8k.folder={data}")
    assert problems == []
    assert found["batch"] == "64 questions x 8 responses per step, 16 questions per update, 4 updates"
    for moment in ("training", "weight transfer", "generation"):
        assert re.match(r"about (1\d|2[0-3]) of 24 GiB per GPU \(verl_ext.gpu_memory\)", found[moment]), found[moment]


@pytest.mark.parametrize(
    "algorithm, experiment",
    [("ppo", "deepseek_qwen_7b_megatron"), ("grpo", "deepseek_qwen_1_5b"), ("dapo", "deepseek_qwen_7b_megatron")]
    + [("trpa", "deepseek_qwen_1_5b"), ("drpo", "qwen3_30b_a3b_megatron")]
    + [("maxrl", "deepseek_qwen_1_5b"), ("dgpo", "deepseek_qwen_7b_megatron")],
)
def test_other_algorithms_pass_with_the_same_run_settings(data, algorithm, experiment):
    problems, _, found = run(f"algorithm={algorithm}", f"+experiment={experiment}", f"math.folder={data}")
    assert problems == []
    assert found["batch"] == "128 questions x 8 responses per step, 32 questions per update, 4 updates"
    assert found["first evaluation"].startswith(f"{6 * 3 * 16} responses of up to 8192 tokens")


def test_disco_passes_with_dynamic_sampling(data):
    sampling = "algorithm.filter_groups.enable=true"
    problems, _, _ = run("algorithm=disco", sampling, "+experiment=deepseek_qwen_1_5b", f"math.folder={data}")
    assert problems == []


def test_the_task_agrees_with_the_papers_settings(compose):
    for algorithm in ("ppo", "disco"):
        config = compose(f"algorithm={algorithm}", "+experiment=deepseek_qwen_7b")
        alone = compose("algorithm=disco")
        for name in ("n", "temperature", "val_kwargs"):
            assert config.actor_rollout_ref.rollout[name] == alone.actor_rollout_ref.rollout[name], name
        assert config.actor_rollout_ref.actor.ppo_mini_batch_size == alone.actor_rollout_ref.actor.ppo_mini_batch_size
        assert config.data.train_batch_size == alone.data.train_batch_size


def test_evaluation_takes_a_model_and_nothing_else(data, model):
    problems, _, found = run("+experiment=evaluate", f"model={model}", f"math.folder={data}")
    assert problems == []
    assert found["algorithm"] == model.name and found["tokenizer"].startswith("longest of 3 prompts: ")
    # The model's own dataclass, too: it is here.
    assert int(found["dataclasses"].split()[0]) >= 7
    assert run("+experiment=evaluate", f"model={model}", "method=mine", f"math.folder={data}")[0] == []
    problems, _, _ = run("+experiment=evaluate", f"math.folder={data}")
    assert problems == ["the settings do not compose: model is not set"]


def test_a_first_command_without_an_engine_is_told_of_the_backends():
    (finding,) = examine(["algorithm=disco"])
    assert finding.problem.endswith("actor_rollout_ref.rollout.name is not set")
    assert "+backend=fsdp2, megatron or cpu" in finding.fix


@pytest.mark.parametrize(
    "override, problem",
    [
        ("disco.score=l-ratio", "disco.score='l-ratio' is unknown"),
        ("disco.module=none.py", "disco.module=none.py cannot be loaded"),
        ("disco.question_temperature=3", "disco.question_temperature=3 has no effect"),
        ("+disco.detla=1e-3", "disco.detla is read by nothing"),
    ],
)
def test_one_mistake_is_one_problem(override, problem):
    """The dataclass of the node, that of the actor, which holds a copy, and verl's own checks quote the same error."""
    (found,) = run("algorithm=disco", "+experiment=arithmetic_cpu", override)[0]
    assert found.startswith(problem)


def test_a_name_that_may_be_a_folders_is_told(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model0").symlink_to(model)
    name = "models/modle0"
    *_, finding = (f for f in examine(["algorithm=disco", "+backend=cpu", f"model={name}"]) if "modle0" in f.problem)
    assert finding.warning and f"there is no {name} in the folder models" in finding.problem
    assert finding.fix == "nearest: models/model0"


def test_values_without_a_critic_are_refused():
    problems, _, _ = run("algorithm=ppo", "+experiment=arithmetic_cpu", "critic.enable=false")
    assert problems == [
        "critic.enable=False does not work with algorithm.adv_estimator=gae, which reads a critic's values"
    ]


def test_missing_files_of_a_split_are_one_problem(tmp_path):
    names = [f"{tmp_path}/{name}.parquet" for name in ("aime24", "aime25")]
    problems, _, _ = run(*RUN, f"math.folder={tmp_path}", f"data.val_files=[{','.join(names)}]")
    assert f"data.val_files: there is no {names[0]} and no {names[1]}" in problems and len(problems) == 2


def test_a_start_refuses_sizes_that_cannot_work(data):
    asked = composition.compose([*RUN, f"math.folder={data}", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192"])
    with pytest.raises(ValueError, match="ppo_max_token_len_per_gpu=8192 is too low for a sequence of 9216 tokens"):
        checks.refuse(asked, Needs.SETTINGS)


ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"


@pytest.mark.parametrize(
    "overrides",
    [
        # Engines whose sizes are not known here.
        ["model_engine=veomni"],
        ["model_engine=torchtitan"],
        # No response is longer than what the server takes.
        ["data.max_response_length=8192", f"{ROLLOUT}.max_model_len=8192", f"{ACTOR}.ppo_max_token_len_per_gpu=8192"],
        # Nothing is trained.
        ["trainer.val_only=true", f"{ACTOR}.ppo_max_token_len_per_gpu=100", "data.train_batch_size=4096"],
        # Prefill and decode have sizes of their own.
        [f"{ROLLOUT}.disaggregation.enabled=true", f"{ROLLOUT}.tensor_model_parallel_size=3"],
        # The size of a sharing of weights is seen by no one.
        [f"{ACTOR}.use_dynamic_bsz=false", f"{ROLLOUT}.log_prob_use_dynamic_bsz=false"]
        + [f"{ACTOR}.ppo_micro_batch_size_per_gpu=1", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=1"]
        + [f"{ACTOR}.ppo_max_token_len_per_gpu=100"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_start_refuses_no_sizes_that_work(data, overrides):
    backend = [] if overrides[0].startswith("model_engine") else ["+backend=fsdp2"]
    files = [f"data.train_files={data}/train.parquet", f"data.val_files={data}/gsm8k.parquet"]
    asked = ["algorithm=grpo", *backend, "actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct", *files]
    asked += [f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.n=8", "trainer.n_gpus_per_node=8", "data.max_prompt_length=1024"]
    asked += ["data.train_batch_size=128", f"{ACTOR}.ppo_mini_batch_size=64"]
    found = composition.compose([*asked, *overrides])
    assert [f.problem for f in sizes.check_sizes(found) if f.problem and not f.warning] == []
    assert [f.problem for f in sizes.check_rows_of_a_step(found)] == []


@pytest.mark.parametrize(
    "override, problem",
    [
        (f"{ROLLOUT}.log_prob_max_token_len_per_gpu=512", f"{ROLLOUT}.log_prob_max_token_len_per_gpu=512 is too low"),
        ("critic.ppo_infer_max_token_len_per_gpu=512", "critic.ppo_infer_max_token_len_per_gpu=512 is too low"),
        ("trainer.val_only=true", "trainer.val_only=True with trainer.val_before_train=False trains"),
        ("data.train_batch_size=0", "data.train_batch_size=0 trains on nothing"),
        ("data.train_batch_size=512", "256 training rows are fewer than data.train_batch_size=512"),
    ],
)
def test_a_start_refuses_what_ends_or_fools_it_later(data, override, problem):
    files = [f"data.train_files={data}/train.parquet", f"data.val_files={data}/gsm8k.parquet"]
    asked = composition.compose(
        ["algorithm=ppo", "+backend=fsdp2", "model=Qwen/Qwen2.5-7B-Instruct", "trainer.val_before_train=false", *files]
        + ["data.train_batch_size=128", f"{ACTOR}.ppo_mini_batch_size=64", override]
    )
    with pytest.raises(ValueError, match=re.escape(problem)):
        checks.refuse(asked, Needs.SETTINGS, Needs.FILES)


def test_a_limit_is_judged_by_what_its_own_role_splits():
    """The critic has the actor's limit, but does not share a sequence among two GPUs."""
    asked = ["algorithm=ppo", "+backend=fsdp2", "model=Qwen/Qwen2.5-7B-Instruct", "data.max_prompt_length=512"]
    asked += ["data.max_response_length=1536", f"{ACTOR}.ulysses_sequence_parallel_size=2"]
    asked += [f"{ACTOR}.ppo_max_token_len_per_gpu=1024", "critic.ppo_infer_max_token_len_per_gpu=1024"]
    found = [f.problem for f in sizes.check_sizes(composition.compose(asked)) if f.problem and not f.warning]
    assert found == ["critic.ppo_infer_max_token_len_per_gpu=1024 is too low for a sequence of 2048 tokens"]


def test_a_users_estimator_may_read_values(data):
    files = [f"data.train_files={data}/train.parquet", f"data.val_files={data}/gsm8k.parquet"]
    asked = ["algorithm=grpo", "+backend=fsdp2", "model=Qwen/Qwen2.5-7B-Instruct", "critic.enable=true", *files]
    asked += ["actor_rollout_ref.model.external_lib=json", "algorithm.adv_estimator=mine"]
    checks.refuse(composition.compose([*asked, "data.train_batch_size=128"]), Needs.SETTINGS)


def test_a_check_that_fails_itself_does_not_end_a_start(monkeypatch, capsys):
    def check_broken(run):
        raise KeyError("ours")
        yield

    monkeypatch.setitem(checks.CHECKS, Needs.SETTINGS, [check_broken])
    checks.refuse(composition.compose(["algorithm=disco", "+experiment=arithmetic_cpu"]), Needs.SETTINGS)
    assert "checking broken failed: KeyError: 'ours'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override",
    [
        # Where verl moves it.
        "+reward_model.reward_kwargs.max_resp_len=1024",
        # A name of the user's.
        "+distillation.teacher_models.gsm8k.key=openai/gsm8k",
    ],
)
def test_a_setting_that_verl_reads_under_another_name_is_known(override):
    asked = composition.compose(["algorithm=grpo", "+experiment=arithmetic_cpu", override])
    assert [f.problem for f in check_unread(asked) if not f.warning] == []


def test_rollouts_on_gpus_of_their_own_are_divided_there(data):
    rollout = "actor_rollout_ref.rollout"
    asked = [*RUN, f"math.folder={data}", "trainer.v1.trainer_mode=separate_async", f"{rollout}.nnodes=1"]
    asked += [f"{rollout}.n_gpus_per_node=8", f"{rollout}.tensor_model_parallel_size=4", "trainer.n_gpus_per_node=6"]
    asked += [f"{rollout}.checkpoint_engine.backend=nccl", "actor_rollout_ref.actor.ppo_mini_batch_size=48"]
    asked += ["data.train_batch_size=192", "trainer.total_training_steps=100"]
    assert "a rollout server of 4 GPU(s) does not divide 6" in run(*asked)[0]
    assert run(*asked, "actor_rollout_ref.hybrid_engine=false")[0] == []


def test_another_engine_is_a_group(data):
    (finding,) = (f for f in examine([*RUN, f"math.folder={data}", "critic.strategy=megatron"]) if f.problem)
    assert finding.problem == "critic.strategy=megatron is wrong"
    assert finding.fix.startswith("write model_engine=megatron instead")


@pytest.mark.parametrize(
    "overrides, problem",
    [
        (["actor_rollout_ref.rollout.name=sglang"], "actor_rollout_ref.rollout.name=sglang needs a GPU here"),
        (
            ["actor_rollout_ref.rollout.name=vllm"],
            "actor_rollout_ref.rollout.name=vllm does not work with actor_rollout",
        ),
        (
            ["actor_rollout_ref.rollout.multi_turn.enable=true"],
            "actor_rollout_ref.rollout.multi_turn.enable=True does no",
        ),
    ],
)
def test_what_the_light_rollout_cannot_do_is_refused_before_ray(overrides, problem):
    problems, _, _ = run("algorithm=disco", "+experiment=arithmetic_cpu", *overrides)
    assert any(p.startswith(problem) for p in problems), problems


def test_missing_data_are_named_with_what_makes_them(tmp_path):
    findings = examine(["algorithm=disco", "+experiment=gsm8k_qwen2_5_0_5b", f"gsm8k.folder={tmp_path}"])
    wrong = [f for f in findings if f.problem and not f.warning]
    assert [f.problem for f in wrong] == [
        f"data.train_files: there is no {tmp_path}/train.parquet",
        f"data.val_files: there is no {tmp_path}/gsm8k.parquet",
    ]
    assert all("python -m verl_ext.tasks.gsm8k.prepare --out DIR; the run takes gsm8k.folder" in f.fix for f in wrong)
    own = ["algorithm=disco", "+backend=cpu", f"model={tmp_path}", "data.train_files=none.parquet"]
    (fix,) = (f.fix for f in examine(own) if "none.parquet" in f.problem)
    # Without a task of ours there is no math.folder.
    assert "math.folder" not in fix and "reward_model.ground_truth" in fix


def test_a_model_that_no_task_builds_is_missing(tmp_path):
    missing = f"actor_rollout_ref.model.path={tmp_path}/none: there is no such folder, and it is not a name on the hub"
    overrides = ["algorithm=disco", "+backend=cpu", f"model={tmp_path}/none"]
    for task in ("countdown", "arithmetic"):
        problems, warned, found = run(*overrides, f"+task={task}", f"{task}.folder={tmp_path}/{task}")
        assert problems == [missing]
        assert found["train data"] == f"{tmp_path}/{task}/train.parquet: the start builds it"
        assert not any("train.parquet" in w for w in warned)


def test_countdown_is_built_by_the_start_and_its_rows_are_read(tmp_path):
    from verl_ext.tasks.countdown.assets import build_assets

    overrides = ["algorithm=grpo", "+experiment=countdown_cpu", f"countdown.folder={tmp_path / 'a'}"]
    problems, warnings, found = run(*overrides)
    assert problems == [] and warnings == []
    assert found["model"].endswith("a/model: the start builds it") and found["val data"].endswith("the start builds it")
    assert "first evaluation" not in found
    assert run(*overrides, "countdown.sizes=[2,3]")[0] == ["countdown.sizes=[2, 3] must be among 3, 4, 5, 6"]
    assert found["batch"] == "16 questions x 8 responses per step, 8 questions per update, 2 updates"
    build_assets(
        **composition.compose([*overrides, "countdown.iterations=0", "countdown.train_size=64"]).config.countdown
    )
    file = tmp_path / "a/train.parquet"
    rows = pd.read_parquet(file)
    rows["reward_model"] = [{"style": "rule", "ground_truth": "22"}] * 64
    rows.to_parquet(file)
    problems, _, _ = run(*overrides)
    refused = (
        "the reward function refuses reward_model.ground_truth: ground_truth must have numbers and a target, got 22"
    )
    assert f"data.train_files: {file}: row 0: {refused} (64 such rows)" in problems


def test_the_quickstart_passes_too(tmp_path):
    from verl_ext.tasks.arithmetic.assets import ensure_assets

    folder = tmp_path / "assets"
    overrides = ["algorithm=ppo", "+experiment=arithmetic_cpu", f"arithmetic.folder={folder}"]
    problems, warnings, _ = run(*overrides)
    # The start builds it.
    assert problems == [] and warnings == ["the critic's settings are not checked, as the model is not on this machine"]
    ensure_assets(composition.compose([*overrides, "arithmetic.iterations=1", "arithmetic.train_size=64"]).config)
    problems, warnings, found = run(*overrides)
    assert problems == [] and warnings == []
    assert "training" not in found and found["gpus"] == "1 node(s) x 2: 2 data-parallel"


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (
            [
                "actor_rollout_ref.actor.ppo_mini_batch_size=48",
                "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192",
                "actor_rollout_ref.rollout.tensor_model_parallel_size=3",
                "actor_rollout_ref.rollout.n=1",
                "trainer.total_epochs=2",
            ],
            [
                "is too low for a sequence of 9216 tokens",
                "a rollout server of 3 GPU(s) does not divide 8",
                "a question needs a positive and a negative",
                "trainer.total_epochs=2 ends after 4",
            ],
        ),
        (
            [
                "trainer.n_gpus_per_node=6",
                "actor_rollout_ref.actor.ulysses_sequence_parallel_size=4",
                "actor_rollout_ref.rollout.tensor_model_parallel_size=8",
                "+actor_rollout_ref.rollout.nonsense=1",
                "data.train_files=none.parquet",
            ],
            [
                "ulysses_sequence_parallel_size=4 does not divide 6 GPUs",
                "tensor_model_parallel_size=8 does not divide the model's 12",
                "actor_rollout_ref.rollout.nonsense is read by nothing",
                "data.train_files: there is no none.parquet",
            ],
        ),
        (
            ["verl_ext.gpu_memory=8", "data.train_batch_size=512", "disco.tau=-1"],
            [
                "training needs about",
                "the KV cache holds 0 tokens, fewer than one sequence of 9216",
                "256 training rows are fewer than data.train_batch_size=512",
                "disco.tau",
            ],
        ),
        (["nonsense=1"], ["the settings do not compose: there is no setting nonsense"]),
        (["trainer.nnodes=???"], ["trainer.nnodes is not set"]),
    ],
)
def test_what_is_wrong_is_named(data, overrides, expected):
    problems, _, _ = run(*RUN, f"math.folder={data}", *overrides)
    for problem in expected:
        assert any(problem in p for p in problems), (problem, problems)


@pytest.mark.parametrize("algorithm, then", [("disco", "mini-batches of different sizes"), ("grpo", "rows of padding")])
def test_a_batch_that_does_not_divide_trains_and_is_a_warning(data, algorithm, then):
    overrides = [f"algorithm={algorithm}", *RUN[1:], f"math.folder={data}"]
    problems, warnings, _ = run(*overrides, "actor_rollout_ref.actor.ppo_mini_batch_size=48")
    assert problems == []
    name = "actor_rollout_ref.actor.ppo_mini_batch_size=48"
    assert f"data.train_batch_size=128 is not a multiple of {name}: {then}" in warnings


def test_a_context_below_prompt_and_response_generates_and_is_a_warning(data):
    problems, warnings, _ = run(*RUN, f"math.folder={data}", "actor_rollout_ref.rollout.max_model_len=8700")
    assert problems == []
    name = "actor_rollout_ref.rollout.max_model_len=8700"
    assert f"{name} cuts a response short of 8192 tokens where prompt plus response take more" in warnings


def test_what_megatron_cannot_split_is_named(data):
    split = [f"actor_rollout_ref.actor.megatron.{kind}_model_parallel_size" for kind in ("tensor", "pipeline")]
    experiment = "+experiment=deepseek_qwen_1_5b_megatron"
    sizes = [f"{split[0]}=4", f"{split[1]}=8", "trainer.n_gpus_per_node=32"]
    problems, _, _ = run("algorithm=disco", experiment, f"math.folder={data}", *sizes)
    assert any("tensor_model_parallel_size=4 does not divide the model's 2" in p for p in problems), problems
    assert any("pipeline_model_parallel_size=8 does not divide the model's 28" in p for p in problems), problems


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda f: f.drop(columns="reward_model"), " has no column reward_model"),
        (lambda f: f.head(0), " has no rows"),
        (
            lambda f: f.assign(reward_model=[{"style": "rule"}] * len(f)),
            ": row 0 has no reward_model.ground_truth (256 such rows)",
        ),
        (lambda f: f.assign(prompt="text"), ": row 0: prompt is not a list of messages (256 such rows)"),
    ],
)
def test_wrong_data_is_named(data, tmp_path, change, problem):
    file = tmp_path / "train.parquet"
    change(pd.read_parquet(data / "train.parquet")).to_parquet(file)
    problems, _, _ = run(*RUN, f"math.folder={data}", f"data.train_files={file}")
    assert problems == [f"data.train_files: {file}{problem}"]


@pytest.mark.parametrize("experiment", SHIPPED)
def test_servers_have_room_for_the_longest_sequence_and_no_more(compose, experiment):
    config = compose("algorithm=disco", f"+experiment={experiment}", "data.max_prompt_length=512")
    assert config.actor_rollout_ref.rollout.max_model_len == 512 + config.data.max_response_length


def test_what_the_engine_will_use_is_judged(data):
    rollout = "actor_rollout_ref.rollout"
    run_of = [*RUN, f"math.folder={data}", "verl_ext.gpu_memory=24"]
    run_of.append(f"{rollout}.gpu_memory_utilization=0.3")
    assert run(*run_of)[0] == []
    # The share less 3.3 GiB of weights and 3 GiB of the engine's own, at 28 KiB a token.
    (finding,) = [f for f in examine([*run_of, f"{rollout}.max_model_len=null"]) if f.name == "KV cache"]
    room = int((0.3 * 24 - 3.31 - 3) * 2**30 / 28672) // 1000
    assert finding.problem.startswith(f"{rollout}.max_model_len=null stands for the model's 131072 positions, of which")
    assert f"holds {room}" in finding.problem and "vllm does not start" in finding.problem
    assert finding.fix == f"set {rollout}.max_model_len=9216, the longest prompt and response"
    # With room for all positions, or with an engine that takes what it needs, null is no problem.
    assert run(*run_of[:3], f"{rollout}.max_model_len=null")[0] == []
    assert run(*run_of, f"{rollout}.max_model_len=null", f"{rollout}.name=hf")[0] == []
    (problem,) = run(*run_of, f"{rollout}.max_model_len=65536")[0]
    assert re.fullmatch(rf"the KV cache holds {room}\d\d\d tokens, fewer than one sequence of 65536", problem)


def test_sequences_longer_than_the_models_positions_are_named(data):
    run_of = ["algorithm=disco", "+experiment=qwen3_4b", f"math.folder={data}", "data.max_response_length=40000"]
    problems, _, _ = run(*run_of, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=41024")
    assert problems == ["actor_rollout_ref.rollout.max_model_len=41024 is more than the model's 40960 positions"]
    unset = [*run_of, "actor_rollout_ref.rollout.max_model_len=null"]
    problems, _, _ = run(*unset, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=41024")
    assert problems == ["prompt and response=41024 is more than the model's 40960 positions"]


def test_wrong_values_are_all_named_and_nothing_is_built_on_them(data):
    overrides = [
        "trainer.n_gpus_per_node=0",
        "trainer.nnodes=two",
        "data.truncation=middel",
        "++data.train_batchsize=1",
    ]
    overrides += ["actor_rollout_ref.model.path=/nope/model", "data.val_files=none.parquet"]
    problems, _, found = run(*RUN, f"math.folder={data}", *overrides)
    assert sorted(problems) == [
        "actor_rollout_ref.model.path=/nope/model: there is no such folder, and it is not a name on the hub",
        "data.train_batchsize is read by nothing",
        "data.truncation=middel is wrong",
        "data.val_files: there is no none.parquet",
        "trainer.n_gpus_per_node=0 is wrong",
        "trainer.nnodes=two is wrong",
    ]
    assert "checks" not in found and found["further checks"].startswith("skipped")


def test_what_verl_ignores_is_a_warning_and_stays_in_the_settings(data):
    overrides = ["trainer.balance_batch=false", "critic.ppo_max_token_len_per_gpu=9216", "critic.use_dynamic_bsz=false"]
    overrides += ["critic.ppo_micro_batch_size_per_gpu=2"]
    problems, warnings, found = run("algorithm=ppo", RUN[1], f"math.folder={data}", *overrides)
    assert problems == [] and "passed for" in found["checks"]
    for override in overrides:
        assert f"{override} has no effect: verl does not read it" in warnings


def test_data_in_json_pass(data, tmp_path):
    rows = pd.read_parquet(data / "train.parquet")
    for name, lines in (("train.jsonl", True), ("train.json", False)):
        rows.to_json(tmp_path / name, orient="records", lines=lines)
        problems, _, found = run(*RUN, f"math.folder={data}", f"data.train_files={tmp_path / name}")
        assert problems == [] and found["train data"].startswith(f"{tmp_path / name}: 256 rows")
        assert found["steps"].startswith("1400, 700.0 passes")


def test_the_rewards_old_names_are_checked_too(data):
    """verl moves them, whole nodes at a time, before anything reads them."""
    run_of = [*RUN, f"math.folder={data}"]
    problems, _, _ = run(*run_of, "custom_reward_function.path=/nope.py")
    assert problems == ["reward.custom_reward_function.path=/nope.py: there is no such file"]
    run_of.append("custom_reward_function.path=pkg://verl_ext.tasks.math.reward")
    assert run(*run_of)[0] == ["reward.custom_reward_function.name=null is not in pkg://verl_ext.tasks.math.reward"]
    assert run(*run_of, "custom_reward_function.name=compute_score")[0] == []


def test_adapters_need_no_vllm_here(data, monkeypatch):
    from verl.workers.rollout.vllm_rollout import utils

    def refuse(rank):
        raise ValueError("vllm version None not supported and SGLang also not Found.")

    monkeypatch.setattr(utils, "get_vllm_max_lora_rank", refuse)
    monkeypatch.setattr(settings, "version_of", lambda *names: None)
    problems, warnings, _ = run("algorithm=disco", "+experiment=deepseek_qwen_1_5b_lora", f"math.folder={data}")
    assert problems == [] and "vllm is not installed here" in warnings


def test_an_error_of_a_check_names_the_overrides(data, monkeypatch):
    def check_luck(run):
        raise ZeroDivisionError("integer modulo by zero")
        yield

    monkeypatch.setitem(checks.CHECKS, Needs.PLAN, [check_luck])
    overrides = [*RUN, f"math.folder={data}", "trainer.nnodes=2"]
    (wrong,) = [f for f in examine(overrides) if f.problem]
    assert wrong.problem == "checking luck failed: ZeroDivisionError: integer modulo by zero"
    assert wrong.fix == f"fix the error above; it may come from math.folder={data}, trainer.nnodes=2"


@pytest.mark.parametrize(
    "overrides, problem, fix",
    [
        (["algorithm=disko"], "there is no algorithm=disko", "use one of disco, disco_b, cispo, "),
        (["algorithm="], "there is no algorithm=", "use one of "),
        (["+experiment=deepseek_qwen_1b"], "there is no experiment=deepseek_qwen_1b", "use one of deepseek_qwen_1_5b"),
        (["model_engine=megatro"], "there is no model_engine=megatro", "use one of megatron, "),
        (["data.train_batch_sizee=3"], "there is no setting data.train_batch_sizee", "nearest: data.train_batch_size"),
        (["algorithm=disco", "disco.tauu=3"], "there is no setting disco.tauu", "nearest: disco.tau"),
        (["disco.delta=1e-3"], "disco.delta is not in this run, but in another algorithm", "leave it out, or choose"),
        (["algoritm=disco"], "there is no setting algoritm", "nearest: algorithm"),
        (["experiment=qwen3_4b"], "the group experiment has no option yet", "write +experiment=qwen3_4b"),
        (["+algorithm=disco"], "algorithm has a value already", "write algorithm=NAME, without the +"),
        (["+data.train_batch_size=3"], "An item is already at 'data.train_batch_size'", "drop the +, or write ++data"),
        (["data.cache_dir=/tmp"], "data.cache_dir can be set, but has no value to override", "write +data.cache_dir"),
        (["+experiment=qwen3_4b", "+experiment=arithmetic_cpu"], "experiment is added twice: ", "keep one of them"),
        (["+experiment=qwen3_4b", "+experiment=qwen3_4b"], "experiment is added twice: ", "keep one of them"),
        (["++foo=1", "++foo=2", "data.bogus=3"], "there is no setting data.bogus", "leave it out"),
        (["trainer.nnodes", "=", "2"], "the override 'trainer.nnodes' cannot be read", "write name=value, without"),
        (["data.apply_chat_template_kwargs={a:1}"], "adds keys to data.apply_chat_template_kwargs", "write ++data"),
        (["~data.seeed"], "'data.seeed' does not exist", "nearest: ~data.seed"),
        (["trainer.nnodes"], "the override 'trainer.nnodes' cannot be read", "write name=value"),
        (["trainer.logger=[console"], "the override 'trainer.logger=[console' cannot be read", "write name=value"),
        (["algorithm=disco,ppo"], "Ambiguous value", "write a list as name=[a,b]"),
    ],
)
def test_overrides_that_do_not_compose_are_one_finding(overrides, problem, fix):
    (finding,) = examine(overrides)
    assert finding.problem.startswith("the settings do not compose: ") and problem in finding.problem
    assert finding.fix.startswith(fix) and "\n" not in finding.problem
    if "there is no algorithm" in problem:
        assert set(finding.fix.removeprefix("use one of ").split(", ")) == set(recipes.describe_algorithms())


def test_the_command(data, tmp_path):
    command = [sys.executable, "-m", "verl_ext.doctor", "experiment", "algorithm=disco"]
    command += ["+experiment=qwen3_4b", f"math.folder={data}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "OK" and "warning: " in done.stdout


@pytest.mark.parametrize(
    "name, billions",
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.78),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7.62),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 8.03),
        ("Qwen/Qwen3-4B", 4.02),
        ("Qwen/Qwen3-30B-A3B", 30.53),
    ],
)
def test_shapes_have_the_published_numbers_of_parameters(name, billions):
    shape, source = find_shape(name)
    assert source == "its model card" and shape.parameters / 1e9 == pytest.approx(billions, abs=0.006)


def test_a_models_parameters_are_counted_from_its_config(model):
    from transformers import AutoModelForCausalLM

    shape, source = find_shape(str(model))
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters() if p.dim() > 1)
    assert source == "config.json" and shape.parameters == count


def test_adapters_are_counted_as_peft_makes_them(model):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert lora_parameters(find_shape(str(model))[0], 8) == trained
