"""Random logits and settings through the rollout's draw of a token, and random weights through its buckets."""

import asyncio
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from decoding import EOS, VOCABULARY, plain
from fuzzing import cases
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from verl_ext.cpu.rollout.buckets import in_buckets
from verl_ext.cpu.rollout.generate import Request, generate
from verl_ext.cpu.rollout.sampling import NEUTRAL, Sampler, SamplingParams, uniforms

# One token ------------------------------------------------------------------------------------------------------------

sizes = st.sampled_from([0.0, 1.0, 30.0, 1e4])
settings = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 1e-20, 0.01, 0.6, 1.0, 2.0, 1e20]),
        "top_k": st.sampled_from([-1, 0, 1, 2, 5, 1000, 2**62]),
        "top_p": st.sampled_from([1e-300, 1e-6, 0.5, 0.9, 1 - 1e-9, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
    },
)


@st.composite
def draws(draw):
    """Logits of 1 to 6 rows, ties and impossible tokens among them, with each row's settings and random number."""
    rows, words, padding = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(0, 3))
    rng, size = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(sizes)
    logits = rng.normal(0, 1, (rows, words + padding)) * size
    if draw(st.booleans()):
        logits = logits.round()
    # Never all of them: the first stays.
    logits[:, 1:][rng.random((rows, words + padding - 1)) < draw(st.sampled_from([0.0, 0.5]))] = -np.inf
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    uniform = rng.choice([0.0, 1 - 2**-53, *rng.random(4)], rows)
    seen = torch.from_numpy(rng.random(logits.shape) < 0.3)
    params = [SamplingParams(max_tokens=1, **draw(settings)) for _ in range(rows)]
    return torch.from_numpy(logits).to(dtype), torch.from_numpy(uniform), seen, params, words


def processed(logits, seen, params):
    """One row's logits after penalty and temperature, as numbers."""
    penalty = params.repetition_penalty
    changed = [(x / penalty if x > 0 else x * penalty) if s else x for x, s in zip(logits, seen, strict=True)]
    return [x / (params.temperature or 1) for x in changed]


def kept_mass(x, k, p):
    """Mass of the tokens that top-k and then top-p keep, in plain Python, of those that top-k keeps."""
    x = sorted(x, reverse=True)[: k if k > 0 else None]
    weights = [math.exp(v - x[0]) for v in x]
    mass, total = 0.0, sum(weights)
    for w in weights:
        mass += w / total
        if p < 1 and mass >= p:
            break
    return mass


@cases(250)
@given(draws(), st.sampled_from(["processed_logprobs", "raw_logprobs"]), st.randoms(use_true_random=False))
def test_a_draw_is_of_a_token_that_the_settings_allow(drawn, mode, random):
    logits, uniform, seen, params, words = drawn
    tokens, log_probs = Sampler(params, words, mode)(logits, uniform, seen)
    assert tokens.dtype == torch.long and log_probs.dtype == torch.float32
    for i, p in enumerate(params):
        row, token = logits[i, :words].tolist(), int(tokens[i])
        assert 0 <= token < words and row[token] > -math.inf
        x = processed(row, seen[i, :words].tolist(), p)
        higher = [v for v in x if v > x[token]]
        if p.temperature == 0:
            assert not higher
        near = 1e-6 * max(1.0, max(abs(v) for v in x + row if v > -math.inf))
        clearly = [v for v in higher if v > x[token] + near]
        # No more tokens before it than top-k lets pass, and less mass than top-p asks for.
        assert p.top_k <= 0 or len(clearly) < p.top_k
        top = sorted(x, reverse=True)[: p.top_k if p.top_k > 0 else None]
        total = sum(math.exp(v - top[0]) for v in top)
        # The filters hold for greedy rows, too: the most probable token is always kept.
        assert p.top_p == 1 or sum(math.exp(v - top[0]) for v in clearly) / total < p.top_p + 1e-5 or not clearly
        source = row if mode == "raw_logprobs" else top
        best = max(source)
        chosen = row[token] if mode == "raw_logprobs" else x[token]
        log_p = chosen - best - math.log(sum(math.exp(v - best) for v in source))
        if mode == "processed_logprobs":
            bounds = [log_p - math.log(kept_mass(x, p.top_k, q)) for q in (min(p.top_p + 1e-5, 1.0), p.top_p - 1e-5)]
        else:
            bounds = [log_p, log_p]
        assert min(bounds) - 1e-4 - 10 * near <= float(log_probs[i]) <= max(bounds) + 1e-4 + 10 * near
    # Each row draws what it draws alone, in any order, and after others have left the batch.
    alone = [Sampler([p], words, mode)(*(x[i : i + 1] for x in (logits, uniform, seen))) for i, p in enumerate(params)]
    assert [int(t) for t, _ in alone] == tokens.tolist()
    assert [float(x) for _, x in alone] == pytest.approx(log_probs.tolist(), 1e-6, 1e-6)
    keep = random.sample(range(len(params)), random.randint(1, len(params)))
    sampler = Sampler(params, words, mode)
    sampler.select(torch.tensor(keep))
    found = sampler(logits[keep], uniform[keep], seen[keep])
    assert found[0].tolist() == tokens[keep].tolist()
    assert found[1].tolist() == pytest.approx(log_probs[keep].tolist(), 1e-6, 1e-6)


@cases(100)
@given(draws(), st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans())
def test_a_model_that_gives_no_numbers_is_named(drawn, bad, everywhere):
    logits, uniform, seen, params, words = drawn
    row = len(params) // 2
    logits[row, : None if everywhere else 1] = bad
    logits[row, words:] = 0
    if bad == -math.inf and not everywhere and logits[row, 1:words].isfinite().any():
        # One token is impossible.
        assert int(Sampler(params, words)(logits, uniform, seen)[0][row]) != 0
        return
    with pytest.raises(ValueError, match="logits of 1 of .* have diverged"):
        Sampler(params, words)(logits, uniform, seen)


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2),
    st.sampled_from([10**400, -(10**400), 1e-45, 1e-320, 0, -1, 1, 2**63, [-1], ["a"], {}, {"a": 1}]),
)  # fmt: skip


@cases(400)
@given(
    st.dictionaries(
        st.one_of(st.sampled_from([*(f.name for f in fields(SamplingParams)), *NEUTRAL]), st.text(max_size=4)),
        anything,
        max_size=3,
    ).filter(lambda sent: sent.get("max_tokens", 1) is not None)
)
@example({"top_p": 1e-50})
@example({"temperature": 1e-42})
@example({"temperature": math.inf})
@example({"temperature": "1"})
@example({"top_k": 2.5})
@example({"top_k": 10**30})
@example({"stop_token_ids": 5})
@example({"repetition_penalty": 1e-45})
def test_a_request_is_refused_by_name_or_draws(sent):
    try:
        params = SamplingParams.parse({"max_tokens": 3} | sent)
    except ValueError as e:
        assert any(name in str(e) for name in sent), e
        return
    # Nothing was rounded.
    for name, value in sent.items():
        if value is not None and name not in NEUTRAL and name != "logprobs":
            assert (list if name == "stop_token_ids" else type(value))(getattr(params, name)) == value
    logits = torch.tensor([[0.5, -2.0, 30.0, -torch.inf, 9.0]])
    token, log_prob = Sampler([params], 4)(logits, torch.tensor([0.5], dtype=torch.float64), logits > 0)
    assert int(token) < 3 and -math.inf < float(log_prob) <= 0
    # Settings of one row are no other's.
    other = SamplingParams(max_tokens=1)
    both = Sampler([other, params], 4)(logits.repeat(2, 1), torch.tensor([0.5, 0.5], dtype=torch.float64),
                                       (logits > 0).repeat(2, 1))  # fmt: skip
    assert int(both[0][1]) == int(token) and both[0][0] == 2


keys = st.recursive(
    st.one_of(st.integers(), st.text(max_size=3)), lambda x: st.lists(x, max_size=3).map(tuple), max_leaves=4
).map(lambda key: key if isinstance(key, tuple) else (key,))


@cases(200)
@given(keys, keys, st.integers(0, 40), st.integers(0, 40))
def test_random_numbers_are_their_keys(key, other, a, b):
    found, more = uniforms(key, min(a, b)), uniforms(key, max(a, b))
    assert np.array_equal(found, more[: len(found)]) and ((0 <= more) & (more < 1)).all()
    assert (key == other) or not len(more) or not np.array_equal(uniforms(other, len(more)), more)


@pytest.fixture(scope="module")
def model():
    """A random model of one layer, whose next token depends on the prompt."""
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=8, max_position_embeddings=64)
    config = Qwen3Config(vocab_size=VOCABULARY, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, **shape)
    model = Qwen3ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(20)
    return model.requires_grad_(False)


@cases(15)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
            settings,
            st.integers(1, 8),
            st.booleans(),
            st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=7,
    )
)
def test_a_response_is_what_its_request_gives_alone(model, drawn):
    requests = [
        Request(prompt, SamplingParams(n, ignore_eos=ignore, stop_token_ids=tuple(stop), **chosen), ("key", key))
        for prompt, chosen, n, ignore, stop, key in drawn
    ]
    found = generate(model, requests, eos_token_ids=EOS, vocab_size=VOCABULARY)
    for request, response in zip(requests, found, strict=True):
        tokens, log_probs = plain(model, request)
        assert response.token_ids == tokens and not response.aborted
        # Temperatures near 0 magnify the rounding of the cache, or leave one token.
        if request.params.temperature == 0 or request.params.temperature > 0.1:
            assert response.log_probs == pytest.approx(log_probs, abs=1e-3)


# Weights --------------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 5), max_size=3)


@cases(150)
@given(
    st.lists(st.tuples(shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.int64])), max_size=8),
    st.integers(0, 300),
    st.booleans(),
    st.sampled_from([None, torch.bfloat16]),
)
def test_buckets_hold_all_weights_in_order(tensors, limit, wanted, dtype):
    weights = [(str(i), torch.full(shape, i, dtype=kind)) for i, (shape, kind) in enumerate(tensors)]
    read = []

    async def buckets():
        source = (read.append(name) or (name, tensor) for name, tensor in weights)
        return [bucket async for bucket in in_buckets(source, limit, wanted=wanted, dtype=dtype)]

    found = asyncio.run(buckets())
    assert read == [name for name, _ in weights]
    assert [last for _, last in found] == ([False] * (len(found) - 1) + [True] if wanted else [])
    flat = [item for bucket, _ in found for item in bucket]
    assert [name for name, _ in flat] == (read if wanted else [])
    for (_, a), (_, b) in zip(flat, weights, strict=False):
        assert torch.equal(a, b.to(dtype or b.dtype))
    for bucket, _ in found:
        assert len(bucket) <= 1 or sum(t.nbytes for _, t in bucket) <= limit
