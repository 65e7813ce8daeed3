"""A Qwen3 of two layers that never saw a text, and the same on disk with a tokenizer of single characters."""

import copy
from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ["<pad>", "<|im_end|>", "<end>", "<|im_start|>"]
CHARACTERS = list("0123456789+=?ruse\n ")


@pytest.fixture(scope="session")
def model() -> Qwen3ForCausalLM:
    """23 tokens; 1 and 2 end a response."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(SPECIAL + CHARACTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=[1, 2],
    )
    model = Qwen3ForCausalLM(config).eval()
    # With the default initialisation, the next token would barely depend on the prompt.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def hf_config(model_path) -> Callable[..., DictConfig]:
    """``hf_config("key=value", ...)``: verl's configuration with this rollout and that model, composed once."""
    import hydra
    import verl  # noqa: F401  (loads the plugin)

    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        base = hydra.compose(
            "ppo_trainer",
            [
                f"actor_rollout_ref.model.path={model_path}",
                "actor_rollout_ref.rollout.name=hf",
                "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
                "trainer.n_gpus_per_node=1",
            ],
        )
    OmegaConf.set_struct(base, False)
    return lambda *overrides: OmegaConf.merge(copy.deepcopy(base), OmegaConf.from_dotlist(list(overrides)))


@pytest.fixture(scope="session")
def model_path(model, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    vocabulary = {token: i for i, token in enumerate(SPECIAL + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1], additional_special_tokens=SPECIAL[2:]
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    fast.save_pretrained(path)
    model.save_pretrained(path)
    return path
