"""The stages of a ring (`easyctx.schedule.ring`), for one rank: keys come straight from their owners."""

from easyctx.band import Block, hull
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
from easyctx.schedule.ring import _split_own


class RingWalk:
    """One rank's pass over a ring of `size` ranks."""

    def __init__(self, layout: Layout, shape: Shape, size: int, rank: int, passes: Passes) -> None:
        self.layout, self.shape, self.size, self.rank, self.passes = layout, shape, size, rank, passes
        self.seq_len = shape.tokens * size
        self.mask = Mask(shape.window).within(self.seq_len)
        self.hops = [hop for hop in layout.hops(self.seq_len, size, self.mask) if hop]

    def forward(self) -> list[Stage]:
        """Each hop's blocks, while the next hop's keys travel."""
        sums = Sums(self.shape.tokens, self.shape.q_size, self.passes)
        stages = self._packing()
        for place, hop in enumerate([0, *self.hops]):
            blocks = self._blocks(self.rank, hop)
            stages.append(Stage(work_of(blocks), sums.add_all(blocks), self._keys(place)))
        return [*stages, Stage(pass_bytes=sums.rounded())]

    def backward(self) -> list[Stage]:
        """Each hop's blocks, while the next hop's keys and the last hop's gradients travel; last a part of its own."""
        passes, shape = self.passes, self.shape
        own = self._blocks(self.rank, 0)
        first, last = _split_own(own, shape.tokens if self.hops else 0)
        moved = gradient_passes(first, shape, passes) + shape.tokens * shape.kv_size * passes.zeros
        stages = [*self._packing(), Stage(work_of(first), moved, self._keys(0))]
        back: tuple[Message, ...] = ()
        came_back = 0
        for place, hop in enumerate(self.hops):
            blocks = self._blocks(self.rank, hop)
            arrived = _keys_of(blocks) * shape.kv_size
            moved = gradient_passes(blocks, shape, passes) + arrived * passes.zeros + came_back * passes.add_message
            stages.append(Stage(work_of(blocks), moved, (*self._keys(place + 1), *back)))
            came_back = self._owed(hop) * shape.kv_size
            back = (Message(arrived * EXACT, came_back * EXACT),)
        moved = gradient_passes(last, shape, passes) + came_back * passes.add_message
        stages.append(Stage(work_of(last), moved, back))
        return [*stages, Stage(pass_bytes=finished_gradients(shape, passes))]

    def _packing(self) -> list[Stage]:
        """Keys and values put into one message."""
        elements = self.shape.tokens * self.shape.kv_size if self.hops else 0
        return [Stage(pass_bytes=elements * self.passes.copy)]

    def _blocks(self, rank: int, hop: int) -> tuple[Block, ...]:
        return self.layout.plan(self.seq_len, self.size, rank % self.size, (rank - hop) % self.size, self.mask)

    def _owed(self, hop: int) -> int:
        """How many of this rank's keys go at a hop."""
        return _keys_of(self._blocks(self.rank + hop, hop))

    def _keys(self, place: int) -> tuple[Message, ...]:
        if place >= len(self.hops):
            return ()
        hop, key_bytes = self.hops[place], self.shape.kv_size * HALF
        return (Message(self._owed(hop) * key_bytes, _keys_of(self._blocks(self.rank, hop)) * key_bytes),)


def _keys_of(blocks: tuple[Block, ...]) -> int:
    part = hull(block.k for block in blocks)
    return part.stop - part.start
