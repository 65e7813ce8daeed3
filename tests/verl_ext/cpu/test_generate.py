"""Batched decoding with a KV cache against one prompt at a time through full forward passes."""

import pytest
import torch
from decoding import EOS, VOCABULARY, plain

from verl_ext.cpu.rollout.generate import Request, generate
from verl_ext.cpu.rollout.sampling import SamplingParams

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 7], [3, 3, 4, 21]]


def requests(prompts=PROMPTS, key="k", **settings):
    settings = {"max_tokens": 12, "temperature": 0.9} | settings
    return [Request(list(p), SamplingParams(**settings), (key, i)) for i, p in enumerate(prompts)]


def decode(model, reqs, **others):
    return generate(model, reqs, **({"eos_token_ids": EOS, "vocab_size": VOCABULARY} | others))


def check(model, reqs):
    got = decode(model, reqs)
    for request, response in zip(reqs, got, strict=True):
        tokens, log_probs = plain(model, request)
        assert response.token_ids == tokens
        assert not response.aborted
        torch.testing.assert_close(torch.tensor(response.log_probs), torch.tensor(log_probs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0},
        {"temperature": 2.0, "top_k": 4},
        {"top_p": 0.8},
        {"repetition_penalty": 1.5},
        {"ignore_eos": True},
        {"stop_token_ids": (7, 15, 16, 17)},
        {"max_tokens": 1},
    ],
    ids=str,
)
def test_batch_with_cache_and_padding_equals_one_by_one_without(model, settings):
    check(model, requests(**settings))


def test_every_way_to_end_occurs(model):
    """Else the tests above would show less than they seem to."""
    got = decode(model, requests(PROMPTS * 8))
    assert {len(r.token_ids) == 12 for r in got} == {True, False}
    assert all(r.token_ids[-1] in EOS for r in got if len(r.token_ids) < 12)
    got = decode(model, requests(PROMPTS * 8, stop_token_ids=(7, 15, 16, 17)))
    assert any(r.token_ids[-1] in (7, 15, 16, 17) and len(r.token_ids) < 12 for r in got)


def test_equal_prompts_are_read_once_and_answered_differently(model):
    prompts = [p for p in PROMPTS for _ in range(4)]
    widths = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kw: widths.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    got = decode(model, requests(prompts, ignore_eos=True))
    handle.remove()
    assert widths[0] == (4, 6) and widths[1] == (20, 1)
    assert len({tuple(r.token_ids) for r in got[:4]}) > 1
    assert [r.token_ids for r in got] == [plain(model, r)[0] for r in requests(prompts, ignore_eos=True)]


def test_rows_that_ended_leave_the_batch(model):
    reqs = [Request([5, 6], SamplingParams(n, ignore_eos=True), (n,)) for n in (2, 2, 2, 3, 12)]
    sizes = []
    handle = model.register_forward_pre_hook(lambda _, args, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    got = decode(model, reqs)
    handle.remove()
    assert sizes[0] == 1 and sizes[1] == 5 and sizes[2] == 2 and set(sizes[3:]) == {1}
    assert [r.token_ids for r in got] == [plain(model, r)[0] for r in reqs]


def test_mixed_settings_in_one_batch(model):
    settings = [{"temperature": 0}, {"top_k": 2}, {"max_tokens": 3}, {"repetition_penalty": 2.0}, {"ignore_eos": True}]
    params = [SamplingParams(**{"max_tokens": 12} | s) for s in settings]
    check(model, [Request(p, s, (i,)) for i, (p, s) in enumerate(zip(PROMPTS, params, strict=True))])


def test_without_padding_no_mask_is_given_and_nothing_changes(model):
    prompts = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    masks = []
    handle = model.register_forward_pre_hook(lambda _, args, kw: masks.append(kw["attention_mask"]), with_kwargs=True)
    got = decode(model, requests(prompts))
    handle.remove()
    assert all(mask is None for mask in masks)
    assert [r.token_ids for r in got] == [plain(model, r)[0] for r in requests(prompts)]


def test_log_probs_are_the_actors_log_probs(model):
    """As verl's actor computes them: teacher-forced, log-softmax of logits / temperature."""
    temperature = 0.7
    reqs = requests(temperature=temperature)
    for request, response in zip(reqs, decode(model, reqs), strict=True):
        ids = torch.tensor([request.prompt_ids + response.token_ids])
        logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(response.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, rtol=0, atol=1e-5)


def test_greedy_is_the_argmax_of_a_full_forward_pass(model):
    for request, response in zip(requests(temperature=0), decode(model, requests(temperature=0)), strict=True):
        ids = torch.tensor([request.prompt_ids + response.token_ids])
        assert model(ids).logits[0, len(request.prompt_ids) - 1 : -1].argmax(-1).tolist() == response.token_ids


def test_a_response_depends_on_its_own_key_alone(model):
    together = decode(model, requests())
    alone = [decode(model, [r])[0] for r in requests()]
    backwards = decode(model, requests()[::-1])[::-1]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone] == [r.token_ids for r in backwards]
    other = decode(model, requests(key="another"))
    assert [r.token_ids for r in together] != [r.token_ids for r in other]


def test_should_stop_returns_what_there_is(model):
    asked = []

    def should_stop():
        asked.append(None)
        return len(asked) == 3

    reqs = [Request([5, 6], SamplingParams(n, ignore_eos=True), (n,)) for n in (2, 12)]
    short, long = decode(model, reqs, should_stop=should_stop)
    assert len(short.token_ids) == 2 and not short.aborted
    assert len(long.token_ids) == 3 and long.aborted
    assert long.token_ids == plain(model, reqs[1])[0][:3]


def test_nothing_asked_nothing_answered(model):
    assert decode(model, []) == []


def test_half_precision_runs(model):
    half = type(model)(model.config).to(torch.bfloat16).eval()
    assert all(len(r.token_ids) <= 12 for r in decode(half, requests()))
