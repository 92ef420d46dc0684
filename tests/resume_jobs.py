"""Jobs that train a few steps under one engine, from a checkpoint and to one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from easyctx.adapters.save import gather_trained
from easyctx.adapters.settings import AdapterSettings
from easyctx.check.float64 import float64_throughout
from easyctx.loss import global_sum
from easyctx.training.order import GlobalOrder
from easyctx.training.ranks import Ranks
from easyctx.training.state import TensorState, trained_parameters
from tests.adapter_jobs import with_adapters
from tests.models import VOCAB, tiny_model

LENGTH, GLOBAL_BATCH, NUM_ROWS = 12, 4, 6


def train_some(
    rank: int, world: int, engine: str, begin: int, end: int, folder: Path, adapters: bool = False
) -> tuple[list[float], Any]:
    """Steps `begin` to `end` in float64; losses and the weights after them, whole; with adapters, those alone.

    Reads the checkpoint `folder/begin` unless begin is 0, and writes `folder/end`.
    """
    model: Any = tiny_model("llama", torch.float64, use_cache=False)
    if adapters:
        model = with_adapters(model, AdapterSettings(4, lora_train=("norms",)))
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
    if adapters:
        one_of_many = SimpleNamespace(
            unwrap_model=lambda _: model, distributed_type=DistributedType.NO, is_main_process=True
        )
        return losses, gather_trained(one_of_many, wrapped)
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
