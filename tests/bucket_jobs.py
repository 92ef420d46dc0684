"""A job that takes a training step on rows of different lengths, padded to few or many of them."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.fsdp import fully_shard

from easyctx.check.float64 import float64_throughout
from easyctx.modes import make_mode_mesh
from easyctx.train import train_step
from easyctx.training.data import checked_rows, make_loader
from easyctx.training.flags import parse_arguments
from tests.engine_jobs import Step, fresh_accelerator
from tests.models import VOCAB

LONGEST, ROWS = 61, 12


def rows_of_own_lengths(borders: bool = False) -> Dataset:
    """Rows of 5 to 70 tokens, some longer than the sequence, with ragged labels; borders: of three documents each."""
    generator = torch.Generator().manual_seed(3)
    lengths = [5 + 65 * n // (ROWS - 1) for n in range(ROWS)]
    ids = [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]
    hidden = [torch.rand(length, generator=generator) < 0.4 for length in lengths]
    labels = [row.masked_fill(mask, -100).tolist() for row, mask in zip(ids, hidden, strict=True)]
    columns = {"input_ids": [row.tolist() for row in ids], "labels": labels}
    if borders:
        columns["document_ids"] = [[3 * n // length for n in range(length)] for length in lengths]
    return Dataset.from_dict(columns)


@dataclass(frozen=True)
class Run:
    mode: str
    sp_degree: int
    buckets: int
    family: str = "llama"
    sharded: bool = False  # by FSDP2, else DDP
    memory: str | None = None
    borders: bool = False


def bucket_step(rank: int, world: int, run: Run) -> dict[str, Any]:
    """Loss and gradient norm of a step, weights after it, and the lengths that this rank's model was called with."""
    accelerator = fresh_accelerator(accumulate=3)
    mesh = make_mode_mesh(run.mode, run.sp_degree)
    step = Step(run.mode, run.sp_degree, family=run.family, memory=run.memory)
    inner: Any = step.patched_model(mesh)
    shapes: list[int] = []
    inner.register_forward_pre_hook(lambda *call: shapes.append(call[2]["input_ids"].shape[1]), with_kwargs=True)
    flags = f"--model m --dataset d --output-dir o --seq-length {LONGEST} --batch-size 2 --max-grad-norm 0"
    config = parse_arguments(
        [*flags.split(), "--buckets", str(run.buckets), "--gradient-accumulate-every", "3", "--parallel_mode", run.mode]
    )
    rows = checked_rows(config, rows_of_own_lengths(run.borders), "d", LONGEST, VOCAB)
    batches = iter(make_loader(rows, config, mesh))
    model, model_config = inner, inner.config
    if run.sharded:
        for unit in (*model.model.layers, model):
            fully_shard(unit)
        optimizer: Any = torch.optim.SGD(model.parameters(), 1.0)
    else:
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1.0))
    model.train()
    with float64_throughout():
        loss, norm = train_step(model, optimizer, batches, config, model_config, accelerator, mesh)
    weights = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in inner.named_parameters()
    }
    return {"loss": loss, "norm": norm, "weights": weights, "shapes": shapes}
