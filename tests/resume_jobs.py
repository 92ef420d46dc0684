"""Jobs that train a few steps under one engine, from a checkpoint and to one."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from easyctx.check.float64 import float64_throughout
from easyctx.loss import global_sum
from easyctx.training.order import GlobalOrder
from easyctx.training.ranks import Ranks
from easyctx.training.state import TensorState, trained_parameters
from tests.models import VOCAB, tiny_model

LENGTH, GLOBAL_BATCH, NUM_ROWS = 12, 4, 6


def train_some(rank: int, world: int, engine: str, begin: int, end: int, folder: Path) -> tuple[list[float], Any]:
    """Steps `begin` to `end` in float64; losses and the weights after them, whole.

    Reads the checkpoint `folder/begin` unless begin is 0, and writes `folder/end`.
    """
    model: Any = tiny_model("llama", torch.float64, use_cache=False)
    wrapped = _wrap(model, engine, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ranks = Ranks()
    state = TensorState(trained_parameters(model), optimizer, ranks)
    if begin:
        state.restore(folder / str(begin), ranks)
    rows = torch.randint(3, VOCAB, (NUM_ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mine = GLOBAL_BATCH // world
    batches = iter(GlobalOrder(NUM_ROWS, 0, mine, rank, world, begin * GLOBAL_BATCH))
    losses = []
    for _ in range(begin, end):
        ids = rows[next(batches)]
        with float64_throughout():
            loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()  # engines average over their ranks, which hold equally many tokens
        losses.append(global_sum(loss, "cpu") / world)
        optimizer.step()
        optimizer.zero_grad()
    dcp.save(
        state.parts(copied=True), checkpoint_id=folder / str(end), process_group=ranks.group, no_dist=ranks.size == 1
    )
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in model.named_parameters()}
    return losses, whole


def _wrap(model: Any, engine: str, world: int) -> Any:
    if engine == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if engine in ("fsdp2", "hsdp"):
        shape = (world,) if engine == "fsdp2" else (2, world // 2)
        names = ("shard",) if engine == "fsdp2" else ("replicate", "shard")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for unit in (*model.model.layers, model):
            fully_shard(unit, mesh=mesh)
        return model
    assert not dist.is_initialized() or dist.get_world_size() == 1
    return model
