"""The rollout server without Ray: batching, random streams, weights, life cycle, errors."""

import asyncio
import dataclasses
import types

import numpy as np
import pytest
import torch
from decoding import plain

from verl_ext.cpu.rollout import adapter as adapter_module
from verl_ext.cpu.rollout import server as server_module
from verl_ext.cpu.rollout.adapter import HFServerAdapter
from verl_ext.cpu.rollout.generate import Request
from verl_ext.cpu.rollout.sampling import SamplingParams
from verl_ext.cpu.rollout.server import HFServer, ServerSpec

PARAMS = {"temperature": 0.9, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}


@pytest.fixture
def spec(model, model_path) -> ServerSpec:
    return ServerSpec(
        model_path=model_path,
        hf_config=model.config,
        attn_implementation="sdpa",
        dtype="float32",
        device="cpu",
        load_format="auto",
        trust_remote_code=False,
        eos_token_ids=[1, 2],
        vocab_size=23,
        prompt_length=16,
        response_length=12,
        max_model_len=40,
        max_num_seqs=64,
        seed=7,
        replica_rank=0,
        ignore_eos=False,
        repetition_penalty=1.0,
        logprobs_mode="processed_logprobs",
        release_memory=False,
    )


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, timeout=60))


async def gather(server, prompts, **others):
    return await asyncio.gather(*(server.generate(p, dict(PARAMS), request_id="r", **others) for p in prompts))


def tokens(outputs):
    return [tuple(o.token_ids) for o in outputs]


def ask(spec, prompts, version=0, **others):
    async def go():
        server = HFServer(spec)
        await server.set_global_steps(version)
        return tokens(await gather(server, prompts, **others))

    return run(go())


def test_answers_are_the_models(spec, model):
    async def go():
        server = HFServer(spec)
        await server.set_global_steps(3)
        return await server.generate([5, 6, 7], dict(PARAMS), request_id="r", image_data=None, video_data=None)

    output = run(go())
    key = ("server", 7, 0, 3, 0, (5, 6, 7))
    expected = plain(model, Request([5, 6, 7], SamplingParams(12, temperature=0.9), key))
    assert output.token_ids == expected[0]
    np.testing.assert_allclose(output.log_probs, expected[1], atol=1e-5)
    assert output.stop_reason == "completed" and output.extra_fields == {"global_steps": 3}


def test_log_probs_only_when_asked_for(spec):
    assert run(HFServer(spec).generate([5], PARAMS | {"logprobs": False})).log_probs is None


def test_requests_are_batched_up_to_max_num_seqs(spec, monkeypatch):
    sizes = []

    def spy(model, requests, **kwargs):
        sizes.append(len(requests))
        return original(model, requests, **kwargs)

    original = server_module.generate
    monkeypatch.setattr(server_module, "generate", spy)
    prompts = [[5, i] for i in range(3, 13)]
    whole = ask(spec, prompts)
    assert sizes == [10]
    sizes.clear()
    assert ask(dataclasses.replace(spec, max_num_seqs=4), prompts) == whole
    assert sizes == [4, 4, 2]


def test_a_run_repeats_itself_whatever_the_order_of_arrival(spec):
    prompts = [[5, 6]] * 4 + [[7]] * 4
    first, again = ask(spec, prompts), ask(spec, prompts[::-1])[::-1]
    # Equal prompts are interchangeable: the same responses, to whichever of them.
    assert sorted(first[:4]) == sorted(again[:4]) and sorted(first[4:]) == sorted(again[4:])
    assert len(set(first[:4])) > 1
    assert ask(dataclasses.replace(spec, seed=8), prompts) != first


def test_a_resumed_run_continues_as_an_uninterrupted_one(spec):
    prompts = [[5, 6]] * 4

    async def uninterrupted():
        server = HFServer(spec)
        responses = []
        for version in range(3):
            await server.set_global_steps(version)
            responses.append(tokens(await gather(server, prompts)))
        return responses

    whole = run(uninterrupted())
    assert len({tuple(r) for r in whole}) == 3
    assert ask(spec, prompts, version=2) == whole[2]


def test_servers_draw_different_numbers_unless_the_client_says_which(spec):
    prompts, other = [[5, 6]] * 4, dataclasses.replace(spec, replica_rank=1)
    assert ask(spec, prompts) != ask(other, prompts)
    assert ask(spec, prompts, stream=(False, 3)) == ask(other, prompts, stream=(False, 3))
    assert ask(spec, prompts, stream=(False, 3)) != ask(spec, prompts, stream=(True, 3))


def test_a_seed_in_the_request_alone_decides(spec):
    async def go(version):
        server = HFServer(spec)
        await server.set_global_steps(version)
        return await asyncio.gather(*(server.generate([5, 6], PARAMS | {"seed": 11}) for _ in range(2)))

    assert len(set(tokens(run(go(0))) + tokens(run(go(5))))) == 1


@pytest.mark.parametrize(
    "prompt_length, asked, limit",
    [(4, {}, 12), (20, {}, 8), (4, {"max_tokens": 3}, 3), (4, {"max_new_tokens": 3}, 3), (38, {"max_tokens": 9}, 2)],
)
def test_longest_response(spec, prompt_length, asked, limit):
    output = run(HFServer(spec).generate([5] * prompt_length, PARAMS | {"ignore_eos": True} | asked))
    assert len(output.token_ids) == limit


def test_ignore_eos_of_the_configuration(spec):
    responses = ask(dataclasses.replace(spec, ignore_eos=True), [[5, i] for i in range(3, 20)])
    assert {len(r) for r in responses} == {12} and any(1 in r or 2 in r for r in responses)


@pytest.mark.parametrize(
    "prompt, others, message",
    [
        ([5] * 40, {}, "a prompt of 40 tokens.*rollout.max_model_len=40"),
        ([], {}, "a prompt of 0 tokens"),
        ([5], {"image_data": ["x"]}, "cannot use image_data"),
    ],
)
def test_refused_requests(spec, prompt, others, message):
    with pytest.raises(ValueError, match=message):
        run(HFServer(spec).generate(prompt, dict(PARAMS), **others))


def test_one_bad_request_of_a_batch_fails_alone(spec):
    requests = [([5], PARAMS, ("a",)), ([6], PARAMS | {"min_p": 0.5}, ("b",)), ([7], PARAMS, ("c",))]
    good, bad, also_good = run(HFServer(spec).generate_batch(requests))
    assert isinstance(bad, ValueError) and good.token_ids and also_good.token_ids


def test_an_error_while_decoding_reaches_every_request_of_the_batch_and_no_later_one(spec, monkeypatch):
    def broken(*args, **kwargs):
        raise FloatingPointError("logits are NaN")

    original = server_module.generate

    async def go():
        server = HFServer(spec)
        monkeypatch.setattr(server_module, "generate", broken)
        failed = await server.generate_batch([([5], PARAMS, ("a",)), ([6], PARAMS, ("b",))])
        monkeypatch.setattr(server_module, "generate", original)
        return failed, await server.generate([5], dict(PARAMS))

    failed, later = run(go())
    assert [str(e) for e in failed] == ["logits are NaN"] * 2 and later.token_ids


# ------------------------------------------------------------------------------------------------------------- weights


class Remote:
    """``server.method.remote(...)`` without Ray."""

    def __init__(self, server):
        self.server = server

    def __getattr__(self, name):
        return types.SimpleNamespace(remote=getattr(self.server, name))


def adapter(server, monkeypatch, rank="0", ranks=1, megabytes=16, dtype="float32", **config):
    monkeypatch.setenv("RANK", rank)
    settings = types.SimpleNamespace(
        tensor_model_parallel_size=ranks,
        dtype=dtype,
        free_cache_engine=True,
        checkpoint_engine=types.SimpleNamespace(update_weights_bucket_megabytes=megabytes),
        **config,
    )
    made = HFServerAdapter(settings, types.SimpleNamespace(), None)
    if made.is_leader_rank:
        made._server = Remote(server)
    return made


def new_weights(model):
    torch.manual_seed(9)
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("buckets", [1, "many"])
def test_weights_of_the_trainer_arrive(spec, model, monkeypatch, dtype, buckets):
    server = HFServer(dataclasses.replace(spec, load_format="dummy", dtype=dtype))
    weights = new_weights(model)
    calls = []
    write = server._write
    monkeypatch.setattr(server, "_write", lambda names, *rest: (calls.append(names), write(names, *rest)))
    sender = adapter(server, monkeypatch, megabytes=16 if buckets == 1 else 0, dtype=dtype)
    run(sender.update_weights(iter(weights.items()), global_steps=4))
    assert len(calls) == (1 if buckets == 1 else len(weights))
    for name, parameter in server.model.named_parameters():
        assert torch.equal(parameter, weights[name].to(parameter.dtype)), name
    assert server.global_steps == 4
    assert server.model.lm_head.weight is server.model.model.embed_tokens.weight


def test_weights_in_numbers_are_used_at_once(spec, model, monkeypatch):
    """Generation after an update is by the new weights: as of a model that has them from the start."""
    fresh = type(model)(model.config).eval()
    with torch.no_grad():
        for name, value in new_weights(model).items():
            fresh.get_parameter(name).copy_(value)

    async def go():
        server = HFServer(spec)
        before = await server.generate([5, 6], PARAMS | {"temperature": 0})
        sender = adapter(server, monkeypatch)
        await sender.update_weights(iter(new_weights(model).items()), global_steps=1)
        return before, await server.generate([5, 6], PARAMS | {"temperature": 0})

    before, after = run(go())
    greedy = SamplingParams(12, temperature=0)
    assert before.token_ids == plain(model, Request([5, 6], greedy, ()))[0]
    assert after.token_ids == plain(fresh, Request([5, 6], greedy, ()))[0] != before.token_ids


def test_both_names_of_tied_weights_and_asynchronous_iterators_are_fine(spec, model, monkeypatch):
    weights = new_weights(model)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    async def stream():
        for item in weights.items():
            yield item

    server = HFServer(spec)
    run(adapter(server, monkeypatch).update_weights(stream()))
    assert torch.equal(server.model.lm_head.weight, weights["lm_head.weight"])


def test_every_rank_runs_through_the_weights_and_one_of_a_replica_sends_them(spec, model, monkeypatch):
    """Reading a weight is a collective: a rank that stopped early would hang the others."""
    read = []

    def stream():
        for item in new_weights(model).items():
            read.append(item[0])
            yield item

    second = adapter(None, monkeypatch, rank="1", ranks=2)
    assert not second.is_leader_rank
    run(second.update_weights(stream(), global_steps=1))
    assert len(read) == len(new_weights(model))
    assert [adapter(None, monkeypatch, rank=r, ranks=2).replica_rank for r in "0123"] == [0, 0, 1, 1]
    assert [adapter(None, monkeypatch, rank=r).replica_rank for r in "0123"] == [0, 1, 2, 3]


def test_weights_that_do_not_fit_are_named(spec, model, monkeypatch):
    weights = new_weights(model)
    sender = adapter(HFServer(spec), monkeypatch)
    left_out = {n: w for n, w in weights.items() if n != "model.norm.weight"}
    with pytest.raises(ValueError, match="leave out 1 parameters: .'model.norm.weight'"):
        run(sender.update_weights(iter(left_out.items())))
    with pytest.raises(ValueError, match="Qwen3ForCausalLM does not have: .'visual.weight'"):
        run(sender.update_weights(iter([("visual.weight", torch.zeros(3))])))


def test_adapters_and_differences_are_refused(monkeypatch):
    sender = adapter(None, monkeypatch)
    with pytest.raises(ValueError, match="set model.lora.merge=True"):
        run(sender.update_weights(iter(()), peft_config={"r": 8}))
    with pytest.raises(ValueError, match="not delta_flush"):
        run(sender.update_weights(iter(()), wire_format="delta_flush"))


def test_no_generation_without_complete_weights(spec, model):
    dummy, half = HFServer(dataclasses.replace(spec, load_format="dummy")), HFServer(spec)
    data = model.model.norm.weight.numpy().view(np.uint8)
    run(half.update_weights(["model.norm.weight"], [(32,)], data, first=True, last=False))
    for server in (dummy, half):
        (error,) = run(server.generate_batch([([5], PARAMS, ("a",))]))
        assert "has not sent this server all weights" in str(error)


def test_adapter_finds_the_server_by_the_replicas_name(monkeypatch):
    asked = []
    monkeypatch.setattr(adapter_module.ray, "get_actor", lambda name: asked.append(name))
    made = adapter(None, monkeypatch, rank="3", ranks=2)
    made._server = None
    assert made.server is None and asked == ["hf_server_1_0"]


# ---------------------------------------------------------------------------------------------------------- life cycle


def test_abort_returns_partial_responses_and_holds_new_requests_until_resumed(spec, monkeypatch):
    async def go():
        server = HFServer(dataclasses.replace(spec, max_num_seqs=2, ignore_eos=True))
        started = asyncio.Event()
        loop = asyncio.get_running_loop()
        original = server_module.generate

        def slow(model, requests, *, should_stop, **kwargs):
            loop.call_soon_threadsafe(started.set)
            while not should_stop():  # the abort comes before the second token
                pass
            return original(model, requests, should_stop=should_stop, **kwargs)

        monkeypatch.setattr(server_module, "generate", slow)
        running = [asyncio.create_task(server.generate([5, i], dict(PARAMS))) for i in (3, 4, 5)]
        await started.wait()
        report = await server.abort_all_requests()
        aborted = await asyncio.gather(*running)
        monkeypatch.setattr(server_module, "generate", original)
        late = asyncio.create_task(server.generate([5], dict(PARAMS)))
        await asyncio.sleep(0.05)
        held = not late.done()
        await server.resume_generation()
        return report, aborted, held, await late

    report, aborted, held, late = run(go())
    assert report["aborted_count"] == 3
    assert [o.stop_reason for o in aborted] == ["aborted"] * 3
    assert [len(o.token_ids) for o in aborted] == [1, 1, 0]
    assert held and late.stop_reason == "completed" and len(late.token_ids) == 12


def test_rejecting_server_sends_late_requests_back_at_once(spec):
    async def go():
        server = HFServer(spec)
        await server.abort_all_requests(reject_request=True)
        return await server.generate([5], dict(PARAMS))

    output = run(go())
    assert output.stop_reason == "aborted" and output.token_ids == []


def test_sleep_takes_the_weights_off_and_wake_up_brings_them_back(spec, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)

    async def go():
        server = HFServer(dataclasses.replace(spec, release_memory=True))
        moves = []
        monkeypatch.setattr(server.model, "to", lambda device: moves.append(device))
        await server.sleep()
        await server.wake_up(tags=["kv_cache"])
        asleep = (await server.generate_batch([([5], PARAMS, ("a",))]))[0]
        await server.wake_up(tags=["weights"])
        awake = (await server.generate_batch([([5], PARAMS, ("a",))]))[0]
        return moves, asleep, awake

    moves, asleep, awake = run(go())
    assert moves == ["cpu", spec.device] and "is asleep" in str(asleep) and awake.token_ids


def test_everything_that_verls_replica_calls_is_there(spec):
    async def go():
        server = HFServer(spec)
        for method in ("clear_kv_cache", "release_kv_cache", "resume_kv_cache", "sleep", "wake_up", "stop_profile"):
            await getattr(server, method)()
        await server.start_profile(profile_step=1)
        return await server.generate([5], dict(PARAMS))

    assert run(go()).token_ids
