"""Compare mathematical answers (:mod:`verl_ext.tasks.math.equality`) in a process with a time and a memory limit.

math-verify parses LaTeX into SymPy, which simplifies and evaluates. On a model's output that can take hours or
gigabytes, or crash the process. :class:`Grader` runs ``python -m verl_ext.tasks.math.grader``, which answers a JSON
object per line with another, and kills it at the time limit. A child that dies fails one answer; the next answer starts
a new child.
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
"""Time limit of a child's imports, which take one to two seconds on an idle machine."""

ANSWERS_PER_CHILD = 1000
"""A child's answers before it is replaced, because caches grow."""

BY_WEIGHT = ("grader error", "memory", "unreadable", "wrong")
"""If several truths fail for different reasons, the first of these is returned."""

INTEGER = re.compile(r"-?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)")


def plainly_equal(answer: str, truth: str) -> bool | None:
    """Compare two answers as integers or as normalised texts; None if that does not decide it."""
    answer, truth = answer.strip(), truth.strip()
    if answer == truth:
        return True
    if INTEGER.fullmatch(answer) and INTEGER.fullmatch(truth):
        # As text: Python refuses to parse integers of thousands of digits.
        return whole_number(answer) == whole_number(truth)
    return True if key(normalise(answer)) == key(normalise(truth)) else None


def whole_number(text: str) -> str:
    """Write an integer without commas and leading zeros."""
    digits = text.lstrip("-").replace(",", "").lstrip("0")
    return "-" * (text[0] == "-" and bool(digits)) + digits


class Grader:
    """One child process, for one thread at a time.

    Args:
        memory_mb: MiB of address space that the child may allocate beyond its imports.
    """

    def __init__(self, memory_mb: int = 1024):
        self.memory_mb = memory_mb
        self._child: subprocess.Popen | None = None
        self._graded = 0

    def grade(self, answer: str, truths: Sequence[str], timeout: float) -> tuple[bool, str]:
        """Tell whether ``answer`` equals one of ``truths``, and otherwise why not.

        Args:
            answer: the text in the box.
            truths: texts of the same form.
            timeout: seconds for this answer, without the start of a child.

        Returns:
            (True, "") or (False, reason); reasons are "wrong", "unreadable" (not mathematics that can be compared),
            "grader error" (a bug here or in a library; its text is in the log), "memory", "timeout", "grader died".
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
                # The child imports what this process can, and nothing from the working directory.
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
                    f"the grading process did not start (exit status {code}); to see why, run "
                    f"{sys.executable} -m verl_ext.tasks.math.grader {self.memory_mb}"
                )
        return self._child

    def _read_line(self, timeout: float) -> bytes:
        """Read a line of the child; empty if it died.

        Raises:
            TimeoutError: it wrote no line within ``timeout`` seconds.
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
        """Kill the child, if any."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()


@lru_cache(maxsize=100)
def log_once(error: str, answer: str) -> None:
    """Print a warning, once per error and answer; Ray shows it to the driver."""
    print(f"verl-disco: warning: grading failed: {error}; answer: {answer[:200]!r}", flush=True)


def limit_memory(memory_mb: int) -> None:
    """Limit this process to ``memory_mb`` MiB more than it has now, and to no file output."""
    import resource

    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    for kind, most in (("AS", used + memory_mb * 2**20), ("FSIZE", 0), ("CORE", 0)):
        number = getattr(resource, f"RLIMIT_{kind}")
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    """Run the child: read a line with an answer, write a line with the verdict, until the parent closes the pipe."""
    # A library's output must not be read as a verdict.
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
        # The parent kills earlier; this is for a child whose parent was killed meanwhile.
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
                # Whatever else a library raises is a bug to look into.
                reason, error = "grader error", f"{type(e).__name__}: {str(e)[:200]}"
            reasons.add(reason)
            if not reason:
                break
        signal.setitimer(signal.ITIMER_REAL, 0)
        reason = next(r for r in ("", *BY_WEIGHT) if r in reasons)
        print(json.dumps({"equal": not reason, "reason": reason, "error": error}), file=out)


if __name__ == "__main__":
    main()
