"""Answers per second of the mathematical grader, called from threads as by verl's reward loop, graded by children.

python benchmarks/grader.py [--data FILE.parquet ...] [--processes 2] [--seconds 2] [--repeats 5]

Without --data, pairs written below. With it (files of verl_ext.tasks.math.prepare), each ground truth is also graded
against itself and against the next one.
"""

import argparse
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

from record import Figure, record

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


def rates(pairs: list[tuple[str, str]], processes: int, seconds: float, repeats: int) -> tuple[list[float], float]:
    """Measure answers per second, ``repeats`` times for at least ``seconds``, and the share of them that was right."""

    def grade(pair: tuple[str, str]) -> float:
        return compute_score("", f"</think> \\boxed{{{pair[0]}}}", pair[1], processes=processes)["score"]

    found, scores, source = [], [], itertools.cycle(pairs)
    # As many threads as verl's reward loop may have on their way; a start of the children is not what is measured.
    with ThreadPoolExecutor(2 * processes) as pool:
        list(pool.map(grade, (pairs * processes)[: 2 * processes]))
        for _ in range(repeats):
            count, started = 0, time.perf_counter()
            while time.perf_counter() - started < seconds:
                results = list(pool.map(grade, itertools.islice(source, 8 * processes)))
                count += len(results)
                scores += results
            found.append(count / (time.perf_counter() - started))
    return found, sum(scores) / len(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=[], help="parquet files of verl_ext.tasks.math.prepare")
    parser.add_argument("--processes", type=int, default=2, help="children that grade at the same time")
    parser.add_argument("--seconds", type=float, default=2, help="per repeat")
    parser.add_argument("--repeats", type=int, default=5, help="for each kind of answers")
    args = parser.parse_args()

    kinds = {
        "plain integers": [(str(n), str(n + n % 2)) for n in range(100)],
        "equal by mathematics": SAME_BY_MATHEMATICS,
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
    figures = {}
    for kind, pairs in kinds.items():
        found, right = rates(pairs, args.processes, args.seconds, args.repeats)
        figures[f"{kind}, graded"] = Figure.of(found, "per second", better="higher")
        figures[f"{kind}, right"] = Figure(100 * right, "%", better="neither")
    record("grader", figures, {"processes": args.processes, "seconds": args.seconds, "repeats": args.repeats})


if __name__ == "__main__":
    main()
