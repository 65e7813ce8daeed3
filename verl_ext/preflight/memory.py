"""An estimate of what a run needs of each GPU's memory, from the model's shape and the settings.

verl's training processes and rollout servers share the GPUs and take turns. Each of these moments must fit:

- training: the rollout engine sleeps;
- weight transfer: the engine's weights are there again, its KV cache is not yet;
- generation: the engine has its share of the whole GPU, and training states that are not offloaded lie beside it. vLLM
  asks for its share when it starts, too, and refuses if that is not free.

Weights, gradients, optimizer and logits are counted exactly, activations by the widths of a layer; :data:`CONTEXT`,
:data:`ASLEEP` and :data:`SERVER` are guesses. All sizes in bytes.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext.preflight.packages import ENGINES

GIB = 2**30
CONTEXT = 1 * GIB
"""The training process's CUDA context and NCCL buffers, beside all that it allocates."""
ASLEEP = 2 * GIB
"""What a sleeping rollout engine keeps: its context, and CUDA graphs, which cannot be offloaded."""
SERVER = 3 * GIB
"""The rest of a rollout engine's share, beside weights and KV cache: context, CUDA graphs and activations."""


@dataclass(frozen=True)
class Shape:
    """A decoder's shape, under transformers' names; 0 where a size is unknown or does not apply."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    max_position_embeddings: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """Read a model's ``config.json``.

        Raises:
            KeyError: a size is missing, as for image or recurrent models.
        """
        heads = config["num_attention_heads"]
        derived = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads}
        # transformers' own name for them, and DeepSeek's.
        derived["num_experts"] = config.get("num_local_experts") or config.get("n_routed_experts") or 0
        # Mixtral and others have no other width.
        derived["moe_intermediate_size"] = config.get("intermediate_size") or 0
        found = {f.name: config.get(f.name) or derived.get(f.name, f.default) for f in fields(cls)}
        if missing := [name for name, value in found.items() if value is MISSING]:
            raise KeyError(missing[0])
        return cls(**found)

    @property
    def table(self) -> int:
        """Parameters of the embedding, and of the output layer."""
        return self.vocab_size * self.hidden_size

    @property
    def attention(self) -> int:
        """Parameters of a layer's attention."""
        return 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)

    @property
    def experts(self) -> int:
        """Parameters of a layer's experts; 0 for a dense model."""
        return 3 * self.num_experts * self.hidden_size * self.moe_intermediate_size

    @property
    def dense(self) -> int:
        """Parameters of a layer besides attention and experts."""
        if self.num_experts:
            return self.hidden_size * self.num_experts
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def parameters(self) -> int:
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.table + self.num_hidden_layers * (self.attention + self.dense + self.experts)

    @property
    def largest_tensor(self) -> int:
        """Elements of the largest tensor: the embedding, or two matrices of all experts of a layer."""
        return max(self.table, 2 * self.experts // 3)

    @property
    def active_width(self) -> int:
        """Width of the feed-forward layer that a token passes through."""
        return self.num_experts_per_tok * self.moe_intermediate_size if self.num_experts else self.intermediate_size


@dataclass(frozen=True)
class Memory:
    """The estimate for one GPU, in bytes."""

    phases: dict[str, dict[str, float]]
    """Moment -> part -> bytes."""
    offloaded: float
    """What moves to the host while others use the GPU."""
    cache_tokens: float
    """Tokens that the KV cache of one server holds."""

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())


@dataclass(frozen=True)
class Model:
    """What one trained model needs on one GPU, in bytes."""

    states: dict[str, float]
    """Weights, gradients, optimizer, and FSDP's gathered weights."""
    reduced: float
    """FSDP's gradients before they are sharded: a layer's, their float32 copy, and the output layer's."""
    kept: float
    """Inputs of all layers, for the backward pass."""
    inside: float
    """Activations within one layer, or within all layers where none is recomputed."""
    logits: float
    resident: float
    """What stays on the GPU while others use it."""
    staged: float
    """Offloaded weights that come back whole to be sent to the rollout engine."""
    offloaded: float

    @property
    def training(self) -> dict[str, float]:
        """Parts at the larger of two moments: the loss, which has the logits, and the backward pass of a layer."""
        loss = self.states | {"activations": self.kept, "logits": self.logits}
        gradients = self.states["gradients"] + self.reduced
        layer = self.states | {"activations": self.kept + self.inside, "gradients": gradients}
        return max(loss, layer, key=lambda parts: sum(parts.values()))


def estimate(config: DictConfig, shape: Shape, gpu: float) -> Memory:
    """Estimate the memory of actor, critic and rollout engine on one of the run's GPUs, which has ``gpu`` bytes."""
    from verl.trainer.ppo.utils import need_critic

    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    world = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if actor.use_dynamic_bsz:
        # Per GPU, however many share a sequence.
        tokens = actor.ppo_max_token_len_per_gpu
    else:
        longest = config.data.max_prompt_length + config.data.max_response_length
        tokens = longest * (actor.ppo_micro_batch_size_per_gpu or 1) / sequence_split(actor)
    models = {"actor": trained(actor, config.actor_rollout_ref.model, shape, world, tokens)}
    if need_critic(config):
        # The V1 trainers split the critic's micro-batches by this alone; 32768 is verl's default.
        tokens = config.critic.get("ppo_infer_max_token_len_per_gpu", 32768)
        models["critic"] = trained(config.critic, config.critic.model, shape, world, tokens, has_logits=False)

    # Asynchronous training has rollout servers on GPUs of their own and, by default, on the training GPUs as well.
    shared = config.trainer.v1.trainer_mode != "separate_async" or config.actor_rollout_ref.get("hybrid_engine", True)
    sleeps = rollout.free_cache_engine and rollout.get("enable_sleep_mode", True)
    split = rollout.tensor_model_parallel_size
    loaded = (4 if rollout.dtype in ("float32", "float") else 2) * shape.parameters / split
    share = rollout.gpu_memory_utilization * gpu if rollout.name in ENGINES else loaded
    idle = 0 if not shared else ASLEEP if sleeps else share

    phases = {}
    for role, model in models.items():
        beside = {f"{other}'s states": m.resident for other, m in models.items() if other != role}
        moment = "training" if role == "actor" else role
        phases[moment] = model.training | beside | {"rollout engine": idle, "CUDA and NCCL": CONTEXT}
    resident = sum(m.resident for m in models.values())
    # verl gathers whole tensors, one at a time, into a bucket; engines that send to other GPUs have two.
    buckets = 1 if rollout.checkpoint_engine.backend == "naive" else 2
    phases["weight transfer"] = {
        "training states": resident + models["actor"].staged,
        "rollout engine": 0 if not shared else loaded + ASLEEP if sleeps else share,
        "buckets": buckets * rollout.checkpoint_engine.update_weights_bucket_megabytes * 2**20,
        "largest tensor": element_size(actor) * shape.largest_tensor,
        "CUDA and NCCL": CONTEXT,
    }
    phases["generation"] = {"rollout engine": share}
    if shared:
        phases["generation"] |= {"training states": resident, "CUDA and NCCL": CONTEXT}

    heads = max(shape.num_key_value_heads / split, 1)
    # Keys and values in half precision.
    per_token = 2 * 2 * shape.num_hidden_layers * heads * shape.head_dim
    return Memory(
        phases=phases,
        offloaded=sum(m.offloaded for m in models.values()),
        cache_tokens=(share - loaded - SERVER) / per_token if rollout.name in ENGINES else float("inf"),
    )


def trained(
    node: DictConfig, model: DictConfig, shape: Shape, world: int, tokens: float, has_logits: bool = True
) -> Model:
    """Estimate the memory of a model on one of ``world`` GPUs.

    Args:
        node: the actor's or the critic's settings.
        model: the settings of its model.
        shape: the model's shape.
        world: number of GPUs.
        tokens: tokens of a micro-batch on this GPU.
        has_logits: false for a critic, which has no output layer over the vocabulary.
    """
    head = shape.table if has_logits else 0
    parameters = shape.parameters - (0 if has_logits or shape.tie_word_embeddings else shape.table)
    if node.strategy == "megatron":
        return _by_megatron(node.megatron, shape, world, tokens, parameters, head)
    return _by_fsdp(node, model, shape, world, tokens, parameters, head)


def _by_fsdp(
    node: DictConfig, model: DictConfig, shape: Shape, world: int, tokens: float, parameters: int, head: int
) -> Model:
    engine = fsdp_settings(node)
    shards = min(engine.fsdp_size, world) if engine.fsdp_size > 0 else world
    layer = shape.attention + shape.dense + shape.experts
    each, computed = element_size(node), _compute_size(engine)
    adapters = lora_parameters(shape, model.lora_rank) if model.lora_rank else 0
    trainable = adapters or parameters
    weights = each * (parameters + adapters) / shards
    # Gradients are sharded in the weights' type, and Adam has two moments per weight.
    gradients, optimizer = each * trainable / shards, 2 * each * trainable / shards
    # The root module, with the output layer, stays gathered between forward and backward pass.
    gathered = computed * (2 * layer + head if engine.reshard_after_forward else parameters)
    trained_layer = adapters / shape.num_hidden_layers if adapters else layer
    reduced = computed * (0 if adapters else head) + (computed + 4) * trained_layer
    if engine.use_no_sync_for_gradient_accumulation:
        # Whole float32 sums over the micro-batches, on each GPU.
        reduced += 4 * trainable
    moved = (weights if engine.param_offload else 0) + (optimizer if engine.optimizer_offload else 0)
    if engine.offload_policy:
        moved, weights, gradients, optimizer = weights + gradients + optimizer, 0, 0, 0
    return Model(
        states=dict(weights=weights, gradients=gradients, optimizer=optimizer, gathered=gathered),
        reduced=reduced,
        **_activations(shape, tokens, shape.num_hidden_layers, model.enable_gradient_checkpointing),
        logits=_logits(node, model, engine, tokens, shape.vocab_size) if head else 0,
        # Gradients are freed after each update.
        resident=max(weights + optimizer - moved, 0),
        # FSDP2 sends shard by shard, unless PEFT needs the whole module.
        staged=weights if engine.param_offload and (node.strategy == "fsdp" or adapters) else 0,
        offloaded=moved,
    )


def _by_megatron(split: DictConfig, shape: Shape, world: int, tokens: float, parameters: int, head: int) -> Model:
    tensor, pipeline = split.tensor_model_parallel_size, split.pipeline_model_parallel_size
    experts = split.expert_model_parallel_size * (split.expert_tensor_parallel_size or tensor)
    layers = shape.num_hidden_layers / pipeline
    tables = parameters - shape.num_hidden_layers * (shape.attention + shape.dense + shape.experts)
    mine = (tables + layers * (shape.attention + shape.dense)) / tensor + layers * shape.experts / experts
    recomputed = split.override_transformer_config.get("recompute_granularity") == "full"
    activations = _activations(shape, tokens, layers, recomputed)
    weights, gradients = 2 * mine, 4 * mine
    # Master weights and two moments in float32, over all ranks that hold the same part.
    optimizer = 12 * parameters / world
    moved = (weights + gradients if split.param_offload else 0) + (optimizer if split.optimizer_offload else 0)
    return Model(
        states=dict(weights=weights, gradients=gradients, optimizer=optimizer),
        reduced=0,
        # Sequence parallelism splits the layers' inputs; a pipeline's first stage holds a micro-batch per stage.
        kept=activations["kept"] / (tensor if split.sequence_parallel else 1) * pipeline,
        inside=activations["inside"] / tensor,
        # In half precision, in float32, and its gradient, with what the entropy needs; split by vocabulary.
        logits=12 * tokens * shape.vocab_size / tensor if head else 0,
        resident=weights + gradients + optimizer - moved,
        staged=weights if split.param_offload else 0,
        offloaded=moved,
    )


def _activations(shape: Shape, tokens: float, layers: float, recomputed: bool) -> dict[str, float]:
    """In half precision: each layer's input, and within a layer per token ten of its vectors and three of its MLP's."""
    inside = 2 * tokens * (10 * shape.hidden_size + 3 * shape.active_width)
    return {"kept": 2 * tokens * shape.hidden_size * layers, "inside": inside if recomputed else inside * layers}


def _logits(node: DictConfig, model: DictConfig, engine: DictConfig, tokens: float, vocabulary: int) -> float:
    """Bytes of the logits and of what is computed from them.

    4 bytes each: the layer's output and the same over the temperature; later, these and their gradient. The entropy
    needs a copy, its softmax and their product in float32: of a chunk, or of all logits where nothing is compiled. If
    it is trained, the first two stay for the backward pass.
    """
    if model.use_fused_kernels:
        return 0
    chunked = node.get("entropy_from_logits_with_chunking", False)
    compiled = engine.use_torch_compile and model.use_remove_padding
    chunk = min(engine.entropy_from_logits_chunk_size, tokens) if chunked else 0 if compiled else tokens
    stays = node.get("entropy_coeff", 0) and not engine.entropy_checkpointing and (chunked or not compiled)
    return vocabulary * (4 * tokens + 12 * chunk + (8 * tokens if stays else 0))


def sequence_split(node: DictConfig) -> int:
    """Number of GPUs that share a sequence: by Megatron's context parallelism, or by FSDP's Ulysses."""
    if node.strategy == "megatron":
        return node.megatron.context_parallel_size
    return max(node.get("ulysses_sequence_parallel_size", 1), fsdp_settings(node).ulysses_sequence_parallel_size)


def is_known(node: DictConfig) -> bool:
    """Whether an actor or critic has an engine whose sizes are known here, FSDP or Megatron."""
    return node.strategy == "megatron" or bool(fsdp_settings(node))


def fsdp_settings(node: DictConfig) -> DictConfig | None:
    """FSDP's settings of an actor or a reference (``fsdp_config``) or a critic (``fsdp``)."""
    return node.get("fsdp_config") or node.get("fsdp")


def element_size(node: DictConfig) -> int:
    """Bytes per weight that actor or critic keep: half precision with Megatron, ``model_dtype`` with FSDP."""
    if node.strategy == "megatron":
        return 2
    dtype = fsdp_settings(node).model_dtype
    return 4 if dtype in (None, "fp32", "float32", "float") else 2


def _compute_size(engine: DictConfig) -> int:
    """Bytes per weight in FSDP's forward pass."""
    dtype = (engine.get("mixed_precision") or {}).get("param_dtype", "bf16")
    return 4 if dtype in ("fp32", "float32", "float") else 2


def lora_parameters(shape: Shape, rank: int) -> int:
    """Parameters of adapters of this rank on all linear layers but the output layer, as peft makes them."""
    h, m = shape.hidden_size, shape.moe_intermediate_size
    q, kv = shape.head_dim * shape.num_attention_heads, shape.head_dim * shape.num_key_value_heads
    sides = (h + q) + 2 * (h + kv) + (q + h)
    if shape.num_experts:
        # The router; of each expert, gate and up as one matrix with twice the rank, and down.
        sides += h + shape.num_experts + shape.num_experts * (2 * (h + 2 * m) + (m + h))
    else:
        sides += 3 * (h + shape.intermediate_size)
    return rank * shape.num_hidden_layers * sides


def gpu_memory(config: DictConfig) -> tuple[float, str]:
    """Bytes of a GPU, and their source: a GPU of this machine, else ``verl_ext.gpu_memory`` in GiB, else 80 GiB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "as here"
    return OmegaConf.select(config, "verl_ext.gpu_memory", default=80) * GIB, "verl_ext.gpu_memory"
