#!/usr/bin/env bash
# From nothing to a DisCO training run on a CPU: environment, a small pre-trained model, training, summary.
#
#   bash examples/quickstart.sh [hydra overrides, e.g. disco.score=l_ratio]
#
# A second start goes on from the last checkpoint; a finished run is only summarised. To start anew, remove
# outputs/arithmetic/disco.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/setup.sh

# Freed memory goes back to the process, not to the system: a few percent faster, for Ray's workers too.
export MALLOC_MMAP_THRESHOLD_=268435456 MALLOC_TRIM_THRESHOLD_=268435456
# Ray runs its workers at nice 15 otherwise.
export RAY_worker_niceness=0
export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

RUN=outputs/arithmetic/disco
mkdir -p "$RUN"
started=$SECONDS
echo "training; everything that verl says goes to $RUN/log.txt"
# A line a step; the rest is in the log.
.venv/bin/python -u -m verl.trainer.main_ppo algorithm=disco +experiment=arithmetic_cpu "$@" 2>&1 |
  tee -a "$RUN/log.txt" |
  .venv/bin/python -u -m verl_ext.arithmetic.progress || {
  tail -n 40 "$RUN/log.txt" >&2
  echo "training failed: see above, and $RUN/log.txt" >&2
  exit 1
}
echo
.venv/bin/python -m verl_ext.arithmetic.summary "$RUN"
echo "time         $((SECONDS - started)) s without installation"
