"""A job that trains some steps and, between them, has prompts answered."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from easyctx.modes import make_mode_mesh
from easyctx.train import train_step
from easyctx.training.samples import Samples
from tests.engine_jobs import LENGTH, Step, fresh_accelerator
from tests.models import VOCAB

PROMPTS = [[5, 6, 7], [9] * 30, [*range(3, 50)]]
STEPS = 3


@dataclass(frozen=True)
class Run:
    mode: str
    sp_degree: int
    folder: Path
    every: int
    sharded: bool = False  # by FSDP2, else DDP
    memory: str | None = None


def sampled_steps(rank: int, world: int, run: Run) -> dict[str, Any]:
    """Losses, weights, what the random numbers are after them, and the answers of each step."""
    accelerator = fresh_accelerator(accumulate=2)
    mesh = make_mode_mesh(run.mode, run.sp_degree)
    step = Step(run.mode, run.sp_degree, dtype=torch.float32, memory=run.memory)
    inner: Any = step.patched_model(mesh)
    model, config = inner, inner.config
    if run.sharded:
        for unit in (*model.model.layers, model):
            fully_shard(unit)
        optimizer: Any = torch.optim.SGD(model.parameters(), 0.5)
    else:
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.5))
    model.train()
    settings: Any = SimpleNamespace(
        parallel_mode=run.mode,
        seq_length=LENGTH,
        pose_length=None,
        gradient_accumulate_every=2,
        max_grad_norm=1.0,
        loss="full",
        sample_every=run.every,
        sample_tokens=6,
        output_dir=str(run.folder),
        model=str(run.folder / "model"),
    )
    samples = Samples(settings, accelerator, mesh, PROMPTS if run.every else [], 0)
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    losses, answers = [], []
    for number in range(STEPS):
        batches = iter([{"input_ids": torch.randint(3, VOCAB, (1, LENGTH), generator=generator)} for _ in range(2)])
        losses.append(train_step(model, optimizer, batches, settings, config, accelerator, mesh))
        answers.append(samples.run_if_due(model, number + 1))
    whole = {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in inner.named_parameters()}
    return {"losses": losses, "weights": whole, "draw": torch.rand(3), "answers": answers, "train": inner.training}
