"""A step of some of a model's layers, beside which the memory of all the others is really taken.

A step at a million tokens on one GPU takes the better part of an hour. Here the decision is made for the whole model;
its last layers are built and run as decided, and what the others would hold is allocated beside them for the length of
the step: weights, gradients and optimizer state wherever the engine has these, and what they keep for the backward. On
the host that is all of it, on the GPU as much as is there in the moment of the peak, so that the peak is the whole's.
Of a row's times `seconds` is the whole's, as predicted; `seconds_timed` and `seconds_of_steps` are what was measured.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from easyctx.cost.hardware import Cluster, Device, find_device
from easyctx.cost.step import Step, step_cost
from easyctx.memory.budget import GIB, MemoryShape, host_tensors, predict, states
from easyctx.memory.describe import gib
from easyctx.memory.engines import get_engine, is_paged
from easyctx.memory.host import available_host_memory
from easyctx.memory.pinned import rounded_away
from easyctx.memory.policy import Decision
from easyctx.memory.pool import BLOCK, HostPool
from easyctx.training.memory import RunMemory

Row = dict[str, Any]
NO_PLAN = (
    "layers that do not run hold what is planned for them, and nothing is: on a CPU, give a flag such as --mlp-tile"
)


@dataclass(frozen=True)
class Sizes:
    """Bytes of one rank: on the GPU, and of pinned and other host memory."""

    gpu: int
    pinned: int
    unpinned: int


@dataclass
class Ballast:
    """Memory that layers would hold which are not there."""

    gpu: torch.Tensor
    pinned: HostPool
    unpinned: torch.Tensor


def layers_to_run(decisions: list[Decision], wanted: int) -> int:
    """How many of the last layers to run under these decisions: those wanted, and up to one that keeps its input."""
    found = max((_to_run(decision, wanted) for decision in decisions), default=wanted)
    return found if found <= wanted else layers_to_run(decisions, found)


def _to_run(decision: Decision, wanted: int) -> int:
    layers = decision.choices.layers
    first = max(len(layers) - wanted, 0)
    while layers[first].inputs == "recompute" and not layers[first].everything:
        first -= 1
    return len(layers) - first


def last_layers(memory: RunMemory, hf_config: Any) -> RunMemory:
    """Of a decision, the part of the last layers, as many as this configuration has."""
    shape = MemoryShape.from_config(hf_config)
    shape = replace(shape, adapters=memory.shape.adapters, fused=memory.shape.fused)
    decision, first = memory.decision, memory.shape.num_layers - shape.num_layers
    choices = replace(decision.choices, layers=decision.choices.layers[first:])
    return replace(memory, shape=shape, decision=replace(decision, choices=choices))


def sizes_of_ballast(whole: RunMemory, part: RunMemory) -> Sizes:
    """On the GPU what is missing of the whole's predicted peak, on the host all that the layers left out have there."""
    setting, engine = whole.setting, get_engine(whole.setting.engine)
    of_part = predict(part.shape, setting, part.decision.choices)
    gpu = max(whole.decision.predicted.gpu_peak - of_part.gpu_peak, 0)
    of_states = (states(memory.shape, setting) for memory in (whole, part))
    weights, gradients, optimizer = (a - b for a, b in zip(*of_states, strict=True))
    pinned = max(sum(_kept_on_host(whole)) - sum(_kept_on_host(part)), 0)
    if not engine.offloads:
        return Sizes(gpu, pinned, is_paged(setting.optimizer) * optimizer)
    if not (engine.pins and setting.pins):
        return Sizes(gpu, pinned, weights + gradients + optimizer)
    rounded = rounded_away(whole.shape, setting) - rounded_away(part.shape, setting)
    return Sizes(gpu, pinned + weights + gradients + rounded, optimizer)


def _kept_on_host(memory: RunMemory) -> list[int]:
    return host_tensors(memory.shape, memory.setting, memory.decision.choices)


def take_ballast(whole: RunMemory, part: RunMemory, device: torch.device) -> Ballast:
    """Allocate it; host memory is there once it is written."""
    sizes = sizes_of_ballast(whole, part)
    return Ballast(
        torch.empty(sizes.gpu, dtype=torch.uint8, device=device),
        HostPool(sizes.pinned, pin=device.type == "cuda" and sizes.pinned > 0, block=BLOCK),
        torch.ones(sizes.unpinned, dtype=torch.uint8),
    )


def room_now(device: torch.device) -> int:
    """Bytes of host memory that are left, as all ranks see it; to be asked before any is taken."""
    left = torch.tensor(available_host_memory(), device=device)
    if dist.is_initialized():
        dist.all_reduce(left, op=dist.ReduceOp.MIN)
    return int(left)


def check_room(memory: RunMemory, room: int) -> None:
    """ValueError where more is predicted than there was (`--host-memory` may promise that)."""
    needed = memory.decision.predicted.host_peak
    if needed > room:
        raise ValueError(
            f"{gib(needed)} GiB of host memory are predicted, and this machine has {gib(room)} left: give "
            f"--host-memory {room // GIB} or less"
        )


def device_here() -> Device:
    """The rates that the whole's time is predicted by; to be asked before anything runs.

    Raises ValueError for a GPU of which none are known.
    """
    try:
        return find_device(torch.cuda.get_device_name() if torch.cuda.is_available() else "h200")
    except ValueError as error:
        raise ValueError(
            f"--layers-timed predicts the time of all layers, and {error}; or leave the flag out"
        ) from error


def as_whole(row: Row, whole: RunMemory, part: RunMemory, length: int, mode: str) -> Row:
    """A row that was measured of `part`, as one of the whole model.

    `seconds_timed` is what was measured; `seconds` is that, times how much longer a step of the whole is predicted to
    take (`easyctx/cost`). `seconds_of_steps` stays what was measured of each step. Rates in the row are those of the
    whole's work over `seconds_timed`, before.
    """
    if part.shape.num_layers == whole.shape.num_layers:
        return row
    longer = _predicted_seconds(whole, length, mode) / _predicted_seconds(part, length, mode)
    sizes = sizes_of_ballast(whole, part)
    rates = {name: row[name] / longer for name in ("tokens_per_s", "mfu") if row.get(name) is not None}
    of_ballast = {"ballast_gpu_gib": sizes.gpu / GIB, "ballast_host_gib": (sizes.pinned + sizes.unpinned) / GIB}
    return row | rates | of_ballast | {"seconds_timed": row["seconds"], "seconds": row["seconds"] * longer}


def _predicted_seconds(memory: RunMemory, length: int, mode: str) -> float:
    setting = memory.setting
    step = Step(
        memory.shape,
        length,
        Cluster.of(device_here(), setting.ring * setting.ulysses, setting.local_ranks),
        mode,
        memory.decision.choices,
        setting.engine,
        ring_degree=setting.ring if mode == "usp_attn" else None,
        world=setting.ranks,
        widths=setting.widths,
        optimizer=setting.optimizer,
    )
    return step_cost(step).seconds
