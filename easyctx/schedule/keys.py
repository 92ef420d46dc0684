"""Keys that come straight from their owner, no more of them than are seen here, and their gradients' way home.

Each rank knows both plans, its own and its peer's, so both sides of a message agree on what it holds, and a pair of
ranks that have nothing to show each other exchange nothing. (Handing keys on from neighbour to neighbour would send
the same over the slowest link of a hop, but all keys to everybody, and their gradients twice.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from easyctx.band import Block, hull
from easyctx.kernel import KeyGradients
from easyctx.layout import Layout, merge_full
from easyctx.mask import Mask
from easyctx.mesh import Axis
from easyctx.schedule.base import Attention
from easyctx.schedule.exchange import Exchange, some


@dataclass(frozen=True)
class Arrival:
    """Keys and values of other ranks, as many of them as are needed, and the blocks to compute with them."""

    hops: tuple[int, ...]  # the owners are so many ranks back; 0 alone for this rank's own keys
    blocks: tuple[Block, ...]
    k_BSKD: torch.Tensor
    v_BSKD: torch.Tensor


@dataclass(frozen=True)
class Part:
    """Some keys of one rank, and the blocks that another one computes of them, counted from the first of these."""

    keys: slice
    blocks: tuple[Block, ...]

    @property
    def length(self) -> int:
        return self.keys.stop - self.keys.start


@dataclass(frozen=True)
class Pairs:
    """What a rank needs of, and owes to, the ranks at each distance.

    Every rank goes through the same hops in the same order, also those at which it has nothing to send or to get:
    NCCL runs a rank's messages one after the other, and two ranks in different orders would wait for each other.
    """

    own: tuple[Block, ...]
    hops: tuple[int, ...]
    comes: dict[int, Part]  # keys that come at a hop
    goes: dict[int, Part]  # this rank's keys that go at a hop


def pairs_of(local: int, call: Attention) -> Pairs:
    """The pairs of this rank, which holds `local` tokens."""
    ring = call.ring
    return _pairs(call.layout, local, ring.rank, ring.size, call.mask.within(local * ring.size), call.kernel.key_tile)


@lru_cache(maxsize=1024)
def _pairs(layout: Layout, local: int, rank: int, size: int, mask: Mask, key_tile: int) -> Pairs:
    def part(queries_of: int, keys_of: int) -> Part:
        blocks = layout.plan(local * size, size, queries_of % size, keys_of % size, mask)
        keys = hull((block.k for block in blocks), key_tile)
        return Part(keys, tuple(block.shifted(0, -keys.start) for block in blocks))

    hops = tuple(hop for hop in layout.hops(local * size, size, mask) if hop)
    own = layout.plan(local * size, size, rank, rank, mask)
    return Pairs(own, hops, {h: part(rank, rank - h) for h in hops}, {h: part(rank + h, rank) for h in hops})


class KeysOfOthers:
    """Iterates over keys, this rank's own first; the next ones travel while a caller computes.

    Keys and values are one message. at_once: so many hops arrive together, as if one rank had had all their keys.
    """

    def __init__(self, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, call: Attention, *, at_once: int = 1) -> None:
        self.call, self.pairs = call, pairs_of(k_BSKD.shape[1], call)
        self.k_BSKD, self.v_BSKD = k_BSKD, v_BSKD
        hops = self.pairs.hops
        self.groups = [hops[i : i + at_once] for i in range(0, len(hops), at_once)]

    def __iter__(self) -> Iterator[Arrival]:
        # [B, S/P, 2, K, D]: of one row of a batch any stretch of keys lies in one piece, and goes without a copy.
        both = torch.stack([self.k_BSKD, self.v_BSKD], dim=2) if self.groups else None
        coming = [self._ask(hops, both) for hops in self.groups[:1]]
        yield Arrival((0,), self.pairs.own, self.k_BSKD, self.v_BSKD)
        for following in [*self.groups[1:], None][: len(self.groups)]:
            arrival, exchanges = coming.pop()
            for exchange in exchanges:
                exchange.wait()
            if following is not None:
                coming.append(self._ask(following, both))
            yield arrival

    def _ask(self, hops: tuple[int, ...], both: torch.Tensor | None) -> tuple[Arrival, list[Exchange]]:
        """Start the exchanges at some hops: what will have come once they are over."""
        assert both is not None
        batch, _, _, heads, head_dim = both.shape
        assert batch == 1 or len(hops) == 1
        parts = [self.pairs.comes[hop] for hop in hops]
        receive = both.new_empty((batch, sum(part.length for part in parts), 2, heads, head_dim))
        exchanges, blocks, start = [], [], 0
        for hop, part in zip(hops, parts, strict=True):
            exchange = Exchange(self.call.ring)
            into = receive[:, start : start + part.length]
            exchange.start(some(both[:, self.pairs.goes[hop].keys].contiguous()), some(into), hops=hop)
            exchanges.append(exchange)
            blocks += [block.shifted(0, start) for block in part.blocks]
            start += part.length
        return Arrival(hops, tuple(merge_full(blocks)), receive[:, :, 0], receive[:, :, 1]), exchanges


class GradientsHome:
    """dk and dv of the keys that a rank got, sent back to their owner as soon as they are there."""

    def __init__(self, own: KeyGradients, pairs: Pairs, axis: Axis) -> None:
        self.own, self.pairs, self.axis = own, pairs, axis
        self.pending: list[tuple[Part, torch.Tensor, Exchange]] = []

    def send(self, arrival: Arrival, of_keys: KeyGradients) -> None:
        """Send home the gradients of an arrival; those that come at the same hop are added to this rank's."""
        [hop] = arrival.hops
        part = self.pairs.goes[hop]
        receive = self.own.new_message(part.keys, part.blocks)
        exchange = Exchange(self.axis)
        exchange.start(some(of_keys.message), some(receive), hops=-hop)
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
