"""Take from outputs/study what is published: docs/study/data, some megabytes from which all tables follow.

    python benchmarks/study/collect.py [--folder outputs/study] [--out docs/study/data]

Of each run: its settings without secrets and machine's paths, the metrics in ``KEPT`` with four digits (of a long run's
later steps every fifth), and how many responses to each held-out question were right, in verl's own format without the
texts. One ``TASK-STAGE.tar.xz`` each; ``verl_ext.report`` reads what is in them. Unfinished runs are left out, failed
ones are marked.
"""

import argparse
import io
import json
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import OmegaConf  # noqa: E402
from record import ROOT, machine, revision, versions  # noqa: E402
from run import PLANS  # noqa: E402

from verl_ext.hydra.identity import SECRET  # noqa: E402
from verl_ext.report.__main__ import find_runs  # noqa: E402
from verl_ext.report.read import read_responses  # noqa: E402
from verl_ext.runs.evaluations import EVALUATION  # noqa: E402
from verl_ext.runs.folder import CONFIG_FILE, FINISHED_FILE, LOG_FILE, METRICS_FILE, flatten, read_metrics  # noqa: E402

FAILED_FILE = "failed"
"""In a collected run that ended with an error, twice: the error's last line."""

KEPT = (
    r"actor/(entropy|grad_norm|kl_loss|pg_clipfrac|ppo_kl|lr)|critic/score/mean|response_length/(mean|clip_ratio)",
    r"disco/(entropy|kl|kl_standard_error|coefficient|over_delta|grad_norm|skipped_updates|trained_rows)",
    r"training/(mixed_questions|(weight|questions)_at_pass_rate/.*|filter_groups/.*)|timing_s/(step|update_actor)",
    EVALUATION.pattern,
)
_KEPT = re.compile("|".join(f"(?:{pattern})" for pattern in KEPT))

EVERY = 5
"""Rows that are kept of the steps after ``SHORT``."""
SHORT = 40


def root_of(folder: Path) -> Path:
    """Return the clone that runs in ``outputs/study`` of it, which need not be this one."""
    return folder.parents[1] if folder.parts[-2:] == ("outputs", "study") else ROOT


def plain(value: Any, folder: Path) -> Any:
    """Take this machine's folders out of a setting or an argument: a path is relative to the clone."""
    if isinstance(value, list):
        return [plain(v, folder) for v in value]
    if not isinstance(value, str):
        return value
    root = re.escape(str(root_of(folder)))
    for path, name in (
        (re.escape(str(folder)) + r"(?![\w.-])", "outputs/study"),
        (root + "/", ""),
        (root + r"(?![\w.-])", "."),
    ):
        value = re.sub(path, name, value)
    return value if value.count("/") < 2 or not value.startswith(("/", "file:///")) else Path(value).name


def settings(run: Path, folder: Path) -> str:
    """Write a run's settings as YAML, without secrets, variables of the environment and this machine's paths."""
    found = flatten(OmegaConf.load(run / CONFIG_FILE))
    kept = OmegaConf.create()
    for name, value in found.items():
        if not SECRET.search(name) and ".env_vars" not in name:
            OmegaConf.update(kept, name, plain(value, folder), force_add=True)
    return OmegaConf.to_yaml(kept)


def metrics(run: Path) -> str:
    """Write the rows and numbers that are kept."""
    lines = []
    for row in read_metrics(run):
        kept = {
            name: float(f"{x:.4g}") for name, x in row.items() if isinstance(x, int | float) and _KEPT.fullmatch(name)
        }
        step = row["step"]
        if step <= SHORT or step % EVERY == 0 or any(map(EVALUATION.match, kept)):
            lines.append(json.dumps({"step": step} | kept))
    return "\n".join(lines) + "\n"


def answers(file: Path) -> str:
    """Write stored responses without their texts, right ones first; those to the same text are to one question."""
    found = read_responses(file, "")
    lines = []
    for number, (_, own) in enumerate(sorted(found.groupby("question"), key=lambda item: item[0])):
        for i, row in enumerate(own.sort_values("right", ascending=False, kind="stable").itertuples()):
            line = {"input": row.question, "data_source": row.benchmark, "acc": row.right, "uid": f"{number}_{i}_0"}
            lines.append(json.dumps(line))
    return "\n".join(lines) + "\n"


def state(run: Path, given_up: bool) -> dict[str, str] | None:
    """Return the file that marks a run's end; None for a run that still goes on."""
    if (run / FINISHED_FILE).exists():
        return {FINISHED_FILE: ""}
    if not given_up:
        return None
    log = run / LOG_FILE
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [line for line in lines if re.search(r"\w*(Error|Exception)\b.*: ", line)]
    return {FAILED_FILE: re.sub(r"\S*/\S+", "...", (errors or lines or ["no log"])[-1])[:300] + "\n"}


def files_of(run: Path, folder: Path, given_up: bool) -> dict[str, str]:
    """Make a run's files: path in the run -> text; empty for a run that still goes on or has no settings."""
    end = state(run, given_up)
    if end is None or not (run / CONFIG_FILE).exists():
        return {}
    made = {CONFIG_FILE: settings(run, folder)} | end
    if (run / METRICS_FILE).exists():
        made[METRICS_FILE] = metrics(run)
    for file in sorted((run / "validation").glob("*.jsonl")):
        made[f"validation/{file.name}"] = answers(file)
    return made


def stages(task: Path) -> Iterator[tuple[str, list[Path], bool]]:
    """Yield a task's stages with their runs, and whether a run that has not finished will not be tried again."""
    for stage in ("tune", "main", "wide", "mechanisms"):
        if (task / stage).is_dir():
            done = task / f"{stage}.done"
            # Where there is a stage "stability", it goes on with the runs of "tune".
            goes_on = stage == "tune" and task.name in PLANS and "stability" in PLANS[task.name].stages
            later = goes_on and not (task / "stability.done").exists()
            yield stage, find_runs([task / stage])[0], done.exists() and not later


def pack(file: Path, texts: dict[str, str]) -> None:
    """Write a tar file that depends on the texts alone."""
    with tarfile.open(file, "w:xz", preset=9) as tar:
        for name, text in sorted(texts.items()):
            content = text.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def collect(folder: Path, out: Path) -> None:
    """Write ``out`` anew from the study's folder."""
    folder = folder.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for task in sorted(f for f in folder.iterdir() if f.is_dir()):
        for stage, runs, given_up in stages(task):
            texts, left = {}, 0
            for run in runs:
                made = files_of(run, folder, given_up)
                left += not made
                texts |= {f"{run.name}/{name}": text for name, text in made.items()}
            pack(out / f"{task.name}-{stage}.tar.xz", texts)
            print(f"{task.name} {stage}: {len(runs) - left} runs" + (f", {left} still going" if left else ""))
        commands = (task / "commands.txt").read_text() if (task / "commands.txt").exists() else ""
        # The interpreter's path, too.
        commands = re.sub(r"^\S*python\S*", "python", commands, flags=re.M)
        lines = [" ".join(plain(a, folder) for a in line.split(" ")) for line in commands.splitlines()]
        (out / f"{task.name}-commands.txt").write_text("\n".join(lines) + "\n")
        for file in sorted((task / "start").glob("*.jsonl")):
            pack(out / f"{task.name}-start-{file.stem}.tar.xz", {file.name: answers(file)})
        if (task / "chosen.json").exists():
            shutil.copy(task / "chosen.json", out / f"{task.name}-chosen.json")
    # The runs' own clone.
    found = {"machine": machine(), "versions": versions() | {"revision": revision(root_of(folder))}}
    (out / "machine.json").write_text(json.dumps(found, indent=2) + "\n")
    size = sum(f.stat().st_size for f in out.iterdir())
    print(f"{out}: {size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs/study")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/study/data")
    args = parser.parse_args()
    collect(args.folder, args.out)


if __name__ == "__main__":
    main()
