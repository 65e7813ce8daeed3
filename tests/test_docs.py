"""Documents that make promises: the paper index, CONTRIBUTING.md, CHANGELOG.md and CITATION.cff."""

import importlib.metadata as metadata
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from recipe.disco import DiscoConfig, disco_loss
from recipe.disco.constraint import CONTROLLERS
from recipe.disco.objectives import OBJECTIVES
from recipe.disco.scores import SCORES
from verl_ext import recipes
from verl_ext.preflight.composition import Run
from verl_ext.preflight.sizes import check_sizes

ROOT = Path(__file__).resolve().parents[1]
INDEX = (ROOT / "docs/index.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in INDEX.split("\n## ")[1:]}
METHODS = recipes.options("algorithm")
PAGES = sorted(page.stem for page in (ROOT / "docs/algorithms").glob("*.md"))

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
    for link in re.findall(r"\]\((?!http)([^)#\s]+)", section):
        assert (ROOT / "docs" / link).is_file(), link
    if (ROOT / f"docs/algorithms/{name}.md").is_file():
        assert f"[page](algorithms/{name}.md)" in section
    for key in _deviations(text):
        assert re.search(rf"`([\w.]+\.)?{key}`", section), f"{config.name} says that {key} deviates; {name} does not"


def test_a_deviation_is_seen():
    text = "# @package _global_\n# T: (arXiv 1)\na:\n\n  # Paper: 1\n  b: 1\n\n  # Not in the paper; verl: 3.\n  c: 3\n"
    assert _deviations(text) == ["c"]
    assert sum(len(_deviations(config.read_text())) for config in METHODS.values()) > 20


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    latest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M).group(1)
    assert citation["version"] == latest == metadata.version("verl-disco")
    (paper,) = citation["references"]
    assert [a["family-names"] for a in paper["authors"]] == ["Li", "Lin", "Galanti", "Tu", "Yang"]
    assert paper["url"].endswith("2505.12366")


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """The files that CONTRIBUTING.md shows, in the working folder; what they register is forgotten afterwards."""
    for name, text in re.findall(r"^`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)^```", CONTRIBUTING, re.M | re.S):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    for registry in (OBJECTIVES, SCORES, CONTROLLERS):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    return tmp_path


def test_the_examples_of_contributing_do_what_they_say(files):
    config = DiscoConfig(
        objective="median",
        score="log_l_power",
        constraint="linear_hinge",
        delta=0.05,
        module=str(files / "mine.py"),
        options={"power": 0.5, "slope": 2.0},
    )
    # sqrt(2) times the mean: -1 and -2 of two positives, -3 of a negative; torch's median of two is the lower.
    log_prob = torch.tensor([[-1.0, -1], [-2, -2], [-3, -3]], dtype=torch.float64, requires_grad=True)
    reward, mask = torch.tensor([1.0, 1, 0]), torch.ones(3, 2)
    loss, metrics = disco_loss(log_prob, log_prob.detach() + 0.1, mask, reward, "qqq", **config.chosen())
    loss.backward()
    root = 2**0.5
    assert loss.item() == pytest.approx(-root + 2 * 0.05)
    assert metrics["coefficient"] == pytest.approx(2)
    by_kl = -2 / 6
    expected = [[by_kl] * 2, [by_kl - root / 2] * 2, [by_kl + root / 2] * 2]
    torch.testing.assert_close(log_prob.grad, torch.tensor(expected, dtype=torch.float64))
    reward: dict = {}
    exec((files / "reward.py").read_text(), reward)
    assert [reward["compute_score"]("words", text, "olleh") for text in ("... olleh", "hello")] == [1.0, 0.0]


def test_the_commands_of_contributing_compose(files, compose):
    commands = re.findall(r"^    python -m verl.trainer.main_ppo ((?:.*\\\n)*.*)", CONTRIBUTING, re.M)
    configs = [compose(*shlex.split(command.replace("\\\n", " "))) for command in commands]
    assert [c.disco.objective for c in configs] == ["median", "disco"]
    assert configs[0].disco.options == {"slope": 0.1}
    assert configs[1].data.max_response_length == 64 and configs[1].reward.custom_reward_function.path == "reward.py"
    variant = compose("algorithm=disco_hard", "hydra.searchpath=[file://config]")
    assert (variant.disco.negatives, variant.disco.delta, variant.verl_ext.algorithm) == ("topk", 1e-4, "disco_hard")


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", *(f"docs/algorithms/{n}.md" for n in PAGES)])
def test_what_a_document_names_is_there(document):
    text = (ROOT / document).read_text()
    names = set(re.findall(r"(?<![\w/.])((?:tests|recipe|verl_ext|benchmarks|docs|examples)/[\w/.]*\w)", text))
    assert len(names) > 1
    assert not [name for name in names if "NAME" not in name and not (ROOT / name).exists()]
    links = re.findall(r"\]\((?!http)([^)#\s]+)", text)
    assert not [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]


QUANTITY = re.compile(
    r"(?<![\w.^-])\d[\d.,]*(?:e-?\d+)?\s(?:%|s|ms|min|minutes?|hours?|[kKMGT]i?B|tok(?:ens)?/s|times|points)(?![\w/])"
)
SOURCED = {
    "README.md": {
        "by about 7 and 6 points": "the paper's abstract",
        "hold, all four of them, in 95 % of such studies": "docs/study/protocol.md",
        "their mean with its 95 % interval": "verl_ext/report/tables.py, mean_and_interval",
        "8 GB of memory": "quickstart_steps: memory in use on the machine, of all its processes",
        "4 GB of disk": "du -sh .venv, 2.8 GB with vLLM and Megatron, and the runs",
    },
    "CHANGELOG.md": {"one GPU of 24 GB": "tests/verl_ext/preflight/test_checks.py, the estimate"},
    "docs/algorithms/dgpo.md": {"exp(1/2) = 1.65 times": "arithmetic"},
    "docs/first-hour.md": {
        "one GPU of 24 GB": "the estimate of memory",
        "at most 18 of 24 GiB": "tests/verl_ext/preflight/test_memory.py",
        "36 to 50 %": "verl's table",
        "above 50 %": "verl's table",
        "above 70 %": "verl's table",
        "100 steps of 30 s": "our guess, as it says",
        "at most 15 of 16 GiB": "tests/verl_ext/preflight/test_memory.py",
    },
    "docs/index.md": {"beta 0.1 times 2.5": "TRPA's script"},
    "docs/algorithms/trpa.md": {"beta 0.1, times 2.5": "TRPA's script"},
    "docs/running-at-scale.md": {
        "GPUs of 80 GB": "the estimate of memory",
        "1 of 24 GB": "the estimate of memory",
        "some 0.5 GB per evaluation (20 kB each": "our estimate, as it says",
        "4 bytes of memory per parameter, and 5 GB": "verl_ext/export/model.py",
        "5 s and 1 GiB per answer": "verl_ext/tasks/math/reward.py",
    },
    "recipe/disco/README.md": {"0 to 25 %, ..., 100 %": "bounds of a metric"},
}
"""Quantities that no benchmark records, and what backs them."""


@pytest.mark.parametrize(
    "document",
    [
        str(file.relative_to(ROOT))
        for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "recipe/disco/README.md")
        # These stand beside their data.
        if not {"study", "results"} & set(file.relative_to(ROOT).parts)
    ],
)
def test_a_quantity_is_a_recorded_figure_or_has_a_source(document):
    text = (ROOT / document).read_text()
    # Commands, examples of output, and links that name a figure, which tests/test_benchmarks.py compares
    text = re.sub(
        r"```.*?```|^ {4}[^\n]*|`[^`]*`|\[[^\]]+\]\([^)\s]+RESULTS\.md\s\"[^\"]+\"\)", "", text, flags=re.S | re.M
    )
    text = " ".join(text.split())
    for words in SOURCED.get(document, ()):
        assert words in text, f"{document} does not say {words!r} any more: take it out of SOURCED"
        text = text.replace(words, "")
    found = [text[max(m.start() - 40, 0) : m.end()] for m in QUANTITY.finditer(text)]
    assert not found, (
        f"{document}: {found}: link it to a recorded figure, [39 %](benchmarks/RESULTS.md "
        '"quickstart: pass@1, all levels, before"), or name its source in SOURCED'
    )


def test_documents_state_what_the_settings_are(compose):
    def holds(document: str, words: str) -> bool:
        return words in " ".join((ROOT / document).read_text().split())

    small = yaml.safe_load((ROOT / "verl_ext/config/setting/small.yaml").read_text())
    questions, n = small["data"]["train_batch_size"], small["actor_rollout_ref"]["rollout"]["n"]
    longest = small["data"]["max_response_length"]
    assert holds("README.md", f"`setting=small`: {questions} questions, {n} responses of up to {longest} tokens")
    one = compose("algorithm=disco", "+experiment=gsm8k_qwen2_5_0_5b")
    batch = f"{one.data.train_batch_size} questions x {one.actor_rollout_ref.rollout.n} responses"
    assert holds("docs/first-hour.md", f"{one.trainer.total_training_steps} steps of {batch}")
    paper = compose("algorithm=disco", "+experiment=deepseek_qwen_1_5b")
    rollout = paper.actor_rollout_ref.rollout
    batch = f"{rollout.val_kwargs.n}, against {paper.data.train_batch_size} x {rollout.n}"
    assert holds("docs/running-at-scale.md", f"1590 questions x {batch}")
    assert round(1590 * rollout.val_kwargs.n / paper.data.train_batch_size / rollout.n) == 25


def test_the_published_averages_are_those_of_the_published_figures():
    published = yaml.safe_load((ROOT / "recipe/disco/config/published.yaml").read_text())
    figures = published["DeepSeek-R1-Distill-Qwen-1.5B"]
    page = (ROOT / "recipe/disco/README.md").read_text()
    (row,) = re.findall(r"^\| DS-Distill-Qwen-1.5B \|(.*)\|$", page, re.M)
    order = ("base", "grpo", "dr_grpo", "dapo", "trpa", "disco (score=l_ratio)", "disco")
    means = [sum(figures[method].values()) / 6 for method in order]
    # Ours are means of rounded figures.
    assert [float(cell.strip(" *")) for cell in row.split("|")] == pytest.approx(means, abs=1e-3)


def test_the_gpu_requirements_are_verls_pins():
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+); extra == .vllm.", "\n".join(metadata.requires("verl")), re.M))
    ours = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "requirements-gpu.txt").read_text(), re.M))
    assert {name: ours[name] for name in ("torch", "vllm", "transformers")} == {
        name: pins[name] for name in ("torch", "vllm", "transformers")
    }
    said = f"torch {pins['torch'][:4]}, vLLM {pins['vllm'][:4]}, transformers {pins['transformers'][:3]}"
    assert said in (ROOT / "docs/running-at-scale.md").read_text()


def test_the_readme_has_every_method_and_task_and_each_task_runs_on_a_cpu(compose):
    text = (ROOT / "README.md").read_text()

    def first_cells(header: str) -> list[str]:
        rows = text.partition(f"| `{header}` |")[2].partition("\n\n")[0].splitlines()[2:]
        return [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]

    assert sorted(first_cells("algorithm=")) == sorted(METHODS)
    tasks = sorted(file.stem for file in (ROOT / "verl_ext/config/task").glob("*.yaml"))
    assert sorted(first_cells("+task=")) == tasks
    for task in tasks:
        config = compose("algorithm=disco", f"+task={task}", "+backend=cpu", "model=mine")
        assert config.trainer.device == "cpu" and config.reward.custom_reward_function.path
        needed = re.findall(rf"`{task}` then needs `([^`]+)`", text)
        sized = Run(compose("algorithm=disco", f"+task={task}", "+backend=cpu", "model=mine", *needed), config)
        assert not [finding.problem for finding in check_sizes(sized) if finding.problem]
