#!/usr/bin/env bash
# Qwen3-8B from 40K to 1M tokens with YaRN: each stage's factor reaches its length from the 40,960 tokens of the start
# model's config. Steps and text (PG-19 books) are ours, and were not tried.
#
# hardware: 8 x h100, 1000 GiB of host memory a node
# time: about 22.9 hours, predicted by easyctx plan from sizes and rates, not measured
# result: not run
#
# Written by `easyctx recipe train_scripts/qwen3_8b_1m.yaml --shell`; the recipe also resumes and keeps a table.
set -euo pipefail
cd "$(dirname "$0")/.."

# 128k: 131,072 tokens, YaRN x 4, 200 steps: predicted 2.5 hours (45.1 s a step), 73.9 GiB of a GPU, 169 GiB of a host
[ -e output/qwen3_8b_1m/data/128k ] || \
  easyctx data emozilla/pg19 --tokenizer Qwen/Qwen3-8B-Base --seq-length 131072 \
    --output output/qwen3_8b_1m/data/128k --tokens 220000000 --shuffle
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model Qwen/Qwen3-8B-Base --gradient-accumulate-every 8 --max-train-steps 200 \
  --learning-rate 2e-5 --seq-length 131072 --rope-scaling yarn --rope-factor 4 --parallel_mode usp_attn \
  --ring_degree 2 --save-every 20 --keep-checkpoints 1 --dataset output/qwen3_8b_1m/data/128k \
  --output-dir output/qwen3_8b_1m/128k --resume

# 512k: 524,288 tokens, YaRN x 13, 100 steps: predicted 7.13 hours (257 s a step), 71.1 GiB of a GPU, 169 GiB of a host
[ -e output/qwen3_8b_1m/data/512k ] || \
  easyctx data emozilla/pg19 --tokenizer Qwen/Qwen3-8B-Base --seq-length 524288 \
    --output output/qwen3_8b_1m/data/512k --tokens 220000000 --shuffle --seed 1
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/qwen3_8b_1m/128k --gradient-accumulate-every 4 --max-train-steps 100 \
  --learning-rate 2e-5 --seq-length 524288 --rope-scaling yarn --rope-factor 13 --parallel_mode usp_attn \
  --ring_degree 2 --save-every 20 --keep-checkpoints 1 --dataset output/qwen3_8b_1m/data/512k \
  --output-dir output/qwen3_8b_1m/512k --resume

# 1m: 1,048,576 tokens, YaRN x 26, 100 steps: predicted 13.2 hours (476 s a step), 75.1 GiB of a GPU, 446 GiB of a host
[ -e output/qwen3_8b_1m/data/1m ] || \
  easyctx data emozilla/pg19 --tokenizer Qwen/Qwen3-8B-Base --seq-length 1048576 \
    --output output/qwen3_8b_1m/data/1m --tokens 220000000 --shuffle --seed 2
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/qwen3_8b_1m/512k --gradient-accumulate-every 2 --max-train-steps 100 \
  --learning-rate 2e-5 --seq-length 1048576 --rope-scaling yarn --rope-factor 26 --parallel_mode usp_attn \
  --ring_degree 2 --save-every 20 --keep-checkpoints 1 --dataset output/qwen3_8b_1m/data/1m \
  --output-dir output/qwen3_8b_1m/1m --resume
