"""Documents that make promises: the paper index, CONTRIBUTING.md, CHANGELOG.md and CITATION.cff."""

import importlib.metadata as metadata
import re
from pathlib import Path

import pytest
import yaml

from verl_ext import recipes

ROOT = Path(__file__).resolve().parents[1]
INDEX = (ROOT / "docs/index.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in INDEX.split("\n## ")[1:]}
METHODS = recipes.options("algorithm")

# What a comment in a config file says of a value that is not simply the paper's.
DEVIATES = re.compile(r"our choice|[Nn]ot in the paper|not known|unknown|not be checked|no number|not read|\bverl\b")


def _deviations(text: str) -> list[str]:
    """Keys whose comment says that their value is not, or not only, the paper's."""
    found, comment = [], ""
    for line in map(str.strip, text.splitlines()[2:]):
        if line.startswith("#"):
            comment += line.lstrip("#")
        else:
            if line and DEVIATES.search(comment):
                found.append(line.partition(":")[0])
            comment = ""
    return found


def test_the_index_has_every_method_once():
    assert sorted(SECTIONS) == sorted(METHODS)
    assert INDEX.count("\n## ") == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_index_tells_paper_config_command_page_and_every_deviation(name):
    section, config = SECTIONS[name], METHODS[name]
    text = config.read_text()
    papers = re.findall(r"arXiv (\d{4}\.\d{5})", text.splitlines()[1]) or ["1707.06347"]
    assert re.findall(r"\[Paper\]\(https://arxiv.org/abs/([\d.]+)\)", section) == papers[-1:]
    assert f"](../{config.relative_to(ROOT)})" in section
    assert f"python -m verl.trainer.main_ppo algorithm={name} ..." in section
    for link in re.findall(r"\]\((?!http)([^)#]+)", section):
        assert (ROOT / "docs" / link).is_file(), link
    if (ROOT / f"docs/algorithms/{name}.md").is_file():
        assert f"[page](algorithms/{name}.md)" in section
    for key in _deviations(text):
        assert re.search(rf"`([\w.]+\.)?{key}`", section), f"{config.name} says that {key} deviates; {name} does not"


def test_a_deviation_is_seen():
    text = "# @package _global_\n# T: (arXiv 1)\na:\n\n  # Paper: 1\n  b: 1\n\n  # Not in the paper; verl: 3.\n  c: 3\n"
    assert _deviations(text) == ["c"]
    assert sum(len(_deviations(config.read_text())) for config in METHODS.values()) > 20


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == metadata.version("verl-disco")
    (paper,) = citation["references"]
    assert [a["family-names"] for a in paper["authors"]] == ["Li", "Lin", "Galanti", "Tu", "Yang"]
    assert paper["url"].endswith("2505.12366")
