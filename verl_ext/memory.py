"""An estimate of what a training run needs of each GPU's memory, from the model's shape and the settings.

It counts what is large: weights, gradients, optimizer, activations under recomputation, logits, the rollout engine's
share. Allocators, kernels' work space and NCCL come on top; they are put at ``OVERHEAD``. All sizes in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

GIB = 2**30
OVERHEAD = 3 * GIB
"""CUDA context, NCCL, fragments, and what a sleeping rollout engine keeps. A guess."""


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
    def active_width(self) -> int:
        """Width of the feed-forward layer that a token passes."""
        return self.num_experts_per_tok * self.moe_intermediate_size if self.num_experts else self.intermediate_size


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    engine: float
    """What the rollout engine takes while it generates."""
    resident: float
    """What stays on the GPU of the training states while it generates."""
    offloaded: float
    """What moves to the host meanwhile."""
    cache_tokens: float
    """Tokens that the KV cache of one server holds."""

    @property
    def training(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + OVERHEAD

    @property
    def generation(self) -> float:
        return self.engine + self.resident + OVERHEAD


def estimate(config: DictConfig, shape: Shape, gpu: float) -> Memory:
    """The actor's and the rollout engine's memory on one of the run's GPUs.

    Args:
        config: the composed configuration of ``main_ppo``.
        shape: of the model.
        gpu: bytes of one GPU.
    """
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    model = config.actor_rollout_ref.model
    world = config.trainer.n_gpus_per_node * config.trainer.nnodes
    longest = config.data.max_prompt_length + config.data.max_response_length
    if actor.use_dynamic_bsz:
        tokens = actor.ppo_max_token_len_per_gpu
    else:
        tokens = longest * (actor.ppo_micro_batch_size_per_gpu or 1)

    layer = shape.attention + shape.dense + shape.experts
    if actor.strategy == "megatron":
        split = actor.megatron
        tensor, pipeline = split.tensor_model_parallel_size, split.pipeline_model_parallel_size
        experts = split.expert_model_parallel_size * (split.expert_tensor_parallel_size or tensor)
        layers = shape.num_hidden_layers / pipeline
        mine = (shape.embedding + layers * (shape.attention + shape.dense)) / tensor
        mine += layers * shape.experts / experts
        weights, gradients = 2 * mine, 4 * mine
        # Master weights and two moments, over all ranks that hold the same part.
        optimizer = 12 * shape.parameters / world
        context = split.context_parallel_size
        width = tensor * context
        # Sequence parallelism splits what is kept between layers.
        kept = tokens * shape.hidden_size * 2 * layers / (width if split.sequence_parallel else context)
        recomputed = split.override_transformer_config.get("recompute_granularity") == "full"
        offload_weights, offload_optimizer = split.param_offload, split.optimizer_offload
        logits = tokens / context * shape.vocab_size / tensor * 12
        # All ranks of a pipeline's first stage hold as many micro-batches as it has stages.
        kept *= pipeline
    else:
        engine = actor.fsdp_config
        shards = engine.fsdp_size if 0 < engine.fsdp_size < world else world
        bytes_each = 4 if engine.model_dtype in ("fp32", "float32") else 2
        width = max(actor.ulysses_sequence_parallel_size, engine.ulysses_sequence_parallel_size)
        trained = lora_parameters(shape, model.lora_rank) if model.lora_rank else shape.parameters
        # Sharded weights, and two layers and the embedding gathered in half precision.
        weights = bytes_each * shape.parameters / shards + 2 * (2 * layer + shape.embedding)
        gradients, optimizer = bytes_each * trained / shards, 2 * bytes_each * trained / shards
        kept = tokens * shape.hidden_size * 2 * shape.num_hidden_layers / width
        recomputed = model.enable_gradient_checkpointing
        offload_weights, offload_optimizer = engine.param_offload, engine.optimizer_offload
        each = 0 if model.use_fused_kernels else 4 if actor.entropy_from_logits_with_chunking else 12
        logits = tokens / width * shape.vocab_size * each

    # Within a layer, in half precision: about ten vectors of the model's width and three of the feed-forward's a token.
    inside = tokens / width * 2 * (10 * shape.hidden_size + 3 * shape.active_width)
    if not recomputed:
        inside *= shape.num_hidden_layers
    engine_share = rollout.gpu_memory_utilization * gpu
    split_rollout = rollout.tensor_model_parallel_size
    heads = max(shape.num_key_value_heads / split_rollout, 1)
    a_token = 4 * shape.num_hidden_layers * heads * shape.head_dim
    cache = engine_share - 2 * shape.parameters / split_rollout - OVERHEAD
    moved = weights * offload_weights + optimizer * offload_optimizer
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept + inside,
        logits=logits,
        engine=engine_share,
        # Gradients are freed after each update.
        resident=weights + optimizer - moved,
        offloaded=moved,
        cache_tokens=cache / a_token,
    )


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
