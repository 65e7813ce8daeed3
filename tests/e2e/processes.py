"""A run in the background: its processes by their parts, what they use, and how to kill them."""

import json
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "VERL_DISCO_TEST_RUN"

SURVIVAL_FILE = "SURVIVAL_FILE"
"""In the environment: a file that gets what tests have seen of runs, for ``benchmarks/survival.py``."""

PARTS = {
    "worker": lambda name: name.startswith("ray::") and ("WorkerDict" in name or "ActorRolloutRef" in name),
    "rollout server": lambda name: name.startswith("ray::HFServer"),
    "task runner": lambda name: name.startswith("ray::TaskRunner"),
    "Ray": lambda name: (
        name.startswith("ray::") or "/raylet/raylet" in name or "gcs_server" in name or "ray/_private" in name
    ),
}
"""Parts of a run -> whether a process of this command line is one."""


def note(kind: str, **seen: object) -> None:
    """Add a line to the file named by ``SURVIVAL_FILE``, if there is one."""
    if name := os.environ.get(SURVIVAL_FILE):
        with open(name, "a") as file:
            file.write(json.dumps({"kind": kind} | seen) + "\n")


class Background:
    """A command whose processes are known by a mark in their environment.

    Args:
        log: gets its output, at its end.
    """

    def __init__(self, command: list[str], log: Path, cwd: Path, environment: dict[str, str]):
        self.mark, self.log, self.output, self.seconds_to_end = uuid.uuid4().hex, log, "", 0.0
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment | {MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with open(self.log, "ab") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                self.output += line.decode(errors="replace")

    def wait_for(self, text: str, seconds: float) -> bool:
        """Wait for ``text`` in the output; False if the command ended without it.

        Raises:
            TimeoutError: neither happened.
        """
        deadline = time.monotonic() + seconds
        while text not in self.output:
            if self.process.poll() is not None:
                self._reader.join(5)
                return text in self.output
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {text!r} in {seconds} s; the output ends with {self.output[-3000:]}")
            time.sleep(0.02)
        return True

    def wait_for_part(self, part: str, seconds: float) -> None:
        """Wait until a process of ``part`` is there, or the command ends.

        Raises:
            TimeoutError: neither happened.
        """
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and part != "driver" and not any(True for _ in self.processes(part)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {part} in {seconds} s among {dict(self.processes())}")
            time.sleep(0.1)

    def wait(self, seconds: float) -> None:
        """Wait some time, or until the command ends."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def end(self, seconds: float) -> int:
        """Wait for the end of all its processes and return the exit status.

        Raises:
            TimeoutError: a process is still there; all are killed.
        """
        started = time.monotonic()
        deadline = started + seconds
        while self.process.poll() is None or any(True for _ in self.processes()):
            if time.monotonic() > deadline:
                left = dict(self.processes())
                self.kill()
                raise TimeoutError(f"after {seconds} s there are {left}; the output ends with {self.output[-3000:]}")
            time.sleep(0.1)
        self.seconds_to_end = time.monotonic() - started
        self._reader.join(5)
        return self.process.returncode

    def processes(self, part: str = "") -> Iterator[tuple[int, str]]:
        """Yield (process id, command line) of its processes, or of a part of them."""
        is_one: Callable[[str], bool] = PARTS.get(part, lambda name: True)
        for folder in Path("/proc").glob("[0-9]*"):
            # Processes end while we look.
            with suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if name and is_one(name):
                        yield int(folder.name), name

    def kill(self, part: str = "", one: Callable[[list[int]], int] | None = None) -> list[int]:
        """Kill its processes, those of a part, or ``one`` of these; "driver" is the command itself."""
        found = [self.process.pid] if part == "driver" else sorted(pid for pid, _ in self.processes(part))
        chosen = [one(found)] if one and found else found
        for pid in chosen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return chosen


@dataclass(frozen=True)
class Usage:
    """What a process uses: memory of its own in MiB, open handles, threads."""

    memory: float
    handles: int
    threads: int


def usage(pid: int) -> Usage:
    """Read what a process uses.

    Raises:
        OSError: it has ended.
    """
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    if "RssAnon" not in status:
        raise ProcessLookupError(pid)
    handles = len(os.listdir(f"/proc/{pid}/fd"))
    return Usage(int(status["RssAnon"].split()[0]) / 1024, handles, int(status["Threads"]))
