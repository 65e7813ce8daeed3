"""Where the seconds of a step go: medians over a run's steps, from its metrics.jsonl.

python benchmarks/step_time.py RUN_DIR [--skip 5]
"""

import argparse
import json
import statistics
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="trainer.default_local_dir of a run")
    parser.add_argument("--skip", type=int, default=5, help="first steps to leave out (warm-up)")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "timing_s/step" in r][args.skip :]
    if not steps:
        raise SystemExit(f"{args.run}: no steps after the first {args.skip}")
    print(f"{len(steps)} steps, seconds: median (10th to 90th percentile)")
    for name in sorted({k for r in steps for k in r if k.startswith("timing_s/")} | {"disco/measure_seconds"}):
        values = sorted(r[name] for r in steps if name in r)
        if values:
            low, high = values[len(values) // 10], values[-1 - len(values) // 10]
            print(f"{name:32} {statistics.median(values):7.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
