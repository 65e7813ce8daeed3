"""Read runs for a report: settings, metrics, evaluations, and the method of each."""

import functools
import math
import re
import reprlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_ext import recipes
from verl_ext.runs.evaluations import EVALUATION
from verl_ext.runs.folder import (
    CONFIG_FILE,
    FINISHED_FILE,
    METRICS_FILE,
    full_names,
    read_json_lines,
    read_metrics,
    read_settings,
)

POOLED = "all benchmarks"
"""Benchmark of stored responses that do not name theirs, if several benchmarks were evaluated."""

SAMPLE = re.compile(r"(?P<question>.+)_\d+_\d+$")
"""verl's ``uid`` of a stored response: question, sample, and index of the sample's output."""

COPIES = ("verl_ext.", "critic.loss_")
"""Settings that follow from the method; recipes add theirs."""

LONGEST_NAME = 80
"""Characters of a method's name that fit into tables and legends."""

NO_SETTING = re.compile(r"(^|[._])(seed|.*_dir|.*_name|logger|prepare|validator|save_freq|max_.*_ckpt_to_keep)$")
"""Settings that may differ between any two runs."""


@dataclass
class Run:
    """A run that has logged metrics.

    Args:
        folder: its ``trainer.default_local_dir``.
        settings: by full name.
        metrics: one row per logged step, indexed by step; one numeric column per metric.
        method: the algorithm, plus the settings in which its other runs differ.
        pass_at_1: by step and benchmark, as verl logged it; empty without an evaluation.
        dumps: evaluated step -> file of its stored responses.
        faults: what is damaged and left out.
    """

    folder: Path
    settings: dict
    metrics: pd.DataFrame
    method: str = ""
    pass_at_1: pd.DataFrame = field(default_factory=pd.DataFrame)
    dumps: dict[int, Path] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    _answers: dict[int, pd.DataFrame] = field(default_factory=dict, init=False, repr=False)

    @property
    def algorithm(self) -> str:
        return one_line(self.settings.get("verl_ext.algorithm", recipes.DEFAULT_ALGORITHM))

    @property
    def seed(self) -> str:
        return one_line(self.settings.get("seed", self.settings.get("data.seed")))

    @property
    def state(self) -> str:
        """Either ``finished`` or ``step 40 of 100``."""
        if (self.folder / FINISHED_FILE).exists():
            return "finished"
        total = self.settings.get("trainer.total_training_steps")
        return one_line(f"step {self.metrics.index.max()}" + (f" of {total}" if total else ""))

    def column(self, *names: str) -> pd.Series:
        """Return the first of the metrics ``names`` that was logged, without gaps; empty if none was."""
        found = next((self.metrics[name] for name in names if name in self.metrics), pd.Series(dtype=float))
        return found.dropna()

    @property
    def unnamed_benchmark(self) -> str:
        """The benchmark of stored responses that do not name theirs."""
        known = list(self.pass_at_1)
        return known[0] if len(known) == 1 else POOLED

    def answers(self, step: int) -> pd.DataFrame:
        """Count the evaluated responses of a step by question, as :func:`read_answers`; empty if none are stored.

        A damaged file is added to ``faults``, and all stored responses of the run are left out.
        """
        if step not in self._answers and step in self.dumps:
            try:
                self._answers[step], faults = read_answers(self.dumps[step], self.unnamed_benchmark)
                self.faults += faults
            except ValueError as e:
                self.faults.append(f"{e}; its stored responses are left out")
                self.dumps, self._answers = {}, {}
        return self._answers.get(step, pd.DataFrame(columns=ANSWERS))


RESPONSES = ["number", "question", "benchmark", "right"]
ANSWERS = ["question", "benchmark", "samples", "right", "largest_k"]


def read_responses(file: Path, benchmark: str, texts: bool = False) -> pd.DataFrame:
    """Read stored responses, one row each.

    verl's ``uid`` identifies a question. Without it, benchmark and text do, and questions with the same text become
    one with more samples.

    Args:
        file: written by verl, one response per line.
        benchmark: of responses that do not name theirs as ``data_source``.
        texts: add the responses' texts, which may need much memory.

    Returns:
        The ``number`` of the question, its text (``question``), ``benchmark`` and the score (``right``); with ``texts``
        the response (``output``) and the ground truth (``truth``).

    Raises:
        ValueError: the file is damaged; names file, line and fault.
    """
    rows, outputs = [], set()
    numbers: dict = {}
    for number, line in read_json_lines(file):
        text, source, uid = line.get("input"), line.get("data_source"), line.get("uid")
        name, right = next(((n, line[n]) for n in ("acc", "score") if line.get(n) is not None), ("acc or score", None))
        if not isinstance(text, str):
            raise ValueError(f"{file}, line {number}, has no text as input")
        if not is_number(right) or math.isnan(right):
            raise ValueError(f"{file}, line {number}, has {name}={reprlib.repr(right)}; it must be a number")
        key = (str(source), text)
        if isinstance(uid, str):
            key = uid
            if match := SAMPLE.match(uid):
                key = match["question"]
                # A sample with several turns has an output per turn, all with the same score.
                if (sample := uid.rpartition("_")[0]) in outputs:
                    continue
                outputs.add(sample)
        # Interned, so that the runs of a sweep share memory.
        text = sys.intern(clean(text))
        name = one_line(source) if isinstance(source, str) else benchmark
        shown = [clean(str(line.get(n, ""))) for n in ("output", "gts")] if texts else []
        rows.append((numbers.setdefault(key, len(numbers)), text, name, float(right), *shown))
    if not rows:
        raise ValueError(f"{file} holds no responses")
    return pd.DataFrame(rows, columns=[*RESPONSES, *(["output", "truth"] if texts else [])])


def read_answers(file: Path, benchmark: str) -> tuple[pd.DataFrame, list[str]]:
    """Count stored responses by question, as :func:`read_responses` reads them; return also what is left out.

    Returns:
        One row per question: its text (``question``), ``benchmark``, number of ``samples``, sum of their scores
        (``right``), and ``largest_k``, the usual number of samples in the benchmark and the limit for pass@k; 0 for
        graded scores, which are not simply right or wrong.

    Raises:
        ValueError: the file is damaged; names file, line and fault.
    """
    responses = read_responses(file, benchmark)
    questions = responses.groupby("number")
    table = questions.agg({"question": "first", "benchmark": "first", "right": "sum"}).assign(samples=questions.size())
    graded = responses[~responses["right"].isin((0, 1))].groupby("benchmark")["right"].first()
    usual = table.groupby("benchmark")["samples"].transform(lambda n: n.mode().max())
    table["largest_k"] = usual.where(~table["benchmark"].isin(graded.index), 0)
    faults = [
        f"{file}: scores of {name} are graded ({score:g}), not 1 or 0; {name} is left out of pass@k for k > 1 and of "
        "gain by difficulty"
        for name, score in graded.items()
    ]
    if short := int((table["samples"] < table["largest_k"]).sum()):
        faults.append(
            f"{file}: {short} of {len(table)} questions have fewer samples than most in their benchmark; they are left "
            "out of pass@k for k above that number"
        )
    return table[ANSWERS], faults


def clean(text: str) -> str:
    """Replace lone surrogates, which pandas cannot store."""
    return text.encode(errors="replace").decode()


def is_number(value: object) -> bool:
    """Tell whether a value from a file is a finite number that fits a float, or NaN."""
    try:
        return isinstance(value, int | float) and not math.isinf(value)
    except OverflowError:
        return False


def one_line(text: object) -> str:
    """Convert a name or value to text for tables, plots and terminals: one line, printable characters only."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(text).split()))


def read_run(folder: Path) -> Run | None:
    """Read a run; None if it has no metrics yet.

    Raises:
        ValueError: ``folder`` is not a run's, or the run is damaged; one sentence with file and fault.
    """
    try:
        if not (folder / CONFIG_FILE).exists():
            raise ValueError(f"{folder} is not a run: it has no {CONFIG_FILE}; give trainer.default_local_dir of runs")
        logged = (folder / METRICS_FILE).exists()
    except OSError as e:
        raise ValueError(f"{folder} cannot be read: {e.strerror}") from None
    settings = read_settings(folder)
    rows = read_metrics(folder) if logged else []
    if not rows:
        return None
    index = pd.Index([row.pop("step") for row in rows], name="step")
    names = {name: one_line(name) for name in set().union(*rows)}
    numbers = [{names[name]: float(value) for name, value in row.items() if is_number(value)} for row in rows]
    metrics = pd.DataFrame(numbers, index=index, dtype=float)
    faults = []
    if odd := [
        f"{name}={reprlib.repr(value)} at step {step}"
        for step, row in zip(index, rows, strict=True)
        for name, value in row.items()
        if value is not None and not is_number(value)
    ]:
        faults.append(f"{folder / METRICS_FILE}: {len(odd)} values that are not numbers are left out, first {odd[0]}")
    dumps = stored_responses(folder, settings, metrics.index)
    return Run(folder, settings, metrics, pass_at_1=evaluations(metrics), dumps=dumps, faults=faults)


def stored_responses(folder: Path, settings: dict, steps: pd.Index) -> dict[int, Path]:
    """Find the files of stored responses of ``steps``, in the run's folder or else where its settings say."""
    place = settings.get("trainer.validation_data_dir")
    places = [Path(place)] if isinstance(place, str) and place else []
    files = [f for place in (*places, folder / "validation") for f in place.glob("*.jsonl")]
    return {int(f.stem): f for f in files if f.stem.isdecimal() and int(f.stem) in steps}


def evaluations(metrics: pd.DataFrame) -> pd.DataFrame:
    """Collect pass@1 by step and benchmark, the mean over all samples of a question."""
    found: dict[str, pd.Series] = {}
    for name in metrics:
        if match := EVALUATION.match(name):
            values = metrics[name].dropna()
            # A resumed run may draw another number of samples, which changes the metric's name.
            found[match["benchmark"]] = found.get(match["benchmark"], values).combine_first(values)
    return pd.DataFrame(found).sort_index()


@functools.cache
def own_settings(algorithm: str) -> dict:
    """Read what the algorithm's YAML file and those it builds on set, by full name."""
    file = recipes.options("algorithm").get(algorithm)
    if file is None:
        return {}
    node = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    bases = [b for b in node.pop("defaults", ()) if isinstance(b, str) and b != "_self_"]
    return {n: v for base in bases for n, v in own_settings(base).items()} | full_names("", node)


def is_the_methods_own(name: str, run: Run) -> bool:
    """Tell whether a setting has the value that the run's algorithm gives it."""
    own = own_settings(run.algorithm)
    if name not in own:
        return False
    value = own[name]
    root = OmegaConf.create({"value": value})
    for other in re.findall(r"[\w.]+", str(value)):
        if other in run.settings:
            OmegaConf.update(root, other, run.settings[other], force_add=True)
    try:
        return run.settings.get(name) == root.value
    except OmegaConfBaseException:
        # It follows what only verl's process can resolve; that is compared itself.
        return True


def values_of(name: str, settings: list[dict]) -> list:
    """List the different values of a setting; 10 and 10.0 are the same."""
    found = []
    for s in settings:
        if s.get(name) not in found:
            found.append(s.get(name))
    return found


def differences(settings: list[dict]) -> list[str]:
    """Name the settings that differ, except those that may differ between any two runs."""
    copies = COPIES + tuple(name for recipe in recipes.installed() for name in recipe.copies)
    names = sorted({n for s in settings for n in s if not NO_SETTING.search(n) and not n.startswith(copies)})
    return [n for n in names if len(values_of(n, settings)) > 1]


def read_runs(folders: list[Path]) -> tuple[list[Run], dict[Path, str]]:
    """Read the runs with metrics; return also the damaged ones, with the reason.

    A method is named ``grpo (kl_coef=0.1)`` if other grpo runs differ, and ``grpo #2`` if the differences are too long
    for a name; :func:`other_differences` lists them.
    """
    runs, damaged = [], {}
    for folder in folders:
        try:
            if (run := read_run(folder)) is not None:
                runs.append(run)
        except ValueError as e:
            damaged[folder] = str(e)
    refuse_shared_dumps(runs)
    for algorithm in {run.algorithm for run in runs}:
        name_methods([run for run in runs if run.algorithm == algorithm])
    return sorted(runs, key=lambda r: (r.method, r.seed)), damaged


def name_methods(runs: list[Run]) -> None:
    """Name the method of each run of one algorithm by the settings that differ."""
    alike = [run.settings for run in runs]
    # A setting that only some runs have was given if it is optional; else it belongs to another version.
    optional = tuple(name for recipe in recipes.installed() for name in recipe.optional)
    compared = [n for n in differences(alike) if n.startswith(optional) or all(n in s for s in alike)]
    for run in runs:
        values = ", ".join(f"{n.rsplit('.', 1)[-1]}={run.settings.get(n, '(not set)')}" for n in compared)
        run.method = one_line(f"{run.algorithm} ({values})" if values else run.algorithm)
    names = sorted({run.method for run in runs})
    if any(len(name) > LONGEST_NAME for name in names) and compared:
        for run in runs:
            run.method = f"{run.algorithm} #{names.index(run.method) + 1}"


def refuse_shared_dumps(runs: list[Run]) -> None:
    """Leave out stored responses in a folder of several runs, which have overwritten each other's files."""
    folders = [{f.parent: f.parent.resolve() for f in run.dumps.values()} for run in runs]
    users = Counter(resolved for places in folders for resolved in set(places.values()))
    for run, places in zip(runs, folders, strict=True):
        if shared := [place for place, resolved in places.items() if users[resolved] > 1]:
            run.faults.append(
                f"trainer.validation_data_dir={shared[0]} is shared by several runs, whose responses are left out; "
                "give each run a folder of its own"
            )
            run.dumps = {}


def other_differences(runs: list[Run]) -> dict[str, dict[str, str]]:
    """Return {setting: {method: value}} for what differs besides the method; empty for a fair comparison.

    A difference belongs to the method if each run has its own algorithm's value, and all runs whose algorithms set none
    have the same value.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name in differences([r.settings for r in runs]):
        rest = [r for r in runs if not is_the_methods_own(name, r)]
        changed = [r for r in rest if name in own_settings(r.algorithm)]
        if not changed and len(values_of(name, [r.settings for r in rest])) <= 1:
            continue
        for run in runs:
            values = found.setdefault(one_line(name), {}).setdefault(run.method, [])
            if (value := one_line(run.settings.get(name, "(not set)"))) not in values:
                values.append(value)
    return {name: {m: " or ".join(v) for m, v in by_method.items()} for name, by_method in found.items()}


def repeated_seeds(runs: list[Run]) -> list[str]:
    """List method and seed of repeated runs (``grpo, seed 1``), which say nothing about the spread over seeds."""
    counts = Counter(f"{r.method}, seed {r.seed}" for r in runs)
    return sorted(name for name, count in counts.items() if count > 1)
