"""Answers a second of the mathematical grader, as verl's reward loop uses it: from threads, graded by child processes.

python benchmarks/grader.py [--data FILE.parquet ...] [--processes 2] [--seconds 10]

Without --data, pairs written below. With it (files of verl_ext.tasks.math.prepare), each ground truth is also graded
against itself and against the next one.
"""

import argparse
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from verl_ext.tasks.math.reward import compute_score

SAME_BY_MATHEMATICS = [
    (r"\frac{1}{2}", "0.5"),
    (r"3\sqrt{2}", r"\sqrt{18}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\{3,1,2\}", r"\{1,2,3\}"),
    (r"\left(\frac{1}{2}, 3\right)", "(0.5,3)"),
    (r"2\pi - \pi", r"\pi"),
    (r"[0,1) \cup [1,2)", "[0,2)"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
]
WRONG = [
    (r"\frac{1}{3}", "0.5"),
    (r"3\sqrt{3}", r"\sqrt{18}"),
    ("x^2+2x+2", "(x+1)^2"),
    (r"\{3,1,4\}", r"\{1,2,3\}"),
    (r"\left(\frac{1}{3}, 3\right)", "(0.5,3)"),
    (r"\pi + 1", r"\pi"),
    ("[0,3)", "[0,2)"),
    (r"\frac{\sqrt{2}}{3}", r"\frac{1}{\sqrt{3}}"),
]
HOSTILE = [
    ("9^{9^{9^{9}}}", "7"),
    (r"(10^{10^{9}})!", "7"),
    (r"\frac{" * 200 + "1" + "}{2}" * 200, "7"),
    ("(" * 900, "7"),
    (r"\sum_{n=1}^{10^{12}} \frac{1}{n^{1.1}}", "7"),
]


def rate(pairs: list[tuple[str, str]], processes: int, seconds: float) -> tuple[float, float]:
    """Answers a second over ``seconds``, and the share of them that was right."""

    def grade(pair: tuple[str, str]) -> float:
        return compute_score("", f"</think> \\boxed{{{pair[0]}}}", pair[1], processes=processes)["score"]

    # As many threads as verl's reward loop may have on their way; a start of the children is not what is measured.
    with ThreadPoolExecutor(2 * processes) as pool:
        list(pool.map(grade, (pairs * processes)[: 2 * processes]))
        count, right, started = 0, 0.0, time.perf_counter()
        source = itertools.cycle(pairs)
        while time.perf_counter() - started < seconds:
            results = list(pool.map(grade, itertools.islice(source, 8 * processes)))
            count, right = count + len(results), right + sum(results)
        return count / (time.perf_counter() - started), right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=[], help="parquet files of verl_ext.tasks.math.prepare")
    parser.add_argument("--processes", type=int, default=2, help="children that grade at the same time")
    parser.add_argument("--seconds", type=float, default=10, help="for each kind of answers")
    args = parser.parse_args()

    kinds = {
        "plain integers": [(str(n), str(n + n % 2)) for n in range(100)],
        "right by mathematics": SAME_BY_MATHEMATICS,
        "wrong": WRONG,
        "hostile": HOSTILE,
    }
    truths = []
    for file in args.data:
        import pandas as pd

        for row in pd.read_parquet(file)["reward_model"]:
            truth = row["ground_truth"]
            truths.append(str(truth if isinstance(truth, str) or not len(truth) else truth[0]))
    if truths:
        kinds["truths against themselves"] = [(t, t) for t in truths]
        kinds["truths against the next"] = list(itertools.pairwise(truths))
    measure = partial(rate, processes=args.processes, seconds=args.seconds)
    print(f"{args.processes} processes")
    for kind, pairs in kinds.items():
        per_second, right = measure(pairs)
        print(f"{kind:28}{per_second:10.1f} a second, {100 * right:.0f} % right", flush=True)


if __name__ == "__main__":
    main()
