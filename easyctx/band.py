"""The mask of one attention block: a band of diagonals.

Within a block, query index i may see key index j iff `low <= j - i <= high`. Causal masks, sliding windows, and
what a window becomes between two shards of any layout are all of this kind, so one small value says what a kernel
must do and nothing of size [S, S] is ever needed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Band:
    """Keys `i + low .. i + high` for query i; None leaves a side open. `Band()` masks nothing."""

    low: int | None = None
    high: int | None = None

    @property
    def is_full(self) -> bool:
        return self.low is None and self.high is None

    @property
    def is_causal(self) -> bool:
        """Exactly `j <= i`, counted from the top left corner."""
        return self.low is None and self.high == 0

    def window(self, num_queries: int, num_keys: int) -> tuple[int | None, int | None]:
        """(left, right) as flash-attention counts them: from the diagonal that ends in the bottom right corner."""
        lead = num_keys - num_queries
        left = None if self.low is None else lead - self.low
        right = None if self.high is None else self.high - lead
        return left, right

    def allowed(self, num_queries: int, num_keys: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The mask itself, bool `[num_queries, num_keys]`, True where a key may be seen: for small blocks only."""
        diagonal = torch.arange(num_keys, device=device)[None, :] - torch.arange(num_queries, device=device)[:, None]
        mask = torch.ones_like(diagonal, dtype=torch.bool)
        if self.low is not None:
            mask &= diagonal >= self.low
        if self.high is not None:
            mask &= diagonal <= self.high
        return mask


FULL = Band()
CAUSAL = Band(high=0)


@dataclass(frozen=True)
class Block:
    """A rectangle of local query and key indices and its mask; every query in it sees at least one key.

    row: the row of the batch that it is part of; None for all rows.
    cuts: where it is a chain of squares along the diagonal (documents), their borders 0, n1, n1 + n2, … counted from
        the block's start: the band holds within each square, and squares do not see each other.
    """

    q: slice
    k: slice
    band: Band
    row: int | None = None
    cuts: tuple[int, ...] = ()

    @property
    def rows(self) -> slice:
        return slice(None) if self.row is None else slice(self.row, self.row + 1)

    @property
    def is_square(self) -> bool:
        return self.q.stop - self.q.start == self.k.stop - self.k.start

    def shifted(self, q_offset: int, k_offset: int) -> "Block":
        def shift(s: slice, by: int) -> slice:
            return slice(s.start + by, s.stop + by)

        return replace(self, q=shift(self.q, q_offset), k=shift(self.k, k_offset))


def pack_squares(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same blocks, with causal squares that follow each other along the diagonal joined into one block.

    A kernel that knows documents (cu_seqlens) then does all of them in one call.
    """
    chain: list[Block] = []
    for block in blocks:
        if chain and not _follows(chain[-1], block):
            yield _joined(chain)
            chain = []
        chain.append(block)
    if chain:
        yield _joined(chain)


def _follows(last: Block, block: Block) -> bool:
    # Where a square is smaller than the window, its band has no lower end; the other squares' does it no harm.
    same_mask = last.band.high == block.band.high == 0 and (
        last.band.low == block.band.low or last.band.low is None or block.band.low is None
    )
    adjacent = last.row == block.row and last.q.stop == block.q.start and last.k.stop == block.k.start
    return same_mask and adjacent and last.is_square and block.is_square


def _joined(chain: list[Block]) -> Block:
    if len(chain) == 1:
        return chain[0]
    first, last = chain[0], chain[-1]
    low = next((block.band.low for block in chain if block.band.low is not None), None)
    cuts = (0, *(block.q.stop - first.q.start for block in chain))
    q, k = slice(first.q.start, last.q.stop), slice(first.k.start, last.k.stop)
    return Block(q, k, Band(low, 0), first.row, cuts)


def band_block(num_queries: int, num_keys: int, band: Band) -> Block | None:
    """The smallest block that holds all pairs a band allows, or None if there are none.

    Queries without a key and keys without a query are cut off, and a side of the band that no longer masks
    anything is opened, so that a kernel sees "full" and "causal" wherever they apply.
    """
    if band.low is not None and band.high is not None and band.low > band.high:
        return None
    q_start = max(0, -band.high) if band.high is not None else 0
    q_stop = min(num_queries, num_keys - band.low) if band.low is not None else num_queries
    if q_start >= q_stop:
        return None
    k_start = max(0, q_start + band.low) if band.low is not None else 0
    k_stop = min(num_keys, q_stop + band.high) if band.high is not None else num_keys
    lead = q_start - k_start
    low = None if band.low is None else band.low + lead
    high = None if band.high is None else band.high + lead
    if low is not None and low <= -(q_stop - q_start - 1):
        low = None
    if high is not None and high >= k_stop - k_start - 1:
        high = None
    return Block(slice(q_start, q_stop), slice(k_start, k_stop), Band(low, high))


def clip_rows(block: Block, rows: slice) -> Block | None:
    """The part of a block whose queries lie in `rows` (counted as the block counts), or None if there is none."""
    assert not block.cuts
    start, stop = max(block.q.start, rows.start), min(block.q.stop, rows.stop)
    if start >= stop:
        return None
    down = start - block.q.start
    low = None if block.band.low is None else block.band.low + down
    high = None if block.band.high is None else block.band.high + down
    inner = band_block(stop - start, block.k.stop - block.k.start, Band(low, high))
    return None if inner is None else replace(inner.shifted(start, block.k.start), row=block.row)


def hull(stretches: Iterable[slice], multiple: int = 1) -> slice:
    """The shortest stretch that holds all of these and starts at a multiple; empty if there are none."""
    found = list(stretches)
    if not found:
        return slice(0, 0)
    return slice(min(s.start for s in found) // multiple * multiple, max(s.stop for s in found))
