#!/usr/bin/env bash
# Llama-2-13B to 1M tokens on two nodes of 8 GPUs. The stages follow the 7B schedule; steps and RoPE bases of the last
# two stages are ours, and were not tried.
#
# hardware: 16 x a100 on 2 nodes, 1000 GiB of host memory a node
# time: about 3.29 days, predicted by easyctx plan from sizes and rates, not measured
# result: not run
#
# Written by `easyctx recipe train_scripts/llama2_13b_1m.yaml --shell`; the recipe also resumes and keeps a table.
# Run it on each node, in a folder that all share, with MACHINE_RANK=0, 1, … and the first node's address:
#   MACHINE_RANK=0 FIRST_NODE=10.0.0.1 bash train_scripts/llama2_13b_1m.sh
set -euo pipefail
cd "$(dirname "$0")/.."
: "${MACHINE_RANK:?0 on the first node, 1 on the second, …}"
: "${FIRST_NODE:?address}"
PORT="${PORT:-29500}"

# 32k: 32,768 tokens, RoPE base 1e+06, 1,000 steps: predicted 14.3 hours (51.3 s a step), 72.6 GiB of a GPU, 141 GiB of a host
accelerate launch --config_file accelerate_configs/zero3_offload_2nodes.yaml --num_processes 16 \
  --num_machines 2 --machine_rank "$MACHINE_RANK" --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" \
  -m easyctx.train --model meta-llama/Llama-2-13b-hf --dataset yaofu/slimpajama-per-source-length-upsample \
  --gradient-accumulate-every 2 --max-train-steps 1000 --learning-rate 2e-5 --seq-length 32768 --rope-theta 1e6 \
  --parallel_mode data_parallel --save-every 25 --keep-checkpoints 1 --output-dir output/llama2_13b_1m/32k \
  --resume

# 64k: 65,536 tokens, RoPE base 5e+06, 1,000 steps: predicted 18.8 hours (67.7 s a step), 74.6 GiB of a GPU, 141 GiB of a host
accelerate launch --config_file accelerate_configs/zero3_offload_2nodes.yaml --num_processes 16 \
  --num_machines 2 --machine_rank "$MACHINE_RANK" --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" \
  -m easyctx.train --model output/llama2_13b_1m/32k --dataset yaofu/slimpajama-per-source-length-upsample \
  --gradient-accumulate-every 1 --max-train-steps 1000 --learning-rate 2e-5 --seq-length 65536 --rope-theta 5e6 \
  --parallel_mode data_parallel --save-every 25 --keep-checkpoints 1 --output-dir output/llama2_13b_1m/64k \
  --resume

# 256k: 256,000 tokens, RoPE base 2.5e+07, 500 steps: predicted 22 hours (158 s a step), 73.3 GiB of a GPU, 141 GiB of a host
accelerate launch --config_file accelerate_configs/zero3_offload_2nodes.yaml --num_processes 16 \
  --num_machines 2 --machine_rank "$MACHINE_RANK" --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" \
  -m easyctx.train --model output/llama2_13b_1m/64k \
  --dataset PY007/slimpajama_llama_tokenized_upsample_4096_chunk_256K --gradient-accumulate-every 2 \
  --max-train-steps 500 --learning-rate 2e-5 --seq-length 256000 --rope-theta 25e6 \
  --parallel_mode zigzag_ring_attn --sp-degree 8 --save-every 25 --keep-checkpoints 1 \
  --output-dir output/llama2_13b_1m/256k --resume

# 512k: 512,000 tokens, RoPE base 1e+08, 150 steps: predicted 11.7 hours (282 s a step), 73.3 GiB of a GPU, 141 GiB of a host
accelerate launch --config_file accelerate_configs/zero3_offload_2nodes.yaml --num_processes 16 \
  --num_machines 2 --machine_rank "$MACHINE_RANK" --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" \
  -m easyctx.train --model output/llama2_13b_1m/256k \
  --dataset PY007/slimpajama_llama_tokenized_upsample_4096_chunk_1M --gradient-accumulate-every 2 \
  --max-train-steps 150 --learning-rate 2e-5 --seq-length 512000 --rope-theta 100e6 \
  --parallel_mode zigzag_ring_attn --save-every 25 --keep-checkpoints 1 --output-dir output/llama2_13b_1m/512k \
  --resume

# 1m: 1,000,000 tokens, RoPE base 2.5e+08, 90 steps: predicted 12.2 hours (489 s a step), 72.6 GiB of a GPU, 141 GiB of a host
accelerate launch --config_file accelerate_configs/zero3_offload_2nodes.yaml --num_processes 16 \
  --num_machines 2 --machine_rank "$MACHINE_RANK" --main_process_ip "$FIRST_NODE" --main_process_port "$PORT" \
  -m easyctx.train --model output/llama2_13b_1m/512k \
  --dataset PY007/slimpajama_llama_tokenized_upsample_4096_chunk_1M --gradient-accumulate-every 1 \
  --max-train-steps 90 --learning-rate 1e-5 --seq-length 1000000 --rope-theta 250e6 \
  --parallel_mode zigzag_ring_attn --save-every 25 --keep-checkpoints 1 --output-dir output/llama2_13b_1m/1m \
  --resume

# The last RoPE base goes into the config alone; the weights are linked, not copied.
[ "$MACHINE_RANK" != 0 ] || \
  python -m easyctx.recipe.final --model output/llama2_13b_1m/1m --output output/llama2_13b_1m/final \
    --rope-theta 1e+09
