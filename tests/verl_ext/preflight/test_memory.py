"""The estimate of a GPU's memory, against figures calculated by hand and runs that are known to fit or not to."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import DictConfig

from verl_ext.preflight import composition
from verl_ext.preflight.memory import ASLEEP, CONTEXT, GIB, SERVER, Memory, Shape, estimate, lora_parameters
from verl_ext.preflight.model import find_shape, memory_findings

ROOT = Path(__file__).resolve().parents[3]
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
OFFLOAD = [f"{ACTOR}.fsdp_config.{what}_offload=true" for what in ("param", "optimizer")]
ULYSSES = [f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2"]
BUCKET = 2 * GIB

SMALL = Shape.of(
    dict(hidden_size=1024, num_hidden_layers=10, num_attention_heads=8, intermediate_size=4096, vocab_size=1000)
)
TABLE, LAYER = 1000 * 1024, 2**24
PARAMETERS = 2 * TABLE + 10 * LAYER
TOKENS = 18432
KEPT, INSIDE = 2 * TOKENS * 1024 * 10, 2 * TOKENS * (10 * 1024 + 3 * 4096)


def run_of(*overrides: str, algorithm: str = "disco", experiment: str = "deepseek_qwen_1_5b") -> DictConfig:
    return composition.compose([f"algorithm={algorithm}", f"+experiment={experiment}", *overrides]).config


@pytest.fixture(scope="module")
def plain() -> DictConfig:
    return run_of()


def small(config: DictConfig, **changes) -> Memory:
    """The memory with settings by their full names, dots as two underscores."""
    config = config.copy()
    for name, value in changes.items():
        node, _, key = name.replace("__", ".").rpartition(".")
        at = config.actor_rollout_ref
        for part in filter(None, node.split(".")):
            at = at[part]
        at[key] = value
    return estimate(config, SMALL, 80 * GIB)


def test_the_small_shape_by_hand():
    assert (SMALL.num_key_value_heads, SMALL.head_dim) == (8, 128)
    # Four square matrices of attention, three of the feed-forward.
    assert SMALL.attention + SMALL.dense == 4 * 1024**2 + 3 * 1024 * 4096 == LAYER
    assert SMALL.parameters == PARAMETERS and SMALL.largest_tensor == TABLE


def test_experts_are_counted_under_any_of_their_names():
    config = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=100)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    found = [Shape.of(config | {name: 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}) for name in names]
    assert {shape.experts for shape in found} == {3 * 8 * 64 * 32}
    # Mixtral's have the model's one width.
    assert Shape.of(config | {"num_local_experts": 8, "num_experts_per_tok": 2}).experts == 3 * 8 * 64 * 48


def test_training_by_fsdp(plain):
    parts = small(plain).phases["training"]
    # Float32 over eight GPUs: 4 bytes a weight and a gradient, 8 for Adam's moments.
    assert parts["weights"] == PARAMETERS / 2 and parts["optimizer"] == PARAMETERS
    # bfloat16: two layers and the output layer.
    assert parts["gathered"] == 2 * (2 * LAYER + TABLE)
    # A layer's gradients in bfloat16 and float32, and the output layer's, beside all shards.
    assert parts["gradients"] == PARAMETERS / 2 + 6 * LAYER + 2 * TABLE
    assert parts["activations"] == KEPT + INSIDE and "logits" not in parts
    assert parts["rollout engine"] == ASLEEP and parts["CUDA and NCCL"] == CONTEXT


def test_the_moment_of_the_loss_has_logits_and_no_activations_within_layers():
    shape = replace(SMALL, vocab_size=150000)
    parts = estimate(run_of(), shape, 80 * GIB).phases["training"]
    # bfloat16 logits and their copy; a float32 chunk of 2048 tokens, its softmax and their product.
    assert parts["logits"] == 150000 * (4 * TOKENS + 12 * 2048)
    assert parts["activations"] == KEPT and parts["gradients"] == shape.parameters / 2


@pytest.mark.parametrize(
    "overrides, each",
    [
        ([f"{ACTOR}.entropy_from_logits_with_chunking=false"], 4 * TOKENS),
        # Not compiled: all softmax and products in float32.
        (
            [f"{ACTOR}.entropy_from_logits_with_chunking=false", f"{ACTOR}.fsdp_config.use_torch_compile=false"],
            (4 + 12) * TOKENS,
        ),
        # A trained entropy keeps each chunk and its softmax.
        ([f"{ACTOR}.entropy_coeff=0.001"], (4 + 8) * TOKENS + 12 * 2048),
        ([f"{ACTOR}.entropy_coeff=0.001", f"{ACTOR}.entropy_checkpointing=true"], 4 * TOKENS + 12 * 2048),
        ([f"{ACTOR}.entropy_from_logits_chunk_size=1024"], 4 * TOKENS + 12 * 1024),
        # The tokens of each of the GPUs that share sequences, or fixed micro-batches of 9216 tokens split over them.
        (ULYSSES, 4 * TOKENS + 12 * 2048),
        (
            [*ULYSSES, f"{ACTOR}.use_dynamic_bsz=false", f"{ACTOR}.ppo_micro_batch_size_per_gpu=3"],
            4 * 3 * 9216 / 2 + 12 * 2048,
        ),
    ],
)
def test_logits_and_entropy(overrides, each):
    shape = replace(SMALL, num_hidden_layers=2, intermediate_size=1024, vocab_size=150000)
    parts = estimate(run_of(*overrides, algorithm="grpo"), shape, 80 * GIB).phases["training"]
    assert parts["logits"] == 150000 * each


def test_what_changes_training(plain):
    before = small(plain).phases["training"]
    assert small(plain, model__use_fused_kernels=True).total("training") == sum(before.values())
    sums = small(plain, actor__fsdp_config__use_no_sync_for_gradient_accumulation=True).phases["training"]
    assert sums["gradients"] - before["gradients"] == 4 * PARAMETERS
    whole = small(plain, actor__fsdp_config__reshard_after_forward=False).phases["training"]
    assert whole["gathered"] == 2 * PARAMETERS
    all_layers = small(plain, model__enable_gradient_checkpointing=False).phases["training"]
    assert all_layers["activations"] == KEPT + 10 * INSIDE
    assert small(plain, actor__fsdp_config__fsdp_size=4).phases["training"]["weights"] == PARAMETERS
    assert small(plain, actor__fsdp_config__model_dtype="bf16").phases["training"]["weights"] == PARAMETERS / 4
    # The engine cannot sleep: its share stays.
    awake = small(plain, rollout__free_cache_engine=False)
    assert awake.phases["training"]["rollout engine"] == 0.6 * 80 * GIB
    on_host = small(plain, actor__fsdp_config__offload_policy=True)
    assert on_host.phases["training"]["weights"] == 0 and on_host.offloaded == 2 * PARAMETERS


def test_generation_is_the_engines_share_and_what_stays_beside_it(plain):
    states = PARAMETERS / 2 + PARAMETERS
    memory = small(plain)
    assert memory.total("generation") == 0.6 * 80 * GIB + states + CONTEXT
    assert memory.total("weight transfer") == states + 2 * PARAMETERS + ASLEEP + BUCKET + 4 * TABLE + CONTEXT
    # Keys and values of ten layers, eight heads of 128, in half precision.
    assert memory.cache_tokens == (0.6 * 80 * GIB - 2 * PARAMETERS - SERVER) / (4 * 10 * 8 * 128)
    split = small(plain, rollout__tensor_model_parallel_size=2)
    assert split.cache_tokens == (0.6 * 80 * GIB - PARAMETERS - SERVER) / (4 * 10 * 4 * 128)
    moved = small(plain, actor__fsdp_config__param_offload=True, actor__fsdp_config__optimizer_offload=True)
    assert moved.total("generation") == 0.6 * 80 * GIB + CONTEXT and moved.offloaded == states
    # FSDP1 brings the weights back to send them, FSDP2 does not.
    assert moved.phases["weight transfer"]["training states"] == 0
    first = small(plain, actor__fsdp_config__param_offload=True, actor__strategy="fsdp")
    assert first.phases["weight transfer"]["training states"] == states
    # The light engine takes what it needs.
    light = small(plain, rollout__name="hf", rollout__dtype="float32")
    assert light.phases["generation"]["rollout engine"] == 4 * PARAMETERS and light.cache_tokens == math.inf


def test_servers_on_gpus_of_their_own_leave_training_alone(plain):
    config = plain.copy()
    config.trainer.v1.trainer_mode = "separate_async"
    config.actor_rollout_ref.hybrid_engine = False
    config.actor_rollout_ref.rollout.checkpoint_engine.backend = "nccl"
    memory = estimate(config, SMALL, 80 * GIB)
    assert memory.phases["generation"] == {"rollout engine": 0.6 * 80 * GIB}
    assert memory.phases["training"]["rollout engine"] == 0
    assert memory.phases["weight transfer"]["buckets"] == 2 * BUCKET
    # verl's default: servers beside training as well.
    config.actor_rollout_ref.hybrid_engine = True
    assert estimate(config, SMALL, 80 * GIB).phases["training"]["rollout engine"] == ASLEEP


def test_the_critic_is_counted():
    config = run_of("critic.ppo_infer_max_token_len_per_gpu=9216", algorithm="ppo")
    memory = estimate(config, SMALL, 80 * GIB)
    # No output layer.
    critic = PARAMETERS - TABLE
    parts = memory.phases["critic"]
    assert parts["weights"] == critic / 2 and parts["optimizer"] == critic
    assert parts["activations"] == (KEPT + INSIDE) / 2
    assert parts["actor's states"] == 1.5 * PARAMETERS
    assert memory.phases["training"]["critic's states"] == 1.5 * critic
    assert memory.phases["generation"]["training states"] == 1.5 * (PARAMETERS + critic)
    config.critic.fsdp.param_offload = config.critic.fsdp.optimizer_offload = True
    moved = estimate(config, SMALL, 80 * GIB)
    assert moved.phases["generation"]["training states"] == 1.5 * PARAMETERS and moved.offloaded == 1.5 * critic


def test_megatrons_gradients_are_float32_and_stay():
    offload = [f"{ACTOR}.megatron.{what}_offload=false" for what in ("param", "optimizer")]
    config = run_of(*offload, experiment="deepseek_qwen_1_5b_megatron")
    parts = estimate(config, SMALL, 80 * GIB).phases["training"]
    # Two ranks share each layer: bfloat16 weights, float32 gradients; float32 masters and moments over all eight.
    assert parts["weights"] == PARAMETERS and parts["gradients"] == 2 * PARAMETERS
    assert parts["optimizer"] == 12 * PARAMETERS / 8
    memory = estimate(config, SMALL, 80 * GIB)
    assert memory.phases["generation"]["training states"] == 4.5 * PARAMETERS
    config.actor_rollout_ref.actor.megatron.param_offload = True
    memory = estimate(config, SMALL, 80 * GIB)
    assert memory.phases["generation"]["training states"] == 1.5 * PARAMETERS
    # Weights come back to be sent, gradients do not.
    assert memory.phases["weight transfer"]["training states"] == 2.5 * PARAMETERS


def test_adapters_in_float32_on_one_gpu():
    config = run_of(experiment="deepseek_qwen_1_5b_lora")
    config.actor_rollout_ref.actor.fsdp_config.model_dtype = "fp32"
    shape = find_shape("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")[0]
    adapters = lora_parameters(shape, 32)
    # Rank 32 on q and o, k and v, and three matrices of the feed-forward.
    assert adapters == 32 * 28 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    parts = estimate(config, shape, 24 * GIB).phases["training"]
    assert parts["weights"] == 4 * (shape.parameters + adapters) and parts["optimizer"] == 8 * adapters
    half = config.copy()
    half.actor_rollout_ref.actor.fsdp_config.model_dtype = "bf16"
    assert estimate(half, shape, 24 * GIB).phases["training"]["optimizer"] == 4 * adapters


PUBLISHED = [
    f"{ACTOR}.ppo_max_token_len_per_gpu=36864",
    f"{ROLLOUT}.gpu_memory_utilization=0.85",
    *(o.replace("true", "false") for o in OFFLOAD),
]
"""The authors' script for 7B on eight A100 of 80 GB."""


def of_7b(*overrides: str) -> tuple[dict[str, float], list[str]]:
    """GiB by moment, and what is found wrong."""
    config = run_of(*overrides, experiment="deepseek_qwen_7b")
    shape, _ = find_shape(config.actor_rollout_ref.model.path)
    memory = estimate(config, shape, config.verl_ext.gpu_memory * GIB)
    wrong = [f.problem for f in memory_findings(config, shape) if f.problem and not f.warning]
    return {phase: memory.total(phase) / GIB for phase in memory.phases}, wrong


@pytest.mark.parametrize("gpu", [80, 79.15])
@pytest.mark.parametrize("chunking", [True, False])
def test_the_published_run_fits(gpu, chunking):
    chunks = f"{ACTOR}.entropy_from_logits_with_chunking={chunking}"
    needed, wrong = of_7b(*PUBLISHED, chunks, f"verl_ext.gpu_memory={gpu}")
    assert wrong == []
    # 7.62e9 parameters: weights and moments in float32 are 12 bytes each over eight GPUs, 10.64 GiB.
    assert needed["generation"] == pytest.approx(0.85 * gpu + 10.64 + 1, abs=0.01)
    assert 45 < needed["training"] < 55


@pytest.mark.parametrize(
    "overrides, problem",
    [
        # 21.3 GiB of states beside 68 GiB: vLLM finds its share not free.
        (["trainer.n_gpus_per_node=4"], "generation needs about 90 of 80 GiB"),
        ([f"{ROLLOUT}.gpu_memory_utilization=0.9"], "generation needs about 84 of 80 GiB"),
        ([f"{ACTOR}.fsdp_config.use_torch_compile=false", f"{ACTOR}.entropy_coeff=1e-3"], "training needs about 92 of"),
        ([f"{ROLLOUT}.free_cache_engine=false"], "training needs about 116 of 80 GiB"),
        (["trainer.n_gpus_per_node=1", *OFFLOAD], "training needs about 150"),
        ([f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes=65536"], "weight transfer needs about"),
    ],
)
def test_runs_that_are_too_large_do_not(overrides, problem):
    _, wrong = of_7b(*PUBLISHED, *overrides)
    assert any(w.startswith(problem) for w in wrong), wrong


STATED = {
    "gsm8k_qwen2_5_0_5b": [
        "Beside {states:.0f} GiB of training states",
        "a KV cache for {sequences:.0f} of the longest",
    ],
    "gsm8k_qwen2_5_1_5b_lora": [
        "Beside {states:.0f} GiB of training states: {weights:.1f} GiB of weights",
        "a KV cache for {sequences:.0f} of the longest",
    ],
    "deepseek_qwen_1_5b_lora": [
        "Beside {states:.0f} GiB of training states: {weights:.1f} GiB of weights",
        "a KV cache for {tokens:.0f}k tokens",
    ],
    "deepseek_qwen_7b": ["Weights, gradients and optimizer take {trained:.0f} GiB per GPU"],
    "qwen3_30b_a3b": [
        "Weights, gradients and optimizer take {trained:.0f} GiB per GPU",
        "the weights are {weights:.0f} GiB",
    ],
}
"""What the comments of an experiment say, with the estimate's figures."""


def stated(algorithm: str, experiment: str, *overrides: str) -> dict[str, float]:
    """The figures that documents and comments take from the estimate, in GiB and tokens."""
    config = run_of(*overrides, algorithm=algorithm, experiment=experiment)
    shape, _ = find_shape(config.actor_rollout_ref.model.path)
    memory = estimate(config, shape, config.verl_ext.gpu_memory * GIB)
    training = memory.phases["training"]
    return dict(
        most=math.ceil(max(map(memory.total, memory.phases)) / GIB),
        states=memory.phases["generation"]["training states"] / GIB,
        trained=sum(training[part] for part in ("weights", "gradients", "optimizer")) / GIB,
        weights=2 * shape.parameters / GIB,
        tokens=memory.cache_tokens / 1000,
        sequences=memory.cache_tokens / (config.data.max_prompt_length + config.data.max_response_length) // 10 * 10,
    )


def holds(file: str, words: str) -> bool:
    return words in " ".join((ROOT / file).read_text().replace("#", "").split())


@pytest.mark.parametrize("experiment", STATED)
def test_comments_state_the_estimate(experiment):
    figures = stated("disco", experiment)
    folder = "verl_ext" if experiment.startswith("gsm8k") else "recipe/disco"
    for words in STATED[experiment]:
        words = words.format_map(figures)
        assert holds(f"{folder}/config/experiment/{experiment}.yaml", words), words


def test_the_first_hour_states_the_estimate():
    disco, ppo = (stated(algorithm, "gsm8k_qwen2_5_0_5b") for algorithm in ("disco", "ppo"))
    assert holds("docs/first-hour.md", f"at most {disco['most']} of 24 GiB")
    # With the settings that it names there.
    less = (
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1536",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.3",
    )
    small = stated("disco", "gsm8k_qwen2_5_0_5b", *less, "verl_ext.gpu_memory=16")
    assert holds("docs/first-hour.md", f"at most {small['most']} of 16 GiB") and holds(
        "docs/first-hour.md", " ".join(less)
    )
    assert holds("verl_ext/config/experiment/gsm8k_qwen2_5_0_5b.yaml", f"{ppo['states']:.0f} with a critic")
