"""What the installed verl and TransferQueue have under the names of the contract.

A module that cannot be imported here, because it needs vLLM, say, is read instead.
"""

import ast
import importlib
import importlib.util
import inspect
from functools import cache
from pathlib import Path
from typing import Any

from uses import PACKAGES

DATA = (
    *("experimental/agent_loop", "experimental/reward_loop", "trainer/ppo/v1", "trainer/ppo/padding_utils.py"),
    *("trainer/ppo/core_algos.py", "trainer/ppo/utils.py", "utils", "workers", "protocol.py"),
)
"""Parts of verl that handle batches."""


def describe(name: str) -> str | None:
    """The parameters of a function or method by its full name, "" for anything else; None if there is no such thing."""
    try:
        return _imported(name)
    except Exception:
        # Of another verl, or of one without a package that this module needs.
        return _read(name)


def neighbours(name: str) -> list[str]:
    """Names that stand beside this one."""
    try:
        return sorted(vars(_find(name.rpartition(".")[0])))
    except Exception:
        return []


def _find(name: str) -> Any:
    first, *parts = name.split(".")
    found = importlib.import_module(first)
    for i, part in enumerate(parts):
        module = ".".join([first, *parts[: i + 1]])
        if inspect.ismodule(found) and not hasattr(found, part) and _file(module):
            importlib.import_module(module)
        if inspect.isclass(found) and getattr(found, part, None) is getattr(object, part, None):
            # What every class has is none of verl's.
            raise AttributeError(part)
        found = inspect.getattr_static(found, part) if i + 1 == len(parts) else getattr(found, part)
    return found


def _imported(name: str) -> str | None:
    try:
        found = _find(name)
    except AttributeError:
        owner = name.rpartition(".")[0]
        try:
            cls = _find(owner)
        except AttributeError:
            return None
        return "" if inspect.isclass(cls) and name.rpartition(".")[2] in _set_by(cls) else None
    found = getattr(found, "__func__", found)
    if name.endswith(".__init__") and (fields := getattr(_find(name.rpartition(".")[0]), "model_fields", None)):
        return f"({', '.join(sorted(fields))})"
    return _plain(inspect.signature(found)) if inspect.isfunction(found) else ""


def _plain(signature: inspect.Signature) -> str:
    """Without types, which change and break nothing."""
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def _set_by(cls: type) -> set[str]:
    """Attributes that a class and its bases annotate, or set on ``self``."""
    found: set[str] = set()
    for c in cls.__mro__:
        found |= set(vars(c).get("__annotations__", {}))
        if c.__module__.split(".")[0] in PACKAGES:
            classes = (n for n in ast.walk(_tree(inspect.getsourcefile(c))) if isinstance(n, ast.ClassDef))
            found |= set().union(*(_stored(n) for n in classes if n.name == c.__name__))
    return found


def _stored(body: ast.ClassDef) -> set[str]:
    return {
        n.attr
        for n in ast.walk(body)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and getattr(n.value, "id", "") == "self"
    }


# Read, not imported ---------------------------------------------------------------------------------------------------


@cache
def _tree(file: str | Path) -> ast.Module:
    return ast.parse(Path(file).read_text())


def _file(module: str) -> Path | None:
    first, *parts = module.split(".")
    spec = importlib.util.find_spec(first)
    for root in (spec and spec.submodule_search_locations) or ():
        for file in (Path(root, *parts, "__init__.py"), Path(root, *parts).with_suffix(".py")):
            if file.is_file():
                return file
    return None


def _read(name: str) -> str | None:
    """The same for modules that cannot be imported here; what a class inherits from another module is not seen."""
    if _file(name):
        return ""
    module, path = name, []
    while module and not (file := _file(module)):
        module, _, part = module.rpartition(".")
        path.insert(0, part)
    node: ast.AST | None = _tree(file) if module else None
    for i, part in enumerate(path):
        body = getattr(node, "body", [])
        for s in ast.walk(node) if i == 0 else ():
            if isinstance(s, ast.ImportFrom) and part in (a.asname or a.name for a in s.names):
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                source = ".".join(filter(None, [package if s.level else "", s.module]))
                return _read(".".join([source, *path]))
        found = next((s for s in body if getattr(s, "name", "") == part), None)
        if found is None:
            stored = isinstance(node, ast.ClassDef) and part in _stored(node)
            named = {t.id for s in body for t in getattr(s, "targets", []) if isinstance(t, ast.Name)}
            return "" if stored or part in named else None
        node = found
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    bare = ast.parse(ast.unparse(node)).body[0].args
    for a in (*bare.posonlyargs, *bare.args, *bare.kwonlyargs, bare.vararg, bare.kwarg):
        if a is not None:
            a.annotation = None
    # Spaced as inspect does.
    return f"({ast.unparse(bare)})"


# Texts and settings ---------------------------------------------------------------------------------------------------


@cache
def texts(part: str) -> frozenset[str]:
    """Strings and names in a file or folder of verl, or in a module by its full name."""
    root = Path(importlib.util.find_spec("verl").origin).parent
    place = _file(part) or root / part
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    found: set[str] = set()
    for file in files:
        for n in ast.walk(_tree(file)):
            if isinstance(n, ast.Constant) and isinstance(n.value, str):
                found.add(n.value)
            else:
                found.add(getattr(n, "arg", None) or getattr(n, "attr", None) or getattr(n, "name", None) or "")
    return frozenset(found)


def mentions(text: str) -> bool:
    """Whether a text stands anywhere in verl."""
    root = Path(importlib.util.find_spec("verl").origin).parent
    return any(text in file.read_text() for file in root.rglob("*.py"))


def handles(word: str) -> bool:
    """Whether verl has this word where it handles batches."""
    return any(word in texts(part) for part in DATA)


@cache
def settings() -> frozenset[str]:
    """Full names of verl's settings and nodes for FSDP and Megatron, and the fields of the dataclasses behind them."""
    from omegaconf import OmegaConf

    from verl_ext.preflight.composition import compose, hints, names, walk

    found: set[str] = set()
    for engine in ("dp", "megatron"):
        config = compose([f"model_engine={engine}"]).config
        found |= names(config)
        for s in walk(OmegaConf.to_container(config, resolve=False)):
            found |= {f"{s.name.rpartition('.')[0]}.{field}" for field in hints(s.owner)}
    return frozenset(found)


def is_read(setting: str) -> bool:
    """Whether verl reads a setting that its files do not name."""
    from verl_ext.preflight.unread import is_read

    return is_read(setting, _stock())


@cache
def _stock() -> Any:
    from verl_ext.preflight.composition import compose

    return compose([]).config
