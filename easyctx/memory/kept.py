"""One tensor that waits for its layer's backward, on the device or on the host."""

from typing import Protocol

import torch

from easyctx.memory.choices import Place
from easyctx.memory.spill import Spill, Spilled

ONCE = "a layer ran backward a second time (retain_graph?), and what it had kept is gone: choose --memory none for that"


class Kept(Protocol):
    """A tensor that can be had again."""

    def prefetch(self) -> None:
        """It will be asked for soon."""

    def get(self, keep: bool = False) -> torch.Tensor:
        """The tensor, without a graph. Unless `keep`, for the last time."""


class _OnDevice:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor.detach()

    def prefetch(self) -> None:
        pass

    def get(self, keep: bool = False) -> torch.Tensor:
        if self.tensor is None:
            raise RuntimeError(ONCE)
        tensor = self.tensor.detach()
        if not keep:
            self.tensor = None
        return tensor


class _OnHost:
    def __init__(self, spilled: Spilled) -> None:
        self.spilled = spilled

    def prefetch(self) -> None:
        if self.spilled.blocks:
            self.spilled.spill.prefetch(self.spilled)

    def get(self, keep: bool = False) -> torch.Tensor:
        if not self.spilled.blocks:
            raise RuntimeError(ONCE)
        return self.spilled.spill.get(self.spilled, keep)


def keep_at(tensor: torch.Tensor, place: Place, layer: int, spill: Spill | None) -> Kept:
    """Keep a tensor of this layer in its place, "gpu" or "host"."""
    if place == "gpu":
        return _OnDevice(tensor)
    assert place == "host"
    assert spill is not None, "nothing is kept on the host without a pool there"
    return _OnHost(spill.put(tensor, layer))
