"""A job that trains a few steps with Muon under DDP, from a checkpoint and to one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from easyctx.training.optimizer import make_optimizer
from easyctx.training.ranks import Ranks
from easyctx.training.state import TensorState, trained_parameters
from tests.models import VOCAB, tiny_model


def muon_steps(rank: int, world: int, begin: int, end: int, folder: Path) -> dict[str, torch.Tensor]:
    """Steps `begin` to `end`, and the weights after them, from checkpoint `folder/begin`, if any, to `folder/end`."""
    model: Any = tiny_model("llama", torch.float32, use_cache=False)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    settings: Any = SimpleNamespace(optimizer="muon", learning_rate=1e-3, adam_betas=[0.9, 0.95], weight_decay=0.1)
    optimizer = make_optimizer(model, settings)
    ranks = Ranks()
    state = TensorState(trained_parameters(model), optimizer, ranks)
    if begin:
        state.restore(folder / str(begin), ranks)
    for step in range(begin, end):
        ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(10 * step + rank))
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dcp.save(state.parts(copied=True), checkpoint_id=folder / str(end), process_group=ranks.group)
    return {name: p.detach().clone() for name, p in model.named_parameters()}
