"""Finds overrides that nothing reads: ``++data.train_batchsize=64`` composes, and changes nothing.

A name that only an override adds counts as read if it is a field of its node's dataclass, a parameter of the function
that takes its node, or if verl's sources, ours or those that the settings name read it from a node of that name.
Dictionaries that are passed on whole (``override_config``, ``engine_kwargs`` ...) are not judged. :data:`IGNORED` lists
the settings of verl that its V1 trainers do not read; a recipe names those that its loss does not read.
"""

import importlib.metadata as metadata
import importlib.util
import inspect
import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_ext import recipes
from verl_ext.preflight.composition import Run, hints, names, walk
from verl_ext.preflight.findings import Finding, nearest
from verl_ext.preflight.trainer import DATA_BACKEND, SHARED_PREFIXES

HANDED_ON = {"apply_chat_template_kwargs", "custom", "engine_kwargs", "env_vars", "fused_kernel_options", "options"}
HANDED_ON |= {"layer_name_map", "mbridge_config", "mm_processor_kwargs", "sampler_kwargs", "turbo_config"}
"""Nodes whose keys others define, besides ``override_...``."""

REWARD_KWARGS = "custom_reward_function.reward_kwargs"
""":mod:`verl_ext.preflight.references` compares it with the function's parameters."""

PACKAGES = ("verl", "verl_ext", "transfer_queue")
"""Packages that read the settings of every run, besides recipes and verl's plugins."""

SELDOM = ("distillation", "reward_model", "custom_reward_function", "critic", "arithmetic", "countdown", "gsm8k")
"""Nodes that few runs use: suggested last."""

ROLES = {"actor", "critic", "ref", "rollout", "reward_model", "distillation"}
"""Nodes that share names of settings, each of which is read from its own node alone."""

BY_TOKENS = "the V1 trainers cut the critic's micro-batches by tokens: set critic.ppo_infer_max_token_len_per_gpu"
NOT_IN_V1 = "it belongs to verl's legacy trainer: leave it out"
NOWHERE = "no part of verl reads it: leave it out"

IGNORED: dict[str, str] = {
    r"actor_rollout_ref\.actor\.grad_clip": "set actor_rollout_ref.actor.optim.clip_grad",
    r"critic\.grad_clip": "set critic.optim.clip_grad",
    r"critic\.(ppo_max|forward_max)_token_len_per_gpu": BY_TOKENS,
    r"critic\.(use_dynamic_bsz|(ppo|forward)_micro_batch_size(_per_gpu)?)": BY_TOKENS,
    r"actor_rollout_ref\.actor\.ppo_micro_batch_size": "set actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    r"trainer\.balance_batch": "the V1 trainers always balance: leave it out",
    r"trainer\.(esi_redundant_time|ray_wait_register_center_timeout)": NOT_IN_V1,
    r"algorithm\.(use_pf_ppo|pf_ppo\..*)": NOT_IN_V1,
    r"actor_rollout_ref\.actor\.(calculate_sum_pi_squared|use_prefix_grouper)": NOT_IN_V1,
    r"data\.reward_fn_key": "the V1 trainers take the column data_source: name it so",
    r"data\.return_raw_input_ids": NOWHERE,
    r"actor_rollout_ref\.nccl_timeout|critic\.nccl_timeout": NOWHERE,
    r"actor_rollout_ref\.actor\.freeze_vision_tower": NOWHERE,
    r"(actor_rollout_ref|critic)\.model\.tiled_mlp\..*": NOWHERE,
    r".*\.rollout\.(over_sample_rate|multi_stage_wake_up)": NOWHERE,
    r".*\.multi_turn\.(use_inference_chat_template|tokenization_sanity_check_mode|num_repeat_rollouts)": NOWHERE,
    r".*\.megatron\.(dist_checkpointing_prefix|router_replay\.(record|replay)_file)": NOWHERE,
}
"""Settings of verl that its V1 trainers do not read -> what to do instead."""

RAY_INIT = "ray_kwargs.ray_init"


def check_unread(run: Run) -> Iterator[Finding]:
    """Name each override that nothing reads, and the nearest setting that something reads."""
    yield from check_ignored(run)
    plain, known = run.plain, names(run.plain)
    raw = OmegaConf.to_container(run.composed, resolve=False)
    interpolated = "\n".join(re.findall(r"\$\{[^}]*\}", str(raw)))
    users = text_of_users(raw)
    closed: tuple[str, ...] = ()
    for setting in walk(raw):
        name, key = setting.name, setting.name.rpartition(".")[2]
        if name in known or key in (*SHARED_PREFIXES, DATA_BACKEND, "_target_") or name.startswith(closed):
            continue
        copied = re.search(rf"(?:\$\{{|select:\s*){re.escape(name)}(?!\w)", interpolated)
        if copied or re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", users):
            closed += (f"{name}.",)
        elif name.partition(".")[0] in _own_nodes() and name in names_of_groups():
            if not isinstance(setting.value, dict):
                problem = f"{name} is read by nothing in this run, but with another algorithm or experiment"
                yield Finding(name, "", problem, "leave it out, or choose the one that has it", warning=True)
        elif near := _nearly(name, plain):
            problem = f"{name} is passed on, but verl reads {near} there, and no such name"
            yield Finding(name, "", problem, f"nearest: {near}", warning=True)
        elif not is_read(name, plain, setting.owner):
            closed += (f"{name}.",)
            near = suggestions(name, plain, setting.owner)
            fix = f"nearest: {', '.join(near)}" if near else "leave it out"
            yield Finding(name, "", f"{name} is read by nothing", fix)


def check_ignored(run: Run) -> Iterator[Finding]:
    """Warn of each user's value that verl accepts and its V1 trainers do not read."""
    # Unresolved: what does not resolve is named elsewhere.
    settings = list(walk(OmegaConf.to_container(run.composed, resolve=False)))
    if any(s.name == "trainer.use_v1" and s.value is False for s in settings):
        return
    plain = {s.name: s.value for s in walk(OmegaConf.to_container(run.plain, resolve=False))}
    by_name = {s.name: s.value for s in settings}
    loss = by_name.get("actor_rollout_ref.actor.policy_loss.loss_mode")
    method = f"algorithm={by_name.get('verl_ext.algorithm')}"
    readers = [("verl", IGNORED), *((method, r.unread(by_name)) for r in recipes.installed() if loss in r.losses)]
    for setting in settings:
        name, value = setting.name, setting.value
        # The critic's micro-batches are split by tokens in any case.
        if isinstance(value, dict) or value == plain.get(name) or (name, value) == ("critic.use_dynamic_bsz", True):
            continue
        for reader, ignored in readers:
            if advice := next((a for pattern, a in ignored.items() if re.fullmatch(pattern, name)), ""):
                shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
                problem = f"{name}={shown} has no effect: {reader} does not read it"
                yield Finding(name, "", problem, advice, warning=True)
                break


def is_read(name: str, plain: DictConfig, owner: type | None = None) -> bool:
    """Whether something reads this name, which ``plain`` lacks; ``owner`` is its node's dataclass."""
    # An old place, whose contents verl moves.
    name = re.sub(r"^reward_model\.reward_kwargs\b", "reward.reward_kwargs", name)
    parent, _, key = name.rpartition(".")
    parts = parent.split(".")
    if REWARD_KWARGS in name or any(p in HANDED_ON or p.startswith("override_") for p in parts):
        return True
    if parent in RAY_NAMES:
        return key in RAY_NAMES[parent]()
    if key in hints(owner) or (parts[0] == "verl_ext" and name in names_of_groups()):
        return True
    node = OmegaConf.select(plain, parent) if parent else plain
    # A key that the dataclass lacks can be read only before that is made, from a node of its name.
    siblings = {str(k) for k in node} - {"_target_"} if isinstance(node, DictConfig) and owner is None else set()
    return any(reads(as_attributes(text), parts, key, siblings) for text in sources().values() if key in text)


def _nearly(name: str, plain: DictConfig) -> str | None:
    """Find the nearest name that verl sets or reads itself in a dictionary that is passed on."""
    parent, _, key = name.rpartition(".")
    node, last = OmegaConf.select(plain, parent) if parent else None, parent.rpartition(".")[2]
    if not (last in HANDED_ON or last.startswith("override_")):
        return None
    known = {str(k) for k in node} if isinstance(node, DictConfig) else set()
    for text in filter(lambda text: last in text, sources().values()):
        known |= set(re.findall(rf"\b{last}\.(\w+)\b(?!\()", as_attributes(text)))
    near = nearest(key, known, 0.88)
    return f"{parent}.{near[0]}" if near and key not in known else None


def suggestions(name: str, plain: DictConfig, owner: type | None = None) -> list[str]:
    """Suggest up to three settings: similar in the same node, of the same name elsewhere, or similar elsewhere."""
    parent, _, key = name.rpartition(".")
    known = names(plain) | names_of_groups()
    prefix = f"{parent}." if parent else ""
    here = {n[len(prefix) :] for n in known if n.startswith(prefix) and "." not in n[len(prefix) :]}
    here |= set(hints(owner)) | (RAY_NAMES[parent]() if parent in RAY_NAMES else set())
    if parent == "verl_ext":
        # No option sets all of them.
        here |= {key for text in sources().values() for key in re.findall(r"config, \"verl_ext\.(\w+)\"", text)}
    elsewhere: dict[str, list[str]] = {}
    for n in known:
        elsewhere.setdefault(n.rpartition(".")[2], []).append(n)
    near = [prefix + found for found in nearest(key, here - {"_target_"})]
    if parent and parent not in known:
        near = nearest(name, known, 0.75)
    if key not in elsewhere and not near:
        key = next(iter(nearest(key, elsewhere, 0.75)), "")
    same = sorted(elsewhere.get(key, []), key=lambda n: (n.startswith(SELDOM), n.count("."), n))
    return list(dict.fromkeys([*near[:2], *same, *near]))[:3]


# Sources --------------------------------------------------------------------------------------------------------------


def reads(text: str, parts: list[str], key: str, siblings: set[str]) -> bool:
    """Whether a source reads ``key`` from the node ``parts``: by its name, or where it reads two of its siblings."""
    others = ROLES.difference(parts) if ROLES.intersection(parts) else set()
    for receiver in set(re.findall(rf"([A-Za-z_][\w.]*)\.{re.escape(key)}\b(?!\()", text)):
        *before, last = receiver.split(".")
        # An object's own attributes, and names of modules in texts.
        if receiver in ("self", "cls") or receiver.split(".")[0] in {p.split(".")[0] for p in packages()}:
            continue
        if others & {re.sub("_(config|cfg)$", "", part) for part in (*before, last)}:
            continue
        if last in (f"{parts[-1]}_config", f"{parts[-1]}_cfg", f"{parts[-1]}_kwargs"):
            return True
        if last == parts[-1] and any(x.endswith(("config", "cfg", *parts[-2:-1])) for x in (last, *before[-1:])):
            return True
        if siblings and len(_read_from(receiver, text) & siblings) >= min(2, len(siblings)):
            return True
    return False


@cache
def _read_from(receiver: str, text: str) -> set[str]:
    return set(re.findall(rf"(?<![\w.]){re.escape(receiver)}\.(\w+)", text))


@cache
def packages() -> frozenset[str]:
    """Return the packages that may read the settings of every run."""
    plugins = {e.module.split(".")[0] for e in metadata.entry_points(group="verl.plugins")}
    return plugins.union(PACKAGES, (recipe.package for recipe in recipes.installed()))


@cache
def sources() -> dict[Path, str]:
    """Return the Python sources that may read settings, by file."""
    folders = []
    for package in sorted(packages()):
        spec = importlib.util.find_spec(package)
        folders += spec.submodule_search_locations or [] if spec else []
    return {f: f.read_text(errors="replace") for d in folders for f in Path(d).rglob("*.py")}


@cache
def as_attributes(text: str) -> str:
    """Rewrite ``node["key"]``, ``node.get("key")`` and the like as ``node.key``, without imports."""
    text = re.sub(r"^\s*(?:from|import) .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"""\bgetattr\(\s*([\w.]+),\s*["'](\w+)["']""", r"\1.\2 ", text)
    text = re.sub(r"""["'](\w+)["'] (?:not )?in ([\w.]+)""", r"\2.\1 ", text)
    text = re.sub(r"""\bselect\(\s*([\w.]+),\s*["']([\w.]+)["']""", r"\1.\2 ", text)
    for _ in range(2):
        text = re.sub(r"""\[["'](\w+)["']\]|\.(?:get|pop)\(\s*["'](\w+)["'][^()]*\)""", r".\1\2", text)
    return text


def text_of_users(raw: dict[str, Any]) -> str:
    """Return the user's code that the settings name: files, ``pkg://`` modules, classes by full name."""
    texts = []
    for setting in walk(raw):
        value = setting.value
        if not isinstance(value, str) or "${" in value:
            continue
        file = Path(value.removeprefix("file://")).expanduser()
        if value.endswith(".py") and file.is_file():
            texts.append(file.read_text(errors="replace"))
        elif value.startswith("pkg://") or setting.name.endswith(("_class", "_module", "_lib", "validator", "prepare")):
            texts.append(_source_of(value.removeprefix("pkg://").replace("/", ".")))
    return "\n".join(texts)


def _source_of(name: str) -> str:
    """Return the source of a module, or of an object's module; "" for verl's and ours, which are read anyway."""
    if name.startswith(tuple(f"{package}." for package in packages())):
        return ""
    for module in (name, name.rpartition(".")[0]):
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            continue
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            return Path(spec.origin).read_text(errors="replace")
    return ""


@cache
def names_of_groups() -> set[str]:
    """Return the config groups and all settings of their options; a method's settings are in its own runs alone."""
    groups = recipes.groups()
    files = [file for group in groups for file in recipes.options(group).values()]
    return groups.union(*(names(OmegaConf.load(file)) for file in files)) - {"defaults"}


@cache
def _own_nodes() -> set[str]:
    """Return the top-level nodes that our options add to verl's."""
    verl = Path(next(iter(importlib.util.find_spec("verl").submodule_search_locations))) / "trainer/config"
    stock = {str(key) for key in OmegaConf.load(verl / "ppo_trainer.yaml")} | {d.name for d in verl.iterdir()}
    return {name.partition(".")[0] for name in names_of_groups()} - stock - {"verl_ext"}


def _ray_names(parent: str) -> set[str]:
    import ray
    from ray.runtime_env import RuntimeEnv

    return set(inspect.signature(ray.init).parameters) if parent.endswith("init") else set(RuntimeEnv.known_fields)


RAY_NAMES = {name: partial(_ray_names, name) for name in (RAY_INIT, f"{RAY_INIT}.runtime_env")}
"""Nodes that Ray takes -> function that returns the names it knows."""
