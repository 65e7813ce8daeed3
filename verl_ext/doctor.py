"""Checks a machine, or a run without starting it.

    python -m verl_ext.doctor                                              # this machine
    python -m verl_ext.doctor experiment algorithm=NAME +experiment=NAME   # one run

The first shows versions, the plugin's state, algorithms, devices and rollout engines; the second runs all checks of
:mod:`verl_ext.preflight.checks`. Both end with OK, or with what is wrong and how to fix it (exit status 1).
"""

import sys

from verl_ext.preflight import checks, machine
from verl_ext.preflight.findings import run_checks


def main(arguments: list[str] | None = None) -> int:
    """Print the report; return 0 if nothing is wrong, else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if arguments and arguments[0] != "experiment":
        # A group or a value: the word before them was forgotten.
        meant = f"; did you mean: experiment {' '.join(arguments)}" if "=" in arguments[0] else ""
        print(f"unknown argument {arguments[0]}{meant}\n\n{__doc__}")
        return 1
    findings = checks.examine(arguments[1:]) if arguments else run_checks(machine.CHECKS)
    problems = []
    for finding in findings:
        if finding.value:
            print(f"{finding.name:24}{finding.value}", flush=True)
        if finding.problem:
            problems.append(finding)
    print()
    for p in sorted(problems, key=lambda p: p.warning):
        print(f"{'warning' if p.warning else 'WRONG'}: {p.problem}" + (f"\n  fix: {p.fix}" if p.fix else ""))
    wrong = sum(not p.warning for p in problems)
    print(f"{wrong} problem(s)" if wrong else "OK")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
