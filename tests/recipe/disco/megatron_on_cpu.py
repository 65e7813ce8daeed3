"""Lets verl's Megatron engine run on CPU tensors, for tests alone.

Megatron-Core and mbridge write "cuda" into their code, and build Transformer Engine's layers, which no CPU can run.
:func:`before_verl` maps that device to the CPU; :func:`install` has mbridge build Megatron-Core's own layers, with an
attention over packed and padded sequences that context parallelism may split. What is tested, verl's engine and
Megatron's parallel layers, schedules and optimizer, is untouched.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def is_cuda(x) -> bool:
    return (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and x.startswith("cuda"))


class CudaIsCpu(TorchFunctionMode):
    """Every function that is told "cuda" works on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name in ("cuda", "pin_memory"):
            return args[0]
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None) if kwargs.get("pin_memory") else None
        if name == "to":
            args = tuple(CPU if is_cuda(x) else x for x in args)
        result = function(*args, **kwargs)
        if name == "type" and len(args) == 1 and not kwargs:
            # Megatron's optimizers know float tensors by this name.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def before_verl() -> None:
    """Call before verl or Megatron is imported."""
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "VERL_ENGINE_DEVICE": "cuda", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    import torch._dynamo

    # Must see torch.cuda's functions before they are replaced.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    torch.cuda.current_device = lambda: CPU
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.nn.Module.cuda = lambda self, device=None: self
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = lambda seed: None
    CudaIsCpu().__enter__()
    # verl would ask for a backend that torch refuses.
    dist.init_process_group("gloo")


class GatherOverRanks(torch.autograd.Function):
    """(t, ...) on each rank of a group -> (ranks, t, ...), the same on all."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None


def positions(rank: int, half: int, ranks: int) -> torch.Tensor:
    """Which tokens of a sequence a context-parallel rank has: of 2 x ranks pieces, one from each end."""
    end = 2 * half * ranks
    return torch.cat(
        [torch.arange(rank * half, (rank + 1) * half), torch.arange(end - (rank + 1) * half, end - rank * half)]
    )


def attend(query, key, value, scale: float) -> torch.Tensor:
    """Causal attention of one sequence, (t, heads, width) each, of which this rank may have a part."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_context_parallel_world_size()
    repeat = query.size(1) // key.size(1)
    mask = None
    if ranks > 1:
        group, rank = parallel_state.get_context_parallel_group(), parallel_state.get_context_parallel_rank()
        half = query.size(0) // 2
        both = GatherOverRanks.apply(torch.cat([key, value], -1), group).flatten(0, 1)
        key, value = both.chunk(2, -1)
        there = torch.cat([positions(r, half, ranks) for r in range(ranks)])
        mask = positions(rank, half, ranks)[:, None] >= there[None, :]
    query, key, value = (
        x.transpose(0, 1)[None] for x in (query, key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1))
    )
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[0].transpose(0, 1)


def install() -> None:
    """Have mbridge build Megatron-Core's own layers; call after verl is imported."""
    from mbridge.core.llm_bridge import LLMBridge
    from mbridge.models.qwen2 import Qwen2Bridge
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.module import MegatronModule
    from verl.utils.megatron_utils import get_hf_rope_theta

    class Attention(MegatronModule):
        def __init__(self, config, layer_number, attn_mask_type, attention_type, *args, softmax_scale=None, **kwargs):
            super().__init__(config)
            self.scale = softmax_scale or config.kv_channels**-0.5

        def forward(self, query, key, value, attention_mask, *args, packed_seq_params=None, **kwargs):
            if packed_seq_params is None:
                # Padded on the right: causal is enough.
                rows = [attend(query[:, i], key[:, i], value[:, i], self.scale) for i in range(query.size(1))]
                return torch.stack(rows, 1).flatten(2)
            ranks = parallel_state.get_context_parallel_world_size()
            ends = [end // ranks for end in packed_seq_params.cu_seqlens_q_padded.tolist()]
            parts = zip(ends[:-1], ends[1:], strict=True)
            rows = [attend(query[a:b], key[a:b], value[a:b], self.scale) for a, b in parts]
            return torch.cat(rows).flatten(1)

    class Norm(torch.nn.RMSNorm):
        def __init__(self, config, hidden_size, eps=1e-5, **kwargs):
            super().__init__(hidden_size, eps=eps)
            # Megatron adds its gradients up over ranks that have parts of a sequence each.
            self.weight.sequence_parallel = config.sequence_parallel

    def layer_spec(bridge, vp_stage=None):
        bridge.has_vp_stage = True
        spec = get_gpt_decoder_block_spec(
            bridge.config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
        )
        spec.layer_norm = Norm
        for layer in spec.layer_specs:
            parts = layer.submodules
            parts.input_layernorm = parts.pre_mlp_layernorm = Norm
            attention = parts.self_attention.submodules
            attention.core_attention = Attention
            if bridge.config.qk_layernorm:
                attention.q_layernorm = attention.k_layernorm = Norm
        return spec

    arguments = LLMBridge._get_gptmodel_args

    def with_rope_theta(bridge):
        # transformers 5 keeps it elsewhere.
        if not hasattr(bridge.hf_config, "rope_theta"):
            bridge.hf_config.rope_theta = get_hf_rope_theta(bridge.hf_config)
        return arguments(bridge)

    LLMBridge._get_transformer_layer_spec = layer_spec
    LLMBridge._get_gptmodel_args = with_rope_theta
    # The norms stand alone here; in Transformer Engine's layers they are part of the product that follows.
    layer = "model.layers.{layer_number}"
    Qwen2Bridge._OTHER_MAPPING = {"input_layernorm.weight": [f"{layer}.input_layernorm.weight"]}
    Qwen2Bridge._MLP_MAPPING = Qwen2Bridge._MLP_MAPPING | {
        "pre_mlp_layernorm.weight": [f"{layer}.post_attention_layernorm.weight"]
    }


def seed() -> None:
    """What verl leaves out where there is no GPU; call once the parallel groups are there."""
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(42)
