#!/usr/bin/env bash
# From nothing to a DisCO training run on a CPU: environment, a small pre-trained model, training, summary, report.
#
#   bash examples/quickstart.sh [hydra overrides, e.g. disco.score=l_ratio]
#
# Each run has a folder of its own, outputs/arithmetic/disco,OVERRIDES,seed=SEED (or RUN=folder). A second start goes on
# from the last checkpoint; a finished run is only summarised. To start anew, remove the folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/setup.sh

run=(algorithm=disco +experiment=arithmetic_cpu ${RUN:+"trainer.default_local_dir='$RUN'"} "$@")
# What the run's settings say of its folder: "finished" or "unfinished", and which it is.
found=$(.venv/bin/python -m verl_ext.hydra.identity "${run[@]}" | tail -n 1)
RUN=${found#* }
mkdir -p "$RUN"
if [ "${found%% *}" = finished ]; then
  echo "finished before; to train anew, remove $RUN"
else
  started=$SECONDS
  echo "training; everything that verl says goes to $RUN/log.txt"
  # One line per step; the rest is in the log.
  .venv/bin/python -u -m verl.trainer.main_ppo "${run[@]}" 2>&1 |
    tee -a "$RUN/log.txt" |
    .venv/bin/python -u -m verl_ext.tasks.arithmetic.progress || {
    tail -n 40 "$RUN/log.txt" >&2
    echo "training failed: see above, and $RUN/log.txt" >&2
    exit 1
  }
  echo "training took $((SECONDS - started)) s, pre-training included"
fi
echo
.venv/bin/python -m verl_ext.tasks.arithmetic.summary "$RUN"
.venv/bin/python -m verl_ext.report "$RUN" --out "$RUN/report" | tail -n 1
