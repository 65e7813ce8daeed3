#!/usr/bin/env bash
# DeepSeek-R1-Distill-Llama-8B, 8k tokens, FSDP2 on 8 GPUs of 80 GB, as published for the 7B model (arXiv 2505.12366)
# Arguments are Hydra overrides; ALGORITHM=grpo takes another method.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_experiment.sh" deepseek_llama_8b "$@"
