#!/usr/bin/env bash
# DeepSeek-R1-Distill-Qwen-1.5B with LoRA on one GPU of 24 GB, 4k tokens. All values but the method's are ours.
# Arguments are Hydra overrides; ALGORITHM=grpo takes another method.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_experiment.sh" deepseek_qwen_1_5b_lora "$@"
