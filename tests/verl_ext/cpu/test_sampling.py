"""One draw against plain Python: filters, greedy, penalties, the distribution, log-probabilities, parsing."""

import dataclasses

import numpy as np
import pytest
import torch

from verl_ext.cpu.rollout.sampling import NEUTRAL, Sampler, SamplingParams, uniforms


def reference(logits, temperature=1.0, top_k=-1, top_p=1.0, penalty=1.0, seen=()):
    """The distribution that one row is drawn from, in plain Python."""
    logits = [float(x) for x in logits]
    for token in seen:
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    weights = [np.exp(x / (temperature or 1.0)) for x in logits]
    order = sorted(range(len(weights)), key=lambda t: -weights[t])
    if top_k > 0:
        order = order[:top_k]
    total, kept, mass = sum(weights[t] for t in order), [], 0.0
    for token in order:
        kept.append(token)
        mass += weights[token] / total
        if mass >= top_p:
            break
    total = sum(weights[t] for t in kept)
    p = np.zeros(len(weights))
    p[kept] = [weights[t] / total for t in kept]
    return p


def params(**settings):
    return SamplingParams(max_tokens=8, **settings)


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 3},
    {"top_p": 0.7},
    {"temperature": 2.0, "top_k": 5, "top_p": 0.8},
    {"top_p": 1e-6},
    {"top_k": 1},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5, "temperature": 0.7, "top_p": 0.9},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution_and_log_probs(settings):
    """Uniform numbers on a fine grid hit each token as often as its probability says."""
    torch.manual_seed(1)
    logits, seen, grid = torch.randn(9) * 2, [0, 4], 20000
    names = {"repetition_penalty": "penalty"}
    p = reference(logits, seen=seen, **{names.get(k, k): v for k, v in settings.items()})
    mask = torch.zeros(9, dtype=torch.bool)
    mask[seen] = True

    sampler = Sampler([params(**settings)] * grid, vocab_size=9)
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    tokens, log_probs = sampler(logits.expand(grid, -1), uniform, mask.expand(grid, -1))
    np.testing.assert_allclose(np.bincount(tokens, minlength=9) / grid, p, atol=2 / grid)
    np.testing.assert_allclose(log_probs.numpy(), np.log(p[tokens]), atol=1e-5)


def test_rows_have_their_own_settings():
    torch.manual_seed(2)
    logits = torch.randn(len(SETTINGS), 9)
    uniform = torch.rand(len(SETTINGS), dtype=torch.float64)
    seen = torch.rand(len(SETTINGS), 9) < 0.3
    all_params = [params(**s) for s in SETTINGS]
    together = Sampler(all_params, 9)(logits, uniform, seen)
    for i, one in enumerate(all_params):
        alone = Sampler([one], 9)(logits[i : i + 1], uniform[i : i + 1], seen[i : i + 1])
        assert together[0][i] == alone[0]
        torch.testing.assert_close(together[1][i : i + 1], alone[1])


def test_selected_rows_keep_their_settings():
    torch.manual_seed(3)
    logits, uniform = torch.randn(len(SETTINGS), 9), torch.rand(len(SETTINGS), dtype=torch.float64)
    seen = torch.zeros(len(SETTINGS), 9, dtype=torch.bool)
    sampler = Sampler([params(**s) for s in SETTINGS], 9)
    before = sampler(logits, uniform, seen)
    keep = torch.tensor([7, 2, 4])
    sampler.select(keep)
    after = sampler(logits[keep], uniform[keep], seen[keep])
    assert torch.equal(after[0], before[0][keep]) and torch.equal(after[1], before[1][keep])


def test_greedy_takes_the_most_probable_and_counts_as_temperature_one():
    torch.manual_seed(4)
    logits = torch.randn(50, 9)
    tokens, log_probs = Sampler([params(temperature=0)] * 50, 9)(logits, torch.rand(50, dtype=torch.float64))
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).amax(-1))


def test_raw_log_probs_are_of_the_bare_logits():
    torch.manual_seed(5)
    logits = torch.randn(50, 9)
    settings = [params(temperature=0.5, top_k=2)] * 50
    tokens, log_probs = Sampler(settings, 9, "raw_logprobs")(logits, torch.rand(50, dtype=torch.float64))
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_ends_of_the_unit_interval_draw_possible_tokens(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    token, log_prob = Sampler([params()], 4)(logits, torch.tensor([uniform], dtype=torch.float64))
    assert token == (1 if uniform == 0 else 2) and torch.isfinite(log_prob)


def test_padding_of_the_embedding_is_never_drawn():
    logits = torch.zeros(1000, 9)
    logits[:, 6:] = 5.0
    tokens, log_probs = Sampler([params()] * 1000, vocab_size=6)(logits, torch.rand(1000, dtype=torch.float64))
    assert tokens.max() == 5
    torch.testing.assert_close(log_probs, torch.full((1000,), float(-np.log(6))))


def test_random_numbers_are_a_function_of_the_key():
    assert np.array_equal(uniforms(("a", 1, (2, 3)), 5), uniforms(("a", 1, (2, 3)), 8)[:5])
    assert not np.array_equal(uniforms(("a", 1, (2, 3)), 5), uniforms(("a", 12, (3,)), 5))
    many = np.concatenate([uniforms(("key", i), 100) for i in range(200)])
    assert 0 <= many.min() and many.max() < 1 and abs(many.mean() - 0.5) < 0.01


def test_what_verl_passes_is_understood():
    """The dict that verl's agent-loop worker sends; None is not given."""
    sent = dict(temperature=0, top_p=1.0, top_k=-1, repetition_penalty=1.0, logprobs=True, stop_token_ids=[3, 4])
    got = SamplingParams.parse(sent | {"max_tokens": 5, "seed": None}, ignore_eos=True)
    assert got == SamplingParams(5, 0, 1.0, -1, 1.0, True, (3, 4), True, None)


@pytest.mark.parametrize("logprobs, expected", [(None, False), (False, False), (True, True), (0, True)])
def test_logprobs_as_verl_and_as_vllm_ask_for_them(logprobs, expected):
    assert SamplingParams.parse({"max_tokens": 1, "logprobs": logprobs}).logprobs is expected


def test_neutral_values_of_what_is_not_there_are_accepted():
    assert SamplingParams.parse({"max_tokens": 1, **NEUTRAL, "stop": []}) == SamplingParams(1)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"logit_bias": {3: 1}}, "no sampling parameter logit_bias"),
        ({"n": 4}, "not support n=4, only n=1 .the number of responses is rollout.n"),
        ({"stop": ["\n"]}, "not support stop="),
        ({"min_p": 0.1}, "not support min_p=0.1, only min_p=0"),
        ({"temperature": -1}, "temperature=-1 must be 0 .greedy. or from 1e-20"),
        ({"top_p": 0}, "top_p=0 must be in"),
        ({"top_k": -2}, "top_k=-2 must be -1"),
        ({"max_tokens": 0}, "max_tokens=0 must be a whole number >= 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be from 1e-20"),
    ],
)
def test_refusals_name_the_parameter(setting, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams.parse({"max_tokens": 1, **setting})


def test_every_field_has_a_test():
    assert {f.name for f in dataclasses.fields(SamplingParams)} == {
        *("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty"),
        *("ignore_eos", "stop_token_ids", "logprobs", "seed"),
    }
