"""Keys that travel round the ring from neighbour to neighbour, and their gradients, one hop behind them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from easyctx.band import Block
from easyctx.schedule.base import Attention
from easyctx.schedule.exchange import Exchange


@dataclass(frozen=True)
class Arrival:
    """Keys and values of one owner, or as many of them as are needed, and the blocks to compute with them."""

    hop: int  # the owner is so many ranks back
    blocks: tuple[Block, ...]
    k_BSKD: torch.Tensor
    v_BSKD: torch.Tensor


class TravellingKeys:
    """Iterates over one owner's keys after the other; the next ones travel while a caller computes.

    Keys and values are one message, in two buffers that take turns.
    """

    def __init__(self, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention) -> None:
        self.call, self.k_BSKD, self.v_BSKD = call, k_BSKD, v_BSKD

    def __iter__(self) -> Iterator[Arrival]:
        axis, exchange = self.call.ring, Exchange(self.call.ring)
        k, v = self.k_BSKD, self.v_BSKD
        here = torch.stack([k, v]) if axis.size > 1 else k.new_empty(0)
        spare = torch.empty_like(here)
        for hop in range(axis.size):
            is_last = hop == axis.size - 1
            owner = (axis.rank - hop) % axis.size
            # Before anything is sent: a length that does not divide must leave no message under way.
            blocks = self.call.layout.plan(k.shape[1] * axis.size, axis.size, axis.rank, owner, self.call.mask)
            if not is_last:
                exchange.start(here, spare)
            yield Arrival(hop, blocks, k, v)
            if not is_last:
                exchange.wait()
                here, spare = spare, here
                k, v = here[0], here[1]


class TravellingGradients:
    """dk and dv of one owner after the other; each rank adds its share and sends them on.

    They are sums over ranks, so they travel in the exact dtype (float32 for half precision): the error does not
    grow with the ring.
    """

    def __init__(self, k_BSKD: torch.Tensor, dtype: torch.dtype, call: Attention) -> None:
        self.last_hop = call.ring.size - 1
        self.exchange = Exchange(call.ring)
        self.here = torch.empty(0, dtype=dtype, device=k_BSKD.device)
        self.arriving: torch.Tensor | None = None

    def add(self, arrival: Arrival, dkv: torch.Tensor) -> None:
        """Add the sums so far of this arrival's keys to this rank's share, and send them on."""
        if self.arriving is not None:
            self.exchange.wait()
            dkv += self.arriving
        self.here = dkv
        if self.last_hop:
            self.arriving = torch.empty_like(dkv) if self.arriving is None else self.arriving
            # From the last rank that added to them they go back to the rank that owns the keys.
            self.exchange.start(dkv, self.arriving, hops=1 if arrival.hop < self.last_hop else -self.last_hop)

    def home(self) -> torch.Tensor:
        """The finished sums of this rank's keys, `[2, B, S/P, K, D]`."""
        if self.arriving is None:
            return self.here
        self.exchange.wait()
        return self.arriving
