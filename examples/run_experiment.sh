#!/usr/bin/env bash
# One of the experiments in recipe/disco/config or verl_ext/config: checked first, then started, on one node or several.
#
#   bash examples/run_experiment.sh NAME [override ...]
#   ALGORITHM=grpo bash examples/run_experiment.sh deepseek_qwen_7b seed=2 trainer.nnodes=2
#
# Needs requirements-gpu.txt and the data (docs/running-at-scale.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=(algorithm="${ALGORITHM:-disco}" "+experiment=${1:?the name of an experiment}" "${@:2}")
"${PYTHON:-.venv/bin/python}" -m verl_ext.doctor experiment "${run[@]}"
exec bash examples/ray/run.sh "${run[@]}"
