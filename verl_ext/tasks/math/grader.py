"""Whether two mathematical answers are equal (:mod:`verl_ext.tasks.math.equality`), in a process that can be stopped.

math-verify parses LaTeX into SymPy, which simplifies and evaluates. On what a model writes that can take hours,
gigabytes, or the whole process with it. :class:`Grader` runs ``python -m verl_ext.tasks.math.grader``, which reads one
JSON object per line and answers with another, and kills it when it is late. A child that dies costs the answer it was
at; the next one starts another child.
"""

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from verl_ext.tasks.math.normalise import key, normalise

START_SECONDS = 120.0
"""What a child gets for its imports, which take one to two seconds on an idle machine."""

ANSWERS_PER_CHILD = 1000
"""Then another takes its place, for caches grow."""

BY_WEIGHT = ("grader error", "memory", "unreadable", "wrong")
"""Where several truths fail for several reasons, the first of these is told."""

INTEGER = re.compile(r"-?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)")


def plainly_equal(answer: str, truth: str) -> bool | None:
    """Whether two answers are equal, where that is plain to see; None where it takes mathematics.

    They are when they are one integer, or the same text but for what :mod:`verl_ext.tasks.math.normalise` takes away.
    """
    answer, truth = answer.strip(), truth.strip()
    if answer == truth:
        return True
    if INTEGER.fullmatch(answer) and INTEGER.fullmatch(truth):
        # As text: Python refuses integers of thousands of digits.
        return whole_number(answer) == whole_number(truth)
    return True if key(normalise(answer)) == key(normalise(truth)) else None


def whole_number(text: str) -> str:
    """An integer without commas and leading zeros."""
    digits = text.lstrip("-").replace(",", "").lstrip("0")
    return "-" * (text[0] == "-" and bool(digits)) + digits


class Grader:
    """One child process. Not for several threads at once.

    Args:
        memory_mb: what the child may allocate beyond its imports, in MiB of address space.
    """

    def __init__(self, memory_mb: int = 1024):
        self.memory_mb = memory_mb
        self._child: subprocess.Popen | None = None
        self._graded = 0

    def grade(self, answer: str, truths: Sequence[str], timeout: float) -> tuple[bool, str]:
        """Whether ``answer`` equals one of ``truths``, and otherwise why not.

        Args:
            answer: as it stands in the box.
            truths: as they would stand there.
            timeout: seconds for this answer, the start of a child not counted.

        Returns:
            (True, "") or (False, reason); reasons are "wrong", "unreadable" (no mathematics that can be compared),
            "grader error" (a fault of ours or of a library, with its text in the log), "memory", "timeout" and
            "grader died".
        """
        child = self._start()
        try:
            request = json.dumps({"answer": answer, "truths": list(truths), "seconds": timeout}) + "\n"
            child.stdin.write(request.encode())
            reply = self._read_line(timeout)
        except TimeoutError:
            self.close()
            return False, "timeout"
        except OSError:
            reply = b""
        if not reply:
            self.close()
            return False, "grader died"
        result = json.loads(reply)
        if result["error"]:
            log_once(result["error"], answer)
        self._graded += 1
        if result["reason"] == "memory" or self._graded >= ANSWERS_PER_CHILD:
            self.close()
        return result["equal"], result["reason"]

    def _start(self) -> subprocess.Popen:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = subprocess.Popen(
                [sys.executable, "-m", "verl_ext.tasks.math.grader", str(self.memory_mb)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                # What this process can import, the child can; and not what lies in the working directory by chance.
                cwd=Path(__file__).parents[3],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
            self._graded = 0
            try:
                ready = self._read_line(START_SECONDS)
            except TimeoutError:
                ready = b""
            if not ready:
                with suppress(subprocess.TimeoutExpired):
                    self._child.wait(1)
                code = self._child.poll()
                self.close()
                raise RuntimeError(
                    "the grading process did not start (exit status "
                    f"{code}); see why with: {sys.executable} -m verl_ext.tasks.math.grader {self.memory_mb}"
                )
        return self._child

    def _read_line(self, timeout: float) -> bytes:
        """A line of the child; empty when it died.

        Raises:
            TimeoutError: it wrote none within ``timeout`` seconds.
        """
        deadline, line, fd = time.monotonic() + timeout, b"", self._child.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise TimeoutError
                part = os.read(fd, 65536)
                if not part:
                    return b""
                line += part
        return line

    def close(self) -> None:
        """Kill the child, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()


@lru_cache(maxsize=100)
def log_once(error: str, answer: str) -> None:
    """Warn of an error, with the answer at which it was met first. Printed: Ray shows that to the driver."""
    print(f"verl-disco: warning: grading failed: {error}; answer: {answer[:200]!r}", flush=True)


def limit_memory(memory_mb: int) -> None:
    """Let this process allocate ``memory_mb`` MiB more than it has, and write no file."""
    import resource

    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    for kind, most in (("AS", used + memory_mb * 2**20), ("FSIZE", 0), ("CORE", 0)):
        number = getattr(resource, f"RLIMIT_{kind}")
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    """The child: a line with an answer in, a line with the verdict out, until the parent closes the pipe."""
    # Nothing that a library prints may pass for a verdict.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from verl_ext.tasks.math.equality import answers_equal
    from verl_ext.tasks.math.expressions import Unreadable

    answers_equal("2", "\\frac{4}{2}")
    if sys.platform == "linux":
        limit_memory(int(sys.argv[1]))
    print("ready", file=out)
    for line in sys.stdin:
        request = json.loads(line)
        # The parent kills sooner; this is for a child whose parent was killed meanwhile.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["seconds"] + 1)
        reasons, error = set(), ""
        for truth in request["truths"]:
            try:
                reason = "" if answers_equal(request["answer"], truth) else "wrong"
            except MemoryError:
                reason = "memory"
            except (Unreadable, RecursionError):
                reason = "unreadable"
            except Exception as e:
                # Whatever a library raises on what a model wrote is a fault to look into.
                reason, error = "grader error", f"{type(e).__name__}: {str(e)[:200]}"
            reasons.add(reason)
            if not reason:
                break
        signal.setitimer(signal.ITIMER_REAL, 0)
        reason = next(r for r in ("", *BY_WEIGHT) if r in reasons)
        print(json.dumps({"equal": not reason, "reason": reason, "error": error}), file=out)


if __name__ == "__main__":
    main()
