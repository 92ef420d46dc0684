"""Layouts: round trip, positions, and plans that cover exactly the causal (and windowed) pairs."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from easyctx.band import CAUSAL, FULL, Band, Block, band_block
from easyctx.documents import Documents
from easyctx.layout import CONTIGUOUS, STRIPED, ZIGZAG, Layout, Split
from easyctx.mask import Mask

LAYOUTS = [CONTIGUOUS, ZIGZAG, STRIPED]
layouts = st.sampled_from(LAYOUTS)
SHARDS = [*LAYOUTS, Split(ZIGZAG, 2), Split(CONTIGUOUS, 3)]
shards = st.sampled_from(SHARDS)
worlds = st.integers(1, 9)
lengths = st.integers(1, 6)  # in units of the layout's multiple


def ranks_of(layout: Layout, world: int) -> int:
    return world * layout.parts if isinstance(layout, Split) else world


@given(shards, worlds, lengths)
def test_unshard_undoes_shard(layout: Layout, world: int, units: int) -> None:
    world = ranks_of(layout, world)
    x = torch.arange(3 * units * layout.multiple(world)).view(3, -1)
    shards = [layout.shard(x, world, rank) for rank in range(world)]
    assert torch.equal(layout.unshard(shards), x)
    assert torch.equal(layout.unshard([s.T for s in shards], dim=0), x.T)


@given(shards, worlds, lengths)
def test_positions_are_what_shard_takes(layout: Layout, world: int, units: int) -> None:
    world = ranks_of(layout, world)
    length = units * layout.multiple(world)
    for rank in range(world):
        positions = layout.positions(length, world, rank)
        assert torch.equal(layout.shard(torch.arange(length)[None], world, rank)[0], positions)
        assert (positions.diff() > 0).all()


def test_parts_of_a_split_shard_are_the_outer_shard() -> None:
    """Ulysses' exchange puts the tokens of neighbouring ranks together: the ring then finds its own layout."""
    for rank in range(3):
        parts = [Split(ZIGZAG, 4).positions(48, 12, 4 * rank + part) for part in range(4)]
        assert torch.equal(torch.cat(parts), ZIGZAG.positions(48, 3, rank))


@st.composite
def masks(draw: st.DrawFn, length: int) -> Mask:
    """Any window and any documents, the same in all rows of the batch or not."""
    window = draw(st.none() | st.integers(1, length + 5))
    rows = draw(st.none() | st.lists(st.sets(st.integers(1, max(length - 1, 1)), max_size=6), min_size=1, max_size=2))
    if rows is None:
        return Mask(window)
    starts = tuple((0, *sorted(s for s in row if s < length)) for row in rows)
    return Mask(window, Documents(length, starts))


def visible_pairs(mask: Mask, length: int, rows: int) -> torch.Tensor:
    """bool [rows, S, S] by definition: causal, within the window, of the same document."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    visible = ((distance >= 0) & (distance < (mask.window or length + 1))).expand(rows, -1, -1).clone()
    if mask.documents is not None:
        ids = mask.documents.ids().expand(rows, -1)
        visible &= ids[:, :, None] == ids[:, None, :]
    return visible


def pairs_of(block: Block) -> torch.Tensor:
    """bool, which pairs of its rectangle a block computes."""
    allowed = block.band.allowed(block.q.stop - block.q.start, block.k.stop - block.k.start)
    if block.cuts:
        same = torch.zeros_like(allowed)
        for a, b in itertools.pairwise(block.cuts):
            same[a:b, a:b] = True
        allowed &= same
    return allowed


@given(st.data(), layouts, worlds, lengths)
def test_plan_covers_each_visible_pair_once(data: st.DataObject, layout: Layout, world: int, units: int) -> None:
    length = units * layout.multiple(world)
    mask = data.draw(masks(length))
    rows = len(mask.documents.starts) if mask.documents else 1
    visible = visible_pairs(mask, length, rows)
    hops = layout.hops(length, world, mask)
    for rank, owner in itertools.product(range(world), repeat=2):
        seen = torch.zeros(rows, length // world, length // world, dtype=torch.int)
        plan = layout.plan(length, world, rank, owner, mask)
        for block in plan:
            allowed = pairs_of(block)
            assert allowed.any(1).all(), "a query without a key would have no log-sum-exp"
            assert allowed.any(0).all(), "a key without a query is wasted work"
            seen[block.rows, block.q, block.k] += allowed.int()
        queries, keys = (layout.positions(length, world, r) for r in (rank, owner))
        assert torch.equal(seen, visible[:, queries][:, :, keys].int())
        assert not plan or (rank - owner) % world in hops


def test_documents_of_a_shard_are_one_block() -> None:
    """Squares along the diagonal go to the kernel together; only the document on a shard's edge needs another rank."""
    mask = Mask(documents=Documents(64, ((0, 5, 11, 20, 40, 44, 60),)))
    [own] = CONTIGUOUS.plan(64, 2, 1, 1, mask)
    assert own.cuts == (0, 8, 12, 28, 32)
    assert own.band == CAUSAL
    assert CONTIGUOUS.plan(64, 2, 1, 0, mask) == (Block(slice(0, 8), slice(20, 32), FULL),)
    apart = Mask(documents=Documents(64, ((0, 32),)))
    assert CONTIGUOUS.plan(64, 2, 1, 0, apart) == ()
    assert CONTIGUOUS.hops(64, 2, apart) == (0,)


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


@pytest.mark.parametrize("layout", SHARDS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("window", [None, 1, 2, 9, 16, 17, 40, 100])
def test_hops_are_those_of_all_pairs(layout: Layout, window: int | None) -> None:
    for size in (1, 2, 5, 12):
        size = size * getattr(layout, "parts", 1)
        length = 4 * layout.multiple(size)
        mask = Mask(window).within(length)
        pairs = itertools.product(range(size), range(size))
        needed = {(rank - owner) % size for rank, owner in pairs if layout.plan(length, size, rank, owner, mask)}
        assert set(layout.hops(length, size, mask)) == needed


def test_windows_shorten_the_ring() -> None:
    assert CONTIGUOUS.hops(64, 4) == (0, 1, 2, 3)
    assert CONTIGUOUS.hops(64, 4, Mask(4)) == (0, 1)
    assert CONTIGUOUS.hops(64, 4, Mask(1)) == (0,)
    assert ZIGZAG.hops(128, 8, Mask(4)) == (0, 1, 7), "chunks' neighbours are on neighbouring ranks"


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
