"""A job that fine-tunes with TRL's SFTTrainer; to be imported only where TRL is."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from easyctx.trainer import sequence_parallel
from tests.models import tiny_model
from tests.trainer_jobs import forget_processes

FIGURES = ("loss", "mean_token_accuracy", "entropy", "num_tokens", "eval_loss", "eval_mean_token_accuracy")


@dataclass(frozen=True)
class Sft:
    tokenizer: str
    mode: str | None = None
    sp_degree: int | None = None
    batch: int = 2
    packing: bool = False


def texts(number: int) -> Dataset:
    """Prompts and completions of several lengths."""
    return Dataset.from_list(
        [{"prompt": "ab " * (1 + i % 4), "completion": "cde " * (2 + 3 * i % 5)} for i in range(number)]
    )


def fine_tune(rank: int, world: int, run: Sft) -> dict[str, Any]:
    """What was logged, figure by figure, and the weights."""
    forget_processes()
    args = SFTConfig(
        output_dir="unused",
        use_cpu=True,
        bf16=False,
        max_steps=2,
        max_length=48,
        packing=run.packing,
        eval_packing=False,
        per_device_train_batch_size=run.batch,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    kind: Any = SFTTrainer
    if run.mode is not None:
        kind = sequence_parallel(SFTTrainer, run.mode, sp_degree=run.sp_degree)
    trainer = kind(
        model=tiny_model("llama", torch.float32, use_cache=False, vocab_size=512),
        args=args,
        train_dataset=texts(24),
        eval_dataset=texts(3),
        processing_class=AutoTokenizer.from_pretrained(run.tokenizer),
    )
    trainer.train()
    history = trainer.state.log_history
    forget_processes()
    return {name: [entry[name] for entry in history if name in entry] for name in FIGURES} | {
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    }
