"""An estimate of what a run needs of each GPU's memory, from the model's shape and the settings.

verl's training processes and rollout servers share the GPUs and take turns. Each of these moments must fit:

- training: the rollout engine sleeps;
- weight transfer: the engine's weights are there again, its KV cache is not yet;
- generation: the engine has its share of the whole GPU, and training states that are not offloaded lie beside it. vLLM
  asks for its share when it starts, too, and refuses if that is not free.

Weights, gradients, optimizer and logits are counted exactly, activations by the widths of a layer. What no setting
says is in :data:`CONTEXT`, :data:`ASLEEP` and :data:`SERVER`. All sizes in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

GIB = 2**30
CONTEXT = 1 * GIB
"""The training process's CUDA context and NCCL buffers, beside all that it allocates. A guess."""
ASLEEP = 2 * GIB
"""What a sleeping rollout engine keeps: its context, and CUDA graphs, which cannot be offloaded. A guess."""
SERVER = 3 * GIB
"""What a rollout engine takes out of its share for neither weights nor KV cache: its context, CUDA graphs, and the
activations of ``max_num_batched_tokens``. A guess."""

HAS_SHARE = ("vllm", "sglang", "trtllm")
"""Engines that take ``gpu_memory_utilization`` of the GPU, whatever they need."""


@dataclass(frozen=True)
class Shape:
    """A decoder's shape, under transformers' names."""

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
    """Longest sequence; 0 if not known."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """From a model's ``config.json``.

        Raises:
            KeyError: it lacks a size, as those of images or recurrent models may.
        """
        heads = config["num_attention_heads"]
        values = {name: config[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
        values["num_attention_heads"] = heads
        values["num_key_value_heads"] = config.get("num_key_value_heads") or heads
        values["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
        values["intermediate_size"] = config["intermediate_size"]
        values["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
        values["num_experts"] = config.get("num_experts") or config.get("n_routed_experts") or 0
        values["num_experts_per_tok"] = config.get("num_experts_per_tok") or 0
        values["moe_intermediate_size"] = config.get("moe_intermediate_size") or 0
        values["max_position_embeddings"] = config.get("max_position_embeddings") or 0
        return cls(**values)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding and the output layer."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

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
        return self.embedding + self.num_hidden_layers * (self.attention + self.dense + self.experts)

    @property
    def largest_tensor(self) -> int:
        """Elements of the largest tensor: a table of the vocabulary, or two matrices of all experts of a layer."""
        return max(self.vocab_size * self.hidden_size, 2 * self.experts // 3)

    @property
    def active_width(self) -> int:
        """Width of the feed-forward layer that a token passes."""
        return self.num_experts_per_tok * self.moe_intermediate_size if self.num_experts else self.intermediate_size


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU: what each moment needs, by part."""

    phases: dict[str, dict[str, float]]
    offloaded: float
    """What moves to the host while others use the GPU."""
    cache_tokens: float
    """Tokens that the KV cache of one server holds."""

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())


@dataclass(frozen=True)
class Model:
    """Bytes of one model that is trained, on one GPU."""

    weights: float
    gradients: float
    """A buffer as long as the weights: in float32 with Megatron, in the weights' own type with FSDP."""
    optimizer: float
    whole: float
    """Weights of FSDP's two layers at work and of the output layer, gathered in the forward pass's type."""
    reduced: float
    """Gradients of FSDP that are not sharded yet: a layer's, its float32 copy on the way, and the output layer's."""
    kept: float
    """Inputs of all layers, for the backward pass."""
    inside: float
    """Activations within one layer, or within all of them where none is recomputed."""
    logits: float
    resident: float
    """What stays on the GPU while others use it."""
    staged: float
    """Offloaded weights that come back whole to be sent to the rollout engine."""
    offloaded: float

    @property
    def training(self) -> dict[str, float]:
        """Parts at the larger of two moments: the loss, which has the logits, and the backward pass of a layer."""
        states = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        states |= {"gathered": self.whole}
        loss = states | {"activations": self.kept, "logits": self.logits}
        layer = states | {"activations": self.kept + self.inside, "gradients": self.gradients + self.reduced}
        return max(loss, layer, key=lambda parts: sum(parts.values()))


def estimate(config: DictConfig, shape: Shape, gpu: float) -> Memory:
    """The memory of actor, critic and rollout engine on one of the run's GPUs.

    Args:
        config: the composed configuration of ``main_ppo``.
        shape: of the model.
        gpu: bytes of one GPU.
    """
    from verl.trainer.ppo.utils import need_critic

    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    world = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if actor.use_dynamic_bsz:
        # Of each GPU, however many share a sequence.
        tokens = actor.ppo_max_token_len_per_gpu
    else:
        longest = config.data.max_prompt_length + config.data.max_response_length
        tokens = longest * (actor.ppo_micro_batch_size_per_gpu or 1) / sequence_split(actor)
    models = {"actor": trained(actor, config.actor_rollout_ref.model, shape, world, tokens)}
    if need_critic(config):
        # The V1 trainers cut the critic's micro-batches by this alone; 32768 is verl's own.
        tokens = config.critic.get("ppo_infer_max_token_len_per_gpu", 32768)
        models["critic"] = trained(config.critic, config.critic.model, shape, world, tokens, has_logits=False)

    # Asynchronous training has servers on GPUs of their own, and unless told otherwise some beside training as well.
    shared = config.trainer.v1.trainer_mode != "separate_async" or config.actor_rollout_ref.get("hybrid_engine", True)
    sleeps = rollout.free_cache_engine and rollout.get("enable_sleep_mode", True)
    split = rollout.tensor_model_parallel_size
    loaded = (4 if rollout.dtype in ("float32", "float") else 2) * shape.parameters / split
    share = rollout.gpu_memory_utilization * gpu if rollout.name in HAS_SHARE else loaded
    idle = 0 if not shared else ASLEEP if sleeps else share

    phases = {}
    for role, model in models.items():
        beside = {f"{other}'s states": m.resident for other, m in models.items() if other != role}
        moment = "training" if role == "actor" else role
        phases[moment] = model.training | beside | {"rollout engine": idle, "CUDA and NCCL": CONTEXT}
    resident = sum(m.resident for m in models.values())
    # verl gathers whole tensors, one at a time, into a bucket; engines that send to other GPUs have two.
    buckets = 1 if rollout.checkpoint_engine.backend == "naive" else 2
    bucket = buckets * rollout.checkpoint_engine.update_weights_bucket_megabytes * 2**20
    phases["weight transfer"] = {
        "training states": resident + models["actor"].staged,
        "rollout engine": 0 if not shared else loaded + ASLEEP if sleeps else share,
        "buckets": bucket,
        "largest tensor": element_size(actor) * shape.largest_tensor,
        "CUDA and NCCL": CONTEXT,
    }
    phases["generation"] = {"rollout engine": share}
    if shared:
        phases["generation"] |= {"training states": resident, "CUDA and NCCL": CONTEXT}

    heads = max(shape.num_key_value_heads / split, 1)
    # Keys and values in half precision.
    a_token = 2 * 2 * shape.num_hidden_layers * heads * shape.head_dim
    return Memory(
        phases=phases,
        offloaded=sum(m.offloaded for m in models.values()),
        cache_tokens=(share - loaded - SERVER) / a_token if rollout.name in HAS_SHARE else float("inf"),
    )


def trained(
    node: DictConfig, model: DictConfig, shape: Shape, world: int, tokens: float, has_logits: bool = True
) -> Model:
    """The memory of a model on one of ``world`` GPUs.

    Args:
        node: the actor's or the critic's settings.
        model: its model's.
        shape: of it.
        world: GPUs.
        tokens: of a micro-batch, on this GPU.
        has_logits: false for a critic, which has no output layer over the vocabulary either.
    """
    table = shape.vocab_size * shape.hidden_size
    parameters = shape.parameters if has_logits or shape.tie_word_embeddings else shape.parameters - table
    head = table if has_logits else 0
    if node.strategy == "megatron":
        return _by_megatron(node.megatron, shape, world, tokens, parameters, head)
    return _by_fsdp(node, model, shape, world, tokens, parameters, head)


def _by_fsdp(
    node: DictConfig, model: DictConfig, shape: Shape, world: int, tokens: float, parameters: int, head: int
) -> Model:
    engine = node.get("fsdp_config") or node.fsdp
    shards = min(engine.fsdp_size, world) if engine.fsdp_size > 0 else world
    layers = shape.num_hidden_layers
    layer = shape.attention + shape.dense + shape.experts
    each, computed = element_size(node), _compute_size(engine)
    adapters = lora_parameters(shape, model.lora_rank) if model.lora_rank else 0
    trainable = adapters or parameters
    weights = each * (parameters + adapters) / shards
    # Gradients are sharded in the weights' type, and Adam has two moments for each.
    gradients, optimizer = each * trainable / shards, 2 * each * trainable / shards
    # The root, which has the output layer, is not sharded again between forward and backward pass.
    whole = computed * (2 * layer + head if engine.reshard_after_forward else parameters)
    reduced = computed * (0 if adapters else head) + (computed + 4) * (adapters / layers if adapters else layer)
    if engine.use_no_sync_for_gradient_accumulation:
        # Whole float32 sums over the micro-batches, on each GPU.
        reduced += 4 * trainable
    moved = (weights if engine.param_offload else 0) + (optimizer if engine.optimizer_offload else 0)
    if engine.offload_policy:
        moved, weights, gradients, optimizer = weights + gradients + optimizer, 0, 0, 0
    return Model(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        whole=whole,
        reduced=reduced,
        **_activations(shape, tokens, layers, model.enable_gradient_checkpointing),
        logits=_logits(node, model, engine, tokens, shape.vocab_size) if head else 0,
        # Gradients are freed after each update.
        resident=max(weights + optimizer - moved, 0),
        # FSDP2 sends shard by shard, unless PEFT needs the module.
        staged=weights if engine.param_offload and (node.strategy == "fsdp" or adapters) else 0,
        offloaded=moved,
    )


def _by_megatron(split: DictConfig, shape: Shape, world: int, tokens: float, parameters: int, head: int) -> Model:
    tensor, pipeline = split.tensor_model_parallel_size, split.pipeline_model_parallel_size
    experts = split.expert_model_parallel_size * (split.expert_tensor_parallel_size or tensor)
    layers = shape.num_hidden_layers / pipeline
    embedding = parameters - shape.num_hidden_layers * (shape.attention + shape.dense + shape.experts)
    mine = (embedding + layers * (shape.attention + shape.dense)) / tensor + layers * shape.experts / experts
    width = tensor if split.sequence_parallel else 1
    activations = _activations(
        shape, tokens, layers, split.override_transformer_config.get("recompute_granularity") == "full"
    )
    weights, gradients = 2 * mine, 4 * mine
    # Master weights and two moments in float32, over all ranks that hold the same part.
    optimizer = 12 * parameters / world
    moved = (weights + gradients if split.param_offload else 0) + (optimizer if split.optimizer_offload else 0)
    return Model(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        whole=0,
        reduced=0,
        # Sequence parallelism splits what lies between layers. All ranks of a pipeline's first stage hold as many
        # micro-batches as it has stages.
        kept=activations["kept"] / width * pipeline,
        inside=activations["inside"] / tensor,
        # In half precision, in float32, and the gradient of that, with what the entropy needs; split by vocabulary.
        logits=12 * tokens * shape.vocab_size / tensor if head else 0,
        resident=weights + gradients + optimizer - moved,
        staged=weights if split.param_offload else 0,
        offloaded=moved,
    )


def _activations(shape: Shape, tokens: float, layers: float, recomputed: bool) -> dict[str, float]:
    """In half precision: each layer's input, and inside a layer about ten vectors of the model's width per token and
    three of the feed-forward's."""
    inside = 2 * tokens * (10 * shape.hidden_size + 3 * shape.active_width)
    return {"kept": 2 * tokens * shape.hidden_size * layers, "inside": inside if recomputed else inside * layers}


def _logits(node: DictConfig, model: DictConfig, engine: DictConfig, tokens: float, vocabulary: int) -> float:
    """The logits with what is computed from them.

    4 bytes each: the layer's output and the same over the temperature; later, these and their gradient. The entropy
    needs a copy, its softmax and their product in float32: of a chunk, or of all where nothing is compiled. If it is
    trained, the first two stay for the backward pass.
    """
    if model.use_fused_kernels:
        return 0
    chunked = node.get("entropy_from_logits_with_chunking", False)
    compiled = engine.use_torch_compile and model.use_remove_padding
    chunk = min(engine.entropy_from_logits_chunk_size, tokens) if chunked else 0 if compiled else tokens
    stays = node.get("entropy_coeff", 0) and not engine.entropy_checkpointing and (chunked or not compiled)
    return vocabulary * (4 * tokens + 12 * chunk + (8 * tokens if stays else 0))


def sequence_split(node: DictConfig) -> int:
    """Over how many GPUs a sequence is split: by Megatron's context parallelism, or by Ulysses."""
    if node.strategy == "megatron":
        return node.megatron.context_parallel_size
    engine = node.get("fsdp_config") or node.fsdp
    return max(node.get("ulysses_sequence_parallel_size", 1), engine.ulysses_sequence_parallel_size)


def element_size(node: DictConfig) -> int:
    """Bytes of a weight as actor or critic keep it: Megatron in half precision, FSDP as its settings say."""
    if node.strategy == "megatron":
        return 2
    dtype = (node.get("fsdp_config") or node.fsdp).model_dtype
    return 4 if dtype in (None, "fp32", "float32", "float") else 2


def _compute_size(engine: DictConfig) -> int:
    """Bytes of a weight in FSDP's forward pass."""
    dtype = (engine.get("mixed_precision") or {}).get("param_dtype", "bf16")
    return 4 if dtype in ("fp32", "float32", "float") else 2


def lora_parameters(shape: Shape, rank: int) -> int:
    """Parameters of adapters of this rank on all linear layers, the output layer aside."""
    h, q, kv = (
        shape.hidden_size,
        shape.head_dim * shape.num_attention_heads,
        shape.head_dim * shape.num_key_value_heads,
    )
    sides = (h + q) + 2 * (h + kv) + (q + h)
    sides += 3 * (h + shape.intermediate_size) if not shape.num_experts else h + shape.num_experts
    return rank * shape.num_hidden_layers * sides


def gpu_memory(config: DictConfig) -> tuple[float, str]:
    """Bytes of a GPU, and where the figure is from: a GPU here, else the setting ``verl_ext.gpu_memory``, else 80."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "as here"
    return OmegaConf.select(config, "verl_ext.gpu_memory", default=80) * GIB, "verl_ext.gpu_memory"
