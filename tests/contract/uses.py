"""What our sources use of verl and TransferQueue, read from the sources themselves: nothing is imported or run.

Followed are imports, attributes of what was imported, classes that extend verl's (what they override, and what they
take from ``self``), values whose type an annotation or the contract's ``types`` tell, and settings by the nodes that
they are read from. What is built at run time, under names that no source shows, is not seen.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

TOP = "actor_rollout_ref|algorithm|critic|data|distillation|global_profiler|ray_kwargs|reward|trainer|transfer_queue"
"""Nodes of verl's configuration."""

SETTING = re.compile(rf"(?<![\w./{{])(?:{TOP})(?:\.[a-z0-9]\w*(?<!_))+(?![\w(/])(?<!\.pt)")
PACKAGES = ("verl", "transfer_queue")
MODULE = re.compile(r"(?:verl|transfer_queue)(?:\.\w+)+")
PATH = re.compile(r"\w+(?:\.\w+)*")
VARIABLE = re.compile(r"\b(?:VERL|TQ)_[A-Z_]+\b")
DATA = {"DataProto", "TensorDict", "tensordict_utils", "verl_ext.training.transfer"}
"""Modules that import one of these handle batches."""

DICT_METHODS = {"copy", "get", "items", "keys", "pop", "setdefault", "update", "values"}

OURS = ("hydra_plugins", "recipe", "verl_ext")

Uses = dict[str, dict[str, set[str]]]
"""kind (names, overrides, own, settings, variables, words, texts) -> name -> places (file:line)."""


def sources() -> dict[str, ast.Module]:
    """Parse our modules, by file."""
    files = sorted(f for top in OURS for f in (ROOT / top).rglob("*.py"))
    return {str(f.relative_to(ROOT)): ast.parse(f.read_text()) for f in files}


def find_uses(types: dict[str, str], parameters: dict[str, str], modules: dict[str, ast.Module] | None = None) -> Uses:
    """Read all sources.

    Args:
        types: what attributes of verl's are, where that cannot be seen: a class, or a node of the settings.
        parameters: the same for parameters of this name, and verl's class behind a mixin of ours, by its name.
        modules: ours, by file, unless others are to be read.
    """
    modules = sources() if modules is None else modules
    readers = {file: _Reader(file, tree, types, parameters) for file, tree in modules.items()}
    for reader in readers.values():
        reader.read_imports(readers)
    classes = {name: c for r in readers.values() for name, c in r.classes.items()}
    uses: Uses = defaultdict(lambda: defaultdict(set))
    for reader in readers.values():
        reader.read(classes, uses)
    for kind in ("names", "settings"):
        # What holds something that is named, too, goes without saying.
        holders = {".".join(n.split(".")[:i]) for n in uses[kind] for i in range(1, n.count(".") + 1)}
        uses[kind] = {n: places for n, places in uses[kind].items() if n not in holders}
    return uses


def _is_class(name: str) -> bool:
    last = name.rpartition(".")[2].lstrip("_")
    return last.lstrip("v")[:1].isupper() and not last.isupper()


class _Class:
    """A class of ours: the names that it defines, and its bases as written in its module."""

    def __init__(self, node: ast.ClassDef, reader: "_Reader"):
        self.node, self.reader = node, reader
        self.defined = {name for s in node.body for name in _bound(s)}
        self.defined |= {
            n.attr
            for n in ast.walk(node)
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and getattr(n.value, "id", "") == "self"
        }

    def foreign(self, classes: dict[str, "_Class"]) -> list[str]:
        """Its bases that are verl's, those of ours looked through."""
        found = [self.reader.parameters[self.node.name]] if self.node.name in self.reader.parameters else []
        for base in self.node.bases:
            kind = self.reader.names.get(getattr(base, "id", ""), "")
            if MODULE.fullmatch(kind):
                found.append(kind)
            elif getattr(base, "id", "") in classes and base.id != self.node.name:
                found += classes[base.id].foreign(classes)
        return list(dict.fromkeys(found))

    def inherited(self, classes: dict[str, "_Class"]) -> set[str]:
        """Names that a base of ours defines."""
        ours = (classes[b.id] for b in self.node.bases if getattr(b, "id", "") in classes and b.id != self.node.name)
        return set().union(*(c.owned(classes) for c in ours))

    def owned(self, classes: dict[str, "_Class"]) -> set[str]:
        """Names that it or a base of ours defines."""
        return self.defined | self.inherited(classes)


def _bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    for target in getattr(statement, "targets", [getattr(statement, "target", None)]):
        if isinstance(target, ast.Name):
            yield target.id


class _Reader(ast.NodeVisitor):
    """One module. What a name stands for is a full name of verl's, "a " before that for an instance, or "settings..."
    for a node of the configuration.
    """

    def __init__(self, file: str, tree: ast.Module, types: dict[str, str], parameters: dict[str, str]):
        self.file, self.tree, self.types, self.parameters = file, tree, types, parameters
        self.names: dict[str, str] = {}
        self.classes = {n.name: _Class(n, self) for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
        self.own: _Class | None = None
        self.docs = {
            id(n.body[0].value)
            for n in ast.walk(tree)
            if hasattr(n, "body") and isinstance(n.body, list) and n.body and isinstance(n.body[0], ast.Expr)
        }
        """First expressions: docstrings, mostly."""

    # Imports ----------------------------------------------------------------------------------------------------------

    def read_imports(self, readers: dict[str, "_Reader"]) -> None:
        """Bind what is imported at any depth; a name of verl's may come by way of a module of ours."""
        self.hooks, self.imported = {}, set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for a in node.names:
                    self.imported.add(a.name)
                    self.names[a.asname or a.name.split(".")[0]] = a.name if a.asname else a.name.split(".")[0]
            elif isinstance(node, ast.ImportFrom) and node.module:
                for a in node.names:
                    self.imported |= {node.module, a.name}
                    self.names[a.asname or a.name] = self._imported(node.module, a.name, readers)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "register_post_import_hook":
                self.hooks[getattr(node.args[0], "id", "")] = getattr(node.args[1], "value", "")

    @staticmethod
    def _imported(module: str, name: str, readers: dict[str, "_Reader"]) -> str:
        reader = readers.get(module.replace(".", "/") + ".py")
        for node in reader.tree.body if reader else ():
            for a in node.names if isinstance(node, ast.ImportFrom) else ():
                if name == (a.asname or a.name):
                    return f"{node.module}.{a.name}"
        return f"{module}.{name}"

    # Uses -------------------------------------------------------------------------------------------------------------

    def read(self, classes: dict[str, _Class], uses: Uses) -> None:
        """Add what this module uses."""
        self.all, self.uses = classes, uses
        self.handles_data = bool(DATA & self.imported)
        self.scopes = [self.names]
        self.visit(self.tree)

    def use(self, kind: str, name: str, node: ast.AST) -> None:
        self.uses[kind][name].add(f"{self.file}:{node.lineno}")

    def visit_Import(self, node: ast.Import) -> None:
        for a in node.names:
            if MODULE.fullmatch(a.name):
                self.use("names", a.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for a in node.names:
            if node.module and MODULE.fullmatch(f"{node.module}.{a.name}"):
                self.use("names", f"{node.module}.{a.name}", node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.own = self.own, self.classes[node.name]
        for name in self.own.defined:
            self.use("own", name, node)
        for base in self.own.foreign(self.all):
            for name in sorted(self.own.defined):
                self.use("overrides", f"{base}.{name}", node)
        self.generic_visit(node)
        self.own = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        scope = {}
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for i, a in enumerate(arguments):
            kind = self.annotated(a.annotation)
            written = ast.unparse(a.annotation) if a.annotation else "Any"
            if kind is None and ("DictConfig" in written or written == "Any"):
                kind = self.parameters.get(a.arg)
            scope[a.arg] = self.hooks.get(node.name) if i == 0 and node.name in self.hooks else kind
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def annotated(self, node: ast.AST | None) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.BinOp):
            return self.annotated(node.left) or self.annotated(node.right)
        kind = self.kind(node) if isinstance(node, ast.Name | ast.Attribute) else None
        return f"a {kind}" if kind and MODULE.fullmatch(kind) else None

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            self.scopes[-1][node.target.id] = self.annotated(node.annotation) or self.kind(node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self.bind(node.target, node.value)

    def bind(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = self.kind(value)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for t, v in zip(target.elts, value.elts, strict=True):
                self.bind(t, v)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.kind(node)
        self.use("texts", node.attr, node)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.kind(node)
        if isinstance(node.slice, ast.Constant):
            self.word(node.slice)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if isinstance(node.ops[0], ast.In | ast.NotIn) and isinstance(node.left, ast.Constant):
            self.child(node.comparators[0], node.left)
            self.word(node.left)
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key in node.keys:
            if isinstance(key, ast.Constant):
                self.word(key)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.kind(node)
        called = self.kind(node.func)
        if called and MODULE.fullmatch(called) and _is_class(called):
            self.use("names", f"{called}.__init__", node)
        on_batch = (called or "").startswith("verl.utils.tensordict_utils.")
        if on_batch or getattr(node.func, "attr", "") in ("get", "pop"):
            for value in (*node.args, *(k.value for k in node.keywords)):
                self.word(value)
        for keyword in node.keywords if on_batch else ():
            self.use("words", keyword.arg or "", node)
        self.pair(node.args)
        self.generic_visit(node)

    def visit_Tuple(self, node: ast.Tuple) -> None:
        self.pair(node.elts)
        for x in node.elts:
            self.word(x)
        self.generic_visit(node)

    visit_List = visit_Set = visit_Tuple

    def pair(self, nodes: list[ast.expr]) -> None:
        """A module and a path in it, side by side."""
        texts = [getattr(n, "value", None) for n in nodes[:2]]
        if len(texts) == 2 and all(isinstance(t, str) and PATH.fullmatch(t) for t in texts):
            if MODULE.fullmatch(texts[0]):
                self.use("names", ".".join(texts), nodes[0])

    def visit_Constant(self, node: ast.Constant) -> None:
        if not isinstance(node.value, str) or id(node) in self.docs:
            return
        self.use("texts", node.value, node)
        for match in VARIABLE.finditer(node.value):
            self.use("variables", match[0], node)
        if MODULE.fullmatch(node.value):
            self.use("names", node.value, node)
            return
        for match in SETTING.finditer(node.value):
            self.use("settings", match[0], node)

    def word(self, node: ast.AST) -> None:
        """A name that may be a column's, where batches are handled."""
        value = getattr(node, "value", None)
        if self.handles_data and isinstance(value, str) and value.isidentifier():
            self.use("words", value, node)

    # What an expression is --------------------------------------------------------------------------------------------

    def kind(self, node: ast.AST | None) -> str | None:
        """What an expression stands for, as the class says; None if that is unknown. Adds the uses on the way."""
        if isinstance(node, ast.Name):
            return next((s[node.id] for s in reversed(self.scopes) if node.id in s), None)
        if isinstance(node, ast.Attribute):
            return self.attribute(node.value, node.attr, node)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            return self.child(node.value, node.slice)
        if isinstance(node, ast.BoolOp):
            return self.kind(node.values[0])
        if isinstance(node, ast.Call):
            return self.result(node)
        return None

    def result(self, node: ast.Call) -> str | None:
        """What a call returns."""
        name, args = ast.unparse(node.func), node.args
        if name in ("copy.copy", "copy.deepcopy") and args:
            return self.kind(args[0])
        if (
            name in ("getattr", "hasattr", "setattr", "object.__setattr__")
            and len(args) > 1
            and isinstance(args[1], ast.Constant)
        ):
            return self.attribute(args[0], str(args[1].value), node)
        if name.endswith("OmegaConf.select") and len(args) > 1:
            return self.child(args[0], args[1])
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop") and args:
            return self.child(node.func.value, args[0])
        called = self.kind(node.func)
        if called in self.types:
            return f"a {self.types[called]}"
        return f"a {called}" if called and MODULE.fullmatch(called) and _is_class(called) else None

    def child(self, parent: ast.AST, key: ast.AST) -> str | None:
        """``parent["key"]`` of a node of the settings."""
        kind, value = self.kind(parent), getattr(key, "value", None)
        if kind is None or not kind.startswith("settings") or not isinstance(value, str):
            return None
        return self.setting(f"{kind}.{value}", key)

    def setting(self, kind: str, node: ast.AST) -> str:
        if SETTING.fullmatch(name := kind.removeprefix("settings.")):
            self.use("settings", name, node)
        return kind

    def attribute(self, parent: ast.AST, name: str, node: ast.AST) -> str | None:
        if isinstance(parent, ast.Name) and parent.id in ("self", "cls") and self.own:
            if name in self.own.owned(self.all):
                return "settings" if name == "config" else None
            owners = self.own.foreign(self.all)
        elif isinstance(parent, ast.Call) and getattr(parent.func, "id", "") == "super" and self.own:
            owners = [] if name in self.own.inherited(self.all) else self.own.foreign(self.all)
        else:
            kind = self.kind(parent)
            if kind is None:
                return "settings" if name == "config" else None
            if kind.startswith("settings"):
                return None if name in DICT_METHODS else self.setting(f"{kind}.{name}", node)
            owners = [kind.removeprefix("a ")] if MODULE.fullmatch(kind.removeprefix("a ")) or kind in PACKAGES else []
            owners = [owner for owner in owners if not owner.rpartition(".")[2].isupper()]
        for owner in owners:
            self.use("names", f"{owner}.{name}", node)
        for owner in owners:
            if type_ := self.types.get(f"{owner}.{name}"):
                return type_ if type_.startswith("settings") else f"a {type_}"
        # Of a class's attribute the type is not known, unless it is a class.
        return f"{owners[0]}.{name}" if owners and (_is_class(name) or not _is_class(owners[0])) else None
