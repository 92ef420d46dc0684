"""The stages of DistFlashAttn (`easyctx.schedule.dist_flash`), for one rank."""

from collections.abc import Callable
from dataclasses import dataclass

from easyctx.band import Block, clip_rows, hull
from easyctx.cost.stages import (
    EXACT,
    HALF,
    Message,
    Passes,
    Shape,
    Stage,
    Sums,
    finished_gradients,
    gradient_passes,
    work_of,
)
from easyctx.layout import Layout
from easyctx.mask import Mask


@dataclass(frozen=True)
class _Share:
    """What a rank computes at a distance: `takes` counts the keys, or the queries where it helps, that come for it."""

    gets_keys: bool
    takes: int
    blocks: tuple[Block, ...]


class DistFlashWalk:
    """One rank's pass: its own blocks first, then one step for each distance up to half the ring."""

    def __init__(self, layout: Layout, shape: Shape, size: int, rank: int, passes: Passes) -> None:
        self.layout, self.shape, self.size, self.rank, self.passes = layout, shape, size, rank, passes
        self.seq_len = shape.tokens * size
        self.mask = Mask(shape.window).within(self.seq_len)
        hops = set(layout.hops(self.seq_len, size, self.mask))
        self.distances = [t for t in range(1, size // 2 + 1) if t in hops or size - t in hops]

    def forward(self) -> list[Stage]:
        shape, passes = self.shape, self.passes
        query_bytes = shape.q_size * HALF
        result_bytes = shape.batch * shape.q_heads * EXACT + query_bytes
        own, moved = Sums(shape.tokens, shape.q_size, passes), []
        shares = self._shares(0)
        for share in shares:
            if share.gets_keys:
                moved.append(own.add_all(share.blocks))
            else:
                part = Sums(share.takes, shape.q_size, passes)
                moved.append(part.add_all(share.blocks) + part.rounded())
        helpers = [peer for peer in self._shares(1)[1:] if not peer.gets_keys and peer.takes]
        moved.append(sum(own.add(peer.takes, is_reply=True) for peer in helpers) + own.rounded())
        return self._stages(moved, query_bytes, lambda share: 0 if share.gets_keys else result_bytes)

    def backward(self) -> list[Stage]:
        shape, passes = self.shape, self.passes
        query_bytes = shape.batch * shape.q_heads * EXACT + 3 * shape.q_size * HALF
        moved: list[float] = []
        sums = [share.takes * self._size(share) for share in self._shares(0)]
        for share, elements in zip(self._shares(0), sums, strict=True):
            added = gradient_passes(share.blocks, shape, passes)
            moved.append(added + elements * passes.zeros)
        replies = sum(peer.takes * self._size(peer) for peer in self._shares(1)[1:])
        moved.append(replies * passes.add_message + finished_gradients(shape, passes))
        return self._stages(moved, query_bytes, lambda share: EXACT * self._size(share))

    def _size(self, share: _Share) -> int:
        """Elements of one of the keys, or queries, that come for a share."""
        return self.shape.kv_size if share.gets_keys else self.shape.q_size

    def _shares(self, ahead: int) -> list[_Share]:
        """The work at distance 0 and at each step: of this rank, or (ahead = 1) of whom it sends to."""
        return [self._share((self.rank + ahead * t) % self.size, t) for t in (0, *self.distances)]

    def _stages(self, moved: list[float], query_bytes: int, result_bytes: Callable[[_Share], int]) -> list[Stage]:
        """One stage for each share, and one for what comes home last.

        moved: bytes of each stage's memory passes. query_bytes: of a query that goes to a helper. result_bytes: of
        what goes back for each key or query of a share (this rank's own, the first, stay).
        """
        shares, peers = self._shares(0), self._shares(1)

        def brought(share: _Share) -> float:
            return share.takes * (self.shape.kv_size * HALF if share.gets_keys else query_bytes)

        out = [Message(brought(peer), brought(share)) for peer, share in zip(peers, shares, strict=True)]
        home = [
            Message(share.takes * result_bytes(share), peer.takes * result_bytes(peer))
            for peer, share in zip(peers, shares, strict=True)
        ]
        following, back = [*out[1:], Message(0), Message(0)], [Message(0), Message(0), *home[1:]]
        stages = []
        for place, passing in enumerate(moved):
            messages = following[place], back[place]
            work = work_of(shares[place].blocks) if place < len(shares) else ()
            # Tensors are copied into one message.
            stages.append(Stage(work, passing + 2 * sum(m.num_bytes for m in messages), messages))
        return stages

    def _share(self, rank: int, distance: int) -> _Share:
        """As `easyctx.schedule.dist_flash` divides a pair of ranks: at half the ring's size both take half the rows."""
        tokens, half = self.shape.tokens, self.shape.tokens // 2 if 2 * distance == self.size else None
        gets_keys = rank >= distance
        queries_of = rank if gets_keys else rank - distance + self.size
        keys_of = rank - distance if gets_keys else rank
        rows = slice(0, tokens if half is None else half) if gets_keys else slice(half or 0, tokens)
        plan = self.layout.plan(self.seq_len, self.size, queries_of, keys_of, self.mask)
        blocks = tuple(block for block in (clip_rows(b, rows) for b in plan) if block is not None)
        part = hull(block.k if gets_keys else block.q for block in blocks)
        return _Share(gets_keys, part.stop - part.start, blocks)
