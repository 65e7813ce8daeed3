"""verl's handle of one rollout server, in the trainer's process."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.plugin.platform import get_platform
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.rollout.replica import RolloutReplica
from verl.workers.rollout.utils import get_max_position_embeddings

from verl_ext.cpu.rollout.sampling import LOGPROBS_MODES
from verl_ext.cpu.rollout.server import HFServer, ServerSpec

DTYPES = ("float32", "bfloat16", "float16")
ENGINE_OPTIONS = ("num_threads", "window_ms", "attn_implementation")
SAME_NAME = ("load_format", "prompt_length", "response_length", "max_num_seqs", "seed", "ignore_eos")
SAME_NAME += ("repetition_penalty", "logprobs_mode")
"""Settings of the server that have the same name in verl's ``RolloutConfig``."""


def server_name(replica_rank: int, suffix: str = "") -> str:
    """Name a replica's Ray actor."""
    return f"hf_server_{replica_rank}_0{suffix}"


class HFReplica(RolloutReplica):
    """One server for the ranks of a replica (``rollout.tensor_model_parallel_size``), on the first rank's device.

    The model is not split: more ranks per replica make fewer servers, not smaller ones.
    """

    async def launch_servers(self) -> None:
        """Start the server beside the first worker of this replica.

        Raises:
            ValueError: a setting that this rollout does not support.
        """
        if self.is_reward_model or self.is_teacher_model:
            raise ValueError("rollout.name=hf serves the actor only; use another rollout for a reward model or teacher")
        platform = get_platform()
        on_accelerator = platform.device_name != "cpu"
        node_id, device_ids = await self.workers[0].__ray_call__.remote(_placement, platform.ray_resource_name())
        env_vars = {}
        if on_accelerator:
            # As in verl's vLLM rollout: share the worker's device without reserving it in Ray.
            env_vars = {name: "1" for name in platform.ray_noset_envvars()}
            env_vars[platform.visible_devices_envvar()] = device_ids[0]
        model: HFModelConfig = omega_conf_to_dataclass(self.model_config, dataclass_type=HFModelConfig)
        server = (
            ray.remote(HFServer)
            .options(
                num_cpus=0,
                name=server_name(self.replica_rank, self.name_suffix),
                max_concurrency=self.max_concurrency,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
                runtime_env={"env_vars": env_vars},
            )
            .remote(server_spec(self.config, model, self.replica_rank, platform.device_name))
        )
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        # A key for verl's load balancer; there is no HTTP server.
        self._server_address = server_name(self.replica_rank, self.name_suffix)


def _placement(worker: Any, resource: str) -> tuple[str, list[str]]:
    """Return a worker's Ray node and accelerator ids; runs in the worker."""
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_accelerator_ids().get(resource, [])


def server_spec(rollout: Any, model: HFModelConfig, replica_rank: int, device: str) -> ServerSpec:
    """Derive the server's settings from verl's ``RolloutConfig`` and model configuration.

    Raises:
        ValueError: the setting that this rollout does not support, what was found and what would be right.
    """
    refuse_unsupported(rollout, model)
    options = dict((rollout.engine_kwargs or {}).get("hf") or {})
    if unknown := sorted(options.keys() - ENGINE_OPTIONS):
        raise ValueError(f"rollout.engine_kwargs.hf has no option {unknown}; its options are {sorted(ENGINE_OPTIONS)}")

    max_positions = get_max_position_embeddings(model.hf_config)
    max_model_len = rollout.max_model_len or max_positions
    if max_model_len > max_positions:
        raise ValueError(
            f"rollout.max_model_len={max_model_len} exceeds the model's max_position_embeddings={max_positions}"
        )
    eos = {model.tokenizer.eos_token_id}
    generation = getattr(model.generation_config, "eos_token_id", None)
    eos |= set(generation if isinstance(generation, list | tuple) else [generation])
    attention = "sdpa" if device == "cpu" else model.hf_config._attn_implementation
    return ServerSpec(
        model_path=model.local_path,
        hf_config=model.hf_config,
        attn_implementation=options.pop("attn_implementation", None)
        or model.override_config.get("attn_implementation", attention),
        dtype=rollout.dtype,
        device=device,
        trust_remote_code=model.trust_remote_code,
        eos_token_ids=sorted(eos - {None}),
        vocab_size=len(model.tokenizer),
        max_model_len=max_model_len,
        replica_rank=replica_rank,
        release_memory=rollout.free_cache_engine and device != "cpu",
        **{name: getattr(rollout, name) for name in SAME_NAME},
        **options,
    )


def refuse_unsupported(rollout: Any, model: HFModelConfig) -> None:
    """Raise ValueError for the first setting that this rollout does not support."""
    lora = model.lora_rank > 0 or model.lora.get("rank", 0) > 0 or model.lora_adapter_path is not None
    for name, found, right in (
        ("rollout.dtype", rollout.dtype, DTYPES),
        ("rollout.logprobs_mode", rollout.logprobs_mode, LOGPROBS_MODES),
        ("rollout.data_parallel_size", rollout.data_parallel_size, (1,)),
        ("rollout.pipeline_model_parallel_size", rollout.pipeline_model_parallel_size, (1,)),
        ("rollout.quantization", rollout.quantization, (None,)),
        ("rollout.qat.enable", bool((rollout.qat or {}).get("enable", False)), (False,)),
        ("rollout.enable_rollout_routing_replay", rollout.enable_rollout_routing_replay, (False,)),
        ("rollout.mtp.enable_rollout", rollout.mtp.enable and rollout.mtp.enable_rollout, (False,)),
        ("rollout.prometheus.enable", rollout.prometheus.enable, (False,)),
        ("model.lora.merge", not lora or model.lora.get("merge", False), (True,)),
    ):
        if found not in right:
            raise ValueError(f"rollout.name=hf does not support {name}={found}; possible: {', '.join(map(str, right))}")
