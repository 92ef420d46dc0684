#!/usr/bin/env bash
# Anima-100K's fine-tuning (LoRA on questions about documents of up to 100K tokens) of Llama-2-7B: rank 32, learning
# rate 1e-4, 16 rows a step, 92,000 tokens of document and question and 1,024 of answer. Attention is exact and full.
#
#   DATA=questions.jsonl bash train_scripts/anima_7b_100k.sh
#   DATA=questions.jsonl PROCESSES=8 ACCUMULATE=16 bash train_scripts/anima_7b_100k.sh     # a row over 8 GPUs
#
# hardware: 1 x a100 with 80 GB (PROCESSES more: each row is shared among them)
# result: not run
#
# Whatever stands here can be set in the environment; train_scripts/long_qa.sh has the commands, and more settings.
# The number of steps, RoPE base and alpha are this script's own, as are the norms and embeddings that are trained too
# (LongLoRA, arXiv 2309.12307: adapters alone do not reach far beyond the length that a model was made for).
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL="${MODEL:-meta-llama/Llama-2-7b-hf}"
OUTPUT="${OUTPUT:-output/anima_7b_100k}"
PROCESSES="${PROCESSES:-1}"
ENGINE="${ENGINE:-ddp}"
PARALLEL_MODE="${PARALLEL_MODE:-$([ "$PROCESSES" = 1 ] && echo data_parallel || echo zigzag_ring_attn)}"
SOURCE_TOKENS="${SOURCE_TOKENS:-92000}"
TARGET_TOKENS="${TARGET_TOKENS:-1024}"
BUCKETS="${BUCKETS:-8}"
ROPE_THETA="${ROPE_THETA:-5e6}"
LORA_R="${LORA_R:-32}"
LORA_ALPHA="${LORA_ALPHA:-32}"
LORA_TRAIN="${LORA_TRAIN-embeddings norms}"
QUANTIZE="${QUANTIZE-}"
OPTIMIZER="${OPTIMIZER:-paged_adamw_8bit}"
LEARNING_RATE="${LEARNING_RATE:-1e-4}"
ACCUMULATE="${ACCUMULATE:-16}"
STEPS="${STEPS:-500}"
SAVE_EVERY="${SAVE_EVERY:-50}"
SAMPLE_EVERY="${SAMPLE_EVERY:-50}"

# shellcheck source=long_qa.sh
source train_scripts/long_qa.sh
