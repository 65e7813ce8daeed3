"""The platform "cpu" in verl's platform registry: gloo, and Ray scheduling by a declared number of "GPUs".

At the first ``get_platform()``, after plugins are loaded, verl asks the registered platforms in turn whether they are
available and caches the answer. "cpu" is available only as a last resort (:func:`accelerator_present`), unless
``VERL_PLATFORM=cpu`` is set or :func:`verl_ext.cpu.request` is called.
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
    """Find evidence of an accelerator that this torch can use; None if there is none.

    ``torch.cuda.is_available()`` is not enough: Ray hides the GPUs from actors that ask for none (the TaskRunner, the
    agent loops), on GPU machines and on the CPU-only head node of a GPU cluster, where verl's own check fails too if
    ``nvidia-smi`` is missing. So with a CUDA or ROCm build of torch this also looks for device files, which no
    environment variable hides, and asks Ray for accelerators anywhere in the cluster. A declared ``num_gpus`` does not
    count: Ray reports a type only for accelerators that it detected.
    """
    if torch.cuda.is_available():
        return "torch.cuda.is_available()"
    # xpu, hpu ...; verl has no platform for Apple's mps
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


class _DeviceModule(types.ModuleType):
    """``torch.cpu`` plus the functions of ``torch.cuda`` that verl calls on any device.

    ``is_available()`` is False: verl asks it before it manages device memory, and there is none.
    """

    def __init__(self):
        super().__init__("verl_ext.cpu.device_module")
        for name in ("empty_cache", "ipc_collect", "manual_seed", "manual_seed_all", "reset_peak_memory_stats"):
            setattr(self, name, _nothing)
        for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
            setattr(self, name, lambda *args: 0)
        self.is_available = lambda: False
        self.mem_get_info = lambda *args: (0, 0)
        self.get_device_name = lambda *args: "CPU"
        self.get_rng_state = lambda *args: torch.get_rng_state()
        self.set_rng_state = lambda state, *args: torch.set_rng_state(state)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


_device_module = _DeviceModule()


class CPUPlatform(PlatformBase):
    """A CPU run: each rank is a process, and ``trainer.n_gpus_per_node`` is the number of ranks per node."""

    device_name = vendor_name = NAME
    device_module = _device_module

    # Nothing to do or to return on a CPU.
    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # verl has not asked the platforms that other plugins registered later.
        names = PlatformRegistry.registered_names()
        later = names[names.index(NAME) + 1 :] if NAME in names else ()
        return accelerator_present() is None and not any(
            PlatformRegistry.get(name)().is_platform_available(use_smi_check=use_smi_check) for name in later
        )

    def current_device(self) -> str:
        return _DeviceId(NAME)

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "VERL_CPU_VISIBLE_DEVICES"  # never read; verl writes Ray's invented ids into it

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def ray_resource_name(self) -> str:
        # verl's resource check knows only "GPU" and "NPU". GPUs declared to Ray (ray_kwargs.ray_init.num_gpus = ranks
        # on this node) satisfy it without a patch; Ray does not look for them.
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False  # so that verl's vLLM rollout sends weights through shared memory

    def rollout_env_vars(self) -> dict[str, str]:
        # For verl's vLLM servers: do not pin threads, as many servers and workers share the cores.
        defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        return {name: os.environ.get(name, value) for name, value in defaults.items()}


def register() -> None:
    """Register the platform with verl, once."""
    if PlatformRegistry.get(NAME) is None:
        PlatformRegistry.register(platform=NAME)(CPUPlatform)
