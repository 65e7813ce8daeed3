"""Filter verl's output to one line per training step, evaluations and refusals.

python -m verl.trainer.main_ppo ... 2>&1 | python -m verl_ext.tasks.arithmetic.progress
"""

import re
import sys

from verl_ext.tasks.arithmetic.summary import pass_at_1

STEP = re.compile(r"step:(\d+) - (.*)")
# Validation metrics are printed as np.float64(...).
VALUE = re.compile(r"([\w@/.-]+):(?:np\.\w+\()?(-?[\d.]+(?:e[+-]?\d+)?|nan|inf)")
# The KL is the method's own, otherwise verl's ppo_kl.
SHOWN = {
    "reward": "critic/score/mean",
    "mixed": "training/mixed_questions",
    "KL": "[^/]+/kl|actor/ppo_kl",
    "entropy": "actor/entropy",
    "seconds": "timing_s/step",
}
PASSED_ON = ("pre-training ", "building the arithmetic", "verl-disco:", "Started a local Ray instance")


def summarise(line: str) -> str | None:
    """Shorten a line of output; None drops it."""
    if match := STEP.search(line):
        values = {name: float(value) for name, value in VALUE.findall(match[2])}
        passed = list(pass_at_1(values).values())
        found = {label: [v for name, v in values.items() if re.fullmatch(of, name)] for label, of in SHOWN.items()}
        shown = [f"{label} {numbers[0]:.3g}" for label, numbers in found.items() if numbers]
        if passed:
            shown.append(f"held-out pass@1 {sum(passed) / len(passed):.1%}")
        return f"step {int(match[1]):3d}   " + "   ".join(shown)
    if any(text in line for text in PASSED_ON):
        return re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
    return None


def main() -> None:
    for line in sys.stdin:
        if (shown := summarise(line)) is not None:
            print(shown, flush=True)


if __name__ == "__main__":
    main()
