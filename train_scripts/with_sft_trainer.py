"""TRL's SFTTrainer on long conversations: three lines turn sequence parallelism on (marked 1, 2, 3).

    pip install trl
    accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 8 train_scripts/with_sft_trainer.py \
        --model MODEL --dataset chats.jsonl --max-length 131072 --sp-degree 8 --output-dir output/sft

Each line of the file has `messages`, or `prompt` and `completion` (loss on the completion only), or `text`.
On a CPU: accelerate_configs/cpu.yaml. On one process (--mode none) it is plain SFTTrainer, with the same losses.
"""

import argparse
from typing import Any

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from easyctx.trainer import sequence_parallel  # 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a causal LM")
    parser.add_argument("--dataset", required=True, help="a JSON lines file")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--mode", default="zigzag_ring_attn", help="a sequence-parallel mode; none: stock SFTTrainer")
    parser.add_argument("--sp-degree", type=int, help="processes that share a sequence; default: all")
    parser.add_argument("--max-length", type=int, default=65536, help="tokens to a row; longer ones are cut")
    parser.add_argument("--packing", action="store_true", help="several conversations to a row, borders kept")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=1, help="rows to a group of --sp-degree processes")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args(argv)


def train(argv: list[str] | None = None) -> Any:
    options = parse(argv)
    config = SFTConfig(
        output_dir=options.output_dir,
        max_length=options.max_length,
        packing=options.packing,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        bf16=options.bf16,
        use_cpu=options.cpu,
        logging_steps=1,
        report_to="none",
    )
    kind: Any = SFTTrainer
    if options.mode != "none":
        kind = sequence_parallel(SFTTrainer, options.mode, sp_degree=options.sp_degree)  # 2
    rows = load_dataset("json", data_files=options.dataset, split="train")
    trainer = kind(model=options.model, args=config, train_dataset=rows)  # 3
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    train()
