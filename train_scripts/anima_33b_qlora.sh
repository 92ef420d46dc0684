#!/usr/bin/env bash
# Anima-33B's fine-tuning (QLoRA: NF4 weights with double quantisation) of LLaMA-33B: rank 64, alpha 16, learning rate
# 1e-4, 16 rows a step, 10,000 steps, 512 tokens of prompt and 512 of answer.
#
#   DATA=instructions.jsonl bash train_scripts/anima_33b_qlora.sh
#   DATA=… PROCESSES=2 ENGINE=fsdp2 OPTIMIZER=adamw ACCUMULATE=8 bash train_scripts/anima_33b_qlora.sh  # 2 x 40 GB
#
# hardware: 1 x a100 with 80 GB, or 2 x a100 with 40 GB, which share the 4-bit weights (FSDP2)
# result: not run
#
# Whatever stands here can be set in the environment; train_scripts/long_qa.sh has the commands, and more settings.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL="${MODEL:-huggyllama/llama-30b}"
OUTPUT="${OUTPUT:-output/anima_33b_qlora}"
PROCESSES="${PROCESSES:-1}"
ENGINE="${ENGINE:-ddp}"
PARALLEL_MODE="${PARALLEL_MODE:-data_parallel}"
SOURCE_TOKENS="${SOURCE_TOKENS:-512}"
TARGET_TOKENS="${TARGET_TOKENS:-512}"
BUCKETS="${BUCKETS:-8}"
ROPE_THETA="${ROPE_THETA-}"
LORA_R="${LORA_R:-64}"
LORA_ALPHA="${LORA_ALPHA:-16}"
LORA_TRAIN="${LORA_TRAIN-}"
QUANTIZE="${QUANTIZE-nf4}"
OPTIMIZER="${OPTIMIZER:-paged_adamw_8bit}"
LEARNING_RATE="${LEARNING_RATE:-1e-4}"
ACCUMULATE="${ACCUMULATE:-16}"
STEPS="${STEPS:-10000}"
SAVE_EVERY="${SAVE_EVERY:-200}"
SAMPLE_EVERY="${SAMPLE_EVERY:-200}"

# shellcheck source=long_qa.sh
source train_scripts/long_qa.sh
