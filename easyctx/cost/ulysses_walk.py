"""The exchanges of Ulysses (`easyctx.schedule.ulysses`): heads come and results leave group by group."""

from collections.abc import Sequence
from dataclasses import replace

from easyctx.cost.stages import EXACT, HALF, Message, Passes, Shape, Stage
from easyctx.schedule import check_heads
from easyctx.schedule.head_exchange import HeadGroups


class UlyssesWalk:
    """One rank's exchanges among `degree` ranks, for all groups of heads.

    shape: of this rank's tokens and all heads.
    """

    def __init__(self, shape: Shape, degree: int, passes: Passes, *, backward: bool) -> None:
        check_heads(shape.q_heads, shape.kv_heads, degree)
        self.shape, self.degree, self.passes = shape, degree, passes
        length = shape.tokens * degree
        self.groups = len(HeadGroups(shape.q_heads, shape.kv_heads, length, degree).all) if degree > 1 else 1
        queries, lse = shape.tokens * shape.q_size, shape.tokens * shape.batch * shape.q_heads * EXACT
        keys = shape.tokens * shape.kv_size * max(degree // shape.kv_heads, 1)
        # Bytes of each message: heads that come, results that leave. Gradients of copied heads leave in float32, apart.
        if backward:
            come = [(3 * queries + keys) * HALF, lse]
            leave = [queries * HALF, keys * EXACT] if degree > shape.kv_heads else [(queries + keys) * HALF]
        else:
            come, leave = [(queries + keys) * HALF], [queries * HALF, lse]
        self._come: Sequence[float] = come if degree > 1 else []
        self._leave: Sequence[float] = leave if degree > 1 else []

    @property
    def inner(self) -> Shape:
        """What the ring inside sees of one group."""
        parts = self.degree * self.groups
        return replace(
            self.shape,
            tokens=self.shape.tokens * self.degree,
            q_heads=self.shape.q_heads // parts,
            kv_heads=max(self.shape.kv_heads // self.degree, 1) // self.groups,
        )

    def first(self) -> Stage:
        """The first group's heads come."""
        return Stage(pass_bytes=self._copies(self._come), messages=self._messages(self._come))

    def meanwhile(self, group: int) -> Stage:
        """What is exchanged while a group is computed: the next one's heads, the last one's results."""
        come = self._come if group + 1 < self.groups else []
        leave = self._leave if group else []
        return Stage(pass_bytes=self._copies(come), messages=(*self._messages(come), *self._messages(leave)))

    def last(self) -> Stage:
        """The last group's results leave; all results are put in order of tokens."""
        return Stage(pass_bytes=self._copies(self._leave) * self.groups, messages=self._messages(self._leave))

    def _messages(self, sizes: Sequence[float]) -> tuple[Message, ...]:
        return tuple(Message(size / self.degree / self.groups, degree=self.degree) for size in sizes)

    def _copies(self, sizes: Sequence[float]) -> float:
        """Bytes moved to put a group's tensors in order."""
        return sum(sizes) / HALF * self.passes.copy / self.groups
