#!/usr/bin/env bash
# One run on one node or several: within a Slurm allocation a Ray cluster is started over its nodes, elsewhere (or on
# one node) the run has a Ray of its own. All arguments are Hydra overrides.
#
#   bash examples/ray/run.sh algorithm=disco +experiment=arithmetic_cpu
#   RAY_ADDRESS=head:6379 bash examples/ray/run.sh algorithm=disco ...    # a cluster that is there already
#
# The same Python environment, with this project in it, must be on each node: PYTHON names its interpreter. RAY_PORT
# (6379) is the head's port, RAY_TIMEOUT (600) the seconds in which all nodes must be up.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
port=${RAY_PORT:-6379}
nodes=${SLURM_JOB_NUM_NODES:-1}

ray() { "$python" -m ray.scripts.scripts "$@"; }

# In a cluster that is there, Ray does not want to be told what it has.
train() {
  local address=$1
  shift
  "$python" -m verl.trainer.main_ppo "++ray_kwargs.ray_init.address='$address'" \
    ++ray_kwargs.ray_init.num_cpus=null ++ray_kwargs.ray_init.num_gpus=null "$@"
}
# Waits, for up to RAY_TIMEOUT seconds, until a command succeeds.
wait_until() {
  local deadline=$((SECONDS + ${RAY_TIMEOUT:-600}))
  until "$@"; do
    ((SECONDS < deadline)) || { echo "no Ray cluster of $nodes nodes within ${RAY_TIMEOUT:-600} s" >&2; return 1; }
    sleep 2
  done
}

if [ -n "${RAY_ADDRESS:-}" ]; then
  train "$RAY_ADDRESS" "$@"
  exit
fi
if ((nodes == 1)); then
  exec "$python" -m verl.trainer.main_ppo "$@"
fi

# Ray's default depends on what lies in ~/.ray; the processes of this cluster share a token of their own.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
[ "$RAY_AUTH_MODE" != token ] || export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(srun --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" hostname --ip-address | awk '{print $1}')
start="$python -m ray.scripts.scripts start --block --disable-usage-stats"
# This script runs on the first node: the head, then a worker on each other node, in the background.
srun --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" --overlap --export=ALL $start --head --node-ip-address="$head" --port="$port" &
head_is_up() { ray status --address "$head:$port" >/dev/null 2>&1; }
wait_until head_is_up
for host in "${hosts[@]:1}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$host" --overlap --export=ALL $start --address="$head:$port" &
done
echo "waiting for $nodes nodes"
all_are_up() { [ "$(ray status --address "$head:$port" 2>/dev/null | grep -c '^ 1 node_')" -ge "$nodes" ]; }
wait_until all_are_up

status=0
train "$head:$port" "$@" || status=$?
# Ends the cluster with the run.
kill $(jobs -p) 2>/dev/null || true
exit $status
