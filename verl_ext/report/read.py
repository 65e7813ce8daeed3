"""Reads runs for a report: settings, metrics, evaluations, and which of them are the same method."""

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

from verl_ext import recipes
from verl_ext.runs.folder import (
    CONFIG_FILE,
    FINISHED_FILE,
    METRICS_FILE,
    full_names,
    read_json_lines,
    read_metrics,
    read_settings,
)

EVALUATION = re.compile(r"^val-core/(?P<benchmark>.+)/(?:acc|reward|score)/mean@(?P<n>\d+)$")
"""verl's name for pass@1 over n samples. Its ``best@k/mean`` is no pass@k: drawn with replacement, it is biased low."""

POOLED = "all benchmarks"
"""Stands for the benchmark of stored responses that do not name theirs, where several were evaluated."""

SAMPLE = re.compile(r"(?P<question>.+)_\d+_\d+$")
"""verl's ``uid`` of a stored response: question, sample, and which of the sample's outputs it is."""

COPIES = ("verl_ext.", "critic.loss_")
"""Nodes that follow from the method; recipes add theirs."""

LONGEST_NAME = 80
"""Characters of a method's name that tables and legends have room for."""

NO_SETTING = re.compile(r"(^|[._])(seed|.*_dir|.*_name|logger|prepare|validator|save_freq|max_.*_ckpt_to_keep)$")
"""Settings in which any two runs may differ."""


@dataclass
class Run:
    """One run.

    Args:
        folder: its ``trainer.default_local_dir``.
        settings: by full name.
        metrics: one row per logged step, indexed by step; one column per metric, all of them numbers.
        method: the algorithm, and what else is set otherwise in its other runs.
        pass_at: under 1, pass@1 by step and benchmark, as verl logged it.
        dumps: the file of stored responses of each evaluated step that has one.
        faults: what was found damaged in it and is left out.
    """

    folder: Path
    settings: dict
    metrics: pd.DataFrame
    method: str = ""
    pass_at: dict[int, pd.DataFrame] = field(default_factory=dict)
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
        """``finished`` or ``step 40 of 100``."""
        if (self.folder / FINISHED_FILE).exists():
            return "finished"
        total = self.settings.get("trainer.total_training_steps")
        return one_line(f"step {self.metrics.index.max()}" + (f" of {total}" if total else ""))

    def column(self, *names: str) -> pd.Series:
        """The first of the metrics ``names`` that was logged, without gaps; empty if none was."""
        for name in names:
            if name in self.metrics:
                return self.metrics[name].dropna()
        return pd.Series(dtype=float)

    def answers(self, step: int) -> pd.DataFrame:
        """Count the evaluated responses of a step, by question: see :func:`read_answers`.

        Empty where none are stored. A damaged file is told in ``faults``, and the run has no stored responses then.
        """
        if step not in self._answers and step in self.dumps:
            known = list(self.pass_at.get(1, ()))
            try:
                self._answers[step], faults = read_answers(self.dumps[step], known[0] if len(known) == 1 else POOLED)
                self.faults += faults
            except ValueError as e:
                self.faults.append(f"{e}; its stored responses are left out")
                self.dumps, self._answers = {}, {}
        return self._answers.get(step, pd.DataFrame(columns=ANSWERS))


ANSWERS = ["question", "benchmark", "samples", "right", "largest_k"]


def read_answers(file: Path, benchmark: str) -> tuple[pd.DataFrame, list[str]]:
    """Count stored responses by question, and say what is odd about them.

    verl numbers the questions of an evaluation in ``uid``. Without that, a question is told by benchmark and text, and
    two of one text are one with twice the samples.

    Args:
        file: verl's, one response per line.
        benchmark: of responses that do not name theirs as ``data_source``.

    Returns:
        One row per question: ``question``, its text; ``benchmark``; how many ``samples``; the sum of their scores,
        ``right``; and ``largest_k``, the usual number of samples in its benchmark: pass@k is told up to there. It is 0
        for graded scores, of which none is simply right.

    Raises:
        ValueError: the file is damaged; names file, line and fault.
    """
    questions: dict = {}
    outputs = set()
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
                # A sample of several turns has an output for each, all with its score.
                if (sample := uid.rpartition("_")[0]) in outputs:
                    continue
                outputs.add(sample)
        if (row := questions.get(key)) is None:
            # Interned, so that the runs of a sweep share their texts. A lone surrogate fits into no table.
            text = sys.intern(text.encode(errors="replace").decode())
            row = questions[key] = [text, benchmark, 0, 0.0, math.nan]
        if row[1] is benchmark and isinstance(source, str):
            row[1] = one_line(source)
        row[2] += 1
        row[3] += right
        if right not in (0, 1):
            row[4] = right
    if not questions:
        raise ValueError(f"{file} holds no responses")
    table = pd.DataFrame(list(questions.values()), columns=[*ANSWERS[:-1], "graded"])
    graded = table.groupby("benchmark")["graded"].first().dropna()
    usual = table.groupby("benchmark")["samples"].transform(lambda n: n.mode().max())
    table["largest_k"] = usual.where(~table["benchmark"].isin(graded.index), 0)
    faults = [
        f"{file}: scores of {name} are graded ({score:g}), not 1 or 0 for right or wrong; it has no pass@k for k > 1 "
        "and no gain by difficulty"
        for name, score in graded.items()
    ]
    if short := int((table["samples"] < table["largest_k"]).sum()):
        faults.append(
            f"{file}: {short} of {len(table)} questions have fewer samples than most of their benchmark; they are left "
            "out of pass@k for k above their own number"
        )
    return table[ANSWERS], faults


def is_number(value: object) -> bool:
    """Tell whether a value from a file is a number that a float can hold; null is none, NaN is one."""
    try:
        return isinstance(value, int | float) and not math.isinf(value)
    except OverflowError:
        return False


def one_line(text: object) -> str:
    """A name or a value as text that tables, plots and terminals take: no line ends, controls or half characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(text).split()))


def read_run(folder: Path) -> Run | None:
    """Read a run; None where there are no metrics yet.

    Raises:
        ValueError: ``folder`` is no directory of a run, or the run is damaged; one sentence with file and fault.
    """
    try:
        if not (folder / CONFIG_FILE).exists():
            raise ValueError(f"{folder} is no run: it has no {CONFIG_FILE}; give trainer.default_local_dir of runs")
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
        faults.append(f"{folder / METRICS_FILE}: {len(odd)} values that are no numbers are left out, first {odd[0]}")
    pass_at_1 = evaluations(metrics)
    return Run(
        folder,
        settings,
        metrics,
        pass_at={1: pass_at_1} if len(pass_at_1) else {},
        dumps=stored_responses(folder, settings, metrics.index),
        faults=faults,
    )


def stored_responses(folder: Path, settings: dict, steps: pd.Index) -> dict[int, Path]:
    """The file of stored responses of each of ``steps`` that has one: in the run, else where its settings say."""
    told = settings.get("trainer.validation_data_dir")
    places = [Path(told)] if isinstance(told, str) and told else []
    files = [f for place in (*places, folder / "validation") for f in place.glob("*.jsonl")]
    return {int(f.stem): f for f in files if f.stem.isdecimal() and int(f.stem) in steps}


def evaluations(metrics: pd.DataFrame) -> pd.DataFrame:
    """pass@1 by step and benchmark: the mean over all samples of a question."""
    found: dict[str, pd.Series] = {}
    for name in metrics:
        if match := EVALUATION.match(name):
            values = metrics[name].dropna()
            # A resumed run may draw another number of samples, which verl logs under another name.
            found[match["benchmark"]] = found.get(match["benchmark"], values).combine_first(values)
    return pd.DataFrame(found).sort_index()


@functools.cache
def own_settings(algorithm: str) -> dict:
    """What the algorithm's YAML file sets, by full name, with those of the algorithms that it builds on."""
    file = recipes.options("algorithm").get(algorithm)
    if file is None:
        return {}
    node = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    bases = [b for b in node.pop("defaults", ()) if isinstance(b, str) and b != "_self_"]

    return {n: v for base in bases for n, v in own_settings(base).items()} | full_names("", node)


def is_the_methods_own(name: str, run: Run) -> bool:
    """Whether a setting has the value that the run's algorithm gives it."""
    own = own_settings(run.algorithm)
    if name not in own:
        return False
    # An interpolation follows from other settings, which are compared themselves.
    return "${" in str(own[name]) or run.settings.get(name) == own[name]


def values_of(name: str, settings: list[dict]) -> list:
    """The different values of a setting; 10 and 10.0 are one."""
    found = []
    for s in settings:
        if s.get(name) not in found:
            found.append(s.get(name))
    return found


def differences(settings: list[dict]) -> list[str]:
    """Names of settings that are not the same in all, but for those in which any two runs may differ."""
    copies = COPIES + tuple(name for recipe in recipes.installed() for name in recipe.copies)
    names = sorted({n for s in settings for n in s if not NO_SETTING.search(n) and not n.startswith(copies)})
    return [n for n in names if len(values_of(n, settings)) > 1]


def read_runs(folders: list[Path]) -> tuple[list[Run], dict[Path, str]]:
    """Read the runs with metrics, and say why a damaged one is left out.

    Methods are named: ``grpo (kl_coef=0.1)`` where there is also another grpo; ``grpo #2`` where what tells them apart
    is too much for a name, and stands in the table of :func:`other_differences` alone.
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
    """Name the methods of runs of one algorithm by what differs between them."""
    alike = [run.settings for run in runs]
    # Of what only some of them know, options were given; the rest is of another version.
    optional = tuple(name for recipe in recipes.installed() for name in recipe.optional)
    told = [n for n in differences(alike) if n.startswith(optional) or all(n in s for s in alike)]
    for run in runs:
        values = ", ".join(f"{n.rsplit('.', 1)[-1]}={run.settings.get(n, '(not set)')}" for n in told)
        run.method = one_line(f"{run.algorithm} ({values})" if values else run.algorithm)
    names = sorted({run.method for run in runs})
    if any(len(name) > LONGEST_NAME for name in names) and told:
        for run in runs:
            run.method = f"{run.algorithm} #{names.index(run.method) + 1}"


def refuse_shared_dumps(runs: list[Run]) -> None:
    """Leave out stored responses in a folder of several runs: each has written over those of the others."""
    folders = [{f.parent: f.parent.resolve() for f in run.dumps.values()} for run in runs]
    users = Counter(resolved for places in folders for resolved in set(places.values()))
    for run, places in zip(runs, folders, strict=True):
        if shared := [place for place, resolved in places.items() if users[resolved] > 1]:
            run.faults.append(
                f"trainer.validation_data_dir={shared[0]} is that of several runs, whose stored responses cannot be "
                "told apart; they are left out. Give each run a folder of its own"
            )
            run.dumps = {}


def other_differences(runs: list[Run]) -> dict[str, dict[str, str]]:
    """{setting: {method: value}} for what differs between runs beside the method; nothing for an equal comparison.

    A difference belongs to the methods where each run has the value that its own algorithm sets, and those whose
    algorithms do not set it have one value.
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
    """``grpo, seed 1``: what stands in more than one run, which says nothing of the spread over seeds."""
    counts = Counter(f"{r.method}, seed {r.seed}" for r in runs)
    return sorted(name for name, count in counts.items() if count > 1)
