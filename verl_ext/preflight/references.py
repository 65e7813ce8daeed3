"""Checks that the files, models, modules, functions and classes that settings name exist and can be called."""

import importlib.util
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from verl_ext.preflight.composition import Run, Setting
from verl_ext.preflight.findings import Finding, first_lines, nearest
from verl_ext.preflight.values import wrong_type

REWARD = "reward.custom_reward_function"

PASSED = ("data_source", "solution_str", "ground_truth", "extra_info")
"""Arguments that verl's reward managers pass to a reward function."""

OBJECTS = (REWARD, "data.custom_cls", "trainer.v1.sampler.custom_sampler")
"""Nodes with the path of a module and the name of an object in it."""

CLASSES = ("actor_rollout_ref.rollout.agent.agent_loop_manager_class", "trainer.checkpoint_callback_class")
CLASSES += ("actor_rollout_ref.rollout.checkpoint_manager_class", "verl_ext.validator", "verl_ext.prepare")
"""Settings whose value is the full name of a class or function."""

MODULES = ("actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module", "actor_rollout_ref.model.external_lib")
"""Settings whose value is a module that verl imports, or several."""

OPTIMIZERS = ("actor_rollout_ref.actor.optim.optimizer_impl", "critic.optim.optimizer_impl")
"""Settings whose value is the module of an optimizer."""

FILES = (
    "actor_rollout_ref.rollout.multi_turn.tool_config_path",
    "actor_rollout_ref.rollout.multi_turn.function_tool_path",
    "actor_rollout_ref.rollout.agent.agent_loop_config_path",
    "actor_rollout_ref.rollout.router_config_path",
    "actor_rollout_ref.rollout.quantization_config_file",
)
"""Settings whose value is a file."""

TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "config.json")

MODELS = {
    "actor_rollout_ref.model.path": ("config.json",),
    "actor_rollout_ref.model.hf_config_path": ("config.json",),
    "actor_rollout_ref.model.tokenizer_path": TOKENIZER,
    "actor_rollout_ref.model.lora_adapter_path": ("adapter_config.json",),
    "data.tokenizer": TOKENIZER,
}
"""Settings whose value is a folder or a name on the hub -> files of which the folder needs one."""


@dataclass(frozen=True)
class Object:
    """A function or class that settings name."""

    where: str
    """The setting of its module, with the value."""
    what: str
    """The setting of its name."""
    path: str
    """The module, as verl takes it: a file, or ``pkg://MODULE``."""
    name: str | None


def objects(config: DictConfig) -> Iterator[Object]:
    """Yield all functions and classes that these settings name."""
    for setting in CLASSES:
        if full_name := OmegaConf.select(config, setting):
            module, _, name = str(full_name).rpartition(".")
            yield Object(f"{setting}={full_name}", setting, f"pkg://{module}", name)
    for node in OBJECTS:
        found = OmegaConf.select(config, node) or {}
        if path := found.get("path"):
            yield Object(f"{node}.path={path}", f"{node}.name", str(path), found.get("name"))
    manager = config.reward.reward_manager
    if manager.source == "importlib" and (path := manager.module.path):
        where = f"reward.reward_manager.module.path={path}"
        yield Object(where, "reward.reward_manager.name", str(path), manager.name)


def check_code(run: Run) -> Iterator[Finding]:
    """Name each module, function and class that does not exist, without importing it."""
    for wanted in objects(run.config):
        if not run.is_elsewhere(wanted.path):
            yield from _missing(wanted)
    for name in MODULES:
        value = OmegaConf.select(run.config, name)
        for module in value if OmegaConf.is_list(value) else [value] if value else []:
            if _find_spec(str(module)) is None and not run.is_elsewhere(str(module)):
                yield Finding("modules", "", f"{name}={module}: there is no such module", "install it, or fix the name")
    for name in OPTIMIZERS:
        # Another package than the installed ones may be on the nodes that train: the checks of packages name it.
        module = str(OmegaConf.select(run.config, name) or "")
        if _find_spec(module.partition(".")[0]) is not None and _find_spec(module) is None:
            yield Finding("modules", "", f"{name}={module}: there is no such module", "fix the name")


def check_imports(run: Run) -> Iterator[Finding]:
    """Import what settings name, as verl will, and name what cannot be called."""
    reward = run.config.reward
    for wanted in objects(run.config):
        if any(_missing(wanted)):
            continue
        found, problems = _wrong_object(wanted)
        yield from problems
        if found is not None and wanted.what.startswith(REWARD) and reward.reward_manager.source == "register":
            yield from _wrong_call(found, reward.custom_reward_function.get("reward_kwargs") or {})


def check_paths(run: Run) -> Iterator[Finding]:
    """Name each file and model that does not exist."""
    from verl.trainer.ppo.utils import need_critic

    config, models = run.config, dict(MODELS)
    if need_critic(config):
        models |= {"critic.model.path": ("config.json",), "critic.model.tokenizer_path": TOKENIZER}
    if config.reward.reward_model.enable:
        models["reward.reward_model.model_path"] = ("config.json",)
    seen = set()
    for name, holds in models.items():
        value = OmegaConf.select(config, name)
        if value not in seen and not run.is_elsewhere(str(value)):
            yield from _wrong_model(name, value, holds)
        seen.add(value)
    for name in FILES:
        if (file := str(OmegaConf.select(config, name) or "")) and not _exists(file) and not run.is_elsewhere(file):
            yield Finding("files", "", f"{name}={file}: there is no such file", "give an existing file, or null")
    if not run.is_elsewhere(str(config.trainer.resume_from_path)):
        yield from _wrong_resume(config)
    template = config.actor_rollout_ref.model.get("custom_chat_template")
    if template and "{" not in str(template):
        problem = f"actor_rollout_ref.model.custom_chat_template={template} is not a Jinja template"
        yield Finding("template", "", problem, "give the template's text itself, not a path")


def _module_file(path: str) -> Path | None:
    """Return the file of a module as verl names it: a path, or ``pkg://MODULE``."""
    if path.startswith("pkg://"):
        spec = _find_spec(path.removeprefix("pkg://").replace("/", "."))
        return Path(spec.origin) if spec is not None and spec.origin else None
    # verl does not expand a ~.
    file = Path(path.removeprefix("file://"))
    return file if file.is_file() else None


def _find_spec(module: str) -> Any:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None


def _exists(path: str) -> bool:
    from verl.utils.import_utils import resolve_config_path

    try:
        return "://" in path or os.path.exists(resolve_config_path(os.path.expanduser(path)))
    except FileNotFoundError:
        return False


def _wrong_model(name: str, value: Any, holds: tuple[str, ...]) -> Iterator[Finding]:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not value and name.endswith("model.path"):
        yield Finding("model", "", f"{name} is not set", "give a folder, or a name on the hub")
    if not value or "://" in str(value):
        return
    path = Path(os.path.expanduser(str(value)))
    if path.is_dir():
        if not any((path / file).exists() for file in holds):
            yield Finding("model", "", f"{name}={value}: the folder has no {holds[0]}", "give a folder that has it")
        return
    if not str(value).startswith(("/", "~", ".")) and not path.exists():
        with suppress(HFValidationError):
            validate_repo_id(str(value))
            return
    problem = f"{name}={value}: there is no such folder, and it is not a name on the hub"
    yield Finding("model", "", problem, "give an existing folder, or a name on the hub such as Qwen/Qwen3-4B")


def _wrong_resume(config: DictConfig) -> Iterator[Finding]:
    mode, path = config.trainer.resume_mode, config.trainer.resume_from_path
    name = f"trainer.resume_from_path={'null' if path is None else path}"
    if mode != "resume_path" and path:
        problem = f"{name} is read only with trainer.resume_mode=resume_path, but that is {mode}"
        yield Finding("resume", "", problem, "set trainer.resume_mode=resume_path, or leave the path out")
    elif mode != "resume_path":
        return
    elif not path or "global_step_" not in str(path):
        fix = "give a checkpoint's folder: .../global_step_N"
        yield Finding("resume", "", f"{name} does not name a checkpoint to resume from", fix)
    elif not os.path.isdir(path):
        yield Finding("resume", "", f"{name}: there is no such folder", "give an existing .../global_step_N")


def _missing(wanted: Object) -> Iterator[Finding]:
    """Find what can be found without importing the module."""
    file = _module_file(wanted.path)
    if file is None:
        problem = f"{wanted.where}: there is no such {'module' if wanted.path.startswith('pkg://') else 'file'}"
        yield Finding("modules", "", problem, "give an existing one: a Python file, or pkg://MODULE")
        return
    text = file.read_text(errors="replace") if file.suffix == ".py" else "import *"
    if not re.search(rf"import \*|\b__getattr__\b|\b{re.escape(str(wanted.name))}\b", text):
        yield _not_in(wanted, re.findall(r"^(?:async )?(?:def|class) (\w+)", text, re.MULTILINE))


def _not_in(wanted: Object, defined: Iterable[str]) -> Finding:
    has = list(defined)
    near = nearest(str(wanted.name), has)
    fix = f"nearest: {', '.join(near)}" if near else f"give the name of a function or class in it: {', '.join(has[:5])}"
    return Finding("modules", "", f"{wanted.what}={wanted.name or 'null'} is not in {wanted.path}", fix)


def _wrong_object(wanted: Object) -> tuple[Any, list[Finding]]:
    """Import the function or class as verl does, and find what is wrong with it."""
    from verl.utils.import_utils import load_module

    try:
        module = load_module(wanted.path)
    except (Exception, SystemExit) as e:
        cause = e.__cause__ or e
        # The module exists; the packages that it imports may be on the nodes that train.
        elsewhere = isinstance(cause, ModuleNotFoundError)
        problem = f"{wanted.where} cannot be imported: {type(cause).__name__}: {first_lines(cause)}"
        return None, [Finding("modules", "", problem, "install what it needs, or fix it", warning=elsewhere)]
    found = getattr(module, str(wanted.name), None)
    if callable(found):
        return found, []
    if found is None:
        return None, [_not_in(wanted, (n for n, x in vars(module).items() if callable(x)))]
    problem = f"{wanted.what}={wanted.name} of {wanted.path} cannot be called"
    return None, [Finding("modules", "", problem, "give the name of a function or class in it")]


def _wrong_call(function: Any, kwargs: DictConfig | dict) -> Iterator[Finding]:
    """Compare verl's call and ``reward_kwargs`` with the reward function's parameters."""
    try:
        parameters = inspect.signature(function).parameters
        annotations = get_type_hints(function)
    except (ValueError, TypeError, NameError):
        return
    catch_all = next((p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    own = {n: None if p.default is p.empty else p.default for n, p in named.items() if n not in PASSED}
    problems = []
    for key, value in kwargs.items():
        name = f"{REWARD}.reward_kwargs.{key}"
        if key in PASSED:
            problems.append((f"{name} would replace what verl passes for each response", "leave it out"))
        elif key in own:
            if wanted := wrong_type(Setting(name, value, None, annotations.get(key), {}), value, own[key]):
                problems.append((f"{name}={value} is wrong", f"use {wanted}"))
        elif (near := nearest(key, own)) or catch_all is None or not _uses(function, catch_all):
            fix = f"nearest: {', '.join(near)}" if near else f"it has {', '.join(sorted(own)) or 'none'}"
            problems.append((f"{name} is read by nothing: {function.__name__} has no such parameter", fix))
    for problem, fix in problems:
        yield Finding("reward", "", problem, fix)
    if problems:
        return
    try:
        inspect.signature(function).bind(**dict.fromkeys(PASSED), **kwargs)
    except TypeError as e:
        problem = f"{REWARD}.name={function.__name__} does not fit verl's call: {e}"
        yield Finding("reward", "", problem, f"let it take the parameters {', '.join(PASSED)}")
        return
    # Our reward functions refuse wrong values when called, and calling them costs nothing.
    if function.__module__.startswith("verl_ext."):
        try:
            function(data_source="", solution_str="", ground_truth="1", extra_info={}, **kwargs)
        except Exception as e:
            yield Finding("reward", "", f"{REWARD}: {first_lines(e)}", "fix the setting that it names")


def _uses(function: Any, catch_all: str) -> bool:
    """Whether the function uses its catch-all parameter."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return True
    return len(re.findall(rf"(?<!\w){re.escape(catch_all)}\b(?!:)", source)) > 1
