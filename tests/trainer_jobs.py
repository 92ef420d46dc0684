"""Jobs that train with transformers' Trainer, stock on one process or with shared sequences on every rank."""

import os
import runpy
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.data.data_collator import DataCollatorWithFlattening

from easyctx import positions
from easyctx.check.float64 import float64_throughout
from easyctx.modes import make_mode_mesh
from easyctx.trainer import sequence_parallel
from easyctx.trainer.batch import read_batch, shard_batch
from easyctx.trainer.samples import count_targets
from tests.models import ragged_batch, tiny_model

LENGTHS = (53, 40, 53, 17, 31, 53, 9, 22)  # of the rows; none divides by a layout's multiple
STEPS = 2


@dataclass(frozen=True)
class Run:
    """mode None: the stock trainer. `batch` sequences to a micro-batch of a data-parallel rank."""

    mode: str | None
    sp_degree: int | None = None
    ring_degree: int | None = None
    batch: int = 1
    eval_batch: int = 1
    accumulate: int = 2
    packed: bool = False
    whole_predictions: bool = False
    save_to: str | None = None
    resume: bool = False
    settings: tuple[tuple[str, Any], ...] = ()


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, torch.Tensor]]:
    ids, labels = ragged_batch(len(lengths), max(lengths))
    return [
        {"input_ids": i[:n], "labels": torch.where(torch.arange(n) < n - 3, label[:n], i[:n])}
        for i, label, n in zip(ids, labels, lengths, strict=True)
    ]


def pad_right(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of the longest one's length: mask 0 and label -100 on the padding, as tokenizers' collators have it."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(t, (0, longest - len(t)), value=value) for t in tensors])

    return {
        "input_ids": padded([s["input_ids"] for s in samples], 0),
        "labels": padded([s["labels"] for s in samples], -100),
        "attention_mask": padded([torch.ones_like(s["input_ids"]) for s in samples], 0),
    }


def pack(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One row of all samples, by transformers' own collator."""
    lists = [{name: t.tolist() for name, t in sample.items()} for sample in samples]
    return DataCollatorWithFlattening()(lists)


class Losses(TrainerCallback):
    """What the trainer logged."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.norm: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.loss.append(logs["loss"])
            self.norm.append(logs["grad_norm"])


def forget_processes() -> None:
    """Let the next TrainingArguments make accelerate's state anew."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    PartialState._shared_state.clear()


def arguments(run: Run) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": run.save_to or "unused",
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": run.batch,
        "per_device_eval_batch_size": run.eval_batch,
        "gradient_accumulation_steps": run.accumulate,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "steps" if run.save_to else "no",
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "non_padding",
    }
    return TrainingArguments(**settings | dict(run.settings))


def make_trainer(run: Run, losses: Losses, **more: Any) -> Any:
    kind: Any = Trainer
    if run.mode is not None:
        kind = sequence_parallel(Trainer, run.mode, sp_degree=run.sp_degree, ring_degree=run.ring_degree)
    # Both are to see the same borders: stock models look for them in position ids where no cache is asked for.
    model = tiny_model("llama", use_cache=False)
    return kind(
        model=model,
        args=arguments(run),
        train_dataset=rows(),
        eval_dataset=rows((21, 53, 34)),
        data_collator=pack if run.packed else pad_right,
        callbacks=[losses],
        **more,
    )


def train(rank: int, world: int, run: Run) -> dict[str, Any]:
    """Train, evaluate and, if asked, predict: what came of it."""
    forget_processes()
    losses = Losses()
    trainer = make_trainer(run, losses)
    with ExitStack() as stack:
        stack.enter_context(float64_throughout())
        before = trainer.evaluate()["eval_loss"]
        trainer.train(resume_from_checkpoint=str(Path(run.save_to or "") / "checkpoint-1") if run.resume else None)
        found: dict[str, Any] = {"eval_before": before, "eval": trainer.evaluate()["eval_loss"]}
        if run.whole_predictions:
            told = trainer.predict(rows((21, 53, 34)))
            found |= {"logits": torch.tensor(told.predictions), "labels": torch.tensor(told.label_ids)}
    if run.save_to and not run.resume:
        trainer.save_model(os.path.join(run.save_to, "last"))
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    forget_processes()
    return found | {
        "loss": losses.loss,
        "norm": losses.norm,
        "weights": weights,
        "tokens": trainer.state.num_input_tokens_seen,
        "flops": trainer.state.total_flos,
    }


def one_process(run: Run) -> dict[str, Any]:
    return train(0, 1, run)


def example(rank: int, world: int, script: str, flags: tuple[str, ...]) -> list[float]:
    """What a script of train_scripts/ logs as loss."""
    forget_processes()
    run = runpy.run_path(str(Path(__file__).parent.parent / "train_scripts" / script))
    trainer = run["train"]([*flags, "--max-steps", "2", "--accumulate", "2", "--learning-rate", "1e-3", "--cpu"])
    forget_processes()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def saved_difference(one: Path, other: Path) -> float:
    """The largest difference of a weight between two saved models."""
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (one, other)]
    pairs = zip(*(model.parameters() for model in models), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def refusal(rank: int, world: int, run: Run, what: str) -> str:
    """The message of the ValueError that training raises."""
    forget_processes()
    try:
        trainer = make_trainer(run, Losses(), **({"compute_loss_func": max} if what == "loss" else {}))
        if what == "samples":
            trainer.train_dataset = rows()[rank:]
        if what == "left":
            collate = trainer.data_collator
            trainer.data_collator = lambda samples: {n: t.flip(1) for n, t in collate(samples).items()}
        trainer.train()
    except ValueError as error:
        return str(error)
    finally:
        forget_processes()
    return "nothing was refused"


def numbers_of_a_step(rank: int, world: int) -> list[int]:
    """The numbers that shards of a step's two batches carry to the model, where none is computed after the count."""
    cpu, mesh = torch.device("cpu"), make_mode_mesh("zigzag_ring_attn", world, None)
    batches = [pad_right(rows()[at : at + 2]) for at in (0, 2)]
    count_targets(batches, mesh, cpu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions, "batch_number", lambda ids: pytest.fail("computed again"))
        shards = [shard_batch(read_batch(batch), "zigzag_ring_attn", mesh, cpu)[0] for batch in batches]
    return [getattr(shard["input_ids"], positions._BATCH) for shard in shards]
