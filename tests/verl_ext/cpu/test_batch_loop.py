"""The batch agent-loop manager writes the same rows as verl's own worker, and refuses unsupported settings.

No Ray: servers, reward workers and TransferQueue are stand-ins that answer at once.
"""

import asyncio
import types
from collections import defaultdict

import numpy as np
import pytest
import ray
import torch
import transfer_queue
from tensordict import TensorDict
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.utils import tensordict_utils as tu
from verl.workers.rollout import replica as verl_replica

from verl_ext.cpu.rollout.batch_loop import BatchAgentLoopManager, _reward_batch, _rows
from verl_ext.cpu.rollout.server import TokenOutput

QUESTIONS = ["1+2=?", "3+3+3=?", "4=?"]


def respond(prompt_ids, which):
    """Tokens that tell the prompt and which of its responses it is."""
    return [4 + (sum(prompt_ids) + which) % 10] * (1 + which) + [1]


class Queue:
    """TransferQueue's client: what was put, by partition and key."""

    def __init__(self, monkeypatch):
        self.fields = defaultdict(dict)
        self.tags = defaultdict(lambda: defaultdict(dict))
        self.puts = []

        async def async_kv_batch_put(**kwargs):
            self.put(**kwargs)

        async def async_kv_put(key, partition_id, tag):
            self.put(keys=[key], partition_id=partition_id, tags=[tag])

        monkeypatch.setattr(transfer_queue, "init", lambda *args: None)
        monkeypatch.setattr(transfer_queue, "kv_batch_put", self.put)
        monkeypatch.setattr(transfer_queue, "async_kv_batch_put", async_kv_batch_put)
        monkeypatch.setattr(transfer_queue, "async_kv_put", async_kv_put)

    def put(self, keys, partition_id, tags, fields=None):
        self.puts.append(list(keys))
        for i, (key, tag) in enumerate(zip(keys, tags, strict=True)):
            self.tags[partition_id][key].update(tag)
            if fields is not None:
                self.fields[partition_id][key] = {name: fields[name][i] for name in fields.keys()}


class Actor:
    """A Ray actor's handle whose calls are made at once; an answer is a value, an exception, or a coroutine."""

    def __init__(self, **methods):
        self.calls = []
        for name, function in methods.items():
            setattr(self, name, types.SimpleNamespace(remote=self._remote(name, function)))

    def _remote(self, name, function):
        def remote(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            try:
                return function(*args, **kwargs)
            except Exception as e:
                return e

        return remote


def score(data):
    """Reward of one row, from everything that verl's reward managers look at."""
    assert len(data) == 1
    item = data[0]
    length = item.batch["responses"].shape[-1]
    mask = item.batch["attention_mask"]
    response = item.batch["responses"][: int(mask[-length:].sum())]
    prompt = item.batch["prompts"][mask[:-length].bool()]
    assert torch.equal(prompt, item.batch["prompts"][-len(prompt) :])
    if "broken" in item.non_tensor_batch["reward_model"]["ground_truth"]:
        raise ArithmeticError("no such answer")
    value = float(response.sum() + prompt.sum()) + item.non_tensor_batch["__num_turns__"]
    return {"reward_score": value, "reward_extra_info": {"acc": value, "source": item.non_tensor_batch["data_source"]}}


def reward_worker():
    def scores(data):
        def one(row):
            try:
                return score(row)
            except ArithmeticError as e:
                return e

        return [one(data[i : i + 1]) for i in range(len(data))]

    return Actor(compute_score=score, compute_scores=scores)


def generation_server(fail=(), alike=False):
    """Answers ``respond``; ``alike``: without regard to which of a prompt's responses it is."""

    def which(stream):
        return 0 if alike else stream[1]

    def generate_batch(requests):
        return [
            RuntimeError("out of luck")
            if tuple(prompt) in fail
            else TokenOutput(
                token_ids=respond(prompt, which(stream)),
                log_probs=[-0.5] * (2 + which(stream)) if params["logprobs"] else None,
                stop_reason="completed",
                extra_fields={"global_steps": 6},
            )
            for prompt, params, stream in requests
        ]

    return Actor(generate_batch=generate_batch)


@pytest.fixture
def queue(monkeypatch):
    return Queue(monkeypatch)


@pytest.fixture
def config(hf_config):
    return lambda *overrides: hf_config(
        "actor_rollout_ref.rollout.n=3",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "data.max_prompt_length=30",
        "data.max_response_length=3",
        *overrides,
    )


@pytest.fixture
def make(config, queue, monkeypatch):
    def manager(*overrides, servers=None, rewards=None):
        made = config(*overrides)
        servers = servers or [generation_server()]
        handles = {f"hf_server_{i}_0": server for i, server in enumerate(servers)}
        monkeypatch.setattr(ray, "get_actor", handles.__getitem__)

        def get(answer):
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(ray, "get", get)
        return BatchAgentLoopManager.create(
            config=made,
            llm_client=None,
            teacher_client=None,
            reward_loop_worker_handles=[reward_worker()] if rewards is None else rewards,
        )

    return manager


def questions(texts=QUESTIONS, **columns) -> TensorDict:
    """A batch as verl's trainer makes it of the data set's columns."""

    def objects(values):
        return np.fromiter(values, dtype=object)

    batch = {
        "dummy_tensor": torch.zeros(len(texts), 1, dtype=torch.uint8),
        "raw_prompt": objects([[{"role": "user", "content": text}] for text in texts]),
        "uid": objects([f"uid{i}" for i in range(len(texts))]),
        "index": objects(list(range(len(texts)))),
        "data_source": objects(["toy"] * len(texts)),
        "reward_model": objects([{"style": "rule", "ground_truth": text} for text in texts]),
        "extra_info": objects([{"index": i} for i in range(len(texts))]),
        "tools_kwargs": objects([{}] * len(texts)),
        **{name: objects(values) for name, values in columns.items()},
    }
    made = tu.get_tensordict(batch)
    tu.assign_non_tensor_data(made, "global_steps", 7)
    return made


def as_verl_writes(config, queue, batch, reward):
    """Let verl's own worker and agent loop write the same responses into the queue."""

    class Client:
        async def generate(self, request_id, *, prompt_ids, sampling_params, **kwargs):
            return verl_replica.TokenOutput(
                token_ids=respond(prompt_ids, 0),
                log_probs=[-0.5] * 2 if sampling_params["logprobs"] else None,
                stop_reason="completed",
                extra_fields={"global_steps": 6, "min_global_steps": 6, "max_global_steps": 6},
            )

    async def compute_score(data):
        return score(data)

    async def go():
        worker_class = AgentLoopWorkerTQ.__ray_metadata__.modified_class
        handles = [Actor(compute_score=compute_score)] if reward else None
        worker = worker_class(config, Client(), None, handles)
        await worker.generate_sequences(batch)
        await asyncio.gather(*worker.background_tasks)

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(go())
    finally:
        loop.close()


def comparable(value):
    """Without what differs from run to run: the seconds in ``metrics``."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.tolist())
    value = getattr(value, "data", value)
    if isinstance(value, dict) and "generate_sequences" in value:
        return {name: type(seconds) for name, seconds in value.items()}
    return value


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("reward", [True, False])
@pytest.mark.parametrize("log_probs", [True, False])
def test_it_writes_what_verl_writes(make, config, monkeypatch, queue, validate, reward, log_probs):
    overrides = [f"actor_rollout_ref.rollout.calculate_log_probs={log_probs}"]
    overrides += ["actor_rollout_ref.rollout.val_kwargs.n=2"]
    manager = make(*overrides, servers=[generation_server(alike=True)])  # verl's order of responses is random
    if not reward:
        manager.reward_workers = None
    batches = [questions(), questions()]
    if validate:
        for batch in batches:
            tu.assign_non_tensor_data(batch, "validate", True)
    manager.generate_sequences(batches[0])
    verls = Queue(monkeypatch)
    as_verl_writes(config(*overrides), verls, batches[1], reward)

    partition = "val" if validate else "train"
    assert set(queue.tags) == set(verls.tags) == {partition}
    assert queue.tags[partition] == verls.tags[partition]
    assert len(queue.fields[partition]) == len(QUESTIONS) * (2 if validate else 3)
    assert set(queue.fields[partition]) == set(verls.fields[partition])
    for key, expected in verls.fields[partition].items():
        got = queue.fields[partition][key]
        assert set(got) == set(expected)
        for name in expected:
            assert comparable(got[name]) == comparable(expected[name]), (key, name)


def test_one_request_one_reward_call_two_puts(make, queue):
    server, worker = generation_server(), reward_worker()
    make(servers=[server], rewards=[worker]).generate_sequences(questions())
    assert len(server.calls) == len(worker.calls) == 1
    assert [len(keys) for keys in queue.puts] == [9, 3]


def test_servers_and_reward_workers_share_the_work(make, queue):
    servers, workers = [generation_server(), generation_server()], [reward_worker(), reward_worker()]
    make("trainer.n_gpus_per_node=2", servers=servers, rewards=workers).generate_sequences(questions())
    assert [len(s.calls[0][1][0]) for s in servers] == [5, 4]
    assert [len(w.calls[0][1][0]) for w in workers] == [5, 4]
    assert len(queue.fields["train"]) == 9


def test_servers_answer_alike_whatever_their_number(make, queue):
    make("trainer.n_gpus_per_node=2", servers=[generation_server(), generation_server()]).generate_sequences(
        questions()
    )
    two = {key: field["responses"].tolist() for key, field in queue.fields["train"].items()}
    make().generate_sequences(questions())
    assert two == {key: field["responses"].tolist() for key, field in queue.fields["train"].items()}


def test_streams_of_equal_prompts_differ_and_start_anew_with_each_step(make):
    server = generation_server()
    manager = make(servers=[server])

    def streams(step, validate=False):
        batch = questions(["1+2=?", "1+2=?"])
        tu.assign_non_tensor_data(batch, "global_steps", step)
        if validate:
            tu.assign_non_tensor_data(batch, "validate", True)
        manager.generate_sequences(batch)
        return [stream for _, _, stream in server.calls[-1][1][0]]

    first = streams(7)
    assert first == [(False, k) for k in range(6)]
    assert streams(7) == [(False, k) for k in range(6, 12)]  # a refill within the step
    assert streams(8) == first
    assert streams(8, validate=True) == [(True, 0), (True, 1)]


def test_a_failed_response_fails_its_question_alone(make, queue):
    ids = make().agent.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[1]}], add_generation_prompt=True, return_dict=False
    )
    make(servers=[generation_server(fail={tuple(ids)})]).generate_sequences(questions())
    tags = queue.tags["train"]
    assert [tags[f"uid{i}"]["status"] for i in range(3)] == ["finished", "failure", "finished"]
    assert {key.split("_")[0] for key in queue.fields["train"]} == {"uid0", "uid2"}


def test_a_failed_reward_fails_its_question_alone_and_is_asked_for_once(make, queue):
    worker = reward_worker()
    make(rewards=[worker]).generate_sequences(questions(["1+2=?", "broken", "4=?"]))
    assert [(name, len(data)) for name, (data,), _ in worker.calls] == [("compute_scores", 9)]
    tags = queue.tags["train"]
    assert [tags[f"uid{i}"]["status"] for i in range(3)] == ["finished", "failure", "finished"]
    assert len(queue.fields["train"]) == 6


def test_when_everything_fails_the_run_stops_with_the_error(make, queue, caplog):
    def dead(requests):
        raise ConnectionError("actor died")

    with pytest.raises(RuntimeError, match="all 9 responses failed") as error:
        make(servers=[Actor(generate_batch=dead)]).generate_sequences(questions())
    assert isinstance(error.value.__cause__, ConnectionError) and not queue.puts
    assert caplog.text.count("9 of 9 responses failed with this error") == 1
    refill = make("trainer.v1.sampler.sync_refill_failed_groups=True", servers=[Actor(generate_batch=dead)])
    refill.generate_sequences(questions())
    assert {tag["status"] for tag in queue.tags["train"].values()} == {"failure"}


def test_a_dead_reward_worker_fails_the_questions_it_had(make, queue):
    def dead(data):
        raise ConnectionError("actor died")

    make(rewards=[reward_worker(), Actor(compute_scores=dead)]).generate_sequences(questions())
    tags = queue.tags["train"]
    assert [tags[f"uid{i}"]["status"] for i in range(3)] == ["finished", "failure", "failure"]


def test_a_dead_server_fails_the_questions_it_had(make, queue):
    def dead(requests):
        raise ConnectionError("actor died")

    servers = [generation_server(), Actor(generate_batch=dead)]
    make("trainer.n_gpus_per_node=2", servers=servers).generate_sequences(questions())
    tags = queue.tags["train"]
    assert [tags[f"uid{i}"]["status"] for i in range(3)] == ["finished", "failure", "failure"]
    assert sorted(queue.fields["train"]) == ["uid0_0_0", "uid0_1_0", "uid0_2_0", "uid1_0_0", "uid1_1_0"]


def test_sampling_settings_of_training_validation_and_greedy_baselines(make):
    server = generation_server()
    manager = make(
        "actor_rollout_ref.rollout.temperature=0.6",
        "actor_rollout_ref.rollout.val_kwargs.temperature=0.3",
        "actor_rollout_ref.rollout.val_kwargs.top_p=0.95",
        servers=[server],
    )
    manager.generate_sequences(questions(__rollout_n__=[1, 2, 1], __do_sample__=[True, True, False]))
    params = [p for _, p, _ in server.calls[-1][1][0]]
    assert [p["temperature"] for p in params] == [0.6, 0.6, 0.6, 0]
    assert all(set(p) == {"temperature", "top_p", "top_k", "repetition_penalty", "logprobs"} for p in params)
    batch = questions()
    tu.assign_non_tensor_data(batch, "validate", True)
    manager.generate_sequences(batch)
    assert {(p["temperature"], p["top_p"]) for _, p, _ in server.calls[-1][1][0]} == {(0.3, 0.95)}


def test_long_prompts_are_cut_on_the_left_as_verl_does(make, queue):
    make("actor_rollout_ref.rollout.prompt_length=4").generate_sequences(questions(["123456=?"]))
    assert {len(f["prompts"]) for f in queue.fields["train"].values()} == {4}
    assert all(f["prompts"][-1] == 3 for f in queue.fields["train"].values())  # the generation prompt stays


@pytest.mark.parametrize(
    "override",
    [
        "actor_rollout_ref.rollout.name=vllm",
        "trainer.v1.trainer_mode=colocate_async",
        "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
        "actor_rollout_ref.rollout.agent.agent_loop_config_path=x.yaml",
        "actor_rollout_ref.rollout.multi_turn.enable=True",
        "actor_rollout_ref.rollout.multi_turn.tool_config_path=t.yaml",
        "actor_rollout_ref.rollout.multi_turn.function_tool_path=t.py",
        "distillation.enabled=True",
    ],
)
def test_refusals(make, override):
    with pytest.raises(ValueError, match=rf"{override} does not work with .*agent_loop_manager_class=null"):
        make(override)


def test_other_agents_in_the_data_set_are_refused(make):
    with pytest.raises(ValueError, match="agent_name=single_turn_agent only; the data set asks for tool_agent"):
        make().generate_sequences(questions(agent_name=["single_turn_agent", "tool_agent", "tool_agent"]))


def test_reward_workers_see_each_row_as_if_alone(make):
    """Padding of the batch must not reach what a reward manager takes out of it."""
    manager = make()
    samples = manager._samples(_rows(questions()), validate=False)
    outputs = [
        manager._agent_output(s, TokenOutput(respond(s.prompt_ids, s.stream[1]), extra_fields={})) for s in samples
    ]
    together = _reward_batch(samples, outputs)
    for i in range(len(samples)):
        alone = _reward_batch(samples[i : i + 1], outputs[i : i + 1])
        assert score(together[i : i + 1]) == score(alone)
