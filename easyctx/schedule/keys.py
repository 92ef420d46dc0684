"""Keys that come straight from their owner, no more of them than are seen here, and their gradients' way home.

Each rank knows both plans, its own and its peer's, so both sides of a message agree on what it holds, and a pair of
ranks that have nothing to show each other exchange nothing. (Handing keys on from neighbour to neighbour would send
the same over the slowest link of a hop, but all keys to everybody, and their gradients twice.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from easyctx.band import Block, hull
from easyctx.kernel import KeyGradients
from easyctx.mesh import Axis
from easyctx.schedule.base import Attention
from easyctx.schedule.exchange import Exchange, some


@dataclass(frozen=True)
class Arrival:
    """Keys and values of one owner, as many of them as are needed, and the blocks to compute with them."""

    hop: int  # the owner is so many ranks back
    blocks: tuple[Block, ...]
    k_BSKD: torch.Tensor
    v_BSKD: torch.Tensor


@dataclass(frozen=True)
class _Part:
    """Some keys of one rank, and the blocks that another one computes of them, counted from the first of these."""

    keys: slice
    blocks: tuple[Block, ...]


class Pairs:
    """What this rank needs of, and owes to, the ranks at each distance.

    Every rank goes through the same hops in the same order, also those at which it has nothing to send or to get:
    NCCL runs a rank's messages one after the other, and two ranks in different orders would wait for each other.
    """

    def __init__(self, local: int, call: Attention) -> None:
        self.axis: Axis = call.ring
        self.call, self.local = call, local
        rank, size = self.axis.rank, self.axis.size
        self.hops = [hop for hop in call.layout.hops(local * size, size, call.mask) if hop]
        self.needed = {hop: self._blocks(rank, rank - hop) for hop in (0, *self.hops)}

    def comes(self, hop: int) -> _Part:
        """The keys that come at a hop."""
        return self._part(self.needed[hop])

    def goes(self, hop: int) -> _Part:
        """This rank's keys that go at a hop."""
        return self._part(self._blocks(self.axis.rank + hop, self.axis.rank))

    def _blocks(self, queries_of: int, keys_of: int) -> tuple[Block, ...]:
        size = self.axis.size
        return self.call.layout.plan(self.local * size, size, queries_of % size, keys_of % size, self.call.mask)

    def _part(self, blocks: tuple[Block, ...]) -> _Part:
        keys = hull((block.k for block in blocks), self.call.kernel.key_tile)
        return _Part(keys, tuple(block.shifted(0, -keys.start) for block in blocks))


class KeysOfOthers:
    """Iterates over keys, this rank's own first; those of the next hop travel while a caller computes.

    Keys and values are one message.
    """

    def __init__(self, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention) -> None:
        self.pairs = Pairs(k_BSKD.shape[1], call)
        self.k_BSKD, self.v_BSKD = k_BSKD, v_BSKD

    def __iter__(self) -> Iterator[Arrival]:
        hops = self.pairs.hops
        # [B, S/P, 2, K, D]: of one row of a batch any stretch of keys lies in one piece, and goes without a copy.
        both = torch.stack([self.k_BSKD, self.v_BSKD], dim=2) if hops else None
        coming = [self._ask(hop, both) for hop in hops[:1]]
        yield Arrival(0, self.pairs.needed[0], self.k_BSKD, self.v_BSKD)
        for following in [*hops[1:], None][: len(hops)]:
            arrival, exchange = coming.pop()
            exchange.wait()
            if following is not None:
                coming.append(self._ask(following, both))
            yield arrival

    def _ask(self, hop: int, both: torch.Tensor | None) -> tuple[Arrival, Exchange]:
        """Start the exchange at a hop: what will have come once it is over."""
        assert both is not None
        comes, goes = self.pairs.comes(hop), self.pairs.goes(hop)
        batch, _, _, heads, head_dim = both.shape
        receive = both.new_empty((batch, comes.keys.stop - comes.keys.start, 2, heads, head_dim))
        exchange = Exchange(self.pairs.axis)
        exchange.start(some(both[:, goes.keys].contiguous()), some(receive), hops=hop)
        return Arrival(hop, comes.blocks, receive[:, :, 0], receive[:, :, 1]), exchange


class GradientsHome:
    """dk and dv of the keys that a rank got, sent back to their owner as soon as they are there."""

    def __init__(self, own: KeyGradients, pairs: Pairs) -> None:
        self.own, self.pairs = own, pairs
        self.pending: list[tuple[_Part, torch.Tensor, Exchange]] = []

    def send(self, arrival: Arrival, of_keys: KeyGradients) -> None:
        """Send home the gradients of an arrival; those that come at the same hop are added to this rank's."""
        part = self.pairs.goes(arrival.hop)
        receive = self.own.new_message(part.keys, part.blocks)
        exchange = Exchange(self.pairs.axis)
        exchange.start(some(of_keys.message), some(receive), hops=-arrival.hop)
        self.pending.append((part, receive, exchange))
        self._collect(1)  # one message may be under way while the next block is computed

    def collect(self) -> None:
        """Wait for what is still under way."""
        self._collect(0)

    def _collect(self, leave: int) -> None:
        while len(self.pending) > leave:
            part, receive, exchange = self.pending.pop(0)
            exchange.wait()
            if receive.numel():
                self.own.add_message(receive, part.keys, part.blocks)
