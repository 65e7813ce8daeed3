"""Run the study of docs/study/protocol.md: one task's stages, one run at a time, each resumed where it stopped.

    python benchmarks/study/run.py arithmetic    # on one core; docs/study/protocol.md says what is run
    python benchmarks/study/run.py countdown     # on the other, at the same time

Started again, it goes on: finished runs are skipped, the others resume from their checkpoint. A run that fails is
tried once more. Everything is below ``outputs/study/TASK``; ``collect.py`` takes what is published from there.
"""

import argparse
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from start import measure

from verl_ext.report.__main__ import find_runs
from verl_ext.report.read import Run, read_run

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).parent / "config"

METHODS = ("grpo", "disco", "dapo_static", "dapo", "disco_l_ratio", "disco_b", "dr_grpo", "trpa", "grpo_er", "ppo")
METHODS += ("maxrl", "dgpo", "drpo", "real")
WIDE = ("grpo", "disco", "dapo_static", "disco_b")
LIKE = {"grpo_free": "grpo", "grpo_unclipped": "grpo"}
"""Variants that are not tuned -> the method whose learning rate they take."""

RATES = ("1e-05", "3e-05", "0.0001", "0.0003", "0.001", "0.003", "0.01")
"""Half decades, so that a factor of about 3 is a place; as Hydra writes them, so that a run keeps its name."""
FIRST = RATES[1:5]
LR = "actor_rollout_ref.actor.optim.lr"
KNOBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "disco": ("disco.delta", ("1e-3", "3e-3", "1e-2")),
    "grpo": ("grpo.kl_coef", ("0.04", "0.004", "0")),
}
"""A second setting, tuned at the best learning rate; its family takes it over."""
STANDARD = {"disco.delta": "3e-3", "grpo.kl_coef": "0.04"}
"""The values that learning rates are tuned with."""

TUNING, SEEDS, FEW_SEEDS = (101,), (11, 12, 13, 14, 15), 3
FACTORS = (0, 1, 2)
"""Places from the best learning rate of the runs that go on: 1, 3, 10 times it. At 0.3 times it they are as tuned."""

MECHANISMS: tuple[tuple[str, ...], ...] = (
    ("algorithm=grpo_free,grpo_unclipped",),
    ("algorithm=disco", "disco.delta=1e-4,1e-3,3e-3,1e-2"),
    ("algorithm=disco", "disco.kl_estimator=k3"),
    ("algorithm=disco", "disco.tau=0.1,1,100"),
    ("algorithm=disco", "disco.constraint=none,augmented_lagrangian"),
    ("algorithm=disco", "disco.constraint=fixed", "disco.coefficient=0.1,1"),
    ("algorithm=disco", "disco.measure=lagged"),
    ("algorithm=disco", "disco.questions=grpo"),
)
ADDED: tuple[tuple[str, ...], ...] = (("algorithm=dapo_static", "dapo.overlong_buffer.enable=false"),)
"""Thought of after the main runs (docs/study/protocol.md, "Deviations"); all seeds."""


@dataclass(frozen=True)
class Plan:
    """Of one task: how long its runs are, and which stages it has.

    Attributes:
        steps: of a run.
        long: steps of a run of the stage "stability".
        every: steps between evaluations.
        stages: in order.
    """

    steps: int
    long: int
    every: int
    stages: tuple[str, ...]


PLANS = {
    "arithmetic": Plan(40, 200, 20, ("assets", "tune", "main", "stability")),
    "countdown": Plan(40, 200, 20, ("assets", "tune", "main", "wide", "mechanisms")),
}


@dataclass
class Study:
    """One task of the study in its folder.

    Attributes:
        folder: of the task.
        methods: those that are compared.
        seeds: of the comparison.
        rates: learning rates to begin with.
        extensions: learning rates that may be added where the best is at an end.
        extra: overrides of each run; a rehearsal makes it small by them.
    """

    task: str
    folder: Path
    plan: Plan
    methods: Sequence[str] = METHODS
    seeds: Sequence[int] = SEEDS
    rates: Sequence[str] = FIRST
    extensions: int = 2
    extra: Sequence[str] = ()

    # What is run --------------------------------------------------------------------------------------------------

    def sweep(self, stage: str, *overrides: str, steps: int | None = None, rates: bool = True) -> None:
        """Run a sweep of verl_ext, a second time if jobs failed.

        Raises:
            SystemExit: it was interrupted, or refused before its first job.
        """
        steps = steps or self.plan.steps
        questions = "tuning" if stage == "tune" else "judging"
        searched = [f"file://{CONFIG}", *([f"file://{self.folder}/config"] if rates else [])]
        command = [sys.executable, "-m", "verl.trainer.main_ppo", "-m", f"hydra.searchpath=[{','.join(searched)}]"]
        command += [f"hydra.sweep.dir={self.folder}/{stage}", f"+experiment=study_{self.task}"]
        command += [f"{self.task}.folder={self.folder}/assets", f"data.val_files={self.folder}/{questions}.parquet"]
        command += [f"trainer.total_training_steps={steps}", f"trainer.test_freq={self.plan.every}"]
        command += [*(["+rates=chosen"] if rates else []), *self.extra, *overrides]
        note(self.folder / "commands.txt", shlex.join(command))
        for attempt in (1, 2):
            started = time.time()
            status = call(command)
            if status == 0:
                return
            if status != 1 or not ran(self.folder / stage, started):
                raise SystemExit(status)
            print(f"study: attempt {attempt} of 2 of {shlex.join(overrides)} left failed runs", flush=True)

    def once(self, stage: str, run: Callable[[], None]) -> None:
        """Run a stage unless it was done before: its runs may have gone on since, in a later stage."""
        mark = self.folder / f"{stage}.done"
        if mark.exists():
            print(f"study: {self.task} {stage} was done before", flush=True)
            return
        print(f"study: {self.task} {stage}", flush=True)
        run()
        mark.touch()

    def run(self, stages: Sequence[str]) -> None:
        for stage in self.plan.stages:
            if stage in stages:
                self.once(stage, getattr(self, stage))

    # Stages ---------------------------------------------------------------------------------------------------------

    def assets(self) -> None:
        """Build model and data, cut the held-out questions in two, and measure where all runs start."""
        import hydra
        import verl  # noqa: F401  (its plugins add the config groups)

        overrides = [f"hydra.searchpath=[file://{CONFIG}]", f"+experiment=study_{self.task}", *self.extra]
        with hydra.initialize_config_module("verl.trainer.config", version_base=None):
            config = hydra.compose("ppo_trainer", [*overrides, f"{self.task}.folder={self.folder}/assets"])
        hydra.utils.get_method(config.verl_ext.prepare)(config)
        questions = pd.read_parquet(self.folder / "assets/test.parquet")
        for name, part in split(questions).items():
            pd.concat([part] * 8, ignore_index=True).to_parquet(self.folder / f"{name}.parquet")
        for name in ("tuning", "judging"):
            measure(self.folder, name)

    def tune(self) -> None:
        """Choose each method's learning rate, then the second settings; write them where the other stages read them."""
        tried = {method: list(self.rates) for method in self.methods}
        wanted = dict(tried)
        for extension in range(self.extensions + 1):
            for rates in sorted({tuple(r) for r in wanted.values()}):
                methods = [m for m, r in wanted.items() if tuple(r) == rates]
                self._tune(f"algorithm={','.join(methods)}", f"{LR}={','.join(rates)}")
            found = self.scores()
            if none := set(self.methods) - {method for method, _ in found}:
                raise SystemExit(f"study: no tuning run of {', '.join(sorted(none))} has finished: see their log.txt")
            wanted = {m: [rate] for m in tried if (rate := beyond({r: found.get((m, r), 0.0) for r in tried[m]}))}
            if extension < self.extensions:
                tried = {m: [*r, *wanted.get(m, [])] for m, r in tried.items()}
        best = {m: max(rates, key=lambda r: found.get((m, r), 0.0)) for m, rates in tried.items()}
        settings = dict(STANDARD)
        for method, (name, values) in KNOBS.items():
            if method in tried:
                others = [v for v in values if v != STANDARD[name]]
                self._tune(f"algorithm={method}", f"{LR}={best[method]}", f"{name}={','.join(others)}")
                of = self.scores(name)
                # The one that rates were tuned with, if none is better.
                first = [STANDARD[name], *others]
                settings[name] = max(first, key=lambda v: of.get((method, best[method], v), 0.0))
        self._write(best, settings)

    def _tune(self, *overrides: str) -> None:
        self.sweep("tune", f"seed={joined(TUNING)}", *overrides, rates=False)

    def scores(self, knob: str | None = None) -> dict[tuple[str, ...], float]:
        """Score what the stage tune has run."""
        runs = map(read_run, find_runs([self.folder / "tune"])[0])
        return scores([run for run in runs if run is not None], self.plan.steps, knob)

    def _write(self, best: Mapping[str, str], settings: Mapping[str, str]) -> None:
        """Write the group ``rates`` of the other stages' settings."""
        best = dict(best) | {m: best[of] for m, of in LIKE.items() if of in best}
        lines = ["# @package _global_", "# What the stage tune has chosen", "study:", "  rate:"]
        lines += [f"    {method}: {rate}" for method, rate in best.items()]
        lines += ["actor_rollout_ref:", "  actor:", "    optim:"]
        lines += ["      lr: ${study.rate.${oc.select:verl_ext.algorithm,ppo}}"]
        lines += ["verl_ext:", f"  kl_resolution: {settings['disco.delta']}"]
        lines += ["grpo:", f"  kl_coef: {settings['grpo.kl_coef']}"]
        file = self.folder / "config/rates/chosen.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
        (self.folder / "chosen.json").write_text(json.dumps({"lr": best, **settings}, indent=2) + "\n")

    def main(self) -> None:
        """The comparison."""
        self.sweep("main", f"seed={joined(self.seeds)}", f"algorithm={','.join(self.methods)}")

    def wide(self) -> None:
        """As many responses in groups of 32."""
        methods = [m for m in WIDE if m in self.methods]
        sizes = [
            "actor_rollout_ref.rollout.n=32",
            "data.train_batch_size=8",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        ]
        self.sweep("wide", f"seed={joined(self.seeds)}", f"algorithm={','.join(methods)}", *sizes)

    def mechanisms(self) -> None:
        """One change to a method at a time."""
        for overrides in ADDED:
            self.sweep("mechanisms", f"seed={joined(self.seeds)}", *overrides)
        for seed in self.seeds[:FEW_SEEDS]:
            for overrides in MECHANISMS:
                self.sweep("mechanisms", f"seed={seed}", *overrides)

    def stability(self) -> None:
        """Let the tuning runs at 1, 3 and 10 times the best learning rate go on."""
        best = json.loads((self.folder / "chosen.json").read_text())["lr"]
        for method in self.methods:
            place = RATES.index(best[method])
            rates = [RATES[place + f] for f in FACTORS if 0 <= place + f < len(RATES)]
            overrides = [f"algorithm={method}", f"{LR}={','.join(rates)}"]
            self.sweep("tune", f"seed={joined(TUNING)}", *overrides, steps=self.plan.long, rates=False)


def scores(runs: Sequence[Run], steps: int, knob: str | None = None) -> dict[tuple[str, ...], float]:
    """Average pass@1 over the last two evaluations up to ``steps``, and over seeds.

    By method and learning rate, and with ``knob`` by that setting; runs that failed before are not among them.
    """
    found: dict[tuple[str, ...], list[float]] = {}
    for run in runs:
        settings = run.settings
        if steps not in run.pass_at_1.index or not is_standard(settings, knob):
            continue
        key = [run.algorithm, spelled(settings[LR], RATES)]
        if knob in settings:
            key.append(spelled(settings[knob], dict(KNOBS.values())[knob]))
        passed = run.pass_at_1.loc[:steps].mean(axis=1)
        found.setdefault(tuple(key), []).append(float(passed[-2:].mean()))
    return {key: sum(values) / len(values) for key, values in found.items()}


def is_standard(settings: Mapping[str, Any], but: str | None = None) -> bool:
    """Tell whether the second settings have the values that rates were tuned with, except for ``but``."""
    return all(float(settings.get(name, value)) == float(value) for name, value in STANDARD.items() if name != but)


def spelled(value: float, among: Sequence[str]) -> str:
    """Find a number as it is written in a list."""
    return next(text for text in among if math.isclose(float(text), float(value), abs_tol=1e-12))


def note(file: Path, line: str) -> None:
    """Add a line to a file, once."""
    if line not in (file.read_text().splitlines() if file.exists() else []):
        with open(file, "a") as f:
            print(line, file=f)


def ran(folder: Path, since: float) -> bool:
    """Tell whether a job has started since then, and none was refused: runs failed, not the sweep."""
    logs = [f for f in folder.glob("*/log.txt") if f.stat().st_mtime >= since]
    return bool(logs) and not any(b"verl-disco: settings refused" in f.read_bytes() for f in logs)


def joined(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


def beyond(scores: Mapping[str, float]) -> str | None:
    """Return the next learning rate if the best of ``scores`` is the lowest or the highest; None if not."""
    places = [RATES.index(rate) for rate in scores]
    best = RATES.index(max(scores, key=scores.__getitem__))
    if best == min(places) and best > 0:
        return RATES[best - 1]
    if best == max(places) and best < len(RATES) - 1:
        return RATES[best + 1]
    return None


def split(questions: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Cut the held-out questions: a third for tuning, two thirds for judging, the same of each level."""
    place = questions.groupby("data_source").cumcount()
    return {"tuning": questions[place % 3 == 0], "judging": questions[place % 3 > 0]}


def call(command: Sequence[str]) -> int:
    """Run a command below this process, which takes it along when it is terminated; return the exit status."""
    process = subprocess.Popen(command, cwd=ROOT)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=PLANS)
    parser.add_argument("stages", nargs="*", help="some of the task's stages; all by default")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/study")
    rehearsal = parser.add_argument_group("for a rehearsal")
    rehearsal.add_argument("--steps", type=int)
    rehearsal.add_argument("--long", type=int)
    rehearsal.add_argument("--every", type=int)
    rehearsal.add_argument("--methods", nargs="+", default=METHODS)
    rehearsal.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    rehearsal.add_argument("--rates", nargs="+", default=FIRST)
    rehearsal.add_argument("--extensions", type=int, default=2)
    rehearsal.add_argument("--set", nargs="+", default=[], metavar="OVERRIDE", help="of each run")
    args = parser.parse_args()
    plan = PLANS[args.task]
    plan = Plan(args.steps or plan.steps, args.long or plan.long, args.every or plan.every, plan.stages)
    if unknown := set(args.stages) - set(plan.stages):
        parser.error(f"{args.task} has no stage {min(unknown)}; it has {', '.join(plan.stages)}")
    folder = args.folder.resolve() / args.task
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(args.task, folder, plan, args.methods, args.seeds, args.rates, args.extensions, args.set)
    study.run(args.stages or plan.stages)


if __name__ == "__main__":
    main()
