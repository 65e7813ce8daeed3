"""The platform "cpu" in verl's platform registry: gloo, and Ray scheduling by a declared number of "GPUs".

verl asks the registered platforms one after another whether they are available and caches the answer at the first
``get_platform()``; plugins are loaded before that. "cpu" says yes only as the last resort, see
:func:`accelerator_present`. Setting ``VERL_PLATFORM=cpu`` or calling :func:`verl_ext.cpu.request` chooses it anyway.
"""

import glob
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

NAME = "cpu"


def accelerator_present() -> str | None:
    """What shows that this run has an accelerator that this torch can use, or None.

    ``torch.cuda.is_available()`` alone would not do: Ray hides the GPUs from actors that ask for none (the TaskRunner,
    the agent loops), on GPU machines and on the CPU-only head node of a GPU cluster, and verl's own check is negative
    there when ``nvidia-smi`` is not installed. So a torch that is built for CUDA or ROCm also looks for device files,
    which no environment variable hides, and asks Ray for accelerators anywhere in the cluster. (A declared
    ``num_gpus`` does not count: Ray writes the type only of those that it detected.)
    """
    if torch.cuda.is_available():
        return "torch.cuda.is_available()"
    # Other kinds (xpu, hpu ...); verl has no platform for Apple's.
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None and kind.type not in ("cpu", "mps"):
        return f"torch.accelerator: {kind}"
    if torch.version.cuda is None and torch.version.hip is None:
        return None
    for pattern in ("/dev/nvidia[0-9]*", "/dev/kfd"):
        if files := glob.glob(pattern):
            return files[0]
    import ray

    if ray.is_initialized():
        for resource in ray.cluster_resources():
            if resource.startswith("accelerator_type:"):
                return f"Ray resource {resource}"
    return None


class _DeviceId(str):
    """``"cpu"`` for ``tensor.to(id)`` and ``torch.device(id)``, ``0`` in verl's ``f"{device_name}:{id}"``."""

    def __format__(self, spec: str) -> str:
        return "0"


def _nothing(*args, **kwargs) -> None:
    return None


def _zero(*args, **kwargs) -> int:
    return 0


class _DeviceModule(types.ModuleType):
    """``torch.cpu`` plus those functions of ``torch.cuda`` that verl calls on any device.

    ``is_available()`` is False: verl asks it before managing device memory, and there is none.
    """

    def __init__(self):
        super().__init__("verl_ext.cpu.device_module")
        for name in ("empty_cache", "ipc_collect", "manual_seed", "manual_seed_all", "reset_peak_memory_stats"):
            setattr(self, name, _nothing)
        for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
            setattr(self, name, _zero)
        self.is_available = lambda: False
        self.mem_get_info = lambda *args: (0, 0)
        self.get_device_name = lambda *args: "CPU"
        self.get_rng_state = lambda *args: torch.get_rng_state()
        self.set_rng_state = lambda state, *args: torch.set_rng_state(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


_device_module = _DeviceModule()


class CPUPlatform(PlatformBase):
    """One process of a CPU run. A rank is one process; the number of ranks is ``trainer.n_gpus_per_node``."""

    @property
    def device_name(self) -> str:
        return NAME

    @property
    def vendor_name(self) -> str:
        return NAME

    @property
    def device_module(self) -> types.ModuleType:
        return _device_module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Platforms that other plugins registered after this one have not been asked yet.
        names = PlatformRegistry.registered_names()
        later = names[names.index(NAME) + 1 :] if NAME in names else ()
        return accelerator_present() is None and not any(
            PlatformRegistry.get(name)().is_platform_available(use_smi_check=use_smi_check) for name in later
        )

    def current_device(self) -> str:
        return _DeviceId(NAME)

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "VERL_CPU_VISIBLE_DEVICES"  # read by nobody; verl writes Ray's made-up ids into it

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        # verl's resource check knows only "GPU" and "NPU". A number of GPUs declared to Ray
        # (ray_kwargs.ray_init.num_gpus = ranks on this node) satisfies it without a patch; Ray does not look for them.
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False  # so that verl's vLLM rollout sends weights through shared memory

    def rollout_env_vars(self) -> dict[str, str]:
        # For verl's vLLM servers: do not pin threads, as many servers and workers share the cores.
        defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        return {name: os.environ.get(name, value) for name, value in defaults.items()}

    def cudart(self) -> Any:
        return None


def register() -> None:
    """Put the platform into verl's registry, once."""
    if PlatformRegistry.get(NAME) is None:
        PlatformRegistry.register(platform=NAME)(CPUPlatform)
