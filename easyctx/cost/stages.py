"""What one rank does in one pass of attention, as stages: work between two waits, and the messages meanwhile.

A stage ends when both are done. What a schedule does not overlap is a stage of its own, of work alone or of messages
alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from easyctx.band import Band, Block
from easyctx.kernel.base import squares


@dataclass(frozen=True)
class Shape:
    """One layer's attention as one GPU holds it: `tokens` of its sequence, in half precision.

    window: a query sees itself and the `window - 1` positions before it; None for all of them.
    """

    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    batch: int = 1

    @property
    def q_size(self) -> int:
        """Elements of one token's queries, of all rows of the batch."""
        return self.batch * self.q_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys and values together."""
        return 2 * self.batch * self.kv_heads * self.head_dim


HALF, EXACT = 2, 4  # bytes of an element of tensors, and of sums and log-sum-exps


@dataclass(frozen=True)
class Passes:
    """Memory traffic between and inside kernel calls: bytes read and written for each element, in half precision runs.

    The defaults are those of kernels that know single blocks (`easyctx.kernel.running`), operation by operation.
    """

    zeros: float = 4  # float32 sums made
    widen: float = 6  # a first output to float32, for a second one to be folded in
    merge: float = 10  # a block folded into the output: 4 + 2 read, 4 written
    merge_reply: float = 10  # the same of what another rank computed
    rounded: float = 6  # float32 results to half precision
    add: float = 10  # a block's gradient added to its float32 sum
    add_message: float = 12  # a float32 sum that came, added to this rank's
    copy: float = 4  # half precision, as it is


OUTSIDE = Passes()
# flash-attn-4 on Hopper keeps output and sums in its own kernels (`easyctx.kernel.hopper`): the output as two half
# precision numbers, read and written with every block; gradients where the library adds them up anyway, in one set of
# sums for masked and one for unmasked blocks.
INSIDE = Passes(zeros=4, widen=0, merge=8, merge_reply=64, rounded=4, add=0)


@dataclass(frozen=True)
class Work:
    """One kernel call: queries, and the query-key pairs that its mask allows."""

    rows: int
    pairs: int
    windowed: bool = False


@dataclass(frozen=True)
class Message:
    """What this rank sends to one rank of its ring, or to each other rank of an all-to-all among `degree`, and what
    comes in the same exchange; both are waited for."""

    num_bytes: float
    received: float = 0.0
    degree: int = 0

    @property
    def bytes_sent(self) -> float:
        return self.num_bytes * (self.degree - 1 if self.degree else 1)


@dataclass(frozen=True)
class Stage:
    """Kernel calls and memory passes of one rank, while its messages travel."""

    work: tuple[Work, ...] = ()
    pass_bytes: float = 0.0
    messages: tuple[Message, ...] = ()


def work_of(blocks: Iterable[Block]) -> tuple[Work, ...]:
    return tuple(Work(b.q.stop - b.q.start, pairs_of(b), b.band.low is not None) for b in blocks)


def pairs_of(block: Block) -> int:
    """Query-key pairs that a block's mask allows."""
    if block.cuts:
        return sum(_pairs(s.stop - s.start, s.stop - s.start, block.band) for s in squares(block.cuts))
    return _pairs(block.q.stop - block.q.start, block.k.stop - block.k.start, block.band)


def _pairs(num_queries: int, num_keys: int, band: Band) -> int:
    upper = num_queries * num_keys if band.high is None else _at_most(num_queries, num_keys, band.high)
    lower = 0 if band.low is None else _at_most(num_queries, num_keys, band.low - 1)
    return upper - lower


def _at_most(num_queries: int, num_keys: int, diagonal: int) -> int:
    """Pairs (i, j) with j - i <= diagonal: query i has `i + diagonal + 1` of them, within 0 .. num_keys."""

    def up_to(x: int) -> int:  # sum of y clamped to 0 .. num_keys, over all y <= x
        x, beyond = max(min(x, num_keys), 0), max(x - num_keys, 0)
        return x * (x + 1) // 2 + beyond * num_keys

    return up_to(num_queries + diagonal) - up_to(diagonal)


def causal_pairs(length: int, window: int | None) -> int:
    """Pairs of a whole sequence."""
    return _pairs(length, length, Band(None if window is None else 1 - window, 0))


class Sums:
    """Memory passes of a running output (`easyctx.kernel.running.RunningOutput`)."""

    def __init__(self, tokens: int, q_size: int, passes: Passes) -> None:
        self.tokens, self.q_size, self.passes = tokens, q_size, passes
        self.is_empty, self.is_exact = True, False

    def add(self, rows: int, *, is_reply: bool = False) -> float:
        """Bytes moved to fold in a partial over so many queries."""
        if self.is_empty and rows == self.tokens:
            self.is_empty = False
            return 0.0
        moved = 0.0
        if not self.is_exact:
            moved = self.tokens * self.q_size * (self.passes.zeros if self.is_empty else self.passes.widen)
        self.is_empty, self.is_exact = False, True
        return moved + rows * self.q_size * (self.passes.merge_reply if is_reply else self.passes.merge)

    def add_all(self, blocks: Iterable[Block]) -> float:
        return sum(self.add(block.q.stop - block.q.start) for block in blocks)

    def rounded(self) -> float:
        """Bytes moved to give the result in half precision."""
        return self.tokens * self.q_size * self.passes.rounded if self.is_exact else 0.0


def gradient_passes(blocks: Iterable[Block], shape: Shape, passes: Passes) -> float:
    """Bytes moved to add the blocks' dq, dk and dv to their sums."""
    return passes.add * sum(
        (b.q.stop - b.q.start) * shape.q_size + (b.k.stop - b.k.start) * shape.kv_size for b in blocks
    )


def finished_gradients(shape: Shape, passes: Passes) -> float:
    """Bytes moved to make dq's sums and to give all gradients in half precision."""
    return shape.tokens * (shape.q_size * (passes.zeros + passes.rounded) + shape.kv_size * passes.rounded)
