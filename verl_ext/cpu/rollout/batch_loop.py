"""An agent-loop manager for small single-turn runs: per batch one call per server and reward worker, and one put.

verl's own manager runs each response as a task with its own calls to the server, the reward worker and TransferQueue.
That suits long responses and tools, but takes most of the time of a small run. To choose this one::

    actor_rollout_ref.rollout.name=hf
    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_ext.cpu.rollout.batch_loop.BatchAgentLoopManager

It returns when all responses are in TransferQueue, so the trainer never waits for its replay buffer's next poll (2 s).
It writes the same rows as verl's ``AgentLoopWorkerTQ`` with a ``SingleTurnAgentLoop`` (a test compares them).
"""

import logging
from collections import Counter
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import ray
import torch
from omegaconf import DictConfig
from tensordict import NonTensorData, NonTensorStack, TensorDict
from torch.nn.utils.rnn import pad_sequence
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, AgentLoopWorker, DictConfigWrap
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.protocol import DataProto
from verl.utils.model import compute_position_id_with_mask
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_ext.cpu.rollout.limits import AGENT, refuse_unsupported
from verl_ext.cpu.rollout.replica import server_name
from verl_ext.cpu.rollout.server import TokenOutput
from verl_ext.training.transfer import RowKey, put

logger = logging.getLogger(__name__)


@dataclass
class Sample:
    """A pending generation request."""

    fields: dict[str, Any]
    """The question's fields in the data set, and ``session_id``, the number of this response to it."""
    prompt_ids: list[int]
    params: dict[str, Any]
    """Sampling settings."""
    stream: tuple
    """Determines the server's random numbers, together with the prompt."""


class BatchAgentLoopManager:
    """Generate, reward and store whole batches; verl's trainer calls :meth:`create` and :meth:`generate_sequences`."""

    def __init__(
        self,
        config: DictConfig,
        llm_client: Any,
        teacher_client: Any = None,
        reward_loop_worker_handles: list[ray.actor.ActorHandle] | None = None,
    ):
        refuse_unsupported(config)
        self.rollout = config.actor_rollout_ref.rollout
        self.reward_workers = reward_loop_worker_handles
        # For verl's tokenizer, chat template and prompts; neither object ever runs a loop.
        worker = AgentLoopWorker(config, llm_client, teacher_client, reward_loop_worker_handles)
        if worker.processor is not None:
            raise ValueError(
                f"{type(self).__name__} supports text only, and the model has a {type(worker.processor).__name__}; "
                "leave rollout.agent.agent_loop_manager_class empty for verl's own manager"
            )
        self.agent = SingleTurnAgentLoop(
            trainer_config=DictConfigWrap(config),
            server_manager=llm_client,
            tokenizer=worker.tokenizer,
            processor=worker.processor,
            dataset_cls=worker.dataset_cls,
            data_config=DictConfigWrap(config.data),
            hf_model_type=worker.hf_model_type,
        )
        self.refill_failed = bool(config.trainer.v1.sampler.get("sync_refill_failed_groups", False))
        ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
        replicas = ranks // self.rollout.tensor_model_parallel_size
        self.servers = [ray.get_actor(server_name(rank)) for rank in range(replicas)]
        self._drawn: Counter[tuple[int, ...]] = Counter()
        self._drawn_in: tuple | None = None

    @classmethod
    def create(cls, *args: Any, **kwargs: Any) -> "BatchAgentLoopManager":
        return cls(*args, **kwargs)

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Generate, reward and store all responses of a batch; a question with a failed response counts as failed."""
        validate = bool(prompts["validate"]) if "validate" in prompts else False
        partition = "val" if validate else "train"
        questions = _rows(prompts)
        uids = [q["uid"] for q in questions]
        failed = self._run(self._samples(questions, validate), partition)
        tags = [{"status": "failure" if uid in failed else "finished"} for uid in uids]
        put(partition, uids, tags)

    def _run(self, samples: list[Sample], partition: str) -> set[str]:
        """Store the responses; return the uids of questions with a failed response.

        Raises:
            RuntimeError: every response failed, and verl is not set to replace failed questions.
        """
        started = perf_counter()
        outputs = self._generate(samples)
        seconds = {"generate_sequences": perf_counter() - started}
        outputs = [
            o if isinstance(o, Exception) else self._agent_output(s, o) for s, o in zip(samples, outputs, strict=True)
        ]
        good = [i for i, o in enumerate(outputs) if not isinstance(o, Exception)]
        started = perf_counter()
        rewards = self._rewards([samples[i] for i in good], [outputs[i] for i in good])
        if self.reward_workers is not None:
            seconds["compute_score"] = perf_counter() - started
        for i, reward in zip(good, rewards, strict=True):
            if isinstance(reward, Exception):
                outputs[i] = reward
            elif reward is not None:
                outputs[i].reward_score = reward["reward_score"]
                outputs[i].extra_fields["reward_extra_info"] = reward["reward_extra_info"]

        keys, fields, tags, failed, wrapped = [], [], [], set(), {}
        errors: dict[str, list[Exception]] = {}
        for sample, output in zip(samples, outputs, strict=True):
            uid, session_id = sample.fields["uid"], sample.fields["session_id"]
            if isinstance(output, Exception):
                failed.add(uid)
                errors.setdefault(repr(output), []).append(output)
                continue
            for name, value in seconds.items():
                setattr(output.metrics, name, value)
            field, tag = _row(sample.fields, output)
            keys.append(str(RowKey(uid, session_id, trajectory=0)))
            fields.append({name: _wrap(value, wrapped) for name, value in field.items()})
            tags.append(tag)
        for equal in errors.values():
            logger.error("%d of %d responses failed with this error", len(equal), len(samples), exc_info=equal[0])
        if not keys and not self.refill_failed:
            raise RuntimeError(f"all {len(samples)} responses failed") from next(iter(errors.values()))[0]
        if keys:
            put(partition, keys, tags, list_of_dict_to_tensordict(fields))
        return failed

    def _samples(self, questions: list[dict[str, Any]], validate: bool) -> list[Sample]:
        rollout = self.rollout
        source = rollout.val_kwargs if validate else rollout
        params = dict(
            temperature=source.temperature,
            top_p=source.top_p,
            top_k=source.top_k,
            repetition_penalty=1.0,
            logprobs=rollout.calculate_log_probs,
        )
        greedy = params | dict(temperature=0, top_p=1.0, top_k=-1)
        samples = []
        for question in questions:
            fields = dict(question)
            agent = fields.pop("agent_name", AGENT)
            if agent != AGENT:
                raise ValueError(f"{type(self).__name__} runs agent_name={AGENT} only; the data set asks for {agent}")
            n = int(fields.pop("__rollout_n__", source.n))
            do_sample = fields.pop("__do_sample__", True)
            # Count equal prompts within a step: the servers' random numbers depend on the count.
            now = (validate, int(fields["global_steps"]))
            if now != self._drawn_in:
                self._drawn_in = now
                self._drawn.clear()
            prompt_ids = self.agent.loop.run_until_complete(
                self.agent.ct_build_initial_tokens(list(fields["raw_prompt"]))
            )
            for session_id in range(n):
                stream = (validate, self._drawn[tuple(prompt_ids)])
                self._drawn[tuple(prompt_ids)] += 1
                settings = params if validate or do_sample else greedy
                samples.append(Sample(fields | {"session_id": session_id}, prompt_ids, settings, stream))
        return samples

    def _generate(self, samples: list[Sample]) -> list[TokenOutput | Exception]:
        chunks = _split(samples, len(self.servers))
        calls = [
            server.generate_batch.remote([(s.prompt_ids, s.params, s.stream) for s in chunk])
            for server, chunk in zip(self.servers, chunks, strict=False)
        ]
        return [output for call, chunk in zip(calls, chunks, strict=True) for output in _get(call, len(chunk))]

    def _agent_output(self, sample: Sample, output: TokenOutput) -> AgentLoopOutput:
        """Convert a server's output as verl's single-turn agent loop does."""
        length = self.rollout.response_length
        version = output.extra_fields.get("global_steps")
        return AgentLoopOutput(
            prompt_ids=sample.prompt_ids,
            response_ids=output.token_ids[:length],
            response_mask=[1] * len(output.token_ids[:length]),
            response_logprobs=output.log_probs[:length] if output.log_probs else None,
            routed_experts=None,
            multi_modal_data={},
            mm_processor_kwargs=self.agent._get_mm_processor_kwargs(),
            mm_processor_output=None,
            num_turns=2,
            metrics={"num_preempted": -1},
            extra_fields={
                **output.extra_fields,
                "min_global_steps": version,
                "max_global_steps": version,
                "turn_scores": [],
                "tool_rewards": [],
            },
        )

    def _rewards(self, samples: list[Sample], outputs: list[AgentLoopOutput]) -> list[dict | None | Exception]:
        """Compute a reward per response; None if a colocated reward model does that later."""
        if self.reward_workers is None or not samples:
            return [None] * len(samples)
        chunks = _split(list(range(len(samples))), len(self.reward_workers))
        batches = [_reward_batch([samples[i] for i in c], [outputs[i] for i in c]) for c in chunks]
        calls = [w.compute_scores.remote(b) for w, b in zip(self.reward_workers, batches, strict=False)]
        return [reward for call, batch in zip(calls, batches, strict=True) for reward in _get(call, len(batch))]


def _rows(batch: TensorDict) -> list[dict[str, Any]]:
    """Split a batch into the fields of each question, as verl's agent-loop worker does."""

    def at(column: Any, i: int) -> Any:
        if isinstance(column, NonTensorData):
            return column.data
        return column[i].data if isinstance(column, NonTensorStack) else column[i]

    columns = {name: column for name, column in batch.items() if name != "validate"}
    return [{name: at(column, i) for name, column in columns.items()} for i in range(len(batch))]


def _row(question: dict[str, Any], output: AgentLoopOutput) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the fields and the tag of one response in TransferQueue."""
    field = output.as_dict() | question
    field.pop("multi_modal_data", None)
    field["loss_mask"] = field["response_mask"]
    field["input_ids"] = torch.cat([field["prompts"], field["responses"]])
    field["position_ids"] = torch.arange(len(field["input_ids"]))
    field["multi_modal_inputs"] = {}
    prompt_len, response_len = len(field["prompts"]), len(field["responses"])
    tag = {
        "status": "success",
        "prompt_len": prompt_len,
        "response_len": response_len,
        "seq_len": prompt_len + response_len,
        "global_steps": question["global_steps"],
        "min_global_steps": output.extra_fields["min_global_steps"],
        "max_global_steps": output.extra_fields["max_global_steps"],
    }
    return field, tag


def _wrap(value: Any, wrapped: dict[int, tuple[Any, NonTensorData]]) -> Any:
    """Wrap ``value`` for a TensorDict; values that responses share only once, because wrapping is slower than storing.

    ``wrapped`` is keyed by identity and keeps each value alive, so that no other value gets its id.
    """
    if isinstance(value, torch.Tensor):
        return value
    if id(value) not in wrapped:
        wrapped[id(value)] = value, NonTensorData(value)
    return wrapped[id(value)][1]


def _reward_batch(samples: list[Sample], outputs: list[AgentLoopOutput]) -> DataProto:
    """Make the input of verl's reward workers: prompts padded on the left, responses on the right."""
    prompts = [torch.tensor(o.prompt_ids) for o in outputs]
    responses = [torch.tensor(o.response_ids, dtype=torch.long) for o in outputs]

    def pad(tensors: list[torch.Tensor], side: str) -> torch.Tensor:
        return pad_sequence(tensors, batch_first=True, padding_side=side)

    left, right = pad(prompts, "left"), pad(responses, "right")
    ones = pad([torch.ones_like(t) for t in prompts], "left"), pad([torch.ones_like(t) for t in responses], "right")
    mask = torch.cat(ones, 1)
    tensors = {
        "prompts": left,
        "responses": right,
        "attention_mask": mask,
        "input_ids": torch.cat([left, right], 1),
        "position_ids": compute_position_id_with_mask(mask),
    }
    others = {name: [s.fields[name] for s in samples] for name in samples[0].fields}
    others |= {
        "__num_turns__": [o.num_turns for o in outputs],
        "tool_extra_fields": [o.extra_fields for o in outputs],
        "prompt_len": [len(o.prompt_ids) for o in outputs],
        "response_len": [len(o.response_ids) for o in outputs],
    }
    return DataProto(
        batch=TensorDict(tensors, batch_size=len(samples)),
        non_tensor_batch={name: np.fromiter(values, dtype=object) for name, values in others.items()},
    )


def _split(items: list, parts: int) -> list[list]:
    """Split ``items`` into at most ``parts`` non-empty runs of equal length; the last may be shorter."""
    size = -(-len(items) // parts)
    return [items[i : i + size] for i in range(0, len(items), size)]


def _get(call: ray.ObjectRef, count: int) -> list:
    """Return the ``count`` results of a call, or its exception that many times."""
    try:
        return ray.get(call)
    except Exception as e:
        return [e] * count
