"""The tokenizer and the untrained model, saved and loaded the way verl does."""

import pytest
import torch
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_ext.tasks.arithmetic.model import build_model, build_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_model(tokenizer, seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(saved):
    return AutoTokenizer.from_pretrained(saved)


@cases(200)
@given(text=st.text(max_size=60))
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_chat_has_one_token_a_role_line_and_a_digit(tokenizer):
    chat = [{"role": "system", "content": "1"}, {"role": "user", "content": "12+3="}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\n1<|im_end|>\n<|im_start|>user\n12+3=<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    names = [tokenizer.decode(i) for i in ids]
    assert names == [
        *("<|im_start|>", "system\n", "1", "<|im_end|>", "\n"),
        *("<|im_start|>", "user\n", "1", "2", "+", "3", "=", "<|im_end|>", "\n"),
        *("<|im_start|>", "assistant\n"),
    ]


def test_a_finished_turn_continues_its_generation_prompt(tokenizer):
    question = [{"role": "user", "content": "4+8="}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": "12#12"}], tokenize=False)
    assert whole == prompt + "12#12" + tokenizer.eos_token + "\n"


def test_special_tokens(tokenizer):
    assert tokenizer.is_fast
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    ids = [*tokenizer.encode("12#12"), tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12#12"


def test_the_model_is_a_small_qwen3_that_vllm_can_serve(saved, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(saved)
    config = model.config
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.vocab_size == len(tokenizer)
    # vLLM's CPU build knows these.
    assert config.head_dim in (32, 64, 128)
    assert 1e5 < sum(p.numel() for p in model.parameters()) < 3e5
    assert config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id


def test_the_seed_decides_the_weights_and_nothing_else_changes(tokenizer):
    state = torch.get_rng_state()
    one, same, other = (build_model(tokenizer, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)
