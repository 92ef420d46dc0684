"""Layouts: round trip, positions, and plans that cover exactly the causal (and windowed) pairs."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from easyctx.band import CAUSAL, FULL, Band, Block, band_block
from easyctx.layout import CONTIGUOUS, STRIPED, ZIGZAG, Layout

LAYOUTS = [CONTIGUOUS, ZIGZAG, STRIPED]
layouts = st.sampled_from(LAYOUTS)
worlds = st.integers(1, 9)
lengths = st.integers(1, 6)  # in units of the layout's multiple


@given(layouts, worlds, lengths)
def test_unshard_undoes_shard(layout: Layout, world: int, units: int) -> None:
    x = torch.arange(3 * units * layout.multiple(world)).view(3, -1)
    shards = [layout.shard(x, world, rank) for rank in range(world)]
    assert torch.equal(layout.unshard(shards), x)
    assert torch.equal(layout.unshard([s.T for s in shards], dim=0), x.T)


@given(layouts, worlds, lengths)
def test_positions_are_what_shard_takes(layout: Layout, world: int, units: int) -> None:
    length = units * layout.multiple(world)
    for rank in range(world):
        positions = layout.positions(length, world, rank)
        assert torch.equal(layout.shard(torch.arange(length)[None], world, rank)[0], positions)
        assert (positions.diff() > 0).all()


@given(layouts, worlds, lengths, st.none() | st.integers(1, 60))
def test_plan_covers_each_visible_pair_once(layout: Layout, world: int, units: int, window: int | None) -> None:
    length = units * layout.multiple(world)
    hops = layout.num_hops(length, world, window)
    for rank, owner in itertools.product(range(world), repeat=2):
        seen = torch.zeros(length // world, length // world, dtype=torch.int)
        plan = layout.plan(length, world, rank, owner, window)
        for block in plan:
            allowed = block.band.allowed(block.q.stop - block.q.start, block.k.stop - block.k.start)
            assert allowed.any(1).all(), "a query without a key would have no log-sum-exp"
            assert allowed.any(0).all(), "a key without a query is wasted work"
            seen[block.q, block.k] += allowed.int()
        distance = layout.positions(length, world, rank)[:, None] - layout.positions(length, world, owner)[None, :]
        visible = (distance >= 0) & (distance < (window or length + 1))
        assert torch.equal(seen, visible.int())
        assert not plan or (rank - owner) % world <= hops


def test_plans_of_the_design_table() -> None:
    """Full, half and causal blocks as ring, zigzag and striped attention define them: one kernel call a hop."""
    everything, half = slice(0, 8), slice(4, 8)
    own = (Block(everything, everything, CAUSAL),)
    for layout in LAYOUTS:
        assert layout.plan(32, 4, 2, 2) == own
    assert CONTIGUOUS.plan(32, 4, 2, 1) == (Block(everything, everything, FULL),)
    assert CONTIGUOUS.plan(32, 4, 1, 2) == ()
    assert ZIGZAG.plan(32, 4, 2, 1) == (Block(everything, slice(0, 4), FULL),)
    assert ZIGZAG.plan(32, 4, 1, 2) == (Block(half, everything, FULL),)
    assert STRIPED.plan(32, 4, 2, 1) == own
    assert STRIPED.plan(32, 4, 1, 2) == (Block(slice(1, 8), slice(0, 7), CAUSAL),)


def test_zigzag_balances_causal_work() -> None:
    def work(rank: int) -> int:
        blocks = [b for owner in range(4) for b in ZIGZAG.plan(64, 4, rank, owner)]
        return sum(int(b.band.allowed(b.q.stop - b.q.start, b.k.stop - b.k.start).sum()) for b in blocks)

    assert len({work(rank) for rank in range(4)}) == 1


def test_windows_shorten_the_ring() -> None:
    assert CONTIGUOUS.num_hops(64, 4) == 3
    assert CONTIGUOUS.num_hops(64, 4, window=4) == 1
    assert CONTIGUOUS.num_hops(64, 4, window=1) == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_refuses_a_length_that_does_not_divide(layout: Layout) -> None:
    with pytest.raises(ValueError, match=f"multiple of {layout.multiple(3)}, got 13: pad to"):
        layout.shard(torch.zeros(1, 13), 3, 0)
    with pytest.raises(ValueError, match="rank 3 is outside 0 .. 2"):
        layout.positions(12, 3, 3)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(-9, 9), st.integers(-9, 9))
def test_band_block_keeps_exactly_the_allowed_pairs(rows: int, columns: int, low: int, high: int) -> None:
    band = Band(low, high)
    whole = band.allowed(rows, columns)
    block = band_block(rows, columns, band)
    kept = torch.zeros_like(whole)
    if block is not None:
        kept[block.q, block.k] = block.band.allowed(block.q.stop - block.q.start, block.k.stop - block.k.start)
    assert torch.equal(kept, whole)
