#!/usr/bin/env bash
# What neither Anima had: QLoRA of LLaMA-33B at 100,000 tokens, NF4 weights with double quantisation, exact full
# attention. Rank 64, alpha 16 and learning rate as Anima-33B, 16 rows a step as both.
#
#   DATA=questions.jsonl bash train_scripts/qlora_33b_100k.sh
#   DATA=questions.jsonl PROCESSES=8 bash train_scripts/qlora_33b_100k.sh      # a row over 8 GPUs
#
# hardware: 1 x h200 (PROCESSES more: each row is shared among them)
# result: not run
#
# Whatever stands here can be set in the environment; train_scripts/long_qa.sh has the commands, and more settings.
# The number of steps and the RoPE base are this script's own, as are the norms that are trained too
# (LongLoRA, arXiv 2309.12307); LORA_TRAIN="embeddings norms" adds the embeddings, which float32 copies make large.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL="${MODEL:-huggyllama/llama-30b}"
OUTPUT="${OUTPUT:-output/qlora_33b_100k}"
PROCESSES="${PROCESSES:-1}"
ENGINE="${ENGINE:-ddp}"
PARALLEL_MODE="${PARALLEL_MODE:-$([ "$PROCESSES" = 1 ] && echo data_parallel || echo zigzag_ring_attn)}"
SOURCE_TOKENS="${SOURCE_TOKENS:-98976}"
TARGET_TOKENS="${TARGET_TOKENS:-1024}"
BUCKETS="${BUCKETS:-8}"
ROPE_THETA="${ROPE_THETA:-5e6}"
LORA_R="${LORA_R:-64}"
LORA_ALPHA="${LORA_ALPHA:-16}"
LORA_TRAIN="${LORA_TRAIN-norms}"
QUANTIZE="${QUANTIZE-nf4}"
OPTIMIZER="${OPTIMIZER:-paged_adamw_8bit}"
LEARNING_RATE="${LEARNING_RATE:-1e-4}"
ACCUMULATE="${ACCUMULATE:-16}"
STEPS="${STEPS:-500}"
SAVE_EVERY="${SAVE_EVERY:-50}"
SAMPLE_EVERY="${SAMPLE_EVERY:-50}"

# shellcheck source=long_qa.sh
source train_scripts/long_qa.sh
