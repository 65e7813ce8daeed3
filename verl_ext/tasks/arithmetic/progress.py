"""Filter verl's output to what a reader of a terminal wants: our own lines, one per step among them.

python -m verl.trainer.main_ppo ... 2>&1 | python -m verl_ext.tasks.arithmetic.progress
"""

import re
import sys

OWN = "verl-disco: "
PASSED_ON = ("pre-training ", "building the arithmetic", OWN, "Started a local Ray instance")
# Ray colours what it passes on from a process, and puts the process in front.
RAYS = re.compile(r"\x1b\[[0-9;]*m|^\s*\(\w+ pid=[^)]*\) ")


def summarise(line: str) -> str | None:
    """Shorten a line of output; None drops it."""
    if not any(text in line for text in PASSED_ON):
        return None
    line = RAYS.sub("", RAYS.sub("", line)).strip()
    return line.removeprefix(OWN) if line.startswith(f"{OWN}step ") else line


def main() -> None:
    for line in sys.stdin:
        if (shown := summarise(line)) is not None:
            print(shown, flush=True)


if __name__ == "__main__":
    main()
