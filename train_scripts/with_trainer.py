"""transformers' Trainer on long sequences: three lines turn sequence parallelism on (marked 1, 2, 3).

    easyctx data books.txt --tokenizer MODEL --seq-length 65536 --output data/64k
    accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 train_scripts/with_trainer.py \
        --model MODEL --dataset data/64k --sp-degree 8 --output-dir output/64k --gradient-checkpointing

On a CPU: accelerate_configs/cpu.yaml. On one process (--mode none) it is plain Trainer, with the same losses.
"""

import argparse
from typing import Any

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from easyctx.data.load import load_tokenised
from easyctx.trainer import sequence_parallel  # 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a causal LM")
    parser.add_argument("--dataset", required=True, help="rows of one length with input_ids, made by `easyctx data`")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--mode", default="zigzag_ring_attn", help="a sequence-parallel mode; none: stock Trainer")
    parser.add_argument("--sp-degree", type=int, help="processes that share a sequence; default: all")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences to a group of --sp-degree processes")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args(argv)


def train(argv: list[str] | None = None) -> Any:
    options = parse(argv)
    rows = load_tokenised(options.dataset)
    if "labels" not in rows.column_names:
        rows = rows.map(lambda row: {"labels": row["input_ids"]})
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        gradient_checkpointing=options.gradient_checkpointing,
        bf16=options.bf16,
        use_cpu=options.cpu,
        logging_steps=1,
        report_to="none",
    )
    kind: Any = Trainer
    if options.mode != "none":
        kind = sequence_parallel(Trainer, options.mode, sp_degree=options.sp_degree)  # 2
    model = AutoModelForCausalLM.from_pretrained(options.model, use_cache=False)
    trainer = kind(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)  # 3
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    train()
