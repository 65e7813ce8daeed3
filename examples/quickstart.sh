#!/usr/bin/env bash
# From nothing to a DisCO training run on a CPU: environment, a small pre-trained model, training, summary.
#
#   bash examples/quickstart.sh [hydra overrides, e.g. disco.score=l_ratio]
#
# Each set of overrides has a folder of its own in outputs/arithmetic (or RUN=folder). A second start goes on from the
# last checkpoint; a finished run is only summarised. To start anew, remove the folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/setup.sh

RUN=${RUN:-outputs/arithmetic/$(printf '%s' "disco${*:+ $*}" | tr -c 'A-Za-z0-9._' '-')}
mkdir -p "$RUN"
if [ -e "$RUN/finished" ]; then
  echo "finished before; to train anew, remove $RUN"
else
  started=$SECONDS
  echo "training; everything that verl says goes to $RUN/log.txt"
  # A line a step; the rest is in the log.
  .venv/bin/python -u -m verl.trainer.main_ppo algorithm=disco +experiment=arithmetic_cpu \
    "trainer.default_local_dir='$RUN'" "$@" 2>&1 |
    tee -a "$RUN/log.txt" |
    .venv/bin/python -u -m verl_ext.arithmetic.progress || {
    tail -n 40 "$RUN/log.txt" >&2
    echo "training failed: see above, and $RUN/log.txt" >&2
    exit 1
  }
  echo "training took $((SECONDS - started)) s, pre-training included"
fi
echo
.venv/bin/python -m verl_ext.arithmetic.summary "$RUN"
