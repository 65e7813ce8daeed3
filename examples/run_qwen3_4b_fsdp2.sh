#!/usr/bin/env bash
# Qwen3-4B in its thinking mode, 8k tokens, FSDP2 on 8 GPUs of 80 GB. All values but the method's are ours.
# Arguments are Hydra overrides; ALGORITHM=grpo takes another method.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_experiment.sh" qwen3_4b "$@"
