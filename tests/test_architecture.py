"""One arrow, recipe -> verl_ext -> verl: in imports, at any depth of a function, and in texts. No circles."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("recipe", "verl_ext", "hydra_plugins")

PURE = {"scores", "objectives", "questions", "constraint", "loss", "update", "settings", "registry", "metrics"}
"""The method: torch and mathematics. They are read without verl, and import no other module of the recipe."""


def sources(root: Path) -> dict[str, Path]:
    """Our modules by name."""
    files = {f.relative_to(root).with_suffix(""): f for name in OURS for f in (root / name).rglob("*.py")}
    return {".".join(p.parts).removesuffix(".__init__"): f for p, f in files.items()}


def imports(name: str, file: Path, modules: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """What a module imports, by full name, and whether that happens when it is imported itself."""

    def walk(node: ast.AST, on_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, on_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
                above = package[: len(package) + 1 - child.level] if child.level else []
                base = ".".join([*above, *filter(None, [child.module])])
                for alias in child.names:
                    below = f"{base}.{alias.name}"
                    yield (below if below in modules else base), on_import
            else:
                yield from walk(child, on_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    return walk(ast.parse(file.read_text()), True)


def circles(edges: set[tuple[str, str]]) -> list[str]:
    """Circles in a graph: ``a -> b -> a``, each once, one way around."""
    after: dict[str, set[str]] = {}
    for a, b in edges:
        after.setdefault(a, set()).add(b)
    found: dict[frozenset[str], str] = {}

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            circle = path[path.index(node) :]
            found.setdefault(frozenset(circle), " -> ".join([*circle, node]))
        elif node not in done:
            for below in sorted(after.get(node, ())):
                visit(below, [*path, node])
            done.add(node)

    done: set[str] = set()
    for node in sorted(after):
        visit(node, [])
    return sorted(found.values())


def wrong_imports(root: Path) -> list[str]:
    """What breaks the arrow or makes a circle."""
    modules = sources(root)
    wrong, edges, packages = [], set(), set()
    for name, file in modules.items():
        top, _, short = name.partition(".")
        pure = short.removeprefix("disco.") in PURE and short.startswith("disco.")
        for target, on_import in imports(name, file, modules):
            parts = target.split(".")
            if parts[0] == "tests" or (parts[0] == "recipe" and top != "recipe"):
                wrong.append(f"{name} imports {target}")
            if pure and on_import and parts[0] in ("verl", *OURS):
                if parts[:2] != ["recipe", "disco"] or parts[-1] not in PURE:
                    wrong.append(f"{name} imports {target} when it is imported")
            if target in modules and target != name:
                edges.add((name, target))
            if top == parts[0] == "verl_ext" and len(parts) > 1 and "." in name:
                packages.add((name.split(".")[1], parts[1]))
    # The entry point registers all, and a check looks whether it did. A package may import its own modules when called.
    packages = {(a, b) for a, b in packages if a not in (b, "plugin")}
    edges = {(a, b) for a, b in edges if a != "verl_ext.plugin" and not b.startswith(f"{a}.")}
    return wrong + [f"packages: {c}" for c in circles(packages)] + [f"modules: {c}" for c in circles(edges)]


def wrong_texts(root: Path) -> list[str]:
    """Files of verl_ext and hydra_plugins that name a recipe, or a method of one."""
    recipes = [d.name for d in (root / "recipe").iterdir() if d.is_dir() and not d.name.startswith("__")]
    methods = [f.stem for f in root.glob("recipe/*/config/algorithm/*.yaml")]
    # "real" is a word, too.
    words = "|".join([*recipes, *(rf"\b{method}\b" for method in methods if method != "real")])
    # The distribution bears the name of its first recipe.
    named = re.compile(rf"(?<!verl[-_])(?:{words})|algorithm[=:]\s*(?:{'|'.join(methods)})\b", re.IGNORECASE)
    wrong = []
    for folder in ("verl_ext", "hydra_plugins"):
        for file in sorted(f for f in (root / folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts):
            path = file.relative_to(root)
            if named.search(str(path)):
                wrong.append(f"{path} bears a recipe's name")
            for number, line in enumerate(file.read_text().splitlines(), 1):
                if found := named.search(line):
                    wrong.append(f"{path}, line {number}, names {found[0]}")
    return wrong


def test_recipes_import_verl_ext_which_knows_of_none():
    assert wrong_imports(ROOT) == []


def test_no_text_of_verl_ext_names_a_recipe():
    assert wrong_texts(ROOT) == []


TREE = {
    "verl_ext/__init__.py": "",
    "verl_ext/recipes.py": "import importlib.metadata",
    "verl_ext/plugin.py": "def activate():\n    from verl_ext.hydra import config_source\n",
    "verl_ext/hydra/config_source.py": "# verl-disco; a recipe has an entry point\nfrom verl_ext import recipes",
    "verl_ext/preflight/machine.py": "from verl_ext import plugin",
    "verl_ext/cpu/__init__.py": "def register():\n    from verl_ext.cpu import platform\n",
    "verl_ext/cpu/platform.py": "import verl_ext.cpu",
    "verl_ext/config/algorithm/grpo.yaml": "# Over real numbers",
    "hydra_plugins/launcher.py": "from verl_ext.hydra import config_source",
    "recipe/disco/__init__.py": "from recipe.disco.loss import disco_loss",
    "recipe/disco/loss.py": "import torch\nfrom .scores import log_l\n\ndef load():\n    import verl\n",
    "recipe/disco/scores.py": "import torch",
    "recipe/disco/worker.py": "import verl\nfrom recipe.disco import loss\nfrom verl_ext.hydra import config_source",
    "recipe/disco/config/algorithm/disco_b.yaml": "# Another",
    "recipe/disco/config/algorithm/real.yaml": "# REAL",
}
"""A small tree of the same shape, in which nothing is wrong."""


def faults(root: Path, tree: dict[str, str]) -> list[str]:
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return wrong_imports(root) + wrong_texts(root)


def test_a_tree_without_a_fault_has_none(tmp_path):
    assert faults(tmp_path, TREE) == []


@pytest.mark.parametrize(
    "file, text, expected",
    [
        ("verl_ext/a.py", "import recipe.mine", ["verl_ext.a imports recipe.mine"]),
        ("verl_ext/a.py", "def f():\n    from recipe import mine", ["verl_ext.a imports recipe"]),
        ("hydra_plugins/a.py", "if True:\n    import recipe", ["hydra_plugins.a imports recipe"]),
        ("recipe/disco/worker.py", "from tests.recipe import harness", ["recipe.disco.worker imports tests.recipe"]),
        ("recipe/disco/loss.py", "import verl.utils", ["recipe.disco.loss imports verl.utils when it is imported"]),
        (
            "recipe/disco/scores.py",
            "class A:\n    from verl_ext import recipes",
            ["recipe.disco.scores imports verl_ext.recipes when it is imported"],
        ),
        (
            "recipe/disco/scores.py",
            "from recipe.disco import worker",
            [
                "recipe.disco.scores imports recipe.disco.worker when it is imported",
                "modules: recipe.disco.loss -> recipe.disco.scores -> recipe.disco.worker -> recipe.disco.loss",
            ],
        ),
        (
            "verl_ext/recipes.py",
            "def f():\n    from .hydra import config_source",
            [
                "packages: hydra -> recipes -> hydra",
                "modules: verl_ext.hydra.config_source -> verl_ext.recipes -> verl_ext.hydra.config_source",
            ],
        ),
        ("verl_ext/a.yaml", "# As Disco does", ["verl_ext/a.yaml, line 1, names Disco"]),
        ("verl_ext/a.py", '"""\nSee\nalgorithm=real"""', ["verl_ext/a.py, line 3, names algorithm=real"]),
        ("verl_ext/a.md", "disco_b is another", ["verl_ext/a.md, line 1, names disco"]),
        ("hydra_plugins/disco_sweep.py", "", ["hydra_plugins/disco_sweep.py bears a recipe's name"]),
    ],
)
def test_each_fault_is_found(tmp_path, file, text, expected):
    assert faults(tmp_path, TREE | {file: text}) == expected


def test_a_circle_of_packages_is_found_where_no_module_is_in_one(tmp_path):
    tree = TREE | {
        "verl_ext/hydra/start.py": "def f():\n    from verl_ext.preflight import machine\n",
        "verl_ext/preflight/settings.py": "from verl_ext.hydra.config_source import run_name",
    }
    assert faults(tmp_path, tree) == ["packages: hydra -> preflight -> hydra"]


def test_no_time_is_told_by_a_clock_that_jumps():
    clock = re.compile(r"time\.time\(|datetime|time\.(local|gm|c)time|st_[mac]time|getmtime")
    found = [name for name, file in sources(ROOT).items() if clock.search(file.read_text())]
    assert found == []
