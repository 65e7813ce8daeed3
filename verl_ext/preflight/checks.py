"""Lists all checks of a run, for every start and for the doctor.

A check is a function of the :class:`~verl_ext.preflight.composition.Run` that yields findings: what it saw, or what is
wrong and how to fix it. Add yours to :data:`CHECKS`, under what it needs.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import Enum, auto

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_ext.preflight import composition
from verl_ext.preflight.composition import Run
from verl_ext.preflight.errors import explain
from verl_ext.preflight.findings import Finding, first_lines, run_checks
from verl_ext.preflight.model import check_model, check_tokenizer
from verl_ext.preflight.nodes import ask_cluster
from verl_ext.preflight.packages import check_packages
from verl_ext.preflight.references import check_code, check_imports, check_paths
from verl_ext.preflight.rows import check_columns, check_data_files, check_default_reward, check_rows
from verl_ext.preflight.settings import check_cpu, check_dataclasses, check_validator, check_verls_own
from verl_ext.preflight.sizes import check_first_evaluation, check_rows_of_a_step, check_sizes, check_steps
from verl_ext.preflight.skipping import check_skipping
from verl_ext.preflight.trainer import (
    check_adapters,
    check_asynchrony,
    check_critic,
    check_lost_updates,
    check_next_verl,
    check_own_settings,
    check_recipes_worker,
    check_task,
    check_trainer,
    check_val_only,
    will_build,
)
from verl_ext.preflight.unread import check_unread
from verl_ext.preflight.values import check_values


class Needs(Enum):
    """What a check needs, and so what it costs and who runs it."""

    OVERRIDES = auto()
    """The settings as composed: at every start, quick. A run of stock verl is warned, not refused."""
    CODE = auto()
    """The code that settings name, without importing it: at every start, quick."""
    FILES = auto()
    """Data and models to exist: at every start, after ``verl_ext.prepare`` has built its files; of data the heads."""
    CONTENTS = auto()
    """To read data and import code: seconds, the doctor alone."""
    SETTINGS = auto()
    """Right values: at every start, quick."""
    CLUSTER = auto()
    """An answer of each node of a running cluster: seconds, at every start."""
    PLAN = auto()
    """Right values, verl's dataclasses, the tokenizer and an estimate of memory: seconds, the doctor alone."""


def check_nodes(run: Run) -> Iterator[Finding]:
    """Name nodes of the cluster that differ from this one."""
    if not run.is_stock:
        yield from ask_cluster(run.config, run.folder)


_TRAINER = [check_trainer, check_own_settings, check_task, check_asynchrony, check_next_verl, check_adapters]
_TRAINER += [check_critic, check_val_only]
_PLAN = [check_dataclasses, check_verls_own, check_steps, check_model, check_tokenizer]
_PLAN += [check_first_evaluation, check_packages]
CHECKS: dict[Needs, list[Callable[[Run], Iterator[Finding]]]] = {
    Needs.OVERRIDES: [check_unread, check_values, check_lost_updates],
    Needs.CODE: [check_code],
    Needs.FILES: [check_paths, check_data_files, check_columns, check_default_reward, check_rows_of_a_step],
    Needs.CONTENTS: [check_imports, check_rows],
    Needs.SETTINGS: [*_TRAINER, check_recipes_worker, check_skipping, check_cpu, check_sizes, check_validator],
    Needs.CLUSTER: [check_nodes],
    Needs.PLAN: _PLAN,
}


def refuse(run: Run, *needs: Needs) -> None:
    """Run these checks of a start: print the warnings, and end the start if something is wrong.

    Raises:
        ValueError: says what is wrong, and what would be right.
    """
    for need in needs:
        if run.is_stock and need is not Needs.OVERRIDES:
            continue
        wrong = []
        for finding in filter(lambda f: f.problem, run_checks(CHECKS[need], run)):
            if finding.error and finding.name == "validator":
                # The method's own code, without which nobody knows whether it may start.
                raise finding.error
            # If another check itself fails, that need not be the settings' fault.
            if finding.warning or finding.error or (need is Needs.OVERRIDES and run.is_stock):
                print(f"verl-disco: warning: {finding}", flush=True)
            else:
                wrong.append(finding)
        if wrong:
            raise ValueError("; ".join(map(str, wrong)))


def examine(overrides: Sequence[str]) -> Iterator[Finding]:
    """Run all checks of the run with these overrides, in the order of the report, without starting it.

    Stops at the first error that later checks depend on: settings that do not compose, or values that cannot be right.
    A check that fails where something is wrong already says nothing more, nor does one that repeats what another named:
    verl's dataclasses and its own checks quote the error of the node that they hold.
    """
    named, told = False, set()
    for finding in _examine(overrides):
        cause = _cause(finding.problem)
        if cause and cause in told:
            if not finding.value:
                continue
            finding = replace(finding, problem="", fix="", error=None)
        told.add(cause)
        if finding.error and named:
            finding = Finding(finding.name, "not checked: fix what is named above first")
        named |= bool(finding.problem) and not finding.warning
        yield finding


def _cause(problem: str) -> str:
    """Return the message of the exception that a problem quotes, or the problem itself, without quotes."""
    quoted = re.findall(r"""(?:Error|Exception)\((["'])(.+?)\1\)(?= full_key|$)""", problem)
    return re.sub(r"""[\\"']""", "", quoted[-1][1] if quoted else problem)


def _examine(overrides: Sequence[str]) -> Iterator[Finding]:
    try:
        run = composition.compose(overrides)
    except Exception as e:
        yield explain(e, overrides)
        return
    values = [o for o in overrides if "." in o.split("=")[0]]
    hint = f"; it may come from {', '.join(values)}" if values else ""
    unread = list(run_checks([check_unread], run, hint=hint))
    others = list(run_checks([c for c in CHECKS[Needs.OVERRIDES] if c is not check_unread], run, hint=hint))
    yield from sorted(unread + others, key=lambda f: f.error is not None)
    wrong = any(f.problem and not f.warning for f in others)
    for name in composition.unset(run.composed)[:1]:
        # What a backend sets, the first time that somebody starts.
        has_backend = any(o.lstrip("+").startswith(("backend=", "experiment=")) for o in overrides)
        backend = "" if has_backend else ", or a backend that sets it: +backend=fsdp2, megatron or cpu"
        yield Finding("settings", "", f"the settings do not compose: {name} is not set", f"give {name}=...{backend}")
        return
    # A name reported once is not to be refused again by its node's dataclass, nor by that of a copy.
    for name in {finding.name for finding in unread} - composition.names(run.plain):
        parent, _, key = name.rpartition(".")
        node = OmegaConf.select(run.composed, parent) if parent else run.composed
        if isinstance(node, DictConfig) and key in node:
            with open_dict(node):
                del node[key]
    try:
        config = run.config
    except Exception as e:
        if not wrong:
            problem = f"the settings do not compose: {first_lines(e)}"
            yield Finding("settings", "", problem, "fix the setting that it names")
        return
    prepared = OmegaConf.select(config, "verl_ext.prepare")
    for need in (Needs.CODE, Needs.FILES, Needs.CONTENTS):
        for finding in run_checks(CHECKS[need], run, hint=hint):
            if need is Needs.FILES and prepared and finding.problem:
                built = will_build(config, finding.problem)
                if built:
                    finding = Finding(finding.name, f"{built}: the start builds it")
                elif built is None:
                    finding = replace(finding, warning=True, fix=f"{prepared} may build it when the run starts")
            yield finding
    if wrong:
        yield Finding("further checks", "skipped: fix the values above first")
        return
    for need in (Needs.SETTINGS, Needs.PLAN, Needs.CLUSTER):
        yield from run_checks(CHECKS[need], run, hint=hint)
