"""The cost model of attention: FLOPs and bytes as the schedules really have them, and times that behave."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from easyctx.band import Band, Block
from easyctx.cost.attention import attention_cost, is_described, stages_of, typical_ranks
from easyctx.cost.hardware import DEVICES, Cluster
from easyctx.cost.kernels import Curve, KernelRates, fit, kernel_rates
from easyctx.cost.stages import OUTSIDE, Shape, causal_pairs, pairs_of
from easyctx.cost.ulysses_walk import UlyssesWalk
from easyctx.kernel import KERNELS, Saved, Score
from easyctx.layout import CONTIGUOUS
from easyctx.mask import Mask
from easyctx.mesh import Mesh
from easyctx.modes import MODES, Mode
from easyctx.schedule import Attention, Ring
from easyctx.virtual import VirtualRanks

H200 = DEVICES["h200"]
PARALLEL = [mode for mode in MODES.values() if mode.is_sequence_parallel and is_described(mode)]
# Every block at the same rate, so that time is FLOPs.
FLAT = KernelRates("torch_flash", Curve(1e15), Curve(1e15), "made up")
FREE = dataclasses.replace(H200, memory_rate=1e30, nvlink_rate=1e30, network_rate=1e30, nvlink_start=0, network_start=0)


def ring_of(mode: Mode, size: int) -> int | None:
    return max(size // 2, 1) if mode.over == "both" else None


@given(st.integers(1, 9), st.integers(1, 9), st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9))
def test_pairs_of_a_band_are_those_that_its_mask_allows(
    queries: int, keys: int, low: int | None, high: int | None
) -> None:
    band = Band(low, high)
    if low is not None and high is not None and low > high:
        return
    block = Block(slice(3, 3 + queries), slice(1, 1 + keys), band)
    assert pairs_of(block) == int(band.allowed(queries, keys).sum())


def test_pairs_of_a_chain_of_squares() -> None:
    assert pairs_of(Block(slice(0, 5), slice(0, 5), Band(high=0), cuts=(0, 2, 5))) == 3 + 6


@pytest.mark.parametrize("mode", PARALLEL, ids=lambda mode: mode.name)
@pytest.mark.parametrize("size", [2, 3, 4, 6])
@pytest.mark.parametrize("window", [None, 5, 13])
def test_the_work_of_all_ranks_is_every_pair_once(mode: Mode, size: int, window: int | None) -> None:
    if mode.over == "both" and size == 3:
        return  # three ranks have no two axes
    ring = mode.check_ring_degree(ring_of(mode, size), size)
    shape = Shape(8, 12, 12, 16, window)
    for backward in (False, True):
        inner = UlyssesWalk(shape, size // ring, OUTSIDE, backward=backward).inner
        walks = [stages_of(mode, inner, ring, rank, backward, OUTSIDE) for rank in range(ring)]
        pairs = sum(work.pairs for stages in walks for stage in stages for work in stage.work)
        length = 8 * size
        expected = Mask(window).within(length)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < (expected.window or length))
        assert pairs == int(seen.sum()) == causal_pairs(length, window)


@pytest.mark.parametrize("mode", PARALLEL, ids=lambda mode: mode.name)
@pytest.mark.parametrize(("size", "kv_heads"), [(2, 2), (4, 2), (8, 2), (4, 4)])
@pytest.mark.parametrize("window", [None, 6, 20])
def test_bytes_are_those_that_virtual_ranks_send(mode: Mode, size: int, kv_heads: int, window: int | None) -> None:
    tokens, q_heads, head_dim = 8, 8, 4
    degree = ring_of(mode, size)
    ranks = VirtualRanks(size, degree)
    q, k = (torch.zeros(1, tokens, heads, head_dim, dtype=torch.bfloat16) for heads in (q_heads, kv_heads))

    def job(mesh: Mesh) -> None:
        assert mode.schedule is not None
        call = Attention(mode.layout, KERNELS["tiled"], Score(1.0), Mask(window), *mode.axes(mesh))
        out, lse = mode.schedule.forward(q, k, k, call)
        sent.append(ranks.bytes_sent())
        mode.schedule.backward(q, Saved(q, k, k, out.to(q.dtype), lse), call)

    sent: list[int] = []
    ranks.run(job)
    total = ranks.bytes_sent()
    ranks.close()
    assert total == sum(_bytes(mode, Shape(tokens, q_heads, kv_heads, head_dim, window), size, degree))


def _bytes(mode: Mode, shape: Shape, size: int, degree: int | None) -> list[float]:
    """Of every rank, forward and backward."""
    ring = mode.check_ring_degree(degree, size)
    found = []
    for rank, backward in itertools.product(range(size), (False, True)):
        outer = UlyssesWalk(shape, size // ring, OUTSIDE, backward=backward)
        stages = stages_of(mode, outer.inner, ring, rank // (size // ring), backward, OUTSIDE) * outer.groups
        stages += [outer.first(), *(outer.meanwhile(n) for n in range(outer.groups)), outer.last()]
        found.append(sum(message.bytes_sent for stage in stages for message in stage.messages))
    return found


@pytest.mark.parametrize("mode", ["ring_attn", "zigzag_ring_attn", "striped_attn", "dist_flash_attn"])
@pytest.mark.parametrize("window", [None, 700, 3000])
def test_a_few_ranks_stand_for_a_large_ring(mode: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from easyctx.cost import attention

    cluster, shape = Cluster(H200, 20), Shape(1024, 32, 8, 128, window)
    few = [attention_cost(mode, shape, cluster, backward=backward) for backward in (False, True)]
    monkeypatch.setattr(attention, "SMALL_RING", 99)
    attention._cost.cache_clear()
    assert typical_ranks(20, shape) == list(range(20))
    every = [attention_cost(mode, shape, cluster, backward=backward) for backward in (False, True)]
    attention._cost.cache_clear()
    for one, other in zip(few, every, strict=True):
        assert one.seconds == pytest.approx(other.seconds, rel=0.02)


@pytest.mark.parametrize("mode", ["zigzag_ring_attn", "dist_flash_attn", "ulysses_attn", "usp_attn"])
def test_free_links_and_memory_leave_the_kernels_own_time(mode: str) -> None:
    cluster = Cluster(FREE, 8, 2)
    for backward in (False, True):
        cost = attention_cost(
            mode,
            Shape(4096, 32, 8, 128),
            cluster,
            backward=backward,
            kernel=FLAT,
            ring_degree=4 if mode == "usp_attn" else None,
        )
        assert cost.share == pytest.approx(1, rel=1e-3)
        assert cost.exposed_seconds == pytest.approx(0, abs=1e-12)


def test_a_contiguous_ring_takes_as_long_as_its_last_rank() -> None:
    """Of P = 8 ranks the last does 15 / 64 of all pairs where an eighth would be its due: a share of 8 / 15."""
    cost = attention_cost("ring_attn", Shape(4096, 32, 8, 128), Cluster(FREE, 8), kernel=FLAT)
    assert cost.share == pytest.approx(8 / 15, rel=1e-3)


def test_overlap_by_hand() -> None:
    """Zigzag on 2 GPUs, forward: two stages of equal work, the first of which waits for the longer message. Rank 0
    needs all of rank 1's keys, and rank 1 half of rank 0's."""
    slow = dataclasses.replace(FREE, nvlink_rate=1e9, nvlink_start=1e-3)
    cost = attention_cost("zigzag_ring_attn", Shape(2048, 8, 8, 64), Cluster(slow, 2), kernel=FLAT)
    message = 1e-3 + 2048 * 2 * 8 * 64 * 2 / 1e9
    first, second = (pairs * 4 * 8 * 64 / 1e15 for pairs in (2048 * 2049 / 2, 2048 * 1024))
    assert first < message
    assert cost.seconds == pytest.approx(message + second)
    assert cost.exposed_seconds == pytest.approx(message - first)
    assert cost.bytes_sent == 2048 * 2 * 8 * 64 * 2


@given(
    st.sampled_from(["ring_attn", "zigzag_ring_attn", "striped_attn", "dist_flash_attn", "ulysses_attn"]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([1024, 8192, 65536]),
    st.booleans(),
)
def test_slower_parts_never_make_it_faster(mode: str, size: int, tokens: int, backward: bool) -> None:
    def seconds(device=H200, nodes=1, tokens=tokens, passes=OUTSIDE) -> float:  # type: ignore[no-untyped-def]
        shape = Shape(tokens, 32, 8, 128)
        return attention_cost(mode, shape, Cluster(device, size, nodes), backward=backward, passes=passes).seconds

    base = seconds()
    assert base <= seconds(dataclasses.replace(H200, nvlink_rate=H200.nvlink_rate / 3))
    assert base <= seconds(dataclasses.replace(H200, memory_rate=H200.memory_rate / 3))
    assert base <= seconds(nodes=2)
    assert base < seconds(tokens=2 * tokens)
    assert seconds(passes=dataclasses.replace(OUTSIDE, merge=5, add=0)) <= base


def test_the_curve_through_two_points() -> None:
    truth = Curve(600e12, 800)
    fitted = fit([(keys, truth.rate(keys)) for keys in (1000, 4000, 50_000)])
    assert fitted.limit == pytest.approx(truth.limit)
    assert fitted.half == pytest.approx(truth.half)
    assert fit([(1000, 7e14), (9000, 6e14)]).half == 0  # faster at short lengths: no loss to be seen


def test_curves_pass_near_what_was_measured() -> None:
    """Each measured rate within 6%: flash-attn-4's own points differ by 8% without a trend."""
    from easyctx.cost.kernels import POINTS

    for name, points in POINTS.items():
        rates = kernel_rates(H200, name)
        for tokens, forward, backward in points:
            assert rates.forward.rate(tokens / 2) == pytest.approx(forward * 1e12, rel=0.06)
            assert rates.backward.rate(tokens / 2) == pytest.approx(backward * 1e12, rel=0.06)


def test_a_schedule_that_nobody_described_is_said_to_be_one() -> None:
    class New(Ring):
        name = "new"

    mode = Mode("new_attn", "a mode of tomorrow", CONTIGUOUS, New())
    assert not is_described(mode)
    with pytest.raises(ValueError, match="new_attn runs 'new', whose cost is not described: ring, dist_flash"):
        attention_cost(mode, Shape(64, 4, 4, 16), Cluster(H200, 2))


def test_large_clusters_are_quick_to_predict() -> None:
    import time

    begin = time.perf_counter()
    cost = attention_cost("zigzag_ring_attn", Shape(8192, 32, 8, 128), Cluster(H200, 1024, 128), backward=True)
    assert 0 < cost.share < 1
    assert time.perf_counter() - begin < 5
