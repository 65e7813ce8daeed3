"""The one list of checks of a run, and the two that use it: every start, and the doctor.

A check is a function of the :class:`~verl_ext.preflight.composition.Run` that yields findings: what is there, or what
is wrong and how to fix it. Add one to :data:`CHECKS`: what it needs says when it runs.
"""

from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_ext.preflight import composition
from verl_ext.preflight.composition import Run
from verl_ext.preflight.errors import explain
from verl_ext.preflight.findings import Finding, first_lines, run_checks
from verl_ext.preflight.lost_updates import check_adapters, check_lost_updates
from verl_ext.preflight.model import check_model
from verl_ext.preflight.next_verl import check_next_verl
from verl_ext.preflight.nodes import ask_cluster
from verl_ext.preflight.packages import check_packages
from verl_ext.preflight.references import check_code, check_imports, check_paths
from verl_ext.preflight.rows import check_data_files, check_rows
from verl_ext.preflight.settings import check_cpu, check_dataclasses, check_validator, check_verls_own
from verl_ext.preflight.sizes import check_first_evaluation, check_sizes, check_steps
from verl_ext.preflight.trainer import check_asynchrony, check_trainer
from verl_ext.preflight.unread import check_unread
from verl_ext.preflight.values import check_values


class Needs(Enum):
    """What a check needs, and so what it costs and who runs it."""

    OVERRIDES = auto()
    """The settings as composed: milliseconds, at every start. A run of stock verl is told, and goes on."""
    CODE = auto()
    """To look for the code that settings name, without importing it: milliseconds, at every start."""
    FILES = auto()
    """To look for data and models: milliseconds, at every start, once ``verl_ext.prepare`` has built what it builds."""
    CONTENTS = auto()
    """To read data and import code: seconds, the doctor alone."""
    SETTINGS = auto()
    """Right values: milliseconds, at every start."""
    CLUSTER = auto()
    """An answer of each node of a cluster that runs already: seconds, at every start."""
    PLAN = auto()
    """Right values, verl's dataclasses, the tokenizer and an estimate of memory: seconds, the doctor alone."""


def check_nodes(run: Run) -> Iterator[Finding]:
    """Name nodes of the cluster that lack what this one has."""
    if not run.is_stock:
        yield from ask_cluster(run.config, run.folder)


CHECKS: dict[Needs, list[Callable[[Run], Iterator[Finding]]]] = {
    Needs.OVERRIDES: [check_unread, check_values, check_lost_updates],
    Needs.CODE: [check_code],
    Needs.FILES: [check_paths, check_data_files],
    Needs.CONTENTS: [check_imports, check_rows],
    Needs.SETTINGS: [check_trainer, check_asynchrony, check_next_verl, check_adapters, check_cpu, check_validator],
    Needs.CLUSTER: [check_nodes],
    Needs.PLAN: [
        check_dataclasses,
        check_verls_own,
        check_sizes,
        check_steps,
        check_model,
        check_first_evaluation,
        check_packages,
    ],
}


def refuse(run: Run, *needs: Needs) -> None:
    """Run these checks of a start: print the warnings, and end it where something is wrong.

    Raises:
        ValueError: says what is wrong, and what would be right.
    """
    for need in needs:
        if run.is_stock and need is not Needs.OVERRIDES:
            continue
        wrong = []
        for finding in run_checks(CHECKS[need], run):
            if not finding.problem:
                continue
            # These judge by what sources read: if one fails itself, that says nothing about the settings.
            if finding.warning or (need is Needs.OVERRIDES and (run.is_stock or finding.error)):
                print(f"verl-disco: warning: {finding}", flush=True)
            else:
                wrong.append(finding)
        if failed := next((f.error for f in wrong if f.error), None):
            raise failed
        if wrong:
            raise ValueError("; ".join(map(str, wrong)))


def examine(overrides: Sequence[str]) -> Iterator[Finding]:
    """Run all checks of the run with these overrides, without starting it, in the order in which a reader wants them.

    Stops at the first error that later checks depend on: settings that do not compose, or values that cannot be right.
    """
    try:
        run = composition.compose(overrides)
    except Exception as e:
        yield explain(e, overrides)
        return
    values = [o for o in overrides if "." in o.split("=")[0]]
    hint = f"; it may come from {', '.join(values)}" if values else ""
    found = {check: list(run_checks([check], run, hint=hint)) for check in CHECKS[Needs.OVERRIDES]}
    for findings in found.values():
        yield from findings
    wrong = any(f.problem and not f.warning for check in found if check is not check_unread for f in found[check])
    for name in composition.unset(run.composed)[:1]:
        yield Finding("settings", "", f"the settings do not compose: {name} is not set", f"give {name}=...")
        return
    try:
        config = run.config
    except Exception as e:
        if not wrong:
            problem = f"the settings do not compose: {first_lines(e)}"
            yield Finding("settings", "", problem, "fix the setting that it names")
        return
    known = composition.names(run.plain)
    for finding in found[check_unread]:
        if finding.name not in known:
            leave_out(config, finding.name)
    for need in (Needs.CODE, Needs.FILES, Needs.CONTENTS):
        yield from run_checks(CHECKS[need], run, hint=hint)
    if wrong:
        yield Finding("further checks", "skipped: fix the values above first")
        return
    for need in (Needs.SETTINGS, Needs.PLAN, Needs.CLUSTER):
        yield from run_checks(CHECKS[need], run, hint=hint)


def leave_out(config: DictConfig, name: str) -> None:
    """Take a setting out, so that a name reported once is not refused again by what is made of its node."""
    parent, _, key = name.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, DictConfig) and key in node:
        with open_dict(node):
            del node[key]
