#!/usr/bin/env bash
# The whole way from a short context to a long one, small enough for two CPU cores and a few minutes:
# train a tiny model until it finds needles in 256 bytes of text, see it fail past that length, extend it to 2048
# with ring attention over several processes, and measure again. GPUs are used where there are any.
#
#   bash train_scripts/quickstart.sh [--seed N] [--output DIR]
#
# Makes .venv in the repository's root at the first run (PYTHON=/path/to/python3.11 picks another Python).
set -euo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() {
  echo "error: $*" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
seed=0
out="$root/output/quickstart"
while [ $# -gt 0 ]; do
  case "$1" in
    --seed) seed="${2:?--seed needs a number}" && shift 2 ;;
    --output) out="${2:?--output needs a folder}" && shift 2 ;;
    -h | --help) usage && exit 0 ;;
    *) fail "unknown argument '$1'; there are --seed N and --output DIR" ;;
  esac
done
[[ "$seed" =~ ^[0-9]{1,9}$ ]] || fail "--seed is '$seed'; give a whole number from 0 to 999999999"

# Only a folder that the quickstart made is cleared.
if [ -e "$out" ] && [ ! -e "$out/.quickstart" ] && [ -n "$(ls -A "$out" 2>/dev/null || echo file)" ]; then
  fail "--output $out holds something else; name a new folder"
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
touch "$out/.quickstart"
(cd "$out" && rm -rf held_out long_rows long_rows.partial short extended needle_before needle_after perplexity summary.json)

cd "$root"
# shellcheck source=setup_env.sh
source train_scripts/setup_env.sh
SECONDS=0
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONUNBUFFERED=1
export HF_DATASETS_DISABLE_PROGRESS_BARS=1

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
# Port 0: accelerate picks a free one, so that two runs on a machine do not meet.
if [ "$gpus" -ge 2 ]; then
  launch=(accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes "$gpus" --main_process_port 0)
  parallel_mode=zigzag_ring_attn
  where="$gpus GPUs"
elif [ "$gpus" -eq 1 ]; then
  launch=(python)
  parallel_mode=data_parallel
  where="1 GPU (which has nobody to share a sequence with)"
else
  launch=(accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes 2 --main_process_port 0)
  parallel_mode=zigzag_ring_attn
  where="2 processes on the CPU"
fi

step() { printf '\n[%3d s] %s\n' "$SECONDS" "$*"; }

needle() { # name of the model's folder, name of the results' folder
  "${launch[@]}" eval/needle.py --model "$out/$1" --labels "$2" --output "$out/$2" \
    --haystack "$out/held_out" --lengths 256 512 1024 2048 --depths 11 --samples 8 --shift-haystack \
    --prefix "" --needle "[NUMBER={number}]" --question " [NUMBER=" --answer-stub "" --digits 4 \
    --seed "$seed" --force # also lengths that the model was not trained on
}

step "training a byte-level Llama (0.4M parameters) at 256 bytes, on Python's own help texts"
python -m train_scripts.quickstart.pretrain --output "$out" --seed "$seed"

step "looking for needles before the extension, on $where"
needle short needle_before

step "raising the RoPE base and going on at 2048 bytes: $parallel_mode on $where"
"${launch[@]}" -m easyctx.train --model "$out/short" --dataset "$out/long_rows" --output-dir "$out/extended" \
  --seq-length 2048 --batch-size 2 --gradient-accumulate-every 1 --max-train-steps 480 --rope-theta 5e4 \
  --learning-rate 1e-3 --lr-schedule cosine --warmup-steps 5 --weight-decay 0 --adam-betas 0.9 0.98 \
  --parallel_mode "$parallel_mode" --seed "$seed" --tracker none

step "looking for needles after the extension, the same prompts"
needle extended needle_after

step "perplexity of text that no training saw, before and after"
"${launch[@]}" eval/perplexity.py --model "$out/short" "$out/extended" --labels before after \
  --output "$out/perplexity" --data "$out/held_out" --split --lengths 256 512 1024 2048 --force

python -m train_scripts.quickstart.report --output "$out" --seconds "$SECONDS"
