#!/usr/bin/env bash
# Llama-3-8B from 8K to 1M tokens. Lengths, RoPE bases, learning rate and tokens of each stage are those that Gradient
# reports for Llama-3-8B-Instruct-Gradient-1048k (its model card); the batch is smaller where theirs was spread over
# 512 GPUs, with more steps in its place. The text is books (PG-19), not theirs.
#
# hardware: 8 x h100, 1000 GiB of host memory a node
# time: about 2.58 days, predicted by easyctx plan from sizes and rates, not measured
# result: not run
#
# Written by `easyctx recipe train_scripts/llama3_8b_1m.yaml --shell`; the recipe also resumes and keeps a table.
set -euo pipefail
cd "$(dirname "$0")/.."

# 64k: 65,536 tokens, RoPE base 1.53e+07, 30 steps: predicted 26.3 minutes (52.7 s a step), 54.2 GiB of a GPU, 167 GiB of a host
[ -e output/llama3_8b_1m/data/64k ] || \
  easyctx data emozilla/pg19 --tokenizer meta-llama/Meta-Llama-3-8B --seq-length 65536 \
    --output output/llama3_8b_1m/data/64k --tokens 67000000 --shuffle
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model meta-llama/Meta-Llama-3-8B --gradient-accumulate-every 32 --max-train-steps 30 \
  --learning-rate 2e-5 --seq-length 65536 --rope-theta 15.3e6 --parallel_mode usp_attn --ring_degree 2 \
  --save-every 20 --keep-checkpoints 1 --dataset output/llama3_8b_1m/data/64k \
  --output-dir output/llama3_8b_1m/64k --resume

# 256k: 262,144 tokens, RoPE base 2.071e+08, 24 steps: predicted 103 minutes (257 s a step), 72.5 GiB of a GPU, 167 GiB of a host
[ -e output/llama3_8b_1m/data/256k ] || \
  easyctx data emozilla/pg19 --tokenizer meta-llama/Meta-Llama-3-8B --seq-length 262144 \
    --output output/llama3_8b_1m/data/256k --tokens 106000000 --shuffle --seed 1
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/llama3_8b_1m/64k --gradient-accumulate-every 16 --max-train-steps 24 \
  --learning-rate 2e-5 --seq-length 262144 --rope-theta 207.1e6 --parallel_mode usp_attn --ring_degree 2 \
  --save-every 20 --keep-checkpoints 1 --dataset output/llama3_8b_1m/data/256k \
  --output-dir output/llama3_8b_1m/256k --resume

# 512k: 524,288 tokens, RoPE base 1.06e+09, 200 steps: predicted 12.7 hours (228 s a step), 75.4 GiB of a GPU, 167 GiB of a host
[ -e output/llama3_8b_1m/data/512k ] || \
  easyctx data emozilla/pg19 --tokenizer meta-llama/Meta-Llama-3-8B --seq-length 524288 \
    --output output/llama3_8b_1m/data/512k --tokens 441000000 --shuffle --seed 2
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/llama3_8b_1m/256k --gradient-accumulate-every 4 --max-train-steps 200 \
  --learning-rate 2e-5 --seq-length 524288 --rope-theta 1.06e9 --parallel_mode usp_attn --ring_degree 2 \
  --save-every 20 --keep-checkpoints 1 --dataset output/llama3_8b_1m/data/512k \
  --output-dir output/llama3_8b_1m/512k --resume

# 1m: 1,048,576 tokens, RoPE base 2.8e+09, 200 steps: predicted 47 hours (846 s a step), 75.3 GiB of a GPU, 362 GiB of a host
[ -e output/llama3_8b_1m/data/1m ] || \
  easyctx data emozilla/pg19 --tokenizer meta-llama/Meta-Llama-3-8B --seq-length 1048576 \
    --output output/llama3_8b_1m/data/1m --tokens 881000000 --shuffle --seed 3
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/llama3_8b_1m/512k --gradient-accumulate-every 4 --max-train-steps 200 \
  --learning-rate 2e-5 --seq-length 1048576 --rope-theta 2.80e9 --parallel_mode usp_attn --ring_degree 2 \
  --save-every 20 --keep-checkpoints 1 --dataset output/llama3_8b_1m/data/1m \
  --output-dir output/llama3_8b_1m/1m --resume
