"""Tensors that wait for the backward in host memory: copied out beside the forward, back before they are needed."""

from collections import deque
from typing import Any

import torch

from easyctx.memory.copies import Copies, Done, copies_for
from easyctx.memory.pool import HostPool


class Spilled:
    """A tensor in the pool. Its blocks go back when `release` is called, at the latest when it is forgotten."""

    def __init__(self, spill: "Spill", tensor: torch.Tensor) -> None:
        self.spill = spill
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.fetched: tuple[torch.Tensor, Done] | None = None
        self.blocks: list[torch.Tensor] = []
        self.blocks = spill.pool.take(tensor.numel() * tensor.element_size())

    def release(self) -> None:
        if self.fetched is not None:  # for nobody, it turns out: its memory is free once the copy is over
            self.fetched[1].wait()
            self.fetched = None
        self.spill.pool.give_back(self.blocks)
        self.blocks = []

    def __del__(self) -> None:
        self.release()


class Spill:
    """The way of a device's tensors into a host pool and back.

    Args:
        pool: where they go. Copies in both directions follow each other on one stream, so that a block can be used
            again while its last copy is still under way.
    """

    def __init__(self, pool: HostPool, device: torch.device) -> None:
        self.pool = pool
        self.copies: Copies = copies_for(device)
        # Sources of copies that may not have ended: their memory must stay as it is until then.
        self._leaving: deque[tuple[int, torch.Tensor, Done]] = deque()
        self.put_count = self.fetch_count = 0

    def put(self, tensor: torch.Tensor, layer: int) -> Spilled:
        """Start to copy a tensor of this layer out. Its memory is held until the next but one layer puts something."""
        spilled = Spilled(self, tensor)
        source = tensor.detach().contiguous()
        done = self.copies.start(lambda: _copy(_bytes(source), spilled.blocks, self.pool.block, to_host=True))
        self.put_count += 1
        while self._leaving and (self._leaving[0][0] not in (layer, layer - 1) or self._leaving[0][2].has_come()):
            _, _, earlier = self._leaving.popleft()
            earlier.wait()
        self._leaving.append((layer, source, done))
        return spilled

    def prefetch(self, spilled: Spilled) -> None:
        """Start to copy it back."""
        if spilled.fetched is not None:
            return
        # Allocated by the computing stream, whose memory it becomes; the copy starts after all that used it before.
        tensor = torch.empty(spilled.shape, dtype=spilled.dtype, device=spilled.device)
        done = self.copies.start(lambda: _copy(_bytes(tensor), spilled.blocks, self.pool.block, to_host=False))
        self.fetch_count += 1
        spilled.fetched = tensor, done

    def get(self, spilled: Spilled, keep: bool = False) -> torch.Tensor:
        """The tensor, on its device; with `keep` it can be had again."""
        self._drop_sources()
        self.prefetch(spilled)
        assert spilled.fetched is not None
        tensor, done = spilled.fetched
        done.wait()
        spilled.fetched = None
        if not keep:
            spilled.release()
        return tensor

    def _drop_sources(self) -> None:
        """The forward is over: the backward's memory should not hold what was copied out long ago."""
        while self._leaving:
            self._leaving.popleft()[2].wait()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)


def _copy(device_bytes: torch.Tensor, blocks: list[torch.Tensor], block: int, to_host: bool) -> None:
    parts: Any = device_bytes.split(block) if device_bytes.numel() else ()
    for part, host in zip(parts, blocks, strict=True):
        here = host[: len(part)]
        if to_host:
            here.copy_(part, non_blocking=True)
        else:
            part.copy_(here, non_blocking=True)
