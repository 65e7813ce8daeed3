#!/usr/bin/env bash
# Environment, ruff, then the test suite. `--all` adds the long tests; other arguments go to pytest as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/setup.sh --vllm
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest "$@"
