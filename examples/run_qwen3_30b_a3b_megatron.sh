#!/usr/bin/env bash
# Qwen3-30B-A3B (128 experts), 8k tokens, Megatron on 2 nodes of 8 GPUs of 80 GB. All values but the method's are ours.
# Arguments are Hydra overrides; ALGORITHM=grpo takes another method.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_experiment.sh" qwen3_30b_a3b_megatron "$@"
