"""A Qwen3 of two layers that never saw a text, for tests of the rollout."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 23


@pytest.fixture(scope="session")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).eval()
    # From its own initialisation the next token hardly depends on the prompt.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model.requires_grad_(False)
