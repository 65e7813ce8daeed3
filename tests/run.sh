#!/usr/bin/env bash
# Environment, ruff, types, then the test suite, two tests at a time where there are 12 GB of memory. `--all` adds the
# long tests; other arguments go to pytest as they are (`-n 0`: one at a time).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/setup.sh --tests
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
workers=2
[ "$(awk '/^MemTotal/ {print $2}' /proc/meminfo)" -ge 12000000 ] || workers=0
# A file's tests share what they start; the long files come first.
exec .venv/bin/python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
