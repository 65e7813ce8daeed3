"""The generation server: a Ray actor around one transformers model. Imports torch and transformers, but not verl."""

import asyncio
import threading
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from verl_ext.cpu.rollout.generate import Request, Response, generate
from verl_ext.cpu.rollout.sampling import SamplingParams


@dataclass
class ServerSpec:
    """A server's settings; ``replica`` derives them from verl's configuration."""

    model_path: str
    hf_config: PretrainedConfig
    attn_implementation: str
    dtype: str
    device: str
    load_format: str
    """"dummy": wait for the trainer's weights; otherwise start with those of ``model_path``."""
    trust_remote_code: bool
    eos_token_ids: list[int]
    vocab_size: int
    """The tokenizer's number of tokens."""
    prompt_length: int
    response_length: int
    max_model_len: int
    max_num_seqs: int
    """Responses that are decoded together, at most."""
    seed: int
    replica_rank: int
    ignore_eos: bool
    repetition_penalty: float
    logprobs_mode: str
    release_memory: bool
    """``sleep`` moves the weights off the accelerator."""
    num_threads: int | None = None
    """Threads of torch; None leaves them as Ray set them."""
    window_ms: float = 4.0
    """Milliseconds to wait for one more request before a batch starts."""


@dataclass
class TokenOutput:
    """The fields of verl's ``TokenOutput`` that verl's client reads."""

    token_ids: list[int]
    log_probs: list[float] | None = None
    routed_experts: Any = None
    stop_reason: str | None = None
    num_preempted: int | None = None
    extra_fields: dict[str, Any] = field(default_factory=dict)


class HFServer:
    """verl's server interface: generate; update_weights; abort and resume; sleep and wake up.

    Requests that arrive within a few milliseconds are decoded as one batch, at most ``max_num_seqs`` at a time.

    Random numbers depend on the seed, the version of the weights (verl's global step), the prompt, and a counter of
    equal prompts. So a run is reproducible, and a resumed run continues as if it had not stopped, in whatever order
    requests arrive. With several servers the client has to give the counter (``generate_batch``), because verl's load
    balancer distributes requests at random.
    """

    def __init__(self, spec: ServerSpec):
        self.spec = spec
        if spec.num_threads is not None:
            torch.set_num_threads(spec.num_threads)
        options = dict(
            dtype=getattr(torch, spec.dtype),
            attn_implementation=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
        )
        if spec.load_format == "dummy":
            model = AutoModelForCausalLM.from_config(spec.hf_config, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(spec.model_path, config=spec.hf_config, **options)
        self.model = model.requires_grad_(False).eval().to(spec.device)
        # Under every name: tied weights have several, and the trainer may send any of them.
        self._tensors = dict(self.model.named_parameters(remove_duplicate=False)) | dict(
            self.model.named_buffers(remove_duplicate=False)
        )
        self._required = {id(p) for p in self.model.parameters()}
        self._received: set[int] = set()
        self._has_weights = spec.load_format != "dummy"  # all of them, of one version
        self._asleep = False

        self.global_steps: int | None = None
        self._asked: Counter[tuple[int, ...]] = Counter()
        self._queue: list[tuple[Request, asyncio.Future]] = []
        self._arrived = asyncio.Event()
        self._busy = asyncio.Lock()  # held while a batch is decoded or the model is written to
        self._in_flight = 0
        self._abort = threading.Event()
        self._open = asyncio.Event()
        self._open.set()
        self._rejecting = False
        self._task: asyncio.Task | None = None

    def ready(self) -> int:
        """Return the number of parameters, once the model is loaded."""
        return sum(p.numel() for p in self.model.parameters())

    # ---------------------------------------------------------------- generation

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str | None = None,
        stream: tuple | None = None,
        **others: Any,
    ) -> TokenOutput:
        """Generate one response.

        Args:
            stream: determines the random numbers together with seed, version and prompt; the client chooses it so that
                no two requests of one version share it. None: the server counts equal prompts.

        Raises:
            ValueError: an unsupported sampling parameter or input, or a prompt that is too long.
            RuntimeError: the weights are incomplete or asleep.
        """
        for name, value in others.items():
            if value:
                raise ValueError(f"rollout.name=hf generates text from tokens; it cannot use {name}")
        request = self._request([int(t) for t in prompt_ids], sampling_params, stream)
        while not self._open.is_set():
            if self._rejecting:
                return self._output(Response([], [], aborted=True), request)
            await self._open.wait()
        if self._task is None:
            self._task = asyncio.create_task(self._serve())
        future = asyncio.get_running_loop().create_future()
        self._queue.append((request, future))
        self._arrived.set()
        return self._output(await future, request)

    async def generate_batch(
        self, requests: list[tuple[list[int], dict[str, Any], tuple | None]]
    ) -> list[TokenOutput | Exception]:
        """Generate responses to (prompt_ids, sampling_params, stream), in order; a failed one is an exception."""
        return await asyncio.gather(
            *(self.generate(prompt, params, stream=stream) for prompt, params, stream in requests),
            return_exceptions=True,
        )

    def _request(self, prompt_ids: list[int], params: dict[str, Any], stream: tuple | None) -> Request:
        spec = self.spec
        room = spec.max_model_len - len(prompt_ids)
        if not prompt_ids or room < 1:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens: it must have at least one, and fewer than "
                f"rollout.max_model_len={spec.max_model_len}"
            )
        params = dict(params)
        max_new_tokens = params.pop("max_new_tokens", None)  # SGLang's name
        params["max_tokens"] = params.get("max_tokens") or max_new_tokens
        if params["max_tokens"] is None:
            left = spec.prompt_length + spec.response_length - len(prompt_ids)
            params["max_tokens"] = max(1, min(spec.response_length, left))
        parsed = SamplingParams.parse(params, ignore_eos=spec.ignore_eos, repetition_penalty=spec.repetition_penalty)
        parsed = replace(parsed, max_tokens=min(parsed.max_tokens, room))
        prompt = tuple(prompt_ids)
        if parsed.seed is not None:
            key = ("request", parsed.seed, prompt)
        elif stream is not None:
            key = ("stream", spec.seed, self.global_steps, stream, prompt)
        else:
            key = ("server", spec.seed, spec.replica_rank, self.global_steps, self._asked[prompt], prompt)
            self._asked[prompt] += 1
        return Request(prompt_ids, parsed, key)

    def _output(self, response: Response, request: Request) -> TokenOutput:
        return TokenOutput(
            token_ids=response.token_ids,
            log_probs=response.log_probs if request.params.logprobs else None,
            stop_reason="aborted" if response.aborted else "completed",
            extra_fields={"global_steps": self.global_steps},
        )

    async def _serve(self) -> None:
        """Decode the queue, batch by batch, forever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            known = -1
            while known < len(self._queue) < self.spec.max_num_seqs:  # while requests keep arriving
                known = len(self._queue)
                await asyncio.sleep(self.spec.window_ms / 1000)
            async with self._busy:
                batch, self._queue = self._queue[: self.spec.max_num_seqs], self._queue[self.spec.max_num_seqs :]
                if not self._queue:
                    self._arrived.clear()
                self._in_flight = len(batch)
                try:
                    responses = await loop.run_in_executor(None, self._generate, [request for request, _ in batch])
                except Exception as e:
                    responses = [e] * len(batch)
                self._in_flight = 0
            for (_, future), response in zip(batch, responses, strict=True):
                if future.done():  # cancelled
                    continue
                if isinstance(response, Exception):
                    future.set_exception(response)
                else:
                    future.set_result(response)

    def _generate(self, requests: list[Request]) -> list[Response]:
        if not self._has_weights:
            raise RuntimeError("generate: the trainer has not sent this server all weights yet")
        if self._asleep:
            raise RuntimeError("generate: this server is asleep; its weights are not on the accelerator")
        return generate(
            self.model,
            requests,
            eos_token_ids=self.spec.eos_token_ids,
            vocab_size=self.spec.vocab_size,
            logprobs_mode=self.spec.logprobs_mode,
            should_stop=self._abort.is_set,
        )

    # ---------------------------------------------------------------- weights

    async def update_weights(
        self, names: list[str], shapes: list[tuple[int, ...]], data: np.ndarray, first: bool, last: bool
    ) -> None:
        """Write one bucket of an update; all buckets together must hold every parameter.

        Args:
            data: uint8, the tensors one after another in this server's dtype.

        Raises:
            ValueError: parameters that the model does not have, or that the update left out.
        """
        async with self._busy:
            if first:
                self._has_weights, self._received = False, set()
            await asyncio.get_running_loop().run_in_executor(None, self._write, names, shapes, data)
        if last:
            missing = self._required - self._received
            if left_out := [name for name, tensor in self._tensors.items() if id(tensor) in missing]:
                raise ValueError(f"the trainer's weights leave out {len(left_out)} parameters: {left_out[:5]}")
            self._has_weights = True

    @torch.no_grad()
    def _write(self, names: list[str], shapes: list[tuple[int, ...]], data: np.ndarray) -> None:
        if unknown := [name for name in names if name not in self._tensors]:
            model = type(self.model).__name__
            raise ValueError(f"the trainer sent {len(unknown)} weights that {model} does not have: {unknown[:5]}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's arrays are read-only, and nothing writes to them
            flat = torch.from_numpy(data).view(self.model.dtype)
        parts = flat.split([int(np.prod(shape)) for shape in shapes])
        for name, shape, part in zip(names, shapes, parts, strict=True):
            self._tensors[name].copy_(part.view(shape))
            self._received.add(id(self._tensors[name]))

    async def set_global_steps(self, global_steps: int | None) -> None:
        """Set the version of the weights."""
        self.global_steps = global_steps
        self._asked.clear()

    # ---------------------------------------------------------------- life cycle

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """End all responses with the tokens so far, and start none until ``resume_generation``.

        Requests that arrive meanwhile wait; with ``reject_request`` they return at once, aborted and empty.
        """
        self._open.clear()
        self._rejecting = reject_request
        waiting, self._queue = self._queue, []
        self._arrived.clear()
        for _, future in waiting:
            if not future.done():
                future.set_result(Response([], [], aborted=True))
        in_flight = self._in_flight
        self._abort.set()
        try:
            async with self._busy:
                pass
        finally:
            self._abort.clear()
        return {"aborted_count": len(waiting) + in_flight, "request_ids": []}

    async def resume_generation(self) -> None:
        self._rejecting = False
        self._open.set()

    async def sleep(self) -> None:
        """Move the weights off the accelerator, after the current batch."""
        if not self.spec.release_memory or self._asleep:
            return
        async with self._busy:
            self._asleep = True
            self.model.to("cpu")
            torch.accelerator.empty_cache()

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Undo ``sleep`` if ``tags`` include the weights (None: everything)."""
        if not self._asleep or (tags is not None and "weights" not in tags):
            return
        async with self._busy:
            self.model.to(self.spec.device)
            self._asleep = False

    # A KV cache lives as long as its batch, and there is no profiler.
    async def _nothing(self, **kwargs: Any) -> None: ...

    clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = _nothing
