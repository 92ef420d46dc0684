# Sourced by the LoRA and QLoRA scripts beside it, which say what they are and set MODEL, SOURCE_TOKENS and so on:
# data, training with samples, evals of the adapter, merged weights. What is done already is not done again, and a run
# that was stopped goes on, so the same command may be given again.

fail() {
  echo "error: $*" >&2
  exit 2
}
[ "${BASH_SOURCE[0]}" != "$0" ] || fail "this file has no settings of its own: run train_scripts/anima_7b_100k.sh," \
  "anima_33b_qlora.sh or qlora_33b_100k.sh, which source it"
[ -n "${DATA:-}" ] || fail "DATA is not set: DATA=questions.jsonl bash …; JSON lines with document, question and answer" \
  "(or prompt and response, or messages)"
SEQ_LENGTH=$((SOURCE_TOKENS + TARGET_TOKENS))
VALIDATION="${VALIDATION:-0.01}"     # share of DATA that is held out, for the perplexity of answers
SAMPLE_PROMPTS="${SAMPLE_PROMPTS:-}" # prompts that are answered during training; by default the first 4 of DATA
SAMPLE_TOKENS="${SAMPLE_TOKENS:-100}"
HAYSTACK="${HAYSTACK:-}" # a text file, or a folder of them: needles and perplexity after training; without it no evals
EVAL_LENGTHS="${EVAL_LENGTHS:-$((SEQ_LENGTH / 4)) $((SEQ_LENGTH / 2)) $SEQ_LENGTH}"
MERGE="${MERGE:-no}" # yes: also write the weights with the adapter added to them
read -ra lengths <<<"$EVAL_LENGTHS"
read -ra more <<<"${TRAIN_FLAGS:-}" # further flags of the train loop
adapter="$OUTPUT/adapter"

launch() {
  accelerate launch --config_file "accelerate_configs/$ENGINE.yaml" --num_processes "$PROCESSES" --main_process_port 0 "$@"
}

# Rows of their own lengths; what is too long loses the end of its document, never of its question.
[ -e "$OUTPUT/data" ] || easyctx data "$DATA" --sft --unpacked --tokenizer "$MODEL" --seq-length "$SEQ_LENGTH" \
  --max-source-tokens "$SOURCE_TOKENS" --max-target-tokens "$TARGET_TOKENS" --validation "$VALIDATION" --shuffle \
  --output "$OUTPUT/data"

if [ -z "$SAMPLE_PROMPTS" ]; then
  [[ "$DATA" == *.jsonl ]] || fail "DATA $DATA is no .jsonl file: name SAMPLE_PROMPTS"
  mkdir -p "$OUTPUT"
  SAMPLE_PROMPTS="$OUTPUT/prompts.jsonl"
  head -n 4 "$DATA" >"$SAMPLE_PROMPTS"
fi

launch -m easyctx.train --model "$MODEL" --dataset "$OUTPUT/data" --output-dir "$adapter" --resume \
  --seq-length "$SEQ_LENGTH" --buckets "$BUCKETS" --parallel_mode "$PARALLEL_MODE" \
  ${ROPE_THETA:+--rope-theta "$ROPE_THETA"} --lora-r "$LORA_R" --lora-alpha "$LORA_ALPHA" \
  ${LORA_TRAIN:+--lora-train $LORA_TRAIN} ${QUANTIZE:+--quantize "$QUANTIZE"} --optimizer "$OPTIMIZER" \
  --learning-rate "$LEARNING_RATE" --weight-decay 0 --batch-size 1 --gradient-accumulate-every "$ACCUMULATE" \
  --max-train-steps "$STEPS" --save-every "$SAVE_EVERY" --eval-dataset "$OUTPUT/data" --eval-every "$SAMPLE_EVERY" \
  --sample-every "$SAMPLE_EVERY" --sample-prompts "$SAMPLE_PROMPTS" --sample-tokens "$SAMPLE_TOKENS" "${more[@]}"

if [ -n "$HAYSTACK" ]; then
  launch eval/needle.py --model "$adapter" --haystack "$HAYSTACK" --lengths "${lengths[@]}" --depths "${DEPTHS:-11}" \
    --parallel_mode "$PARALLEL_MODE" --output "$OUTPUT/needle"
  launch eval/perplexity.py --model "$adapter" --data "$HAYSTACK" --split --lengths "${lengths[@]}" \
    --parallel_mode "$PARALLEL_MODE" --output "$OUTPUT/perplexity"
fi

if [ "$MERGE" = yes ] && [ ! -e "$OUTPUT/merged" ]; then
  easyctx merge "$adapter" --output "$OUTPUT/merged"
fi
