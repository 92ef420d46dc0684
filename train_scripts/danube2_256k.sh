#!/usr/bin/env bash
# H2O-danube2-1.8B from 8K to 256K tokens with EasyContext's schedule (its train_scripts/EasyContext-256K-danube2.sh):
# RoPE bases 30K to 100M.
#
# hardware: 8 x a100, 500 GiB of host memory a node
# time: about 26.2 hours, predicted by easyctx plan from sizes and rates, not measured
# result: not run
#
# Written by `easyctx recipe train_scripts/danube2_256k.yaml --shell`; the recipe also resumes and keeps a table.
set -euo pipefail
cd "$(dirname "$0")/.."

# 16k_rope_30k: 16,000 tokens, RoPE base 30000, 400 steps: predicted 89.2 minutes (13.4 s a step), 68.6 GiB of a GPU, 32 GiB of a host
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model h2oai/h2o-danube2-1.8b-base \
  --dataset PY007/slimpajama_mistral_tokenized_upsample_4096_chunk_128K --batch-size 2 \
  --gradient-accumulate-every 4 --max-train-steps 400 --learning-rate 2e-5 --seq-length 16000 --rope-theta 30e3 \
  --parallel_mode data_parallel --seed 2024 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/danube2_256k/16k_rope_30k --resume

# 32k_rope_100k: 32,000 tokens, RoPE base 100000, 400 steps: predicted 118 minutes (17.7 s a step), 68.6 GiB of a GPU, 32 GiB of a host
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/danube2_256k/16k_rope_30k \
  --dataset PY007/slimpajama_mistral_tokenized_upsample_4096_chunk_128K --gradient-accumulate-every 4 \
  --max-train-steps 400 --learning-rate 2e-5 --seq-length 32000 --rope-theta 100e3 \
  --parallel_mode data_parallel --seed 2025 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/danube2_256k/32k_rope_100k --resume

# 32k_rope_300k: 32,000 tokens, RoPE base 300000, 400 steps: predicted 118 minutes (17.7 s a step), 68.6 GiB of a GPU, 32 GiB of a host
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/danube2_256k/32k_rope_100k \
  --dataset PY007/slimpajama_mistral_tokenized_upsample_4096_chunk_128K --gradient-accumulate-every 4 \
  --max-train-steps 400 --learning-rate 2e-5 --seq-length 32000 --rope-theta 300e3 \
  --parallel_mode data_parallel --seed 2026 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/danube2_256k/32k_rope_300k --resume

# 64k_rope_1m: 64,000 tokens, RoPE base 1e+06, 400 steps: predicted 3.27 hours (29.4 s a step), 68.6 GiB of a GPU, 32 GiB of a host
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/danube2_256k/32k_rope_300k \
  --dataset PY007/slimpajama_mistral_tokenized_upsample_4096_chunk_128K --batch-size 4 \
  --gradient-accumulate-every 4 --max-train-steps 400 --learning-rate 2e-5 --seq-length 64000 --rope-theta 1e6 \
  --parallel_mode zigzag_ring_attn --seed 2027 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/danube2_256k/64k_rope_1m --resume

# 64k_rope_2.5m: 64,000 tokens, RoPE base 2.5e+06, 400 steps: predicted 3.27 hours (29.4 s a step), 68.6 GiB of a GPU, 32 GiB of a host
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/danube2_256k/64k_rope_1m \
  --dataset PY007/slimpajama_mistral_tokenized_upsample_4096_chunk_128K --batch-size 4 \
  --gradient-accumulate-every 4 --max-train-steps 400 --learning-rate 2e-5 --seq-length 64000 \
  --rope-theta 2.5e6 --parallel_mode zigzag_ring_attn --seed 2028 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/danube2_256k/64k_rope_2.5m --resume

# 64k_rope_5m: 64,000 tokens, RoPE base 5e+06, 400 steps: predicted 3.27 hours (29.4 s a step), 68.6 GiB of a GPU, 32 GiB of a host
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/danube2_256k/64k_rope_2.5m \
  --dataset PY007/slimpajama_mistral_tokenized_upsample_4096_chunk_128K --batch-size 4 \
  --gradient-accumulate-every 4 --max-train-steps 400 --learning-rate 2e-5 --seq-length 64000 --rope-theta 5e6 \
  --parallel_mode zigzag_ring_attn --seed 2029 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/danube2_256k/64k_rope_5m --resume

# 128k_rope_10m: 128,000 tokens, RoPE base 1e+07, 300 steps: predicted 3.88 hours (46.6 s a step), 68.6 GiB of a GPU, 32 GiB of a host
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/danube2_256k/64k_rope_5m \
  --dataset PY007/slimpajama_mistral_tokenized_upsample_4096_chunk_128K --batch-size 2 \
  --gradient-accumulate-every 4 --max-train-steps 300 --learning-rate 2e-5 --seq-length 128000 \
  --rope-theta 10e6 --parallel_mode zigzag_ring_attn --seed 2030 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/danube2_256k/128k_rope_10m --resume

# 128k_rope_30m: 128,000 tokens, RoPE base 3e+07, 200 steps: predicted 2.59 hours (46.6 s a step), 68.6 GiB of a GPU, 32 GiB of a host
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/danube2_256k/128k_rope_10m \
  --dataset PY007/slimpajama_mistral_tokenized_upsample_4096_chunk_128K --batch-size 2 \
  --gradient-accumulate-every 4 --max-train-steps 200 --learning-rate 2e-5 --seq-length 128000 \
  --rope-theta 30e6 --parallel_mode zigzag_ring_attn --seed 2031 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/danube2_256k/128k_rope_30m --resume

# 256k_rope_100m: 256,000 tokens, RoPE base 1e+08, 200 steps: predicted 4.5 hours (81.1 s a step), 68.6 GiB of a GPU, 32 GiB of a host
accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 --main_process_port 0 \
  -m easyctx.train --model output/danube2_256k/128k_rope_30m \
  --dataset PY007/slimpajama_mistral_tokenized_upsample_4096_chunk_1M --gradient-accumulate-every 4 \
  --max-train-steps 200 --learning-rate 2e-5 --seq-length 256000 --rope-theta 100e6 \
  --parallel_mode zigzag_ring_attn --seed 2032 --save-every 50 --keep-checkpoints 1 \
  --output-dir output/danube2_256k/256k_rope_100m --resume
