"""Keys that come straight from their owner, no more of them than a window or document borders leave to be seen.

Each rank knows both plans, its own and its peer's, so both sides of a message agree on what it holds, and a pair of
ranks that have nothing to show each other exchange nothing.
"""

from collections.abc import Iterator

import torch

from easyctx.band import Block, hull
from easyctx.mesh import Axis
from easyctx.schedule.base import Attention
from easyctx.schedule.exchange import Exchange, some
from easyctx.schedule.travel import Arrival


class _Pairs:
    """What this rank needs of, and owes to, the ranks at each distance.

    Every rank goes through the same hops in the same order, also those at which it has nothing to send or to get:
    NCCL runs a rank's messages one after the other, and two ranks in different orders would wait for each other.
    """

    def __init__(self, local: int, call: Attention) -> None:
        self.axis: Axis = call.ring
        rank, size = self.axis.rank, self.axis.size

        def blocks(queries_of: int, keys_of: int) -> tuple[Block, ...]:
            return call.layout.plan(local * size, size, queries_of % size, keys_of % size, call.mask)

        self.hops = [hop for hop in call.layout.hops(local * size, size, call.mask) if hop]
        self.needed = {hop: blocks(rank, rank - hop) for hop in (0, *self.hops)}
        self.owed = {hop: _keys(blocks(rank + hop, rank)) for hop in self.hops}


def _keys(blocks: tuple[Block, ...]) -> slice:
    """The stretch of keys that holds all of a plan's."""
    return hull(block.k for block in blocks)


class DirectKeys:
    """Iterates over the keys that are needed, hop by hop; those of the next hop travel while a caller computes."""

    def __init__(self, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention) -> None:
        self.pairs = _Pairs(k_BSKD.shape[1], call)
        self.k_BSKD, self.v_BSKD = k_BSKD, v_BSKD

    def __iter__(self) -> Iterator[Arrival]:
        coming = [self._ask(hop) for hop in self.pairs.hops[:1]]
        yield Arrival(0, self.pairs.needed[0], self.k_BSKD, self.v_BSKD)
        for following in [*self.pairs.hops[1:], None][: len(self.pairs.hops)]:
            arrival, exchange = coming.pop()
            exchange.wait()
            if following is not None:
                coming.append(self._ask(following))
            yield arrival

    def _ask(self, hop: int) -> tuple[Arrival, Exchange]:
        """Start the exchange at a hop: what will have come once it is over."""
        owed, needed = self.pairs.owed[hop], self.pairs.needed[hop]
        part = _keys(needed)
        send = torch.stack([self.k_BSKD[:, owed], self.v_BSKD[:, owed]])
        receive = self.k_BSKD.new_empty((2, *self.k_BSKD[:, part].shape))
        exchange = Exchange(self.pairs.axis)
        exchange.start(some(send), some(receive), hops=hop)
        blocks = tuple(block.shifted(0, -part.start) for block in needed)
        return Arrival(hop, blocks, receive[0], receive[1]), exchange


class DirectGradients:
    """dk and dv of the keys that a rank got, sent back to their owner as soon as they are there, in the exact dtype."""

    def __init__(self, k_BSKD: torch.Tensor, dtype: torch.dtype, call: Attention) -> None:
        self.pairs = _Pairs(k_BSKD.shape[1], call)
        self.sums = torch.empty(0, dtype=dtype, device=k_BSKD.device)
        self.pending: list[tuple[slice, torch.Tensor, Exchange]] = []

    def add(self, arrival: Arrival, dkv: torch.Tensor) -> None:
        """Send home the gradients of an arrival; those of this rank's own keys (hop 0) stay."""
        if arrival.hop == 0:
            self.sums = dkv
            return
        owed = self.pairs.owed[arrival.hop]
        receive = torch.empty_like(self.sums[:, :, owed], memory_format=torch.contiguous_format)
        exchange = Exchange(self.pairs.axis)
        exchange.start(some(dkv), some(receive), hops=-arrival.hop)
        self.pending.append((owed, receive, exchange))
        self._collect(1)  # one message may be under way while the next block is computed

    def home(self) -> torch.Tensor:
        """The finished sums of this rank's keys, `[2, B, S/P, K, D]`."""
        self._collect(0)
        return self.sums

    def _collect(self, leave: int) -> None:
        while len(self.pending) > leave:
            owed, receive, exchange = self.pending.pop(0)
            exchange.wait()
            self.sums[:, :, owed] += receive
