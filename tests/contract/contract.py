"""The contract with verl: all that this package imports, overrides or reads by name, in ``contract.yaml``.

verl never signed it, so it is compared with the verl that is installed. To move to the next verl:

1. install it, raise ``SUPPORTED_VERL`` in ``verl_ext/plugin.py`` and the pin in ``pyproject.toml``;
2. run ``python tests/contract/contract.py``: each line names something of verl's, what has become of it, what it is
   for here, and the places that use it. ``tests/contract/test_contract.py`` fails with the same lines;
3. go through them: change those places, then the contract: ``python tests/contract/contract.py --write`` puts
   today's names and parameters into it and drops those that nothing uses any more; write the reasons where it left
   ``TODO``.
   Settings, data and texts are few and edited by hand;
4. a parameter that is only new may still change a result: read verl's code before you write it down;
5. run the suite. What the contract cannot see are numbers: the tests of training steps show those.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import installed
import yaml
from uses import Uses, find_uses

from verl_ext.preflight.findings import nearest

TODO = "TODO"
"""For a reason that is to be written."""

FILE = Path(__file__).with_name("contract.yaml")


@dataclass
class Contract:
    """What ``contract.yaml`` says.

    Args:
        names: full name -> (parameters, or "" for what takes none; reason).
        settings: full name -> reason.
        optional: settings among these that verl reads and does not list.
        data: word -> reason: columns, tags and facts of a batch, and what workers return.
        texts: file names, environment variables and the like -> (module of verl's that has it, reason).
        types: attribute of verl's -> class, or node of the settings.
        parameters: the same for names of parameters and mixins of ours.
    """

    names: dict[str, tuple[str, str]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    optional: set[str] = field(default_factory=set)
    data: dict[str, str] = field(default_factory=dict)
    texts: dict[str, tuple[str, str]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path = FILE) -> "Contract":
        """Read the file."""
        raw = yaml.safe_load(file.read_text())
        contract = cls(types=raw["types"], parameters=raw["parameters"])
        for owner, members in raw["names"].items():
            common = members.get("_")
            for written, reason in members.items():
                name, bracket, rest = written.partition("(")
                if written != "_":
                    contract.names[f"{owner}.{name}"] = bracket + rest, reason or common or TODO
        for node, groups in raw["settings"].items():
            for keys, reason in groups.items():
                for key in keys.split():
                    name = f"{node}.{key.removeprefix('+')}"
                    contract.settings[name] = reason
                    contract.optional |= {name} if key.startswith("+") else set()
        for words in raw["data"].values():
            contract.data |= {word: reason for keys, reason in words.items() for word in keys.split()}
        for module, found in raw["texts"].items():
            contract.texts |= {text: (module, reason) for text, reason in found.items()}
        return contract

    def uses(self) -> Uses:
        """What our sources use."""
        return find_uses(self.types, self.parameters)


def changes(contract: Contract, uses: Uses) -> Iterator[str]:
    """Name all that the installed verl has no longer, or has with other parameters, and where we use it."""
    for name, (parameters, reason) in contract.names.items():
        now = installed.describe(name)
        places = _places(uses, "names", name) or _places(uses, "overrides", name)
        if now is None:
            near = nearest(name.rpartition(".")[2], installed.neighbours(name))
            yield _line(name, f"is missing{_near(near)}", reason, places)
        elif now.replace(" ", "") != parameters.replace(" ", ""):
            yield _line(name, f"was {parameters or 'no function'}, is {now or 'no function'}", reason, places)
    for name, reason in contract.settings.items():
        if not (installed.is_read(name) if name in contract.optional else name in installed.settings()):
            what = "is read by nothing" if name in contract.optional else "is no setting"
            near = nearest(name, installed.settings(), 0.85)
            yield _line(name, f"{what}{_near(near)}", reason, _places(uses, "settings", name))
    for word, reason in contract.data.items():
        if not installed.handles(word):
            yield _line(f"data {word!r}", "is in none of verl's files that handle batches", reason, _words(uses, word))
    for text, (module, reason) in contract.texts.items():
        if not any(text in t for t in installed.texts(module)):
            yield _line(f"{text!r}", f"is not in {module}", reason, _texts(uses, text))


def unwritten(contract: Contract, uses: Uses) -> Iterator[str]:
    """Name all that our sources use and the contract does not list."""
    for name, places in sorted(missing_names(contract, uses).items()):
        yield f"{name} is used in {_list(places)}, but not in {FILE.name}"
    for name, places in sorted(uses["settings"].items()):
        # Ours stand in our own files, and have their own tests.
        if name not in contract.settings and not _holds(name, contract) and name not in _own_settings():
            yield f"{name} is used in {_list(places)}, but not in {FILE.name}"
    keys = {part for name in uses["settings"] for part in name.split(".")}
    for word, places in sorted(uses["words"].items()):
        known = word in contract.data or word in contract.texts or word in keys or word in uses["own"]
        if "_" in word and not known and installed.handles(word):
            yield f"data {word!r} is used in {_list(places)}, but not in {FILE.name}"
    for text, places in sorted(uses["variables"].items()):
        if text not in contract.texts and installed.mentions(text):
            yield f"{text!r} is used in {_list(places)}, but not in {FILE.name}"


def missing_names(contract: Contract, uses: Uses) -> dict[str, set[str]]:
    """Names that our sources use and the contract does not list -> places."""
    listed = contract.names.keys() | contract.texts.keys()
    found = {n: places for n, places in uses["names"].items() if n not in listed and not _holds(n, contract)}
    own = {n.rpartition(".")[2] for n in uses["overrides"]}
    # Of a class that we extend, what it does not have is ours.
    found = {n: p for n, p in found.items() if n.rpartition(".")[2] not in own or installed.describe(n) is not None}
    overridden = {n: p for n, p in uses["overrides"].items() if n not in listed and n.rpartition(".")[2] != "__doc__"}
    found |= {n: p for n, p in overridden.items() if installed.describe(n) is not None}
    return {n: p for n, p in found.items() if not any(other.startswith(f"{n}.") for other in found)}


def unused(contract: Contract, uses: Uses) -> Iterator[str]:
    """Name all that the contract lists and our sources do not use."""
    for kind, names in (
        ("names", [n for n in contract.names if n not in uses["overrides"]]),
        ("settings", contract.settings),
        ("words", contract.data),
    ):
        for name in names:
            if name not in uses[kind] and not any(n.startswith(f"{name}.") for n in uses[kind]):
                yield f"{name} is in {FILE.name}, but used nowhere"
    for text in contract.texts:
        if not _texts(uses, text):
            yield f"{text!r} is in {FILE.name}, but used nowhere"


def rewrite(uses: Uses, file: Path = FILE) -> None:
    """Bring the names in the file up to the installed verl and to our sources, with TODO for reasons to be written."""
    contract, text = Contract.load(file), file.read_text()
    raw = yaml.safe_load(text)["names"]
    reasons = {f"{o}.{w.partition('(')[0]}": reason for o, members in raw.items() for w, reason in members.items()}
    gone = {line.split(" ")[0] for line in unused(contract, uses)}
    owners: dict[str, list[str]] = {}
    for name in sorted({*contract.names, *missing_names(contract, uses)} - gone):
        parameters = installed.describe(name)
        owner, _, member = name.rpartition(".")
        if parameters is not None:
            reason = reasons.get(name, None if f"{owner}._" in reasons else TODO)
            owners.setdefault(owner, []).append(_entry(member + parameters, reason))
    blocks = []
    for owner, lines in owners.items():
        common = [_entry("_", reasons[f"{owner}._"])] if f"{owner}._" in reasons else []
        blocks.append("\n".join([f"  {owner}:", *common, *lines]))
    before, after = text.split("\nnames:", 1)[0] + "\n", text[text.index("\nsettings:\n") :]
    file.write_text(before + "names:\n" + "\n\n".join(blocks) + "\n" + after)


def _entry(key: str, reason: str | None) -> str:
    key, reason = (f'"{x}"' if ": " in x else x for x in (key, reason or ""))
    return f"    {key}: {reason}".rstrip()


def _holds(name: str, contract: Contract) -> bool:
    """Whether the contract lists something in this."""
    return any(n.startswith(f"{name}.") for n in (*contract.names, *contract.settings))


@cache
def _own_settings() -> frozenset[str]:
    from verl_ext.preflight.unread import names_of_groups

    return frozenset(names_of_groups() - installed.settings())


def _line(name: str, what: str, reason: str, places: set[str]) -> str:
    return f"{name} {what}\n    for: {reason}\n    used in: {_list(places)}"


def _near(names: list[str]) -> str:
    return f" (nearest: {', '.join(names)})" if names else ""


def _list(places: set[str]) -> str:
    return ", ".join(sorted(places)) or "nothing"


def _places(uses: Uses, kind: str, name: str) -> set[str]:
    inside = (places for n, places in uses[kind].items() if n == name or n.startswith(f"{name}."))
    return set().union(*inside)


def _words(uses: Uses, word: str) -> set[str]:
    return uses["words"].get(word, set())


def _texts(uses: Uses, text: str) -> set[str]:
    return set().union(*(places for found, places in uses["texts"].items() if text in found))


def main() -> int:
    contract = Contract.load()
    uses = contract.uses()
    if "--write" in sys.argv[1:]:
        rewrite(uses)
        contract = Contract.load()
    lines = [line for check in (changes, unwritten, unused) for line in check(contract, uses)]
    print("\n".join(lines) or "verl is as the contract says")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
