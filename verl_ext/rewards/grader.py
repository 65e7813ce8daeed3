"""Whether two mathematical answers are equal, by math-verify, in a process of its own that can be stopped.

math-verify parses LaTeX into SymPy and simplifies. On what a model writes that can take hours, gigabytes, or the whole
process with it. :class:`Grader` runs ``python -m verl_ext.rewards.grader``, which reads one JSON object a line and
answers with another, and kills it when it is late. A child that dies costs the answer it was at; the next one starts
another child.
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
from pathlib import Path

START_SECONDS = 120.0
"""What a child gets for its imports, which take one to two seconds on an idle machine."""

ANSWERS_PER_CHILD = 1000
"""Then another takes its place, for caches grow."""


INTEGER = re.compile(r"-?(\d+|\d{1,3}(,\d{3})+)")


def plainly_equal(answer: str, truth: str) -> bool | None:
    """Whether two answers are equal, where that is plain to see; None where it takes mathematics.

    They are when they are the same text, but for spaces, dollar signs, ``\\text{}`` and a full stop, or one integer.
    """
    answer, truth = plain(answer), plain(truth)
    if answer == truth:
        return True
    if INTEGER.fullmatch(answer) and INTEGER.fullmatch(truth):
        # As text: Python refuses integers of thousands of digits.
        return whole_number(answer) == whole_number(truth)
    return None


def whole_number(text: str) -> str:
    """An integer without commas and leading zeros."""
    digits = text.lstrip("-").replace(",", "").lstrip("0")
    return "-" * (text[0] == "-" and bool(digits)) + digits


def plain(text: str) -> str:
    """An answer without what changes nothing but its looks: spaces, dollar signs, sizes, a full stop, ``\\text{}``."""
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;:]|[$~]", "", text)
    # But not between digits: 3 1/2 is not 31/2.
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").rstrip(".")


def answers_equal(answer: str, truth: str) -> bool:
    """Whether ``answer`` is mathematically equal to ``truth``; both as they stand in a box.

    As math-verify has it, with two repairs: 4.5e33 is a number, and numbers that agree to 6 decimals must agree to 5
    digits as well, so that 0 is not 6.63e-34.

    Without any bound on time or memory, in this process: for :class:`Grader`'s child.

    Raises:
        ValueError: math-verify reads no mathematics in ``truth`` or in ``answer``.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX alone: math-verify's other way to read a number calls SymPy's parse_expr, which evaluates Python.
    how = [LatexExtractionConfig(boxed_match_priority=0)]
    sides = []
    for name, text in (("truth", truth), ("answer", answer)):
        text = re.sub(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?!\w)", r"\1 \\times 10^{\2}", text)
        # Its own time limits need the main thread's alarm, which is ours.
        sides.append(parse(f"\\boxed{{{text}}}", how, parsing_timeout=None))
        if not sides[-1]:
            raise ValueError(f"no mathematics in the {name}")
    if not verify(*sides, timeout_seconds=None):
        return False
    a, b = (side[0] for side in sides)
    if getattr(a, "is_real", False) and a.is_number and getattr(b, "is_real", False) and b.is_number:
        a, b = a.evalf(15), b.evalf(15)
        return bool(abs(a - b) <= 1e-5 * max(abs(a), abs(b)))
    return True


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
            (True, "") or (False, reason); reasons are "wrong", "unreadable" (nothing that math-verify can read),
            "memory", "timeout" and "grader died".
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
        self._graded += 1
        if result["reason"] == "memory" or self._graded >= ANSWERS_PER_CHILD:
            self.close()
        return result["equal"], result["reason"]

    def _start(self) -> subprocess.Popen:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = subprocess.Popen(
                [sys.executable, "-m", "verl_ext.rewards.grader", str(self.memory_mb)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                # What this process can import, the child can; and not what lies in the working directory by chance.
                cwd=Path(__file__).parents[2],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
            self._graded = 0
            try:
                ready = self._read_line(START_SECONDS)
            except TimeoutError:
                ready = b""
            if not ready:
                code = self._child.poll()
                self.close()
                raise RuntimeError(
                    "the grading process did not start (exit status "
                    f"{code}); see why with: {sys.executable} -m verl_ext.rewards.grader {self.memory_mb}"
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
    answers_equal("1", "1")
    if sys.platform == "linux":
        limit_memory(int(sys.argv[1]))
    print("ready", file=out)
    for line in sys.stdin:
        request = json.loads(line)
        # The parent kills sooner; this is for a child whose parent was killed meanwhile.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["seconds"] + 1)
        equal, reason = False, "unreadable"
        for truth in request["truths"]:
            try:
                equal = answers_equal(request["answer"], truth)
                reason = "" if equal else "wrong"
            except MemoryError:
                reason = "memory"
            except Exception:
                # Whatever a parser raises on what a model wrote.
                pass
            if equal:
                break
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"equal": equal, "reason": reason}), file=out)


if __name__ == "__main__":
    main()
