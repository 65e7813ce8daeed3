"""A few hundred steps: the memory of every process stays flat, no handle leaks, and a step logs no more than before.

STEPS=1000 in the environment makes it longer.
"""

import json
import os
import re
import statistics
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from processes import Usage, note, usage

STEPS = int(os.environ.get("STEPS", "300"))


def tree_size(folder: Path) -> int:
    """The bytes in the files of a folder."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            total += file.stat().st_size * file.is_file()
    return total


def median(window: list[Usage]) -> Usage:
    return Usage(*(statistics.median(getattr(u, f.name) for u in window) for f in fields(Usage)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "tasks"),
    [
        ((), 20),
        # verl's agent loop makes four of each of 24 responses: generate, a server taken and given back, a reward.
        (
            ("trainer.v1.trainer_mode=colocate_async", "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null"),
            4 * 24 + 15,
        ),
    ],
    ids=["sync", "colocate_async"],
)
def test_nothing_grows(command, background, tmp_path, mode, tasks):
    """``tasks``: of Ray, in a step."""
    overrides = (
        "algorithm=disco",
        *mode,
        f"trainer.total_training_steps={STEPS}",
        "trainer.save_freq=10",
        "trainer.test_freq=25",
        "trainer.max_actor_ckpt_to_keep=2",
        "trainer.total_epochs=10000",
    )
    folder = tmp_path / "run"
    run = background(command(*overrides, folder=folder), tmp_path)
    metrics, samples, written = folder / "metrics.jsonl", defaultdict(list), []
    assert run.wait_for("verl-disco: step ", 300), run.output[-5000:]
    (session,) = {m[0] for _, name in run.processes() if (m := re.search(r"/tmp/ray/session_[\w-]+", name))}
    while run.process.poll() is None:
        step = metrics.read_bytes().count(b"\n")
        for pid, name in run.processes():
            with suppress(OSError):
                samples[pid, " ".join(Path(word).name for word in name.split()[:3])[:40]].append((step, usage(pid)))
        written.append((step, len(run.output), tree_size(Path(session, "logs")), tree_size(folder)))
        time.sleep(1)
    assert run.end(120) == 0, run.output[-5000:]

    def between(values, first, last):
        return [value for step, *value in values if first * STEPS <= step <= last * STEPS]

    report, grown = [], []
    for (_, name), values in sorted(samples.items()):
        # The first steps fill caches. A process that comes late, or ends early, has no second half.
        early, late = (between(values, *part) for part in ((0.3, 0.5), (0.8, 1.0)))
        if len(early) < 3 or len(late) < 3:
            continue
        a, b = (median([u for (u,) in window]) for window in (early, late))
        report.append(f"{name:40} {a} -> {b}")
        note("process", mode=" ".join(mode[:1]), steps=STEPS, name=name, before=asdict(a), after=asdict(b))
        # Ray keeps what it knows of its last 100,000 tasks, 4 KiB of each; the windows' middles are half the run apart.
        known = tasks * STEPS / 2 * 4.3 / 1024 if "gcs_server" in name else 0
        if b.memory > a.memory * 1.03 + 4 + known or b.handles > a.handles + 4 or b.threads > a.threads + 2:
            grown.append(report[-1])
    print(*report, sep="\n")
    assert len(report) >= 8 and not grown

    # Per step, in the second half as in the first.
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    lines = [len(line) for line in metrics.read_text().splitlines()]
    assert max(lines[STEPS // 2 :]) <= 1.1 * max(lines[: STEPS // 2]) < 10_000
    for what, *sizes in zip(("step", "output", "Ray's logs", "folder"), *written, strict=True):
        if what == "step":
            steps = sizes
            continue
        at = {share: sizes[next(i for i, s in enumerate(steps) if s >= share * STEPS)] for share in (0.3, 0.6, 0.9)}
        first, second = at[0.6] - at[0.3], at[0.9] - at[0.6]
        each = [round(part / STEPS / 0.3) for part in (first, second)]
        print(f"{what}: {each[0]} and {each[1]} bytes per step")
        note("bytes per step", mode=" ".join(mode[:1]), steps=STEPS, name=what, before=each[0], after=each[1])
        assert second <= 1.2 * first + 20_000
    assert len(list(folder.glob("global_step_*"))) == 2
