#!/usr/bin/env bash
# Llama-2-7B from 4K to 512K tokens with EasyContext's schedule (its train_scripts/EasyContext-1M-Llama-2-7B.sh):
# about 1M tokens a step, RoPE bases 1M to 250M, and 1B in the finished config.
#
# hardware: 8 x a100, 1000 GiB of host memory a node
# time: about 5.67 days, predicted by easyctx plan from sizes and rates, not measured
# result: not run
#
# Written by `easyctx recipe train_scripts/llama2_7b_512k.yaml --shell`; the recipe also resumes and keeps a table.
set -euo pipefail
cd "$(dirname "$0")/.."

# 32k_rope_1m: 32,768 tokens, RoPE base 1e+06, 1,000 steps: predicted 15.6 hours (56.3 s a step), 75 GiB of a GPU, 145 GiB of a host
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model meta-llama/Llama-2-7b-hf --dataset yaofu/slimpajama-per-source-length-upsample \
  --gradient-accumulate-every 4 --max-train-steps 1000 --learning-rate 2e-5 --seq-length 32768 --rope-theta 1e6 \
  --parallel_mode data_parallel --seed 42 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/llama2_7b_512k/32k_rope_1m --resume

# 64k_rope_5m: 65,536 tokens, RoPE base 5e+06, 1,000 steps: predicted 21.6 hours (77.8 s a step), 72.1 GiB of a GPU, 145 GiB of a host
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/llama2_7b_512k/32k_rope_1m \
  --dataset yaofu/slimpajama-per-source-length-upsample --gradient-accumulate-every 2 --max-train-steps 1000 \
  --learning-rate 2e-5 --seq-length 65536 --rope-theta 5e6 --parallel_mode data_parallel --seed 2022 \
  --save-every 50 --keep-checkpoints 1 --output-dir output/llama2_7b_512k/64k_rope_5m --resume

# 256k_rope_10m: 256,000 tokens, RoPE base 1e+07, 500 steps: predicted 26.8 hours (193 s a step), 75.3 GiB of a GPU, 145 GiB of a host
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/llama2_7b_512k/64k_rope_5m \
  --dataset PY007/slimpajama_llama_tokenized_upsample_4096_chunk_256K --gradient-accumulate-every 4 \
  --max-train-steps 500 --learning-rate 2e-5 --seq-length 256000 --rope-theta 10e6 \
  --parallel_mode zigzag_ring_attn --seed 2023 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/llama2_7b_512k/256k_rope_10m --resume

# 256k_rope_25m: 256,000 tokens, RoPE base 2.5e+07, 500 steps: predicted 26.8 hours (193 s a step), 75.3 GiB of a GPU, 145 GiB of a host
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/llama2_7b_512k/256k_rope_10m \
  --dataset PY007/slimpajama_llama_tokenized_upsample_4096_chunk_256K --gradient-accumulate-every 4 \
  --max-train-steps 500 --learning-rate 2e-5 --seq-length 256000 --rope-theta 25e6 \
  --parallel_mode zigzag_ring_attn --seed 2024 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/llama2_7b_512k/256k_rope_25m --resume

# 256k_rope_50m: 256,000 tokens, RoPE base 5e+07, 150 steps: predicted 8.04 hours (193 s a step), 75.3 GiB of a GPU, 145 GiB of a host
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/llama2_7b_512k/256k_rope_25m \
  --dataset PY007/slimpajama_llama_tokenized_upsample_4096_chunk_256K --gradient-accumulate-every 4 \
  --max-train-steps 150 --learning-rate 2e-5 --seq-length 256000 --rope-theta 50e6 \
  --parallel_mode zigzag_ring_attn --seed 2025 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/llama2_7b_512k/256k_rope_50m --resume

# 512k_rope_100m: 512,000 tokens, RoPE base 1e+08, 300 steps: predicted 28.5 hours (342 s a step), 74.3 GiB of a GPU, 145 GiB of a host
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/llama2_7b_512k/256k_rope_50m \
  --dataset PY007/slimpajama_llama_tokenized_upsample_4096_chunk_1M --gradient-accumulate-every 2 \
  --max-train-steps 300 --learning-rate 2e-5 --seq-length 512000 --rope-theta 100e6 \
  --parallel_mode zigzag_ring_attn --seed 2026 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/llama2_7b_512k/512k_rope_100m --resume

# 512k_rope_250m: 512,000 tokens, RoPE base 2.5e+08, 90 steps: predicted 8.55 hours (342 s a step), 74.3 GiB of a GPU, 145 GiB of a host
accelerate launch --config_file accelerate_configs/zero3_offload.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/llama2_7b_512k/512k_rope_100m \
  --dataset PY007/slimpajama_llama_tokenized_upsample_4096_chunk_1M --gradient-accumulate-every 2 \
  --max-train-steps 90 --learning-rate 1e-5 --seq-length 512000 --rope-theta 250e6 \
  --parallel_mode zigzag_ring_attn --seed 2027 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/llama2_7b_512k/512k_rope_250m --resume

# The last RoPE base goes into the config alone; the weights are linked, not copied.
python -m easyctx.recipe.final --model output/llama2_7b_512k/512k_rope_250m \
  --output output/llama2_7b_512k/final --rope-theta 1e+09
