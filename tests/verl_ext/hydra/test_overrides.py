"""Overrides of names that nothing reads and values that cannot be right are found, with what would be right; what verl
takes is not."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from verl_ext import recipes
from verl_ext.hydra import config_source as hydra_config
from verl_ext.preflight import composition
from verl_ext.preflight.composition import Run
from verl_ext.preflight.unread import HANDED_ON, IGNORED, RAY_NAMES, as_attributes, check_unread, reads, sources
from verl_ext.preflight.values import MODES, check_values

ROOT = Path(hydra_config.__file__).parents[2]
SHIPPED = [file for group in sorted(recipes.groups()) for file in recipes.options(group).values()]
ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """Compositions without values of the user's."""
    return {
        "disco": composition.compose(["algorithm=disco", "+experiment=deepseek_qwen_1_5b"]),
        "megatron": composition.compose(["algorithm=dapo", "+experiment=deepseek_qwen_1_5b_megatron"]),
        "ppo": composition.compose(["algorithm=ppo"]),
    }


def edited(run: Run, *overrides: str) -> Run:
    """The same run with overrides that may add."""
    config = run.composed.copy()
    OmegaConf.set_struct(config, False)
    config.merge_with(OmegaConf.from_dotlist(list(overrides)))
    return Run(config, run.plain)


def unread(run: Run, *overrides: str) -> list:
    return list(check_unread(edited(run, *overrides)))


def wrong(run: Run, *overrides: str) -> list:
    return list(check_values(edited(run, *overrides)))


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, nearest",
    [
        ("data.train_batchsize=64", "data.train_batch_size"),
        ("data.batch_size=64", "data.train_batch_size"),
        ("data.max_response_lenght=64", "data.max_response_length"),
        ("data.shufle=false", "data.shuffle"),
        ("data.lr=1e-6", "actor_rollout_ref.actor.optim.lr"),
        ("trainer.n_gpus=8", "trainer.n_gpus_per_node"),
        ("trainer.save_frequency=8", "trainer.save_freq"),
        ("trainer.epochs=8", "trainer.total_epochs"),
        ("trainer.v1.trainer_mod=sync", "trainer.v1.trainer_mode"),
        ("algorithm.kl_coef=0", "algorithm.kl_ctrl.kl_coef"),
        ("algorithm.clip_ratio=0.3", "actor_rollout_ref.actor.clip_ratio"),
        ("algorithm.adv_estimater=grpo", "algorithm.adv_estimator"),
        ("algorihtm.adv_estimator=grpo", "algorithm"),
        ("actor.strategy=fsdp", "actor_rollout_ref.actor"),
        ("experimnt=qwen3_4b", "experiment"),
        ("seeed=3", "seed"),
        ("disco.tauu=3", "disco.tau"),
        ("grpo.klcoef=3", "grpo.kl_coef"),
        ("verl_ext.whole_group=false", "verl_ext.whole_groups"),
        ("actor_rollout_ref.hybrid_engin=true", "actor_rollout_ref.hybrid_engine"),
        ("actor_rollout_ref.model.lora.rnak=8", "actor_rollout_ref.model.lora.rank"),
        ("actor_rollout_ref.rollout.temp=1", "actor_rollout_ref.rollout.temperature"),
        (
            "actor_rollout_ref.rollout.tensor_parallel_size=2",
            "actor_rollout_ref.rollout.tensor_model_parallel_size",
        ),
        ("actor_rollout_ref.rollout.val_kwargs.temprature=1", "actor_rollout_ref.rollout.val_kwargs.temperature"),
        ("actor_rollout_ref.actor.mini_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size"),
        ("actor_rollout_ref.actor.fsdp_config.fsdpsize=8", "actor_rollout_ref.actor.fsdp_config.fsdp_size"),
        ("reward.custom_reward_function.paht=r.py", "reward.custom_reward_function.path"),
        ("reward.custom_reward_fn.path=r.py", "reward.custom_reward_function"),
        ("ray_kwargs.ray_init.num_cpu=8", "ray_kwargs.ray_init.num_cpus"),
        ("ray_kwargs.ray_init.runtime_env.env_var.A=b", "ray_kwargs.ray_init.runtime_env.env_vars"),
        ("foo.bar=1", None),
        ("foo={bar: 1}", None),
        ("data.dataframe=1", None),
    ],
)
def test_what_nothing_reads_is_named_with_the_nearest(runs, override, nearest):
    (finding,) = unread(runs["disco"], override)
    assert finding.problem == f"{finding.name} is read by nothing" and not finding.warning
    assert override.startswith(finding.name)
    if nearest is None:
        assert finding.fix == "leave it out"
    else:
        assert nearest in finding.fix.removeprefix("nearest: ").split(", ")


READ = """
actor_rollout_ref.model.override_config.attn_implementation=sdpa
actor_rollout_ref.model.override_config.max_position_embeddings=32768
actor_rollout_ref.model.target_parameters=[a]
actor_rollout_ref.actor.use_rollout_log_probs=true
actor_rollout_ref.actor.ppo_infer_micro_batch_size_per_gpu=4
actor_rollout_ref.actor.checkpoint.save_lora_only=true
actor_rollout_ref.actor.optim.override_optimizer_config.fused=true
actor_rollout_ref.actor.policy_loss.rollout_correction.rollout_is=token
actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16
actor_rollout_ref.actor.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap=[A]
actor_rollout_ref.actor.fsdp_config.router_replay.mode=R2
actor_rollout_ref.rollout.enable_sleep_mode=false
actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_dtype=fp8
actor_rollout_ref.rollout.custom.mine=1
actor_rollout_ref.rollout.repetition_penalty=1.1
actor_rollout_ref.rollout.limit_images=2
actor_rollout_ref.rollout.moe_tensor_parallel_size=1
algorithm.gdpo_reward_keys=[a]
data.apply_chat_template_kwargs.enable_thinking=false
data.cache_dir=/tmp
data.chat_template_func=null
data.filter_prompts=false
data.need_tools_kwargs=true
disco.options.margin=0.2
ray_kwargs.ray_init.num_gpus=2
ray_kwargs.ray_init.address=auto
ray_kwargs.ray_init.runtime_env.env_vars.VERL_PLATFORM=cpu
ray_kwargs.ray_init.runtime_env.working_dir=.
reward.custom_reward_function.reward_kwargs.timeout=10
custom_reward_function.reward_kwargs.timeout=10
reward.reward_kwargs.max_resp_len=100
trainer.remove_previous_ckpt_in_save=true
trainer.v1.sampler.sampler_kwargs.poll_interval=1
trainer.wandb_proxy=http://localhost
verl_ext.prepare=verl_ext.tasks.arithmetic.assets.ensure_assets
verl_ext.progress=false
""".split()


@pytest.mark.parametrize("override", READ)
def test_what_something_reads_is_no_finding(runs, override):
    assert unread(runs["disco"], override) == []


def test_what_is_almost_a_name_of_verls_in_a_handed_on_dictionary_is_a_warning(runs):
    node = "actor_rollout_ref.model.override_config"
    (finding,) = unread(runs["disco"], f"{node}.attn_implementaton=sdpa")
    assert finding.warning and finding.fix == f"nearest: {node}.attn_implementation"


def test_what_megatron_reads_is_no_finding(runs):
    megatron = "actor_rollout_ref.actor.megatron"
    names = ["override_ddp_config.overlap_grad_reduce", "override_transformer_config.moe_grouped_gemm"]
    names += ["pad_bshd_to_minibatch_max", "override_mcore_model_config.x"]
    assert unread(runs["megatron"], *(f"{megatron}.{name}=true" for name in names)) == []
    (finding,) = unread(runs["megatron"], f"{megatron}.tensor_model_paralel_size=2")
    assert f"{megatron}.tensor_model_parallel_size" in finding.fix


def test_no_setting_of_our_configuration_and_pages_is_a_wrong_one(runs):
    """Not under another algorithm either: README writes ++disco.delta in sweeps over methods."""
    for file in SHIPPED:
        names = composition.names(OmegaConf.load(file)) - {"defaults"}
        leaves = sorted(n for n in names if not any(o.startswith(f"{n}.") for o in names) and "hydra" not in n)
        run = runs["megatron" if "megatron" in file.name else "disco"]
        missing = [n for n in leaves if OmegaConf.select(run.composed, n) is None and "_target_" not in n]
        assert [f.problem for f in unread(run, *(f"{n}=1" for n in missing)) if not f.warning] == [], file
    pages = [
        ROOT / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.sh"),
        *ROOT.glob("recipe/**/*.md"),
    ]
    text = "\n".join(page.read_text() for page in pages)
    overrides = set(re.findall(r"(?<![\w+])\+{1,2}([a-z_]+\.[\w.]+)=", text)) - {"hydra"}
    assert len(overrides) > 3
    assert [f.problem for f in unread(runs["disco"], *(f"{o}=1" for o in overrides)) if not f.warning] == []


def test_a_setting_of_another_method_is_a_warning(runs):
    (finding,) = unread(runs["ppo"], "disco.delta=1e-3")
    assert finding.warning and finding.problem.startswith("disco.delta is read by nothing in this run")
    (finding,) = unread(runs["ppo"], "disco.detla=1e-3")
    assert not finding.warning and finding.fix.startswith("nearest: disco.delta")


def test_what_an_override_or_the_users_code_reads_is_no_finding(runs, tmp_path):
    assert unread(runs["disco"], "lengths=4096", "data.max_response_length=${lengths}") == []
    file = tmp_path / "mine.py"
    file.write_text("def f(config):\n    return config.data.get('my_limit')\n")
    assert unread(runs["disco"], f"data.custom_cls.path={file}", "data.my_limit=3") == []
    assert len(unread(runs["disco"], "data.my_limit=3")) == 1


# What verl has, and does not read -------------------------------------------------------------------------------------


LEGACY = re.compile(
    r"/verl/(trainer/(ppo/ray_trainer|ppo/prefix_grouper_utils|main_ppo_v0|sft_trainer|main_eval|main_generation)"
    r"|experimental/(fully_async|one_step|separation)|workers/(config/|engine_workers_tinker|rollout/schemas)"
    r"|workers/reward_manager/|model_merger)"
)
"""Sources that no run of a V1 trainer executes, or that declare settings and check them, but do nothing by them."""

READ_OTHERWISE = {
    r"model_engine": "Hydra's group",
    r".*\.optim\.warmup_style": "the dataclass turns it into lr_scheduler_type",
    r".*\.optim\.muon_.*": "Megatron's optimizer takes the node as a dictionary",
    r".*\.wrap_policy\.min_num_params": "a dictionary's get() in verl.utils.fsdp_utils",
    r"actor_rollout_ref\.(actor|ref)\.rollout_n|critic\.rollout_n": "a copy of rollout.n, for checks",
    r".*\.model\.lora\..*": "Megatron-Bridge takes the node whole",
    r"data\.filter_overlong_prompts_workers": "a dictionary's get() in RLHFDataset",
    r"distillation\.enabled": "is_distillation_enabled() takes the node",
    r"global_profiler\.global_tool_config\.nsys\..*": "Ray takes the node whole",
    r"critic\.ppo_micro_batch_size_per_gpu": "verl's dataclass refuses to be made without",
    r"base_model|method": "the report",
    r"reward\.custom_reward_function\.reward_kwargs\..*": "the reward's parameters, which the preflight compares",
}
"""What the search does not find, and who reads it."""


@pytest.fixture(scope="module")
def training() -> list[str]:
    """What a training run executes, as attributes."""
    return [as_attributes(text) for file, text in sources().items() if not LEGACY.search(str(file))]


def unread_leaves(nodes: list[dict], only: set[str], training: list[str]) -> set[str]:
    """Leaves of these configurations, among ``only``, of which nothing in ``training`` reads the value."""
    copied = {n.rstrip(".") for n in re.findall(r"\$\{(?:oc\.select:)?([\w.]+)", str(nodes))}
    leaves = {s.name: s for node in nodes for s in composition.walk(node) if not isinstance(s.value, dict)}
    found = set()
    for name in only & leaves.keys():
        parent, _, key = name.rpartition(".")
        parts = parent.split(".")
        above = {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
        whole = any(p in HANDED_ON or p.startswith("override_") for p in parts) or parent in RAY_NAMES
        if whole or key == "_target_" or copied & {name, *above}:
            continue
        siblings = {str(k) for k in leaves[name].siblings} - {"_target_"}
        if not any(reads(text, parts, key, siblings) for text in training if f".{key}" in text):
            found.add(name)
    return {n for n in found if not any(re.fullmatch(pattern, n) for pattern in READ_OTHERWISE)}


@pytest.fixture(scope="module")
def stock() -> list[dict]:
    """verl's own configurations."""
    runs = [composition.compose([f"model_engine={engine}"]).composed for engine in ("dp", "megatron")]
    return [OmegaConf.to_container(run, resolve=False) for run in runs]


def test_what_verl_ignores_is_listed(training, stock):
    """The list is what the search finds in verl's own configuration, no more and no less."""
    names = set().union(*({s.name for s in composition.walk(node)} for node in stock))
    found = unread_leaves(stock, names, training)
    assert {n for n in found if not any(re.fullmatch(pattern, n) for pattern in IGNORED)} == set()
    assert [p for p in IGNORED if not any(re.fullmatch(p, n) for n in found)] == []


def test_something_reads_all_that_our_files_set(training, stock):
    files = [OmegaConf.load(file) for file in SHIPPED]
    ours = {n for n in set().union(*map(composition.names, files)) if not n.startswith(("hydra", "verl_ext.", "defau"))}
    # verl's own last: its nodes have more siblings.
    nodes = [*(OmegaConf.to_container(file, resolve=False) for file in files), *stock]
    assert unread_leaves(nodes, ours, training) == set()


@pytest.mark.parametrize(
    "override, advice",
    [
        (f"{ACTOR}.grad_clip=0.5", f"set {ACTOR}.optim.clip_grad"),
        ("critic.grad_clip=0.5", "set critic.optim.clip_grad"),
        ("trainer.balance_batch=false", "the V1 trainers always balance: leave it out"),
        ("critic.ppo_max_token_len_per_gpu=9216", "set critic.ppo_infer_max_token_len_per_gpu"),
        ("critic.ppo_micro_batch_size_per_gpu=4", "set critic.ppo_infer_max_token_len_per_gpu"),
        ("critic.use_dynamic_bsz=false", "set critic.ppo_infer_max_token_len_per_gpu"),
        ("algorithm.use_pf_ppo=true", "leave it out"),
        ("data.reward_fn_key=source", "take the column data_source"),
        (f"{ROLLOUT}.over_sample_rate=0.1", "leave it out"),
    ],
)
def test_what_verl_ignores_is_a_warning(runs, override, advice):
    (finding,) = unread(runs["disco"], override)
    assert finding.warning and finding.problem == f"{override} has no effect: verl does not read it"
    assert advice in finding.fix


def test_what_verl_reads_or_has_anyway_is_no_warning(runs):
    for override in ("trainer.balance_batch=true", f"{ACTOR}.grad_clip=1.0", "critic.use_dynamic_bsz=true"):
        assert unread(runs["disco"], override) == []
    assert unread(runs["disco"], f"{ACTOR}.optim.clip_grad=0.5", "critic.ppo_infer_max_token_len_per_gpu=9216") == []
    # The legacy trainer reads them.
    assert unread(runs["ppo"], "trainer.use_v1=false", "trainer.balance_batch=false") == []


# Values ---------------------------------------------------------------------------------------------------------------


COUNT = "use a whole number of at least 1"


@pytest.mark.parametrize(
    "override, fix",
    [
        *((f"trainer.n_gpus_per_node={value}", COUNT) for value in ("-8", "0", "eight", "1.5", "true", "[8]", "'8'")),
        *((f"trainer.nnodes={value}", COUNT) for value in ("0", "-1", "''", ".nan", ".inf")),
        *((f"data.{name}=0", COUNT) for name in ("val_batch_size", "max_prompt_length", "max_response_length")),
        *((f"{ROLLOUT}.{n}=-1", COUNT) for n in ("n", "val_kwargs.n", "max_num_seqs", "max_num_batched_tokens")),
        *((f"{ROLLOUT}.{n}=0", COUNT) for n in ("tensor_model_parallel_size", "agent.num_workers", "max_model_len")),
        *((f"{ACTOR}.{n}=0", COUNT) for n in ("ppo_mini_batch_size", "ppo_epochs", "ppo_max_token_len_per_gpu")),
        (f"{ACTOR}.ulysses_sequence_parallel_size=0", COUNT),
        ("trainer.total_training_steps=-5", COUNT),
        ("trainer.total_epochs=0", COUNT),
        ("trainer.test_freq=-5", "use -1 or a whole number of at least 0"),
        ("trainer.save_freq=often", "use -1 or a whole number of at least 0"),
        (f"{ACTOR}.fsdp_config.fsdp_size=0", "use -1 or a whole number of at least 1"),
        ("data.dataloader_num_workers=-1", "use a whole number of at least 0"),
        (f"{ACTOR}.optim.lr=abc", "use a number of at least 0"),
        (f"{ACTOR}.optim.lr=-1e-6", "use a number of at least 0"),
        (f"{ACTOR}.optim.lr=null", "use a number"),
        (f"{ACTOR}.optim.betas=[0.9]", "use two numbers of at least 0 and below 1"),
        (f"{ACTOR}.optim.betas=0.9", "use two numbers of at least 0 and below 1"),
        (f"{ACTOR}.entropy_coeff=abc", "use a number"),
        ("disco.delta=abc", "use a number"),
        ("data.seed=abc", "use a number"),
        (f"{ROLLOUT}.temperature=0", "use a number above 0"),
        (f"{ROLLOUT}.val_kwargs.temperature=-1", "use a number of at least 0"),
        (f"{ROLLOUT}.top_p=2", "use a number above 0, and at most 1"),
        (f"{ROLLOUT}.gpu_memory_utilization=60", "use a number above 0, and at most 1"),
        ("algorithm.gamma=2", "use a number between 0 and 1"),
        ("trainer.val_before_train=no_", "use true or false"),
        (f"{ACTOR}.fsdp_config.param_offload=maybe", "use true or false"),
        ("trainer.project_name=[a]", "use a text"),
        ("trainer=5", "use settings below it: name.setting=value"),
        ("trainer.v1=null", "use settings below it: name.setting=value"),
        ("reward_model.num_workers=0", COUNT),
        (f"{ROLLOUT}.mode=asynch", "use async"),
        (f"{ACTOR}.optim.lr_scheduler_type=cosin", "use one of cosine, constant"),
        ("data.truncation=middel", "use one of middle, left, error, right"),
        ("trainer.v1.trainer_mode=colocate_asinc", "use one of colocate_async, separate_async, sync"),
        ("trainer.resume_mode=always", "use one of disable, auto, resume_path"),
        ("algorithm.rollout_correction.rollout_is=tokens", "use one of token, sequence or null"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(runs, override, fix):
    name, _, value = override.partition("=")
    (finding,) = [f for f in wrong(runs["disco"], override) if f.name == name]
    assert finding.problem.startswith(f"{name}=") and finding.problem.endswith(" is wrong") and not finding.warning
    assert finding.fix == fix


@pytest.mark.parametrize(
    "override, nearest",
    [
        (f"{ROLLOUT}.name=vlm", "vllm"),
        (f"{ROLLOUT}.dtype=bfloat", "float"),
        (f"{ROLLOUT}.load_format=safetensor", "safetensors"),
        (f"{ROLLOUT}.multi_turn.format=hermess", "hermes"),
        (f"{ROLLOUT}.agent.default_agent_loop=single_turn_agnet", "single_turn_agent"),
        (f"{ROLLOUT}.checkpoint_engine.backend=nccll", "nccl"),
        (f"{ACTOR}.strategy=fspd2", "fsdp2"),
        (f"{ACTOR}.loss_agg_mode=token_mean", "token-mean"),
        (f"{ACTOR}.kl_loss_type=low_var", "low_var_kl"),
        (f"{ACTOR}.optim.optimizer=AdamWW", "AdamW"),
        (f"{ACTOR}.fsdp_config.model_dtype=fp23", "fp32"),
        (f"{ACTOR}.checkpoint.save_contents=[model,optimiser]", "optimizer"),
        ("algorithm.adv_estimator=grop", "grpo"),
        ("algorithm.kl_penalty=kll", "kl"),
        ("algorithm.kl_ctrl.type=fixd", "fixed"),
        ("algorithm.rollout_correction.rollout_rs=seq_mean_k9", "seq_mean_k1"),
        ("trainer.logger=[console,wandbb]", "wandb"),
        ("trainer.device=gpu", "cpu"),
        ("reward.reward_manager.name=naiv", "naive"),
        ("reward_model.reward_manager=naiv", "naive"),
        ("transfer_queue.backend.storage_backend=SimpleStore", "SimpleStorage"),
        ("actor_rollout_ref.model.override_config.attn_implementation=spda", "sdpa"),
    ],
)
def test_a_misspelt_mode_is_named_with_the_choices_nearest_first(runs, override, nearest):
    (finding,) = wrong(runs["disco"], override)
    assert finding.name == override.partition("=")[0]
    assert finding.fix.removeprefix("use one of ").split(", ")[0] == nearest


def test_a_misspelt_policy_loss_is_named():
    (finding,) = wrong(composition.compose(["algorithm=gspo"]), f"{ACTOR}.policy_loss.loss_mode=gpso")
    assert finding.fix.startswith("use one of gspo, ")


@pytest.mark.parametrize(
    "override",
    """
    trainer.test_freq=-1 trainer.test_freq=0 trainer.total_training_steps=null trainer.max_actor_ckpt_to_keep=null
    trainer.logger=console trainer.logger=[file,tracking] trainer.experiment_name=7 trainer.val_before_train=false
    trainer.v1.colocate_async.num_warmup_batches=1.5 trainer.esi_redundant_time=0.5 trainer.device=xpu
    data.seed=null data.train_max_samples=-1 data.gen_batch_size=32 data.shuffle=0 data.truncation=left
    actor_rollout_ref.rollout.top_k=0 actor_rollout_ref.rollout.top_p=1 actor_rollout_ref.rollout.max_model_len=null
    actor_rollout_ref.rollout.val_kwargs.temperature=0 actor_rollout_ref.rollout.load_format=mine
    actor_rollout_ref.actor.optim.lr=1 actor_rollout_ref.actor.optim.optimizer=SGD
    actor_rollout_ref.actor.fsdp_config.fsdp_size=-1 actor_rollout_ref.actor.entropy_coeff=-0.001
    actor_rollout_ref.actor.kl_loss_type=k3+ algorithm.rollout_correction.rollout_rs=token_k1,seq_mean_k3
    actor_rollout_ref.model.target_modules=[q_proj] reward.custom_reward_function=null ray_kwargs.ray_init.num_cpus=null
    """.split(),
)
def test_a_value_that_verl_takes_is_no_finding(runs, override):
    assert wrong(runs["disco"], override) == []


def test_a_file_in_place_of_a_list_that_was_followed_is_no_finding():
    run = composition.compose(["+experiment=evaluate", "model=x", "data.train_files=x.parquet"])
    assert [f.problem for f in check_values(run)] == []


def test_a_choice_that_the_users_code_registers_is_no_finding(runs, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("@register('naive_mine')\nclass Mine: ...\n")
    override = "reward.reward_manager.name=naive_mine"
    assert len(wrong(runs["disco"], override)) == 1
    assert wrong(runs["disco"], override, f"reward.custom_reward_function.path={file}") == []


def test_a_reference_to_nothing_is_named(runs):
    (finding,) = wrong(runs["disco"], "trainer.nnodes=${foo.bar}")
    assert finding.problem.startswith("trainer.nnodes=${foo.bar} does not resolve: Interpolation key 'foo.bar'")


@pytest.mark.parametrize("algorithm", recipes.describe_algorithms())
def test_every_algorithm_has_right_values_that_something_reads(algorithm):
    # One engine for every other algorithm: verl's settings differ by engine, ours by algorithm.
    experiment = ("deepseek_qwen_1_5b_lora", "qwen3_30b_a3b_megatron")[len(algorithm) % 2]
    shipped = composition.compose([f"algorithm={algorithm}", f"+experiment={experiment}"])
    assert [f.problem for f in [*check_unread(shipped), *check_values(shipped)]] == []


@pytest.mark.parametrize("engine", ["dp", "megatron", "veomni", "torchtitan"])
def test_stock_settings_are_right(engine):
    assert list(check_values(composition.compose([f"model_engine={engine}"]))) == []


def choices(name: str) -> list:
    return next(choices_of(None) for pattern, choices_of, _ in MODES if re.fullmatch(pattern, name))


def test_choices_that_no_registry_has_are_those_of_verls_functions():
    from verl.trainer.ppo.core_algos import agg_loss, get_kl_controller, kl_penalty

    rows = torch.zeros(2, 3)
    for name in choices("algorithm.kl_penalty"):
        assert kl_penalty(rows, rows, name).shape == rows.shape
    with pytest.raises(NotImplementedError):
        kl_penalty(rows, rows, "kll")
    for name in choices(f"{ACTOR}.loss_agg_mode"):
        agg_loss(rows, torch.ones_like(rows), name, dp_size=1, batch_num_tokens=6, global_batch_size=2)
    for name in choices("algorithm.kl_ctrl.type"):
        get_kl_controller(OmegaConf.create({"type": name, "kl_coef": 0.1, "horizon": 10, "target_kl": 0.1}))
