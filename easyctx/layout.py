"""Layouts: which global positions of a sequence each rank holds.

The only code that knows token order. Pure arithmetic of `(seq_len, world_size, rank)`: no process group, no
device. A shard is a tuple of `Run`s (arithmetic progressions of global positions), in local order; every other
question (positions, sharding, what a block of attention looks like) follows from the runs.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from easyctx.band import FULL, Band, Block, band_block, pack_squares
from easyctx.mask import CAUSAL_MASK, Mask


@dataclass(frozen=True)
class Run:
    """Global positions `start, start + step, …` (`count` of them)."""

    start: int
    count: int
    step: int = 1

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.count * self.step, self.step)


class Layout:
    """One way to lay `seq_len` positions over `world_size` ranks, each getting the same number."""

    name: str

    def multiple(self, world_size: int) -> int:
        """Sequence lengths must be a multiple of this (tokens); shorter ones are padded up to it."""
        return world_size

    def runs(self, seq_len: int, world_size: int, rank: int) -> tuple[Run, ...]:
        """The runs that `rank` holds, in local order, with ascending positions."""
        raise NotImplementedError

    def positions(self, seq_len: int, world_size: int, rank: int) -> torch.Tensor:
        """Global positions of the rank's tokens: int64 `[seq_len / world_size]`, ascending."""
        return torch.cat([torch.arange(r.count) * r.step + r.start for r in self._runs(seq_len, world_size, rank)])

    def shard(self, x: torch.Tensor, world_size: int, rank: int, dim: int = 1) -> torch.Tensor:
        """The rank's part of `x` along `dim` (a new tensor).

        Raises ValueError if the length does not divide; `easyctx.inputs` pads before it shards.
        """
        runs = self._runs(x.shape[dim], world_size, rank)
        index = (slice(None),) * (dim % x.dim())
        return torch.cat([x[(*index, r.slice)] for r in runs], dim=dim)

    def unshard(self, shards: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
        """The inverse of `shard`: the shards of rank 0, 1, … put back in global order along `dim`."""
        world_size, local = len(shards), shards[0].shape[dim]
        shape = list(shards[0].shape)
        shape[dim] = local * world_size
        out = shards[0].new_empty(shape)
        index = (slice(None),) * (dim % out.dim())
        for rank, shard in enumerate(shards):
            runs = self._runs(local * world_size, world_size, rank)
            for part, run in zip(shard.split([r.count for r in runs], dim=dim), runs, strict=True):
                out[(*index, run.slice)] = part
        return out

    def plan(self, seq_len: int, world_size: int, rank: int, owner: int, mask: Mask = CAUSAL_MASK) -> tuple[Block, ...]:
        """Blocks of causal attention between the queries of `rank` and the keys of `owner`.

        Together they cover exactly the pairs that `mask` allows; block pairs that it hides whole are left out, so
        an empty plan means that nothing is to be computed or sent.
        """
        return _plan(self, seq_len, world_size, rank, owner, mask.within(seq_len))

    def hops(self, seq_len: int, world_size: int, mask: Mask = CAUSAL_MASK) -> tuple[int, ...]:
        """At which distances (query rank - key rank, modulo the ranks) any rank has something to compute."""
        return _hops(self, seq_len, world_size, mask.within(seq_len))

    def _runs(self, seq_len: int, world_size: int, rank: int) -> tuple[Run, ...]:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside 0 .. {world_size - 1}")
        multiple = self.multiple(world_size)
        if seq_len == 0 or seq_len % multiple:
            raise ValueError(
                f"{self.name} layout over {world_size} ranks needs a positive length that is a multiple of "
                f"{multiple}, got {seq_len}: pad to {-(-max(seq_len, 1) // multiple) * multiple} "
                "(prepare_seq_parallel_inputs does it)"
            )
        return self.runs(seq_len, world_size, rank)


class Contiguous(Layout):
    """Rank r holds the r-th stretch of the sequence."""

    name = "contiguous"

    def runs(self, seq_len: int, world_size: int, rank: int) -> tuple[Run, ...]:
        local = seq_len // world_size
        return (Run(rank * local, local),)


class Zigzag(Layout):
    """2P chunks; rank r holds chunks r and 2P - 1 - r, so that causal work is the same on every rank."""

    name = "zigzag"

    def multiple(self, world_size: int) -> int:
        return 2 * world_size

    def runs(self, seq_len: int, world_size: int, rank: int) -> tuple[Run, ...]:
        chunk = seq_len // (2 * world_size)
        return Run(rank * chunk, chunk), Run((2 * world_size - 1 - rank) * chunk, chunk)


class Striped(Layout):
    """Rank r holds positions r, r + P, r + 2P, … (Striped Attention, arXiv 2311.09431)."""

    name = "striped"

    def runs(self, seq_len: int, world_size: int, rank: int) -> tuple[Run, ...]:
        return (Run(rank, seq_len // world_size, world_size),)


class Split(Layout):
    """Every shard of an outer layout, cut into `parts` stretches that neighbouring ranks hold (USP)."""

    def __init__(self, outer: Layout, parts: int) -> None:
        self.outer, self.parts = outer, parts
        self.name = outer.name if parts == 1 else f"{outer.name} split by {parts}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Split) and (other.outer, other.parts) == (self.outer, self.parts)

    def __hash__(self) -> int:
        return hash((self.outer, self.parts))

    def multiple(self, world_size: int) -> int:
        # Every run of a shard divides, so that a part is whole stretches of it.
        return self.outer.multiple(world_size // self.parts) * self.parts

    def runs(self, seq_len: int, world_size: int, rank: int) -> tuple[Run, ...]:
        local = seq_len // world_size
        start = rank % self.parts * local
        outer = self.outer.runs(seq_len, world_size // self.parts, rank // self.parts)
        return tuple(run for _, run in _cut(outer, lambda offset, run: (start - offset, start + local - offset)))


CONTIGUOUS, ZIGZAG, STRIPED = Contiguous(), Zigzag(), Striped()


def _cut(runs: Sequence[Run], bounds: Callable[[int, Run], tuple[int, int]]) -> Iterator[tuple[int, Run]]:
    """(local offset, part) for each run of which something lies within its `bounds(offset, run)`, in its indices."""
    offset = 0
    for run in runs:
        first, last = bounds(offset, run)
        first, last = max(first, 0), min(last, run.count)
        if first < last:
            yield offset + first, Run(run.start + first * run.step, last - first, run.step)
        offset += run.count


def within(runs: Sequence[Run], start: int, stop: int) -> list[tuple[int, Run]]:
    """The parts of runs at global positions `start` to `stop`, with their local offsets."""
    return list(_cut(runs, lambda _, run: (-((run.start - start) // run.step), -((run.start - stop) // run.step))))


@lru_cache(maxsize=16384)
def _plan(layout: Layout, seq_len: int, world_size: int, rank: int, owner: int, mask: Mask) -> tuple[Block, ...]:
    q_runs, k_runs = layout._runs(seq_len, world_size, rank), layout._runs(seq_len, world_size, owner)
    if mask.documents is None:
        return tuple(merge_full(_document_blocks(q_runs, k_runs, 0, seq_len, mask.window, rank == owner)))
    starts_of_rows = mask.documents.starts
    blocks: list[Block] = []
    for row, starts in enumerate(starts_of_rows):
        of_row = None if len(set(starts_of_rows)) == 1 else row
        found: list[Block] = []
        for start, stop in _shared_documents(starts, seq_len, q_runs, k_runs):
            found += merge_full(_document_blocks(q_runs, k_runs, start, stop, mask.window, rank == owner))
        blocks += [replace(block, row=of_row) for block in pack_squares(found)]
        if of_row is None:
            break
    return tuple(blocks)


def _shared_documents(
    starts: tuple[int, ...], seq_len: int, q_runs: Sequence[Run], k_runs: Sequence[Run]
) -> Iterator[tuple[int, int]]:
    """(start, stop) of the documents that may have tokens in runs of both sides."""

    def touched(runs: Sequence[Run]) -> set[int]:
        spans = ((run.start, run.start + (run.count - 1) * run.step) for run in runs)
        return {i for a, b in spans for i in range(bisect_right(starts, a) - 1, bisect_right(starts, b))}

    for i in sorted(touched(q_runs) & touched(k_runs)):
        yield starts[i], starts[i + 1] if i + 1 < len(starts) else seq_len


def _document_blocks(
    q_runs: Sequence[Run], k_runs: Sequence[Run], start: int, stop: int, window: int | None, is_own: bool
) -> list[Block]:
    """The blocks of one document (global positions `start` to `stop`), or of a whole row."""
    q_parts, k_parts = within(q_runs, start, stop), within(k_runs, start, stop)
    if is_own and window is None:
        # Local order is the order of positions, so the mask between local indices is causal whatever the runs.
        if not q_parts:
            return []
        first, (last, last_run) = q_parts[0][0], q_parts[-1]
        local = slice(first, last + last_run.count)
        return [Block(local, local, Band(high=0))]
    blocks = []
    for q_offset, q_run in q_parts:
        for k_offset, k_run in k_parts:
            block = run_block(q_run, k_run, window)
            if block is not None:
                blocks.append(block.shifted(q_offset, k_offset))
    return blocks


def run_block(q_run: Run, k_run: Run, window: int | None) -> Block | None:
    """The block between two runs, which share a step: query index i sees key index j iff j - i lies in a band."""
    assert q_run.step == k_run.step
    step, lead = q_run.step, q_run.start - k_run.start
    high = lead // step
    low = None if window is None else -((window - 1 - lead) // step)
    return band_block(q_run.count, k_run.count, Band(low, high))


def merge_full(blocks: list[Block]) -> list[Block]:
    """The same, with neighbouring unmasked blocks joined: fewer, larger kernel calls."""
    merged: list[Block] = []
    for block in blocks:
        last = merged[-1] if merged else None
        if last is not None and last.band == block.band == FULL:
            if last.k == block.k and last.q.stop == block.q.start:
                merged[-1] = Block(slice(last.q.start, block.q.stop), last.k, FULL)
                continue
            if last.q == block.q and last.k.stop == block.k.start:
                merged[-1] = Block(last.q, slice(last.k.start, block.k.stop), FULL)
                continue
        merged.append(block)
    return merged


@lru_cache(maxsize=256)
def _hops(layout: Layout, seq_len: int, world_size: int, mask: Mask) -> tuple[int, ...]:
    def is_needed(hop: int) -> bool:
        # Mostly a few ranks show what all do, and all pairs of 1,024 ranks would take a minute.
        few = {0, max(hop - 1, 0), hop, world_size - 1}
        looked_at = range(world_size) if mask.documents or isinstance(layout, Split) else sorted(few, reverse=True)
        return any(_plan(layout, seq_len, world_size, r, (r - hop) % world_size, mask) for r in looked_at)

    return tuple(hop for hop in range(world_size) if is_needed(hop))
