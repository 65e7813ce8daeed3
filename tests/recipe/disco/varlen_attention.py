"""Variable-length attention in plain torch: verl's Ulysses patch, which knows flash attention only, runs on a CPU."""

import torch
import torch.nn.functional as F


def attend(query, key, value, attention_mask, query_length, *args, position_ids=None, softmax_scale=None, **kwargs):
    """(1, tokens, heads, dim) of packed sequences, each starting where ``position_ids`` is 0; causal within each."""
    repeat = query.size(2) // key.size(2)
    starts = [*(position_ids.flatten() == 0).nonzero().flatten().tolist(), query.size(1)]
    pieces = []
    for a, b in zip(starts, starts[1:], strict=False):
        heads = query, key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)
        q, k, v = (x[:, a:b].transpose(1, 2) for x in heads)
        pieces.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale).transpose(1, 2))
    return torch.cat(pieces, 1)


def install() -> str:
    """Register it under a name for ``attn_implementation``, below verl's Ulysses exchange."""
    import verl.models.transformers.monkey_patch as patch
    from transformers import AttentionInterface
    from transformers.integrations import flash_attention
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    flash_attention._flash_attention_forward = attend
    patch._flash_attention_forward = attend
    # Looked up at call time: verl replaces the module's kernel with its own, which calls ours.
    AttentionInterface.register("cpu_varlen", lambda *a, **k: flash_attention.flash_attention_forward(*a, **k))
    AttentionMaskInterface.register("cpu_varlen", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    return "cpu_varlen"
