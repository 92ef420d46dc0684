"""The stages of a ring (`easyctx.schedule.ring`), for one rank: keys that travel round it, or come straight."""

from easyctx.band import Block, hull
from easyctx.cost.stages import EXACT, HALF, Message, Passes, Shape, Stage, Sums, gradient_passes, work_of
from easyctx.layout import Layout
from easyctx.mask import Mask


class RingWalk:
    """One rank's pass over a ring of `size` ranks.

    unrounded: whether the kernel's gradients are read out in float32 at the price of further passes.
    """

    def __init__(
        self, layout: Layout, shape: Shape, size: int, rank: int, passes: Passes, *, unrounded: bool = False
    ) -> None:
        self.layout, self.shape, self.size, self.rank = layout, shape, size, rank
        self.passes, self.unrounded = passes, unrounded
        self.seq_len = shape.tokens * size
        self.mask = Mask(shape.window).within(self.seq_len)
        self.goes_round = self.mask.is_causal
        self.hops = range(size) if self.goes_round else hops_of(layout, self.seq_len, size, self.mask)

    def forward(self) -> list[Stage]:
        """Each hop's blocks, while the next hop's keys travel."""
        sums = Sums(self.shape.tokens, self.shape.q_size, self.passes)
        stages = self._packing()
        for place, hop in enumerate(self.hops):
            blocks = self._blocks(self.rank, hop)
            stages.append(Stage(work_of(blocks), sums.add_all(blocks), self._keys(place + 1)))
        return [*stages, Stage(pass_bytes=sums.rounded())]

    def backward(self) -> list[Stage]:
        """Each hop's blocks, while the next hop's keys and the last hop's gradients travel; the last ones alone."""
        passes, shape = self.passes, self.shape
        stages = [*self._packing(), Stage(pass_bytes=shape.tokens * shape.q_size * passes.zeros)]
        gradients: tuple[Message, ...] = ()
        for place, hop in enumerate(self.hops):
            blocks = self._blocks(self.rank, hop)
            arrived = shape.tokens if self.goes_round or hop == 0 else _length(hull(b.k for b in blocks))
            moved = gradient_passes(blocks, shape, passes, unrounded=self.unrounded)
            moved += arrived * shape.kv_size * (passes.zeros + (passes.add if place else 0.0))
            stages.append(Stage(work_of(blocks), moved, (*self._keys(place + 1), *gradients)))
            gradients = self._gradients(hop, arrived)
        return [*stages, Stage(messages=gradients)]

    def _packing(self) -> list[Stage]:
        """Keys and values put into one message."""
        elements = self.shape.tokens * self.shape.kv_size if self.size > 1 and self.goes_round else 0
        return [Stage(pass_bytes=elements * self.passes.copy)]

    def _blocks(self, rank: int, hop: int) -> tuple[Block, ...]:
        return self.layout.plan(self.seq_len, self.size, rank % self.size, (rank - hop) % self.size, self.mask)

    def _keys(self, place: int) -> tuple[Message, ...]:
        if place >= len(self.hops):
            return ()
        if self.goes_round:
            return (Message(self.shape.tokens * self.shape.kv_size * HALF),)
        hop = self.hops[place]
        owed = hull(block.k for block in self._blocks(self.rank + hop, hop))
        return (Message(_length(owed) * self.shape.kv_size * HALF),)

    def _gradients(self, hop: int, arrived: int) -> tuple[Message, ...]:
        """Sums of dk and dv: on to the next rank, or home; those of this rank's own keys stay where none else adds."""
        if self.size == 1 or (not self.goes_round and hop == 0):
            return ()
        return (Message(arrived * self.shape.kv_size * EXACT),)


def hops_of(layout: Layout, seq_len: int, size: int, mask: Mask) -> list[int]:
    """`layout.hops` without documents, from a few ranks of each hop (all pairs of 1,024 ranks take a minute)."""
    return [
        hop
        for hop in range(size)
        if any(
            layout.plan(seq_len, size, r, (r - hop) % size, mask) for r in sorted({0, max(hop - 1, 0), hop, size - 1})
        )
    ]


def _length(part: slice) -> int:
    return part.stop - part.start
