"""A step of some of a model's layers, beside which the memory of all the others is really taken.

A step at a million tokens on one GPU takes the better part of an hour. Here the decision is made for the whole model;
its last layers are built and run as decided, and what the others would hold (weights, what they keep on the GPU and on
the host, their adapters' gradients and optimizer state) is allocated beside them for the length of the step, so that
the peak is the whole model's: it falls into the backward of the last layers, when the others hold all they ever do.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from easyctx.cost.hardware import Cluster, find_device
from easyctx.cost.step import Step, step_cost
from easyctx.memory.budget import Choices, Kept, MemoryShape, Setting, host_tensors, states
from easyctx.memory.pool import BLOCK, HostPool
from easyctx.training.memory import RunMemory


@dataclass
class Ballast:
    """Memory that layers would hold which are not there."""

    gpu: torch.Tensor
    host: HostPool


def first_timed(choices: Choices, wanted: int) -> int:
    """The first of the layers to run: the last `wanted`, and those before that their inputs are made again from."""
    first = max(len(choices.layers) - wanted, 0)
    while choices.layers[first].inputs == "recompute" and not choices.layers[first].everything:
        first -= 1
    return first


def last_layers(memory: RunMemory, shape: MemoryShape) -> RunMemory:
    """Of a decision, the part of the last `shape.num_layers` layers."""
    decision, first = memory.decision, memory.shape.num_layers - shape.num_layers
    choices = replace(decision.choices, layers=decision.choices.layers[first:])
    return replace(memory, shape=shape, decision=replace(decision, choices=choices))


def take_ballast(whole: RunMemory, part: RunMemory, device: torch.device) -> Ballast:
    """Allocate what the layers hold that `whole` has before those of `part`."""
    gpu, host = sizes_of_ballast(whole, part)
    pool = HostPool(host, pin=device.type == "cuda", block=BLOCK) if host else HostPool(0, pin=False)
    return Ballast(torch.empty(gpu, dtype=torch.uint8, device=device), pool)


def sizes_of_ballast(whole: RunMemory, part: RunMemory) -> tuple[int, int]:
    """Bytes on the GPU and on the host."""
    first = whole.shape.num_layers - part.shape.num_layers
    held = sum(states(whole.shape, whole.setting)) - sum(states(part.shape, part.setting))
    kept = Kept(whole.shape, whole.setting, whole.decision.choices).first_on_gpu[first]
    on_host = sum(_on_host(whole)) - sum(_on_host(part))
    return held + kept, max(on_host, 0)


def _on_host(memory: RunMemory) -> list[int]:
    return host_tensors(memory.shape, memory.setting, memory.decision.choices)


def times_longer(whole: RunMemory, part: RunMemory, length: int, gpu: str) -> float:
    """How many times longer a step of the whole model is predicted to take (`easyctx/cost`) than one of its part."""
    return _predicted(whole, length, gpu) / _predicted(part, length, gpu)


def _predicted(memory: RunMemory, length: int, gpu: str) -> float:
    setting: Setting = memory.setting
    cluster = Cluster.of(find_device(gpu), 1, 1)
    choices: Any = memory.decision.choices
    return step_cost(
        Step(memory.shape, length, cluster, "data_parallel", choices, "ddp", widths=setting.widths)
    ).seconds
